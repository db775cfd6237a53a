//! The operator's key for snapshots: an X25519 pair, each half as one word.

use std::fmt;
use std::str::FromStr;

use curve25519_dalek::montgomery::MontgomeryPoint;
use sha2::{Digest, Sha256};

const PUBLIC_PREFIX: &str = "chutes-snapshot-1.";
const SECRET_PREFIX: &str = "chutes-snapshot-secret-1.";
const CHECKSUM_BYTES: usize = 4;

/// Why a text is no key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSnapshotKey {
    /// Something else; the text is not repeated, it may be a secret.
    #[error("this is no {0}: one begins with {1}")]
    Other(&'static str, &'static str),
    /// Cut off, or with a wrong character.
    #[error("the {0} is cut off or mistyped: copy all of it, as one word")]
    Damaged(&'static str),
    /// Nothing can be encrypted to it.
    #[error("nothing can be encrypted to this key: make a new one")]
    Useless,
}

fn written(prefix: &str, bytes: &[u8; 32]) -> String {
    let checksum = Sha256::digest(bytes);
    format!(
        "{prefix}{}{}",
        hex::encode(&checksum[..CHECKSUM_BYTES]),
        hex::encode(bytes)
    )
}

fn read(what: &'static str, prefix: &'static str, text: &str) -> Result<[u8; 32], InvalidSnapshotKey> {
    let rest = text.trim().strip_prefix(prefix);
    let rest = rest.ok_or(InvalidSnapshotKey::Other(what, prefix))?;
    let damaged = || InvalidSnapshotKey::Damaged(what);
    let bytes = hex::decode(rest).map_err(|_| damaged())?;
    let (checksum, bytes) = bytes.split_at_checked(CHECKSUM_BYTES).ok_or_else(damaged)?;
    let bytes: [u8; 32] = bytes.try_into().map_err(|_| damaged())?;
    if Sha256::digest(bytes)[..CHECKSUM_BYTES] != *checksum {
        return Err(damaged());
    }
    Ok(bytes)
}

/// The public half: snapshots are encrypted to it. It is no secret.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Recipient([u8; 32]);

impl Recipient {
    /// A short name, the first 8 bytes of the SHA-256 of the key.
    #[must_use]
    pub fn id(&self) -> String {
        hex::encode(&Sha256::digest(self.0)[..8])
    }

    pub(super) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl FromStr for Recipient {
    type Err = InvalidSnapshotKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        read("public key for snapshots", PUBLIC_PREFIX, text).map(Self)
    }
}

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&written(PUBLIC_PREFIX, &self.0))
    }
}

impl fmt::Debug for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recipient({})", self.id())
    }
}

/// The secret half: whoever has it can read all snapshots. Overwritten when dropped, never printed.
pub struct SnapshotKey([u8; 32]);

impl SnapshotKey {
    /// A key out of 32 random bytes.
    #[must_use]
    pub fn new(random: [u8; 32]) -> Self {
        Self(random)
    }

    /// Reads a key file: the line that begins with the secret's word; lines after `#` are for people.
    ///
    /// # Errors
    /// [`InvalidSnapshotKey`]; its text repeats nothing of the file.
    pub fn parse(text: &str) -> Result<Self, InvalidSnapshotKey> {
        let mut lines = text.lines().map(str::trim);
        let line = lines.find(|line| !line.is_empty() && !line.starts_with('#'));
        read("key file for snapshots", SECRET_PREFIX, line.unwrap_or_default()).map(Self)
    }

    /// The text of a key file.
    #[must_use]
    pub fn file_text(&self) -> String {
        format!(
            "# Opens the snapshots of a chutes miner. Whoever has this file can read them: keep it off the hosts.\n\
             # public: {}\n{}\n",
            self.recipient(),
            written(SECRET_PREFIX, &self.0)
        )
    }

    /// The public half.
    #[must_use]
    pub fn recipient(&self) -> Recipient {
        Recipient(MontgomeryPoint::mul_base_clamped(self.0).0)
    }

    pub(super) fn agree(&self, other: &[u8; 32]) -> MontgomeryPoint {
        MontgomeryPoint(*other).mul_clamped(self.0)
    }
}

impl Drop for SnapshotKey {
    fn drop(&mut self) {
        self.0.fill(0);
        // Without this the compiler may leave the write out, since nobody reads it.
        std::hint::black_box(&self.0);
    }
}

impl fmt::Debug for SnapshotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotKey({})", self.recipient().id())
    }
}

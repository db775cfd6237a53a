//! A snapshot outside the cluster: one file, encrypted to a key that only the operator has.
//!
//! ```text
//! "CHUTSAVE" | version 1 | length (4) | head as JSON | ephemeral X25519 key (32) | pieces
//! piece: up to 64 KiB of plain text with ChaCha20-Poly1305; all but the last one are full
//! plain text of all pieces: length (4) | summary as JSON | the snapshot as members send it to each other
//! ```
//! The key of the pieces is HKDF-SHA256 of the X25519 secret, bound to everything before the pieces: whoever
//! changes the head has a file that does not open. A piece's nonce is its number and whether it is the last, so
//! that pieces cannot be moved, repeated or cut off. Integers are little endian. Nothing here reads a file, a
//! clock or randomness; `key.rs` has the operator's key as text.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, Read};

use curve25519_dalek::montgomery::MontgomeryPoint;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::time::UnixMillis;

mod key;

pub use key::{InvalidSnapshotKey, Recipient, SnapshotKey};

const MAGIC: &[u8; 8] = b"CHUTSAVE";
/// Version of the files written today. Old ones are read for ever.
pub const VERSION: u8 = 1;
const INFO: &[u8] = b"chutes-miner snapshot v1";
/// Plain text of one piece.
pub const PIECE_BYTES: usize = 64 * 1024;
const TAG_BYTES: usize = 16;
/// Head and summary grow with nothing but the number of members.
const TEXT_BYTES_MAX: usize = 1024 * 1024;

/// What everybody may know of a snapshot. Names that a reader does not know are left out by it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Name of the cluster.
    pub cluster: String,
    /// Index of the last command in it.
    pub last_index: u64,
    /// When it was taken.
    pub created_at: UnixMillis,
    /// Who can read it: [`Recipient::id`].
    pub recipient: String,
    /// Format of the state in it.
    pub format: u32,
    /// Version of the program that wrote it.
    pub written_by: String,
}

/// What only the key shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Members when it was taken.
    pub members: BTreeSet<u64>,
    /// Rows by table.
    pub rows: BTreeMap<String, u64>,
    /// Size of the plain snapshot.
    pub size_bytes: u64,
}

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Something else.
    #[error("this is no snapshot file")]
    Other,
    /// A newer program wrote it.
    #[error(
        "the snapshot file has version {0}, this program reads up to version {VERSION}: use the newer one"
    )]
    Newer(u8),
    /// Another key is needed.
    #[error("the snapshot is for the key {wanted}, not for {given}")]
    OtherKey {
        /// Whose it is.
        wanted: String,
        /// Whose key was given.
        given: String,
    },
    /// It was changed or cut off.
    #[error("the snapshot file is damaged: {0}")]
    Damaged(&'static str),
    /// The system did not let us read.
    #[error("read the snapshot file: {0}")]
    Io(#[from] io::Error),
}

impl From<ReadError> for io::Error {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Io(error) => error,
            other => Self::new(io::ErrorKind::InvalidData, other.to_string()),
        }
    }
}

/// Encrypts the pieces of one file.
struct Pieces {
    key: LessSafeKey,
    count: u64,
}

impl fmt::Debug for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pieces({})", self.count)
    }
}

impl Pieces {
    /// None when the other side's key is one of the few that give everybody the same secret.
    fn new(shared: &MontgomeryPoint, preamble: &[u8], recipient: &Recipient) -> Option<Self> {
        if shared.0 == [0; 32] {
            return None;
        }
        let okm = Salt::new(HKDF_SHA256, INFO).extract(&shared.0);
        let info = [preamble, recipient.as_bytes()];
        let key = okm.expand(&info, &CHACHA20_POLY1305).map(UnboundKey::from);
        let key = LessSafeKey::new(key.expect("32 bytes are a legal length for HKDF-SHA256"));
        Some(Self { key, count: 0 })
    }

    fn nonce(&mut self, last: bool) -> Nonce {
        let mut nonce = [0; NONCE_LEN];
        nonce[..8].copy_from_slice(&self.count.to_le_bytes());
        nonce[NONCE_LEN - 1] = u8::from(last);
        self.count += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Makes a snapshot file out of a stream of bytes, in constant memory.
#[derive(Debug)]
pub struct Sealer {
    pieces: Pieces,
    waiting: Vec<u8>,
}

impl Sealer {
    /// A file for `recipient`, and its beginning. `ephemeral` must be random, secret and never used again. The
    /// head's `recipient` is filled in here.
    ///
    /// # Errors
    /// [`InvalidSnapshotKey`] when the recipient's key is none.
    pub fn new(
        recipient: &Recipient,
        mut head: Head,
        summary: &Summary,
        ephemeral: [u8; 32],
    ) -> Result<(Self, Vec<u8>), InvalidSnapshotKey> {
        head.recipient = recipient.id();
        let head = serde_json::to_vec(&head).map_err(|_| InvalidSnapshotKey::Useless)?;
        let mut preamble = MAGIC.to_vec();
        preamble.push(VERSION);
        put_text(&mut preamble, &head);
        preamble.extend_from_slice(&MontgomeryPoint::mul_base_clamped(ephemeral).0);
        let shared = MontgomeryPoint(*recipient.as_bytes()).mul_clamped(ephemeral);
        let pieces = Pieces::new(&shared, &preamble, recipient).ok_or(InvalidSnapshotKey::Useless)?;
        let mut waiting = Vec::with_capacity(PIECE_BYTES);
        let summary = serde_json::to_vec(summary).map_err(|_| InvalidSnapshotKey::Useless)?;
        put_text(&mut waiting, &summary);
        Ok((Self { pieces, waiting }, preamble))
    }

    /// Takes bytes; what of the file is ready.
    pub fn put(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.waiting.extend_from_slice(bytes);
        let mut ready = Vec::new();
        // One byte at least waits for the end: the last piece is never known before.
        while self.waiting.len() > PIECE_BYTES {
            let rest = self.waiting.split_off(PIECE_BYTES);
            let piece = std::mem::replace(&mut self.waiting, rest);
            ready.extend(self.seal(piece, false));
        }
        ready
    }

    /// The end of the file.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        let piece = std::mem::take(&mut self.waiting);
        self.seal(piece, true)
    }

    fn seal(&mut self, mut piece: Vec<u8>, last: bool) -> Vec<u8> {
        let nonce = self.pieces.nonce(last);
        let sealed = self
            .pieces
            .key
            .seal_in_place_append_tag(nonce, Aad::empty(), &mut piece);
        sealed.expect("a piece is far below the cipher's limit");
        piece
    }
}

fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    let length = u32::try_from(text.len()).expect("names and counts stay far below 4 GiB");
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(text);
}

/// A snapshot file whose head has been read.
#[derive(Debug)]
pub struct Sealed<R> {
    input: R,
    head: Head,
    preamble: Vec<u8>,
}

impl<R: Read> Sealed<R> {
    /// Reads the head. Without the key nothing says that it is true.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn open(mut input: R) -> Result<Self, ReadError> {
        let mut preamble = vec![0; MAGIC.len() + 1];
        input
            .read_exact(&mut preamble)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => ReadError::Other,
                _ => error.into(),
            })?;
        match preamble.split_at(MAGIC.len()) {
            (magic, _) if magic != MAGIC => return Err(ReadError::Other),
            (_, [VERSION]) => {}
            (_, [version]) if *version > VERSION => return Err(ReadError::Newer(*version)),
            _ => return Err(ReadError::Damaged("its version makes no sense")),
        }
        let text = take_text(&mut input)?;
        let head = from_json(&text, "its head makes no sense")?;
        put_text(&mut preamble, &text);
        let mut ephemeral = [0; 32];
        input.read_exact(&mut ephemeral).map_err(early_end)?;
        preamble.extend_from_slice(&ephemeral);
        Ok(Self {
            input,
            head,
            preamble,
        })
    }

    /// What the file says of itself.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Opens it with the key. What is read then is true as far as it was read; the end is checked by the read
    /// that finds it.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn unseal(self, key: &SnapshotKey) -> Result<Opened<R>, ReadError> {
        let recipient = key.recipient();
        if self.head.recipient != recipient.id() {
            return Err(ReadError::OtherKey {
                wanted: self.head.recipient,
                given: recipient.id(),
            });
        }
        let (_, ephemeral) = self.preamble.split_at(self.preamble.len() - 32);
        let ephemeral: [u8; 32] = ephemeral
            .try_into()
            .map_err(|_| ReadError::Damaged("it has no key"))?;
        let shared = key.agree(&ephemeral);
        let pieces = Pieces::new(&shared, &self.preamble, &recipient);
        let mut opened = Opened {
            input: self.input,
            head: self.head,
            summary: Summary {
                members: BTreeSet::new(),
                rows: BTreeMap::new(),
                size_bytes: 0,
            },
            pieces: pieces.ok_or(ReadError::Damaged("its key makes no sense"))?,
            ahead: Vec::with_capacity(PIECE_BYTES + TAG_BYTES + 1),
            plain: Vec::new(),
            taken: 0,
            ended: false,
        };
        let text = take_text(&mut opened)?;
        opened.summary = from_json(&text, "its summary makes no sense")?;
        Ok(opened)
    }
}

/// The plain snapshot in a file, as a stream.
#[derive(Debug)]
pub struct Opened<R> {
    input: R,
    head: Head,
    summary: Summary,
    pieces: Pieces,
    /// Of the next piece, as it stands in the file.
    ahead: Vec<u8>,
    plain: Vec<u8>,
    taken: usize,
    ended: bool,
}

impl<R: Read> Opened<R> {
    /// What the file says of itself; now it is known to be true.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// What is in it.
    #[must_use]
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    fn next_piece(&mut self) -> Result<(), ReadError> {
        let full = PIECE_BYTES + TAG_BYTES;
        // One byte more says whether there is another piece.
        let wanted = full + 1 - self.ahead.len();
        let limit = u64::try_from(wanted).unwrap_or(u64::MAX);
        self.input.by_ref().take(limit).read_to_end(&mut self.ahead)?;
        let last = self.ahead.len() <= full;
        let rest = self.ahead.split_off(self.ahead.len().min(full));
        let mut piece = std::mem::replace(&mut self.ahead, rest);
        let nonce = self.pieces.nonce(last);
        let plain = self.pieces.key.open_in_place(nonce, Aad::empty(), &mut piece);
        let length = plain
            .map_err(|_| ReadError::Damaged("it was changed or cut off"))?
            .len();
        piece.truncate(length);
        (self.plain, self.taken, self.ended) = (piece, 0, last);
        Ok(())
    }
}

impl<R: Read> Read for Opened<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.plain.len() {
            if self.ended || out.is_empty() {
                return Ok(0);
            }
            self.next_piece()?;
        }
        let left = &self.plain[self.taken..];
        let length = left.len().min(out.len());
        out[..length].copy_from_slice(&left[..length]);
        self.taken += length;
        Ok(length)
    }
}

fn early_end(error: io::Error) -> ReadError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ReadError::Damaged("it ends early"),
        _ => error.into(),
    }
}

fn take_text(input: &mut impl Read) -> Result<Vec<u8>, ReadError> {
    let mut length = [0; 4];
    input.read_exact(&mut length).map_err(early_end)?;
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > TEXT_BYTES_MAX {
        return Err(ReadError::Damaged("a length in it makes no sense"));
    }
    let mut text = vec![0; length];
    input.read_exact(&mut text).map_err(early_end)?;
    Ok(text)
}

fn from_json<T: DeserializeOwned>(text: &[u8], damage: &'static str) -> Result<T, ReadError> {
    serde_json::from_slice(text).map_err(|_| ReadError::Damaged(damage))
}

#[cfg(test)]
mod tests;

//! Sealed values: secrets that the replicated state carries, opened only with the miner's seed.
//!
//! A sealed value is `version 1 | 12 bytes nonce | ChaCha20-Poly1305 ciphertext and tag` under a key derived from the
//! seed by HKDF-SHA256; its associated data binds the version and the label of its kind. Old versions are read for
//! ever. The caller brings the nonce: nothing here is random.

use std::fmt;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use serde::{Deserialize, Serialize};

/// Bytes of a nonce. No two values of one seed may share theirs: they are random.
pub const NONCE_BYTES: usize = ring::aead::NONCE_LEN;

/// Version byte of the values sealed today.
const VERSION: u8 = 1;
/// Salt of the derivation: separates these keys from any other use of the seed.
const SALT: &[u8] = b"chutes-miner sealing";
/// Domain label of version 1.
const INFO: &[u8] = b"chacha20-poly1305 v1";

/// What a sealed value is. A value sealed as one kind does not open as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SealedKind {
    /// Private key of the cluster's certificate authority.
    ClusterCaKey,
    /// Launch token of a deployment.
    LaunchToken,
    /// Kubeconfig of a worker.
    Kubeconfig,
    /// Credentials for pulling images.
    PullSecret,
}

impl SealedKind {
    /// The label bound into the sealed bytes. Never changes.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::ClusterCaKey => "cluster-ca-key",
            Self::LaunchToken => "launch-token",
            Self::Kubeconfig => "kubeconfig",
            Self::PullSecret => "pull-secret",
        }
    }
}

/// Seals and opens for the holders of one seed.
pub struct SealingKey(LessSafeKey);

impl SealingKey {
    /// Derives the key.
    ///
    /// # Panics
    /// Never: the length is a legal one.
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let derived = Salt::new(HKDF_SHA256, SALT).extract(seed);
        let key = derived
            .expand(&[INFO], &CHACHA20_POLY1305)
            .map(UnboundKey::from)
            .expect("32 bytes are a legal length for HKDF-SHA256");
        Self(LessSafeKey::new(key))
    }

    /// Seals a secret; none if it is longer than the cipher allows.
    #[must_use]
    pub fn seal(&self, kind: SealedKind, nonce: [u8; NONCE_BYTES], plaintext: &[u8]) -> Option<Vec<u8>> {
        let mut body = plaintext.to_vec();
        let bound = Aad::from(associated_data(VERSION, kind));
        let unique = Nonce::assume_unique_for_key(nonce);
        self.0.seal_in_place_append_tag(unique, bound, &mut body).ok()?;
        let mut sealed = Vec::with_capacity(1 + NONCE_BYTES + body.len());
        sealed.push(VERSION);
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(&body);
        Some(sealed)
    }

    /// Opens a sealed value; none if it is cut, altered, of another kind, of another seed or of a newer version.
    #[must_use]
    pub fn unseal(&self, kind: SealedKind, sealed: &[u8]) -> Option<Vec<u8>> {
        let (&version, rest) = sealed.split_first()?;
        if version != VERSION {
            return None;
        }
        let (nonce, body) = rest.split_at_checked(NONCE_BYTES)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut body = body.to_vec();
        let bound = Aad::from(associated_data(version, kind));
        let plain = self.0.open_in_place(nonce, bound, &mut body).ok()?.len();
        body.truncate(plain);
        Some(body)
    }
}

impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealingKey(..)")
    }
}

fn associated_data(version: u8, kind: SealedKind) -> Vec<u8> {
    let mut data = vec![version];
    data.extend_from_slice(kind.label().as_bytes());
    data
}

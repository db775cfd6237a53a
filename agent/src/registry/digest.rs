//! Checks of what is received against a digest, while it streams.

use ring::digest::{Context, SHA256, SHA512};

use crate::registry::path::{Algorithm, Digest};

/// Hashes bytes as they pass and says at the end whether they were what was asked for.
pub struct Verifier {
    context: Context,
    expected: Digest,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Verifier({})", self.expected)
    }
}

impl Verifier {
    /// For one body.
    #[must_use]
    pub fn new(expected: Digest) -> Self {
        let context = Context::new(match expected.algorithm() {
            Algorithm::Sha256 => &SHA256,
            Algorithm::Sha512 => &SHA512,
        });
        Self { context, expected }
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
    }

    /// True if all bytes together have the digest.
    #[must_use]
    pub fn matches(self) -> bool {
        hex::encode(self.context.finish()) == self.expected.hex()
    }
}

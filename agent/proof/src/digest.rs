//! SHA-256 over length-prefixed fields, so that no two lists of fields have the same bytes.

use sha2::{Digest, Sha256};

/// First field of every hash. The number changes whenever any result of this crate changes.
const DOMAIN: &[u8] = b"chutes-agent proof 1";

/// Hashes the domain, the purpose and the fields.
pub(crate) fn hash_fields(purpose: &str, fields: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for field in [DOMAIN, purpose.as_bytes()].iter().chain(fields) {
        hasher.update((field.len() as u64).to_le_bytes());
        hasher.update(field);
    }
    hasher.finalize().into()
}

/// The `index`-th 64-bit word (0 to 3) of a hash, little-endian.
pub(crate) fn word(hash: &[u8; 32], index: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash[index * 8..index * 8 + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_cannot_be_shifted_into_each_other() {
        assert_ne!(hash_fields("t", &[b"ab", b"c"]), hash_fields("t", &[b"a", b"bc"]));
        assert_ne!(hash_fields("t", &[b"ab"]), hash_fields("t", &[b"ab", b""]));
        assert_ne!(hash_fields("t", &[b"ab"]), hash_fields("u", &[b"ab"]));
    }
}

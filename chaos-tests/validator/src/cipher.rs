//! AES-128-CBC with PKCS#7 padding, the symmetric cipher between a chute and its validator.

use aes::Aes128;
use cbc::cipher::block_padding::Pkcs7;
use cbc::cipher::{BlockDecryptMut, BlockEncryptMut, KeyIvInit};

/// Bytes of a key and of an initialisation vector.
pub(crate) const BLOCK: usize = 16;

/// Encrypts.
pub(crate) fn encrypt(key: &[u8; BLOCK], iv: &[u8; BLOCK], plaintext: &[u8]) -> Vec<u8> {
    cbc::Encryptor::<Aes128>::new(key.into(), iv.into()).encrypt_padded_vec_mut::<Pkcs7>(plaintext)
}

/// Decrypts; nothing when the length or the padding is wrong.
pub(crate) fn decrypt(key: &[u8; BLOCK], iv: &[u8; BLOCK], ciphertext: &[u8]) -> Option<Vec<u8>> {
    cbc::Decryptor::<Aes128>::new(key.into(), iv.into())
        .decrypt_padded_vec_mut::<Pkcs7>(ciphertext)
        .ok()
}

/// Sixteen bytes from hexadecimal digits.
pub(crate) fn block_from_hex(text: &str) -> Option<[u8; BLOCK]> {
    hex::decode(text).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_vector_comes_out() {
        // NIST SP 800-38A, F.2.1, first block.
        let key = block_from_hex("2b7e151628aed2a6abf7158809cf4f3c").expect("16 bytes");
        let iv = block_from_hex("000102030405060708090a0b0c0d0e0f").expect("16 bytes");
        let plaintext = hex::decode("6bc1bee22e409f96e93d7e117393172a").expect("hex");
        let sealed = encrypt(&key, &iv, &plaintext);
        assert_eq!(hex::encode(&sealed[..16]), "7649abac8119b246cee98e9b12e9197d");
        assert_eq!(sealed.len(), 32, "a whole block of padding follows");
        assert_eq!(decrypt(&key, &iv, &sealed), Some(plaintext));
        assert_eq!(decrypt(&key, &iv, &sealed[..17]), None);
    }
}

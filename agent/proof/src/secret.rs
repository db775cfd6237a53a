//! Encryption to a proof: only who did the work for that device, seed and iteration count can decrypt.
//!
//! A ciphertext is an initialisation vector of 16 bytes, the text under ChaCha20-Poly1305, and its tag.
//! The key comes by HKDF-SHA256 from the proof's last state with the vector as salt, so every vector has
//! its own key and the cipher's nonce can be zero.

use protocol::gpu::DeviceInfo;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};

use crate::Error;
use crate::profile::Profile;
use crate::work::{Proved, Secret, prove};

/// Bytes of the initialisation vector in front of each ciphertext.
pub const IV_BYTES: usize = 16;
/// Bytes of the authentication tag at the end.
pub const TAG_BYTES: usize = 16;
/// The longest ciphertext that is decrypted, in bytes.
pub const CIPHERTEXT_BYTES_MAX: usize = 64 * 1024;

const HEADER: &[u8] = b"chutes-agent proof 1 text";

fn key(secret: &Secret, iv: &[u8]) -> LessSafeKey {
    let seed = secret.seed.to_le_bytes();
    let info = [HEADER, secret.uuid.as_bytes(), &seed];
    let extracted = Salt::new(HKDF_SHA256, iv).extract(&secret.state);
    let expanded = extracted
        .expand(&info, &CHACHA20_POLY1305)
        .expect("32 bytes are within HKDF's limit");
    LessSafeKey::new(UnboundKey::from(expanded))
}

fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

fn seal(secret: &Secret, plaintext: &str, iv: [u8; IV_BYTES]) -> Vec<u8> {
    let mut text = plaintext.as_bytes().to_vec();
    key(secret, &iv)
        .seal_in_place_append_tag(nonce(), Aad::from(HEADER), &mut text)
        .expect("texts are far below the cipher's limit");
    [&iv[..], &text].concat()
}

/// Encrypts a text to a device, as a verifier that does the whole work itself. `iv` must be random.
#[must_use]
pub fn encrypt(
    device: &DeviceInfo,
    plaintext: &str,
    seed: u64,
    iterations: u32,
    iv: [u8; IV_BYTES],
    profile: &Profile,
) -> Vec<u8> {
    seal(&prove(device, seed, iterations, profile).secret, plaintext, iv)
}

/// Decrypts what was encrypted to this proof.
///
/// # Errors
/// [`Error::CiphertextLength`], [`Error::WrongKey`], [`Error::NotText`].
pub fn decrypt(proved: &Proved, blob: &[u8]) -> Result<String, Error> {
    if !(IV_BYTES + TAG_BYTES..=CIPHERTEXT_BYTES_MAX).contains(&blob.len()) {
        return Err(Error::CiphertextLength(blob.len()));
    }
    let (iv, sealed) = blob.split_at(IV_BYTES);
    let mut sealed = sealed.to_vec();
    let text = key(&proved.secret, iv)
        .open_in_place(nonce(), Aad::from(HEADER), &mut sealed)
        .map_err(|_| Error::WrongKey)?;
    String::from_utf8(text.to_vec()).map_err(|_| Error::NotText)
}

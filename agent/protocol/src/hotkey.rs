//! sr25519 key pairs and SS58 addresses, as Substrate chains use them.
//!
//! Facts (`validator-protocol`, section 1.1): signing context `substrate`, message = raw bytes, secret
//! expanded with schnorrkel's Ed25519 mode, address = base58 of prefix 42, public key and two bytes of
//! blake2b-512 over `SS58PRE`.

use std::fmt;

use blake2::{Blake2b512, Digest};
use schnorrkel::{ExpansionMode, Keypair, MiniSecretKey, PublicKey, Signature};
use serde::{Deserialize, Serialize};

const SIGNING_CONTEXT: &[u8] = b"substrate";
const SS58_PREFIX: u8 = 42;

/// Why a text is no address, seed or signature.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    /// Not base58, wrong length, wrong network prefix or wrong checksum.
    #[error("{0:?} is not an SS58 address with prefix 42")]
    Address(String),
    /// Not 32 bytes of hexadecimal. The text is not repeated: it may be most of a secret.
    #[error("the seed is not 64 hexadecimal digits (with or without 0x)")]
    Seed,
    /// The hotkey file is not the JSON that wallets write.
    #[error("the hotkey file has no usable \"secretSeed\": {0}")]
    File(String),
}

/// The SS58 address of a miner or validator: 48 characters of base58, case-sensitive.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Hotkey(String);

impl Hotkey {
    /// Checks an address from outside, checksum included.
    ///
    /// # Errors
    /// [`InvalidKey::Address`].
    pub fn parse(text: &str) -> Result<Self, InvalidKey> {
        let hotkey = Self(text.to_owned());
        match hotkey.public_key_bytes() {
            Some(_) => Ok(hotkey),
            None => Err(InvalidKey::Address(text.chars().take(64).collect())),
        }
    }

    /// The address of a public key.
    #[must_use]
    pub fn from_public_key(public_key: &[u8; 32]) -> Self {
        let mut raw = vec![SS58_PREFIX];
        raw.extend_from_slice(public_key);
        let checksum = ss58_checksum(&raw);
        raw.extend_from_slice(&checksum);
        Self(bs58::encode(raw).into_string())
    }

    /// The text of the address.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The address in lower case, as image names carry it. Lossy: it can only be looked up in a table.
    #[must_use]
    pub fn lower(&self) -> String {
        self.0.to_lowercase()
    }

    fn public_key_bytes(&self) -> Option<[u8; 32]> {
        let raw = bs58::decode(&self.0).into_vec().ok()?;
        let (body, checksum) = raw.split_at_checked(33)?;
        let (prefix, public_key) = body.split_first()?;
        let fits = *prefix == SS58_PREFIX && checksum == ss58_checksum(body);
        if fits { public_key.try_into().ok() } else { None }
    }

    /// True if `signature` was made over `message` by this address's key.
    #[must_use]
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let Some(bytes) = self.public_key_bytes() else {
            return false;
        };
        let (Ok(key), Ok(signature)) = (PublicKey::from_bytes(&bytes), Signature::from_bytes(signature))
        else {
            return false;
        };
        key.verify_simple(SIGNING_CONTEXT, message, &signature).is_ok()
    }
}

fn ss58_checksum(body: &[u8]) -> [u8; 2] {
    let hash = Blake2b512::new()
        .chain_update(b"SS58PRE")
        .chain_update(body)
        .finalize();
    [hash[0], hash[1]]
}

impl fmt::Display for Hotkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Hotkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A key pair that can sign. Its `Debug` shows the address only.
pub struct Signer {
    keypair: Keypair,
    hotkey: Hotkey,
}

impl Signer {
    /// From a 32-byte seed.
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let mini = MiniSecretKey::from_bytes(seed).expect("32 bytes are always a mini secret key");
        let keypair = mini.expand_to_keypair(ExpansionMode::Ed25519);
        let hotkey = Hotkey::from_public_key(&keypair.public.to_bytes());
        Self { keypair, hotkey }
    }

    /// From 64 hexadecimal digits, with or without `0x`.
    ///
    /// # Errors
    /// [`InvalidKey::Seed`].
    pub fn from_seed_hex(text: &str) -> Result<Self, InvalidKey> {
        Ok(Self::from_seed(&seed_from_hex(text)?))
    }

    /// The address of this key.
    #[must_use]
    pub fn hotkey(&self) -> &Hotkey {
        &self.hotkey
    }

    /// Signs; 128 lower-case hexadecimal digits, no `0x`. Signatures are randomised.
    #[must_use]
    pub fn sign_hex(&self, message: &[u8]) -> String {
        hex::encode(self.keypair.sign_simple(SIGNING_CONTEXT, message).to_bytes())
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.hotkey)
    }
}

/// Reads a seed of 64 hexadecimal digits, with or without `0x`.
///
/// # Errors
/// [`InvalidKey::Seed`].
pub fn seed_from_hex(text: &str) -> Result<[u8; 32], InvalidKey> {
    let text = text.trim();
    let bytes = hex::decode(text.strip_prefix("0x").unwrap_or(text)).map_err(|_| InvalidKey::Seed)?;
    bytes.try_into().map_err(|_| InvalidKey::Seed)
}

/// Reads the seed from a hotkey file as wallets write it: JSON with `ss58Address` and `secretSeed`.
///
/// # Errors
/// [`InvalidKey::File`] when the JSON or the member is missing, or when the address in the file is not the
/// seed's; [`InvalidKey::Seed`] when the seed is malformed.
pub fn seed_from_hotkey_file(text: &str) -> Result<[u8; 32], InvalidKey> {
    #[derive(Deserialize)]
    struct HotkeyFile {
        #[serde(rename = "secretSeed")]
        secret_seed: Option<String>,
        #[serde(rename = "ss58Address")]
        ss58_address: Option<String>,
    }
    let file: HotkeyFile =
        serde_json::from_str(text).map_err(|_| InvalidKey::File("it is not a JSON object".to_owned()))?;
    let seed = file.secret_seed.ok_or_else(|| {
        InvalidKey::File("the member is missing (is this an encrypted or public-only key?)".to_owned())
    })?;
    let seed = seed_from_hex(&seed)?;
    let derived = Signer::from_seed(&seed);
    match file.ss58_address {
        Some(address) if address != derived.hotkey().as_str() => Err(InvalidKey::File(format!(
            "\"ss58Address\" says {address} but the seed belongs to {}",
            derived.hotkey()
        ))),
        _ => Ok(seed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: &str = "5CcyqxXnJucaCnQQvvUg5EPzj1uoNAxACZvzArHw5aVDvgNH";
    const V: &str = "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq";

    /// Vectors of the protocol reference, section 1.8, made with the miner's and validator's own libraries.
    #[test]
    fn addresses_match_the_reference() {
        let seeds = [
            ("01".repeat(32), M),
            ("02".repeat(32), V),
            (
                "e031170f32b4cda05df2f3cf6bc8d76827b683bbce23d9fa960c0b3fc21641b8".to_owned(),
                "5E6xfU3oNU7y1a7pQwoc31fmUjwBZ2gKcNCw8EXsdtCQieUQ",
            ),
        ];
        for (seed, address) in seeds {
            assert_eq!(
                Signer::from_seed_hex(&seed)
                    .expect("valid seed")
                    .hotkey()
                    .as_str(),
                address
            );
            assert_eq!(
                Signer::from_seed_hex(&format!("0x{seed}"))
                    .expect("0x is allowed")
                    .hotkey()
                    .as_str(),
                address
            );
        }
    }

    #[test]
    fn signatures_of_the_reference_verify() {
        let rows = [
            (
                M,
                format!("{M}:1735689600:miner"),
                "b62c2d9af7a6e4966e097221968a4f9bd620de5645803e47a731ea00f1ebcd2fdae16ec779a20f6288c494749399a0f8b7ee7d6c50b9ff4a0f51e1212e773583",
            ),
            (
                M,
                format!("{M}:1735689600:bbd02bf9a14d02d41f6b78dd36c79838d910f5a22937722109bf0035254b62f8"),
                "a4abc6d5322c59c675ccf5d120d23c5894e26b890095b4af483ff8aa77f595717f785dacda4b93ee3445e3f630dd18c43d392a9e1076d8531b81d9508d21dd8a",
            ),
            (
                V,
                format!("{M}:{V}:1735689600:graval"),
                "5874eace8d813a400d7567428eef52f1f6bba600d7a24c1f7f1416f4a7565557fa105333a68685ff0692bfd0d0292c7be875fa8554c86840af78515a68ef688f",
            ),
            (
                M,
                format!("{M}:{M}:1735689600:management"),
                "8e8b7d327ed2568f148b40a9b5e2606f53416ba7def89d2fcaeda4373f21d216ac82d2a35826769db694424d6f26e610a02de88a47dca8bf27e389d5e1f26386",
            ),
        ];
        for (address, message, signature) in rows {
            let key = Hotkey::parse(address).expect("valid address");
            let signature = hex::decode(signature).expect("hex");
            assert!(key.verifies(message.as_bytes(), &signature), "{message}");
            assert!(
                !key.verifies(format!("{message}x").as_bytes(), &signature),
                "{message}"
            );
        }
    }

    #[test]
    fn a_fresh_signature_verifies_and_garbage_does_not() {
        let signer = Signer::from_seed(&[7; 32]);
        let signature = hex::decode(signer.sign_hex(b"message")).expect("hex");
        assert!(signer.hotkey().verifies(b"message", &signature));
        for garbage in [vec![], vec![0; 64], vec![0xff; 64], vec![1; 63]] {
            assert!(!signer.hotkey().verifies(b"message", &garbage));
        }
    }

    #[test]
    fn wrong_addresses_are_refused() {
        for bad in ["", "5Ccy", &M.to_lowercase(), "0x189dac", &M.replace('c', "d")] {
            assert!(Hotkey::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hotkey_files_are_read_and_checked() {
        let seed = format!("0x{}", "01".repeat(32));
        let good = format!(r#"{{"ss58Address":"{M}","secretSeed":"{seed}"}}"#);
        assert_eq!(seed_from_hotkey_file(&good), Ok([1; 32]));
        let other = format!(r#"{{"ss58Address":"{V}","secretSeed":"{seed}"}}"#);
        assert!(matches!(seed_from_hotkey_file(&other), Err(InvalidKey::File(_))));
        assert!(matches!(seed_from_hotkey_file("{}"), Err(InvalidKey::File(_))));
        assert!(matches!(seed_from_hotkey_file("seed"), Err(InvalidKey::File(_))));
    }
}

//! The seed and what is derived from it: the signing key and the sealing key ([`protocol::sealing`]).

use std::fmt;
use std::sync::Mutex;

use protocol::hotkey::{Hotkey, InvalidKey, Signer, seed_from_hex, seed_from_hotkey_file};
use protocol::sealing::{NONCE_BYTES, SealingKey};
use protocol::signing::{
    HOTKEY_HEADER, Headers, MINER_HEADER, NONCE_HEADER, SIGNATURE_HEADER, VALIDATOR_HEADER,
};
use protocol::time::UnixMillis;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use super::{Error, MessageKind, PLAINTEXT_BYTES_MAX, Result, SealedKind};

/// The 32 bytes that everything is derived from. Overwritten when dropped, never printed.
pub struct Seed([u8; 32]);

impl Seed {
    /// Takes the bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Reads a seed file: 64 hexadecimal digits (with or without `0x`), or a wallet's hotkey JSON.
    ///
    /// # Errors
    /// [`InvalidKey`]; its text repeats nothing of the file.
    pub fn parse(text: &str) -> std::result::Result<Self, InvalidKey> {
        let read = if text.trim_start().starts_with('{') {
            seed_from_hotkey_file
        } else {
            seed_from_hex
        };
        read(text).map(Self)
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        self.0.fill(0);
        // Without this the compiler may leave the write out, since nobody reads it.
        std::hint::black_box(&self.0);
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed(..)")
    }
}

/// What a signer answers: the caller knows the rest of the headers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// Time of signing in whole Unix seconds.
    pub nonce: u64,
    /// 128 hexadecimal digits.
    pub signature: String,
}

impl Signed {
    /// The headers of a request of this kind.
    #[must_use]
    pub fn headers(self, kind: &MessageKind, hotkey: &Hotkey) -> Headers {
        let mut headers = match kind {
            MessageKind::OwnDevices => {
                vec![
                    (MINER_HEADER, hotkey.to_string()),
                    (VALIDATOR_HEADER, hotkey.to_string()),
                ]
            }
            _ => vec![(HOTKEY_HEADER, hotkey.to_string())],
        };
        headers.push((NONCE_HEADER, self.nonce.to_string()));
        headers.push((SIGNATURE_HEADER, self.signature));
        headers
    }
}

/// Where the nonces of sealed values come from.
enum Nonces {
    System(SystemRandom),
    /// The simulation's: the same seed gives the same bytes. Never with a real key.
    Seeded(Mutex<fastrand::Rng>),
}

/// Signing key and sealing key.
pub struct Key {
    signer: Signer,
    sealing: SealingKey,
    nonces: Nonces,
}

impl Key {
    /// Derives both keys.
    #[must_use]
    pub fn new(seed: &Seed) -> Self {
        Self {
            signer: Signer::from_seed(&seed.0),
            sealing: SealingKey::from_seed(&seed.0),
            nonces: Nonces::System(SystemRandom::new()),
        }
    }

    /// As [`Key::new`], but sealing is repeatable from `rng`: for the simulation alone.
    #[must_use]
    pub fn for_simulation(seed: &Seed, rng: fastrand::Rng) -> Self {
        Self {
            nonces: Nonces::Seeded(Mutex::new(rng)),
            ..Self::new(seed)
        }
    }

    /// The address of this key.
    #[must_use]
    pub fn hotkey(&self) -> &Hotkey {
        self.signer.hotkey()
    }

    /// Signs a message of an enumerated kind at this time.
    #[must_use]
    pub fn sign(&self, kind: &MessageKind, now: UnixMillis) -> Signed {
        let (hotkey, nonce, tail) = (self.hotkey(), now.unix_seconds(), kind.tail());
        let message = match kind {
            MessageKind::OwnDevices => format!("{hotkey}:{hotkey}:{nonce}:{tail}"),
            _ => format!("{hotkey}:{nonce}:{tail}"),
        };
        Signed {
            nonce,
            signature: self.signer.sign_hex(message.as_bytes()),
        }
    }

    /// Seals a secret.
    ///
    /// # Errors
    /// [`Error::TooLong`]; [`Error::Unavailable`] when the system has no randomness.
    pub fn seal(&self, kind: SealedKind, plaintext: &[u8]) -> Result<Vec<u8>> {
        if plaintext.len() > PLAINTEXT_BYTES_MAX {
            return Err(Error::TooLong(plaintext.len()));
        }
        let mut nonce = [0; NONCE_BYTES];
        match &self.nonces {
            Nonces::System(random) => random
                .fill(&mut nonce)
                .map_err(|_| Error::Unavailable("no randomness".to_owned()))?,
            Nonces::Seeded(rng) => rng
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .fill(&mut nonce),
        }
        let sealed = self.sealing.seal(kind, nonce, plaintext);
        sealed.ok_or(Error::TooLong(plaintext.len()))
    }

    /// Opens a sealed value.
    ///
    /// # Errors
    /// [`Error::NotOpened`].
    pub fn unseal(&self, kind: SealedKind, sealed: &[u8]) -> Result<Vec<u8>> {
        let opened = self.sealing.unseal(kind, sealed);
        opened.ok_or(Error::NotOpened(kind.label()))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.hotkey())
    }
}

#[cfg(test)]
mod tests {
    use protocol::signing::{
        Purpose, Tail, VALIDATOR_NONCE_WINDOW_SECONDS, check_request_to_miner, check_request_to_validator,
    };
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::signer::BodyRoute;

    const NOW: UnixMillis = UnixMillis(1_735_689_600_000);

    fn key() -> Key {
        Key::for_simulation(&Seed::new([1; 32]), fastrand::Rng::with_seed(7))
    }

    fn find<'a>(headers: &'a Headers) -> impl Fn(&str) -> Option<&'a str> {
        move |name| headers.iter().find(|(n, _)| n == &name).map(|(_, v)| v.as_str())
    }

    #[test]
    fn every_kind_is_signed_as_validators_check_it() {
        let key = key();
        let rows = [
            (MessageKind::SocketAuth, Purpose::Sockets),
            (MessageKind::Registry, Purpose::Registry),
            (MessageKind::MinerRead, Purpose::Miner),
            (MessageKind::ReleaseJob, Purpose::Miner),
            (MessageKind::LaunchConfig, Purpose::Launch),
            (MessageKind::DeleteInstance, Purpose::Instances),
            (MessageKind::DeleteNode, Purpose::Nodes),
            (MessageKind::VerificationStatus, Purpose::Graval),
        ];
        for (kind, purpose) in rows {
            let headers = key.sign(&kind, NOW).headers(&kind, key.hotkey());
            let checked = check_request_to_validator(
                find(&headers),
                NOW,
                VALIDATOR_NONCE_WINDOW_SECONDS,
                &Tail::Purpose(purpose),
            );
            assert_eq!(checked.as_ref(), Ok(key.hotkey()), "{kind:?}");
        }
        let body = br#"{"active":true}"#;
        let kind = MessageKind::Body {
            route: BodyRoute::ActivateInstance,
            sha256: Sha256::digest(body).into(),
        };
        let headers = key.sign(&kind, NOW).headers(&kind, key.hotkey());
        assert!(check_request_to_validator(find(&headers), NOW, 600, &Tail::Body(body)).is_ok());
        let headers = key
            .sign(&MessageKind::OwnDevices, NOW)
            .headers(&MessageKind::OwnDevices, key.hotkey());
        let graval = Tail::Purpose(Purpose::Graval);
        let own = [key.hotkey().clone()];
        assert!(check_request_to_miner(find(&headers), key.hotkey(), &own, NOW, 30, &graval).is_ok());
    }

    #[test]
    fn sealed_values_open_with_their_kind_and_seed_only() {
        let key = key();
        let sealed = key.seal(SealedKind::LaunchToken, b"a token").expect("short");
        assert_eq!(
            key.unseal(SealedKind::LaunchToken, &sealed),
            Ok(b"a token".to_vec())
        );
        assert!(key.unseal(SealedKind::Kubeconfig, &sealed).is_err());
        assert!(
            Key::new(&Seed::new([2; 32]))
                .unseal(SealedKind::LaunchToken, &sealed)
                .is_err()
        );
        for at in 0..sealed.len() {
            let mut altered = sealed.clone();
            altered[at] ^= 1;
            assert!(
                key.unseal(SealedKind::LaunchToken, &altered).is_err(),
                "byte {at}"
            );
            assert!(
                key.unseal(SealedKind::LaunchToken, &sealed[..at]).is_err(),
                "cut at {at}"
            );
        }
        let again = key.seal(SealedKind::LaunchToken, b"a token").expect("short");
        assert_ne!(again, sealed, "every value has its own nonce");
        let long = vec![0; PLAINTEXT_BYTES_MAX + 1];
        assert_eq!(
            key.seal(SealedKind::LaunchToken, &long),
            Err(Error::TooLong(long.len()))
        );
    }

    /// Sealed as the first version does, with seed `01` x 32, by another library (Python's `cryptography`).
    /// It opens for ever.
    #[test]
    fn a_value_sealed_by_the_first_version_opens() {
        let sealed = hex::decode(GOLDEN_SEALED).expect("hex");
        let key = Key::new(&Seed::new([1; 32]));
        assert_eq!(
            key.unseal(SealedKind::ClusterCaKey, &sealed),
            Ok(b"first version".to_vec())
        );
    }

    const GOLDEN_SEALED: &str =
        "01070707070707070707070707df64026a16fe4d7474b1c16c641183e94644a85b2cca9b690eba84ae74";

    #[test]
    fn seeds_are_read_from_both_kinds_of_file_and_never_shown() {
        let hex = "01".repeat(32);
        let wallet = format!(r#"  {{"secretSeed":"0x{hex}"}}"#);
        for text in [&hex, &format!("0x{hex}\n"), &wallet] {
            let seed = Seed::parse(text).expect("a good file");
            assert_eq!(Key::new(&seed).hotkey(), key().hotkey());
            assert_eq!(format!("{seed:?}"), "Seed(..)");
        }
        for bad in ["", "01", "{}", "{", &"g".repeat(64)] {
            let error = Seed::parse(bad).expect_err("a bad file").to_string();
            assert!(bad.len() < 3 || !error.contains(bad), "{error}");
        }
    }
}

//! What a proof backend promises, and the suite that every backend must pass.
//!
//! Backends block: they are called on the threads of [`crate::gpu::worker`], `prove` and `decrypt` one at a
//! time. `prove` may take minutes, everything else less than a second.

use std::fmt;

use proof::WorkProduct;
use protocol::gpu::DeviceInfo;

/// Proves that this host's devices are what they say.
pub trait Prover: fmt::Debug + Send + Sync {
    /// The devices, in an order that never changes while the backend lives. Never blocks.
    fn devices(&self) -> &[DeviceInfo];

    /// Answers a device challenge of 64 hexadecimal digits with 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`Error::NoDevice`], [`Error::BadChallenge`], [`Error::Backend`].
    fn answer(&self, challenge: &str) -> Result<String, Error>;

    /// Does the work on all devices; one work product for each, in the order of the devices.
    ///
    /// # Errors
    /// [`Error::NoDevice`], [`Error::Unsupported`], [`Error::Backend`].
    fn prove(&self, seed: u64, iterations: u32) -> Result<Vec<WorkProduct>, Error>;

    /// Decrypts what was encrypted to the device at this place, with the secret of the last proof.
    ///
    /// # Errors
    /// [`Error::NotProved`] unless the last proof was for this seed and iteration count,
    /// [`Error::NoDevice`] for a place without device, [`Error::BadCiphertext`], [`Error::Backend`].
    fn decrypt(&self, seed: u64, iterations: u32, device: usize, blob: &[u8]) -> Result<String, Error>;
}

/// Why a prover, or the worker in front of it, gives no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such device, or none at all.
    #[error("there is no such GPU on this host")]
    NoDevice,
    /// The challenge is not 64 hexadecimal digits.
    #[error("the challenge is not 64 hexadecimal digits")]
    BadChallenge,
    /// The ciphertext was not made for this device, seed and iteration count.
    #[error("the ciphertext was not made for this GPU, seed and iteration count")]
    BadCiphertext,
    /// Decryption without the proof it belongs to.
    #[error("no proof was done for this seed and iteration count")]
    NotProved,
    /// The backend cannot do that at all.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The backend failed.
    #[error("the proof backend failed: {0}")]
    Backend(String),
    /// Other work is in front and did not end in time, or too much is waiting.
    #[error("the GPUs are busy with another proof")]
    Busy,
    /// The work itself did not end in time.
    #[error("the proof took too long")]
    TimedOut,
    /// The backend panicked; the next call starts afresh.
    #[error("the proof backend crashed")]
    Crashed,
    /// The worker has ended.
    #[error("the proof worker has stopped")]
    Stopped,
}

impl From<proof::Error> for Error {
    fn from(error: proof::Error) -> Self {
        match error {
            proof::Error::NoDevice => Self::NoDevice,
            proof::Error::MalformedChallenge => Self::BadChallenge,
            proof::Error::CiphertextLength(_) | proof::Error::WrongKey | proof::Error::NotText => {
                Self::BadCiphertext
            }
        }
    }
}

/// The promises above as a test, for every backend.
#[cfg(test)]
pub(crate) mod contract {
    use super::*;

    /// The verifier's side of a backend.
    pub(crate) trait Verifier {
        fn encrypt(&self, device: &DeviceInfo, text: &str, seed: u64, iterations: u32) -> Vec<u8>;
        fn accepts(&self, device: &DeviceInfo, seed: u64, product: &WorkProduct, index: usize) -> bool;
        fn accepts_answer(&self, devices: &[DeviceInfo], challenge: &str, answer: &str) -> bool;
    }

    pub(crate) fn prover_keeps_its_promises(prover: &dyn Prover, verifier: &dyn Verifier) {
        let devices = prover.devices().to_vec();
        assert!(!devices.is_empty(), "the suite needs a device");
        let mut uuids: Vec<_> = devices.iter().map(|device| device.uuid.clone()).collect();
        uuids.sort();
        uuids.dedup();
        assert_eq!(uuids.len(), devices.len(), "device UUIDs are unique");

        for first in [0_u8, 1, 255] {
            let challenge = format!("{first:02x}{}", "cd".repeat(31));
            let answer = prover.answer(&challenge).expect("a good challenge");
            assert!(verifier.accepts_answer(&devices, &challenge, &answer));
            assert_eq!(prover.answer(&challenge), Ok(answer.clone()), "answers repeat");
            assert!(!verifier.accepts_answer(&devices, &"ee".repeat(32), &answer));
        }
        for bad in ["", "cd", &"zz".repeat(32), &"cd".repeat(33)] {
            assert_eq!(prover.answer(bad), Err(Error::BadChallenge), "{bad}");
        }

        let (seed, iterations) = (u64::MAX - 1, 2);
        let blobs: Vec<_> = devices
            .iter()
            .map(|device| verifier.encrypt(device, "decrypt me please", seed, iterations))
            .collect();
        let early = prover.decrypt(seed, iterations, 0, &blobs[0]);
        assert_eq!(early, Err(Error::NotProved), "no decryption before the proof");

        let products = prover.prove(seed, iterations).expect("the proof");
        assert_eq!(products.len(), devices.len());
        for (place, device) in devices.iter().enumerate() {
            assert!(
                verifier.accepts(device, seed, &products[place], 0),
                "{}",
                device.uuid
            );
            assert!(!verifier.accepts(device, seed - 1, &products[place], 0));
            let text = prover.decrypt(seed, iterations, place, &blobs[place]);
            assert_eq!(text.as_deref(), Ok("decrypt me please"));
            let other = (place + 1) % devices.len();
            if other != place {
                assert!(
                    !verifier.accepts(device, seed, &products[other], 0),
                    "products differ"
                );
                let crossed = prover.decrypt(seed, iterations, place, &blobs[other]);
                assert_eq!(crossed, Err(Error::BadCiphertext));
            }
        }
        for (seed, iterations) in [(seed - 1, iterations), (seed, iterations + 1)] {
            let wrong = prover.decrypt(seed, iterations, 0, &blobs[0]);
            assert_eq!(wrong, Err(Error::NotProved), "seed and iterations are compared");
        }
        let nowhere = prover.decrypt(seed, iterations, devices.len(), &blobs[0]);
        assert_eq!(nowhere, Err(Error::NoDevice));
        for blob in [&blobs[0][..10], &[0; 64], &[]] {
            assert_eq!(
                prover.decrypt(seed, iterations, 0, blob),
                Err(Error::BadCiphertext)
            );
        }

        let again = prover.prove(seed, iterations).expect("the same proof again");
        assert_eq!(again, products, "proofs repeat");
        prover.prove(seed - 1, iterations).expect("another proof");
        let stale = prover.decrypt(seed, iterations, 0, &blobs[0]);
        assert_eq!(stale, Err(Error::NotProved), "only the last proof decrypts");
    }
}

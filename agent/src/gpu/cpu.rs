//! The CPU backend: proves software GPUs with the arithmetic of the crate `proof`. For development and
//! tests; no real validator accepts a software GPU.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use proof::{Profile, Proved, WorkProduct};
use protocol::gpu::DeviceInfo;
use protocol::id::GpuId;
use sha2::{Digest, Sha256};

use crate::gpu::prover::{Error, Prover};

/// The most software GPUs of a host: validators refuse servers with more than ten devices.
pub const SOFTWARE_GPUS_MAX: usize = 10;
/// The most memory that a CPU may be asked to fill for one software GPU, in bytes.
pub const HELD_BYTES_MAX: u64 = 256 << 20;

/// Why a CPU backend cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// None, or more than a validator takes.
    #[error("{0} software GPUs: 1 to {SOFTWARE_GPUS_MAX} are possible")]
    Count(usize),
    /// A profile that is made for cards.
    #[error(
        "profile {profile} needs {bytes} bytes for each software GPU; a CPU gets at most {HELD_BYTES_MAX}"
    )]
    Profile {
        /// The profile's name.
        profile: &'static str,
        /// What it would fill.
        bytes: u64,
    },
}

/// Software GPUs and the last proof of each.
pub struct Cpu {
    devices: Vec<DeviceInfo>,
    profile: Profile,
    last: Mutex<Option<Last>>,
}

struct Last {
    seed: u64,
    iterations: u32,
    proved: Vec<Proved>,
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cpu")
            .field("software_gpus", &self.devices.len())
            .field("profile", &self.profile.name)
            .finish_non_exhaustive()
    }
}

/// The identity of a host's software GPU: the same for the same seed text, different between hosts.
#[must_use]
pub fn software_gpu_id(uuid_seed: &str, number: usize) -> GpuId {
    let hash = Sha256::new()
        .chain_update(b"chutes-agent software gpu\0")
        .chain_update((number as u64).to_le_bytes())
        .chain_update(uuid_seed)
        .finalize();
    GpuId::from_device_uuid(&hex::encode(&hash[..16])).expect("16 bytes are 32 digits")
}

impl Cpu {
    /// A backend with so many software GPUs, named from `uuid_seed`.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn new(count: usize, uuid_seed: &str, profile: Profile) -> Result<Self, ConfigError> {
        if !(1..=SOFTWARE_GPUS_MAX).contains(&count) {
            return Err(ConfigError::Count(count));
        }
        let devices: Vec<_> = (0..count)
            .map(|number| proof::software_device(software_gpu_id(uuid_seed, number)))
            .collect();
        let bytes = profile.held_bytes(devices[0].memory);
        if bytes > HELD_BYTES_MAX {
            return Err(ConfigError::Profile {
                profile: profile.name,
                bytes,
            });
        }
        Ok(Self {
            devices,
            profile,
            last: Mutex::new(None),
        })
    }
}

impl Prover for Cpu {
    fn devices(&self) -> &[DeviceInfo] {
        &self.devices
    }

    fn answer(&self, challenge: &str) -> Result<String, Error> {
        Ok(proof::device_challenge_answer(&self.devices, challenge)?)
    }

    fn prove(&self, seed: u64, iterations: u32) -> Result<Vec<WorkProduct>, Error> {
        let proved: Vec<Proved> = self
            .devices
            .iter()
            .map(|device| proof::prove(device, seed, iterations, &self.profile))
            .collect();
        let products = proved.iter().map(|proved| proved.work_product.clone()).collect();
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Last {
            seed,
            iterations,
            proved,
        });
        Ok(products)
    }

    fn decrypt(&self, seed: u64, iterations: u32, device: usize, blob: &[u8]) -> Result<String, Error> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let last = last
            .as_ref()
            .filter(|last| (last.seed, last.iterations) == (seed, iterations))
            .ok_or(Error::NotProved)?;
        let proved = last.proved.get(device).ok_or(Error::NoDevice)?;
        Ok(proof::decrypt(proved, blob)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::prover::contract::{Verifier, prover_keeps_its_promises};

    struct Ours(Profile);

    impl Verifier for Ours {
        fn encrypt(&self, device: &DeviceInfo, text: &str, seed: u64, iterations: u32) -> Vec<u8> {
            proof::encrypt(device, text, seed, iterations, [3; 16], &self.0)
        }
        fn accepts(&self, device: &DeviceInfo, seed: u64, product: &WorkProduct, index: usize) -> bool {
            proof::check(device, seed, product, index, &self.0)
        }
        fn accepts_answer(&self, devices: &[DeviceInfo], challenge: &str, answer: &str) -> bool {
            proof::verify_device_challenge(devices, challenge, answer)
        }
    }

    #[test]
    fn the_cpu_backend_keeps_the_promises_of_a_prover() {
        for count in [1, 3] {
            let cpu = Cpu::new(count, "host-1", Profile::DEVELOPMENT).expect("a good configuration");
            prover_keeps_its_promises(&cpu, &Ours(Profile::DEVELOPMENT));
        }
    }

    #[test]
    fn software_gpus_are_named_by_their_host() {
        assert_eq!(
            software_gpu_id("host-1", 0).as_str(),
            "0f3fccb9c44cb3aa3e726a9cf9f8ff25",
            "restarts keep the identity"
        );
        assert_ne!(software_gpu_id("host-1", 0), software_gpu_id("host-1", 1));
        assert_ne!(software_gpu_id("host-1", 0), software_gpu_id("host-2", 0));
    }

    #[test]
    fn impossible_configurations_are_refused() {
        for count in [0, 11] {
            let refused = Cpu::new(count, "h", Profile::DEVELOPMENT).err();
            assert_eq!(refused, Some(ConfigError::Count(count)));
        }
        assert!(matches!(
            Cpu::new(1, "h", Profile::STANDARD).err(),
            Some(ConfigError::Profile {
                profile: "standard",
                ..
            })
        ));
    }
}

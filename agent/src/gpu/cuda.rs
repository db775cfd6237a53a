//! Discovery through the CUDA driver, the only file that talks to it. The library is opened at run time, so
//! the same binary runs on machines without a driver.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{DriverError, result, sys};
use protocol::gpu::DeviceInfo;

use crate::gpu::device::{Discovered, ImpossibleFact, RawFacts, checked};
use crate::gpu::prover::{self, Prover};

/// The most devices that are looked at; validators accept ten of a server.
const DEVICES_MAX: usize = 64;

/// Why no device was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// The driver's library is not on this machine.
    #[error("no CUDA driver: libcuda is not installed on this machine, or not visible to this process")]
    NoDriver,
    /// The driver is there and says that it sees no device.
    #[error("the CUDA driver is installed but shows no device")]
    NoDevice,
    /// The driver answered with an error.
    #[error("CUDA driver: {call}: {error}")]
    Driver {
        /// What was asked.
        call: &'static str,
        /// What it answered.
        error: String,
    },
    /// The driver answered with nonsense.
    #[error(transparent)]
    Fact(#[from] ImpossibleFact),
    /// The driver's library lacks a function, or the binding gave up.
    #[error("the CUDA driver cannot be used: {0}")]
    Unusable(String),
}

/// All devices that the CUDA driver shows, in its order. Never panics.
///
/// # Errors
/// [`ProbeError`], whose text is fit for a person.
pub fn probe() -> Result<Vec<Discovered>, ProbeError> {
    // The binding panics when the library or a function in it is missing: ask first, and catch the rest.
    catch_unwind(AssertUnwindSafe(|| {
        if driver_is_present() {
            ask()
        } else {
            Err(ProbeError::NoDriver)
        }
    }))
    .unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(ProbeError::Unusable(text.unwrap_or("unknown reason").to_owned()))
    })
}

#[expect(unsafe_code, reason = "the binding marks opening a foreign library as unsafe")]
fn driver_is_present() -> bool {
    // SAFETY: opens libcuda by its well-known names and closes it; its initialisers have no preconditions.
    unsafe { sys::is_culib_present() }
}

fn ask() -> Result<Vec<Discovered>, ProbeError> {
    let failed = |call| move |error: DriverError| driver_error(call, error);
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Err(ProbeError::NoDevice),
        other => other.map_err(failed("initialise"))?,
    }
    let count = result::device::get_count().map_err(failed("count devices"))?;
    let count = usize::try_from(count).unwrap_or(0).min(DEVICES_MAX);
    if count == 0 {
        return Err(ProbeError::NoDevice);
    }
    (0..count)
        .map(|ordinal| Ok(checked(ordinal, &facts(ordinal)?)?))
        .collect()
}

#[expect(
    unsafe_code,
    reason = "the binding marks questions about a device handle as unsafe"
)]
fn facts(ordinal: usize) -> Result<RawFacts, ProbeError> {
    let failed = |call| move |error: DriverError| driver_error(call, error);
    let number = i32::try_from(ordinal).expect("at most DEVICES_MAX");
    let device = result::device::get(number).map_err(failed("open device"))?;
    let attribute = |attribute| {
        // SAFETY: `device` comes from `device::get` above and device handles are never closed.
        unsafe { result::device::get_attribute(device, attribute) }.map_err(failed("device attribute"))
    };
    let uuid = result::device::get_uuid(device).map_err(failed("device UUID"))?;
    Ok(RawFacts {
        uuid: uuid.bytes.map(|byte| byte.to_ne_bytes()[0]),
        name: result::device::get_name(device).map_err(failed("device name"))?,
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }.map_err(failed("device memory"))?,
        processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        clock_rate_khz: attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
        max_threads_per_processor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)?,
        pci: [
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
        ],
    })
}

fn driver_error(call: &'static str, error: DriverError) -> ProbeError {
    ProbeError::Driver {
        call,
        error: format!("{:?}", error.0),
    }
}

/// Discovered cards. Their facts are real and their challenges are answered; work on them is refused, since
/// this build carries no kernels.
#[derive(Debug)]
pub struct Cuda {
    devices: Vec<DeviceInfo>,
}

impl Cuda {
    /// Discovers the cards.
    ///
    /// # Errors
    /// As [`probe`].
    pub fn discover() -> Result<Self, ProbeError> {
        let devices = probe()?.into_iter().map(|found| found.info).collect();
        Ok(Self { devices })
    }
}

impl Prover for Cuda {
    fn devices(&self) -> &[DeviceInfo] {
        &self.devices
    }

    fn answer(&self, challenge: &str) -> Result<String, prover::Error> {
        Ok(proof::device_challenge_answer(&self.devices, challenge)?)
    }

    fn prove(&self, _seed: u64, _iterations: u32) -> Result<Vec<proof::WorkProduct>, prover::Error> {
        Err(prover::Error::Unsupported("this build has no CUDA kernels"))
    }

    fn decrypt(
        &self,
        _seed: u64,
        _iterations: u32,
        _device: usize,
        _blob: &[u8],
    ) -> Result<String, prover::Error> {
        Err(prover::Error::NotProved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine without a driver: a clear error. On one with cards: facts that identify them.
    #[test]
    fn probing_never_panics_and_says_what_is_there() {
        match probe() {
            Ok(devices) => {
                assert!(!devices.is_empty());
                let mut uuids: Vec<_> = devices.iter().map(|device| &device.info.uuid).collect();
                uuids.sort();
                uuids.dedup();
                assert_eq!(uuids.len(), devices.len());
            }
            Err(ProbeError::NoDriver) => {
                assert!(ProbeError::NoDriver.to_string().starts_with("no CUDA driver"));
                assert_eq!(Cuda::discover().err(), Some(ProbeError::NoDriver));
            }
            Err(other) => assert!(!other.to_string().is_empty()),
        }
    }
}

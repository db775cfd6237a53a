//! The software GPU: a made-up device type under which a CPU runs the proof. Its name says what it is, so
//! that it can never be taken for a card.

use protocol::gpu::{DeviceInfo, GpuType};
use protocol::id::GpuId;

/// Product name of every software GPU.
pub const SOFTWARE_NAME: &str = "Software GPU";

/// The software GPU as a row of a validator's table. No real validator lists it.
pub const SOFTWARE: GpuType = GpuType {
    short_ref: "software",
    name_pattern: SOFTWARE_NAME,
    memory_gb: 16,
    processors: 8,
    clock_mhz: (1000, 2000),
    threads_per_processor: 1024,
    hourly_usd_micros: 100_000,
    proof: (2, 1),
};

/// The facts of the software GPU with this identity; they fit [`SOFTWARE`].
#[must_use]
pub fn software_device(uuid: GpuId) -> DeviceInfo {
    DeviceInfo {
        uuid,
        name: SOFTWARE_NAME.to_owned(),
        memory: SOFTWARE.memory_gb << 30,
        processors: SOFTWARE.processors,
        clock_rate_khz: 1_500_000,
        max_threads_per_processor: SOFTWARE.threads_per_processor,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The limits with which a validator compares an announced device (`validator-protocol`, 5.2).
    #[test]
    fn a_software_device_fits_its_type_and_no_real_one() {
        let device = software_device(GpuId::from_device_uuid(&"5a".repeat(16)).expect("32 digits"));
        assert!(SOFTWARE.matches_name(&device.name));
        assert_eq!(protocol::gpu::gpu_type_of_name(&device.name), None);
        assert_eq!(protocol::gpu::gpu_type_of_short_ref(SOFTWARE.short_ref), None);
        let gb = device.memory / 1_000_000_000;
        assert!(gb >= SOFTWARE.memory_gb - 1 && gb * 10_000 <= SOFTWARE.memory_gb * 10_737 + 10_000);
        assert_eq!(device.processors, SOFTWARE.processors);
        let mhz = device.clock_rate_khz / 1000;
        assert!(mhz >= SOFTWARE.clock_mhz.0 && mhz * 10 <= SOFTWARE.clock_mhz.1 * 11);
    }
}

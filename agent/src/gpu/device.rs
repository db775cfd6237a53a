//! Facts of a discovered device, checked and brought into the form that goes over the wire. Pure.

use std::fmt;

use protocol::gpu::DeviceInfo;
use protocol::id::GpuId;

/// Where a device sits on the PCI bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress {
    /// Domain.
    pub domain: u16,
    /// Bus.
    pub bus: u8,
    /// Device (slot).
    pub device: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.0", self.domain, self.bus, self.device)
    }
}

/// One discovered device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Discovered {
    /// What is announced to validators.
    pub info: DeviceInfo,
    /// Where it sits, for people and for comparison with other tools.
    pub pci: PciAddress,
}

/// What a driver says of a device, as it says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawFacts {
    /// The 16 bytes of the device UUID.
    pub uuid: [u8; 16],
    /// Product name.
    pub name: String,
    /// Bytes.
    pub memory: usize,
    /// Streaming multiprocessors.
    pub processors: i32,
    /// Highest clock in kHz.
    pub clock_rate_khz: i32,
    /// Resident threads per multiprocessor.
    pub max_threads_per_processor: i32,
    /// PCI domain, bus and device.
    pub pci: [i32; 3],
}

/// A fact that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("device {ordinal}: the driver says {fact} = {value}, which is not possible")]
pub struct ImpossibleFact {
    ordinal: usize,
    fact: &'static str,
    value: String,
}

/// Checks a driver's facts of the device with this ordinal.
///
/// # Errors
/// [`ImpossibleFact`]: an empty or over-long name, an all-zero UUID, a count that is not positive.
pub fn checked(ordinal: usize, raw: &RawFacts) -> Result<Discovered, ImpossibleFact> {
    let impossible = |fact, value: &dyn fmt::Debug| ImpossibleFact {
        ordinal,
        fact,
        value: format!("{value:?}"),
    };
    let count = |fact, value: i32, least: u32| {
        u32::try_from(value)
            .ok()
            .filter(|value| *value >= least)
            .ok_or_else(|| impossible(fact, &value))
    };
    let name = raw.name.trim();
    // 63 bytes is what GraVal's structure holds.
    if name.is_empty() || name.len() > 63 || name.chars().any(char::is_control) {
        return Err(impossible("name", &raw.name));
    }
    if raw.uuid == [0; 16] {
        return Err(impossible("uuid", &raw.uuid));
    }
    if raw.memory == 0 {
        return Err(impossible("memory", &raw.memory));
    }
    let [domain, bus, device] = raw.pci;
    let pci = PciAddress {
        domain: u16::try_from(domain).map_err(|_| impossible("PCI domain", &domain))?,
        bus: u8::try_from(bus).map_err(|_| impossible("PCI bus", &bus))?,
        device: u8::try_from(device).map_err(|_| impossible("PCI device", &device))?,
    };
    let info = DeviceInfo {
        uuid: GpuId::from_device_uuid(&hex::encode(raw.uuid)).expect("16 bytes are 32 digits"),
        name: name.to_owned(),
        memory: raw.memory as u64,
        processors: count("processors", raw.processors, 1)?,
        clock_rate_khz: u64::from(count("clock rate", raw.clock_rate_khz, 0)?),
        max_threads_per_processor: count("threads per processor", raw.max_threads_per_processor, 1)?,
    };
    Ok(Discovered { info, pci })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw() -> RawFacts {
        RawFacts {
            uuid: [0xab; 16],
            name: "NVIDIA H100 80GB HBM3".to_owned(),
            memory: 85_031_714_816,
            processors: 132,
            clock_rate_khz: 1_980_000,
            max_threads_per_processor: 2048,
            pci: [0, 0x3b, 0],
        }
    }

    #[test]
    fn facts_of_a_card_become_what_is_announced() {
        let device = checked(0, &raw()).expect("possible facts");
        assert_eq!(
            serde_json::to_string(&device.info).expect("plain data"),
            r#"{"uuid":"abababababababababababababababab","name":"NVIDIA H100 80GB HBM3","memory":85031714816,"processors":132,"clock_rate":1980000.0,"max_threads_per_processor":2048}"#
        );
        assert_eq!(device.pci.to_string(), "0000:3b:00.0");
    }

    #[test]
    fn impossible_facts_are_named() {
        type Change = fn(&mut RawFacts);
        let rows: [(Change, &str); 11] = [
            (|r| r.uuid = [0; 16], "uuid"),
            (|r| r.name.clear(), "name"),
            (|r| r.name = "x".repeat(64), "name"),
            (|r| r.name = "a\nb".to_owned(), "name"),
            (|r| r.memory = 0, "memory"),
            (|r| r.processors = 0, "processors"),
            (|r| r.clock_rate_khz = -1, "clock rate"),
            (|r| r.max_threads_per_processor = 0, "threads per processor"),
            (|r| r.pci[0] = 1 << 16, "PCI domain"),
            (|r| r.pci[1] = 256, "PCI bus"),
            (|r| r.pci[2] = -1, "PCI device"),
        ];
        for (change, fact) in rows {
            let mut facts = raw();
            change(&mut facts);
            let error = checked(3, &facts).expect_err(fact).to_string();
            assert!(error.starts_with("device 3") && error.contains(fact), "{error}");
        }
    }
}

//! GPU devices and the types that validators know.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::id::GpuId;

/// What a prover says of one GPU. On the wire the members are named as GraVal names them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Its identity.
    pub uuid: GpuId,
    /// Product name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Memory in bytes.
    pub memory: u64,
    /// Streaming multiprocessors.
    pub processors: u32,
    /// Highest clock in kHz. A float on the wire, as GraVal sends it.
    #[serde(
        rename = "clock_rate",
        serialize_with = "khz_to_float",
        deserialize_with = "khz_from_number"
    )]
    pub clock_rate_khz: u64,
    /// Resident threads per multiprocessor.
    pub max_threads_per_processor: u32,
}

fn khz_to_float<S: Serializer>(khz: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    #[expect(clippy::cast_precision_loss, reason = "clock rates are far below 2^53 kHz")]
    serializer.serialize_f64(*khz as f64)
}

fn khz_from_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let khz = f64::deserialize(deserializer)?;
    if !(0.0..1e15).contains(&khz) {
        return Err(serde::de::Error::custom(
            "clock_rate is not a sensible number of kHz",
        ));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the range is checked above"
    )]
    Ok(khz as u64)
}

/// A GPU model as validators list it (`validator-protocol`, section 7, prices of 2025-10-03).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuType {
    /// Short reference, such as `h100_sxm`; chutes name the models they support by it.
    pub short_ref: &'static str,
    /// Pattern searched in a device's name: plain text, `.` for any character, `.?` and `.*`, a final
    /// `$`, and `(?!X)` for "not followed by X".
    pub name_pattern: &'static str,
    /// Nominal memory in GB.
    pub memory_gb: u64,
    /// Streaming multiprocessors.
    pub processors: u32,
    /// Base and boost clock in MHz.
    pub clock_mhz: (u64, u64),
    /// Resident threads per multiprocessor, as the validator's table has it.
    pub threads_per_processor: u32,
    /// The validator's reference price, in millionths of a dollar per hour.
    pub hourly_usd_micros: u64,
    /// GraVal: iterations, and the estimated time in seconds.
    pub proof: (u32, u32),
}

impl GpuType {
    /// True if the device's name belongs to this type.
    #[must_use]
    pub fn matches_name(&self, name: &str) -> bool {
        let (pattern, name) = (self.name_pattern.as_bytes(), name.as_bytes());
        (0..=name.len()).any(|start| matches_here(pattern, &name[start..]))
    }
}

/// A matcher for just the constructs that the validator's table uses.
fn matches_here(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [] => true,
        [b'$'] => text.is_empty(),
        [b'(', b'?', b'!', rest @ ..] => {
            let Some(end) = rest.iter().position(|b| *b == b')') else {
                return false;
            };
            !text.starts_with(&rest[..end]) && matches_here(&rest[end + 1..], text)
        }
        [b'.', b'*', rest @ ..] => (0..=text.len()).any(|skip| matches_here(rest, &text[skip..])),
        [b'.', b'?', rest @ ..] => {
            matches_here(rest, text) || (!text.is_empty() && matches_here(rest, &text[1..]))
        }
        [b'.', rest @ ..] => !text.is_empty() && matches_here(rest, &text[1..]),
        [byte, rest @ ..] => text.first() == Some(byte) && matches_here(rest, &text[1..]),
    }
}

#[expect(clippy::too_many_arguments, reason = "one row of a table, column by column")]
const fn gpu_type(
    short_ref: &'static str,
    name_pattern: &'static str,
    memory_gb: u64,
    processors: u32,
    clock_mhz: (u64, u64),
    threads_per_processor: u32,
    hourly_usd_micros: u64,
    proof: (u32, u32),
) -> GpuType {
    GpuType {
        short_ref,
        name_pattern,
        memory_gb,
        processors,
        clock_mhz,
        threads_per_processor,
        hourly_usd_micros,
        proof,
    }
}

/// The table, in the validator's order: the first match of a name wins.
pub const GPU_TYPES: [GpuType; 26] = [
    gpu_type("3090", r"RTX 3090", 24, 82, (1395, 1695), 1536, 250000, (1, 70)),
    gpu_type("4090", r"RTX 4090", 24, 128, (2235, 2520), 1536, 400000, (2, 65)),
    gpu_type("5090", r"RTX 5090", 32, 170, (2017, 2407), 1536, 700000, (2, 60)),
    gpu_type(
        "a4000",
        r"RTX A4000(?! Ada)",
        16,
        48,
        (765, 1560),
        1536,
        200000,
        (1, 75),
    ),
    gpu_type(
        "a4000_ada",
        r"RTX 4000 Ada",
        20,
        48,
        (765, 2175),
        1536,
        210000,
        (1, 80),
    ),
    gpu_type("a5000", r"RTX A5000", 24, 64, (1170, 1695), 1536, 250000, (1, 92)),
    gpu_type(
        "a6000",
        r"RTX A6000(?! Ada)",
        48,
        84,
        (1455, 1860),
        1536,
        500000,
        (1, 140),
    ),
    gpu_type(
        "a6000_ada",
        r"RTX 6000 Ada",
        48,
        142,
        (915, 2505),
        1536,
        750000,
        (1, 60),
    ),
    gpu_type(
        "pro_6000",
        r"RTX PRO 6000",
        96,
        188,
        (1590, 2617),
        1024,
        1800000,
        (1, 103),
    ),
    gpu_type("l4", r"L4(?!0)", 24, 58, (795, 2040), 1536, 250000, (1, 85)),
    gpu_type(
        "a10",
        r"A10(?!0)(?!G)",
        24,
        72,
        (1110, 1710),
        1536,
        250000,
        (1, 82),
    ),
    gpu_type("a40", r"A40", 48, 84, (1305, 1740), 1536, 500000, (1, 142)),
    gpu_type("l40", r"L40(?!S)", 48, 142, (735, 2490), 1536, 550000, (1, 60)),
    gpu_type("l40s", r"L40S", 48, 142, (1065, 2520), 1536, 850000, (1, 60)),
    gpu_type(
        "a100_40gb",
        r"A100.?PCIE.?40GB",
        40,
        108,
        (1065, 1410),
        2048,
        1100000,
        (4, 60),
    ),
    gpu_type(
        "a100_40gb_sxm",
        r"A100.?SXM.?.?40GB",
        40,
        108,
        (1065, 1410),
        2048,
        1150000,
        (4, 60),
    ),
    gpu_type(
        "a100",
        r"A100.?80GB.?PCIe",
        80,
        108,
        (1065, 1410),
        2048,
        1200000,
        (2, 58),
    ),
    gpu_type(
        "a100_sxm",
        r"A100.?SXM.?.?80GB",
        80,
        108,
        (1275, 1410),
        2048,
        1250000,
        (3, 70),
    ),
    gpu_type(
        "h100",
        r"H100.*PCIe",
        80,
        114,
        (1095, 1755),
        2048,
        1790000,
        (2, 62),
    ),
    gpu_type(
        "h100_nvl",
        r"H100.*NVL",
        96,
        132,
        (1590, 1980),
        2048,
        2250000,
        (3, 75),
    ),
    gpu_type(
        "h100_sxm",
        r"H100.*HBM3",
        80,
        132,
        (1590, 1980),
        2048,
        2350000,
        (5, 70),
    ),
    gpu_type(
        "h800",
        r"H800.*PCIe",
        80,
        114,
        (1095, 1755),
        2048,
        1500000,
        (3, 75),
    ),
    gpu_type("h20", r" H20$", 96, 78, (1590, 1980), 1024, 600000, (1, 300)),
    gpu_type("h200", r" H200", 140, 132, (1590, 1980), 2048, 2750000, (3, 70)),
    gpu_type(
        "mi300x",
        r"gfx942:sramecc",
        192,
        304,
        (1600, 2100),
        256,
        3000000,
        (2, 75),
    ),
    gpu_type("b200", r" B200", 192, 148, (1590, 1965), 1024, 4500000, (2, 75)),
];

/// The type that a validator derives from a device's name.
#[must_use]
pub fn gpu_type_of_name(name: &str) -> Option<&'static GpuType> {
    GPU_TYPES.iter().find(|gpu_type| gpu_type.matches_name(name))
}

/// The type with this short reference.
#[must_use]
pub fn gpu_type_of_short_ref(short_ref: &str) -> Option<&'static GpuType> {
    GPU_TYPES.iter().find(|gpu_type| gpu_type.short_ref == short_ref)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_find_the_type_that_the_validator_finds() {
        for (name, short_ref) in [
            ("NVIDIA H100 80GB HBM3", Some("h100_sxm")),
            ("NVIDIA H100 PCIe", Some("h100")),
            ("NVIDIA H100 NVL", Some("h100_nvl")),
            ("NVIDIA H200", Some("h200")),
            ("NVIDIA H20", Some("h20")),
            ("NVIDIA A100-SXM4-80GB", Some("a100_sxm")),
            ("NVIDIA A100 80GB PCIe", Some("a100")),
            ("NVIDIA A100-PCIE-40GB", Some("a100_40gb")),
            ("NVIDIA RTX A4000", Some("a4000")),
            ("NVIDIA RTX A6000", Some("a6000")),
            ("NVIDIA RTX 6000 Ada Generation", Some("a6000_ada")),
            ("NVIDIA L40S", Some("l40s")),
            ("NVIDIA L40", Some("l40")),
            ("NVIDIA L4", Some("l4")),
            ("NVIDIA A10", Some("a10")),
            ("NVIDIA A10G", None),
            ("NVIDIA GeForce RTX 4090", Some("4090")),
            ("NVIDIA B200", Some("b200")),
            ("Matrox G200", None),
            ("", None),
        ] {
            assert_eq!(gpu_type_of_name(name).map(|t| t.short_ref), short_ref, "{name}");
        }
    }

    #[test]
    fn clock_rates_are_floats_on_the_wire() {
        let device = DeviceInfo {
            uuid: GpuId::from_device_uuid(&"ab".repeat(16)).expect("32 digits"),
            name: "NVIDIA H100 80GB HBM3".to_owned(),
            memory: 85_031_714_816,
            processors: 132,
            clock_rate_khz: 1_980_000,
            max_threads_per_processor: 2048,
        };
        let json = serde_json::to_string(&device).expect("plain data");
        assert_eq!(
            json,
            r#"{"uuid":"abababababababababababababababab","name":"NVIDIA H100 80GB HBM3","memory":85031714816,"processors":132,"clock_rate":1980000.0,"max_threads_per_processor":2048}"#
        );
        assert_eq!(
            serde_json::from_str::<DeviceInfo>(&json).expect("own output"),
            device
        );
        let whole = json.replace("1980000.0", "1980000");
        assert_eq!(
            serde_json::from_str::<DeviceInfo>(&whole).expect("integers are numbers"),
            device
        );
        assert!(serde_json::from_str::<DeviceInfo>(&json.replace("1980000.0", "-1")).is_err());
    }
}

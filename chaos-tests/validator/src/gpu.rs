//! The GPU types that this validator knows: the real table and what the scenario adds or relaxes.

use protocol::gpu::{DeviceInfo, GPU_TYPES, GpuType};
use serde_json::{Map, Value, json};

use crate::scenario::RelaxedGpu;

/// One accepted type with its time limits.
#[derive(Debug, Clone)]
pub(crate) struct Accepted {
    pub(crate) gpu_type: GpuType,
    pub(crate) iterations: u32,
    /// Estimated time of a proof, in ms.
    pub(crate) estimate_ms: u64,
    /// `/prove` must take longer than the first and less than the second, in ms.
    pub(crate) prove_window_ms: (u64, u64),
    /// From claim to verification, in ms.
    pub(crate) launch_deadline_ms: u64,
}

/// All accepted types, in the order in which names are matched.
#[derive(Debug, Clone)]
pub(crate) struct GpuTable(Vec<Accepted>);

impl GpuTable {
    pub(crate) fn new(relaxed: &[RelaxedGpu]) -> Self {
        let software = relaxed
            .iter()
            .any(|r| r.short_ref == proof::SOFTWARE.short_ref)
            .then_some(proof::SOFTWARE);
        let rows = GPU_TYPES.iter().copied().chain(software).map(|gpu_type| {
            let estimate_ms = u64::from(gpu_type.proof.1) * 1000;
            let strict = Accepted {
                gpu_type,
                iterations: gpu_type.proof.0,
                estimate_ms,
                prove_window_ms: (estimate_ms * 55 / 100, estimate_ms * 170 / 100),
                launch_deadline_ms: estimate_ms * 215 / 100,
            };
            match relaxed.iter().find(|r| r.short_ref == gpu_type.short_ref) {
                None => strict,
                Some(r) => Accepted {
                    iterations: r.iterations,
                    estimate_ms: r.estimate_ms,
                    prove_window_ms: (r.prove_ms_min, r.prove_ms_max),
                    launch_deadline_ms: r.launch_deadline_ms,
                    ..strict
                },
            }
        });
        Self(rows.collect())
    }

    pub(crate) fn of_name(&self, name: &str) -> Option<&Accepted> {
        self.0.iter().find(|row| row.gpu_type.matches_name(name))
    }

    pub(crate) fn of_short_ref(&self, short_ref: &str) -> Option<&Accepted> {
        self.0.iter().find(|row| row.gpu_type.short_ref == short_ref)
    }

    /// Checks the facts of a device against its type (`validator-protocol`, section 5.2).
    pub(crate) fn check(&self, device: &DeviceInfo, identifier: &str) -> Result<&Accepted, String> {
        let row = self
            .of_name(&device.name)
            .ok_or_else(|| format!("unsupported GPU name: {}", device.name))?;
        let expected = &row.gpu_type;
        if identifier != expected.short_ref {
            return Err(format!(
                "gpu_identifier {identifier} does not belong to {}, which is {}",
                device.name, expected.short_ref
            ));
        }
        let gigabytes = device.memory / 1_000_000_000;
        let most = expected.memory_gb as f64 * 1.0737 + 1.0;
        if gigabytes + 1 < expected.memory_gb || gigabytes as f64 > most {
            return Err(format!(
                "memory of {gigabytes} GB does not fit {}",
                expected.short_ref
            ));
        }
        if device.processors != expected.processors {
            return Err(format!(
                "{} processors instead of {}",
                device.processors, expected.processors
            ));
        }
        let mhz = device.clock_rate_khz as f64 / 1000.0;
        if mhz < expected.clock_mhz.0 as f64 || mhz > expected.clock_mhz.1 as f64 * 1.1 {
            return Err(format!("clock of {mhz} MHz does not fit {}", expected.short_ref));
        }
        Ok(row)
    }

    /// Short references that a node selector allows, in table order.
    pub(crate) fn supported(&self, include: &[String], exclude: &[String], vram_gb_min: u64) -> Vec<String> {
        let names = |list: &[String], name: &str| list.iter().any(|n| n == name);
        self.0
            .iter()
            .filter(|row| row.gpu_type.memory_gb >= vram_gb_min)
            .map(|row| row.gpu_type.short_ref)
            .filter(|name| include.is_empty() || names(include, name))
            .filter(|name| !names(exclude, name))
            .map(str::to_owned)
            .collect()
    }

    /// Share of the dearest type's price that the cheapest of `supported` has, times the GPU count.
    pub(crate) fn compute_multiplier(&self, supported: &[String], gpu_count: u32) -> f64 {
        let dearest = GPU_TYPES.iter().map(|t| t.hourly_usd_micros).max().unwrap_or(1);
        let cheapest = supported
            .iter()
            .filter_map(|name| self.of_short_ref(name))
            .map(|row| row.gpu_type.hourly_usd_micros)
            .min()
            .unwrap_or(0);
        f64::from(gpu_count) * cheapest as f64 / dearest as f64
    }

    /// The answer of `GET /nodes/supported`.
    pub(crate) fn as_json(&self) -> Value {
        let rows: Map<String, Value> = self
            .0
            .iter()
            .map(|row| {
                let t = &row.gpu_type;
                let facts = json!({
                    "model_name_check": t.name_pattern,
                    "memory": t.memory_gb,
                    "processors": t.processors,
                    "clock_rate_base": t.clock_mhz.0,
                    "clock_rate_boost": t.clock_mhz.1,
                    "max_threads_per_processor": t.threads_per_processor,
                    "hourly_rate": t.hourly_usd_micros as f64 / 1e6,
                    "graval": {"iterations": row.iterations, "estimate": row.estimate_ms as f64 / 1000.0},
                });
                (t.short_ref.to_owned(), facts)
            })
            .collect();
        Value::Object(rows)
    }
}

#[cfg(test)]
mod tests {
    use protocol::id::GpuId;

    use super::*;

    fn h100() -> DeviceInfo {
        DeviceInfo {
            uuid: GpuId::from_device_uuid(&"ab".repeat(16)).expect("32 digits"),
            name: "NVIDIA H100 80GB HBM3".to_owned(),
            memory: 85_031_714_816,
            processors: 132,
            clock_rate_khz: 1_980_000,
            max_threads_per_processor: 2048,
        }
    }

    #[test]
    fn device_facts_are_checked_against_the_table() {
        let table = GpuTable::new(&[]);
        let refused = |change: &dyn Fn(&mut DeviceInfo), identifier: &str| {
            let mut device = h100();
            change(&mut device);
            table.check(&device, identifier).is_err()
        };
        assert!(table.check(&h100(), "h100_sxm").is_ok());
        assert!(refused(&|_| (), "h100"));
        assert!(refused(&|d| d.name = "Matrox G200".to_owned(), "h100_sxm"));
        for (memory, bad) in [
            (78_999_999_999, true),
            (79_000_000_000, false),
            (86_999_999_999, false),
            (87_000_000_000, true),
        ] {
            assert_eq!(refused(&|d| d.memory = memory, "h100_sxm"), bad, "{memory}");
        }
        assert!(refused(&|d| d.processors = 131, "h100_sxm"));
        for (khz, bad) in [
            (1_589_000, true),
            (1_590_000, false),
            (2_178_000, false),
            (2_179_000, true),
        ] {
            assert_eq!(refused(&|d| d.clock_rate_khz = khz, "h100_sxm"), bad, "{khz}");
        }
    }

    #[test]
    fn selectors_and_multipliers_follow_the_table() {
        let table = GpuTable::new(&[]);
        let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            table.supported(&[], &names(&["b200", "mi300x"]), 140),
            names(&["h200"])
        );
        assert_eq!(
            table.supported(&names(&["3090", "4090"]), &[], 24),
            names(&["3090", "4090"])
        );
        assert!(table.supported(&names(&["software"]), &[], 16).is_empty());
        let four = table.compute_multiplier(&names(&["b200", "h200"]), 4);
        assert!((four - 4.0 * 2.75 / 4.5).abs() < 1e-9, "{four}");
    }
}

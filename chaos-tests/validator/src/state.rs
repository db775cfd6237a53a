//! Everything that the validator knows, as plain data, and its file: one JSON document that is replaced by
//! rename after each change, so that `kill -9` at any moment leaves the old or the new one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use protocol::gpu::DeviceInfo;
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ConfigId, GpuId, InstanceId, JobId};
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use crate::identity::uuid_of_name;
use crate::pay::Life;
use crate::scenario::{ChuteSpec, Demand};

/// All records.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct State {
    /// First start; the program's times count from here.
    pub(crate) started_at: UnixMillis,
    /// Steps of the program that are done.
    pub(crate) steps_done: BTreeSet<usize>,
    pub(crate) hotkeys: BTreeSet<Hotkey>,
    pub(crate) images: BTreeMap<String, Image>,
    pub(crate) chutes: BTreeMap<ChuteId, Chute>,
    pub(crate) nodes: BTreeMap<GpuId, Node>,
    /// Who announced which GPU when, for the hopping rule.
    pub(crate) node_history: Vec<NodeHistory>,
    pub(crate) tasks: BTreeMap<String, Task>,
    pub(crate) configs: BTreeMap<ConfigId, LaunchConfig>,
    pub(crate) instances: BTreeMap<InstanceId, Instance>,
    /// Lives of instances that are gone.
    pub(crate) ended: Vec<Ended>,
    pub(crate) jobs: BTreeMap<JobId, Job>,
    pub(crate) bounties: BTreeMap<ChuteId, Bounty>,
    pub(crate) rolling_updates: BTreeMap<ChuteId, RollingUpdate>,
    pub(crate) cleaned_at: UnixMillis,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Image {
    pub(crate) id: String,
    pub(crate) username: String,
    pub(crate) name: String,
    pub(crate) tag: String,
    pub(crate) patch_version: String,
    pub(crate) chutes_version: Option<String>,
    pub(crate) created_at: UnixMillis,
}

impl Image {
    /// `user/name:tag`, with `-patch` once it was patched.
    pub(crate) fn reference(&self) -> String {
        let patch = match self.patch_version.as_str() {
            "initial" => String::new(),
            patch => format!("-{patch}"),
        };
        format!("{}/{}:{}{patch}", self.username, self.name, self.tag)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Chute {
    pub(crate) id: ChuteId,
    pub(crate) version: String,
    pub(crate) image: String,
    pub(crate) code: String,
    pub(crate) chutes_version: Option<String>,
    pub(crate) supported_gpus: Vec<String>,
    pub(crate) compute_multiplier: f64,
    pub(crate) spec: ChuteSpec,
    pub(crate) demand: Option<Demand>,
    pub(crate) created_at: UnixMillis,
    pub(crate) updated_at: UnixMillis,
}

impl Chute {
    /// The version of some code on this chute's image.
    pub(crate) fn version_of(image: &str, code: &str) -> String {
        uuid_of_name(&format!("{image}:{code}"))
    }

    /// True if its library still uses the flow without launch configs.
    pub(crate) fn is_legacy(&self) -> bool {
        is_legacy_version(self.chutes_version.as_deref())
    }
}

/// `X.Y.Z` below 0.3.0, or unknown (`validator-protocol`, section 6.1).
pub(crate) fn is_legacy_version(version: Option<&str>) -> bool {
    let Some(version) = version else { return true };
    let mut parts = version
        .split('.')
        .map(|part| part.bytes().take_while(u8::is_ascii_digit).count())
        .zip(version.split('.'))
        .map(|(digits, part)| part[..digits].parse::<u32>().unwrap_or(0));
    let number = [(); 3].map(|()| parts.next().unwrap_or(0));
    number < [0, 3, 0]
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Node {
    pub(crate) device: DeviceInfo,
    pub(crate) hotkey: Hotkey,
    pub(crate) gpu_identifier: String,
    pub(crate) device_index: u32,
    pub(crate) server_id: Option<String>,
    pub(crate) seed: u64,
    pub(crate) verification_host: String,
    pub(crate) verification_port: u16,
    pub(crate) verification_error: Option<String>,
    pub(crate) created_at: UnixMillis,
    pub(crate) verified_at: Option<UnixMillis>,
    /// Of a sealed worker.
    #[serde(default)]
    pub(crate) attested: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NodeHistory {
    pub(crate) uuid: GpuId,
    pub(crate) hotkey: Hotkey,
    pub(crate) at: UnixMillis,
}

/// A verification of GPUs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) hotkey: Hotkey,
    /// In order of their device index.
    pub(crate) uuids: Vec<GpuId>,
    pub(crate) outcome: Option<TaskOutcome>,
    pub(crate) finished_at: Option<UnixMillis>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TaskOutcome {
    Verified,
    Failed(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LaunchConfig {
    pub(crate) chute: ChuteId,
    pub(crate) hotkey: Hotkey,
    pub(crate) job: Option<JobId>,
    pub(crate) issued_at: UnixMillis,
    pub(crate) claimed_by: Option<InstanceId>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Instance {
    pub(crate) id: InstanceId,
    pub(crate) chute: ChuteId,
    pub(crate) version: String,
    pub(crate) image: String,
    pub(crate) chutes_version: Option<String>,
    pub(crate) hotkey: Hotkey,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) gpus: Vec<GpuId>,
    pub(crate) config: Option<ConfigId>,
    pub(crate) job: Option<JobId>,
    pub(crate) created_at: UnixMillis,
    pub(crate) deadline_at: Option<UnixMillis>,
    pub(crate) verified_at: Option<UnixMillis>,
    pub(crate) activated_at: Option<UnixMillis>,
    pub(crate) stop_billing_at: Option<UnixMillis>,
    pub(crate) seed: u64,
    pub(crate) symmetric_key: String,
    pub(crate) response_plaintext: String,
    pub(crate) port_mappings: Vec<PortMapping>,
    pub(crate) multiplier: f64,
    pub(crate) target_multiplier: f64,
    pub(crate) hourly_rate: f64,
    pub(crate) public: bool,
    pub(crate) verification_error: Option<String>,
    /// Times of the last activations in the legacy flow.
    pub(crate) legacy_attempts: Vec<UnixMillis>,
}

impl Instance {
    pub(crate) fn active(&self) -> bool {
        self.activated_at.is_some()
    }

    pub(crate) fn serving(&self) -> bool {
        self.active() && self.verified_at.is_some()
    }

    pub(crate) fn life(&self, ended_at: Option<UnixMillis>, valid_termination: bool) -> Life {
        Life {
            created_at: self.created_at,
            activated_at: self.activated_at,
            ended_at,
            public: self.public && self.job.is_none(),
            valid_termination,
            multiplier: self.multiplier,
            target: self.target_multiplier,
        }
    }
}

/// A port as the container announces it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PortMapping {
    pub(crate) internal_port: u16,
    pub(crate) external_port: u16,
    pub(crate) proto: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Ended {
    pub(crate) instance: InstanceId,
    pub(crate) chute: ChuteId,
    pub(crate) hotkey: Hotkey,
    pub(crate) verified: bool,
    pub(crate) life: Life,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) id: JobId,
    pub(crate) chute: ChuteId,
    pub(crate) version: String,
    pub(crate) method: String,
    pub(crate) disk_gb: u32,
    pub(crate) work_ms: u64,
    pub(crate) compute_multiplier: f64,
    pub(crate) created_at: UnixMillis,
    pub(crate) started_at: Option<UnixMillis>,
    pub(crate) finished_at: Option<UnixMillis>,
    pub(crate) instance: Option<InstanceId>,
    pub(crate) hotkey: Option<Hotkey>,
    pub(crate) tried_by: Vec<Hotkey>,
    pub(crate) status: String,
    pub(crate) result: serde_json::Value,
    pub(crate) error_detail: Option<String>,
    pub(crate) output_files: Vec<String>,
    pub(crate) miner_terminated: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Bounty {
    pub(crate) fixed: Option<u64>,
    pub(crate) created_at: UnixMillis,
}

impl Bounty {
    /// min(3 x seconds + 100, 86400), unless the scenario fixed it.
    pub(crate) fn amount(&self, now: UnixMillis) -> u64 {
        self.fixed
            .unwrap_or_else(|| (3 * (now.since(self.created_at) / 1000) + 100).min(86_400))
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RollingUpdate {
    pub(crate) old_version: String,
    pub(crate) new_version: String,
    pub(crate) why: String,
    pub(crate) started_at: UnixMillis,
    /// Launches that each miner may still make.
    pub(crate) permitted: BTreeMap<Hotkey, u32>,
    /// Instances that were not told yet.
    pub(crate) to_tell: Vec<InstanceId>,
    /// Instances that must be gone when it ends.
    pub(crate) stale: Vec<InstanceId>,
    pub(crate) next_at: UnixMillis,
    pub(crate) spacing_ms: u64,
}

impl State {
    /// Reads the file; nothing when there is none.
    pub(crate) fn load(path: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
                let text = format!("{}: {error}", path.display());
                io::Error::new(io::ErrorKind::InvalidData, text)
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Replaces the file.
    pub(crate) fn save(&self, path: &Path) -> io::Result<()> {
        let temporary = path.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        std::fs::rename(&temporary, path)
    }

    /// A chute by id or name.
    pub(crate) fn chute_called(&self, text: &str) -> Option<&Chute> {
        self.chutes
            .values()
            .find(|chute| chute.id.as_str() == text || chute.spec.name == text)
    }

    pub(crate) fn instances_of<'a>(&'a self, chute: &'a ChuteId) -> impl Iterator<Item = &'a Instance> {
        self.instances
            .values()
            .filter(move |instance| &instance.chute == chute)
    }

    pub(crate) fn instance_of_gpu(&self, gpu: &GpuId) -> Option<&Instance> {
        self.instances
            .values()
            .find(|instance| instance.gpus.contains(gpu))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn library_versions_tell_the_flow() {
        for (version, legacy) in [
            (None, true),
            (Some("0.2.52"), true),
            (Some("0.3.0"), false),
            (Some("0.3.40.rc5"), false),
            (Some("0.3.0rc1"), false),
            (Some("1.0"), false),
            (Some("x"), true),
        ] {
            assert_eq!(is_legacy_version(version), legacy, "{version:?}");
        }
    }

    #[test]
    fn bounties_grow_up_to_their_cap() {
        let bounty = Bounty {
            fixed: None,
            created_at: UnixMillis(0),
        };
        for (seconds, amount) in [
            (0, 100),
            (10, 130),
            (28_766, 86_398),
            (28_767, 86_400),
            (80_000, 86_400),
        ] {
            assert_eq!(
                bounty.amount(UnixMillis::from_unix_seconds(seconds)),
                amount.min(86_400)
            );
        }
    }

    #[test]
    fn the_file_is_replaced_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("state.json");
        assert!(State::load(&path).expect("no file is no error").is_none());
        let state = State {
            started_at: UnixMillis(7),
            ..State::default()
        };
        state.save(&path).expect("written");
        let read = State::load(&path).expect("read").expect("there");
        assert_eq!(read.started_at, UnixMillis(7));
        std::fs::write(&path, b"{").expect("spoilt");
        assert!(State::load(&path).is_err());
    }
}

//! Rows and answers of the validator's REST routes: only the members that we use, read tolerantly.
//!
//! Unknown members are ignored, missing ones and nulls take a default, numbers may be whole or floats. A row
//! without its key, or with a member of the wrong type, is broken; the listing counts it. Amounts become
//! integers here: thousandths (`_milli`) and millionths (`_micros`). Shapes: `validator-protocol`, 3.3 to 3.5.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use protocol::gpu::DeviceInfo;
use protocol::id::{ChuteId, ChuteVersion, ConfigId, GpuId, InstanceId, JobId, ServerId};
use protocol::time::UnixMillis;
use protocol::workload::{PortProtocol, Secret};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::event::float_to_u64;
use super::times;

/// A chute as published: `/miner/chutes/`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ChuteRow {
    /// Its key.
    #[serde(deserialize_with = "id")]
    pub chute_id: ChuteId,
    /// Its current version.
    #[serde(deserialize_with = "id")]
    pub version: ChuteVersion,
    /// `user/name`.
    #[serde(default, deserialize_with = "or_default")]
    pub name: String,
    /// Image without registry, with its patch: `user/name:tag-patch`.
    #[serde(default, deserialize_with = "or_default")]
    pub image: String,
    /// Key of the image.
    #[serde(default, deserialize_with = "or_default")]
    pub image_id: String,
    /// Source text.
    #[serde(default, deserialize_with = "or_default")]
    pub code: String,
    /// File name of the source.
    #[serde(default, deserialize_with = "or_default")]
    pub filename: String,
    /// `module:variable`.
    #[serde(default, deserialize_with = "or_default")]
    pub ref_str: String,
    /// Version of the chutes library.
    #[serde(default, deserialize_with = "or_default")]
    pub chutes_version: Option<String>,
    /// Short references of the GPU types that it may run on; sorted, since the order on the wire is random.
    #[serde(default, deserialize_with = "sorted_texts")]
    pub supported_gpus: Vec<String>,
    /// What it needs.
    #[serde(default, deserialize_with = "or_default")]
    pub node_selector: NodeSelector,
    /// Routes. Only whether there are any matters: without, it is for jobs alone.
    #[serde(default, deserialize_with = "length")]
    pub cords: usize,
    /// Its job methods.
    #[serde(default, deserialize_with = "or_default")]
    pub jobs: Vec<JobMethod>,
    /// Requests that one instance takes at a time.
    #[serde(default, deserialize_with = "whole_or_zero")]
    pub concurrency: u64,
    /// Everybody may use it.
    #[serde(default, deserialize_with = "or_default")]
    pub public: Option<bool>,
    /// May be stopped for another (2026).
    #[serde(default, deserialize_with = "or_default")]
    pub preemptible: Option<bool>,
    /// Runs on sealed workers only (2026).
    #[serde(default, deserialize_with = "or_default")]
    pub tee: Option<bool>,
    /// Weight of its time now, in thousandths (2026).
    #[serde(default, rename = "effective_compute_multiplier", deserialize_with = "milli")]
    pub effective_compute_multiplier_milli: Option<u64>,
}

/// What a chute needs of a server.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NodeSelector {
    /// GPUs, all on one server.
    #[serde(default = "one", deserialize_with = "whole_or_one")]
    pub gpu_count: u64,
    /// Memory that each of them must have, in GB.
    #[serde(default, deserialize_with = "whole_or_zero")]
    pub min_vram_gb_per_gpu: u64,
    /// Weight of its time, in thousandths.
    #[serde(default, rename = "compute_multiplier", deserialize_with = "milli")]
    pub compute_multiplier_milli: Option<u64>,
}

impl Default for NodeSelector {
    fn default() -> Self {
        Self {
            gpu_count: 1,
            min_vram_gb_per_gpu: 0,
            compute_multiplier_milli: None,
        }
    }
}

/// A method that runs as a job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct JobMethod {
    /// Its name.
    #[serde(default, deserialize_with = "or_default")]
    pub name: String,
    /// Ports that it listens on.
    #[serde(default, deserialize_with = "or_default")]
    pub ports: Vec<JobPort>,
    /// Disk that it needs, in GB.
    #[serde(default, deserialize_with = "whole")]
    pub disk_gb: Option<u64>,
}

/// A port of a job.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct JobPort {
    /// Port inside the container.
    pub port: u16,
    /// Its transport.
    #[serde(rename = "proto")]
    pub protocol: PortProtocol,
}

/// An image: `/miner/images/`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ImageRow {
    /// Its key.
    #[serde(deserialize_with = "text_id")]
    pub image_id: String,
    /// Owner.
    #[serde(default, deserialize_with = "or_default")]
    pub username: String,
    /// Name.
    #[serde(default, deserialize_with = "or_default")]
    pub name: String,
    /// Tag.
    #[serde(default, deserialize_with = "or_default")]
    pub tag: String,
    /// `initial`, or which renewal of the library.
    #[serde(default, deserialize_with = "or_default")]
    pub patch_version: Option<String>,
    /// Version of the chutes library in it.
    #[serde(default, deserialize_with = "or_default")]
    pub chutes_version: Option<String>,
    /// `built and pushed`, or why not.
    #[serde(default, deserialize_with = "or_default")]
    pub status: String,
}

/// One of our GPUs as the validator has it: `/miner/nodes/`, and the answer to `POST /nodes/`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NodeRow {
    /// The GPU.
    #[serde(rename = "uuid", deserialize_with = "gpu")]
    pub gpu: GpuId,
    /// The server that it was advertised with.
    #[serde(default, deserialize_with = "maybe_id")]
    pub server_id: Option<ServerId>,
    /// Short reference of its type.
    #[serde(default, deserialize_with = "or_default")]
    pub gpu_identifier: Option<String>,
    /// Seed of the proof; needs all 64 bits.
    #[serde(default, deserialize_with = "whole")]
    pub seed: Option<u64>,
    /// Where the validator reaches the server.
    #[serde(default, deserialize_with = "or_default")]
    pub verification_host: Option<String>,
    /// Why the last verification failed.
    #[serde(default, deserialize_with = "or_default")]
    pub verification_error: Option<String>,
    /// When it was verified.
    #[serde(default, deserialize_with = "time")]
    pub verified_at: Option<UnixMillis>,
}

/// One of our instances: `/miner/instances/`. Its symmetric key is streamed too and is not read.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct InstanceRow {
    /// Its key.
    #[serde(deserialize_with = "id")]
    pub instance_id: InstanceId,
    /// Its chute.
    #[serde(deserialize_with = "id")]
    pub chute_id: ChuteId,
    /// The chute's version that it runs.
    #[serde(default, deserialize_with = "maybe_id")]
    pub version: Option<ChuteVersion>,
    /// Its launch config; legacy instances have none.
    #[serde(default, deserialize_with = "maybe_id")]
    pub config_id: Option<ConfigId>,
    /// Gets traffic, if also verified.
    #[serde(default, deserialize_with = "or_default")]
    pub active: bool,
    /// Passed the challenge.
    #[serde(default, deserialize_with = "or_default")]
    pub verified: bool,
    /// When it was made.
    #[serde(default, deserialize_with = "time")]
    pub created_at: Option<UnixMillis>,
    /// When it became active.
    #[serde(default, deserialize_with = "time")]
    pub activated_at: Option<UnixMillis>,
    /// When it was last verified.
    #[serde(default, deserialize_with = "time")]
    pub last_verified_at: Option<UnixMillis>,
    /// Where the validator reaches it.
    #[serde(default, deserialize_with = "or_default")]
    pub host: Option<String>,
    /// On which port.
    #[serde(default, deserialize_with = "whole")]
    pub port: Option<u64>,
    /// Weight of its time, in thousandths.
    #[serde(default, rename = "compute_multiplier", deserialize_with = "milli")]
    pub compute_multiplier_milli: Option<u64>,
}

/// A job without instance: `/miner/jobs/`. Finished ones are listed too.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct JobRow {
    /// Its key.
    #[serde(deserialize_with = "id")]
    pub job_id: JobId,
    /// The chute that does it.
    #[serde(deserialize_with = "id")]
    pub chute_id: ChuteId,
    /// Method to run.
    #[serde(default, deserialize_with = "or_default")]
    pub method: String,
    /// When it ended; then it is no offer.
    #[serde(default, deserialize_with = "time")]
    pub finished_at: Option<UnixMillis>,
    /// Hotkeys that have tried it.
    #[serde(default, deserialize_with = "or_default")]
    pub miner_history: Vec<String>,
    /// Weight of its time, in thousandths.
    #[serde(default, rename = "compute_multiplier", deserialize_with = "milli")]
    pub compute_multiplier_milli: Option<u64>,
    /// Arguments; only the disk is read.
    #[serde(default, deserialize_with = "or_default")]
    job_args: JobArgs,
}

impl JobRow {
    /// Disk that it needs, in GB, if it says so.
    #[must_use]
    pub fn disk_gb(&self) -> Option<u64> {
        self.job_args.disk_gb
    }

    /// True if it waits for somebody.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.finished_at.is_none()
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
struct JobArgs {
    #[serde(default, rename = "_disk_gb", deserialize_with = "whole")]
    disk_gb: Option<u64>,
}

/// Use of a chute in the last hour: `/miner/metrics/`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MetricRow {
    /// The chute.
    #[serde(deserialize_with = "id")]
    pub chute_id: ChuteId,
    /// Instances that did it.
    #[serde(default, deserialize_with = "whole_or_zero")]
    pub instance_count: u64,
    /// Calls.
    #[serde(default, deserialize_with = "whole_or_zero")]
    pub total_invocations: u64,
    /// Calls refused for load.
    #[serde(default, deserialize_with = "whole_or_zero")]
    pub rate_limit_count: u64,
    /// Seconds of computing, in thousandths.
    #[serde(default, rename = "total_compute_time", deserialize_with = "milli")]
    pub total_compute_time_milli: Option<u64>,
    /// Weight of its time, in thousandths.
    #[serde(default, rename = "compute_multiplier", deserialize_with = "milli")]
    pub compute_multiplier_milli: Option<u64>,
    /// What users paid, in millionths of a dollar.
    #[serde(default, rename = "total_usage_usd", deserialize_with = "micros")]
    pub total_usage_usd_micros: Option<u64>,
}

/// How loaded a chute is: `/chutes/utilization`. A chute that is absent is not blocked.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct UtilizationRow {
    /// The chute.
    #[serde(deserialize_with = "id")]
    pub chute_id: ChuteId,
    /// False: the validator wants no more instances. Absent: not blocked.
    #[serde(default, deserialize_with = "or_default")]
    pub scalable: Option<bool>,
    /// True: a rolling update blocks launches.
    #[serde(default, deserialize_with = "or_default")]
    pub update_in_progress: Option<bool>,
    /// How many more instances are wanted.
    #[serde(default, deserialize_with = "whole")]
    pub scale_allowance: Option<u64>,
    /// Instances that the validator aims at.
    #[serde(default, deserialize_with = "whole")]
    pub target_count: Option<u64>,
    /// Instances in all, active or not.
    #[serde(default, deserialize_with = "whole")]
    pub total_instance_count: Option<u64>,
    /// Instances with traffic.
    #[serde(default, deserialize_with = "whole")]
    pub active_instance_count: Option<u64>,
    /// Busy share now, in thousandths.
    #[serde(default, rename = "utilization_current", deserialize_with = "milli")]
    pub utilization_current_milli: Option<u64>,
    /// Busy share over 5 minutes, in thousandths.
    #[serde(default, rename = "utilization_5m", deserialize_with = "milli")]
    pub utilization_5m_milli: Option<u64>,
    /// Busy share over 15 minutes, in thousandths.
    #[serde(default, rename = "utilization_15m", deserialize_with = "milli")]
    pub utilization_15m_milli: Option<u64>,
    /// Share of calls refused for load over 5 minutes, in thousandths.
    #[serde(default, rename = "rate_limit_ratio_5m", deserialize_with = "milli")]
    pub rate_limit_ratio_5m_milli: Option<u64>,
    /// Share of calls refused for load over 15 minutes, in thousandths.
    #[serde(default, rename = "rate_limit_ratio_15m", deserialize_with = "milli")]
    pub rate_limit_ratio_15m_milli: Option<u64>,
    /// Share of calls refused for load over an hour, in thousandths.
    #[serde(default, rename = "rate_limit_ratio_1h", deserialize_with = "milli")]
    pub rate_limit_ratio_1h_milli: Option<u64>,
}

/// A redeploy under way: `/chutes/rolling_updates`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RollingUpdateRow {
    /// The chute.
    #[serde(deserialize_with = "id")]
    pub chute_id: ChuteId,
    /// What ran before.
    #[serde(default, deserialize_with = "maybe_id")]
    pub old_version: Option<ChuteVersion>,
    /// What shall run.
    #[serde(default, deserialize_with = "maybe_id")]
    pub new_version: Option<ChuteVersion>,
    /// How many instances each hotkey may make again. On the wire a map, or a string with its JSON.
    #[serde(default, deserialize_with = "permitted")]
    pub permitted: BTreeMap<String, u64>,
}

/// An open bounty: `/bounties/`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BountyRow {
    /// The chute.
    #[serde(deserialize_with = "id")]
    pub chute_id: ChuteId,
    /// Its amount, in the validator's points.
    #[serde(default, rename = "bounty_amount", deserialize_with = "whole_or_zero")]
    pub amount: u64,
    /// How long it has been open, in s.
    #[serde(default, deserialize_with = "whole_or_zero")]
    pub seconds_elapsed: u64,
    /// How long it stays, in s.
    #[serde(default, deserialize_with = "whole")]
    pub time_remaining: Option<u64>,
}

/// An active instance of anybody: `/miner/active_instances/` (2026).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ActiveInstanceRow {
    /// Its key.
    #[serde(deserialize_with = "id")]
    pub instance_id: InstanceId,
    /// Its chute.
    #[serde(deserialize_with = "id")]
    pub chute_id: ChuteId,
    /// Whose.
    #[serde(default, deserialize_with = "or_default")]
    pub miner_hotkey: Option<String>,
    /// Since when.
    #[serde(default, deserialize_with = "time")]
    pub activated_at: Option<UnixMillis>,
    /// Weight of its time, in thousandths.
    #[serde(default, rename = "compute_multiplier", deserialize_with = "milli")]
    pub compute_multiplier_milli: Option<u64>,
}

/// A GPU type that the validator takes: a member of `/nodes/supported`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct SupportedGpu {
    /// Nominal memory in GB.
    #[serde(default, deserialize_with = "whole")]
    pub memory: Option<u64>,
    /// Multiprocessors.
    #[serde(default, deserialize_with = "whole")]
    pub processors: Option<u64>,
    /// Reference price, in millionths of a dollar per hour.
    #[serde(default, rename = "hourly_rate", deserialize_with = "micros")]
    pub hourly_rate_usd_micros: Option<u64>,
}

/// A GPU as it is advertised with `POST /nodes/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeAdvertisement {
    /// What the prover says of it.
    #[serde(flatten)]
    pub device: DeviceInfo,
    /// Position in the server.
    pub device_index: u32,
    /// Short reference of its type.
    pub gpu_identifier: String,
    /// Public address of the server.
    pub verification_host: String,
    /// Port of the GPU proof API there.
    pub verification_port: u16,
}

/// A sealed worker as it is announced with `POST /servers/` (`validator-protocol`, section 8.2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NewServer {
    /// Its public address.
    pub host: String,
    /// Its id: the UID of its node.
    pub id: ServerId,
    /// Its name.
    pub name: String,
    /// Its GPUs, as its attestation service lists them.
    pub gpus: Vec<NodeAdvertisement>,
}

/// The answer to `POST /nodes/`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Advertised {
    /// What to poll for, `{hotkey}::{id}`.
    pub task_id: String,
    /// The GPUs as the validator has them now.
    #[serde(default, deserialize_with = "or_default")]
    pub nodes: Vec<NodeRow>,
}

/// How far a verification is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VerificationStatus {
    /// Not decided. For ever, when the task is forgotten: the caller needs a deadline.
    Pending,
    /// All GPUs of the task are verified.
    Verified,
    /// Not verified, with the reason. The GPUs must be deleted and advertised again.
    Failed(String),
}

/// The answer to a launch request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchConfig {
    /// Names the launch.
    pub config: ConfigId,
    /// Single-use token for the container.
    pub token: Secret,
}

fn id<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(from: D) -> Result<T, D::Error> {
    String::deserialize(from)?.parse().map_err(D::Error::custom)
}

fn maybe_id<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(
    from: D,
) -> Result<Option<T>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.map(|text| text.parse().map_err(D::Error::custom))
        .transpose()
}

/// Images have no identifier type of their own; any identifier's rules are the rules.
fn text_id<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    id::<D, ChuteId>(from).map(|id| id.as_str().to_owned())
}

fn gpu<'de, D: Deserializer<'de>>(from: D) -> Result<GpuId, D::Error> {
    GpuId::from_device_uuid(&String::deserialize(from)?).map_err(D::Error::custom)
}

fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn sorted_texts<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let mut texts: Vec<String> = or_default(from)?;
    texts.sort();
    texts.dedup();
    Ok(texts)
}

fn length<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
    let items: Vec<serde::de::IgnoredAny> = or_default(from)?;
    Ok(items.len())
}

/// A whole number, a float that is one (or is cut to one), or nothing. Negative and absurd ones are errors.
fn whole<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    match Option::<Value>::deserialize(from)? {
        None => Ok(None),
        Some(value) => match value.as_u64().or_else(|| value.as_f64().and_then(float_to_u64)) {
            Some(number) => Ok(Some(number)),
            None => Err(D::Error::custom("not a number of things")),
        },
    }
}

fn whole_or_zero<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    whole(from).map(Option::unwrap_or_default)
}

fn whole_or_one<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    whole(from).map(|count| count.unwrap_or(1))
}

fn one() -> u64 {
    1
}

fn scaled<'de, D: Deserializer<'de>>(from: D, factor: f64) -> Result<Option<u64>, D::Error> {
    let number = Option::<f64>::deserialize(from)?;
    let scaled = number.map(|number| {
        // Rounding of averages can fall just below zero.
        let number = if (-1e-6..0.0).contains(&number) {
            0.0
        } else {
            number
        };
        float_to_u64((number * factor).round()).ok_or_else(|| D::Error::custom("not a sensible amount"))
    });
    scaled.transpose()
}

fn milli<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    scaled(from, 1e3)
}

fn micros<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    scaled(from, 1e6)
}

fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<UnixMillis>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.map(|text| times::iso8601(&text).ok_or_else(|| D::Error::custom("not a time")))
        .transpose()
}

fn permitted<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, u64>, D::Error> {
    fn read<T: DeserializeOwned, E: serde::de::Error>(value: Value) -> Result<T, E> {
        serde_json::from_value(value).map_err(E::custom)
    }
    match Option::<Value>::deserialize(from)? {
        None => Ok(BTreeMap::new()),
        Some(Value::String(json)) => serde_json::from_str(&json).map_err(D::Error::custom),
        Some(value) => read(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the protocol reference, with everything unknown left in.
    #[test]
    fn a_chute_row_is_read() {
        let json = r#"{"chute_id":"14a91d88-1","name":"acme/model","image_id":"im1","image":"acme/img:1.0-ab12cd34ef56","code":"x = 1\n","filename":"app.py","ref_str":"app:chute","version":"9a0c","chutes_version":"0.3.40","cords":[{"path":"/chat","function":"chat","stream":false}],"jobs":[{"name":"train","upload":true,"ports":[{"name":"ssh","port":2202,"default":true,"proto":"tcp"}],"disk_gb":20}],"node_selector":{"gpu_count":2,"min_vram_gb_per_gpu":24,"include":null,"exclude":["b200"],"compute_multiplier":0.0343,"supported_gpus":["4090","3090"]},"supported_gpus":["4090","3090","4090"],"public":true,"concurrency":16,"readme":null,"invocation_count":3.0,"effective_compute_multiplier":1.5}"#;
        let row: ChuteRow = serde_json::from_str(json).expect("a good row");
        assert_eq!(row.supported_gpus, ["3090", "4090"]);
        assert_eq!(row.node_selector.gpu_count, 2);
        assert_eq!(row.node_selector.compute_multiplier_milli, Some(34));
        assert_eq!(row.effective_compute_multiplier_milli, Some(1500));
        assert_eq!((row.cords, row.jobs.len(), row.jobs[0].disk_gb), (1, 1, Some(20)));
        assert_eq!(row.jobs[0].ports[0].protocol, PortProtocol::Tcp);
        assert_eq!((row.concurrency, row.preemptible, row.tee), (16, None, None));
    }

    #[test]
    fn missing_members_and_nulls_take_defaults() {
        let row: ChuteRow = serde_json::from_str(
            r#"{"chute_id":"c","version":"v","name":null,"jobs":null,"cords":null,"node_selector":null,"supported_gpus":null,"concurrency":null}"#,
        )
        .expect("tolerated");
        assert_eq!(
            (row.node_selector.gpu_count, row.cords, row.concurrency),
            (1, 0, 0)
        );
        let row: InstanceRow =
            serde_json::from_str(r#"{"instance_id":"n","chute_id":"c"}"#).expect("tolerated");
        assert!(!row.active && !row.verified && row.config_id.is_none());
    }

    #[test]
    fn rows_without_key_or_with_wrong_types_are_broken() {
        for json in [
            "{}",
            r#"{"chute_id":"c"}"#,
            r#"{"chute_id":7,"version":"v"}"#,
            r#"{"chute_id":"a/b","version":"v"}"#,
            r#"{"chute_id":"c","version":"v","supported_gpus":"4090"}"#,
            r#"{"chute_id":"c","version":"v","concurrency":-1}"#,
            r#"{"chute_id":"c","version":"v","node_selector":{"compute_multiplier":1e300}}"#,
        ] {
            assert!(serde_json::from_str::<ChuteRow>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn seeds_keep_every_bit_and_times_are_read() {
        let json = format!(
            r#"{{"uuid":"GPU-{}","seed":9223372036854775807,"server_id":"s1","verified_at":"2025-01-01T00:00:00","clock_rate":1980000.0}}"#,
            "ab".repeat(16)
        );
        let row: NodeRow = serde_json::from_str(&json).expect("a good row");
        assert_eq!(row.seed, Some(9_223_372_036_854_775_807));
        assert_eq!(row.verified_at, Some(UnixMillis(1_735_689_600_000)));
    }

    #[test]
    fn permitted_may_be_a_map_or_a_string() {
        for json in [
            r#"{"chute_id":"c","permitted":{"5A":2}}"#,
            r#"{"chute_id":"c","permitted":"{\"5A\": 2}"}"#,
        ] {
            let row: RollingUpdateRow = serde_json::from_str(json).expect("a good row");
            assert_eq!(row.permitted.get("5A"), Some(&2), "{json}");
        }
        for json in [r#"{"chute_id":"c","permitted":null}"#, r#"{"chute_id":"c"}"#] {
            let row: RollingUpdateRow = serde_json::from_str(json).expect("a good row");
            assert!(row.permitted.is_empty());
        }
        assert!(serde_json::from_str::<RollingUpdateRow>(r#"{"chute_id":"c","permitted":"x"}"#).is_err());
    }

    #[test]
    fn jobs_say_their_disk_and_whether_they_are_open() {
        let json = r#"{"job_id":"j","chute_id":"c","method":"m","job_args":{"_disk_gb":40,"x":[1]},"finished_at":"2025-09-25T12:01:45.123456+00:00"}"#;
        let row: JobRow = serde_json::from_str(json).expect("a good row");
        assert_eq!((row.disk_gb(), row.is_open()), (Some(40), false));
    }

    #[test]
    fn numbers_may_be_whole_or_floats() {
        let row: UtilizationRow = serde_json::from_str(
            r#"{"chute_id":"c","target_count":3.0,"utilization_current":0.4567,"utilization_5m":1,"scalable":false}"#,
        )
        .expect("a good row");
        assert_eq!(row.target_count, Some(3));
        assert_eq!(
            (row.utilization_current_milli, row.utilization_5m_milli),
            (Some(457), Some(1000))
        );
        assert_eq!((row.scalable, row.update_in_progress), (Some(false), None));
    }
}

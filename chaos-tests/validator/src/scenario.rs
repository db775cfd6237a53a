//! What a stand-in publishes and when, what it relaxes, and how it misbehaves: one TOML file, or the built-in
//! [`Scenario::development`]. Unknown keys are errors. All times are in the unit that ends their name.

use protocol::hotkey::{Hotkey, Signer};
use protocol::workload::Secret;
use serde::{Deserialize, Serialize};

use crate::faults::{EventFault, Faults, HttpFault};
use crate::pay::PayRule;

mod development;

/// Seed of the development miner, in hexadecimal. Worthless: it stands in the source.
pub const DEVELOPMENT_MINER_SEED: &str = "0101010101010101010101010101010101010101010101010101010101010101";
/// Seed of the development validator, in hexadecimal. Worthless: it stands in the source.
pub const DEVELOPMENT_VALIDATOR_SEED: &str =
    "0202020202020202020202020202020202020202020202020202020202020202";

/// Why a scenario file is refused.
#[derive(Debug, thiserror::Error)]
pub enum InvalidScenario {
    /// Not the TOML that is expected; the text names line and key.
    #[error("{0}")]
    Form(#[from] Box<toml::de::Error>),
    /// Well-formed but impossible.
    #[error("{0}")]
    Content(String),
}

/// A whole scenario.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scenario {
    /// For people.
    pub name: String,
    /// Seed of the validator's hotkey, hexadecimal.
    pub validator_seed: Secret,
    /// Miners that are registered at the start.
    pub hotkeys: Vec<Hotkey>,
    /// What is not as strict as in the real network.
    pub relaxed: Relaxed,
    /// Timers of the validator.
    pub timers: Timers,
    /// When launches are admitted.
    pub gates: Gates,
    /// Behaviour of the websocket.
    pub socket: SocketSettings,
    /// What instance time is worth.
    pub pay: PayRule,
    /// What goes wrong from the start.
    pub faults: Faults,
    /// Seed of all random choices of the faults.
    pub fault_seed: u64,
    /// Sites that chutes try to reach.
    pub egress: Egress,
    /// Blob requests are answered by a redirect to another path.
    pub redirect_blobs: bool,
    /// What is published and when.
    pub program: Vec<Step>,
    /// What a run must reach.
    pub goals: Goals,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            name: "empty".to_owned(),
            validator_seed: Secret::new(DEVELOPMENT_VALIDATOR_SEED.to_owned()),
            hotkeys: vec![],
            relaxed: Relaxed::default(),
            timers: Timers::default(),
            gates: Gates::default(),
            socket: SocketSettings::default(),
            pay: PayRule::default(),
            faults: Faults::default(),
            fault_seed: 1,
            egress: Egress::default(),
            redirect_blobs: false,
            program: vec![],
            goals: Goals::default(),
        }
    }
}

impl Scenario {
    /// Reads a scenario file.
    ///
    /// # Errors
    /// [`InvalidScenario`], naming the key.
    pub fn from_toml(text: &str) -> Result<Self, InvalidScenario> {
        let scenario: Self = toml::from_str(text).map_err(Box::new)?;
        scenario.signer()?;
        for gpu in &scenario.relaxed.gpu_types {
            let known = gpu.short_ref == proof::SOFTWARE.short_ref
                || protocol::gpu::gpu_type_of_short_ref(&gpu.short_ref).is_some();
            if !known {
                let text = format!("relaxed.gpu_types: there is no GPU type {:?}", gpu.short_ref);
                return Err(InvalidScenario::Content(text));
            }
        }
        Ok(scenario)
    }

    /// The validator's key.
    ///
    /// # Errors
    /// [`InvalidScenario::Content`] when the seed is malformed.
    pub fn signer(&self) -> Result<Signer, InvalidScenario> {
        Signer::from_seed_hex(self.validator_seed.reveal())
            .map_err(|error| InvalidScenario::Content(format!("validator_seed: {error}")))
    }

    /// One line for each thing that is less strict than in the real network.
    #[must_use]
    pub fn relaxed_lines(&self) -> Vec<String> {
        let relaxed = &self.relaxed;
        let mut lines = vec![];
        if relaxed.loopback_hosts {
            lines.push("loopback addresses count as public hosts".to_owned());
        }
        for gpu in &relaxed.gpu_types {
            lines.push(format!(
                "GPU type {}: proof estimate {} ms, accepted between {} and {} ms, launch deadline {} ms",
                gpu.short_ref, gpu.estimate_ms, gpu.prove_ms_min, gpu.prove_ms_max, gpu.launch_deadline_ms
            ));
        }
        if self.pay.vesting_seconds != PayRule::default().vesting_seconds {
            lines.push(format!(
                "instances vest after {} s instead of 1 h",
                self.pay.vesting_seconds
            ));
        }
        let strict = Timers::default();
        if self.timers.rolling_update_spacing_ms != strict.rolling_update_spacing_ms {
            lines.push("rolling updates notify faster than every 5 min".to_owned());
        }
        if self.timers.device_info_challenges != strict.device_info_challenges {
            lines.push(format!(
                "{} device challenges instead of {}",
                self.timers.device_info_challenges, strict.device_info_challenges
            ));
        }
        lines
    }
}

/// What is not as strict as in the real network.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Relaxed {
    /// 127.0.0.0/8 counts as public.
    pub loopback_hosts: bool,
    /// GPU types with other times; `software` exists only when it is named here.
    pub gpu_types: Vec<RelaxedGpu>,
}

/// Times of one GPU type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelaxedGpu {
    /// Which type.
    pub short_ref: String,
    /// Iterations of the proof.
    pub iterations: u32,
    /// Estimated time of the proof.
    pub estimate_ms: u64,
    /// A faster answer to `/prove` is refused.
    pub prove_ms_min: u64,
    /// A slower answer to `/prove` is refused.
    pub prove_ms_max: u64,
    /// Longest time from claim to verification.
    pub launch_deadline_ms: u64,
}

/// Timers (`validator-protocol`, sections 2.1, 3.6, 5 and 6.8).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timers {
    /// Life of a launch token.
    pub token_seconds: u64,
    /// An instance that is not verified for so long is deleted.
    pub unverified_seconds: u64,
    /// The same for the legacy flow.
    pub unverified_legacy_seconds: u64,
    /// A verified instance that is not active for so long is deleted.
    pub inactive_seconds: u64,
    /// How often those are looked for.
    pub cleanup_ms: u64,
    /// Pause between the notices of a rolling update; by the real rule when absent.
    pub rolling_update_spacing_ms: Option<u64>,
    /// A rolling update is over after this at the latest.
    pub rolling_update_seconds_max: u64,
    /// Challenges to `/info` in one verification.
    pub device_info_challenges: u32,
    /// Life of a bounty.
    pub bounty_seconds: u64,
    /// Results of GPU verification are kept so long.
    pub verification_result_seconds: u64,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            token_seconds: 7_200,
            unverified_seconds: 3_600,
            unverified_legacy_seconds: 4_500,
            inactive_seconds: 1_800,
            cleanup_ms: 60_000,
            rolling_update_spacing_ms: None,
            rolling_update_seconds_max: 3_600,
            device_info_challenges: 20,
            bounty_seconds: 86_400,
            verification_result_seconds: 3_600,
        }
    }
}

/// When launches are admitted (`validator-protocol`, section 6.3).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gates {
    /// Instances that the autoscaler wants of a chute that says nothing else; 0 is read as 1.
    pub target_count: u32,
    /// Private chutes need 2 activated public instances on 16 GPUs (since 2025-10).
    pub private_needs_public: bool,
    /// The routes of the legacy flow exist.
    pub legacy: bool,
    /// Hotkeys that are refused, with the reason.
    pub blacklist: Vec<(Hotkey, String)>,
}

/// The websocket.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SocketSettings {
    /// Time between pings.
    pub ping_interval_ms: u64,
    /// Time for the answer.
    pub ping_timeout_ms: u64,
    /// Only the last authenticated session of a hotkey gets its events, and the end of any session of it
    /// ends that (`validator-protocol`, section 2.4).
    pub one_session_per_hotkey: bool,
}

impl Default for SocketSettings {
    fn default() -> Self {
        Self {
            ping_interval_ms: 25_000,
            ping_timeout_ms: 20_000,
            one_session_per_hotkey: true,
        }
    }
}

/// Sites that chutes try to reach by name. Each has a listener on loopback; a development resolver leads there.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Egress {
    /// Names that a chute must reach.
    pub allowed: Vec<String>,
    /// Names that a chute must not reach.
    pub forbidden: Vec<String>,
}

/// What a run must reach to count as good.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Goals {
    /// GPUs verified.
    pub gpus_proved: u32,
    /// Instances that were verified and active, each chute counted once.
    pub deployments_verified: u32,
    /// Connections to allowed sites.
    pub egress_allowed: u32,
    /// Refusals of forbidden sites.
    pub egress_denied: u32,
    /// Jobs finished.
    pub jobs_finished: u32,
    /// Time for all of it.
    pub within_seconds: u32,
}

/// Something that happens at a time.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    /// Not before this long after the first start.
    #[serde(default)]
    pub at_ms: u64,
    /// Not before this chute (by name) has an active instance.
    #[serde(default)]
    pub when_active: Option<String>,
    /// What happens.
    #[serde(flatten)]
    pub action: Action,
}

/// What a scenario or the control interface can make the validator do. Chutes are named by name or id.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum Action {
    /// A new chute, with its image if that is new.
    PublishChute(Box<ChuteSpec>),
    /// New code, so a new version and a rolling update.
    UpdateChute {
        /// Which chute.
        chute: String,
        /// The new code; a comment is appended to the old when absent.
        #[serde(default)]
        code: Option<String>,
    },
    /// The owner deletes the chute.
    DeleteChute {
        /// Which chute.
        chute: String,
    },
    /// A newer chutes library is built into an image: same version, other tag, rolling update.
    PatchImage {
        /// `user/name:tag`.
        image: String,
        /// 12 hexadecimal digits.
        patch_version: String,
        /// The library's version.
        chutes_version: String,
    },
    /// The owner deletes an image.
    DeleteImage {
        /// `user/name:tag`.
        image: String,
    },
    /// Users wait for a chute.
    OfferBounty {
        /// Which chute.
        chute: String,
        /// Fixed amount; growing by the real rule when absent.
        #[serde(default)]
        amount: Option<u64>,
    },
    /// A user creates a job.
    OfferJob {
        /// Which chute.
        chute: String,
        /// Function to run.
        method: String,
        /// The chute stand-in works this long.
        #[serde(default)]
        work_ms: u64,
        /// Disk that it needs.
        #[serde(default = "ten")]
        disk_gb: u32,
    },
    /// A user deletes a job.
    DeleteJob {
        /// Which job.
        job_id: String,
    },
    /// Demand as the scaling hints show it.
    SetDemand {
        /// Which chute.
        chute: String,
        /// The hints.
        demand: Demand,
    },
    /// The validator deletes an instance.
    DeleteInstance {
        /// Which instance.
        instance_id: String,
        /// Cause, for people.
        #[serde(default)]
        message: Option<String>,
    },
    /// The validator deletes all instances of a chute.
    DeleteInstancesOf {
        /// Which chute.
        chute: String,
    },
    /// Faults from now on, replacing all others.
    SetFaults {
        /// The faults.
        faults: Faults,
    },
    /// One more HTTP fault.
    AddHttpFault {
        /// The fault.
        fault: HttpFault,
    },
    /// One more event fault.
    AddEventFault {
        /// The fault.
        fault: EventFault,
    },
    /// All sockets end.
    DropSockets {
        /// How.
        #[serde(default)]
        how: DropHow,
    },
    /// A hotkey appears in the metagraph.
    RegisterHotkey {
        /// Which hotkey.
        hotkey: Hotkey,
    },
    /// A hotkey leaves the metagraph; its nodes and instances go without an event.
    DeregisterHotkey {
        /// Which hotkey.
        hotkey: Hotkey,
    },
}

fn ten() -> u32 {
    10
}

/// How a socket ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropHow {
    /// The connection breaks without a word.
    #[default]
    Abrupt,
    /// Engine.IO close packet, then the websocket's close.
    Close,
    /// Socket.IO disconnect packet; the websocket stays open.
    Disconnect,
}

/// Demand of a chute.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Demand {
    /// Share of capacity in use.
    pub utilization: f64,
    /// Share of requests refused for lack of capacity.
    pub rate_limit_ratio: f64,
    /// Requests in the last hour.
    pub requests_per_hour: u64,
    /// Compute seconds in the last hour.
    pub compute_seconds_per_hour: f64,
    /// Instances that the autoscaler wants; the scenario's default when absent.
    pub target_count: Option<u32>,
}

impl Default for Demand {
    fn default() -> Self {
        Self {
            utilization: 0.5,
            rate_limit_ratio: 0.0,
            requests_per_hour: 600,
            compute_seconds_per_hour: 900.0,
            target_count: None,
        }
    }
}

/// A chute to publish.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChuteSpec {
    /// Name, unique for the user.
    pub name: String,
    /// Owner.
    pub username: String,
    /// `name:tag` of its image, of the same owner.
    pub image: String,
    /// Version of the chutes library in the image.
    pub chutes_version: Option<String>,
    /// Source text; a generated one when absent.
    pub code: Option<String>,
    /// File name of the source text.
    pub filename: String,
    /// What the container starts.
    pub ref_str: String,
    /// GPUs of one instance.
    pub gpu_count: u32,
    /// Least memory of each.
    pub min_vram_gb_per_gpu: u64,
    /// GPU types, all when empty.
    pub include: Vec<String>,
    /// GPU types that are not wanted.
    pub exclude: Vec<String>,
    /// Anyone may call it. Private chutes are never preempted and need a bounty or an instance.
    pub public: bool,
    /// It runs on sealed workers, and nowhere else.
    pub tee: bool,
    /// It may reach the internet.
    pub allow_external_egress: bool,
    /// Functions that answer requests; without any it runs jobs only.
    pub cords: Vec<String>,
    /// Functions that run as jobs.
    pub jobs: Vec<JobSpec>,
    /// Requests that one instance takes at a time.
    pub concurrency: u32,
    /// Idle private instances end after this.
    pub shutdown_after_seconds: u64,
    /// Urgency boost, in thousandths.
    pub boost_milli: u32,
    /// Demand as the scaling hints show it.
    pub demand: Option<Demand>,
}

impl Default for ChuteSpec {
    fn default() -> Self {
        Self {
            name: String::new(),
            username: "acme".to_owned(),
            image: "app:1.0".to_owned(),
            chutes_version: Some("0.3.40".to_owned()),
            code: None,
            filename: "app.py".to_owned(),
            ref_str: "app:chute".to_owned(),
            gpu_count: 1,
            min_vram_gb_per_gpu: 16,
            include: vec![],
            exclude: vec![],
            public: true,
            tee: false,
            allow_external_egress: true,
            cords: vec!["chat".to_owned()],
            jobs: vec![],
            concurrency: 16,
            shutdown_after_seconds: 300,
            boost_milli: 1000,
            demand: None,
        }
    }
}

impl ChuteSpec {
    /// True without any function that answers requests.
    #[must_use]
    pub fn job_only(&self) -> bool {
        self.cords.is_empty()
    }
}

/// A function that runs as a job.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobSpec {
    /// Name of the function.
    pub name: String,
    /// Ports that it listens on.
    pub ports: Vec<JobPort>,
    /// Longest time in seconds.
    pub timeout: Option<u64>,
    /// It uploads its output.
    pub upload: bool,
    /// Disk that it needs.
    pub disk_gb: Option<u32>,
}

/// A port of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobPort {
    /// For people.
    pub name: String,
    /// Port inside the container.
    pub port: u16,
    /// `tcp`, `udp` or `http`.
    pub proto: String,
    /// The one that users are led to.
    #[serde(default)]
    pub default: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_development_scenario_is_its_own_toml() {
        let scenario = Scenario::development();
        let text = toml::to_string(&scenario).expect("a scenario can be written");
        let read = Scenario::from_toml(&text).expect("and read");
        assert_eq!(
            serde_json::to_value(&read).expect("plain data"),
            serde_json::to_value(&scenario).expect("plain data")
        );
        let chutes: Vec<&ChuteSpec> = scenario
            .program
            .iter()
            .filter_map(|step| match &step.action {
                Action::PublishChute(spec) => Some(spec.as_ref()),
                _ => None,
            })
            .collect();
        let runnable = chutes.iter().filter(|chute| chute.include.is_empty());
        assert!(runnable.map(|chute| chute.gpu_count).sum::<u32>() <= 8);
        assert!(chutes.len() > 5);
        assert!(scenario.program.iter().all(|step| step.at_ms <= 20_000));
        assert!(!scenario.relaxed_lines().is_empty());
        assert!(Scenario::default().relaxed_lines().is_empty());
    }

    #[test]
    fn wrong_scenarios_are_refused_with_the_key() {
        for (text, key) in [
            ("nmae = 'x'", "nmae"),
            ("[timers]\ntoken = 1", "token"),
            ("validator_seed = 'zz'", "validator_seed"),
            ("hotkeys = ['abc']\nvalidator_seed = 1", "validator_seed"),
            (
                "[[relaxed.gpu_types]]\nshort_ref='g200'\niterations=1\nestimate_ms=1\nprove_ms_min=0\nprove_ms_max=1\nlaunch_deadline_ms=1",
                "g200",
            ),
        ] {
            let error = Scenario::from_toml(text).expect_err(text).to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}

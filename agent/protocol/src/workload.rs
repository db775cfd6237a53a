//! What should run on a server, and what the server says of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::hotkey::Hotkey;
use crate::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId, JobId};

/// Orders the desired sets of one server. Compared as a pair: a restored cluster has a higher incarnation,
/// every change of the set a higher revision. A host refuses a lower fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Fence {
    /// Set when the cluster is made, raised by snapshot restore and quorum recovery.
    pub incarnation: u64,
    /// Raised by every change of the server's desired set.
    pub revision: u64,
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({}, {})", self.incarnation, self.revision)
    }
}

/// A text that must not reach a log: `Debug` prints its length only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The secret itself, for the one place that needs it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} bytes)", self.0.len())
    }
}

/// Transport of a port that a chute listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortProtocol {
    /// A plain TCP port.
    Tcp,
    /// A UDP port.
    Udp,
    /// A TCP port that speaks HTTP; exported to the chute under its own name.
    Http,
}

impl PortProtocol {
    /// The word in `CHUTES_PORT_{WORD}_{port}`.
    #[must_use]
    pub fn env_word(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Http => "HTTP",
        }
    }
}

/// The port of the app inside a chute.
pub const PRIMARY_PORT: u16 = 8000;
/// The port of the log server inside a chute.
pub const LOGGING_PORT: u16 = 8001;
/// The port inside a chute on a sealed worker that shows what it runs in.
pub const ATTESTATION_PORT: u16 = 8002;

/// A port inside the chute that must be reachable from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Port {
    /// Port number that the chute listens on.
    pub internal: u16,
    /// Its transport.
    pub protocol: PortProtocol,
}

/// A port of a running workload and where it is reached from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    /// Port inside the chute.
    pub internal: u16,
    /// Port on the server's address.
    pub external: u16,
    /// Its transport.
    pub protocol: PortProtocol,
}

/// Everything that a server needs to run one deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadSpec {
    /// Names the workload; `chute-{deployment}` on Kubernetes.
    pub deployment: DeploymentId,
    /// The validator that the deployment belongs to.
    pub validator: Hotkey,
    /// Us.
    pub miner: Hotkey,
    /// The chute to run.
    pub chute: ChuteId,
    /// Its version.
    pub version: ChuteVersion,
    /// Image without registry: `user/name:tag`.
    pub image: String,
    /// `module:variable` that the runtime inside the image starts.
    pub ref_str: String,
    /// File name of the code.
    pub filename: String,
    /// Source text of the chute.
    pub code: String,
    /// Version of the chutes library in the image.
    pub chutes_version: Option<String>,
    /// The GPUs that it may use, all on this server.
    pub gpus: Vec<GpuId>,
    /// Address under which the validator reaches the server.
    pub external_host: String,
    /// Launch config, in the launch-config flow.
    pub config: Option<ConfigId>,
    /// Single-use token that belongs to the launch config.
    pub launch_token: Option<Secret>,
    /// Seed of the GPU proof, in the legacy flow.
    pub legacy_seed: Option<u64>,
    /// The job, when this is one.
    pub job: Option<JobId>,
    /// Ports: the app, the log server, then those of the job.
    pub ports: Vec<Port>,
    /// CPUs in all.
    pub cpu_count: u32,
    /// RAM in all, in GB.
    pub memory_gb: u32,
    /// Disk in all, in GB.
    pub disk_gb: u32,
}

impl WorkloadSpec {
    /// False if it was started before: what starts it is good once and was used, so a server has it already, or it
    /// has ended.
    #[must_use]
    pub fn can_be_started(&self) -> bool {
        self.launch_token.is_some() || self.legacy_seed.is_some()
    }
}

/// How far a workload is, as its server sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkloadPhase {
    /// Accepted, nothing started yet.
    Pending,
    /// The image is being pulled.
    Pulling {
        /// Bytes received so far.
        bytes_done: u64,
    },
    /// Its process exists and is not known to be ready.
    Running {
        /// Where its ports are reached.
        ports: Vec<PortMapping>,
        /// Its health check passes.
        ready: bool,
    },
    /// It is being stopped and still holds its GPUs.
    Stopping,
    /// It ended by itself. It holds no GPU; it stays listed until it is no longer desired.
    Ended {
        /// Exit code, when there was one.
        exit_code: Option<i32>,
        /// What a person should know, one line.
        reason: String,
    },
}

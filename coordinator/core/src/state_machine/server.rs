//! Servers and their GPUs: what a host says of itself, under which terms it serves a validator, and who
//! holds each GPU.

use protocol::gpu::DeviceInfo;
use protocol::hotkey::Hotkey;
use protocol::id::{DeploymentId, GpuId, ServerId};
use protocol::report::HostFacts;
use protocol::time::UnixMillis;
use protocol::workload::Fence;
use serde::{Deserialize, Serialize};

/// How long a validator may take to verify a server's GPUs, from the operator's request on, in ms.
pub const ENROLMENT_TIMEOUT_MS: u64 = 30 * 60 * 1000;

/// A host that has joined, with GPUs or without.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// What it said of itself last.
    pub facts: HostFacts,
    /// When it joined.
    pub joined_at: UnixMillis,
    /// False while it has been silent for longer than the leader allows.
    pub reachable: bool,
    /// Why it gets no new work although the operator did not lock it.
    pub quarantine: Option<String>,
    /// The operator wants no new work on it.
    pub locked: bool,
    /// Under which terms it works for a validator; none until the operator adds it.
    pub enrolment: Option<Enrolment>,
    /// Why the last enrolment ended, for the person who asked for it.
    pub last_failure: Option<String>,
    /// Grows with every change of the server's desired set.
    pub revision: u64,
    /// The desired set that its last report was about.
    pub reported: Option<Fence>,
    /// Workloads in its last report that no deployment of ours accounts for. They may be using any GPU.
    pub strangers: Vec<DeploymentId>,
}

impl Server {
    /// A host that has just joined.
    #[must_use]
    pub fn new(facts: HostFacts, at: UnixMillis) -> Self {
        Self {
            facts,
            joined_at: at,
            reachable: true,
            quarantine: None,
            locked: false,
            enrolment: None,
            last_failure: None,
            revision: 0,
            reported: None,
            strangers: Vec::new(),
        }
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> &ServerId {
        &self.facts.server
    }

    /// The terms, if they are in force: added, verified, not leaving.
    #[must_use]
    pub fn ready_enrolment(&self) -> Option<&Enrolment> {
        self.enrolment
            .as_ref()
            .filter(|enrolment| enrolment.phase == EnrolmentPhase::Ready)
    }
}

/// A server's work for one validator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolment {
    /// The only validator it may earn from.
    pub validator: Hotkey,
    /// GPU type that the operator named, as the validator calls it.
    pub gpu_short_ref: String,
    /// What one GPU costs the operator for an hour, in millionths of a dollar.
    pub hourly_cost_usd_micros: u64,
    /// Seed that the validator gave with the verification; legacy chutes need it.
    pub seed: Option<u64>,
    /// How far it is.
    pub phase: EnrolmentPhase,
    /// When the operator asked for it.
    pub added_at: UnixMillis,
    /// When to give up if it is not ready.
    pub deadline: UnixMillis,
}

/// Life of an enrolment. `Ready` waits for nothing; the others name what they wait for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EnrolmentPhase {
    /// The GPUs are being announced to the validator.
    Advertising,
    /// The validator is checking them.
    Verifying {
        /// Under which it can be asked.
        task: String,
    },
    /// They count as capacity.
    Ready,
    /// The validator is being told that they leave; workloads are being stopped.
    Leaving {
        /// Why.
        reason: String,
    },
}

/// One GPU of an enrolled server. Its `holder` is the allocation: there is no other record of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// What the prover said of it.
    pub device: DeviceInfo,
    /// Where it is.
    pub server: ServerId,
    /// The type that chutes name.
    pub short_ref: String,
    /// When the validator accepted it; it is no capacity before.
    pub verified_at: Option<UnixMillis>,
    /// The deployment that has it, until the host has confirmed that the workload is gone.
    pub holder: Option<DeploymentId>,
    /// The deployment that gets it next.
    pub promised_to: Option<DeploymentId>,
}

impl Gpu {
    /// Its identity.
    #[must_use]
    pub fn id(&self) -> &GpuId {
        &self.device.uuid
    }

    /// True if a deployment may take it now.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.verified_at.is_some() && self.holder.is_none() && self.promised_to.is_none()
    }
}

//! Life of a deployment.
//!
//! ```text
//! Requested --> Assigned --> Launched --> Serving --> Stopping --> Draining --> (audit row)
//!     |  token       | host runs  | verified    | out of the     | validator     ^ host confirms
//!     |  + GPUs      | it         | and active  | desired set    | told          | that it is gone
//!     +--------------+------------+-------------+----------------+---------------+
//! ```
//! Phases only go forward, by [`Deployment::enter`]. *Running, claimed, verified, active* are facts with
//! times that may arrive in any order, since events overtake reports.

use protocol::id::{ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::time::UnixMillis;
use protocol::workload::PortMapping;
use serde::{Deserialize, Serialize};

use super::chute::{ChuteKey, VersionKey};

/// Phases, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Waits for the launch token and, where victims must drain first, for the GPUs.
    Requested,
    /// In the server's desired set; waits for the host to run it.
    Assigned,
    /// Runs; waits to be verified and activated.
    Launched,
    /// Verified and active: it earns.
    Serving,
    /// Out of the desired set; waits for the validator to have been told.
    Stopping,
    /// Waits for the host to confirm that it is gone; its GPUs are not free yet.
    Draining,
}

/// How long a running workload may go without claiming its launch config, in ms: the reference's 30 min
/// (`scheduling`, section 3.4). Its instance may also have been claimed and deleted with both events missed.
pub const UNCLAIMED_PATIENCE_MS: u64 = 30 * 60_000;

impl Phase {
    /// True if the server should run it.
    #[must_use]
    pub fn is_desired(self) -> bool {
        matches!(self, Self::Assigned | Self::Launched | Self::Serving)
    }

    /// True until it is being taken down.
    #[must_use]
    pub fn is_live(self) -> bool {
        self < Self::Stopping
    }

    /// How long the phase may last without progress, in ms. A serving deployment waits for nothing.
    #[must_use]
    pub fn patience_ms(self) -> u64 {
        const MINUTE: u64 = 60_000;
        match self {
            Self::Requested => 10 * MINUTE,
            Self::Assigned => 30 * MINUTE,
            Self::Launched => 120 * MINUTE,
            Self::Serving => u64::MAX,
            Self::Stopping | Self::Draining => 10 * MINUTE,
        }
    }
}

/// How a deployment becomes known to its validator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Flow {
    /// The workload announces itself with a token (chutes library 0.3.0 and newer).
    LaunchConfig,
    /// We announce and activate it.
    Legacy,
}

/// Why a deployment is taken down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopReason {
    /// The validator refused the launch.
    LaunchRefused(String),
    /// A phase lasted too long.
    DeadlinePassed(Phase),
    /// The workload ended by itself.
    WorkloadEnded(String),
    /// The host does not have it although it should.
    WorkloadVanished,
    /// The validator deleted the instance.
    InstanceDeleted(String),
    /// The validator does not list the instance any more.
    InstanceMissing,
    /// The chute was taken out of the catalogue.
    ChuteDeleted,
    /// The job was withdrawn.
    JobDeleted,
    /// It made room for another.
    Preempted(DeploymentId),
    /// It made room for a newer version of its chute.
    Superseded(DeploymentId),
    /// A person asked for it.
    Operator(String),
    /// Its server leaves.
    ServerLeaving,
    /// The strategy wanted it.
    Strategy(String),
}

impl StopReason {
    /// True if the launch itself failed, which counts against the chute on this GPU type.
    #[must_use]
    pub fn is_launch_failure(&self) -> bool {
        matches!(
            self,
            Self::DeadlinePassed(_) | Self::WorkloadEnded(_) | Self::WorkloadVanished
        )
    }
}

/// What is known of a deployment, in any order; the time is when we learnt it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Its process exists.
    pub running_at: Option<UnixMillis>,
    /// Its health check passed.
    pub ready_at: Option<UnixMillis>,
    /// The launch config was claimed: the validator has an instance.
    pub claimed_at: Option<UnixMillis>,
    /// The validator verified the instance.
    pub verified_at: Option<UnixMillis>,
    /// The validator sends requests to it.
    pub active_at: Option<UnixMillis>,
}

/// How far the end of a deployment is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// Why.
    pub reason: StopReason,
    /// Since when.
    pub at: UnixMillis,
    /// Revision of the server's desired set that first lacked it; none if it never was in one.
    pub removed_at_revision: Option<u64>,
    /// The host has confirmed that nothing of it is left.
    pub absent: bool,
}

/// Our attempt to run a chute on certain GPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    /// Its name.
    pub id: DeploymentId,
    /// What it runs.
    pub chute: ChuteKey,
    /// In which version.
    pub version: ChuteVersion,
    /// The image at the time of placement: a patched image does not restart what runs.
    pub image: String,
    /// The chutes library in that image.
    pub chutes_version: Option<String>,
    /// Where.
    pub server: ServerId,
    /// On which GPUs.
    pub gpus: Vec<GpuId>,
    /// For which job.
    pub job: Option<JobId>,
    /// May be stopped for another.
    pub preemptible: bool,
    /// How the validator learns of it.
    pub flow: Flow,
    /// Where it stands.
    pub phase: Phase,
    /// Since when.
    pub phase_since: UnixMillis,
    /// When the phase has lasted too long.
    pub deadline: UnixMillis,
    /// Why it was placed here.
    pub reason: String,
    /// Who must go first; stopped when the token is there.
    pub victims: Vec<DeploymentId>,
    /// Ties it to its instance.
    pub config: Option<ConfigId>,
    /// The launch token, sealed; erased once used.
    pub sealed_token: Option<Vec<u8>>,
    /// The validator's record.
    pub instance: Option<InstanceId>,
    /// What is known.
    pub facts: Facts,
    /// Where its ports are reached, once it runs.
    pub ports: Vec<PortMapping>,
    /// Image bytes received, as the host last said.
    pub bytes_pulled: u64,
    /// Revision of the server's desired set that first had it.
    pub assigned_at_revision: Option<u64>,
    /// First listing that lacked its instance.
    pub missing_since: Option<UnixMillis>,
    /// The validator wants it replaced by this version.
    pub superseded_by: Option<ChuteVersion>,
    /// How far its end is.
    pub stop: Option<Stop>,
    /// When it was placed.
    pub created_at: UnixMillis,
}

impl Deployment {
    /// Goes forward to `phase`; nothing happens if it is there or beyond.
    pub fn enter(&mut self, phase: Phase, at: UnixMillis) {
        if phase > self.phase {
            self.phase = phase;
            self.phase_since = at;
            self.progressed(at);
        }
    }

    /// How long the present phase may last without progress, in ms. A workload that runs claims its launch
    /// config soon or never; loading a model afterwards may take long.
    fn patience_ms(&self) -> u64 {
        let unclaimed = self.phase == Phase::Launched && self.facts.claimed_at.is_none();
        if unclaimed {
            UNCLAIMED_PATIENCE_MS
        } else {
            self.phase.patience_ms()
        }
    }

    /// Puts the deadline off because something moved.
    pub fn progressed(&mut self, at: UnixMillis) {
        self.deadline = at + self.patience_ms();
    }

    /// The version row that it needs.
    #[must_use]
    pub fn version_key(&self) -> VersionKey {
        VersionKey {
            chute: self.chute.clone(),
            version: self.version.clone(),
        }
    }

    /// Its job, if the validator may still count on us for it when the deployment is taken down for this
    /// reason. Giving back a job that is over, or that was never ours, changes nothing there.
    #[must_use]
    pub fn job_to_give_back(&self, reason: &StopReason) -> Option<&JobId> {
        let settled = matches!(
            reason,
            StopReason::JobDeleted | StopReason::LaunchRefused(_) | StopReason::InstanceDeleted(_)
        );
        self.job.as_ref().filter(|_| !settled)
    }

    /// True once the validator sends requests to it and has verified it.
    #[must_use]
    pub fn earns(&self) -> bool {
        self.facts.verified_at.is_some() && self.facts.active_at.is_some()
    }
}

/// What is left of a deployment: for people, for `explain`, and to know a late instance for ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// Its last state.
    pub deployment: Deployment,
    /// When it was gone.
    pub gone_at: UnixMillis,
}

/// How long an audit row is kept, in ms.
pub const AUDIT_MEMORY_MS: u64 = 8 * 24 * 3_600_000;
/// How many audit rows are kept.
pub const AUDIT_ROWS_MAX: usize = 20_000;

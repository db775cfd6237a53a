//! Side effects as data: what is to be done at a validator, and how it can end.
//!
//! An effect is done at least once and is safe to repeat; "already done" and "refused" are outcomes like
//! any other. Only where the validator answers once (a job's launch config) the repeat is refused there,
//! and that refusal is an outcome too.

use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

/// Names an effect; grows.
pub type EffectId = u64;

/// Effects of one subject are done in their order; those of different subjects side by side.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Subject {
    /// Everything about one deployment.
    Deployment(DeploymentId),
    /// Everything about one server and its GPUs.
    Server(ServerId),
    /// An instance that no deployment accounts for, or none any more.
    Instance(InstanceId),
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EffectKind {
    /// `GET /instances/launch_config`.
    FetchLaunchConfig {
        /// For whom.
        deployment: DeploymentId,
        /// What it runs.
        chute: ChuteId,
        /// For which job: the validator answers this once per hotkey.
        job: Option<JobId>,
    },
    /// Legacy: `POST /instances/{chute}/`.
    AnnounceInstance {
        /// Who.
        deployment: DeploymentId,
        /// What it runs.
        chute: ChuteId,
        /// Its GPUs.
        gpus: Vec<GpuId>,
        /// Where the validator reaches it.
        host: String,
        /// On which port.
        port: u16,
    },
    /// Legacy: `PATCH /instances/{chute}/{instance}`.
    ActivateInstance {
        /// Who.
        deployment: DeploymentId,
        /// What it runs.
        chute: ChuteId,
        /// Its instance.
        instance: InstanceId,
    },
    /// `DELETE /instances/{chute}/{instance}`.
    DeleteInstance {
        /// What it ran.
        chute: ChuteId,
        /// Which instance.
        instance: InstanceId,
    },
    /// `DELETE /miner/jobs/{job}`.
    ReleaseJob {
        /// Which.
        job: JobId,
    },
    /// `POST /nodes/` with all GPUs of the server.
    AdvertiseGpus {
        /// Which server.
        server: ServerId,
    },
    /// `GET /nodes/verification_status`, until it says something final.
    AwaitVerification {
        /// Which server.
        server: ServerId,
        /// Under which it is asked.
        task: String,
        /// When to stop asking.
        until: UnixMillis,
    },
    /// `DELETE /nodes/{gpu}`.
    DeleteGpu {
        /// Which.
        gpu: GpuId,
    },
}

/// Something to do outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effect {
    /// Names it; grows.
    pub id: EffectId,
    /// In whose order it stands.
    pub subject: Subject,
    /// At which validator.
    pub validator: Hotkey,
    /// What.
    pub kind: EffectKind,
    /// Since when it waits.
    pub created_at: UnixMillis,
}

/// How an effect ended. An error that may pass is no end: the executor tries again.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EffectOutcome {
    /// Done, or found to be done already.
    Done,
    /// The validator said no, for good or for now.
    Refused {
        /// HTTP status.
        status: u16,
        /// What it said.
        detail: String,
    },
    /// A launch config.
    LaunchConfig {
        /// Its name.
        config: ConfigId,
        /// Its token, sealed by the signer.
        sealed_token: Vec<u8>,
    },
    /// The instance was announced.
    Announced {
        /// Its name.
        instance: InstanceId,
    },
    /// The instance was activated.
    Activated {
        /// And is verified already.
        verified: bool,
    },
    /// The GPUs were announced.
    Advertised {
        /// Under which the verification can be asked for.
        task: String,
        /// Seed of their proof.
        seed: u64,
    },
    /// The GPUs were verified.
    Verified,
    /// The GPUs were not accepted.
    VerificationFailed {
        /// What the validator said.
        detail: String,
    },
}

impl std::fmt::Debug for EffectOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Done => f.write_str("Done"),
            Self::Refused { status, detail } => write!(f, "Refused({status}, {detail:?})"),
            Self::LaunchConfig { config, .. } => write!(f, "LaunchConfig({config})"),
            Self::Announced { instance } => write!(f, "Announced({instance})"),
            Self::Activated { verified } => write!(f, "Activated(verified: {verified})"),
            Self::Advertised { task, .. } => write!(f, "Advertised({task})"),
            Self::Verified => f.write_str("Verified"),
            Self::VerificationFailed { detail } => write!(f, "VerificationFailed({detail:?})"),
        }
    }
}

//! A server of another miner with what runs on it, as that one's record has it.

use protocol::hotkey::Hotkey;
use protocol::id::{ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::time::UnixMillis;
use protocol::workload::PortMapping;
use serde::{Deserialize, Serialize};

use super::chute::{ChuteCode, ChuteDefinition};
use super::deployment::{Deployment, Facts};

/// A server as the other miner's record has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adoption {
    /// Which of ours it is.
    pub server: ServerId,
    /// For whom it works.
    pub validator: Hotkey,
    /// GPU type in the validator's words.
    pub gpu_short_ref: String,
    /// Cost of one GPU for an hour, in millionths of a dollar.
    pub hourly_cost_usd_micros: u64,
    /// Seed that the validator gave with the verification.
    pub seed: Option<u64>,
    /// It gets no new work.
    pub locked: bool,
    /// Its GPUs, and whether the validator has accepted them.
    pub gpus: Vec<(GpuId, bool)>,
    /// What runs on it.
    pub deployments: Vec<AdoptedDeployment>,
}

/// A deployment as the other miner's record and the cluster have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedDeployment {
    /// Its name, which stays.
    pub id: DeploymentId,
    /// Its chute, as the other miner knows it.
    pub chute: ChuteDefinition,
    /// Code of that version.
    pub code: ChuteCode,
    /// The version that runs.
    pub version: ChuteVersion,
    /// The image that runs, without registry.
    pub image: String,
    /// Version of the chutes library in it.
    pub chutes_version: Option<String>,
    /// Its GPUs.
    pub gpus: Vec<GpuId>,
    /// Its job, if it is for one.
    pub job: Option<JobId>,
    /// Its launch config.
    pub config: Option<ConfigId>,
    /// The validator's record.
    pub instance: Option<InstanceId>,
    /// May be stopped for another.
    pub preemptible: bool,
    /// What is known of it; what is in the future counts as now.
    pub facts: Facts,
    /// Where its ports are reached.
    pub ports: Vec<PortMapping>,
    /// When it was placed.
    pub created_at: Option<UnixMillis>,
}

impl AdoptedDeployment {
    /// What is known of it there and not here.
    pub(super) fn news_for(&self, known: &Deployment) -> [(&'static str, bool); 3] {
        let is_new = |there: Option<UnixMillis>, here: Option<UnixMillis>| there.is_some() && here.is_none();
        let (there, here) = (&self.facts, &known.facts);
        [
            ("claimed", self.instance.is_some() && known.instance.is_none()),
            ("verified", is_new(there.verified_at, here.verified_at)),
            ("active", is_new(there.active_at, here.active_at)),
        ]
    }
}

//! What a host observes and reports.

use serde::{Deserialize, Serialize};

use crate::gpu::DeviceInfo;
use crate::id::{DeploymentId, ServerId};
use crate::workload::{Fence, WorkloadPhase};

/// One workload on a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadStatus {
    /// Whose workload.
    pub deployment: DeploymentId,
    /// How far it is.
    pub phase: WorkloadPhase,
}

/// All workloads of a server, after it has made the desired set of `fence` its own. What is not listed
/// does not exist on the server and holds none of its GPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadReport {
    /// The desired set that the host is working on.
    pub fence: Fence,
    /// Every workload that exists there, wanted or not.
    pub workloads: Vec<WorkloadStatus>,
}

/// What a host says of itself when it joins and whenever it changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Its identity.
    pub server: ServerId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// Address under which validators reach it: an IP address or a DNS name.
    pub address: String,
    /// Port of its GPU proof API.
    pub proof_port: u16,
    /// Its GPUs, as its prover sees them.
    pub devices: Vec<DeviceInfo>,
    /// CPUs in all.
    pub cpu_count: u32,
    /// RAM in all, in GB.
    pub memory_gb: u32,
    /// Disk left for workloads, in GB.
    pub disk_free_gb: u32,
    /// Version of its agent.
    pub agent_version: String,
}

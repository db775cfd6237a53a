//! A host as the state machine's tests need it: it takes desired sets over late, starts and stops workloads
//! one by one, and reports what really runs.

use std::collections::BTreeMap;

use coordinator_core::state_machine::desired::DesiredSet;
use protocol::gpu::DeviceInfo;
use protocol::id::{ConfigId, DeploymentId, GpuId, ServerId};
use protocol::report::{HostFacts, WorkloadReport, WorkloadStatus};
use protocol::workload::{Fence, PRIMARY_PORT, PortMapping, PortProtocol, WorkloadPhase};

#[derive(Debug, Clone)]
pub(crate) struct Running {
    pub(crate) gpus: Vec<GpuId>,
    pub(crate) config: Option<ConfigId>,
    pub(crate) ready: bool,
    pub(crate) ended: bool,
}

#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) facts: HostFacts,
    pub(crate) desired: DesiredSet,
    pub(crate) running: BTreeMap<DeploymentId, Running>,
}

impl Host {
    pub(crate) fn new(number: u8, gpu_count: u8) -> Self {
        let devices = (0..gpu_count).map(|gpu| DeviceInfo {
            uuid: GpuId::from_device_uuid(&format!("{number:02x}{gpu:02x}{}", "0".repeat(28))).unwrap(),
            name: "NVIDIA RTX A6000".to_owned(),
            memory: 51_000_000_000,
            processors: 84,
            clock_rate_khz: 1_800_000,
            max_threads_per_processor: 1536,
        });
        let facts = HostFacts {
            server: ServerId::parse(&format!("server-{number}")).unwrap(),
            name: format!("host-{number}"),
            address: format!("203.0.113.{number}"),
            proof_port: 30443,
            devices: devices.collect(),
            cpu_count: 32,
            memory_gb: 256,
            disk_free_gb: 500,
            agent_version: "0.1.0".to_owned(),
        };
        let desired = DesiredSet {
            fence: Fence::default(),
            workloads: vec![],
        };
        Self {
            facts,
            desired,
            running: BTreeMap::new(),
        }
    }

    /// Takes a set over unless it is of a lower fence.
    pub(crate) fn take(&mut self, set: DesiredSet) {
        if set.fence >= self.desired.fence {
            self.desired = set;
        }
    }

    /// Stops one unwanted workload, or starts one wanted one; false if all is as desired.
    pub(crate) fn converge_once(&mut self, pick: &mut fastrand::Rng) -> bool {
        let wanted: BTreeMap<&DeploymentId, _> = self
            .desired
            .workloads
            .iter()
            .map(|w| (&w.spec.deployment, w))
            .collect();
        let unwanted: Vec<DeploymentId> = self
            .running
            .keys()
            .filter(|id| !wanted.contains_key(id))
            .cloned()
            .collect();
        let missing: Vec<_> = wanted
            .values()
            .filter(|w| !self.running.contains_key(&w.spec.deployment))
            .collect();
        if !unwanted.is_empty() && (missing.is_empty() || pick.bool()) {
            self.running.remove(&unwanted[pick.usize(..unwanted.len())]);
            return true;
        }
        let Some(workload) = missing.get(pick.usize(..missing.len().max(1))) else {
            return false;
        };
        let running = Running {
            gpus: workload.spec.gpus.clone(),
            config: workload.spec.config.clone(),
            ready: false,
            ended: false,
        };
        self.running.insert(workload.spec.deployment.clone(), running);
        true
    }

    pub(crate) fn report(&self) -> WorkloadReport {
        let mut workloads: BTreeMap<DeploymentId, WorkloadPhase> = self
            .desired
            .workloads
            .iter()
            .map(|workload| (workload.spec.deployment.clone(), WorkloadPhase::Pending))
            .collect();
        for (id, running) in &self.running {
            let ports = vec![PortMapping {
                internal: PRIMARY_PORT,
                external: 31000,
                protocol: PortProtocol::Tcp,
            }];
            let phase = if running.ended {
                WorkloadPhase::Ended {
                    exit_code: Some(1),
                    reason: "crashed".to_owned(),
                }
            } else {
                WorkloadPhase::Running {
                    ports,
                    ready: running.ready,
                }
            };
            workloads.insert(id.clone(), phase);
        }
        let workloads = workloads
            .into_iter()
            .map(|(deployment, phase)| WorkloadStatus { deployment, phase });
        WorkloadReport {
            fence: self.desired.fence,
            workloads: workloads.collect(),
        }
    }

    /// Two live processes on one GPU, if there are.
    pub(crate) fn shared_gpu(&self) -> Option<String> {
        let mut users: BTreeMap<&GpuId, &DeploymentId> = BTreeMap::new();
        for (id, running) in self.running.iter().filter(|(_, running)| !running.ended) {
            for gpu in &running.gpus {
                if let Some(other) = users.insert(gpu, id) {
                    return Some(format!("{other} and {id} both run on GPU {gpu}"));
                }
            }
        }
        None
    }
}

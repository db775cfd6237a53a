//! What each server should run, under its fence. Derived from the deployments: there is no second record.

use protocol::id::{ChuteVersion, DeploymentId, ServerId};
use protocol::workload::{
    ATTESTATION_PORT, Fence, LOGGING_PORT, PRIMARY_PORT, Port, PortProtocol, WorkloadSpec,
};

use super::chute::attests;
use super::deployment::{Deployment, Flow};
use super::state::State;

/// A workload that a server should run; the launch token is still sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredWorkload {
    /// All but the token.
    pub spec: WorkloadSpec,
    /// The token, for the leader to unseal on the way to the host.
    pub sealed_token: Option<Vec<u8>>,
}

/// All that one server should run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredSet {
    /// Orders it among the sets of this server.
    pub fence: Fence,
    /// In order of their deployments.
    pub workloads: Vec<DesiredWorkload>,
}

impl State {
    /// The fence of a server's present set.
    #[must_use]
    pub fn fence_of(&self, server: &ServerId) -> Option<Fence> {
        let revision = self.servers.get(server)?.revision;
        Some(Fence {
            incarnation: self.settings.incarnation,
            revision,
        })
    }

    /// What a server should run now.
    #[must_use]
    pub fn desired(&self, server: &ServerId) -> Option<DesiredSet> {
        let fence = self.fence_of(server)?;
        let wanted = self
            .deployments_on(server)
            .filter(|deployment| deployment.phase.is_desired());
        let workloads = wanted
            .filter_map(|deployment| self.workload(deployment))
            .collect();
        Some(DesiredSet { fence, workloads })
    }

    fn workload(&self, deployment: &Deployment) -> Option<DesiredWorkload> {
        let server = self.servers.get(&deployment.server)?;
        let code = self.codes.get(&deployment.version_key())?;
        let gpu_count = u32::try_from(deployment.gpus.len()).ok()?;
        let gpus_on_server = u32::try_from(server.facts.devices.len()).ok()?.max(gpu_count);
        let tcp = |internal| Port {
            internal,
            protocol: PortProtocol::Tcp,
        };
        let mut ports = vec![tcp(PRIMARY_PORT), tcp(LOGGING_PORT)];
        if self.workers.contains_key(&deployment.server) && attests(deployment.chutes_version.as_deref()) {
            ports.push(tcp(ATTESTATION_PORT));
        }
        let job = deployment.job.as_ref().and_then(|job| self.jobs.get(job));
        if job.is_some() {
            let extra = self
                .chutes
                .get(&deployment.chute)
                .map(|chute| &chute.definition.job_ports);
            ports.extend(extra.into_iter().flatten().copied());
        }
        let spec = WorkloadSpec {
            deployment: deployment.id.clone(),
            validator: deployment.chute.validator.clone(),
            miner: self.settings.miner.clone()?,
            chute: deployment.chute.chute.clone(),
            version: deployment.version.clone(),
            image: deployment.image.clone(),
            ref_str: code.ref_str.clone(),
            filename: code.filename.clone(),
            code: code.code.clone(),
            chutes_version: deployment.chutes_version.clone(),
            gpus: deployment.gpus.clone(),
            external_host: server.facts.address.clone(),
            config: deployment.config.clone(),
            launch_token: None,
            // Only to start it, as the token is.
            legacy_seed: match deployment.flow {
                Flow::Legacy if deployment.facts.running_at.is_none() => {
                    server.enrolment.as_ref().and_then(|enrolment| enrolment.seed)
                }
                Flow::Legacy | Flow::LaunchConfig => None,
            },
            job: deployment.job.clone(),
            ports,
            cpu_count: cpu_per_gpu(server.facts.cpu_count, gpus_on_server) * gpu_count,
            memory_gb: memory_gb_per_gpu(server.facts.memory_gb, gpus_on_server) * gpu_count,
            disk_gb: job.map_or(DISK_GB_DEFAULT, |job| job.disk_gb),
        };
        Some(DesiredWorkload {
            spec,
            sealed_token: deployment.sealed_token.clone(),
        })
    }

    /// Deployments that run this version, or whose version it is; its code must be kept for them.
    #[must_use]
    pub fn version_is_used(&self, chute: &super::chute::ChuteKey, version: &ChuteVersion) -> bool {
        let current = self
            .chutes
            .get(chute)
            .is_some_and(|c| c.definition.version == *version);
        current
            || self
                .deployments_of(chute)
                .any(|deployment| deployment.version == *version)
    }

    /// Ids of the deployments that a server should run.
    #[must_use]
    pub fn desired_ids(&self, server: &ServerId) -> Vec<DeploymentId> {
        self.deployments_on(server)
            .filter(|d| d.phase.is_desired())
            .map(|d| d.id.clone())
            .collect()
    }
}

/// Disk of a chute that asks for none, in GB (`scheduling`, section 4.2).
pub const DISK_GB_DEFAULT: u32 = 10;

/// CPUs for one GPU: two of the machine are left to us, at most four go to one GPU (`scheduling` 1.3).
#[must_use]
pub fn cpu_per_gpu(cpu_count: u32, gpu_count: u32) -> u32 {
    (cpu_count.saturating_sub(2) / gpu_count.max(1)).clamp(1, 4)
}

/// RAM for one GPU in GB: 6 GB and a fifth of the rest are left to the machine (`scheduling` 1.3, without
/// its cap at the VRAM, which starves small cards).
#[must_use]
pub fn memory_gb_per_gpu(memory_gb: u32, gpu_count: u32) -> u32 {
    (memory_gb.saturating_sub(6) * 4 / 5 / gpu_count.max(1)).max(1)
}

//! Servers, GPUs, deployments and chutes in the shape that the original clients read.

use coordinator_core::state_machine::State;
use coordinator_core::state_machine::chute::ChuteKey;
use coordinator_core::state_machine::deployment::{Deployment, Phase};
use coordinator_core::state_machine::desired::{cpu_per_gpu, memory_gb_per_gpu};
use coordinator_core::state_machine::server::{Enrolment, EnrolmentPhase, Gpu, Server};
use protocol::gpu::DeviceInfo;
use protocol::workload::PRIMARY_PORT;
use serde::Serialize;
use std::collections::BTreeMap;

/// A server that works for a validator.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct ServerObject {
    server_id: String,
    validator: String,
    name: String,
    ip_address: String,
    verification_port: u16,
    status: &'static str,
    created_at: String,
    labels: BTreeMap<&'static str, String>,
    seed: Option<u64>,
    gpu_count: usize,
    cpu_per_gpu: u32,
    memory_per_gpu: u32,
    hourly_cost: f64,
    locked: bool,
    gpus: Vec<GpuObject>,
    deployments: Vec<DeploymentObject>,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct GpuObject {
    gpu_id: String,
    validator: String,
    server_id: String,
    deployment_id: Option<String>,
    device_info: DeviceInfo,
    model_short_ref: String,
    verified: bool,
}

/// A deployment that is not gone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct DeploymentObject {
    deployment_id: String,
    instance_id: Option<String>,
    validator: String,
    host: String,
    port: Option<u16>,
    chute_id: String,
    server_id: String,
    version: String,
    active: bool,
    verified_at: Option<String>,
    stub: bool,
    job_id: Option<String>,
    config_id: Option<String>,
    created_at: String,
    gpus: Vec<GpuObject>,
    chute: ChuteObject,
}

/// What a deployment runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct ChuteObject {
    chute_id: String,
    validator: String,
    name: String,
    image: String,
    code: String,
    filename: String,
    ref_str: String,
    version: String,
    supported_gpus: Vec<String>,
    gpu_count: u32,
    created_at: String,
    updated_at: String,
    ban_reason: Option<String>,
    chutes_version: Option<String>,
}

/// What is being taken down, in the five words of the reference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct PurgedObject {
    chute_id: String,
    chute_name: String,
    server_id: String,
    server_name: String,
    gpu_count: usize,
}

impl ServerObject {
    /// None for a host that works for nobody.
    pub(super) fn of(state: &State, server: &Server) -> Option<Self> {
        let enrolment = server.enrolment.as_ref()?;
        let gpus: Vec<GpuObject> = state
            .gpus_of(server.id())
            .map(|gpu| GpuObject::of(state, gpu))
            .collect();
        let count = u32::try_from(gpus.len()).unwrap_or(u32::MAX);
        Some(Self {
            server_id: server.id().to_string(),
            validator: enrolment.validator.to_string(),
            name: server.facts.name.clone(),
            ip_address: server.facts.address.clone(),
            verification_port: server.facts.proof_port,
            status: status_word(server, enrolment),
            created_at: enrolment.added_at.iso8601(),
            labels: BTreeMap::from([("nvidia.com/gpu.count", count.to_string())]),
            seed: enrolment.seed,
            gpu_count: gpus.len(),
            cpu_per_gpu: cpu_per_gpu(server.facts.cpu_count, count),
            memory_per_gpu: memory_gb_per_gpu(server.facts.memory_gb, count),
            hourly_cost: dollars(enrolment.hourly_cost_usd_micros),
            locked: server.locked,
            gpus,
            deployments: state
                .deployments_on(server.id())
                .map(|deployment| DeploymentObject::of(state, deployment))
                .collect(),
        })
    }
}

fn status_word(server: &Server, enrolment: &Enrolment) -> &'static str {
    match &enrolment.phase {
        _ if !server.reachable => "NotReady",
        _ if server.quarantine.is_some() => "Quarantined",
        EnrolmentPhase::Advertising | EnrolmentPhase::Verifying { .. } => "Verifying",
        EnrolmentPhase::Leaving { .. } => "Leaving",
        EnrolmentPhase::Ready => "Ready",
    }
}

/// Millionths of a dollar as the number that clients print with two digits.
pub(super) fn dollars(usd_micros: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "prices are far below 2^53 micros")]
    let micros = usd_micros as f64;
    micros / 1e6
}

impl GpuObject {
    fn of(state: &State, gpu: &Gpu) -> Self {
        let enrolment = state
            .servers()
            .get(&gpu.server)
            .and_then(|server| server.enrolment.as_ref());
        Self {
            gpu_id: gpu.id().to_string(),
            validator: enrolment.map_or_else(String::new, |enrolment| enrolment.validator.to_string()),
            server_id: gpu.server.to_string(),
            deployment_id: gpu.holder.as_ref().map(ToString::to_string),
            device_info: gpu.device.clone(),
            model_short_ref: gpu.short_ref.clone(),
            verified: gpu.verified_at.is_some(),
        }
    }
}

impl DeploymentObject {
    /// A deployment with its GPUs and its chute.
    pub(super) fn of(state: &State, deployment: &Deployment) -> Self {
        let server = state.servers().get(&deployment.server);
        let port = deployment.ports.iter().find(|port| port.internal == PRIMARY_PORT);
        let text = |id: Option<&dyn ToString>| id.map(ToString::to_string);
        Self {
            deployment_id: deployment.id.to_string(),
            instance_id: text(deployment.instance.as_ref().map(|id| id as &dyn ToString)),
            validator: deployment.chute.validator.to_string(),
            host: server.map_or_else(String::new, |server| server.facts.address.clone()),
            port: port.map(|port| port.external),
            chute_id: deployment.chute.chute.to_string(),
            server_id: deployment.server.to_string(),
            version: deployment.version.to_string(),
            active: deployment.facts.active_at.is_some(),
            verified_at: deployment.facts.verified_at.map(|at| at.iso8601()),
            stub: deployment.phase == Phase::Requested,
            job_id: text(deployment.job.as_ref().map(|id| id as &dyn ToString)),
            config_id: text(deployment.config.as_ref().map(|id| id as &dyn ToString)),
            created_at: deployment.created_at.iso8601(),
            gpus: deployment
                .gpus
                .iter()
                .filter_map(|id| state.gpus().get(id))
                .map(|gpu| GpuObject::of(state, gpu))
                .collect(),
            chute: ChuteObject::of(state, deployment),
        }
    }
}

impl ChuteObject {
    /// The catalogue may have forgotten a chute that still runs; its code stays as long as it is needed.
    fn of(state: &State, deployment: &Deployment) -> Self {
        let chute = state.chutes().get(&deployment.chute);
        let definition = chute.map(|chute| &chute.definition);
        let code = state.codes().get(&deployment.version_key());
        let code = |part: fn(&coordinator_core::state_machine::chute::ChuteCode) -> &String| {
            code.map_or_else(String::new, |code| part(code).clone())
        };
        let recorded_at = chute
            .map_or(deployment.created_at, |chute| chute.recorded_at)
            .iso8601();
        let gpus = u32::try_from(deployment.gpus.len()).unwrap_or(u32::MAX);
        Self {
            chute_id: deployment.chute.chute.to_string(),
            validator: deployment.chute.validator.to_string(),
            name: chute_name(state, &deployment.chute),
            image: deployment.image.clone(),
            code: code(|code| &code.code),
            filename: code(|code| &code.filename),
            ref_str: code(|code| &code.ref_str),
            version: deployment.version.to_string(),
            supported_gpus: definition.map_or_else(Vec::new, |definition| {
                definition.supported_gpus.iter().cloned().collect()
            }),
            gpu_count: definition.map_or(gpus, |definition| definition.gpu_count),
            created_at: recorded_at.clone(),
            updated_at: recorded_at,
            ban_reason: chute.and_then(|chute| chute.ban_reason.clone()),
            chutes_version: deployment.chutes_version.clone(),
        }
    }
}

impl PurgedObject {
    /// The five words.
    pub(super) fn of(state: &State, deployment: &Deployment) -> Self {
        let server = state.servers().get(&deployment.server);
        Self {
            chute_id: deployment.chute.chute.to_string(),
            chute_name: chute_name(state, &deployment.chute),
            server_id: deployment.server.to_string(),
            server_name: server.map_or_else(String::new, |server| server.facts.name.clone()),
            gpu_count: deployment.gpus.len(),
        }
    }
}

/// A chute's name, or its id once the catalogue has forgotten it.
pub(super) fn chute_name(state: &State, key: &ChuteKey) -> String {
    let chute = state.chutes().get(key);
    chute.map_or_else(|| key.chute.to_string(), |chute| chute.definition.name.clone())
}

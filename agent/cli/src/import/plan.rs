//! What is to be taken over (pure): for each server one request to our miner and the marks on its objects, and what is
//! left out, with the reason.
//!
//! A deployment is taken over if the record and the cluster agree on it: a row with GPUs, a Job on its server, a
//! Service. All else is named and left as it is.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::ResourceExt;
use protocol::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId};
use protocol::workload::{PortMapping, PortProtocol};
use runtime::manifest::{
    CHUTE_CONTAINER, DEPLOYMENT_LABEL, FENCE_ANNOTATION, GPUS_ANNOTATION, LAUNCHED_ANNOTATION,
    NODE_CHARACTERS_MAX, NODE_LABEL, PORTS_ANNOTATION, job_name, service_name,
};
use serde_json::{Value, json};

use super::objects::{Kind, Mark, Object, Objects};
use super::rows::{Chute, Deployment, Gpu, Rows, Server, unix_ms};

/// Longest body that the miner's API takes.
const BODY_BYTES_MAX: usize = 1024 * 1024;
const CHUTE_LABEL: (&str, &str) = ("chutes/chute", "true");
/// Older than every fence of ours: whatever our agent writes comes later.
const FIRST_FENCE: &str = "0/0";

/// Everything that is to be done.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) servers: Vec<ServerPlan>,
    pub(crate) left_out: Vec<LeftOut>,
    pub(crate) left_alone: Vec<LeftAlone>,
}

/// The Job of a chute that no row knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeftAlone {
    pub(crate) job: String,
    /// Where it runs.
    pub(crate) node: String,
}

/// One server.
#[derive(Debug)]
pub(crate) struct ServerPlan {
    pub(crate) name: String,
    /// `server` and `deployments` of the request.
    pub(crate) request: Value,
    /// Why it cannot even be asked for.
    pub(crate) problems: Vec<String>,
    /// First: the Jobs get their agent's label.
    pub(crate) jobs: Vec<Mark>,
    /// Then Services and pods.
    pub(crate) others: Vec<Mark>,
    /// Last: from now on its agent may act on them.
    pub(crate) seals: Vec<Mark>,
}

/// Something of the record that is not taken over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeftOut {
    /// Name of its server, if it has one.
    pub(crate) server: Option<String>,
    pub(crate) what: String,
    pub(crate) why: String,
}

/// The objects of one deployment.
#[derive(Debug, Default)]
struct Found<'a> {
    job: Option<&'a Job>,
    service: Option<&'a Service>,
    pods: Vec<&'a Pod>,
}

impl Objects {
    fn by_deployment(&self) -> BTreeMap<&str, Found<'_>> {
        let mut all: BTreeMap<&str, Found<'_>> = BTreeMap::new();
        for job in &self.jobs {
            if let Some(deployment) = owner(job, job_name) {
                all.entry(deployment).or_default().job = Some(job);
            }
        }
        for service in &self.services {
            if let Some(deployment) = owner(service, service_name) {
                all.entry(deployment).or_default().service = Some(service);
            }
        }
        for pod in &self.pods {
            if let Some(deployment) = pod.labels().get(DEPLOYMENT_LABEL) {
                all.entry(deployment).or_default().pods.push(pod);
            }
        }
        all
    }
}

/// The deployment of an object that bears the name which the original gives.
fn owner(object: &impl ResourceExt, name: fn(&DeploymentId) -> String) -> Option<&str> {
    let deployment = object.labels().get(DEPLOYMENT_LABEL)?;
    let id = DeploymentId::parse(deployment).ok()?;
    (object.name_any() == name(&id)).then_some(deployment)
}

/// What of the record and the cluster is to be taken over.
pub(crate) fn plan(rows: &Rows, objects: &Objects) -> Plan {
    let found = objects.by_deployment();
    let servers: BTreeMap<&str, &Server> = rows
        .servers
        .iter()
        .map(|server| (server.server_id.as_str(), server))
        .collect();
    let mut plan = Plan::default();
    for gpu in rows
        .gpus
        .iter()
        .filter(|gpu| !servers.contains_key(gpu.server_id.as_str()))
    {
        plan.left_out.push(LeftOut {
            server: None,
            what: format!("GPU {}", gpu.gpu_id),
            why: format!("its server {} has no row", gpu.server_id),
        });
    }
    for deployment in &rows.deployments {
        if !servers.contains_key(deployment.server_id.as_str()) {
            plan.left_out.push(LeftOut {
                server: None,
                what: format!("deployment {}", deployment.deployment_id),
                why: format!("its server {} has no row", deployment.server_id),
            });
        }
    }
    let mut sorted: Vec<&&Server> = servers.values().collect();
    sorted.sort_by(|one, other| one.name.cmp(&other.name));
    for server in sorted {
        let planned = plan_server(server, rows, &found, &mut plan.left_out);
        plan.servers.push(planned);
    }
    let known: BTreeSet<&str> = rows
        .deployments
        .iter()
        .map(|row| row.deployment_id.as_str())
        .collect();
    let is_unknown = |job: &&Job| {
        let labels = job.labels();
        let deployment = labels.get(DEPLOYMENT_LABEL).map_or("", String::as_str);
        labels.get(CHUTE_LABEL.0).map(String::as_str) == Some(CHUTE_LABEL.1)
            && !known.contains(deployment)
            // Those are of our own agents.
            && !is_sealed(*job)
            && is_live(job)
    };
    let left_alone = objects.jobs.iter().filter(is_unknown).map(|job| LeftAlone {
        job: job.name_any(),
        node: node_of(job).to_owned(),
    });
    plan.left_alone = left_alone.collect();
    for server in &mut plan.servers {
        // Its GPUs would count as free.
        let here = plan.left_alone.iter().filter(|left| left.node == server.name);
        server.problems.extend(here.map(|left| {
            format!(
                "the Job {} runs on it, and no row knows it: the original removes it after a while, or delete it",
                left.job
            )
        }));
    }
    plan
}

/// False for a Job that has ended or is going.
fn is_live(job: &Job) -> bool {
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    let has_ended =
        conditions.any(|it| it.status == "True" && matches!(it.type_.as_str(), "Complete" | "Failed"));
    !has_ended && job.metadata.deletion_timestamp.is_none()
}

fn plan_server(
    server: &Server,
    rows: &Rows,
    found: &BTreeMap<&str, Found<'_>>,
    left_out: &mut Vec<LeftOut>,
) -> ServerPlan {
    let name = &server.name;
    let mut leave_out = |what: String, why: String| {
        left_out.push(LeftOut {
            server: Some(name.clone()),
            what,
            why,
        });
    };
    let mut problems = Vec::new();
    if !is_label_value(name) {
        problems.push(format!(
            "its name cannot be the value of a label: {NODE_CHARACTERS_MAX} letters, digits, '-', '_' and '.' at most, \
             a letter or digit at both ends"
        ));
    }
    let of_server = rows.gpus.iter().filter(|gpu| gpu.server_id == server.server_id);
    let mut gpus = BTreeMap::new();
    let mut models = BTreeSet::new();
    for gpu in of_server {
        models.insert(gpu.model_short_ref.as_deref().unwrap_or_default());
        match GpuId::from_device_uuid(&gpu.gpu_id) {
            Ok(id) => _ = gpus.insert(id, gpu),
            Err(error) => leave_out(format!("GPU {}", gpu.gpu_id), error.to_string()),
        }
    }
    let model = match models.iter().collect::<Vec<_>>()[..] {
        [model] if !model.is_empty() => (*model).to_owned(),
        [] => {
            problems.push("the database has no GPU of it".to_owned());
            String::new()
        }
        _ => {
            let models: Vec<&str> = models.iter().copied().collect();
            problems.push(format!("its GPUs are of several models or of none: {models:?}"));
            String::new()
        }
    };
    let cost = server.hourly_cost.unwrap_or_else(|| {
        problems.push("the database has no hourly cost of it".to_owned());
        0.0
    });
    let seed = server.seed.map(u64::try_from).transpose().unwrap_or_else(|_| {
        problems.push(format!("its seed {:?} is below zero", server.seed));
        None
    });
    let (mut deployments, mut jobs, mut others, mut seals) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for deployment in rows
        .deployments
        .iter()
        .filter(|row| row.server_id == server.server_id)
    {
        let nothing = Found::default();
        let found = found.get(deployment.deployment_id.as_str()).unwrap_or(&nothing);
        match plan_deployment(deployment, server, rows, &gpus, found) {
            Ok(planned) => {
                deployments.push(planned.request);
                jobs.extend(planned.job);
                others.extend(planned.others);
                seals.extend(planned.seals);
            }
            // Its GPUs would count as free.
            Err(why) if found.job.is_some_and(is_live) => problems.push(format!(
                "deployment {} has a Job and cannot be taken over: {why}",
                deployment.deployment_id
            )),
            Err(why) => leave_out(format!("deployment {}", deployment.deployment_id), why),
        }
    }
    let gpus = gpus
        .iter()
        .map(|(id, gpu)| json!({ "gpu_id": id, "verified": gpu.is_verified() }));
    let request = json!({
        "server": {
            "name": name, "ip_address": server.ip_address, "validator": server.validator, "gpu_short_ref": model, "hourly_cost": cost,
            "seed": seed, "locked": server.is_locked(), "gpus": gpus.collect::<Vec<_>>(),
        },
        "deployments": deployments,
    });
    // With room for the rest of the body.
    let bytes = request.to_string().len() + 100;
    if bytes > BODY_BYTES_MAX {
        problems.push(format!(
            "what runs on it takes {bytes} bytes with all code, more than the {BODY_BYTES_MAX} of a request: end one \
             of its deployments"
        ));
    }
    ServerPlan {
        name: name.clone(),
        request,
        problems,
        jobs,
        others,
        seals,
    }
}

struct DeploymentPlan {
    request: Value,
    job: Option<Mark>,
    others: Vec<Mark>,
    seals: Vec<Mark>,
}

/// One deployment, or why it is left out.
fn plan_deployment(
    row: &Deployment,
    server: &Server,
    rows: &Rows,
    gpus_there: &BTreeMap<GpuId, &Gpu>,
    found: &Found<'_>,
) -> Result<DeploymentPlan, String> {
    let problem = |error: &dyn std::fmt::Display| error.to_string();
    DeploymentId::parse(&row.deployment_id).map_err(|error| problem(&error))?;
    ChuteId::parse(&row.chute_id).map_err(|error| problem(&error))?;
    ChuteVersion::parse(&row.version).map_err(|error| problem(&error))?;
    let optional = [
        row.config_id.as_deref().map(|id| ConfigId::parse(id).err()),
        row.instance_id.as_deref().map(|id| InstanceId::parse(id).err()),
        row.job_id.as_deref().map(|id| JobId::parse(id).err()),
    ];
    if let Some(error) = optional.into_iter().flatten().flatten().next() {
        return Err(error.to_string());
    }
    if row.stub == Some(true) && found.job.is_none() {
        return Err("it is a stub: the original has not finished launching it".to_owned());
    }
    let chute = rows.chutes.iter().find(|chute| chute.chute_id == row.chute_id);
    let chute = chute.ok_or_else(|| format!("its chute {} has no row", row.chute_id))?;
    ChuteVersion::parse(&chute.version).map_err(|error| problem(&error))?;
    let (job, service) = objects_of(server, found)?;
    let gpus = gpus_of(row, rows, gpus_there)?;
    let image = image_of(job)?;
    let ports = ports_of(service)?;
    let ms = |time: &Option<String>| time.as_deref().map(unix_ms).transpose();
    let ms = |time| ms(time).map_err(|error| format!("{error:#}"));
    let ready = is_ready(&found.pods);
    let preemptible = row.preemptible.or(chute.preemptible).unwrap_or(true);
    let request = json!({
        "deployment_id": row.deployment_id, "chute_id": row.chute_id, "version": row.version, "image": image,
        "chutes_version": chute.chutes_version, "gpus": gpus, "job_id": row.job_id, "config_id": row.config_id,
        "instance_id": row.instance_id, "active": row.active == Some(true), "verified_at_ms": ms(&row.verified_at)?,
        "activated_at_ms": ms(&row.activated_at)?, "created_at_ms": ms(&row.created_at)?,
        "preemptible": preemptible, "ready": ready, "ports": ports, "chute": chute_json(chute),
    });
    let gpus: Vec<&str> = gpus.iter().map(GpuId::as_str).collect();
    let gpus = gpus.join(",");
    let ports = serde_json::to_string(&ports).map_err(|error| problem(&error))?;
    let node = server.name.as_str();
    let of_gpus = (GPUS_ANNOTATION, gpus.as_str());
    let of_service = [of_gpus, (LAUNCHED_ANNOTATION, "true")];
    let pods = found.pods.iter();
    let pods = pods.filter_map(|pod| mark(Kind::Pod, *pod, node, &[of_gpus]));
    let others = mark(Kind::Service, service, node, &of_service)
        .into_iter()
        .chain(pods);
    // The Job's seal is the one that agents look at.
    let seals = [seal(Kind::Service, service), seal(Kind::Job, job)];
    Ok(DeploymentPlan {
        request,
        job: mark(Kind::Job, job, node, &[of_gpus, (PORTS_ANNOTATION, &ports)]),
        others: others.collect(),
        seals: seals.into_iter().flatten().collect(),
    })
}

fn chute_json(chute: &Chute) -> Value {
    json!({
        "name": chute.name, "image": chute.image, "version": chute.version, "chutes_version": chute.chutes_version,
        "gpu_count": chute.gpu_count, "supported_gpus": chute.supported_gpus.as_deref().unwrap_or_default(),
        "tee": chute.tee == Some(true), "filename": chute.filename, "ref_str": chute.ref_str, "code": chute.code,
    })
}

/// Its Job and its Service, if they are what the record says.
fn objects_of<'a>(server: &Server, found: &Found<'a>) -> Result<(&'a Job, &'a Service), String> {
    let job = found
        .job
        .ok_or("it has no Job: it has ended, or is of an older kind")?;
    let service = found.service.ok_or("it has no Service: nobody can reach it")?;
    if job.metadata.deletion_timestamp.is_some() || service.metadata.deletion_timestamp.is_some() {
        return Err("it is being removed".to_owned());
    }
    let node = node_of(job);
    if node != server.name {
        return Err(format!("its Job is on the node {node:?}, not on its server"));
    }
    let nodes = [job.labels().get(NODE_LABEL), service.labels().get(NODE_LABEL)];
    if let Some(other) = nodes.into_iter().flatten().find(|node| **node != server.name) {
        return Err(format!("its objects belong to the agent of {other}"));
    }
    Ok((job, service))
}

fn gpus_of(row: &Deployment, rows: &Rows, there: &BTreeMap<GpuId, &Gpu>) -> Result<BTreeSet<GpuId>, String> {
    let mut gpus = BTreeSet::new();
    for gpu in &rows.gpus {
        if gpu.deployment_id.as_ref() != Some(&row.deployment_id) {
            continue;
        }
        let id = GpuId::from_device_uuid(&gpu.gpu_id).map_err(|error| error.to_string())?;
        if !there.contains_key(&id) {
            return Err(format!("its GPU {id} is not of its server"));
        }
        gpus.insert(id);
    }
    if gpus.is_empty() {
        return Err("it has no GPUs".to_owned());
    }
    Ok(gpus)
}

fn node_of(job: &Job) -> &str {
    let pod = job.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    pod.and_then(|pod| pod.node_name.as_deref()).unwrap_or_default()
}

/// The image of the chute without its registry.
fn image_of(job: &Job) -> Result<String, String> {
    let pod = job.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    let containers = pod.map_or(&[][..], |pod| &pod.containers);
    let chute = containers
        .iter()
        .find(|container| container.name == CHUTE_CONTAINER);
    let image = chute.and_then(|container| container.image.as_deref());
    let image = image.ok_or_else(|| format!("its Job has no container {CHUTE_CONTAINER}"))?;
    Ok(match image.split_once('/') {
        // Only the name of a registry has a dot or a port.
        Some((registry, rest)) if registry.contains(['.', ':']) => rest.to_owned(),
        _ => image.to_owned(),
    })
}

fn ports_of(service: &Service) -> Result<Vec<PortMapping>, String> {
    let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_deref());
    let mapping = |port: &k8s_openapi::api::core::v1::ServicePort| {
        Some(PortMapping {
            internal: u16::try_from(port.port).ok()?,
            external: u16::try_from(port.node_port?).ok()?,
            protocol: match port.protocol.as_deref() {
                Some("UDP") => PortProtocol::Udp,
                _ => PortProtocol::Tcp,
            },
        })
    };
    let mapped = ports.unwrap_or_default().iter().map(|port| {
        mapping(port).ok_or_else(|| format!("its Service has no node port for port {}", port.port))
    });
    mapped.collect()
}

/// Whether one of its pods runs with all of its containers ready.
fn is_ready(pods: &[&Pod]) -> bool {
    let is_there = |pod: &&&Pod| pod.metadata.deletion_timestamp.is_none();
    let running = pods.iter().filter(is_there).find_map(|pod| {
        let status = pod.status.as_ref()?;
        (status.phase.as_deref() == Some("Running")).then_some(status)
    });
    let containers = running
        .and_then(|status| status.container_statuses.as_deref())
        .unwrap_or_default();
    !containers.is_empty() && containers.iter().all(|container| container.ready)
}

fn is_sealed(object: &impl ResourceExt) -> bool {
    object.annotations().contains_key(FENCE_ANNOTATION)
}

fn missing(present: &BTreeMap<String, String>, wanted: &[(&str, &str)]) -> BTreeMap<String, String> {
    let lacks = |(key, value): &&(&str, &str)| present.get(*key).map(String::as_str) != Some(*value);
    let lacking = wanted.iter().filter(lacks);
    lacking
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// What an object lacks, if anything. One that is sealed is its agent's own.
fn mark(kind: Kind, object: &impl ResourceExt, node: &str, annotations: &[(&str, &str)]) -> Option<Mark> {
    let labels = missing(object.labels(), &[(NODE_LABEL, node)]);
    let annotations = missing(object.annotations(), annotations);
    let is_whole = labels.is_empty() && annotations.is_empty();
    let mark = Mark {
        object: Object::of(kind, object),
        labels,
        annotations,
    };
    (!is_whole && !is_sealed(object)).then_some(mark)
}

fn seal(kind: Kind, object: &impl ResourceExt) -> Option<Mark> {
    let annotations = BTreeMap::from([(FENCE_ANNOTATION.to_owned(), FIRST_FENCE.to_owned())]);
    let seal = Mark {
        object: Object::of(kind, object),
        labels: BTreeMap::new(),
        annotations,
    };
    (!is_sealed(object)).then_some(seal)
}

fn is_label_value(name: &str) -> bool {
    let at_end = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    name.len() <= NODE_CHARACTERS_MAX
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && at_end(name.chars().next())
        && at_end(name.chars().next_back())
}

#[cfg(test)]
mod tests;

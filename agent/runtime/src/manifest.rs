//! A workload as Kubernetes objects (pure): the Service, the ConfigMap with the code, and the Job, in the
//! order in which they are made. The Job needs the node ports that the Service was given.
//!
//! The fields are those that validators and the chutes library look at. Where the original miner did
//! something that a chute cannot see, we do it more safely: the pod gets no service account token, and the
//! init container sees this chute's cache folder only, since evicting models is the agent's own work.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMap, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    ExecAction, HostPathVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec, Probe,
    ResourceRequirements, SecurityContext, Service, ServicePort, ServiceSpec, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use kube::core::ObjectMeta;
use protocol::id::{ChuteId, ChuteVersion, DeploymentId, GpuId};
use protocol::workload::{Fence, LOGGING_PORT, PRIMARY_PORT, PortMapping, PortProtocol, WorkloadSpec};
use sha1::{Digest, Sha1};

use crate::environment::{Surroundings, command, environment, health_port};

/// Annotation with the fence under which an object was last written: `incarnation/revision`.
pub const FENCE_ANNOTATION: &str = "chutes-agent/fence";
/// Annotation with the GPU ids of a workload, separated by commas.
pub const GPUS_ANNOTATION: &str = "chutes-agent/gpus";
/// Annotation of a Job with the ports of its Service, as JSON: where they are reached from outside.
pub const PORTS_ANNOTATION: &str = "chutes-agent/ports";
/// Annotation of a Service whose deployment's Job was made, or is about to be.
pub const LAUNCHED_ANNOTATION: &str = "chutes-agent/launched";
/// Annotation of the code with the deployment that wrote it last, so that each write changes it.
const WRITER_ANNOTATION: &str = "chutes-agent/written-for";
/// Label that names the workload of a deployment.
pub const DEPLOYMENT_LABEL: &str = "chutes/deployment-id";
/// Label with the node whose agent an object belongs to: its name, of [`NODE_CHARACTERS_MAX`] characters at most.
pub const NODE_LABEL: &str = "chutes-agent/node";
/// Under this name the fields that we write are ours.
pub const FIELD_MANAGER: &str = "chutes-agent";
/// The container with the chute itself.
pub const CHUTE_CONTAINER: &str = "chute";
const CODE_LABEL: (&str, &str) = ("chutes/code", "true");
/// Label with the chute that an object belongs to.
pub const CHUTE_LABEL: &str = "chutes/chute-id";
const VERSION_LABEL: &str = "chutes/version";
/// The longest value of a label, and so of a node's name.
pub const NODE_CHARACTERS_MAX: usize = 63;
const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "chutes-agent");
const SHARED_MEMORY: &str = "16Gi";
/// Where sealed workers pull images, from version 1.4.0 of their virtual machine on (`kubernetes-objects`, section 1.2).
const SEALED_REGISTRY: &str = "registry.chutes.ai";
/// User and group of chutes on a sealed worker.
const SEALED_USER: i64 = 1000;

/// What the objects of one node have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Namespace of all chutes.
    pub namespace: String,
    /// The node itself: chutes are not scheduled by Kubernetes.
    pub node_name: String,
    /// Port of the registry proxy on every node, a part of each image's name.
    pub registry_port: u16,
    /// Runtime class that gives a container the GPUs of `NVIDIA_VISIBLE_DEVICES`.
    pub runtime_class: String,
    /// Folder on the node that holds one folder of models for each chute.
    pub cache_root: String,
    /// Image of the container that prepares the cache folder; needs `/bin/sh`.
    pub init_image: String,
    /// Seconds between the request to stop and the kill.
    pub stop_grace_seconds: i64,
    /// URL of the explicit egress proxy, where one is to be used.
    pub egress_door: Option<String>,
    /// Chutes may send packets of their own making, as Kubernetes lets pods do. Not where packets are filtered by the
    /// pod that sends them: a chute could speak from another pod's address.
    pub raw_sockets: bool,
    /// The node is a sealed worker, which has neither our doors nor other people's containers: its images come from the
    /// validator's registry, its chutes bring their code, and prove where they run through a port of their own.
    pub sealed: bool,
}

impl Settings {
    /// The usual values for one node; the runtime class is that of k3s.
    #[must_use]
    pub fn for_node(node_name: &str) -> Self {
        Self {
            namespace: "chutes".to_owned(),
            node_name: node_name.to_owned(),
            registry_port: 30500,
            runtime_class: "nvidia".to_owned(),
            cache_root: "/var/snap/cache".to_owned(),
            init_image: "busybox:1.37.0".to_owned(),
            stop_grace_seconds: 30,
            egress_door: None,
            raw_sockets: true,
            sealed: false,
        }
    }

    /// The usual values for a sealed worker.
    #[must_use]
    pub fn for_worker(node_name: &str) -> Self {
        Self {
            stop_grace_seconds: 180,
            sealed: true,
            ..Self::for_node(node_name)
        }
    }
}

/// Name of a deployment's Job.
#[must_use]
pub fn job_name(deployment: &DeploymentId) -> String {
    format!("chute-{deployment}")
}

/// Name of a deployment's Service.
#[must_use]
pub fn service_name(deployment: &DeploymentId) -> String {
    format!("chute-service-{deployment}")
}

/// Name of the ConfigMap with a chute's code: the same for all deployments of one version.
#[must_use]
pub fn code_name(chute: &ChuteId, version: &ChuteVersion) -> String {
    format!("chute-code-{}", uuid5_oid(&format!("{chute}::{version}")))
}

/// A name-based UUID (RFC 9562, version 5) in the namespace of ISO object identifiers.
#[must_use]
pub fn uuid5_oid(name: &str) -> String {
    const NAMESPACE_OID: u128 = 0x6ba7_b812_9dad_11d1_80b4_00c0_4fd4_30c8;
    let digest = Sha1::new()
        .chain_update(NAMESPACE_OID.to_be_bytes())
        .chain_update(name)
        .finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    bytes[6] = bytes[6] & 0x0f | 0x50;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = hex::encode(bytes);
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

/// The image as containerd knows it: through the node's registry proxy, which finds the validator's
/// registry by the host name. A sealed worker has a certificate for the registry itself.
#[must_use]
pub fn image_name(spec: &WorkloadSpec, settings: &Settings) -> String {
    if settings.sealed {
        return format!("{SEALED_REGISTRY}/{}", spec.image);
    }
    format!(
        "{}.localregistry.chutes.ai:{}/{}",
        spec.validator.lower(),
        settings.registry_port,
        spec.image
    )
}

/// Selects the objects of one node's agent.
#[must_use]
pub fn node_selector(settings: &Settings) -> String {
    format!("{NODE_LABEL}={}", settings.node_name)
}

/// True if an object belongs to the agent of this node.
#[must_use]
pub fn is_of_node(object: &impl ResourceExt, settings: &Settings) -> bool {
    object.labels().get(NODE_LABEL) == Some(&settings.node_name)
}

/// True for code of chutes that we may remove.
#[must_use]
pub fn is_code(code: &ConfigMap) -> bool {
    code.labels().get(CODE_LABEL.0).map(String::as_str) == Some(CODE_LABEL.1)
}

/// Selects the objects of one deployment.
#[must_use]
pub fn deployment_selector(deployment: &DeploymentId) -> String {
    format!("{DEPLOYMENT_LABEL}={deployment}")
}

/// Selects what uses the code of one version.
#[must_use]
pub fn version_selector(chute: &ChuteId, version: &ChuteVersion) -> String {
    format!("{CHUTE_LABEL}={chute},{VERSION_LABEL}={version}")
}

/// The ports of a deployment reached from outside, on the node's own address. It says that the deployment was launched:
/// its Job was made or is about to be.
#[must_use]
pub fn service(spec: &WorkloadSpec, fence: Fence, settings: &Settings) -> Service {
    let labels = own_labels(base_labels(spec), settings);
    let mut own = metadata(service_name(&spec.deployment), labels, fence, settings);
    let annotations = own.annotations.get_or_insert_default();
    annotations.insert(GPUS_ANNOTATION.to_owned(), gpu_list(spec));
    annotations.insert(LAUNCHED_ANNOTATION.to_owned(), "true".to_owned());
    let selector = BTreeMap::from([(DEPLOYMENT_LABEL.to_owned(), spec.deployment.to_string())]);
    Service {
        metadata: own,
        spec: Some(ServiceSpec {
            type_: Some("NodePort".to_owned()),
            external_traffic_policy: Some("Local".to_owned()),
            selector: Some(selector),
            ports: Some(ports(spec).iter().map(|(_, port)| port.clone()).collect()),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

/// The node ports that a Service was given, or nothing while one of them is missing.
#[must_use]
pub fn node_ports(spec: &WorkloadSpec, service: &Service) -> Option<Vec<PortMapping>> {
    let given = service.spec.as_ref()?.ports.as_ref()?;
    let mapping = |(protocol, wanted): &(PortProtocol, ServicePort)| {
        let port = given.iter().find(|port| port.name == wanted.name)?;
        Some(PortMapping {
            internal: u16::try_from(port.port).ok()?,
            external: u16::try_from(port.node_port?).ok()?,
            protocol: *protocol,
        })
    };
    ports(spec).iter().map(mapping).collect()
}

/// The chute's code. Deployments of one version share it. Written before (`launched` false) and after the Job.
#[must_use]
pub fn code(spec: &WorkloadSpec, fence: Fence, settings: &Settings, launched: bool) -> ConfigMap {
    let labels = BTreeMap::from([
        (CHUTE_LABEL.to_owned(), spec.chute.to_string()),
        (VERSION_LABEL.to_owned(), spec.version.to_string()),
        (CODE_LABEL.0.to_owned(), CODE_LABEL.1.to_owned()),
        (MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned()),
    ]);
    let mut own = metadata(code_name(&spec.chute, &spec.version), labels, fence, settings);
    let writer = format!(
        "{}{}",
        spec.deployment,
        if launched { "" } else { ", about to be launched" }
    );
    let annotations = own.annotations.get_or_insert_default();
    annotations.insert(WRITER_ANNOTATION.to_owned(), writer);
    ConfigMap {
        metadata: own,
        data: Some(BTreeMap::from([(spec.filename.clone(), spec.code.clone())])),
        ..ConfigMap::default()
    }
}

/// The chute itself, once its node ports are known.
#[must_use]
pub fn job(spec: &WorkloadSpec, fence: Fence, settings: &Settings, ports: &[PortMapping]) -> Job {
    let mut labels = job_labels(spec);
    labels.insert(NODE_LABEL.to_owned(), settings.node_name.clone());
    let own_labels = own_labels(labels.clone(), settings);
    let mut own = metadata(job_name(&spec.deployment), own_labels, fence, settings);
    let annotations = own.annotations.get_or_insert_default();
    annotations.insert(GPUS_ANNOTATION.to_owned(), gpu_list(spec));
    let ports_text = serde_json::to_string(ports).expect("plain data");
    annotations.insert(PORTS_ANNOTATION.to_owned(), ports_text);
    let scrape = [("scrape", "true"), ("path", "/_metrics"), ("port", "8000")]
        .map(|(name, value)| (format!("prometheus.io/{name}"), value.to_owned()));
    Job {
        metadata: own,
        spec: Some(JobSpec {
            parallelism: Some(1),
            completions: Some(1),
            backoff_limit: Some(0),
            ttl_seconds_after_finished: Some(300),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(labels),
                    annotations: Some(
                        scrape
                            .into_iter()
                            .chain([(GPUS_ANNOTATION.to_owned(), gpu_list(spec))])
                            .collect(),
                    ),
                    ..ObjectMeta::default()
                }),
                spec: Some(pod(spec, settings, ports)),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// The fence under which an object was last written, if it is one of ours.
#[must_use]
pub fn fence_of(object: &impl ResourceExt) -> Option<Fence> {
    let (incarnation, revision) = object.annotations().get(FENCE_ANNOTATION)?.split_once('/')?;
    Some(Fence {
        incarnation: incarnation.parse().ok()?,
        revision: revision.parse().ok()?,
    })
}

/// The GPUs that an object's deployment was given, if it is one of ours.
#[must_use]
pub fn gpus_of(object: &impl ResourceExt) -> Option<Vec<GpuId>> {
    let list = object.annotations().get(GPUS_ANNOTATION)?;
    let gpus = list.split(',').filter(|gpu| !gpu.is_empty());
    gpus.map(|gpu| GpuId::from_device_uuid(gpu).ok()).collect()
}

/// Where the ports of a Job are reached from outside.
#[must_use]
pub fn ports_of(job: &Job) -> Option<Vec<PortMapping>> {
    serde_json::from_str(job.annotations().get(PORTS_ANNOTATION)?).ok()
}

/// The chute and its version that an object belongs to.
#[must_use]
pub fn version_of(object: &impl ResourceExt) -> Option<(ChuteId, ChuteVersion)> {
    let labels = object.labels();
    let chute = ChuteId::parse(labels.get(CHUTE_LABEL)?).ok()?;
    let version = ChuteVersion::parse(labels.get(VERSION_LABEL)?).ok()?;
    Some((chute, version))
}

fn gpu_list(spec: &WorkloadSpec) -> String {
    let gpus: Vec<&str> = spec.gpus.iter().map(|gpu| gpu.as_str()).collect();
    gpus.join(",")
}

fn own_labels(mut labels: BTreeMap<String, String>, settings: &Settings) -> BTreeMap<String, String> {
    labels.insert(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned());
    labels.insert(NODE_LABEL.to_owned(), settings.node_name.clone());
    labels
}

fn metadata(name: String, labels: BTreeMap<String, String>, fence: Fence, settings: &Settings) -> ObjectMeta {
    let fence = format!("{}/{}", fence.incarnation, fence.revision);
    ObjectMeta {
        name: Some(name),
        namespace: Some(settings.namespace.clone()),
        labels: Some(labels),
        annotations: Some(BTreeMap::from([(FENCE_ANNOTATION.to_owned(), fence)])),
        ..ObjectMeta::default()
    }
}

fn base_labels(spec: &WorkloadSpec) -> BTreeMap<String, String> {
    BTreeMap::from([
        (DEPLOYMENT_LABEL.to_owned(), spec.deployment.to_string()),
        ("chutes/chute".to_owned(), "true".to_owned()),
        (CHUTE_LABEL.to_owned(), spec.chute.to_string()),
        (VERSION_LABEL.to_owned(), spec.version.to_string()),
    ])
}

fn job_labels(spec: &WorkloadSpec) -> BTreeMap<String, String> {
    let mut labels = base_labels(spec);
    if let (Some(config), Some(_)) = (&spec.config, &spec.launch_token) {
        labels.insert("chutes/config-id".to_owned(), config.to_string());
    }
    if let Some(job) = &spec.job {
        labels.insert("chutes/job-id".to_owned(), job.to_string());
        labels.insert("chutes/job".to_owned(), "true".to_owned());
    }
    labels
}

fn kubernetes_protocol(protocol: PortProtocol) -> &'static str {
    match protocol {
        PortProtocol::Tcp | PortProtocol::Http => "TCP",
        PortProtocol::Udp => "UDP",
    }
}

/// Service ports in the workload's order, without what is the same to Kubernetes. A number used by both
/// transports gets a name for each, since names are unique within a Service.
fn ports(spec: &WorkloadSpec) -> Vec<(PortProtocol, ServicePort)> {
    let mut list: Vec<(PortProtocol, ServicePort)> = Vec::new();
    for port in &spec.ports {
        let number = i32::from(port.internal);
        let transport = kubernetes_protocol(port.protocol);
        let known = |same_transport: bool| {
            list.iter().any(|(_, other)| {
                other.port == number && (!same_transport || other.protocol.as_deref() == Some(transport))
            })
        };
        if known(true) {
            continue;
        }
        let name = if known(false) {
            format!("chute-{number}-{}", transport.to_lowercase())
        } else {
            format!("chute-{number}")
        };
        list.push((
            port.protocol,
            ServicePort {
                name: Some(name),
                port: number,
                target_port: Some(IntOrString::Int(number)),
                protocol: Some(transport.to_owned()),
                ..ServicePort::default()
            },
        ));
    }
    list
}

fn pod(spec: &WorkloadSpec, settings: &Settings, ports: &[PortMapping]) -> PodSpec {
    let cache = format!("{}/{}", settings.cache_root, spec.chute);
    let disk = Quantity(format!("{}Gi", spec.disk_gb));
    let empty = |name: &str, medium: Option<&str>, limit: Quantity| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium: medium.map(str::to_owned),
            size_limit: Some(limit),
        }),
        ..Volume::default()
    };
    let code = (!settings.sealed).then(|| Volume {
        name: "code".to_owned(),
        config_map: Some(ConfigMapVolumeSource {
            name: code_name(&spec.chute, &spec.version),
            ..ConfigMapVolumeSource::default()
        }),
        ..Volume::default()
    });
    PodSpec {
        restart_policy: Some("Never".to_owned()),
        node_name: Some(settings.node_name.clone()),
        runtime_class_name: Some(settings.runtime_class.clone()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(true),
        termination_grace_period_seconds: Some(settings.stop_grace_seconds),
        init_containers: Some(vec![init_container(settings)]),
        containers: vec![chute_container(spec, settings, ports)],
        security_context: settings.sealed.then(|| PodSecurityContext {
            run_as_user: Some(SEALED_USER),
            run_as_group: Some(SEALED_USER),
            ..PodSecurityContext::default()
        }),
        volumes: Some(
            code.into_iter()
                .chain([
                    Volume {
                        name: "cache".to_owned(),
                        host_path: Some(HostPathVolumeSource {
                            path: cache,
                            type_: Some("DirectoryOrCreate".to_owned()),
                        }),
                        ..Volume::default()
                    },
                    empty("tmp", None, disk),
                    empty("shm", Some("Memory"), Quantity(SHARED_MEMORY.to_owned())),
                ])
                .collect(),
        ),
        ..PodSpec::default()
    }
}

fn mount(name: &str, path: &str) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        ..VolumeMount::default()
    }
}

fn init_container(settings: &Settings) -> Container {
    let script = "mkdir -p /cache/hub /cache/civitai && chmod -R 777 /cache";
    Container {
        name: "cache-init".to_owned(),
        image: Some(settings.init_image.clone()),
        image_pull_policy: Some("IfNotPresent".to_owned()),
        command: Some(["/bin/sh", "-c", script].map(str::to_owned).to_vec()),
        security_context: Some(SecurityContext {
            run_as_user: Some(0),
            run_as_group: Some(0),
            ..SecurityContext::default()
        }),
        volume_mounts: Some(vec![mount("cache", "/cache")]),
        ..Container::default()
    }
}

fn chute_container(spec: &WorkloadSpec, settings: &Settings, ports: &[PortMapping]) -> Container {
    let around = Surroundings {
        ports,
        cache: "/cache",
        egress_door: settings.egress_door.as_deref(),
        sealed: settings.sealed,
    };
    let variable = |(name, value): (String, String)| EnvVar {
        name,
        value: Some(value),
        value_from: None,
    };
    let resources = BTreeMap::from([
        ("cpu".to_owned(), Quantity(spec.cpu_count.to_string())),
        ("memory".to_owned(), Quantity(format!("{}Gi", spec.memory_gb))),
        (
            "ephemeral-storage".to_owned(),
            Quantity(format!("{}Gi", spec.disk_gb)),
        ),
    ]);
    let code = (!settings.sealed).then(|| VolumeMount {
        sub_path: Some(spec.filename.clone()),
        ..mount("code", &format!("/app/{}", spec.filename))
    });
    let container_port = |(_, port): &(PortProtocol, ServicePort)| ContainerPort {
        container_port: port.port,
        protocol: port.protocol.clone(),
        ..ContainerPort::default()
    };
    Container {
        name: CHUTE_CONTAINER.to_owned(),
        image: Some(image_name(spec, settings)),
        image_pull_policy: Some("Always".to_owned()),
        command: Some(command(spec)),
        env: Some(environment(spec, around).into_iter().map(variable).collect()),
        ports: Some(self::ports(spec).iter().map(container_port).collect()),
        resources: Some(ResourceRequirements {
            requests: Some(resources.clone()),
            limits: Some(resources),
            ..ResourceRequirements::default()
        }),
        security_context: Some(SecurityContext {
            capabilities: Some(Capabilities {
                add: Some(vec!["IPC_LOCK".to_owned()]),
                drop: (!settings.raw_sockets).then(|| vec!["NET_RAW".to_owned()]),
            }),
            ..SecurityContext::default()
        }),
        readiness_probe: Some(Probe {
            exec: Some(ExecAction {
                command: Some(vec![
                    "/bin/sh".to_owned(),
                    "-c".to_owned(),
                    format!("curl -f http://127.0.0.1:{}/_alive", health_port(spec)),
                ]),
            }),
            initial_delay_seconds: Some(15),
            period_seconds: Some(15),
            timeout_seconds: Some(1),
            success_threshold: Some(1),
            failure_threshold: Some(60),
            ..Probe::default()
        }),
        volume_mounts: Some(
            code.into_iter()
                .chain([
                    mount("cache", "/cache"),
                    mount("tmp", "/tmp"),
                    mount("shm", "/dev/shm"),
                ])
                .collect(),
        ),
        ..Container::default()
    }
}

const _: () = assert!(
    PRIMARY_PORT == 8000 && LOGGING_PORT == 8001,
    "named in annotations and probes"
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::tests::spec;
    use protocol::id::JobId;
    use protocol::workload::{ATTESTATION_PORT, Port};

    const FENCE: Fence = Fence {
        incarnation: 1,
        revision: 42,
    };

    /// Compares the objects with the file of that name; `UPDATE_SNAPSHOTS=1` writes it anew.
    fn check(name: &str, spec: &WorkloadSpec, settings: &Settings) {
        let mut service = service(spec, FENCE, settings);
        assert_eq!(node_ports(spec, &service), None, "no node port was given yet");
        let given = service
            .spec
            .as_mut()
            .and_then(|spec| spec.ports.as_mut())
            .expect("has ports");
        for (node_port, port) in (31000..).zip(given) {
            port.node_port = Some(node_port);
        }
        let ports = node_ports(spec, &service).expect("all are given");
        let job = job(spec, FENCE, settings, &ports);
        assert_eq!(fence_of(&job), Some(FENCE));
        assert_eq!(gpus_of(&job), Some(spec.gpus.clone()));
        assert_eq!(ports_of(&job), Some(ports));
        assert_eq!(version_of(&job), Some((spec.chute.clone(), spec.version.clone())));
        let objects = serde_json::json!({
            "service": service,
            "code": (!settings.sealed).then(|| code(spec, FENCE, settings, true)),
            "job": job,
        });
        let text = serde_json::to_string_pretty(&objects).expect("plain data") + "\n";
        let path = format!("{}/src/manifest/{name}.json", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(&path, &text).expect("the sources are writable");
        }
        let expected = std::fs::read_to_string(&path).expect("the snapshot exists");
        assert_eq!(
            text, expected,
            "{path} differs; UPDATE_SNAPSHOTS=1 writes it anew"
        );
    }

    #[test]
    fn objects_of_the_launch_config_flow() {
        check("launch_config", &spec(), &Settings::for_node("gpu-host-1"));
    }

    #[test]
    fn packets_of_its_own_making_are_sent_by_no_chute_that_is_filtered() {
        let dropped = |settings: &Settings| {
            let job = job(&spec(), FENCE, settings, &[]);
            let pod = job.spec.and_then(|job| job.template.spec).expect("it has one");
            let chute = pod.containers.into_iter().find(|it| it.name == CHUTE_CONTAINER);
            let rights = chute.and_then(|it| it.security_context?.capabilities);
            rights.expect("it has some").drop
        };
        let mut settings = Settings::for_node("gpu-host-1");
        assert_eq!(dropped(&settings), None);
        settings.raw_sockets = false;
        assert_eq!(dropped(&settings), Some(vec!["NET_RAW".to_owned()]));
    }

    #[test]
    fn objects_of_the_legacy_flow() {
        let legacy = WorkloadSpec {
            chutes_version: Some("0.2.51".to_owned()),
            config: None,
            launch_token: None,
            legacy_seed: Some(1_234_567_890_123),
            ..spec()
        };
        check("legacy", &legacy, &Settings::for_node("gpu-host-1"));
    }

    #[test]
    fn objects_of_a_job() {
        let mut job = WorkloadSpec {
            job: Some(JobId::parse("job-1").expect("valid")),
            disk_gb: 500,
            ..spec()
        };
        for (internal, protocol) in [
            (2222, PortProtocol::Tcp),
            (5000, PortProtocol::Http),
            (5000, PortProtocol::Udp),
            (5000, PortProtocol::Tcp),
        ] {
            job.ports.push(Port { internal, protocol });
        }
        check("job", &job, &Settings::for_node("gpu-host-1"));
    }

    #[test]
    fn objects_of_a_job_on_a_sealed_worker() {
        let mut job = WorkloadSpec {
            job: Some(JobId::parse("job-1").expect("valid")),
            chutes_version: Some("0.6.10".to_owned()),
            ..spec()
        };
        job.ports.extend([ATTESTATION_PORT, 2222].map(|internal| Port {
            internal,
            protocol: PortProtocol::Tcp,
        }));
        check("sealed", &job, &Settings::for_worker("tee-1"));
    }

    #[test]
    fn the_code_map_is_named_as_others_name_it() {
        let spec = spec();
        assert_eq!(
            code_name(&spec.chute, &spec.version),
            "chute-code-97334de6-0467-5977-b6fd-62af37a9e815"
        );
    }
}

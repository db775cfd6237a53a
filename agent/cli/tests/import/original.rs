//! The original miner at work: 20 servers with 160 GPUs and 60 deployments in various states, as rows of its database
//! and as the objects that it makes.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::Api;
use kube::api::PostParams;
use protocol::hotkey::{Hotkey, Signer};
use protocol::id::DeploymentId;
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::control_plane::{ControlPlane, Space};

pub(crate) const SERVERS: usize = 20;
pub(crate) const DEPLOYMENTS: usize = 60;
/// The Job that no row knows.
pub(crate) const ROWLESS: &str = "ffffffff-0000-4000-8000-000000000000";
/// How many GPUs the three deployments of a server have; one of its eight is free.
const GPU_COUNTS: [usize; 3] = [1, 2, 4];
const VERIFIED_AT: &str = "2026-11-20 10:00:00.25";
pub(crate) const VERIFIED_AT_MS: u64 = 1_795_168_800_250;
pub(crate) const CREATED_AT_MS: u64 = 1_795_168_000_000;

/// How far a deployment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Serving,
    Verified,
    /// It has an instance, and its pod runs.
    Claimed,
    /// Its pod does not run yet.
    Starting,
    /// Without Job and Service.
    Stub,
    /// Its Job is gone, its Service is there.
    Vanished,
}

#[derive(Debug, Clone)]
pub(crate) struct Deployment {
    pub(crate) number: usize,
    pub(crate) stage: Stage,
}

pub(crate) fn validator() -> Hotkey {
    Signer::from_seed(&[2; 32]).hotkey().clone()
}

pub(crate) fn server_name(server: usize) -> String {
    format!("gpu-{server:02}")
}

pub(crate) fn gpu(server: usize, number: usize) -> String {
    format!("{:032x}", 0xabc_0000 + server * 8 + number)
}

pub(crate) fn seed(server: usize) -> Option<i64> {
    match server {
        0 => Some(i64::MAX),
        7 => None,
        // Beyond what a float holds.
        _ => Some((1 << 53) + 1 + i64::try_from(server).expect("small") * 2),
    }
}

pub(crate) fn cost_micros(server: usize) -> u64 {
    1_250_000 + 10_000 * server as u64
}

/// Server 3 is; of server 5 nothing is said, which is locked to the original.
pub(crate) fn is_locked(server: usize) -> bool {
    matches!(server, 3 | 5)
}

/// The free GPU of server 4 is not verified.
pub(crate) fn is_verified(server: usize, gpu: usize) -> bool {
    (server, gpu) != (4, 7)
}

pub(crate) fn deployments() -> Vec<Deployment> {
    let stage = |number| match number {
        7 => Stage::Stub,
        33 => Stage::Vanished,
        20 => Stage::Serving,
        _ if number % 8 == 3 => Stage::Claimed,
        _ if number % 8 == 7 => Stage::Starting,
        _ if number % 10 == 5 => Stage::Verified,
        _ => Stage::Serving,
    };
    (0..DEPLOYMENTS)
        .map(|number| Deployment {
            number,
            stage: stage(number),
        })
        .collect()
}

impl Deployment {
    pub(crate) fn id(&self) -> DeploymentId {
        DeploymentId::parse(&format!("{:08x}-0000-4000-8000-000000000000", self.number)).expect("valid")
    }

    pub(crate) fn server(&self) -> usize {
        self.number / 3
    }

    pub(crate) fn gpus(&self) -> Vec<String> {
        let slot = self.number % 3;
        let first: usize = GPU_COUNTS[..slot].iter().sum();
        (first..first + GPU_COUNTS[slot])
            .map(|number| gpu(self.server(), number))
            .collect()
    }

    fn is_legacy(&self) -> bool {
        self.number.is_multiple_of(12)
    }

    pub(crate) fn chute(&self) -> String {
        if self.is_legacy() {
            "chute-old".to_owned()
        } else {
            format!("chute-{}", GPU_COUNTS[self.number % 3])
        }
    }

    /// One runs an older version than the chute's newest.
    pub(crate) fn version(&self) -> &'static str {
        if self.number == 13 { "v1" } else { "v2" }
    }

    pub(crate) fn image(&self) -> String {
        format!("acme/{}:{}", self.chute(), self.version())
    }

    pub(crate) fn config(&self) -> Option<String> {
        (!self.is_legacy()).then(|| format!("config-{}", self.number))
    }

    pub(crate) fn instance(&self) -> Option<String> {
        let has_one = !matches!(self.stage, Stage::Starting | Stage::Stub);
        has_one.then(|| format!("instance-{}", self.number))
    }

    pub(crate) fn job(&self) -> Option<String> {
        (self.number == 20).then(|| "job-20".to_owned())
    }

    pub(crate) fn is_verified(&self) -> bool {
        matches!(self.stage, Stage::Serving | Stage::Verified | Stage::Vanished)
    }

    pub(crate) fn is_active(&self) -> bool {
        matches!(self.stage, Stage::Serving | Stage::Vanished)
    }

    /// The record and the cluster agree on it.
    pub(crate) fn is_taken_over(&self) -> bool {
        !matches!(self.stage, Stage::Stub | Stage::Vanished)
    }

    /// Node ports are few in a test, so most have one only.
    fn ports(&self) -> Vec<(u16, &'static str)> {
        match self.number {
            1 => vec![(8000, "TCP"), (8001, "TCP")],
            20 => vec![(8000, "TCP"), (8001, "TCP"), (2222, "TCP"), (2222, "UDP")],
            _ => vec![(8000, "TCP")],
        }
    }
}

fn text(value: Option<&str>) -> String {
    value.map_or_else(|| "NULL".to_owned(), |value| format!("'{value}'"))
}

/// Writes all rows.
pub(crate) async fn write_rows(database: &Client) {
    let validator = validator();
    let mut sql = String::new();
    for server in 0..SERVERS {
        let (name, seed) = (server_name(server), seed(server));
        let seed = seed.map_or_else(|| "NULL".to_owned(), |seed| seed.to_string());
        let locked = match server {
            3 => "true",
            5 => "NULL",
            _ => "false",
        };
        let cost = cost_micros(server);
        sql += &format!(
            "INSERT INTO servers (server_id, validator, name, ip_address, verification_port, status, labels, seed, \
             gpu_count, hourly_cost, locked) VALUES ('node-uid-{server}', '{validator}', '{name}', '203.0.113.{server}', \
             30443, 'Ready', '{{\"chutes/worker\": \"true\"}}', {seed}, 8, {cost} / 1e6, {locked});"
        );
    }
    for (chute, count, library) in [
        ("chute-1", 1, "0.3.40"),
        ("chute-2", 2, "0.3.40"),
        ("chute-4", 4, "0.3.40"),
        ("chute-old", 1, "0.2.51"),
    ] {
        sql += &format!(
            "INSERT INTO chutes (chute_id, validator, name, image, code, filename, ref_str, version, supported_gpus, \
             gpu_count, chutes_version) VALUES ('{chute}', '{validator}', 'acme/{chute}', 'acme/{chute}:v2', \
             'print(''{chute} \u{e4}'')', 'app.py', 'app:chute', 'v2', '{{h100_sxm,h200}}', {count}, '{library}');"
        );
    }
    for deployment in deployments() {
        let (number, id, chute, version) = (
            deployment.number,
            deployment.id(),
            deployment.chute(),
            deployment.version(),
        );
        let (instance, config, job) = (deployment.instance(), deployment.config(), deployment.job());
        let (instance, config, job) = (
            text(instance.as_deref()),
            text(config.as_deref()),
            text(job.as_deref()),
        );
        let (active, stub) = (deployment.is_active(), deployment.stage == Stage::Stub);
        let verified_at = text(deployment.is_verified().then_some(VERIFIED_AT));
        let server = deployment.server();
        sql += &format!(
            "INSERT INTO deployments (deployment_id, instance_id, validator, host, port, chute_id, server_id, version, \
             active, verified_at, stub, job_id, config_id, created_at) VALUES ('{id}', {instance}, '{validator}', \
             '203.0.113.{server}', {number}, '{chute}', 'node-uid-{server}', '{version}', {active}, {verified_at}, \
             {stub}, {job}, {config}, '2026-11-20 11:46:40+02');"
        );
    }
    for server in 0..SERVERS {
        for number in 0..8 {
            let id = gpu(server, number);
            let mut holders = deployments().into_iter().filter(|it| it.server() == server);
            let holder = holders.find(|it| it.gpus().contains(&id));
            let holder = text(holder.map(|it| it.id().to_string()).as_deref());
            let verified = is_verified(server, number);
            sql += &format!(
                "INSERT INTO gpus VALUES ('{id}', '{validator}', 'node-uid-{server}', {holder}, \
                 '{{\"name\": \"NVIDIA H100\"}}', 'h100_sxm', {verified});"
            );
        }
    }
    database.batch_execute(&sql).await.expect("good rows");
}

fn labels(id: &DeploymentId, deployment: &Deployment) -> Value {
    let mut labels = json!({
        "chutes/deployment-id": id, "chutes/chute": "true", "chutes/chute-id": deployment.chute(),
        "chutes/version": deployment.version(),
    });
    if let Some(config) = deployment.config() {
        labels["chutes/config-id"] = json!(config);
    }
    if let Some(job) = deployment.job() {
        labels["chutes/job-id"] = json!(job);
        labels["chutes/job"] = json!("true");
    }
    labels
}

fn job(id: &DeploymentId, deployment: &Deployment) -> Job {
    let registry = format!("{}.localregistry.chutes.ai:30500", validator().lower());
    let gpus = deployment.gpus();
    let devices = gpus.iter().map(|gpu| {
        let parts = [&gpu[..8], &gpu[8..12], &gpu[12..16], &gpu[16..20], &gpu[20..]];
        format!("GPU-{}", parts.join("-"))
    });
    let devices: Vec<String> = devices.collect();
    let labels = labels(id, deployment);
    let annotations = json!({
        "prometheus.io/scrape": "true", "prometheus.io/path": "/_metrics", "prometheus.io/port": "8000",
    });
    let chute = json!({
        "name": "chute", "image": format!("{registry}/{}", deployment.image()), "imagePullPolicy": "Always",
        "command": ["chutes", "run", "app:chute", "--port", "8000"],
        "env": [{ "name": "NVIDIA_VISIBLE_DEVICES", "value": devices.join(",") }],
        "ports": [{ "containerPort": 8000 }],
        "securityContext": { "capabilities": { "add": ["IPC_LOCK"] } },
        "volumeMounts": [{ "name": "cache", "mountPath": "/cache" }],
    });
    let init = json!({
        "name": "cache-init", "image": "parachutes/cache-cleaner:latest", "command": ["/bin/bash", "-c", "true"],
        "volumeMounts": [{ "name": "raw-cache", "mountPath": "/cache" }],
    });
    let folder = |path: String| json!({ "path": path, "type": "DirectoryOrCreate" });
    let pod = json!({
        "restartPolicy": "Never", "nodeName": server_name(deployment.server()),
        "runtimeClassName": "nvidia-container-runtime", "initContainers": [init], "containers": [chute],
        "volumes": [
            { "name": "cache", "hostPath": folder(format!("/var/snap/cache/{}", deployment.chute())) },
            { "name": "raw-cache", "hostPath": folder("/var/snap/cache".to_owned()) },
        ],
    });
    let job = json!({
        "metadata": { "name": format!("chute-{id}"), "labels": labels },
        "spec": {
            "parallelism": 1, "completions": 1, "backoffLimit": 0, "ttlSecondsAfterFinished": 300,
            "template": { "metadata": { "labels": labels, "annotations": annotations }, "spec": pod },
        },
    });
    serde_json::from_value(job).expect("a Job")
}

fn service(id: &DeploymentId, deployment: &Deployment) -> Service {
    let ports = deployment.ports().into_iter().map(|(port, transport)| {
        let name = if transport == "UDP" {
            format!("chute-{port}-udp")
        } else {
            format!("chute-{port}")
        };
        json!({ "name": name, "port": port, "targetPort": port, "protocol": transport })
    });
    let service = json!({
        "metadata": {
            "name": format!("chute-service-{id}"),
            "labels": {
                "chutes/deployment-id": id, "chutes/chute": "true", "chutes/chute-id": deployment.chute(),
                "chutes/version": deployment.version(),
            },
        },
        "spec": {
            "type": "NodePort", "externalTrafficPolicy": "Local", "selector": { "chutes/deployment-id": id },
            "ports": ports.collect::<Vec<_>>(),
        },
    });
    serde_json::from_value(service).expect("a Service")
}

/// Makes all objects, with pods that do what their deployments' stages say.
pub(crate) async fn make_objects(plane: &ControlPlane, space: &Space) {
    let classes: Api<RuntimeClass> = Api::all(plane.client.clone());
    let class = json!({ "handler": "nvidia", "metadata": { "name": "nvidia-container-runtime" } });
    let class = serde_json::from_value(class).expect("a runtime class");
    let how = PostParams::default();
    classes.create(&how, &class).await.expect("the API server works");
    let mut all: Vec<(DeploymentId, Deployment)> =
        deployments().into_iter().map(|it| (it.id(), it)).collect();
    // It uses the GPU that is free in the record.
    let rowless = Deployment {
        number: 3,
        stage: Stage::Serving,
    };
    all.push((DeploymentId::parse(ROWLESS).expect("valid"), rowless));
    for (id, deployment) in &all {
        if deployment.stage == Stage::Stub {
            continue;
        }
        space
            .services()
            .create(&how, &service(id, deployment))
            .await
            .expect("a good Service");
        if deployment.stage == Stage::Vanished {
            continue;
        }
        let (phase, ready) = match deployment.stage {
            Stage::Starting => ("Pending", false),
            Stage::Claimed => ("Running", false),
            _ => ("Running", true),
        };
        let container =
            json!({ "name": "chute", "ready": ready, "restartCount": 0, "image": "", "imageID": "" });
        space.say(id, json!({ "phase": phase, "containerStatuses": [container] }));
        space
            .jobs()
            .create(&how, &job(id, deployment))
            .await
            .expect("a good Job");
    }
    for (id, deployment) in &all {
        if !matches!(deployment.stage, Stage::Stub | Stage::Vanished) {
            space.until_pods(id, 1).await;
        }
    }
}

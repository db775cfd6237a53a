//! A registry on loopback that serves one small image, and a runtime that pulls from it. The chute in the
//! image is a shell script that notes its start and runs the chute's code, which is shell as well.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use flate2::Compression;
use flate2::write::GzEncoder;
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, DeploymentId};
use protocol::logs::{Log, LogQuery};
use protocol::workload::{Fence, Port, PortProtocol, Secret, WorkloadPhase, WorkloadSpec};
use runtime::process::{Config, Process};
use runtime::{Observed, Runtime};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

/// Notes a start where it outlives the workload, then becomes the code.
const CHUTE: &str =
    "#!/bin/sh\necho started >> \"$HF_HOME/$CHUTES_DEPLOYMENT_ID\"\n. \"$CHUTES_CODE_FILE\"\n";
const LONG: Duration = Duration::from_secs(30);

pub(crate) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// A layer with files, compressed.
pub(crate) fn layer(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        let gnu = header.as_gnu_mut().expect("made as such");
        gnu.name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder
            .append(&header, content.as_bytes())
            .expect("memory is writable");
    }
    let encoder = builder.into_inner().expect("memory is writable");
    encoder.finish().expect("memory is writable")
}

/// What the registry answers and what it was asked.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    pub(crate) documents: BTreeMap<String, Vec<u8>>,
    /// Requests still to be answered with 503.
    pub(crate) outages: u32,
    pub(crate) requests: Vec<String>,
    pub(crate) hosts: Vec<String>,
}

impl Registry {
    /// Adds an image with these layers under a tag.
    pub(crate) fn add(&mut self, tag: &str, layers: &[Vec<u8>]) {
        let config = br#"{"config":{"Env":["PATH=/opt/chutes/bin:/usr/bin","IMAGE=yes"]}}"#.to_vec();
        let describe = |bytes: &Vec<u8>| serde_json::json!({"digest": sha256(bytes), "size": bytes.len(), "mediaType": "application/octet-stream"});
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "config": describe(&config),
            "layers": layers.iter().map(describe).collect::<Vec<_>>(),
        });
        let path = |kind: &str, name: &str| format!("/v2/someone/echo/{kind}/{name}");
        for blob in layers.iter().chain([&config]) {
            self.documents.insert(path("blobs", &sha256(blob)), blob.clone());
        }
        self.documents
            .insert(path("manifests", tag), manifest.to_string().into_bytes());
    }
}

type Shared = Arc<Mutex<Registry>>;

async fn answer(State(registry): State<Shared>, uri: Uri, headers: HeaderMap) -> (StatusCode, Vec<u8>) {
    let mut registry = registry.lock().expect("no test panics inside");
    registry.requests.push(uri.path().to_owned());
    let host = headers
        .get("host")
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default();
    registry.hosts.push(host.to_owned());
    if registry.outages > 0 {
        registry.outages -= 1;
        return (StatusCode::SERVICE_UNAVAILABLE, Vec::new());
    }
    match registry.documents.get(uri.path()) {
        Some(bytes) => (StatusCode::OK, bytes.clone()),
        None => (StatusCode::NOT_FOUND, Vec::new()),
    }
}

/// A host without an agent: its folder and its registry.
pub(crate) struct World {
    pub(crate) folder: TempDir,
    pub(crate) registry: Shared,
    pub(crate) address: SocketAddr,
}

impl World {
    pub(crate) async fn new() -> Self {
        let mut registry = Registry::default();
        registry.add("1.0", &[layer(&[("opt/chutes/bin/chutes", CHUTE)])]);
        let registry = Arc::new(Mutex::new(registry));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has ports");
        let address = listener.local_addr().expect("it is bound");
        let app = Router::new().fallback(answer).with_state(Arc::clone(&registry));
        tokio::spawn(async move { axum::serve(listener, app).await });
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        Self {
            folder,
            registry,
            address,
        }
    }

    pub(crate) fn config(&self) -> Config {
        config(self.folder.path(), self.address)
    }

    pub(crate) async fn open(&self) -> Process {
        Process::open(self.config())
            .await
            .expect("nothing is wrong with the folder")
    }

    /// How often the chute of a deployment was let loose.
    pub(crate) fn starts(&self, deployment: &DeploymentId) -> usize {
        let path = self.folder.path().join("cache/chute-1").join(deployment.as_str());
        std::fs::read_to_string(path).unwrap_or_default().lines().count()
    }
}

pub(crate) fn config(folder: &std::path::Path, registry: SocketAddr) -> Config {
    Config {
        stop_grace: Duration::from_millis(300),
        health_period: Duration::from_millis(50),
        pull_patience: Duration::from_secs(5),
        ..Config::new(folder.to_owned(), registry, vec!["http://127.0.0.1:1".to_owned()])
    }
}

/// A name that no other test uses: processes are found by it.
pub(crate) fn unique(name: &str) -> DeploymentId {
    let text = format!("{name}-{}-{:016x}", std::process::id(), fastrand::u64(..));
    DeploymentId::parse(&text).expect("valid")
}

/// A chute that runs this code. Each has an address of its own, so that tests do not take each other's
/// ports.
pub(crate) fn spec(name: &str, code: &str) -> WorkloadSpec {
    let port = |internal, protocol| Port { internal, protocol };
    WorkloadSpec {
        deployment: unique(name),
        validator: Hotkey::from_public_key(&[2; 32]),
        miner: Hotkey::from_public_key(&[1; 32]),
        chute: ChuteId::parse("chute-1").expect("valid"),
        version: ChuteVersion::parse("v1").expect("valid"),
        image: "someone/echo:1.0".to_owned(),
        ref_str: "echo:chute".to_owned(),
        filename: "echo.sh".to_owned(),
        code: code.to_owned(),
        chutes_version: Some("0.3.40".to_owned()),
        gpus: Vec::new(),
        external_host: format!(
            "127.{}.{}.{}",
            fastrand::u8(2..250),
            fastrand::u8(..),
            fastrand::u8(1..250)
        ),
        config: None,
        launch_token: Some(Secret::new("token".to_owned())),
        legacy_seed: None,
        job: None,
        ports: vec![
            port(8000, PortProtocol::Tcp),
            port(8001, PortProtocol::Tcp),
            port(9000, PortProtocol::Udp),
        ],
        cpu_count: 1,
        memory_gb: 1,
        disk_gb: 1,
    }
}

pub(crate) const FENCE: Fence = Fence {
    incarnation: 1,
    revision: 1,
};

/// Waits until what the runtime shows of a deployment is as wanted.
pub(crate) async fn until(
    runtime: &dyn Runtime,
    deployment: &DeploymentId,
    what: &str,
    wanted: impl Fn(Option<&WorkloadPhase>) -> bool,
) -> Option<WorkloadPhase> {
    let mut changes = runtime.changes();
    let mut last = None;
    let seen = tokio::time::timeout(LONG, async {
        loop {
            changes.borrow_and_update();
            last = phase(runtime, deployment).await;
            if wanted(last.as_ref()) {
                return;
            }
            changes.changed().await.expect("the runtime lives");
        }
    });
    let seen = seen.await;
    assert!(seen.is_ok(), "waited for {what}, last seen {last:?}");
    last
}

pub(crate) async fn phase(runtime: &dyn Runtime, deployment: &DeploymentId) -> Option<WorkloadPhase> {
    let list: Vec<Observed> = runtime.observe().await.expect("it can be observed");
    list.into_iter()
        .find(|it| it.status.deployment == *deployment)
        .map(|it| it.status.phase)
}

pub(crate) fn is_running(phase: Option<&WorkloadPhase>) -> bool {
    matches!(phase, Some(WorkloadPhase::Running { .. }))
}

pub(crate) fn is_ended(phase: Option<&WorkloadPhase>) -> bool {
    matches!(phase, Some(WorkloadPhase::Ended { .. }))
}

/// Numbers of the living processes that carry the deployment's name.
pub(crate) fn processes(deployment: &DeploymentId) -> Vec<u32> {
    let wanted = format!("CHUTES_DEPLOYMENT_ID={deployment}");
    let pids = std::fs::read_dir("/proc")
        .expect("Linux")
        .filter_map(|item| item.ok()?.file_name().to_str()?.parse().ok());
    let carries = |pid: &u32| {
        let zombie =
            std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "));
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        !zombie
            && environment
                .split(|byte| *byte == 0)
                .any(|item| item == wanted.as_bytes())
    };
    pids.filter(carries).collect()
}

/// What a deployment wrote after a place; none if nothing is known of it.
pub(crate) async fn log(
    runtime: &dyn Runtime,
    deployment: &DeploymentId,
    after: Option<String>,
) -> Option<Log> {
    let query = LogQuery {
        deployment: deployment.clone(),
        previous: false,
        after,
    };
    runtime.log(&query).await.expect("readable")
}

/// Waits until the chute has written a line to its output.
pub(crate) async fn said(world: &World, deployment: &DeploymentId, line: &str) {
    let path = world
        .folder
        .path()
        .join("workloads")
        .join(deployment.as_str())
        .join("output.log");
    let seen = tokio::time::timeout(LONG, async {
        while !std::fs::read_to_string(&path)
            .unwrap_or_default()
            .lines()
            .any(|it| it == line)
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(seen.await.is_ok(), "{line:?} was not said");
}

pub(crate) fn write_line(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")
        .and_then(|()| out.flush())
        .expect("the parent reads");
}

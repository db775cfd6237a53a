//! A sealed worker: a cluster of its own with one node and no agent of ours, driven by whoever leads. The API server is
//! real; the test plays the node as in `kubernetes.rs`, and the attestation service that a sealed worker has.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use coordinator::clock::{Clock as _, WallClock};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Node;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use protocol::gpu::DeviceInfo;
use protocol::id::{DeploymentId, GpuId};
use protocol::signing::{Purpose, Tail, VALIDATOR_NONCE_WINDOW_SECONDS, check_request_to_validator};
use reqwest::{Method, StatusCode};
use runtime::manifest::job_name;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use validator_stand_in::faults::{HttpAction, HttpFault};
use validator_stand_in::ledger::Record;
use validator_stand_in::scenario::{Action, ChuteSpec};

use super::cluster::{Miner, Plan, rows};
use super::control_plane::{ControlPlane, programs};
use super::kubernetes::play_nodes;
use super::stand_in::{StandIn, chute, scenario};
use super::{alone, until};

const ADDRESS: &str = "127.0.0.1";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sealed_worker_is_driven_by_whoever_leads() {
    let Some(programs) = programs() else { return };
    let _alone = alone().await;
    let plane = ControlPlane::start(programs).await;
    let space = Arc::new(plane.namespace("chutes").await);
    let before = space.remains().await;
    let nodes = tokio::spawn(play_nodes(Arc::clone(&space)));
    let gpus = [gpu(1), gpu(2)];
    let attestation = Attestation::start(&gpus);
    let node = make_node(&plane, gpus.len()).await;
    let sealed = |name: &str| ChuteSpec {
        tee: true,
        ..chute(name)
    };
    let chutes = vec![chute("plain"), sealed("sealed"), sealed("later")];
    let validator = StandIn::start(scenario("workers", 0xd5, chutes)).await;
    let plan = || Plan {
        works_for: &validator,
        gpus: 1,
        has_seed: true,
    };
    let mut miner = Miner::start(&[&validator], &[plan(), plan(), plan()]).await;

    let kubeconfig = std::fs::read_to_string(plane.kubeconfig()).expect("it is there");
    let body = json!({ "kubeconfig": kubeconfig, "attestation_port": attestation.port });
    let (status, refused) = miner.ask(Method::POST, "/v1/workers", Some(&body)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(
        refused["detail"]
            .as_str()
            .is_some_and(|it| it.contains("chutes/tee=true")),
        "{refused}"
    );
    label(&plane, json!({ "chutes/tee": "true" })).await;
    let (status, worker) = miner.ask(Method::POST, "/v1/workers", Some(&body)).await;
    assert_eq!(status, StatusCode::OK, "{worker}");
    assert_eq!(
        (&worker["name"], &worker["gpus"], &worker["server_id"]),
        (&json!("tee-1"), &json!(2), &json!(node.uid()))
    );
    assert!(attestation.asked.load(Ordering::Relaxed) > 0);
    for answer in miner.ask_all("/v1/workers").await {
        assert!(
            !answer.1.to_string().contains("token"),
            "no kubeconfig is given out"
        );
    }
    until("the worker is driven", async || {
        let state = miner.state().await;
        let worker = rows(&state, "servers")
            .iter()
            .find(|row| row["name"] == "tee-1")?
            .clone();
        (!worker["reported"].is_null()).then_some(())
    })
    .await;
    // Taken, but nobody hears it: then the worker is in its own way.
    let fault = HttpFault {
        path: "/servers/".to_owned(),
        method: Some("POST".to_owned()),
        percent: 100,
        times: Some(1),
        action: HttpAction::LoseAnswer,
    };
    validator.perform(&Action::AddHttpFault { fault }).await;
    let terms = json!({
        "name": "tee-1", "validator": validator.hotkey, "hourly_cost": 0.01, "gpu_short_ref": proof::SOFTWARE.short_ref,
    });
    // Once: an enrolment that failed would succeed the second time.
    let (status, frames) = miner.ask(Method::POST, "/servers/", Some(&terms)).await;
    assert_eq!(status, StatusCode::OK, "{frames}");
    assert!(
        frames.to_string().contains("completed server bootstrapping"),
        "{frames}"
    );
    let added = validator.records(|record| match record {
        Record::ServerAdded { server, uuids, .. } => Some((server.clone(), uuids.len())),
        _ => None,
    });
    let once = (node.uid().expect("it has one"), 2);
    assert_eq!(added, [once.clone(), once]);

    let first = miner.serving(&validator, "sealed").await;
    let second = miner.serving(&validator, "later").await;
    let plain = miner.serving(&validator, "plain").await;
    let on = |deployment: &Value| deployment["server_id"].clone();
    assert_eq!((on(&first), on(&second)), (json!(node.uid()), json!(node.uid())));
    assert_ne!(
        on(&plain),
        json!(node.uid()),
        "it needs no sealed worker, so it gets none"
    );
    let job = job_of(&space.jobs(), &first).await;
    let pod = job
        .spec
        .as_ref()
        .and_then(|job| job.template.spec.as_ref())
        .expect("it has one");
    let image = pod.containers[0].image.as_deref().expect("it has one");
    assert!(image.starts_with("registry.chutes.ai/"), "{image}");
    let id = first["deployment_id"].as_str().expect("an id");
    let (status, events) = miner
        .ask(Method::GET, &format!("/v1/deployments/{id}/events"), None)
        .await;
    assert_eq!(
        (status, &events["server_name"]),
        (StatusCode::OK, &json!("tee-1"))
    );

    // What runs goes on under the next leader, which can do with the worker what the one before could.
    miner.kill_leader().await;
    let (status, _) = stop(&miner, &second).await;
    assert_eq!(status, StatusCode::OK);
    miner.gone(&second).await;
    let same = job_of(&space.jobs(), &first).await;
    assert_eq!(
        (same.uid(), same.creation_timestamp()),
        (job.uid(), job.creation_timestamp())
    );
    assert_eq!(
        miner.serving(&validator, "sealed").await["deployment_id"],
        first["deployment_id"]
    );
    let jobs = space
        .jobs()
        .list(&ListParams::default())
        .await
        .expect("it answers");
    assert!(
        jobs.items
            .iter()
            .all(|job| job.metadata.deletion_timestamp.is_some()
                || job.uid() == same.uid()
                || job.name_any() != job_name(&deployment(&second)))
    );

    let (status, refused) = miner.ask(Method::DELETE, "/v1/workers/tee-1", None).await;
    assert_eq!(status, StatusCode::CONFLICT, "{refused}");
    let (status, _) = miner.ask(Method::DELETE, "/servers/tee-1", None).await;
    assert_eq!(status, StatusCode::OK);
    until("the worker goes", async || {
        let (status, _) = miner.ask(Method::DELETE, "/v1/workers/tee-1", None).await;
        (status == StatusCode::OK).then_some(())
    })
    .await;
    let deleted = validator.records(|record| match record {
        Record::ServerDeleted { server, .. } => Some(server.clone()),
        _ => None,
    });
    let uid = node.uid().expect("it has one");
    assert_eq!(deleted, [uid.clone(), uid], "once since it was in its own way");
    let state = miner.state().await;
    assert!(!rows(&state, "servers").iter().any(|row| row["name"] == "tee-1"));
    assert_eq!(space.remains().await, before);
    miner.stop().await;
    nodes.abort();
    drop(space);
    plane.stop().await;
}

fn gpu(number: u8) -> DeviceInfo {
    proof::software_device(GpuId::parse(&format!("{number:032x}")).expect("32 digits"))
}

fn deployment(row: &Value) -> DeploymentId {
    DeploymentId::parse(row["deployment_id"].as_str().expect("a text")).expect("an id")
}

async fn job_of(jobs: &Api<Job>, row: &Value) -> Job {
    jobs.get(&job_name(&deployment(row)))
        .await
        .expect("it runs as a Job")
}

async fn stop(miner: &Miner, row: &Value) -> (StatusCode, Value) {
    let ban = json!({ "chute_id": row["chute_id"], "reason": "a test" });
    let (status, answer) = miner.ask(Method::POST, "/v1/bans", Some(&ban)).await;
    assert!(status.is_success(), "{status}: {answer}");
    miner
        .ask(Method::DELETE, &format!("/deployments/{}", deployment(row)), None)
        .await
}

async fn make_node(plane: &ControlPlane, gpus: usize) -> Node {
    let nodes: Api<Node> = Api::all(plane.client.clone());
    let labels = json!({ "nvidia.com/gpu.count": gpus.to_string(), "chutes/external-ip": ADDRESS });
    let node = json!({ "metadata": { "name": "tee-1", "labels": labels } });
    let node = serde_json::from_value(node).expect("a node");
    let made = nodes
        .create(&PostParams::default(), &node)
        .await
        .expect("it is new");
    let size = json!({ "cpu": "8", "memory": "64Gi", "ephemeral-storage": "500Gi" });
    let status = json!({ "status": { "capacity": size, "allocatable": size } });
    nodes
        .patch_status("tee-1", &PatchParams::default(), &Patch::Merge(&status))
        .await
        .expect("it is there");
    made
}

async fn label(plane: &ControlPlane, labels: Value) {
    let nodes: Api<Node> = Api::all(plane.client.clone());
    let patch = json!({ "metadata": { "labels": labels } });
    nodes
        .patch("tee-1", &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .expect("it is there");
}

/// Stands in for a worker's attestation service: HTTPS with a certificate that nobody knows.
struct Attestation {
    port: u16,
    asked: Arc<AtomicUsize>,
}

impl Attestation {
    #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
    fn start(gpus: &[DeviceInfo]) -> Self {
        let made = rcgen::generate_simple_self_signed([ADDRESS.to_owned()]).expect("a certificate");
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.into());
        let config = Arc::new(config.expect("its own key"));
        let listener = TcpListener::bind((ADDRESS, 0)).expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let asked = Arc::new(AtomicUsize::new(0));
        let (counted, gpus) = (Arc::clone(&asked), json!(gpus).to_string());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let connection = ServerConnection::new(Arc::clone(&config)).expect("a good configuration");
                let mut stream = StreamOwned::new(connection, stream.expect("loopback works"));
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    if !matches!(stream.read(&mut byte), Ok(1)) {
                        break;
                    }
                    head.push(byte[0]);
                }
                let head = String::from_utf8(head).expect("a request");
                let (status, body) = if is_signed(&head) {
                    counted.fetch_add(1, Ordering::Relaxed);
                    ("200 OK", gpus.as_str())
                } else {
                    ("401 Unauthorized", "[]")
                };
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
                );
                // Whoever asked may be gone.
                let _ = stream.write_all(answer.as_bytes());
                stream.conn.send_close_notify();
                let _ = stream.flush();
            }
        });
        Self { port, asked }
    }
}

/// The miner asks for the GPUs.
fn is_signed(head: &str) -> bool {
    let mut lines = head.split("\r\n");
    let headers: Vec<(String, String)> = lines
        .clone()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let header = |name: &str| {
        let found = headers.iter().find(|(other, _)| *other == name.to_lowercase());
        found.map(|(_, value)| value.as_str())
    };
    let signed = check_request_to_validator(
        header,
        WallClock.now(),
        VALIDATOR_NONCE_WINDOW_SECONDS,
        &Tail::Purpose(Purpose::Attest),
    );
    lines.next() == Some("GET /server/devices HTTP/1.1") && signed.is_ok()
}

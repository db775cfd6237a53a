//! Sealed workers: what is refused when one is added, and how the leader drives one.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::StatusCode;
use coordinator::host_link::{AskHost, Hub};
use coordinator::sealed_worker::{Access, Drive, Driven, Error, Node, Workers};
use coordinator::signer::SealedKind;
use coordinator_core::state_machine::Command;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use protocol::gpu::DeviceInfo;
use protocol::id::ServerId;
use protocol::link::{FromHost, ToHost};
use protocol::logs::{HostAnswer, HostQuestion};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::workload::{Fence, Secret};
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::fixture::{Fixture, LOOPBACK, gpu_id, server_id, signer};

const PATIENCE: Duration = Duration::from_secs(30);

/// The test's ends of a worker that is driven.
struct Ends {
    kubeconfig: String,
    reports: mpsc::Sender<FromHost>,
    wants: mpsc::Receiver<ToHost>,
}

/// Clusters whose only node is no sealed worker; what is driven is handed to the test.
#[derive(Debug, Default)]
struct Fake {
    driven: Mutex<Vec<Ends>>,
    /// Another node was found in a worker's place.
    looked: Notify,
}

impl std::fmt::Debug for Ends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ends")
    }
}

#[derive(Debug)]
struct Silent;

impl AskHost for Silent {
    fn ask(&self, _: HostQuestion, _: Duration) -> BoxFuture<'static, Result<HostAnswer, String>> {
        std::future::ready(Ok(HostAnswer::Unknown)).boxed()
    }
}

impl Workers for Fake {
    fn reduce(&self, kubeconfig: &Secret, context: Option<&str>) -> Result<Secret, Error> {
        match context {
            Some(name) => Err(Error::Refused(format!("the kubeconfig has no context {name}"))),
            None => Ok(kubeconfig.clone()),
        }
    }

    fn node<'a>(&'a self, kubeconfig: &'a Secret) -> BoxFuture<'a, Result<Node, Error>> {
        let node = match kubeconfig.reveal() {
            "plain" => Ok(Node {
                uid: server_id("plain"),
                name: "plain".to_owned(),
                address: Some("192.0.2.7".to_owned()),
                sealed: false,
                gpus: None,
                cpu_count: 8,
                memory_gb: 64,
                disk_gb: 100,
            }),
            "another node" => {
                self.looked.notify_one();
                Ok(Node {
                    uid: server_id("another"),
                    name: "tee-1".to_owned(),
                    address: None,
                    sealed: true,
                    gpus: Some(1),
                    cpu_count: 8,
                    memory_gb: 64,
                    disk_gb: 100,
                })
            }
            _ => Err(Error::Unavailable(
                "the API server of the worker is away".to_owned(),
            )),
        };
        std::future::ready(node).boxed()
    }

    fn drive(&self, access: Access) -> BoxFuture<'static, Result<Driven, Error>> {
        let (reports, reports_in) = mpsc::channel(8);
        let (wants, wants_in) = mpsc::channel(8);
        self.driven.lock().unwrap().push(Ends {
            kubeconfig: access.kubeconfig.reveal().to_owned(),
            reports,
            wants: wants_in,
        });
        let driven = Driven {
            reports: reports_in,
            wants,
            way: Arc::new(Silent),
            run: std::future::pending().boxed(),
        };
        std::future::ready(Ok(driven)).boxed()
    }
}

impl Fake {
    /// The ends of the worker that is driven next.
    async fn next(&self) -> Ends {
        let driven = async {
            loop {
                if let Some(ends) = self.driven.lock().unwrap().pop() {
                    return ends;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, driven).await.expect("it is driven soon")
    }
}

#[tokio::test]
async fn a_kubeconfig_is_taken_over_loopback_and_only_of_a_sealed_worker() {
    let fixture = Fixture::with_workers(Arc::new(Fake::default())).await;
    let post = async |body: &Value| {
        let body = body.to_string();
        let headers = fixture.bound("POST", "/v1/workers", body.as_bytes());
        fixture
            .send("POST", "/v1/workers", &headers, &body, LOOPBACK)
            .await
    };
    let body = json!({ "kubeconfig": "plain" });
    let far = fixture.ask("POST", "/v1/workers", &body.to_string()).await;
    assert_eq!(far.status, StatusCode::FORBIDDEN);
    assert!(far.detail().contains("ssh -L"), "{}", far.detail());
    for (body, status, why) in [
        (
            &body,
            StatusCode::BAD_REQUEST,
            "plain has no label chutes/tee=true",
        ),
        (
            &json!({ "kubeconfig": "away" }),
            StatusCode::BAD_GATEWAY,
            "API server of the worker is away",
        ),
        (
            &json!({ "kubeconfig": "plain", "context": "other" }),
            StatusCode::BAD_REQUEST,
            "no context other",
        ),
    ] {
        let answer = post(body).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        assert!(answer.detail().contains(why), "{}", answer.detail());
    }
    assert_eq!(post(&json!({})).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(fixture.ask("GET", "/v1/workers", "").await.json(), json!([]));
    let unknown = fixture.ask("DELETE", "/v1/workers/tee-1", "").await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    let host = fixture.ask("DELETE", "/v1/workers/gpu-a", "").await;
    assert_eq!(host.status, StatusCode::NOT_FOUND, "a host is no worker");
}

fn worker() -> ServerId {
    server_id("tee-1")
}

async fn add(fixture: &Fixture, kubeconfig: &str) {
    let sealed = signer().seal(SealedKind::Kubeconfig, kubeconfig.as_bytes()).await;
    let device = DeviceInfo {
        uuid: gpu_id('f'),
        name: "NVIDIA H200".to_owned(),
        memory: 150_000_000_000,
        processors: 132,
        clock_rate_khz: 1_980_000,
        max_threads_per_processor: 2048,
    };
    let facts = HostFacts {
        server: worker(),
        name: "tee-1".to_owned(),
        address: "192.0.2.7".to_owned(),
        proof_port: 30443,
        devices: vec![device],
        cpu_count: 64,
        memory_gb: 512,
        disk_free_gb: 500,
        agent_version: String::new(),
    };
    let sealed_kubeconfig = sealed.expect("it is short");
    let command = Command::AddWorker {
        facts,
        sealed_kubeconfig,
    };
    fixture.propose(command).await;
}

fn report(fence: Fence) -> FromHost {
    FromHost::Report(WorkloadReport {
        fence,
        workloads: Vec::new(),
    })
}

#[tokio::test]
async fn a_worker_is_driven_as_long_as_it_is_known_and_counts_as_silent_when_it_says_nothing() {
    let fixture = Fixture::new().await;
    let (fake, hub) = (Arc::new(Fake::default()), Hub::default());
    let drive = Drive {
        store: fixture.store.clone(),
        signer: signer(),
        hub: hub.clone(),
        workers: Arc::clone(&fake) as Arc<dyn Workers>,
        silence_max: Duration::from_millis(300),
    };
    let cancel = CancellationToken::new();
    let driving = tokio::spawn(drive.all(cancel.clone()));
    add(&fixture, "first").await;
    let mut ends = fake.next().await;
    assert_eq!(ends.kubeconfig, "first", "it is opened on the way");
    assert!(hub.host(&worker()).is_none(), "it has said nothing yet");
    ends.reports
        .send(report(Fence::default()))
        .await
        .expect("it is heard");
    let told = timeout(PATIENCE, ends.wants.recv()).await.expect("soon");
    let Some(ToHost::Desired { fence, workloads }) = told else {
        panic!("{told:?}");
    };
    assert_eq!(workloads, []);
    ends.reports.send(report(fence)).await.expect("it is heard");
    assert!(hub.host(&worker()).is_some());
    let reported = || {
        fixture
            .store
            .read(|state| state.servers().get(&worker()).and_then(|row| row.reported))
    };
    let recorded = async {
        while reported().is_none() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, recorded).await.expect("its report is recorded");
    let silent = async {
        while hub.host(&worker()).is_some() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, silent)
        .await
        .expect("its API server says nothing any more");
    ends.reports
        .send(report(Fence::default()))
        .await
        .expect("it is heard");
    timeout(PATIENCE, ends.wants.recv())
        .await
        .expect("it is told anew");
    assert!(hub.host(&worker()).is_some());

    add(&fixture, "second").await;
    let next = fake.next().await;
    assert_eq!(next.kubeconfig, "second");
    timeout(PATIENCE, ends.reports.closed())
        .await
        .expect("with the first it is driven no more");
    // Behind this one is a node that took the place of the worker's.
    add(&fixture, "another node").await;
    timeout(PATIENCE, next.reports.closed())
        .await
        .expect("it is driven no more");
    timeout(PATIENCE, fake.looked.notified())
        .await
        .expect("it is looked at");
    add(&fixture, "third").await;
    let next = fake.next().await;
    assert_eq!(next.kubeconfig, "third");
    let driven = fake.driven.lock().unwrap().len();
    assert_eq!(driven, 0, "the one before was not driven");
    fixture.propose(Command::RemoveWorker { server: worker() }).await;
    timeout(PATIENCE, next.reports.closed())
        .await
        .expect("it is driven no more");
    assert!(hub.host(&worker()).is_none());
    cancel.cancel();
    driving.await.expect("it ends");
}

//! The host's desired set, from an offer to what runs and what is reported.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent::workloads::store::{Error, Found, Store};
use agent::workloads::{Channels, Offer, run};
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, DeploymentId};
use protocol::report::WorkloadReport;
use protocol::workload::{Fence, WorkloadPhase, WorkloadSpec};
use runtime::memory::Memory;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

fn id(name: &str) -> DeploymentId {
    DeploymentId::parse(name).expect("valid")
}

fn spec(name: &str) -> WorkloadSpec {
    WorkloadSpec {
        deployment: id(name),
        validator: Hotkey::from_public_key(&[2; 32]),
        miner: Hotkey::from_public_key(&[1; 32]),
        chute: ChuteId::parse("chute").expect("valid"),
        version: ChuteVersion::parse("v1").expect("valid"),
        image: "someone/echo:1.0".to_owned(),
        ref_str: "echo:chute".to_owned(),
        filename: "echo.py".to_owned(),
        code: "pass".to_owned(),
        chutes_version: None,
        gpus: Vec::new(),
        external_host: "127.0.0.1".to_owned(),
        config: None,
        launch_token: None,
        legacy_seed: None,
        job: None,
        ports: Vec::new(),
        cpu_count: 1,
        memory_gb: 1,
        disk_gb: 1,
    }
}

fn running() -> WorkloadPhase {
    WorkloadPhase::Running {
        ports: Vec::new(),
        ready: true,
    }
}

/// A host process without link and neighbours.
struct Host {
    offers: mpsc::Sender<Offer>,
    delivered: watch::Sender<Fence>,
    report: watch::Receiver<Option<WorkloadReport>>,
    chutes: watch::Receiver<Option<BTreeSet<ChuteId>>>,
    stored: watch::Receiver<Fence>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

async fn open(folder: &Path) -> (Store, Found) {
    let path = folder.join("agent.redb");
    loop {
        match Store::open(&path) {
            // The thread of the last one is about to let go.
            Err(Error::InUse(_)) => tokio::task::yield_now().await,
            other => return other.expect("its own file"),
        }
    }
}

impl Host {
    async fn start(folder: &TempDir, runtime: &Memory) -> Self {
        let (store, found) = open(folder.path()).await;
        let (offers, offers_in) = mpsc::channel(4);
        let (delivered, delivered_in) = watch::channel(Fence::default());
        let (report, report_in) = watch::channel(None);
        let (chutes, chutes_in) = watch::channel(None);
        let (stored, stored_in) = watch::channel(Fence::default());
        let channels = Channels {
            offers: offers_in,
            delivered: delivered_in,
            report,
            stored,
            chutes,
        };
        let shutdown = CancellationToken::new();
        let runtime = Arc::new(runtime.clone());
        let every = Duration::from_millis(200);
        let task = tokio::spawn(run(runtime, store, found.set, channels, every, shutdown.clone()));
        Self {
            offers,
            delivered,
            report: report_in,
            chutes: chutes_in,
            stored: stored_in,
            shutdown,
            task,
        }
    }

    async fn offer(&self, fence: (u64, u64), names: &[&str]) {
        let offer = Offer {
            fence: to_fence(fence),
            workloads: names.iter().map(|name| spec(name)).collect(),
        };
        self.offers.send(offer).await.expect("it runs");
    }

    /// Waits for a report that says exactly this, such as `(1, 2) a=running b=pending`.
    async fn reports(&mut self, expected: &str) {
        let mut last = String::new();
        let seen = tokio::time::timeout(Duration::from_secs(20), async {
            loop {
                last = describe(self.report.borrow_and_update().as_ref());
                if last == expected {
                    return;
                }
                self.report.changed().await.expect("it runs");
            }
        });
        let seen = seen.await;
        assert!(seen.is_ok(), "expected {expected:?}, last {last:?}");
    }

    fn deliver(&self, fence: (u64, u64)) {
        self.delivered.send_replace(to_fence(fence));
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.expect("no panic");
    }
}

fn to_fence((incarnation, revision): (u64, u64)) -> Fence {
    Fence {
        incarnation,
        revision,
    }
}

fn describe(report: Option<&WorkloadReport>) -> String {
    let Some(report) = report else {
        return "none".to_owned();
    };
    let mut text = report.fence.to_string();
    for workload in &report.workloads {
        let phase = match &workload.phase {
            WorkloadPhase::Pending => "pending",
            WorkloadPhase::Pulling { .. } => "pulling",
            WorkloadPhase::Running { .. } => "running",
            WorkloadPhase::Stopping => "stopping",
            WorkloadPhase::Ended { .. } => "ended",
        };
        text += &format!(" {}={phase}", workload.deployment);
    }
    text
}

#[tokio::test]
async fn a_set_becomes_true_and_is_reported() {
    let folder = tempfile::tempdir().expect("temporary folders can be made");
    let runtime = Memory::default();
    let mut host = Host::start(&folder, &runtime).await;
    host.reports("(0, 0)").await;
    host.offer((1, 1), &["a", "b"]).await;
    // Nothing starts until the coordinator knows what runs here.
    host.reports("(1, 1) a=pending b=pending").await;
    assert_eq!(runtime.started(), []);
    host.deliver((1, 1));
    host.chutes
        .wait_for(|chutes| chutes.as_ref().is_some_and(|chutes| chutes.len() == 1))
        .await
        .expect("it runs");
    let mut changes = runtime::Runtime::changes(&runtime);
    changes.wait_for(|count| *count == 2).await.expect("it lives");
    assert_eq!(runtime.started(), [id("a"), id("b")]);
    runtime.advance(&id("a"), running());
    runtime.advance(&id("b"), running());
    host.reports("(1, 1) a=running b=running").await;
    host.offer((1, 2), &["b", "c"]).await;
    host.reports("(1, 2) a=stopping b=running c=pending").await;
    runtime.remove(&id("a"));
    host.reports("(1, 2) b=running c=pending").await;
    assert_eq!(runtime.started(), [id("a"), id("b"), id("c")], "each once");
    host.stop().await;
}

#[tokio::test]
async fn the_set_outlives_the_agent_and_old_sets_are_refused() {
    let folder = tempfile::tempdir().expect("temporary folders can be made");
    let runtime = Memory::default();
    let mut host = Host::start(&folder, &runtime).await;
    host.offer((2, 5), &["a"]).await;
    host.reports("(2, 5) a=pending").await;
    host.deliver((2, 5));
    runtime::Runtime::changes(&runtime)
        .wait_for(|count| *count == 1)
        .await
        .expect("it lives");
    runtime.advance(&id("a"), running());
    host.reports("(2, 5) a=running").await;
    host.stop().await;

    let mut host = Host::start(&folder, &runtime).await;
    host.reports("(2, 5) a=running").await;
    // A past leader, a past cluster, and a second set under one fence.
    for fence in [(2, 4), (1, 9), (0, 0), (2, 5)] {
        host.offer(fence, &[]).await;
    }
    host.offer((2, 6), &["a", "b"]).await;
    host.reports("(2, 6) a=running b=pending").await;
    assert_eq!(runtime.started(), [id("a"), id("b")]);
    host.stop().await;
}

#[tokio::test]
async fn a_restored_cluster_removes_nothing_before_it_has_a_report() {
    let folder = tempfile::tempdir().expect("temporary folders can be made");
    let runtime = Memory::default();
    let mut host = Host::start(&folder, &runtime).await;
    host.offer((1, 9), &["a"]).await;
    host.reports("(1, 9) a=pending").await;
    host.deliver((1, 9));
    runtime::Runtime::changes(&runtime)
        .wait_for(|count| *count == 1)
        .await
        .expect("it lives");
    runtime.advance(&id("a"), running());
    host.reports("(1, 9) a=running").await;
    host.offer((2, 1), &["b"]).await;
    host.reports("(2, 1) a=running b=pending").await;
    host.stop().await;
    // Also the next agent waits.
    let mut host = Host::start(&folder, &runtime).await;
    host.reports("(2, 1) a=running b=pending").await;
    assert_eq!(runtime.started(), [id("a")]);
    host.deliver((2, 1));
    host.reports("(2, 1) a=stopping b=pending").await;
    host.stop().await;
}

#[tokio::test]
async fn without_an_observation_there_is_no_report() {
    let folder = tempfile::tempdir().expect("temporary folders can be made");
    let runtime = Memory::default();
    runtime.set_unreachable(true);
    let mut host = Host::start(&folder, &runtime).await;
    host.offer((1, 1), &["a"]).await;
    host.stored
        .wait_for(|fence| *fence == to_fence((1, 1)))
        .await
        .expect("it runs");
    host.offer((1, 2), &["a"]).await;
    host.stored
        .wait_for(|fence| *fence == to_fence((1, 2)))
        .await
        .expect("it runs");
    assert_eq!(describe(host.report.borrow_and_update().as_ref()), "none");
    runtime.set_unreachable(false);
    host.reports("(1, 2) a=pending").await;
    // The same again, from time to time.
    let repeated = tokio::time::timeout(Duration::from_secs(20), host.report.changed());
    repeated.await.expect("it is repeated").expect("it runs");
    host.reports("(1, 2) a=pending").await;
    host.stop().await;
}

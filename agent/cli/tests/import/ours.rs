//! Our miner: a store, the management API in front of it, and for each node what keeps workloads there, with the
//! coordinator's end of its link.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use agent::workloads::store::Store as Disk;
use agent::workloads::{Channels, Offer, run};
use coordinator::api::{
    Alone, ClusterView, Config, Deps, Hosts, Limits, Progress, Roles, SupportedGpus, ValidatorListing,
    router, serve,
};
use coordinator::backup::Door;
use coordinator::clock::WallClock;
use coordinator::leader::Scheduling;
use coordinator::signer::{Key, LocalSigner, Seed};
use coordinator::store::{BoxFuture, Store};
use coordinator::validator::inventory::{self, Observed};
use coordinator_core::state_machine::Command;
use coordinator_core::state_machine::command::{Observation, PayProfile};
use coordinator_core::state_machine::effect::EffectOutcome;
use protocol::gpu::DeviceInfo;
use protocol::hotkey::{Hotkey, Signer};
use protocol::id::{GpuId, ServerId};
use protocol::logs::{HostAnswer, HostQuestion};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::time::UnixMillis;
use protocol::workload::Fence;
use runtime::kubernetes::Kubernetes;
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::control_plane::Space;
use crate::original::{self, SERVERS, gpu, server_name, validator};

/// What the API asks of others: there are none.
#[derive(Debug)]
struct Nobody;

impl SupportedGpus for Nobody {
    fn supported_gpus<'a>(&'a self, _: &'a Hotkey) -> BoxFuture<'a, Result<BTreeSet<String>, String>> {
        Box::pin(std::future::ready(Err("there is no validator".to_owned())))
    }
}

impl Hosts for Nobody {
    fn last_report(&self, _: &ServerId) -> Option<(UnixMillis, WorkloadReport)> {
        None
    }

    fn ask(&self, _: &ServerId, _: HostQuestion) -> Option<BoxFuture<'static, Result<HostAnswer, String>>> {
        None
    }
}

impl ValidatorListing for Nobody {
    fn last_listing(&self, _: &Hotkey) -> Option<Observation> {
        None
    }

    fn last_look(&self, validator: &Hotkey) -> Option<Arc<inventory::Observation>> {
        Some(Arc::new(look(validator)))
    }
}

/// A chute that nobody runs.
pub(crate) const NEW_CHUTE: &str = "new-chute";

/// One chute could be read, and nothing else.
fn look(validator: &Hotkey) -> inventory::Observation {
    fn unknown<T>() -> Observed<T> {
        Observed::Unknown {
            why: "cut".to_owned(),
        }
    }
    let chute = json!({
        "chute_id": NEW_CHUTE, "version": "v1", "name": NEW_CHUTE, "chutes_version": "0.3.40",
        "supported_gpus": ["h100_sxm"], "node_selector": { "gpu_count": 1 }, "cords": [1],
        "effective_compute_multiplier": 3.0,
    });
    inventory::Observation {
        validator: validator.clone(),
        chutes: Observed::Known {
            asked_at: UnixMillis(original::CREATED_AT_MS),
            rows: vec![serde_json::from_value(chute).expect("a row as on the wire")],
            broken_rows: 1,
        },
        images: unknown(),
        nodes: unknown(),
        instances: unknown(),
        jobs: unknown(),
        bounties: unknown(),
        metrics: unknown(),
        utilization: unknown(),
        rolling_updates: unknown(),
        active_instances: unknown(),
        clock_offset_ms: None,
    }
}

impl ClusterView for Nobody {
    fn name(&self) -> String {
        "cluster-1".to_owned()
    }

    fn roles(&self) -> Roles {
        Roles::default()
    }

    fn progress(&self) -> BTreeMap<u64, Progress> {
        BTreeMap::new()
    }

    fn clocks_ahead_ms(&self) -> BTreeMap<u64, i64> {
        BTreeMap::new()
    }

    fn transfer(&self, _: Option<u64>) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(std::future::ready(Err("there is no other member".to_owned())))
    }
}

/// The miner. All of it ends with it.
pub(crate) struct Ours {
    pub(crate) store: Store,
    pub(crate) base: String,
    folder: TempDir,
    tasks: JoinSet<()>,
}

pub(crate) fn server_id(server: usize) -> ServerId {
    ServerId::parse(&format!("{}-uid", server_name(server))).expect("valid")
}

impl Ours {
    /// It acts, and no host has joined.
    pub(crate) async fn start() -> Self {
        let store = Store::in_memory(Arc::new(WallClock));
        let miner = Signer::from_seed(&[1; 32]).hotkey().clone();
        let key = Key::new(&Seed::new([1; 32]));
        let deps = Deps {
            supported_gpus: Arc::new(Nobody),
            hosts: Arc::new(Nobody),
            validator_listing: Arc::new(Nobody),
            scheduling: Scheduling::default(),
            cluster: Arc::new(Nobody),
            backup: Door::default(),
            others: Arc::new(Alone),
            signer: Arc::new(LocalSigner::new(key, Arc::new(WallClock))),
            workers: None,
        };
        let config = Config {
            miner: miner.clone(),
            member: "host-1".to_owned(),
            allow_plain_legacy_writes: false,
            limits: Limits::default(),
        };
        let routes = router(config, store.clone(), deps);
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has ports");
        let base = format!("http://{}", listener.local_addr().expect("bound"));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(
            routes,
            Limits::default(),
            listener,
            CancellationToken::new(),
        ));
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let ours = Self {
            store,
            base,
            folder,
            tasks,
        };
        let validators = BTreeSet::from([validator()]);
        ours.propose(Command::Configure {
            miner,
            validators,
            pay_profile: PayProfile::Of2026,
        })
        .await;
        ours
    }

    pub(crate) async fn propose(&self, command: Command) {
        self.store.propose(command).await.expect("the rules allow it");
    }

    pub(crate) async fn observe(&self, observing: bool) {
        self.propose(Command::SetObserving { observing }).await;
    }

    /// What waits for validators is done, as an executor would report it.
    pub(crate) async fn tell_validators(&self) {
        while let Some(effect) = self
            .store
            .read(|state| state.outbox().ready().next().map(|effect| effect.id))
        {
            let outcome = EffectOutcome::Done;
            self.propose(Command::FinishEffect { effect, outcome }).await;
        }
    }

    /// The agents and the API end.
    pub(crate) async fn stop(&mut self) {
        self.tasks.shutdown().await;
    }

    /// All hosts join, each with its agent.
    pub(crate) async fn join_all(&mut self, space: &Space) {
        for server in 0..SERVERS {
            let device = |number| DeviceInfo {
                uuid: GpuId::parse(&gpu(server, number)).expect("valid"),
                name: "NVIDIA H100 80GB HBM3".to_owned(),
                memory: 85_031_714_816,
                processors: 132,
                clock_rate_khz: 1_980_000,
                max_threads_per_processor: 2048,
            };
            let facts = HostFacts {
                server: server_id(server),
                name: server_name(server),
                address: format!("203.0.113.{server}"),
                proof_port: 30443,
                devices: (0..8).map(device).collect(),
                cpu_count: 128,
                memory_gb: 1024,
                disk_free_gb: 5000,
                agent_version: "0.1.0".to_owned(),
            };
            self.propose(Command::RecordHost { facts }).await;
            let runtime = space.open(&server_name(server)).await;
            let path = self.folder.path().join(format!("{server}.redb"));
            self.tasks
                .spawn(work(self.store.clone(), server_id(server), runtime, path));
        }
    }
}

/// An agent's workloads, offered and reported as over the host link.
async fn work(store: Store, server: ServerId, runtime: Kubernetes, path: std::path::PathBuf) {
    let (disk, found) = Disk::open(&path).expect("a new file");
    let (offers, offers_in) = mpsc::channel(4);
    let (delivered, delivered_in) = watch::channel(Fence::default());
    let (report, mut reports) = watch::channel(None::<WorkloadReport>);
    let channels = Channels {
        offers: offers_in,
        delivered: delivered_in,
        report,
        stored: watch::channel(Fence::default()).0,
        chutes: watch::channel(None).0,
    };
    let every = Duration::from_millis(500);
    let mut own = JoinSet::new();
    own.spawn(run(
        Arc::new(runtime),
        disk,
        found.set,
        channels,
        every,
        CancellationToken::new(),
    ));
    let mut changes = store.changes();
    let mut offered = None;
    loop {
        let desired = store.read(|state| state.desired(&server)).expect("it has joined");
        if offered != Some(desired.fence) {
            offered = Some(desired.fence);
            let workloads = desired
                .workloads
                .into_iter()
                .map(|workload| workload.spec)
                .collect();
            let offer = Offer {
                fence: desired.fence,
                workloads,
            };
            offers.send(offer).await.expect("it runs");
        }
        tokio::select! {
            () = changes.changed() => {}
            Ok(()) = reports.changed() => {
                let Some(report) = reports.borrow_and_update().clone() else { continue };
                let fence = report.fence;
                let command = Command::RecordWorkloads { server: server.clone(), report };
                // One of an older set is refused.
                if store.propose(command).await.is_ok() {
                    delivered.send_replace(fence);
                }
            }
        }
    }
}

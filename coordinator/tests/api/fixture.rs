//! A store with a small cluster in it, and signed requests against the router in this process.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use coordinator::api::{
    Alone, ClusterView, Config, Connection, Deps, Hosts, Limits, Peer, Progress, Roles, Routes,
    SupportedGpus, ValidatorListing, routes,
};
use coordinator::backup::Door;
use coordinator::clock::Clock;
use coordinator::leader::Scheduling;
use coordinator::sealed_worker::Workers;
use coordinator::signer::{Key, LocalSigner, Seed, Sign};
use coordinator::store::{BoxFuture, Store};
use coordinator::validator::inventory;
use coordinator_core::state_machine::chute::{ChuteCode, ChuteDefinition, ChuteKey};
use coordinator_core::state_machine::command::{Observation, PayProfile, Placement};
use coordinator_core::state_machine::effect::{EffectKind, EffectOutcome};
use coordinator_core::state_machine::{Command, Reply};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use protocol::gpu::DeviceInfo;
use protocol::hotkey::{Hotkey, Signer};
use protocol::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::logs::{HostAnswer, HostQuestion};
use protocol::report::{HostFacts, WorkloadReport, WorkloadStatus};
use protocol::signing::{BoundRequest, Headers, Purpose, Tail, headers_to_miner};
use protocol::time::UnixMillis;
use protocol::workload::{PortMapping, PortProtocol, WorkloadPhase};
use serde_json::Value;

/// 2025-01-01, as in the reference's vectors.
pub(crate) const START: UnixMillis = UnixMillis(1_735_689_600_000);
/// This machine.
pub(crate) const LOOPBACK: &str = "127.0.0.1:40000";
/// Some other machine.
pub(crate) const FOREIGN: &str = "203.0.113.9:40000";

#[derive(Debug)]
pub(crate) struct ManualClock(Mutex<UnixMillis>);

impl Clock for ManualClock {
    fn now(&self) -> UnixMillis {
        *self.0.lock().unwrap()
    }
}

/// Validators' GPU types as a table; an absent validator does not answer.
#[derive(Debug, Default)]
pub(crate) struct Types(pub(crate) BTreeMap<Hotkey, BTreeSet<String>>);

impl SupportedGpus for Types {
    fn supported_gpus<'a>(
        &'a self,
        validator: &'a Hotkey,
    ) -> BoxFuture<'a, Result<BTreeSet<String>, String>> {
        let types = self.0.get(validator).cloned();
        Box::pin(async move { types.ok_or_else(|| "connection refused".to_owned()) })
    }
}

/// Reports as a table.
#[derive(Debug, Default)]
pub(crate) struct Reports(
    pub(crate) Mutex<BTreeMap<ServerId, (UnixMillis, WorkloadReport)>>,
    /// What each host answers to whatever it is asked.
    pub(crate) Mutex<BTreeMap<ServerId, Result<HostAnswer, String>>>,
);

impl Hosts for Reports {
    fn last_report(&self, server: &ServerId) -> Option<(UnixMillis, WorkloadReport)> {
        self.0.lock().unwrap().get(server).cloned()
    }

    fn ask(
        &self,
        server: &ServerId,
        _: HostQuestion,
    ) -> Option<BoxFuture<'static, Result<HostAnswer, String>>> {
        let answer = self.1.lock().unwrap().get(server).cloned()?;
        Some(Box::pin(std::future::ready(answer)))
    }
}

/// The members of the log as a table. A lead goes to whom it is handed to, if that one votes.
#[derive(Debug, Default)]
pub(crate) struct Members {
    pub(crate) roles: Mutex<Roles>,
    pub(crate) progress: Mutex<BTreeMap<u64, Progress>>,
}

impl ClusterView for Members {
    fn name(&self) -> String {
        "cluster-1".to_owned()
    }

    fn roles(&self) -> Roles {
        self.roles.lock().unwrap().clone()
    }

    fn progress(&self) -> BTreeMap<u64, Progress> {
        self.progress.lock().unwrap().clone()
    }

    fn clocks_ahead_ms(&self) -> BTreeMap<u64, i64> {
        [(2, -3_600_000)].into()
    }

    fn transfer(&self, to: Option<u64>) -> BoxFuture<'_, Result<(), String>> {
        let mut roles = self.roles.lock().unwrap();
        let own = roles.own;
        let to = to.or_else(|| roles.voters.iter().copied().find(|voter| *voter != own));
        let transferred = match to {
            Some(to) if roles.voters.contains(&to) => {
                roles.leader = Some(to);
                roles.term += 1;
                Ok(())
            }
            _ => Err("no other voter answers".to_owned()),
        };
        Box::pin(std::future::ready(transferred))
    }
}

pub(crate) struct Fixture {
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) store: Store,
    pub(crate) miner: Signer,
    pub(crate) validator: Hotkey,
    pub(crate) reports: Arc<Reports>,
    pub(crate) listings: LastListings,
    pub(crate) members: Arc<Members>,
    pub(crate) routes: Router,
    metrics: Router,
    random: Mutex<u128>,
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn detail(&self) -> String {
        self.json()["detail"].as_str().expect("a detail").to_owned()
    }
}

pub(crate) fn server_id(name: &str) -> ServerId {
    ServerId::parse(&format!("{name}-uid")).unwrap()
}

pub(crate) fn gpu_id(digit: char) -> GpuId {
    GpuId::from_device_uuid(&digit.to_string().repeat(32)).unwrap()
}

pub(crate) fn deployment_id(name: &str) -> DeploymentId {
    DeploymentId::parse(name).unwrap()
}

/// Seals and opens for nobody in particular.
pub(crate) fn signer() -> Arc<dyn Sign> {
    let key = Key::new(&Seed::new([1; 32]));
    Arc::new(LocalSigner::new(key, Arc::new(coordinator::clock::WallClock)))
}

impl Fixture {
    /// Nothing but the configuration and a host `gpu-a` with GPUs `a` and `b`, not enrolled.
    pub(crate) async fn new() -> Self {
        Self::with(false, |store| store).await
    }

    pub(crate) async fn with(allow_plain_legacy_writes: bool, wrap: impl FnOnce(Store) -> Store) -> Self {
        Self::with_all(allow_plain_legacy_writes, wrap, None).await
    }

    /// With this way to sealed workers.
    pub(crate) async fn with_workers(workers: Arc<dyn Workers>) -> Self {
        Self::with_all(false, |store| store, Some(workers)).await
    }

    async fn with_all(
        allow_plain_legacy_writes: bool,
        wrap: impl FnOnce(Store) -> Store,
        workers: Option<Arc<dyn Workers>>,
    ) -> Self {
        let clock = Arc::new(ManualClock(Mutex::new(START)));
        let store = Store::in_memory(Arc::clone(&clock) as Arc<dyn Clock>);
        let (miner, validator) = (
            Signer::from_seed(&[1; 32]),
            Signer::from_seed(&[2; 32]).hotkey().clone(),
        );
        let (reports, listings) = (Arc::new(Reports::default()), LastListings::default());
        let members = Arc::new(Members::default());
        let types = BTreeSet::from(["h100_sxm".to_owned(), "4090".to_owned()]);
        let deps = Deps {
            supported_gpus: Arc::new(Types(BTreeMap::from([(validator.clone(), types)]))),
            hosts: Arc::clone(&reports) as Arc<dyn Hosts>,
            validator_listing: Arc::new(listings.clone()),
            scheduling: Scheduling::default(),
            cluster: Arc::clone(&members) as Arc<dyn ClusterView>,
            backup: Door::default(),
            others: Arc::new(Alone),
            signer: signer(),
            workers,
        };
        let config = Config {
            miner: miner.hotkey().clone(),
            member: "host-1".to_owned(),
            allow_plain_legacy_writes,
            limits: Limits::default(),
        };
        let Routes {
            operators: routes,
            metrics,
            ..
        } = routes(config, wrap(store.clone()), deps);
        let fixture = Self {
            clock,
            store,
            miner,
            validator,
            reports,
            listings,
            members,
            routes,
            metrics,
            random: Mutex::new(0),
        };
        fixture
            .propose(Command::Configure {
                miner: fixture.miner.hotkey().clone(),
                validators: BTreeSet::from([fixture.validator.clone()]),
                pay_profile: PayProfile::Of2026,
            })
            .await;
        fixture.join("gpu-a", &['a', 'b', 'c']).await;
        fixture
    }

    /// `gpu-a` enrolled and ready, a chute on GPU `a` that serves, a job on GPU `b`, GPU `c` free.
    pub(crate) async fn busy() -> Self {
        let fixture = Self::new().await;
        fixture.make_busy().await;
        fixture
    }

    pub(crate) async fn make_busy(&self) {
        self.enrol("gpu-a").await;
        self.verify().await;
        self.report("gpu-a", vec![]).await;
        self.chute("chute-1").await;
        self.chute("chute-2").await;
        self.propose(Command::RecordJobOffer {
            job: JobId::parse("job-1").unwrap(),
            chute: self.key("chute-2"),
            gpu_count: 1,
            disk_gb: 10,
            excluded: false,
        })
        .await;
        self.place("dep-1", "chute-1", 'a', None).await;
        self.place("dep-2", "chute-2", 'b', Some("job-1")).await;
        let running = |id: &str, external| WorkloadStatus {
            deployment: deployment_id(id),
            phase: WorkloadPhase::Running {
                ports: vec![PortMapping {
                    internal: 8000,
                    external,
                    protocol: PortProtocol::Http,
                }],
                ready: true,
            },
        };
        self.report("gpu-a", vec![running("dep-1", 31001), running("dep-2", 31002)])
            .await;
        let instance = InstanceId::parse("inst-1").unwrap();
        let config = Some(ConfigId::parse("config-dep-1").unwrap());
        for command in [
            Command::RecordInstanceCreated {
                validator: self.validator.clone(),
                chute: ChuteId::parse("chute-1").unwrap(),
                config: config.clone(),
                instance: instance.clone(),
            },
            Command::RecordInstanceVerified {
                instance: instance.clone(),
            },
            Command::RecordInstanceActivated { config, instance },
        ] {
            self.propose(command).await;
        }
    }

    pub(crate) async fn propose(&self, command: Command) -> Reply {
        self.store.propose(command).await.expect("the rules allow it")
    }

    pub(crate) fn pass(&self, ms: u64) {
        let mut now = self.clock.0.lock().unwrap();
        *now = *now + ms;
    }

    pub(crate) fn key(&self, chute: &str) -> ChuteKey {
        ChuteKey {
            validator: self.validator.clone(),
            chute: ChuteId::parse(chute).unwrap(),
        }
    }

    pub(crate) async fn join(&self, name: &str, gpus: &[char]) {
        let device = |digit: &char| DeviceInfo {
            uuid: gpu_id(*digit),
            name: "NVIDIA H100 80GB HBM3".to_owned(),
            memory: 85_031_714_816,
            processors: 132,
            clock_rate_khz: 1_980_000,
            max_threads_per_processor: 2048,
        };
        let facts = HostFacts {
            server: server_id(name),
            name: name.to_owned(),
            address: "198.51.100.7".to_owned(),
            proof_port: 30443,
            devices: gpus.iter().map(device).collect(),
            cpu_count: 26,
            memory_gb: 126,
            disk_free_gb: 500,
            agent_version: "0.1.0".to_owned(),
        };
        self.propose(Command::RecordHost { facts }).await;
    }

    pub(crate) async fn enrol(&self, name: &str) {
        self.propose(Command::EnrolServer {
            server: server_id(name),
            validator: self.validator.clone(),
            gpu_short_ref: "h100_sxm".to_owned(),
            hourly_cost_usd_micros: 1_500_000,
        })
        .await;
    }

    /// Ends the oldest effects of an enrolment well.
    pub(crate) async fn verify(&self) {
        self.advertised().await;
        self.finish(|kind| match kind {
            EffectKind::AwaitVerification { .. } => Some(EffectOutcome::Verified),
            _ => None,
        })
        .await;
    }

    pub(crate) async fn advertised(&self) {
        self.finish(|kind| match kind {
            EffectKind::AdvertiseGpus { .. } => Some(EffectOutcome::Advertised {
                task: "task-1".to_owned(),
                seed: 18_446_744_073_709_551_615,
            }),
            _ => None,
        })
        .await;
    }

    /// Ends whatever an enrolment waits for well, if it waits.
    pub(crate) async fn verify_if_waiting(&self) {
        for _ in 0..2 {
            let ends: Vec<_> = self.store.read(|state| {
                let ready = state.outbox().ready();
                let ends = ready.filter_map(|effect| match effect.kind {
                    EffectKind::AdvertiseGpus { .. } => Some((
                        effect.id,
                        EffectOutcome::Advertised {
                            task: "task-1".to_owned(),
                            seed: 1,
                        },
                    )),
                    EffectKind::AwaitVerification { .. } => Some((effect.id, EffectOutcome::Verified)),
                    _ => None,
                });
                ends.collect()
            });
            for (effect, outcome) in ends {
                self.propose(Command::FinishEffect { effect, outcome }).await;
            }
        }
    }

    /// Ends the deletions of instances well.
    pub(crate) async fn delete_instances(&self) {
        self.finish(|kind| match kind {
            EffectKind::DeleteInstance { .. } => Some(EffectOutcome::Done),
            _ => None,
        })
        .await;
    }

    /// Ends every ready effect that `outcome` knows an end for.
    pub(crate) async fn finish(&self, outcome: impl Fn(&EffectKind) -> Option<EffectOutcome>) {
        let ends: Vec<_> = self.store.read(|state| {
            let ready = state.outbox().ready();
            ready
                .filter_map(|effect| Some((effect.id, outcome(&effect.kind)?)))
                .collect()
        });
        assert!(!ends.is_empty(), "no effect waits that could end");
        for (effect, outcome) in ends {
            self.propose(Command::FinishEffect { effect, outcome }).await;
        }
    }

    pub(crate) async fn report(&self, name: &str, workloads: Vec<WorkloadStatus>) {
        let server = server_id(name);
        let fence = self
            .store
            .read(|state| state.fence_of(&server))
            .unwrap_or_default();
        let report = WorkloadReport { fence, workloads };
        let now = self.clock.now();
        self.reports
            .0
            .lock()
            .unwrap()
            .insert(server.clone(), (now, report.clone()));
        self.propose(Command::RecordWorkloads { server, report }).await;
    }

    pub(crate) async fn chute(&self, chute: &str) {
        let definition = ChuteDefinition {
            key: self.key(chute),
            version: ChuteVersion::parse("v1").unwrap(),
            name: format!("name of {chute}"),
            image: "user/image:tag".to_owned(),
            chutes_version: Some("0.3.40".to_owned()),
            gpu_count: 1,
            supported_gpus: BTreeSet::from(["h100_sxm".to_owned(), "h200".to_owned()]),
            preemptible: true,
            tee: false,
            serves_requests: true,
            job_ports: vec![],
            effective_multiplier_milli: None,
        };
        let code = ChuteCode {
            filename: "app.py".to_owned(),
            code: "chute = Chute()\n".to_owned(),
            ref_str: "app:chute".to_owned(),
        };
        self.propose(Command::RecordChute { definition, code }).await;
    }

    pub(crate) async fn place(&self, deployment: &str, chute: &str, gpu: char, job: Option<&str>) {
        self.propose(Command::PlaceDeployment(Placement {
            deployment: deployment_id(deployment),
            chute: self.key(chute),
            version: ChuteVersion::parse("v1").unwrap(),
            server: server_id("gpu-a"),
            gpus: vec![gpu_id(gpu)],
            victims: vec![],
            job: job.map(|job| JobId::parse(job).unwrap()),
            reason: "the best value for its cost".to_owned(),
        }))
        .await;
        self.finish(|kind| match kind {
            EffectKind::FetchLaunchConfig { deployment, .. } => Some(EffectOutcome::LaunchConfig {
                config: ConfigId::parse(&format!("config-{deployment}")).unwrap(),
                sealed_token: vec![1, 2, 3],
            }),
            _ => None,
        })
        .await;
    }

    /// Headers of the original scheme, as the original CLI makes them.
    pub(crate) fn original(&self, method: &str, body: &[u8]) -> Headers {
        let tail = match method {
            "POST" | "PUT" | "PATCH" => Tail::Body(body),
            _ => Tail::Purpose(Purpose::Management),
        };
        headers_to_miner(&self.miner, self.miner.hotkey(), self.clock.now(), &tail)
    }

    /// Headers of the newer scheme.
    pub(crate) fn bound(&self, method: &str, path_and_query: &str, body: &[u8]) -> Headers {
        let mut random = self.random.lock().unwrap();
        *random += 1;
        BoundRequest {
            method,
            path_and_query,
            body,
        }
        .sign(&self.miner, self.clock.now(), *random)
    }

    /// A request signed by the newer scheme, from another machine.
    pub(crate) async fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        let headers = self.bound(method, path, body.as_bytes());
        self.send(method, path, &headers, body, FOREIGN).await
    }

    /// A request signed by the original scheme, from this machine.
    pub(crate) async fn ask_originally(&self, method: &str, path: &str, body: &str) -> Answer {
        let headers = self.original(method, body.as_bytes());
        self.send(method, path, &headers, body, LOOPBACK).await
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&'static str, String)],
        body: &str,
        peer: &str,
    ) -> Answer {
        let response = self.open(method, path, headers, body, peer).await;
        let (head, body) = response.into_parts();
        let body = to_bytes(body, usize::MAX).await.expect("a whole body").to_vec();
        Answer {
            status: head.status,
            headers: head.headers,
            body,
        }
    }

    /// What the door of Prometheus answers.
    pub(crate) async fn prometheus(&self, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).expect("a request");
        let Ok(response) = TowerToHyperService::new(self.metrics.clone()).call(request).await;
        let (head, body) = response.into_parts();
        let body = to_bytes(body, usize::MAX).await.expect("a whole body").to_vec();
        (head.status, String::from_utf8(body).expect("text"))
    }

    pub(crate) async fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&'static str, String)],
        body: &str,
        peer: &str,
    ) -> axum::response::Response {
        self.open_on(&Connection::default(), method, path, headers, body, peer)
            .await
    }

    /// One of several requests on a connection.
    pub(crate) async fn open_on(
        &self,
        connection: &Connection,
        method: &str,
        path: &str,
        headers: &[(&'static str, String)],
        body: &str,
        peer: &str,
    ) -> axum::response::Response {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let peer: SocketAddr = peer.parse().unwrap();
        let request = request
            .extension(Peer(peer))
            .extension(connection.clone())
            .body(Body::from(body.to_owned()))
            .unwrap();
        let Ok(response) = TowerToHyperService::new(self.routes.clone()).call(request).await;
        response
    }

    /// Deployments that are live, in order.
    pub(crate) fn live(&self) -> Vec<String> {
        self.store.read(|state| {
            let live = state.deployments().values().filter(|d| d.phase.is_live());
            live.map(|d| d.id.to_string()).collect()
        })
    }
}

/// Remembers the last look at each validator; clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastListings(Arc<Mutex<Looks>>);

#[derive(Debug, Default)]
struct Looks {
    in_part: BTreeMap<Hotkey, Observation>,
    whole: BTreeMap<Hotkey, Arc<inventory::Observation>>,
}

impl LastListings {
    /// Replaces the last look, as far as it is compared.
    pub(crate) fn record(&self, observation: Observation) {
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        looks.in_part.insert(observation.validator.clone(), observation);
    }

    /// Replaces all of the last look.
    pub(crate) fn record_whole(&self, look: inventory::Observation) {
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        looks.whole.insert(look.validator.clone(), Arc::new(look));
    }
}

impl ValidatorListing for LastListings {
    fn last_listing(&self, validator: &Hotkey) -> Option<Observation> {
        let looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        looks.in_part.get(validator).cloned()
    }

    fn last_look(&self, validator: &Hotkey) -> Option<Arc<inventory::Observation>> {
        let looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        looks.whole.get(validator).cloned()
    }
}

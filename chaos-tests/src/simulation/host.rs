//! A host model: it keeps the desired set, starts and stops workloads with delays, and reports, over a link
//! that is cut and made again, with any member. Its chutes claim, verify and activate themselves at the validator.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coordinator::clock::Clock;
use coordinator::host_link::session;
use protocol::gpu::DeviceInfo;
use protocol::id::{DeploymentId, GpuId, ServerId};
use protocol::link::{FromHost, ToHost};
use protocol::report::{HostFacts, WorkloadReport, WorkloadStatus};
use protocol::time::UnixMillis;
use protocol::workload::{Fence, PRIMARY_PORT, PortMapping, PortProtocol, WorkloadPhase, WorkloadSpec};
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::clock::SimulatedClock;
use super::member::Members;
use super::network::{Network, Place};
use super::recorder::Recorder;
use super::validator::Validator;

/// Messages under way on a link.
const MESSAGES_MAX: usize = 16;
/// A report is sent again so often although nothing has changed.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// For a new connection.
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// A member that is silent for so long is left for another one.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// Between two looks whether it is.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The other end gives a silent connection up after so long.
const IDLE_MAX: Duration = Duration::from_secs(20);

/// What runs, or did.
#[derive(Debug)]
struct Workload {
    gpus: Vec<GpuId>,
    phase: WorkloadPhase,
    /// Its process exists.
    live: bool,
    stop: CancellationToken,
    crash: CancellationToken,
}

#[derive(Debug)]
struct Inner {
    random: fastrand::Rng,
    fence: Fence,
    desired: BTreeMap<DeploymentId, WorkloadSpec>,
    workloads: BTreeMap<DeploymentId, Workload>,
    clock_offset_ms: i64,
    paused_until_ms: u64,
    link: CancellationToken,
}

/// The model; clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Host(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    facts: HostFacts,
    recorder: Recorder,
    validator: Validator,
    clock: Arc<SimulatedClock>,
    inner: Mutex<Inner>,
    changed: Notify,
    /// A planted fault.
    revision_not_checked: bool,
}

/// The way between a host and the member that it is connected to.
#[derive(Debug, Clone)]
struct Way {
    network: Network,
    member: Place,
}

impl Way {
    async fn is_open(&self) -> bool {
        self.network
            .until_it_passes(Place::Hosts, self.member, CONNECT_MAX)
            .await
            && self.network.passes(self.member, Place::Hosts)
    }

    /// Returns when nothing has passed for a while.
    async fn is_silent(&self) {
        loop {
            sleep(LOOK_EVERY).await;
            let there = self
                .network
                .until_it_passes(Place::Hosts, self.member, SILENCE_MAX);
            if !there.await {
                return;
            }
            let back = self
                .network
                .until_it_passes(self.member, Place::Hosts, SILENCE_MAX);
            if !back.await {
                return;
            }
        }
    }

    /// Messages in order, each when it passes.
    fn pipe<T: Send + 'static>(&self, from: Place, to: Place) -> (mpsc::Sender<T>, mpsc::Receiver<T>) {
        let (sender, mut sent) = mpsc::channel(MESSAGES_MAX);
        let (deliver, receiver) = mpsc::channel(MESSAGES_MAX);
        let network = self.network.clone();
        tokio::spawn(async move {
            while let Some(message) = sent.recv().await {
                sleep(Duration::from_millis(2)).await;
                if !network.until_it_passes(from, to, IDLE_MAX).await || deliver.send(message).await.is_err()
                {
                    return;
                }
            }
        });
        (sender, receiver)
    }
}

/// Why a workload's life ended before it was stopped.
type Died = &'static str;

impl Host {
    pub(super) fn new(
        number: u8,
        gpu_count: u8,
        recorder: Recorder,
        validator: Validator,
        clock: Arc<SimulatedClock>,
        random: fastrand::Rng,
        revision_not_checked: bool,
    ) -> Self {
        let devices = (0..gpu_count).map(|gpu| DeviceInfo {
            uuid: GpuId::from_device_uuid(&format!("{number:02x}{gpu:02x}{}", "0".repeat(28)))
                .expect("32 hexadecimal digits"),
            name: "NVIDIA RTX A6000".to_owned(),
            memory: 51_000_000_000,
            processors: 84,
            clock_rate_khz: 1_800_000,
            max_threads_per_processor: 1536,
        });
        let facts = HostFacts {
            server: ServerId::parse(&format!("server-{number}")).expect("letters and digits"),
            name: format!("host-{number}"),
            address: format!("203.0.113.{number}"),
            proof_port: 30443,
            devices: devices.collect(),
            cpu_count: 32,
            memory_gb: 256,
            disk_free_gb: 500,
            agent_version: "0.1.0".to_owned(),
        };
        let inner = Inner {
            random,
            fence: Fence::default(),
            desired: BTreeMap::new(),
            workloads: BTreeMap::new(),
            clock_offset_ms: 0,
            paused_until_ms: 0,
            link: CancellationToken::new(),
        };
        Self(Arc::new(Shared {
            facts,
            recorder,
            validator,
            clock,
            inner: Mutex::new(inner),
            changed: Notify::new(),
            revision_not_checked,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw_ms(&self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.lock().random.u64(range))
    }

    pub(super) fn server(&self) -> &ServerId {
        &self.0.facts.server
    }

    /// Deployments whose workloads exist here.
    pub(super) fn running(&self) -> Vec<DeploymentId> {
        self.lock().workloads.keys().cloned().collect()
    }

    /// Cuts the link; it comes back by itself.
    pub(super) fn cut(&self) {
        self.lock().link.cancel();
    }

    /// Stops answering for a while; what runs goes on.
    pub(super) fn pause(&self, ms: u64) {
        self.lock().paused_until_ms = self.0.recorder.now_ms() + ms;
    }

    /// Sets its clock off and reconnects, which is when clocks are compared.
    pub(super) fn set_clock_off(&self, offset_ms: i64) {
        self.lock().clock_offset_ms = offset_ms;
        self.cut();
    }

    pub(super) fn clock_is_off(&self) -> bool {
        self.lock().clock_offset_ms != 0
    }

    /// Kills one live workload; none if there is none.
    pub(super) fn crash_one(&self) -> Option<DeploymentId> {
        let mut inner = self.lock();
        let live: Vec<DeploymentId> = inner
            .workloads
            .iter()
            .filter(|(_, workload)| workload.live)
            .map(|(id, _)| id.clone())
            .collect();
        if live.is_empty() {
            return None;
        }
        let id = live[inner.random.usize(..live.len())].clone();
        inner.workloads.get(&id)?.crash.cancel();
        Some(id)
    }

    async fn while_paused(&self) {
        loop {
            let left_ms = self
                .lock()
                .paused_until_ms
                .saturating_sub(self.0.recorder.now_ms());
            if left_ms == 0 {
                return;
            }
            sleep(Duration::from_millis(left_ms)).await;
        }
    }

    /// Keeps a link to some member for ever, and moves to another one when it is silent.
    pub(super) async fn run(self, members: Members, network: Network) {
        loop {
            self.while_paused().await;
            let member = members.any(&mut self.lock().random).clone();
            let way = Way {
                network: network.clone(),
                member: Place::Member(member.number()),
            };
            if way.is_open().await {
                let (up, incoming) = way.pipe(Place::Hosts, way.member);
                let (outgoing, down) = way.pipe(way.member, Place::Hosts);
                let me = self.server().clone();
                let recorder = self.0.recorder.clone();
                let served = member.serve(|context| async move {
                    let name = me.clone();
                    let end =
                        Box::pin(session::serve(context, move |id| *id == me, incoming, outgoing)).await;
                    recorder.note(format_args!("session of {name} ends: {end:?}"));
                });
                if served {
                    self.0.recorder.event("sessions");
                    let what = format!("{}: connected to member {}", self.server(), member.number());
                    self.0.recorder.note(what);
                    self.talk(up, down, &way).await;
                }
            }
            sleep(self.draw_ms(200..2000)).await;
        }
    }

    async fn talk(&self, up: mpsc::Sender<FromHost>, mut down: mpsc::Receiver<ToHost>, way: &Way) {
        let link = CancellationToken::new();
        let hello = {
            let mut inner = self.lock();
            inner.link = link.clone();
            let now = self.0.clock.now();
            FromHost::Hello {
                facts: self.0.facts.clone(),
                fence: inner.fence,
                clock: UnixMillis(now.0.saturating_add_signed(inner.clock_offset_ms)),
            }
        };
        if up.send(hello).await.is_err() || up.send(FromHost::Report(self.report())).await.is_err() {
            return;
        }
        loop {
            tokio::select! {
                biased;
                () = link.cancelled() => {
                    let half_open_ms = self.lock().random.u64(0..12_000);
                    if half_open_ms > 6000 {
                        // The other end does not notice for a while.
                        tokio::spawn(async move {
                            sleep(Duration::from_millis(half_open_ms)).await;
                            drop((up, down));
                        });
                    }
                    return;
                }
                () = way.is_silent() => {
                    self.0.recorder.note(format_args!("{}: the member is silent", self.server()));
                    return;
                }
                message = down.recv() => {
                    self.while_paused().await;
                    match message {
                        Some(ToHost::Desired { fence, workloads }) => self.take(fence, workloads),
                        Some(ToHost::RegistryHeaders(_) | ToHost::Doors(_) | ToHost::Authorities(_)) => {}
                        None => return,
                    }
                }
                () = self.0.changed.notified() => {}
                () = sleep(REPORT_EVERY) => {}
            }
            self.while_paused().await;
            if up.send(FromHost::Report(self.report())).await.is_err() {
                return;
            }
        }
    }

    /// Takes a set over unless it is of a lower fence, and makes it true.
    fn take(&self, fence: Fence, workloads: Vec<WorkloadSpec>) {
        let mut inner = self.lock();
        if fence < inner.fence && !self.0.revision_not_checked {
            self.0.recorder.event("sets of a lower fence refused");
            self.0
                .recorder
                .note(format_args!("{}: set {fence} refused", self.server()));
            return;
        }
        if fence < inner.fence {
            let (me, newer) = (self.server(), inner.fence);
            self.0
                .recorder
                .violation(format_args!("{me} took set {fence} after {newer}"));
        }
        inner.fence = fence;
        inner.desired = workloads
            .into_iter()
            .map(|spec| (spec.deployment.clone(), spec))
            .collect();
        let wanted: Vec<DeploymentId> = inner.desired.keys().cloned().collect();
        self.0
            .recorder
            .note(format_args!("{}: set {fence} of {wanted:?}", self.server()));
        let inner = &mut *inner;
        for (id, workload) in &inner.workloads {
            if !inner.desired.contains_key(id) {
                workload.stop.cancel();
            }
        }
        for (id, spec) in &inner.desired {
            if inner.workloads.contains_key(id) {
                continue;
            }
            let workload = Workload {
                gpus: spec.gpus.clone(),
                phase: WorkloadPhase::Pending,
                live: false,
                stop: CancellationToken::new(),
                crash: CancellationToken::new(),
            };
            let life = self
                .clone()
                .live(spec.clone(), workload.stop.clone(), workload.crash.clone());
            inner.workloads.insert(id.clone(), workload);
            tokio::spawn(life);
        }
    }

    fn report(&self) -> WorkloadReport {
        let inner = self.lock();
        let status = |(id, workload): (&DeploymentId, &Workload)| WorkloadStatus {
            deployment: id.clone(),
            phase: workload.phase.clone(),
        };
        WorkloadReport {
            fence: inner.fence,
            workloads: inner.workloads.iter().map(status).collect(),
        }
    }

    /// One workload from its acceptance until nothing of it is left.
    async fn live(self, spec: WorkloadSpec, stop: CancellationToken, crash: CancellationToken) {
        let id = spec.deployment.clone();
        let died = tokio::select! {
            biased;
            () = stop.cancelled() => None,
            () = crash.cancelled() => Some("crashed"),
            died = self.work(&spec) => Some(died),
        };
        if let Some(reason) = died {
            self.0
                .recorder
                .note(format_args!("{}: {id} ends: {reason}", self.server()));
            let exit_code = Some(i32::from(reason != JOB_DONE));
            let reason = reason.to_owned();
            self.enter(&id, WorkloadPhase::Ended { exit_code, reason }, false);
            // It stays listed until it is no longer wanted.
            stop.cancelled().await;
        } else if self
            .lock()
            .workloads
            .get(&id)
            .is_some_and(|workload| workload.live)
        {
            self.enter(&id, WorkloadPhase::Stopping, true);
            sleep(self.draw_ms(100..5000)).await;
        }
        self.0
            .recorder
            .note(format_args!("{}: nothing is left of {id}", self.server()));
        self.lock().workloads.remove(&id);
        // It may have been asked for again meanwhile; ids are never reused, so it was not.
        self.0.changed.notify_one();
    }

    fn enter(&self, id: &DeploymentId, phase: WorkloadPhase, live: bool) {
        let mut inner = self.lock();
        if let Some(workload) = inner.workloads.get_mut(id) {
            (workload.phase, workload.live) = (phase, live);
        }
        let mut users: BTreeMap<&GpuId, &DeploymentId> = BTreeMap::new();
        for (id, workload) in inner.workloads.iter().filter(|(_, workload)| workload.live) {
            for gpu in &workload.gpus {
                if let Some(other) = users.insert(gpu, id) {
                    let what = format!("1: {other} and {id} both run on GPU {gpu}");
                    self.0.recorder.violation(what);
                }
            }
        }
        drop(inner);
        self.0.changed.notify_one();
    }

    /// Pulls, starts, serves; returns only when the process ends by itself.
    async fn work(&self, spec: &WorkloadSpec) -> Died {
        let id = &spec.deployment;
        sleep(self.draw_ms(20..500)).await;
        let steps = self.lock().random.u64(1..4);
        for step in 1..=steps {
            let bytes_done = step * 1_000_000;
            self.enter(id, WorkloadPhase::Pulling { bytes_done }, false);
            sleep(self.draw_ms(100..1500)).await;
        }
        let external = self.lock().random.u16(31_000..32_000);
        let ports = vec![PortMapping {
            internal: PRIMARY_PORT,
            external,
            protocol: PortProtocol::Tcp,
        }];
        let running = |ready| WorkloadPhase::Running {
            ports: ports.clone(),
            ready,
        };
        self.enter(id, running(false), true);
        self.0.recorder.event("workloads started");
        sleep(self.draw_ms(200..2500)).await;
        if let Some(config) = &spec.config {
            let Some(token) = &spec.launch_token else {
                self.0
                    .recorder
                    .violation(format_args!("4: {id} is started without its token"));
                return "no launch token";
            };
            let instance = match self.0.validator.claim(config, token.reveal(), id) {
                Ok(instance) => instance,
                Err(why) => return why,
            };
            let (answer_lost, verifying) = {
                let mut inner = self.lock();
                let lost = inner.random.u8(..20) == 0 && self.0.recorder.faults_are_on();
                (lost, Duration::from_millis(inner.random.u64(300..6000)))
            };
            if answer_lost {
                self.0.recorder.fault("claim answer lost", id);
                return "the claim was not answered";
            }
            sleep(verifying).await;
            if self.0.validator.verify(&instance).is_err() {
                return "the instance is gone";
            }
            self.enter(id, running(true), true);
            sleep(self.draw_ms(50..3000)).await;
            if self.0.validator.activate(&instance).is_err() {
                return "the instance is gone";
            }
        }
        self.enter(id, running(true), true);
        if spec.job.is_some() {
            sleep(self.draw_ms(5_000..30_000)).await;
            return JOB_DONE;
        }
        std::future::pending().await
    }
}

const JOB_DONE: Died = "done";

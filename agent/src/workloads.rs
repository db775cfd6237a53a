//! Keeps the desired workloads on disk and makes them true.
//!
//! ```text
//! link --desired set--> judge -> store (durable) -> diff -> runtime
//! link <----report------------------------------------------ observe
//! ```
//!
//! [`fence`] decides which set counts, [`store`] keeps it, and the loop here waits for one event, applies it
//! and converges. A report carries the fence of the set that is stored, and lists everything that exists or
//! is wanted; while the runtime cannot say what exists, there is no report.

pub mod fence;
pub mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use protocol::id::{ChuteId, DeploymentId};
use protocol::report::{WorkloadReport, WorkloadStatus};
use protocol::workload::{Fence, WorkloadPhase, WorkloadSpec};
use runtime::diff::diff;
use runtime::{Observed, Runtime};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use self::fence::{DesiredSet, Verdict, judge};
use self::store::Store;

const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// A set as the coordinator sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Orders it.
    pub fence: Fence,
    /// All of it.
    pub workloads: Vec<WorkloadSpec>,
}

/// How the loop talks with the rest of the host.
#[derive(Debug)]
pub struct Channels {
    /// Sets from the coordinator.
    pub offers: mpsc::Receiver<Offer>,
    /// Fence of the last report that was given to the coordinator.
    pub delivered: watch::Receiver<Fence>,
    /// The newest report; none before the first.
    pub report: watch::Sender<Option<WorkloadReport>>,
    /// Fence of the set on disk.
    pub stored: watch::Sender<Fence>,
    /// Chutes that run here or are about to: their models must not be evicted. None until a set is known.
    pub chutes: watch::Sender<Option<BTreeSet<ChuteId>>>,
}

#[derive(Debug)]
enum Event {
    Offer(Offer),
    Delivered,
    Changed,
    Tick,
    Retry,
    Stop,
}

#[derive(Debug)]
struct Retry {
    failures: u32,
    at: Instant,
}

struct Workloads {
    runtime: Arc<dyn Runtime>,
    store: Store,
    set: DesiredSet,
    channels: Channels,
    /// Taken over as soon as the disk has room.
    unwritten: Option<DesiredSet>,
    /// Workloads that the runtime would not start or stop.
    retries: BTreeMap<DeploymentId, Retry>,
    /// Next attempt of what concerns all of them: the disk, or a runtime that does not answer.
    retry_all: Option<Retry>,
}

/// Runs until `shutdown`. Workloads go on afterwards.
pub async fn run(
    runtime: Arc<dyn Runtime>,
    store: Store,
    set: DesiredSet,
    channels: Channels,
    report_every: Duration,
    shutdown: CancellationToken,
) {
    let mut changes = runtime.changes();
    let mut ticks = interval(report_every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    channels.stored.send_replace(set.fence);
    let mut workloads = Workloads {
        runtime,
        store,
        set,
        channels,
        unwritten: None,
        retries: BTreeMap::new(),
        retry_all: None,
    };
    loop {
        let retry_at = workloads.next_retry();
        let event = tokio::select! {
            biased;
            () = shutdown.cancelled() => Event::Stop,
            Some(offer) = workloads.channels.offers.recv() => Event::Offer(offer),
            Ok(()) = workloads.channels.delivered.changed() => Event::Delivered,
            Ok(()) = changes.changed() => Event::Changed,
            () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => Event::Retry,
            _ = ticks.tick() => Event::Tick,
        };
        let report_always = matches!(event, Event::Tick);
        match event {
            Event::Stop => return,
            Event::Offer(offer) => workloads.offered(offer).await,
            Event::Delivered => workloads.delivered().await,
            Event::Changed | Event::Tick => {}
            Event::Retry => workloads.write_again().await,
        }
        workloads.converge(report_always).await;
    }
}

impl Workloads {
    async fn offered(&mut self, offer: Offer) {
        let known = self.unwritten.as_ref().unwrap_or(&self.set);
        match judge(known, offer.fence, offer.workloads) {
            Verdict::Same => {}
            Verdict::Refuse(refusal) => tracing::warn!(%refusal, "desired set refused"),
            Verdict::Take(set) => self.take(set).await,
        }
    }

    /// Only what is on disk counts as taken over.
    async fn take(&mut self, set: DesiredSet) {
        match self.store.put_set(&set).await {
            Ok(()) => {
                tracing::info!(fence = %set.fence, workloads = set.workloads.len(), "desired set taken over");
                self.channels.stored.send_replace(set.fence);
                if !set.reported {
                    self.retries.clear();
                }
                self.set = set;
                self.unwritten = None;
                self.retry_all = None;
            }
            Err(error) => {
                tracing::error!(%error, fence = %set.fence, "desired set not taken over, retried");
                self.unwritten = Some(set);
                self.retry_all = Some(later(self.retry_all.take()));
            }
        }
    }

    async fn write_again(&mut self) {
        if let Some(set) = self.unwritten.take() {
            self.take(set).await;
        }
    }

    /// The coordinator has seen what runs here: from now on its set may remove it.
    async fn delivered(&mut self) {
        let fence = *self.channels.delivered.borrow();
        if !self.set.reported && fence.incarnation == self.set.fence.incarnation && self.set.is_known() {
            let set = DesiredSet {
                reported: true,
                ..self.set.clone()
            };
            if self.unwritten.is_none() {
                self.take(set).await;
            }
        }
    }

    async fn converge(&mut self, report_always: bool) {
        let Some(mut observed) = self.observe().await else {
            return;
        };
        if self.set.is_known() && self.set.reported && self.act(&observed).await {
            match self.observe().await {
                Some(newer) => observed = newer,
                None => return,
            }
        }
        self.show(observed, report_always);
    }

    async fn observe(&mut self) -> Option<Vec<Observed>> {
        match self.runtime.observe().await {
            Ok(observed) => {
                if self.unwritten.is_none() {
                    self.retry_all = None;
                }
                Some(observed)
            }
            Err(error) => {
                tracing::warn!(%error, "no report");
                self.retry_all = Some(later(self.retry_all.take()));
                None
            }
        }
    }

    /// Starts and stops; says whether anything was done.
    async fn act(&mut self, observed: &[Observed]) -> bool {
        let plan = diff(&self.set.workloads, observed);
        let now = Instant::now();
        let due = |retries: &BTreeMap<_, Retry>, id| retries.get(id).is_none_or(|retry| retry.at <= now);
        let todo: BTreeSet<_> = plan.start.iter().chain(&plan.stop).cloned().collect();
        self.retries.retain(|deployment, _| todo.contains(deployment));
        let mut acted = false;
        for deployment in plan
            .stop
            .iter()
            .filter(|id| due(&self.retries, *id))
            .cloned()
            .collect::<Vec<_>>()
        {
            acted = true;
            let result = self.runtime.stop(&deployment).await;
            self.note(deployment, "stop", result);
        }
        for deployment in plan
            .start
            .iter()
            .filter(|id| due(&self.retries, *id))
            .cloned()
            .collect::<Vec<_>>()
        {
            acted = true;
            let spec = self
                .set
                .workloads
                .iter()
                .find(|spec| spec.deployment == deployment);
            let result = match spec {
                Some(spec) => self.runtime.apply(self.set.fence, spec).await,
                None => Ok(()),
            };
            self.note(deployment, "start", result);
        }
        acted
    }

    fn note(&mut self, deployment: DeploymentId, what: &str, result: Result<(), runtime::Error>) {
        let last = self.retries.remove(&deployment);
        if let Err(error) = result {
            tracing::warn!(%deployment, %error, what, "retried");
            self.retries.insert(deployment, later(last));
        }
    }

    fn show(&self, observed: Vec<Observed>, always: bool) {
        let mut all: BTreeMap<DeploymentId, WorkloadPhase> = BTreeMap::new();
        for spec in &self.set.workloads {
            all.insert(spec.deployment.clone(), WorkloadPhase::Pending);
        }
        all.extend(
            observed
                .into_iter()
                .map(|it| (it.status.deployment, it.status.phase)),
        );
        let report = WorkloadReport {
            fence: self.set.fence,
            workloads: all
                .into_iter()
                .map(|(deployment, phase)| WorkloadStatus { deployment, phase })
                .collect(),
        };
        self.channels.report.send_if_modified(|last| {
            let news = always || last.as_ref() != Some(&report);
            *last = Some(report);
            news
        });
        let chutes = || self.set.workloads.iter().map(|spec| spec.chute.clone()).collect();
        let chutes: Option<BTreeSet<ChuteId>> = self.set.is_known().then(chutes);
        self.channels.chutes.send_if_modified(|last| {
            let news = *last != chutes;
            *last = chutes;
            news
        });
    }

    fn next_retry(&self) -> Option<Instant> {
        // Single workloads wait for what concerns all of them.
        let all = self.retry_all.as_ref().map(|retry| retry.at);
        all.or_else(|| self.retries.values().map(|retry| retry.at).min())
    }
}

/// The next attempt: later each time, at no round moment.
fn later(last: Option<Retry>) -> Retry {
    let failures = last.map_or(0, |retry| retry.failures.saturating_add(1));
    let pause = RETRY_FIRST.saturating_mul(1 << failures.min(10)).min(RETRY_MAX);
    Retry {
        failures,
        at: Instant::now() + pause.mul_f64(0.5 + fastrand::f64() / 2.0),
    }
}

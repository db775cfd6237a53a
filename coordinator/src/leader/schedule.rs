//! When a strategy is asked, and what becomes of its decisions: each is proposed, and the state machine
//! checks it against every rule again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coordinator_core::scheduler::command_for;
use coordinator_core::scheduler::market::{ChuteMarket, LastInvocation, Market, Metrics, Utilization};
use coordinator_core::scheduler::strategy::{self, Decision, Plan, Trigger};
use coordinator_core::scheduler::view::View;
use coordinator_core::state_machine::State;
use coordinator_core::state_machine::chute::ChuteKey;
use protocol::hotkey::Hotkey;
use protocol::id::DeploymentId;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Listings;
use crate::store::{Error, Store};
use crate::validator::Event;
use crate::validator::inventory::Observation;

/// Questions that may wait. If there are more, the next pass over everything answers them.
const TRIGGERS_MAX: usize = 256;
/// Between two passes over everything, where no setting says it.
const TICK_EVERY_DEFAULT: Duration = Duration::from_secs(15);
/// Changes of the state are looked at this often at most.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Asks the strategy; never waits.
#[derive(Debug, Clone)]
pub struct Triggers {
    queue: mpsc::Sender<Trigger>,
}

impl Triggers {
    pub(super) fn channel() -> (Self, mpsc::Receiver<Trigger>) {
        let (queue, triggered) = mpsc::channel(TRIGGERS_MAX);
        (Self { queue }, triggered)
    }

    /// Asks for a pass over everything.
    pub fn tick(&self) {
        self.ask(Trigger::Tick);
    }

    fn ask(&self, trigger: Trigger) {
        // A full queue is no loss: what is in it makes the strategy look anyway.
        let _ = self.queue.try_send(trigger);
    }

    /// Asks what an event calls for, after it was recorded.
    pub(super) fn of_event(&self, validator: &Hotkey, event: &Event, store: &Store) {
        let key = |chute: &protocol::id::ChuteId| ChuteKey {
            validator: validator.clone(),
            chute: chute.clone(),
        };
        match event {
            Event::ChuteCreated {
                chute,
                job_only: false,
                ..
            } => self.ask(Trigger::ChuteCreated(key(chute))),
            Event::BountyChange { chute, .. } => self.ask(Trigger::Bounty(key(chute))),
            Event::JobCreated { job, .. } => self.ask(Trigger::Job(job.clone())),
            Event::RollingUpdate { instance, .. } => {
                if let Some(id) = store.read(|state| state.deployment_of(None, instance).cloned()) {
                    self.ask(Trigger::RollingUpdate(id));
                }
            }
            _ => {}
        }
    }
}

/// When and by what strategy chutes are placed.
#[derive(Debug, Clone)]
pub struct Scheduling {
    strategy: Arc<strategy::Scheduler>,
    tick_every: Duration,
    last: Arc<Mutex<Option<Plan>>>,
}

/// The built-in strategy.
impl Default for Scheduling {
    fn default() -> Self {
        Self {
            strategy: Arc::default(),
            tick_every: TICK_EVERY_DEFAULT,
            last: Arc::default(),
        }
    }
}

impl Scheduling {
    /// With the strategy of this name.
    ///
    /// # Errors
    /// The names that there are, when it is none of them.
    pub fn new(name: &str, tick_every: Duration) -> Result<Self, String> {
        let chosen = strategy::by_name(name).ok_or_else(|| strategy::NAMES.join(", "))?;
        let strategy = Arc::new(strategy::Scheduler::new(chosen));
        Ok(Self {
            strategy,
            tick_every,
            last: Arc::default(),
        })
    }

    pub(super) fn strategy(&self) -> &strategy::Scheduler {
        &self.strategy
    }

    /// What came out of the last pass over everything, for people.
    #[must_use]
    pub fn last_plan(&self) -> Option<Plan> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[derive(Debug)]
pub(super) struct Scheduler {
    pub(super) store: Store,
    pub(super) listings: Listings,
    pub(super) scheduling: Scheduling,
    pub(super) random: fastrand::Rng,
}

impl Scheduler {
    pub(super) async fn run(mut self, mut triggered: mpsc::Receiver<Trigger>, cancel: CancellationToken) {
        let mut changes = self.store.changes();
        let mut next_tick = Instant::now();
        let mut room = 0;
        let mut look_at = None;
        loop {
            let trigger = tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = sleep_until(next_tick) => Trigger::Tick,
                Some(trigger) = triggered.recv() => trigger,
                // A trigger never waits for this: what an event recorded is a change, too.
                () = changes.changed(), if look_at.is_none() => {
                    look_at = Some(Instant::now() + LOOK_EVERY);
                    continue;
                }
                () = sleep_until(look_at.unwrap_or(next_tick)), if look_at.is_some() => {
                    look_at = None;
                    // Room that has appeared is worth a pass; anything else waits for the next one.
                    let before = std::mem::replace(&mut room, self.store.read(free_gpus));
                    if room <= before {
                        continue;
                    }
                    Trigger::Tick
                }
            };
            if trigger == Trigger::Tick {
                next_tick = Instant::now() + self.scheduling.tick_every;
            }
            self.decide(&trigger).await;
        }
    }

    async fn decide(&mut self, trigger: &Trigger) {
        let market = market_of(&self.listings.all());
        let began = Instant::now();
        let clock_ms = || u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let plan = self.store.read(|state| {
            let view = View::new(state, &market);
            self.scheduling.strategy.propose(&view, trigger, &clock_ms)
        });
        if let Some(failure) = &plan.failure {
            tracing::error!(failure, "the built-in strategy took over");
        }
        for decision in &plan.decisions {
            self.carry_out(decision).await;
        }
        if *trigger == Trigger::Tick {
            *self
                .scheduling
                .last
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some(plan);
        }
    }

    async fn carry_out(&mut self, decision: &Decision) {
        if let Decision::Launch(launch) = decision {
            tracing::info!(
                chute = %launch.chute.chute, server = %launch.server, victims = launch.victims.len(),
                reason = launch.reason, "placing"
            );
        }
        let id = deployment_id(&mut self.random);
        let command = self.store.read(|state| command_for(decision.clone(), state, id));
        let Some(command) = command else { return };
        match self.store.propose(command).await {
            Ok(_) => {}
            // The state has moved on since the view was taken; the next pass sees it.
            Err(Error::Rejected(rejection)) => tracing::info!(%rejection, "a decision was rejected"),
            Err(error) => tracing::warn!(%error, "a decision was not recorded"),
        }
    }
}

/// A new deployment's name: a random UUID (version 4), since validators and Kubernetes see it.
fn deployment_id(random: &mut fastrand::Rng) -> DeploymentId {
    let bits = random.u128(..) & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let hex = format!("{bits:032x}");
    let text = format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    );
    DeploymentId::parse(&text).expect("hexadecimal digits and dashes")
}

fn free_gpus(state: &State) -> usize {
    state.gpus().values().filter(|gpu| gpu.is_free()).count()
}

/// What strategies may know of the network, from the last listings.
pub(super) fn market_of(listings: &[Arc<Observation>]) -> Market {
    let mut market = Market::default();
    for observed in listings {
        add_listing(&mut market, observed);
    }
    market
}

fn add_listing(market: &mut Market, observed: &Observation) {
    let mut chutes: BTreeMap<ChuteKey, ChuteMarket> = BTreeMap::new();
    let key = |chute: &protocol::id::ChuteId| ChuteKey {
        validator: observed.validator.clone(),
        chute: chute.clone(),
    };
    if let Some((read_at, rows)) = observed.metrics.complete() {
        market.metrics_read_at.insert(observed.validator.clone(), read_at);
        for row in rows {
            let metrics = Metrics {
                instance_count: u32::try_from(row.instance_count).unwrap_or(u32::MAX),
                total_invocations: row.total_invocations,
                total_compute_time_s: thousandths(row.total_compute_time_milli.unwrap_or(0)),
                compute_multiplier: thousandths(row.compute_multiplier_milli.unwrap_or(1000)),
                rate_limit_count: row.rate_limit_count,
                read_at,
            };
            let chute = chutes.entry(key(&row.chute_id)).or_default();
            if row.total_invocations > 0 {
                chute.last_invocation = LastInvocation::Unknown;
            }
            chute.metrics = Some(metrics);
        }
    }
    if let Some((read_at, rows)) = observed.utilization.complete() {
        for row in rows {
            let small = |count: Option<u64>| count.map(|count| u32::try_from(count).unwrap_or(u32::MAX));
            chutes.entry(key(&row.chute_id)).or_default().utilization = Some(Utilization {
                scalable: row.scalable,
                update_in_progress: row.update_in_progress.unwrap_or(false),
                scale_allowance: small(row.scale_allowance),
                target_count: small(row.target_count),
                read_at,
            });
        }
    }
    for row in observed.chutes.rows() {
        if let Some(milli) = row.effective_compute_multiplier_milli {
            chutes.entry(key(&row.chute_id)).or_default().effective_multiplier = Some(thousandths(milli));
        }
    }
    if let Some((_, rows)) = observed.active_instances.complete() {
        for row in rows {
            let count = &mut chutes.entry(key(&row.chute_id)).or_default().active_instances;
            *count = Some(count.unwrap_or(0) + 1);
        }
    }
    market.chutes.extend(chutes);
}

/// Thousandths as a float: strategies calculate with floats, the wire and the state do not.
#[expect(
    clippy::cast_precision_loss,
    reason = "amounts are far below 2^53 thousandths"
)]
fn thousandths(milli: u64) -> f64 {
    milli as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::WallClock;
    use coordinator_core::state_machine::command::Command;

    /// What an event records is a change of the state, too: the trigger behind it waited for the pause between looks.
    #[tokio::test]
    async fn a_trigger_does_not_wait_for_the_next_look_at_changes() {
        let store = Store::in_memory(Arc::new(WallClock));
        let (triggers, triggered) = Triggers::channel();
        let scheduler = Scheduler {
            store: store.clone(),
            listings: Listings::default(),
            scheduling: Scheduling::new(strategy::NAMES[0], Duration::from_secs(3600)).unwrap(),
            random: fastrand::Rng::with_seed(1),
        };
        let running = tokio::spawn(scheduler.run(triggered, CancellationToken::new()));
        let turns = async || {
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
        };
        turns().await;
        store.propose(Command::PassTime).await.unwrap();
        turns().await;
        triggers.ask(Trigger::Job(protocol::id::JobId::parse("job-1").unwrap()));
        turns().await;
        assert_eq!(triggers.queue.capacity(), TRIGGERS_MAX, "it still waits");
        running.abort();
    }

    #[test]
    fn deployment_names_are_uuids_of_version_4() {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..100 {
            let text = deployment_id(&mut random).to_string();
            assert_eq!(text.len(), 36, "{text}");
            assert_eq!(text.as_bytes()[14], b'4', "{text}");
            assert!(matches!(text.as_bytes()[19], b'8' | b'9' | b'a' | b'b'), "{text}");
        }
    }
}

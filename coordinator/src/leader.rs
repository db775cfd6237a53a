//! All that only a leader does: the validators' sockets, the periodic look at their listings, the outbox,
//! deadlines, watching hosts, scheduling. It starts when this member leads and is dropped when it does not;
//! what it remembers besides the state may be lost with it.
//!
//! - `follow.rs`: what one validator says, by socket and by listing;
//! - `schedule.rs`: when a strategy is asked, and what becomes of its decisions;
//! - `trial.rs`: what would be done if the cluster did not observe;
//! - here: deadlines and silent hosts. What runs on sealed workers is driven by [`crate::sealed_worker`].
//!
//! While the cluster observes, the leader watches hosts, drives workers as their agents would, and reads validators' listings, for `diff` and for the trial, and
//! does nothing else: another miner acts with this hotkey.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coordinator_core::state_machine::{Command, State};
use protocol::hotkey::Hotkey;
use protocol::id::ServerId;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::executor::{Executor, Validators};
use crate::host_link::Hub;
use crate::sealed_worker::{Drive, SILENCE_MAX, Workers};
use crate::signer::Sign;
use crate::store::{Error, Store};
use crate::validator::inventory::Observation;
use crate::validator::socket::Dial;
use crate::validator::{Directory, SocketEvent, socket};

mod follow;
mod schedule;
mod trial;

pub use schedule::{Scheduling, Triggers};
pub use trial::Look;

/// A host that was silent for this long is not used for new work.
const HOST_SILENCE_MAX: Duration = Duration::from_secs(30);
/// Between two looks at silent hosts.
const WATCH_EVERY: Duration = Duration::from_secs(5);
/// Between two writes of `PassTime` when no deadline is due: old memories go then.
const FORGET_EVERY_MS: u64 = 60_000;
/// Events that may wait. A full queue makes the socket drop them and ask for a listing instead.
const EVENTS_MAX: usize = 1024;

/// The last listing of each validator, for `diff` and for strategies.
#[derive(Debug, Clone, Default)]
pub struct Listings {
    inner: Arc<Mutex<BTreeMap<Hotkey, Arc<Observation>>>>,
}

impl Listings {
    /// The last listing of a validator that this member has read.
    #[must_use]
    pub fn get(&self, validator: &Hotkey) -> Option<Arc<Observation>> {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(validator)
            .cloned()
    }

    fn put(&self, observation: Observation) -> Arc<Observation> {
        let observation = Arc::new(observation);
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.insert(observation.validator.clone(), Arc::clone(&observation));
        observation
    }

    fn all(&self) -> Vec<Arc<Observation>> {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }
}

/// What a leader works with.
#[derive(Debug, Clone)]
pub struct Leader {
    /// The state.
    pub store: Store,
    /// Signs and seals.
    pub signer: Arc<dyn Sign>,
    /// Where validators are.
    pub directory: Directory,
    /// Their REST interfaces.
    pub validators: Arc<Validators>,
    /// How their sockets are dialled.
    pub dial: Arc<dyn Dial>,
    /// Who is connected.
    pub hub: Hub,
    /// Where the last listings are kept.
    pub listings: Listings,
    /// Between two listings of a validator, when nothing asks for one earlier.
    pub observe_every: Duration,
    /// When and by what strategy chutes are placed.
    pub scheduling: Scheduling,
    /// The way to the clusters of sealed workers, if this program knows one.
    pub workers: Option<Arc<dyn Workers>>,
    /// Seed of jitter and of the names that this leader gives.
    pub seed: u64,
}

impl Leader {
    /// The same for the next time: a member that leads once more, be it in the same term, must not give the
    /// same names again.
    #[must_use]
    pub fn next_time(&mut self) -> Self {
        self.seed = seed_after(self.seed);
        self.clone()
    }

    /// Leads until cancelled.
    pub async fn run(self, cancel: CancellationToken) {
        // Whatever is still running when this future is dropped ends with it.
        let stop = cancel.child_token();
        let _stop = stop.clone().drop_guard();
        let mut random = fastrand::Rng::with_seed(self.seed);
        let mut tasks = JoinSet::new();
        let store = self.store.clone();
        let observes = store.read(State::is_observing);
        if observes {
            tracing::warn!("the cluster observes: nothing is done at validators, nothing is placed");
            for validator in self.directory.iter() {
                if let Some(api) = self.validators.get(&validator.hotkey) {
                    tasks.spawn(follow::only_list(
                        Arc::clone(api),
                        self.store.clone(),
                        self.listings.clone(),
                        self.observe_every,
                        stop.clone(),
                    ));
                }
            }
        } else {
            self.act(&mut tasks, &mut random, &stop);
        }
        tasks.spawn(pass_time(self.store.clone(), stop.clone()));
        tasks.spawn(watch_hosts(self.store.clone(), self.hub.clone(), stop.clone()));
        if let Some(workers) = self.workers {
            let drive = Drive {
                store: self.store,
                signer: self.signer,
                hub: self.hub,
                workers,
                silence_max: SILENCE_MAX,
            };
            tasks.spawn(drive.all(stop.clone()));
        }

        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = until_observing(&store, !observes) => {}
            // No task ends by itself: one that does has panicked, and leading without it would be worse.
            ended = tasks.join_next() => tracing::error!(?ended, "a leader's task ended; leading starts again"),
        }
        stop.cancel();
        while tasks.join_next().await.is_some() {}
    }

    /// Starts all that changes something outside.
    fn act(&self, tasks: &mut JoinSet<()>, random: &mut fastrand::Rng, stop: &CancellationToken) {
        let (triggers, triggered) = Triggers::channel();
        let executor = Executor::new(
            self.store.clone(),
            Arc::clone(&self.signer),
            Arc::clone(&self.validators),
        );
        tasks.spawn(executor.run(stop.clone(), random.fork()));
        for validator in self.directory.iter() {
            let Some(api) = self.validators.get(&validator.hotkey) else {
                continue;
            };
            let (events, received) = mpsc::channel::<SocketEvent>(EVENTS_MAX);
            let store = self.store.clone();
            let mut config = socket::Config::new(validator, Arc::new(move || store.leads_now()));
            config.dial = Arc::clone(&self.dial);
            let socket = socket::Socket::new(config, Arc::clone(&self.signer), events, random.fork());
            tasks.spawn(socket.run(stop.clone()));
            let follower = follow::Follower {
                store: self.store.clone(),
                miner: self.signer.hotkey().clone(),
                api: Arc::clone(api),
                listings: self.listings.clone(),
                look: Arc::new(Notify::new()),
                triggers: triggers.clone(),
                observe_every: self.observe_every,
            };
            tasks.spawn(follower.clone().take_events(received, stop.clone()));
            tasks.spawn(follower.look_again_and_again(stop.clone()));
        }
        let scheduler = schedule::Scheduler {
            store: self.store.clone(),
            listings: self.listings.clone(),
            scheduling: self.scheduling.clone(),
            random: random.fork(),
        };
        tasks.spawn(scheduler.run(triggered, stop.clone()));
    }
}

/// Returns when the cluster observes, or acts.
async fn until_observing(store: &Store, observing: bool) {
    let mut changes = store.changes();
    while store.read(State::is_observing) != observing {
        changes.changed().await;
    }
}

fn seed_after(seed: u64) -> u64 {
    fastrand::Rng::with_seed(seed).u64(..)
}

/// Proposes `PassTime` when a deadline is due.
async fn pass_time(store: Store, cancel: CancellationToken) {
    let mut changes = store.changes();
    let mut forgotten_at = store.clock().now();
    loop {
        let now = store.clock().now();
        let due = store
            .read(|state| state.next_deadline())
            .is_some_and(|deadline| deadline <= now);
        if due || now.since(forgotten_at) >= FORGET_EVERY_MS {
            forgotten_at = now;
            if let Err(error) = store.propose(Command::PassTime).await {
                tracing::warn!(%error, "deadlines were not passed");
            }
        }
        let next = store.read(|state| state.next_deadline());
        let now = store.clock().now();
        let wait_ms = next
            .map_or(FORGET_EVERY_MS, |next| next.since(now))
            .clamp(100, FORGET_EVERY_MS);
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(wait_ms)) => {}
            // A new deadline may be earlier; do not look more often than every 100 ms.
            () = async {
                changes.changed().await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            } => {}
        }
    }
}

/// Marks hosts that nobody hears; their workloads are left alone, they may well be earning.
async fn watch_hosts(store: Store, hub: Hub, cancel: CancellationToken) {
    let began = Instant::now();
    loop {
        if cancel
            .run_until_cancelled(tokio::time::sleep(WATCH_EVERY))
            .await
            .is_none()
        {
            return;
        }
        let silent: Vec<(ServerId, Option<String>)> = store.read(|state| {
            let reachable = state.servers().values().filter(|server| server.reachable);
            reachable
                .filter(|server| {
                    let heard = hub.heard_at(server.id()).unwrap_or(began).max(began);
                    hub.host(server.id()).is_none() && heard.elapsed() > HOST_SILENCE_MAX
                })
                .map(|server| (server.id().clone(), server.quarantine.clone()))
                .collect()
        });
        for (server, quarantine) in silent {
            tracing::warn!(%server, "host is silent: no new work for it");
            let command = Command::RecordHostCondition {
                server,
                reachable: false,
                quarantine,
            };
            match store.propose(command).await {
                Ok(_) | Err(Error::Rejected(_)) => {}
                Err(error) => tracing::warn!(%error, "a silent host was not recorded"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found by the simulation: a leader gave the names of its first time once more.
    #[test]
    fn a_member_that_leads_again_gives_other_names() {
        let mut seed = 17;
        let mut all: Vec<u128> = (0..100)
            .flat_map(|_| {
                seed = seed_after(seed);
                let mut random = fastrand::Rng::with_seed(seed);
                [random.u128(..), random.u128(..), random.u128(..)]
            })
            .collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 300);
    }
}

//! The only member: opened on the same disks life after life, killed at once or by a loss of power in the
//! middle of a write.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coordinator::executor::Validators;
use coordinator::host_link::{Hub, session};
use coordinator::leader::{Leader, Listings, Scheduling};
use coordinator::member::ReplicatedLog;
use coordinator::signer::Sign;
use coordinator::store::{Machine, Store};
use coordinator::validator::Directory;
use coordinator::validator::socket::Dial;
use coordinator_core::state_machine::command::PayProfile;
use coordinator_core::state_machine::{Command, Faults};
use protocol::link::RegistryHeaders;
use replica::{Config, Health, Pace, Replica, SnapshotPolicy, Timing, Writer};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::clock::SimulatedClock;
use super::disk::Disks;
use super::recorder::Recorder;
use super::validator::Validator;
use super::watched::{Oracle, Watched, WatchedLog};

/// One voter beats for nobody; slower beats cost fewer steps.
const TIMING: Pace = Pace {
    heartbeat_ms: 2_000,
    election_min_ms: 6_000,
    election_max_ms: 12_000,
};

/// What every life of the member is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) recorder: Recorder,
    pub(super) clock: Arc<SimulatedClock>,
    pub(super) signer: Arc<dyn Sign>,
    pub(super) directory: Directory,
    pub(super) validators: Arc<Validators>,
    pub(super) dial: Arc<dyn Dial>,
    pub(super) validator: Validator,
    pub(super) planted: Faults,
    pub(super) pay_profile: PayProfile,
    pub(super) disks: Disks,
    pub(super) oracle: Oracle,
}

/// The member; clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Member(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    parts: Parts,
    random: Mutex<fastrand::Rng>,
    life: Mutex<Option<Life>>,
    killed: Notify,
    power_goes: AtomicBool,
}

/// A member that is up.
#[derive(Debug)]
struct Life {
    store: Store,
    context: session::Context,
    /// Sessions end with it. It stays empty: hosts are models and pull nothing.
    _header_sets: watch::Sender<Vec<RegistryHeaders>>,
    tasks: Vec<AbortHandle>,
}

impl Member {
    pub(super) fn new(parts: Parts, random: fastrand::Rng) -> Self {
        Self(Arc::new(Shared {
            parts,
            random: Mutex::new(random),
            life: Mutex::new(None),
            killed: Notify::new(),
            power_goes: AtomicBool::new(false),
        }))
    }

    fn life(&self) -> MutexGuard<'_, Option<Life>> {
        self.0.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw<T>(&self, draw: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        draw(&mut self.0.random.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The store, while the member is up.
    pub(super) fn store(&self) -> Option<Store> {
        self.life().as_ref().map(|life| life.store.clone())
    }

    /// Starts a host's session, which dies with the member; none while it is down.
    pub(super) fn serve<F>(&self, session: impl FnOnce(session::Context) -> F) -> bool
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut life = self.life();
        let Some(life) = life.as_mut() else { return false };
        life.tasks.retain(|task| !task.is_finished());
        let task = tokio::spawn(session(life.context.clone()));
        life.tasks.push(task.abort_handle());
        true
    }

    /// `kill -9`, with the power.
    pub(super) fn kill(&self) {
        self.0.killed.notify_one();
    }

    /// The power goes after so many more writes and syncs.
    pub(super) fn fail_power_after(&self, steps: u64) {
        self.0.power_goes.store(true, Ordering::Relaxed);
        self.0.parts.disks.power.fail_after(Some(steps));
    }

    /// Lives, dies and lives again.
    pub(super) async fn run(self) {
        let Parts { disks, recorder, .. } = &self.0.parts;
        for number in 0_u64.. {
            recorder.note(format_args!("member: life {number} begins"));
            let alive = Arc::new(AtomicBool::new(true));
            match self.live(number, &alive).await {
                Ok(()) => {}
                Err(why) if self.0.power_goes.load(Ordering::Relaxed) => {
                    recorder.note(format_args!("member: {why}"));
                }
                Err(why) => {
                    recorder.violation(format_args!("2: the member fails for no reason: {why}"));
                    return;
                }
            }
            alive.store(false, Ordering::Relaxed);
            self.0.power_goes.store(false, Ordering::Relaxed);
            disks.restart();
            recorder.event("restarts");
            let down = self.draw(|random| random.u64(100..6000));
            sleep(Duration::from_millis(down)).await;
        }
    }

    async fn live(&self, number: u64, alive: &Arc<AtomicBool>) -> Result<(), String> {
        let parts = &self.0.parts;
        let machine = Machine::new(parts.planted);
        let watched = Watched {
            machine: machine.clone(),
            recorder: parts.recorder.clone(),
            validator: parts.validator.clone(),
            alive: Arc::clone(alive),
        };
        let mut config = Config::new("simulation", 1, parts.disks.storage());
        config.writer = Writer::Inline;
        config.timing = Timing::Exact(TIMING);
        config.seed = Some(self.draw(|random| random.u64(..)));
        config.snapshots = SnapshotPolicy {
            every_entries: Some(200),
            keep_entries: 20,
            ..SnapshotPolicy::default()
        };
        let replica = Replica::open(config, Box::new(watched), Arc::new(replica::Unconnected))
            .await
            .map_err(|error| error.to_string())?;
        let end = Box::pin(self.lead(number, &replica, machine)).await;
        // The dead member's tasks end now; what they held on the disks is out of reach already.
        if let Some(life) = self.life().take() {
            for task in &life.tasks {
                task.abort();
            }
        }
        alive.store(false, Ordering::Relaxed);
        parts.disks.restart();
        tokio::spawn(async move {
            let _ = timeout(Duration::from_secs(60), replica.shutdown()).await;
        });
        end
    }

    /// Until it is killed (well) or fails.
    async fn lead(&self, number: u64, replica: &Replica, machine: Machine) -> Result<(), String> {
        let parts = &self.0.parts;
        replica.linearizable().await.map_err(|error| error.to_string())?;
        parts.oracle.check(&machine, &parts.recorder);
        let log = WatchedLog {
            log: ReplicatedLog::new(replica.clone()),
            oracle: parts.oracle.clone(),
            recorder: parts.recorder.clone(),
        };
        let clock = Arc::clone(&parts.clock);
        let store = Store::new(machine, Arc::new(log), clock, self.draw(|random| random.u64(..)));
        let configure = Command::Configure {
            miner: parts.signer.hotkey().clone(),
            validators: parts.directory.iter().map(|v| v.hotkey.clone()).collect(),
            pay_profile: parts.pay_profile,
        };
        store
            .propose(configure)
            .await
            .map_err(|error| error.to_string())?;
        let (header_sets, headers) = watch::channel(Vec::new());
        let hub = Hub::default();
        let context = session::Context {
            store: store.clone(),
            signer: Arc::clone(&parts.signer),
            hub: hub.clone(),
            headers,
        };
        let leader = Leader {
            store: store.clone(),
            signer: Arc::clone(&parts.signer),
            directory: parts.directory.clone(),
            validators: Arc::clone(&parts.validators),
            dial: Arc::clone(&parts.dial),
            hub,
            listings: Listings::default(),
            observe_every: Duration::from_secs(15),
            scheduling: Scheduling::new("value_per_cost", Duration::from_secs(10))?,
            seed: self.draw(|random| random.u64(..)),
        };
        let leading = tokio::spawn(Box::pin(leader.run(CancellationToken::new())));
        let recorder = parts.recorder.clone();
        let life = Life {
            store,
            context,
            _header_sets: header_sets,
            tasks: vec![leading.abort_handle()],
        };
        *self.life() = Some(life);
        recorder.note(format_args!("member: life {number} leads"));
        let mut health = replica.health();
        tokio::select! {
            biased;
            () = self.0.killed.notified() => Ok(()),
            ended = leading => Err(format!("the leader ended by itself: {ended:?}")),
            sick = health.wait_for(|health| !health.is_well()) => Err(match sick.as_deref() {
                Ok(Health::Failed { reason }) => reason.clone(),
                other => format!("{other:?}"),
            }),
        }
    }
}

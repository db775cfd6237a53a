//! A member: opened on the same disks life after life, killed at once or by a loss of power in the middle of a
//! write. Each life runs what a real one runs: sessions of hosts, and `member::lead`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coordinator::clock::{AgreedClock, Clock};
use coordinator::executor::Validators;
use coordinator::host_link::{Hub, session};
use coordinator::leader::{Leader, Listings, Scheduling};
use coordinator::member::{self, ReplicatedLog};
use coordinator::member_link::{Answering, Asking, Response};
use coordinator::membership::HandOver;
use coordinator::signer::Sign;
use coordinator::store::{Machine, Store};
use coordinator::validator::{Directory, ValidatorApi};
use coordinator_core::state_machine::Command;
use coordinator_core::state_machine::command::PayProfile;
use futures_util::FutureExt;
use protocol::link::RegistryHeaders;
use replica::{Config, Health, Pace, Replica, SnapshotPolicy, Start, Timing, Writer};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::Planted;
use super::clock::{MachineClock, SimulatedClock};
use super::disk::Disks;
use super::ledger::Ledger;
use super::network::{Door, End, Network, address_of};
use super::recorder::Recorder;
use super::socket::ModelDial;
use super::validator::Validator;
use super::watched::{Oracle, Watched, WatchedLog};

/// Slower than in production, since every beat is a step: failover takes about two seconds.
const TIMING: Pace = Pace::of_heartbeat(250);

/// What all members are made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) recorder: Recorder,
    pub(super) clock: Arc<SimulatedClock>,
    pub(super) signer: Arc<dyn Sign>,
    pub(super) directory: Directory,
    pub(super) validator: Validator,
    pub(super) network: Network,
    pub(super) planted: Planted,
    pub(super) pay_profile: PayProfile,
    pub(super) oracle: Oracle,
    pub(super) ledger: Ledger,
}

/// The member; clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Member(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    number: u64,
    parts: Arc<Parts>,
    disks: Disks,
    machine_clock: MachineClock,
    random: Mutex<fastrand::Rng>,
    life: Mutex<Option<Life>>,
    killed: Arc<Notify>,
    /// Its disks are about to fail.
    is_doomed: AtomicBool,
}

/// A member that is up.
#[derive(Debug)]
struct Life {
    machine: Machine,
    replica: Replica,
    context: session::Context,
    /// Sessions end with them. They stay empty: hosts are models, which pull nothing and know the members.
    _header_sets: watch::Sender<Vec<RegistryHeaders>>,
    _doors: watch::Sender<Vec<String>>,
    tasks: Vec<AbortHandle>,
}

impl Member {
    pub(super) fn new(number: u64, parts: Arc<Parts>, mut random: fastrand::Rng) -> Self {
        let machine_clock = MachineClock::new(*parts.clock);
        Self(Arc::new(Shared {
            number,
            parts,
            machine_clock,
            disks: Disks::new(random.u64(..)),
            random: Mutex::new(random),
            life: Mutex::new(None),
            killed: Arc::default(),
            is_doomed: AtomicBool::new(false),
        }))
    }

    fn life(&self) -> MutexGuard<'_, Option<Life>> {
        self.0.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw<T>(&self, draw: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        draw(&mut self.0.random.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn number(&self) -> u64 {
        self.0.number
    }

    /// The store, while the member is up.
    pub(super) fn store(&self) -> Option<Store> {
        self.life().as_ref().map(|life| life.context.store.clone())
    }

    /// Whether it has heard of one in this life.
    pub(super) fn knows_a_leader(&self) -> bool {
        self.inside()
            .is_some_and(|(_, replica)| replica.leadership().borrow().leader.is_some())
    }

    /// Machine and replica, while the member is up.
    pub(super) fn inside(&self) -> Option<(Machine, Replica)> {
        let life = self.life();
        life.as_ref()
            .map(|life| (life.machine.clone(), life.replica.clone()))
    }

    /// Whether it leads, as it sees it.
    pub(super) fn leads(&self) -> bool {
        self.inside().is_some_and(|(_, replica)| replica.leads_now())
    }

    /// Starts a host's session, which dies with the member; none while it is down or knows of no leader.
    pub(super) fn serve<F>(&self, session: impl FnOnce(session::Context) -> F) -> bool
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut life = self.life();
        let Some(life) = life.as_mut() else { return false };
        if life.replica.leadership().borrow().leader.is_none() {
            return false;
        }
        life.tasks.retain(|task| !task.is_finished());
        let task = tokio::spawn(session(life.context.clone()));
        life.tasks.push(task.abort_handle());
        true
    }

    pub(super) fn machine_clock(&self) -> &MachineClock {
        &self.0.machine_clock
    }

    /// `kill -9`, with the power.
    pub(super) fn kill(&self) {
        self.0.killed.notify_one();
    }

    /// The same, as soon as it has voted.
    pub(super) fn kill_after_a_vote(&self) {
        let killed = Arc::clone(&self.0.killed);
        self.0.parts.network.kill_after_a_vote(self.0.number, killed);
    }

    /// The power goes after so many more writes and syncs.
    pub(super) fn fail_power_after(&self, steps: u64) {
        self.0.is_doomed.store(true, Ordering::Relaxed);
        self.0.disks.power.fail_after(steps);
    }

    /// The disks stop taking syncs; the power stays.
    pub(super) fn fail_syncs(&self) {
        self.0.is_doomed.store(true, Ordering::Relaxed);
        self.0.disks.power.fail_syncs();
    }

    /// Lives, dies and lives again.
    pub(super) async fn run(self) {
        let (me, recorder) = (self.0.number, &self.0.parts.recorder);
        for number in 0_u64.. {
            recorder.note(format_args!("member {me}: life {number} begins"));
            let alive = Arc::new(AtomicBool::new(true));
            match self.live(&alive).await {
                Ok(()) => {}
                Err(why) if self.0.is_doomed.load(Ordering::Relaxed) => {
                    recorder.note(format_args!("member {me}: {why}"));
                }
                Err(why) => {
                    recorder.violation(format_args!("2: member {me} fails for no reason: {why}"));
                    return;
                }
            }
            alive.store(false, Ordering::Relaxed);
            self.0.is_doomed.store(false, Ordering::Relaxed);
            self.0.disks.restart();
            recorder.event("restarts");
            let down = self.draw(|random| random.u64(50..6000));
            sleep(Duration::from_millis(down)).await;
        }
    }

    fn config(&self) -> Config {
        let me = self.0.number;
        let mut config = Config::new("simulation", me, self.0.disks.storage());
        config.address = address_of(me);
        config.start = if me == 1 { Start::Found } else { Start::Join };
        config.writer = Writer::Inline;
        config.timing = Timing::Exact(TIMING);
        config.seed = Some(self.draw(|random| random.u64(..)));
        config.faults = self.0.parts.planted.replica;
        config.snapshots = SnapshotPolicy {
            every_entries: Some(200),
            keep_entries: 20,
            ..SnapshotPolicy::default()
        };
        config
    }

    async fn live(&self, alive: &Arc<AtomicBool>) -> Result<(), String> {
        let (me, parts) = (self.0.number, &self.0.parts);
        let machine = Machine::new(parts.planted.state_machine);
        let watched = Watched::new(me, machine.clone(), parts, Arc::clone(alive));
        let end = End {
            member: me,
            network: parts.network.clone(),
            alive: Arc::clone(alive),
        };
        let replica = Replica::open(self.config(), Box::new(watched), Arc::new(end.clone()))
            .await
            .map_err(|error| error.to_string())?;
        let ended = self.work(&replica, machine, end).await;
        parts.network.leave(me);
        // The dead member's tasks end now; what they held on the disks is out of reach already.
        if let Some(life) = self.life().take() {
            for task in &life.tasks {
                task.abort();
            }
        }
        alive.store(false, Ordering::Relaxed);
        self.0.disks.restart();
        tokio::spawn(async move {
            let _ = timeout(Duration::from_secs(60), replica.shutdown()).await;
        });
        ended
    }

    /// Until it is killed (well) or fails.
    async fn work(&self, replica: &Replica, machine: Machine, end: End) -> Result<(), String> {
        let parts = &self.0.parts;
        let log = WatchedLog {
            log: ReplicatedLog::new(replica.clone()),
            oracle: parts.oracle.clone(),
            recorder: parts.recorder.clone(),
        };
        let machine_clock = Arc::new(self.0.machine_clock.clone());
        let agreed = AgreedClock::new(self.0.number, machine_clock.clone());
        let clock: Arc<dyn Clock> = if parts.planted.clocks_not_compared {
            machine_clock
        } else {
            Arc::new(agreed.clone())
        };
        let seed = self.draw(|random| random.u64(..));
        let store = Store::new(machine.clone(), Arc::new(log), clock, seed);
        let (header_sets, headers) = watch::channel(Vec::new());
        let (doors_known, doors) = watch::channel(Vec::new());
        let (touches, in_touch) = watch::channel(true);
        let hub = Hub::default();
        let context = session::Context {
            store,
            signer: Arc::clone(&parts.signer),
            hub: hub.clone(),
            headers,
            doors,
            in_touch,
            way: None,
        };
        let door = self.door(replica, hub.clone(), agreed.clone());
        parts.network.join(self.0.number, door);
        let asking = Asking {
            peers: Arc::new(end),
            replica: replica.clone(),
        };
        let comparing =
            asking
                .clone()
                .compare_clocks(agreed, context.store.clone(), CancellationToken::new());
        let comparing = tokio::spawn(comparing);
        let telling = tokio::spawn(asking.tell(hub, touches, CancellationToken::new()));
        let configure = Command::Configure {
            miner: parts.signer.hotkey().clone(),
            validators: parts.directory.iter().map(|v| v.hotkey.clone()).collect(),
            pay_profile: parts.pay_profile,
        };
        let leader = self.leader(&context)?;
        let lead = member::lead(
            leader,
            Vec::new(),
            configure,
            replica.clone(),
            HandOver::channel().1,
            CancellationToken::new(),
        );
        let leading = tokio::spawn(Box::pin(lead));
        let observed = tokio::spawn(observe(self.clone(), replica.clone(), machine.clone()));
        *self.life() = Some(Life {
            machine,
            replica: replica.clone(),
            context,
            _header_sets: header_sets,
            _doors: doors_known,
            tasks: [
                leading.abort_handle(),
                observed.abort_handle(),
                telling.abort_handle(),
                comparing.abort_handle(),
            ]
            .into(),
        });
        let mut health = replica.health();
        tokio::select! {
            biased;
            () = self.0.killed.notified() => Ok(()),
            ended = leading => Err(format!("leading ended by itself: {ended:?}")),
            sick = health.wait_for(|health| !health.is_well()) => Err(match sick.as_deref() {
                Ok(Health::Failed { reason }) => reason.clone(),
                other => format!("{other:?}"),
            }),
        }
    }

    fn door(&self, replica: &Replica, hub: Hub, clock: AgreedClock) -> Door {
        let no_api = |_| {
            let (status, body) = (503, Vec::new());
            std::future::ready(Response { status, body }).boxed()
        };
        Door {
            replica: replica.clone(),
            answering: Answering {
                hotkey: self.0.parts.signer.hotkey().clone(),
                hub,
                replica: replica.clone(),
                clock,
                requests: Arc::new(no_api),
            },
        }
    }

    fn leader(&self, context: &session::Context) -> Result<Leader, String> {
        let (me, parts) = (self.0.number, &self.0.parts);
        let validator = parts.validator.seen_by(me, parts.network.clone());
        let api: Arc<dyn ValidatorApi> = Arc::new(validator.clone());
        let validators: Validators = [(validator.hotkey.clone(), api)].into_iter().collect();
        let clock = Arc::clone(&parts.clock);
        Ok(Leader {
            store: context.store.clone(),
            signer: Arc::clone(&parts.signer),
            directory: parts.directory.clone(),
            validators: Arc::new(validators),
            dial: Arc::new(ModelDial { validator, clock }),
            hub: context.hub.clone(),
            listings: Listings::default(),
            observe_every: Duration::from_secs(15),
            scheduling: Scheduling::new("value_per_cost", Duration::from_secs(10))?,
            workers: None,
            seed: self.draw(|random| random.u64(..)),
        })
    }
}

/// Checks what holds whenever this member begins to lead.
async fn observe(member: Member, replica: Replica, machine: Machine) {
    let (me, parts) = (member.number(), &member.0.parts);
    let mut leadership = replica.leadership();
    loop {
        let Ok(term) = leadership.wait_for(|now| now.leads).await.map(|now| now.term) else {
            return;
        };
        parts
            .recorder
            .note(format_args!("member {me}: leads in term {term}"));
        parts.recorder.event("leader changes");
        parts.network.leads_in(me, term);
        parts.network.check_leaders();
        parts.oracle.check(&machine, &parts.recorder);
        let ended = leadership.wait_for(|now| !now.leads || now.term != term).await;
        if ended.is_err() {
            return;
        }
        parts
            .recorder
            .note(format_args!("member {me}: leads no more in term {term}"));
    }
}

/// All members of a world.
#[derive(Debug, Clone)]
pub(super) struct Members(pub(super) Arc<[Member]>);

impl Members {
    /// Only the one that founds the cluster.
    pub(super) fn founder(&self) -> Self {
        Self(self.0.iter().take(1).cloned().collect())
    }

    pub(super) fn all(&self) -> &[Member] {
        &self.0
    }

    /// The one that leads.
    pub(super) fn leader(&self) -> Option<&Member> {
        self.0.iter().find(|member| member.leads())
    }

    /// Any one of them, up or down.
    pub(super) fn any(&self, random: &mut fastrand::Rng) -> &Member {
        &self.0[random.usize(..self.0.len())]
    }
}

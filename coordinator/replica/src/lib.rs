//! Raft: a replicated, durable log and state behind one non-generic front.
//!
//! The Raft library (openraft) and the database (redb) are known only here. To the rest of the product a
//! command is bytes, the state machine is a trait object, and [`Replica`] is the only way in.
//!
//! ```text
//! propose -> proposer (many commands, one entry) -> log_store (one fsync for a group) -> commit
//!         -> machine (apply in memory, reply) -> state_store (rows, no fsync) -> snapshot -> purge of the log
//! ```
//!
//! Nothing is acknowledged before it is on the disk of a majority. Rows are written lazily: the log makes up
//! for what a crash takes from them. Reading order: `format`, `storage`, `log_store`, `state_store`,
//! `snapshot`, `machine`, `runtime`, `proposer`, `leadership`, `starting`, `hearing`, `wire`, `transport`, `urgency`,
//! `answer`, `forward`, `membership`, `quic`.

use openraft::async_runtime::WatchReceiver;
use openraft::error::{Fatal, LinearizableReadError, RaftError};
use openraft::{BasicNode, ReadPolicy};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

#[cfg(test)]
mod conformance;

mod answer;
pub mod backup;
mod compaction;
mod config;
mod error;
mod faults;
mod format;
mod forward;
mod health;
mod hearing;
mod leadership;
mod log_store;
mod machine;
mod membership;
mod open;
mod proposer;
pub mod quic;
mod raft;
pub mod reading;
pub mod recovery;
mod rounds;
mod runtime;
mod snapshot;
mod starting;
mod state_store;
mod storage;
mod timing;
mod transport;
mod urgency;
mod wire;

pub use config::{Config, Pace, SnapshotPolicy, Start, Timing};
pub use error::{Error, ProposeError, WAY_BACK};
pub use faults::Faults;
pub use health::{Health, Metrics};
pub use leadership::Leadership;
pub use machine::StateMachine;
pub use membership::{Membership, Progress};
pub use proposer::Proposals;
pub use redb::{BackendError, StorageBackend};
pub use snapshot::MemorySnapshots;
pub use state_store::RowChange;
pub use storage::{Storage, Writer, make_database};
pub use transport::{Transport, Unconnected, Unreachable};
pub use wire::MESSAGE_BYTES_MAX;

use health::Shared;
use leadership::{Lease, follow, leadership_of};
use log_store::LogStore;
use machine::{Machine, SnapshotLock};
use proposer::{Backoff, Proposer, Queue};
use raft::{Raft, Seed};
use rounds::Rounds;
use snapshot::receiving::Receiver;
use state_store::StateLane;
use timing::Ways;
use transport::Network;

/// Directive for a log filter: the Raft library reports every step at `info`, and every heartbeat to a member
/// that is away at `warn`; this crate says once that it is.
pub const QUIET_LOG_DIRECTIVE: &str = "openraft=error";

/// After so long without news a snapshot is asked for again.
const SNAPSHOT_AGAIN: Duration = Duration::from_secs(1);

/// One member's replica. Clones are handles to the same one.
#[derive(Clone)]
pub struct Replica(Arc<Inner>);

struct Inner {
    member: u64,
    raft: watch::Sender<Raft>,
    /// None once the replica is shut down.
    running: tokio::sync::Mutex<Option<Running>>,
    ways: Ways,
    /// Where [`Lease::length`] comes from.
    lease_length: watch::Sender<Duration>,
    seed: Seed,
    faults: Faults,
    /// Marks requests of this cluster.
    cluster: u32,
    network: Network,
    rounds: Rounds,
    receiver: Receiver,
    lease: Lease,
    /// Where [`Lease::given_up`] comes from.
    given_up: watch::Sender<u64>,
    hand_over: std::sync::OnceLock<membership::HandOver>,
    /// Limits the batches of other members.
    forwarded: Semaphore,
    queue: Queue,
    shared: Shared,
    log: LogStore,
    state: StateLane,
    snapshot_lock: SnapshotLock,
    leadership: watch::Receiver<Leadership>,
    stop: Mutex<Option<oneshot::Sender<()>>>,
    /// Closes when the proposer has ended.
    proposer_ended: watch::Receiver<()>,
    timeout: Duration,
}

/// What it takes to start the Raft library anew.
struct Running {
    config: openraft::Config,
    machine: Machine,
}

impl Inner {
    fn raft(&self) -> Raft {
        self.raft.borrow().clone()
    }
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replica")
            .field("leadership", &*self.0.leadership.borrow())
            .finish_non_exhaustive()
    }
}

impl Replica {
    /// Opens a replica: on an empty store it founds a cluster of one voter or waits to be added, see
    /// [`Start`]; otherwise it goes on from what is stored.
    /// The machine has loaded the stored rows when this returns; the newest acknowledged commands may still
    /// be on their way to it from the log, so call [`Replica::linearizable`] before reading.
    ///
    /// # Errors
    /// Every variant of [`Error`] that names a file, when the store is refused; `Configuration`; `Load`.
    pub async fn open(
        config: Config,
        machine: Box<dyn StateMachine>,
        transport: Arc<dyn Transport>,
    ) -> Result<Self, Error> {
        // On the heap: what it awaits is large.
        Box::pin(Self::open_all(config, machine, transport)).await
    }

    async fn open_all(
        config: Config,
        machine: Box<dyn StateMachine>,
        transport: Arc<dyn Transport>,
    ) -> Result<Self, Error> {
        config.check()?;
        let mut raft_config = config.raft()?;
        let limits = config.proposals.clone();
        let (node_id, address, start) = (config.node_id, config.address.clone(), config.start);
        let (cluster, writer, timing) = (config.cluster.clone(), config.writer, config.timing);
        let every_bytes = config.snapshots.every_bytes;
        let faults = config.faults;
        let seed = Seed::new(config.seed.unwrap_or_else(|| fastrand::u64(..)));
        let shared = Shared::new();
        let open::Opened {
            log,
            state,
            machine,
            place,
            members,
            snapshot_lock,
        } = open::open(config, machine, &shared).await?;

        let network = Network::new(transport, &cluster, node_id, writer);
        let ways = Ways::default();
        if timing == Timing::Auto {
            // Whoever starts with the pace of the others disturbs nobody.
            ways.measure_all(&network, &members, node_id).await;
            timing::set(
                &mut raft_config,
                timing::wanted(timing.pace(), ways.worst(&members)),
            );
        }
        let (length_out, length) = watch::channel(timing::lease(&raft_config));
        let (given_up, followed) = watch::channel(0);
        let lease = Lease {
            length,
            given_up: followed,
        };
        let own_lease = timing::lease(&raft_config);
        let silence = timing::silence(own_lease, ways.longest_lease(&members).max(log.lease()));
        let promised = starting::followed(log.vote(), node_id);
        let kept = machine.keep();
        let started = match starting::write_down(&log, own_lease).await {
            Ok(()) => {
                let config = Arc::new(raft_config.clone());
                let started = Raft::new(node_id, config, network.clone(), log.clone(), machine);
                seed.scope(started).await.map_err(|fatal| fatal.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        let raft = match started {
            Ok(raft) => raft,
            Err(reason) => {
                log.stop().await;
                state.stop().await;
                return Err(Error::Failed(shared.failure().unwrap_or(reason)));
            }
        };
        let (leadership_out, leadership) =
            watch::channel(leadership_of(&raft.metrics().borrow_watched(), &lease, None));
        let (current, raft) = watch::channel(raft);
        let (queue, proposals) = Queue::new(limits.clone());
        let (stop, stopped) = oneshot::channel();
        let (proposer_end, proposer_ended) = watch::channel(());
        let proposer = Proposer::new(
            raft.clone(),
            network.clone(),
            proposals,
            limits.clone(),
            shared.clone(),
            stopped,
        );
        let follow = follow(
            raft.clone(),
            leadership_out,
            shared.clone(),
            lease.clone(),
            network.clone(),
        );
        seed.scope(async {
            if let Some(leader) = promised {
                let started = raft.borrow().clone();
                starting::keep_promise(&started, raft.clone(), leader, silence).await;
            }
            starting::shorten(log.clone(), raft.clone(), own_lease, silence);
            raft::spawn(async move {
                proposer.run().await;
                drop(proposer_end);
            });
            raft::spawn(follow);
            raft::spawn(hearing::mind(raft.clone(), lease.clone(), network.clone()));
            raft::spawn(membership::finish_changes(raft.clone(), leadership.clone()));
        })
        .await;

        let replica = Self(Arc::new(Inner {
            member: node_id,
            raft: current,
            running: tokio::sync::Mutex::new(Some(Running {
                config: raft_config,
                machine: kept,
            })),
            ways,
            lease_length: length_out,
            seed,
            faults,
            cluster: wire::cluster_mark(&cluster),
            network,
            rounds: Rounds::default(),
            receiver: Receiver::new(cluster, place, writer),
            lease,
            given_up,
            hand_over: std::sync::OnceLock::new(),
            forwarded: Semaphore::new(answer::FORWARDED_MAX),
            queue,
            shared,
            log,
            state,
            snapshot_lock,
            leadership,
            stop: Mutex::new(Some(stop)),
            proposer_ended,
            timeout: Duration::from_millis(limits.timeout_ms),
        }));
        if let Err(error) = replica.begin(start, address).await {
            replica.shutdown().await;
            return Err(error);
        }
        let watched = Box::pin(timing::watch_ways(Arc::downgrade(&replica.0), timing));
        let shortened = compaction::keep_log_short(Arc::downgrade(&replica.0), every_bytes);
        let shortened = Box::pin(shortened);
        let both = async {
            raft::spawn(watched);
            raft::spawn(shortened);
        };
        replica.0.seed.scope(both).await;
        Ok(replica)
    }

    async fn begin(&self, start: Start, address: String) -> Result<(), Error> {
        let raft = self.0.raft();
        let member = self.member();
        let initialized = self.0.seed.scope(raft.is_initialized()).await;
        if !initialized.map_err(|fatal| self.failed(&fatal))? {
            if start == Start::Join {
                return Ok(());
            }
            let members = BTreeMap::from([(member, BasicNode { addr: address })]);
            let founded = self.0.seed.scope(raft.initialize(members)).await;
            return founded.map_err(|error| self.failed(&error));
        }
        if raft.voter_ids().eq([member]) {
            // Nobody else can win: no need to wait for an election timeout.
            let elected = self.0.seed.scope(raft.trigger().elect(false)).await;
            elected.map_err(|fatal| self.failed(&fatal))?;
        }
        Ok(())
    }

    /// Proposes a command and returns the state machine's reply once it is durable on a majority, committed and
    /// applied on the leader. Any member takes it: one that does not lead forwards it.
    /// Repeating a command after [`ProposeError::OutcomeUnknown`] needs a request id within the command.
    ///
    /// # Errors
    /// See [`ProposeError`]; all but `OutcomeUnknown` mean that the command is not and will not be applied.
    pub async fn propose(&self, command: Vec<u8>) -> Result<Vec<u8>, ProposeError> {
        self.0.queue.propose(command).await
    }

    /// A barrier for reads: when it returns, the machine of this member has applied every command that was
    /// acknowledged anywhere before the call, so what it published is current.
    ///
    /// # Errors
    /// `NotLeader`, `Timeout`, `Stopped` or `Failed`.
    pub async fn linearizable(&self) -> Result<(), Error> {
        self.next_round().await
    }

    /// One round of [`Replica::linearizable`].
    async fn barrier(&self) -> Result<(), Error> {
        if self.0.faults.stale_read {
            return Ok(());
        }
        let deadline = Instant::now() + self.0.timeout;
        let mut backoff = Backoff::new();
        loop {
            let raft = self.0.raft();
            let barrier = self.0.seed.scope(raft.ensure_linearizable(ReadPolicy::ReadIndex));
            let leader = match timeout_at(deadline, barrier).await {
                Err(_) => return Err(Error::Timeout),
                Ok(Ok(_)) => return Ok(()),
                // The library is being started anew, with other timing.
                Ok(Err(RaftError::Fatal(Fatal::Stopped))) if !self.has_ended() => None,
                Ok(Err(RaftError::Fatal(fatal))) => return Err(self.failed(&fatal)),
                Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)))) => {
                    forward.leader_id
                }
                Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))) => None,
            };
            let other = leader.filter(|leader| *leader != self.member());
            let peer = other.and_then(|leader| forward::leader(&raft, &self.0.network, leader));
            if let Some(peer) = peer
                && let Ok(Some(index)) = forward::read_index(&raft, &peer, deadline).await
            {
                return self.applied(index, deadline).await;
            }
            if !backoff.wait(deadline).await {
                return Err(Error::NotLeader { leader: other });
            }
        }
    }

    /// Waits until the machine has applied the entry at `index`.
    async fn applied(&self, index: u64, deadline: Instant) -> Result<(), Error> {
        let mut metrics = self.0.raft().metrics();
        loop {
            {
                let now = metrics.borrow_watched();
                if now.last_applied.is_some_and(|id| id.index >= index) {
                    return Ok(());
                }
                if let Err(fatal) = &now.running_state {
                    return Err(self.failed(fatal));
                }
            }
            match timeout_at(deadline, metrics.changed()).await {
                Err(_) => return Err(Error::Timeout),
                Ok(Err(_)) => return Err(Error::Stopped),
                Ok(Ok(())) => {}
            }
        }
    }

    /// Whether this member leads at this very moment. What acts on the outside asks again right before it
    /// does: after a pause of the process, [`Replica::leadership`] tells it a moment late.
    #[must_use]
    pub fn leads_now(&self) -> bool {
        leadership::leads(&self.0.raft().metrics().borrow_watched(), &self.0.lease)
    }

    /// Follows who leads, and how far the state has come.
    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.0.leadership.clone()
    }

    /// Follows whether the replica works. A failed one stays failed until restarted.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<Health> {
        self.0.shared.watch()
    }

    /// Counters and positions now.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let metrics = self.0.raft().metrics();
        let raft = metrics.borrow_watched();
        Metrics {
            term: raft.current_term,
            last_index: raft.last_log_index,
            committed_index: raft.local_committed.map(|id| id.index),
            applied_index: raft.last_applied.map(|id| id.index),
            snapshot_index: raft.snapshot.map(|id| id.index),
            purged_index: raft.purged.map(|id| id.index),
            ..Metrics::of(&self.0.shared.counters)
        }
    }

    /// Writes a snapshot of everything applied so far and returns once it is on the disk. The log may be
    /// purged up to it afterwards.
    ///
    /// # Errors
    /// `Timeout` after a minute; `Stopped` or `Failed`.
    pub async fn snapshot(&self) -> Result<(), Error> {
        let target = match self.0.running.lock().await.as_ref() {
            Some(running) => running.machine.last_applied().await,
            None => return Err(Error::Stopped),
        };
        let raft = self.0.raft();
        let mut metrics = raft.metrics();
        let written = async {
            let mut seen = metrics.borrow_watched().snapshot;
            loop {
                // The library ignores this while another one is being written, which may have begun too early.
                let triggered = self.0.seed.scope(raft.trigger().snapshot()).await;
                triggered.map_err(|fatal| self.failed(&fatal))?;
                let again = Instant::now() + SNAPSHOT_AGAIN;
                loop {
                    {
                        let now = metrics.borrow_watched();
                        if now.snapshot >= target {
                            return Ok(());
                        }
                        if let Err(fatal) = &now.running_state {
                            return Err(self.failed(fatal));
                        }
                        if now.snapshot != seen {
                            seen = now.snapshot;
                            break;
                        }
                    }
                    match timeout_at(again, metrics.changed()).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return Err(Error::Stopped),
                        Err(_) => break,
                    }
                }
            }
        };
        timeout(Duration::from_secs(60), written)
            .await
            .unwrap_or(Err(Error::Timeout))
    }

    /// Ends this replica in order: another voter takes over the lead, entries on their way are finished, waiting commands are answered with
    /// "stopped", the files are written out and closed. When it returns they can be opened again. Other
    /// handles get `Stopped` from then on.
    pub async fn shutdown(self) {
        self.hand_over().await;
        let inner = &self.0;
        let stop = inner.stop.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(stop) = stop {
            // An error means that the proposer has ended already.
            let _ = stop.send(());
        }
        let mut ended = inner.proposer_ended.clone();
        while ended.changed().await.is_ok() {}
        // From here on nothing starts the library anew.
        let ended = inner.running.lock().await.take();
        let raft = inner.raft();
        if let Err(error) = inner.seed.scope(raft.shutdown()).await {
            tracing::warn!(%error, "the raft task did not end in order");
        }
        let _no_snapshot_is_being_written = inner.snapshot_lock.lock().await;
        if let Some(Running { machine, .. }) = ended
            && let Err(error) = machine.write_rows().await
        {
            tracing::debug!(%error, "the log has what is not written");
        }
        inner.log.stop().await;
        inner.state.stop().await;
    }

    fn has_ended(&self) -> bool {
        self.0.shared.failure().is_some() || self.0.queue.is_closed()
    }

    fn failed(&self, error: &dyn std::fmt::Display) -> Error {
        match self.0.shared.failure() {
            Some(reason) => Error::Failed(reason),
            None if self.0.queue.is_closed() => Error::Stopped,
            None => Error::Failed(error.to_string()),
        }
    }
}

//! The state as the rest of the coordinator sees it: propose a command, read what is applied, wait for
//! changes. Behind it stands the replicated log (seam [`Log`]).

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};
use std::time::Duration;

use coordinator_core::state_machine::codec::{
    Row, Unreadable, decode_answer, decode_proposal, encode_answer, encode_proposal,
};
use coordinator_core::state_machine::command::RequestId;
use coordinator_core::state_machine::{Command, Faults, Proposal, Rejection, Reply, State, apply};
use protocol::hotkey::Hotkey;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::clock::Clock;

/// How long a proposal waits until the time is known.
const CLOCK_MAX: Duration = Duration::from_secs(5);

/// A future that a trait object returns.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Why a command got no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A rule said no; nothing changed.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The log takes nothing now; nothing changed, and nothing will.
    #[error("the log is not available: {0}")]
    Unavailable(String),
    /// It is not known whether the command was applied; repeat it under the same request id.
    #[error("the log did not answer: {0}")]
    OutcomeUnknown(String),
}

/// The seam of the replicated log: bytes in order, applied to a [`Machine`] on every member.
pub trait Log: fmt::Debug + Send + Sync {
    /// Appends, replicates and applies a command; its answer.
    fn propose(&self, command: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, Error>>;
    /// Returns once a read of the state sees every write that was acknowledged before the call.
    fn linearizable(&self) -> BoxFuture<'_, Result<(), Error>>;
    /// Whether this member leads at this very moment.
    fn leads_now(&self) -> bool;
}

/// The state machine as the log drives it. Its clones share one state.
#[derive(Clone)]
pub struct Machine {
    shared: Arc<Shared>,
}

struct Shared {
    state: RwLock<State>,
    faults: Faults,
    /// Index of the last applied entry.
    applied: AtomicU64,
    /// Grows with everything that was applied or loaded.
    generation: AtomicU64,
    changed: Notify,
}

impl Shared {
    fn wake(&self) {
        self.generation.fetch_add(1, Ordering::Release);
        self.changed.notify_waiters();
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Machine(applied {})",
            self.shared.applied.load(Ordering::Acquire)
        )
    }
}

impl Machine {
    /// An empty state.
    #[must_use]
    pub fn new(faults: Faults) -> Self {
        let state = RwLock::new(State::new(faults));
        Self {
            shared: Arc::new(Shared {
                state,
                faults,
                applied: AtomicU64::new(0),
                generation: AtomicU64::new(0),
                changed: Notify::new(),
            }),
        }
    }

    /// Applies a command from the log; the answer's bytes.
    ///
    /// # Panics
    /// When the command cannot be read, or makes all that follows unreadable for this program: a member that
    /// skipped it would diverge from the others.
    #[must_use]
    pub fn apply(&self, command: &[u8]) -> Vec<u8> {
        let proposal = decode_proposal(command).expect("a member must stop rather than skip a command");
        let mut state = self.state_mut();
        let answer = apply(&mut state, proposal);
        if let Some(finalized) = state.too_new() {
            let reason = Unreadable::TooNew(finalized.clone());
            tracing::error!(%reason, "this member stops");
            panic!("{reason}");
        }
        encode_answer(&answer)
    }

    /// The rows that changed since the last call.
    #[must_use]
    pub fn changed_rows(&self) -> Vec<Row> {
        self.state_mut().drain_rows()
    }

    /// Replaces the state by what these rows say.
    ///
    /// # Errors
    /// [`Unreadable`] when a row is damaged or newer; the state is as before.
    pub fn load(&self, rows: &mut dyn Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Result<(), Unreadable> {
        let loaded = State::from_rows(rows, self.shared.faults)?;
        *self.state_mut() = loaded;
        self.shared.wake();
        Ok(())
    }

    /// Wakes those who wait for changes.
    pub fn applied(&self, index: u64) {
        self.shared.applied.store(index, Ordering::Release);
        self.shared.wake();
    }

    /// Takes the other's state if that has applied more; for one that no log drives any more.
    pub fn catch_up_with(&self, other: &Self) {
        let reached = other.shared.applied.load(Ordering::Acquire);
        if reached > self.shared.applied.load(Ordering::Acquire) {
            std::mem::swap(&mut *self.state_mut(), &mut *other.state_mut());
            self.applied(reached);
        }
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.shared.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the state as it is applied here. Keep it short: it holds up applying.
    pub fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.shared.state.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A handle on log and state; clones are cheap.
#[derive(Debug, Clone)]
pub struct Store {
    machine: Machine,
    log: Arc<dyn Log>,
    clock: Arc<dyn Clock>,
    requests: Arc<std::sync::Mutex<fastrand::Rng>>,
}

impl Store {
    /// Joins a machine and the log that drives it. `seed` makes request ids: random in production, given
    /// in a simulation.
    #[must_use]
    pub fn new(machine: Machine, log: Arc<dyn Log>, clock: Arc<dyn Clock>, seed: u64) -> Self {
        let requests = Arc::new(std::sync::Mutex::new(fastrand::Rng::with_seed(seed)));
        Self {
            machine,
            log,
            clock,
            requests,
        }
    }

    /// A store whose log is a plain function call in this process: for tests, and for simulations that are
    /// not about the log. Nothing is durable.
    #[must_use]
    pub fn in_memory(clock: Arc<dyn Clock>) -> Self {
        let machine = Machine::new(Faults::none());
        let log = Arc::new(MemoryLog {
            machine: machine.clone(),
        });
        Self::new(machine, log, clock, 1)
    }

    /// The clock that proposals carry.
    #[must_use]
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// A name for a write, to repeat it under.
    #[must_use]
    pub fn new_request(&self) -> RequestId {
        let mut random = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        RequestId::new(self.clock.now(), random.u128(..))
    }

    /// Returns once the clock may be gone by.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it could not be compared with others'.
    pub async fn settled(&self) -> Result<(), Error> {
        if let Some(settling) = self.clock.settling()
            && timeout(CLOCK_MAX, settling).await.is_err()
        {
            let why = "this member could not compare its clock with those of most voters yet";
            return Err(Error::Unavailable(why.to_owned()));
        }
        Ok(())
    }

    /// Proposes a command once.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn propose(&self, command: Command) -> Result<Reply, Error> {
        self.propose_as(self.new_request(), None, command).await
    }

    /// Proposes a command under a name; repeating it is safe. `guard` is the hash of the signature that
    /// authorises it and is good for one command.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn propose_as(
        &self,
        request: RequestId,
        guard: Option<[u8; 32]>,
        command: Command,
    ) -> Result<Reply, Error> {
        let (needed, present) = (command.format(), self.read(State::format));
        if needed > present {
            return Err(Rejection::NotFinalized { needed, present }.into());
        }
        self.settled().await?;
        let proposal = Proposal {
            request,
            at: self.clock.now(),
            guard,
            command,
        };
        let answer = self.log.propose(encode_proposal(&proposal)).await?;
        let answer = decode_answer(&answer).map_err(|error| Error::OutcomeUnknown(error.to_string()))?;
        Ok(answer?)
    }

    /// Returns once [`Store::read`] sees every write that was acknowledged before the call.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when this member cannot know, for want of a quorum.
    pub async fn linearizable(&self) -> Result<(), Error> {
        self.log.linearizable().await
    }

    /// Whether this member leads at this very moment: asked right before what only one member may do.
    #[must_use]
    pub fn leads_now(&self) -> bool {
        self.log.leads_now()
    }

    /// Reads the state as it is applied on this member. Keep it short: it holds up applying.
    pub fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        self.machine.read(read)
    }

    /// The miner that the cluster belongs to, if it is another one than `own`: its hotkey was replaced.
    #[must_use]
    pub fn other_miner(&self, own: &Hotkey) -> Option<Hotkey> {
        self.read(|state| state.settings().miner.clone().filter(|miner| miner != own))
    }

    /// Changes whenever something was applied.
    #[must_use]
    pub fn changes(&self) -> Changes {
        let shared = Arc::clone(&self.machine.shared);
        let seen = shared.generation.load(Ordering::Acquire);
        Changes { shared, seen }
    }
}

/// Follows the state. Those who wait are woken in the order in which they began to, so that a simulation
/// repeats itself (a watch channel wakes its receivers in random order).
pub struct Changes {
    shared: Arc<Shared>,
    seen: u64,
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Changes(seen {})", self.seen)
    }
}

impl Changes {
    /// Waits until something was applied since the last time, or since this was made. Nothing is lost when
    /// it is dropped.
    pub async fn changed(&mut self) {
        loop {
            let changed = self.shared.changed.notified();
            let generation = self.shared.generation.load(Ordering::Acquire);
            if generation != self.seen {
                self.seen = generation;
                return;
            }
            changed.await;
        }
    }
}

/// A log that applies at once and keeps nothing.
#[derive(Debug)]
struct MemoryLog {
    machine: Machine,
}

impl Log for MemoryLog {
    fn propose(&self, command: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, Error>> {
        let answer = self.machine.apply(&command);
        // Nobody stores them.
        drop(self.machine.changed_rows());
        let index = self.machine.shared.applied.load(Ordering::Acquire) + 1;
        self.machine.applied(index);
        Box::pin(std::future::ready(Ok(answer)))
    }

    fn linearizable(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn leads_now(&self) -> bool {
        true
    }
}

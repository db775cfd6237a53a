//! The state machine and the log under watch: after every command the invariants are checked, and every
//! answer that the log has acknowledged is remembered, to be looked for in the state of every later leader and
//! in every linearizable read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coordinator::clock::Clock as _;
use coordinator::member::ReplicatedLog;
use coordinator::store::{BoxFuture, Error, Log, Machine};
use coordinator_core::state_machine::codec::{Unreadable, decode_answer, decode_proposal};
use coordinator_core::state_machine::command::{Answer, REQUEST_MEMORY_MS, RequestId};
use coordinator_core::state_machine::deployment::{Phase, StopReason};
use coordinator_core::state_machine::effect::EffectId;
use coordinator_core::state_machine::{Command, Proposal, Rejection, State, invariant};
use protocol::id::DeploymentId;
use protocol::time::UnixMillis;
use replica::{RowChange, StateMachine};

use super::ledger::Rows;
use super::member::Parts;
use super::recorder::Recorder;
use super::validator::Validator;

/// The time of a command may be ahead by what clocks may differ.
const AHEAD_MAX_MS: u64 = 6_000;
/// Log entries after which the rows are read back.
const REREAD_EVERY: u64 = 128;

/// A member's machine for one life.
#[derive(Debug)]
pub(super) struct Watched {
    member: u64,
    machine: Machine,
    parts: Arc<Parts>,
    rows: Rows,
    /// Changes that `rows` has and that were not asked for yet.
    unwritten: Vec<RowChange>,
    /// Effects that have ended in this life.
    ended: BTreeSet<EffectId>,
    /// False after the member's death: what its tasks still do reaches nobody.
    alive: Arc<AtomicBool>,
}

impl Watched {
    pub(super) fn new(member: u64, machine: Machine, parts: &Arc<Parts>, alive: Arc<AtomicBool>) -> Self {
        Self {
            member,
            machine,
            parts: Arc::clone(parts),
            rows: Rows::default(),
            unwritten: Vec::new(),
            ended: BTreeSet::new(),
            alive,
        }
    }

    /// Takes the rows that changed, before they are asked for.
    fn follow_rows(&mut self) {
        let changed = StateMachine::changed_rows(&mut self.machine);
        self.rows.change(&changed);
        self.unwritten.extend(changed);
    }

    /// The rows, read back, are the state in memory.
    fn reread(&self, index: u64) {
        let faults = self.parts.planted.state_machine;
        let same = match State::from_rows(&mut self.rows.iter(), faults) {
            Ok(read) => self.machine.read(|state| *state == read),
            Err(_) => false,
        };
        if !same {
            let what = format!(
                "11: at index {index} the rows of member {} are not its state",
                self.member
            );
            self.parts.recorder.violation(what);
        }
    }

    /// Applies a command and says what does not hold any more.
    fn apply_watched(&mut self, command: &[u8]) -> (Vec<u8>, Vec<String>) {
        let (oracle, validator) = (&self.parts.oracle, &self.parts.validator);
        let proposal = decode_proposal(command).expect("we have encoded it");
        let before = self.machine.read(Before::of);
        let mut found: Vec<String> = self
            .machine
            .read(|state| out_of_order(state, &proposal))
            .into_iter()
            .collect();
        let answer = StateMachine::apply(&mut self.machine, command);
        let said = decode_answer(&answer);
        let line = format!(
            "member {} applied {:?} -> {said:?}",
            self.member, proposal.command
        );
        self.parts.recorder.note(line);
        let is_new = oracle.is_new(&proposal);
        if is_new {
            self.parts.recorder.command();
        }
        if let (Command::FinishEffect { effect, .. }, Ok(Ok(_))) = (&proposal.command, &said) {
            self.ended.insert(*effect);
        }
        if let (Command::PlaceDeployment(placement), Ok(Err(why))) = (&proposal.command, &said)
            && is_new
            && why.to_string().contains("exists already")
        {
            found.push(format!("the name {} was given twice", placement.deployment));
        }
        found.extend(said.err().map(|error| error.to_string()));
        if oracle.was_refused(&proposal) {
            found.push("a write that was said to change nothing is applied".to_owned());
        }
        let ahead_ms = proposal.at.since(self.parts.clock.now());
        if ahead_ms > AHEAD_MAX_MS {
            found.push(format!("the time of a command is {} s ahead", ahead_ms / 1000));
        }
        self.machine.read(|state| {
            found.extend(invariant::violations(state));
            found.extend(before.violations(state, validator));
            found.extend(done_again(state, &self.ended));
        });
        (answer, found)
    }
}

impl StateMachine for Watched {
    fn apply(&mut self, command: &[u8]) -> Vec<u8> {
        if !self.alive.load(Ordering::Relaxed) {
            return StateMachine::apply(&mut self.machine, command);
        }
        let (answer, found) = self.apply_watched(command);
        for violation in found {
            self.parts.recorder.violation(violation);
        }
        answer
    }

    fn changed_rows(&mut self) -> Vec<RowChange> {
        self.follow_rows();
        std::mem::take(&mut self.unwritten)
    }

    fn load(&mut self, rows: &mut dyn Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Result<(), String> {
        self.rows = Rows::default();
        self.unwritten.clear();
        let mut rows = rows.inspect(|(table, key, value)| {
            self.rows.put((*table, key.clone()), value.clone());
        });
        StateMachine::load(&mut self.machine, &mut rows)
    }

    fn applied(&mut self, index: u64) {
        StateMachine::applied(&mut self.machine, index);
        if !self.alive.load(Ordering::Relaxed) {
            return;
        }
        self.follow_rows();
        if let Some(difference) = self.parts.ledger.reached(self.member, index, &self.rows) {
            self.parts.recorder.violation(difference);
        }
        if index.is_multiple_of(REREAD_EVERY) {
            self.reread(index);
        }
        self.parts.network.check_leaders();
    }
}

/// An effect that ends before an older one of its subject.
fn out_of_order(state: &State, proposal: &Proposal) -> Option<String> {
    let Command::FinishEffect { effect, .. } = &proposal.command else {
        return None;
    };
    let effect = state.outbox().get(*effect)?;
    let repeated = state.answer_to(proposal.request).is_some();
    (!repeated && !state.outbox().is_ready(effect)).then(|| {
        format!(
            "effect {} of {:?} was done before an older one",
            effect.id, effect.subject
        )
    })
}

/// An effect that has ended and waits to be done once more.
fn done_again(state: &State, ended: &BTreeSet<EffectId>) -> Option<String> {
    let again = state.outbox().iter().find(|effect| ended.contains(&effect.id));
    again.map(|effect| format!("effect {} has ended and is in the outbox", effect.id))
}

/// What is remembered of the state before a command.
struct Before {
    phases: BTreeMap<DeploymentId, Phase>,
}

impl Before {
    fn of(state: &State) -> Self {
        let phases = state.deployments().values();
        Self {
            phases: phases.map(|d| (d.id.clone(), d.phase)).collect(),
        }
    }

    /// Phases only go forward, nothing disappears without an audit row, nothing is given up as missing that
    /// the validator has.
    fn violations(&self, state: &State, validator: &Validator) -> Vec<String> {
        let mut found = Vec::new();
        for (id, before) in &self.phases {
            let Some(now) = state.deployments().get(id) else {
                if !state.audits().contains_key(id) {
                    found.push(format!("{id} disappeared"));
                }
                continue;
            };
            if now.phase < *before {
                found.push(format!("{id} went back from {before:?} to {:?}", now.phase));
            }
            let given_up = before.is_live()
                && now
                    .stop
                    .as_ref()
                    .is_some_and(|stop| stop.reason == StopReason::InstanceMissing);
            if given_up
                && now
                    .instance
                    .as_ref()
                    .is_some_and(|instance| validator.has(instance))
            {
                found.push(format!(
                    "{id} was given up as missing although the validator has it"
                ));
            }
        }
        found
    }
}

/// What callers were promised, and what was done.
#[derive(Debug, Clone, Default)]
pub(super) struct Oracle(Arc<Mutex<Promised>>);

#[derive(Debug, Default)]
struct Promised {
    answers: BTreeMap<RequestId, (u64, Answer)>,
    /// Their requests in order of acknowledgement.
    order: Vec<RequestId>,
    /// Requests that were applied somewhere.
    seen: BTreeSet<RequestId>,
    /// Tries that were applied somewhere, and those of which it was said that they never will be: a try has its time.
    tried: BTreeSet<(RequestId, UnixMillis)>,
    refused: BTreeSet<(RequestId, UnixMillis)>,
    /// Signatures by the request that used them up.
    guards: BTreeMap<[u8; 32], RequestId>,
}

/// So many of the newest acknowledged writes are looked for in a read.
const LOOKED_FOR: usize = 64;

impl Oracle {
    fn lock(&self) -> MutexGuard<'_, Promised> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_new(&self, proposal: &Proposal) -> bool {
        self.lock().seen.insert(proposal.request)
    }

    /// Whether this try was said never to be applied.
    fn was_refused(&self, proposal: &Proposal) -> bool {
        let mut promised = self.lock();
        let a_try = (proposal.request, proposal.at);
        promised.tried.insert(a_try);
        promised.refused.contains(&a_try)
    }

    fn refused(&self, proposal: &Proposal, recorder: &Recorder) {
        recorder.event("writes refused for certain");
        let mut promised = self.lock();
        let a_try = (proposal.request, proposal.at);
        promised.refused.insert(a_try);
        if promised.tried.contains(&a_try) {
            recorder.violation("a write that was applied is said to have changed nothing");
        }
    }

    fn acknowledged(&self, proposal: &Proposal, at_ms: u64, answer: Answer, recorder: &Recorder) {
        let mut promised = self.lock();
        let request = proposal.request;
        if let Some((_, first)) = promised.answers.get(&request) {
            if *first != answer {
                recorder.violation(format!("2: a request was answered {first:?}, then {answer:?}"));
            }
            return;
        }
        if let Some(guard) = proposal.guard
            && answer != Err(Rejection::Replayed)
        {
            let first = *promised.guards.entry(guard).or_insert(request);
            if first != request {
                recorder.violation(format!("one signature was good for two writes: {answer:?}"));
            }
        }
        promised.answers.insert(request, (at_ms, answer));
        promised.order.push(request);
    }

    pub(super) fn len(&self) -> usize {
        self.lock().order.len()
    }

    /// Every acknowledged write must be in the state, with the answer that was given.
    pub(super) fn check(&self, machine: &Machine, recorder: &Recorder) {
        let everything = self.len();
        self.look(machine, recorder, 0..everything, "2: a write is lost");
    }

    /// What was acknowledged before a linearizable read began, as so many writes, must be seen by it.
    pub(super) fn check_read(&self, machine: &Machine, recorder: &Recorder, before: usize) {
        let newest = before.saturating_sub(LOOKED_FOR)..before;
        self.look(machine, recorder, newest, "2: a linearizable read misses a write");
    }

    fn look(&self, machine: &Machine, recorder: &Recorder, which: Range<usize>, what: &str) {
        let promised = self.lock();
        let now = recorder.now_ms();
        let asked = promised.order[which].iter();
        let known = asked.filter_map(|request| promised.answers.get(request).map(|known| (request, known)));
        // The state forgets answers by its own clock, which may be a little ahead of the acknowledgement.
        let recent = known.filter(|(_, (at_ms, _))| at_ms + REQUEST_MEMORY_MS > now + 60_000);
        let lost: BTreeSet<String> = machine.read(|state| {
            recent
                .filter(|(request, (_, answer))| state.answer_to(**request).as_ref() != Some(answer))
                .map(|(_, (at_ms, answer))| format!("acknowledged at {at_ms} ms with {answer:?}"))
                .collect()
        });
        for lost in lost {
            recorder.violation(format!("{what}: {lost}"));
        }
    }
}

/// The replicated log with the oracle at its mouth.
pub(super) struct WatchedLog {
    pub(super) log: ReplicatedLog,
    pub(super) oracle: Oracle,
    pub(super) recorder: Recorder,
}

impl fmt::Debug for WatchedLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WatchedLog({:?})", self.log)
    }
}

impl Log for WatchedLog {
    fn propose(&self, command: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, Error>> {
        Box::pin(async move {
            let unread = |error: Unreadable| Error::OutcomeUnknown(error.to_string());
            let proposal = decode_proposal(&command).map_err(unread)?;
            let bytes = match self.log.propose(command).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    if matches!(error, Error::Unavailable(_)) {
                        self.oracle.refused(&proposal, &self.recorder);
                    }
                    return Err(error);
                }
            };
            let answer = decode_answer(&bytes).map_err(unread)?;
            let at_ms = self.recorder.now_ms();
            self.oracle.acknowledged(&proposal, at_ms, answer, &self.recorder);
            Ok(bytes)
        })
    }

    fn linearizable(&self) -> BoxFuture<'_, Result<(), Error>> {
        self.log.linearizable()
    }

    fn leads_now(&self) -> bool {
        self.log.leads_now()
    }
}

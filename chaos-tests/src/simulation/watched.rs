//! The state machine and the log under watch: after every command the invariants are checked, and every
//! answer that the log has acknowledged is remembered, to be looked for after each restart.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use coordinator::member::ReplicatedLog;
use coordinator::store::{BoxFuture, Log, Machine};
use coordinator_core::state_machine::codec::{decode_answer, decode_proposal};
use coordinator_core::state_machine::command::{Answer, REQUEST_MEMORY_MS, RequestId};
use coordinator_core::state_machine::deployment::{Phase, StopReason};
use coordinator_core::state_machine::{Command, Proposal, State, invariant};
use protocol::id::DeploymentId;
use replica::{RowChange, StateMachine};

use super::recorder::Recorder;
use super::validator::Validator;

/// A member's machine for one life.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) machine: Machine,
    pub(super) recorder: Recorder,
    pub(super) validator: Validator,
    /// False after the member's death: what its tasks still do reaches nobody.
    pub(super) alive: Arc<AtomicBool>,
}

impl StateMachine for Watched {
    fn apply(&mut self, command: &[u8], changed: &mut Vec<RowChange>) -> Vec<u8> {
        if !self.alive.load(Ordering::Relaxed) {
            return StateMachine::apply(&mut self.machine, command, changed);
        }
        let proposal = decode_proposal(command).expect("we have encoded it");
        let before = self.machine.read(Before::of);
        if let Some(effect) = self.machine.read(|state| out_of_order(state, &proposal)) {
            self.recorder.violation(effect);
        }
        let answer = StateMachine::apply(&mut self.machine, command, changed);
        self.recorder.command();
        match decode_answer(&answer) {
            Ok(answer) => self
                .recorder
                .note(format_args!("applied {:?} -> {answer:?}", proposal.command)),
            Err(error) => self.recorder.violation(error),
        }
        let found = self.machine.read(|state| {
            let mut found = invariant::violations(state);
            found.extend(before.violations(state, &self.validator));
            found
        });
        for violation in found {
            self.recorder.violation(violation);
        }
        answer
    }

    fn load(&mut self, rows: &mut dyn Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Result<(), String> {
        StateMachine::load(&mut self.machine, rows)
    }

    fn applied(&mut self, index: u64) {
        StateMachine::applied(&mut self.machine, index);
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

/// What callers were promised.
#[derive(Debug, Clone, Default)]
pub(super) struct Oracle(Arc<Mutex<BTreeMap<RequestId, (u64, Answer)>>>);

impl Oracle {
    fn acknowledged(&self, request: RequestId, at_ms: u64, answer: Answer, recorder: &Recorder) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, first)) = known.get(&request) {
            if *first != answer {
                recorder.violation(format!("2: a request was answered {first:?}, then {answer:?}"));
            }
            return;
        }
        known.insert(request, (at_ms, answer));
    }

    pub(super) fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Every acknowledged write must be in the state, with the answer that was given.
    pub(super) fn check(&self, machine: &Machine, recorder: &Recorder) {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = recorder.now_ms();
        // The state forgets answers by its own clock, which may be a little ahead of the acknowledgement.
        let recent = known
            .iter()
            .filter(|(_, (at_ms, _))| at_ms + REQUEST_MEMORY_MS > now + 60_000);
        let lost: BTreeSet<String> = machine.read(|state| {
            recent
                .filter(|(request, (_, answer))| state.answer_to(**request) != Some(answer))
                .map(|(_, (at_ms, answer))| format!("acknowledged at {at_ms} ms with {answer:?}"))
                .collect()
        });
        for what in lost {
            recorder.violation(format!("2: a write is lost: {what}"));
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
    fn propose(&self, command: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, String>> {
        Box::pin(async move {
            let request = decode_proposal(&command)
                .map_err(|error| error.to_string())?
                .request;
            let bytes = self.log.propose(command).await?;
            let answer = decode_answer(&bytes).map_err(|error| error.to_string())?;
            let at_ms = self.recorder.now_ms();
            self.oracle.acknowledged(request, at_ms, answer, &self.recorder);
            Ok(bytes)
        })
    }

    fn linearizable(&self) -> BoxFuture<'_, Result<(), String>> {
        self.log.linearizable()
    }
}

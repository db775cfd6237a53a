//! What must hold between two states, besides the invariants of one.

use std::collections::BTreeMap;

use coordinator_core::state_machine::State;
use coordinator_core::state_machine::deployment::{Phase, StopReason};
use protocol::id::DeploymentId;

use crate::validator::Validator;

/// What is remembered of the state before a command.
#[derive(Debug, Default)]
pub(crate) struct Before {
    phases: BTreeMap<DeploymentId, Phase>,
}

impl Before {
    pub(crate) fn of(state: &State) -> Self {
        Self {
            phases: state
                .deployments()
                .values()
                .map(|d| (d.id.clone(), d.phase))
                .collect(),
        }
    }

    /// Phases only go forward, and nothing disappears without an audit row.
    pub(crate) fn check(&self, state: &State) -> Result<(), String> {
        for (id, phase) in &self.phases {
            match state.deployments().get(id) {
                Some(now) if now.phase < *phase => return Err(format!("{id} went back to {:?}", now.phase)),
                Some(_) => {}
                None if state.audits().contains_key(id) => {}
                None => return Err(format!("{id} disappeared")),
            }
        }
        Ok(())
    }
}

/// Nothing is given up as missing that the validator still has.
pub(crate) fn missing_is_true(before: &Before, state: &State, validator: &Validator) -> Result<(), String> {
    for deployment in state.deployments().values() {
        let was_live = before
            .phases
            .get(&deployment.id)
            .is_some_and(|phase| phase.is_live());
        let stop = deployment.stop.as_ref();
        let given_up = was_live && stop.is_some_and(|stop| stop.reason == StopReason::InstanceMissing);
        let instance = deployment.instance.as_ref();
        if given_up && instance.is_some_and(|instance| validator.instances.contains_key(instance)) {
            return Err(format!(
                "{} was given up although the validator lists it",
                deployment.id
            ));
        }
    }
    Ok(())
}

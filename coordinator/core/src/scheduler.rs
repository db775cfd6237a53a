//! Placement decisions: a strategy looks at a view of the state and proposes.
//!
//! Nothing here changes anything. A [`strategy::Decision`] becomes a command, and `apply` checks it against
//! the rules again: whatever a strategy does, no invariant breaks.
//!
//! Reading order: [`market`] (what the leader learnt of the network and keeps in memory), [`view`] (the
//! questions a strategy may ask), [`room`] (the GPUs that one pass has left), [`strategy`] (the trait, and
//! what guards us against a bad one), [`pay`] (what a copy earns), [`preemption`] (who would have to go),
//! [`value_per_cost`] (the strategy that is built in), [`explain`] (why not there).

pub mod explain;
pub mod market;
pub mod pay;
pub mod preemption;
pub mod room;
pub mod strategy;
pub mod value_per_cost;
pub mod view;

use protocol::id::DeploymentId;

use crate::state_machine::command::{Allowance, Command};
use crate::state_machine::deployment::StopReason;
use crate::state_machine::state::State;

use strategy::Decision;

/// The command that carries a decision out; none if it is only an explanation. `deployment` names the new
/// deployment.
#[must_use]
pub fn command_for(decision: Decision, state: &State, deployment: DeploymentId) -> Option<Command> {
    match decision {
        Decision::Launch(launch) => Some(Command::PlaceDeployment(launch.into_placement(deployment))),
        Decision::Retire { deployment, reason } => {
            // Only what its validator wants replaced may go before its pay is safe.
            let superseded = state.deployments().get(&deployment)?.superseded_by.is_some();
            Some(Command::StopDeployments {
                deployments: vec![deployment],
                reason: StopReason::Strategy(reason),
                allowance: Allowance {
                    loss: superseded,
                    jobs: false,
                    budgeted: !superseded,
                },
            })
        }
        Decision::Nothing { .. } => None,
    }
}

//! Who votes, kept right by the leader: eligible hosts become learners, learners become voters, dead voters
//! are replaced, removed hosts leave. One change at a time; `policy.rs` says which.

use std::time::Duration;

use replica::{Progress, Replica};
use tokio_util::sync::CancellationToken;

use crate::store::Store;

pub mod policy;

use policy::{Candidate, Roles, Step, next_step};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A member that has not answered for so long is replaced, if another one can.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// A learner that is at most so many entries behind has caught up.
const BEHIND_MAX: u64 = 500;

/// The members that should be, as this leader sees them.
#[must_use]
pub fn candidates(store: &Store, replica: &Replica) -> Vec<Candidate> {
    let progress = replica.progress();
    let (own, last) = (replica.member(), replica.metrics().last_index.unwrap_or(0));
    store.read(|state| {
        state
            .members()
            .map(|(member, record)| {
                let progress = progress.get(&member);
                Candidate {
                    member,
                    address: record.host.address.clone(),
                    site: record.host.site.clone(),
                    pin: record.pin,
                    alive: member == own || progress.is_some_and(answers),
                    caught_up: member == own || progress.is_some_and(|progress| is_near(progress, last)),
                }
            })
            .collect()
    })
}

fn answers(progress: &Progress) -> bool {
    progress.answered_ago.is_some_and(|ago| ago <= SILENCE_MAX)
}

fn is_near(progress: &Progress, last: u64) -> bool {
    progress
        .matched
        .is_some_and(|matched| matched + BEHIND_MAX >= last)
}

/// The roles that the replicated log knows now.
#[must_use]
pub fn roles(replica: &Replica) -> Roles {
    let membership = replica.membership();
    Roles {
        leader: replica
            .leadership()
            .borrow()
            .leader
            .unwrap_or_else(|| replica.member()),
        voters: membership.voters.keys().copied().collect(),
        learners: membership.learners.keys().copied().collect(),
        changing: membership.changing,
        addresses: membership.voters.into_iter().chain(membership.learners).collect(),
    }
}

/// Keeps the members right until cancelled; for the leader only.
pub async fn keep(store: Store, replica: Replica, cancel: CancellationToken) {
    loop {
        let pause = tokio::time::sleep(LOOK_EVERY);
        if cancel.run_until_cancelled(pause).await.is_none() {
            return;
        }
        let Some(step) = next_step(&candidates(&store, &replica), &roles(&replica)) else {
            continue;
        };
        tracing::info!(?step, "the members change");
        let done = match step.clone() {
            Step::AddLearner(member, address) | Step::Move(member, address) => {
                replica.add_learner(member, address).await
            }
            Step::SetVoters(voters) => replica.set_voters(voters).await,
            Step::Transfer(member) => replica.transfer(Some(member)).await,
            Step::Remove(member) => replica.remove_member(member).await,
        };
        if let Err(error) = done {
            tracing::warn!(?step, %error, "the members did not change; it is tried again");
        }
    }
}

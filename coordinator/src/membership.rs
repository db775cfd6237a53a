//! Who votes, kept right by the leader: eligible hosts become learners, learners become voters, dead voters
//! are replaced, removed hosts leave. One change at a time; `policy.rs` says which.

use std::time::Duration;

use replica::{Progress, Replica};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::store::Store;

pub mod policy;

use policy::{Candidate, Roles, Step, next_step};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A member that has not answered for so long is replaced, if another one can.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// A leader whose clock is off hands over after so long, and tries it again so seldom.
const OFF_CLOCK_AFTER: Duration = Duration::from_secs(10);
/// A learner that is at most so many entries behind has caught up.
const BEHIND_MAX: u64 = 500;

/// The members that should be, as one sees them that has led for so long.
#[must_use]
pub fn candidates(store: &Store, replica: &Replica, led_for: Duration) -> Vec<Candidate> {
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
                    alive: member == own || progress.is_some_and(|progress| answers(progress, led_for)),
                    caught_up: member == own || progress.is_some_and(|progress| is_near(progress, last)),
                }
            })
            .collect()
    })
}

/// Who has not answered this leader yet may have answered the one before until a moment ago.
fn answers(progress: &Progress, led_for: Duration) -> bool {
    progress.answered_ago.unwrap_or(led_for) <= SILENCE_MAX
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

/// Asks the leader of this process to hand the lead over: what it has received as such is recorded before.
#[derive(Debug, Clone)]
pub struct HandOver(mpsc::Sender<Wish>);

/// Somebody else is to lead.
#[derive(Debug)]
pub struct Wish {
    to: Option<u64>,
    done: Option<oneshot::Sender<Result<(), String>>>,
}

impl HandOver {
    /// A way to ask, and where the wishes arrive.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<Wish>) {
        let (wishes, asked) = mpsc::channel(1);
        (Self(wishes), asked)
    }

    /// Hands the lead to a member, or to the voter that has come farthest. Returns when that one leads.
    ///
    /// # Errors
    /// Why that has not come to be; this member leads on, if it did.
    pub async fn to(&self, to: Option<u64>) -> Result<(), String> {
        let (done, outcome) = oneshot::channel();
        let wish = Wish { to, done: Some(done) };
        let sent = self.0.try_send(wish);
        sent.map_err(|_| "the lead is being handed over, or this member stops".to_owned())?;
        let outcome = outcome.await;
        outcome.unwrap_or_else(|_| Err("this member stops".to_owned()))
    }
}

/// Has the replica ask the leader of this process as well, where it must hand over by itself.
pub fn ask_before_handing_over(replica: &Replica, hand_over: HandOver) {
    replica.hand_over_through(move || {
        let hand_over = hand_over.clone();
        Box::pin(async move { hand_over.to(None).await.is_ok() })
    });
}

impl Wish {
    /// Whoever asked has been told that there was no answer: what happened afterwards would surprise them.
    fn is_forgotten(&self) -> bool {
        self.done.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    /// Does it; whatever a leader does has ended.
    pub async fn carry_out(self, replica: &Replica) {
        if self.is_forgotten() {
            return;
        }
        let transferred = replica.transfer(self.to).await;
        self.answer(transferred);
    }

    fn answer(self, outcome: Result<(), replica::Error>) {
        let outcome = outcome.map_err(|error| error.to_string());
        if let Err(error) = &outcome {
            tracing::info!(to = ?self.to, error, "the lead was not handed over");
        }
        if let Some(done) = self.done {
            // Who asked may have gone away.
            let _ = done.send(outcome);
        }
    }
}

/// The next wish that is worth ending all that a leader does; those that change nothing are answered at once. None when
/// nobody can ask any more.
pub async fn next_wish(wishes: &mut mpsc::Receiver<Wish>, replica: &Replica) -> Option<Wish> {
    loop {
        let wish = wishes.recv().await?;
        if wish.is_forgotten() {
            continue;
        }
        match replica.can_hand_over(wish.to) {
            Ok(target) if target == replica.member() => wish.answer(Ok(())),
            Ok(_) => return Some(wish),
            Err(error) => wish.answer(Err(error)),
        }
    }
}

/// Keeps the members right until cancelled, or until somebody else is to lead; for the leader only.
pub async fn keep(store: Store, replica: Replica, cancel: CancellationToken) -> Option<Wish> {
    let began = Instant::now();
    loop {
        let pause = tokio::time::sleep(LOOK_EVERY);
        cancel.run_until_cancelled(pause).await?;
        // It signs with the time of its machine, which validators refuse then.
        let better = store.clock().better().into_iter();
        let able = better
            .filter(|_| began.elapsed() >= OFF_CLOCK_AFTER)
            .find(|member| replica.can_hand_over(Some(*member)).is_ok());
        if able.is_some() {
            tracing::warn!(to = able, "hands over the lead: this machine's clock is off");
            return Some(Wish { to: able, done: None });
        }
        let Some(step) = next_step(&candidates(&store, &replica, began.elapsed()), &roles(&replica)) else {
            continue;
        };
        tracing::info!(?step, "the members change");
        let done = match step.clone() {
            Step::AddLearner(member, address) | Step::Move(member, address) => {
                replica.add_learner(member, address).await
            }
            Step::SetVoters(voters) => replica.set_voters(voters).await,
            Step::Transfer(member) => match replica.can_hand_over(Some(member)) {
                Ok(to) => {
                    let to = Some(to);
                    return Some(Wish { to, done: None });
                }
                Err(error) => Err(error),
            },
            Step::Remove(member) => replica.remove_member(member).await,
        };
        if let Err(error) = done {
            tracing::warn!(?step, %error, "the members did not change; it is tried again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A leader of a second replaced a voter that it had not heard yet by a spare one.
    #[test]
    fn nobody_counts_as_dead_before_a_new_leader_has_waited() {
        let silent = |answered_ago| Progress {
            matched: None,
            answered_ago,
        };
        let seconds = Duration::from_secs;
        for (answered_ago, led_for, expected) in [
            (None, seconds(1), true),
            (None, seconds(30), true),
            (None, seconds(31), false),
            (Some(seconds(29)), seconds(100), true),
            (Some(seconds(31)), seconds(100), false),
        ] {
            let progress = silent(answered_ago);
            assert_eq!(answers(&progress, led_for), expected, "{progress:?} {led_for:?}");
        }
    }
}

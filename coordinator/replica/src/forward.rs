//! What a member that does not lead asks of the one that does: to propose commands, and up to where a read
//! must wait.

use openraft::async_runtime::WatchReceiver;
use std::time::Duration;
use tokio::time::{Instant, sleep};

use crate::error::ProposeError;
use crate::membership::Membership;
use crate::raft::{Commands, Raft};
use crate::transport::{CallError, Network, Peer};
use crate::wire::{Answer, Bytes, Request};

/// A question for the read index without an answer for this long has failed: ask again, it costs nothing.
const READ_INDEX_MAX: Duration = Duration::from_secs(1);
/// How long an old leader may still answer once another one is known: it may have finished in order.
const OLD_LEADER_MAX: Duration = Duration::from_millis(200);

/// The way to a leader whose address is known.
pub(crate) fn leader(raft: &Raft, network: &Network, leader: u64) -> Option<Peer> {
    let members = Membership::of(&raft.metrics().borrow_watched().membership_config);
    members
        .address(leader)
        .map(|address| network.peer(leader, address))
}

/// Has the leader propose commands as one entry.
pub(crate) async fn propose(
    raft: &Raft,
    leader: &Peer,
    commands: &Commands,
    deadline: Instant,
) -> Result<Vec<Vec<u8>>, ProposeError> {
    let within = deadline.saturating_duration_since(Instant::now());
    if within.is_zero() {
        return Err(ProposeError::Timeout);
    }
    let request = Request::Propose {
        // The leader ends first, so that its answer is better than none.
        within_ms: u64::try_from(within.as_millis() * 9 / 10).unwrap_or(u64::MAX),
        commands: commands.iter().map(|command| Bytes(command.to_vec())).collect(),
    };
    let answered = tokio::select! {
        biased;
        answered = leader.ask(&request, within) => answered,
        () = deposed(raft, leader.member) => {
            let why = format!("member {} does not lead any more and gave no answer", leader.member);
            return Err(ProposeError::OutcomeUnknown(why));
        }
    };
    match answered {
        Ok(Answer::Proposed(replies)) => Ok(replies.into_iter().map(|reply| reply.0).collect()),
        Ok(Answer::NotProposed(refusal)) => Err(refusal.into()),
        Ok(_) => Err(ProposeError::OutcomeUnknown(leader.unexpected().to_string())),
        Err(error) => Err(ProposeError::OutcomeUnknown(error.to_string())),
    }
}

/// Returns a moment after another member than `leader` leads.
async fn deposed(raft: &Raft, leader: u64) {
    succeeded(raft, leader).await;
    sleep(OLD_LEADER_MAX).await;
}

/// Returns once another member than `leader` leads, or this one ends.
async fn succeeded(raft: &Raft, leader: u64) {
    let mut metrics = raft.metrics();
    loop {
        let current = metrics.borrow_watched().current_leader;
        if current.is_some_and(|current| current != leader) {
            return;
        }
        if metrics.changed().await.is_err() {
            return;
        }
    }
}

/// Asks the leader up to which index everything is acknowledged; `None` when it does not lead, or another one leads
/// before it answers.
pub(crate) async fn read_index(
    raft: &Raft,
    leader: &Peer,
    deadline: Instant,
) -> Result<Option<u64>, CallError> {
    let left = deadline.saturating_duration_since(Instant::now());
    let within = left.min(READ_INDEX_MAX);
    let within_ms = u64::try_from(within.as_millis() * 9 / 10).unwrap_or(u64::MAX);
    let request = Request::ReadIndex { within_ms };
    let answered = tokio::select! {
        biased;
        answered = leader.ask(&request, within) => answered,
        () = succeeded(raft, leader.member) => return Ok(None),
    };
    match answered? {
        Answer::ReadAt { index } => Ok(Some(index)),
        Answer::NotReadable { .. } => Ok(None),
        _ => Err(leader.unexpected()),
    }
}

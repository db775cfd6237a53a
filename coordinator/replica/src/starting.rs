//! What a member forgets when it starts anew, and a leader relies on: when it answered last.
//!
//! With each answer a voter promises to help nobody else to the lead for a lease. The Raft library keeps that in
//! memory only. So whoever starts takes the leader that it followed as heard at that moment, whatever the time
//! that it was away: it cannot know it. The library is started anew with each change of timing, too.
//! How long the lease was stands beside the vote, since the settings may have been changed while the member was away.

use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse};
use std::time::Duration;
use tokio::time::{Instant, sleep};

use crate::log_store::LogStore;
use crate::raft::{CurrentRaft, Raft, RaftVote, spawn};
use crate::timing;

/// The vote of the leader that a member with this stored vote may have answered last. One that led itself has
/// answered nobody since it was elected; the others keep their own promises.
pub(crate) fn followed(stored: Option<RaftVote>, own: u64) -> Option<RaftVote> {
    stored.filter(|vote| vote.committed && vote.leader_id.node_id != own)
}

/// Makes a library that was just started take `leader` as heard for `silence` from now on, but for elections that
/// the leader itself wants. Call it inside of a scope, before others can ask the library.
pub(crate) async fn keep_promise(raft: &Raft, current: CurrentRaft, leader: RaftVote, silence: Duration) {
    let lease = timing::lease(raft.config());
    let last = Instant::now() + silence.saturating_sub(lease);
    hear(raft, leader).await;
    // Each time counts for one lease, and the promise was perhaps for a longer one.
    let again = async move {
        while Instant::now() < last && current.has_changed().is_ok() {
            sleep(lease / 2).await;
            let raft = current.borrow().clone();
            if !hear(&raft, leader).await {
                return;
            }
        }
    };
    if silence > lease {
        spawn(again);
    }
}

/// Whether the library takes the leader as heard: not when it has voted since then.
async fn hear(raft: &Raft, leader: RaftVote) -> bool {
    // A heartbeat that says nothing about the log.
    let heartbeat = AppendEntriesRequest {
        vote: leader,
        prev_log_id: None,
        entries: Vec::new(),
        leader_commit: None,
    };
    let taken = raft.append_entries(heartbeat).await;
    matches!(taken, Ok(AppendEntriesResponse::Success))
}

/// Writes the lease down by which a member is about to answer, unless a longer one stands there.
pub(crate) async fn write_down(log: &LogStore, lease: Duration) -> std::io::Result<()> {
    if log.lease().is_none_or(|written| written < lease) {
        log.save_lease(lease).await?;
    }
    Ok(())
}

/// Writes the lease down in place of a longer one, when what was promised by that one is over: `silence` from now.
pub(crate) fn shorten(log: LogStore, current: CurrentRaft, lease: Duration, silence: Duration) {
    if log.lease().is_none_or(|written| written <= lease) {
        return;
    }
    spawn(async move {
        sleep(silence).await;
        let holds = current.has_changed().is_ok() && timing::lease(current.borrow().config()) == lease;
        if holds && let Err(error) = log.save_lease(lease).await {
            tracing::warn!(%error, "a shorter lease was not written down; after a restart, elections wait for longer");
        }
    });
}

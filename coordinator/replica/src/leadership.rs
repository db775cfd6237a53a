//! Who leads, and for how long that is certain.
//!
//! The Raft library lets a leader that is cut off call itself one for ever, since it cannot commit anything.
//! Ours also acts on the outside, so it leads only while its quorum lease holds: a majority answered what it
//! sent less than the longest election silence ago. No other member can win an election before that: whoever
//! answered helps to elect nobody else until then, also when it starts anew meanwhile (see `starting`).

use openraft::async_runtime::WatchReceiver;
use openraft::{Instant as _, RaftMetrics, ServerState};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::health::Shared;
use crate::membership::Membership;
use crate::raft::{CurrentRaft, Types};
use crate::transport::Network;

/// Who leads, as far as this replica knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leadership {
    /// Whether this replica leads, its state holds everything acknowledged before it did, and a majority
    /// confirmed it less than a lease ago.
    pub leads: bool,
    /// Current term.
    pub term: u64,
    /// Id of the leader, if known.
    pub leader: Option<u64>,
    /// When `leads` last changed.
    pub since: Instant,
    /// Index of the last applied log entry; 0 before the first.
    pub applied_index: u64,
}

/// For how long, and in which term not, a leader leads.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    /// How long the confirmation of a majority holds.
    pub(crate) length: watch::Receiver<Duration>,
    /// Term in which this member handed the lead over: others may win that at once, whatever the lease.
    pub(crate) given_up: watch::Receiver<u64>,
}

/// Whether only this member votes.
pub(crate) fn is_only_voter(metrics: &RaftMetrics<Types>) -> bool {
    metrics
        .membership_config
        .voter_ids()
        .all(|voter| voter == metrics.id)
}

/// Until when this member leads, if it does: `None` when it does not, else the end of the lease, which a
/// cluster of one does not need.
fn leads_until(metrics: &RaftMetrics<Types>, lease: &Lease) -> Option<Option<Instant>> {
    // A new leader has caught up once an entry of its own term is applied.
    let caught_up = metrics
        .last_applied
        .is_some_and(|id| id.leader_id.term == metrics.current_term);
    let given_up = *lease.given_up.borrow() == metrics.current_term;
    if metrics.state != ServerState::Leader || !caught_up || given_up || metrics.running_state.is_err() {
        return None;
    }
    if is_only_voter(metrics) {
        return Some(None);
    }
    let left = lease
        .length
        .borrow()
        .saturating_sub(metrics.last_quorum_acked?.elapsed());
    (!left.is_zero()).then(|| Some(Instant::now() + left))
}

/// Whether this member leads at this very moment.
pub(crate) fn leads(metrics: &RaftMetrics<Types>, lease: &Lease) -> bool {
    leads_until(metrics, lease).is_some()
}

pub(crate) fn leadership_of(
    metrics: &RaftMetrics<Types>,
    lease: &Lease,
    before: Option<&Leadership>,
) -> Leadership {
    let leads = leads(metrics, lease);
    let since = before
        .filter(|before| before.leads == leads)
        .map_or_else(Instant::now, |before| before.since);
    Leadership {
        leads,
        term: metrics.current_term,
        leader: metrics.current_leader,
        since,
        applied_index: metrics.last_applied.map_or(0, |id| id.index),
    }
}

/// Publishes the library's metrics as leadership, addresses and health until the replica ends; wakes up by itself when
/// the lease runs out.
pub(crate) async fn follow(
    mut current: CurrentRaft,
    leadership: watch::Sender<Leadership>,
    shared: Shared,
    mut lease: Lease,
    network: Network,
) {
    let mut metrics = current.borrow_and_update().metrics();
    let mut members_at = None;
    loop {
        let lease_end = {
            let now = metrics.borrow_watched();
            if members_at != Some(*now.membership_config.log_id()) {
                members_at = Some(*now.membership_config.log_id());
                network.set_members(Membership::of(&now.membership_config));
            }
            leadership.send_if_modified(|known| {
                let new = leadership_of(&now, &lease, Some(known));
                let changed = new != *known;
                *known = new;
                changed
            });
            if let Err(fatal) = &now.running_state
                && !matches!(fatal, openraft::error::Fatal::Stopped)
            {
                shared.fail(&fatal.to_string());
            }
            leads_until(&now, &lease).flatten()
        };
        let runs_out = async {
            match lease_end {
                Some(end) => sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        let replaced = tokio::select! {
            biased;
            changed = metrics.changed() => match changed {
                Ok(()) => false,
                // It has ended: for good, or until there is another one.
                Err(_) => {
                    leadership.send_modify(nobody_leads);
                    if current.changed().await.is_err() {
                        break;
                    }
                    true
                }
            },
            changed = current.changed() => match changed {
                Ok(()) => true,
                Err(_) => break,
            },
            // Their senders live as long as that of the above.
            _ = lease.given_up.changed() => false,
            _ = lease.length.changed() => false,
            () = runs_out => false,
        };
        if replaced {
            metrics = current.borrow_and_update().metrics();
        }
    }
    leadership.send_modify(nobody_leads);
}

fn nobody_leads(known: &mut Leadership) {
    if known.leads {
        known.since = Instant::now();
    }
    known.leads = false;
    known.leader = None;
}

//! A leader that hears nobody says nothing.
//!
//! Where datagrams get lost in one direction only, a leader may be heard by members of whom it hears nothing. They
//! would follow it for as long as it speaks, although it can commit nothing. So it stops its appends and heartbeats
//! once no majority has answered for a lease: then the others elect somebody else. Meanwhile it asks for echoes, which
//! keep nobody from an election, and speaks again when a majority answers those.

use openraft::async_runtime::WatchReceiver;
use openraft::{Instant as _, ServerState};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

use crate::leadership::{Lease, is_only_voter};
use crate::raft::{CurrentRaft, Raft, RaftMembership};
use crate::transport::Network;
use crate::wire::{Answer, Request};

/// Silences the leader while it hears no majority, until the replica ends.
pub(crate) async fn mind(mut current: CurrentRaft, mut lease: Lease, network: Network) {
    // In which term, and from when on, a leader counts as heard although nobody has answered it yet.
    let mut heard = (0, Instant::now());
    let mut metrics = current.borrow_and_update().metrics();
    loop {
        let left = {
            let now = metrics.borrow_watched();
            let leads_others = now.state == ServerState::Leader && !is_only_voter(&now);
            leads_others.then(|| {
                if heard.0 != now.current_term {
                    heard = (now.current_term, Instant::now());
                }
                let silence = now
                    .last_quorum_acked
                    .map_or(Duration::MAX, |acked| acked.elapsed());
                lease
                    .length
                    .borrow()
                    .saturating_sub(silence.min(heard.1.elapsed()))
            })
        };
        if left == Some(Duration::ZERO) {
            let raft = current.borrow().clone();
            let members = metrics.borrow_watched().membership_config.clone();
            tracing::warn!("no majority answers: this member says nothing as a leader until one does");
            network.set_quiet(true);
            let length = *lease.length.borrow();
            until_heard(&raft, &network, &members, length).await;
            network.set_quiet(false);
            // Errors mean that the library ends, which shows elsewhere.
            let _ = raft.trigger().reset_backoff(members.voter_ids()).await;
            heard.1 = Instant::now();
            continue;
        }
        let runs_out = async {
            match left {
                Some(left) => sleep(left).await,
                None => std::future::pending().await,
            }
        };
        let replaced = tokio::select! {
            biased;
            changed = metrics.changed() => match changed {
                Ok(()) => false,
                // It has ended: for good, or until there is another one.
                Err(_) => match current.changed().await {
                    Ok(()) => true,
                    Err(_) => return,
                },
            },
            changed = current.changed() => match changed {
                Ok(()) => true,
                Err(_) => return,
            },
            // Its sender lives as long as that of the above.
            _ = lease.length.changed() => false,
            () = runs_out => false,
        };
        if replaced {
            metrics = current.borrow_and_update().metrics();
        }
    }
}

/// Returns when a majority answers, or this member leads no more.
async fn until_heard(raft: &Raft, network: &Network, members: &RaftMembership, lease: Duration) {
    let mut metrics = raft.metrics();
    let term = metrics.borrow_watched().current_term;
    let deposed = async {
        loop {
            {
                let now = metrics.borrow_watched();
                if now.state != ServerState::Leader || now.current_term != term {
                    return;
                }
            }
            if metrics.changed().await.is_err() {
                return;
            }
        }
    };
    let heard = async {
        loop {
            let next = Instant::now() + lease / 2;
            if is_majority(members, &echoes(network, members, *raft.node_id(), lease).await) {
                return;
            }
            sleep_until(next).await;
        }
    };
    tokio::select! {
        biased;
        () = deposed => {}
        () = heard => {}
    }
}

/// Voters that answer within `within`, and this member.
async fn echoes(network: &Network, members: &RaftMembership, own: u64, within: Duration) -> BTreeSet<u64> {
    let others = members.voter_ids().filter(|voter| *voter != own);
    let asked = others.map(|voter| async move {
        let address = members.get_node(&voter).map_or("", |node| &node.addr);
        let answer = network.peer(voter, address).ask(&Request::Echo, within).await;
        matches!(answer, Ok(Answer::Echo { .. })).then_some(voter)
    });
    let answered = futures_util::future::join_all(asked).await;
    answered.into_iter().flatten().chain([own]).collect()
}

/// Whether these are a majority, during a change of voters one before and one after it.
fn is_majority(members: &RaftMembership, heard: &BTreeSet<u64>) -> bool {
    let mut configs = members.membership().get_joint_config().iter();
    configs.all(|voters| 2 * voters.intersection(heard).count() > voters.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::{Membership, StoredMembership};
    use std::collections::BTreeMap;

    #[test]
    fn a_majority_is_one_before_and_after_a_change_of_voters() {
        let heard = |configs: Vec<&[u64]>, heard: &[u64]| {
            let configs = configs
                .iter()
                .map(|voters| voters.iter().copied().collect())
                .collect();
            let nodes: BTreeMap<u64, openraft::BasicNode> =
                (1..=9).map(|id| (id, openraft::BasicNode::default())).collect();
            let membership = Membership::new(configs, nodes).expect("all of them are members");
            is_majority(
                &StoredMembership::new(None, membership),
                &heard.iter().copied().collect(),
            )
        };
        assert!(heard(vec![&[1, 2, 3]], &[1, 2]));
        assert!(!heard(vec![&[1, 2, 3]], &[1, 7]));
        assert!(!heard(vec![&[1, 2, 3, 4]], &[1, 2]));
        assert!(!heard(vec![&[1, 2, 3], &[1, 4, 5]], &[1, 2, 3]));
        assert!(heard(vec![&[1, 2, 3], &[1, 4, 5]], &[1, 2, 5]));
    }
}

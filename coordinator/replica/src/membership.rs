//! Who belongs to the cluster, and how that changes: learner first, voter when it has caught up, one change
//! at a time. All changes are asked of the leader.

use futures_util::future::BoxFuture;
use openraft::async_runtime::WatchReceiver;
use openraft::error::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::raft::TransferLeaderRequest;
use openraft::{BasicNode, ChangeMembers, Instant as _, LogId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::Replica;
use crate::error::Error;
use crate::leadership::{Leadership, is_only_voter};
use crate::proposer::Backoff;
use crate::raft::{CurrentRaft, Raft, RaftMembership, RaftVote, spawn};

/// Members with their addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership {
    /// Those whose votes count. During a change of voters, the old and the new ones.
    pub voters: BTreeMap<u64, String>,
    /// Those who get everything and do not vote.
    pub learners: BTreeMap<u64, String>,
    /// A change of voters has begun and not ended. It ends by itself, also under another leader.
    pub changing: bool,
}

impl Membership {
    pub(crate) fn of(stored: &RaftMembership) -> Self {
        let config = stored.membership();
        let voters: BTreeSet<u64> = config.voter_ids().collect();
        let mut members = Self {
            changing: config.get_joint_config().len() > 1,
            ..Self::default()
        };
        for (id, node) in config.nodes() {
            let list = if voters.contains(id) {
                &mut members.voters
            } else {
                &mut members.learners
            };
            list.insert(*id, node.addr.clone());
        }
        members
    }

    /// Address of a member.
    #[must_use]
    pub fn address(&self, member: u64) -> Option<&str> {
        let found = self.voters.get(&member).or_else(|| self.learners.get(&member));
        found.map(String::as_str)
    }
}

/// How far another member has come, as the leader knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Last log index that it has on its disk.
    pub matched: Option<u64>,
    /// How long ago the leader sent what it answered last.
    pub answered_ago: Option<Duration>,
}

/// Hands the lead over; false when it was not handed over.
pub(crate) type HandOver = Box<dyn Fn() -> BoxFuture<'static, bool> + Send + Sync>;

/// Whoever acts as the leader gets so long to end that and to hand over.
const HAND_OVER_MAX: Duration = Duration::from_secs(10);

impl Replica {
    /// Own member id.
    #[must_use]
    pub fn member(&self) -> u64 {
        self.0.member
    }

    /// Members as this replica knows them; a change counts from the moment it is in the log.
    #[must_use]
    pub fn membership(&self) -> Membership {
        Membership::of(&self.0.raft().metrics().borrow_watched().membership_config)
    }

    /// How far the others have come; empty when this member does not lead.
    #[must_use]
    pub fn progress(&self) -> BTreeMap<u64, Progress> {
        let metrics = self.0.raft().metrics();
        let metrics = metrics.borrow_watched();
        let Some(replication) = &metrics.replication else {
            return BTreeMap::new();
        };
        let answered = |member: &u64| {
            let heartbeat = metrics.heartbeat.as_ref()?.get(member).copied()??;
            Some(heartbeat.elapsed())
        };
        let others = replication.iter().filter(|(member, _)| **member != metrics.id);
        others
            .map(|(member, matched)| {
                let progress = Progress {
                    matched: matched.map(|id: LogId<_>| id.index),
                    answered_ago: answered(member),
                };
                (*member, progress)
            })
            .collect()
    }

    /// Adds a member that gets everything and does not vote, or gives one a new address. Returns when that
    /// is decided, not when it has caught up: see [`Replica::progress`].
    ///
    /// # Errors
    /// `NotLeader`, `Membership`, `Timeout`, `Stopped` or `Failed`.
    pub async fn add_learner(&self, member: u64, address: String) -> Result<(), Error> {
        let known = self.membership();
        match known.address(member) {
            Some(same) if same == address => Ok(()),
            Some(_) => {
                let nodes = BTreeMap::from([(member, BasicNode { addr: address })]);
                self.change(ChangeMembers::SetNodes(nodes), true).await
            }
            None => {
                let nodes = BTreeMap::from([(member, BasicNode { addr: address })]);
                self.change(ChangeMembers::AddNodes(nodes), true).await
            }
        }
    }

    /// Makes exactly these members voters; those who were and are not any more stay learners. All of them
    /// must be members already, and should have caught up: until then they count and cannot confirm.
    ///
    /// # Errors
    /// `NotLeader`, `Membership`, `Timeout`, `Stopped` or `Failed`.
    pub async fn set_voters(&self, voters: BTreeSet<u64>) -> Result<(), Error> {
        self.change(ChangeMembers::ReplaceAllVoters(voters), true).await
    }

    /// Removes a member, voter or learner; one that is none already is no error.
    ///
    /// # Errors
    /// `NotLeader`, `Membership` (it is the only voter), `Timeout`, `Stopped` or `Failed`.
    pub async fn remove_member(&self, member: u64) -> Result<(), Error> {
        let known = self.membership();
        let one = BTreeSet::from([member]);
        if known.learners.contains_key(&member) {
            return self.change(ChangeMembers::RemoveNodes(one), true).await;
        }
        if !known.voters.contains_key(&member) {
            return Ok(());
        }
        if known.voters.len() == 1 {
            let reason = format!("member {member} is the only voter");
            return Err(Error::Membership(reason));
        }
        self.change(ChangeMembers::RemoveVoters(one), false).await
    }

    async fn change(&self, change: ChangeMembers<u64, BasicNode>, retain: bool) -> Result<(), Error> {
        let deadline = Instant::now() + self.0.timeout;
        let mut backoff = Backoff::new();
        loop {
            let (raft, change) = (self.0.raft(), change.clone());
            let (done, outcome) = oneshot::channel();
            // A task of its own: a change of voters has two steps, and the second must not be forgotten
            // when the caller goes away.
            let run = async move {
                let _ = done.send(raft.change_membership(change, retain).await);
            };
            self.0.seed.scope(async { spawn(run) }).await;
            let changed = match timeout_at(deadline, outcome).await {
                Err(_) => return Err(Error::Timeout),
                Ok(Err(_)) => return Err(Error::Stopped),
                Ok(Ok(changed)) => changed,
            };
            match changed {
                Ok(_) => return Ok(()),
                Err(RaftError::Fatal(fatal)) => return Err(self.failed(&fatal)),
                Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => {
                    let leader = forward.leader_id;
                    if leader.is_some_and(|leader| leader != self.member()) {
                        return Err(Error::NotLeader { leader });
                    }
                }
                Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(
                    ChangeMembershipError::InProgress(_),
                ))) => {}
                Err(RaftError::APIError(other)) => return Err(Error::Membership(other.to_string())),
            }
            if !backoff.wait(deadline).await {
                return Err(Error::Timeout);
            }
        }
    }

    /// Hands the lead to `to`, or to the voter that has come farthest. This member stops leading before the
    /// other can begin. Returns when another member leads.
    ///
    /// # Errors
    /// `NotLeader`, also when a third member took over; `Membership` when it is not a voter or does not answer;
    /// `Timeout` when nobody took over, in which case this member leads on; `Stopped` or `Failed`.
    pub async fn transfer(&self, to: Option<u64>) -> Result<(), Error> {
        let lease = *self.0.lease.length.borrow();
        let (own, target) = self.successor(to)?;
        if target == self.member() {
            return Ok(());
        }
        // From here on others may win, whatever the lease: stop leading first.
        self.0.given_up.send_replace(own.leader_id.term);
        let mut leadership = self.leadership();
        if leadership.wait_for(|now| !now.leads).await.is_err() {
            return Err(Error::Stopped);
        }
        // Two tries: after the first no more commands enter the log, so that the target catches up.
        for _ in 0..2 {
            let raft = self.0.raft();
            let trigger = raft.trigger();
            let triggered = self.0.seed.scope(trigger.transfer_leader(target));
            triggered.await.map_err(|fatal| self.failed(&fatal))?;
            match self.other_leader(&own, Instant::now() + lease).await? {
                Some(leader) if leader == target || to.is_none() => return Ok(()),
                Some(leader) => return Err(Error::NotLeader { leader: Some(leader) }),
                None => {}
            }
        }
        // The library refuses commands for ever after a transfer that failed: stand for election again.
        let request = TransferLeaderRequest::new(own, self.member(), None);
        let raft = self.0.raft();
        let stood = self.0.seed.scope(raft.handle_transfer_leader(request));
        match stood.await {
            Err(fatal) => Err(self.failed(&fatal)),
            Ok(_) => Err(Error::Timeout),
        }
    }

    /// Whom [`Replica::transfer`] would hand the lead to now; nothing changes. Whoever ends something before it hands the
    /// lead over asks first: a member counts for a while after its death, and is not handed the lead.
    ///
    /// # Errors
    /// `NotLeader`, or `Membership` when that one, or everybody, is not a voter or does not answer.
    pub fn can_hand_over(&self, to: Option<u64>) -> Result<u64, Error> {
        self.successor(to).map(|(_, target)| target)
    }

    /// The vote by which this member leads, and who would take over. The library's metrics are borrowed once at a time:
    /// a second time, while they wait to be changed, would wait for ever.
    fn successor(&self, to: Option<u64>) -> Result<(RaftVote, u64), Error> {
        let own = {
            let metrics = self.0.raft().metrics();
            let metrics = metrics.borrow_watched();
            if metrics.current_leader != Some(metrics.id) {
                return Err(Error::NotLeader {
                    leader: metrics.current_leader,
                });
            }
            metrics.vote
        };
        if to == Some(self.member()) {
            return Ok((own, self.member()));
        }
        let lease = *self.0.lease.length.borrow();
        let voters = self.membership().voters;
        let mut able = self.progress();
        able.retain(|member, it| {
            voters.contains_key(member) && it.answered_ago.is_some_and(|ago| ago < lease)
        });
        let target = match to {
            Some(target) if able.contains_key(&target) => target,
            Some(target) => {
                let reason = format!("member {target} is not a voter that answers");
                return Err(Error::Membership(reason));
            }
            None => {
                let best = able.iter().max_by_key(|(_, progress)| progress.matched);
                let nobody = || Error::Membership("no other voter answers".to_owned());
                *best.ok_or_else(nobody)?.0
            }
        };
        Ok((own, target))
    }

    /// Waits until another member leads; none at the deadline.
    async fn other_leader(&self, own: &RaftVote, deadline: Instant) -> Result<Option<u64>, Error> {
        let mut metrics = self.0.raft().metrics();
        loop {
            {
                let now = metrics.borrow_watched();
                if let Err(fatal) = &now.running_state {
                    return Err(self.failed(fatal));
                }
                let other = now.current_leader.filter(|leader| *leader != now.id);
                if now.vote.leader_id != own.leader_id && other.is_some() {
                    return Ok(other);
                }
            }
            match timeout_at(deadline, metrics.changed()).await {
                Err(_) => return Ok(None),
                Ok(Err(_)) => return Err(Error::Stopped),
                Ok(Ok(())) => {}
            }
        }
    }

    /// Has `hand_over` called when this replica must hand the lead over by itself, to change its timing: whoever acts as the
    /// leader ends that first, and then calls [`Replica::transfer`]. Only the first call counts. A handle to this
    /// replica in it would keep the replica open.
    pub fn hand_over_through(
        &self,
        hand_over: impl Fn() -> BoxFuture<'static, bool> + Send + Sync + 'static,
    ) {
        // An error means that there is one.
        let _ = self.0.hand_over.set(Box::new(hand_over));
    }

    /// Before an orderly stop: another member takes over within a fraction of what an election takes.
    pub(crate) async fn hand_over(&self) {
        let (leads, alone) = {
            let metrics = self.0.raft().metrics();
            let metrics = metrics.borrow_watched();
            (
                metrics.current_leader == Some(metrics.id),
                is_only_voter(&metrics),
            )
        };
        if !leads || alone || self.0.shared.failure().is_some() {
            return;
        }
        if self.can_hand_over(None).is_ok()
            && let Some(hand_over) = self.0.hand_over.get()
            && timeout(HAND_OVER_MAX, hand_over()).await == Ok(true)
        {
            return;
        }
        if let Err(error) = self.transfer(None).await {
            tracing::info!(%error, "stops without another member that takes over");
        }
    }
}

/// How long a change of voters may have stood half done before a leader takes it for abandoned.
const ABANDONED_AFTER: Duration = Duration::from_secs(1);

/// Ends changes of voters whose leader went away after the first of the two steps.
pub(crate) async fn finish_changes(current: CurrentRaft, mut leadership: watch::Receiver<Leadership>) {
    let half_done = |raft: &Raft| {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let configs = metrics.membership_config.membership().get_joint_config();
        let goal = configs.last().filter(|_| configs.len() > 1).cloned();
        goal.map(|goal| (goal, *metrics.membership_config.log_id()))
    };
    loop {
        if leadership.wait_for(|now| now.leads).await.is_err() {
            return;
        }
        let raft = current.borrow().clone();
        if let Some((goal, at)) = half_done(&raft) {
            sleep(ABANDONED_AFTER).await;
            if half_done(&raft).is_some_and(|(_, still)| still == at) {
                tracing::info!(voters = ?goal, "ends a change of voters that was left half done");
                if let Err(error) = raft.change_membership(goal, true).await {
                    tracing::info!(%error, "a change of voters is still half done");
                }
            }
        }
        drop(raft);
        if leadership.changed().await.is_err() {
            return;
        }
    }
}

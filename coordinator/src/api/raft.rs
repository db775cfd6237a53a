//! `/v1/raft`: who votes and who leads, how far each member has come, what the loss of a site would do, and
//! handing the lead to another member.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use coordinator_core::state_machine::host::{HostRecord, Pin};
use coordinator_core::state_machine::{Command, Rejection, State as Record};
use replica::Replica;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::auth::Caller;
use super::error::{ApiError, Result};
use super::hosts::host_named;
use super::operate::parse;
use crate::clock::AgreedClock;
use crate::membership::HandOver;
use crate::membership::policy::{self, Candidate, losses};
use crate::store::BoxFuture;

/// A member that has not answered the leader for so long counts as dead. A leader hears every living member
/// many times a second.
const SILENCE_MAX_MS: u64 = 30_000;

/// Who the members are to each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles {
    /// Who leads, if that is known.
    pub leader: Option<u64>,
    /// Those whose acknowledgement counts.
    pub voters: BTreeSet<u64>,
    /// Those that only follow.
    pub learners: BTreeSet<u64>,
    /// This member.
    pub own: u64,
    /// The present term.
    pub term: u64,
}

/// How far another member has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Last log index that it has on its disk.
    pub matched: Option<u64>,
    /// How long ago the leader sent what it answered last, in ms.
    pub answered_ago_ms: Option<u64>,
}

/// The seam to the replicated log's members.
pub trait ClusterView: fmt::Debug + Send + Sync {
    /// The cluster's name, the same on all members.
    fn name(&self) -> String;
    /// Who votes, who follows, who leads.
    fn roles(&self) -> Roles;
    /// How far the others have come; empty where this member does not lead.
    fn progress(&self) -> BTreeMap<u64, Progress>;
    /// By how much members' machines are ahead of the time that the voters agree on, in ms, as far as this member knows.
    fn clocks_ahead_ms(&self) -> BTreeMap<u64, i64>;
    /// Hands the lead to a member, or to the voter that has come farthest. Returns when that one leads.
    fn transfer(&self, to: Option<u64>) -> BoxFuture<'_, std::result::Result<(), String>>;
}

/// The members as a replica knows them.
#[derive(Debug, Clone)]
pub struct ReplicatedCluster {
    name: String,
    replica: Replica,
    hand_over: HandOver,
    clock: AgreedClock,
}

impl ReplicatedCluster {
    /// A view through this replica; `name` is the cluster's.
    #[must_use]
    pub fn new(name: String, replica: Replica, hand_over: HandOver, clock: AgreedClock) -> Self {
        Self {
            name,
            replica,
            hand_over,
            clock,
        }
    }
}

impl ClusterView for ReplicatedCluster {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn roles(&self) -> Roles {
        let membership = self.replica.membership();
        let now = self.replica.leadership();
        let now = now.borrow();
        Roles {
            leader: now.leader,
            voters: membership.voters.into_keys().collect(),
            learners: membership.learners.into_keys().collect(),
            own: self.replica.member(),
            term: now.term,
        }
    }

    fn progress(&self) -> BTreeMap<u64, Progress> {
        let ms = |ago: std::time::Duration| u64::try_from(ago.as_millis()).unwrap_or(u64::MAX);
        let others = self.replica.progress().into_iter();
        others
            .map(|(member, progress)| {
                let progress = Progress {
                    matched: progress.matched,
                    answered_ago_ms: progress.answered_ago.map(ms),
                };
                (member, progress)
            })
            .collect()
    }

    fn clocks_ahead_ms(&self) -> BTreeMap<u64, i64> {
        self.clock.ahead_ms()
    }

    fn transfer(&self, to: Option<u64>) -> BoxFuture<'_, std::result::Result<(), String>> {
        Box::pin(self.hand_over.to(to))
    }
}

impl Roles {
    /// The word for what a host is at present. A member that the log does not know yet is about to follow it.
    pub(super) fn word(&self, record: &Record, host: &HostRecord) -> &'static str {
        match host.member {
            _ if !host.is_in() => "removed",
            None => "observer",
            Some(member) if record.is_given_up(member) => "lost",
            Some(member) if self.voters.contains(&member) => "voter",
            Some(_) => "learner",
        }
    }

    /// True for the host that leads.
    pub(super) fn leads(&self, record: &HostRecord) -> bool {
        record.is_in() && record.member.is_some() && record.member == self.leader
    }
}

/// A member that left may still be known to the log for a moment, and a new one not yet.
fn members(
    record: &Record,
    roles: &Roles,
    progress: &BTreeMap<u64, Progress>,
    clocks: &BTreeMap<u64, i64>,
) -> Vec<Value> {
    let by_id: BTreeMap<u64, &HostRecord> = record.members().collect();
    let known = roles.voters.union(&roles.learners).copied();
    let all: BTreeSet<u64> = known.chain(by_id.keys().copied()).collect();
    let row = |member: u64| {
        let host = by_id.get(&member).map(|host| &host.host);
        let progress = progress.get(&member).copied().unwrap_or_default();
        let votes = roles.voters.contains(&member);
        json!({
            "member": member,
            "host": host.map(|host| &host.name),
            "site": host.map(|host| &host.site),
            "role": if votes { "voter" } else { "learner" },
            "leads": roles.leader == Some(member),
            "matched": progress.matched,
            "answered_ago_ms": progress.answered_ago_ms,
            "clock_ahead_ms": clocks.get(&member),
        })
    };
    all.into_iter().map(row).collect()
}

/// What the loss of each site would do, as the leader sees it: others do not know who answers.
fn sites(record: &Record, roles: &Roles, progress: &BTreeMap<u64, Progress>) -> Value {
    if roles.leader != Some(roles.own) {
        return Value::Null;
    }
    let alive = |member: u64| {
        let answered = progress.get(&member).and_then(|it| it.answered_ago_ms);
        member == roles.own || answered.is_some_and(|ago| ago <= SILENCE_MAX_MS)
    };
    let candidates: Vec<Candidate> = record
        .members()
        .map(|(member, record)| Candidate {
            member,
            address: record.host.address.clone(),
            site: record.host.site.clone(),
            pin: Pin::Auto,
            alive: alive(member),
            // Only who becomes a voter depends on these two.
            caught_up: true,
        })
        .collect();
    let known = policy::Roles {
        leader: roles.own,
        voters: roles.voters.clone(),
        learners: roles.learners.clone(),
        addresses: BTreeMap::new(),
        changing: false,
    };
    json!(losses(&candidates, &known))
}

pub(super) async fn raft(State(api): State<Arc<Api>>) -> Json<Value> {
    let (roles, progress) = (api.deps.cluster.roles(), api.deps.cluster.progress());
    let clocks = api.deps.cluster.clocks_ahead_ms();
    let (members, sites) = api.store.read(|record| {
        (
            members(record, &roles, &progress, &clocks),
            sites(record, &roles, &progress),
        )
    });
    Json(json!({
        "term": roles.term,
        "leader": roles.leader,
        "answered_by": roles.own,
        "members": members,
        "sites": sites,
    }))
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct TransferBody {
    to: Option<String>,
}

pub(super) async fn transfer(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<Value>> {
    let body: TransferBody = parse(&body)?;
    let conflict = |detail: String| ApiError::new(StatusCode::CONFLICT, detail);
    let roles = api.deps.cluster.roles();
    let to = match &body.to {
        None => None,
        Some(name) => {
            let voter = api.find(|record| {
                let host = host_named(record, name)?;
                let id = host.host.server.clone();
                let member = host.member.filter(|_| host.is_in());
                let member = member.ok_or_else(|| ApiError::from(Rejection::NotEligible(id)))?;
                if !roles.voters.contains(&member) {
                    return Err(conflict(format!(
                        "host {name} does not vote at present: only voters can lead"
                    )));
                }
                Ok(member)
            });
            Some(voter.await?)
        }
    };
    if roles.leader != Some(roles.own) {
        let leader = roles.leader.and_then(|leader| name_of(&api, leader));
        return Err(conflict(match leader {
            Some(leader) => format!("host {leader} leads and could not be asked: try again, or ask its API"),
            None => "this host does not lead, and does not know who does: try again in a moment".to_owned(),
        }));
    }
    // The signature is good for one transfer: whoever saw it cannot order another.
    api.propose(&caller, Command::PassTime).await?;
    let transferred = api.deps.cluster.transfer(to).await;
    transferred.map_err(|why| conflict(format!("the lead stays where it is: {why}")))?;
    // Who is not named is known a moment later at times.
    let other = || {
        api.deps
            .cluster
            .roles()
            .leader
            .filter(|leader| *leader != roles.own)
    };
    let leader = to.or_else(other);
    let name = leader.and_then(|leader| name_of(&api, leader));
    Ok(Json(json!({ "leader": leader, "host": name })))
}

fn name_of(api: &Api, member: u64) -> Option<String> {
    api.store
        .read(|record| record.member(member).map(|host| host.host.name.clone()))
}

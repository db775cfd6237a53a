//! When the majority of the voters is gone for good: one member goes on alone, with what it has.
//!
//! This works on the store of a member that is not running, and by hand only: what other members had
//! acknowledged and this one never got is lost, and a member of the old majority that is still alive would
//! go on as a second cluster. Who calls [`recover`] has asked for more than a key press.

use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use openraft::{BasicNode, EntryPayload, LogId, Vote};
use std::collections::{BTreeMap, BTreeSet};

use crate::config::Config;
use crate::error::Error;
use crate::health::Shared;
use crate::machine::StateMachine;
use crate::open::{self, Opened};
use crate::raft::{Commands, LeaderId, RaftEntry, Types};
use crate::state_store::RowChange;

/// How far the store of a member has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Last log index that it has; what came after it is lost when this member goes on alone.
    pub last_index: Option<u64>,
    /// Term of that entry: of two members, the one with the later term has more, then the one with the
    /// higher index.
    pub last_term: Option<u64>,
    /// Highest term in which it has voted.
    pub term: u64,
    /// Voters as far as this member knows.
    pub voters: BTreeSet<u64>,
    /// Where each member is, those without a vote included.
    pub addresses: BTreeMap<u64, String>,
}

/// Takes everything for granted: only the log is looked at.
struct NoMachine;

impl StateMachine for NoMachine {
    fn apply(&mut self, _command: &[u8]) -> Vec<u8> {
        Vec::new()
    }

    fn changed_rows(&mut self) -> Vec<RowChange> {
        Vec::new()
    }

    fn load(&mut self, rows: &mut dyn Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Result<(), String> {
        rows.for_each(drop);
        Ok(())
    }

    fn applied(&mut self, _index: u64) {}
}

/// Says how far the store of a member has come, without changing it.
///
/// # Errors
/// As [`crate::Replica::open`].
pub async fn inspect(config: Config) -> Result<Condition, Error> {
    let (mut opened, _) = open_store(config).await?;
    let condition = condition(&mut opened).await;
    close(opened).await;
    condition
}

/// Makes the member of this store the only voter and the only member of its cluster. Open the replica
/// afterwards: it leads at once, with everything that is in its log. `first` are commands that are written with
/// the change, in one piece, and applied before any other.
///
/// # Errors
/// As [`crate::Replica::open`]; `Membership` when the store is empty: there is nothing to go on with.
pub async fn recover(config: Config, first: Vec<Vec<u8>>) -> Result<Condition, Error> {
    let (member, address) = (config.node_id, config.address.clone());
    let (mut opened, shared) = open_store(config).await?;
    let before = condition(&mut opened).await;
    let result = match &before {
        Ok(before) => go_alone(&mut opened, before, (member, address), first, &shared).await,
        Err(_) => Ok(()),
    };
    close(opened).await;
    result.and(before)
}

pub(crate) async fn open_store(config: Config) -> Result<(Opened, Shared), Error> {
    config.check()?;
    let shared = Shared::new();
    let opened = Box::pin(open::open(config, Box::new(NoMachine), &shared)).await?;
    Ok((opened, shared))
}

pub(crate) async fn close(opened: Opened) {
    opened.log.stop().await;
    opened.state.stop().await;
}

pub(crate) fn failed(error: impl std::fmt::Display) -> Error {
    Error::Failed(error.to_string())
}

async fn condition(opened: &mut Opened) -> Result<Condition, Error> {
    let last = opened.log.get_log_state().await.map_err(failed)?.last_log_id;
    let vote = opened.log.read_vote().await.map_err(failed)?;
    Ok(Condition {
        last_index: last.map(|id| id.index),
        last_term: last.map(|id| id.leader_id.term),
        term: vote.map_or(0, |vote| vote.leader_id.term),
        voters: opened.members.voter_ids().collect(),
        addresses: opened
            .members
            .nodes()
            .map(|(member, node)| (*member, node.addr.clone()))
            .collect(),
    })
}

async fn go_alone(
    opened: &mut Opened,
    before: &Condition,
    (member, address): (u64, String),
    first: Vec<Vec<u8>>,
    shared: &Shared,
) -> Result<(), Error> {
    let Some(last_index) = before.last_index else {
        let reason = "the store is empty: there is nothing to go on with";
        return Err(Error::Membership(reason.to_owned()));
    };
    // As if this member had won an election and had been told so at once.
    let leader_id = LeaderId {
        term: before.term.max(before.last_term.unwrap_or(0)) + 1,
        node_id: member,
    };
    let vote = Vote {
        leader_id,
        committed: true,
    };
    opened.log.save_vote(&vote).await.map_err(failed)?;
    let nodes = BTreeMap::from([(member, BasicNode { addr: address })]);
    let members = openraft::Membership::new(vec![BTreeSet::from([member])], nodes);
    let payloads = [
        EntryPayload::Membership(members.map_err(failed)?),
        EntryPayload::Normal(Commands::new(&first)),
    ];
    let entries = (last_index + 1..)
        .zip(payloads)
        .map(|(index, payload)| RaftEntry {
            log_id: LogId { leader_id, index },
            payload,
        });
    let (done, written) = Types::oneshot();
    let appended = opened.log.append(entries, IOFlushed::signal(done)).await;
    appended.map_err(failed)?;
    written.await.map_err(failed)?.map_err(failed)?;
    shared
        .failure()
        .map_or(Ok(()), |reason| Err(Error::Failed(reason)))
}

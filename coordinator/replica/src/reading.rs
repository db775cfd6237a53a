//! A store that cannot be written, since its disk is full: what it holds goes into the machine, for readers.
//!
//! Nothing is written, and nothing is said to other members: what must be on the disk before it is said cannot be put
//! there. What the database writes when it opens its files stays in memory.

use futures_util::{StreamExt as _, TryStreamExt as _};
use openraft::storage::{RaftLogReader as _, RaftLogStorage as _, RaftStateMachine as _};

use crate::config::Config;
use crate::error::Error;
use crate::health::Shared;
use crate::machine::StateMachine;
use crate::membership::Membership;
use crate::open;
use crate::recovery::{close, failed};
use crate::snapshot::MemorySnapshots;
use crate::storage::{Directory, Storage};

/// What a store that was only read knows besides the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// Members as of the newest entry of the log.
    pub members: Membership,
    /// The last term in which this member voted.
    pub term: u64,
}

/// Brings the machine to where the member of this store is known to have come. The store lies in a directory.
///
/// # Errors
/// As [`crate::Replica::open`], and `Missing` when nothing was stored before.
pub async fn read(mut config: Config, machine: Box<dyn StateMachine>) -> Result<Read, Error> {
    config.check()?;
    let own = config.node_id;
    if let Storage::Files { directory } = config.storage {
        let directory = Directory::open(directory)?;
        let (log, state) = directory.unwritten(&config.cluster, config.node_id)?;
        config.storage = Storage::Backend {
            log: Box::new(log),
            state: Box::new(state),
            snapshots: MemorySnapshots::default(),
        };
    }
    let shared = Shared::new();
    let mut opened = Box::pin(open::open(config, machine, &shared)).await?;
    let read = async {
        let vote = opened.log.read_vote().await.map_err(failed)?;
        let (applied, _) = opened.machine.applied_state().await.map_err(failed)?;
        let voters: Vec<u64> = opened.members.voter_ids().collect();
        let committed = if voters == [own] {
            opened.log.get_log_state().await.map_err(failed)?.last_log_id
        } else {
            opened.log.read_committed().await.map_err(failed)?
        };
        let next = applied.map_or(0, |id| id.index + 1);
        let end = committed.map_or(0, |id| id.index + 1);
        let entries = opened.log.entries_stream(next..end).await;
        let entries = entries.map_ok(|entry| (entry, None)).boxed();
        opened.machine.apply(entries).await.map_err(failed)?;
        Ok(Read {
            members: Membership::of(&opened.members),
            term: vote.map_or(0, |vote| vote.leader_id.term),
        })
    };
    let read = read.await;
    close(opened).await;
    read
}

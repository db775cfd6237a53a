//! A snapshot as a file of its own: written by a member that runs, looked at anywhere, and the beginning of
//! a new store where all members are lost.
//!
//! The file is what members send to each other (see `snapshot`), with its checksum, and not encrypted:
//! whoever takes it off the machine sees to that. The same cluster goes on after [`restore`], with one
//! member; what was acknowledged after the snapshot is lost.

use openraft::storage::{RaftLogReader, RaftLogStorage};
use openraft::{BasicNode, StoredMembership, Vote};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::Replica;
use crate::config::Config;
use crate::error::Error;
use crate::open::Opened;
use crate::raft::{LeaderId, RaftLogId};
use crate::recovery::{close, failed, open_store};
use crate::snapshot::{self, Header, ReadError, SnapshotData};
use crate::state_store::Applied;
use crate::storage::{fault_in, replace_file};

/// Bytes that are copied at once.
const PIECE_BYTES: usize = 1024 * 1024;

/// What a snapshot file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// Name of the cluster.
    pub cluster: String,
    /// Index of the last command in it.
    pub last_index: Option<u64>,
    /// Members at that time.
    pub members: BTreeSet<u64>,
    /// Rows of the state.
    pub rows: u64,
    /// Size of the file.
    pub size_bytes: u64,
}

/// Reads a whole snapshot file and checks it. Blocks while it reads.
///
/// # Errors
/// `Io`, `Damaged` or `Newer`, naming the file.
pub fn inspect(file: &Path) -> Result<Contents, Error> {
    let io = |source| Error::Io {
        file: file.to_owned(),
        source,
    };
    let data = SnapshotData::File(Arc::new(File::open(file).map_err(io)?));
    let read = |error: ReadError| match error {
        ReadError::Fault(fault) => fault_in(file, fault),
        ReadError::Io(source) => io(source),
    };
    let mut rows = 0;
    let mut reader = data.rows().map_err(read)?;
    while reader.read_row().map_err(read)?.is_some() {
        rows += 1;
    }
    let (size_bytes, _) = data.size_and_crc().map_err(io)?;
    let header = reader.header();
    Ok(Contents {
        cluster: header.cluster.clone(),
        last_index: header.applied.last.map(|id| id.index),
        members: header.applied.membership.nodes().map(|(id, _)| *id).collect(),
        rows,
        size_bytes,
    })
}

impl Replica {
    /// Writes a snapshot of everything applied here so far into a file that only its owner may read. Call
    /// [`Replica::linearizable`] first to have everything acknowledged in it.
    ///
    /// # Errors
    /// `Io`, `Timeout`, `Stopped` or `Failed`.
    pub async fn save_snapshot(&self, to: PathBuf) -> Result<Contents, Error> {
        self.snapshot().await?;
        let (place, file) = (self.0.receiver.place().clone(), to.clone());
        let saved = self.0.network.writer().blocking(move || {
            let save = || {
                let data = place.current()?.ok_or(io::ErrorKind::NotFound)?;
                replace_file(&file, |out| copy(&data, out))
            };
            save().map_err(|source| Error::Io {
                file: file.clone(),
                source,
            })?;
            inspect(&file)
        });
        saved.await.map_err(failed)?
    }
}

fn copy(data: &SnapshotData, out: &mut dyn io::Write) -> io::Result<()> {
    let mut offset = 0;
    loop {
        let piece = data.read_at(offset, PIECE_BYTES)?;
        if piece.is_empty() {
            return Ok(());
        }
        out.write_all(&piece)?;
        offset += piece.len() as u64;
    }
}

/// Begins an empty store with a snapshot file; the member of `config` is the only one afterwards. Open the
/// replica then: it leads at once.
///
/// # Errors
/// As [`crate::Replica::open`] for the store; `Io`, `Damaged`, `Newer` or `Foreign` for the file;
/// `Membership` when the store is not empty.
pub async fn restore(config: Config, file: PathBuf) -> Result<Contents, Error> {
    let (writer, cluster) = (config.writer, config.cluster.clone());
    let (member, address) = (config.node_id, config.address.clone());
    let looked_at = file.clone();
    let contents = writer.blocking(move || inspect(&looked_at)).await;
    let contents = contents.map_err(failed)??;
    if contents.cluster != cluster {
        return Err(Error::Foreign {
            file,
            found: format!("cluster {:?}", contents.cluster),
            expected: format!("cluster {cluster:?}"),
        });
    }
    let (mut opened, _) = open_store(config).await?;
    let begun = begin(&mut opened, &file, member, address).await;
    close(opened).await;
    begun.map(|()| contents)
}

async fn begin(opened: &mut Opened, file: &Path, member: u64, address: String) -> Result<(), Error> {
    let log = opened.log.get_log_state().await.map_err(failed)?;
    let vote = opened.log.read_vote().await.map_err(failed)?;
    if log.last_log_id.is_some() || vote.is_some() || opened.place.current().map_err(failed)?.is_some() {
        let reason = "the store is not empty; restore into a new folder";
        return Err(Error::Membership(reason.to_owned()));
    }
    let io = |source| Error::Io {
        file: file.to_owned(),
        source,
    };
    let data = SnapshotData::File(Arc::new(File::open(file).map_err(io)?));
    let mut reader = data.rows().map_err(|error| io(error.into()))?;
    let header = Header {
        cluster: reader.header().cluster.clone(),
        applied: alone(&reader.header().applied, member, address)?,
    };
    let Some(last) = header.applied.last else {
        let reason = "the snapshot is empty: there is nothing to go on with";
        return Err(Error::Membership(reason.to_owned()));
    };
    let applied = header.applied.clone();
    // First the vote: a store that was left half way says by it that it was used.
    let term = last.leader_id.term + 1;
    let leader_id = LeaderId {
        term,
        node_id: member,
    };
    let vote = Vote {
        leader_id,
        committed: false,
    };
    opened.log.save_vote(&vote).await.map_err(failed)?;
    let replaced = opened.place.replace(|out| {
        let mut fault = None;
        let rows = std::iter::from_fn(|| {
            reader.next_row().unwrap_or_else(|error| {
                fault = Some(error);
                None
            })
        });
        snapshot::write(out, &header, rows)?;
        fault.map_or(Ok(()), Err)
    });
    replaced.map_err(io)?;
    let stored = opened.place.current().map_err(io)?;
    let stored = stored.ok_or_else(|| failed("the snapshot just written is gone"))?;
    opened.state.replace(stored, applied).await.map_err(failed)?;
    opened.log.purge(last).await.map_err(failed)
}

/// The same state with one member.
fn alone(applied: &Applied, member: u64, address: String) -> Result<Applied, Error> {
    let nodes = BTreeMap::from([(member, BasicNode { addr: address })]);
    let members = openraft::Membership::new(vec![BTreeSet::from([member])], nodes);
    let last: Option<RaftLogId> = applied.last;
    Ok(Applied {
        last,
        membership: StoredMembership::new(last, members.map_err(failed)?),
    })
}

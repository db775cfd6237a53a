//! A snapshot as a file of its own: written by a member that runs, looked at anywhere, and the beginning of
//! a new store where all members are lost.
//!
//! The bytes are what members send to each other (see `snapshot`), with their checksum, and not encrypted:
//! whoever takes them off the machine sees to that. The same cluster goes on after [`restore`], with one
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
use crate::snapshot::{self, Header, ReadError, SnapshotData, SnapshotReader};
use crate::state_store::{Applied, RowChange};
use crate::storage::{Writer, fault_in};

/// Bytes that are copied at once.
const PIECE_BYTES: usize = 1024 * 1024;

/// What a snapshot holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// Name of the cluster.
    pub cluster: String,
    /// Index of the last command in it.
    pub last_index: Option<u64>,
    /// Members at that time.
    pub members: BTreeSet<u64>,
    /// Rows of the state by table.
    pub tables: BTreeMap<u8, u64>,
    /// Size of the file.
    pub size_bytes: u64,
}

impl Contents {
    /// Rows of the state.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.tables.values().sum()
    }
}

/// A row of a snapshot: table, key, value.
pub type Row = (u8, Vec<u8>, Vec<u8>);

/// The rows of a snapshot file, one by one. It says that the file is sound only at its end: [`Rows::finish`].
pub struct Rows {
    file: PathBuf,
    data: SnapshotData,
    reader: SnapshotReader,
    tables: BTreeMap<u8, u64>,
    fault: Option<Error>,
}

impl std::fmt::Debug for Rows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rows({})", self.file.display())
    }
}

fn read_error(file: &Path, error: ReadError) -> Error {
    match error {
        ReadError::Fault(fault) => fault_in(file, fault),
        ReadError::Io(source) => Error::Io {
            file: file.to_owned(),
            source,
        },
    }
}

impl Rows {
    /// Opens a snapshot file. It blocks, as all reading of it does.
    ///
    /// # Errors
    /// `Io`, `Damaged` or `Newer`, naming the file.
    pub fn open(file: &Path) -> Result<Self, Error> {
        let opened = File::open(file).map_err(|error| read_error(file, error.into()))?;
        Self::of(SnapshotData::File(Arc::new(opened)), file.to_owned())
    }

    fn of(data: SnapshotData, file: PathBuf) -> Result<Self, Error> {
        let reader = data.rows().map_err(|error| read_error(&file, error))?;
        Ok(Self {
            file,
            data,
            reader,
            tables: BTreeMap::new(),
            fault: None,
        })
    }

    /// Reads on to the end, and says what was in it.
    ///
    /// # Errors
    /// `Io`, `Damaged` or `Newer`, naming the file: what was read of it is worth nothing.
    pub fn finish(mut self) -> Result<Contents, Error> {
        while self.next().is_some() {}
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let size = self.data.size_and_crc();
        let (size_bytes, _) = size.map_err(|error| read_error(&self.file, error.into()))?;
        let header = self.reader.header();
        Ok(Contents {
            cluster: header.cluster.clone(),
            last_index: header.applied.last.map(|id| id.index),
            members: header.applied.membership.nodes().map(|(id, _)| *id).collect(),
            tables: self.tables,
            size_bytes,
        })
    }
}

impl Iterator for Rows {
    type Item = (u8, Vec<u8>, Vec<u8>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.fault.is_some() {
            return None;
        }
        match self.reader.read_row() {
            Ok(row) => {
                let row = row?;
                *self.tables.entry(row.table).or_default() += 1;
                Some((row.table, row.key, row.value))
            }
            Err(error) => {
                self.fault = Some(read_error(&self.file, error));
                None
            }
        }
    }
}

/// A snapshot that is on the disk of a running member, checked; it stays readable when a newer one takes its
/// place.
#[derive(Debug)]
pub struct Saved {
    contents: Contents,
    data: SnapshotData,
    writer: Writer,
}

impl Saved {
    /// What it holds.
    #[must_use]
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// The bytes from `offset` on, up to a mebibyte of them; none at the end.
    ///
    /// # Errors
    /// What the disk says.
    pub async fn read_at(&self, offset: u64) -> io::Result<Vec<u8>> {
        let data = self.data.clone();
        self.writer
            .blocking(move || data.read_at(offset, PIECE_BYTES))
            .await?
    }
}

impl Replica {
    /// Takes a snapshot of everything applied here so far. Call [`Replica::linearizable`] first to have
    /// everything acknowledged in it.
    ///
    /// # Errors
    /// `Io`, `Damaged`, `Timeout`, `Stopped` or `Failed`.
    pub async fn save(&self) -> Result<Saved, Error> {
        self.snapshot().await?;
        let (place, writer) = (self.0.receiver.place().clone(), self.0.network.writer());
        let checked = writer.blocking(move || {
            let file = place.file();
            let current = place
                .current()
                .and_then(|data| data.ok_or(io::ErrorKind::NotFound.into()));
            let data = current.map_err(|source| Error::Io {
                file: file.clone(),
                source,
            })?;
            Ok((Rows::of(data.clone(), file)?.finish()?, data))
        });
        let (contents, data) = checked.await.map_err(failed)??;
        Ok(Saved {
            contents,
            data,
            writer,
        })
    }
}

/// Begins an empty store with a snapshot file; the member of `config` is the only one afterwards. `changes`
/// replace, add and delete rows on the way. Open the replica then: it leads at once.
///
/// # Errors
/// As [`crate::Replica::open`] for the store; `Io`, `Damaged`, `Newer` or `Foreign` for the file;
/// `Membership` when the store is not empty.
pub async fn restore(config: Config, file: PathBuf, changes: Vec<RowChange>) -> Result<Contents, Error> {
    let (writer, cluster) = (config.writer, config.cluster.clone());
    let (member, address) = (config.node_id, config.address.clone());
    let looked_at = file.clone();
    let contents = writer.blocking(move || Rows::open(&looked_at)?.finish()).await;
    let contents = contents.map_err(failed)??;
    if contents.cluster != cluster {
        return Err(Error::Foreign {
            file,
            found: format!("cluster {:?}", contents.cluster),
            expected: format!("cluster {cluster:?}"),
        });
    }
    let (mut opened, _) = open_store(config).await?;
    let begun = begin(&mut opened, &file, member, address, changes).await;
    close(opened).await;
    begun.map(|()| contents)
}

async fn begin(
    opened: &mut Opened,
    file: &Path,
    member: u64,
    address: String,
    changes: Vec<RowChange>,
) -> Result<(), Error> {
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
        snapshot::write(out, &header, changed(rows, changes))?;
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

/// The rows with the changes, ascending as before.
fn changed(
    rows: impl Iterator<Item = snapshot::Row>,
    changes: Vec<RowChange>,
) -> impl Iterator<Item = snapshot::Row> {
    let changes = changes.into_iter().map(|row| ((row.table, row.key), row.value));
    let mut changes: BTreeMap<_, _> = changes.collect();
    let mut rows = rows.peekable();
    std::iter::from_fn(move || {
        loop {
            let next = rows.peek().map(|row| (row.table, &row.key));
            let first = changes.first_key_value().map(|((table, key), _)| (*table, key));
            match (next, first) {
                (next, Some(first)) if next.is_none_or(|next| first <= next) => {
                    let replaced = next == Some(first);
                    let ((table, key), value) = changes.pop_first()?;
                    if replaced {
                        rows.next();
                    }
                    if let Some(value) = value {
                        return Some(snapshot::Row { table, key, value });
                    }
                }
                _ => return rows.next(),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_replace_add_and_delete_rows_in_order() {
        let row = |table, key: u8, value: u8| snapshot::Row {
            table,
            key: vec![key],
            value: vec![value],
        };
        let change = |table, key: u8, value: Option<u8>| RowChange {
            table,
            key: vec![key],
            value: value.map(|value| vec![value]),
        };
        let rows = vec![row(1, 1, 1), row(1, 3, 3), row(2, 1, 4), row(2, 2, 5)];
        let changes = vec![
            change(3, 1, Some(9)),
            change(1, 2, Some(2)),
            change(1, 3, Some(30)),
            change(2, 1, None),
            change(2, 9, None),
            change(0, 1, Some(0)),
        ];
        let found: Vec<_> = changed(rows.into_iter(), changes).collect();
        let expected = [
            row(0, 1, 0),
            row(1, 1, 1),
            row(1, 2, 2),
            row(1, 3, 30),
            row(2, 2, 5),
            row(3, 1, 9),
        ];
        assert_eq!(found, expected);
    }
}

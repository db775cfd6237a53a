//! `state.redb`: the rows of the state, one redb table under keys of (table byte, key), and its worker.
//!
//! Rows are written without fsync. After a crash the file is somewhat older, says how old, and the log is
//! applied again from there; so the file is forced to the disk before the log is purged, before a snapshot
//! counts, at an orderly end, and whenever [`UNFORCED_BYTES_MAX`] or [`UNFORCED_WRITES_MAX`] have gathered.

use redb::{Durability, ReadTransaction, ReadableDatabase, TableDefinition};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::oneshot;

use crate::error::Error;
use crate::format::{Fault, decode_applied, encode_applied, seal, unseal};
use crate::health::Shared;
use crate::raft::{RaftLogId, RaftMembership};
use crate::snapshot::{Row, SnapshotData};
use crate::storage::{Closed, Lane, META, StoreFile, Worker};

const ROWS: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("rows");
const APPLIED: &str = "applied";

/// Bytes of rows after which a commit is forced, since unforced ones cost memory in redb.
const UNFORCED_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Writes of rows after which a commit is forced. Each has some 2,000 commands, which a restart after a crash applies
/// again, however few bytes they changed.
const UNFORCED_WRITES_MAX: usize = 8;

/// One row that a command changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowChange {
    /// Number of the table.
    pub table: u8,
    /// Key within the table.
    pub key: Vec<u8>,
    /// The new value; `None` deletes the row.
    pub value: Option<Vec<u8>>,
}

/// How far the state has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    pub(crate) last: Option<RaftLogId>,
    pub(crate) membership: RaftMembership,
}

type Reply<T> = oneshot::Sender<io::Result<T>>;

/// What the worker of the state file is asked to do.
pub(crate) enum Job {
    Write {
        rows: Vec<RowChange>,
        applied: Applied,
    },
    Force(Reply<()>),
    View(Reply<ReadTransaction>),
    Replace {
        snapshot: SnapshotData,
        applied: Applied,
        reply: Reply<()>,
    },
}

/// The way to the state file.
#[derive(Debug, Clone)]
pub(crate) struct StateLane {
    lane: Lane<StateFile>,
    /// One more than the index up to which the file on the disk holds the state.
    durable_end: Arc<AtomicU64>,
}

impl StateLane {
    pub(crate) fn new(lane: Lane<StateFile>, durable_end: Arc<AtomicU64>) -> Self {
        Self { lane, durable_end }
    }

    /// Queues rows to be written. A later failure shows in the replica's health; the log has them anyway.
    pub(crate) async fn write(&self, rows: Vec<RowChange>, applied: Applied) -> io::Result<()> {
        Ok(self.lane.submit(Job::Write { rows, applied }).await?)
    }

    /// Returns once everything applied up to `index` is on the disk; its rows must be queued. The library purges the
    /// log only up to a snapshot, and before one is built they are.
    pub(crate) async fn make_durable(&self, index: u64) -> io::Result<()> {
        if self.durable_end.load(Ordering::Acquire) > index {
            return Ok(());
        }
        self.force().await
    }

    pub(crate) async fn force(&self) -> io::Result<()> {
        self.ask(Job::Force).await
    }

    /// Orders a view of the state after all writes queued so far; later ones do not show in it.
    pub(crate) async fn view(&self) -> io::Result<oneshot::Receiver<io::Result<ReadTransaction>>> {
        let (reply, answer) = oneshot::channel();
        self.lane.submit(Job::View(reply)).await?;
        Ok(answer)
    }

    /// Replaces all rows by those of a snapshot, durably.
    pub(crate) async fn replace(&self, snapshot: SnapshotData, applied: Applied) -> io::Result<()> {
        self.ask(|reply| Job::Replace {
            snapshot,
            applied,
            reply,
        })
        .await
    }

    pub(crate) async fn stop(&self) {
        self.lane.stop().await;
    }

    async fn ask<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> io::Result<T> {
        let (reply, answer) = oneshot::channel();
        self.lane.submit(job(reply)).await?;
        answer.await.map_err(|_| Closed)?
    }
}

/// The state file, owned by its worker.
#[derive(Debug)]
pub(crate) struct StateFile {
    file: StoreFile,
    shared: Shared,
    durable_end: Arc<AtomicU64>,
    written_end: u64,
    unforced_bytes: usize,
    unforced_writes: usize,
    failure: Option<String>,
}

impl StateFile {
    pub(crate) fn new(file: StoreFile, shared: Shared, durable_end: Arc<AtomicU64>) -> Self {
        let written_end = durable_end.load(Ordering::Acquire);
        Self {
            file,
            shared,
            durable_end,
            written_end,
            unforced_bytes: 0,
            unforced_writes: 0,
            failure: None,
        }
    }

    /// Runs a write unless one failed before, and remembers the first failure.
    fn guarded(&mut self, write: impl FnOnce(&mut Self) -> Result<(), redb::Error>) -> io::Result<()> {
        if let Some(reason) = &self.failure {
            return Err(io::Error::other(reason.clone()));
        }
        write(self).map_err(|error| {
            let reason = self.file.error(error).to_string();
            self.shared.fail(&reason);
            self.failure = Some(reason.clone());
            io::Error::other(reason)
        })
    }

    fn commit(&mut self, writes: &[(Vec<RowChange>, Applied)], force: bool) -> Result<(), redb::Error> {
        let mut transaction = self.file.database.begin_write()?;
        let bytes: usize = writes.iter().flat_map(|(rows, _)| rows).map(size_of_row).sum();
        let force = force
            || self.unforced_bytes + bytes > UNFORCED_BYTES_MAX
            || self.unforced_writes + writes.len() >= UNFORCED_WRITES_MAX;
        if !force {
            transaction.set_durability(Durability::None)?;
        }
        if let Some((_, applied)) = writes.last() {
            let mut table = transaction.open_table(ROWS)?;
            let mut key = Vec::new();
            for row in writes.iter().flat_map(|(rows, _)| rows) {
                key.clear();
                key.push(row.table);
                key.extend_from_slice(&row.key);
                match &row.value {
                    Some(value) => drop(table.insert(key.as_slice(), seal(value).as_slice())?),
                    None => drop(table.remove(key.as_slice())?),
                }
            }
            let mut meta = transaction.open_table(META)?;
            let sealed = encode_applied(applied.last.as_ref(), &applied.membership);
            meta.insert(APPLIED, sealed.as_slice())?;
            self.written_end = applied.last.map_or(0, |id| id.index + 1);
        }
        transaction.commit()?;
        self.committed(force, bytes, writes.len());
        Ok(())
    }

    fn committed(&mut self, forced: bool, bytes: usize, writes: usize) {
        if forced {
            self.unforced_bytes = 0;
            self.unforced_writes = 0;
            self.durable_end.store(self.written_end, Ordering::Release);
        } else {
            self.unforced_bytes += bytes;
            self.unforced_writes += writes;
        }
    }

    fn replace(&mut self, snapshot: &SnapshotData, applied: &Applied) -> Result<(), redb::Error> {
        let mut reader = snapshot.rows().map_err(io::Error::from)?;
        let transaction = self.file.database.begin_write()?;
        {
            let mut table = transaction.open_table(ROWS)?;
            table.retain(|_, _| false)?;
            let mut key = Vec::new();
            while let Some(Row {
                table: number,
                key: rest,
                value,
            }) = reader.next_row()?
            {
                key.clear();
                key.push(number);
                key.extend_from_slice(&rest);
                table.insert(key.as_slice(), seal(&value).as_slice())?;
            }
            let mut meta = transaction.open_table(META)?;
            let sealed = encode_applied(applied.last.as_ref(), &applied.membership);
            meta.insert(APPLIED, sealed.as_slice())?;
        }
        transaction.commit()?;
        self.written_end = applied.last.map_or(0, |id| id.index + 1);
        self.committed(true, 0, 0);
        Ok(())
    }

    fn flush(&mut self, writes: &mut Vec<(Vec<RowChange>, Applied)>) {
        if !writes.is_empty() {
            // A failure shows in the health and in every later job.
            let _ = self.guarded(|state| state.commit(writes, false));
            writes.clear();
        }
    }
}

fn size_of_row(row: &RowChange) -> usize {
    row.key.len() + row.value.as_ref().map_or(0, Vec::len) + 16
}

impl Worker for StateFile {
    type Job = Job;

    fn run(&mut self, jobs: &mut Vec<Job>) {
        let mut writes = Vec::new();
        for job in jobs.drain(..) {
            if let Job::Write { rows, applied } = job {
                writes.push((rows, applied));
                continue;
            }
            self.flush(&mut writes);
            match job {
                Job::Write { .. } => {}
                Job::Force(reply) => {
                    let _ = reply.send(self.guarded(|state| state.commit(&[], true)));
                }
                Job::View(reply) => {
                    let failed = self.guarded(|_| Ok(()));
                    let view =
                        failed.and_then(|()| self.file.database.begin_read().map_err(io::Error::other));
                    let _ = reply.send(view);
                }
                Job::Replace {
                    snapshot,
                    applied,
                    reply,
                } => {
                    let _ = reply.send(self.guarded(|state| state.replace(&snapshot, &applied)));
                }
            }
        }
        self.flush(&mut writes);
    }

    fn finish(&mut self) {
        if self.durable_end.load(Ordering::Acquire) < self.written_end || self.unforced_bytes > 0 {
            let _ = self.guarded(|state| state.commit(&[], true));
        }
    }

    fn panicked(&mut self) {
        self.shared.fail("the writer of the state file panicked");
    }
}

/// Creates the tables if they are missing, and reads how far the state has come.
pub(crate) fn load(file: &StoreFile) -> Result<Applied, Error> {
    let create = || -> Result<(), redb::Error> {
        let transaction = file.database.begin_write()?;
        transaction.open_table(ROWS)?;
        transaction.commit()?;
        Ok(())
    };
    let (missing, applied) = file.read(|transaction| {
        let missing = matches!(
            transaction.open_table(ROWS),
            Err(redb::TableError::TableDoesNotExist(_))
        );
        let applied = transaction
            .open_table(META)?
            .get(APPLIED)?
            .map(|value| value.value().to_vec());
        Ok((missing, applied))
    })?;
    if missing {
        create().map_err(|error| file.error(error))?;
    }
    let Some(sealed) = applied else {
        return Ok(Applied::default());
    };
    let (last, membership) = decode_applied(&sealed).map_err(|fault| file.fault(fault))?;
    Ok(Applied { last, membership })
}

fn row_of(key: &[u8], value: &[u8]) -> Result<Row, Fault> {
    let (table, key) = key.split_first().ok_or(Fault::Damaged("a row without a table"))?;
    Ok(Row {
        table: *table,
        key: key.to_vec(),
        value: unseal(value)?.to_vec(),
    })
}

/// The rows of a view one by one; stops at the first fault, which [`Rows::fault`] then holds.
pub(crate) struct Rows<'a> {
    inner: Option<redb::Range<'a, &'static [u8], &'static [u8]>>,
    fault: Option<String>,
}

impl Rows<'_> {
    pub(crate) fn of(view: &ReadTransaction) -> Result<Self, redb::Error> {
        let table = view.open_table(ROWS)?;
        Ok(Self {
            inner: Some(table.range::<&[u8]>(..)?),
            fault: None,
        })
    }

    pub(crate) fn fault(self) -> Option<String> {
        self.fault
    }
}

impl Iterator for Rows<'_> {
    type Item = (u8, Vec<u8>, Vec<u8>);

    fn next(&mut self) -> Option<Self::Item> {
        let read = match self.inner.as_mut()?.next()? {
            Ok((key, value)) => row_of(key.value(), value.value()).map_err(|fault| fault.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match read {
            Ok(row) => Some((row.table, row.key, row.value)),
            Err(reason) => {
                self.fault = Some(reason);
                self.inner = None;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Identity;
    use crate::raft::LeaderId;
    use redb::backends::InMemoryBackend;

    /// By bytes alone, a restart had tens of thousands of commands to apply again that had changed little.
    #[test]
    fn writes_of_few_bytes_are_forced_too_but_not_each() {
        let identity = Identity {
            cluster: "one".to_owned(),
            node_id: 1,
        };
        let fsyncs: Arc<AtomicU64> = Arc::default();
        let backend = Box::new(InMemoryBackend::new());
        let file = StoreFile::open(backend, "state".into(), &identity, 1 << 20, fsyncs.clone()).unwrap();
        let durable_end: Arc<AtomicU64> = Arc::default();
        let mut state = StateFile::new(file, Shared::new(), durable_end.clone());
        let before = fsyncs.load(Ordering::Acquire);
        let writes = 10 * UNFORCED_WRITES_MAX as u64;
        for index in 0..writes {
            let rows = vec![RowChange {
                table: 1,
                key: vec![1],
                value: Some(index.to_be_bytes().to_vec()),
            }];
            let leader_id = LeaderId { term: 1, node_id: 1 };
            let applied = Applied {
                last: Some(RaftLogId { leader_id, index }),
                ..Applied::default()
            };
            state.run(&mut vec![Job::Write { rows, applied }]);
            let behind = index + 1 - durable_end.load(Ordering::Acquire);
            assert!(
                behind < UNFORCED_WRITES_MAX as u64,
                "write {index}: {behind} behind"
            );
        }
        let forced = fsyncs.load(Ordering::Acquire) - before;
        assert!((10..=writes / 3).contains(&forced), "{forced} of {writes}");
    }
}

//! `raft-log.redb` and its worker: all writes that wait become one transaction and one fsync.

use openraft::EntryPayload;
use openraft::storage::IOFlushed;
use redb::{Durability, ReadableTable, TableDefinition};
use std::io;
use std::ops::Range;
use std::time::Duration;
use tokio::sync::oneshot;

use super::SharedTail;
use crate::error::Error;
use crate::faults::Faults;
use crate::format::{
    decode_entry, decode_lease, decode_log_id, decode_vote, encode_entry_into, encode_lease, encode_log_id,
    encode_vote,
};
use crate::health::{Shared, count};
use crate::raft::{RaftEntry, RaftLogId, RaftMembership, RaftVote, Types};
use crate::storage::{META, StoreFile, Worker};

const LOG: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("log");
const VOTE: &str = "vote";
const PURGED: &str = "purged";
const COMMITTED: &str = "committed";
const LEASE: &str = "lease";

/// One commit of so many has the committed index, and the last one: a restart finds it out by itself, and each commit
/// that leaves it out writes a table less.
const COMMITS_PER_COMMITTED: u32 = 64;

type Reply<T> = oneshot::Sender<io::Result<T>>;

/// What the worker of the log file is asked to do.
pub(crate) enum Job {
    Append {
        entries: Vec<RaftEntry>,
        callback: IOFlushed<Types>,
    },
    Vote {
        vote: RaftVote,
        reply: Reply<()>,
    },
    /// For how long answers bind this member.
    Lease {
        lease: Duration,
        reply: Reply<()>,
    },
    Truncate {
        from: u64,
        reply: Reply<()>,
    },
    Purge {
        upto: RaftLogId,
        reply: Reply<()>,
    },
    Committed(Option<RaftLogId>),
    /// At least the first entry, and no more than `bytes_max` take. Only what is on the disk is read: entries that a
    /// write has yet to bring there are in memory.
    Read {
        range: Range<u64>,
        bytes_max: usize,
        reply: Reply<Vec<RaftEntry>>,
    },
}

impl Job {
    /// Whether someone relies on this write being on the disk. A purge and the committed index are not
    /// forced: older values of theirs are true as well.
    fn must_be_durable(&self, faults: Faults) -> bool {
        match self {
            Self::Append { .. } => !faults.acknowledge_before_fsync,
            Self::Vote { .. } => !faults.two_votes_in_a_term,
            Self::Truncate { .. } | Self::Lease { .. } => true,
            Self::Purge { .. } | Self::Committed(_) | Self::Read { .. } => false,
        }
    }

    fn answer(self, result: &Result<(), String>) {
        let result = result.clone().map_err(io::Error::other);
        match self {
            Self::Append { callback, .. } => callback.io_completed(result),
            Self::Vote { reply, .. }
            | Self::Lease { reply, .. }
            | Self::Truncate { reply, .. }
            | Self::Purge { reply, .. } => {
                // An error means that nobody waits any more.
                let _ = reply.send(result);
            }
            Self::Committed(_) | Self::Read { .. } => {}
        }
    }
}

/// What the file holds at start.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    pub(crate) vote: Option<RaftVote>,
    /// For how long answers bound this member at last; none in a file of a version that did not say.
    pub(crate) lease: Option<Duration>,
    pub(crate) purged: Option<RaftLogId>,
    pub(crate) committed: Option<RaftLogId>,
    pub(crate) last: Option<RaftLogId>,
    /// Members as of the newest entry that says so, however old.
    pub(crate) members: Option<RaftMembership>,
    /// Size of all entries.
    pub(crate) bytes: usize,
    /// The newest entries with their sizes, within the limit of the tail.
    pub(crate) newest: Vec<(RaftEntry, usize)>,
}

/// Bytes that an entry takes in memory, roughly.
pub(crate) fn size_in_memory(entry: &RaftEntry) -> usize {
    let payload = match &entry.payload {
        EntryPayload::Blank => 0,
        EntryPayload::Normal(commands) => commands.size_bytes(),
        EntryPayload::Membership(membership) => 100 * membership.nodes().count(),
    };
    payload + 100
}

/// The log file, owned by its worker.
#[derive(Debug)]
pub(crate) struct LogFile {
    file: StoreFile,
    tail: SharedTail,
    shared: Shared,
    /// Committed index that is not in the file yet.
    committed: Option<Option<RaftLogId>>,
    commits_without_committed: u32,
    failure: Option<String>,
    /// The bytes of one entry after the other: buffers of all sizes, freed here, would stay with the thread that made
    /// them.
    encoded: Vec<u8>,
    faults: Faults,
}

impl LogFile {
    pub(crate) fn new(file: StoreFile, tail: SharedTail, shared: Shared, faults: Faults) -> Self {
        Self {
            file,
            tail,
            shared,
            committed: None,
            commits_without_committed: 0,
            failure: None,
            encoded: Vec::new(),
            faults,
        }
    }

    fn read(&self, range: Range<u64>, bytes_max: usize) -> Result<Vec<RaftEntry>, Error> {
        let (mut entries, mut bytes) = (Vec::new(), 0);
        let fault = self.file.read(|transaction| {
            for row in transaction.open_table(LOG)?.range(range)? {
                let entry = match decode_entry(row?.1.value()) {
                    Ok(entry) => entry,
                    Err(fault) => return Ok(Some(fault)),
                };
                bytes += size_in_memory(&entry);
                if bytes > bytes_max && !entries.is_empty() {
                    break;
                }
                entries.push(entry);
            }
            Ok(None)
        })?;
        fault.map_or(Ok(entries), |fault| Err(self.file.fault(fault)))
    }

    /// Writes all of these in one transaction and answers them.
    fn flush(&mut self, writes: &mut Vec<Job>) {
        if writes.is_empty() {
            return;
        }
        for job in writes.iter() {
            if let Job::Committed(committed) = job {
                self.committed = Some(*committed);
            }
        }
        writes.retain(|job| !matches!(job, Job::Committed(_)));
        if writes.is_empty() {
            return;
        }
        let result = match &self.failure {
            // After a failed write nobody knows what the disk holds: promise nothing more.
            Some(reason) => Err(reason.clone()),
            None => self
                .commit(writes)
                .map_err(|error| self.file.error(error).to_string()),
        };
        match &result {
            Ok(()) => {
                count(&self.shared.counters.log_commits, 1);
                let ends = writes.iter().filter_map(|job| match job {
                    Job::Append { entries, .. } => entries.last().map(|entry| entry.log_id.index + 1),
                    _ => None,
                });
                // Only entries that no later job of this batch removed are still there; the tail has
                // forgotten the others already, so a too high mark does no harm to them.
                if let (Some(end), false) = (
                    ends.max(),
                    writes.iter().any(|job| matches!(job, Job::Truncate { .. })),
                ) {
                    self.tail.durable(end);
                }
            }
            Err(reason) => {
                self.shared.fail(reason);
                self.failure = Some(reason.clone());
            }
        }
        for job in writes.drain(..) {
            job.answer(&result);
        }
    }

    fn commit(&mut self, writes: &[Job]) -> Result<(), redb::Error> {
        let mut transaction = self.file.database.begin_write()?;
        if !writes.iter().any(|job| job.must_be_durable(self.faults)) {
            transaction.set_durability(Durability::None)?;
        }
        let keep = |key: &str, value: &[u8]| -> Result<(), redb::Error> {
            transaction.open_table(META)?.insert(key, value)?;
            Ok(())
        };
        {
            let mut log = transaction.open_table(LOG)?;
            for job in writes {
                match job {
                    Job::Append { entries, .. } => {
                        for entry in entries {
                            encode_entry_into(&mut self.encoded, entry);
                            log.insert(entry.log_id.index, self.encoded.as_slice())?;
                        }
                    }
                    Job::Vote { vote, .. } => keep(VOTE, &encode_vote(vote))?,
                    Job::Lease { lease, .. } => keep(LEASE, &encode_lease(*lease))?,
                    Job::Truncate { from, .. } => log.retain_in::<u64, _>(*from.., |_, _| false)?,
                    Job::Purge { upto, .. } => {
                        log.retain_in::<u64, _>(..=upto.index, |_, _| false)?;
                        keep(PURGED, &encode_log_id(Some(upto)))?;
                    }
                    Job::Committed(_) | Job::Read { .. } => {}
                }
            }
        }
        self.commits_without_committed += 1;
        let due = writes.is_empty() || self.commits_without_committed >= COMMITS_PER_COMMITTED;
        if let Some(committed) = self.committed.take_if(|_| due) {
            keep(COMMITTED, &encode_log_id(committed.as_ref()))?;
            self.commits_without_committed = 0;
        }
        transaction.commit()?;
        Ok(())
    }
}

impl Worker for LogFile {
    type Job = Job;

    fn run(&mut self, jobs: &mut Vec<Job>) {
        let mut writes = Vec::with_capacity(jobs.len());
        for job in jobs.drain(..) {
            // A read between two writes does not keep them from being one.
            if let Job::Read {
                range,
                bytes_max,
                reply,
            } = job
            {
                let _ = reply.send(self.read(range, bytes_max).map_err(io::Error::other));
            } else {
                writes.push(job);
            }
        }
        self.flush(&mut writes);
    }

    fn finish(&mut self) {
        if self.failure.is_some() || self.committed.is_none() {
            return;
        }
        if let Err(error) = self.commit(&[]) {
            tracing::warn!(%error, "the committed index was not stored; a restart finds it out again");
        }
    }

    fn panicked(&mut self) {
        self.shared.fail("the writer of the log file panicked");
    }
}

/// Creates the tables if they are missing, and reads the whole log: every entry must decode, and they must
/// follow one another without a hole.
pub(crate) fn load(file: &StoreFile, tail_bytes_max: usize) -> Result<Stored, Error> {
    let create = || -> Result<(), redb::Error> {
        let transaction = file.database.begin_write()?;
        transaction.open_table(LOG)?;
        transaction.commit()?;
        Ok(())
    };
    let missing = file.read(|transaction| {
        Ok(matches!(
            transaction.open_table(LOG),
            Err(redb::TableError::TableDoesNotExist(_))
        ))
    })?;
    if missing {
        create().map_err(|error| file.error(error))?;
    }
    let meta = |key: &str| {
        file.read(|transaction| {
            Ok(transaction
                .open_table(META)?
                .get(key)?
                .map(|value| value.value().to_vec()))
        })
    };
    let mut stored = Stored::default();
    if let Some(bytes) = meta(VOTE)? {
        stored.vote = Some(decode_vote(&bytes).map_err(|fault| file.fault(fault))?);
    }
    if let Some(bytes) = meta(LEASE)? {
        stored.lease = Some(decode_lease(&bytes).map_err(|fault| file.fault(fault))?);
    }
    if let Some(bytes) = meta(PURGED)? {
        stored.purged = decode_log_id(&bytes).map_err(|fault| file.fault(fault))?;
    }
    if let Some(bytes) = meta(COMMITTED)? {
        stored.committed = decode_log_id(&bytes).map_err(|fault| file.fault(fault))?;
    }
    let rows = file.read(|transaction| {
        let table = transaction.open_table(LOG)?;
        let mut rows = std::collections::VecDeque::new();
        let mut first_fault = None;
        let (mut bytes, mut all_bytes) = (0, 0);
        let mut previous: Option<RaftLogId> = None;
        let mut members = None;
        for row in table.iter()? {
            let (index, value) = row?;
            let entry = match decode_entry(value.value()) {
                Ok(entry) => entry,
                Err(fault) => {
                    first_fault = Some(file.fault(fault));
                    break;
                }
            };
            let follows = previous.is_none_or(|previous| previous.index + 1 == entry.log_id.index);
            if entry.log_id.index != index.value() || !follows {
                first_fault = Some(file.damaged("the log has a hole"));
                break;
            }
            previous = Some(entry.log_id);
            if let EntryPayload::Membership(newer) = &entry.payload {
                members = Some(RaftMembership::new(previous, newer.clone()));
            }
            let size = size_in_memory(&entry);
            bytes += size;
            all_bytes += size;
            rows.push_back((entry, size));
            while bytes > tail_bytes_max {
                let Some((_, size)) = rows.pop_front() else { break };
                bytes -= size;
            }
        }
        Ok((rows, previous, members, all_bytes, first_fault))
    })?;
    let (rows, last, members, bytes, fault) = rows;
    if let Some(fault) = fault {
        return Err(fault);
    }
    stored.last = last;
    stored.members = members;
    stored.bytes = bytes;
    stored.newest = rows.into();
    Ok(stored)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Identity;
    use crate::raft::{Commands, LeaderId};
    use openraft::type_config::TypeConfigExt;
    use redb::backends::InMemoryBackend;
    use std::sync::atomic::Ordering;

    /// A member that reads what it missed had each write of the others wait for one more force to the disk.
    #[test]
    fn a_read_between_two_writes_leaves_them_one_commit() {
        let identity = Identity {
            cluster: "one".to_owned(),
            node_id: 1,
        };
        let backend = Box::new(InMemoryBackend::new());
        let file = StoreFile::open(backend, "log".into(), &identity, 1 << 20, Default::default());
        let (file, shared) = (file.unwrap(), Shared::new());
        load(&file, 0).unwrap();
        let tail = SharedTail(Default::default(), shared.clone());
        let mut log = LogFile::new(file, tail, shared.clone(), Faults::none());
        let append = |index| {
            let leader_id = LeaderId { term: 1, node_id: 1 };
            let entries = vec![RaftEntry {
                log_id: RaftLogId { leader_id, index },
                payload: EntryPayload::Normal(Commands::new(&[[1; 10]])),
            }];
            let callback = IOFlushed::signal(Types::oneshot().0);
            Job::Append { entries, callback }
        };
        log.run(&mut vec![append(0)]);
        let (reply, mut read) = oneshot::channel();
        let read_first = Job::Read {
            range: 0..1,
            bytes_max: 1,
            reply,
        };
        let before = shared.counters.log_commits.load(Ordering::Relaxed);
        log.run(&mut vec![append(1), read_first, append(2)]);
        assert_eq!(read.try_recv().unwrap().unwrap().len(), 1);
        assert_eq!(shared.counters.log_commits.load(Ordering::Relaxed), before + 1);
        assert_eq!(log.read(0..9, usize::MAX).unwrap().len(), 3);
    }
}

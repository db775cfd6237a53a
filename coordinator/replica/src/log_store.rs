//! The Raft log and vote as the Raft library sees them.
//!
//! An append is readable from memory at once and acknowledged when [`log_file`] has forced it to the disk.
//! The newest entries stay in memory within a limit of bytes; older ones are read from the file.

use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

use crate::health::{Shared, count};
use crate::raft::{RaftEntry, RaftLogId, RaftVote, Types};
use crate::state_store::StateLane;
use crate::storage::{Closed, Lane};
use crate::wire::APPEND_BYTES;

pub(crate) mod log_file;

use log_file::{Job, LogFile, Stored};

/// The newest entries, and where the log begins and ends.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    entries: BTreeMap<u64, (RaftEntry, usize)>,
    bytes: usize,
    bytes_max: usize,
    /// Entries below this index are on the disk, so memory may forget them.
    durable_end: u64,
    purged: Option<RaftLogId>,
    last: Option<RaftLogId>,
    vote: Option<RaftVote>,
    lease: Option<Duration>,
    committed: Option<RaftLogId>,
}

impl Tail {
    fn push(&mut self, entry: RaftEntry, size: usize) {
        self.last = Some(entry.log_id);
        self.bytes += size;
        if let Some((_, replaced)) = self.entries.insert(entry.log_id.index, (entry, size)) {
            self.bytes -= replaced;
        }
    }

    fn forget(&mut self) {
        while self.bytes > self.bytes_max {
            let Some(first) = self.entries.first_entry() else {
                return;
            };
            if *first.key() >= self.durable_end {
                return;
            }
            self.bytes -= first.remove().1;
        }
    }

    fn truncate_after(&mut self, last: Option<RaftLogId>) {
        let end = last.map_or(0, |id| id.index + 1);
        for (_, size) in self.entries.split_off(&end).into_values() {
            self.bytes -= size;
        }
        self.durable_end = self.durable_end.min(end);
        self.last = self.last.min(last).max(self.purged);
    }

    fn purge(&mut self, upto: RaftLogId) {
        let kept = self.entries.split_off(&(upto.index + 1));
        for (_, size) in std::mem::replace(&mut self.entries, kept).into_values() {
            self.bytes -= size;
        }
        self.purged = self.purged.max(Some(upto));
        self.last = self.last.max(self.purged);
    }
}

/// The tail, shared between the store, its readers and the file's worker.
#[derive(Debug, Clone)]
pub(crate) struct SharedTail(Arc<Mutex<Tail>>, Shared);

impl SharedTail {
    fn lock(&self) -> MutexGuard<'_, Tail> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, tail: &Tail) {
        self.1
            .counters
            .log_tail_bytes
            .store(tail.bytes as u64, std::sync::atomic::Ordering::Relaxed);
    }

    /// Called by the file's worker: entries below `end` are on the disk.
    pub(crate) fn durable(&self, end: u64) {
        let mut tail = self.lock();
        tail.durable_end = tail.durable_end.max(end);
        tail.forget();
        self.report(&tail);
    }
}

/// The log of one member.
#[derive(Debug, Clone)]
pub(crate) struct LogStore {
    tail: SharedTail,
    lane: Lane<LogFile>,
    state: StateLane,
}

impl LogStore {
    /// A store over what the file holds. `start` gets the shared tail and starts the file's worker.
    pub(crate) fn new(
        stored: Stored,
        tail_bytes_max: usize,
        shared: Shared,
        state: StateLane,
        start: impl FnOnce(SharedTail) -> io::Result<Lane<LogFile>>,
    ) -> io::Result<Self> {
        let mut tail = Tail {
            bytes_max: tail_bytes_max,
            durable_end: stored.last.map_or(0, |id| id.index + 1),
            purged: stored.purged,
            vote: stored.vote,
            lease: stored.lease,
            committed: stored.committed,
            ..Tail::default()
        };
        for (entry, size) in stored.newest {
            tail.push(entry, size);
        }
        tail.last = stored.last.max(stored.purged);
        count(&shared.counters.log_bytes, stored.bytes);
        let tail = SharedTail(Arc::new(Mutex::new(tail)), shared);
        tail.report(&tail.lock());
        let lane = start(tail.clone())?;
        Ok(Self { tail, lane, state })
    }

    /// Index of the first entry in memory.
    pub(crate) fn first_in_memory(&self) -> Option<u64> {
        self.tail.lock().entries.keys().next().copied()
    }

    /// The newest vote that is on the disk.
    pub(crate) fn vote(&self) -> Option<RaftVote> {
        self.tail.lock().vote
    }

    /// For how long answers bind this member, as far as it is on the disk.
    pub(crate) fn lease(&self) -> Option<Duration> {
        self.tail.lock().lease
    }

    /// Writes down for how long answers bind this member.
    pub(crate) async fn save_lease(&self, lease: Duration) -> io::Result<()> {
        self.ask(|reply| Job::Lease { lease, reply }).await?;
        self.tail.lock().lease = Some(lease);
        Ok(())
    }

    /// Returns when everything that was given to the store is on the disk.
    pub(crate) async fn settle(&mut self) -> io::Result<()> {
        match self.vote() {
            // Writes are done in order: the same vote once more comes after all of them.
            Some(vote) => self.save_vote(&vote).await,
            None => Ok(()),
        }
    }

    /// Writes what is queued and closes the file.
    pub(crate) async fn stop(&self) {
        self.lane.stop().await;
    }

    /// The first entries of a range: at least one, if there are any, and no more than `bytes_max` take.
    pub(crate) async fn read(&self, range: Range<u64>, bytes_max: usize) -> io::Result<Vec<RaftEntry>> {
        let (missing, in_memory) = self.in_memory(range, bytes_max);
        let stored = self.stored(missing, bytes_max).await?;
        Ok(if stored.is_empty() { in_memory } else { stored })
    }

    /// What memory has of a range, as far as `bytes_max` reach, and which part before that is in the file only.
    fn in_memory(&self, range: Range<u64>, bytes_max: usize) -> (Range<u64>, Vec<RaftEntry>) {
        let tail = self.tail.lock();
        let first = tail.purged.map_or(0, |id| id.index + 1);
        let start = range.start.max(first);
        let end = range.end.min(tail.last.map_or(0, |id| id.index + 1));
        if start >= end {
            return (start..start, Vec::new());
        }
        let mut bytes = 0;
        let found = tail.entries.range(start..end);
        let fitting = found.take_while(|(_, (_, size))| {
            bytes += size;
            bytes == *size || bytes <= bytes_max
        });
        let found: Vec<RaftEntry> = fitting.map(|(_, (entry, _))| entry.clone()).collect();
        let missing_end = found.first().map_or(end, |entry| entry.log_id.index);
        (start..missing_end, found)
    }

    async fn stored(&self, range: Range<u64>, bytes_max: usize) -> io::Result<Vec<RaftEntry>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        count(&self.tail.1.counters.log_reads_from_disk, 1);
        self.ask(|reply| Job::Read {
            range,
            bytes_max,
            reply,
        })
        .await
    }

    async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<io::Result<T>>) -> Job) -> io::Result<T> {
        let (reply, answer) = oneshot::channel();
        self.lane.submit(job(reply)).await?;
        answer.await.map_err(|_| Closed)?
    }
}

/// First index, and the one after the last.
fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(index) => *index,
        Bound::Excluded(index) => index.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(index) => index.saturating_add(1),
        Bound::Excluded(index) => *index,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<RaftEntry>> {
        let (start, end) = bounds(&range);
        let (missing, in_memory) = self.in_memory(start..end, usize::MAX);
        let mut entries = self.stored(missing, usize::MAX).await?;
        entries.extend(in_memory);
        Ok(entries)
    }

    /// Entries to send: no more than one message takes, at least one.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<RaftEntry>> {
        self.read(start..end, APPEND_BYTES).await
    }

    /// Entries to apply, a few at a time: after a crash there may be more than fit into memory.
    async fn entries_stream<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<RaftEntry>> + Send {
        let (start, end) = bounds(&range);
        let end = end.min(self.tail.lock().last.map_or(0, |id| id.index + 1));
        let pieces = stream::try_unfold((self.clone(), start), move |(mut log, next)| async move {
            if next >= end {
                return Ok(None);
            }
            let entries = log.limited_get_log_entries(next, end).await?;
            let reached = entries.last().map_or(end, |entry| entry.log_id.index + 1);
            Ok::<_, io::Error>(Some((entries, (log, reached))))
        });
        Box::pin(
            pieces
                .map_ok(|entries| stream::iter(entries).map(Ok))
                .try_flatten(),
        )
    }

    async fn read_vote(&mut self) -> io::Result<Option<RaftVote>> {
        Ok(self.vote())
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let tail = self.tail.lock();
        Ok(LogState {
            last_purged_log_id: tail.purged,
            last_log_id: tail.last,
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> io::Result<()> {
        self.ask(|reply| Job::Vote { vote: *vote, reply }).await?;
        self.tail.lock().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<RaftLogId>) -> io::Result<()> {
        self.tail.lock().committed = committed;
        // Rides along with a later write: not worth one of its own, since a restart finds out again.
        self.lane.submit(Job::Committed(committed)).await?;
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<RaftLogId>> {
        Ok(self.tail.lock().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = RaftEntry> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<RaftEntry> = entries.into_iter().collect();
        {
            let mut tail = self.tail.lock();
            for entry in &entries {
                let size = log_file::size_in_memory(entry);
                count(&self.tail.1.counters.log_bytes, size);
                tail.push(entry.clone(), size);
            }
            self.tail.report(&tail);
        }
        self.lane.submit(Job::Append { entries, callback }).await?;
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<RaftLogId>) -> io::Result<()> {
        self.tail.lock().truncate_after(last);
        let from = last.map_or(0, |id| id.index + 1);
        self.ask(|reply| Job::Truncate { from, reply }).await?;
        // An append that was under way may have raised the mark again in the meantime.
        let mut tail = self.tail.lock();
        tail.durable_end = tail.durable_end.min(from);
        Ok(())
    }

    async fn purge(&mut self, upto: RaftLogId) -> io::Result<()> {
        // What the purged entries did must be on the disk before they go.
        self.state.make_durable(upto.index).await?;
        {
            let mut tail = self.tail.lock();
            tail.purge(upto);
            self.tail.report(&tail);
        }
        self.ask(|reply| Job::Purge { upto, reply }).await
    }
}

//! Whether the replica works, and what it has done so far: counters shared by all its parts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::watch;

use crate::snapshot::SnapshotData;

/// Whether the replica can do its work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// All is well.
    Well,
    /// Storage failed or the state machine panicked. Nothing more is acknowledged until a restart.
    Failed {
        /// What happened, for the operator.
        reason: String,
    },
}

impl Health {
    /// Whether nothing failed so far.
    #[must_use]
    pub fn is_well(&self) -> bool {
        *self == Self::Well
    }
}

/// Counters since the replica was opened.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) log_fsyncs: Arc<AtomicU64>,
    pub(crate) state_fsyncs: Arc<AtomicU64>,
    pub(crate) log_commits: AtomicU64,
    pub(crate) entries_proposed: AtomicU64,
    pub(crate) commands_acknowledged: AtomicU64,
    pub(crate) entries_applied: AtomicU64,
    pub(crate) commands_applied: AtomicU64,
    pub(crate) snapshots_built: AtomicU64,
    pub(crate) snapshots_installed: AtomicU64,
    /// Bytes of log entries found at start and written since.
    pub(crate) log_bytes: AtomicU64,
    pub(crate) snapshot_bytes: AtomicU64,
    pub(crate) log_tail_bytes: AtomicU64,
    pub(crate) log_reads_from_disk: AtomicU64,
}

/// Adds to a counter.
pub(crate) fn count(counter: &AtomicU64, amount: usize) {
    counter.fetch_add(amount as u64, Ordering::Relaxed);
}

/// What all parts of one replica share.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) counters: Arc<Counters>,
    health: watch::Sender<Health>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self {
            counters: Arc::default(),
            health: watch::Sender::new(Health::Well),
        }
    }

    /// Records the first failure; later ones are consequences.
    pub(crate) fn fail(&self, reason: &str) {
        let first = self.health.send_if_modified(|health| {
            let first = health.is_well();
            if first {
                *health = Health::Failed {
                    reason: reason.to_owned(),
                };
            }
            first
        });
        if first {
            tracing::error!(reason, "replica failed");
        }
    }

    /// Remembers how large the current snapshot is.
    pub(crate) fn note_snapshot(&self, data: &SnapshotData) {
        if let Ok((size_bytes, _)) = data.size_and_crc() {
            self.counters.snapshot_bytes.store(size_bytes, Ordering::Relaxed);
        }
    }

    pub(crate) fn failure(&self) -> Option<String> {
        match &*self.health.borrow() {
            Health::Well => None,
            Health::Failed { reason } => Some(reason.clone()),
        }
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }
}

/// A reading of the replica's counters and positions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Times that the log file was forced to the disk.
    pub log_fsyncs: u64,
    /// Times that the state file was forced to the disk.
    pub state_fsyncs: u64,
    /// Groups of log writes committed together.
    pub log_commits: u64,
    /// Log entries that the proposer wrote.
    pub entries_proposed: u64,
    /// Commands acknowledged to proposers here.
    pub commands_acknowledged: u64,
    /// Log entries applied, those of a restart's replay included.
    pub entries_applied: u64,
    /// Commands applied, those of a restart's replay included.
    pub commands_applied: u64,
    /// Snapshots written.
    pub snapshots_built: u64,
    /// Snapshots taken over.
    pub snapshots_installed: u64,
    /// Bytes of log entries held in memory.
    pub log_tail_bytes: u64,
    /// Reads of log entries that memory no longer held.
    pub log_reads_from_disk: u64,
    /// Current term.
    pub term: u64,
    /// Index of the last log entry, if any.
    pub last_index: Option<u64>,
    /// Index of the last committed entry known here.
    pub committed_index: Option<u64>,
    /// Index of the last applied entry.
    pub applied_index: Option<u64>,
    /// Index of the last entry in the last snapshot.
    pub snapshot_index: Option<u64>,
    /// Index of the last purged entry.
    pub purged_index: Option<u64>,
}

impl Metrics {
    pub(crate) fn of(counters: &Counters) -> Self {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Self {
            log_fsyncs: read(&counters.log_fsyncs),
            state_fsyncs: read(&counters.state_fsyncs),
            log_commits: read(&counters.log_commits),
            entries_proposed: read(&counters.entries_proposed),
            commands_acknowledged: read(&counters.commands_acknowledged),
            entries_applied: read(&counters.entries_applied),
            commands_applied: read(&counters.commands_applied),
            snapshots_built: read(&counters.snapshots_built),
            snapshots_installed: read(&counters.snapshots_installed),
            log_tail_bytes: read(&counters.log_tail_bytes),
            log_reads_from_disk: read(&counters.log_reads_from_disk),
            ..Self::default()
        }
    }
}

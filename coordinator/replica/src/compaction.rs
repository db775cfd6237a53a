//! Keeps the log short by bytes, where the Raft library counts entries only: under load one entry holds
//! hundreds of commands, and ten thousand of those take long to read at a restart.

use openraft::async_runtime::WatchReceiver;
use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::sleep;

use crate::Inner;

/// How often the log is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Purging fewer entries than this is not worth a write.
const PURGE_MIN: u64 = 64;

/// Causes a snapshot after so many bytes of log, and purges what is neither needed after one nor in memory.
pub(crate) async fn keep_log_short(inner: Weak<Inner>, every_bytes: Option<u64>) {
    let Some(every_bytes) = every_bytes else { return };
    // Bytes written when the last snapshot was begun, as far as that is known.
    let mut before = 0;
    let mut built = 0;
    loop {
        sleep(LOOK_EVERY).await;
        let inner = match inner.upgrade() {
            Some(inner) if !inner.queue.is_closed() => inner,
            _ => return,
        };
        let counters = &inner.shared.counters;
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let (written, snapshot_bytes) = (read(&counters.log_bytes), read(&counters.snapshot_bytes));
        let now_built = read(&counters.snapshots_built) + read(&counters.snapshots_installed);
        let raft = inner.raft();
        if now_built != built {
            built = now_built;
            before = written;
        } else if written.saturating_sub(before) > every_bytes.max(snapshot_bytes) {
            before = written;
            // Errors mean that the library ends, which shows elsewhere.
            let _ = inner.seed.scope(raft.trigger().snapshot()).await;
        }
        let (snapshot, purged) = {
            let metrics = raft.metrics();
            let metrics = metrics.borrow_watched();
            (
                metrics.snapshot.map(|id| id.index),
                metrics.purged.map_or(0, |id| id.index),
            )
        };
        let in_memory = inner.log.first_in_memory();
        if let Some((snapshot, first)) = snapshot.zip(in_memory) {
            let upto = snapshot.min(first.saturating_sub(1));
            if upto > purged + PURGE_MIN {
                let _ = inner.seed.scope(raft.trigger().purge_log(upto)).await;
            }
        }
    }
}

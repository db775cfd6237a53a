//! The clock seam: wall time in production, the simulation's time in tests.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use protocol::time::UnixMillis;

mod agreed;

pub use agreed::{AgreedClock, Comparison, Reading};

/// Where the time comes from. Timers use `tokio::time`, which a simulation pauses; this is for the times
/// that are written down, signed or compared with others' clocks.
pub trait Clock: fmt::Debug + Send + Sync {
    /// Now.
    fn now(&self) -> UnixMillis;

    /// What to wait for before its times may be written down, for one that is compared with others and was not yet.
    fn settling(&self) -> Option<BoxFuture<'_, ()>> {
        None
    }

    /// Members whose machines have the right time, where this one's has not.
    fn better(&self) -> Vec<u64> {
        Vec::new()
    }
}

/// The machine's wall clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct WallClock;

impl Clock for WallClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock seam")]
    fn now(&self) -> UnixMillis {
        let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        UnixMillis(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
    }
}

/// A clock that is set by hand, for tests; clones share it.
#[derive(Debug, Clone, Default)]
pub struct ManualClock(Arc<AtomicU64>);

impl ManualClock {
    /// A clock that stands still until it is set.
    #[must_use]
    pub fn at(now: UnixMillis) -> Self {
        Self(Arc::new(AtomicU64::new(now.0)))
    }

    /// Sets it, for all clones.
    pub fn set(&self, now: UnixMillis) {
        self.0.store(now.0, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(self.0.load(Ordering::Relaxed))
    }
}

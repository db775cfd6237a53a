//! The clock seam on simulated time.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use coordinator::clock::Clock;
use protocol::time::UnixMillis;
use tokio::time::Instant;

/// 2026-01-01: any fixed day does.
const FIRST_MS: u64 = 1_767_225_600_000;

/// Follows the runtime's paused time.
#[derive(Debug, Clone, Copy)]
pub(super) struct SimulatedClock {
    began: Instant,
}

impl SimulatedClock {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
        }
    }
}

impl Clock for SimulatedClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(FIRST_MS) + self.began.elapsed()
    }
}

/// The clock of a member's machine, which may be off; clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct MachineClock {
    right: SimulatedClock,
    ahead_ms: Arc<AtomicI64>,
}

impl MachineClock {
    pub(super) fn new(right: SimulatedClock) -> Self {
        let ahead_ms = Arc::default();
        Self { right, ahead_ms }
    }

    pub(super) fn set_ahead(&self, ms: i64) {
        self.ahead_ms.store(ms, Ordering::Relaxed);
    }

    pub(super) fn is_off(&self) -> bool {
        self.ahead_ms.load(Ordering::Relaxed) != 0
    }
}

impl Clock for MachineClock {
    fn now(&self) -> UnixMillis {
        let ahead_ms = self.ahead_ms.load(Ordering::Relaxed);
        UnixMillis(self.right.now().0.saturating_add_signed(ahead_ms))
    }
}

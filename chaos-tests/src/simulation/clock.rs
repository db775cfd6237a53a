//! The clock seam on simulated time.

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

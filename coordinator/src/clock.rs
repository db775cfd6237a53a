//! The clock seam: wall time in production, the simulation's time in tests.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use protocol::time::UnixMillis;

/// Where the time comes from. Timers use `tokio::time`, which a simulation pauses; this is for the times
/// that are written down, signed or compared with others' clocks.
pub trait Clock: fmt::Debug + Send + Sync {
    /// Now.
    fn now(&self) -> UnixMillis;
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

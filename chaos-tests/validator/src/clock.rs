//! The clock of the stand-ins: real wall time, since nonces and token lifetimes are wall time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protocol::time::UnixMillis;

/// Now, by this machine's wall clock.
#[expect(
    clippy::disallowed_methods,
    reason = "this file is the clock seam of the stand-ins, which are never simulated"
)]
pub(crate) fn now() -> UnixMillis {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    UnixMillis::default() + since
}

//! Jobs: a chute run once on offer. A hotkey may try a job once, so an attempt is never repeated.

use protocol::id::DeploymentId;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use super::chute::ChuteKey;

/// How long the record of a job is kept after it was last offered, in ms. As long as it is there, the job
/// is not tried again.
pub const JOB_MEMORY_MS: u64 = 24 * 3_600_000;

/// A job that a validator offered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// What it runs.
    pub chute: ChuteKey,
    /// GPUs that it needs.
    pub gpu_count: u32,
    /// Disk that it needs, in GB.
    pub disk_gb: u32,
    /// Our one attempt.
    pub attempt: Option<DeploymentId>,
    /// The validator withdrew it, or it excludes us.
    pub closed: bool,
    /// When it was last offered.
    pub offered_at: UnixMillis,
}

impl Job {
    /// True if we may still try it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.closed && self.attempt.is_none()
    }
}

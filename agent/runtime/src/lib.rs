//! One workload controller: makes the workloads of a server true, by whatever runs them there.
//!
//! Reading order: this page ([`Runtime`]), [`diff`] (what to start and stop), [`environment`] and
//! [`manifest`] (what a chute sees; pure), `logs` (what it writes), [`kubernetes`] (Jobs of a cluster), [`process`]
//! (child processes, for development), [`memory`] (nothing at all, for tests and simulation).
//!
//! A runtime accepts work at once and goes on by itself; how far it is shows in [`Runtime::observe`]. It
//! never decides what should run, and it never starts one deployment twice.

pub mod diff;
pub mod environment;
pub mod kubernetes;
mod logs;
pub mod manifest;
pub mod memory;
pub mod process;

use std::fmt;

use futures_util::future::BoxFuture;
use protocol::id::{DeploymentId, GpuId};
use protocol::logs::{Log, LogQuery, WorkloadEvent};
use protocol::report::WorkloadStatus;
use protocol::workload::{Fence, WorkloadPhase, WorkloadSpec};
use tokio::sync::watch;

/// Why a runtime could not do or say something. It says nothing of the workload itself: the caller asks
/// again later.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The runtime does not work here at all, whatever the workload.
    #[error("{0}")]
    Refused(String),
    /// A file or a directory of the runtime.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the path.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// What runs could not be found out. Unknown is not empty.
    #[error("what runs here is not known: {0}")]
    Unknown(String),
}

impl Error {
    fn kept(source: std::io::Error) -> Self {
        Self::Io {
            what: "read what was kept".to_owned(),
            source,
        }
    }
}

/// A workload that exists on the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// Which, and how far it is.
    pub status: WorkloadStatus,
    /// The GPUs that it was given.
    pub gpus: Vec<GpuId>,
}

impl Observed {
    /// True while it may be using its GPUs.
    #[must_use]
    pub fn holds_gpus(&self) -> bool {
        !matches!(self.status.phase, WorkloadPhase::Ended { .. })
    }
}

/// What runs workloads on a server.
pub trait Runtime: fmt::Debug + Send + Sync {
    /// Accepts a workload under the fence of its desired set. Does nothing when the deployment exists
    /// already, in whatever phase: a workload that ended is not started again.
    ///
    /// # Errors
    /// When it was not accepted; nothing of it exists then.
    fn apply<'a>(&'a self, fence: Fence, spec: &'a WorkloadSpec) -> BoxFuture<'a, Result<(), Error>>;

    /// Begins to stop a workload, or removes one that ended. It is listed until it is gone for sure.
    ///
    /// # Errors
    /// When the stop could not begin.
    fn stop<'a>(&'a self, deployment: &'a DeploymentId) -> BoxFuture<'a, Result<(), Error>>;

    /// Everything that exists, by deployment, wanted or not. What is missing is gone for sure.
    ///
    /// # Errors
    /// When that is not known at the moment: unknown is not empty.
    fn observe(&self) -> BoxFuture<'_, Result<Vec<Observed>, Error>>;

    /// Part of what a workload wrote. Its last output is there for seven days after it is gone. None: nothing is known
    /// of it here, or not any more.
    ///
    /// # Errors
    /// When it cannot be read at the moment; [`Error::Refused`] when what is asked for does not exist.
    fn log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<Option<Log>, Error>>;

    /// What happened to a workload, as whatever runs it says, the first first; kept as its output is.
    ///
    /// # Errors
    /// When it cannot be read at the moment.
    fn events<'a>(
        &'a self,
        deployment: &'a DeploymentId,
    ) -> BoxFuture<'a, Result<Option<Vec<WorkloadEvent>>, Error>>;

    /// Counts changes: a new number means that [`Self::observe`] has news.
    fn changes(&self) -> watch::Receiver<u64>;
}

//! What is asked of a host about one workload, while it is there and for some days afterwards: what it wrote, and
//! what happened to it.
//!
//! A member opens a stream of its own for each question; both messages are framed as in [`crate::link`].

use serde::{Deserialize, Serialize};

use crate::id::DeploymentId;
use crate::time::UnixMillis;

/// The most of a workload's output that is answered at once, and that is kept after its end, in bytes.
pub const LOG_BYTES_MAX: usize = 1024 * 1024;

/// A question about one workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostQuestion {
    /// What did it write?
    Log(LogQuery),
    /// What happened to it, as whatever runs it there says?
    Events(DeploymentId),
}

/// Which part of the output is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogQuery {
    /// Whose output.
    pub deployment: DeploymentId,
    /// Of the run before the present one.
    pub previous: bool,
    /// Only what came after this place, [`Log::next`] of an earlier answer; if not given, the end of it.
    pub after: Option<String>,
}

impl LogQuery {
    /// The place after which output is wanted, if any.
    ///
    /// # Errors
    /// For whoever asks, in words: it is no place.
    pub fn place<T: std::str::FromStr>(&self) -> Result<Option<T>, String> {
        let Some(after) = &self.after else {
            return Ok(None);
        };
        let place = after.parse().map_err(|_| {
            format!("after = {after:?} is no place in the output: leave it out, or use `next` of an earlier answer")
        })?;
        Ok(Some(place))
    }
}

/// Whole lines of output, at most [`LOG_BYTES_MAX`] bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Log {
    /// The lines, without tokens.
    pub text: String,
    /// The place after them; none when nothing was written yet.
    pub next: Option<String>,
    /// Whether the workload is gone: what is here was kept of it, and no more will come.
    pub gone: bool,
}

/// Something that happened to a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadEvent {
    /// The last time.
    pub at: UnixMillis,
    /// What it happened to: `Pod d1-x7k2p`.
    pub object: String,
    /// In one word, such as `FailedScheduling`.
    pub reason: String,
    /// In a sentence, without tokens.
    pub message: String,
    /// How often.
    pub count: u32,
}

/// What a host answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostAnswer {
    /// Output.
    Log(Log),
    /// What happened, the first first.
    Events(Vec<WorkloadEvent>),
    /// Nothing is known of the workload there, or not any more.
    Unknown,
    /// Why there is no answer.
    Failed(String),
    /// Why there is no answer to such a question.
    Refused(String),
}

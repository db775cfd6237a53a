//! What can go wrong with a replica, told apart by what the caller does about it.
//!
//! Errors at open name the file and the way back: a member with a doubtful store must not vote with it,
//! since it might vote twice in one term or forget an acknowledged command.

use std::path::PathBuf;

/// What an operator does about a store that is refused. Part of every such message.
pub const WAY_BACK: &str = "this member does not start with it. The way back: stop the agent and run `chutes-agent \
     rejoin`, which puts the folder aside and has the other members tell it everything anew; if none of them is left, \
     restore a snapshot (`chutes-agent restore`). Do not put an older copy of the folder in its place while there are \
     other members: it would have forgotten what it acknowledged and how it voted";

/// Why a replica could not be opened, or why an operation on it failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another process, or another replica of this process, has the store open.
    #[error("{}: in use by another process; two members must never share a directory", file.display())]
    AlreadyOpen {
        /// The locked file.
        file: PathBuf,
    },
    /// A newer release wrote this file.
    #[error(
        "{}: written in format {found}, this release reads up to format {known}; install the newer release again, \
         or: {WAY_BACK}",
        file.display()
    )]
    Newer {
        /// The file in question.
        file: PathBuf,
        /// Format version found.
        found: u8,
        /// Highest format version that this release reads.
        known: u8,
    },
    /// The file fails its checks: truncated, torn or altered.
    #[error("{}: damaged: {reason}; {WAY_BACK}", file.display())]
    Damaged {
        /// The file in question.
        file: PathBuf,
        /// What did not hold.
        reason: String,
    },
    /// A file that must be there is not.
    #[error("{}: missing or empty although this member has stored data before; {WAY_BACK}", file.display())]
    Missing {
        /// The file in question.
        file: PathBuf,
    },
    /// The file belongs to another cluster or to another member.
    #[error("{}: belongs to {found}, but this is {expected}; {WAY_BACK}", file.display())]
    Foreign {
        /// The file in question.
        file: PathBuf,
        /// Whose the file is.
        found: String,
        /// Who we are.
        expected: String,
    },
    /// The operating system refused; nothing is known to be wrong with the data.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file or directory in question.
        file: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The settings contradict each other.
    #[error("replica settings: {0}")]
    Configuration(String),
    /// The application could not take over the stored rows.
    #[error("load state: {0}")]
    Load(String),
    /// Another member leads, or none does at present.
    #[error("not the leader (leader: {leader:?})")]
    NotLeader {
        /// Id of the leader, if known.
        leader: Option<u64>,
    },
    /// The change of members makes no sense, or cannot be done now.
    #[error("members: {0}")]
    Membership(String),
    /// Another member asked something that makes no sense, or that it must not ask.
    #[error("request of member {from} refused: {reason}")]
    Refused {
        /// The member that asked.
        from: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The deadline passed.
    #[error("no answer within the deadline")]
    Timeout,
    /// The replica was shut down.
    #[error("the replica is shut down")]
    Stopped,
    /// Storage failed or the machine panicked: this replica serves no more until restarted.
    #[error("the replica failed: {0}")]
    Failed(String),
}

/// Why a command was not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProposeError {
    /// Too many commands wait. Nothing was proposed; try again later.
    #[error("too many commands are waiting")]
    Busy,
    /// The command is larger than a log entry may be. Nothing was proposed.
    #[error("command of {size_bytes} bytes, the limit is {size_bytes_max}")]
    TooLarge {
        /// Size of the command.
        size_bytes: usize,
        /// Limit of the configuration.
        size_bytes_max: usize,
    },
    /// Another member leads. Nothing was proposed.
    #[error("not the leader (leader: {leader:?})")]
    NotLeader {
        /// Id of the leader, if known.
        leader: Option<u64>,
    },
    /// The deadline passed before the command entered the log. Nothing was proposed.
    #[error("no leader was ready within the deadline")]
    Timeout,
    /// The command may or may not be applied, now or later. Ask again with the same request id.
    #[error("outcome unknown: {0}")]
    OutcomeUnknown(String),
    /// The replica was shut down. Nothing was proposed.
    #[error("the replica is shut down")]
    Stopped,
}

impl ProposeError {
    /// Whether the same command may be proposed again without a request id that tells repeats apart.
    #[must_use]
    pub fn is_certainly_not_applied(&self) -> bool {
        !matches!(self, Self::OutcomeUnknown(_))
    }
}

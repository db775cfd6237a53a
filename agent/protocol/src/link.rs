//! Messages of the host link: one connection from each host to a member of the coordinator.
//!
//! A host says [`FromHost::Hello`] first. Afterwards either side sends whenever it has something; nothing
//! waits for an answer, since the desired set and the report are both whole states that replace the last.
//! On the wire each message is a length (4 bytes, big endian) and postcard bytes of a [`Versioned`].

use serde::{Deserialize, Serialize};

use crate::report::{HostFacts, WorkloadReport};
use crate::time::UnixMillis;
use crate::workload::{Fence, WorkloadSpec};

/// The longest message that either side accepts, in bytes: a desired set of 8 chutes with 150 kB of code.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A message with the version of its form, so that old and new agents can talk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Versioned<T> {
    /// First form.
    V1(T),
}

impl<T> Versioned<T> {
    /// The message, brought to the newest form.
    pub fn into_latest(self) -> T {
        match self {
            Self::V1(message) => message,
        }
    }
}

/// From a host to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHost {
    /// Who is calling, and the highest fence that it has stored.
    Hello {
        /// The host.
        facts: HostFacts,
        /// Fence of the desired set on its disk.
        fence: Fence,
        /// Its wall clock, to be compared with the coordinator's.
        clock: UnixMillis,
    },
    /// The facts changed.
    Facts(HostFacts),
    /// All that runs on it.
    Report(WorkloadReport),
}

/// From the coordinator to a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// What should run, replacing any set of a lower fence.
    Desired {
        /// Orders this set.
        fence: Fence,
        /// All of it.
        workloads: Vec<WorkloadSpec>,
    },
    /// Signed headers for the registries, replacing the last ones.
    RegistryHeaders(Vec<RegistryHeaders>),
}

/// A short-lived signature for one validator's registry, made by a member that holds the seed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryHeaders {
    /// The validator whose registry it is for.
    pub validator: crate::hotkey::Hotkey,
    /// Header names and values.
    pub headers: Vec<(String, String)>,
    /// Not to be used afterwards.
    pub expires_at: UnixMillis,
}

impl std::fmt::Debug for RegistryHeaders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RegistryHeaders({} until {})", self.validator, self.expires_at)
    }
}

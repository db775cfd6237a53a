//! Sealed workers: servers in which no foreign program may run, so without our agent. The leader drives each through the
//! kubeconfig of its own cluster; to everybody else it is a server like any other, but that it runs chutes for trusted
//! execution environments (TEE) and nothing else.

use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

/// How a sealed worker is reached. What is known of it as a server is in its row there, under the same id.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// Kubeconfig of its cluster, sealed with a key that only holders of the miner's seed can derive.
    pub sealed_kubeconfig: Vec<u8>,
    /// When it was added, or got this kubeconfig.
    pub added_at: UnixMillis,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Worker(since {})", self.added_at)
    }
}

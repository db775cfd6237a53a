//! The whole miner with real processes against validator stand-ins in this process: several validators, the
//! legacy flow, private chutes, jobs whose workload dies, chutes as Jobs of a Kubernetes cluster, nodes that enter by
//! themselves, sealed workers.
//!
//! `cluster.rs` runs the hosts and asks the management API, `stand_in.rs` runs the validators; the other
//! rooms are the tests. Each test has a whole miner of its own, so they run one after the other.

#![cfg(feature = "dev")]

mod cluster;
#[path = "../../runtime/tests/runtime/control_plane.rs"]
#[expect(dead_code, reason = "the runtime's own tests use the rest of it")]
mod control_plane;
mod jobs;
mod kubernetes;
mod legacy;
mod logs;
mod nodes;
mod private_chutes;
#[path = "../processes/signed.rs"]
mod signed;
mod stand_in;
mod two_validators;
mod workers;

use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};
use tokio::time::{sleep, timeout};

/// Far above what is needed, on machines that have much else to do.
const PATIENCE: Duration = Duration::from_secs(180);
/// Between two looks at something that only answers questions.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Held while a miner runs.
async fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
    // Another test may have installed it; any is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    ONE_AT_A_TIME.lock().await
}

/// Looks until there is something.
async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            sleep(LOOK_EVERY).await;
        }
    };
    timeout(PATIENCE, found)
        .await
        .unwrap_or_else(|_| panic!("not in time: {what}"))
}

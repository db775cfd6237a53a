//! A member whose disk is full: it leads nobody, acknowledges nothing, and can be read locally until there is room.
//!
//! One that runs has everything in memory and keeps its API open; one that starts reads what its store holds and leaves
//! it as it is.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coordinator_core::state_machine::Faults;
use replica::reading;
use replica::reading::Read;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Error;
use crate::api::{self, ClusterView, Progress, Roles};
use crate::backup;
use crate::clock::Clock;
use crate::config::Config;
use crate::executor::Validators;
use crate::host_link::Hub;
use crate::leader::{Listings, Scheduling};
use crate::signer::Sign;
use crate::store::{self, BoxFuture, Log, Machine, Store};

/// What the operating system says of a full disk.
const ENOSPC: i32 = 28;
/// Between two looks whether a full disk has room again.
const ROOM_EVERY: Duration = Duration::from_secs(1);
/// What counts as room.
const ROOM_BYTES: usize = 1024 * 1024;

/// Whether a failure says that there was no room: it holds what the operating system says then.
pub(super) fn is_of_a_full_disk(reason: &str) -> bool {
    reason.contains(&std::io::Error::from_raw_os_error(ENOSPC).to_string())
}

pub(super) fn say(reason: &str) {
    tracing::error!(
        reason,
        "the disk is full: this member can only be read locally until there is room"
    );
}

/// Returns once something can be written into a folder again.
pub(super) async fn until_there_is_room(folder: &Path) {
    let attempt = folder.join("room.tmp");
    loop {
        tokio::time::sleep(ROOM_EVERY).await;
        let written = std::fs::write(&attempt, vec![1; ROOM_BYTES]);
        // It may not have come into being.
        let _ = std::fs::remove_file(&attempt);
        match written {
            Ok(()) => return tracing::info!("the disk has room again: this member starts anew"),
            Err(error) => tracing::debug!(%error, "the disk is full still"),
        }
    }
}

/// One that fails soon after its start has not applied yet all that its store is known to hold.
pub(super) async fn catch_up(stored: replica::Config, machine: &Machine) {
    let whole = Machine::new(Faults::none());
    match reading::read(stored, Box::new(whole.clone())).await {
        Ok(_) => machine.catch_up_with(&whole),
        Err(error) => tracing::warn!(%error, "what the store holds was not read once more"),
    }
}

/// The log of a member that writes nothing.
#[derive(Debug)]
struct Closed {
    reason: String,
}

impl Closed {
    fn error(&self) -> store::Error {
        store::Error::Unavailable(self.reason.clone())
    }
}

impl Log for Closed {
    fn propose(&self, _: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, store::Error>> {
        Box::pin(std::future::ready(Err(self.error())))
    }

    fn linearizable(&self) -> BoxFuture<'_, Result<(), store::Error>> {
        Box::pin(std::future::ready(Err(self.error())))
    }

    fn leads_now(&self) -> bool {
        false
    }
}

/// The members, as its store has them.
#[derive(Debug)]
struct Remembered {
    cluster: String,
    own: u64,
    read: Read,
}

impl ClusterView for Remembered {
    fn name(&self) -> String {
        self.cluster.clone()
    }

    fn roles(&self) -> Roles {
        let members = &self.read.members;
        Roles {
            leader: None,
            voters: members.voters.keys().copied().collect(),
            learners: members.learners.keys().copied().collect(),
            own: self.own,
            term: self.read.term,
        }
    }

    fn progress(&self) -> BTreeMap<u64, Progress> {
        BTreeMap::new()
    }

    fn clocks_ahead_ms(&self) -> BTreeMap<u64, i64> {
        BTreeMap::new()
    }

    fn transfer(&self, _: Option<u64>) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(std::future::ready(Err("this member does not lead".to_owned())))
    }
}

/// Answers local reads from the store described by `stored`, which could not be opened for `reason`, until there is
/// room; then it fails, to be started anew. True when `shutdown` came first.
///
/// # Errors
/// [`Error::Replica`] when there is nothing to read.
pub(super) async fn serve(
    config: &Config,
    stored: replica::Config,
    signer: Arc<dyn Sign>,
    clock: Arc<dyn Clock>,
    reason: &str,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let (cluster, own) = (stored.cluster.clone(), stored.node_id);
    let machine = Machine::new(Faults::none());
    let read = reading::read(stored, Box::new(machine.clone())).await?;
    let operators = super::listen("management API", config.api_listen).await?;
    let prometheus = match config.metrics_listen {
        Some(address) => Some(super::listen("metrics", address).await?),
        None => None,
    };
    say(reason);
    let log = Closed {
        reason: format!("the disk of this member is full: {reason}"),
    };
    let store = Store::new(machine, Arc::new(log), clock, fastrand::u64(..));
    let deps = api::Deps {
        supported_gpus: Arc::new(Validators::new()),
        hosts: Arc::new(Hub::default()),
        validator_listing: Arc::new(Listings::default()),
        // It cannot lead, so it places nothing.
        scheduling: Scheduling::default(),
        cluster: Arc::new(Remembered { cluster, own, read }),
        backup: backup::Door::default(),
        others: Arc::new(api::Alone),
        signer,
        workers: None,
    };
    let limits = api::Limits::default();
    let routes = api::routes(super::api_config(config), store, deps);
    let (doors, close) = (TaskTracker::new(), CancellationToken::new());
    doors.spawn(api::serve(routes.operators, limits, operators, close.clone()));
    if let Some(prometheus) = prometheus {
        doors.spawn(api::serve(routes.metrics, limits, prometheus, close.clone()));
    }
    doors.close();
    let room = shutdown
        .run_until_cancelled(until_there_is_room(&config.data))
        .await;
    close.cancel();
    doors.wait().await;
    match room {
        Some(()) => Err(Error::Failed(reason.to_owned())),
        None => Ok(()),
    }
}

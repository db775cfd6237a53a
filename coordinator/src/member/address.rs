//! Where this member is to be found, when that is not where the cluster looks for it: its host got another address.
//!
//! The others reach a member that has moved no more, and it can still reach them. So it tells all of them: they look for
//! it at the new address, and the leader records that. Where all have moved at once it finds them by what its
//! configuration says besides; then each of them knows where it is, and can tell it the same.

use std::path::PathBuf;
use std::time::Duration;

use coordinator_core::state_machine::Command;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use protocol::id::ServerId;
use replica::Replica;
use replica::quic::Peers;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::join::{Admission, client};
use crate::store::Store;

/// How long a try may take: whoever is to be told may have said meanwhile where it is.
const TELL_MAX: Duration = Duration::from_secs(4);
/// Between two tries to tell it.
const TELL_AGAIN: Duration = Duration::from_secs(2);

/// Sees to it that the cluster knows a member's address.
#[derive(Debug)]
pub(super) struct Keeper {
    /// As the configuration has it.
    pub(super) address: String,
    /// Doors of others that the configuration names.
    pub(super) members: Vec<String>,
    /// Our id.
    pub(super) server: ServerId,
    /// Folder with our certificate and admission.
    pub(super) folder: PathBuf,
    /// What the cluster knows.
    pub(super) store: Store,
    /// Where the log has us.
    pub(super) replica: Replica,
    /// Where others say that they are.
    pub(super) peers: Peers,
}

impl Keeper {
    /// Until cancelled.
    pub(super) async fn keep(self, cancel: CancellationToken) {
        cancel.run_until_cancelled(self.keep_on()).await;
    }

    async fn keep_on(&self) {
        let mut changes = self.store.changes();
        loop {
            match self.known() {
                Some(known) => {
                    let told = timeout(TELL_MAX, self.tell()).await;
                    if let Err(why) = told.unwrap_or_else(|_| Err("no member has recorded it yet".to_owned()))
                    {
                        tracing::warn!(
                            known,
                            address = self.address,
                            why,
                            "the cluster does not know yet where we are"
                        );
                    }
                    // What was recorded may not be applied here yet.
                    tokio::time::sleep(TELL_AGAIN).await;
                }
                // Known there, or not in the state yet.
                None => changes.changed().await,
            }
        }
    }

    /// Where the cluster looks for us, while that is elsewhere.
    fn known(&self) -> Option<String> {
        let recorded = self.store.read(|state| {
            let record = state.hosts().get(&self.server)?;
            record.is_in().then(|| record.host.address.clone())
        })?;
        let in_the_log = self.replica.membership();
        let in_the_log = in_the_log.address(self.replica.member()).map(str::to_owned);
        [Some(recorded), in_the_log]
            .into_iter()
            .flatten()
            .find(|known| *known != self.address)
    }

    async fn tell(&self) -> Result<(), String> {
        if self.store.leads_now() {
            let (server, address) = (self.server.clone(), self.address.clone());
            let told = self
                .store
                .propose(Command::RecordAddress { server, address })
                .await;
            return told.map(drop).map_err(|error| error.to_string());
        }
        // All at once: most may be gone from where they were.
        let mut told: FuturesUnordered<_> = self
            .doors()
            .into_iter()
            .map(|door| async move { client::tell_address(&[door], &self.folder, &self.address).await })
            .collect();
        let mut why = Vec::new();
        while let Some(told) = told.next().await {
            match told {
                Ok(()) => return Ok(()),
                Err(error) => why.push(error.to_string()),
            }
        }
        Err(why.join("; "))
    }

    /// The others' doors: as the configuration, they themselves and the state have them, and as this host was told last.
    fn doors(&self) -> Vec<String> {
        let recorded: Vec<String> = self.store.read(|state| {
            let others = state
                .members()
                .filter(|(_, record)| record.host.server != self.server);
            others.map(|(_, record)| record.host.address.clone()).collect()
        });
        let last = Admission::read(&self.folder).ok().flatten();
        let last = last.map_or_else(Vec::new, |admission| admission.doors);
        let named = self.members.iter().cloned().chain(self.peers.moved_to());
        let mut doors: Vec<String> = Vec::new();
        for door in named.chain(recorded).chain(last) {
            if door != self.address && !doors.contains(&door) {
                doors.push(door);
            }
        }
        doors
    }
}

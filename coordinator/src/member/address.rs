//! Where this member is to be found, when that is not where the cluster looks for it: its host got another address.
//!
//! The others reach a member that has moved no more, and it can still reach them. So it tells one of them, whose leader
//! then looks for it at the new address.

use std::path::PathBuf;
use std::time::Duration;

use coordinator_core::state_machine::Command;
use protocol::id::ServerId;
use tokio_util::sync::CancellationToken;

use crate::join::{Admission, client};
use crate::store::Store;

/// Between two tries to tell it.
const TELL_AGAIN: Duration = Duration::from_secs(2);

/// Sees to it that the cluster knows a member's address.
#[derive(Debug)]
pub(super) struct Keeper {
    /// As the configuration has it.
    pub(super) address: String,
    /// Our id.
    pub(super) server: ServerId,
    /// Folder with our certificate and admission.
    pub(super) folder: PathBuf,
    /// What the cluster knows.
    pub(super) store: Store,
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
                Some(known) if known != self.address => {
                    if let Err(why) = self.tell().await {
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
                // Known, or not in the state yet.
                _ => changes.changed().await,
            }
        }
    }

    fn known(&self) -> Option<String> {
        self.store.read(|state| {
            let record = state.hosts().get(&self.server)?;
            record.is_in().then(|| record.host.address.clone())
        })
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
        let told = client::tell_address(&self.doors(), &self.folder, &self.address).await;
        told.map_err(|error| error.to_string())
    }

    /// The others' doors: as the state has them, and as this host was told last.
    fn doors(&self) -> Vec<String> {
        let mut doors: Vec<String> = self.store.read(|state| {
            let others = state
                .members()
                .filter(|(_, record)| record.host.server != self.server);
            others.map(|(_, record)| record.host.address.clone()).collect()
        });
        let told = Admission::read(&self.folder).ok().flatten();
        for door in told.map_or_else(Vec::new, |admission| admission.doors) {
            if door != self.address && !doors.contains(&door) {
                doors.push(door);
            }
        }
        doors
    }
}

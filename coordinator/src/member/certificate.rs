//! A member's own certificate: renewed in time, and when the cluster changes over to another authority; the new one
//! is shown at the door at once.

use std::path::PathBuf;
use std::time::Duration;

use coordinator_core::state_machine::State;
use protocol::id::ServerId;
use tokio_util::sync::CancellationToken;

use crate::door;
use crate::identity::Identity;
use crate::join::client;
use crate::store::Store;

/// Between two looks at the age of our certificate.
const RENEW_EVERY: Duration = Duration::from_secs(60 * 60);
/// Between two tries to change over to another authority.
const CHANGE_OVER_AGAIN: Duration = Duration::from_secs(1);

/// Keeps the certificate of a member good.
#[derive(Debug)]
pub(super) struct Keeper {
    /// Where it is shown.
    pub(super) endpoint: quinn::Endpoint,
    /// Where it lies.
    pub(super) folder: PathBuf,
    /// Our id.
    pub(super) server: ServerId,
    /// Which authorities there are, and what the time is.
    pub(super) store: Store,
}

impl Keeper {
    /// Until cancelled.
    pub(super) async fn keep(self, cancel: CancellationToken) {
        cancel.run_until_cancelled(self.keep_on()).await;
    }

    async fn keep_on(&self) {
        let mut looks = tokio::time::interval(RENEW_EVERY);
        let mut changes = self.store.changes();
        loop {
            if let Some(wanted) = self.wanted() {
                if self.change_over(&wanted).await {
                    // What was recorded may not be applied here yet.
                    changes.changed().await;
                }
                continue;
            }
            tokio::select! {
                _ = looks.tick() => self.renew_if_due().await,
                () = changes.changed() => {}
            }
        }
    }

    fn wanted(&self) -> Option<Vec<[u8; 32]>> {
        let wanted = |state: &State| state.authorities_to_tell(&self.server);
        self.store.read(wanted)
    }

    /// True if that is recorded.
    async fn change_over(&self, wanted: &[[u8; 32]]) -> bool {
        let changed = client::change_over(&self.folder, wanted).await;
        // There may be a new certificate although it was not recorded yet.
        self.show();
        match changed {
            Ok(()) => {
                tracing::info!("our certificate is of the cluster's newest authority");
                true
            }
            Err(error) => {
                tracing::warn!(%error, "our certificate was not changed over; it is tried again");
                tokio::time::sleep(CHANGE_OVER_AGAIN).await;
                false
            }
        }
    }

    async fn renew_if_due(&self) {
        let now = self.store.clock().now();
        match client::renew_if_due(&self.folder, now).await {
            Ok(false) => {}
            Ok(true) => self.show(),
            Err(error) => {
                tracing::warn!(%error, "the certificate was not renewed; it is tried again in an hour");
            }
        }
    }

    fn show(&self) {
        let config = Identity::of_host(&self.folder).and_then(|identity| door::server_config(&identity));
        match config {
            Ok(config) => self.endpoint.set_server_config(Some(config)),
            Err(error) => tracing::error!(%error, "the new certificate is not used"),
        }
    }
}

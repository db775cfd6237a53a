//! A snapshot of a running member as a file for an operator, in pieces and in constant memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use coordinator_core::state_machine::codec::table_name;
use coordinator_core::state_machine::format::PROGRAM;
use protocol::snapshot_file::{Head, Recipient, Sealer, Summary};
use replica::backup::Saved;
use replica::{Leadership, Replica};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::watch;

use super::{Error, Result};
use crate::clock::Clock;
use crate::store::Store;

/// Takes snapshots of this member.
#[derive(Debug, Clone)]
pub struct Snapshots {
    cluster: String,
    store: Store,
    replica: Replica,
}

impl Snapshots {
    /// Of the member whose state is `store` and whose log is `replica`.
    #[must_use]
    pub fn new(cluster: String, store: Store, replica: Replica) -> Self {
        Self {
            cluster,
            store,
            replica,
        }
    }

    pub(super) fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Waits until there is a cluster: a snapshot without its authority could not be restored.
    pub(super) async fn founded(&self) {
        let mut changes = self.store.changes();
        while self.store.read(|state| state.cluster().is_none()) {
            changes.changed().await;
        }
    }

    pub(super) fn leadership(&self) -> watch::Receiver<Leadership> {
        self.replica.leadership()
    }

    pub(super) fn clock(&self) -> &Arc<dyn Clock> {
        self.store.clock()
    }

    /// A snapshot with everything acknowledged so far, for `recipient`.
    ///
    /// # Errors
    /// [`Error::Take`]; [`Error::Key`].
    pub async fn sealed(&self, recipient: &Recipient) -> Result<Stream> {
        let take = |error: &dyn std::fmt::Display| Error::Take(error.to_string());
        self.store.linearizable().await.map_err(|error| take(&error))?;
        let saved = self.replica.save().await.map_err(|error| take(&error))?;
        let contents = saved.contents();
        let head = Head {
            cluster: contents.cluster.clone(),
            last_index: contents.last_index.unwrap_or(0),
            created_at: self.clock().now(),
            recipient: recipient.id(),
            format: self.store.read(|state| state.format()),
            written_by: PROGRAM.to_owned(),
        };
        let mut rows: BTreeMap<String, u64> = BTreeMap::new();
        for (table, count) in &contents.tables {
            *rows.entry(table_name(*table).to_owned()).or_default() += count;
        }
        let summary = Summary {
            members: contents.members.clone(),
            rows,
            size_bytes: contents.size_bytes,
        };
        let mut ephemeral = [0; 32];
        let random = SystemRandom::new().fill(&mut ephemeral);
        random.map_err(|_| take(&"this machine has no random numbers"))?;
        let (sealer, ready) = Sealer::new(recipient, head.clone(), &summary, ephemeral)?;
        Ok(Stream {
            head,
            saved,
            sealer: Some(sealer),
            ready,
            offset: 0,
        })
    }
}

/// A snapshot file on its way.
#[derive(Debug)]
pub struct Stream {
    head: Head,
    saved: Saved,
    /// None once the end was written.
    sealer: Option<Sealer>,
    ready: Vec<u8>,
    offset: u64,
}

impl Stream {
    /// What the file says of itself.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The next bytes of the file; none after its end.
    ///
    /// # Errors
    /// What the disk says. The file is then cut off, and does not open.
    pub async fn next(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        loop {
            if !self.ready.is_empty() {
                return Ok(Some(std::mem::take(&mut self.ready)));
            }
            let Some(sealer) = &mut self.sealer else {
                return Ok(None);
            };
            let plain = self.saved.read_at(self.offset).await?;
            self.offset += plain.len() as u64;
            if !plain.is_empty() {
                self.ready = sealer.put(&plain);
            } else if let Some(sealer) = self.sealer.take() {
                self.ready = sealer.finish();
            }
        }
    }
}

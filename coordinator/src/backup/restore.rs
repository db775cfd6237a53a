//! The way back: a snapshot file becomes the store of a member that is the only one of its cluster.
//!
//! ```text
//! file --unseal--> plain file in the new folder --> rows: read once, all must be known --> State::restore
//!                                               \-> replica's store, with the rows that changed
//! ```
//! The plain file is gone when this returns. Nothing of a store is made before the whole file is known to be sound.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use coordinator_core::state_machine::host::{Cluster, NewHost};
use coordinator_core::state_machine::{Faults, Rejection, State};
use protocol::hotkey::Hotkey;
use protocol::snapshot_file::{Head, Opened, ReadError, Sealed, SnapshotKey, Summary};
use protocol::time::UnixMillis;
use replica::{RowChange, Storage};

/// Bytes that are copied at once.
const COPY_BYTES: usize = 256 * 1024;
/// The plain snapshot, for a moment, in the new folder.
const PLAIN: &str = "restored.tmp";

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The snapshot file.
    #[error("{}: {source}", path.display())]
    Snapshot {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: ReadError,
    },
    /// The cluster's name is not the one that was typed.
    #[error("{}: this is a snapshot of cluster {found:?}, not of {wanted:?}", path.display())]
    OtherCluster {
        /// Which file.
        path: PathBuf,
        /// What it is of.
        found: String,
        /// What was typed.
        wanted: String,
    },
    /// The new folder.
    #[error("{}: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// This program cannot read the state in it.
    #[error("the state in the snapshot: {0}")]
    State(String),
    /// The state has no place for the new member.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The new store.
    #[error(transparent)]
    Store(#[from] replica::Error),
}

/// Result of this room.
pub type Result<T> = std::result::Result<T, Error>;

/// A snapshot on this machine, opened with the operator's key and read once as a whole.
#[derive(Debug)]
pub struct Restoring {
    head: Head,
    summary: Summary,
    plain: Plain,
    state: State,
}

/// The plain file; gone when this is dropped.
#[derive(Debug)]
struct Plain(PathBuf);

impl Drop for Plain {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(file = %self.0.display(), %error, "a plain snapshot is left: delete it");
        }
    }
}

impl Restoring {
    /// Opens a snapshot of `cluster` and checks all of it. `folder`, which must exist, gets a file for a while.
    /// Blocks while it reads.
    ///
    /// # Errors
    /// [`Error`]; the folder is then as before.
    pub fn open(file: &Path, key: &SnapshotKey, cluster: &str, folder: &Path) -> Result<Self> {
        let mut opened = unsealed(file, key)?;
        let found = opened.head().cluster.clone();
        if found != cluster {
            return Err(Error::OtherCluster {
                path: file.to_owned(),
                found,
                wanted: cluster.to_owned(),
            });
        }
        let plain = copied(&mut opened, file, folder.join(PLAIN))?;
        let (head, summary) = (opened.head().clone(), opened.summary().clone());
        let mut rows = replica::backup::Rows::open(&plain.0)?;
        let state = State::from_rows(&mut rows, Faults::none());
        // A damaged file explains more than the row in it that makes no sense.
        rows.finish()?;
        let state = state.map_err(|error| Error::State(error.to_string()))?;
        Ok(Self {
            head,
            summary,
            plain,
            state,
        })
    }

    /// What the file says of itself.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// What is in it.
    #[must_use]
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The cluster's authority, for the new member's certificate; its key is sealed with the miner's seed.
    ///
    /// # Errors
    /// [`Rejection::NotFounded`].
    pub fn cluster(&self) -> Result<&Cluster> {
        Ok(self.state.cluster().ok_or(Rejection::NotFounded)?)
    }

    /// The miner whose state it is, if that was recorded.
    #[must_use]
    pub fn miner(&self) -> Option<&Hotkey> {
        self.state.settings().miner.as_ref()
    }

    /// Makes the store, with `host` as its cluster's only member. Returns its member id.
    ///
    /// # Errors
    /// [`Error`]; a store that was begun is not used again.
    pub async fn into_store(mut self, host: NewHost, directory: PathBuf, at: UnixMillis) -> Result<u64> {
        let address = host.address.clone();
        let member = self.state.restore(host, at)?;
        let changes = self.state.drain_rows().into_iter().map(|row| RowChange {
            table: row.table,
            key: row.key,
            value: row.value,
        });
        let storage = Storage::Files { directory };
        let mut config = replica::Config::new(&self.head.cluster, member, storage);
        config.address = address;
        replica::backup::restore(config, self.plain.0.clone(), changes.collect()).await?;
        Ok(member)
    }
}

/// Opens a snapshot file with its key.
///
/// # Errors
/// [`Error::Snapshot`].
pub fn unsealed(file: &Path, key: &SnapshotKey) -> Result<Opened<BufReader<File>>> {
    let failed = |source| Error::Snapshot {
        path: file.to_owned(),
        source,
    };
    let input = File::open(file).map_err(|error| failed(error.into()))?;
    let sealed = Sealed::open(BufReader::new(input)).map_err(failed)?;
    sealed.unseal(key).map_err(failed)
}

fn copied(from: &mut impl Read, file: &Path, to: PathBuf) -> Result<Plain> {
    let failed = |source| Error::File {
        path: to.clone(),
        source,
    };
    let mut options = OpenOptions::new();
    let out = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&to);
    let mut out = out.map_err(failed)?;
    let plain = Plain(to.clone());
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let length = from.read(&mut buffer).map_err(|error| Error::Snapshot {
            path: file.to_owned(),
            source: error.into(),
        })?;
        if length == 0 {
            return Ok(plain);
        }
        out.write_all(&buffer[..length]).map_err(failed)?;
    }
}

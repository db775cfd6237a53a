//! The host's database, `agent.redb`: the desired set and the GPUs that were last seen.
//!
//! One thread owns the file and writes durably. The file holds launch tokens, so only its owner may read it.
//! A value begins with its version (the variant of [`Versioned`]), and old versions are read for ever.

use std::io;
use std::path::{Path, PathBuf};

use protocol::gpu::DeviceInfo;
use protocol::link::Versioned;
use redb::backends::InMemoryBackend;
use redb::{Database, DatabaseError, ReadableDatabase as _, TableDefinition, TableError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};

use super::fence::DesiredSet;

const VALUES: TableDefinition<'static, &'static str, &'static [u8]> = TableDefinition::new("values");
const DESIRED: &str = "desired";
const DEVICES: &str = "devices";
/// Values have one version so far.
const VERSIONS: u8 = 1;
const QUEUE: usize = 8;
const WAY_BACK: &str = "To go on without it, stop the agent and move the file away: the next start adopts \
                        what runs, changes nothing, and gets its desired set from the coordinator.";

/// Why the database is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Two agents on one data directory.
    #[error("{0} is in use: another agent runs on this data directory")]
    InUse(PathBuf),
    /// Written by a later release.
    #[error(
        "{path}: {what} was written by a newer version of chutes-agent; install that one again. {WAY_BACK}"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Which part.
        what: String,
    },
    /// It does not read back.
    #[error("{path} is damaged: {reason}. {WAY_BACK}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The disk: full, gone, read-only.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A write did not become durable; what was there before still is.
    #[error("{path}: not written: {reason}")]
    NotWritten {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

struct Write {
    key: &'static str,
    value: Vec<u8>,
    done: oneshot::Sender<Result<(), String>>,
}

/// The way to the thread that writes.
#[derive(Debug, Clone)]
pub struct Store {
    path: PathBuf,
    writes: mpsc::Sender<Write>,
}

impl std::fmt::Debug for Write {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Write({}, {} bytes)", self.key, self.value.len())
    }
}

/// What was found in the database.
#[derive(Debug, Default)]
pub struct Found {
    /// The desired set, or the empty one that stands for "none yet".
    pub set: DesiredSet,
    /// The GPUs that were last seen, if they ever were.
    pub devices: Option<Vec<DeviceInfo>>,
}

impl Store {
    /// Opens or makes the file and reads all of it.
    ///
    /// # Errors
    /// [`Error`], each naming the file and the way back.
    pub fn open(path: &Path) -> Result<(Self, Found), Error> {
        let at = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        let damaged = |reason: String| Error::Damaged {
            path: path.to_owned(),
            reason,
        };
        if !path.try_exists().map_err(at)? {
            replica::make_database(path).map_err(|error| match error {
                DatabaseError::Storage(redb::StorageError::Io(source)) => at(source),
                other => damaged(other.to_string()),
            })?;
        }
        let database = Database::create(path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => Error::InUse(path.to_owned()),
            DatabaseError::UpgradeRequired(version) => damaged(format!("its format {version} is not ours")),
            DatabaseError::Storage(redb::StorageError::Io(source))
                if !matches!(
                    source.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData
                ) =>
            {
                at(source)
            }
            other => damaged(other.to_string()),
        })?;
        let found = Found {
            set: read(&database, path, DESIRED)?.unwrap_or_default(),
            devices: read(&database, path, DEVICES)?,
        };
        let (writes, queue) = mpsc::channel(QUEUE);
        spawn_writer(database, queue);
        let path = path.to_owned();
        Ok((Self { path, writes }, found))
    }

    /// One that nothing outlives.
    ///
    /// # Errors
    /// Memory is short.
    pub fn in_memory() -> Result<(Self, Found), Error> {
        let path = PathBuf::from("memory");
        let made = Database::builder().create_with_backend(InMemoryBackend::new());
        let database = made.map_err(|error| Error::Damaged {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        let (writes, queue) = mpsc::channel(QUEUE);
        spawn_writer(database, queue);
        Ok((Self { path, writes }, Found::default()))
    }

    /// Replaces the desired set; it is on disk when this returns.
    ///
    /// # Errors
    /// [`Error::NotWritten`]: the last set is still there.
    pub async fn put_set(&self, set: &DesiredSet) -> Result<(), Error> {
        self.put(DESIRED, set).await
    }

    /// Remembers the GPUs.
    ///
    /// # Errors
    /// [`Error::NotWritten`].
    pub async fn put_devices(&self, devices: &[DeviceInfo]) -> Result<(), Error> {
        self.put(DEVICES, &devices).await
    }

    async fn put(&self, key: &'static str, value: &impl Serialize) -> Result<(), Error> {
        let failed = |reason: String| Error::NotWritten {
            path: self.path.clone(),
            reason,
        };
        let value = encode(value).map_err(|error| failed(error.to_string()))?;
        let (done, result) = oneshot::channel();
        let gone = "the writer has ended";
        let write = Write { key, value, done };
        self.writes
            .send(write)
            .await
            .map_err(|_| failed(gone.to_owned()))?;
        result.await.map_err(|_| failed(gone.to_owned()))?.map_err(failed)
    }
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>, postcard::Error> {
    postcard::to_allocvec(&Versioned::V1(value))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the thread is the seam between the database and the rest"
)]
fn spawn_writer(database: Database, mut queue: mpsc::Receiver<Write>) {
    std::thread::spawn(move || {
        while let Some(write) = queue.blocking_recv() {
            let result = commit(&database, write.key, &write.value).map_err(|error| error.to_string());
            // The one who asked may have gone; the value is written all the same.
            let _ = write.done.send(result);
        }
    });
}

fn commit(database: &Database, key: &str, value: &[u8]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    transaction.open_table(VALUES)?.insert(key, value)?;
    transaction.commit()?;
    Ok(())
}

fn read<T: DeserializeOwned>(database: &Database, path: &Path, key: &str) -> Result<Option<T>, Error> {
    let damaged = |reason: String| Error::Damaged {
        path: path.to_owned(),
        reason,
    };
    let bytes = || -> Result<Option<Vec<u8>>, redb::Error> {
        let table = match database.begin_read()?.open_table(VALUES) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(redb::ReadableTable::get(&table, key)?.map(|value| value.value().to_vec()))
    };
    let Some(bytes) = bytes().map_err(|error| damaged(error.to_string()))? else {
        return Ok(None);
    };
    if bytes.first().is_some_and(|version| *version >= VERSIONS) {
        return Err(Error::Newer {
            path: path.to_owned(),
            what: format!("value {key:?}"),
        });
    }
    let value = postcard::from_bytes::<Versioned<T>>(&bytes);
    let value = value.map_err(|error| damaged(format!("value {key:?}: {error}")))?;
    Ok(Some(value.into_latest()))
}

#[cfg(test)]
mod tests {
    use super::super::fence::tests::spec;
    use super::*;
    use protocol::workload::{Fence, Secret};
    use std::fs::File;
    use std::os::unix::fs::PermissionsExt as _;

    fn set() -> DesiredSet {
        let mut spec = spec("deployment-1");
        spec.launch_token = Some(Secret::new("token".to_owned()));
        DesiredSet {
            fence: Fence {
                incarnation: 1,
                revision: 300,
            },
            workloads: vec![spec],
            reported: true,
        }
    }

    /// Opens once more after the writer of the last one has let go of the file.
    async fn reopen(path: &Path) -> Result<(Store, Found), Error> {
        loop {
            match Store::open(path) {
                Err(Error::InUse(_)) => tokio::task::yield_now().await,
                other => return other,
            }
        }
    }

    #[tokio::test]
    async fn a_set_is_read_back_by_the_next_agent_and_by_no_other() {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let path = folder.path().join("agent.redb");
        let (store, found) = Store::open(&path).expect("a new one");
        assert_eq!(found.set, DesiredSet::default());
        let error = Store::open(&path).expect_err("in use").to_string();
        assert!(
            error.contains("another agent runs") && error.contains("agent.redb"),
            "{error}"
        );
        store.put_set(&set()).await.expect("the disk is fine");
        drop(store);
        let (_store, found) = reopen(&path).await.expect("its own file");
        assert_eq!(found.set, set());
        let mode = std::fs::metadata(&path).expect("it exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn what_a_crash_left_while_the_database_was_made_is_no_damage() {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let path = folder.path().join("agent.redb");
        std::fs::write(path.with_extension("new"), [0; 5000]).expect("ours");
        Store::open(&path).expect("a new one");
        assert!(path.exists() && !path.with_extension("new").exists());
    }

    #[test]
    fn the_first_version_is_read_for_ever() {
        let golden = include_str!("golden/desired_v1.hex").trim();
        let bytes = hex::decode(golden).expect("hexadecimal");
        let read: Versioned<DesiredSet> = postcard::from_bytes(&bytes).expect("it was written by us");
        assert_eq!(read.into_latest(), set());
        assert_eq!(hex::encode(encode(&set()).expect("plain data")), golden);
    }

    #[tokio::test]
    async fn newer_and_damaged_files_are_named_with_the_way_back() {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let path = folder.path().join("agent.redb");
        for (value, expected) in [(&[1, 2, 3][..], "newer version"), (&[0, 9][..], "is damaged")] {
            let database = Database::create(&path).expect("a new one");
            commit(&database, DESIRED, value).expect("the disk is fine");
            drop(database);
            let error = Store::open(&path).expect_err("refused").to_string();
            assert!(
                error.contains(expected) && error.contains("move the file away"),
                "{error}"
            );
            assert!(error.contains("agent.redb"), "{error}");
        }
        let length = std::fs::metadata(&path).expect("it exists").len();
        let file = File::options().write(true).open(&path).expect("ours");
        file.set_len(length / 2).expect("ours");
        let error = Store::open(&path).expect_err("refused").to_string();
        assert!(error.contains("is damaged"), "{error}");
        std::fs::write(&path, "not a database").expect("ours");
        let error = Store::open(&path).expect_err("refused").to_string();
        assert!(error.contains("is damaged"), "{error}");
    }
}

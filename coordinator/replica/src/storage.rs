//! Where bytes go: files or caller-supplied backends, and the threads that write them.
//!
//! redb blocks and has one writer at a time, so each file has one [`Lane`]: a queue and, in production, a
//! thread that takes all waiting jobs at once (that is the group commit). In simulation the same worker runs
//! inline, without threads. This file is the only one of the crate that owns threads.

use redb::{Builder, Database, DatabaseError, ReadableDatabase, StorageError, TableDefinition};
use std::ops::Bound;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;
use crate::format::{Fault, Identity, VERSION};
use crate::snapshot::MemorySnapshots;
use redb::{BackendError, StorageBackend, backends::FileBackend};

mod lane;
mod unwritten;

pub(crate) use lane::{Closed, Lane, Worker};
use unwritten::Unwritten;

/// Where a replica keeps its data.
#[derive(Debug)]
pub enum Storage {
    /// `raft-log.redb`, `state.redb`, `state.snapshot` and `member` in this directory, which is created if
    /// missing. Files are readable by their owner only.
    Files {
        /// The directory; one member each.
        directory: PathBuf,
    },
    /// Backends of the caller, for tests and simulation. An empty backend is a new store.
    Backend {
        /// Holds the log and the vote.
        log: Box<dyn StorageBackend>,
        /// Holds the rows of the state.
        state: Box<dyn StorageBackend>,
        /// Holds the last snapshot.
        snapshots: MemorySnapshots,
    },
}

/// Who does blocking work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// One thread for each file: production.
    Thread,
    /// The calling task: simulation, where threads would make runs differ.
    Inline,
}

impl Writer {
    /// Does blocking work that belongs to no file's queue, such as writing a snapshot.
    #[expect(
        clippy::disallowed_methods,
        reason = "the seam for blocking work; inline in simulation"
    )]
    pub(crate) async fn blocking<T, F>(self, work: F) -> Result<T, Closed>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        match self {
            Self::Inline => Ok(work()),
            Self::Thread => tokio::task::spawn_blocking(work).await.map_err(|_| Closed),
        }
    }
}

pub(crate) const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");
const IDENTITY: &str = "identity";
const FORMAT: &str = "format";

/// A backend that counts how often data was forced to the disk.
#[derive(Debug)]
struct Counting {
    backend: Box<dyn StorageBackend>,
    fsyncs: Arc<AtomicU64>,
}

impl StorageBackend for Counting {
    fn len(&self) -> std::io::Result<u64> {
        self.backend.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.backend.read(offset, out)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.backend.set_len(len)
    }

    fn sync_data(&self) -> std::io::Result<()> {
        self.fsyncs.fetch_add(1, Ordering::Relaxed);
        self.backend.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.backend.write(offset, data)
    }

    fn close(&self) -> std::io::Result<()> {
        self.backend.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.backend.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.backend.try_lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.backend.unlock_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.backend.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.backend.lock_shared_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.backend.query_lock_range(start, end)
    }
}

/// One redb file, opened and checked, with its name for messages.
#[derive(Debug)]
pub(crate) struct StoreFile {
    pub(crate) database: Database,
    pub(crate) file: PathBuf,
}

impl StoreFile {
    /// Opens a database, verifies all its checksums, and its identity; makes a new one in an empty backend.
    pub(crate) fn open(
        backend: Box<dyn StorageBackend>,
        file: PathBuf,
        identity: &Identity,
        cache_bytes: usize,
        fsyncs: Arc<AtomicU64>,
    ) -> Result<Self, Error> {
        let backend = Counting { backend, fsyncs };
        let opened = catch_unwind(AssertUnwindSafe(move || {
            Builder::new()
                .set_cache_size(cache_bytes)
                .set_check_integrity_on_open(true)
                .create_with_backend(backend)
        }));
        // A file that someone shortened can make the library panic rather than return an error.
        let database = match opened {
            Ok(opened) => opened.map_err(|error| database_error(&file, error))?,
            Err(_) => {
                return Err(Error::Damaged {
                    file,
                    reason: "its structure makes no sense".into(),
                });
            }
        };
        let store = Self { database, file };
        store.check_identity(identity)?;
        Ok(store)
    }

    fn check_identity(&self, identity: &Identity) -> Result<(), Error> {
        let (format, found) = self.read(|transaction| {
            let table = match transaction.open_table(META) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok((None, None)),
                other => other?,
            };
            let format = table.get(FORMAT)?.map(|value| value.value().to_vec());
            let identity = table.get(IDENTITY)?.map(|value| value.value().to_vec());
            Ok((format, identity))
        })?;
        let (Some(format), Some(found)) = (format, found) else {
            return self.stamp(identity);
        };
        match format.as_slice() {
            [version] if *version > VERSION => return Err(self.newer(*version)),
            [1..=VERSION] => {}
            _ => return Err(self.damaged("its format mark makes no sense")),
        }
        let found = Identity::decode(&found).map_err(|fault| self.fault(fault))?;
        if found == *identity {
            return Ok(());
        }
        Err(Error::Foreign {
            file: self.file.clone(),
            found: found.to_string(),
            expected: identity.to_string(),
        })
    }

    fn stamp(&self, identity: &Identity) -> Result<(), Error> {
        let write = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            {
                let mut table = transaction.open_table(META)?;
                table.insert(FORMAT, [VERSION].as_slice())?;
                table.insert(IDENTITY, identity.encode().as_slice())?;
            }
            transaction.commit()?;
            Ok(())
        };
        write().map_err(|error| self.error(error))
    }

    /// Runs a read; errors get the name of the file.
    pub(crate) fn read<T>(
        &self,
        read: impl FnOnce(&redb::ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, Error> {
        let run = || read(&self.database.begin_read()?);
        run().map_err(|error| self.error(error))
    }

    pub(crate) fn error(&self, error: redb::Error) -> Error {
        match error {
            redb::Error::Io(source) => Error::Io {
                file: self.file.clone(),
                source,
            },
            other => self.damaged(other.to_string()),
        }
    }

    pub(crate) fn fault(&self, fault: Fault) -> Error {
        fault_in(&self.file, fault)
    }

    pub(crate) fn damaged(&self, reason: impl Into<String>) -> Error {
        Error::Damaged {
            file: self.file.clone(),
            reason: reason.into(),
        }
    }

    fn newer(&self, found: u8) -> Error {
        Error::Newer {
            file: self.file.clone(),
            found,
            known: VERSION,
        }
    }
}

/// A fault in the bytes of `file`.
pub(crate) fn fault_in(file: &Path, fault: Fault) -> Error {
    match fault {
        Fault::Newer(found) => Error::Newer {
            file: file.to_owned(),
            found,
            known: VERSION,
        },
        Fault::Damaged(reason) => Error::Damaged {
            file: file.to_owned(),
            reason: reason.into(),
        },
    }
}

fn database_error(file: &Path, error: DatabaseError) -> Error {
    use std::io::ErrorKind;
    let file = file.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
            Error::AlreadyOpen { file }
        }
        DatabaseError::Storage(StorageError::Io(source))
            if !matches!(source.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof) =>
        {
            Error::Io { file, source }
        }
        other => Error::Damaged {
            file,
            reason: other.to_string(),
        },
    }
}

/// The directory of one member.
#[derive(Debug)]
pub(crate) struct Directory(PathBuf);

impl Directory {
    const LOG: &'static str = "raft-log.redb";
    const STATE: &'static str = "state.redb";
    const MEMBER: &'static str = "member";

    pub(crate) fn open(path: PathBuf) -> Result<Self, Error> {
        let directory = Self(path);
        std::fs::create_dir_all(&directory.0).map_err(|source| directory.io(&directory.0, source))?;
        Ok(directory)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    fn io(&self, file: &Path, source: std::io::Error) -> Error {
        Error::Io {
            file: file.to_owned(),
            source,
        }
    }

    /// Reads whose the directory is. If it was used before, both databases must be there: redb would take an
    /// empty file for a new one, and this member would forget its vote.
    pub(crate) fn check_member(&self, identity: &Identity) -> Result<(), Error> {
        let file = self.0.join(Self::MEMBER);
        let sealed = match std::fs::read(&file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(|source| self.io(&file, source))?,
        };
        let found = Identity::decode(&sealed).map_err(|fault| fault_in(&file, fault))?;
        if found != *identity {
            let (found, expected) = (found.to_string(), identity.to_string());
            return Err(Error::Foreign {
                file,
                found,
                expected,
            });
        }
        for name in [Self::LOG, Self::STATE] {
            let file = self.0.join(name);
            match std::fs::metadata(&file) {
                Ok(metadata) if metadata.len() > 0 => {}
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(self.io(&file, source));
                }
                _ => return Err(Error::Missing { file }),
            }
        }
        Ok(())
    }

    /// Records that this directory is in use by `identity`, once both databases exist.
    pub(crate) fn stamp_member(&self, identity: &Identity) -> Result<(), Error> {
        let file = self.0.join(Self::MEMBER);
        if file.exists() {
            return Ok(());
        }
        replace_file(&file, |out| std::io::Write::write_all(out, &identity.encode()))
            .map_err(|source| self.io(&file, source))
    }

    fn backend(&self, name: &str) -> Result<(Box<dyn StorageBackend>, PathBuf), Error> {
        let file = self.0.join(name);
        // An empty one is not ours: `check_member` has seen to that.
        if std::fs::metadata(&file).map_or(0, |found| found.len()) == 0 {
            make_database(&file).map_err(|error| database_error(&file, error))?;
        }
        let opened = private_file().read(true).create(true).truncate(false).open(&file);
        let handle = opened.map_err(|source| self.io(&file, source))?;
        let backend = FileBackend::new(handle).map_err(|error| database_error(&file, error))?;
        Ok((Box::new(backend), file))
    }

    /// Both databases of a member that has stored something, to be read and left as they are.
    pub(crate) fn unwritten(&self, cluster: &str, node_id: u64) -> Result<(Unwritten, Unwritten), Error> {
        let file = self.0.join(Self::MEMBER);
        if !file.exists() {
            return Err(Error::Missing { file });
        }
        self.check_member(&Identity {
            cluster: cluster.to_owned(),
            node_id,
        })?;
        let open = |name| {
            let file = self.0.join(name);
            Unwritten::open(&file).map_err(|source| self.io(&file, source))
        };
        Ok((open(Self::LOG)?, open(Self::STATE)?))
    }

    pub(crate) fn log(&self) -> Result<(Box<dyn StorageBackend>, PathBuf), Error> {
        self.backend(Self::LOG)
    }

    pub(crate) fn state(&self) -> Result<(Box<dyn StorageBackend>, PathBuf), Error> {
        self.backend(Self::STATE)
    }
}

/// Makes an empty redb file that only its owner may read. It is made under another name first: a full disk or a crash
/// in the middle of it must not leave something that looks like a damaged one.
///
/// # Errors
/// Those of redb, and `Storage(Io)` for the file.
pub fn make_database(file: &Path) -> Result<(), DatabaseError> {
    let unfinished = file.with_extension("new");
    let io = |error: std::io::Error| DatabaseError::Storage(StorageError::Io(error));
    let opened = private_file()
        .read(true)
        .create(true)
        .truncate(true)
        .open(&unfinished);
    let backend = FileBackend::new(opened.map_err(io)?)?;
    drop(Builder::new().create_with_backend(backend)?);
    std::fs::rename(&unfinished, file).map_err(io)?;
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(io)
}

/// Options for a file that only its owner may read.
pub(crate) fn private_file() -> std::fs::OpenOptions {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).mode(0o600);
    options
}

/// Replaces a file as a whole: after a crash either the old or the new content is there.
pub(crate) fn replace_file(
    file: &Path,
    write: impl FnOnce(&mut std::io::BufWriter<std::fs::File>) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let directory = file
        .parent()
        .ok_or_else(|| std::io::Error::other("a file has a directory"))?;
    let temporary = file.with_extension("tmp");
    let mut out = std::io::BufWriter::new(private_file().create(true).truncate(true).open(&temporary)?);
    write(&mut out)?;
    let handle = out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    handle.sync_all()?;
    drop(handle);
    std::fs::rename(&temporary, file)?;
    std::fs::File::open(directory)?.sync_all()
}

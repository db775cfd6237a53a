//! Blobs by digest on disk, shared by all validators and all pulls of this host.
//!
//! ```text
//! <directory>/lock                   one process at a time
//! <directory>/incoming/<n>           being received; emptied at start
//! <directory>/sha256/<hex>           whole and verified when it was renamed to this place
//! ```
//!
//! One request downloads a digest (it holds the [`Claim`]); the others read the same file while it grows.
//! A piece becomes readable only when the next one has come, so no reader has the whole of a blob whose
//! digest turns out wrong. Nothing is fsynced: a file found at start is hashed again before its first use.
//! Writing, hashing and reading run on blocking threads; this file is the seam that owns them.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustix::fs::{Timespec, Timestamps, UTIME_NOW, futimens, statvfs};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::registry::body::{BodyError, ResponseBody};
use crate::registry::digest::Verifier;
use crate::registry::metrics::Metrics;
use crate::registry::path::Digest;

/// Bytes read from disk at once.
const PIECE_BYTES: usize = 256 * 1024;
/// Parts up to this size are read in place, without a thread.
const SMALL_BYTES_MAX: u64 = 64 * 1024;
/// Pieces under way between a thread and a connection.
const PIECES_QUEUED: usize = 4;
/// Readers at once; beyond it requests go to the upstream directly.
const READERS_MAX: usize = 256;
/// Downloads at once; beyond it requests go to the upstream directly.
const DOWNLOADS_MAX: usize = 64;

/// Where blobs are kept, and how many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Owned by the store alone.
    pub directory: PathBuf,
    /// The blobs together stay below this; the least recently used goes first.
    pub bytes_max: u64,
    /// Nothing is stored if less than this would stay free on the file system.
    pub free_bytes_min: u64,
}

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has it.
    #[error("{0} is in use by another process")]
    Locked(PathBuf),
    /// The file system refused.
    #[error("open the blob store in {directory}: {source}")]
    Io {
        /// Where.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
}

#[derive(Debug, Clone)]
struct Stored {
    size: u64,
    last_use: u64,
    verified: bool,
}

#[derive(Debug, Default)]
struct Index {
    blobs: BTreeMap<Digest, Stored>,
    downloads: BTreeMap<Digest, watch::Receiver<Progress>>,
    /// Bytes of all blobs and of the downloads under way.
    bytes: u64,
    uses: u64,
}

#[derive(Debug, Clone)]
enum Progress {
    /// The upstream has not answered yet.
    Asking,
    /// `ready` bytes of `size` may be read.
    Receiving { file: Arc<File>, size: u64, ready: u64 },
    /// Whole and verified.
    Whole { file: Arc<File>, size: u64 },
    /// It came to nothing.
    Failed,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    index: Mutex<Index>,
    metrics: Arc<Metrics>,
    readers: Arc<Semaphore>,
    names: AtomicU64,
    _lock: File,
}

/// The blob store; clones share it.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

/// What the store has to say about a digest.
#[derive(Debug)]
pub enum Found {
    /// On disk or arriving.
    Blob(Blob),
    /// Absent; whoever holds the claim downloads it.
    Claim(Claim),
    /// The store cannot help: ask the upstream directly.
    Unavailable,
}

impl Store {
    /// Opens the directory and lists what is there.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(config: Config, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let failed = |source| Error::Io {
            directory: config.directory.clone(),
            source,
        };
        fs::create_dir_all(&config.directory).map_err(failed)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(config.directory.join("lock"))
            .map_err(failed)?;
        if lock.try_lock().is_err() {
            return Err(Error::Locked(config.directory));
        }
        let index = list(&config.directory).map_err(failed)?;
        metrics
            .stored_bytes
            .set(i64::try_from(index.bytes).unwrap_or(i64::MAX));
        Ok(Self(Arc::new(Inner {
            config,
            index: Mutex::new(index),
            metrics,
            readers: Arc::new(Semaphore::new(READERS_MAX)),
            names: AtomicU64::new(0),
            _lock: lock,
        })))
    }

    /// Looks a digest up. Waits for the upstream's first word when another request has asked it already.
    pub async fn find(&self, digest: &Digest) -> Found {
        // A claim that fails makes room for the next; nobody needs more than a few turns.
        for _ in 0..4 {
            let arriving = match self.0.look(digest) {
                Look::Stored { verified: true } => match self.0.open_blob(digest) {
                    Some(blob) => return Found::Blob(blob),
                    None => continue,
                },
                Look::Stored { verified: false } => {
                    self.verify(digest).await;
                    continue;
                }
                Look::Arriving(progress) => progress,
                Look::Claimed(sender) => {
                    return Found::Claim(Claim {
                        store: self.clone(),
                        digest: digest.clone(),
                        sender: Some(sender),
                    });
                }
                Look::Busy => return Found::Unavailable,
            };
            if let Some(blob) = Blob::arriving(arriving).await {
                return Found::Blob(blob);
            }
        }
        Found::Unavailable
    }

    /// Opens one part of a blob as a response body. `None`: no reader is free.
    #[must_use]
    pub fn body(&self, blob: &Blob, part: Range<u64>) -> Option<ResponseBody> {
        let metrics = &self.0.metrics;
        let length = part.end.saturating_sub(part.start);
        if blob.progress.is_none() && length <= SMALL_BYTES_MAX {
            let mut bytes = vec![0; usize::try_from(length).expect("at most 64 KiB")];
            blob.file.read_exact_at(&mut bytes, part.start).ok()?;
            return Some(ResponseBody::full(bytes, metrics));
        }
        let permit = Arc::clone(&self.0.readers).try_acquire_owned().ok()?;
        let (sender, pieces) = mpsc::channel(PIECES_QUEUED);
        let (file, progress) = (Arc::clone(&blob.file), blob.progress.clone());
        on_thread(move || {
            if let Err(error) = read_part(&file, progress, part, &sender) {
                let _ = sender.blocking_send(Err(error));
            }
        });
        Some(ResponseBody::Stored {
            pieces,
            remaining: length,
            permit,
            metrics: metrics.clone(),
        })
    }

    async fn verify(&self, digest: &Digest) {
        let (store, wanted) = (self.clone(), digest.clone());
        let (sender, done) = tokio::sync::oneshot::channel();
        on_thread(move || {
            let good = hash_file(&store.0.config.blob_path(&wanted), &wanted).unwrap_or(false);
            let mut index = store.0.lock();
            if good {
                if let Some(stored) = index.blobs.get_mut(&wanted) {
                    stored.verified = true;
                }
            } else {
                tracing::warn!(digest = %wanted, "a stored blob is damaged and is dropped");
                store.0.metrics.digest_mismatches.inc();
                store.0.remove(&mut index, &wanted);
            }
            drop(index);
            let _ = sender.send(());
        });
        let _ = done.await;
    }
}

enum Look {
    Stored { verified: bool },
    Arriving(watch::Receiver<Progress>),
    Claimed(watch::Sender<Progress>),
    Busy,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, digest: &Digest) -> Look {
        let mut index = self.lock();
        index.uses += 1;
        let uses = index.uses;
        if let Some(stored) = index.blobs.get_mut(digest) {
            stored.last_use = uses;
            return Look::Stored {
                verified: stored.verified,
            };
        }
        if let Some(progress) = index.downloads.get(digest) {
            return Look::Arriving(progress.clone());
        }
        if index.downloads.len() >= DOWNLOADS_MAX {
            return Look::Busy;
        }
        let (sender, receiver) = watch::channel(Progress::Asking);
        index.downloads.insert(digest.clone(), receiver);
        Look::Claimed(sender)
    }

    /// Opens a verified blob and marks it as used; forgets it if the file is gone.
    fn open_blob(&self, digest: &Digest) -> Option<Blob> {
        let opened = File::open(self.config.blob_path(digest)).and_then(|file| {
            let size = file.metadata()?.len();
            Ok((file, size))
        });
        match opened {
            Ok((file, size)) => {
                let now = Timespec {
                    tv_sec: 0,
                    tv_nsec: UTIME_NOW,
                };
                // The order of use survives a restart in the file's time; losing it costs a download.
                let _ = futimens(
                    &file,
                    &Timestamps {
                        last_access: now,
                        last_modification: now,
                    },
                );
                Some(Blob {
                    file: Arc::new(file),
                    size,
                    progress: None,
                })
            }
            Err(error) => {
                tracing::warn!(%digest, %error, "a stored blob cannot be opened and is dropped");
                let mut index = self.lock();
                self.remove(&mut index, digest);
                None
            }
        }
    }

    fn remove(&self, index: &mut Index, digest: &Digest) {
        if let Some(stored) = index.blobs.remove(digest) {
            index.bytes = index.bytes.saturating_sub(stored.size);
            self.publish_bytes(index);
            let _ = fs::remove_file(self.config.blob_path(digest));
        }
    }

    fn publish_bytes(&self, index: &Index) {
        self.metrics
            .stored_bytes
            .set(i64::try_from(index.bytes).unwrap_or(i64::MAX));
    }

    /// Makes room for `size` bytes and books them. False: it would not fit.
    fn reserve(&self, size: u64) -> bool {
        let mut index = self.lock();
        loop {
            let within = size <= self.config.bytes_max && index.bytes <= self.config.bytes_max - size;
            let free =
                statvfs(&self.config.directory).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
            if within && free.saturating_sub(size) >= self.config.free_bytes_min && free >= size {
                index.bytes += size;
                self.publish_bytes(&index);
                return true;
            }
            let oldest = index.blobs.iter().min_by_key(|(_, stored)| stored.last_use);
            let Some(digest) = oldest.map(|(digest, _)| digest.clone()) else {
                return false;
            };
            if size > self.config.bytes_max {
                return false;
            }
            self.remove(&mut index, &digest);
        }
    }

    fn unreserve(&self, size: u64) {
        let mut index = self.lock();
        index.bytes = index.bytes.saturating_sub(size);
        self.publish_bytes(&index);
    }
}

impl Config {
    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.directory
            .join(digest.algorithm().as_str())
            .join(digest.hex())
    }
}

/// A blob that can be read, on disk or still arriving.
#[derive(Debug, Clone)]
pub struct Blob {
    file: Arc<File>,
    size: u64,
    progress: Option<watch::Receiver<Progress>>,
}

impl Blob {
    /// Its whole size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// True while it is being downloaded.
    #[must_use]
    pub fn is_arriving(&self) -> bool {
        self.progress.is_some()
    }

    async fn arriving(mut progress: watch::Receiver<Progress>) -> Option<Self> {
        let started = progress
            .wait_for(|now| !matches!(now, Progress::Asking))
            .await
            .ok()?
            .clone();
        match started {
            Progress::Receiving { file, size, .. } => Some(Self {
                file,
                size,
                progress: Some(progress),
            }),
            Progress::Whole { file, size } => Some(Self {
                file,
                size,
                progress: None,
            }),
            Progress::Asking | Progress::Failed => None,
        }
    }
}

/// The right to download one digest. Dropped without [`Claim::receive`], the next request gets it.
#[derive(Debug)]
pub struct Claim {
    store: Store,
    digest: Digest,
    sender: Option<watch::Sender<Progress>>,
}

impl Claim {
    /// Starts to receive a body of `size` bytes: the pieces go into the sender that comes back, and the
    /// blob can be read at once. Dropping the sender before the end fails the download. `None`: it does not
    /// fit, or the disk refuses.
    #[must_use]
    pub fn receive(mut self, size: u64) -> Option<(Blob, mpsc::Sender<Bytes>)> {
        let inner = Arc::clone(&self.store.0);
        if !inner.reserve(size) {
            return None;
        }
        let name = inner.names.fetch_add(1, Ordering::Relaxed);
        let path = inner.config.directory.join("incoming").join(name.to_string());
        let opened = OpenOptions::new()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&path);
        let file = match opened {
            Ok(file) => Arc::new(file),
            Err(error) => {
                tracing::warn!(%error, "the blob store cannot write");
                inner.unreserve(size);
                return None;
            }
        };
        let sender = self.sender.take().expect("a claim is used once");
        let progress = sender.subscribe();
        sender.send_replace(Progress::Receiving {
            file: Arc::clone(&file),
            size,
            ready: 0,
        });
        let (pieces_in, pieces) = mpsc::channel(PIECES_QUEUED);
        let download = Download {
            store: self.store.clone(),
            digest: self.digest.clone(),
            file: Arc::clone(&file),
            path,
            size,
            sender,
        };
        on_thread(move || download.run(pieces));
        Some((
            Blob {
                file,
                size,
                progress: Some(progress),
            },
            pieces_in,
        ))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(sender) = self.sender.take() {
            self.store.0.lock().downloads.remove(&self.digest);
            sender.send_replace(Progress::Failed);
        }
    }
}

/// The receiving end of a claim, on its own thread.
struct Download {
    store: Store,
    digest: Digest,
    file: Arc<File>,
    path: PathBuf,
    size: u64,
    sender: watch::Sender<Progress>,
}

impl Download {
    fn run(self, pieces: mpsc::Receiver<Bytes>) {
        let inner = &self.store.0;
        let outcome = self
            .write(pieces)
            .and_then(|()| fs::rename(&self.path, inner.config.blob_path(&self.digest)));
        let mut index = inner.lock();
        index.downloads.remove(&self.digest);
        match outcome {
            Ok(()) => {
                index.uses += 1;
                let stored = Stored {
                    size: self.size,
                    last_use: index.uses,
                    verified: true,
                };
                index.blobs.insert(self.digest.clone(), stored);
                drop(index);
                self.sender.send_replace(Progress::Whole {
                    file: Arc::clone(&self.file),
                    size: self.size,
                });
            }
            Err(error) => {
                drop(index);
                tracing::warn!(digest = %self.digest, %error, "a download failed and nothing of it is kept");
                inner.unreserve(self.size);
                let _ = fs::remove_file(&self.path);
                self.sender.send_replace(Progress::Failed);
            }
        }
    }

    fn write(&self, mut pieces: mpsc::Receiver<Bytes>) -> io::Result<()> {
        let (mut written, mut verifier) = (0_u64, Verifier::new(self.digest.clone()));
        while let Some(piece) = pieces.blocking_recv() {
            if piece.is_empty() {
                continue;
            }
            self.sender.send_modify(|progress| {
                if let Progress::Receiving { ready, .. } = progress {
                    *ready = written;
                }
            });
            if piece.len() as u64 > self.size - written {
                return Err(io::Error::other("more bytes came than were announced"));
            }
            verifier.update(&piece);
            (&*self.file).write_all(&piece)?;
            written += piece.len() as u64;
        }
        if written < self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if !verifier.matches() {
            self.store.0.metrics.digest_mismatches.inc();
            return Err(io::Error::other("the bytes do not have the digest asked for"));
        }
        Ok(())
    }
}

/// Reads a part, following the download if there is one.
fn read_part(
    file: &File,
    mut progress: Option<watch::Receiver<Progress>>,
    part: Range<u64>,
    sender: &mpsc::Sender<Result<Bytes, BodyError>>,
) -> Result<(), BodyError> {
    let mut at = part.start;
    while at < part.end {
        let readable = match &mut progress {
            None => part.end,
            Some(progress) => wait_beyond(progress, at, sender)?.min(part.end),
        };
        while at < readable {
            let length = usize::try_from(readable - at)
                .unwrap_or(usize::MAX)
                .min(PIECE_BYTES);
            let mut piece = Vec::with_capacity(length);
            let mut reader = OffsetReader { file, at };
            let read = (&mut reader).take(length as u64).read_to_end(&mut piece);
            match read {
                Ok(0) => return Err(BodyError::Store("the file is shorter than it was".to_owned())),
                Ok(read) => at += read as u64,
                Err(error) => return Err(BodyError::Store(error.to_string())),
            }
            if sender.blocking_send(Ok(piece.into())).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Blocks until bytes beyond `at` may be read; returns where they end.
fn wait_beyond(
    progress: &mut watch::Receiver<Progress>,
    at: u64,
    client: &mpsc::Sender<Result<Bytes, BodyError>>,
) -> Result<u64, BodyError> {
    let moved = |now: &Progress| match now {
        Progress::Asking => false,
        Progress::Receiving { ready, .. } => *ready > at,
        Progress::Whole { .. } | Progress::Failed => true,
    };
    let runtime = tokio::runtime::Handle::current();
    let now = runtime.block_on(async {
        tokio::select! {
            now = progress.wait_for(moved) => now.map(|now| now.clone()).unwrap_or(Progress::Failed),
            () = client.closed() => Progress::Failed,
        }
    });
    match now {
        Progress::Receiving { ready, .. } => Ok(ready),
        Progress::Whole { size, .. } => Ok(size),
        Progress::Asking | Progress::Failed => Err(BodyError::Store("the download failed".to_owned())),
    }
}

/// Reads at an offset of its own, so that readers of one file do not disturb each other.
struct OffsetReader<'a> {
    file: &'a File,
    at: u64,
}

impl Read for OffsetReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

fn hash_file(path: &Path, digest: &Digest) -> io::Result<bool> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(0))?;
    let (mut verifier, mut buffer) = (Verifier::new(digest.clone()), vec![0; PIECE_BYTES]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(verifier.matches()),
            read => verifier.update(&buffer[..read]),
        }
    }
}

/// Lists the blobs, oldest use first, and throws away what was being received.
fn list(directory: &Path) -> io::Result<Index> {
    let incoming = directory.join("incoming");
    if incoming.exists() {
        fs::remove_dir_all(&incoming)?;
    }
    fs::create_dir(&incoming)?;
    let mut found = Vec::new();
    for algorithm in ["sha256", "sha512"] {
        let directory = directory.join(algorithm);
        fs::create_dir_all(&directory)?;
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            let digest = entry
                .file_name()
                .to_str()
                .and_then(|hex| Digest::parse(&format!("{algorithm}:{hex}")));
            if let (Some(digest), true) = (digest, metadata.is_file()) {
                found.push((metadata.modified()?, digest, metadata.len()));
            }
        }
    }
    found.sort();
    let mut index = Index::default();
    for (_, digest, size) in found {
        index.uses += 1;
        index.bytes += size;
        index.blobs.insert(
            digest,
            Stored {
                size,
                last_use: index.uses,
                verified: false,
            },
        );
    }
    Ok(index)
}

#[expect(
    clippy::disallowed_methods,
    reason = "this file is the seam that owns blocking file work"
)]
fn on_thread(work: impl FnOnce() + Send + 'static) {
    // The handle is not needed: each piece of work reports through its own channel.
    drop(tokio::task::spawn_blocking(work));
}

//! Scans the model cache and deletes what the policy chose.
//!
//! ```text
//! <cache>/<chute id>/hub/models--org--name     an item, with datasets-- and spaces--
//! <cache>/<chute id>/civitai/x.safetensors     an item
//! <cache>/.chutes-sweep.lock                   one sweeper at a time
//! <cache>/.chutes-trash/<n>                    on its way out
//! ```
//!
//! Chutes own the contents and may be hostile: every step goes by directory handles that follow no symlink.
//! An item is first renamed into the trash, so that no chute ever sees half a model, and so that deletion
//! happens under a path that only we write. The chute's own folder, and whatever has another shape than
//! the above, is counted and never deleted. All of it blocks: the front page calls it on a thread.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use protocol::id::ChuteId;
use protocol::time::UnixMillis;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstatvfs, mkdirat, openat, renameat, statat};

use crate::cache::policy::{Item, Place};

const LOCK: &str = ".chutes-sweep.lock";
const TRASH: &str = ".chutes-trash";
/// Deeper folders are counted no further: nothing that models need is.
const DEPTH_MAX: usize = 32;
/// Entries looked at in one scan; beyond it the scan fails rather than runs for ever.
const ENTRIES_MAX: u64 = 20_000_000;

/// Why a sweep ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another sweeper is at work.
    #[error("another sweeper is at work in {0}")]
    Locked(PathBuf),
    /// The cache has too many files to look at.
    #[error("the cache has more than {ENTRIES_MAX} entries")]
    TooMany,
    /// The file system refused.
    #[error("{what}: {source}")]
    Io {
        /// What we did.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

fn io_error(what: &'static str) -> impl Fn(rustix::io::Errno) -> Error {
    move |errno| Error::Io {
        what,
        source: errno.into(),
    }
}

/// What a scan found.
#[derive(Debug)]
pub struct Found {
    /// All that may go.
    pub items: Vec<Item>,
    /// Bytes beside the items.
    pub other_bytes: u64,
    /// Bytes free on the file system.
    pub free_bytes: u64,
}

/// The cache folder, held by one sweeper.
#[derive(Debug)]
pub struct Sweeper {
    root: OwnedFd,
    directory: PathBuf,
    trash: OwnedFd,
    trashed: u64,
    _lock: File,
}

impl Sweeper {
    /// Takes the lock and clears what an earlier sweep left in the trash.
    ///
    /// # Errors
    /// [`Error::Locked`] or [`Error::Io`].
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, directory, flags, Mode::empty()).map_err(io_error("open the cache folder"))?;
        let lock_path = directory.join(LOCK);
        let failed = |what: &'static str| move |source| Error::Io { what, source };
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(lock_path)
            .map_err(failed("open the lock"))?;
        if lock.try_lock().is_err() {
            return Err(Error::Locked(directory.to_owned()));
        }
        let trash_path = directory.join(TRASH);
        if let Err(error) = fs::remove_dir_all(&trash_path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(Error::Io {
                what: "clear the trash",
                source: error,
            });
        }
        mkdirat(&root, TRASH, Mode::RWXU).map_err(io_error("make the trash"))?;
        let trash = open_folder(root.as_fd(), OsStr::new(TRASH)).map_err(io_error("open the trash"))?;
        Ok(Self {
            root,
            directory: directory.to_owned(),
            trash,
            trashed: 0,
            _lock: lock,
        })
    }

    /// Lists what is there. A chute's folder that cannot be read is left out, with a warning.
    ///
    /// # Errors
    /// [`Error`].
    pub fn scan(&self) -> Result<Found, Error> {
        let stat = fstatvfs(&self.root).map_err(io_error("ask for free space"))?;
        let mut scan = Scan {
            items: Vec::new(),
            other_bytes: 0,
            entries: 0,
        };
        for (name, kind) in list(self.root.as_fd()).map_err(io_error("list the cache folder"))? {
            if name == LOCK.as_bytes() || name == TRASH.as_bytes() {
                continue;
            }
            let chute = std::str::from_utf8(&name)
                .ok()
                .and_then(|name| ChuteId::parse(name).ok());
            match chute {
                Some(chute) if kind == FileType::Directory => {
                    if let Err(errno) = scan.chute(self.root.as_fd(), &chute)? {
                        tracing::warn!(%chute, %errno, "a chute's cache cannot be read");
                    }
                }
                _ => {
                    scan.other_bytes += scan
                        .measure(self.root.as_fd(), OsStr::from_bytes(&name), 0)?
                        .bytes
                }
            }
        }
        Ok(Found {
            items: scan.items,
            other_bytes: scan.other_bytes,
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }

    /// Takes an item out of its chute's sight. The space is free only after [`Sweeper::empty_trash`].
    ///
    /// # Errors
    /// [`Error::Io`], also when a folder on the way has become a symlink.
    pub fn evict(&mut self, item: &Item) -> Result<(), Error> {
        let (folder, name) = match &item.place {
            Place::Hub(name) => ("hub", name),
            Place::Civitai(name) => ("civitai", name),
        };
        let open = |parent: BorrowedFd<'_>, name: &str| open_folder(parent, OsStr::new(name));
        let chute =
            open(self.root.as_fd(), item.chute.as_str()).map_err(io_error("open the chute's folder"))?;
        let folder = open(chute.as_fd(), folder).map_err(io_error("open the folder of models"))?;
        self.trashed += 1;
        renameat(&folder, name.as_str(), &self.trash, self.trashed.to_string())
            .map_err(io_error("move to the trash"))
    }

    /// Deletes what was evicted.
    ///
    /// # Errors
    /// [`Error::Io`]; what is left goes with the next sweep.
    pub fn empty_trash(&mut self) -> Result<(), Error> {
        let path = self.directory.join(TRASH);
        let failed = |source| Error::Io {
            what: "empty the trash",
            source,
        };
        for entry in fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // Of a symlink only the link goes; the standard library follows none on the way down.
            let is_folder = entry.file_type().map_err(failed)?.is_dir();
            let gone = if is_folder {
                fs::remove_dir_all(entry.path())
            } else {
                fs::remove_file(entry.path())
            };
            gone.map_err(failed)?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Measure {
    bytes: u64,
    touched_at: UnixMillis,
}

struct Scan {
    items: Vec<Item>,
    other_bytes: u64,
    entries: u64,
}

impl Scan {
    /// One chute's folder. The inner error is the file system's; the outer one ends the scan.
    fn chute(
        &mut self,
        root: BorrowedFd<'_>,
        chute: &ChuteId,
    ) -> Result<Result<(), rustix::io::Errno>, Error> {
        let folder = match open_folder(root, OsStr::new(chute.as_str())) {
            Ok(folder) => folder,
            Err(errno) => return Ok(Err(errno)),
        };
        let names = match list(folder.as_fd()) {
            Ok(names) => names,
            Err(errno) => return Ok(Err(errno)),
        };
        for (name, kind) in names {
            let place: Option<fn(String) -> Place> = match name.as_slice() {
                b"hub" if kind == FileType::Directory => Some(Place::Hub),
                b"civitai" if kind == FileType::Directory => Some(Place::Civitai),
                _ => None,
            };
            match place {
                Some(place) => self.models(folder.as_fd(), &name, chute, place)?,
                None => self.other_bytes += self.measure(folder.as_fd(), OsStr::from_bytes(&name), 0)?.bytes,
            }
        }
        Ok(Ok(()))
    }

    /// The items of one `hub` or `civitai` folder.
    fn models(
        &mut self,
        chute_folder: BorrowedFd<'_>,
        folder: &[u8],
        chute: &ChuteId,
        place: fn(String) -> Place,
    ) -> Result<(), Error> {
        let Ok(folder) = open_folder(chute_folder, OsStr::from_bytes(folder)) else {
            return Ok(());
        };
        let Ok(names) = list(folder.as_fd()) else {
            return Ok(());
        };
        for (name, kind) in names {
            let measure = self.measure(folder.as_fd(), OsStr::from_bytes(&name), 0)?;
            let place = String::from_utf8(name).ok().map(place);
            match place.filter(|place| is_item(place, kind)) {
                Some(place) => self.items.push(Item {
                    chute: chute.clone(),
                    place,
                    bytes: measure.bytes,
                    touched_at: measure.touched_at,
                }),
                None => self.other_bytes += measure.bytes,
            }
        }
        Ok(())
    }

    /// Bytes on disk and newest time of everything below, symlinks counted as themselves.
    fn measure(&mut self, parent: BorrowedFd<'_>, name: &OsStr, depth: usize) -> Result<Measure, Error> {
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            return Err(Error::TooMany);
        }
        // What vanished or cannot be read in the meantime counts for nothing.
        let Ok(stat) = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) else {
            return Ok(Measure::default());
        };
        let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let seconds = if is_folder {
            stat.st_mtime
        } else {
            stat.st_mtime.max(stat.st_atime)
        };
        // A file with several links takes its room once; folders always have several.
        #[allow(
            clippy::useless_conversion,
            reason = "the field is narrower on other processors"
        )]
        let links = if is_folder {
            1
        } else {
            u64::from(stat.st_nlink).max(1)
        };
        let mut whole = Measure {
            bytes: u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512) / links,
            touched_at: UnixMillis::from_unix_seconds(u64::try_from(seconds).unwrap_or(0)),
        };
        if is_folder
            && depth < DEPTH_MAX
            && let Ok(folder) = open_folder(parent, name)
            && let Ok(names) = list(folder.as_fd())
        {
            for (name, _) in names {
                let part = self.measure(folder.as_fd(), OsStr::from_bytes(&name), depth + 1)?;
                whole.bytes = whole.bytes.saturating_add(part.bytes);
                whole.touched_at = whole.touched_at.max(part.touched_at);
            }
        }
        Ok(whole)
    }
}

fn is_item(place: &Place, kind: FileType) -> bool {
    match place {
        Place::Hub(name) => {
            let known = ["models--", "datasets--", "spaces--"]
                .iter()
                .any(|prefix| name.starts_with(prefix));
            known && kind == FileType::Directory
        }
        Place::Civitai(name) => name.ends_with(".safetensors") && kind == FileType::RegularFile,
    }
}

fn open_folder(parent: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, rustix::io::Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

fn list(folder: BorrowedFd<'_>) -> Result<Vec<(Vec<u8>, FileType)>, rustix::io::Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => statat(folder, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)
                .map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode)),
            kind => kind,
        };
        names.push((name.to_vec(), kind));
    }
    names.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(names)
}

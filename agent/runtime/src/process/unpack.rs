//! Unpacks the layers of an image into a folder.
//!
//! A layer is a stranger's archive: no name in it may lead out of the folder, neither by itself nor over a
//! link that an earlier entry made. So every path is resolved within the folder, as if that were the root.
//! Owners, set-id bits and device files are left out: all belongs to the agent's user.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use flate2::read::MultiGzDecoder;
use tar::{Archive, EntryType};

const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";
const LINKS_MAX: usize = 40;
const ENTRIES_MAX: usize = 2_000_000;

/// Why a layer was not unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A name leads out of the folder.
    #[error("the layer has an entry {0:?} that leads out of the image")]
    Escape(PathBuf),
    /// More content than is allowed.
    #[error("the image unpacks to more than {0} bytes or {ENTRIES_MAX} entries in a layer")]
    TooLarge(u64),
    /// Nobody waits for it any more.
    #[error("cancelled")]
    Cancelled,
    /// A broken archive, or our own disk.
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
}

/// What unpacking may use up, over all layers of an image.
#[derive(Debug)]
pub(crate) struct Budget {
    /// Bytes of content in all.
    pub(crate) bytes_max: u64,
    /// Used so far.
    pub(crate) bytes_used: u64,
}

/// Unpacks one layer, plain or compressed with gzip, over what is in `root` already.
pub(crate) fn unpack(
    layer: &Path,
    root: &Path,
    budget: &mut Budget,
    cancelled: &AtomicBool,
) -> Result<(), Error> {
    let at = |error| Error::Io(layer.to_owned(), error);
    let mut magic = [0; 2];
    let is_gzip = File::open(layer)
        .and_then(|mut file| file.read_exact(&mut magic))
        .is_ok()
        && magic == [0x1f, 0x8b];
    let file = BufReader::with_capacity(1 << 16, File::open(layer).map_err(at)?);
    let reader: Box<dyn Read> = if is_gzip {
        Box::new(MultiGzDecoder::new(file))
    } else {
        Box::new(file)
    };
    let mut archive = Archive::new(reader);
    let mut written = BTreeSet::new();
    for (count, entry) in archive.entries().map_err(at)?.enumerate() {
        let mut entry = entry.map_err(at)?;
        if cancelled.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let name = entry.path().map_err(at)?.into_owned();
        budget.bytes_used = budget.bytes_used.saturating_add(entry.size());
        if budget.bytes_used > budget.bytes_max || count >= ENTRIES_MAX {
            return Err(Error::TooLarge(budget.bytes_max));
        }
        let name = inside(&name)?;
        if name.as_os_str().is_empty() {
            continue;
        }
        place(&mut entry, root, &name, &mut written).map_err(|problem| match problem {
            Problem::Escape => Error::Escape(name.clone()),
            Problem::Io(error) => Error::Io(name.clone(), error),
        })?;
    }
    Ok(())
}

enum Problem {
    Escape,
    Io(io::Error),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn place<R: Read>(
    entry: &mut tar::Entry<'_, R>,
    root: &Path,
    name: &Path,
    written: &mut BTreeSet<PathBuf>,
) -> Result<(), Problem> {
    let (Some(parent), Some(last)) = (name.parent(), name.file_name()) else {
        return Err(Problem::Escape);
    };
    let parent = resolve(root, parent).ok_or(Problem::Escape)?;
    fs::create_dir_all(&parent)?;
    if let Some(last) = last.to_str().filter(|last| last.starts_with(WHITEOUT)) {
        if last == OPAQUE {
            return clear(&parent, written);
        }
        let hidden = &last[WHITEOUT.len()..];
        if matches!(hidden, "" | "." | "..") {
            return Err(Problem::Escape);
        }
        return remove(&parent.join(hidden), written);
    }
    let path = parent.join(last);
    let mode = entry.header().mode()? & 0o777;
    match entry.header().entry_type() {
        EntryType::Directory => {
            if !fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir()) {
                remove(&path, &BTreeSet::new())?;
                fs::create_dir(&path)?;
            }
            fs::set_permissions(&path, fs::Permissions::from_mode(mode | 0o700))?;
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            remove(&path, &BTreeSet::new())?;
            let mode = mode | 0o600;
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .mode(mode)
                .open(&path)?;
            io::copy(entry, &mut file)?;
            file.set_permissions(fs::Permissions::from_mode(mode))?;
        }
        EntryType::Symlink => {
            let target = entry.link_name()?.ok_or(Problem::Escape)?.into_owned();
            remove(&path, &BTreeSet::new())?;
            // Where it points to does not matter: nobody here follows it without `resolve`.
            std::os::unix::fs::symlink(target, &path)?;
        }
        EntryType::Link => {
            let target = entry.link_name()?.ok_or(Problem::Escape)?.into_owned();
            let target = inside(&target).map_err(|_| Problem::Escape)?;
            let (Some(folder), Some(last)) = (target.parent(), target.file_name()) else {
                return Err(Problem::Escape);
            };
            let target = resolve(root, folder).ok_or(Problem::Escape)?.join(last);
            if target != path {
                remove(&path, &BTreeSet::new())?;
                fs::hard_link(&target, &path)?;
            }
        }
        // Devices and pipes cannot be made by every user, and no chute looks for them in its image.
        _ => return Ok(()),
    }
    written.insert(path);
    Ok(())
}

/// Removes what an earlier layer left at a path; what this layer wrote stays.
fn remove(path: &Path, written: &BTreeSet<PathBuf>) -> Result<(), Problem> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) if written.contains(path) => Ok(()),
        Ok(found) if found.is_dir() => Ok(fs::remove_dir_all(path)?),
        Ok(_) => Ok(fs::remove_file(path)?),
    }
}

fn clear(folder: &Path, written: &BTreeSet<PathBuf>) -> Result<(), Problem> {
    for item in fs::read_dir(folder)? {
        let path = item?.path();
        let holds_new = written
            .range(path.clone()..)
            .next()
            .is_some_and(|next| next.starts_with(&path));
        match holds_new && fs::symlink_metadata(&path)?.is_dir() {
            true => clear(&path, written)?,
            false => remove(&path, written)?,
        }
    }
    Ok(())
}

/// The name of an entry as a plain relative path.
fn inside(name: &Path) -> Result<PathBuf, Error> {
    let mut plain = PathBuf::new();
    for part in name.components() {
        match part {
            Component::Normal(part) => plain.push(part),
            Component::CurDir => {}
            Component::RootDir | Component::ParentDir | Component::Prefix(_) => {
                return Err(Error::Escape(name.to_owned()));
            }
        }
    }
    Ok(plain)
}

/// Follows a path inside the image with all links, as if `root` were the root of the file system. What
/// does not exist yet is taken as written. Nothing when the links lead in a circle.
pub(crate) fn resolve(root: &Path, path: &Path) -> Option<PathBuf> {
    let mut pending: Vec<PathBuf> = path
        .components()
        .rev()
        .map(|c| PathBuf::from(c.as_os_str()))
        .collect();
    let mut done: Vec<PathBuf> = Vec::new();
    let mut links = 0;
    while let Some(part) = pending.pop() {
        match part.components().next() {
            Some(Component::Normal(_)) => {}
            Some(Component::ParentDir) => {
                done.pop();
                continue;
            }
            Some(Component::RootDir) => {
                done.clear();
                continue;
            }
            _ => continue,
        }
        let here = root.join(done.iter().collect::<PathBuf>()).join(&part);
        match fs::read_link(&here) {
            Ok(target) => {
                links += 1;
                if links > LINKS_MAX {
                    return None;
                }
                pending.extend(target.components().rev().map(|c| PathBuf::from(c.as_os_str())));
            }
            Err(_) => done.push(part),
        }
    }
    Some(root.join(done.iter().collect::<PathBuf>()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    enum Item<'a> {
        File(&'a str, &'a str),
        Folder(&'a str),
        Symlink(&'a str, &'a str),
        Hardlink(&'a str, &'a str),
        Device(&'a str),
    }
    use Item::{Device, File as Plain, Folder, Hardlink, Symlink};

    /// An archive whose names are written as they are, also those that a sane writer refuses.
    fn archive(items: &[Item<'_>]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for item in items {
            let mut header = tar::Header::new_gnu();
            let (name, kind, link, content) = match item {
                Plain(name, content) => (name, EntryType::Regular, "", *content),
                Folder(name) => (name, EntryType::Directory, "", ""),
                Symlink(name, target) => (name, EntryType::Symlink, *target, ""),
                Hardlink(name, target) => (name, EntryType::Link, *target, ""),
                Device(name) => (name, EntryType::Char, "", ""),
            };
            let gnu = header.as_gnu_mut().expect("made as such");
            gnu.name[..name.len()].copy_from_slice(name.as_bytes());
            gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_entry_type(kind);
            header.set_mode(0o4755);
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder
                .append(&header, content.as_bytes())
                .expect("memory is writable");
        }
        builder.into_inner().expect("memory is writable")
    }

    /// Unpacks layers into `image/` beside a folder `outside/` that must stay as it is.
    fn unpack_all(layers: &[&[Item<'_>]]) -> (TempDir, Result<(), Error>) {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let root = folder.path().join("image");
        fs::create_dir_all(&root).expect("writable");
        fs::create_dir_all(folder.path().join("outside")).expect("writable");
        fs::write(folder.path().join("outside/secret"), "untouched").expect("writable");
        let mut budget = Budget {
            bytes_max: 1000,
            bytes_used: 0,
        };
        let mut result = Ok(());
        for layer in layers {
            let path = folder.path().join("layer");
            fs::write(&path, archive(layer)).expect("writable");
            result = result.and_then(|()| unpack(&path, &root, &mut budget, &AtomicBool::new(false)));
        }
        let outside = fs::read_dir(folder.path().join("outside"))
            .expect("readable")
            .count();
        assert_eq!(outside, 1, "something was written outside");
        let secret = fs::read_to_string(folder.path().join("outside/secret")).expect("readable");
        assert_eq!(secret, "untouched");
        (folder, result)
    }

    fn read(folder: &TempDir, name: &str) -> Option<String> {
        fs::read_to_string(folder.path().join("image").join(name)).ok()
    }

    #[test]
    fn layers_lie_over_each_other() {
        let (folder, result) = unpack_all(&[
            &[
                Folder("usr/"),
                Plain("usr/bin/tool", "one"),
                Symlink("bin", "usr/bin"),
                Hardlink("usr/bin/same", "usr/bin/tool"),
                Plain("var/old/a", "a"),
                Plain("var/gone", "x"),
                Device("dev/null"),
            ],
            &[
                Plain("./bin/more", "over a link"),
                Plain("var/old/b", "b"),
                Plain("var/old/.wh..wh..opq", ""),
                Plain("var/.wh.gone", ""),
                Plain("usr/bin/tool", "two"),
            ],
        ]);
        result.expect("a sane image");
        for (name, expected) in [
            ("usr/bin/tool", Some("two")),
            ("usr/bin/same", Some("one")),
            ("usr/bin/more", Some("over a link")),
            ("var/old/a", None),
            ("var/old/b", Some("b")),
            ("var/gone", None),
            ("dev/null", None),
        ] {
            assert_eq!(read(&folder, name).as_deref(), expected, "{name}");
        }
        let mode = fs::metadata(folder.path().join("image/usr/bin/tool"))
            .expect("is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o755, "no set-id bits");
    }

    #[test]
    fn names_that_lead_out_are_refused() {
        for items in [
            &[Plain("../outside/secret", "x")][..],
            &[Plain("/outside/secret", "x")],
            &[Plain("a/../../outside/secret", "x")],
            &[Folder("..")],
            &[Hardlink("link", "../outside/secret")],
            &[Plain("a/.wh...", "")],
        ] {
            let (_, result) = unpack_all(&[items]);
            assert!(matches!(result, Err(Error::Escape(_))), "{result:?}");
        }
    }

    #[test]
    fn links_that_lead_out_are_followed_inside() {
        let (folder, result) = unpack_all(&[&[
            Symlink("up", "../outside"),
            Plain("up/secret", "inside"),
            Symlink("root", "/outside"),
            Plain("root/other", "inside"),
            Symlink("file", "../outside/secret"),
            Plain("file", "a file of its own"),
        ]]);
        result.expect("harmless when followed inside");
        assert_eq!(read(&folder, "outside/secret").as_deref(), Some("inside"));
        assert_eq!(read(&folder, "outside/other").as_deref(), Some("inside"));
        let (_, result) = unpack_all(&[&[Symlink("a", "b"), Symlink("b", "a"), Plain("a/x", "x")]]);
        assert!(matches!(result, Err(Error::Escape(_))), "{result:?}");
    }

    #[test]
    fn content_has_a_limit() {
        let long = "x".repeat(600);
        let (_, result) = unpack_all(&[&[Plain("a", &long)], &[Plain("b", &long)]]);
        assert!(matches!(result, Err(Error::TooLarge(1000))), "{result:?}");
    }

    #[test]
    fn a_broken_archive_is_an_error() {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let layer = folder.path().join("layer");
        fs::write(&layer, [0x1f, 0x8b, 1, 2, 3]).expect("writable");
        let mut budget = Budget {
            bytes_max: 1000,
            bytes_used: 0,
        };
        let result = unpack(&layer, folder.path(), &mut budget, &AtomicBool::new(false));
        assert!(matches!(result, Err(Error::Io(..))), "{result:?}");
    }
}

//! A file system of a few megabytes in a file, mounted: a disk that can really be full.

use std::path::{Path, PathBuf};

use anyhow::Context;

use super::run;

/// A mounted file system; it is unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    folder: PathBuf,
    mounted: bool,
}

impl SmallDisk {
    /// Makes one of so many MiB and mounts it at `<place>/mounted`. `place` must exist.
    ///
    /// # Errors
    /// What `mkfs.ext4` or `mount` said: they need root.
    pub fn mount(place: &Path, mebibytes: u64) -> anyhow::Result<Self> {
        let image = place.join("disk.img");
        let file = std::fs::File::create(&image).context("make the disk's file")?;
        file.set_len(mebibytes << 20)?;
        let image = image.to_str().context("a path in UTF-8")?;
        // No journal and no reserve: what fits is what is free.
        run("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", "-m", "0", image])?;
        let folder = place.join("mounted");
        std::fs::create_dir_all(&folder)?;
        let mut disk = Self {
            folder,
            mounted: false,
        };
        run(
            "mount",
            &[
                "-o",
                "loop",
                image,
                disk.folder.to_str().context("a path in UTF-8")?,
            ],
        )?;
        disk.mounted = true;
        Ok(disk)
    }

    /// Where it is mounted.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Fills it until at most a block is free; remove the returned file to make room again.
    ///
    /// # Errors
    /// Any other error than that the disk is full.
    pub fn fill(&self) -> anyhow::Result<PathBuf> {
        use std::io::Write as _;
        let path = self.folder.join("filling");
        let mut file = std::fs::File::create(&path)?;
        for size in [1 << 20, 4096] {
            let block = vec![0_u8; size];
            loop {
                match file.write_all(&block) {
                    Ok(()) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::StorageFull => break,
                    Err(error) => return Err(error).context("fill the disk"),
                }
            }
        }
        // What is only in memory takes no room yet.
        file.sync_all().or_else(|error| match error.kind() {
            std::io::ErrorKind::StorageFull => Ok(()),
            _ => Err(error),
        })?;
        Ok(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if self.mounted {
            // Lazily: a process may still have a file open there.
            let folder = self.folder.to_string_lossy().into_owned();
            let _ = run("umount", &["-l", &folder]);
        }
    }
}

/// Whether loop mounts work here.
pub(super) fn probe() -> anyhow::Result<()> {
    let place = tempfile::tempdir()?;
    SmallDisk::mount(place.path(), 4).map(drop)
}

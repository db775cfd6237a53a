//! fsync as a fault: `fsync_shim.c`, preloaded into a process, counts its calls of fsync and fdatasync, makes
//! them slow, or makes them fail. Parent and children share one page of control, mapped from a file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;

use super::run;

const SOURCE: &str = include_str!("fsync_shim.c");
/// Environment variable in which the library finds the control file.
const CONTROL: &str = "CHAOS_FSYNC_CONTROL";
/// Offsets in the control file, each of eight bytes in this machine's order, as in `fsync_shim.c`.
const DELAY_US: u64 = 0;
const FAIL_ERRNO: u64 = 8;
const CALLS: u64 = 16;

/// The library, and the page that controls it.
#[derive(Debug)]
pub struct Fsync {
    library: PathBuf,
    control: PathBuf,
    file: File,
}

impl Fsync {
    /// Compiles the library with the system's C compiler into `folder`.
    ///
    /// # Errors
    /// What `cc` said.
    pub fn prepare(folder: &Path) -> anyhow::Result<Self> {
        let (source, library) = (folder.join("fsync_shim.c"), folder.join("fsync_shim.so"));
        std::fs::write(&source, SOURCE)?;
        let text = |path: &Path| path.to_str().map(str::to_owned).context("a path in UTF-8");
        run(
            "cc",
            &[
                "-O2",
                "-Wall",
                "-Werror",
                "-shared",
                "-fPIC",
                "-o",
                &text(&library)?,
                &text(&source)?,
                "-ldl",
            ],
        )?;
        let control = folder.join("fsync_control");
        let mut options = File::options();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&control)?;
        file.set_len(4096)?;
        Ok(Self {
            library,
            control,
            file,
        })
    }

    /// A command, and all that it starts, will use the library.
    pub fn preload(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", &self.library)
            .env(CONTROL, &self.control);
    }

    /// From now on each call takes so much longer.
    ///
    /// # Errors
    /// When the control file cannot be written.
    pub fn delay(&self, delay: Duration) -> anyhow::Result<()> {
        let micros = u64::try_from(delay.as_micros()).context("a shorter delay")?;
        Ok(self.file.write_all_at(&micros.to_ne_bytes(), DELAY_US)?)
    }

    /// From now on each call fails with this error number; 0 ends that.
    ///
    /// # Errors
    /// When the control file cannot be written.
    pub fn fail(&self, errno: u64) -> anyhow::Result<()> {
        Ok(self.file.write_all_at(&errno.to_ne_bytes(), FAIL_ERRNO)?)
    }

    /// Calls so far.
    ///
    /// # Errors
    /// When the control file cannot be read.
    pub fn calls(&self) -> anyhow::Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, CALLS)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}

/// Whether a preloaded library is used here.
pub(super) fn probe() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let fsync = Fsync::prepare(folder.path())?;
    let mut command = Command::new("sync");
    command.arg("--data").arg(folder.path().join("fsync_shim.c"));
    fsync.preload(&mut command);
    anyhow::ensure!(command.status().context("sync")?.success(), "sync failed");
    anyhow::ensure!(fsync.calls()? > 0, "the library was not used");
    Ok(())
}

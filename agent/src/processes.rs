//! The supervisor: starts the agent's processes, starts those that end again, and stops all of them in order.
//!
//! ```text
//! run --+-- signer       the seed; stdin = one end of a datagram socket pair
//!       +-- coordinator  stdin = the other end
//!       +-- host         workloads; the chutes outlive everything here
//!       +-- proof
//!       +-- data
//! ```
//! Each child gets the settings in effect as a file and dies when the supervisor dies. Both ends of the socket
//! pair stay open here, so that signer and coordinator may restart without each other.
//!
//! Reading order: this page (folder, lock, order of the stop), [`child`] (one child: start, wait, back off,
//! stop), [`service`] (what a child does).

pub mod child;
pub mod service;

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use self::child::{Child, Children};
use crate::config::Loaded;
use crate::config::checked::run_folder;
use crate::local;
use coordinator::clock::WallClock;

/// From the request to stop until whoever still runs is killed.
const STOP_MAX: Duration = Duration::from_secs(20);
/// The coordinator's share of it, in which all others still run.
const DRAIN_MAX: Duration = Duration::from_secs(9);
/// The signer goes last and needs nothing.
const SIGNER_STOP_MAX: Duration = Duration::from_secs(1);

/// One of the processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Part {
    /// Holds the seed.
    Signer,
    /// A member of the coordinator.
    Coordinator,
    /// Workloads, and the link to the coordinator.
    Host,
    /// The GPU proof.
    Proof,
    /// Registry door, egress door and cache cleaner.
    Data,
}

impl Part {
    /// The subcommand, also the name in logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Signer => "signer",
            Self::Coordinator => "coordinator",
            Self::Host => "host",
            Self::Proof => "proof",
            Self::Data => "data",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why the supervisor cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another agent works in the folder.
    #[error(
        "another agent ({holder}) works in the data folder {folder}: stop it, or give this one a folder of its own"
    )]
    InUse {
        /// The folder.
        folder: PathBuf,
        /// `process N`, as far as that is known.
        holder: String,
    },
    /// A folder, or a file in it.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The socket pair between signer and coordinator.
    #[error("socket pair: {0}")]
    SocketPair(#[source] io::Error),
    /// The settings in effect cannot be written as TOML.
    #[error("settings: {0}")]
    Settings(#[from] toml::ser::Error),
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { path, source }
}

/// Makes a folder that only its owner can look into, or makes an existing one such.
///
/// # Errors
/// [`Error::File`].
pub fn private_folder(path: &Path) -> Result<(), Error> {
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(path);
    made.and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o700)))
        .map_err(file_error(path))
}

/// Writes a file of mode 0600 so that a crash leaves the old one or the new one.
fn write_private(path: &Path, text: &str) -> Result<(), Error> {
    let unnamed = path.with_extension("new");
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&unnamed).map_err(file_error(&unnamed))?;
    file.write_all(text.as_bytes())
        .and_then(|()| fs::rename(&unnamed, path))
        .map_err(file_error(path))
}

/// The data folder as ours alone, for as long as this lives.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the lock goes with the open file")] File);

impl Lock {
    /// Takes it, or says who has it.
    ///
    /// # Errors
    /// [`Error::InUse`] and [`Error::File`].
    pub fn take(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("agent.lock");
        let mut options = File::options();
        let options = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        let mut file = options.open(&path).map_err(file_error(&path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                let known = file.read_to_string(&mut pid).is_ok() && !pid.trim().is_empty();
                let holder = if known {
                    format!("process {}", pid.trim())
                } else {
                    "starting".to_owned()
                };
                return Err(Error::InUse {
                    folder: folder.to_owned(),
                    holder,
                });
            }
            Err(error) => return Err(file_error(&path)(error.into())),
        }
        file.set_len(0)
            .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()))
            .map_err(file_error(&path))?;
        Ok(Self(file))
    }
}

/// Runs all processes of this machine with these settings, from `executable`, until `shutdown`.
///
/// Call it on a current-thread runtime of the main thread: children die with the thread that started them.
///
/// # Errors
/// [`Error`], before anything was started.
pub async fn run(loaded: &Loaded, executable: &Path, shutdown: CancellationToken) -> Result<(), Error> {
    let (config, data) = (&loaded.config, &loaded.config.data);
    private_folder(data)?;
    let run = run_folder(data);
    private_folder(&run)?;
    let _lock = Lock::take(data)?;
    let settings = run.join("config.toml");
    write_private(&settings, &toml::to_string(&loaded.written)?)?;

    let mut parts: Vec<(Part, Option<OwnedFd>)> = Vec::new();
    if config.member.is_some() {
        let (signer, coordinator) = UnixDatagram::pair().map_err(Error::SocketPair)?;
        parts.push((Part::Signer, Some(signer.into())));
        parts.push((Part::Coordinator, Some(coordinator.into())));
    }
    if config.host.is_some() {
        parts.extend([(Part::Data, None), (Part::Proof, None), (Part::Host, None)]);
    }

    let children = Children::new(Arc::new(WallClock));
    let door = local::Door::open(&run.join("agent.sock")).map_err(file_error(&run.join("agent.sock")))?;
    let local_stop = CancellationToken::new();
    let local = tokio::spawn(door.serve(children.clone(), local_stop.clone()));
    tracing::info!(data = %data.display(), "agent starts");

    let mut kept = Vec::new();
    for (part, stdin) in parts {
        let (stop, stopped) = watch::channel(None);
        let child = Child {
            part,
            executable: executable.to_owned(),
            settings: settings.clone(),
            stdin,
        };
        let mut task = JoinSet::new();
        task.spawn(child::keep(child, children.clone(), stopped));
        kept.push((part, stop, task));
    }
    shutdown.cancelled().await;
    tracing::info!("agent stops");
    let now = Instant::now();
    // The coordinator first, while signer and host still answer; the signer last.
    for (these, deadline) in [
        (&[Part::Coordinator][..], now + DRAIN_MAX),
        (
            &[Part::Host, Part::Proof, Part::Data],
            now + STOP_MAX - SIGNER_STOP_MAX,
        ),
        (&[Part::Signer], now + STOP_MAX),
    ] {
        for (_, stop, _) in kept.iter().filter(|(part, ..)| these.contains(part)) {
            stop.send_replace(Some(deadline));
        }
        for (part, _, task) in kept.iter_mut().filter(|(part, ..)| these.contains(part)) {
            let ended = async { while task.join_next().await.is_some() {} };
            // The task kills at the deadline; a process that cannot even be killed is left.
            if timeout_at(deadline + SIGNER_STOP_MAX, ended).await.is_err() {
                tracing::error!(child = %part, "does not end");
            }
        }
    }
    local_stop.cancel();
    if let Err(error) = local.await {
        tracing::warn!(%error, "the local door ended badly");
    }
    tracing::info!("agent has stopped");
    Ok(())
}

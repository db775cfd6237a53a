//! `snapshots`: what lies at the place of `[backup]`, and a copy of it on this machine. Nothing needs to run, and the
//! machine needs not belong to a cluster: a lost cluster is begun again from there.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use agent::config::{self, Sources};
use anyhow::{Context as _, ensure};
use coordinator::backup::Target;

/// What is wanted of the snapshots.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Wanted {
    /// Names of a cluster's snapshots, the oldest first
    List {
        /// Id of the cluster
        #[arg(long)]
        cluster: String,
    },
    /// Copies one into a file of this machine
    Fetch {
        /// Its name
        name: String,
        /// The file, which must not exist
        file: PathBuf,
    },
}

/// Lists or fetches.
///
/// # Errors
/// With a chain of reasons.
pub(crate) async fn snapshots(sources: &Sources, wanted: &Wanted) -> anyhow::Result<()> {
    let member = config::load(sources)?.config.member;
    let member = member.context("coordinator.enabled is false: only members have a [backup]")?;
    let settings = member.coordinator.backup;
    let settings = settings.context("neither backup.directory nor backup.bucket is set")?;
    let target = Target::open(&settings.place)?;
    match wanted {
        Wanted::List { cluster } => list(&target, cluster).await,
        Wanted::Fetch { name, file } => fetch(&target, name, file).await,
    }
}

async fn list(target: &Target, cluster: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    for name in target.list(cluster).await? {
        writeln!(out, "{}", name.text(cluster))?;
    }
    Ok(())
}

async fn fetch(target: &Target, name: &str, file: &Path) -> anyhow::Result<()> {
    ensure!(!file.exists(), "{} exists already", file.display());
    ensure!(
        !name.contains('/'),
        "{name:?} is no name of a snapshot: `chutes-agent snapshots list` has them"
    );
    target.fetch(name, file).await.context("fetch the snapshot")
}

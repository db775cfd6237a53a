//! What a child does: it binds its life to the supervisor's, reads the settings, and runs its service until
//! it is asked to stop.

use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use coordinator::clock::WallClock;
use coordinator::join::Nodes;
use coordinator::signer::{Patience, SignerClient};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::Part;
use crate::config::checked::{Config, HostServices, Member};
use crate::config::{self, Sources};
use crate::sealed_worker::Clusters;
use crate::{data_plane, host_plane, nodes, packet_filter, proof_plane, signer, telemetry};

/// Arguments of a child.
#[derive(Debug, Clone, clap::Args)]
pub struct Arguments {
    /// File with the settings in effect; environment and flags are in it already
    #[arg(long)]
    pub settings: PathBuf,
    /// Process that must be the parent
    #[arg(long)]
    pub supervisor: i32,
}

/// Runs a child. Call it before any thread is started.
///
/// # Errors
/// With a chain of reasons; the supervisor starts another one.
pub fn run(part: Part, arguments: &Arguments) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("die with the supervisor")?;
    // It may have died before this was agreed; then nobody would ever end us.
    let parent = getppid().map_or(0, Pid::as_raw_pid);
    anyhow::ensure!(parent == arguments.supervisor, "the supervisor is gone");
    if part != Part::Host {
        packet_filter::give_up_the_right().context("give up the right to change packet rules")?;
    }
    let sources = Sources {
        file: Some(arguments.settings.clone()),
        ..Sources::default()
    };
    let config = config::load(&sources)?.config;
    telemetry::init(part.name(), &config.log)?;
    if let Err(error) = serve(part, config) {
        tracing::error!(error = telemetry::chain(&error), "cannot go on");
        // Said once, as a line of the log; main would say it again in another form.
        std::process::exit(1);
    }
    Ok(())
}

/// What runs a part's tasks, beside the threads that wait for disks.
fn runtime(part: Part) -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = if part == Part::Coordinator {
        // What a write passes through is a chain of short tasks: to wake another thread for each costs more than it
        // gains (docs/benchmarks.md).
        tokio::runtime::Builder::new_current_thread()
    } else {
        // Hosts with GPUs have a hundred cores and more, which belong to the chutes.
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(threads);
        builder
    };
    builder.enable_all().build()
}

fn serve(part: Part, config: Config) -> anyhow::Result<()> {
    if part == Part::Signer {
        // No runtime: becoming another user works on one thread only.
        return Ok(signer::run_on_stdin(&member(config)?.signer, &WallClock)?);
    }
    // The caller of a library may have installed one; any is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = runtime(part).context("start the async runtime")?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let asked = shutdown.clone();
        tokio::spawn(async move {
            terminate.recv().await;
            asked.cancel();
        });
        match part {
            Part::Signer => unreachable!("served above, without a runtime"),
            Part::Coordinator => Box::pin(coordinate(member(config)?, shutdown)).await,
            Part::Host => Ok(Box::pin(host_plane::run(host(config)?.host, shutdown)).await?),
            Part::Proof => Ok(Box::pin(proof_plane::run(host(config)?.proof, shutdown)).await?),
            Part::Data => Ok(Box::pin(data_plane::run(host(config)?.data, shutdown)).await?),
        }
    })
}

fn member(config: Config) -> anyhow::Result<Member> {
    config.member.context("coordinator.enabled is false here")
}

fn host(config: Config) -> anyhow::Result<HostServices> {
    config.host.context("host.enabled is false here")
}

async fn coordinate(member: Member, shutdown: CancellationToken) -> anyhow::Result<()> {
    let socket = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("take the socket to the signer")?;
    let connecting = SignerClient::connect(socket, fastrand::u64(..), Patience::default());
    let signer = match shutdown.run_until_cancelled(connecting).await {
        Some(signer) => signer.context("reach the signer")?,
        None => return Ok(()),
    };
    let (signer, clock) = (Arc::new(signer), Arc::new(WallClock));
    let nodes: Option<Arc<dyn Nodes>> = match member.nodes {
        Some(config) => Some(Arc::new(nodes::Cluster::connect(config).await?)),
        None => None,
    };
    let workers = Arc::new(Clusters {
        folder: member.coordinator.data.join("workers"),
    });
    let running = coordinator::member::run(member.coordinator, signer, clock, nodes, Some(workers), shutdown);
    Ok(running.await?)
}

//! The stand-in as a program: its arguments, and `run`. The agent offers the same as a hidden subcommand of
//! its development build.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use protocol::hotkey::Hotkey;

use crate::scenario::Scenario;
use crate::server::{Config, Server};

/// Arguments of the stand-in.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Address to listen on; port 0 picks a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Folder of state and ledger
    #[arg(long)]
    pub data: PathBuf,
    /// Scenario file; the built-in development scenario when absent
    #[arg(long)]
    pub scenario: Option<PathBuf>,
    /// Executable that the chutes' images hold; this one when absent
    #[arg(long)]
    pub chute_executable: Option<PathBuf>,
    /// Also registered miner (repeatable)
    #[arg(long = "hotkey")]
    pub hotkeys: Vec<String>,
    /// Written once it serves: a JSON object with all addresses
    #[arg(long)]
    pub ready_file: Option<PathBuf>,
}

/// Serves until the process is asked to stop.
///
/// # Errors
/// With a chain of reasons, when it cannot start.
pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    install_provider();
    let scenario = match &arguments.scenario {
        None => Scenario::development(),
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
            Scenario::from_toml(&text).with_context(|| format!("read {}", path.display()))?
        }
    };
    std::fs::create_dir_all(&arguments.data)
        .with_context(|| format!("create {}", arguments.data.display()))?;
    let chute_executable = match arguments.chute_executable {
        Some(path) => path,
        None => std::env::current_exe().context("find this executable")?,
    };
    let hotkeys = arguments
        .hotkeys
        .iter()
        .map(|text| Hotkey::parse(text))
        .collect::<Result<Vec<_>, _>>()?;
    let server = Server::start(Config {
        scenario,
        listen: arguments.listen,
        data: arguments.data,
        chute_executable,
        hotkeys,
    })
    .await?;
    let description = format!("{}\n", server.description());
    std::io::stdout().write_all(description.as_bytes())?;
    if let Some(path) = arguments.ready_file {
        let temporary = path.with_extension("new");
        std::fs::write(&temporary, &description)?;
        std::fs::rename(&temporary, &path)?;
    }
    until_asked_to_stop().await?;
    server.stop().await;
    Ok(())
}

/// Waits for SIGTERM or SIGINT.
pub(crate) async fn until_asked_to_stop() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// The TLS provider of this process; a second call changes nothing.
pub(crate) fn install_provider() {
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        tracing::debug!("a TLS provider was installed before");
    }
}

//! `chutes-agent`: reads the command line and hands over.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use agent::config::{self, Sources};
use agent::packet_filter;
use agent::processes::service::Arguments;
use agent::processes::{self, Part};
use agent::telemetry;
use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

mod doctor;
mod enter;
mod recover;
mod restore;
mod setup;
mod snapshots;

/// A write costs a member a tenth to a quarter less than with the allocator of the C library (docs/benchmarks.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(
    name = "chutes-agent",
    version,
    about = "The miner's agent: host of chutes, member of the coordinator"
)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    command: Command,
}

/// Where settings come from.
#[derive(Debug, Clone, clap::Args)]
struct Settings {
    /// Configuration file; /etc/chutes-agent/config.toml, if it exists, when absent
    #[arg(long, global = true, env = "CHUTES_AGENT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Data folder, instead of the one in the configuration
    #[arg(long, global = true, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// One setting, such as log.level=debug; wins over file and environment (repeatable)
    #[arg(long = "set", global = true, value_name = "SECTION.KEY=VALUE")]
    assignments: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent: start its processes and keep them running
    Run,
    /// The configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Write an example configuration; once that is filled in, found a cluster. Leaves what exists
    Init,
    /// Join the cluster that a token of `chutes-miner host invite` invites to
    Join(setup::Invitation),
    /// As a node of a Kubernetes cluster that several hosts share: found the cluster, or enter it. Leaves a host that
    /// belongs to it
    Enter(enter::Arguments),
    /// Find what is wrong around this host
    #[command(subcommand)]
    Doctor(DoctorCommand),
    /// What pods reach of this node
    #[command(subcommand)]
    PacketFilter(PacketFilterCommand),
    /// Come back into the cluster as a new member after the store of this one was lost
    Rejoin,
    /// Make this machine the only member of a lost cluster, with a snapshot of it
    Restore(restore::Arguments),
    /// Look at the snapshots that were put away, and fetch one
    #[command(subcommand)]
    Snapshots(snapshots::Wanted),
    /// When the majority of the voters is lost for good: make this member, whose agent is stopped, the only one
    Recover {
        /// Ask nothing: the cluster's id, as it would be typed
        #[arg(long, value_name = "ID")]
        cluster: Option<String>,
    },
    #[command(hide = true)]
    Signer(Arguments),
    #[command(hide = true)]
    Coordinator(Arguments),
    #[command(hide = true)]
    Host(Arguments),
    #[command(hide = true)]
    Proof(Arguments),
    #[command(hide = true)]
    Data(Arguments),
    /// Run the whole miner on this machine, against a validator stand-in
    #[cfg(feature = "dev")]
    Dev(agent::dev::Options),
    #[cfg(feature = "dev")]
    #[command(hide = true)]
    ValidatorStandIn(Box<validator_stand_in::command::Arguments>),
}

#[derive(Debug, Subcommand)]
enum DoctorCommand {
    /// Whether UDP gets through between this host and the members, both ways
    Net,
    /// Whether what is to run on this host is ready
    Ready(doctor::Patience),
}

#[derive(Debug, Subcommand)]
enum PacketFilterCommand {
    /// Print the table that the settings make, without the pods that are trusted
    Show,
    /// Remove the table from the kernel; as root
    Remove,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print the configuration in effect as TOML, or all that is wrong with it
    Check,
}

impl Settings {
    fn sources(self) -> Sources {
        // Values that are not text cannot be settings of ours.
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Sources {
            file: self.config,
            environment: variables.collect(),
            assignments: self.assignments,
            data: self.data,
        }
    }
}

fn main() -> ExitCode {
    // Huge pages made nothing faster here and a member twice as large before its first write. The allocator is built
    // not to ask for them; where the kernel gives them unasked, this keeps them away from here on, and from children.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    match dispatch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "chutes-agent: {}", telemetry::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn dispatch() -> anyhow::Result<()> {
    #[cfg(feature = "dev")]
    if called_as_chute() {
        let environment = std::env::vars().collect();
        let arguments = std::env::args().collect();
        return multi_thread()?.block_on(validator_stand_in::chute::run(arguments, environment));
    }
    let Cli { settings, command } = Cli::parse();
    match command {
        Command::Run => run(&settings.sources()),
        Command::Config(ConfigCommand::Check) => check(&settings.sources()),
        Command::Init => setup::init(settings.sources()),
        Command::Join(invitation) => setup::join(&settings.sources(), &invitation),
        Command::Enter(arguments) => enter::enter(&settings.sources(), &arguments),
        Command::Doctor(DoctorCommand::Net) => multi_thread()?.block_on(doctor::net(&settings.sources())),
        Command::PacketFilter(PacketFilterCommand::Show) => show_packet_filter(&settings.sources()),
        Command::PacketFilter(PacketFilterCommand::Remove) => {
            multi_thread()?.block_on(remove_packet_filter(&settings.sources()))
        }
        Command::Doctor(DoctorCommand::Ready(patience)) => {
            multi_thread()?.block_on(doctor::ready(&settings.sources(), &patience))
        }
        Command::Rejoin => setup::rejoin(&settings.sources()),
        Command::Restore(arguments) => restore::restore(&settings.sources(), &arguments),
        Command::Snapshots(wanted) => {
            multi_thread()?.block_on(snapshots::snapshots(&settings.sources(), &wanted))
        }
        Command::Recover { cluster } => recover::recover(&settings.sources(), cluster.as_deref()),
        Command::Signer(arguments) => processes::service::run(Part::Signer, &arguments),
        Command::Coordinator(arguments) => processes::service::run(Part::Coordinator, &arguments),
        Command::Host(arguments) => processes::service::run(Part::Host, &arguments),
        Command::Proof(arguments) => processes::service::run(Part::Proof, &arguments),
        Command::Data(arguments) => processes::service::run(Part::Data, &arguments),
        #[cfg(feature = "dev")]
        Command::Dev(options) => {
            telemetry::init("dev", &config::Written::default().log)?;
            multi_thread()?.block_on(agent::dev::main(options))
        }
        #[cfg(feature = "dev")]
        Command::ValidatorStandIn(arguments) => {
            telemetry::init("stand-in", &config::Written::default().log)?;
            multi_thread()?.block_on(validator_stand_in::command::run(*arguments))
        }
    }
}

/// In development the chutes' images hold this executable under this name.
#[cfg(feature = "dev")]
fn called_as_chute() -> bool {
    let called_as = std::env::args_os().next().map(PathBuf::from);
    called_as.is_some_and(|path| path.file_name().is_some_and(|name| name == "chutes"))
}

fn multi_thread() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.enable_all().build().context("start the async runtime")
}

fn run(sources: &Sources) -> anyhow::Result<()> {
    let loaded = config::load(sources)?;
    telemetry::init("agent", &loaded.config.log)?;
    let executable = std::env::current_exe().context("find this executable")?;
    // One thread, the main one: the children die with the thread that started them.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().context("start the async runtime")?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let asked = shutdown.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            asked.cancel();
        });
        Ok(processes::run(&loaded, &executable, shutdown).await?)
    })
}

fn show_packet_filter(sources: &Sources) -> anyhow::Result<()> {
    let (written, _) = config::read(sources)?;
    let filter = packet_filter::Config::check(&written.packet_filter, written.egress.listen);
    let filter = filter
        .map_err(anyhow::Error::msg)?
        .context("packet_filter.enabled is false: there is none")?;
    Ok(std::io::stdout().write_all(filter.rules.text(&BTreeSet::new()).as_bytes())?)
}

async fn remove_packet_filter(sources: &Sources) -> anyhow::Result<()> {
    let (written, _) = config::read(sources)?;
    packet_filter::remove(&packet_filter::table::Table::default(), &written.data).await?;
    setup::say(&format!(
        "the table inet {} is removed",
        packet_filter::rules::TABLE
    ))?;
    if written.packet_filter.enabled {
        setup::say("packet_filter.enabled is true: an agent that runs, or is started, installs it again")?;
    }
    Ok(())
}

fn check(sources: &Sources) -> anyhow::Result<()> {
    let loaded = config::load(sources)?;
    let text = toml::to_string(&loaded.written).context("print the configuration")?;
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

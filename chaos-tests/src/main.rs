//! `chaos-tests sim` runs seeds of the simulation and says what they found; `chaos-tests storm` kills processes of
//! a development cluster, and `leaders`, `pause`, `links`, `clocks` and `elections` shake members of a cluster of their
//! own: each says what came of it; `chaos-tests probe` says which fault tools work on this machine.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use chaos_tests::members::{self, Outcome};
use chaos_tests::{faults, kubernetes, sim, storm};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

#[derive(Debug, Parser)]
#[command(about = "Faults, and what must hold in spite of them")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the deterministic simulation.
    Sim(sim::Arguments),
    /// Kills processes of a development cluster.
    Storm(storm::Options),
    /// Kills whoever leads, again and again.
    Leaders(members::Leaders),
    /// Stops the leader for a while.
    Pause(members::Pause),
    /// Spoils the links between members in one way after the other.
    Links(members::Links),
    /// Sets the clock of whoever leads off.
    Clocks(members::Clocks),
    /// Counts elections that nothing calls for, on slow disks and a busy machine.
    Elections(members::Elections),
    /// Runs the miner on a Kubernetes API server with many nodes, and kills the API server.
    Kubernetes(kubernetes::Options),
    /// Passes ports on: part of `links --namespaces`.
    #[command(hide = true)]
    Forward(members::Forward),
    /// Tries each fault tool; fails if one is missing.
    Probe,
}

fn main() -> anyhow::Result<ExitCode> {
    // Faults make the code under test complain all the time; who wants to read it sets RUST_LOG.
    if let Ok(directives) = std::env::var("RUST_LOG") {
        let targets: Targets = directives.parse().context("RUST_LOG")?;
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        tracing_subscriber::registry().with(lines).with(targets).init();
    }
    match Arguments::parse().command {
        Command::Sim(arguments) => sim::run(&arguments, &mut std::io::stdout().lock()),
        Command::Storm(options) => conclude(async { Ok(storm::run(&options).await?.into()) }),
        Command::Leaders(options) => conclude(options.run()),
        Command::Pause(options) => conclude(options.run()),
        Command::Links(options) => conclude(options.run()),
        Command::Clocks(options) => conclude(options.run()),
        Command::Elections(options) => conclude(options.run()),
        Command::Kubernetes(options) => conclude(options.run()),
        Command::Forward(options) => forward(&options),
        Command::Probe => probe(),
    }
}

#[tokio::main]
async fn forward(options: &members::Forward) -> anyhow::Result<ExitCode> {
    options.run(&mut std::io::stdout()).await?;
    Ok(ExitCode::SUCCESS)
}

/// Runs something on real time; its figures are the last line on standard output. Asked to end, it ends all that it has
/// started.
#[tokio::main]
async fn conclude(run: impl Future<Output = anyhow::Result<Outcome>>) -> anyhow::Result<ExitCode> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let outcome = tokio::select! {
        outcome = run => outcome?,
        _ = interrupt.recv() => anyhow::bail!("interrupted"),
        _ = terminate.recv() => anyhow::bail!("asked to end"),
    };
    writeln!(std::io::stdout(), "{}", outcome.figures)?;
    for reason in &outcome.reasons {
        writeln!(std::io::stderr(), "not met: {reason}")?;
    }
    Ok(if outcome.reasons.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn probe() -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    let mut code = ExitCode::SUCCESS;
    for (tool, tried) in faults::probe() {
        match tried {
            Ok(()) => writeln!(out, "{tool}: works")?,
            Err(reason) => {
                writeln!(out, "{tool}: MISSING: {reason}")?;
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

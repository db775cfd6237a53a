//! `chaos-tests sim` runs seeds of the simulation and says what they found; `chaos-tests storm` kills processes of
//! a development cluster and says what came of it; `chaos-tests probe` says which fault tools work on this machine.

use std::io::Write;
use std::ops::Range;
use std::process::ExitCode;

use anyhow::Context;
use chaos_tests::faults;
use chaos_tests::simulation::{Options, Report, planted, run};
use chaos_tests::storm;
use clap::{Args, Parser, Subcommand};
use coordinator_core::state_machine::Faults;

#[derive(Debug, Parser)]
#[command(about = "Faults, and what must hold in spite of them")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the deterministic simulation.
    Sim(Sim),
    /// Kills processes of a development cluster.
    Storm(storm::Options),
    /// Tries each fault tool; fails if one is missing.
    Probe,
}

#[derive(Debug, Args)]
struct Sim {
    /// Seeds, the last one excluded, such as 0..100.
    #[arg(long, default_value = "0..20", value_parser = range, conflicts_with = "seed")]
    seeds: Range<u64>,
    /// One seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Virtual seconds with faults.
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// A fault to plant in the state machine, to see it found.
    #[arg(long, value_parser = planted)]
    plant: Option<Faults>,
    /// Print the trace.
    #[arg(long)]
    trace: bool,
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let parse = || {
        let (first, end) = text.split_once("..").context("such as 0..100")?;
        anyhow::Ok(first.parse()?..end.parse()?)
    };
    parse().map_err(|error| error.to_string())
}

fn main() -> anyhow::Result<ExitCode> {
    // Faults make the code under test complain all the time; who wants to read it sets RUST_LOG.
    if std::env::var_os("RUST_LOG").is_some() {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .init();
    }
    let sim = match Arguments::parse().command {
        Command::Sim(sim) => sim,
        Command::Storm(options) => return shake(&options),
        Command::Probe => return probe(),
    };
    let seeds = sim.seed.map_or(sim.seeds, |seed| seed..seed + 1);
    let mut out = std::io::stdout().lock();
    let (mut runs, mut virtual_ms, mut faults, mut commands, mut violations) = (0_u64, 0, 0, 0, 0);
    for seed in seeds {
        let report = run(Options {
            seconds: sim.seconds,
            keep_trace: sim.trace,
            planted: sim.plant.unwrap_or_default(),
            ..Options::new(seed)
        });
        print(&mut out, &report)?;
        runs += 1;
        virtual_ms += report.virtual_ms;
        faults += report.fault_count();
        commands += report.commands;
        violations += report.violations.len();
    }
    writeln!(
        out,
        "seeds {runs}, virtual seconds {}, faults {faults}, commands {commands}, violations {violations}",
        virtual_ms / 1000
    )?;
    Ok(if violations == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    for line in &report.trace {
        writeln!(out, "{line}")?;
    }
    writeln!(
        out,
        "seed {}: {} virtual s, {} faults, {} commands, {} acknowledged, trace {}",
        report.seed,
        report.virtual_ms / 1000,
        report.fault_count(),
        report.commands,
        report.acknowledged,
        &report.trace_hash[..16],
    )?;
    writeln!(out, "  {:?}\n  {:?}", report.events, report.faults)?;
    for violation in &report.violations {
        writeln!(out, "  VIOLATION {violation}")?;
    }
    if !report.violations.is_empty() {
        writeln!(out, "  repeat with: {}", report.repeat_with())?;
    }
    Ok(())
}

#[tokio::main]
async fn shake(options: &storm::Options) -> anyhow::Result<ExitCode> {
    let report = storm::run(options).await?;
    writeln!(std::io::stdout(), "{}", report.to_json())?;
    for reason in &report.reasons {
        writeln!(std::io::stderr(), "not met: {reason}")?;
    }
    Ok(if report.reasons.is_empty() {
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

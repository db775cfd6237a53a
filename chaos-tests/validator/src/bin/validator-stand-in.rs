//! The validator stand-in as a program of its own. Called as `chutes`, it is the chute stand-in.

use std::path::Path;

use anyhow::Context;
use clap::Parser;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// A validator that speaks the real protocol, for development and tests.
#[derive(Debug, Parser)]
#[command(name = "validator-stand-in", version)]
struct Cli {
    #[command(flatten)]
    arguments: validator_stand_in::command::Arguments,
}

fn main() -> anyhow::Result<()> {
    let directives = std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned());
    let targets: Targets = directives.parse().context("RUST_LOG")?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    tracing_subscriber::registry().with(lines).with(targets).init();
    let arguments: Vec<String> = std::env::args().collect();
    let called_as = arguments.first().and_then(|path| Path::new(path).file_name());
    let is_chute = called_as.is_some_and(|name| name == "chutes");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if is_chute {
        let environment = std::env::vars().collect();
        return runtime.block_on(validator_stand_in::chute::run(arguments, environment));
    }
    runtime.block_on(validator_stand_in::command::run(Cli::parse().arguments))
}

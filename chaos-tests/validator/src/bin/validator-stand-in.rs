//! The validator stand-in as a program of its own. Called as `chutes`, it is the chute stand-in.

use std::path::Path;

use clap::Parser;

/// A validator that speaks the real protocol, for development and tests.
#[derive(Debug, Parser)]
#[command(name = "validator-stand-in", version)]
struct Cli {
    #[command(flatten)]
    arguments: validator_stand_in::command::Arguments,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .init();
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

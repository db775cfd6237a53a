//! Entry point of `chutes-miner`, the operator's command line: it signs requests to the miner's management API
//! and to the validator, and prints what they answer. It decides nothing. `import` and `export` also read and write
//! what the original miner left: its database, and marks on its objects.
//!
//! Exit codes: 0 done (or the operator said no), 1 failed, 2 wrong usage.

use std::process::ExitCode;

use clap::Parser;

mod args;
mod authority;
mod cluster;
mod deployments;
mod export;
mod hosts;
mod hotkey;
mod import;
mod inventory;
mod logs;
mod miner;
mod nodes;
mod output;
mod remote;
mod request;
mod snapshots;
mod stream;
mod trial;
mod upgrade;
mod workers;

use args::{Arguments, Command};
use output::Printer;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Arguments { output, command } = Arguments::parse();
    // Only fails if a provider is there already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let printer = Printer::new(output);
    match Box::pin(run(&printer, command)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Written as one line: the causes, outermost first.
            output::warn(&format!("Error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(printer: &Printer, command: Command) -> anyhow::Result<()> {
    match command {
        Command::AddNode {
            miner,
            name,
            validator,
            hourly_cost,
            gpu_short_ref,
            agent_api: _,
        } => nodes::add(printer, &miner, &name, &validator, hourly_cost, &gpu_short_ref).await,
        Command::DeleteNode { miner, name, yes } => nodes::delete(printer, &miner, &name, yes).await,
        Command::Lock { miner, name } => nodes::lock(printer, &miner, &name, true).await,
        Command::Unlock { miner, name } => nodes::lock(printer, &miner, &name, false).await,
        Command::PurgeDeployments { miner, include_jobs } => {
            deployments::purge_all(printer, &miner, include_jobs).await
        }
        Command::PurgeDeployment {
            miner,
            deployment_id,
            node_id,
            include_jobs,
            yes,
        } => match (deployment_id, node_id) {
            (Some(deployment), None) => deployments::stop_one(printer, &miner, &deployment).await,
            (None, Some(node)) => deployments::purge_node(printer, &miner, &node, include_jobs, yes).await,
            _ => anyhow::bail!("Either deployment_id or node_id must be provided, but not both."),
        },
        Command::PurgeServer {
            miner,
            name,
            include_jobs,
            yes,
        } => deployments::purge_node(printer, &miner, &name, include_jobs, yes).await,
        Command::Deployments { miner, gone } => deployments::timeline(printer, &miner, gone).await,
        Command::Logs {
            miner,
            deployment,
            follow,
            previous,
        } => logs::log(printer, &miner, &deployment, follow, previous).await,
        Command::Events { miner, deployment } => logs::events(printer, &miner, &deployment).await,
        Command::InstanceLogs {
            validator_api,
            jwt,
            cursor,
        } => logs::of_validator(printer, &validator_api, &jwt, cursor.as_deref()).await,
        Command::LocalInventory {
            miner,
            raw_json,
            name,
            ..
        } => inventory::local(&printer.or_json(raw_json), &miner, name.as_deref()).await,
        Command::RemoteInventory {
            validator, raw_json, ..
        } => remote::inventory(&printer.or_json(raw_json), &validator).await,
        Command::ScorchRemote { validator, yes } => remote::scorch(printer, &validator, yes).await,
        Command::DeleteRemote { validator, gpu_id } => remote::delete(printer, &validator, &gpu_id).await,
        Command::Status { miner } => cluster::status(printer, &miner).await,
        Command::Diff {
            miner,
            all,
            select,
            include_jobs,
            allow_loss,
            ..
        } => {
            if select.is_empty() {
                cluster::diff(printer, &miner, all).await
            } else {
                cluster::fix(printer, &miner, &select, include_jobs, allow_loss).await
            }
        }
        Command::Explain { miner, subject } => cluster::explain(printer, &miner, &subject).await,
        Command::Host { command } => hosts::host(printer, command).await,
        Command::Raft { command } => hosts::raft(printer, command).await,
        Command::Snapshot { command } => snapshots::snapshot(printer, command).await,
        Command::Upgrade { command } => upgrade::upgrade(printer, command).await,
        Command::Observe { command } => cluster::observe(printer, command).await,
        Command::Ca { command } => authority::ca(printer, command).await,
        Command::Hotkey { command } => hotkey::hotkey(printer, command).await,
        Command::Worker { command } => workers::worker(printer, command).await,
        Command::Ban {
            miner,
            chute,
            validator,
            reason,
        } => cluster::ban(printer, &miner, &chute, validator, &reason).await,
        Command::Export(arguments) => export::export(printer, &arguments).await,
        Command::Import(arguments) => import::import(printer, &arguments).await,
        Command::Unban {
            miner,
            chute,
            validator,
        } => cluster::unban(printer, &miner, &chute, validator).await,
    }
}

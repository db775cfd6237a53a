//! `worker`: sealed workers, which the members drive through the kubeconfig of each.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use protocol::signing::{Purpose, Tail, headers_to_miner};
use reqwest::Method;
use serde_json::{Value, json};

use crate::args::{self, AddWorker, WorkerCommand};
use crate::inventory::text_of;
use crate::miner::Miner;
use crate::output::{Lines, Printer, Table, confirmed, warn};
use crate::request::{self, escape};

const PATH: &str = "/v1/workers";

pub(crate) async fn worker(printer: &Printer, command: WorkerCommand) -> Result<()> {
    match command {
        WorkerCommand::Add(arguments) => add(printer, &arguments).await,
        WorkerCommand::List { miner } => list(printer, &miner).await,
        WorkerCommand::Remove { miner, name, yes } => remove(printer, &miner, &name, yes).await,
    }
}

async fn add(printer: &Printer, arguments: &AddWorker) -> Result<()> {
    let kubeconfig = match (&arguments.kubeconfig, &arguments.agent_api) {
        (Some(file), _) => read(file)?,
        (None, Some(base)) => ask_for_it(&arguments.miner, base).await?,
        (None, None) => unreachable!("one of them is required"),
    };
    let body = json!({
        "kubeconfig": kubeconfig,
        "context": arguments.context,
        "address": arguments.address,
        "attestation_port": arguments.attestation_port,
    });
    let worker = Miner::new(&arguments.miner)?;
    let worker = worker.ask(Method::POST, PATH, Some(&body)).await?;
    if !printer.wants_tables() {
        return printer.value(&worker);
    }
    let name = text_of(&worker["name"]);
    printer.line(&format!(
        "Worker {name} with {} GPUs at {} is driven from now on.",
        text_of(&worker["gpus"]),
        text_of(&worker["address"])
    ))?;
    printer.line(&format!(
        "Next: chutes-miner add-node --name {name} ... lets it work for a validator."
    ))
}

fn read(file: &Path) -> Result<String> {
    let shown = file.display();
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("read the kubeconfig")?;
        return Ok(text);
    }
    std::fs::read_to_string(file).with_context(|| format!("read the kubeconfig {shown}"))
}

/// The kubeconfig that the agent of a sealed worker hands out to its miner.
async fn ask_for_it(arguments: &args::Miner, base: &str) -> Result<String> {
    let signer = request::signer(&arguments.key.hotkey)?;
    let mut builder = request::client(None)?.get(request::url(base, "/config/kubeconfig")?);
    let tail = Tail::Purpose(Purpose::Registration);
    for (name, value) in headers_to_miner(&signer, signer.hotkey(), request::now(), &tail) {
        builder = builder.header(name, value);
    }
    let whom = format!("the worker's agent at {base}");
    let answer = request::send(builder, &whom, "is --agent-api right?").await?;
    let answer = request::json(answer)
        .await
        .with_context(|| format!("ask {whom} for its kubeconfig"))?;
    let text = answer["kubeconfig"].as_str();
    text.map(str::to_owned)
        .with_context(|| format!("{whom} answers without a kubeconfig"))
}

async fn list(printer: &Printer, arguments: &args::Miner) -> Result<()> {
    let workers = Miner::new(arguments)?.get(PATH).await?;
    if !printer.wants_tables() {
        return printer.value(&workers);
    }
    let columns = ["Name", "ID", "Address", "GPUs", "Reachable", "Validator"];
    let mut table = Table::new("Workers", Lines::Rounded, &columns);
    for worker in workers.as_array().into_iter().flatten() {
        let yes = if worker["reachable"] == json!(true) {
            "yes"
        } else {
            "no"
        };
        let validator = match &worker["validator"] {
            Value::Null => "none".to_owned(),
            validator => text_of(validator),
        };
        table.row(vec![
            text_of(&worker["name"]),
            text_of(&worker["server_id"]),
            text_of(&worker["address"]),
            text_of(&worker["gpus"]),
            yes.to_owned(),
            validator,
        ]);
    }
    printer.table(&table)
}

async fn remove(printer: &Printer, arguments: &args::Miner, name: &str, yes: bool) -> Result<()> {
    if !yes {
        warn(&format!(
            "Worker {name} is driven no more, and its kubeconfig is forgotten. It can be added again."
        ));
        if !confirmed("Continue (y/n)? ", "y")? {
            return Ok(());
        }
    }
    let path = format!("{PATH}/{}", escape(name));
    let answer = Miner::new(arguments)?.ask(Method::DELETE, &path, None).await?;
    if !printer.wants_tables() {
        return printer.value(&answer);
    }
    printer.line(&format!("Worker {name} is removed."))
}

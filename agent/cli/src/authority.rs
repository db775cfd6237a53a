//! `ca`: the authority that signs hosts' certificates, and changing over to another one.

use anyhow::Result;
use reqwest::Method;
use serde_json::{Value, json};

use crate::args::CaCommand;
use crate::inventory::text_of;
use crate::miner::Miner;
use crate::output::{Colour, Lines, Printer, Table};

pub(crate) async fn ca(printer: &Printer, command: CaCommand) -> Result<()> {
    let (miner, path) = match &command {
        CaCommand::Status { miner } => (miner, None),
        CaCommand::Rotate { miner, finish: false } => (miner, Some("/v1/ca/rotate")),
        CaCommand::Rotate { miner, finish: true } => (miner, Some("/v1/ca/finish")),
    };
    let miner = Miner::new(miner)?;
    let status = match path {
        None => miner.get("/v1/ca").await?,
        Some(path) => miner.ask(Method::POST, path, None).await?,
    };
    show(printer, &status)
}

fn show(printer: &Printer, status: &Value) -> Result<()> {
    if !printer.wants_tables() {
        return printer.value(status);
    }
    let mut table = Table::new("Certificates", Lines::Rounded, &["Host", "ID", "Certificate"]);
    let (mut old, mut trusting) = (Vec::new(), Vec::new());
    for host in status["hosts"].as_array().into_iter().flatten() {
        let (name, word) = (text_of(&host["host"]), text_of(&host["certificate"]));
        let certificate = if word == "old" {
            old.push(name.clone());
            printer.paint(Colour::Yellow, "of the old authority")
        } else if host["trusts_old"] == json!(true) {
            trusting.push(name.clone());
            printer.paint(Colour::Yellow, "good; trusts the old authority still")
        } else if word == "new" {
            "of the new authority".to_owned()
        } else {
            "good".to_owned()
        };
        table.row(vec![name, text_of(&host["server_id"]), certificate]);
    }
    printer.line(&format!("Authority: {}", text_of(&status["authority"])))?;
    let changing = !status["next"].is_null();
    if changing {
        let (next, begun_at) = (text_of(&status["next"]), text_of(&status["begun_at"]));
        printer.line(&format!("The new one: {next}, since {begun_at}"))?;
    }
    printer.table(&table)?;
    if !old.is_empty() {
        printer.line(&format!(
            "{} of {} hosts change over when they are connected: {}.",
            old.len(),
            status["hosts"].as_array().map_or(0, Vec::len),
            old.join(", ")
        ))
    } else if changing {
        printer.line("All hosts have changed over: chutes-miner ca rotate --finish drops the old authority.")
    } else if !trusting.is_empty() {
        printer.line(&format!(
            "The old authority is dropped; these hosts forget it when they are connected: {}.",
            trusting.join(", ")
        ))
    } else {
        Ok(())
    }
}

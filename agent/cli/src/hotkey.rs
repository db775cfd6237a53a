//! `hotkey`: the miner's hotkey, and the change to another one.
//!
//! The only thing that the change has to carry over is the key of the cluster's authority: it is sealed with the old
//! seed, and is opened and sealed anew here, where both seeds are. Neither leaves this machine.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use protocol::hotkey::Signer;
use protocol::sealing::{NONCE_BYTES, SealedKind, SealingKey};
use reqwest::Method;
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};

use crate::args::{self, HotkeyCommand};
use crate::inventory::text_of;
use crate::miner::Miner;
use crate::output::{Colour, Lines, Printer, Table, confirmed, warn};
use crate::request;

const PATH: &str = "/v1/hotkey";

pub(crate) async fn hotkey(printer: &Printer, command: HotkeyCommand) -> Result<()> {
    match command {
        HotkeyCommand::Status { miner } => status(printer, &miner).await,
        HotkeyCommand::Replace {
            miner,
            new_hotkey,
            yes,
        } => replace(printer, &miner, &new_hotkey, yes).await,
    }
}

async fn status(printer: &Printer, arguments: &args::Miner) -> Result<()> {
    let status = Miner::new(arguments)?.get(PATH).await?;
    if !printer.wants_tables() {
        return printer.value(&status);
    }
    let hotkey = text_of(&status["hotkey"]);
    printer.line(&format!("The miner's hotkey: {hotkey}"))?;
    let mut table = Table::new("Members", Lines::Rounded, &["Host", "Member", "Seed of"]);
    let mut others = Vec::new();
    for member in status["members"].as_array().into_iter().flatten() {
        let host = text_of(&member["host"]);
        let seed = match member["seed_of"].as_str() {
            Some(seed) if seed == hotkey => "the miner's hotkey".to_owned(),
            Some(seed) => {
                others.push(host.clone());
                printer.paint(Colour::Yellow, seed)
            }
            None => printer.paint(Colour::Yellow, "it did not answer"),
        };
        table.row(vec![host, text_of(&member["member"]), seed]);
    }
    printer.table(&table)?;
    if !others.is_empty() {
        printer.line(&format!(
            "Only votes, until it has the seed of the miner's hotkey in miner.seed_file, the hotkey in miner.hotkey, \
             and its agent was restarted: {}.",
            others.join(", ")
        ))?;
    }
    for reason in in_the_way(&status) {
        printer.line(&format!("Keeps the hotkey from being replaced: {reason}."))?;
    }
    Ok(())
}

fn in_the_way(status: &Value) -> Vec<String> {
    let reasons = status["in_the_way"].as_array().into_iter().flatten();
    reasons.map(text_of).collect()
}

async fn replace(printer: &Printer, arguments: &args::Miner, new_file: &Path, yes: bool) -> Result<()> {
    let old_seed = request::seed(&arguments.key.hotkey, "--hotkey or HOTKEY")?;
    let new_seed = request::seed(new_file, "--new-hotkey")?;
    let (old, new) = (Signer::from_seed(&old_seed), Signer::from_seed(&new_seed));
    let (old, new) = (old.hotkey().to_string(), new.hotkey().to_string());
    if old == new {
        bail!("--hotkey and --new-hotkey are the same one, {old}: nothing is to be replaced");
    }
    let miner = Miner::new(arguments)?;
    let status = miner.get(PATH).await?;
    let reasons = in_the_way(&status);
    if !reasons.is_empty() {
        bail!("the hotkey cannot be replaced yet: {}", reasons.join("; "));
    }
    let sealed_key = sealed_anew(&status, &old_seed, &new_seed)?;
    if !yes {
        warn(&format!(
            "The cluster {} belongs to the miner {old}, and belongs to {new} afterwards.\n\
             From that moment the old hotkey opens nothing here, and the members only vote until each has the new seed.\n\
             Validators know nothing of the new hotkey: it has to be registered there, and every server is enrolled \
             anew.\n\
             Snapshots that were taken before need the old seed: keep it as long as them.",
            text_of(&status["cluster"])
        ));
        if !confirmed("Continue (y/n)? ", "y")? {
            return Ok(());
        }
    }
    let body = json!({ "old": old, "new": new, "sealed_key": hex::encode(sealed_key) });
    let answer = miner.ask(Method::POST, PATH, Some(&body)).await?;
    if !printer.wants_tables() {
        return printer.value(&answer);
    }
    printer.line(&format!("The miner's hotkey is {new} now."))?;
    printer.line(
        "Next, on each member after the other: the new seed into miner.seed_file, the hotkey into miner.hotkey, restart \
         the agent; on every other host: the hotkey into miner.hotkey, restart the agent.",
    )?;
    printer.line(&format!(
        "chutes-miner hotkey status --hotkey {} shows who is left; then add-node for each server, and a new snapshot.",
        new_file.display()
    ))
}

/// The authority's key, opened with the old seed and sealed with the new one.
fn sealed_anew(status: &Value, old_seed: &[u8; 32], new_seed: &[u8; 32]) -> Result<Vec<u8>> {
    let sealed = status["sealed_key"]
        .as_str()
        .and_then(|text| hex::decode(text).ok());
    let sealed = sealed.context("the cluster is not founded yet: try again in a moment")?;
    let key = SealingKey::from_seed(old_seed).unseal(SealedKind::ClusterCaKey, &sealed);
    let key = key.context("the key of the cluster's authority does not open with the seed in --hotkey")?;
    let mut nonce = [0; NONCE_BYTES];
    let random = SystemRandom::new().fill(&mut nonce);
    random.ok().context("this machine has no random numbers")?;
    let sealed = SealingKey::from_seed(new_seed).seal(SealedKind::ClusterCaKey, nonce, &key);
    sealed.context("the key of the cluster's authority is too long to be sealed")
}

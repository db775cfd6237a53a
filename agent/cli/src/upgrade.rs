//! `upgrade`: what each host runs, and the step after which the program before is refused.

use anyhow::Result;
use reqwest::Method;
use serde_json::{Value, json};

use crate::args::{self, UpgradeCommand};
use crate::inventory::text_of;
use crate::miner::Miner;
use crate::output::{Colour, Lines, Printer, Table, confirmed, warn};

pub(crate) async fn upgrade(printer: &Printer, command: UpgradeCommand) -> Result<()> {
    match command {
        UpgradeCommand::Status { miner } => status(printer, &miner).await,
        UpgradeCommand::Finalize { miner, vouch, yes } => finalize(printer, &miner, &vouch, yes).await,
    }
}

async fn status(printer: &Printer, arguments: &args::Miner) -> Result<()> {
    let upgrade = Miner::new(arguments)?.get("/v1/upgrade").await?;
    if !printer.wants_tables() {
        return printer.value(&upgrade);
    }
    let title = format!("Data in format {}", text_of(&upgrade["format"]));
    let mut table = Table::new(
        &title,
        Lines::Rounded,
        &["Host", "Version", "Knows format", "Ready"],
    );
    for host in upgrade["hosts"].as_array().into_iter().flatten() {
        let ready = if host["ready"] == json!(true) {
            "yes".to_owned()
        } else {
            printer.paint(Colour::Yellow, "no")
        };
        let cell = |name: &str| text_of(&host[name]);
        table.row(vec![cell("name"), cell("version"), cell("knows"), ready]);
    }
    printer.table(&table)?;
    printer.line(&what_next(&upgrade))
}

fn what_next(upgrade: &Value) -> String {
    let (format, newest) = (upgrade["format"].as_u64(), upgrade["newest"].as_u64());
    if format >= newest {
        return "Nothing is to be finalized.".to_owned();
    }
    format!(
        "Version {} brings format {}. It stays off until chutes-miner upgrade finalize; until then the version before \
         starts on the same data.",
        text_of(&upgrade["version"]),
        text_of(&upgrade["newest"])
    )
}

async fn finalize(printer: &Printer, arguments: &args::Miner, vouch: &[String], yes: bool) -> Result<()> {
    let miner = Miner::new(arguments)?;
    if !yes {
        warn(
            "Warning: after this the version before does not start on this miner's data any more. The way back is a \
             snapshot that was taken before: chutes-miner snapshot save.",
        );
        if !confirmed("Continue (y/n)? ", "y")? {
            return Ok(());
        }
    }
    let body = json!({ "vouch": vouch });
    let answer = miner
        .ask(Method::POST, "/v1/upgrade/finalize", Some(&body))
        .await?;
    if !printer.wants_tables() {
        return printer.value(&answer);
    }
    if answer["changed"] == json!(true) {
        printer.line(&format!(
            "The data has format {} from now on.",
            text_of(&answer["format"])
        ))
    } else {
        printer.line("Nothing is to be finalized.")
    }
}

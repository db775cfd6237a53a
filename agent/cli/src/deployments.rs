//! `purge-deployments`, `purge-deployment`, `purge-server`, `deployments`.

use anyhow::Result;
use reqwest::Method;
use serde_json::Value;

use crate::args;
use crate::inventory::text_of;
use crate::miner::Miner;
use crate::output::{Lines, Printer, Table, confirmed, warn};
use crate::request::escape;

pub(crate) async fn purge_all(printer: &Printer, arguments: &args::Miner, include_jobs: bool) -> Result<()> {
    let miner = Miner::new(arguments)?;
    say_jobs(include_jobs);
    let path = with_jobs("/deployments/purge".to_owned(), include_jobs);
    printer.value(&miner.ask(Method::DELETE, &path, None).await?)
}

pub(crate) async fn purge_node(
    printer: &Printer,
    arguments: &args::Miner,
    node: &str,
    include_jobs: bool,
    yes: bool,
) -> Result<()> {
    let miner = Miner::new(arguments)?;
    let jobs = miner.jobs_on(node).await?;
    if jobs > 0 && include_jobs {
        warn(&format!(
            "Warning: {jobs} jobs run on {node}. They are stopped, unfinished."
        ));
        if !yes && !confirmed("Continue (y/n)? ", "y")? {
            return Ok(());
        }
    } else if jobs > 0 {
        say_jobs(false);
    }
    let path = with_jobs(format!("/servers/{}/deployments", escape(node)), include_jobs);
    printer.value(&miner.ask(Method::DELETE, &path, None).await?)
}

pub(crate) async fn stop_one(printer: &Printer, arguments: &args::Miner, deployment: &str) -> Result<()> {
    let miner = Miner::new(arguments)?;
    let path = format!("/deployments/{}", escape(deployment));
    printer.value(&miner.ask(Method::DELETE, &path, None).await?)
}

fn say_jobs(included: bool) {
    warn(if included {
        "Jobs are stopped too (--include-jobs)."
    } else {
        "Jobs go on: --include-jobs stops them too."
    });
}

fn with_jobs(path: String, include_jobs: bool) -> String {
    if include_jobs {
        format!("{path}?include_jobs=true")
    } else {
        path
    }
}

pub(crate) async fn timeline(printer: &Printer, arguments: &args::Miner, gone: bool) -> Result<()> {
    let miner = Miner::new(arguments)?;
    let (path, member) = if gone {
        ("/v1/audits", "audits")
    } else {
        ("/v1/deployments", "deployments")
    };
    let answer = miner.get(path).await?;
    if !printer.wants_tables() {
        return printer.value(&answer);
    }
    let headers = [
        "Deployment",
        "Chute",
        "Server",
        "GPUs",
        "Phase",
        "Created",
        "Image MB",
        "Running",
        "Claimed",
        "Verified",
        "Active",
        "Reason",
    ];
    let mut table = Table::new("Deployments (times UTC)", Lines::Rounded, &headers);
    for row in answer[member].as_array().into_iter().flatten() {
        let stop = row["stop"]["reason"].as_str();
        table.row(vec![
            text_of(&row["deployment_id"]),
            text_of(&row["chute_name"]),
            text_of(&row["server_name"]),
            row["gpus"].as_array().map_or(0, Vec::len).to_string(),
            if gone {
                "gone".to_owned()
            } else {
                text_of(&row["phase"])
            },
            clock(&row["created_at"]),
            (row["image_bytes"].as_u64().unwrap_or(0) / 1_000_000).to_string(),
            clock(&row["running_at"]),
            clock(&row["claimed_at"]),
            clock(&row["verified_at"]),
            clock(&row["active_at"]),
            stop.map_or_else(|| text_of(&row["reason"]), str::to_owned),
        ]);
    }
    printer.table(&table)
}

/// Hours, minutes and seconds of an ISO time.
fn clock(at: &Value) -> String {
    let at = at.as_str().and_then(|at| at.get(11..19));
    at.unwrap_or("-").to_owned()
}

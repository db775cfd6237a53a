//! `remote-inventory`, `scorch-remote`, `delete-remote`: the validator's own view, signed by its scheme.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use protocol::hotkey::Signer;
use protocol::signing::{Purpose, Tail, headers_to_validator};
use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::args;
use crate::inventory::{date, megahertz, text_of};
use crate::output::{Colour, Lines, Printer, Table, confirmed, warn};
use crate::request::{self, escape};
use crate::stream::Frames;

/// GPUs that one miner may have here.
const NODES_MAX: usize = 100_000;

struct Validator {
    base: String,
    signer: Signer,
}

impl Validator {
    fn new(arguments: &args::Validator) -> Result<Self> {
        let signer = request::signer(&arguments.key.hotkey)?;
        let base = arguments.validator_api.clone();
        Ok(Self { base, signer })
    }

    async fn open(&self, method: Method, path: &str, purpose: Purpose) -> Result<Response> {
        let url = request::url(&self.base, path)?;
        let mut builder = request::client(None)?.request(method, url);
        for (name, value) in headers_to_validator(&self.signer, request::now(), &Tail::Purpose(purpose)) {
            builder = builder.header(name, value);
        }
        let whom = format!("the validator's API at {}", self.base);
        request::send(builder, &whom, "is --validator-api right?").await
    }

    /// The GPUs that the validator lists. A stream that is cut is an error, not a short list.
    async fn nodes(&self) -> Result<Vec<Value>> {
        let response = self.open(Method::GET, "/miner/nodes/", Purpose::Miner).await?;
        let status = response.status();
        if !status.is_success() {
            let body = request::body(response).await?;
            return Err(request::refused(status, &body).into());
        }
        let mut frames = Frames::new(response);
        let mut nodes = Vec::new();
        while let Some(node) = frames.next().await? {
            if nodes.len() >= NODES_MAX {
                bail!("the validator lists more than {NODES_MAX} GPUs");
            }
            if node["uuid"].is_string() {
                nodes.push(node);
            }
        }
        Ok(nodes)
    }
}

pub(crate) async fn inventory(printer: &Printer, arguments: &args::Validator) -> Result<()> {
    let validator = Validator::new(arguments)?;
    let nodes = validator.nodes().await?;
    let mut by_uuid: BTreeMap<String, Value> = nodes
        .into_iter()
        .map(|node| (text_of(&node["uuid"]), node))
        .collect();
    let runs = validator
        .open(Method::GET, "/miner/inventory", Purpose::Miner)
        .await?;
    let runs = request::json(runs).await?;
    for run in runs.as_array().into_iter().flatten() {
        if let Some(node) = by_uuid.get_mut(&text_of(&run["gpu_id"])) {
            node["chute"] = run["chute_name"].clone();
            node["chute_id"] = run["chute_id"].clone();
            node["inst_verification_error"] = run["verification_error"].clone();
            node["inst_verified_at"] = run["last_verified_at"].clone();
        }
    }
    let mut nodes: Vec<Value> = by_uuid.into_values().collect();
    nodes.sort_by_key(|node| text_of(&node["created_at"]));
    if !printer.wants_tables() {
        return printer.value(&json!(nodes));
    }
    let headers = [
        "Name",
        "Chute",
        "Memory (GB)",
        "Clock (MHz)",
        "Created At",
        "GPU Verification",
        "Instance verification",
    ];
    let mut table = Table::new("GPU Information", Lines::Heavy, &headers);
    for node in &nodes {
        let or_none = |value: &Value| value.as_str().unwrap_or("None").to_owned();
        table.row(vec![
            text_of(&node["name"]),
            format!("{} {}", or_none(&node["chute_id"]), or_none(&node["chute"])),
            memory_gb(&node["memory"]),
            megahertz(&node["clock_rate"]),
            date(&node["created_at"]),
            verification(printer, &node["verified_at"], &node["verification_error"]),
            verification(
                printer,
                &node["inst_verified_at"],
                &node["inst_verification_error"],
            ),
        ]);
    }
    printer.table(&table)
}

/// The validator's table has bytes, whole GB in some versions.
fn memory_gb(memory: &Value) -> String {
    let bytes_from = f64::from(1 << 20);
    match memory.as_f64() {
        None => "-".to_owned(),
        Some(gb) if gb < bytes_from => format!("{gb}"),
        Some(bytes) => format!("{:.1}", bytes / f64::from(1 << 30)),
    }
}

fn verification(printer: &Printer, at: &Value, error: &Value) -> String {
    match (at.is_string(), error.as_str()) {
        (true, _) => printer.paint(Colour::Green, &format!("Verified: {}", date(at))),
        (false, Some(error)) if !error.is_empty() => printer.paint(Colour::Red, &format!("Error: {error}")),
        (false, _) => printer.paint(Colour::Yellow, "Pending"),
    }
}

pub(crate) async fn scorch(printer: &Printer, arguments: &args::Validator, yes: bool) -> Result<()> {
    let validator = Validator::new(arguments)?;
    let nodes = validator.nodes().await?;
    if nodes.is_empty() {
        warn("The validator lists no GPUs of this hotkey.");
        return Ok(());
    }
    let count = nodes.len();
    if !yes {
        warn(&format!(
            "Warning: all {count} GPUs of {} are deleted from the validator; what runs on them stops earning.",
            validator.signer.hotkey()
        ));
        if !confirmed("Type scorch to go on: ", "scorch")? {
            return Ok(());
        }
    }
    let mut failures = 0;
    for node in &nodes {
        let (name, uuid) = (text_of(&node["name"]), text_of(&node["uuid"]));
        printer.line(&format!("Deleting {name} with uuid {uuid}"))?;
        if let Err(error) = delete(printer, arguments, &uuid).await {
            warn(&format!("Error: {uuid}: {error:#}"));
            failures += 1;
        }
    }
    if failures > 0 {
        bail!("{failures} of {count} GPUs were not deleted; run it again");
    }
    Ok(())
}

pub(crate) async fn delete(printer: &Printer, arguments: &args::Validator, gpu_id: &str) -> Result<()> {
    let validator = Validator::new(arguments)?;
    let path = format!("/nodes/{}", escape(gpu_id));
    let response = validator.open(Method::DELETE, &path, Purpose::Nodes).await?;
    let status = response.status();
    if !status.is_success() {
        let body = request::body(response).await?;
        return Err(request::refused(status, &body).into());
    }
    printer.line(&format!("  successfully deleted {gpu_id}"))
}

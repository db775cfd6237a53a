//! `local-inventory`: servers, their deployments and GPUs, in the tables of the original.

use anyhow::{Result, bail};
use serde_json::Value;

use crate::args;
use crate::miner::Miner;
use crate::output::{Colour, Lines, Printer, Table};

pub(crate) async fn local(printer: &Printer, arguments: &args::Miner, name: Option<&str>) -> Result<()> {
    let miner = Miner::new(arguments)?;
    let mut answer = miner.get("/servers/").await?;
    if let Some(servers) = answer.as_array_mut() {
        if let Some(name) = name {
            servers.retain(|server| server["name"] == name || server["server_id"] == name);
            if servers.is_empty() {
                bail!("no server has the name or id {name}");
            }
        }
        servers.sort_by_key(|server| {
            (
                text_of(&server["name"]).to_lowercase(),
                text_of(&server["server_id"]),
            )
        });
    }
    if !printer.wants_tables() {
        return printer.value(&answer);
    }
    for server in answer.as_array().into_iter().flatten() {
        print_server(printer, server)?;
    }
    Ok(())
}

fn print_server(printer: &Printer, server: &Value) -> Result<()> {
    let title = format!("Server: {}", text_of(&server["name"]));
    let mut table = Table::new(&title, Lines::Rounded, &["Property", "Value"]);
    let locked = if server["locked"].as_bool().unwrap_or(false) {
        printer.paint(Colour::Yellow, "Yes")
    } else {
        printer.paint(Colour::Green, "No")
    };
    for (property, value) in [
        ("Status", text_of(&server["status"])),
        ("Locked", locked),
        ("GPUs", text_of(&server["gpu_count"])),
        ("Memory/GPU", format!("{}GB", text_of(&server["memory_per_gpu"]))),
        ("CPU/GPU", text_of(&server["cpu_per_gpu"])),
        (
            "Hourly Cost",
            format!("${:.2}", server["hourly_cost"].as_f64().unwrap_or(0.0)),
        ),
        ("IP Address", text_of(&server["ip_address"])),
        ("Created", date(&server["created_at"])),
    ] {
        table.row(vec![property.to_owned(), value]);
    }
    printer.table(&table)?;
    let deployments: Vec<&Value> = server["deployments"].as_array().into_iter().flatten().collect();
    if !deployments.is_empty() {
        let headers = ["Model Name", "GPUs", "Port", "Created", "Status"];
        let mut table = Table::new("Active Deployments", Lines::Rounded, &headers);
        for deployment in deployments {
            let flag = |name: &str| deployment[name].as_bool().unwrap_or(false);
            let status = if flag("active") && !flag("stub") {
                printer.paint(Colour::Green, "Active")
            } else {
                printer.paint(Colour::Red, "Inactive")
            };
            table.row(vec![
                text_of(&deployment["chute"]["name"]),
                deployment["gpus"].as_array().map_or(0, Vec::len).to_string(),
                text_of(&deployment["port"]),
                date(&deployment["created_at"]),
                status,
            ]);
        }
        printer.table(&table)?;
    }
    let headers = ["Name", "Memory", "Clock (MHz)", "Processors", "Status"];
    let mut table = Table::new("GPU Details", Lines::Rounded, &headers);
    for gpu in server["gpus"].as_array().into_iter().flatten() {
        let device = &gpu["device_info"];
        let status = if gpu["verified"].as_bool().unwrap_or(false) {
            printer.paint(Colour::Green, "Verified")
        } else {
            printer.paint(Colour::Red, "Unverified")
        };
        table.row(vec![
            text_of(&device["name"]),
            format!(
                "{:.1}GB",
                device["memory"].as_f64().unwrap_or(0.0) / f64::from(1 << 30)
            ),
            megahertz(&device["clock_rate"]),
            text_of(&device["processors"]),
            status,
        ]);
    }
    printer.table(&table)?;
    printer.line(&"=".repeat(80))
}

/// kHz as whole MHz.
pub(crate) fn megahertz(khz: &Value) -> String {
    khz.as_f64()
        .map_or_else(|| "-".to_owned(), |khz| format!("{:.0}", (khz / 1000.0).trunc()))
}

/// A value as a cell.
pub(crate) fn text_of(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// `YYYY-MM-DD HH:MM` of an ISO time.
pub(crate) fn date(at: &Value) -> String {
    let at = at.as_str().and_then(|at| at.get(..16));
    at.map_or_else(|| "-".to_owned(), |at| at.replace('T', " "))
}

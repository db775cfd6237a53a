//! `add-node`, `delete-node`, `lock`, `unlock`.

use std::time::Duration;

use anyhow::{Result, bail};
use protocol::gpu::gpu_type_of_short_ref;
use reqwest::Method;
use serde_json::{Value, json};

use crate::args;
use crate::miner::Miner;
use crate::output::{Colour, Printer, confirmed, warn};
use crate::request::{self, escape, is_not_found};
use crate::stream::Frames;

/// Longer than the miner itself waits for the validator.
const ADD_MAX: Duration = Duration::from_secs(35 * 60);
/// A cost per GPU beyond the validator's price times this looks like that of a whole host.
const SUSPICIOUS_FACTOR: f64 = 3.0;
/// The last message of an enrolment that went well. Scripts look for it.
const COMPLETED: &str = "completed server bootstrapping";

pub(crate) async fn add(
    printer: &Printer,
    arguments: &args::Miner,
    name: &str,
    validator: &str,
    hourly_cost: f64,
    gpu_short_ref: &str,
) -> Result<()> {
    if !hourly_cost.is_finite() || hourly_cost < 0.0 {
        bail!("--hourly-cost {hourly_cost} is no amount of dollars");
    }
    let miner = Miner::new(arguments)?;
    warn(&format!("Hourly cost: ${hourly_cost:.2} for EACH GPU of {name}"));
    if let Some(warning) = cost_warning(hourly_cost, gpu_short_ref) {
        warn(&warning);
    }
    let body = json!({
        "name": name,
        "validator": validator,
        "hourly_cost": hourly_cost,
        "gpu_short_ref": gpu_short_ref,
    });
    let response = miner
        .open(Method::POST, "/servers/", Some(&body), Some(ADD_MAX))
        .await?;
    let status = response.status();
    if !status.is_success() {
        let body = request::body(response).await?;
        let refused = request::refused(status, &body);
        warn(&printer.paint(Colour::Red, "Error adding node:"));
        return Err(refused.into());
    }
    let mut frames = Frames::new(response);
    while let Some(frame) = frames.next().await? {
        let text = |name: &str| frame[name].as_str().unwrap_or_default().to_owned();
        let (timestamp, message) = (text("timestamp"), text("message"));
        if printer.wants_tables() {
            printer.line(&format!("{} {message}", printer.paint(Colour::Blue, &timestamp)))?;
        } else {
            printer.line(&frame.to_string())?;
        }
        match frame["state"].as_str() {
            Some("failed") => bail!("{message}"),
            Some("ready") => return Ok(()),
            _ if message.contains(COMPLETED) => return Ok(()),
            _ => {}
        }
    }
    bail!(
        "the miner's API stopped telling before {name} was ready; it goes on without us: see chutes-miner status"
    )
}

/// The mistake that makes every value of a host too small: the whole host's cost instead of one GPU's.
fn cost_warning(hourly_cost: f64, gpu_short_ref: &str) -> Option<String> {
    let gpu_type = gpu_type_of_short_ref(gpu_short_ref)?;
    #[expect(clippy::cast_precision_loss, reason = "prices are small numbers")]
    let reference = gpu_type.hourly_usd_micros as f64 / 1e6;
    (hourly_cost > SUSPICIOUS_FACTOR * reference).then(|| {
        format!(
            "Warning: ${hourly_cost:.2} looks like the cost of a whole host: the validator reckons ${reference:.2} \
             for one {gpu_short_ref}. --hourly-cost is per GPU; delete the node and add it again if this is wrong."
        )
    })
}

pub(crate) async fn delete(printer: &Printer, arguments: &args::Miner, name: &str, yes: bool) -> Result<()> {
    let miner = Miner::new(arguments)?;
    let jobs = miner.jobs_on(name).await?;
    let mut path = format!("/servers/{}", escape(name));
    if jobs > 0 {
        warn(&format!(
            "Warning: {jobs} jobs run on {name}. They end with it, unfinished."
        ));
        if !yes && !confirmed("Continue (y/n)? ", "y")? {
            return Ok(());
        }
        path.push_str("?include_jobs=true");
    }
    match miner.ask(Method::DELETE, &path, None).await {
        Ok(answer) => printer.value(&answer),
        Err(error) if is_not_found(&error) => {
            warn(&format!("Warning: there is no node {name}"));
            Ok(())
        }
        Err(error) => Err(error),
    }
}

pub(crate) async fn lock(printer: &Printer, arguments: &args::Miner, name: &str, lock: bool) -> Result<()> {
    let miner = Miner::new(arguments)?;
    let word = if lock { "lock" } else { "unlock" };
    let path = format!("/servers/{}/{word}", escape(name));
    let server: Value = miner.ask(Method::GET, &path, None).await?;
    if !printer.wants_tables() {
        return printer.value(&server);
    }
    let name = server["name"].as_str().unwrap_or(name);
    // As Python prints it: scripts compare.
    let locked = if server["locked"].as_bool().unwrap_or(lock) {
        "True"
    } else {
        "False"
    };
    printer.line(&format!("Server {name} lock status is now: {locked}"))
}

#[cfg(test)]
mod tests {
    use super::cost_warning;

    #[test]
    fn a_whole_hosts_cost_is_noticed() {
        for (cost, gpu, warns) in [
            (2.35, "h100_sxm", false),
            (7.05, "h100_sxm", false),
            (18.8, "h100_sxm", true),
            (0.8, "3090", true),
            (1000.0, "not_a_gpu", false),
        ] {
            assert_eq!(cost_warning(cost, gpu).is_some(), warns, "{cost} {gpu}");
        }
    }
}

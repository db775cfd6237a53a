//! `status`, `diff`, `explain`, `observe`, `ban`, `unban`.

use anyhow::{Result, bail};
use reqwest::Method;
use serde_json::{Value, json};

use crate::args::{self, ObserveCommand};
use crate::inventory::text_of;
use crate::miner::Miner;
use crate::output::{Colour, Lines, Printer, Table, confirmed, warn};
use crate::request::escape;
use crate::trial;

pub(crate) async fn status(printer: &Printer, arguments: &args::Miner) -> Result<()> {
    let status = Miner::new(arguments)?.get("/v1/status").await?;
    if !printer.wants_tables() {
        return printer.value(&status);
    }
    let cluster = &status["cluster"];
    let mut table = Table::new("Miner", Lines::Rounded, &["Property", "Value"]);
    let words = |values: &Value| {
        let values: Vec<String> = values.as_array().into_iter().flatten().map(text_of).collect();
        if values.is_empty() {
            "none".to_owned()
        } else {
            values.join(", ")
        }
    };
    let counts = |values: &Value| {
        let members = values.as_object().into_iter().flatten();
        let some = members.filter(|(_, count)| count.as_u64() != Some(0));
        let some: Vec<String> = some.map(|(word, count)| format!("{count} {word}")).collect();
        if some.is_empty() {
            "none".to_owned()
        } else {
            some.join(", ")
        }
    };
    let oldest = &status["outbox"]["oldest"];
    let waits = if oldest.is_null() {
        "nothing waits".to_owned()
    } else {
        let (length, what) = (&status["outbox"]["length"], text_of(&oldest["what"]));
        format!(
            "{length} wait; the oldest ({what}) for {} s",
            oldest["waits_seconds"]
        )
    };
    let budget = &status["deletion_budget"];
    let members = cluster["members"].as_array().into_iter().flatten();
    let members: Vec<String> = members
        .map(|member| {
            let leads = member["leads"] == json!(true);
            let leads = if leads { ", leads" } else { "" };
            format!(
                "{} ({}{leads})",
                text_of(&member["host"]),
                text_of(&member["role"])
            )
        })
        .collect();
    for (property, value) in [
        ("Cluster", text_of(&cluster["id"])),
        ("Acts", acts(&cluster["observing_since"])),
        ("Hotkey", text_of(&cluster["miner"])),
        ("Validators", words(&cluster["validators"])),
        ("Rules of pay", text_of(&cluster["pay_profile"])),
        ("Members", members.join(", ")),
        ("Hosts with the seed", words(&cluster["hosts_with_seed"])),
        ("GPUs", counts(&status["gpus"])),
        ("Deployments", counts(&status["deployments"])),
        ("Chutes known", text_of(&status["chutes"])),
        ("To do at validators", waits),
        ("Last snapshot put away", last_snapshot(&status["backup"])),
        (
            "Deletion budget",
            format!("{} of {} used", budget["used"], budget["limit"]),
        ),
    ] {
        table.row(vec![property.to_owned(), value]);
    }
    printer.table(&table)?;
    let headers = [
        "Server",
        "State",
        "Type",
        "GPUs",
        "Free",
        "Held",
        "$/GPU/h",
        "Takes no work because",
    ];
    let mut table = Table::new("Servers", Lines::Rounded, &headers);
    for server in status["servers"].as_array().into_iter().flatten() {
        let gpus = &server["gpus"];
        let cost = server["hourly_cost_usd_per_gpu"].as_f64();
        table.row(vec![
            text_of(&server["name"]),
            text_of(&server["enrolment"]),
            text_of(&server["gpu_short_ref"]),
            text_of(&gpus["reported"]),
            text_of(&gpus["free"]),
            text_of(&gpus["held"]),
            cost.map_or_else(|| "-".to_owned(), |cost| format!("{cost:.2}")),
            text_of(&server["takes_no_work_because"]),
        ]);
    }
    printer.table(&table)?;
    for alert in status["alerts"].as_array().into_iter().flatten() {
        printer.line(&printer.paint(Colour::Yellow, &format!("! {}", text_of(&alert["text"]))))?;
    }
    Ok(())
}

/// What the member that was asked knows: only the leader puts snapshots away.
fn last_snapshot(backup: &Value) -> String {
    if let Some(at) = backup["last"]["at"].as_str() {
        return at.to_owned();
    }
    if backup.is_null() {
        "none by this member".to_owned()
    } else {
        "none; see the alerts".to_owned()
    }
}

pub(crate) async fn diff(printer: &Printer, arguments: &args::Miner, all: bool) -> Result<()> {
    let path = if all { "/v1/diff?all=true" } else { "/v1/diff" };
    let diff = Miner::new(arguments)?.get(path).await?;
    if !printer.wants_tables() {
        return printer.value(&diff);
    }
    let headers = [
        "Kind",
        "ID",
        "Name",
        "Record",
        "Host",
        "Validator",
        "Job",
        "Reason",
    ];
    let mut table = Table::new("", Lines::Rounded, &headers);
    let rows: Vec<&Value> = diff["rows"].as_array().into_iter().flatten().collect();
    for row in &rows {
        let job = if row["is_job"].as_bool().unwrap_or(false) {
            "yes"
        } else {
            ""
        };
        let reason = row["reason"].as_str().unwrap_or("").to_owned();
        let cell = |name: &str| text_of(&row[name]);
        table.row(vec![
            cell("kind"),
            cell("id"),
            cell("name"),
            cell("state"),
            cell("host"),
            cell("validator"),
            job.to_owned(),
            reason,
        ]);
    }
    if !rows.is_empty() {
        printer.table(&table)?;
    }
    for source in diff["sources"]["validators"].as_array().into_iter().flatten() {
        if source["instances_known"] != json!(true) {
            let validator = text_of(&source["validator"]);
            warn(&format!(
                "The instances at validator {validator} are unknown at present."
            ));
        }
    }
    match diff["differences"].as_u64() {
        Some(0) => printer.line("No differences."),
        count => {
            let count = count.unwrap_or(0);
            printer.line(&format!(
                "{count} differences. Most heal by themselves; chutes-miner diff --fix --select ID... stops \
                 deployments that you choose."
            ))
        }
    }
}

/// Stops what the operator selected, and nothing else.
pub(crate) async fn fix(
    printer: &Printer,
    arguments: &args::Miner,
    select: &[String],
    include_jobs: bool,
    allow_loss: bool,
) -> Result<()> {
    let miner = Miner::new(arguments)?;
    let diff = miner.get("/v1/diff?all=true").await?;
    let rows: Vec<&Value> = diff["rows"].as_array().into_iter().flatten().collect();
    for id in select {
        let row = rows
            .iter()
            .find(|row| row["id"] == id.as_str() && row["kind"] == "deployment");
        let Some(row) = row else {
            bail!("{id} is no deployment of the diff; chutes-miner diff --all lists them");
        };
        if row["can_be_stopped"] != json!(true) {
            bail!("deployment {id} is {} already", text_of(&row["state"]));
        }
        if row["is_job"] == json!(true) && !include_jobs {
            bail!("deployment {id} runs a job: --include-jobs stops it too");
        }
        if row["reason"].is_null() {
            bail!(
                "deployment {id} does not differ: chutes-miner purge-deployment -d {id} stops it all the same"
            );
        }
    }
    let body = json!({
        "deployments": select,
        "reason": "selected in the diff",
        "include_jobs": include_jobs,
        "allow_loss": allow_loss,
        "budgeted": true,
    });
    let answer = miner.ask(Method::POST, "/v1/stop", Some(&body)).await?;
    let left = answer["left_by_the_budget"].as_array().map_or(0, Vec::len);
    printer.value(&answer)?;
    if left > 0 {
        bail!("{left} deployments are left: the deletion budget of this window is used; repeat it in 10 min");
    }
    Ok(())
}

pub(crate) async fn explain(
    printer: &Printer,
    arguments: &args::Miner,
    subject: &args::Subject,
) -> Result<()> {
    let query = match (&subject.chute, &subject.server, &subject.deployment) {
        (Some(chute), _, _) => format!("chute={}", escape(chute)),
        (_, Some(server), _) => format!("server={}", escape(server)),
        (_, _, Some(deployment)) => format!("deployment={}", escape(deployment)),
        (None, None, None) => bail!("name one of --chute, --server, --deployment"),
    };
    let answer = Miner::new(arguments)?
        .get(&format!("/v1/explain?{query}"))
        .await?;
    printer.readable(&answer)
}

/// Whether the cluster does anything at validators.
fn acts(observing_since: &Value) -> String {
    match observing_since.as_str() {
        Some(since) => format!("no: it observes since {since}"),
        None => "yes".to_owned(),
    }
}

/// Lets the cluster only watch, or act, or says what it would do.
pub(crate) async fn observe(printer: &Printer, command: ObserveCommand) -> Result<()> {
    let (arguments, observing) = match command {
        ObserveCommand::Trial { miner, all, follow } => {
            let miner = Miner::new(&miner)?;
            return if follow {
                trial::follow(printer, &miner).await
            } else {
                trial::trial(printer, &miner, all).await
            };
        }
        ObserveCommand::Start { miner } => (miner, true),
        ObserveCommand::Stop { miner, yes } => {
            if !yes {
                warn(
                    "Warning: two miners that act with one hotkey delete each other's instances. The other one must \
                     have been stopped: of the original, the deployments gepetto and api.",
                );
                if !confirmed("Continue (y/n)? ", "y")? {
                    return Ok(());
                }
            }
            (miner, false)
        }
    };
    let body = json!({ "observing": observing });
    let answer = Miner::new(&arguments)?
        .ask(Method::PUT, "/v1/observing", Some(&body))
        .await?;
    if !printer.wants_tables() {
        return printer.value(&answer);
    }
    printer.line(match (observing, answer["changed"] == json!(true)) {
        (true, true) => {
            "The cluster observes: validators hear nothing from it until chutes-miner observe stop."
        }
        (false, true) => "The cluster acts.",
        (true, false) => "It observes already.",
        (false, false) => "It acts already.",
    })
}

pub(crate) async fn ban(
    printer: &Printer,
    arguments: &args::Miner,
    chute: &str,
    validator: Option<String>,
    reason: &str,
) -> Result<()> {
    let body = json!({ "chute_id": chute, "validator": validator, "reason": reason });
    let answer = Miner::new(arguments)?
        .ask(Method::POST, "/v1/bans", Some(&body))
        .await?;
    printer.value(&answer)
}

pub(crate) async fn unban(
    printer: &Printer,
    arguments: &args::Miner,
    chute: &str,
    validator: Option<String>,
) -> Result<()> {
    let mut path = format!("/v1/bans?chute_id={}", escape(chute));
    if let Some(validator) = validator {
        path.push_str(&format!("&validator={}", escape(&validator)));
    }
    let answer = Miner::new(arguments)?.ask(Method::DELETE, &path, None).await?;
    printer.value(&answer)
}

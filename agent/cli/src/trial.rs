//! `observe trial`, and the trial of `import --observe`: what a cluster that observes would do if it acted. It is asked
//! for, printed, and followed; nothing is changed.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::inventory::text_of;
use crate::miner::Miner;
use crate::output::{Colour, Lines, Printer, Table, warn};
use crate::request::Refused;

/// Between two looks of `--follow`. The leader reads validators' listings once a minute.
const EVERY: Duration = Duration::from_secs(30);

fn path(all: bool) -> &'static str {
    if all {
        "/v1/observing/trial?all=true"
    } else {
        "/v1/observing/trial"
    }
}

pub(crate) async fn trial(printer: &Printer, miner: &Miner, all: bool) -> Result<()> {
    let trial = miner.get(path(all)).await?;
    if printer.wants_tables() {
        print(printer, &trial)
    } else {
        printer.value(&trial)
    }
}

/// Prints decisions as they come and go, until the cluster acts or the command is ended.
pub(crate) async fn follow(printer: &Printer, miner: &Miner) -> Result<()> {
    follow_each(printer, async || miner.get(path(false)).await).await
}

/// The trial with servers of the original as if they were taken over.
pub(crate) async fn with_servers(miner: &Miner, servers: Vec<Value>) -> Result<Value> {
    let body = json!({ "servers": servers });
    let tried = miner.ask(Method::POST, path(false), Some(&body)).await;
    tried.map_err(|error| {
        let refused = error.downcast_ref::<Refused>();
        if refused.is_some_and(|refused| refused.status == StatusCode::PAYLOAD_TOO_LARGE) {
            error.context("too many servers for one request: name some with --server")
        } else {
            error
        }
    })
}

pub(crate) async fn follow_each(printer: &Printer, look: impl AsyncFn() -> Result<Value>) -> Result<()> {
    warn("Nothing is done. What would be is shown as it comes (+) and goes (-).");
    let mut known = None;
    loop {
        match look().await {
            Ok(trial) => {
                let now = decisions(&trial);
                let before = known.unwrap_or_default();
                for change in changes(&before, &now) {
                    change.print(printer, &text_of(&trial["at"]))?;
                }
                known = Some(now);
            }
            // It was there before, so it may come back. A refusal stays: the cluster acts now, say.
            Err(error) if known.is_some() && !is_refusal(&error) => warn(&format!("Warning: {error:#}")),
            Err(error) => return Err(error),
        }
        tokio::time::sleep(EVERY).await;
    }
}

fn is_refusal(error: &anyhow::Error) -> bool {
    let refused = error.downcast_ref::<Refused>();
    refused.is_some_and(|refused| refused.status.is_client_error())
}

/// A decision as it is told apart from others, and as it is shown.
type Decisions = BTreeMap<(&'static str, String), (String, Value)>;

fn decisions(trial: &Value) -> Decisions {
    let mut found = Decisions::new();
    let mut add = |kind: &'static str, key: &[&str], row: &Value, text: String| {
        // What merely varies, such as the value in a reason, makes no other decision.
        let key: Vec<String> = key.iter().map(|name| row[*name].to_string()).collect();
        found.insert((kind, key.join(" ")), (text, row.clone()));
    };
    let rows = |name: &str| trial[name].as_array().into_iter().flatten();
    for row in rows("in_the_way") {
        let text = format!("in the way: {}", text_of(row));
        add("in_the_way", &["text"], &json!({ "text": row }), text);
    }
    for row in rows("placed") {
        let key = ["chute_id", "server_id", "gpus", "stops", "job_id"];
        let gpus = row["gpus"].as_array().map_or(0, Vec::len);
        let (chute, server) = (text_of(&row["chute_name"]), text_of(&row["server_name"]));
        let text = format!("place {chute} on {gpus} GPUs of {server}: {}", why_placed(row));
        add("placed", &key, row, text);
    }
    for row in rows("stopped") {
        let (id, chute) = (text_of(&row["deployment_id"]), text_of(&row["chute_name"]));
        let text = format!(
            "stop {id} of {chute}, {}: {}",
            text_of(&row["when"]),
            text_of(&row["reason"])
        );
        add("stopped", &["deployment_id", "when"], row, text);
    }
    for row in rows("unaccounted") {
        let (id, chute) = (text_of(&row["instance_id"]), text_of(&row["chute_name"]));
        let text = format!("instance {id} of {chute}: {}", text_of(&row["reason"]));
        add("unaccounted", &["instance_id", "deleted"], row, text);
    }
    for row in rows("told") {
        let text = format!("{}: {}", text_of(&row["what"]), text_of(&row["about"]));
        add("told", &["what", "about", "validator"], row, text);
    }
    found
}

/// A decision that has come, or is not there any more.
struct Change<'a> {
    has_come: bool,
    kind: &'static str,
    text: &'a str,
    row: &'a Value,
}

fn changes<'a>(before: &'a Decisions, now: &'a Decisions) -> Vec<Change<'a>> {
    fn of<'a>(all: &'a Decisions, others: &'a Decisions, has_come: bool) -> impl Iterator<Item = Change<'a>> {
        let new = all.iter().filter(|(key, _)| !others.contains_key(*key));
        new.map(move |((kind, _), (text, row))| Change {
            has_come,
            kind,
            text,
            row,
        })
    }
    of(before, now, false).chain(of(now, before, true)).collect()
}

impl Change<'_> {
    fn print(&self, printer: &Printer, at: &str) -> Result<()> {
        if !printer.wants_tables() {
            let change = if self.has_come { "come" } else { "gone" };
            let line = json!({ "at": at, "change": change, "kind": self.kind, "what": self.row });
            return printer.line(&line.to_string());
        }
        let (sign, colour) = if self.has_come {
            ("+", Colour::Green)
        } else {
            ("-", Colour::Yellow)
        };
        printer.line(&format!(
            "{at} {}",
            printer.paint(colour, &format!("{sign} {}", self.text))
        ))
    }
}

fn why_placed(row: &Value) -> String {
    let reason = text_of(&row["reason"]);
    match row["refused_because"].as_str() {
        Some(refused) => format!("{reason}; refused: {refused}"),
        None => reason,
    }
}

/// The trial as tables.
pub(crate) fn print(printer: &Printer, trial: &Value) -> Result<()> {
    let rows = |name: &str| -> Vec<&Value> { trial[name].as_array().into_iter().flatten().collect() };
    let count = |value: &Value| value.as_array().map_or(0, Vec::len).to_string();
    let table = |title: &str, headers: &[&str], name: &str, cells: &dyn Fn(&Value) -> Vec<String>| {
        let rows = rows(name);
        if rows.is_empty() {
            return Ok(());
        }
        let mut table = Table::new(title, Lines::Rounded, headers);
        rows.iter().for_each(|row| table.row(cells(row)));
        printer.table(&table)
    };
    let cell = |row: &Value, name: &str| text_of(&row[name]);
    table(
        "Would be placed",
        &["Chute", "Server", "GPUs", "Stops", "Why"],
        "placed",
        &|row| {
            let stops: Vec<String> = row["stops"]
                .as_array()
                .into_iter()
                .flatten()
                .map(text_of)
                .collect();
            vec![
                cell(row, "chute_name"),
                cell(row, "server_name"),
                count(&row["gpus"]),
                stops.join(", "),
                why_placed(row),
            ]
        },
    )?;
    let columns = |title: &str, headers: &[&str], name: &str, keys: &[&str]| {
        table(title, headers, name, &|row| {
            keys.iter().map(|key| cell(row, key)).collect()
        })
    };
    columns(
        "Would be stopped",
        &["Deployment", "Chute", "Server", "When", "Why"],
        "stopped",
        &["deployment_id", "chute_name", "server_name", "when", "reason"],
    )?;
    columns(
        "Instances that no deployment accounts for",
        &["Instance", "Chute", "What would be done"],
        "unaccounted",
        &["instance_id", "chute_name", "reason"],
    )?;
    columns(
        "Validators would be told",
        &["What", "About", "Validator"],
        "told",
        &["what", "about", "validator"],
    )?;
    columns(
        "Would be left alone",
        &["Chute", "Why"],
        "left_alone_because",
        &["chute_name", "reason"],
    )?;
    for text in rows("in_the_way") {
        printer.line(&printer.paint(Colour::Yellow, &format!("! {}", text_of(text))))?;
    }
    if !trial["strategy_failure"].is_null() {
        let failure = text_of(&trial["strategy_failure"]);
        printer.line(&printer.paint(
            Colour::Yellow,
            &format!("! {failure}: the built-in strategy decided"),
        ))?;
    }
    if rows("placed").is_empty() && rows("stopped").is_empty() {
        printer.line("Nothing would be placed or stopped.")?;
    }
    for listing in rows("listings")
        .into_iter()
        .filter(|row| row["read_at"].is_string())
    {
        let unknown: Vec<String> = listing["unknown"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|unknown| text_of(&unknown["resource"]))
            .collect();
        let unknown = if unknown.is_empty() {
            String::new()
        } else {
            format!("; unknown: {}", unknown.join(", "))
        };
        let (validator, read_at) = (cell(listing, "validator"), cell(listing, "read_at"));
        printer.line(&format!(
            "Validator {validator} was listed at {read_at}{unknown}."
        ))?;
    }
    printer.line(&format!(
        "{} deployments go on; {} chutes are left alone (observe trial --all says why). Nothing was done: the cluster \
         observes since {}.",
        trial["go_on"],
        trial["left_alone"],
        text_of(&trial["observing_since"])
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(value: &str, stops: &[&str]) -> Value {
        let placed = json!({
            "chute_id": "c", "chute_name": "acme/model", "server_id": "s", "server_name": "gpu-a", "gpus": ["1", "2"],
            "stops": stops, "job_id": null, "reason": format!("value {value}"), "refused_because": null,
        });
        json!({ "placed": [placed], "in_the_way": ["no host"] })
    }

    #[test]
    fn only_what_is_decided_otherwise_is_a_change() {
        let (first, same) = (decisions(&trial("1", &[])), decisions(&trial("2", &[])));
        let other = decisions(&json!({ "placed": trial("2", &["victim"])["placed"] }));
        let none = Decisions::new();
        let shown = |before, now| -> Vec<String> {
            let changes = changes(before, now);
            let sign = |has_come| if has_come { '+' } else { '-' };
            changes
                .iter()
                .map(|it| format!("{} {}", sign(it.has_come), it.text))
                .collect()
        };
        let place = "place acme/model on 2 GPUs of gpu-a: value";
        assert_eq!(
            shown(&none, &first),
            ["+ in the way: no host".to_owned(), format!("+ {place} 1")]
        );
        assert_eq!(shown(&first, &same), Vec::<String>::new());
        assert_eq!(
            shown(&same, &other),
            [
                "- in the way: no host".to_owned(),
                format!("- {place} 2"),
                format!("+ {place} 2")
            ]
        );
    }
}

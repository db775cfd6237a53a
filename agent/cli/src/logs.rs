//! `logs`, `events`: what a workload wrote and what happened to it, by way of the miner's API; `instance-logs`: what
//! the validator has of it.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Result, bail};
use reqwest::Method;
use serde_json::Value;

use crate::args;
use crate::inventory::text_of;
use crate::miner::Miner;
use crate::output::{Lines, Printer, Table, warn};
use crate::request::{self, escape};
use crate::stream::Frames;

/// Between two looks for more.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);
/// An answer of so many bytes may have been cut.
const AT_ONCE_BYTES: usize = 512 * 1024;
/// How often, and after which pause, it is tried again while nobody answers.
const AWAY_TRIES: u32 = 15;
const AWAY_PAUSE: Duration = Duration::from_secs(2);
/// A stream of output may go on for so long.
const STREAM_MAX: Duration = Duration::from_secs(24 * 3600);

pub(crate) async fn log(
    printer: &Printer,
    arguments: &args::Miner,
    deployment: &str,
    follow: bool,
    previous: bool,
) -> Result<()> {
    let miner = Miner::new(arguments)?;
    let path = format!("/v1/deployments/{}/log", escape(deployment));
    let first = if previous {
        format!("{path}?previous=true")
    } else {
        path.clone()
    };
    let mut answer = miner.get(&first).await?;
    show(printer, &answer)?;
    if !follow {
        return Ok(());
    }
    loop {
        let before = answer["next"].as_str().map(str::to_owned);
        // There may be more at once where the last answer was a long one.
        if answer["text"]
            .as_str()
            .is_none_or(|text| text.len() < AT_ONCE_BYTES)
        {
            tokio::time::sleep(FOLLOW_EVERY).await;
        }
        let after = before
            .as_ref()
            .map(|before| format!("{path}?after={}", escape(before)));
        answer = patiently(&miner, after.as_ref().unwrap_or(&path)).await?;
        let is_new = answer["next"].as_str() != before.as_deref();
        if is_new {
            show(printer, &answer)?;
        } else if answer["gone"] == true {
            return Ok(());
        }
    }
}

/// Text for people, whole answers for scripts.
fn show(printer: &Printer, answer: &Value) -> Result<()> {
    if !printer.wants_tables() {
        return printer.value(answer);
    }
    let mut out = std::io::stdout().lock();
    out.write_all(answer["text"].as_str().unwrap_or_default().as_bytes())?;
    Ok(out.flush()?)
}

/// Asks for more, also while a member or the host is away for a moment.
async fn patiently(miner: &Miner, path: &str) -> Result<Value> {
    let mut tries = 0;
    loop {
        match miner.get(path).await {
            Err(error) if tries < AWAY_TRIES && request::may_pass(&error) => {
                tries += 1;
                tokio::time::sleep(AWAY_PAUSE).await;
            }
            answer => return answer,
        }
    }
}

pub(crate) async fn events(printer: &Printer, arguments: &args::Miner, deployment: &str) -> Result<()> {
    let miner = Miner::new(arguments)?;
    let path = format!("/v1/deployments/{}/events", escape(deployment));
    let answer = miner.get(&path).await?;
    if !printer.wants_tables() {
        return printer.value(&answer);
    }
    let title = format!("What happened on {} (times UTC)", text_of(&answer["server_name"]));
    let headers = ["Last seen", "Times", "Object", "Reason", "Message"];
    let mut table = Table::new(&title, Lines::Rounded, &headers);
    for event in answer["events"].as_array().into_iter().flatten() {
        let at = text_of(&event["at"]);
        table.row(vec![
            at.get(..19).unwrap_or(&at).to_owned(),
            event["count"].to_string(),
            text_of(&event["object"]),
            text_of(&event["reason"]),
            text_of(&event["message"]),
        ]);
    }
    printer.table(&table)
}

pub(crate) async fn of_validator(
    printer: &Printer,
    validator_api: &str,
    jwt: &str,
    cursor: Option<&str>,
) -> Result<()> {
    if let Some(cursor) = cursor
        && !is_cursor(cursor)
    {
        bail!("--cursor {cursor:?} is not of the form YYYY-MM-DDTHH:MM:SS");
    }
    let mut last = cursor.map(str::to_owned);
    let followed = tokio::select! {
        followed = follow_validator(printer, validator_api, jwt, &mut last) => followed,
        // Nothing is lost: the same can be asked for again.
        _ = tokio::signal::ctrl_c() => {
            resume_hint(last.as_deref());
            std::process::exit(130);
        }
    };
    if followed.is_err() {
        resume_hint(last.as_deref());
    }
    followed
}

async fn follow_validator(
    printer: &Printer,
    validator_api: &str,
    jwt: &str,
    last: &mut Option<String>,
) -> Result<()> {
    let query = last
        .as_deref()
        .map_or_else(String::new, |last| format!("?cursor={}", escape(last)));
    let url = request::url(validator_api, &format!("/miner/instance_logs{query}"))?;
    let asked = request::client(Some(STREAM_MAX))?
        .request(Method::GET, url)
        .header("Authorization", jwt);
    let whom = format!("the validator's API at {validator_api}");
    let response = request::send(asked, &whom, "is --validator-api right?").await?;
    let status = response.status();
    if !status.is_success() {
        let body = request::body(response).await?;
        return Err(request::refused(status, &body).into());
    }
    let mut frames = Frames::new(response);
    while let Some(data) = frames.next_data().await? {
        match serde_json::from_str::<Value>(&data) {
            Ok(Value::Object(entry)) => {
                printer.line(entry.get("log").map(text_of).unwrap_or_default().trim_end())?;
                if let Some(cursor) = entry.get("cursor").and_then(Value::as_str) {
                    *last = Some(cursor.get(..19).unwrap_or(cursor).to_owned());
                }
            }
            _ if data == "." => {}
            _ => printer.line(data.trim_end())?,
        }
    }
    Ok(())
}

fn resume_hint(last: Option<&str>) {
    if let Some(last) = last {
        warn(&format!("To go on from here: --cursor {last}"));
    }
}

fn is_cursor(text: &str) -> bool {
    const FORM: &[u8] = b"dddd-dd-ddTdd:dd:dd";
    let fits = |(byte, form): (u8, &u8)| {
        if *form == b'd' {
            byte.is_ascii_digit()
        } else {
            byte == *form
        }
    };
    text.len() == FORM.len() && text.bytes().zip(FORM).all(fits)
}

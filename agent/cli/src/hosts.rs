//! `host` and `raft`: who belongs to the cluster, who votes and who leads.

use anyhow::Result;
use reqwest::Method;
use serde_json::{Value, json};

use crate::args::{self, HostCommand, PinWord, RaftCommand};
use crate::inventory::{date, text_of};
use crate::miner::Miner;
use crate::output::{Colour, Lines, Printer, Table, confirmed, warn};
use crate::request::escape;

/// Clocks of members may differ by so much.
const CLOCK_AHEAD_MAX_MS: u64 = 5_000;

pub(crate) async fn host(printer: &Printer, command: HostCommand) -> Result<()> {
    match command {
        HostCommand::Invite {
            miner,
            eligible,
            ttl,
            site,
        } => invite(printer, &miner, eligible, ttl.as_deref(), site.as_deref()).await,
        HostCommand::List { miner } => list(printer, &miner).await,
        HostCommand::Remove { miner, name, yes } => remove(printer, &miner, &name, yes).await,
        HostCommand::Pin { miner, name, pin } => set_pin(printer, &miner, &name, pin).await,
    }
}

pub(crate) async fn raft(printer: &Printer, command: RaftCommand) -> Result<()> {
    match command {
        RaftCommand::Status { miner } => raft_status(printer, &miner).await,
        RaftCommand::Transfer { miner, host } => transfer(printer, &miner, host.as_deref()).await,
        RaftCommand::Recover => printer.line(RECOVER),
    }
}

/// For people the token alone goes to stdout: it can be piped to where it is needed.
async fn invite(
    printer: &Printer,
    arguments: &args::Miner,
    eligible: bool,
    ttl: Option<&str>,
    site: Option<&str>,
) -> Result<()> {
    let mut body = json!({ "eligible": eligible });
    if let Some(ttl) = ttl {
        body["ttl"] = json!(ttl);
    }
    if let Some(site) = site {
        body["site"] = json!(site);
    }
    let miner = Miner::new(arguments)?;
    let answer = miner.ask(Method::POST, "/hosts/invites", Some(&body)).await?;
    if !printer.wants_tables() {
        return printer.value(&answer);
    }
    let seed = if eligible {
        ", for a host that has the miner's seed"
    } else {
        ""
    };
    warn(&format!(
        "Good once, until {} UTC{seed}. Whoever has this word can join: keep it secret.",
        date(&answer["expires_at"])
    ));
    printer.line(&text_of(&answer["token"]))
}

async fn list(printer: &Printer, arguments: &args::Miner) -> Result<()> {
    let hosts = Miner::new(arguments)?.get("/hosts").await?;
    if !printer.wants_tables() {
        return printer.value(&hosts);
    }
    let headers = [
        "Host",
        "ID",
        "Site",
        "Address",
        "Role",
        "Pin",
        "Connected",
        "Joined",
        "Removed",
    ];
    let mut table = Table::new("Hosts", Lines::Rounded, &headers);
    for host in hosts.as_array().into_iter().flatten() {
        let cell = |name: &str| text_of(&host[name]);
        table.row(vec![
            cell("name"),
            cell("server_id"),
            site_text(&host["site"]),
            cell("address"),
            role(printer, host),
            cell("pin"),
            yes_or_no(&host["connected"]),
            date(&host["joined_at"]),
            date(&host["revoked_at"]),
        ]);
    }
    printer.table(&table)
}

/// Without a majority nobody can be asked over the network, and the store of the member that goes on is in use as
/// long as its agent runs: so it is done there.
const RECOVER: &str = "\
This is done on the machine of a member that is left, with its agent stopped:

  chutes-agent recover

It shows how far that member has come, who voted and what may be lost, and changes nothing before the cluster's id is
typed. Ask every member that is left, and go on with the one that has come farthest. The others, and those that
come back later, run `chutes-agent rejoin` before their agent is started.
If a majority of the voters can be brought back, do that instead: nothing is lost then.";

fn role(printer: &Printer, row: &Value) -> String {
    let role = text_of(&row["role"]);
    match (row["leads"].as_bool(), role.as_str()) {
        (Some(true), _) => printer.paint(Colour::Green, &format!("{role}, leads")),
        (_, "removed" | "lost") => printer.paint(Colour::Red, &role),
        _ => role,
    }
}

fn yes_or_no(value: &Value) -> String {
    match value.as_bool() {
        Some(true) => "yes".to_owned(),
        Some(false) => "no".to_owned(),
        None => "-".to_owned(),
    }
}

/// Hosts without a site share the empty one.
fn site_text(site: &Value) -> String {
    let site = text_of(site);
    if site.is_empty() { "-".to_owned() } else { site }
}

async fn remove(printer: &Printer, arguments: &args::Miner, name: &str, yes: bool) -> Result<()> {
    let miner = Miner::new(arguments)?;
    if !yes {
        warn(&format!(
            "Warning: {name} leaves the cluster, and its certificate is worthless from now on. To come back it \
             needs a new invitation."
        ));
        if !confirmed("Continue (y/n)? ", "y")? {
            return Ok(());
        }
    }
    let path = format!("/hosts/{}", escape(name));
    printer.value(&miner.ask(Method::DELETE, &path, None).await?)
}

async fn set_pin(printer: &Printer, arguments: &args::Miner, name: &str, pin: PinWord) -> Result<()> {
    let pin = match pin {
        PinWord::Auto => "auto",
        PinWord::Voter => "voter",
        PinWord::Never => "never",
    };
    let path = format!("/hosts/{}/pin", escape(name));
    let body = json!({ "pin": pin });
    let answer = Miner::new(arguments)?
        .ask(Method::PUT, &path, Some(&body))
        .await?;
    printer.value(&answer)
}

async fn raft_status(printer: &Printer, arguments: &args::Miner) -> Result<()> {
    let raft = Miner::new(arguments)?.get("/v1/raft").await?;
    if !printer.wants_tables() {
        return printer.value(&raft);
    }
    let headers = ["Member", "Host", "Site", "Role", "Log index", "Answered"];
    let title = format!("Term {}", text_of(&raft["term"]));
    let mut table = Table::new(&title, Lines::Rounded, &headers);
    for member in raft["members"].as_array().into_iter().flatten() {
        let answered = member["answered_ago_ms"].as_u64();
        table.row(vec![
            text_of(&member["member"]),
            text_of(&member["host"]),
            site_text(&member["site"]),
            role(printer, member),
            text_of(&member["matched"]),
            answered.map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms ago")),
        ]);
    }
    printer.table(&table)?;
    for member in raft["members"].as_array().into_iter().flatten() {
        if let Some(ahead_ms) = member["clock_ahead_ms"].as_i64()
            && ahead_ms.unsigned_abs() > CLOCK_AHEAD_MAX_MS
        {
            let off = printer.paint(Colour::Yellow, &format!("{} s", ahead_ms / 1000));
            let host = text_of(&member["host"]);
            printer.line(&format!(
                "The clock of {host} is {off} ahead of the members' time: run a time service (chrony) on it."
            ))?;
        }
    }
    let Some(sites) = raft["sites"].as_array() else {
        return printer.line("The leader's API tells how far each member has come.");
    };
    for loss in sites {
        let site = match loss["site"].as_str().unwrap_or_default() {
            "" => "the hosts that name no site".to_owned(),
            site => format!("site {site}"),
        };
        let what = if loss["survives"] == json!(true) {
            "the cluster goes on".to_owned()
        } else {
            printer.paint(Colour::Yellow, "no change is possible until it is back")
        };
        printer.line(&format!("Without {site}: {what}."))?;
    }
    Ok(())
}

async fn transfer(printer: &Printer, arguments: &args::Miner, host: Option<&str>) -> Result<()> {
    let body = host.map_or_else(|| json!({}), |host| json!({ "to": host }));
    let miner = Miner::new(arguments)?;
    let answer = miner.ask(Method::POST, "/v1/raft/transfer", Some(&body)).await?;
    if !printer.wants_tables() {
        return printer.value(&answer);
    }
    printer.line(&format!("{} leads now", text_of(&answer["host"])))
}

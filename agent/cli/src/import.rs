//! `import`: takes over a running original miner, from its database and its cluster, without stopping a chute.
//!
//! Reading order: [`rows`] (its tables), [`objects`] (its objects in the cluster), [`plan`] (what follows from both;
//! pure), this page (in which order it is done).
//!
//! ```text
//! read, plan, ask our miner about each server --> of those that are well: mark all Jobs --> for each: mark its other
//! objects, take it over --> wait until its agent knows --> seal
//! ```
//! An agent leaves alone what it sees without seal, so nothing can be stopped between the steps. Each
//! step is done only where it was not done before, so that whatever broke off is run again.

pub(crate) mod objects;
mod plan;
pub(crate) mod rows;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::args;
use crate::miner::Miner;
use crate::output::{Colour, Lines, Printer, Table, warn};
use crate::request::Refused;
use crate::trial;
use objects::{Cluster, Mark};
use plan::{Plan, ServerPlan};

const PATH: &str = "/v1/import";
/// How long agents may take to say that they know what was taken over.
const AGENTS_MAX: Duration = Duration::from_secs(30);
const ASK_EVERY: Duration = Duration::from_millis(500);

pub(crate) async fn import(printer: &Printer, arguments: &args::Import) -> Result<()> {
    let miner = Miner::new(&arguments.miner)?;
    let cluster = Cluster::open(arguments.kubeconfig.as_deref(), &arguments.namespace).await?;
    if arguments.follow {
        let look = async || {
            let (plan, outcomes) = compare(&miner, &cluster, arguments).await?;
            try_out(&miner, &plan, &outcomes).await
        };
        return trial::follow_each(printer, look).await;
    }
    let (plan, mut outcomes) = compare(&miner, &cluster, arguments).await?;
    let broken_off = if arguments.apply {
        let due = plan.servers.iter().zip(&mut outcomes);
        let due = due.filter(|(_, outcome)| outcome.problems.is_empty());
        take_over_all(&miner, &cluster, due.collect()).await.err()
    } else {
        None
    };
    let tried = if arguments.observe {
        Some(try_out(&miner, &plan, &outcomes).await?)
    } else {
        None
    };
    print(printer, &plan, &outcomes, arguments.apply, tried)?;
    if let Some(error) = broken_off {
        return Err(error);
    }
    let with_problems = outcomes
        .iter()
        .filter(|outcome| !outcome.problems.is_empty())
        .count();
    if with_problems > 0 {
        bail!("{with_problems} of {} servers have problems", outcomes.len());
    }
    Ok(())
}

/// What is there, and what taking it over would change.
async fn compare(miner: &Miner, cluster: &Cluster, arguments: &args::Import) -> Result<(Plan, Vec<Outcome>)> {
    let rows = rows::read(&arguments.postgres).await?;
    let objects = cluster.list().await?;
    let mut plan = plan::plan(&rows, &objects);
    select(&mut plan, &arguments.server)?;
    let mut outcomes = Vec::new();
    for server in &plan.servers {
        outcomes.push(ask(miner, server, false).await?);
    }
    Ok((plan, outcomes))
}

/// What our miner would do if it had taken over what can be, and acted.
async fn try_out(miner: &Miner, plan: &Plan, outcomes: &[Outcome]) -> Result<Value> {
    let good = plan.servers.iter().zip(outcomes);
    let good = good.filter(|(_, outcome)| outcome.problems.is_empty());
    let servers = good.map(|(server, _)| without_code(server.request.clone()));
    let mut tried = trial::with_servers(miner, servers.collect()).await?;
    if let Some(in_the_way) = tried["in_the_way"].as_array_mut() {
        for (server, outcome) in plan.servers.iter().zip(outcomes) {
            let problems = outcome.problems.iter();
            in_the_way.extend(problems.map(|problem| json!(format!("server {}: {problem}", server.name))));
        }
    }
    Ok(tried)
}

/// The code of chutes decides nothing, and all servers go into one request.
fn without_code(mut request: Value) -> Value {
    for deployment in request["deployments"].as_array_mut().into_iter().flatten() {
        deployment["chute"]["code"] = json!("");
    }
    request
}

/// What became of a server.
#[derive(Debug, Default)]
struct Outcome {
    id: Value,
    changes: Vec<String>,
    problems: Vec<String>,
    /// The record was changed.
    is_applied: bool,
    marked: usize,
    sealed: usize,
}

fn select(plan: &mut Plan, names: &[String]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    for name in names {
        if !plan.servers.iter().any(|server| server.name == *name) {
            bail!("the original miner has no server {name}");
        }
    }
    plan.servers.retain(|server| names.contains(&server.name));
    plan.left_alone.retain(|left| names.contains(&left.node));
    plan.left_out
        .retain(|left| left.server.as_ref().is_some_and(|server| names.contains(server)));
    Ok(())
}

/// Asks our miner what taking a server over would change, or to do it.
async fn ask(miner: &Miner, server: &ServerPlan, apply: bool) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    outcome.problems.clone_from(&server.problems);
    if !outcome.problems.is_empty() {
        return Ok(outcome);
    }
    let mut body = server.request.clone();
    body["apply"] = json!(apply);
    let answer = match miner.ask(Method::POST, PATH, Some(&body)).await {
        Ok(answer) => answer,
        Err(error) => {
            // Of this server only; others may be well.
            let refused = error.downcast_ref::<Refused>().filter(|refused| {
                let of_the_server = [
                    StatusCode::BAD_REQUEST,
                    StatusCode::NOT_FOUND,
                    StatusCode::PAYLOAD_TOO_LARGE,
                    StatusCode::UNPROCESSABLE_ENTITY,
                ];
                of_the_server.contains(&refused.status)
            });
            let Some(refused) = refused else {
                return Err(error.context(format!("ask about {}", server.name)));
            };
            outcome.problems.push(refused.detail.clone());
            return Ok(outcome);
        }
    };
    let texts = |name: &str| -> Result<Vec<String>> {
        let list = answer[name].as_array();
        let list =
            list.with_context(|| format!("the miner's answer has no {name}: is its version older?"))?;
        let text = |text: &Value| text.as_str().map_or_else(|| text.to_string(), str::to_owned);
        Ok(list.iter().map(text).collect())
    };
    outcome.id = answer["server_id"].clone();
    outcome.changes = texts("changes")?;
    outcome.problems = texts("problems")?;
    outcome.is_applied = answer["applied"] == true;
    Ok(outcome)
}

/// Takes over what is due. What is wrong with one server only becomes one of its problems.
async fn take_over_all(
    miner: &Miner,
    cluster: &Cluster,
    mut due: Vec<(&ServerPlan, &mut Outcome)>,
) -> Result<()> {
    if due.iter().any(|(_, outcome)| !outcome.changes.is_empty()) {
        let status = miner.get("/v1/status").await?;
        if status["cluster"]["observing_since"].is_null() {
            bail!("the cluster acts: only one that observes takes servers over, see chutes-miner observe");
        }
    }
    for (server, outcome) in &mut due {
        write(cluster, &server.jobs, &mut outcome.marked, &mut outcome.problems).await;
    }
    for (server, outcome) in &mut due {
        if outcome.problems.is_empty() {
            let taken = take_over(miner, cluster, server, outcome).await;
            taken.with_context(|| format!("take {} over", server.name))?;
        }
    }
    due.retain(|(server, outcome)| outcome.problems.is_empty() && !server.seals.is_empty());
    let names = due.iter().map(|(server, _)| server.name.as_str()).collect();
    let unaware = wait_for_agents(miner, names).await?;
    for (server, outcome) in due {
        if unaware.contains(server.name.as_str()) {
            let problem =
                "it is taken over and not sealed: its agent has not said yet that it knows; run it again";
            outcome.problems.push(problem.to_owned());
        } else {
            write(cluster, &server.seals, &mut outcome.sealed, &mut outcome.problems).await;
        }
    }
    Ok(())
}

/// Waits until the agents of these servers have said that they know what they are to run: an agent that does not would
/// end what is sealed. Those that did not say it in time.
async fn wait_for_agents<'a>(miner: &Miner, mut names: BTreeSet<&'a str>) -> Result<BTreeSet<&'a str>> {
    let deadline = Instant::now() + AGENTS_MAX;
    while !names.is_empty() {
        let state = miner.get("/v1/state").await?;
        let servers = state["servers"].as_array().into_iter().flatten();
        for server in servers {
            let (reported, revision) = (&server["reported"], server["revision"].as_u64());
            let is_aware = reported["incarnation"] == state["incarnation"]
                && reported["revision"]
                    .as_u64()
                    .is_some_and(|reported| Some(reported) >= revision);
            if is_aware && let Some(name) = server["name"].as_str() {
                names.remove(name);
            }
        }
        if Instant::now() >= deadline {
            break;
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
    Ok(names)
}

/// Marks what is not marked yet, and takes over. What is wrong with this server only becomes one of its problems.
async fn take_over(
    miner: &Miner,
    cluster: &Cluster,
    server: &ServerPlan,
    outcome: &mut Outcome,
) -> Result<()> {
    if !write(
        cluster,
        &server.others,
        &mut outcome.marked,
        &mut outcome.problems,
    )
    .await
    {
        return Ok(());
    }
    if !outcome.changes.is_empty() {
        let answer = ask(miner, server, true).await?;
        outcome.is_applied = answer.is_applied;
        outcome.problems = answer.problems;
        let is_done = answer.is_applied || answer.changes.is_empty();
        if outcome.problems.is_empty() && !is_done {
            outcome
                .problems
                .push("the miner did not take it over; run it again".to_owned());
        }
        if !outcome.problems.is_empty() {
            return Ok(());
        }
    }
    Ok(())
}

/// Writes marks and counts them; false, with the reason among the problems, if one could not be written.
async fn write(cluster: &Cluster, marks: &[Mark], written: &mut usize, problems: &mut Vec<String>) -> bool {
    for mark in marks {
        if let Err(error) = cluster.write(mark).await {
            // The API server may add the whole object.
            problems.push(format!("{error:#}").chars().take(300).collect());
            return false;
        }
        *written += 1;
    }
    true
}

fn print(
    printer: &Printer,
    plan: &Plan,
    outcomes: &[Outcome],
    apply: bool,
    tried: Option<Value>,
) -> Result<()> {
    let servers = || plan.servers.iter().zip(outcomes);
    if !printer.wants_tables() {
        let servers = servers().map(|(server, outcome)| {
            json!({
                "server": server.name, "server_id": outcome.id, "changes": outcome.changes,
                "problems": outcome.problems, "applied": outcome.is_applied,
                "objects_to_mark": server.jobs.len() + server.others.len(), "objects_marked": outcome.marked,
                "objects_to_seal": server.seals.len(), "objects_sealed": outcome.sealed,
            })
        });
        let left_out = plan.left_out.iter();
        let left_out =
            left_out.map(|left| json!({ "server": left.server, "what": left.what, "why": left.why }));
        let mut answer = json!({
            "apply": apply,
            "servers": servers.collect::<Vec<_>>(),
            "left_out": left_out.collect::<Vec<_>>(),
            "left_alone": plan.left_alone.iter().map(|left| &left.job).collect::<Vec<_>>(),
        });
        if let Some(tried) = tried {
            answer["trial"] = tried;
        }
        return printer.value(&answer);
    }
    let title = if apply { "Import" } else { "To be taken over" };
    let mut table = Table::new(title, Lines::Rounded, &["Server", "What"]);
    for (server, outcome) in servers() {
        let mut row = |text: String| table.row(vec![server.name.clone(), text]);
        for problem in &outcome.problems {
            row(printer.paint(Colour::Red, &format!("problem: {problem}")));
        }
        for change in &outcome.changes {
            let change = if outcome.is_applied {
                printer.paint(Colour::Green, change)
            } else if apply {
                format!("not done: {change}")
            } else {
                change.clone()
            };
            row(change);
        }
        let (marks, seals, word) = if apply {
            (outcome.marked, outcome.sealed, "")
        } else {
            let marks = server.jobs.len() + server.others.len();
            (marks, server.seals.len(), "to be ")
        };
        if marks + seals > 0 {
            row(format!("{marks} objects {word}marked, {seals} {word}sealed"));
        } else if outcome.changes.is_empty() && outcome.problems.is_empty() {
            row("nothing changes".to_owned());
        }
    }
    printer.table(&table)?;
    if !plan.left_out.is_empty() {
        let mut table = Table::new("Left out", Lines::Rounded, &["Server", "What", "Why"]);
        for left in &plan.left_out {
            let server = left.server.clone().unwrap_or_else(|| "-".to_owned());
            table.row(vec![server, left.what.clone(), left.why.clone()]);
        }
        printer.table(&table)?;
    }
    for left in &plan.left_alone {
        warn(&format!(
            "Left alone: no row knows the Job {} on {}. It goes on, and its GPUs count as free",
            left.job, left.node
        ));
    }
    if let Some(tried) = tried {
        return trial::print(printer, &tried);
    }
    if !apply {
        warn("Nothing was changed. With --apply it is done");
    }
    Ok(())
}

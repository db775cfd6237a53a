//! `export`: the way back. Writes what this miner knows into the original's database, so that the original goes on with
//! the chutes that run; and takes our marks off the objects, once the agents are stopped.
//!
//! ```text
//! observe start --> export --apply --> the agents are removed --> export --release --> the original is started
//! ```
//! Reading order: [`difference`] (which rows change; pure), this page (in which order it is done).

mod difference;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::args;
use crate::import::objects::Cluster;
use crate::import::rows::Database;
use crate::miner::Miner;
use crate::output::{Lines, Printer, Table, warn};
use difference::{Change, Ours, Tables, Verb};

/// What the API server says of the agents' pods.
const AGENTS: &str = "app.kubernetes.io/name=chutes-miner";

pub(crate) async fn export(printer: &Printer, arguments: &args::Export) -> Result<()> {
    let cluster = Cluster::open(arguments.kubeconfig.as_deref(), &arguments.namespace).await?;
    if arguments.release {
        return release(printer, &cluster, arguments.apply).await;
    }
    let Some(url) = &arguments.postgres else {
        bail!("--postgres is missing: the URL of the original miner's database");
    };
    let miner = Miner::new(&arguments.miner)?;
    let state = miner.get("/v1/state").await?;
    if state["observing_since"].is_null() {
        bail!("the cluster acts, and what it knows changes: chutes-miner observe start comes first");
    }
    let deployments = state["deployments"].as_array().into_iter().flatten();
    let starting = deployments.filter(|row| row["live"] == true && row["running_at"].is_null());
    let starting: Vec<String> = starting.map(|row| row["deployment_id"].to_string()).collect();
    if !starting.is_empty() {
        bail!(
            "these are starting, and the original would not know how far they are: let them start (chutes-miner observe \
             stop), or stop them (chutes-miner purge-deployment): {}",
            starting.join(", ")
        );
    }
    let servers = miner.get("/servers/").await?;
    let nodes = cluster.nodes().await?;
    let ours = Ours::new(&servers, &state, &nodes);
    let database = Database::of(url)?;
    let (client, connection) = database.connect().await?;
    // It ends with the client, and what it has to say of a failure the client says too.
    let connection = tokio::spawn(connection);
    let changes = write(&client, &ours, arguments.apply).await;
    drop(client);
    let _ = connection.await;
    let changes = changes.with_context(|| format!("write to {}", database.shown))?;
    print(printer, &changes, &ours.problems, arguments.apply)?;
    if !ours.problems.is_empty() {
        bail!("{} servers have problems", ours.problems.len());
    }
    Ok(())
}

/// All of it in one transaction; without `apply` nothing is left of that.
async fn write(client: &Client, ours: &Ours, apply: bool) -> Result<Vec<Change>> {
    client
        .batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE; SET LOCAL TIME ZONE 'UTC'")
        .await?;
    let mut tables = Tables::default();
    let mut columns_there = BTreeMap::new();
    for (name, rows) in tables.each() {
        columns_there.insert(name, columns(client, name).await?);
        let query = format!("SELECT to_jsonb(t)::text FROM {name} t");
        for row in client.query(&query, &[]).await? {
            let text: String = row.get(0);
            rows.push(serde_json::from_str(&text).with_context(|| format!("a row of {name}"))?);
        }
    }
    let changes = difference::changes(&tables, ours);
    for change in changes.iter().filter(|_| apply) {
        let (table, key) = (change.table.name, change.table.key);
        let done = match change.verb {
            Verb::Insert => {
                let row = change.row.to_string();
                // Others get their defaults.
                let there = &columns_there[table];
                let known: Vec<&str> = change.columns().filter(|name| there.contains(*name)).collect();
                let values: Vec<String> = known.iter().map(|name| format!("r.{name}")).collect();
                let insert = format!(
                    "INSERT INTO {table} ({}) SELECT {} FROM jsonb_populate_record(NULL::{table}, $1::text::jsonb) r",
                    known.join(", "),
                    values.join(", ")
                );
                client.execute(&insert, &[&row]).await
            }
            Verb::Update => {
                let row = change.row.to_string();
                let columns: Vec<&str> = change.columns().collect();
                let names = columns.join(", ");
                let values: Vec<String> = columns.iter().map(|name| format!("r.{name}")).collect();
                let update = format!(
                    "UPDATE {table} t SET ({names}) = (SELECT {} FROM jsonb_populate_record(t, $1::text::jsonb) r) \
                     WHERE t.{key} = $2",
                    values.join(", ")
                );
                client.execute(&update, &[&row, &change.id]).await
            }
            Verb::Delete => {
                let delete = format!("DELETE FROM {table} WHERE {key} = $1");
                client.execute(&delete, &[&change.id]).await
            }
        };
        done.with_context(|| change.to_string())?;
    }
    let end = if apply { "COMMIT" } else { "ROLLBACK" };
    client.batch_execute(end).await?;
    Ok(changes)
}

/// The columns that a table has.
async fn columns(client: &Client, table: &str) -> Result<BTreeSet<String>> {
    let query = "SELECT column_name::text FROM information_schema.columns WHERE table_name = $1 AND table_schema = \
                 ANY (current_schemas(false))";
    let rows = client.query(query, &[&table]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

fn print(printer: &Printer, changes: &[Change], problems: &[String], apply: bool) -> Result<()> {
    if !printer.wants_tables() {
        let changes: Vec<Value> = changes.iter().map(Change::json).collect();
        return printer.value(&json!({ "apply": apply, "changes": changes, "problems": problems }));
    }
    let title = if apply { "Written" } else { "To be written" };
    let mut table = Table::new(title, Lines::Rounded, &["Table", "Row", "What"]);
    for change in changes {
        table.row(vec![
            change.table.name.to_owned(),
            change.id.clone(),
            change.what(),
        ]);
    }
    if changes.is_empty() {
        printer.line("Nothing changes: the database says what this miner knows.")?;
    } else {
        printer.table(&table)?;
    }
    for problem in problems {
        warn(&format!("Problem: {problem}"));
    }
    warn(if apply {
        "Next: remove the agents (helm uninstall), then chutes-miner export --release --apply, then start the original"
    } else {
        "Nothing was changed. With --apply it is done"
    });
    Ok(())
}

/// Takes our marks off all objects: no agent that is ever started again looks at them.
async fn release(printer: &Printer, cluster: &Cluster, apply: bool) -> Result<()> {
    let agents = cluster.pods_with(AGENTS).await?;
    if !agents.is_empty() {
        bail!(
            "agents are running, and would take what is released for lost: remove them first ({})",
            agents.join(", ")
        );
    }
    let objects = cluster.list().await?;
    let marked = objects.marked();
    if apply {
        for one in &marked {
            cluster.release(one).await?;
        }
    }
    if !printer.wants_tables() {
        let names: Vec<String> = marked.iter().map(ToString::to_string).collect();
        return printer.value(&json!({ "apply": apply, "released": names }));
    }
    let word = if apply { "were" } else { "are to be" };
    printer.line(&format!("{} objects {word} released", marked.len()))
}

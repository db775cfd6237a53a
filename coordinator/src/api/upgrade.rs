//! `/v1/upgrade`: which format the data has, what each host's program knows, and finalizing an upgrade.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::{Extension, Json};
use coordinator_core::state_machine::format::{NEWEST, PROGRAM};
use coordinator_core::state_machine::{Command, State as Record};
use protocol::id::ServerId;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::auth::Caller;
use super::error::Result;
use super::hosts::host_named;
use super::operate::parse;

fn of_state(record: &Record) -> Value {
    let hosts = record.versions().into_iter();
    let hosts: Vec<Value> = hosts
        .map(|(server, host)| {
            let knows = host.knows();
            json!({
                "server_id": server,
                "name": host.name,
                "version": host.version,
                "knows": knows,
                "ready": knows.is_some_and(|known| known >= NEWEST),
            })
        })
        .collect();
    let finalized = record.finalized();
    let finalized = finalized.map(|it| json!({ "version": it.program, "at": it.at.iso8601() }));
    json!({
        "format": record.format(),
        "finalized": finalized,
        "newest": NEWEST,
        "version": PROGRAM,
        "hosts": hosts,
    })
}

pub(super) async fn show(State(api): State<Arc<Api>>) -> Json<Value> {
    Json(api.store.read(of_state))
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct FinalizeBody {
    #[serde(default)]
    vouch: Vec<String>,
}

pub(super) async fn finalize(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<Value>> {
    let body: FinalizeBody = parse(&body)?;
    api.store.linearizable().await?;
    let (vouched, present) = api.store.read(|record| {
        let named = body
            .vouch
            .iter()
            .map(|name| Ok(host_named(record, name)?.host.server.clone()));
        let vouched: Result<BTreeSet<ServerId>> = named.collect();
        Ok::<_, super::error::ApiError>((vouched?, record.format()))
    })?;
    // Where nothing is new nothing is written, so that the program before can still read the log.
    let command = if present < NEWEST {
        Command::FinalizeFormat {
            format: NEWEST,
            program: PROGRAM.to_owned(),
            vouched,
        }
    } else {
        Command::PassTime
    };
    api.propose_and_see(&caller, command).await?;
    let mut answer = api.store.read(of_state);
    answer["changed"] = json!(present < NEWEST);
    Ok(Json(answer))
}

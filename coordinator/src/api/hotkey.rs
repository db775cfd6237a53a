//! `/v1/hotkey`: which hotkey the miner has, what keeps it from getting another one, and the change.
//!
//! No seed comes here. Whoever asks for the change holds both: it opens the authority's key with the old one, seals it
//! with the new one, and sends it back. Which seed each member runs with is asked of the members themselves.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::{Extension, Json};
use coordinator_core::state_machine::{Command, Reply, State as Record};
use protocol::hotkey::Hotkey;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::auth::Caller;
use super::error::Result;
use super::operate::{invalid, parse};

/// The longest sealed key that is taken, in bytes: one is a few hundred bytes long.
const SEALED_KEY_BYTES_MAX: usize = 4096;

pub(super) async fn status(State(api): State<Arc<Api>>) -> Json<Value> {
    let mut seeds = api.deps.others.hotkeys().await;
    let own = api.deps.cluster.roles().own;
    seeds.insert(own, Some(api.deps.signer.hotkey().clone()));
    let members = |record: &Record| -> Vec<Value> {
        let members = record.members();
        members
            .map(|(member, host)| {
                let seed = seeds.get(&member).cloned().flatten();
                json!({ "host": host.host.name, "member": member, "seed_of": seed })
            })
            .collect()
    };
    Json(api.store.read(|record| {
        let sealed_key = record.cluster().map(|cluster| hex::encode(&cluster.sealed_key));
        json!({
            "hotkey": record.settings().miner,
            "cluster": api.deps.cluster.name(),
            "sealed_key": sealed_key,
            "in_the_way": record.in_the_way_of_another_hotkey(),
            "members": members(record),
        })
    }))
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReplaceBody {
    old: String,
    new: String,
    sealed_key: String,
}

fn hotkey(what: &str, text: &str) -> Result<Hotkey> {
    Hotkey::parse(text).map_err(|error| invalid(&format!("{what} is no hotkey: {error}")))
}

pub(super) async fn replace(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<Value>> {
    let body: ReplaceBody = parse(&body)?;
    let (old, new) = (hotkey("old", &body.old)?, hotkey("new", &body.new)?);
    let sealed_key = hex::decode(&body.sealed_key).ok();
    let sealed_key = sealed_key.filter(|bytes| (1..=SEALED_KEY_BYTES_MAX).contains(&bytes.len()));
    let sealed_key = sealed_key.ok_or_else(|| {
        invalid("sealed_key is the authority's key, sealed with the new seed, in hexadecimal")
    })?;
    let command = Command::ReplaceHotkey {
        old,
        new: new.clone(),
        sealed_key,
    };
    let reply = api.propose_and_see(&caller, command).await?;
    Ok(Json(json!({ "hotkey": new, "changed": reply == Reply::Done })))
}

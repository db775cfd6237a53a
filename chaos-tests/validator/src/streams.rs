//! What a miner reads: the row streams of `/miner/*` with their odd framing, and the plain lists
//! (`validator-protocol`, sections 3.2 to 3.5).

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State as Shared};
use axum::http::{HeaderMap, Response};
use protocol::hotkey::Hotkey;
use protocol::id::ChuteId;
use protocol::signing::{HOTKEY_HEADER, Purpose};
use protocol::time::UnixMillis;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::auth;
use crate::problem::Problem;
use crate::rows;
use crate::state::State;
use crate::validator::Validator;

#[derive(Debug, Deserialize)]
pub(crate) struct StreamQuery {
    explicit_null: Option<String>,
    miner_hotkey: Option<String>,
    hotkey: Option<String>,
    #[serde(default)]
    per_chute: Option<String>,
}

/// `GET /miner/{what}/`.
pub(crate) async fn rows_of(
    Shared(validator): Shared<Arc<Validator>>,
    Path(what): Path<String>,
    Query(query): Query<StreamQuery>,
    headers: HeaderMap,
) -> Result<Response<Body>, Problem> {
    // Two plain lists share the path's form.
    if what == "active_instances" {
        auth::miner_for(&validator, &headers, Purpose::Miner)?;
        let body = active_instances(&validator).to_string();
        return Ok(Response::builder()
            .header("content-type", "application/json")
            .body(Body::from(body))
            .expect("constant headers are valid"));
    }
    if !["chutes", "images", "nodes", "instances", "jobs", "metrics"].contains(&what.as_str()) {
        return Err(Problem::not_found("Not Found"));
    }
    let miner = auth::miner_for(&validator, &headers, Purpose::Miner)?;
    let rows = validator.read(|state, now| stream_rows(&validator, state, &what, &miner, now));
    let explicit_null = query.explicit_null.is_some_and(|text| {
        let text = text.to_lowercase();
        ["1", "true", "t", "yes", "y", "on"].contains(&text.as_str())
    });
    Ok(Response::new(Body::from(framed(
        &rows,
        explicit_null && what == "instances",
    ))))
}

/// Rows as `data: {...}` and a blank line each; an empty set is an empty body, or says so if asked.
fn framed(rows: &[Value], explicit_null: bool) -> String {
    if rows.is_empty() && explicit_null {
        return "data: NO_ITEMS\n".to_owned();
    }
    rows.iter().map(|row| format!("data: {row}\n\n")).collect()
}

fn stream_rows(
    validator: &Validator,
    state: &State,
    what: &str,
    miner: &Hotkey,
    now: UnixMillis,
) -> Vec<Value> {
    let boost = |age_ms| validator.scenario.pay.bounty_boost(age_ms);
    match what {
        "chutes" => state
            .chutes
            .values()
            .map(|chute| rows::chute(chute, state, boost, now))
            .collect(),
        "images" => state.images.values().map(rows::image).collect(),
        "nodes" => state
            .nodes
            .values()
            .filter(|node| &node.hotkey == miner)
            .map(|node| rows::node(node, &validator.gpus))
            .collect(),
        "instances" => state
            .instances
            .values()
            .filter(|instance| &instance.hotkey == miner)
            .map(rows::instance)
            .collect(),
        // Finished jobs too, as in the real one.
        "jobs" => state
            .jobs
            .values()
            .filter(|job| job.instance.is_none())
            .map(rows::job)
            .collect(),
        _ => state
            .chutes
            .values()
            .filter_map(|chute| {
                let demand = chute
                    .demand
                    .as_ref()
                    .filter(|demand| demand.requests_per_hour > 0)?;
                let count = state.instances_of(&chute.id).count();
                Some(rows::metric(chute, demand, count, now))
            })
            .collect(),
    }
}

fn active_instances(validator: &Validator) -> Value {
    validator.read(|state, _| {
        state
            .instances
            .values()
            .filter(|instance| instance.serving())
            .map(|i| json!({"chute_id": i.chute, "instance_id": i.id, "compute_multiplier": i.multiplier}))
            .collect()
    })
}

/// `GET /miner/chutes/{chute_id}/{version}`.
pub(crate) async fn chute_version(
    Shared(validator): Shared<Arc<Validator>>,
    Path((chute, version)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Problem> {
    auth::miner_for(&validator, &headers, Purpose::Miner)?;
    validator
        .read(|state, now| {
            let id = ChuteId::parse(&chute).ok()?;
            let chute = state.chutes.get(&id).filter(|chute| chute.version == version)?;
            let boost = |age_ms| validator.scenario.pay.bounty_boost(age_ms);
            Some(Json(rows::chute(chute, state, boost, now)))
        })
        .ok_or_else(|| Problem::not_found(format!("chute_id={chute} version={version} not found")))
}

/// `GET /miner/inventory`: GPUs in instances; reads the hotkey's header and checks no signature.
pub(crate) async fn inventory(Shared(validator): Shared<Arc<Validator>>, headers: HeaderMap) -> Json<Value> {
    let asked = headers.get(HOTKEY_HEADER).and_then(|value| value.to_str().ok());
    Json(validator.read(|state, _| {
        let of_asked = |hotkey: &Hotkey| Some(hotkey.as_str()) == asked;
        let mut rows = vec![];
        for instance in state.instances.values().filter(|i| of_asked(&i.hotkey)) {
            let name = state
                .chutes
                .get(&instance.chute)
                .map(|chute| chute.spec.name.as_str());
            for gpu in &instance.gpus {
                rows.push(json!({
                    "gpu_id": gpu,
                    "last_verified_at": instance.verified_at.map(UnixMillis::iso8601),
                    "verification_error": instance.verification_error,
                    "active": instance.active(),
                    "chute_id": instance.chute,
                    "chute_name": name,
                }));
            }
        }
        Value::Array(rows)
    }))
}

/// `GET /miner/stats`.
pub(crate) async fn stats(
    Shared(validator): Shared<Arc<Validator>>,
    Query(query): Query<StreamQuery>,
) -> Result<Json<Value>, Problem> {
    let asked = match &query.miner_hotkey {
        Some(text) => {
            Some(Hotkey::parse(text).map_err(|_| Problem::bad_request(format!("Invalid hotkey: {text}")))?)
        }
        None => None,
    };
    let per_chute = query
        .per_chute
        .is_some_and(|text| text.eq_ignore_ascii_case("true"));
    let units = validator.read(|state, now| {
        let mut sums: std::collections::BTreeMap<(Hotkey, Option<ChuteId>), f64> = Default::default();
        for (hotkey, chute, life) in crate::instances::lives(state) {
            if asked.as_ref().is_none_or(|asked| *asked == hotkey) {
                let key = (hotkey, per_chute.then_some(chute));
                *sums.entry(key).or_default() += crate::pay::score(&life, &validator.scenario.pay, now);
            }
        }
        sums.into_iter()
            .map(|((hotkey, chute), units)| {
                let mut row = json!({"miner_hotkey": hotkey, "invocation_count": 0, "compute_units": units});
                if let Some(chute) = chute {
                    row["chute_id"] = json!(chute);
                }
                row
            })
            .collect::<Vec<_>>()
    });
    let window = json!({"bounties": [], "compute_units": units});
    Ok(Json(
        json!({"past_hour": window, "past_day": window, "all": window}),
    ))
}

/// `GET /miner/scores`.
pub(crate) async fn scores(
    Shared(validator): Shared<Arc<Validator>>,
    Query(query): Query<StreamQuery>,
) -> Json<Value> {
    let scores = crate::instances::scores(&validator);
    let total: f64 = scores.values().sum();
    let keep = |hotkey: &Hotkey| {
        query
            .hotkey
            .as_deref()
            .is_none_or(|asked| asked == hotkey.as_str())
    };
    let map = |share: bool| -> Map<String, Value> {
        scores
            .iter()
            .filter(|(hotkey, _)| keep(hotkey))
            .map(|(hotkey, score)| {
                let value = if share && total > 0.0 {
                    score / total
                } else {
                    *score
                };
                (hotkey.to_string(), json!(value))
            })
            .collect()
    };
    Json(json!({
        "raw_values": map(false), "totals": {"compute_units": total}, "normalized": map(true),
        "final_scores": map(true),
    }))
}

/// `GET /miner/unique_chute_history/{hotkey}`.
pub(crate) async fn unique_chute_history(
    Shared(validator): Shared<Arc<Validator>>,
    Path(hotkey): Path<String>,
) -> Result<Json<Value>, Problem> {
    validator
        .read(|state, now| {
            let hotkey = state.hotkeys.iter().find(|known| known.as_str() == hotkey)?;
            let count = state
                .instances
                .values()
                .filter(|i| &i.hotkey == hotkey && i.serving())
                .map(|i| &i.chute)
                .collect::<std::collections::BTreeSet<_>>()
                .len();
            Some(Json(json!([{"time": now.iso8601(), "count": count}])))
        })
        .ok_or_else(|| Problem::not_found("Miner not found"))
}

/// `GET /miner/metagraph`.
pub(crate) async fn metagraph(Shared(validator): Shared<Arc<Validator>>) -> Json<Value> {
    let blacklist = &validator.scenario.gates.blacklist;
    Json(validator.read(|state, _| {
        state
            .hotkeys
            .iter()
            .enumerate()
            .map(|(uid, hotkey)| {
                let reason = blacklist
                    .iter()
                    .find(|(h, _)| h == hotkey)
                    .map(|(_, reason)| reason);
                json!({
                    "hotkey": hotkey, "coldkey": hotkey, "node_id": uid, "incentive": 0.0, "netuid": 64,
                    "stake": 0.0, "blacklist_reason": reason,
                })
            })
            .collect()
    }))
}

/// `GET /chutes/utilization`.
pub(crate) async fn utilization(Shared(validator): Shared<Arc<Validator>>) -> Json<Value> {
    Json(validator.read(|state, now| {
        state
            .chutes
            .values()
            .filter(|chute| !chute.spec.job_only())
            .map(|chute| rows::utilization(chute, state, crate::launch::target(&validator, chute), now))
            .collect()
    }))
}

/// `GET /chutes/rolling_updates`. The quotas come as a JSON text, as they may in the real one.
pub(crate) async fn rolling_updates(Shared(validator): Shared<Arc<Validator>>) -> Json<Value> {
    Json(validator.read(|state, _| {
        state
            .rolling_updates
            .iter()
            .map(|(chute, update)| {
                json!({
                    "chute_id": chute,
                    "old_version": update.old_version,
                    "new_version": update.new_version,
                    "started_at": update.started_at.iso8601(),
                    "permitted": json!(update.permitted).to_string(),
                })
            })
            .collect()
    }))
}

/// `GET /bounties/`, oldest first.
pub(crate) async fn bounties(Shared(validator): Shared<Arc<Validator>>) -> Json<Value> {
    let life_ms = validator.scenario.timers.bounty_seconds * 1000;
    Json(validator.read(|state, now| {
        let mut all: Vec<_> = state.bounties.iter().collect();
        all.sort_by_key(|(_, bounty)| bounty.created_at);
        all.into_iter()
            .map(|(chute, bounty)| {
                json!({
                    "chute_id": chute,
                    "bounty_amount": bounty.amount(now),
                    "seconds_elapsed": now.since(bounty.created_at) / 1000,
                    "time_remaining": (bounty.created_at + life_ms).since(now) / 1000,
                    "created_at": bounty.created_at.unix_seconds(),
                })
            })
            .collect()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_framed_as_the_real_one_frames_them() {
        let rows = [json!({"a": 1}), json!({"b": "x\ny"})];
        assert_eq!(
            framed(&rows, true),
            "data: {\"a\":1}\n\ndata: {\"b\":\"x\\ny\"}\n\n"
        );
        assert_eq!(framed(&[], true), "data: NO_ITEMS\n");
        assert_eq!(framed(&[], false), "");
    }
}

//! Launch configs (`validator-protocol`, sections 6.2 to 6.4): the token that a miner gets, the claim,
//! proof and activation by the container that carries it.
//!
//! Here are the token and what all steps share; `claim` is the first call of the container,
//! `proof_of_work` the two that follow.

mod claim;
mod proof_of_work;

pub(crate) use claim::claim;
pub(crate) use proof_of_work::{activate, set_active, verify};

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State as Shared};
use axum::http::HeaderMap;
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ConfigId, GpuId, JobId};
use protocol::signing::Purpose;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth;
use crate::clock;
use crate::gates::{Capacity, admit};
use crate::identity::{random_bytes, random_uuid};
use crate::ledger::Record;
use crate::problem::Problem;
use crate::state::{Chute, Instance, LaunchConfig, State};
use crate::validator::{Out, Validator};

/// Hotkeys that may race for one job.
const JOB_RACERS_MAX: usize = 15;

/// Instances that the autoscaler wants of a chute.
pub(crate) fn target(validator: &Validator, chute: &Chute) -> u32 {
    chute
        .demand
        .as_ref()
        .and_then(|demand| demand.target_count)
        .unwrap_or(validator.scenario.gates.target_count.max(1))
}

/// The capacity rules for one chute and miner.
pub(crate) fn check_capacity(
    validator: &Validator,
    state: &State,
    chute: &Chute,
    miner: &Hotkey,
    job: bool,
) -> Result<(), Problem> {
    let count = |keep: &dyn Fn(&Instance) -> bool| {
        let count = state.instances_of(&chute.id).filter(|i| keep(i)).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    };
    let capacity = Capacity {
        total: count(&|_| true),
        active: count(&Instance::serving),
        yours: count(&|instance| &instance.hotkey == miner),
        target: target(validator, chute),
        rolling_update: state
            .rolling_updates
            .get(&chute.id)
            .map(|update| Some(update.permitted.get(miner).copied().unwrap_or(0))),
        private: !chute.spec.public,
        bounty: state.bounties.contains_key(&chute.id),
        job,
    };
    admit(&capacity).map_err(Problem::locked)
}

#[derive(Debug, Deserialize)]
pub(crate) struct ConfigQuery {
    chute_id: Option<String>,
    job_id: Option<String>,
}

/// `GET /instances/launch_config`.
pub(crate) async fn issue(
    Shared(validator): Shared<Arc<Validator>>,
    Query(query): Query<ConfigQuery>,
    headers: HeaderMap,
) -> Result<Json<Value>, Problem> {
    let miner = auth::miner_for(&validator, &headers, Purpose::Launch)?;
    let asked = query.chute_id.clone().unwrap_or_default();
    let outcome = validator.change(|state, out| {
        let outcome = try_issue(&validator, state, out, &miner, &query);
        if let Err(problem) = &outcome {
            out.untouched();
            out.record(Record::TokenRefused {
                hotkey: miner.clone(),
                chute: asked,
                status: problem.status.as_u16(),
                reason: problem.reason(),
            });
        }
        outcome
    })?;
    Ok(Json(outcome))
}

fn try_issue(
    validator: &Validator,
    state: &mut State,
    out: &mut Out,
    miner: &Hotkey,
    query: &ConfigQuery,
) -> Result<Value, Problem> {
    auth::not_blacklisted(validator, miner)?;
    let asked = query
        .chute_id
        .as_deref()
        .ok_or_else(|| Problem::invalid("missing", &["query", "chute_id"], "Field required"))?;
    let chute = ChuteId::parse(asked)
        .ok()
        .and_then(|id| state.chutes.get(&id).cloned())
        .ok_or_else(|| Problem::not_found(format!("Chute {asked} not found")))?;
    let job = match query.job_id.as_deref() {
        None => None,
        Some(text) => Some(enter_race(state, &chute, miner, text)?),
    };
    if job.is_none() && !chute.spec.public && validator.scenario.gates.private_needs_public {
        check_public_work(state, miner)?;
    }
    check_capacity(validator, state, &chute, miner, job.is_some())?;
    let config = ConfigId::parse(&random_uuid()).expect("a UUID is a valid id");
    let issued = out.now.unix_seconds();
    let mut claims = json!({
        "exp": issued + validator.scenario.timers.token_seconds,
        "iat": issued,
        "sub": config,
        "iss": "chutes",
        "url": format!("{}/instances/launch_config/{config}", validator.api_url),
        "env_key": hex::encode(random_bytes::<16>()),
        "env_type": "graval",
        "egress": chute.spec.allow_external_egress,
        "lock_modules": false,
    });
    if let Some(job) = job.as_ref().and_then(|id| state.jobs.get(id)) {
        claims["job_id"] = json!(job.id);
        claims["disk_gb"] = json!(job.disk_gb);
    }
    state.configs.insert(
        config.clone(),
        LaunchConfig {
            chute: chute.id.clone(),
            hotkey: miner.clone(),
            job: job.clone(),
            issued_at: out.now,
            claimed_by: None,
        },
    );
    out.record(Record::TokenGranted {
        hotkey: miner.clone(),
        chute: chute.id.clone(),
        config: config.clone(),
        job,
    });
    Ok(json!({"token": validator.tokens.sign(&claims), "config_id": config}))
}

/// One try for each hotkey, at most fifteen hotkeys.
fn enter_race(state: &mut State, chute: &Chute, miner: &Hotkey, asked: &str) -> Result<JobId, Problem> {
    let job = JobId::parse(asked)
        .ok()
        .and_then(|id| state.jobs.get_mut(&id))
        .filter(|job| job.chute == chute.id && job.finished_at.is_none())
        .ok_or_else(|| Problem::not_found(format!("Job {asked} not found")))?;
    if job.instance.is_some() {
        return Err(Problem::conflict("Job is already claimed"));
    }
    if job.tried_by.contains(miner) {
        return Err(Problem::forbidden("Your hotkey has already attempted this job"));
    }
    if job.tried_by.len() >= JOB_RACERS_MAX {
        return Err(Problem::locked("Job race is full"));
    }
    job.tried_by.push(miner.clone());
    Ok(job.id.clone())
}

fn check_public_work(state: &State, miner: &Hotkey) -> Result<(), Problem> {
    let public: Vec<&Instance> = state
        .instances
        .values()
        .filter(|instance| &instance.hotkey == miner && instance.public && instance.serving())
        .collect();
    let gpus: usize = public.iter().map(|instance| instance.gpus.len()).sum();
    if public.len() < 2 || gpus < 16 {
        return Err(Problem::forbidden(
            "Private chutes need 2 activated public instances and 16 GPUs on them",
        ));
    }
    Ok(())
}

fn checked_token(validator: &Validator, headers: &HeaderMap, config: &str) -> Result<ConfigId, Problem> {
    let token = auth::bearer(headers)?;
    let claims = validator
        .tokens
        .check(token, clock::now().unix_seconds())
        .map_err(|invalid| Problem::unauthorized(invalid.to_string()))?;
    if claims["iss"] != "chutes" || claims["sub"] != config || config.is_empty() {
        return Err(Problem::unauthorized("The token is not for this launch config"));
    }
    ConfigId::parse(config).map_err(|_| Problem::unauthorized("Launch config not found"))
}

/// All checks on GPUs that launch-config and legacy flow share.
pub(crate) fn check_gpus<'a>(
    validator: &Validator,
    state: &'a State,
    chute: &Chute,
    miner: &Hotkey,
    host: &str,
    uuids: impl Iterator<Item = &'a GpuId> + Clone,
) -> Result<Vec<&'a crate::state::Node>, Problem> {
    let distinct: BTreeSet<&GpuId> = uuids.clone().collect();
    let count = uuids.clone().count();
    if distinct.len() < count {
        return Err(Problem::bad_request("Duplicate GPUs"));
    }
    if count != chute.spec.gpu_count as usize || count == 0 {
        return Err(Problem::bad_request(format!(
            "{count} GPUs instead of {}",
            chute.spec.gpu_count
        )));
    }
    let mut nodes = vec![];
    for uuid in uuids {
        let node = state
            .nodes
            .get(uuid)
            .filter(|node| &node.hotkey == miner)
            .ok_or_else(|| Problem::not_found(format!("GPU {uuid} not found in your inventory")))?;
        if node.verified_at.is_none() {
            return Err(Problem::bad_request(format!("GPU {uuid} is not verified")));
        }
        if !chute.supported_gpus.contains(&node.gpu_identifier)
            || validator.gpus.of_short_ref(&node.gpu_identifier).is_none()
        {
            return Err(Problem::bad_request(format!(
                "GPU {uuid} does not suit the chute"
            )));
        }
        if node.attested != chute.spec.tee {
            let text = format!("GPU {uuid} is in the wrong kind of server for the chute");
            return Err(Problem::bad_request(text));
        }
        if !node.verification_host.eq_ignore_ascii_case(host) {
            let text = format!("Instance host {host} is not {}", node.verification_host);
            return Err(Problem::bad_request(text));
        }
        if let Some(other) = state.instance_of_gpu(uuid) {
            let text = format!("GPU {uuid} is already used by instance {}", other.id);
            return Err(Problem::conflict(text));
        }
        nodes.push(node);
    }
    Ok(nodes)
}

/// Host and port are unique over all instances; the real one fails with 500.
pub(crate) fn check_free_address(state: &State, host: &str, port: u16) -> Result<(), Problem> {
    let taken = state
        .instances
        .values()
        .any(|instance| instance.port == port && instance.host.eq_ignore_ascii_case(host));
    if taken {
        let text = format!("duplicate key value: {host}:{port} is in use");
        return Err(Problem::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, text));
    }
    Ok(())
}

fn claimed_instance<'a>(state: &'a State, config: &ConfigId) -> Result<&'a Instance, Problem> {
    let entry = state
        .configs
        .get(config)
        .ok_or_else(|| Problem::unauthorized("Launch config not found"))?;
    entry
        .claimed_by
        .as_ref()
        .and_then(|id| state.instances.get(id))
        .ok_or_else(|| Problem::not_found("Instance disappeared or was never claimed"))
}

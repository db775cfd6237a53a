//! `GET /v1/explain?chute=|server=|deployment=`: why here, why not there, why idle. The sentences come from
//! the rulebook of placement itself.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use coordinator_core::state_machine::State as Record;
use coordinator_core::state_machine::chute::{Chute, ChuteKey};
use coordinator_core::state_machine::command::Allowance;
use coordinator_core::state_machine::deployment::Deployment;
use coordinator_core::state_machine::desired::DISK_GB_DEFAULT;
use coordinator_core::state_machine::server::{Gpu, Server};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::deployments::no_deployment;
use super::error::{ApiError, Result};
use super::objects::chute_name;
use super::status::phase_word;
use super::timeline::stop_words;

#[derive(Debug, Clone, Deserialize)]
pub(super) struct ExplainQuery {
    chute: Option<String>,
    server: Option<String>,
    deployment: Option<String>,
}

pub(super) async fn explain(
    State(api): State<Arc<Api>>,
    Query(query): Query<ExplainQuery>,
) -> Result<Json<Value>> {
    let ExplainQuery {
        chute,
        server,
        deployment,
    } = query;
    let explained = api.store.read(|record| match (&chute, &server, &deployment) {
        (Some(chute), None, None) => of_chutes(record, chute),
        (None, Some(server), None) => record
            .server_by_name_or_id(server)
            .map(|found| of_server(record, found))
            .ok_or_else(|| ApiError::no_server(server)),
        (None, None, Some(deployment)) => of_deployment(record, deployment),
        _ => Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "name one of chute, server, deployment",
        )),
    })?;
    Ok(Json(explained))
}

fn of_chutes(record: &Record, text: &str) -> Result<Value> {
    let named =
        |(key, chute): &(&ChuteKey, &Chute)| key.chute.as_str() == text || chute.definition.name == text;
    let chutes: Vec<Value> = record
        .chutes()
        .iter()
        .filter(named)
        .map(|(key, chute)| of_chute(record, key, chute))
        .collect();
    if chutes.is_empty() {
        let detail = format!("no chute with id or name {text} is known; the validator has not listed it");
        return Err(ApiError::new(StatusCode::NOT_FOUND, detail));
    }
    Ok(json!({ "chutes": chutes }))
}

fn of_chute(record: &Record, key: &ChuteKey, chute: &Chute) -> Value {
    let definition = &chute.definition;
    let servers: Vec<Value> = record
        .present_servers()
        .map(|server| {
            let why_not = why_not_here(record, key, chute, server);
            json!({ "server": server.facts.name, "fits": why_not.is_empty(), "why_not": why_not })
        })
        .collect();
    let deployments: Vec<Value> = record
        .deployments_of(key)
        .map(|deployment| brief(record, deployment))
        .collect();
    json!({
        "chute_id": key.chute,
        "validator": key.validator,
        "name": definition.name,
        "version": definition.version,
        "needs": { "gpu_count": definition.gpu_count, "supported_gpus": definition.supported_gpus },
        "not_placed_because": record.unplaceable(chute, false),
        "bounty": record.bounties().get(key).map(|bounty| bounty.amount),
        "servers": servers,
        "deployments": deployments,
    })
}

/// Every reason why a server cannot take one more deployment now without stopping anything.
fn why_not_here(record: &Record, key: &ChuteKey, chute: &Chute, server: &Server) -> Vec<String> {
    let definition = &chute.definition;
    let mut reasons: Vec<String> = record.unavailable(server).into_iter().collect();
    if let Some(enrolment) = &server.enrolment
        && enrolment.validator != key.validator
    {
        reasons.push("it works for another validator".to_owned());
    }
    reasons.extend(record.other_kind(chute, server.id()).map(str::to_owned));
    let fits = |gpu: &&Gpu| {
        definition.supported_gpus.contains(&gpu.short_ref) && record.kept_off(chute, &gpu.short_ref).is_none()
    };
    let gpus: Vec<&Gpu> = record.gpus_of(server.id()).collect();
    if let Some(gpu) = gpus.first() {
        if !definition.supported_gpus.contains(&gpu.short_ref) {
            reasons.push(format!("the chute does not run on {}", gpu.short_ref));
        }
        reasons.extend(record.kept_off(chute, &gpu.short_ref));
    }
    let free = gpus
        .iter()
        .copied()
        .filter(fits)
        .filter(|gpu| gpu.is_free())
        .count();
    if u64::try_from(free).unwrap_or(u64::MAX) < u64::from(definition.gpu_count) {
        reasons.push(format!(
            "{} suitable GPUs are needed, {free} are free",
            definition.gpu_count
        ));
    }
    if server.facts.disk_free_gb < DISK_GB_DEFAULT {
        let free = server.facts.disk_free_gb;
        reasons.push(format!(
            "{DISK_GB_DEFAULT} GB of disk are needed, {free} are free"
        ));
    }
    reasons
}

fn of_server(record: &Record, server: &Server) -> Value {
    let gpus: Vec<Value> = record
        .gpus_of(server.id())
        .map(|gpu| {
            let idle = match (&gpu.holder, &gpu.promised_to, gpu.verified_at) {
                (Some(_), _, _) => None,
                (None, _, None) => Some("the validator has not verified it".to_owned()),
                (None, Some(next), _) => Some(format!("it is promised to {next}")),
                (None, None, Some(_)) => Some(
                    record
                        .unavailable(server)
                        .unwrap_or_else(|| "nothing was placed on it".to_owned()),
                ),
            };
            json!({
                "gpu_id": gpu.id(),
                "type": gpu.short_ref,
                "holder": gpu.holder,
                "promised_to": gpu.promised_to,
                "idle_because": idle,
            })
        })
        .collect();
    let deployments: Vec<Value> = record
        .deployments_on(server.id())
        .map(|deployment| brief(record, deployment))
        .collect();
    json!({
        "server": server.facts.name,
        "server_id": server.id(),
        "takes_no_work_because": record.unavailable(server),
        "last_failure": server.last_failure,
        "workloads_of_nobody": server.strangers,
        "gpus": gpus,
        "deployments": deployments,
    })
}

fn of_deployment(record: &Record, text: &str) -> Result<Value> {
    let live = record.deployments().values().find(|d| d.id.as_str() == text);
    let gone = || {
        record
            .audits()
            .values()
            .find(|audit| audit.deployment.id.as_str() == text)
    };
    match (live, gone) {
        (Some(deployment), _) => Ok(brief(record, deployment)),
        (None, gone) => match gone() {
            Some(audit) => {
                let mut brief = brief(record, &audit.deployment);
                brief["gone_at"] = json!(audit.gone_at.iso8601());
                Ok(brief)
            }
            None => Err(no_deployment(text)),
        },
    }
}

fn brief(record: &Record, deployment: &Deployment) -> Value {
    let server = record.servers().get(&deployment.server);
    json!({
        "deployment_id": deployment.id,
        "chute_id": deployment.chute.chute,
        "chute_name": chute_name(record, &deployment.chute),
        "server": server.map(|server| &server.facts.name),
        "phase": phase_word(deployment.phase),
        "here_because": deployment.reason,
        "not_stopped_for_others_because": record.protection_of(deployment, Allowance::default()),
        "job_id": deployment.job,
        "stopped_because": deployment.stop.as_ref().map(|stop| stop_words(&stop.reason)),
    })
}

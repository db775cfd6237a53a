//! `GET /v1/deployments`, `GET /v1/audits`: each deployment with the times of its launch.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use coordinator_core::state_machine::State as Record;
use coordinator_core::state_machine::deployment::{Deployment, StopReason};
use protocol::time::UnixMillis;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::objects::chute_name;
use super::status::phase_word;

/// Rows of `/v1/audits` in one answer.
const AUDITS_MAX: usize = 500;

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct AuditsQuery {
    limit: Option<usize>,
}

pub(super) async fn deployments(State(api): State<Arc<Api>>) -> Json<Value> {
    let rows: Vec<Value> = api.store.read(|record| {
        let deployments = record.deployments().values();
        deployments.map(|deployment| row(record, deployment)).collect()
    });
    Json(json!({ "deployments": rows }))
}

/// The deployments that went last, the last one first.
pub(super) async fn audits(State(api): State<Arc<Api>>, Query(query): Query<AuditsQuery>) -> Json<Value> {
    let limit = query.limit.unwrap_or(100).min(AUDITS_MAX);
    let rows: Vec<Value> = api.store.read(|record| {
        let mut audits: Vec<_> = record.audits().values().collect();
        audits.sort_by(|a, b| {
            b.gone_at
                .cmp(&a.gone_at)
                .then_with(|| a.deployment.id.cmp(&b.deployment.id))
        });
        let rows = audits.into_iter().take(limit).map(|audit| {
            let mut row = row(record, &audit.deployment);
            row["gone_at"] = json!(audit.gone_at.iso8601());
            row
        });
        rows.collect()
    });
    Json(json!({ "audits": rows }))
}

fn row(record: &Record, deployment: &Deployment) -> Value {
    let time = |at: Option<UnixMillis>| at.map(UnixMillis::iso8601);
    let facts = &deployment.facts;
    let server = record.servers().get(&deployment.server);
    json!({
        "deployment_id": deployment.id,
        "chute_id": deployment.chute.chute,
        "chute_name": chute_name(record, &deployment.chute),
        "validator": deployment.chute.validator,
        "version": deployment.version,
        "image": deployment.image,
        "server_id": deployment.server,
        "server_name": server.map(|server| &server.facts.name),
        "gpus": deployment.gpus,
        "job_id": deployment.job,
        "config_id": deployment.config,
        "instance_id": deployment.instance,
        "preemptible": deployment.preemptible,
        "phase": phase_word(deployment.phase),
        "phase_since": deployment.phase_since.iso8601(),
        // A serving deployment waits for nothing.
        "deadline": (deployment.deadline.0 < 1 << 52).then(|| deployment.deadline.iso8601()),
        "reason": deployment.reason,
        "created_at": deployment.created_at.iso8601(),
        "requested_at": deployment.created_at.iso8601(),
        "image_bytes": deployment.bytes_pulled,
        "running_at": time(facts.running_at),
        "ready_at": time(facts.ready_at),
        "claimed_at": time(facts.claimed_at),
        "verified_at": time(facts.verified_at),
        "active_at": time(facts.active_at),
        "stop": deployment.stop.as_ref().map(|stop| json!({
            "at": stop.at.iso8601(),
            "reason": stop_words(&stop.reason),
            "host_confirmed": stop.absent,
        })),
    })
}

/// A reason in words.
pub(super) fn stop_words(reason: &StopReason) -> String {
    match reason {
        StopReason::LaunchRefused(why) => format!("the validator refused the launch: {why}"),
        StopReason::DeadlinePassed(phase) => format!("it was {} for too long", phase_word(*phase)),
        StopReason::WorkloadEnded(why) => format!("the workload ended: {why}"),
        StopReason::WorkloadVanished => "the host does not have it although it should".to_owned(),
        StopReason::InstanceDeleted(why) => format!("the validator deleted the instance: {why}"),
        StopReason::InstanceMissing => "the validator does not list the instance any more".to_owned(),
        StopReason::ChuteDeleted => "the chute was taken out of the catalogue".to_owned(),
        StopReason::JobDeleted => "the job was withdrawn".to_owned(),
        StopReason::Preempted(other) => format!("it made room for {other}"),
        StopReason::Superseded(other) => format!("it made room for a newer version, {other}"),
        StopReason::Operator(why) => format!("a person asked for it: {why}"),
        StopReason::ServerLeaving => "its server leaves".to_owned(),
        StopReason::Strategy(why) => format!("the strategy wanted it: {why}"),
    }
}

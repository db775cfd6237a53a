//! `GET /v1/state`: the whole state for tools that compare it with something else, without source code and
//! secrets, and with the invariants checked on the spot. Times are Unix milliseconds.

use std::sync::Arc;

use axum::Json;
use axum::extract;
use coordinator_core::state_machine::chute::Chute;
use coordinator_core::state_machine::deployment::{Deployment, Phase};
use coordinator_core::state_machine::invariant::violations;
use coordinator_core::state_machine::{State, outbox::Outbox};
use serde_json::{Value, json};

use super::Api;

/// Families of properties that [`violations`] checks: GPUs, names, phases, references.
const INVARIANT_FAMILIES: u64 = 4;

pub(super) async fn state(extract::State(api): extract::State<Arc<Api>>) -> Json<Value> {
    Json(api.store.read(state_json))
}

fn state_json(state: &State) -> Value {
    json!({
        "now": state.settings().now,
        "incarnation": state.settings().incarnation,
        "miner": state.settings().miner,
        "observing_since": state.observing_since(),
        "servers": state.servers().values().map(|server| json!({
            "server_id": server.id(),
            "name": server.facts.name,
            "reachable": server.reachable,
            "locked": server.locked,
            "quarantine": server.quarantine,
            "revision": server.revision,
            "reported": server.reported,
            "enrolment": server.enrolment.as_ref().map(|enrolment| format!("{:?}", enrolment.phase)),
            "last_failure": server.last_failure,
        })).collect::<Vec<_>>(),
        "gpus": state.gpus().values().map(|gpu| json!({
            "gpu_id": gpu.id(),
            "server_id": gpu.server,
            "short_ref": gpu.short_ref,
            "verified": gpu.verified_at.is_some(),
            "holder": gpu.holder,
            "promised_to": gpu.promised_to,
        })).collect::<Vec<_>>(),
        "chutes": state.chutes().values().map(|chute| chute_json(state, chute)).collect::<Vec<_>>(),
        "bounties": state.bounties().iter().map(|(key, bounty)| json!({
            "chute_id": key.chute,
            "validator": key.validator,
            "amount": bounty.amount,
        })).collect::<Vec<_>>(),
        "jobs": state.jobs().iter().map(|(id, job)| json!({
            "job_id": id,
            "chute_id": job.chute.chute,
            "closed": job.closed,
            "attempt": job.attempt,
        })).collect::<Vec<_>>(),
        "deployments": state.deployments().values().map(|d| deployment_json(state, d)).collect::<Vec<_>>(),
        "audits": state.audits().values().map(|audit| {
            let mut row = deployment_json(state, &audit.deployment);
            row["gone_at"] = json!(audit.gone_at);
            row["phase"] = json!("gone");
            row
        }).collect::<Vec<_>>(),
        "outbox": outbox_json(state.outbox()),
        "invariants_checked": INVARIANT_FAMILIES,
        "violations": violations(state),
    })
}

fn chute_json(state: &State, chute: &Chute) -> Value {
    let definition = &chute.definition;
    let runs = state
        .gpus()
        .values()
        .any(|gpu| definition.supported_gpus.contains(&gpu.short_ref));
    json!({
        "chute_id": definition.key.chute,
        "validator": definition.key.validator,
        "name": definition.name,
        "version": definition.version,
        "image": definition.image,
        "gpu_count": definition.gpu_count,
        "preemptible": definition.preemptible,
        "ban_reason": chute.ban_reason,
        "cooldown_until": chute.cooldown.as_ref().map(|cooldown| cooldown.until),
        "missing_since": chute.missing_since,
        "runs_on_known_gpus": runs,
    })
}

fn deployment_json(state: &State, deployment: &Deployment) -> Value {
    let facts = &deployment.facts;
    let name = state
        .chutes()
        .get(&deployment.chute)
        .map(|chute| chute.definition.name.as_str());
    let phase = match deployment.phase {
        Phase::Requested => "requested",
        Phase::Assigned => "assigned",
        Phase::Launched => "launched",
        Phase::Serving => "serving",
        Phase::Stopping => "stopping",
        Phase::Draining => "draining",
    };
    json!({
        "deployment_id": deployment.id,
        "chute_id": deployment.chute.chute,
        "chute_name": name,
        "validator": deployment.chute.validator,
        "version": deployment.version,
        "server_id": deployment.server,
        "gpus": deployment.gpus,
        "job_id": deployment.job,
        "config_id": deployment.config,
        "instance_id": deployment.instance,
        "phase": phase,
        "live": deployment.phase.is_live(),
        "deadline": deployment.deadline,
        "created_at": deployment.created_at,
        "running_at": facts.running_at,
        "ready_at": facts.ready_at,
        "claimed_at": facts.claimed_at,
        "verified_at": facts.verified_at,
        "active_at": facts.active_at,
        "bytes_pulled": deployment.bytes_pulled,
        "reason": deployment.reason,
        "stop_reason": deployment.stop.as_ref().map(|stop| format!("{:?}", stop.reason)),
    })
}

fn outbox_json(outbox: &Outbox) -> Vec<Value> {
    let row = |effect: &coordinator_core::state_machine::effect::Effect| {
        json!({
            "effect": effect.id,
            "subject": format!("{:?}", effect.subject),
            "kind": format!("{:?}", effect.kind),
            "since": effect.created_at,
        })
    };
    outbox.iter().map(row).collect()
}

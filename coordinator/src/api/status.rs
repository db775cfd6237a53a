//! `GET /v1/status`: the cluster in one screen.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_core::state_machine::State as Record;
use coordinator_core::state_machine::deployment::Phase;
use coordinator_core::state_machine::server::{EnrolmentPhase, Server};
use protocol::time::UnixMillis;
use serde_json::{Value, json};

use super::objects::dollars;
use super::{Api, hosts, snapshots};

/// An effect that waits for longer is worth a look.
const EFFECT_LATE_MS: u64 = 5 * 60_000;

pub(super) async fn status(State(api): State<Arc<Api>>) -> Json<Value> {
    let now = api.store.clock().now();
    let roles = api.deps.cluster.roles();
    let (mut status, (mut members, mut names)) = api
        .store
        .read(|record| (of_state(record, now), hosts::members(record, &roles)));
    if members.is_empty() {
        // Not founded yet: this member is the only voter.
        let member = &api.config.member;
        members.push(json!({ "host": member, "role": "voter", "leads": true }));
        names.push(member.clone());
    }
    status["cluster"]["id"] = json!(api.deps.cluster.name());
    status["cluster"]["members"] = json!(members);
    status["cluster"]["hosts_with_seed"] = json!(names);
    let report = api.deps.backup.report();
    status["backup"] = snapshots::of_report(&report);
    if let (Some((at, text)), Some(alerts)) = (report.failure, status["alerts"].as_array_mut()) {
        let text = format!("no snapshot was put away at {}: {text}", at.iso8601());
        alerts.push(json!({ "subject": "backup", "text": text }));
    }
    Json(status)
}

/// The word for a phase in JSON.
pub(super) fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Requested => "requested",
        Phase::Assigned => "assigned",
        Phase::Launched => "launched",
        Phase::Serving => "serving",
        Phase::Stopping => "stopping",
        Phase::Draining => "draining",
    }
}

fn enrolment_word(server: &Server) -> &'static str {
    match server.enrolment.as_ref().map(|enrolment| &enrolment.phase) {
        None => "none",
        Some(EnrolmentPhase::Advertising) => "advertising",
        Some(EnrolmentPhase::Verifying { .. }) => "verifying",
        Some(EnrolmentPhase::Ready) => "ready",
        Some(EnrolmentPhase::Leaving { .. }) => "leaving",
    }
}

/// Deployments by phase, every phase named.
pub(super) fn deployments_by_phase(record: &Record) -> BTreeMap<&'static str, u64> {
    let phases = [
        Phase::Requested,
        Phase::Assigned,
        Phase::Launched,
        Phase::Serving,
        Phase::Stopping,
        Phase::Draining,
    ];
    let mut counts: BTreeMap<_, _> = phases.iter().map(|phase| (phase_word(*phase), 0)).collect();
    for deployment in record.deployments().values() {
        *counts.entry(phase_word(deployment.phase)).or_default() += 1;
    }
    counts
}

fn of_state(record: &Record, now: UnixMillis) -> Value {
    let settings = record.settings();
    let oldest = record.outbox().iter().next();
    let (mut free, mut held, mut verified) = (0, 0, 0);
    for gpu in record.gpus().values() {
        free += u64::from(gpu.is_free());
        held += u64::from(gpu.holder.is_some());
        verified += u64::from(gpu.verified_at.is_some());
    }
    let servers: Vec<Value> = record
        .present_servers()
        .map(|server| of_server(record, server))
        .collect();
    let oldest = oldest.map(|effect| {
        json!({
            "id": effect.id,
            "what": effect_word(&effect.kind),
            "validator": effect.validator,
            "waits_seconds": now.since(effect.created_at) / 1000,
        })
    });
    json!({
        "cluster": {
            "miner": settings.miner,
            "validators": settings.validators,
            "pay_profile": match settings.pay_profile {
                coordinator_core::state_machine::command::PayProfile::Of2025September => "2025-09",
                coordinator_core::state_machine::command::PayProfile::Of2026 => "2026",
            },
            "incarnation": settings.incarnation,
            "format": record.format(),
            "observing_since": record.observing_since().map(UnixMillis::iso8601),
        },
        "time": now.iso8601(),
        "servers": servers,
        "gpus": { "total": record.gpus().len(), "verified": verified, "free": free, "held": held },
        "deployments": deployments_by_phase(record),
        "chutes": record.chutes().len(),
        "jobs": record.jobs().len(),
        "bounties": record.bounties().len(),
        "outbox": { "length": record.outbox().len(), "oldest": oldest },
        "deletion_budget": { "used": settings.budget_used, "limit": record.deletion_budget() },
        "alerts": alerts(record, now),
    })
}

fn of_server(record: &Record, server: &Server) -> Value {
    let gpus: Vec<_> = record.gpus_of(server.id()).collect();
    json!({
        "server_id": server.id(),
        "name": server.facts.name,
        "address": server.facts.address,
        "agent_version": server.facts.agent_version,
        "enrolment": enrolment_word(server),
        "validator": server.enrolment.as_ref().map(|enrolment| &enrolment.validator),
        "gpu_short_ref": server.enrolment.as_ref().map(|enrolment| &enrolment.gpu_short_ref),
        "hourly_cost_usd_per_gpu": server.enrolment.as_ref().map(|e| dollars(e.hourly_cost_usd_micros)),
        "reachable": server.reachable,
        "locked": server.locked,
        "quarantine": server.quarantine,
        "last_failure": server.last_failure,
        "takes_no_work_because": record.unavailable(server),
        "gpus": {
            "reported": server.facts.devices.len(),
            "total": gpus.len(),
            "verified": gpus.iter().filter(|gpu| gpu.verified_at.is_some()).count(),
            "free": gpus.iter().filter(|gpu| gpu.is_free()).count(),
            "held": gpus.iter().filter(|gpu| gpu.holder.is_some()).count(),
        },
        "deployments": record.deployments_on(server.id()).count(),
        "disk_free_gb": server.facts.disk_free_gb,
    })
}

/// The word for what is to be done.
pub(super) fn effect_word(kind: &coordinator_core::state_machine::effect::EffectKind) -> &'static str {
    use coordinator_core::state_machine::effect::EffectKind;
    match kind {
        EffectKind::FetchLaunchConfig { .. } => "fetch a launch config",
        EffectKind::AnnounceInstance { .. } => "announce an instance",
        EffectKind::ActivateInstance { .. } => "activate an instance",
        EffectKind::DeleteInstance { .. } => "delete an instance",
        EffectKind::ReleaseJob { .. } => "release a job",
        EffectKind::AdvertiseGpus { .. } => "advertise GPUs",
        EffectKind::AwaitVerification { .. } => "await the verification of GPUs",
        EffectKind::DeleteGpu { .. } => "delete a GPU",
    }
}

/// What a person should look at, one sentence each.
fn alerts(record: &Record, now: UnixMillis) -> Vec<Value> {
    let mut alerts = Vec::new();
    let mut alert = |subject: &str, text: String| alerts.push(json!({ "subject": subject, "text": text }));
    for server in record.present_servers() {
        let name = &server.facts.name;
        if !server.reachable {
            alert(
                name,
                format!("host {name} is silent: look at its agent and its network"),
            );
        }
        if let Some(reason) = &server.quarantine {
            alert(name, format!("host {name} gets no new work: {reason}"));
        }
        if let Some(failure) = &server.last_failure {
            alert(name, format!("adding {name} failed: {failure}"));
        }
        if !server.strangers.is_empty() {
            let count = server.strangers.len();
            alert(
                name,
                format!("host {name} runs {count} workloads that no deployment accounts for"),
            );
        }
    }
    for effect in record
        .outbox()
        .iter()
        .filter(|effect| now.since(effect.created_at) > EFFECT_LATE_MS)
    {
        let minutes = now.since(effect.created_at) / 60_000;
        let what = effect_word(&effect.kind);
        let text = format!(
            "\"{what}\" waits for validator {} for {minutes} min",
            effect.validator
        );
        alert("outbox", text);
    }
    if !record.strangers().is_empty() {
        let count = record.strangers().len();
        let text = format!("validators list {count} instances that no deployment accounts for: see the diff");
        alert("instances", text);
    }
    let (used, limit) = (record.settings().budget_used, record.deletion_budget());
    if used >= limit {
        let text = format!("{used} of {limit} deletions of this window are used: a person must look");
        alert("deletion budget", text);
    }
    alerts
}

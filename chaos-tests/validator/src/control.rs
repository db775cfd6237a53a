//! The control interface under `/_stand_in/`, a path that no real validator has; loopback only. A
//! supervisor publishes, plants faults and reads ledger and score through it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{ConnectInfo, Query, Request, State as Shared};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use protocol::id::ConfigId;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::instances;
use crate::ledger::Record;
use crate::pay;
use crate::problem::Problem;
use crate::program;
use crate::rows;
use crate::scenario::Action;
use crate::validator::Validator;

/// Ledger entries in one answer.
const ENTRIES_MAX: usize = 10_000;

pub(crate) fn routes() -> Router<Arc<Validator>> {
    Router::new()
        .route("/_stand_in/", get(info))
        .route("/_stand_in/action", post(action))
        .route("/_stand_in/ledger", get(ledger))
        .route("/_stand_in/score", get(score))
        .route("/_stand_in/state", get(state))
        .route("/_stand_in/faults", get(faults))
        .route("/_stand_in/chute_report", post(chute_report))
        .layer(axum::middleware::from_fn(loopback_only))
}

async fn loopback_only(ConnectInfo(peer): ConnectInfo<SocketAddr>, request: Request, next: Next) -> Response {
    if peer.ip().to_canonical().is_loopback() {
        next.run(request).await
    } else {
        Problem::not_found("Not Found").into_response()
    }
}

/// Addresses, names and what is relaxed.
pub(crate) fn description(validator: &Validator) -> Value {
    let scenario = &validator.scenario;
    json!({
        "scenario": scenario.name,
        "validator": validator.signer.hotkey(),
        "api_url": validator.api_url,
        "socket_url": validator.api_url.replacen("http", "ws", 1),
        "registry_url": validator.api_url,
        "sites": validator.sites,
        "relaxed": scenario.relaxed_lines(),
        "goals": scenario.goals,
    })
}

async fn info(Shared(validator): Shared<Arc<Validator>>) -> Json<Value> {
    Json(description(&validator))
}

async fn action(
    Shared(validator): Shared<Arc<Validator>>,
    Json(action): Json<Action>,
) -> Result<Json<Value>, Problem> {
    program::perform(&validator, action, None).map(Json)
}

#[derive(Debug, Deserialize)]
struct LedgerQuery {
    #[serde(default)]
    after: u64,
    kind: Option<String>,
}

async fn ledger(Shared(validator): Shared<Arc<Validator>>, Query(query): Query<LedgerQuery>) -> Json<Value> {
    let entries = validator.ledger(|ledger| ledger.after(query.after, ENTRIES_MAX));
    let rows = entries
        .iter()
        .filter_map(|entry| serde_json::to_value(entry).ok())
        .filter(|row| query.kind.as_deref().is_none_or(|kind| row["kind"] == kind))
        .collect();
    Json(rows)
}

/// What the run is worth so far, and the counts that a supervisor reports.
async fn score(Shared(validator): Shared<Arc<Validator>>) -> Json<Value> {
    let scores = instances::scores(&validator);
    let (paid, verified_instances, steps_done) = validator.read(|state, now| {
        let paid: f64 = instances::lives(state)
            .iter()
            .map(|(_, _, life)| pay::paid_seconds(life, now))
            .sum();
        let living = state
            .instances
            .values()
            .filter(|i| i.verified_at.is_some())
            .count();
        let ended = state.ended.iter().filter(|ended| ended.verified).count();
        // An empty sum is minus zero.
        (paid + 0.0, living + ended, state.steps_done.len())
    });
    let counts = validator.ledger(|ledger| {
        let mut counts = Counts::default();
        for entry in ledger.all() {
            counts.add(&entry.record);
        }
        counts
    });
    Json(json!({
        "scores": scores,
        "paid_seconds": paid,
        "program_steps_done": steps_done,
        "events_published": counts.events,
        "gpus_proved": counts.gpus.len(),
        "deployments_verified": verified_instances,
        "chutes_verified": counts.verified_chutes.len(),
        "chutes_activated": counts.active_chutes.len(),
        "tokens_granted": counts.tokens,
        "claims_granted": counts.claims,
        "jobs_finished": counts.jobs_complete,
        "image_bytes_sent": counts.image_bytes,
        "egress_allowed": counts.egress_allowed,
        "egress_denied": counts.egress_denied,
        "egress_wrong": counts.egress_wrong,
    }))
}

#[derive(Debug, Default)]
struct Counts {
    events: u64,
    gpus: BTreeSet<String>,
    verified_chutes: BTreeSet<String>,
    active_chutes: BTreeSet<String>,
    tokens: u64,
    claims: u64,
    jobs_complete: u64,
    image_bytes: u64,
    egress_allowed: u64,
    egress_denied: u64,
    egress_wrong: u64,
}

impl Counts {
    fn add(&mut self, record: &Record) {
        match record {
            Record::EventPublished { .. } => self.events += 1,
            Record::NodesVerified { uuids, .. } => {
                self.gpus.extend(uuids.iter().map(ToString::to_string));
            }
            Record::InstanceVerified { chute, .. } => {
                self.verified_chutes.insert(chute.to_string());
            }
            Record::InstanceActivated { chute, .. } => {
                self.active_chutes.insert(chute.to_string());
            }
            Record::TokenGranted { .. } => self.tokens += 1,
            Record::ClaimGranted { .. } => self.claims += 1,
            Record::JobFinished { status, .. } if status == "complete" => self.jobs_complete += 1,
            Record::RegistryRequest { bytes, .. } => self.image_bytes += bytes,
            Record::EgressObserved {
                should_reach,
                reached,
                ..
            } => match (should_reach, reached) {
                (true, true) => self.egress_allowed += 1,
                (false, false) => self.egress_denied += 1,
                _ => self.egress_wrong += 1,
            },
            _ => {}
        }
    }
}

/// Everything a supervisor compares with the miner's own records.
async fn state(Shared(validator): Shared<Arc<Validator>>) -> Json<Value> {
    let listeners = validator.hub.listeners();
    Json(validator.read(|state, now| {
        let boost = |age_ms| validator.scenario.pay.bounty_boost(age_ms);
        let instances: Vec<Value> = state
            .instances
            .values()
            .map(|instance| {
                let mut row = rows::instance(instance);
                row["gpus"] = json!(instance.gpus);
                row["job_id"] = json!(instance.job);
                row
            })
            .collect();
        json!({
            "now": now,
            "started_at": state.started_at,
            "steps_done": state.steps_done.len(),
            "steps": validator.scenario.program.len(),
            "hotkeys": state.hotkeys,
            "listening_hotkeys": listeners,
            "images": state.images.values().map(rows::image).collect::<Vec<_>>(),
            "chutes": state.chutes.values().map(|c| rows::chute(c, state, boost, now)).collect::<Vec<_>>(),
            "nodes": state.nodes.values().map(|n| rows::node(n, &validator.gpus)).collect::<Vec<_>>(),
            "instances": instances,
            "jobs": state.jobs.values().map(rows::job).collect::<Vec<_>>(),
            "bounties": state.bounties,
            "rolling_updates": state.rolling_updates,
        })
    }))
}

async fn faults(Shared(validator): Shared<Arc<Validator>>) -> Json<Value> {
    Json(json!(validator.planted().faults))
}

#[derive(Debug, Deserialize)]
struct ChuteReport {
    config_id: Option<ConfigId>,
    site: String,
    should_reach: bool,
    reached: bool,
    detail: String,
}

/// A chute stand-in tells whether it reached a site.
async fn chute_report(
    Shared(validator): Shared<Arc<Validator>>,
    Json(report): Json<ChuteReport>,
) -> StatusCode {
    validator.record(Record::EgressObserved {
        config: report.config_id,
        site: report.site,
        should_reach: report.should_reach,
        reached: report.reached,
        detail: report.detail,
    });
    StatusCode::NO_CONTENT
}

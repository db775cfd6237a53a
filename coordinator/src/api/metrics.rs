//! `GET /metrics`: counts from the state, and what this API has answered, in Prometheus' text form.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use coordinator_core::state_machine::State as Record;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::auth::{Access, Asked};
use super::error::{ApiError, Result};
use super::raft::Roles;
use super::status::deployments_by_phase;
use super::{Api, Peer};
use crate::backup::Report;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    method: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

/// What the API counts itself.
#[derive(Debug, Default)]
pub(super) struct Counters {
    answers: Family<AnswerLabels, Counter>,
}

impl Counters {
    /// Methods that are none of ours share a label: the labels stay few.
    pub(super) fn answered(&self, method: &Method, status: StatusCode) {
        let method = match *method {
            Method::GET => "GET",
            Method::POST => "POST",
            Method::DELETE => "DELETE",
            _ => "other",
        };
        let status = status.as_u16();
        self.answers.get_or_create(&AnswerLabels { method, status }).inc();
    }
}

/// Without a signature only for this machine itself.
pub(super) async fn metrics(State(api): State<Arc<Api>>, request: Request) -> Result<Response> {
    let peer = Peer::of(&request);
    if !peer.is_loopback() {
        let asked = Asked {
            method: request.method(),
            path_and_query: request.uri().path_and_query().map_or("/", |path| path.as_str()),
            headers: request.headers(),
            body: b"",
            peer,
            connection: None,
        };
        api.door
            .admit(&asked, Access::Read, &api.miner(), api.store.clock().now())?;
    }
    all_of(&api)
}

/// On a door of their own, which is for Prometheus only.
pub(super) async fn unsigned(State(api): State<Arc<Api>>) -> Result<Response> {
    all_of(&api)
}

fn all_of(api: &Api) -> Result<Response> {
    let mut registry = Registry::with_prefix("coordinator");
    let answers = api.counters.answers.clone();
    registry.register("api_answers", "Answers of the management API", answers);
    let now = api.store.clock().now();
    api.store.read(|record| {
        let oldest = record.outbox().iter().next();
        let oldest_seconds = oldest.map_or(0, |effect| now.since(effect.created_at) / 1000);
        gauge(
            &mut registry,
            "outbox_oldest_seconds",
            "How long the oldest effect waits",
            oldest_seconds,
        );
        of_state(&mut registry, record);
    });
    of_backup(&mut registry, &api.deps.backup.report());
    // Not who is called the leader: one that is cut off from the others calls itself one for ever.
    let leads = u64::from(api.store.leads_now());
    gauge(&mut registry, "leads", "1 if this member leads", leads);
    of_roles(&mut registry, &api.deps.cluster.roles());
    let mut encoded = String::new();
    text::encode(&mut encoded, &registry)
        .map_err(|error| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, content_type)], encoded).into_response())
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge: Gauge = Gauge::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

fn family(
    registry: &mut Registry,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (&'static str, u64)>,
) {
    let family = Family::<KindLabels, Gauge>::default();
    for (kind, value) in values {
        let value = i64::try_from(value).unwrap_or(i64::MAX);
        family.get_or_create(&KindLabels { kind }).set(value);
    }
    registry.register(name, help, family);
}

fn of_backup(registry: &mut Registry, report: &Report) {
    if let Some(done) = &report.last {
        let (at, size) = (done.at.unix_seconds(), done.size_bytes);
        gauge(
            registry,
            "backup_last_time_seconds",
            "When the last snapshot was put away",
            at,
        );
        gauge(registry, "backup_last_bytes", "Size of the last snapshot", size);
    }
    let failed = u64::from(report.failure.is_some());
    gauge(registry, "backup_failed", "1 if the last attempt failed", failed);
}

fn of_roles(registry: &mut Registry, roles: &Roles) {
    let known = u64::from(roles.leader.is_some());
    gauge(
        registry,
        "leader_known",
        "1 if this member knows who leads",
        known,
    );
    gauge(
        registry,
        "term",
        "Current term: it grows with each election",
        roles.term,
    );
    let count = |members: &BTreeSet<u64>| members.len() as u64;
    let kinds = [
        ("voter", count(&roles.voters)),
        ("learner", count(&roles.learners)),
    ];
    family(
        registry,
        "members",
        "Members of the replicated log",
        kinds.into_iter(),
    );
}

fn of_state(registry: &mut Registry, record: &Record) {
    let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
    let gpus = |wanted: fn(&coordinator_core::state_machine::server::Gpu) -> bool| {
        count(record.gpus().values().filter(|gpu| wanted(gpu)).count())
    };
    let kinds = [
        ("all", gpus(|_| true)),
        ("verified", gpus(|gpu| gpu.verified_at.is_some())),
        (
            "free",
            gpus(coordinator_core::state_machine::server::Gpu::is_free),
        ),
        ("held", gpus(|gpu| gpu.holder.is_some())),
    ];
    family(registry, "gpus", "GPUs of enrolled servers", kinds.into_iter());
    let servers = |wanted: fn(&coordinator_core::state_machine::server::Server) -> bool| {
        count(record.present_servers().filter(|server| wanted(server)).count())
    };
    let kinds = [
        ("all", servers(|_| true)),
        ("ready", servers(|server| server.ready_enrolment().is_some())),
        ("locked", servers(|server| server.locked)),
        ("unreachable", servers(|server| !server.reachable)),
        ("quarantined", servers(|server| server.quarantine.is_some())),
    ];
    family(registry, "servers", "Hosts that have joined", kinds.into_iter());
    let phases = deployments_by_phase(record).into_iter();
    family(registry, "deployments", "Deployments by phase", phases);
    gauge(
        registry,
        "outbox_length",
        "Effects that wait",
        count(record.outbox().len()),
    );
    gauge(
        registry,
        "chutes",
        "Chutes in the catalogue",
        count(record.chutes().len()),
    );
    gauge(
        registry,
        "jobs",
        "Jobs that are remembered",
        count(record.jobs().len()),
    );
    gauge(
        registry,
        "stranger_instances",
        "Instances of nobody",
        count(record.strangers().len()),
    );
    let used = u64::from(record.settings().budget_used);
    gauge(registry, "deletions_in_window", "Deletions in this window", used);
    gauge(
        registry,
        "deletion_budget",
        "Deletions that a window allows",
        u64::from(record.deletion_budget()),
    );
}

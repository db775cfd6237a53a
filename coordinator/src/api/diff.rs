//! `GET /v1/diff`: the record, the hosts and the validators side by side, a reason for each difference.
//!
//! What hosts and validators said last is memory of this member. Unknown is a side of its own: it agrees with
//! everything and proves nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use coordinator_core::state_machine::State as Record;
use coordinator_core::state_machine::command::{ListedInstance, Listing, Observation};
use coordinator_core::state_machine::deployment::{Deployment, Phase};
use coordinator_core::state_machine::effect::Subject;
use coordinator_core::state_machine::outbox::Outbox;
use futures_util::future::BoxFuture;
use protocol::hotkey::Hotkey;
use protocol::id::{DeploymentId, GpuId, InstanceId, ServerId};
use protocol::logs::{HostAnswer, HostQuestion};
use protocol::report::WorkloadReport;
use protocol::time::UnixMillis;
use protocol::workload::WorkloadPhase;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Api;
use super::objects::chute_name;
use super::status::phase_word;
use crate::host_link::Hub;
use crate::leader::Listings;
use crate::validator::{intake, inventory};

/// What hosts reported last, and the way to ask those that are connected to this member.
pub trait Hosts: fmt::Debug + Send + Sync {
    /// The last report of a host and when it came; none if it is connected nowhere.
    fn last_report(&self, server: &ServerId) -> Option<(UnixMillis, WorkloadReport)>;

    /// Asks a host; none if it is not connected to this member.
    fn ask(
        &self,
        server: &ServerId,
        question: HostQuestion,
    ) -> Option<BoxFuture<'static, Result<HostAnswer, String>>>;
}

impl Hosts for Hub {
    fn last_report(&self, server: &ServerId) -> Option<(UnixMillis, WorkloadReport)> {
        Self::last_report(self, server)
    }

    fn ask(
        &self,
        server: &ServerId,
        question: HostQuestion,
    ) -> Option<BoxFuture<'static, Result<HostAnswer, String>>> {
        Self::ask(self, server, question, super::HOST_ANSWER_MAX)
    }
}

/// What validators listed last.
pub trait ValidatorListing: fmt::Debug + Send + Sync {
    /// The last look at a validator; none before the first.
    fn last_listing(&self, validator: &Hotkey) -> Option<Observation>;

    /// All of the last look at a validator; none before the first.
    fn last_look(&self, validator: &Hotkey) -> Option<Arc<inventory::Observation>>;
}

impl ValidatorListing for Listings {
    fn last_listing(&self, validator: &Hotkey) -> Option<Observation> {
        self.get(validator)
            .map(|observed| intake::core_observation(&observed))
    }

    fn last_look(&self, validator: &Hotkey) -> Option<Arc<inventory::Observation>> {
        self.get(validator)
    }
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(super) struct DiffQuery {
    /// Also what agrees.
    #[serde(default)]
    all: bool,
}

pub(super) async fn diff(State(api): State<Arc<Api>>, Query(query): Query<DiffQuery>) -> Json<Value> {
    let (servers, validators) = api.store.read(|record| {
        let servers: Vec<ServerId> = record.servers().keys().cloned().collect();
        (servers, record.settings().validators.clone())
    });
    let seen = Seen {
        hosts: servers
            .into_iter()
            .map(|server| {
                let report = api.deps.hosts.last_report(&server);
                (server, report)
            })
            .collect(),
        validators: validators
            .into_iter()
            .map(|validator| {
                let listing = api.deps.validator_listing.last_listing(&validator);
                (validator, listing)
            })
            .collect(),
    };
    let rows = api.store.read(|record| compare(record, &seen));
    let differences = rows.iter().filter(|row| !row.agrees()).count();
    let rows: Vec<&Row> = rows.iter().filter(|row| query.all || !row.agrees()).collect();
    Json(json!({ "differences": differences, "rows": rows, "sources": seen.sources() }))
}

/// What the outside said last.
#[derive(Debug, Clone)]
struct Seen {
    hosts: BTreeMap<ServerId, Option<(UnixMillis, WorkloadReport)>>,
    validators: BTreeMap<Hotkey, Option<Observation>>,
}

impl Seen {
    fn sources(&self) -> Value {
        let hosts = self.hosts.iter().map(|(server, report)| {
            json!({ "server_id": server, "reported_at": report.as_ref().map(|(at, _)| at.iso8601()) })
        });
        let validators = self.validators.iter().map(|(validator, look)| {
            let known = |look: &Observation| matches!(look.instances, Listing::Known(_));
            json!({
                "validator": validator,
                "read_at": look.as_ref().map(|look| look.read_at.iso8601()),
                "instances_known": look.as_ref().is_some_and(known),
            })
        });
        json!({ "hosts": hosts.collect::<Vec<_>>(), "validators": validators.collect::<Vec<_>>() })
    }

    fn instances(&self, validator: &Hotkey) -> Option<(UnixMillis, &[ListedInstance])> {
        let look = self.validators.get(validator)?.as_ref()?;
        match &look.instances {
            Listing::Unknown => None,
            Listing::Known(instances) => Some((look.read_at, instances)),
        }
    }
}

/// One thing on three sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Row {
    kind: &'static str,
    id: String,
    name: String,
    state: String,
    host: String,
    validator: String,
    /// Why the sides differ; none if they agree.
    reason: Option<String>,
    is_job: bool,
    /// `POST /v1/stop` takes it down.
    can_be_stopped: bool,
}

impl Row {
    fn agrees(&self) -> bool {
        self.reason.is_none()
    }

    fn of_nobody(
        kind: &'static str,
        id: String,
        name: String,
        host: &str,
        validator: &str,
        reason: &str,
    ) -> Self {
        Self {
            kind,
            id,
            name,
            state: "absent".to_owned(),
            host: host.to_owned(),
            validator: validator.to_owned(),
            reason: Some(reason.to_owned()),
            is_job: false,
            can_be_stopped: false,
        }
    }
}

/// All rows: deployments, then what nobody accounts for, then GPUs.
fn compare(record: &Record, seen: &Seen) -> Vec<Row> {
    let mut rows: Vec<Row> = record
        .deployments()
        .values()
        .map(|deployment| of_deployment(record, seen, deployment))
        .collect();
    rows.extend(workloads_of_nobody(record, seen));
    for validator in seen.validators.keys() {
        rows.extend(instances_of_nobody(record, seen, validator));
        rows.extend(gpus(record, seen, validator));
    }
    rows
}

/// What a host says of a deployment.
enum OnHost<'a> {
    Unknown,
    Absent { is_current: bool },
    Present(&'a WorkloadPhase),
}

/// What a validator says of a deployment.
enum Listed<'a> {
    Unknown,
    Absent { read_at: UnixMillis },
    Present(&'a ListedInstance),
}

fn on_host<'a>(seen: &'a Seen, deployment: &Deployment) -> OnHost<'a> {
    let Some(Some((_, report))) = seen.hosts.get(&deployment.server) else {
        return OnHost::Unknown;
    };
    let found = report
        .workloads
        .iter()
        .find(|workload| workload.deployment == deployment.id);
    match found {
        Some(workload) => OnHost::Present(&workload.phase),
        None => OnHost::Absent {
            is_current: deployment
                .assigned_at_revision
                .is_some_and(|revision| report.fence.revision >= revision),
        },
    }
}

fn listed<'a>(seen: &'a Seen, deployment: &Deployment) -> Listed<'a> {
    let Some((read_at, instances)) = seen.instances(&deployment.chute.validator) else {
        return Listed::Unknown;
    };
    let found = instances.iter().find(|listed| {
        deployment.instance.as_ref() == Some(&listed.instance)
            || (listed.config.is_some() && listed.config == deployment.config)
    });
    found.map_or(Listed::Absent { read_at }, Listed::Present)
}

fn of_deployment(record: &Record, seen: &Seen, deployment: &Deployment) -> Row {
    let (on_host, listed) = (on_host(seen, deployment), listed(seen, deployment));
    let host = match &on_host {
        OnHost::Unknown => "unknown",
        OnHost::Absent { .. } => "absent",
        OnHost::Present(phase) => workload_word(phase),
    };
    let validator = match &listed {
        Listed::Unknown => "unknown",
        Listed::Absent { .. } => "absent",
        Listed::Present(instance) if instance.active && instance.verified => "active",
        Listed::Present(instance) if instance.verified => "verified",
        Listed::Present(_) => "listed",
    };
    let reasons: Vec<String> = [
        host_differs(deployment, &on_host),
        validator_differs(record, deployment, &listed),
    ]
    .into_iter()
    .flatten()
    .collect();
    Row {
        kind: "deployment",
        id: deployment.id.to_string(),
        name: chute_name(record, &deployment.chute),
        state: phase_word(deployment.phase).to_owned(),
        host: host.to_owned(),
        validator: validator.to_owned(),
        reason: (!reasons.is_empty()).then(|| reasons.join("; ")),
        is_job: deployment.job.is_some(),
        can_be_stopped: deployment.phase.is_live(),
    }
}

fn workload_word(phase: &WorkloadPhase) -> &'static str {
    match phase {
        WorkloadPhase::Pending => "pending",
        WorkloadPhase::Pulling { .. } => "pulling",
        WorkloadPhase::Running { ready: true, .. } => "ready",
        WorkloadPhase::Running { .. } => "running",
        WorkloadPhase::Stopping => "stopping",
        WorkloadPhase::Ended { .. } => "ended",
    }
}

fn host_differs(deployment: &Deployment, on_host: &OnHost<'_>) -> Option<String> {
    match on_host {
        OnHost::Unknown => None,
        OnHost::Absent { is_current } if deployment.phase.is_desired() => Some(if *is_current {
            "the host does not have it although it should".to_owned()
        } else {
            "the host has not taken the newest set up yet".to_owned()
        }),
        OnHost::Absent { .. } => None,
        OnHost::Present(WorkloadPhase::Ended { reason, .. }) => Some(format!("the workload ended: {reason}")),
        OnHost::Present(_) => match deployment.phase {
            Phase::Requested => Some("the host runs it although it is not assigned yet".to_owned()),
            Phase::Stopping | Phase::Draining => Some("the host has not finished stopping it".to_owned()),
            Phase::Assigned | Phase::Launched | Phase::Serving => None,
        },
    }
}

fn validator_differs(record: &Record, deployment: &Deployment, listed: &Listed<'_>) -> Option<String> {
    let facts = &deployment.facts;
    match listed {
        Listed::Unknown => None,
        Listed::Absent { read_at } => {
            let claimed_before = facts.claimed_at.is_some_and(|at| at < *read_at);
            (claimed_before && deployment.phase.is_live())
                .then(|| "the validator does not list its instance".to_owned())
        }
        Listed::Present(_) if !deployment.phase.is_live() => {
            let subject = Subject::Deployment(deployment.id.clone());
            Some(if waits(record.outbox(), &subject) {
                "the validator still lists the instance; its deletion waits".to_owned()
            } else {
                "the validator still lists the instance although it was told".to_owned()
            })
        }
        Listed::Present(instance) => {
            let mut missing = Vec::new();
            if deployment.instance.as_ref() != Some(&instance.instance) {
                missing.push("the record does not know the instance yet");
            }
            if instance.verified != facts.verified_at.is_some() {
                missing.push("they differ on whether it is verified");
            }
            if instance.active != facts.active_at.is_some() {
                missing.push("they differ on whether it is active");
            }
            (!missing.is_empty()).then(|| missing.join("; "))
        }
    }
}

fn waits(outbox: &Outbox, subject: &Subject) -> bool {
    outbox.of_subject(subject).next().is_some()
}

fn workloads_of_nobody(record: &Record, seen: &Seen) -> Vec<Row> {
    let mut rows = Vec::new();
    for (server, report) in &seen.hosts {
        let Some((_, report)) = report else { continue };
        let name = record
            .servers()
            .get(server)
            .map_or("", |server| server.facts.name.as_str());
        let known = |id: &DeploymentId| {
            record
                .deployments()
                .get(id)
                .is_some_and(|deployment| deployment.server == *server)
        };
        for workload in report
            .workloads
            .iter()
            .filter(|workload| !known(&workload.deployment))
        {
            let reason = "no deployment accounts for it: the host stops it with its next set";
            rows.push(Row::of_nobody(
                "workload",
                workload.deployment.to_string(),
                name.to_owned(),
                workload_word(&workload.phase),
                "unknown",
                reason,
            ));
        }
    }
    rows
}

fn instances_of_nobody(record: &Record, seen: &Seen, validator: &Hotkey) -> Vec<Row> {
    let Some((_, instances)) = seen.instances(validator) else {
        return Vec::new();
    };
    let matched: BTreeSet<&InstanceId> = instances
        .iter()
        .filter(|listed| {
            record.deployments().values().any(|deployment| {
                deployment.instance.as_ref() == Some(&listed.instance)
                    || (listed.config.is_some() && listed.config == deployment.config)
            })
        })
        .map(|listed| &listed.instance)
        .collect();
    instances
        .iter()
        .filter(|listed| !matched.contains(&listed.instance))
        .map(|listed| {
            let ours_once = record
                .deployment_of(listed.config.as_ref(), &listed.instance)
                .is_some();
            let reason = if ours_once {
                "its deployment is gone: it is deleted at the second sight"
            } else {
                "no deployment accounts for it: it is deleted at the second sight, within the budget"
            };
            let word = if listed.active { "active" } else { "listed" };
            let (id, chute) = (listed.instance.to_string(), listed.chute.to_string());
            Row::of_nobody("instance", id, chute, "unknown", word, reason)
        })
        .collect()
}

fn gpus(record: &Record, seen: &Seen, validator: &Hotkey) -> Vec<Row> {
    let look = seen.validators.get(validator).and_then(Option::as_ref);
    let Some(Listing::Known(listed)) = look.map(|look| &look.gpus) else {
        return Vec::new();
    };
    let listed: BTreeMap<&GpuId, bool> = listed.iter().map(|(gpu, verified)| (gpu, *verified)).collect();
    let mut rows = Vec::new();
    for gpu in record.gpus().values() {
        let server = record.servers().get(&gpu.server);
        let enrolment = server.and_then(|server| server.enrolment.as_ref());
        if enrolment.is_none_or(|enrolment| enrolment.validator != *validator) {
            continue;
        }
        let ours = gpu.verified_at.is_some();
        let (word, reason) = match listed.get(gpu.id()) {
            None if ours => ("absent", Some("the validator does not list the GPU")),
            None => ("absent", None),
            Some(true) if !ours => ("verified", Some("the record does not know that it is verified")),
            Some(true) => ("verified", None),
            Some(false) if ours => ("listed", Some("the validator no longer says that it is verified")),
            Some(false) => ("listed", None),
        };
        let reported =
            server.is_some_and(|server| server.facts.devices.iter().any(|device| device.uuid == *gpu.id()));
        let reason = reason.or((!reported).then_some("its host does not report it at present"));
        rows.push(Row {
            kind: "gpu",
            id: gpu.id().to_string(),
            name: server.map_or_else(String::new, |server| server.facts.name.clone()),
            state: if ours { "verified" } else { "unverified" }.to_owned(),
            host: if reported { "reported" } else { "absent" }.to_owned(),
            validator: word.to_owned(),
            reason: reason.map(str::to_owned),
            is_job: false,
            can_be_stopped: false,
        });
    }
    for (gpu, verified) in listed.iter().filter(|(gpu, _)| !record.gpus().contains_key(gpu)) {
        let word = if *verified { "verified" } else { "listed" };
        let reason = "no server of ours has it: chutes-miner delete-remote takes it out";
        rows.push(Row::of_nobody(
            "gpu",
            gpu.to_string(),
            String::new(),
            "absent",
            word,
            reason,
        ));
    }
    rows
}

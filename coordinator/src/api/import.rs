//! `POST /v1/import`: one server of another miner, with what runs on it, against the state; taken over if asked to.
//! Signed by the newer scheme only.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use coordinator_core::state_machine::adoption::{AdoptedDeployment, Adoption};
use coordinator_core::state_machine::chute::{ChuteCode, ChuteDefinition, ChuteKey};
use coordinator_core::state_machine::deployment::Facts;
use coordinator_core::state_machine::{Command, Rejection, Reply, State as Record};
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::time::UnixMillis;
use protocol::workload::PortMapping;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::auth::Caller;
use super::enrolment::micros;
use super::error::{ApiError, Result};
use super::operate::{invalid, parse};

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Import {
    #[serde(default)]
    apply: bool,
    server: ServerThere,
    deployments: Vec<DeploymentThere>,
}

/// A server of another miner with what runs on it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct There {
    server: ServerThere,
    deployments: Vec<DeploymentThere>,
}

/// A server of another miner that is one of our hosts.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) adoption: Adoption,
    /// Why validators would not find it.
    pub(super) problem: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerThere {
    name: String,
    /// Under which validators know its GPUs.
    ip_address: Option<String>,
    validator: String,
    gpu_short_ref: String,
    hourly_cost: f64,
    seed: Option<u64>,
    locked: bool,
    gpus: Vec<GpuThere>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct GpuThere {
    gpu_id: String,
    verified: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeploymentThere {
    deployment_id: String,
    chute_id: String,
    version: String,
    image: String,
    chutes_version: Option<String>,
    gpus: Vec<String>,
    job_id: Option<String>,
    config_id: Option<String>,
    instance_id: Option<String>,
    active: bool,
    verified_at_ms: Option<u64>,
    activated_at_ms: Option<u64>,
    created_at_ms: Option<u64>,
    preemptible: bool,
    ready: bool,
    ports: Vec<PortMapping>,
    chute: ChuteThere,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChuteThere {
    name: String,
    image: String,
    version: String,
    chutes_version: Option<String>,
    gpu_count: u32,
    supported_gpus: BTreeSet<String>,
    tee: bool,
    filename: String,
    ref_str: String,
    code: String,
}

/// A name out of a text, or what is wrong with it.
fn named<T, E: std::fmt::Display>(
    what: &str,
    text: &str,
    parse: impl Fn(&str) -> std::result::Result<T, E>,
) -> Result<T> {
    parse(text).map_err(|error| invalid(&format!("{what} {text:?}: {error}")))
}

fn named_or_none<T, E: std::fmt::Display>(
    what: &str,
    text: Option<&str>,
    parse: impl Fn(&str) -> std::result::Result<T, E>,
) -> Result<Option<T>> {
    text.map(|text| named(what, text, parse)).transpose()
}

impl DeploymentThere {
    fn adopted(self, validator: &Hotkey, now: UnixMillis) -> Result<AdoptedDeployment> {
        let chute = self.chute;
        let gpus: Result<Vec<GpuId>> = self
            .gpus
            .iter()
            .map(|text| named("GPU", text, GpuId::from_device_uuid))
            .collect();
        let verified_at = self.verified_at_ms.map(UnixMillis);
        let created_at = self.created_at_ms.map(UnixMillis);
        // Older records do not say when it became active.
        let active_at = self
            .activated_at_ms
            .map(UnixMillis)
            .or(verified_at)
            .unwrap_or(now);
        Ok(AdoptedDeployment {
            id: named("deployment", &self.deployment_id, DeploymentId::parse)?,
            chute: ChuteDefinition {
                key: ChuteKey {
                    validator: validator.clone(),
                    chute: named("chute", &self.chute_id, ChuteId::parse)?,
                },
                version: named("version", &chute.version, ChuteVersion::parse)?,
                name: chute.name,
                image: chute.image,
                chutes_version: chute.chutes_version,
                gpu_count: chute.gpu_count,
                supported_gpus: chute.supported_gpus,
                preemptible: self.preemptible,
                tee: chute.tee,
                // The validator's next listing says it better.
                serves_requests: true,
                job_ports: Vec::new(),
                effective_multiplier_milli: None,
            },
            code: ChuteCode {
                filename: chute.filename,
                code: chute.code,
                ref_str: chute.ref_str,
            },
            version: named("version", &self.version, ChuteVersion::parse)?,
            image: self.image,
            chutes_version: self.chutes_version,
            gpus: gpus?,
            job: named_or_none("job", self.job_id.as_deref(), JobId::parse)?,
            config: named_or_none("launch config", self.config_id.as_deref(), ConfigId::parse)?,
            instance: named_or_none("instance", self.instance_id.as_deref(), InstanceId::parse)?,
            preemptible: self.preemptible,
            facts: Facts {
                running_at: None,
                ready_at: self.ready.then_some(now),
                claimed_at: self.instance_id.and(created_at.or(Some(now))),
                verified_at,
                active_at: self.active.then_some(active_at),
            },
            ports: self.ports,
            created_at,
        })
    }
}

impl ServerThere {
    fn adoption(
        self,
        server: ServerId,
        deployments: Vec<DeploymentThere>,
        now: UnixMillis,
    ) -> Result<Adoption> {
        let validator = named("validator", &self.validator, Hotkey::parse)?;
        let cost = micros(self.hourly_cost)
            .ok_or_else(|| invalid("hourly_cost: dollars per GPU and hour, from 0 to 1000"))?;
        let gpus: Result<Vec<(GpuId, bool)>> = self
            .gpus
            .iter()
            .map(|gpu| Ok((named("GPU", &gpu.gpu_id, GpuId::from_device_uuid)?, gpu.verified)))
            .collect();
        let deployments: Result<Vec<AdoptedDeployment>> = deployments
            .into_iter()
            .map(|deployment| deployment.adopted(&validator, now))
            .collect();
        Ok(Adoption {
            server,
            gpu_short_ref: self.gpu_short_ref,
            hourly_cost_usd_micros: cost,
            seed: self.seed,
            locked: self.locked,
            gpus: gpus?,
            deployments: deployments?,
            validator,
        })
    }
}

impl There {
    pub(super) fn name(&self) -> &str {
        &self.server.name
    }

    /// Which of our hosts it is; none if no host of its name has joined.
    pub(super) fn find(self, record: &Record, now: UnixMillis) -> Result<Option<Found>> {
        let Self { server, deployments } = self;
        let mut hosts = record.present_servers();
        let Some(host) = hosts.find(|host| host.facts.name == server.name) else {
            return Ok(None);
        };
        let address = &host.facts.address;
        let problem = server.ip_address.as_ref().filter(|there| *there != address);
        let problem = problem.map(|there| {
            format!("validators know its GPUs under {there}, and its agent says {address}: set host.address")
        });
        let adoption = server.adoption(host.id().clone(), deployments, now)?;
        Ok(Some(Found { adoption, problem }))
    }
}

/// What to do where no host of that name has joined.
pub(super) fn no_host(name: &str) -> String {
    format!("no host with the name {name} has joined: its agent comes first")
}

pub(super) async fn import(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<Value>> {
    let Import {
        apply,
        server,
        deployments,
    } = parse(&body)?;
    let there = There { server, deployments };
    let name = there.name().to_owned();
    api.store.linearizable().await?;
    let now = api.store.clock().now();
    let found = api.store.read(|record| there.find(record, now))?;
    let found = found.ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, no_host(&name)))?;
    let Found { adoption, problem } = found;
    let mut difference = api.store.read(|record| record.difference(&adoption));
    difference.problems.extend(problem);
    let mut answer = json!({
        "server": name,
        "server_id": adoption.server,
        "changes": difference.changes,
        "problems": difference.problems,
        "applied": false,
    });
    if !apply {
        return Ok(Json(answer));
    }
    if !api.store.read(Record::is_observing) {
        return Err(Rejection::NotObserving.into());
    }
    if difference.problems.is_empty() && !difference.changes.is_empty() {
        let reply = api.propose(&caller, Command::AdoptServer(adoption)).await?;
        answer["applied"] = json!(reply == Reply::Done);
    }
    Ok(Json(answer))
}

//! Launch configs (`validator-protocol`, sections 6.2 to 6.4): the token that a miner gets, the claim,
//! proof and activation by the container that carries it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, Path, Query, State as Shared};
use axum::http::HeaderMap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proof::{Profile, WorkProduct};
use protocol::gpu::DeviceInfo;
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ConfigId, GpuId, InstanceId, JobId};
use protocol::signing::{Purpose, body_hash};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth;
use crate::cipher;
use crate::clock;
use crate::compute;
use crate::event::Event;
use crate::gates::{Capacity, admit};
use crate::identity::{random_bytes, random_uuid};
use crate::instances;
use crate::jobs;
use crate::ledger::{DeletedBy, Record};
use crate::problem::Problem;
use crate::state::{Chute, Instance, LaunchConfig, PortMapping, State};
use crate::validator::{Out, Validator};
use crate::verification;

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

#[derive(Debug, Deserialize)]
struct Claim {
    gpus: Vec<DeviceInfo>,
    host: String,
    port_mappings: Vec<PortMapping>,
    /// SHA-256 of the code that the container found, from our own chute stand-in; a real container sends a
    /// sealed dump that only its validator can open.
    #[serde(default)]
    code_digest: Option<String>,
}

/// A claim that passed all checks.
struct Granted {
    config: ConfigId,
    chute: Chute,
    miner: Hotkey,
    job: Option<JobId>,
    device: DeviceInfo,
    seed: u64,
    iterations: u32,
    deadline_ms: u64,
    gpu_model: String,
    multiplier: f64,
    hourly_rate: f64,
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

/// `POST /instances/launch_config/{config_id}`: the claim.
pub(crate) async fn claim(
    Shared(validator): Shared<Arc<Validator>>,
    Path(config): Path<String>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Problem> {
    let outcome = try_claim(&validator, &config, peer, &headers, &body).await;
    if let Err(problem) = &outcome {
        validator.record(Record::ClaimRefused {
            config,
            status: problem.status.as_u16(),
            reason: problem.reason(),
        });
    }
    outcome
}

async fn try_claim(
    validator: &Arc<Validator>,
    config: &str,
    peer: SocketAddr,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Json<Value>, Problem> {
    let config = checked_token(validator, headers, config)?;
    let claim: Claim = auth::json_body(headers, body)?;
    let egress_address = headers
        .get("x-forwarded-for")
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(',').next())
        .map_or_else(|| peer.ip().to_string(), |first| first.trim().to_owned());
    let granted =
        validator.read(|state, _| check_claim(validator, state, &config, &claim, &egress_address))?;
    // The arithmetic takes long, so it is done without the lock and the claim is checked again.
    let key = random_bytes::<16>();
    let (device, seed, iterations) = (granted.device.clone(), granted.seed, granted.iterations);
    let blob = compute::away(move || {
        let iv = random_bytes();
        proof::encrypt(
            &device,
            &hex::encode(key),
            seed,
            iterations,
            iv,
            &Profile::DEVELOPMENT,
        )
    })
    .await;
    let answer = validator.change(|state, out| {
        let checked = check_claim(validator, state, &config, &claim, &egress_address);
        let granted = match checked {
            Ok(again) => Granted {
                device: granted.device,
                ..again
            },
            Err(problem) => {
                out.untouched();
                return Err(problem);
            }
        };
        Ok(grant(state, out, &granted, &claim, key, &blob))
    })?;
    if let Some(port) = claim.port_mappings.iter().find(|m| m.internal_port == 8001) {
        let url = format!("http://{}:{}/logs", claim.host, port.external_port);
        let (validator, miner) = (validator.clone(), granted.miner);
        tokio::spawn(async move {
            // As in the real one, only told.
            if let Err(error) = verification::log_server(&validator, &miner, url).await {
                tracing::debug!(%error, "log server probe");
            }
        });
    }
    Ok(Json(answer))
}

fn check_claim(
    validator: &Validator,
    state: &State,
    config: &ConfigId,
    claim: &Claim,
    egress_address: &str,
) -> Result<Granted, Problem> {
    let entry = state
        .configs
        .get(config)
        .ok_or_else(|| Problem::unauthorized("Launch config not found"))?;
    if entry.claimed_by.is_some() {
        return Err(Problem::unauthorized("Launch config has already been claimed"));
    }
    let miner = &entry.hotkey;
    let chute = state
        .chutes
        .get(&entry.chute)
        .ok_or_else(|| Problem::not_found(format!("Chute {} not found", entry.chute)))?;
    if let Some(digest) = &claim.code_digest
        && *digest != body_hash(chute.code.as_bytes())
    {
        return Err(Problem::forbidden("Code does not match the chute's"));
    }
    let job = match &entry.job {
        None => None,
        Some(id) => {
            let job = state
                .jobs
                .get(id)
                .ok_or_else(|| Problem::not_found(format!("Job {id} not found")))?;
            if job.instance.is_some() || job.finished_at.is_some() {
                return Err(Problem::conflict("Job was claimed by another instance"));
            }
            check_job_ports(chute, &job.method, &claim.port_mappings)?;
            let relaxed = validator.scenario.relaxed.loopback_hosts && egress_address.starts_with("127.");
            if egress_address != claim.host && !relaxed {
                let text = format!("Egress address {egress_address} is not {}", claim.host);
                return Err(Problem::bad_request(text));
            }
            Some(job)
        }
    };
    check_capacity(validator, state, chute, miner, job.is_some())?;
    let nodes = check_gpus(
        validator,
        state,
        chute,
        miner,
        &claim.host,
        claim.gpus.iter().map(|g| &g.uuid),
    )?;
    let port = main_port(claim)?;
    check_free_address(state, &claim.host, port)?;
    let pick = usize::from(random_bytes::<1>()[0]) % nodes.len();
    let node = nodes[pick];
    let accepted = validator
        .gpus
        .of_short_ref(&node.gpu_identifier)
        .ok_or_else(|| Problem::bad_request("Unsupported GPU"))?;
    let private = !chute.spec.public || job.is_some();
    let factor = if private {
        f64::from(validator.scenario.pay.private_milli) / 1000.0
    } else {
        1.0
    };
    Ok(Granted {
        config: config.clone(),
        chute: chute.clone(),
        miner: miner.clone(),
        job: job.map(|job| job.id.clone()),
        device: node.device.clone(),
        seed: node.seed,
        iterations: accepted.iterations,
        deadline_ms: accepted.launch_deadline_ms,
        gpu_model: node.gpu_identifier.clone(),
        multiplier: chute.compute_multiplier * f64::from(chute.spec.boost_milli) / 1000.0 * factor,
        hourly_rate: accepted.gpu_type.hourly_usd_micros as f64 / 1e6 * f64::from(chute.spec.gpu_count),
    })
}

fn main_port(claim: &Claim) -> Result<u16, Problem> {
    let first = claim
        .port_mappings
        .first()
        .ok_or_else(|| Problem::invalid("too_short", &["body", "port_mappings"], "at least one port"))?;
    if let Some(bad) = claim
        .port_mappings
        .iter()
        .find(|mapping| mapping.external_port < 22)
    {
        let text = format!("port {} is not allowed", bad.external_port);
        return Err(Problem::invalid(
            "greater_than_equal",
            &["body", "port_mappings"],
            text,
        ));
    }
    Ok(first.external_port)
}

fn check_job_ports(chute: &Chute, method: &str, mappings: &[PortMapping]) -> Result<(), Problem> {
    let wanted: BTreeSet<(String, u16)> = chute
        .spec
        .jobs
        .iter()
        .filter(|job| job.name == method)
        .flat_map(|job| &job.ports)
        .map(|port| (port.proto.to_lowercase(), port.port))
        .collect();
    let announced: BTreeSet<(String, u16)> = mappings
        .iter()
        .filter(|mapping| ![8000, 8001].contains(&mapping.internal_port))
        .map(|mapping| (mapping.proto.to_lowercase(), mapping.internal_port))
        .collect();
    if wanted == announced {
        Ok(())
    } else {
        Err(Problem::forbidden("Job ports do not match the chute's"))
    }
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

fn grant(
    state: &mut State,
    out: &mut Out,
    granted: &Granted,
    claim: &Claim,
    key: [u8; 16],
    blob: &[u8],
) -> Value {
    let id = InstanceId::parse(&random_uuid()).expect("a UUID is a valid id");
    let plaintext = format!("secret is {} {}", granted.config, granted.seed);
    let gpus: Vec<GpuId> = claim.gpus.iter().map(|gpu| gpu.uuid.clone()).collect();
    let port = claim
        .port_mappings
        .first()
        .map_or(0, |mapping| mapping.external_port);
    let instance = Instance {
        id: id.clone(),
        chute: granted.chute.id.clone(),
        version: granted.chute.version.clone(),
        image: granted.chute.image.clone(),
        chutes_version: granted.chute.chutes_version.clone(),
        hotkey: granted.miner.clone(),
        host: claim.host.clone(),
        port,
        gpus: gpus.clone(),
        config: Some(granted.config.clone()),
        job: granted.job.clone(),
        created_at: out.now,
        deadline_at: Some(out.now + granted.deadline_ms),
        verified_at: None,
        activated_at: None,
        stop_billing_at: None,
        seed: granted.seed,
        symmetric_key: hex::encode(key),
        response_plaintext: plaintext.clone(),
        port_mappings: claim.port_mappings.clone(),
        multiplier: granted.multiplier,
        target_multiplier: granted.multiplier,
        hourly_rate: granted.hourly_rate,
        public: granted.chute.spec.public,
        verification_error: None,
        legacy_attempts: vec![],
    };
    if let Some(config) = state.configs.get_mut(&granted.config) {
        config.claimed_by = Some(id.clone());
    }
    if let Some(left) = state
        .rolling_updates
        .get_mut(&granted.chute.id)
        .and_then(|update| update.permitted.get_mut(&granted.miner))
    {
        *left = left.saturating_sub(1);
    }
    out.record(Record::ClaimGranted {
        hotkey: granted.miner.clone(),
        chute: granted.chute.id.clone(),
        config: granted.config.clone(),
        instance: id.clone(),
        gpus,
        host: claim.host.clone(),
        port,
    });
    if let Some(job) = granted.job.as_ref().and_then(|id| state.jobs.get_mut(id)) {
        job.instance = Some(id.clone());
        job.hotkey = Some(granted.miner.clone());
        job.status = "pending".to_owned();
        out.record(Record::JobClaimed {
            job: job.id.clone(),
            instance: id.clone(),
        });
    }
    out.publish(Event::instance_created(&instance, &granted.gpu_model));
    state.instances.insert(id, instance);
    json!({
        "seed": granted.seed,
        "iterations": granted.iterations,
        "job_id": granted.job,
        "symmetric_key": {
            "ciphertext": STANDARD.encode(blob),
            "uuid": granted.device.uuid,
            "response_plaintext": plaintext,
        },
    })
}

#[derive(Debug, Deserialize)]
struct Response {
    response: String,
    iv: String,
    proof: BTreeMap<String, Value>,
}

/// `PUT /instances/launch_config/{config_id}`: the proof.
pub(crate) async fn verify(
    Shared(validator): Shared<Arc<Validator>>,
    Path(config): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Problem> {
    let outcome = try_verify(&validator, &config, &headers, &body).await;
    if let Err(problem) = &outcome {
        validator.record(Record::VerificationRefused {
            config,
            status: problem.status.as_u16(),
            reason: problem.reason(),
        });
    }
    outcome
}

async fn try_verify(
    validator: &Arc<Validator>,
    config: &str,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Json<Value>, Problem> {
    let config = checked_token(validator, headers, config)?;
    let response: Response = auth::json_body(headers, body)?;
    let arrived = clock::now();
    let (instance, device, iterations) = validator.read(|state, _| {
        let instance = claimed_instance(state, &config)?;
        if instance.verified_at.is_some() {
            return Err(Problem::bad_request("Instance has already been verified"));
        }
        let pick = usize::from(random_bytes::<1>()[0]) % instance.gpus.len();
        let node = state
            .nodes
            .get(&instance.gpus[pick])
            .ok_or_else(|| Problem::not_found("GPU is gone"))?;
        let iterations = validator
            .gpus
            .of_short_ref(&node.gpu_identifier)
            .map_or(1, |accepted| accepted.iterations);
        Ok((instance.clone(), node.device.clone(), iterations))
    })?;
    let late = instance.deadline_at.is_some_and(|deadline| arrived >= deadline);
    let checked = if late {
        Err("the answer came too late".to_owned())
    } else {
        let instance = instance.clone();
        compute::away(move || check_response(&instance, &device, iterations, &response)).await
    };
    if let Err(reason) = checked {
        validator.change(|state, out| {
            instances::end(state, out, &instance.id, DeletedBy::Validator, &reason, true);
        });
        return Err(Problem::forbidden(reason));
    }
    if instance.job.is_some()
        && let Err(reason) = jobs::test_ports(&instance).await
    {
        // The real one announces the deletion here and keeps the row.
        validator.change(|_, out| {
            out.untouched();
            out.publish(Event::instance_deleted(&instance, &reason));
        });
        return Err(Problem::forbidden(reason));
    }
    validator.change(|state, out| {
        let answer = accept_proof(validator, state, out, &config);
        if answer.is_err() {
            out.untouched();
        }
        answer.map(Json)
    })
}

fn accept_proof(
    validator: &Validator,
    state: &mut State,
    out: &mut Out,
    config: &ConfigId,
) -> Result<Value, Problem> {
    let id = claimed_instance(state, config)?.id.clone();
    let instance = state
        .instances
        .get_mut(&id)
        .ok_or_else(|| Problem::not_found("Instance is gone"))?;
    if instance.verified_at.is_some() {
        return Err(Problem::bad_request("Instance has already been verified"));
    }
    instance.verified_at = Some(out.now);
    out.record(Record::InstanceVerified {
        instance: instance.id.clone(),
        chute: instance.chute.clone(),
    });
    out.publish(Event::instance_verified(instance));
    let mut answer = json!({
        "chute_id": instance.chute,
        "instance_id": instance.id,
        "verified_at": out.now.iso8601(),
        "activation_url": format!("{}/instances/launch_config/{config}/activate", validator.api_url),
    });
    if let Some(job) = instance.job.as_ref().and_then(|id| state.jobs.get(id)) {
        let token = validator.tokens.sign(&json!({
            "sub": job.id, "iat": out.now.unix_seconds(), "iss": "chutes",
        }));
        answer["job_id"] = json!(job.id);
        answer["job_method"] = json!(job.method);
        answer["job_data"] = json!({"_disk_gb": job.disk_gb, "work_ms": job.work_ms});
        answer["job_status_url"] = json!(format!("{}/jobs/{}?token={token}", validator.api_url, job.id));
    }
    Ok(answer)
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

fn check_response(
    instance: &Instance,
    device: &DeviceInfo,
    iterations: u32,
    response: &Response,
) -> Result<(), String> {
    let key = cipher::block_from_hex(&instance.symmetric_key).ok_or("no symmetric key")?;
    let iv = cipher::block_from_hex(&response.iv).ok_or("iv is not 32 hexadecimal digits")?;
    let sealed = STANDARD
        .decode(&response.response)
        .map_err(|_| "response is not base64".to_owned())?;
    let plaintext = cipher::decrypt(&key, &iv, &sealed).ok_or("response cannot be decrypted")?;
    if plaintext != instance.response_plaintext.as_bytes() {
        return Err("wrong plaintext in the response".to_owned());
    }
    let shown = response
        .proof
        .get(device.uuid.as_str())
        .ok_or_else(|| format!("no proof for GPU {}", device.uuid))?;
    let work = shown.get("work_product").unwrap_or(shown);
    let work: WorkProduct =
        serde_json::from_value(work.clone()).map_err(|error| format!("malformed proof: {error}"))?;
    if verification::check_work(device, instance.seed, iterations, &work) {
        Ok(())
    } else {
        Err(format!("wrong proof for GPU {}", device.uuid))
    }
}

/// `GET /instances/launch_config/{config_id}/activate`.
pub(crate) async fn activate(
    Shared(validator): Shared<Arc<Validator>>,
    Path(config): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, Problem> {
    let outcome = checked_token(&validator, &headers, &config).and_then(|id| {
        validator.change(|state, out| {
            let outcome = try_activate(&validator, state, out, &id);
            if outcome.is_err() {
                out.untouched();
            }
            outcome
        })
    });
    if let Err(problem) = &outcome {
        validator.record(Record::ActivationRefused {
            config,
            status: problem.status.as_u16(),
            reason: problem.reason(),
        });
    }
    outcome.map(|()| Json(json!({"ok": true})))
}

fn try_activate(
    validator: &Validator,
    state: &mut State,
    out: &mut Out,
    config: &ConfigId,
) -> Result<(), Problem> {
    let instance = claimed_instance(state, config)?.clone();
    if instance.verified_at.is_none() {
        return Err(Problem::forbidden("Instance is not verified"));
    }
    if instance.active() {
        out.untouched();
        return Ok(());
    }
    if let Some(chute) = state.chutes.get(&instance.chute)
        && !chute.spec.public
        && instance.job.is_none()
    {
        let active = state.instances_of(&chute.id).filter(|i| i.serving()).count();
        if active >= target(validator, chute) as usize {
            // Announced although the row stays, as in the real one.
            let problem = Problem::locked("private chute filled up meanwhile");
            out.publish(Event::instance_deleted(&instance, &problem.reason()));
            return Err(problem);
        }
    }
    set_active(validator, state, out, &instance.id);
    Ok(())
}

/// Makes an instance active; the first one takes an open bounty.
pub(crate) fn set_active(validator: &Validator, state: &mut State, out: &mut Out, id: &InstanceId) {
    let Some(instance) = state.instances.get_mut(id) else {
        return;
    };
    let bounty = if instance.job.is_none() {
        state.bounties.remove(&instance.chute)
    } else {
        None
    };
    instance.activated_at = Some(out.now);
    if let Some(bounty) = &bounty {
        let age_ms = out.now.since(bounty.created_at);
        instance.multiplier *= validator.scenario.pay.bounty_boost(age_ms);
    }
    if let Some(chute) = state.chutes.get(&instance.chute)
        && (!chute.spec.public && instance.job.is_none())
    {
        instance.stop_billing_at = Some(out.now + chute.spec.shutdown_after_seconds * 1000);
    }
    if let Some(job) = instance.job.as_ref().and_then(|id| state.jobs.get_mut(id)) {
        job.started_at = Some(out.now);
        job.status = "running".to_owned();
    }
    out.record(Record::InstanceActivated {
        instance: instance.id.clone(),
        chute: instance.chute.clone(),
        bounty: bounty.map(|bounty| bounty.amount(out.now)),
    });
    if instance.config.is_some() {
        out.publish(Event::instance_activated(instance));
    }
}

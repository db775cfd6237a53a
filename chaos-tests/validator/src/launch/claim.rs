//! The claim: a container says who it is and on which GPUs, once for each launch config. All checks are made
//! twice, before and after the arithmetic that seals its key.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, Path, State as Shared};
use axum::http::HeaderMap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proof::Profile;
use protocol::gpu::DeviceInfo;
use protocol::hotkey::Hotkey;
use protocol::id::{ConfigId, GpuId, InstanceId, JobId};
use protocol::signing::body_hash;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth;
use crate::compute;
use crate::event::Event;
use crate::identity::{random_bytes, random_uuid};
use crate::ledger::Record;
use crate::problem::Problem;
use crate::state::{Chute, Instance, PortMapping, State};
use crate::validator::{Out, Validator};
use crate::verification;

use crate::launch::{check_capacity, check_free_address, check_gpus, checked_token};

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

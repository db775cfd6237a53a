//! After the claim: the container shows its proof in time, then that its app has started.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State as Shared};
use axum::http::HeaderMap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proof::WorkProduct;
use protocol::gpu::DeviceInfo;
use protocol::id::{ConfigId, InstanceId};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth;
use crate::cipher;
use crate::clock;
use crate::compute;
use crate::event::Event;
use crate::identity::random_bytes;
use crate::instances;
use crate::jobs;
use crate::ledger::{DeletedBy, Record};
use crate::problem::Problem;
use crate::state::{Instance, State};
use crate::validator::{Out, Validator};
use crate::verification;

use crate::launch::{checked_token, claimed_instance, target};

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

//! Instances after their launch: deletion by whoever, their pay, and the legacy flow without launch configs
//! (`validator-protocol`, sections 3.4 and 6.6).

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State as Shared};
use axum::http::{HeaderMap, StatusCode};
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, GpuId, InstanceId};
use protocol::signing::{Purpose, Tail};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth;
use crate::event::Event;
use crate::identity::random_uuid;
use crate::launch;
use crate::ledger::{DeletedBy, Record};
use crate::nodes;
use crate::pay::{self, Life};
use crate::problem::Problem;
use crate::rows;
use crate::state::{Ended, Instance, State};
use crate::validator::{Out, Validator};
use crate::verification;

/// Activations of one legacy instance in 600 s.
const LEGACY_ATTEMPTS_MAX: usize = 5;

/// Ends an instance. `announce`: its miner is told; cascades and finished jobs are not announced.
pub(crate) fn end(
    state: &mut State,
    out: &mut Out,
    id: &InstanceId,
    by: DeletedBy,
    reason: &str,
    announce: bool,
) -> Option<Instance> {
    let instance = state.instances.remove(id)?;
    if let Some(job) = instance.job.as_ref().and_then(|id| state.jobs.get_mut(id))
        && job.finished_at.is_none()
    {
        job.finished_at = Some(out.now);
        job.status = "error".to_owned();
        job.error_detail = Some(reason.to_owned());
        job.miner_terminated = by == DeletedBy::Miner;
        out.record(Record::JobFinished {
            job: job.id.clone(),
            status: "error".to_owned(),
        });
    }
    let stale = state.chutes.get(&instance.chute).is_none_or(|chute| {
        chute.version != instance.version || chute.chutes_version != instance.chutes_version
    });
    let valid = matches!(by, DeletedBy::Validator | DeletedBy::JobDone | DeletedBy::Cascade) || stale;
    state.ended.push(Ended {
        instance: instance.id.clone(),
        chute: instance.chute.clone(),
        hotkey: instance.hotkey.clone(),
        verified: instance.verified_at.is_some(),
        life: instance.life(Some(out.now), valid),
    });
    out.record(Record::InstanceDeleted {
        instance: instance.id.clone(),
        chute: instance.chute.clone(),
        by,
        reason: reason.to_owned(),
    });
    if announce {
        out.publish(Event::instance_deleted(&instance, reason));
    }
    Some(instance)
}

/// Lives of all instances that there were, with owner and chute.
pub(crate) fn lives(state: &State) -> Vec<(Hotkey, ChuteId, Life)> {
    let ended = state
        .ended
        .iter()
        .map(|ended| (ended.hotkey.clone(), ended.chute.clone(), ended.life.clone()));
    let living = state
        .instances
        .values()
        .map(|i| (i.hotkey.clone(), i.chute.clone(), i.life(i.stop_billing_at, true)));
    ended.chain(living).collect()
}

/// Score of each registered hotkey.
pub(crate) fn scores(validator: &Validator) -> BTreeMap<Hotkey, f64> {
    validator.read(|state, now| {
        let mut sums: BTreeMap<Hotkey, f64> = state.hotkeys.iter().map(|h| (h.clone(), 0.0)).collect();
        for (hotkey, _, life) in lives(state) {
            if let Some(sum) = sums.get_mut(&hotkey) {
                *sum += pay::score(&life, &validator.scenario.pay, now);
            }
        }
        sums
    })
}

/// `DELETE /instances/{chute_id}/{instance_id}`.
pub(crate) async fn delete(
    Shared(validator): Shared<Arc<Validator>>,
    Path((chute, instance)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Problem> {
    let miner = auth::miner_for(&validator, &headers, Purpose::Instances)?;
    validator.change(|state, out| {
        let id = InstanceId::parse(&instance).ok().filter(|id| {
            state
                .instances
                .get(id)
                .is_some_and(|i| i.hotkey == miner && i.chute.as_str() == chute)
        });
        let Some(id) = id else {
            out.untouched();
            return Err(Problem::not_found(format!("Instance {instance} not found")));
        };
        end(state, out, &id, DeletedBy::Miner, "deleted by its miner", true);
        Ok(Json(json!({"instance_id": id, "deleted": true})))
    })
}

#[derive(Debug, Deserialize)]
struct LegacyAnnouncement {
    node_ids: Vec<GpuId>,
    host: String,
    port: u16,
}

/// `POST /instances/{chute_id}/`, legacy: the miner announces what it has started.
pub(crate) async fn announce_legacy(
    Shared(validator): Shared<Arc<Validator>>,
    Path(chute): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), Problem> {
    if !validator.scenario.gates.legacy {
        return Err(Problem::not_found("Not Found"));
    }
    let miner = auth::miner(&validator, &headers, &Tail::Body(&body))?;
    auth::not_blacklisted(&validator, &miner)?;
    let announced: LegacyAnnouncement = auth::json_body(&headers, &body)?;
    nodes::check_public(&announced.host, validator.scenario.relaxed.loopback_hosts).await?;
    let row = validator.change(|state, out| {
        let row = add_legacy(&validator, state, out, &miner, &chute, &announced);
        if row.is_err() {
            out.untouched();
        }
        row
    })?;
    Ok((StatusCode::ACCEPTED, Json(row)))
}

fn add_legacy(
    validator: &Validator,
    state: &mut State,
    out: &mut Out,
    miner: &Hotkey,
    chute: &str,
    announced: &LegacyAnnouncement,
) -> Result<Value, Problem> {
    let chute = ChuteId::parse(chute)
        .ok()
        .and_then(|id| state.chutes.get(&id))
        .ok_or_else(|| Problem::not_found(format!("Chute {chute} not found")))?;
    if !chute.is_legacy() {
        return Err(Problem::bad_request(
            "Chutes of version 0.3.0 and newer need a launch config",
        ));
    }
    launch::check_capacity(validator, state, chute, miner, false)?;
    let known = launch::check_gpus(
        validator,
        state,
        chute,
        miner,
        &announced.host,
        announced.node_ids.iter(),
    )?;
    if launch::check_free_address(state, &announced.host, announced.port).is_err() {
        return Err(Problem::conflict("Host and port are already in use"));
    }
    let multiplier = chute.compute_multiplier * f64::from(chute.spec.boost_milli) / 1000.0;
    let instance = Instance {
        id: InstanceId::parse(&random_uuid()).expect("a UUID is a valid id"),
        chute: chute.id.clone(),
        version: chute.version.clone(),
        image: chute.image.clone(),
        chutes_version: chute.chutes_version.clone(),
        hotkey: miner.clone(),
        host: announced.host.clone(),
        port: announced.port,
        gpus: announced.node_ids.clone(),
        config: None,
        job: None,
        created_at: out.now,
        deadline_at: None,
        verified_at: None,
        activated_at: None,
        stop_billing_at: None,
        seed: known.first().map_or(0, |node| node.seed),
        symmetric_key: String::new(),
        response_plaintext: String::new(),
        port_mappings: vec![],
        multiplier,
        target_multiplier: multiplier,
        hourly_rate: 0.0,
        public: chute.spec.public,
        verification_error: None,
        legacy_attempts: vec![],
    };
    out.record(Record::LegacyAnnounced {
        hotkey: miner.clone(),
        chute: instance.chute.clone(),
        instance: instance.id.clone(),
        gpus: instance.gpus.clone(),
    });
    let row = rows::instance(&instance);
    state.instances.insert(instance.id.clone(), instance);
    Ok(row)
}

#[derive(Debug, Deserialize)]
struct LegacyActivation {
    active: bool,
}

/// `PATCH /instances/{chute_id}/{instance_id}`, legacy: active first, verified afterwards.
pub(crate) async fn activate_legacy(
    Shared(validator): Shared<Arc<Validator>>,
    Path((chute, instance)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Problem> {
    if !validator.scenario.gates.legacy {
        return Err(Problem::not_found("Not Found"));
    }
    let miner = auth::miner(&validator, &headers, &Tail::Body(&body))?;
    let asked: LegacyActivation = auth::json_body(&headers, &body)?;
    if !asked.active {
        return Err(Problem::bad_request("Only active=true can be set"));
    }
    let instance = validator.change(|state, out| {
        let found = InstanceId::parse(&instance)
            .ok()
            .and_then(|id| state.instances.get_mut(&id))
            .filter(|i| i.hotkey == miner && i.chute.as_str() == chute && i.config.is_none());
        let Some(found) = found else {
            out.untouched();
            return Err(Problem::not_found(format!("Instance {instance} not found")));
        };
        let now = out.now;
        found.legacy_attempts.retain(|at| now.since(*at) < 600_000);
        if found.legacy_attempts.len() >= LEGACY_ATTEMPTS_MAX {
            return Err(Problem::new(
                StatusCode::TOO_MANY_REQUESTS,
                "Too many activations in 600 s",
            ));
        }
        found.legacy_attempts.push(now);
        let id = found.id.clone();
        if !found.active() {
            launch::set_active(&validator, state, out, &id);
        }
        state
            .instances
            .get(&id)
            .cloned()
            .ok_or_else(|| Problem::not_found("Instance is gone"))
    })?;
    if instance.verified_at.is_none() {
        let (validator, instance) = (validator.clone(), instance.clone());
        tokio::spawn(async move { verify_legacy(&validator, &instance).await });
    }
    Ok(Json(rows::instance(&instance)))
}

/// The reduced check of a legacy chute: device challenges at its own port.
async fn verify_legacy(validator: &Arc<Validator>, instance: &Instance) {
    let devices: Vec<_> = validator.read(|state, _| {
        instance
            .gpus
            .iter()
            .filter_map(|gpu| state.nodes.get(gpu).map(|node| node.device.clone()))
            .collect()
    });
    let base_url = format!("http://{}:{}", instance.host, instance.port);
    let mut outcome = Ok(());
    for _ in 0..validator.scenario.timers.device_info_challenges {
        outcome = verification::chute_challenge(validator, &instance.hotkey, &base_url, &devices).await;
        if outcome.is_err() {
            break;
        }
    }
    validator.change(|state, out| {
        let Some(row) = state.instances.get_mut(&instance.id) else {
            out.untouched();
            return;
        };
        match outcome {
            Err(error) => row.verification_error = Some(error),
            Ok(()) if row.verified_at.is_some() => out.untouched(),
            Ok(()) => {
                row.verified_at = Some(out.now);
                row.verification_error = None;
                out.record(Record::InstanceVerified {
                    instance: row.id.clone(),
                    chute: row.chute.clone(),
                });
                out.publish(Event::instance_verified(row));
            }
        }
    });
}

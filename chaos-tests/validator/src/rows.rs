//! Records as the real API shows them (`validator-protocol`, sections 3.3 and 3.5). Pure.

use std::collections::BTreeSet;

use protocol::time::UnixMillis;
use serde_json::{Value, json};

use crate::gpu::GpuTable;
use crate::identity::uuid_of_name;
use crate::scenario::Demand;
use crate::state::{Chute, Image, Instance, Job, Node, State};

fn time(at: Option<UnixMillis>) -> Value {
    at.map_or(Value::Null, |at| json!(at.iso8601()))
}

fn user(username: &str) -> String {
    uuid_of_name(&format!("user::{username}"))
}

/// A chute, with the members that newer miners read.
pub(crate) fn chute(
    chute: &Chute,
    state: &State,
    bounty_boost: impl Fn(u64) -> f64,
    now: UnixMillis,
) -> Value {
    let spec = &chute.spec;
    let reference = state.images.get(&chute.image).map(Image::reference);
    let cords: Vec<Value> = spec
        .cords
        .iter()
        .map(|name| {
            json!({
                "method": "POST", "path": format!("/{name}"), "function": name, "stream": false,
                "passthrough": false, "public_api_path": format!("/{name}"), "public_api_method": "POST",
                "input_schema": null, "output_schema": null, "output_content_type": "application/json",
                "minimal_input_schema": null,
            })
        })
        .collect();
    let boost = f64::from(spec.boost_milli) / 1000.0;
    let bounty = state
        .bounties
        .get(&chute.id)
        .map_or(1.0, |bounty| bounty_boost(now.since(bounty.created_at)));
    let list = |names: &[String]| {
        if names.is_empty() {
            Value::Null
        } else {
            json!(names)
        }
    };
    json!({
        "chute_id": chute.id,
        "user_id": user(&spec.username),
        "name": spec.name,
        "tagline": "",
        "readme": "",
        "tool_description": null,
        "image_id": chute.image,
        "logo_id": null,
        "public": spec.public,
        "standard_template": null,
        "cords": cords,
        "jobs": spec.jobs,
        "node_selector": {
            "gpu_count": spec.gpu_count,
            "min_vram_gb_per_gpu": spec.min_vram_gb_per_gpu,
            "include": list(&spec.include),
            "exclude": list(&spec.exclude),
            "compute_multiplier": chute.compute_multiplier,
            "supported_gpus": chute.supported_gpus,
        },
        "slug": format!("{}-{}", spec.username, spec.name),
        "code": chute.code,
        "filename": spec.filename,
        "ref_str": spec.ref_str,
        "version": chute.version,
        "concurrency": spec.concurrency,
        "boost": boost,
        "chutes_version": chute.chutes_version,
        "revision": null,
        "openrouter": false,
        "discount": 0.0,
        "created_at": time(Some(chute.created_at)),
        "updated_at": time(Some(chute.updated_at)),
        "logging_enabled": false,
        "max_instances": null,
        "scaling_threshold": null,
        "shutdown_after_seconds": spec.shutdown_after_seconds,
        "invocation_count": 0,
        "image": reference,
        "supported_gpus": chute.supported_gpus.iter().collect::<BTreeSet<_>>(),
        "preemptible": spec.public,
        "tee": spec.tee,
        "allow_external_egress": spec.allow_external_egress,
        "effective_compute_multiplier": chute.compute_multiplier * boost * bounty,
    })
}

pub(crate) fn image(image: &Image) -> Value {
    json!({
        "image_id": image.id,
        "user_id": user(&image.username),
        "name": image.name,
        "tag": image.tag,
        "readme": "",
        "logo_id": null,
        "public": true,
        "status": "built and pushed",
        "created_at": time(Some(image.created_at)),
        "chutes_version": image.chutes_version,
        "patch_version": image.patch_version,
        "build_started_at": time(Some(image.created_at)),
        "build_completed_at": time(Some(image.created_at)),
        "username": image.username,
    })
}

pub(crate) fn node(node: &Node, gpus: &GpuTable) -> Value {
    let sxm = node.gpu_identifier.ends_with("_sxm");
    let known = gpus.of_short_ref(&node.gpu_identifier).is_some();
    json!({
        "uuid": node.device.uuid,
        "name": node.device.name,
        "memory": node.device.memory,
        "major": null,
        "minor": null,
        "processors": node.device.processors,
        "sxm": known.then_some(sxm),
        "clock_rate": node.device.clock_rate_khz as f64,
        "max_threads_per_processor": node.device.max_threads_per_processor,
        "concurrent_kernels": true,
        "ecc": null,
        "seed": node.seed,
        "miner_hotkey": node.hotkey,
        "gpu_identifier": node.gpu_identifier,
        "device_index": node.device_index,
        "server_id": node.server_id,
        "created_at": time(Some(node.created_at)),
        "verification_host": node.verification_host,
        "verification_port": node.verification_port,
        "verification_error": node.verification_error,
        "verified_at": time(node.verified_at),
    })
}

pub(crate) fn instance(instance: &Instance) -> Value {
    let mappings: Vec<Value> = instance.port_mappings.iter().map(|m| json!(m)).collect();
    json!({
        "instance_id": instance.id,
        "host": instance.host,
        "port": instance.port,
        "chute_id": instance.chute,
        "version": instance.version,
        "miner_uid": 0,
        "miner_hotkey": instance.hotkey,
        "miner_coldkey": instance.hotkey,
        "region": "n/a",
        "active": instance.active(),
        "verified": instance.verified_at.is_some(),
        "last_queried_at": null,
        "created_at": time(Some(instance.created_at)),
        "updated_at": time(Some(instance.created_at)),
        "activated_at": time(instance.activated_at),
        "last_verified_at": time(instance.verified_at),
        "stop_billing_at": time(instance.stop_billing_at),
        "billed_to": null,
        "verification_error": instance.verification_error,
        "consecutive_failures": 0,
        "chutes_version": instance.chutes_version,
        "symmetric_key": instance.symmetric_key,
        "config_id": instance.config,
        "cacert": null,
        "port_mappings": if mappings.is_empty() { Value::Null } else { json!(mappings) },
        "hourly_rate": instance.hourly_rate,
        "compute_multiplier": instance.multiplier,
    })
}

pub(crate) fn job(job: &Job) -> Value {
    json!({
        "job_id": job.id,
        "user_id": user("customer"),
        "chute_id": job.chute,
        "version": job.version,
        "chutes_version": null,
        "method": job.method,
        "miner_uid": null,
        "miner_hotkey": job.hotkey,
        "miner_coldkey": null,
        "instance_id": job.instance,
        "active": job.started_at.is_some() && job.finished_at.is_none(),
        "verified": job.finished_at.is_some(),
        "last_queried_at": null,
        "created_at": time(Some(job.created_at)),
        "updated_at": time(Some(job.created_at)),
        "started_at": time(job.started_at),
        "finished_at": time(job.finished_at),
        "job_args": {"_disk_gb": job.disk_gb, "work_ms": job.work_ms},
        "status": job.status,
        "result": job.result,
        "error_detail": job.error_detail,
        "output_files": job.output_files,
        "miner_terminated": job.miner_terminated,
        "port_mappings": null,
        "miner_history": job.tried_by,
        "compute_multiplier": job.compute_multiplier,
    })
}

/// Demand of the last hour, for chutes that have any.
pub(crate) fn metric(chute: &Chute, demand: &Demand, instances: usize, now: UnixMillis) -> Value {
    json!({
        "chute_id": chute.id,
        "start_date": time(Some(now - 3_600_000)),
        "end_date": time(Some(now)),
        "compute_multiplier": chute.compute_multiplier,
        "total_invocations": demand.requests_per_hour,
        "total_compute_time": demand.compute_seconds_per_hour,
        "error_count": 0,
        "rate_limit_count": (demand.requests_per_hour as f64 * demand.rate_limit_ratio).round(),
        "instance_count": instances,
        "per_second_price_usd": chute.compute_multiplier / 3600.0,
        "total_usage_usd": chute.compute_multiplier / 3600.0 * demand.compute_seconds_per_hour,
    })
}

/// A scaling hint.
pub(crate) fn utilization(chute: &Chute, state: &State, target: u32, now: UnixMillis) -> Value {
    let quiet = Demand {
        utilization: 0.0,
        requests_per_hour: 0,
        compute_seconds_per_hour: 0.0,
        ..Demand::default()
    };
    let demand = chute.demand.as_ref().unwrap_or(&quiet);
    let total = state.instances_of(&chute.id).count();
    let active = state.instances_of(&chute.id).filter(|i| i.serving()).count();
    let allowance = (target as usize).saturating_sub(total);
    let mut row = json!({
        "chute_id": chute.id,
        "timestamp": time(Some(now)),
        "utilization_current": demand.utilization,
        "instance_count": total,
        "action_taken": "no_action",
        "target_count": target,
        "name": if chute.spec.public { chute.spec.name.as_str() } else { "[private chute]" },
        "update_in_progress": state.rolling_updates.contains_key(&chute.id),
        "total_instance_count": total,
        "active_instance_count": active,
        "scalable": allowance > 0,
        "scale_allowance": allowance,
        "avg_busy_ratio": demand.utilization,
        "total_invocations": demand.requests_per_hour,
        "total_rate_limit_errors": 0,
    });
    for (window, share) in [("5m", 12.0), ("15m", 4.0), ("1h", 1.0)] {
        let requests = demand.requests_per_hour as f64 / share;
        let limited = requests * demand.rate_limit_ratio;
        row[format!("utilization_{window}")] = json!(demand.utilization);
        row[format!("rate_limit_ratio_{window}")] = json!(demand.rate_limit_ratio);
        row[format!("total_requests_{window}")] = json!(requests.round());
        row[format!("completed_requests_{window}")] = json!((requests - limited).round());
        row[format!("rate_limited_requests_{window}")] = json!(limited.round());
    }
    row
}

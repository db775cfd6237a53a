//! What the validator does by itself: the scenario's steps, rolling updates, timers, and the same actions
//! at the request of the control interface.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, InstanceId, JobId};
use serde_json::{Value, json};

use crate::event::Event;
use crate::identity::{random_uuid, uuid_of_name};
use crate::instances;
use crate::ledger::{DeletedBy, Record};
use crate::problem::Problem;
use crate::scenario::{Action, ChuteSpec, Step};
use crate::state::{Bounty, Chute, Image, Instance, Job, RollingUpdate, State};
use crate::validator::{Out, Validator};

const TICK: Duration = Duration::from_millis(100);
/// Pauses between the notices of a rolling update add up to this.
const ROLLING_UPDATE_MS: u64 = 2_700_000;
const ROLLING_UPDATE_SPACING_MS_MAX: u64 = 300_000;

/// Runs until shutdown.
pub(crate) async fn run(validator: Arc<Validator>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut dropped_at = tokio::time::Instant::now();
    loop {
        tokio::select! {
            () = validator.shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        tick(&validator);
        let every = validator.planted().faults.drop_sockets_every_ms;
        if every.is_some_and(|ms| dropped_at.elapsed() >= Duration::from_millis(ms)) {
            validator.hub.drop_all(crate::scenario::DropHow::Abrupt);
            dropped_at = tokio::time::Instant::now();
        }
    }
}

fn tick(validator: &Arc<Validator>) {
    let due: Vec<usize> = validator.read(|state, now| {
        let elapsed = now.since(state.started_at);
        let steps = validator.scenario.program.iter().enumerate();
        steps
            .filter(|(number, step)| !state.steps_done.contains(number) && is_due(step, state, elapsed))
            .map(|(number, _)| number)
            .collect()
    });
    for number in due {
        let action = validator.scenario.program[number].action.clone();
        if let Err(problem) = perform(validator, action, Some(number)) {
            tracing::warn!(
                step = number,
                reason = problem.reason(),
                "step of the scenario failed"
            );
        }
    }
    let rolling = validator.read(|state, now| state.rolling_updates.values().any(|u| u.next_at <= now));
    if rolling {
        validator.change(|state, out| advance_rolling_updates(validator, state, out));
    }
    let cleanup_ms = validator.scenario.timers.cleanup_ms;
    if validator
        .read(|state, now| now.since(state.cleaned_at) >= cleanup_ms && has_overdue(validator, state, now))
    {
        validator.change(|state, out| clean(validator, state, out));
    }
}

fn is_due(step: &Step, state: &State, elapsed_ms: u64) -> bool {
    let condition = step.when_active.as_deref().is_none_or(|name| {
        state
            .chute_called(name)
            .is_some_and(|chute| state.instances_of(&chute.id).any(Instance::serving))
    });
    elapsed_ms >= step.at_ms && condition
}

/// Does one thing. `step`: its number in the program, marked as done with it.
pub(crate) fn perform(
    validator: &Arc<Validator>,
    action: Action,
    step: Option<usize>,
) -> Result<Value, Problem> {
    match &action {
        Action::SetFaults { faults } => validator.planted().faults = faults.clone(),
        Action::AddHttpFault { fault } => validator.planted().faults.http.push(fault.clone()),
        Action::AddEventFault { fault } => validator.planted().faults.events.push(fault.clone()),
        Action::DropSockets { how } => {
            validator.hub.drop_all(*how);
        }
        _ => {}
    }
    validator.change(|state, out| {
        if let Some(step) = step {
            state.steps_done.insert(step);
        }
        apply(validator, state, out, action)
    })
}

fn apply(validator: &Validator, state: &mut State, out: &mut Out, action: Action) -> Result<Value, Problem> {
    match action {
        Action::PublishChute(spec) => publish(validator, state, out, *spec),
        Action::UpdateChute { chute, code } => update(validator, state, out, &chute, code),
        Action::DeleteChute { chute } => delete_chute(state, out, &chute),
        Action::PatchImage {
            image,
            patch_version,
            chutes_version,
        } => patch_image(validator, state, out, &image, patch_version, chutes_version),
        Action::DeleteImage { image } => {
            let id = image_called(state, &image)?.id.clone();
            if let Some(image) = state.images.remove(&id) {
                out.publish(Event::image_deleted(&image));
            }
            Ok(Value::Null)
        }
        Action::OfferBounty { chute, amount } => {
            let chute = chute_called(state, &chute)?;
            let bounty = Bounty {
                fixed: amount,
                created_at: out.now,
            };
            out.record(Record::BountyOpened {
                chute: chute.id.clone(),
            });
            if !state.rolling_updates.contains_key(&chute.id) {
                out.publish(Event::bounty_change(&chute, bounty.amount(out.now)));
            }
            state.bounties.insert(chute.id, bounty);
            Ok(Value::Null)
        }
        Action::OfferJob {
            chute,
            method,
            work_ms,
            disk_gb,
        } => offer_job(state, out, &chute, method, work_ms, disk_gb),
        Action::DeleteJob { job_id } => delete_job(state, out, &job_id),
        Action::SetDemand { chute, demand } => {
            let id = chute_called(state, &chute)?.id;
            if let Some(chute) = state.chutes.get_mut(&id) {
                chute.demand = Some(demand);
            }
            Ok(Value::Null)
        }
        Action::DeleteInstance { instance_id, message } => {
            let message = message.unwrap_or_else(|| "deleted by the validator".to_owned());
            let ended = InstanceId::parse(&instance_id)
                .ok()
                .and_then(|id| instances::end(state, out, &id, DeletedBy::Validator, &message, true));
            ended
                .map(|instance| json!({"instance_id": instance.id}))
                .ok_or_else(|| Problem::not_found(format!("Instance {instance_id} not found")))
        }
        Action::DeleteInstancesOf { chute } => {
            let id = chute_called(state, &chute)?.id;
            let ids: Vec<InstanceId> = state.instances_of(&id).map(|i| i.id.clone()).collect();
            for id in &ids {
                instances::end(state, out, id, DeletedBy::Validator, "scaled down", true);
            }
            Ok(json!({"instance_ids": ids}))
        }
        Action::RegisterHotkey { hotkey } => {
            state.hotkeys.insert(hotkey);
            Ok(Value::Null)
        }
        Action::DeregisterHotkey { hotkey } => {
            deregister(state, out, &hotkey);
            Ok(Value::Null)
        }
        Action::SetFaults { .. }
        | Action::AddHttpFault { .. }
        | Action::AddEventFault { .. }
        | Action::DropSockets { .. } => Ok(Value::Null),
    }
}

fn chute_called(state: &State, name: &str) -> Result<Chute, Problem> {
    state
        .chute_called(name)
        .cloned()
        .ok_or_else(|| Problem::not_found(format!("Chute {name} not found")))
}

fn image_called<'a>(state: &'a State, name: &str) -> Result<&'a Image, Problem> {
    state
        .images
        .values()
        .find(|image| image.id == name || format!("{}/{}:{}", image.username, image.name, image.tag) == name)
        .ok_or_else(|| Problem::not_found(format!("Image {name} not found")))
}

fn publish(
    validator: &Validator,
    state: &mut State,
    out: &mut Out,
    spec: ChuteSpec,
) -> Result<Value, Problem> {
    let (name, tag) = spec
        .image
        .split_once(':')
        .ok_or_else(|| Problem::bad_request("image must be name:tag"))?;
    let image_id = uuid_of_name(&format!("{}::image::{}", spec.username, spec.image));
    if !state.images.contains_key(&image_id) {
        let image = Image {
            id: image_id.clone(),
            username: spec.username.clone(),
            name: name.to_owned(),
            tag: tag.to_owned(),
            patch_version: "initial".to_owned(),
            chutes_version: spec.chutes_version.clone(),
            created_at: out.now,
        };
        out.publish(Event::image_created(&image));
        state.images.insert(image_id.clone(), image);
    }
    let id = uuid_of_name(&format!("{}::chute::{}", spec.username, spec.name));
    let id = ChuteId::parse(&id).expect("a UUID is a valid id");
    if state.chutes.contains_key(&id) {
        return Err(Problem::conflict(format!("Chute {} exists", spec.name)));
    }
    let code = spec
        .code
        .clone()
        .unwrap_or_else(|| generated_code(validator, &spec));
    let supported = validator
        .gpus
        .supported(&spec.include, &spec.exclude, spec.min_vram_gb_per_gpu);
    let chute = Chute {
        version: Chute::version_of(&image_id, &code),
        compute_multiplier: validator.gpus.compute_multiplier(&supported, spec.gpu_count),
        supported_gpus: supported,
        chutes_version: spec.chutes_version.clone(),
        demand: spec.demand.clone(),
        created_at: out.now,
        updated_at: out.now,
        image: image_id,
        id: id.clone(),
        code,
        spec,
    };
    out.publish(Event::chute_created(&chute));
    let row = json!({"chute_id": chute.id, "version": chute.version});
    state.chutes.insert(id, chute);
    Ok(row)
}

/// A program that says which sites it will try, in the line that the chute stand-in reads.
fn generated_code(validator: &Validator, spec: &ChuteSpec) -> String {
    let address =
        |names: &[String]| -> Vec<String> { names.iter().map(|name| format!("https://{name}")).collect() };
    let egress = &validator.scenario.egress;
    let probes = json!({"allowed": address(&egress.allowed), "forbidden": address(&egress.forbidden)});
    format!(
        "from chutes.chute import Chute\n\n# egress: {probes}\nchute = Chute(username=\"{}\", name=\"{}\")\n",
        spec.username, spec.name
    )
}

fn update(
    validator: &Validator,
    state: &mut State,
    out: &mut Out,
    name: &str,
    code: Option<String>,
) -> Result<Value, Problem> {
    let old = chute_called(state, name)?;
    let code = code.unwrap_or_else(|| format!("{}# updated {}\n", old.code, out.now));
    let version = Chute::version_of(&old.image, &code);
    let updated = Chute {
        version: version.clone(),
        code,
        updated_at: out.now,
        ..old.clone()
    };
    out.publish(Event::chute_updated(&updated));
    state.chutes.insert(old.id.clone(), updated);
    start_rolling_update(validator, state, out, &old.id, &old.version, "code change");
    Ok(json!({"chute_id": old.id, "version": version}))
}

fn patch_image(
    validator: &Validator,
    state: &mut State,
    out: &mut Out,
    name: &str,
    patch_version: String,
    chutes_version: String,
) -> Result<Value, Problem> {
    let id = image_called(state, name)?.id.clone();
    let Some(image) = state.images.get_mut(&id) else {
        return Err(Problem::not_found("Image not found"));
    };
    image.patch_version = patch_version;
    image.chutes_version = Some(chutes_version.clone());
    let image = image.clone();
    for chute in state.chutes.values_mut().filter(|chute| chute.image == id) {
        chute.chutes_version = Some(chutes_version.clone());
        chute.updated_at = out.now;
    }
    let chutes: Vec<Chute> = state
        .chutes
        .values()
        .filter(|chute| chute.image == id)
        .cloned()
        .collect();
    out.publish(Event::image_updated(&image, &chutes.iter().collect::<Vec<_>>()));
    let why = format!("chutes library upgraded to {chutes_version}");
    for chute in &chutes {
        start_rolling_update(validator, state, out, &chute.id, &chute.version, &why);
    }
    Ok(json!({"image": image.reference()}))
}

fn start_rolling_update(
    validator: &Validator,
    state: &mut State,
    out: &mut Out,
    chute: &ChuteId,
    old_version: &str,
    why: &str,
) {
    let Some(new_version) = state.chutes.get(chute).map(|chute| chute.version.clone()) else {
        return;
    };
    let mut permitted: BTreeMap<Hotkey, u32> = BTreeMap::new();
    let mut to_tell = vec![];
    for instance in state
        .instances_of(chute)
        .filter(|instance| instance.job.is_none())
    {
        *permitted.entry(instance.hotkey.clone()).or_default() += 1;
        to_tell.push(instance.id.clone());
    }
    if to_tell.is_empty() {
        return;
    }
    let count = u64::try_from(to_tell.len()).unwrap_or(u64::MAX);
    let by_rule = (ROLLING_UPDATE_MS / count).clamp(1_000, ROLLING_UPDATE_SPACING_MS_MAX);
    let update = RollingUpdate {
        old_version: old_version.to_owned(),
        new_version,
        why: why.to_owned(),
        started_at: out.now,
        permitted,
        stale: to_tell.clone(),
        to_tell,
        next_at: out.now,
        spacing_ms: validator
            .scenario
            .timers
            .rolling_update_spacing_ms
            .unwrap_or(by_rule),
    };
    state.rolling_updates.insert(chute.clone(), update);
}

fn advance_rolling_updates(validator: &Validator, state: &mut State, out: &mut Out) {
    let max_ms = validator.scenario.timers.rolling_update_seconds_max * 1000;
    let due: Vec<ChuteId> = state
        .rolling_updates
        .iter()
        .filter(|(_, update)| update.next_at <= out.now)
        .map(|(chute, _)| chute.clone())
        .collect();
    for chute in due {
        let Some(update) = state.rolling_updates.get_mut(&chute) else {
            continue;
        };
        let over = out.now.since(update.started_at) >= max_ms;
        if !update.to_tell.is_empty() && !over {
            let id = update.to_tell.remove(0);
            update.next_at = out.now + update.spacing_ms;
            let (old, new, why) = (&update.old_version, &update.new_version, &update.why);
            if let Some(instance) = state.instances.get(&id) {
                out.publish(Event::rolling_update(instance, old, new, why));
            }
            continue;
        }
        if let Some(update) = state.rolling_updates.remove(&chute) {
            for id in update.stale {
                instances::end(state, out, &id, DeletedBy::Validator, "stale version", true);
            }
        }
    }
}

fn delete_chute(state: &mut State, out: &mut Out, name: &str) -> Result<Value, Problem> {
    let chute = chute_called(state, name)?;
    let ids: Vec<InstanceId> = state.instances_of(&chute.id).map(|i| i.id.clone()).collect();
    for id in &ids {
        instances::end(state, out, id, DeletedBy::Cascade, "its chute was deleted", false);
    }
    state.chutes.remove(&chute.id);
    state.bounties.remove(&chute.id);
    state.rolling_updates.remove(&chute.id);
    state.jobs.retain(|_, job| job.chute != chute.id);
    out.publish(Event::chute_deleted(&chute));
    Ok(json!({"chute_id": chute.id}))
}

fn offer_job(
    state: &mut State,
    out: &mut Out,
    chute: &str,
    method: String,
    work_ms: u64,
    disk_gb: u32,
) -> Result<Value, Problem> {
    let chute = chute_called(state, chute)?;
    if !chute.spec.jobs.iter().any(|job| job.name == method) {
        return Err(Problem::bad_request(format!(
            "{} has no job {method}",
            chute.spec.name
        )));
    }
    let job = Job {
        id: JobId::parse(&random_uuid()).expect("a UUID is a valid id"),
        chute: chute.id.clone(),
        version: chute.version.clone(),
        compute_multiplier: chute.compute_multiplier,
        created_at: out.now,
        started_at: None,
        finished_at: None,
        instance: None,
        hotkey: None,
        tried_by: vec![],
        status: "pending".to_owned(),
        result: Value::Null,
        error_detail: None,
        output_files: vec![],
        miner_terminated: false,
        method,
        work_ms,
        disk_gb,
    };
    out.record(Record::JobOffered {
        job: job.id.clone(),
        chute: chute.id.clone(),
    });
    out.publish(Event::job_created(&job, &chute, false));
    let row = json!({"job_id": job.id});
    state.jobs.insert(job.id.clone(), job);
    Ok(row)
}

fn delete_job(state: &mut State, out: &mut Out, job: &str) -> Result<Value, Problem> {
    let removed = JobId::parse(job).ok().and_then(|id| state.jobs.remove(&id));
    let job = removed.ok_or_else(|| Problem::not_found(format!("Job {job} not found")))?;
    out.publish(Event::job_deleted(&job));
    if let Some(instance) = &job.instance {
        instances::end(
            state,
            out,
            instance,
            DeletedBy::Cascade,
            "its job was deleted",
            false,
        );
    }
    Ok(json!({"job_id": job.id}))
}

fn deregister(state: &mut State, out: &mut Out, hotkey: &Hotkey) {
    let ids: Vec<InstanceId> = state
        .instances
        .values()
        .filter(|instance| &instance.hotkey == hotkey)
        .map(|instance| instance.id.clone())
        .collect();
    for id in &ids {
        instances::end(
            state,
            out,
            id,
            DeletedBy::Cascade,
            "its miner was deregistered",
            false,
        );
    }
    state.nodes.retain(|_, node| &node.hotkey != hotkey);
    state.hotkeys.remove(hotkey);
}

/// Why an instance must go now, if it must (`validator-protocol`, section 6.8).
fn overdue(
    validator: &Validator,
    instance: &Instance,
    now: protocol::time::UnixMillis,
) -> Option<&'static str> {
    let timers = &validator.scenario.timers;
    let unverified = match instance.config {
        Some(_) => timers.unverified_seconds,
        None => timers.unverified_legacy_seconds,
    };
    if instance.stop_billing_at.is_some_and(|at| at <= now) {
        return Some("idle for longer than shutdown_after_seconds");
    }
    match instance.verified_at {
        None if now.since(instance.created_at) >= unverified * 1000 => Some("not verified in time"),
        Some(at) if !instance.active() && now.since(at) >= timers.inactive_seconds * 1000 => {
            Some("not activated in time")
        }
        _ => None,
    }
}

fn has_overdue(validator: &Validator, state: &State, now: protocol::time::UnixMillis) -> bool {
    let bounty_ms = validator.scenario.timers.bounty_seconds * 1000;
    state
        .instances
        .values()
        .any(|i| overdue(validator, i, now).is_some())
        || state
            .bounties
            .values()
            .any(|b| now.since(b.created_at) >= bounty_ms)
        || stale(state).next().is_some()
}

/// Instances of an old version without a rolling update.
fn stale(state: &State) -> impl Iterator<Item = &Instance> {
    state.instances.values().filter(|instance| {
        instance.job.is_none()
            && !state.rolling_updates.contains_key(&instance.chute)
            && state
                .chutes
                .get(&instance.chute)
                .is_some_and(|chute| chute.version != instance.version)
    })
}

fn clean(validator: &Validator, state: &mut State, out: &mut Out) {
    state.cleaned_at = out.now;
    let now = out.now;
    let mut ending: Vec<(InstanceId, &'static str)> = state
        .instances
        .values()
        .filter_map(|i| overdue(validator, i, now).map(|why| (i.id.clone(), why)))
        .collect();
    ending.extend(stale(state).map(|i| (i.id.clone(), "stale version")));
    for (id, why) in ending {
        instances::end(state, out, &id, DeletedBy::Validator, why, true);
    }
    let bounty_ms = validator.scenario.timers.bounty_seconds * 1000;
    state.bounties.retain(|_, b| now.since(b.created_at) < bounty_ms);
}

//! Safety properties that hold after every command. Tests check them after each; a running member may.

use std::collections::{BTreeMap, BTreeSet};

use super::deployment::Phase;
use super::effect::Subject;
use super::state::State;

/// Every property that does not hold, in words; empty if all is well.
#[must_use]
pub fn violations(state: &State) -> Vec<String> {
    let mut found = Vec::new();
    gpus_have_one_holder(state, &mut found);
    names_are_used_once(state, &mut found);
    phases_fit_their_facts(state, &mut found);
    nothing_dangles(state, &mut found);
    members_are_told_apart(state, &mut found);
    found
}

/// No member id and no key is used twice, and none is above the count.
fn members_are_told_apart(state: &State, found: &mut Vec<String>) {
    let next = state.cluster().map_or(0, |cluster| cluster.next_member);
    for member in state.given_up.keys().filter(|member| **member >= next) {
        found.push(format!("2: member {member} was given up, but never was"));
    }
    let (mut members, mut keys) = (BTreeSet::new(), BTreeSet::new());
    for record in state.hosts().values() {
        let server = &record.host.server;
        if record
            .member
            .is_some_and(|member| member >= next || !members.insert(member))
        {
            found.push(format!(
                "2: host {server} has the member id of another: {:?}",
                record.member
            ));
        }
        for key in record.former_keys.iter().chain([&record.host.key_hash]) {
            if !keys.insert(key) {
                found.push(format!("2: host {server} has a key that was used before"));
            }
        }
    }
}

fn gpus_have_one_holder(state: &State, found: &mut Vec<String>) {
    let mut wanted: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for deployment in state.deployments.values() {
        let distinct: BTreeSet<_> = deployment.gpus.iter().collect();
        if distinct.len() != deployment.gpus.len() || distinct.is_empty() {
            found.push(format!("1: {} names a GPU twice or none", deployment.id));
        }
        for gpu in &deployment.gpus {
            let row = state.gpus.get(gpu);
            let holds = row.is_some_and(|gpu| gpu.holder.as_ref() == Some(&deployment.id));
            let promised = row.is_some_and(|gpu| gpu.promised_to.as_ref() == Some(&deployment.id));
            let may_be_promised = deployment.phase == Phase::Requested;
            let never_held = deployment
                .stop
                .as_ref()
                .is_some_and(|stop| stop.removed_at_revision.is_none());
            let has_it = holds || never_held || (may_be_promised && promised);
            if !has_it {
                found.push(format!(
                    "1: {} ({:?}) does not hold GPU {gpu}",
                    deployment.id, deployment.phase
                ));
            }
            if deployment.phase != Phase::Requested && !never_held {
                wanted.entry(gpu).or_default().push(&deployment.id);
            }
        }
    }
    for (gpu, deployments) in wanted {
        if deployments.len() > 1 {
            found.push(format!("1: GPU {gpu} belongs to {deployments:?}"));
        }
    }
    for gpu in state.gpus.values() {
        for id in gpu.holder.iter().chain(&gpu.promised_to) {
            let deployment = state.deployments.get(id);
            if deployment.is_none_or(|d| !d.gpus.contains(gpu.id()) || d.server != gpu.server) {
                found.push(format!(
                    "1: GPU {} is given to {id}, which does not have it",
                    gpu.id()
                ));
            }
        }
        if gpu.promised_to.is_some() && gpu.holder.is_none() {
            found.push(format!(
                "1: GPU {} is promised although nobody holds it",
                gpu.id()
            ));
        }
    }
}

fn names_are_used_once(state: &State, found: &mut Vec<String>) {
    let (mut configs, mut jobs, mut instances) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let gone = state.audits.values().map(|audit| &audit.deployment);
    for deployment in state.deployments.values().chain(gone) {
        if deployment
            .config
            .as_ref()
            .is_some_and(|config| !configs.insert(config))
        {
            found.push(format!("4: the launch config of {} is used twice", deployment.id));
        }
        if deployment.job.as_ref().is_some_and(|job| !jobs.insert(job)) {
            found.push(format!("4: the job of {} was tried twice", deployment.id));
        }
        if deployment
            .instance
            .as_ref()
            .is_some_and(|instance| !instances.insert(instance))
        {
            found.push(format!("4: the instance of {} is another's too", deployment.id));
        }
    }
}

fn phases_fit_their_facts(state: &State, found: &mut Vec<String>) {
    for deployment in state.deployments.values() {
        let id = &deployment.id;
        let waits = deployment.phase != Phase::Serving;
        if waits && deployment.deadline.0 == u64::MAX {
            found.push(format!("10: {id} is {:?} without a deadline", deployment.phase));
        }
        if !waits && !deployment.earns() {
            found.push(format!("10: {id} is serving but not verified and active"));
        }
        if deployment.phase.is_live() == deployment.stop.is_some() {
            found.push(format!(
                "10: {id} is {:?} and its stop is {:?}",
                deployment.phase, deployment.stop
            ));
        }
        if deployment.sealed_token.is_some() && (!waits || !deployment.phase.is_live()) {
            found.push(format!("8: {id} keeps a token that it does not need"));
        }
        let pending = state
            .outbox
            .of_subject(&Subject::Deployment(id.clone()))
            .next()
            .is_some();
        if deployment.phase == Phase::Stopping && !pending {
            found.push(format!(
                "10: {id} is stopping but there is nothing to tell the validator"
            ));
        }
        let absent = deployment.stop.as_ref().is_some_and(|stop| stop.absent);
        if deployment.phase == Phase::Draining && absent && !pending {
            found.push(format!("10: {id} is gone everywhere but here"));
        }
        let assigned = deployment.assigned_at_revision.is_some();
        if deployment.phase.is_desired() && !assigned {
            found.push(format!("10: {id} is desired but was never assigned"));
        }
    }
}

fn nothing_dangles(state: &State, found: &mut Vec<String>) {
    for deployment in state.deployments.values() {
        if !state.codes.contains_key(&deployment.version_key()) {
            found.push(format!("3: the code of {} is gone", deployment.id));
        }
        if state
            .servers
            .get(&deployment.server)
            .is_none_or(|server| server.enrolment.is_none())
        {
            found.push(format!("3: the server of {} is not enrolled", deployment.id));
        }
    }
    for key in state.codes.keys() {
        if !state.version_is_used(&key.chute, &key.version) {
            found.push(format!(
                "3: code of {} {} is kept for nobody",
                key.chute.chute, key.version
            ));
        }
    }
    for gpu in state.gpus.values() {
        if state
            .servers
            .get(&gpu.server)
            .is_none_or(|server| server.enrolment.is_none())
        {
            found.push(format!("3: the server of GPU {} is not enrolled", gpu.id()));
        }
    }
    for worker in state.workers.keys() {
        if !state.servers.contains_key(worker) || state.hosts.contains_key(worker) {
            found.push(format!("3: worker {worker} is no server, or a host as well"));
        }
    }
    for effect in state.outbox.iter() {
        if effect.id >= state.settings.next_effect {
            found.push(format!("3: effect {} has a number of the future", effect.id));
        }
        let known = match &effect.subject {
            Subject::Deployment(id) => state.deployments.contains_key(id),
            Subject::Server(id) => state
                .servers
                .get(id)
                .is_some_and(|server| server.enrolment.is_some()),
            Subject::Instance(_) => true,
        };
        if !known {
            found.push(format!(
                "3: effect {} is about {:?}, which is gone",
                effect.id, effect.subject
            ));
        }
    }
    if !state.index_is_right() {
        found.push("11: what is derived from the tables does not match them".to_owned());
    }
}

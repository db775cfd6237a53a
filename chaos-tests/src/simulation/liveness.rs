//! After faults end everything must come to rest: the state, the hosts and the validator agree, and so do all
//! members.

use std::collections::BTreeSet;

use coordinator::membership::policy::voters_wanted;
use coordinator::store::Store;
use coordinator_core::state_machine::State;
use coordinator_core::state_machine::deployment::Phase;

use super::host::Host;
use super::member::{Member, Members};
use super::validator::Validator;

/// What still differs, in words; none if all is at rest.
pub(super) fn unrest(members: &Members, hosts: &[Host], validator: &Validator) -> Vec<String> {
    let mut found = differences(members);
    if let Some(store) = members.leader().and_then(Member::store) {
        found.extend(unrest_in(&store, hosts, validator));
    }
    found
}

/// Members that are away, behind, or no voters although they should be; or that nobody leads.
pub(super) fn differences(members: &Members) -> Vec<String> {
    let mut found = Vec::new();
    if members.leader().and_then(Member::store).is_none() {
        found.push("nobody leads".to_owned());
    }
    let mut first: Option<(u64, State)> = None;
    for member in members.all() {
        let me = member.number();
        let Some((machine, replica)) = member.inside() else {
            found.push(format!("member {me} is down"));
            continue;
        };
        let wanted = voters_wanted(members.all().len());
        let membership = replica.membership();
        if membership.voters.len() != wanted || membership.changing {
            found.push(format!(
                "member {me} knows of {membership:?}, {wanted} should vote"
            ));
        }
        let index = replica.metrics().applied_index.unwrap_or_default();
        let state = machine.read(State::clone);
        match &first {
            None => first = Some((index, state)),
            Some((other, _)) if *other != index => {
                found.push(format!("member {me} is at {index}, another one at {other}"));
            }
            Some((_, other)) if *other != state => {
                found.push(format!("11: member {me} has another state than the first"));
            }
            Some(_) => {}
        }
    }
    found
}

fn unrest_in(store: &Store, hosts: &[Host], validator: &Validator) -> Vec<String> {
    let mut found = Vec::new();
    let running: BTreeSet<_> = hosts.iter().flat_map(Host::running).collect();
    let instances: BTreeSet<_> = validator.lock().instances.keys().cloned().collect();
    store.read(|state| {
        for effect in state.outbox().iter() {
            found.push(format!("effect {} ({:?}) waits", effect.id, effect.kind));
        }
        for server in state.servers().values().filter(|server| !server.reachable) {
            found.push(format!("{} counts as silent", server.id()));
        }
        let mut recorded = BTreeSet::new();
        let mut desired = BTreeSet::new();
        for deployment in state.deployments().values() {
            if deployment.phase != Phase::Serving {
                found.push(format!(
                    "{} of {} is {:?} since {}, stop {:?}",
                    deployment.id,
                    deployment.chute.chute,
                    deployment.phase,
                    deployment.phase_since,
                    deployment.stop
                ));
            }
            recorded.extend(deployment.instance.clone());
            desired.insert(deployment.id.clone());
        }
        for id in instances.symmetric_difference(&recorded) {
            found.push(format!(
                "{id} is on one side only (validator: {})",
                instances.contains(id)
            ));
        }
        for id in running.symmetric_difference(&desired) {
            found.push(format!(
                "{id} runs or is wanted, not both (runs: {})",
                running.contains(id)
            ));
        }
    });
    found
}

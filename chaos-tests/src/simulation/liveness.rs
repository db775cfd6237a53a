//! After faults end everything must come to rest: the state, the hosts and the validator agree.

use std::collections::BTreeSet;

use coordinator::store::Store;
use coordinator_core::state_machine::deployment::Phase;

use super::host::Host;
use super::validator::Validator;

/// What still differs, in words; none if all is at rest.
pub(super) fn unrest(store: &Store, hosts: &[Host], validator: &Validator) -> Vec<String> {
    let mut found = Vec::new();
    let running: BTreeSet<_> = hosts.iter().flat_map(Host::running).collect();
    let instances: BTreeSet<_> = validator.lock().instances.keys().cloned().collect();
    store.read(|state| {
        for effect in state.outbox().iter() {
            found.push(format!("effect {} ({:?}) waits", effect.id, effect.kind));
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

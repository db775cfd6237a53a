//! Desired against observed: what to start, keep and stop (pure).
//!
//! The second guard of the rule that no two live workloads share a GPU stands here (the first is the
//! coordinator's placement): a workload waits as long as another one, wanted or not, holds one of its GPUs.

use std::collections::{BTreeMap, BTreeSet};

use protocol::id::{DeploymentId, GpuId};
use protocol::workload::{WorkloadPhase, WorkloadSpec};

use crate::Observed;

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Wanted and absent, its GPUs are free.
    pub start: Vec<DeploymentId>,
    /// Wanted and there.
    pub keep: Vec<DeploymentId>,
    /// There and not wanted, not being stopped yet.
    pub stop: Vec<DeploymentId>,
    /// Wanted, absent, and something that must go first is still there.
    pub wait: Vec<Waiting>,
}

/// A workload that cannot start yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub deployment: DeploymentId,
    /// The workload that must be gone first: it holds a GPU, or is an earlier run of the same deployment.
    pub on: DeploymentId,
}

/// Compares what should run with what exists.
#[must_use]
pub fn diff(desired: &[WorkloadSpec], observed: &[Observed]) -> Plan {
    let wanted: BTreeSet<&DeploymentId> = desired.iter().map(|spec| &spec.deployment).collect();
    let mut plan = Plan::default();
    let mut present: BTreeMap<&DeploymentId, &WorkloadPhase> = BTreeMap::new();
    let mut held: BTreeMap<&GpuId, &DeploymentId> = BTreeMap::new();
    for workload in observed {
        let deployment = &workload.status.deployment;
        present.insert(deployment, &workload.status.phase);
        if workload.holds_gpus() {
            held.extend(workload.gpus.iter().map(|gpu| (gpu, deployment)));
        }
        let stopping = matches!(workload.status.phase, WorkloadPhase::Stopping);
        if !wanted.contains(deployment) && !stopping {
            plan.stop.push(deployment.clone());
        }
    }
    let mut seen = BTreeSet::new();
    for spec in desired.iter().filter(|spec| seen.insert(&spec.deployment)) {
        let deployment = &spec.deployment;
        let wait = |on: &DeploymentId| Waiting {
            deployment: deployment.clone(),
            on: on.clone(),
        };
        match present.get(deployment) {
            Some(WorkloadPhase::Stopping) => plan.wait.push(wait(deployment)),
            Some(_) => plan.keep.push(deployment.clone()),
            None => match spec.gpus.iter().find_map(|gpu| held.get(gpu)) {
                Some(holder) => plan.wait.push(wait(holder)),
                None => {
                    held.extend(spec.gpus.iter().map(|gpu| (gpu, deployment)));
                    plan.start.push(deployment.clone());
                }
            },
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::tests::spec;
    use protocol::report::WorkloadStatus;

    fn id(text: &str) -> DeploymentId {
        DeploymentId::parse(text).expect("valid")
    }

    fn gpus(numbers: &[u8]) -> Vec<GpuId> {
        let gpu = |number: &u8| GpuId::from_device_uuid(&format!("{number:032x}")).expect("valid");
        numbers.iter().map(gpu).collect()
    }

    fn want(name: &str, on: &[u8]) -> WorkloadSpec {
        WorkloadSpec {
            deployment: id(name),
            gpus: gpus(on),
            ..spec()
        }
    }

    fn have(name: &str, on: &[u8], phase: WorkloadPhase) -> Observed {
        Observed {
            status: WorkloadStatus {
                deployment: id(name),
                phase,
            },
            gpus: gpus(on),
        }
    }

    /// Expectation as text: `start | keep | stop | wait<on`.
    fn check(desired: &[WorkloadSpec], observed: &[Observed], expected: &str) {
        let plan = diff(desired, observed);
        let names = |ids: &[DeploymentId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let wait = plan.wait.iter().map(|w| format!("{}<{}", w.deployment, w.on));
        let wait = wait.collect::<Vec<_>>().join(" ");
        let seen = [names(&plan.start), names(&plan.keep), names(&plan.stop), wait].join("|");
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_plan_starts_keeps_stops_and_waits() {
        let ended = || WorkloadPhase::Ended {
            exit_code: Some(1),
            reason: "exit code 1".to_owned(),
        };
        let running = || WorkloadPhase::Running {
            ports: Vec::new(),
            ready: true,
        };
        check(&[], &[], "|||");
        check(&[want("a", &[0])], &[], "a|||");
        check(&[want("a", &[0])], &[have("a", &[0], running())], "|a||");
        check(&[], &[have("a", &[0], running())], "||a|");
        // Being stopped already: nothing to do but wait.
        check(&[], &[have("a", &[0], WorkloadPhase::Stopping)], "|||");
        // What ended is kept while it is wanted, never started again, and removed afterwards.
        check(&[want("a", &[0])], &[have("a", &[0], ended())], "|a||");
        check(&[], &[have("a", &[0], ended())], "||a|");
        // A GPU that another one holds, wanted or not.
        check(&[want("b", &[0])], &[have("a", &[0], running())], "||a|b<a");
        check(
            &[want("b", &[0])],
            &[have("a", &[0], WorkloadPhase::Stopping)],
            "|||b<a",
        );
        check(&[want("b", &[0])], &[have("a", &[0], ended())], "b||a|");
        check(
            &[want("a", &[0]), want("b", &[0, 1])],
            &[have("a", &[0], running())],
            "|a||b<a",
        );
        // A set that gives one GPU twice: the first wins.
        check(&[want("a", &[0]), want("b", &[0])], &[], "a|||b<a");
        // A set that names one deployment twice.
        check(&[want("a", &[0]), want("a", &[1])], &[], "a|||");
        // Wanted again while its earlier run is being stopped.
        check(
            &[want("a", &[0])],
            &[have("a", &[0], WorkloadPhase::Stopping)],
            "|||a<a",
        );
    }
}

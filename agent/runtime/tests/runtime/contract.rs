//! What every runtime must keep, tried on all of them.

use protocol::id::DeploymentId;
use protocol::workload::{WorkloadPhase, WorkloadSpec};
use runtime::Runtime;
use runtime::memory::Memory;
use runtime::process::Process;

use crate::support::{self, FENCE, World, is_ended, is_running, log, phase, until};

/// How the suite lets things happen that a runtime does by itself.
pub(crate) trait Subject {
    fn runtime(&self) -> &dyn Runtime;
    /// A workload that goes on until it is stopped.
    fn lasting(&self) -> WorkloadSpec;
    /// A workload that ends with code 3.
    fn ending(&self) -> WorkloadSpec;
    /// Lets an accepted workload get on.
    fn get_on(&self, deployment: &DeploymentId, phase: WorkloadPhase);
    /// Lets a stop complete.
    fn let_go(&self, deployment: &DeploymentId);
}

pub(crate) async fn contract(subject: &impl Subject) {
    let runtime = subject.runtime();
    assert_eq!(
        runtime.observe().await.expect("it works"),
        [],
        "nothing runs at first"
    );

    let spec = subject.lasting();
    let id = &spec.deployment;
    assert_eq!(log(runtime, id, None).await, None, "it was never here");
    assert_eq!(runtime.events(id).await.expect("it works"), None);
    let changes = runtime.changes();
    runtime.apply(FENCE, &spec).await.expect("it is accepted");
    assert!(
        phase(runtime, id).await.is_some(),
        "what was accepted is listed at once"
    );
    assert!(changes.has_changed().expect("it lives"), "and that is a change");
    runtime.apply(FENCE, &spec).await.expect("repeating is fine");
    assert_eq!(runtime.observe().await.expect("it works").len(), 1, "still one");
    let ports = Vec::new();
    subject.get_on(id, WorkloadPhase::Running { ports, ready: true });
    until(runtime, id, "running", is_running).await;
    assert!(runtime.events(id).await.expect("it works").is_some());

    runtime.stop(id).await.expect("it can be stopped");
    runtime.stop(id).await.expect("repeating is fine");
    subject.let_go(id);
    until(runtime, id, "gone", |phase| phase.is_none()).await;
    runtime
        .stop(id)
        .await
        .expect("stopping what is not there is fine");

    let spec = subject.ending();
    let id = &spec.deployment;
    runtime.apply(FENCE, &spec).await.expect("it is accepted");
    let reason = "exit code 3".to_owned();
    let ended = WorkloadPhase::Ended {
        exit_code: Some(3),
        reason,
    };
    subject.get_on(id, ended.clone());
    assert_eq!(until(runtime, id, "ended", is_ended).await, Some(ended.clone()));
    runtime.apply(FENCE, &spec).await.expect("repeating is fine");
    assert_eq!(phase(runtime, id).await, Some(ended), "what ended stays so");
    let observed = runtime.observe().await.expect("it works");
    assert!(!observed[0].holds_gpus());
    runtime.stop(id).await.expect("it can be removed");
    until(runtime, id, "gone", |phase| phase.is_none()).await;
}

impl Subject for Memory {
    fn runtime(&self) -> &dyn Runtime {
        self
    }
    fn lasting(&self) -> WorkloadSpec {
        support::spec("lasting", "")
    }
    fn ending(&self) -> WorkloadSpec {
        support::spec("ending", "")
    }
    fn get_on(&self, deployment: &DeploymentId, phase: WorkloadPhase) {
        self.advance(deployment, phase);
    }
    fn let_go(&self, deployment: &DeploymentId) {
        self.remove(deployment);
    }
}

impl Subject for Process {
    fn runtime(&self) -> &dyn Runtime {
        self
    }
    fn lasting(&self) -> WorkloadSpec {
        support::spec("lasting", "exec sleep 1000")
    }
    fn ending(&self) -> WorkloadSpec {
        support::spec("ending", "exit 3")
    }
    fn get_on(&self, _: &DeploymentId, _: WorkloadPhase) {}
    fn let_go(&self, _: &DeploymentId) {}
}

#[tokio::test]
async fn the_memory_runtime_keeps_the_contract() {
    contract(&Memory::default()).await;
}

#[tokio::test]
async fn the_process_runtime_keeps_the_contract() {
    let world = World::new().await;
    contract(&world.open().await).await;
}

#[tokio::test]
async fn unknown_is_an_error_and_not_empty() {
    let runtime = Memory::default();
    runtime.set_unreachable(true);
    assert!(runtime.observe().await.is_err());
    assert!(runtime.apply(FENCE, &runtime.lasting()).await.is_err());
    runtime.set_unreachable(false);
    assert_eq!(runtime.observe().await.expect("it works again"), []);
}

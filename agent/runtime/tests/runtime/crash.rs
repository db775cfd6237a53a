//! An agent that dies between any two steps, and the next one: never two processes for a deployment, and a
//! chute that was let loose once is not started again.

use std::process::Stdio;

use protocol::workload::{WorkloadPhase, WorkloadSpec};
use runtime::Runtime;
use runtime::process::fault::{Faults, Step};
use runtime::process::{Config, Process};

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

use crate::support::{self, FENCE, World, is_ended, is_running, phase, processes, spec, until, write_line};

/// Runs a workload until its agent dies at the step; gives what the next agent finds.
async fn die_at(step: Step, world: &World, spec: &WorkloadSpec, stop: bool) -> Process {
    let (faults, halted) = Faults::halt_at(step);
    let config = Config {
        faults,
        ..world.config()
    };
    let runtime = Process::open(config).await.expect("nothing is wrong");
    runtime.apply(FENCE, spec).await.expect("accepted");
    if stop {
        until(&runtime, &spec.deployment, "running", is_running).await;
        support::said(world, &spec.deployment, "up").await;
        runtime.stop(&spec.deployment).await.expect("known");
    }
    let reached = tokio::time::timeout(std::time::Duration::from_secs(30), halted.notified()).await;
    assert!(reached.is_ok(), "{step:?} was not reached");
    runtime.close().await;
    world.open().await
}

async fn stop(runtime: &Process, spec: &WorkloadSpec) {
    runtime.stop(&spec.deployment).await.expect("known");
    until(runtime, &spec.deployment, "gone", |phase| phase.is_none()).await;
    assert_eq!(processes(&spec.deployment), Vec::<u32>::new());
}

#[tokio::test]
async fn an_agent_that_dies_while_it_starts_a_chute_starts_it_once() {
    let world = World::new().await;
    for step in [
        Step::FolderMade,
        Step::StartingRecorded,
        Step::ProcessGated,
        Step::StartedRecorded,
        Step::Released,
    ] {
        let spec = spec("start", "echo up; exec sleep 1000");
        let next = die_at(step, &world, &spec, false).await;
        // What the agent's loop does: what is wanted and absent is applied.
        let mut changes = next.changes();
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
        while world.starts(&spec.deployment) == 0 {
            next.apply(FENCE, &spec).await.expect("accepted");
            let changed = tokio::time::timeout(std::time::Duration::from_millis(50), changes.changed());
            let _ = changed.await;
            assert!(
                tokio::time::Instant::now() < deadline,
                "{step:?}: it is never started"
            );
        }
        until(&next, &spec.deployment, "running", is_running).await;
        support::said(&world, &spec.deployment, "up").await;
        assert_eq!(world.starts(&spec.deployment), 1, "{step:?}");
        assert_eq!(processes(&spec.deployment).len(), 1, "{step:?}");
        stop(&next, &spec).await;
        next.close().await;
    }
}

#[tokio::test]
async fn an_agent_that_dies_at_an_end_reports_the_end() {
    let world = World::new().await;
    let spec = spec("end", "exit 5");
    let next = die_at(Step::EndRecorded, &world, &spec, false).await;
    let ended = phase(&next, &spec.deployment).await;
    assert!(
        matches!(
            ended,
            Some(WorkloadPhase::Ended {
                exit_code: Some(5),
                ..
            })
        ),
        "{ended:?}"
    );
    next.apply(FENCE, &spec).await.expect("accepted");
    assert_eq!(world.starts(&spec.deployment), 1);
    stop(&next, &spec).await;
}

#[tokio::test]
async fn an_agent_that_dies_while_it_stops_a_chute_leaves_nothing() {
    let world = World::new().await;
    for step in [Step::ProcessesEnded, Step::FolderRemoved] {
        let spec = spec("stop", "echo up; exec sleep 1000");
        let next = die_at(step, &world, &spec, true).await;
        stop(&next, &spec).await;
        assert_eq!(world.starts(&spec.deployment), 1, "{step:?}");
        next.close().await;
    }
}

#[tokio::test]
async fn an_end_that_nobody_watched_is_an_end() {
    let world = World::new().await;
    let spec = spec("unwatched", "echo up; exec sleep 1000");
    let runtime = world.open().await;
    runtime.apply(FENCE, &spec).await.expect("accepted");
    until(&runtime, &spec.deployment, "running", is_running).await;
    support::said(&world, &spec.deployment, "up").await;
    runtime.close().await;
    for pid in processes(&spec.deployment) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("small")).expect("not zero");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("ours");
    }
    let next = world.open().await;
    until(&next, &spec.deployment, "ended", is_ended).await;
    next.apply(FENCE, &spec).await.expect("accepted");
    assert_eq!(world.starts(&spec.deployment), 1, "its token is used up");
    stop(&next, &spec).await;
}

#[tokio::test]
async fn a_record_that_cannot_be_read_ends_what_carries_its_name() {
    let world = World::new().await;
    let spec = spec("garbled", "exec sleep 1000");
    let runtime = world.open().await;
    runtime.apply(FENCE, &spec).await.expect("accepted");
    until(&runtime, &spec.deployment, "running", is_running).await;
    runtime.close().await;
    let record = world
        .folder
        .path()
        .join("workloads")
        .join(spec.deployment.as_str())
        .join("record.json");
    std::fs::write(record, "{}").expect("ours");
    let next = world.open().await;
    until(&next, &spec.deployment, "ended", is_ended).await;
    assert_eq!(processes(&spec.deployment), Vec::<u32>::new());
}

/// This test is its own agent: run again with `AGENT_DATA` set, it starts the workload and waits to be
/// killed.
#[tokio::test]
async fn an_agent_that_was_killed_is_followed_by_one_that_adopts() {
    let code = "echo up; exec sleep 1000";
    if let (Ok(data), Ok(registry)) = (std::env::var("AGENT_DATA"), std::env::var("AGENT_REGISTRY")) {
        let config = support::config(data.as_ref(), registry.parse().expect("an address"));
        let runtime = Process::open(config).await.expect("nothing is wrong");
        let spec = spec("killed", code);
        runtime.apply(FENCE, &spec).await.expect("accepted");
        until(&runtime, &spec.deployment, "running", is_running).await;
        write_line(&format!("\nworkload {}", spec.deployment));
        std::future::pending::<()>().await;
    }
    let world = World::new().await;
    let name = "crash::an_agent_that_was_killed_is_followed_by_one_that_adopts";
    let mut agent = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", name, "--nocapture"])
        .env("AGENT_DATA", world.folder.path())
        .env("AGENT_REGISTRY", world.address.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it can run again");
    let mut lines = BufReader::new(agent.stdout.take().expect("piped")).lines();
    let deployment = loop {
        let line = lines
            .next_line()
            .await
            .expect("text")
            .expect("the agent says when it runs");
        if let Some(deployment) = line.strip_prefix("workload ") {
            break deployment.to_owned();
        }
    };
    let deployment = protocol::id::DeploymentId::parse(&deployment).expect("its own");
    support::said(&world, &deployment, "up").await;
    let before = processes(&deployment);
    agent.kill().await.expect("it runs");

    let next = world.open().await;
    until(&next, &deployment, "running", is_running).await;
    assert_eq!(
        (processes(&deployment), before.len()),
        (before.clone(), 1),
        "the same process"
    );
    assert_eq!(world.starts(&deployment), 1);
    next.stop(&deployment).await.expect("known");
    until(&next, &deployment, "gone", |phase| phase.is_none()).await;
    assert_eq!(processes(&deployment), Vec::<u32>::new());
}

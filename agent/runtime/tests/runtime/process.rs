//! Child processes: start, health, ports, stop, ends, and images that are not as they should be.

use std::net::TcpListener;

use axum::Router;
use axum::routing::get;
use protocol::workload::{PortMapping, WorkloadPhase, WorkloadSpec};
use runtime::Runtime;
use runtime::process::{Config, Process};

use crate::support::{FENCE, World, is_ended, is_running, layer, log, processes, said, sha256, spec, until};

fn ports(phase: Option<WorkloadPhase>) -> Vec<PortMapping> {
    match phase {
        Some(WorkloadPhase::Running { ports, .. }) => ports,
        other => panic!("it should run, it is {other:?}"),
    }
}

fn reason(phase: Option<WorkloadPhase>) -> String {
    match phase {
        Some(WorkloadPhase::Ended { reason, .. }) => reason,
        other => panic!("it should have ended, it is {other:?}"),
    }
}

#[tokio::test]
async fn a_chute_finds_its_surroundings_and_becomes_ready() {
    let world = World::new().await;
    let runtime = world.open().await;
    let spec = spec("surroundings", "env; echo args \"$@\"; pwd; exec sleep 1000");
    let id = &spec.deployment;
    runtime.apply(FENCE, &spec).await.expect("accepted");
    let ports = ports(until(&runtime, id, "running", is_running).await);
    assert_eq!(
        ports.iter().map(|port| port.internal).collect::<Vec<_>>(),
        [8000, 8001, 9000]
    );
    let arguments = format!(
        "run echo:chute --port 8000 --miner-ss58 {} --validator-ss58 {}",
        spec.miner, spec.validator
    );
    said(&world, id, &format!("args {arguments}")).await;
    let code = world
        .folder
        .path()
        .join("workloads")
        .join(id.as_str())
        .join("app/echo.sh");
    for line in [
        "CHUTES_LAUNCH_JWT=token".to_owned(),
        format!("CHUTES_EXTERNAL_HOST={}", spec.external_host),
        format!("CHUTES_PROCESS_BIND_HOST={}", spec.external_host),
        format!("CHUTES_PORT_PRIMARY={}", ports[0].external),
        format!("CHUTES_PORT_LOGGING={}", ports[1].external),
        format!("CHUTES_PORT_UDP_9000={}", ports[2].external),
        format!("CHUTES_CODE_FILE={}", code.display()),
        "IMAGE=yes".to_owned(),
    ] {
        said(&world, id, &line).await;
    }
    // The library of this version answers health checks on its log port.
    let listener = tokio::net::TcpListener::bind((spec.external_host.as_str(), ports[1].external)).await;
    let app = Router::new().route("/_alive", get(async || "ok"));
    let server = tokio::spawn(axum::serve(listener.expect("the port is free"), app).into_future());
    let ready = |wanted: bool| move |phase: Option<&WorkloadPhase>| matches!(phase, Some(WorkloadPhase::Running { ready, .. }) if *ready == wanted);
    until(&runtime, id, "ready", ready(true)).await;
    server.abort();
    until(&runtime, id, "no longer ready", ready(false)).await;
    let host = format!("{}.localregistry.chutes.ai:30500", spec.validator.lower());
    assert!(
        world
            .registry
            .lock()
            .expect("free")
            .hosts
            .iter()
            .all(|seen| *seen == host)
    );
    runtime.stop(id).await.expect("known");
    until(&runtime, id, "gone", |phase| phase.is_none()).await;
    assert_eq!(processes(id), Vec::<u32>::new());
    assert!(!world.folder.path().join("workloads").join(id.as_str()).exists());
    let kept = log(&runtime, id, None).await.expect("it is kept");
    assert!(
        kept.gone && kept.text.lines().any(|line| line == "IMAGE=yes"),
        "{kept:?}"
    );
    let rest = log(&runtime, id, kept.next).await.expect("it is kept");
    assert_eq!(rest.text, "");
    assert_eq!(runtime.events(id).await.expect("readable"), Some(Vec::new()));
}

#[tokio::test]
async fn a_stop_ends_processes_that_ignore_it_and_their_children() {
    let world = World::new().await;
    let runtime = world.open().await;
    // One child in the group, one in a session of its own, one without the marker: all ignore SIGTERM.
    let code = "trap '' TERM\nsleep 1000 &\nsetsid sleep 1000 &\nenv -i sleep 1000 &\necho ready\nwhile :; do sleep 1000; done";
    let spec = spec("stubborn", code);
    let id = &spec.deployment;
    runtime.apply(FENCE, &spec).await.expect("accepted");
    until(&runtime, id, "running", is_running).await;
    said(&world, id, "ready").await;
    assert!(processes(id).len() >= 3, "{:?}", processes(id));
    runtime.stop(id).await.expect("known");
    until(&runtime, id, "stopping", |phase| {
        matches!(phase, Some(WorkloadPhase::Stopping))
    })
    .await;
    until(&runtime, id, "gone", |phase| phase.is_none()).await;
    assert_eq!(processes(id), Vec::<u32>::new());
}

#[tokio::test]
async fn what_an_ended_chute_left_running_is_ended_too() {
    let world = World::new().await;
    let runtime = world.open().await;
    let spec = spec("leaves-children", "setsid sleep 1000 &\nexit 7");
    let id = &spec.deployment;
    runtime.apply(FENCE, &spec).await.expect("accepted");
    let phase = until(&runtime, id, "ended", is_ended).await;
    assert_eq!(reason(phase), "exit code 7");
    assert_eq!(processes(id), Vec::<u32>::new(), "it holds no GPU any more");
}

#[tokio::test]
async fn deployments_share_an_image_and_no_port() {
    let world = World::new().await;
    let host = spec("address", "").external_host;
    let _used = TcpListener::bind((host.as_str(), 31001)).expect("nobody else uses this address");
    let config = Config {
        ports: 31000..=31006,
        ..world.config()
    };
    let runtime = Process::open(config).await.expect("nothing is wrong");
    let specs: Vec<WorkloadSpec> = (0..3)
        .map(|number| WorkloadSpec {
            external_host: host.clone(),
            ..spec(&format!("sharing-{number}"), "exec sleep 1000")
        })
        .collect();
    let mut externals = Vec::new();
    for spec in &specs[..2] {
        runtime.apply(FENCE, spec).await.expect("accepted");
        let phase = until(&runtime, &spec.deployment, "running", is_running).await;
        externals.extend(ports(phase).iter().map(|port| port.external));
    }
    externals.sort_unstable();
    assert_eq!(externals, [31000, 31002, 31003, 31004, 31005, 31006]);
    runtime.apply(FENCE, &specs[2]).await.expect("accepted");
    let phase = until(&runtime, &specs[2].deployment, "ended", is_ended).await;
    assert_eq!(reason(phase), "no port is free");
    let requests = world.registry.lock().expect("free").requests.clone();
    assert_eq!(
        requests
            .iter()
            .filter(|path| path.contains("/manifests/"))
            .count(),
        3,
        "a tag is always resolved"
    );
    assert_eq!(
        requests.iter().filter(|path| path.contains("/blobs/")).count(),
        2,
        "blobs come once"
    );
    for spec in &specs {
        runtime.stop(&spec.deployment).await.expect("known");
        until(&runtime, &spec.deployment, "gone", |phase| phase.is_none()).await;
    }
}

#[tokio::test]
async fn a_registry_that_is_busy_is_asked_again() {
    let world = World::new().await;
    world.registry.lock().expect("free").outages = 3;
    let runtime = world.open().await;
    let spec = spec("outage", "exit 0");
    runtime.apply(FENCE, &spec).await.expect("accepted");
    let phase = until(&runtime, &spec.deployment, "ended", is_ended).await;
    assert_eq!(reason(phase), "exit code 0");
}

#[tokio::test]
async fn bad_images_never_run() {
    let world = World::new().await;
    let good = layer(&[("opt/chutes/bin/chutes", "#!/bin/sh\n")]);
    let with_trick = layer(&[
        ("opt/chutes/bin/chutes", "#!/bin/sh\n"),
        ("../../../escaped", "x"),
    ]);
    {
        let mut registry = world.registry.lock().expect("free");
        registry.add("trick", &[with_trick]);
        registry.add("empty", &[layer(&[("opt/readme", "x")])]);
        let mut forged = layer(&[("opt/chutes/bin/chutes", "#!/bin/sh\nexit 9\n")]);
        registry.add("forged", &[forged.clone()]);
        let path = format!("/v2/someone/echo/blobs/{}", sha256(&forged));
        forged[4] ^= 1;
        registry.documents.insert(path, forged);
        registry.add("longer", std::slice::from_ref(&good));
        let path = format!("/v2/someone/echo/blobs/{}", sha256(&good));
        registry.documents.insert(path, [good.clone(), vec![0]].concat());
        registry.documents.insert(
            "/v2/someone/echo/manifests/garbage".to_owned(),
            b"<html>".to_vec(),
        );
    }
    let runtime = world.open().await;
    for (tag, expected) in [
        ("trick", "leads out of the image"),
        ("empty", "no command \"chutes\""),
        ("forged", "came with digest sha256:"),
        ("longer", "is longer than its"),
        ("garbage", "manifest garbage"),
        ("absent", "404"),
        ("a/b", "is no name of an image"),
    ] {
        let spec = WorkloadSpec {
            image: format!("someone/echo:{tag}"),
            ..spec("bad-image", "exit 0")
        };
        runtime.apply(FENCE, &spec).await.expect("accepted");
        let phase = until(&runtime, &spec.deployment, "ended", is_ended).await;
        let reason = reason(phase);
        assert!(reason.contains(expected), "{tag}: {reason}");
        assert_eq!(world.starts(&spec.deployment), 0, "{tag}");
    }
    let images = std::fs::read_dir(world.folder.path().join("images")).expect("there");
    let left: Vec<_> = images
        .filter_map(|item| item.ok()?.file_name().into_string().ok())
        .collect();
    assert!(
        left.iter().all(|name| name.len() == 64),
        "unfinished images are removed: {left:?}"
    );
    assert!(!world.folder.path().join("escaped").exists());
}

#[tokio::test]
async fn two_agents_do_not_share_a_folder() {
    let world = World::new().await;
    let first = world.open().await;
    let error = Process::open(world.config())
        .await
        .expect_err("it is taken")
        .to_string();
    assert!(error.contains("another agent uses"), "{error}");
    first.close().await;
    world.open().await.close().await;
}

#[tokio::test]
async fn real_validators_are_refused() {
    let world = World::new().await;
    let config = Config {
        validators: vec!["https://api.example.org".to_owned()],
        ..world.config()
    };
    let error = Process::open(config).await.expect_err("refused").to_string();
    assert!(
        error.contains("isolates nothing") && error.contains("api.example.org"),
        "{error}"
    );
}

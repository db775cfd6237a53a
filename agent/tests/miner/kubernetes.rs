//! Chutes as Jobs: two hosts that are nodes of one cluster, with a real API server and real controllers. The test
//! plays what a node has besides: for each pod a chute stand-in, with exactly that pod's command and environment.
//! Added to it are the address to listen on (there is no address translation) and where the code was mounted.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use protocol::id::DeploymentId;
use reqwest::{Method, StatusCode};
use runtime::manifest::DEPLOYMENT_LABEL;
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::time::sleep;

use super::cluster::{Miner, Plan, rows};
use super::control_plane::{ControlPlane, Space, programs};
use super::stand_in::{StandIn, chute, scenario};
use super::{LOOK_EVERY, alone, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chutes_run_as_jobs_on_the_nodes_of_a_cluster() {
    let Some(programs) = programs() else { return };
    let _alone = alone().await;
    let plane = ControlPlane::start(programs).await;
    let space = Arc::new(plane.namespace("chutes").await);
    let before = space.remains().await;
    let nodes = tokio::spawn(play_nodes(Arc::clone(&space)));
    let validator = StandIn::start(scenario(
        "kubernetes",
        0xd4,
        vec![chute("first"), chute("second")],
    ))
    .await;
    let plan = || Plan {
        works_for: &validator,
        gpus: 1,
        has_seed: false,
    };
    let kubeconfig = plane.kubeconfig();
    let runtime = format!("kind = \"kubernetes\"\nkubeconfig = \"{}\"", kubeconfig.display());
    let miner = Miner::start_with(&[&validator], &[plan(), plan()], &runtime).await;

    for name in ["first", "second"] {
        let serving = miner.serving(&validator, name).await;
        assert!(
            serving["verified_at"].is_u64() && serving["active_at"].is_u64(),
            "{serving}"
        );
        // It would be placed again.
        let ban = json!({ "chute_id": serving["chute_id"], "reason": "a test" });
        let (status, answer) = miner.ask(Method::POST, "/v1/bans", Some(&ban)).await;
        assert!(status.is_success(), "{status}: {answer}");
    }
    assert_eq!(validator.instances().await.len(), 2);
    let pods = space
        .pods()
        .list(&ListParams::default())
        .await
        .expect("it answers");
    let on: Vec<&str> = pods
        .iter()
        .filter_map(|pod| pod.spec.as_ref()?.node_name.as_deref())
        .collect();
    assert!(on.contains(&"host-1") && on.contains(&"host-2"), "{on:?}");

    for name in ["first", "second"] {
        let serving = miner.serving(&validator, name).await;
        let id = serving["deployment_id"].as_str().expect("an id");
        let (status, answer) = miner
            .ask(Method::DELETE, &format!("/deployments/{id}"), None)
            .await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        miner.gone(&serving).await;
    }
    assert!(validator.instances().await.is_empty());
    until("the GPUs are free", async || {
        let state = miner.state().await;
        rows(&state, "gpus")
            .iter()
            .all(|gpu| gpu["holder"].is_null())
            .then_some(())
    })
    .await;
    assert_eq!(space.remains().await, before);
    miner.stop().await;
    nodes.abort();
    drop(space);
    plane.stop().await;
}

/// Starts what pods hold, and ends it when they are gone.
pub(super) async fn play_nodes(space: Arc<Space>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let chutes = folder.path().join("chutes");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_chutes-agent"), &chutes).expect("our own folder");
    let mut running: BTreeMap<String, Child> = BTreeMap::new();
    loop {
        let pods = space
            .pods()
            .list(&ListParams::default())
            .await
            .expect("it answers")
            .items;
        running.retain(|name, _| pods.iter().any(|pod| pod.name_any() == *name));
        for pod in pods
            .iter()
            .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        {
            if running.contains_key(&pod.name_any()) {
                continue;
            }
            let child = start(pod, &space.code(), folder.path(), &chutes).await;
            running.insert(pod.name_any(), child);
            let deployment = DeploymentId::parse(&pod.labels()[DEPLOYMENT_LABEL]).expect("an id");
            let state = json!({ "running": { "startedAt": "2026-01-01T00:00:00Z" } });
            let container = json!({ "name": "chute", "image": "i", "imageID": "i", "ready": true,
                "restartCount": 0, "state": state });
            space.say(
                &deployment,
                json!({ "phase": "Running", "containerStatuses": [container] }),
            );
        }
        sleep(LOOK_EVERY).await;
    }
}

async fn start(pod: &Pod, code: &Api<ConfigMap>, folder: &Path, chutes: &Path) -> Child {
    let spec = pod.spec.as_ref().expect("a spec");
    let container = &spec.containers[0];
    let volumes = spec.volumes.iter().flatten();
    let map = volumes.filter_map(|volume| volume.config_map.as_ref()).next();
    let text = match map {
        Some(map) => {
            let data = code.get(&map.name).await.expect("it is there").data;
            let files = data.expect("it holds something").into_values();
            files.last().expect("one file")
        }
        // On a sealed worker it comes from the validator.
        None => String::new(),
    };
    let file = folder.join(pod.name_any());
    std::fs::write(&file, text).expect("our own folder");
    let variables = container.env.iter().flatten();
    let variables: BTreeMap<&str, &str> = variables
        .map(|variable| {
            (
                variable.name.as_str(),
                variable.value.as_deref().unwrap_or_default(),
            )
        })
        .collect();
    let command = container.command.as_ref().expect("it has a command");
    assert_eq!(command[0], "chutes");
    Command::new(chutes)
        .args(&command[1..])
        .env_clear()
        .envs(&variables)
        .env("CHUTES_PROCESS_BIND_HOST", variables["CHUTES_EXTERNAL_HOST"])
        .env("CHUTES_CODE_FILE", &file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("the program runs")
}

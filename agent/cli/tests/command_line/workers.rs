//! `worker`: where a kubeconfig comes from, and that it goes nowhere but to the miner.

use serde_json::{Value, json};

use crate::world::World;

fn worker() -> Value {
    json!({
        "server_id": "6f1c", "name": "tee-1", "address": "192.0.2.7", "gpus": 8, "reachable": true, "validator": null,
        "added_at": "2026-11-30T00:00:00Z",
    })
}

#[tokio::test]
async fn a_kubeconfig_comes_from_a_file_from_standard_input_or_from_the_workers_agent() {
    let answers = [
        ("POST /v1/workers", 200, worker()),
        (
            "GET /config/kubeconfig",
            200,
            json!({ "kubeconfig": "of the agent" }),
        ),
    ];
    let world = World::new("worker-add", &answers).await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("tee-1.yaml");
    std::fs::write(&file, "of a file").expect("our own folder");
    let file = file.display().to_string();
    for (arguments, kubeconfig) in [
        (["--kubeconfig", &file], "of a file"),
        (["--kubeconfig", "-"], "of standard input"),
        (["--agent-api", &world.base], "of the agent"),
    ] {
        let more = [
            "--context",
            "one",
            "--address",
            "192.0.2.7",
            "--attestation-port",
            "31443",
        ];
        let line = [&["worker", "add"][..], &arguments, &more].concat();
        let run = world.run_with_input(&line, "of standard input").await;
        run.ends(
            0,
            "Worker tee-1 with 8 GPUs at 192.0.2.7 is driven from now on.",
            "",
        );
        run.ends(0, "chutes-miner add-node --name tee-1", "");
        assert!(!format!("{run:?}").contains(kubeconfig), "{run:?}");
        let asked = world.fake.asked.lock().expect("no panic").clone();
        let expected = json!({
            "kubeconfig": kubeconfig, "context": "one", "address": "192.0.2.7", "attestation_port": 31443,
        });
        assert_eq!(asked.last().expect("it was asked").1, expected);
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_worker_is_said_before_anything_is_sent() {
    let answers = [("GET /config/kubeconfig", 200, json!({ "other": 1 }))];
    let world = World::new("worker-refused", &answers).await;
    let base = world.base.clone();
    for (arguments, code, why) in [
        (&["worker", "add"][..], 2, "--kubeconfig <PATH>"),
        (
            &["worker", "add", "--kubeconfig", "a", "--agent-api", &base],
            2,
            "cannot be used with",
        ),
        (
            &["worker", "add", "--kubeconfig", "/nowhere/k.yaml"],
            1,
            "read the kubeconfig /nowhere/k.yaml",
        ),
        (
            &["worker", "add", "--agent-api", &base],
            1,
            "answers without a kubeconfig",
        ),
        (
            &["worker", "add", "--agent-api", "http://127.0.0.1:1"],
            1,
            "is --agent-api right?",
        ),
    ] {
        world.run(arguments).await.ends(code, "", why);
    }
    assert!(!world.was_asked("POST /v1/workers"));
}

#[tokio::test]
async fn workers_are_listed_and_removed_after_a_yes() {
    let answers = [
        ("GET /v1/workers", 200, json!([worker()])),
        (
            "DELETE /v1/workers/tee-1",
            200,
            json!({ "name": "tee-1", "removed": true }),
        ),
    ];
    let world = World::new("worker-list", &answers).await;
    world.run(&["worker", "list"]).await.ends(0, "tee-1", "");
    let run = world.run_with_input(&["worker", "remove", "tee-1"], "n\n").await;
    run.ends(0, "", "its kubeconfig is forgotten");
    assert!(!world.was_asked("DELETE /v1/workers/tee-1"), "it was not meant");
    let run = world.run(&["worker", "remove", "tee-1", "--yes"]).await;
    run.ends(0, "Worker tee-1 is removed.", "");
    let unknown = world.run(&["worker", "remove", "other", "--yes"]).await;
    unknown.ends(1, "", "no such thing");
}

//! `observe trial`: the answer of the management API's own tests, as people and scripts see it.

use serde_json::{Value, json};

use crate::world::World;

/// What the management API answers in its tests, member by member.
const GOLDEN: &str = include_str!("../../../../coordinator/tests/api/golden/trial.json");

#[tokio::test]
async fn what_would_be_done_is_shown_and_nothing_else_is_asked() {
    let golden: Value = serde_json::from_str(GOLDEN).expect("JSON");
    let mut brief = golden.clone();
    brief["left_alone_because"] = json!([]);
    let answers = [
        ("GET /v1/observing/trial", 200, brief),
        ("GET /v1/observing/trial?all=true", 200, golden.clone()),
    ];
    let world = World::new("trial", &answers).await;
    let run = world.run(&["observe", "trial"]).await;
    for words in [
        "Would be placed",
        "│ name of chute-3 │ gpu-a  │ 1    │",
        "Would be stopped",
        "Instances that no deployment accounts for",
        "│ inst-9   │ name of chute-3 │ no deployment accounts for it: it is deleted",
        "│ advertise GPUs │ 1 GPUs of gpu-b │",
        "; unknown: images, metrics.",
        "Nothing was done: the cluster observes since 2025-01-01T00:00:00",
    ] {
        run.ends(0, words, "");
    }
    assert!(!run.stdout.contains("Would be left alone"), "{run:?}");
    let all = world.run(&["observe", "trial", "--all"]).await;
    all.ends(0, "│ name of chute-1 │ the chute only runs jobs", "");
    let run = world
        .run(&["observe", "trial", "--all", "--output", "json"])
        .await;
    assert_eq!(serde_json::from_str::<Value>(&run.stdout).expect("JSON"), golden);
    let asked = world.fake.asked.lock().expect("no panic");
    assert!(
        asked.iter().all(|(asked, _)| asked.starts_with("GET ")),
        "{asked:?}"
    );
}

#[tokio::test]
async fn what_is_in_the_way_is_said_and_a_cluster_that_acts_tries_nothing() {
    let empty = json!({
        "observing_since": "2025-01-01T00:00:00.000000+00:00", "in_the_way": ["no host has joined: agents first"],
        "go_on": 0, "left_alone": 0, "placed": [], "stopped": [],
    });
    let world = World::new("trial-empty", &[("GET /v1/observing/trial", 200, empty)]).await;
    let run = world.run(&["observe", "trial"]).await;
    run.ends(
        0,
        "! no host has joined: agents first\nNothing would be placed or stopped.\n",
        "",
    );

    let acts = json!({ "detail": "the cluster acts, for real: `chutes-miner explain` says why" });
    let world = World::new("trial-acts", &[("GET /v1/observing/trial", 409, acts)]).await;
    for arguments in [&["observe", "trial"][..], &["observe", "trial", "--follow"]] {
        let run = world.run(arguments).await;
        run.ends(
            1,
            "",
            "409 Conflict: the cluster acts, for real: `chutes-miner explain`",
        );
    }
    for arguments in [
        &["import", "--postgres", "postgresql://x", "--observe", "--apply"][..],
        &["import", "--postgres", "postgresql://x", "--follow"],
        &["observe", "trial", "--all", "--follow"],
    ] {
        world.run(arguments).await.ends(2, "", "Usage:");
    }
}

//! The command as users and scripts run it, against a miner and a validator that check every signature.

#[path = "command_line/hotkey.rs"]
mod hotkey;
#[path = "command_line/kept.rs"]
mod kept;
#[path = "command_line/trial.rs"]
mod trial;
#[path = "command_line/workers.rs"]
mod workers;
#[path = "command_line/world.rs"]
mod world;

use serde_json::{Value, json};

use world::{World, set_mode};

fn frames(messages: &[(&str, Option<&str>)]) -> Value {
    let frames = messages.iter().map(|(message, state)| {
        let mut frame = json!({ "timestamp": "2025-01-01T00:00:00.000000", "message": message });
        if let Some(state) = state {
            frame["state"] = json!(state);
        }
        format!("data: {frame}\n\n")
    });
    Value::String(frames.collect())
}

const ADD: [&str; 9] = [
    "add-node",
    "--name",
    "gpu-a",
    "--validator",
    "5Cf",
    "--gpu-short-ref",
    "h100_sxm",
    "--agent-api",
    "http://x",
];

#[tokio::test]
async fn add_node_tells_the_progress_and_the_price_of_each_gpu() {
    let good = frames(&[
        ("adding", None),
        ("completed server bootstrapping in 3.0 seconds", Some("ready")),
    ]);
    let world = World::new("add", &[("POST /servers/", 200, good)]).await;
    let run = world.run(&[&ADD[..], &["--hourly-cost", "2.00"]].concat()).await;
    let last = "2025-01-01T00:00:00.000000 completed server bootstrapping";
    run.ends(0, last, "$2.00 for EACH GPU");
    assert!(!run.stderr.contains("whole host"), "{run:?}");
    let body = world.fake.asked.lock().expect("no panic")[0].1.clone();
    let expected = json!({
        "name": "gpu-a", "validator": "5Cf", "hourly_cost": 2.0, "gpu_short_ref": "h100_sxm",
    });
    assert_eq!(body, expected);
    let run = world.run(&[&ADD[..], &["--hourly-cost", "18.80"]].concat()).await;
    run.ends(0, "completed", "looks like the cost of a whole host");
    world.run(&["add-node", "--help"]).await.ends(0, "ONE GPU", "");
}

#[tokio::test]
async fn add_node_fails_when_the_node_was_not_added() {
    let failed = frames(&[("adding", None), ("no: wrong device", Some("failed"))]);
    let ended = frames(&[("adding", None)]);
    let conflict = json!({ "detail": "already provisioned!" });
    for (name, status, body, reason) in [
        ("failed", 200, failed, "wrong device"),
        ("ended", 200, ended, "chutes-miner status"),
        ("conflict", 409, conflict, "already provisioned!"),
    ] {
        let world = World::new(name, &[("POST /servers/", status, body)]).await;
        let run = world.run(&[&ADD[..], &["--hourly-cost", "2"]].concat()).await;
        run.ends(1, "", reason);
    }
}

fn server() -> Value {
    let device = json!({
        "name": "NVIDIA H100", "memory": 85_031_714_816_u64, "clock_rate": 1_980_000.0, "processors": 132,
    });
    json!({
        "server_id": "uid", "name": "gpu-a", "status": "Ready", "gpu_count": 1, "memory_per_gpu": 32,
        "cpu_per_gpu": 4, "hourly_cost": 1.5, "ip_address": "198.51.100.7", "locked": true,
        "created_at": "2025-01-01T10:20:30.000000+00:00",
        "gpus": [{ "gpu_id": "aa", "device_info": device, "verified": true }],
        "deployments": [{
            "chute": { "name": "chute" }, "gpus": [{}], "port": 31001, "active": true, "stub": false,
            "created_at": "2025-01-01T10:20:30.000000+00:00",
        }],
    })
}

#[tokio::test]
async fn the_inventory_is_a_table_or_json() {
    let world = World::new("inventory", &[("GET /servers/", 200, json!([server()]))]).await;
    let run = world.run(&["local-inventory"]).await;
    run.ends(0, "Server: gpu-a", "");
    for text in [
        "│ Hourly Cost │ $1.50            │",
        "│ Created     │ 2025-01-01 10:20 │",
        "│ Locked      │ Yes              │",
        "│ NVIDIA H100 │ 79.2GB │ 1980        │ 132        │ Verified │",
        "│ chute      │ 1    │ 31001 │ 2025-01-01 10:20 │ Active │",
        &"=".repeat(80),
    ] {
        assert!(run.stdout.contains(text), "{text} is not in\n{}", run.stdout);
    }
    for arguments in [
        &["local-inventory", "--raw-json"][..],
        &["--output", "json", "local-inventory"],
    ] {
        let run = world.run(arguments).await;
        let printed: Value = serde_json::from_str(&run.stdout).expect("JSON");
        assert_eq!(printed, json!([server()]));
        assert!(run.stdout.contains("\n  {\n    \""), "two spaces deep");
    }
    let yaml = world.run(&["local-inventory", "--output", "yaml"]).await;
    yaml.ends(0, "name: \"gpu-a\"", "");
    world
        .run(&["local-inventory", "-n", "uid"])
        .await
        .ends(0, "Server: gpu-a", "");
    let none = world.run(&["local-inventory", "-n", "gpu"]).await;
    none.ends(1, "", "no server has the name or id gpu");
}

#[tokio::test]
async fn locks_are_printed_as_scripts_expect() {
    let answers = [
        (
            "GET /servers/gpu-a/lock",
            200,
            json!({ "name": "gpu-a", "locked": true }),
        ),
        (
            "GET /servers/gpu-a/unlock",
            200,
            json!({ "name": "gpu-a", "locked": false }),
        ),
    ];
    let world = World::new("lock", &answers).await;
    let run = world.run(&["lock", "--name", "gpu-a"]).await;
    run.ends(0, "Server gpu-a lock status is now: True\n", "");
    let run = world.run(&["unlock", "--name", "gpu-a"]).await;
    run.ends(0, "Server gpu-a lock status is now: False\n", "");
    let run = world.run(&["lock", "--name", "a/b"]).await;
    run.ends(1, "", "404 Not Found: no such thing");
    assert!(world.was_asked("GET /servers/a%2Fb/lock"));
}

#[tokio::test]
async fn deleting_a_node_with_jobs_asks_first() {
    let started = || json!({ "status": "started" });
    let answers = [
        (
            "GET /servers/gpu-a/delete_preflight",
            200,
            json!({ "jobs": [{}, {}] }),
        ),
        ("DELETE /servers/gpu-a?include_jobs=true", 200, started()),
        ("GET /servers/gpu-b/delete_preflight", 200, json!({ "jobs": [] })),
        ("DELETE /servers/gpu-b", 200, started()),
        ("GET /servers/gpu-c/delete_preflight", 200, json!({ "jobs": [] })),
    ];
    let world = World::new("delete", &answers).await;
    let delete = ["delete-node", "--name", "gpu-a"];
    world
        .run_with_input(&delete, "n\n")
        .await
        .ends(0, "", "2 jobs run on gpu-a");
    world
        .run_with_input(&delete, "")
        .await
        .ends(0, "", "Continue (y/n)? ");
    assert!(!world.was_asked("DELETE /servers/gpu-a?include_jobs=true"));
    world
        .run_with_input(&delete, "y\n")
        .await
        .ends(0, "\"status\": \"started\"", "");
    let run = world.run(&[&delete[..], &["--yes"]].concat()).await;
    run.ends(0, "started", "2 jobs");
    world
        .run(&["delete-node", "--name", "gpu-b"])
        .await
        .ends(0, "started", "");
    let run = world.run(&["delete-node", "--name", "gpu-c"]).await;
    run.ends(0, "", "there is no node gpu-c");
    world
        .run(&["delete-node", "--name", "gpu-d"])
        .await
        .ends(1, "", "no such thing");
}

#[tokio::test]
async fn purges_say_what_happens_to_jobs() {
    let done = json!({ "status": "initiated", "deployments_purged": [] });
    let answers = [
        ("DELETE /deployments/purge", 200, done.clone()),
        ("DELETE /deployments/purge?include_jobs=true", 200, done.clone()),
        (
            "DELETE /deployments/dep-1",
            200,
            json!({ "deployment_purged": {} }),
        ),
        (
            "GET /servers/gpu-a/delete_preflight",
            200,
            json!({ "jobs": [{}] }),
        ),
        ("DELETE /servers/gpu-a/deployments", 200, done.clone()),
        ("DELETE /servers/gpu-a/deployments?include_jobs=true", 200, done),
    ];
    let world = World::new("purge", &answers).await;
    world
        .run(&["purge-deployments"])
        .await
        .ends(0, "initiated", "Jobs go on");
    let run = world.run(&["purge-deployments", "--include-jobs"]).await;
    run.ends(0, "initiated", "Jobs are stopped too");
    let run = world.run(&["purge-deployment", "-d", "dep-1"]).await;
    run.ends(0, "deployment_purged", "");
    let run = world.run(&["purge-deployment", "-n", "gpu-a"]).await;
    run.ends(0, "initiated", "Jobs go on");
    let with_jobs = ["purge-server", "-n", "gpu-a", "--include-jobs"];
    world
        .run_with_input(&with_jobs, "no\n")
        .await
        .ends(0, "", "1 jobs run on gpu-a");
    assert!(!world.was_asked("DELETE /servers/gpu-a/deployments?include_jobs=true"));
    world
        .run_with_input(&with_jobs, "y\n")
        .await
        .ends(0, "initiated", "");
    let text = "Error: Either deployment_id or node_id must be provided, but not both.";
    world.run(&["purge-deployment"]).await.ends(1, "", text);
    let run = world.run(&["purge-deployment", "-d", "a", "-n", "b"]).await;
    run.ends(1, "", text);
}

#[tokio::test]
async fn fixing_takes_what_was_selected_and_no_more() {
    let row = |id: &str, is_job: bool, reason: Value, can_be_stopped: bool| {
        json!({
            "kind": "deployment", "id": id, "name": "chute", "state": "serving", "host": "absent",
            "validator": "active", "reason": reason, "is_job": is_job, "can_be_stopped": can_be_stopped,
        })
    };
    let gone = || json!("the host does not have it");
    let rows = json!({ "differences": 2, "sources": {}, "rows": [
        row("dep-1", false, gone(), true),
        row("dep-2", true, gone(), true),
        row("dep-3", false, Value::Null, true),
        row("dep-4", false, json!("stopping"), false),
    ]});
    let answers = [
        ("GET /v1/diff", 200, rows.clone()),
        ("GET /v1/diff?all=true", 200, rows),
        (
            "POST /v1/stop",
            200,
            json!({ "stopping": ["dep-1"], "left_by_the_budget": [] }),
        ),
    ];
    let world = World::new("diff", &answers).await;
    world
        .run(&["diff"])
        .await
        .ends(0, "the host does not have it", "");
    for (arguments, code, text) in [
        (&["--fix"][..], 2, "--select"),
        (&["--fix", "--select", "dep-2"], 1, "--include-jobs stops it too"),
        (&["--fix", "--select", "dep-3"], 1, "does not differ"),
        (&["--fix", "--select", "dep-4"], 1, "already"),
        (
            &["--fix", "--select", "dep-1", "dep-9"],
            1,
            "dep-9 is no deployment of the diff",
        ),
    ] {
        let run = world.run(&[&["diff"][..], arguments].concat()).await;
        run.ends(code, "", text);
    }
    assert!(!world.was_asked("POST /v1/stop"), "nothing was stopped so far");
    let run = world.run(&["diff", "--fix", "--select", "dep-1"]).await;
    run.ends(0, "dep-1", "");
    let asked = world.fake.asked.lock().expect("no panic");
    let body = &asked.last().expect("asked").1;
    assert_eq!(body["deployments"], json!(["dep-1"]));
    assert_eq!(
        (&body["include_jobs"], &body["budgeted"]),
        (&json!(false), &json!(true))
    );
}

#[tokio::test]
async fn the_validators_view_is_joined_and_scorched() {
    let node = json!({
        "uuid": "aa", "name": "NVIDIA H100", "memory": 85_031_714_816_u64, "clock_rate": 1_980_000.0,
        "created_at": "2025-01-01T10:20:30", "verified_at": "2025-01-01T10:30:30",
    });
    let runs = json!([{ "gpu_id": "aa", "chute_name": "c", "chute_id": "id" }]);
    let answers = [
        (
            "GET /miner/nodes/",
            200,
            Value::String(format!("data: {node}\n\n")),
        ),
        ("GET /miner/inventory", 200, runs),
        ("DELETE /nodes/aa", 200, json!({})),
    ];
    let world = World::new("remote", &answers).await;
    let run = world.run(&["remote-inventory"]).await;
    run.ends(0, "│ NVIDIA H100 │ id c", "");
    assert!(run.stdout.contains("Verified: 2025-01-01 10:30"), "{run:?}");
    assert!(run.stdout.contains("Pending"), "{run:?}");
    let run = world.run_with_input(&["scorch-remote"], "y\n").await;
    run.ends(0, "", "Type scorch to go on");
    assert!(!world.was_asked("DELETE /nodes/aa"));
    let run = world.run_with_input(&["scorch-remote"], "scorch\n").await;
    run.ends(
        0,
        "Deleting NVIDIA H100 with uuid aa\n  successfully deleted aa\n",
        "",
    );
    let run = world.run(&["scorch-remote", "--yes"]).await;
    run.ends(0, "successfully deleted aa", "");
    let run = world.run(&["delete-remote", "--gpu-id", "aa"]).await;
    run.ends(0, "  successfully deleted aa", "");
    world
        .run(&["delete-remote", "--gpu-id", "bb"])
        .await
        .ends(1, "", "404");
}

#[tokio::test]
async fn hosts_are_invited_listed_pinned_and_removed() {
    let hosts = json!([
        {
            "server_id": "a-uid", "name": "gpu-a", "site": "east", "address": "a:4433", "member": 1,
            "eligible": true, "role": "voter", "leads": true, "pin": "auto", "connected": true,
            "joined_at": "2025-01-01T10:20:30.000000+00:00", "revoked_at": null,
        },
        {
            "server_id": "b-uid", "name": "gpu-b", "site": "", "address": "b:4433", "member": null,
            "eligible": false, "role": "removed", "leads": false, "pin": "auto", "connected": false,
            "joined_at": "2025-01-01T10:20:30.000000+00:00",
            "revoked_at": "2025-01-02T10:20:30.000000+00:00",
        },
    ]);
    let invited = json!({
        "invite": "0a", "token": "chutes-join-1.00ff", "eligible": true,
        "expires_at": "2025-01-01T00:10:00.000000+00:00",
    });
    let answers = [
        ("POST /hosts/invites", 200, invited.clone()),
        ("GET /hosts", 200, hosts.clone()),
        ("DELETE /hosts/gpu%20b", 200, json!({ "role": "removed" })),
        (
            "DELETE /hosts/gpu-a",
            409,
            json!({ "detail": "host a-uid is the only member" }),
        ),
        ("PUT /hosts/gpu-a/pin", 200, json!({ "pin": "voter" })),
    ];
    let world = World::new("hosts", &answers).await;
    let run = world
        .run(&["host", "invite", "--eligible", "--ttl", "10m", "--site", "east"])
        .await;
    run.ends(
        0,
        "",
        "until 2025-01-01 00:10 UTC, for a host that has the miner's seed",
    );
    assert_eq!(run.stdout, "chutes-join-1.00ff\n", "the word alone can be piped");
    let run = world.run(&["host", "invite", "--output", "json"]).await;
    let printed: Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!((printed, run.stderr.as_str()), (invited, ""));
    let bodies = || -> Vec<Value> {
        let asked = world.fake.asked.lock().expect("no panic");
        asked.iter().map(|(_, body)| body.clone()).collect()
    };
    assert_eq!(
        bodies(),
        [
            json!({ "eligible": true, "ttl": "10m", "site": "east" }),
            json!({ "eligible": false }),
        ]
    );
    let run = world.run(&["host", "list"]).await;
    run.ends(
        0,
        "│ gpu-a │ a-uid │ east │ a:4433  │ voter, leads │ auto │ yes",
        "",
    );
    run.ends(
        0,
        "│ removed      │ auto │ no        │ 2025-01-01 10:20 │ 2025-01-02 10:20 │",
        "",
    );
    let run = world.run(&["host", "list", "--output", "json"]).await;
    assert_eq!(serde_json::from_str::<Value>(&run.stdout).expect("JSON"), hosts);
    let run = world.run(&["host", "pin", "gpu-a", "voter"]).await;
    run.ends(0, "\"pin\": \"voter\"", "");
    assert_eq!(bodies().last(), Some(&json!({ "pin": "voter" })));
    let run = world.run(&["host", "pin", "gpu-a", "maybe"]).await;
    run.ends(2, "", "possible values: auto, voter, never");
    let remove = ["host", "remove", "gpu b"];
    world
        .run_with_input(&remove, "n\n")
        .await
        .ends(0, "", "gpu b leaves the cluster");
    assert!(!world.was_asked("DELETE /hosts/gpu%20b"));
    world.run_with_input(&remove, "y\n").await.ends(0, "removed", "");
    let run = world.run(&["host", "remove", "gpu-a", "--yes"]).await;
    run.ends(1, "", "409 Conflict: host a-uid is the only member");
}

#[tokio::test]
async fn the_members_are_shown_and_the_lead_is_handed_over() {
    let member = |member: u64, leads: bool, ago: Value| {
        json!({
            "member": member, "host": format!("gpu-{member}"), "site": "east", "role": "voter",
            "leads": leads, "matched": ago.as_u64().map(|_| 90), "answered_ago_ms": ago,
            "clock_ahead_ms": if leads { 400 } else { -3_600_000 },
        })
    };
    let raft = json!({
        "term": 4, "leader": 1, "answered_by": 1,
        "members": [member(1, true, Value::Null), member(2, false, json!(40))],
        "sites": [
            { "site": "east", "voters": 2, "survives": false },
            { "site": "", "voters": 1, "survives": true },
        ],
    });
    let answers = [
        ("GET /v1/raft", 200, raft.clone()),
        (
            "GET /v1/status",
            200,
            json!({ "cluster": { "members": raft["members"] } }),
        ),
        (
            "POST /v1/raft/transfer",
            200,
            json!({ "leader": 2, "host": "gpu-2" }),
        ),
    ];
    let world = World::new("raft", &answers).await;
    let run = world.run(&["raft", "status"]).await;
    run.ends(
        0,
        "│ 1      │ gpu-1 │ east │ voter, leads │ -         │ -         │",
        "",
    );
    run.ends(
        0,
        "│ 2      │ gpu-2 │ east │ voter        │ 90        │ 40 ms ago │",
        "",
    );
    assert!(!run.stdout.contains("clock of gpu-1"));
    run.ends(0, "The clock of gpu-2 is -3600 s ahead", "");
    run.ends(
        0,
        "Without site east: no change is possible until it is back.",
        "",
    );
    run.ends(0, "Without the hosts that name no site: the cluster goes on.", "");
    let yaml = world.run(&["raft", "status", "--output", "yaml"]).await;
    yaml.ends(0, "leader: 1", "");
    let run = world.run(&["status"]).await;
    run.ends(0, "gpu-1 (voter, leads), gpu-2 (voter)", "");
    for (arguments, body) in [
        (&["raft", "transfer", "gpu-2"][..], json!({ "to": "gpu-2" })),
        (&["raft", "transfer"], json!({})),
    ] {
        world.run(arguments).await.ends(0, "gpu-2 leads now", "");
        let asked = world.fake.asked.lock().expect("no panic");
        assert_eq!(asked.last().expect("asked").1, body);
    }
}

#[tokio::test]
async fn another_authority_is_made_and_the_old_one_dropped() {
    let host = |name: &str, certificate: &str, trusts_old: bool| {
        json!({
            "host": name, "server_id": format!("{name}-uid"), "member": null,
            "certificate": certificate, "trusts_old": trusts_old,
        })
    };
    let during = json!({
        "authority": "aa", "next": "bb", "begun_at": "2026-11-28T00:00:00.000000+00:00",
        "hosts": [host("gpu-a", "new", false), host("gpu-b", "old", false)],
    });
    let after = json!({
        "authority": "bb", "next": null, "begun_at": null,
        "hosts": [host("gpu-a", "current", false), host("gpu-b", "current", true)],
    });
    let answers = [
        ("GET /v1/ca", 200, during.clone()),
        ("POST /v1/ca/rotate", 200, during),
        ("POST /v1/ca/finish", 200, after),
    ];
    let world = World::new("ca", &answers).await;
    for arguments in [["ca", "status"], ["ca", "rotate"]] {
        let run = world.run(&arguments).await;
        run.ends(0, "The new one: bb, since", "");
        run.ends(0, "gpu-b │ gpu-b-uid │ of the old authority", "");
        run.ends(0, "1 of 2 hosts change over when they are connected: gpu-b.", "");
    }
    let run = world.run(&["ca", "rotate", "--finish"]).await;
    run.ends(0, "gpu-a │ gpu-a-uid │ good", "");
    run.ends(0, "these hosts forget it when they are connected: gpu-b.", "");
    let run = world.run(&["ca", "status", "--output", "json"]).await;
    run.ends(0, "\"certificate\": \"old\"", "");

    let run = world.run(&["raft", "recover"]).await;
    run.ends(0, "chutes-agent recover", "");
}

#[tokio::test]
async fn of_several_addresses_the_first_that_is_there_is_asked() {
    let world = World::new("several", &[("GET /hosts", 200, json!([]))]).await;
    let there = &world.base;
    let several = format!("http://127.0.0.1:1, {there}");
    let run = world.run(&["host", "list", "--miner-api", &several]).await;
    run.ends(
        0,
        "Hosts",
        "cannot reach http://127.0.0.1:1: the next address is tried",
    );
    // An answer is an answer, also a refusal: nobody else is asked.
    let several = format!("{there},http://127.0.0.1:1");
    let run = world.run(&["raft", "status", "--miner-api", &several]).await;
    run.ends(1, "", "404 Not Found");
    assert!(!run.stderr.contains("next address"), "{run:?}");
    let run = world
        .run(&[
            "raft",
            "status",
            "--miner-api",
            "http://127.0.0.1:1,http://127.0.0.1:2",
        ])
        .await;
    run.ends(1, "", "cannot reach the miner's API at http://127.0.0.1:2");
}

#[tokio::test]
async fn errors_name_the_thing_and_the_way_out() {
    let world = World::new("errors", &[]).await;
    world.run(&[]).await.ends(2, "", "Usage");
    world.run(&["lock"]).await.ends(2, "", "--name");
    world
        .run(&["local-inventory", "--bogus"])
        .await
        .ends(2, "", "--bogus");
    world.run(&["--help"]).await.ends(0, "add-node", "");
    let run = world.run(&["status", "--miner-api", "http://127.0.0.1:1"]).await;
    run.ends(1, "", "is --miner-api right?");
    let run = world.run(&["status", "--miner-api", "nonsense"]).await;
    run.ends(1, "", "is not the URL of an API");
    let run = world.run(&["status", "--hotkey", "/nowhere"]).await;
    run.ends(1, "", "read the hotkey file /nowhere");
    let other = json!({ "secretSeed": format!("0x{}", "02".repeat(32)) }).to_string();
    std::fs::write(&world.hotkey, other).expect("write the key");
    let run = world.run(&["status"]).await;
    run.ends(1, "", "is --hotkey this miner's key");
    set_mode(&world.hotkey, 0o644);
    let run = world.run(&["status"]).await;
    run.ends(1, "", "others can read");
    assert!(!run.stderr.contains("0202"), "the seed is not printed: {run:?}");
}

#[tokio::test]
async fn the_output_of_a_deployment_is_printed_and_followed_to_its_end() {
    let log = |text: &str, next: &str, gone: bool| json!({ "deployment_id": "d1", "server_name": "gpu-a", "text": text, "next": next, "gone": gone });
    let answers = [
        ("GET /v1/deployments/d1/log", 200, log("one\n", "2", false)),
        (
            "GET /v1/deployments/d1/log?after=2",
            200,
            log("two\n", "4", false),
        ),
        ("GET /v1/deployments/d1/log?after=4", 200, log("", "4", true)),
        (
            "GET /v1/deployments/d1/log?previous=true",
            502,
            json!({ "detail": "host gpu-a: none" }),
        ),
    ];
    let world = World::new("logs", &answers).await;
    let run = world.run(&["logs", "d1"]).await;
    run.ends(0, "one\n", "");
    assert_eq!(run.stdout, "one\n");
    let run = world.run(&["logs", "d1", "--follow"]).await;
    run.ends(0, "one\ntwo\n", "");
    let run = world.run(&["--output", "json", "logs", "d1"]).await;
    run.ends(0, "\"next\": \"2\"", "");
    let run = world.run(&["logs", "d1", "--previous"]).await;
    run.ends(1, "", "host gpu-a: none");
    world
        .run(&["logs", "d1", "--previous", "--follow"])
        .await
        .ends(2, "", "cannot be used with");
}

#[tokio::test]
async fn events_are_a_table() {
    let event = json!({ "at": "2025-01-01T10:20:30.000000+00:00", "object": "Pod p", "reason": "BackOff",
        "message": "again", "count": 2 });
    let answer = json!({ "server_name": "gpu-a", "events": [event] });
    let world = World::new("events", &[("GET /v1/deployments/d1/events", 200, answer)]).await;
    let run = world.run(&["events", "d1"]).await;
    run.ends(0, "2025-01-01T10:20:30 │ 2     │ Pod p  │ BackOff │ again", "");
}

#[tokio::test]
async fn the_validators_copy_of_the_output_is_printed_with_a_way_to_go_on() {
    let stream =
        "data: .\n\ndata: {\"log\": \"one\\n\", \"cursor\": \"2025-01-01T10:20:30.5\"}\n\ndata: plain\n\n";
    let answers = [
        ("GET /miner/instance_logs", 200, json!(stream)),
        (
            "GET /miner/instance_logs?cursor=2025-01-01T10%3A20%3A30",
            500,
            json!({ "detail": "no" }),
        ),
    ];
    let world = World::new("instance-logs", &answers).await;
    let run = world.run(&["instance-logs", "--jwt", "jwt"]).await;
    run.ends(0, "one\nplain\n", "");
    let again = ["instance-logs", "--jwt", "jwt", "--cursor", "2025-01-01T10:20:30"];
    let run = world.run(&again).await;
    run.ends(1, "", "To go on from here: --cursor 2025-01-01T10:20:30");
    let run = world
        .run(&["instance-logs", "--jwt", "jwt", "--cursor", "yesterday"])
        .await;
    run.ends(1, "", "YYYY-MM-DDTHH:MM:SS");
    world
        .run(&["instance-logs", "--jwt", "wrong"])
        .await
        .ends(1, "", "401");
}

#[tokio::test]
async fn a_cluster_is_told_to_observe_and_to_act() {
    let answer = |observing: bool| json!({ "observing": observing, "changed": true });
    let world = World::new("observe", &[("PUT /v1/observing", 200, answer(false))]).await;
    let run = world.run_with_input(&["observe", "stop"], "n\n").await;
    run.ends(0, "", "delete each other's instances");
    assert!(!world.was_asked("PUT /v1/observing"));
    let run = world.run_with_input(&["observe", "stop"], "y\n").await;
    run.ends(0, "The cluster acts.", "");
    let run = world.run(&["observe", "start"]).await;
    run.ends(0, "validators hear nothing from it", "");
    let asked = world.fake.asked.lock().expect("no panic").clone();
    let bodies: Vec<bool> = asked
        .iter()
        .filter_map(|(_, body)| body["observing"].as_bool())
        .collect();
    assert_eq!(bodies, [false, true]);
}

//! From the announcement of GPUs to the deletion of an instance, and what is refused on the way.

use axum::body::Bytes;
use protocol::hotkey::Signer;
use protocol::signing::{Purpose, Tail, headers_to_validator};
use serde_json::{Value, json};

use crate::support::{Flow, Socket, World, chute, gpu, now, quiet_scenario};

#[tokio::test(flavor = "multi_thread")]
async fn a_chute_is_launched_from_announcement_to_deletion() {
    let world = World::start(quiet_scenario(vec![chute("echo")])).await;
    let mut socket = Socket::authenticated(&world).await;
    let gpus = world.verified_gpus(2).await;
    for _ in &gpus {
        let event = socket.event("gpu_verified").await;
        assert_eq!(event["filter_recipients"], json!([world.miner.hotkey()]));
    }
    let nodes = world.rows("nodes").await;
    assert_eq!(nodes.len(), 2);
    assert_eq!(nodes[0]["seed"], nodes[1]["seed"]);
    assert!(nodes[0]["seed"].as_u64().is_some_and(|seed| seed > 0));
    assert!(nodes[0]["verified_at"].is_string());

    let chute = world.chute_id("echo").await;
    let (status, config) = world.launch_config(&format!("chute_id={chute}")).await;
    assert_eq!(status, 200, "{config}");
    let token = config["token"].as_str().expect("text");
    let (container, port) = world
        .run_chute("echo", &gpus[..1], Flow::Token(token), None)
        .await;
    let created = socket.event("instance_created").await;
    assert_eq!(created["data"]["config_id"], config["config_id"]);
    assert_eq!(created["data"]["gpu_model_name"], "software");
    let instance = created["data"]["instance_id"].as_str().expect("text");
    let verified = socket.event("instance_verified").await;
    assert_eq!(verified["data"]["instance_id"], instance);
    let activated = socket.event("instance_activated").await;
    assert_eq!(activated["data"]["instance_id"], instance);
    let alive = world
        .client
        .get(format!("http://127.0.0.1:{port}/_alive"))
        .send()
        .await;
    assert_eq!(alive.expect("an answer").status(), 200);

    let rows = world.rows("instances").await;
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (&rows[0]["active"], &rows[0]["verified"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(rows[0]["symmetric_key"].as_str().map(str::len), Some(32));
    let (_, text) = world
        .call("GET", "/miner/active_instances/", Purpose::Miner)
        .await;
    assert_eq!(
        serde_json::from_str::<Value>(&text).expect("JSON")[0]["instance_id"],
        instance
    );

    let path = format!("/instances/{chute}/{instance}");
    let (status, text) = world.call("DELETE", &path, Purpose::Instances).await;
    assert_eq!((status, text.contains("\"deleted\":true")), (200, true), "{text}");
    let deleted = socket.event("instance_deleted").await;
    assert_eq!(deleted["data"]["instance_id"], instance);
    assert_eq!(world.call("DELETE", &path, Purpose::Instances).await.0, 404);
    assert!(world.rows("instances").await.is_empty());
    let explicit = "/miner/instances/?explicit_null=True";
    assert_eq!(
        world.call("GET", explicit, Purpose::Miner).await.1,
        "data: NO_ITEMS\n"
    );
    container.abort();

    let score = world.control("score").await;
    assert_eq!(score["gpus_proved"], 2);
    assert_eq!(score["deployments_verified"], 1);
    assert!(
        score["paid_seconds"]
            .as_f64()
            .is_some_and(|seconds| seconds > 0.0)
    );
    let kinds = world.kinds();
    for kind in [
        "nodes_announced",
        "nodes_verified",
        "token_granted",
        "claim_granted",
        "instance_verified",
        "instance_activated",
        "instance_deleted",
    ] {
        assert!(kinds.iter().any(|k| k == kind), "{kind} is not in the ledger");
    }
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_are_checked_one_by_one() {
    let world = World::start(quiet_scenario(vec![chute("echo"), chute("other")])).await;
    let gpus = world.verified_gpus(3).await;
    let (status, answer) = world.announce(&[gpu(0), gpu(77)]).await;
    assert_eq!(status, 409, "{answer}");
    let chute = world.chute_id("echo").await;
    let (_, config) = world.launch_config(&format!("chute_id={chute}")).await;
    let token = config["token"].as_str().expect("text").to_owned();
    let path = format!(
        "/instances/launch_config/{}",
        config["config_id"].as_str().expect("text")
    );
    let body = |gpus: &[protocol::id::GpuId], host: &str, port: u16| {
        json!({
            "gpus": gpus.iter().cloned().map(proof::software_device).collect::<Vec<_>>(),
            "host": host,
            "port_mappings": [{"internal_port": 8000, "external_port": port, "proto": "tcp", "default": true}],
            "env": "x", "code": "y", "fsv": null,
        })
    };
    let claim = async |token: &str, body: Value| world.container("POST", &path, token, Some(body)).await;
    let good = body(&gpus[..1], "127.0.0.1", 40_000);
    for (name, token, body, expected) in [
        ("bad token", "a.b.c", good.clone(), 401),
        ("no GPU", &token, body(&[], "127.0.0.1", 40_000), 400),
        ("two GPUs", &token, body(&gpus[..2], "127.0.0.1", 40_000), 400),
        ("not mine", &token, body(&[gpu(99)], "127.0.0.1", 40_000), 404),
        ("other host", &token, body(&gpus[..1], "127.0.0.2", 40_000), 400),
        ("low port", &token, body(&gpus[..1], "127.0.0.1", 21), 422),
        ("no ports", &token, json!({"gpus": [], "host": "x"}), 422),
    ] {
        let (status, answer) = claim(token, body).await;
        assert_eq!(status, expected, "{name}: {answer}");
    }
    // A GPU whose verification fails: nobody answers at its port.
    let mut node = json!(proof::software_device(gpu(88)));
    node["device_index"] = json!(0);
    node["gpu_identifier"] = json!("software");
    node["verification_host"] = json!("127.0.0.1");
    node["verification_port"] = json!(crate::support::free_port());
    let (status, answer) = world.post("POST", "/nodes/", &json!({"nodes": [node]})).await;
    assert_eq!(status, 202, "{answer}");
    let outcome = world.outcome_of(answer["task_id"].as_str().expect("text")).await;
    assert_eq!(outcome["status"], "failed", "{outcome}");
    let (status, answer) = claim(&token, body(&[gpu(88)], "127.0.0.1", 40_000)).await;
    assert_eq!(status, 400, "an unverified GPU: {answer}");
    let (status, answer) = claim(&token, good.clone()).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(claim(&token, good).await.0, 401, "a token is used once");
    let activate = format!("{path}/activate");
    assert_eq!(
        world.container("GET", &activate, &token, None).await.0,
        403,
        "not verified"
    );

    // A second launch: a GPU in use, then an address in use.
    let other = world.chute_id("other").await;
    let (_, config) = world.launch_config(&format!("chute_id={other}")).await;
    let token = config["token"].as_str().expect("text").to_owned();
    let path = format!(
        "/instances/launch_config/{}",
        config["config_id"].as_str().expect("text")
    );
    let in_use = body(&gpus[..1], "127.0.0.1", 40_001);
    assert_eq!(world.container("POST", &path, &token, Some(in_use)).await.0, 409);
    let taken = body(&gpus[1..2], "127.0.0.1", 40_000);
    assert_eq!(world.container("POST", &path, &token, Some(taken)).await.0, 500);

    // A wrong answer ends the instance.
    let mut socket = Socket::authenticated(&world).await;
    let free = body(&gpus[1..2], "127.0.0.1", 40_002);
    assert_eq!(world.container("POST", &path, &token, Some(free)).await.0, 200);
    let wrong = json!({"response": "AAAA", "iv": "00".repeat(16), "proof": {}});
    let (status, answer) = world.container("PUT", &path, &token, Some(wrong.clone())).await;
    assert_eq!(status, 403, "{answer}");
    let deleted = socket.event("instance_deleted").await;
    assert_eq!(deleted["data"]["config_id"], config["config_id"]);
    assert_eq!(world.container("PUT", &path, &token, Some(wrong)).await.0, 404);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_refused_by_rule() {
    let mut private = chute("private");
    private.public = false;
    let mut scenario = quiet_scenario(vec![chute("echo"), private]);
    scenario.gates.private_needs_public = true;
    let blocked = Signer::from_seed(&[3; 32]);
    scenario.hotkeys.push(blocked.hotkey().clone());
    scenario
        .gates
        .blacklist
        .push((blocked.hotkey().clone(), "for cheating".to_owned()));
    let world = World::start(scenario).await;
    let (echo, private) = (world.chute_id("echo").await, world.chute_id("private").await);
    for (query, expected) in [
        ("chute_id=nothing".to_owned(), 404),
        (String::new(), 422),
        (format!("chute_id={private}"), 403),
        (format!("chute_id={echo}&job_id=nothing"), 404),
        (format!("chute_id={echo}"), 200),
    ] {
        let (status, answer) = world.launch_config(&query).await;
        assert_eq!(status, expected, "{query}: {answer}");
    }
    let path = format!("/instances/launch_config?chute_id={echo}");
    let headers = headers_to_validator(&blocked, now(), &Tail::Purpose(Purpose::Launch));
    let (status, text) = world.send("GET", &path, headers, None).await;
    assert_eq!((status, text.contains("for cheating")), (403, true), "{text}");

    let gpus = world.verified_gpus(2).await;
    world.launch("echo", &gpus[..1]).await;
    let (status, answer) = world.launch_config(&format!("chute_id={echo}")).await;
    assert_eq!(status, 423, "at its target: {answer}");
    world
        .act(json!({"action": "set_demand", "chute": "echo", "demand": {"target_count": 9}}))
        .await;
    assert_eq!(world.launch_config(&format!("chute_id={echo}")).await.0, 200);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_bad_signatures_are_401() {
    let world = World::start(quiet_scenario(vec![])).await;
    let stranger = Signer::from_seed(&[9; 32]);
    let tail = Tail::Purpose(Purpose::Miner);
    let good = || headers_to_validator(&world.miner, now(), &tail);
    let without = |name: &str| {
        let mut headers = good();
        headers.retain(|(n, _)| *n != name);
        headers
    };
    let with = |name: &str, value: String| {
        let mut headers = without(name);
        headers.push((
            ["X-Chutes-Hotkey", "X-Chutes-Nonce", "X-Chutes-Signature"]
                .into_iter()
                .find(|n| *n == name)
                .expect("a name"),
            value,
        ));
        headers
    };
    let signature = |headers: &[(&str, String)]| {
        let found = headers.iter().find(|(name, _)| *name == "X-Chutes-Signature");
        found.expect("signed").1.clone()
    };
    for (name, headers, expected) in [
        ("good", good(), 200),
        ("nothing", vec![], 401),
        ("no hotkey", without("X-Chutes-Hotkey"), 401),
        ("no nonce", without("X-Chutes-Nonce"), 401),
        ("no signature", without("X-Chutes-Signature"), 401),
        (
            "0x",
            with("X-Chutes-Signature", format!("0x{}", signature(&good()))),
            401,
        ),
        ("milliseconds", with("X-Chutes-Nonce", now().0.to_string()), 401),
        ("stranger", headers_to_validator(&stranger, now(), &tail), 401),
        (
            "old",
            headers_to_validator(&world.miner, now() - 600_000, &tail),
            401,
        ),
        (
            "future",
            headers_to_validator(&world.miner, now() + 601_000, &tail),
            401,
        ),
        (
            "nearly old",
            headers_to_validator(&world.miner, now() - 590_000, &tail),
            200,
        ),
        (
            "nearly future",
            headers_to_validator(&world.miner, now() + 590_000, &tail),
            200,
        ),
        (
            "other purpose",
            headers_to_validator(&world.miner, now(), &Tail::Purpose(Purpose::Nodes)),
            401,
        ),
        (
            "body hash",
            headers_to_validator(&world.miner, now(), &Tail::Body(b"")),
            401,
        ),
    ] {
        let (status, text) = world.send("GET", "/miner/nodes/", headers, None).await;
        assert_eq!(status, expected, "{name}: {text}");
        assert!(status == 200 || text.contains("\"detail\""), "{name}: {text}");
    }
    let (status, _) = world.send("GET", "/miner/chutes?a=b", good(), None).await;
    assert_eq!(status, 307, "without its slash");
    let body = Bytes::from_static(b"{}");
    let mut headers = headers_to_validator(&world.miner, now(), &Tail::Body(&body));
    headers.push(("content-type", "text/plain".to_owned()));
    let mut request = world.client.post(world.url("/nodes/")).body(body);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    assert_eq!(request.send().await.expect("an answer").status(), 422);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_survive_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let scenario = quiet_scenario(vec![chute("echo")]);
    let world = World::at(folder.path(), scenario.clone()).await;
    world.published(1).await;
    let gpus = world.verified_gpus(2).await;
    let instance = world.launch("echo", &gpus[..1]).await;
    let before: Vec<_> = world.server.ledger();
    world.server.stop().await;

    let world = World::at(folder.path(), scenario).await;
    let after = world.server.ledger();
    assert_eq!(after[..before.len()], before[..], "nothing is lost or changed");
    let rows = world.rows("instances").await;
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0]["instance_id"], instance["instance_id"]);
    assert_eq!(world.rows("nodes").await.len(), 2);
    assert_eq!(
        world.rows("chutes").await.len(),
        1,
        "the program does not start over"
    );
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_legacy_flow_goes_by_announcement_and_activation() {
    let mut old = chute("old");
    old.chutes_version = Some("0.2.52".to_owned());
    let mut scenario = quiet_scenario(vec![old]);
    scenario.gates.legacy = true;
    let world = World::start(scenario).await;
    let gpus = world.verified_gpus(1).await;
    let nodes = world.rows("nodes").await;
    let seed = nodes[0]["seed"].as_u64().expect("64 bits");
    let chute = world.chute_id("old").await;
    let (container, port) = world.run_chute("old", &gpus, Flow::Seed(seed), None).await;
    let announced = json!({"node_ids": gpus, "host": "127.0.0.1", "port": port});
    let path = format!("/instances/{chute}/");
    let (status, row) = world.post("POST", &path, &announced).await;
    assert_eq!(status, 202, "{row}");
    assert_eq!(world.post("POST", &path, &announced).await.0, 409, "GPUs in use");
    let path = format!("{path}{}", row["instance_id"].as_str().expect("text"));
    assert_eq!(world.post("PATCH", &path, &json!({"active": false})).await.0, 400);
    world
        .until("the port is open", async |world| {
            let url = format!("http://127.0.0.1:{port}/_alive");
            world.client.get(url).send().await.ok()
        })
        .await;
    let mut socket = Socket::authenticated(&world).await;
    let (status, row) = world.post("PATCH", &path, &json!({"active": true})).await;
    assert_eq!((status, &row["active"]), (200, &json!(true)), "{row}");
    let event = socket.event("instance_verified").await;
    assert_eq!(event["data"]["instance_id"], row["instance_id"]);
    for attempt in 2..=6 {
        let (status, _) = world.post("PATCH", &path, &json!({"active": true})).await;
        assert_eq!(status, if attempt > 5 { 429 } else { 200 }, "attempt {attempt}");
    }
    container.abort();
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_worker_is_taken_at_its_word_and_runs_chutes_that_need_one() {
    let sealed = validator_stand_in::scenario::ChuteSpec {
        tee: true,
        ..chute("sealed")
    };
    let world = World::start(quiet_scenario(vec![sealed, chute("plain")])).await;
    let row = |number: u8, index: u32| {
        let mut row = json!(proof::software_device(gpu(number)));
        row["device_index"] = json!(index);
        row["gpu_identifier"] = json!(proof::SOFTWARE.short_ref);
        row["verification_host"] = json!("127.0.0.1");
        row["verification_port"] = json!(30443);
        row
    };
    let body = json!({ "host": "127.0.0.1", "id": "uid-1", "name": "tee-1", "gpus": [row(1, 0), row(2, 1)] });
    let (status, answer) = world.post("POST", "/servers/", &body).await;
    assert_eq!((status, &answer["server_id"]), (201, &json!("uid-1")), "{answer}");
    assert_eq!(world.post("POST", "/servers/", &body).await.0, 409, "it is known");
    let nodes = world.rows("nodes").await;
    assert!(
        nodes.iter().all(|node| node["verified_at"].is_string()),
        "{nodes:?}"
    );
    let chutes = world.rows("chutes").await;
    let tee = |name: &str| {
        chutes
            .iter()
            .find(|row| row["name"] == name)
            .map(|row| row["tee"].clone())
    };
    assert_eq!(
        (tee("sealed"), tee("plain")),
        (Some(json!(true)), Some(json!(false)))
    );
    world.launch("sealed", &[gpu(1)]).await;

    let (status, _) = world.call("DELETE", "/servers/uid-1", Purpose::Nodes).await;
    assert_eq!(status, 401, "another purpose");
    assert_eq!(world.call("DELETE", "/servers/uid-1", Purpose::Tee).await.0, 200);
    assert_eq!(world.call("DELETE", "/servers/uid-1", Purpose::Tee).await.0, 404);
    assert!(world.rows("nodes").await.is_empty() && world.rows("instances").await.is_empty());
}

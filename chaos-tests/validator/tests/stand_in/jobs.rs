//! Jobs, bounties, updates and deletions: what owners and users do.

use protocol::signing::Purpose;
use serde_json::json;
use validator_stand_in::scenario::{ChuteSpec, JobPort, JobSpec};

use crate::support::{Flow, Socket, World, chute, quiet_scenario};

fn batch() -> ChuteSpec {
    let port = |port, proto: &str| JobPort {
        name: proto.to_owned(),
        port,
        proto: proto.to_owned(),
        default: false,
    };
    ChuteSpec {
        cords: vec![],
        jobs: vec![JobSpec {
            name: "train".to_owned(),
            ports: vec![port(9000, "tcp"), port(9001, "udp")],
            ..JobSpec::default()
        }],
        ..chute("batch")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_runs_to_its_end() {
    let world = World::start(quiet_scenario(vec![batch()])).await;
    let mut socket = Socket::authenticated(&world).await;
    let gpus = world.verified_gpus(1).await;
    world
        .act(json!({"action": "offer_job", "chute": "batch", "method": "train", "work_ms": 1, "disk_gb": 20}))
        .await;
    let offered = socket.event("job_created").await;
    assert_eq!(offered["data"]["disk_gb"], 20);
    let job = offered["data"]["job_id"].as_str().expect("text");
    let chute = world.chute_id("batch").await;
    let query = format!("chute_id={chute}&job_id={job}");
    let (status, config) = world.launch_config(&query).await;
    assert_eq!(status, 200, "{config}");
    assert_eq!(world.launch_config(&query).await.0, 403, "one try each");
    let token = config["token"].as_str().expect("text");
    let ports = ["CHUTES_PORT_TCP_9000", "CHUTES_PORT_UDP_9001"];
    let flow = Flow::TokenWithPorts(token, &ports);
    let (container, _) = world.run_chute("batch", &gpus, flow, None).await;
    container.await.expect("no panic").expect("the job ends well");
    let rows = world.control("state").await;
    assert_eq!(rows["jobs"][0]["status"], "complete");
    assert_eq!(rows["jobs"][0]["miner_terminated"], false);
    assert!(
        world.rows("instances").await.is_empty(),
        "its instance ended with it"
    );
    assert_eq!(world.control("score").await["jobs_finished"], 1);
    assert_eq!(world.rows("jobs").await.len(), 0, "assigned jobs are not offered");
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_ports_are_refused_and_a_release_offers_again() {
    let world = World::start(quiet_scenario(vec![batch()])).await;
    let mut socket = Socket::authenticated(&world).await;
    let gpus = world.verified_gpus(1).await;
    let offer = json!({"action": "offer_job", "chute": "batch", "method": "train", "work_ms": 600_000});
    world.act(offer.clone()).await;
    let job = socket.event("job_created").await["data"]["job_id"].clone();
    let job = job.as_str().expect("text");
    let chute = world.chute_id("batch").await;
    let (_, config) = world
        .launch_config(&format!("chute_id={chute}&job_id={job}"))
        .await;
    let token = config["token"].as_str().expect("text");
    let (container, _) = world.run_chute("batch", &gpus, Flow::Token(token), None).await;
    let error = container.await.expect("no panic").expect_err("no ports");
    assert!(format!("{error:#}").contains("403"), "{error:#}");

    let ports = ["CHUTES_PORT_TCP_9000", "CHUTES_PORT_UDP_9001"];
    let flow = Flow::TokenWithPorts(token, &ports);
    let (container, _) = world.run_chute("batch", &gpus, flow, None).await;
    socket.event("instance_activated").await;
    let path = format!("/miner/jobs/{job}");
    assert_eq!(
        world.call("DELETE", &path, Purpose::Miner).await,
        (200, "null".to_owned())
    );
    let again = socket.event("job_created").await;
    assert_eq!(again["data"]["job_id"], job);
    assert!(
        again["data"].get("disk_gb").is_none(),
        "left out, as in the real one"
    );
    assert_eq!(again["data"]["exclude"], json!([world.miner.hotkey()]));
    assert_eq!(world.call("DELETE", &path, Purpose::Miner).await.0, 404);
    world.act(json!({"action": "delete_job", "job_id": job})).await;
    socket.event("job_deleted").await;
    container.abort();
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bounty_goes_to_who_activates_first() {
    let world = World::start(quiet_scenario(vec![chute("echo")])).await;
    let mut socket = Socket::connect(&world).await;
    let gpus = world.verified_gpus(1).await;
    world
        .act(json!({"action": "offer_bounty", "chute": "echo"}))
        .await;
    let event = socket.event("bounty_change").await;
    assert!(
        event["data"]["bounty"]
            .as_u64()
            .is_some_and(|amount| amount >= 100)
    );
    let (_, list) = world.call("GET", "/bounties/", Purpose::Miner).await;
    assert!(list.contains("\"bounty_amount\":1"), "{list}");
    let plain = world.rows("chutes").await[0]["node_selector"]["compute_multiplier"].clone();
    let plain = plain.as_f64().expect("a number");
    let instance = world.launch("echo", &gpus).await;
    let boosted = instance["compute_multiplier"].as_f64().expect("a number");
    assert!(boosted > plain * 1.49, "{boosted} against {plain}");
    assert_eq!(world.call("GET", "/bounties/", Purpose::Miner).await.1, "[]");
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_update_tells_permits_and_ends_stale_instances() {
    let mut scenario = quiet_scenario(vec![chute("echo")]);
    scenario.timers.rolling_update_spacing_ms = Some(3_000);
    let world = World::start(scenario).await;
    let mut socket = Socket::authenticated(&world).await;
    let gpus = world.verified_gpus(2).await;
    let old = world.launch("echo", &gpus[..1]).await;
    let chute = world.chute_id("echo").await;
    let updated = world
        .act(json!({"action": "update_chute", "chute": "echo"}))
        .await;
    let event = socket.event("chute_updated").await;
    assert_eq!(event["data"]["version"], updated["version"]);
    let told = socket.event("rolling_update").await;
    assert_eq!(told["data"]["instance_id"], old["instance_id"]);
    assert_eq!(told["data"]["new_version"], updated["version"]);
    let version = updated["version"].as_str().expect("text");
    let path = format!("/miner/chutes/{chute}/{version}");
    assert_eq!(world.call("GET", &path, Purpose::Miner).await.0, 200);
    let path = format!("/miner/chutes/{chute}/{}", old["version"].as_str().expect("text"));
    assert_eq!(
        world.call("GET", &path, Purpose::Miner).await.0,
        404,
        "no longer current"
    );
    let new = world.launch("echo", &gpus[1..]).await;
    assert_eq!(new["version"], updated["version"]);
    let deleted = socket.event("instance_deleted").await;
    assert_eq!(deleted["data"]["instance_id"], old["instance_id"]);
    assert_eq!(
        world.launch_config(&format!("chute_id={chute}")).await.0,
        423,
        "over"
    );
    world
        .act(json!({"action": "delete_chute", "chute": "echo"}))
        .await;
    socket.event("chute_deleted").await;
    assert!(world.rows("instances").await.is_empty());
    world.server.stop().await;
}

//! Planted faults do what they say and nothing else.

use protocol::signing::{Purpose, Tail, headers_to_validator};
use serde_json::json;

use crate::support::{Socket, World, chute, now, quiet_scenario};

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_refused_lost_cut_and_emptied() {
    let world = World::start(quiet_scenario(vec![chute("a"), chute("b")])).await;
    let fault = async |fault: serde_json::Value| {
        world
            .act(json!({"action": "add_http_fault", "fault": fault}))
            .await;
    };
    fault(json!({"path": "/miner/chutes/", "times": 1, "action": "refuse", "status": 503})).await;
    assert_eq!(world.call("GET", "/miner/chutes/", Purpose::Miner).await.0, 503);
    assert_eq!(world.rows("chutes").await.len(), 2, "once means once");
    fault(json!({"path": "/miner/chutes/", "times": 1, "action": "empty"})).await;
    assert_eq!(
        world.call("GET", "/miner/chutes/", Purpose::Miner).await,
        (200, String::new())
    );
    fault(json!({"path": "/miner/chutes/", "times": 1, "action": "truncate", "after_bytes": 30})).await;
    let headers = headers_to_validator(&world.miner, now(), &Tail::Purpose(Purpose::Miner));
    let mut request = world.client.get(world.url("/miner/chutes/"));
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let cut = request.send().await.expect("headers arrive");
    assert!(cut.bytes().await.is_err(), "the stream breaks");
    fault(json!({"path": "/nodes/", "method": "POST", "times": 1, "action": "lose_answer"})).await;
    assert_eq!(world.announce(&[crate::support::gpu(1)]).await.0, 502);
    assert_eq!(
        world.announce(&[crate::support::gpu(1)]).await.0,
        409,
        "it was done all the same"
    );
    let clock = json!({"action": "set_faults", "faults": {"clock_skew_seconds": 700}});
    world.act(clock).await;
    assert_eq!(world.call("GET", "/miner/chutes/", Purpose::Miner).await.0, 401);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_lost_doubled_and_sockets_dropped() {
    let world = World::start(quiet_scenario(vec![])).await;
    let mut socket = Socket::authenticated(&world).await;
    for (name, action) in [("lost", "lose"), ("doubled", "duplicate")] {
        let fault = json!({"reason": "chute_created", "times": 1, "action": action});
        world
            .act(json!({"action": "add_event_fault", "fault": fault}))
            .await;
        world.act(json!({"action": "publish_chute", "name": name})).await;
    }
    let (first, second) = (
        socket.event("chute_created").await,
        socket.event("chute_created").await,
    );
    assert_eq!(first, second);
    assert_eq!(first["data"]["chute_id"], world.chute_id("doubled").await);
    for how in ["abrupt", "close"] {
        let mut socket = Socket::authenticated(&world).await;
        world.act(json!({"action": "drop_sockets", "how": how})).await;
        while socket.packet().await.is_some() {}
    }
    let published: Vec<_> = world
        .control("ledger?kind=event_published")
        .await
        .as_array()
        .expect("a list")
        .iter()
        .filter(|row| row["event"]["reason"] == "chute_created")
        .map(|row| (row["fault"].is_string(), row["event"]["effect"].clone()))
        .collect();
    assert_eq!(
        published,
        vec![(true, json!("chute_known")), (true, json!("chute_known"))]
    );
    world.server.stop().await;
}

//! The websocket from outside: handshake, authentication, pings, ends.

use protocol::hotkey::Signer;
use protocol::socket_io::Packet;
use serde_json::json;

use crate::support::{Socket, World, chute, now, quiet_scenario};

#[tokio::test(flavor = "multi_thread")]
async fn authentication_fails_politely_and_succeeds_with_an_acknowledgement() {
    let world = World::start(quiet_scenario(vec![])).await;
    for (signer, at) in [
        (Signer::from_seed(&[9; 32]), now()),
        (Signer::from_seed(&[1; 32]), now() - 600_000),
    ] {
        let mut socket = Socket::connect(&world).await;
        socket.authenticate(&signer, at).await;
        let Some(Packet::Event { name, args, .. }) = socket.packet().await else {
            panic!("an answer was expected");
        };
        assert_eq!(name, "auth_failed");
        let text = args[0]["error"].as_str().expect("text");
        assert!(text.starts_with("Authentication failed: "), "{text}");
        assert_eq!(socket.packet().await, Some(Packet::Disconnect));
    }
    let mut socket = Socket::connect(&world).await;
    let headers = protocol::signing::headers_to_validator(
        &world.miner,
        now(),
        &protocol::signing::Tail::Purpose(protocol::signing::Purpose::Sockets),
    );
    let object: serde_json::Map<_, _> = headers
        .into_iter()
        .map(|(name, value)| (name.to_owned(), json!(value)))
        .collect();
    let event = Packet::Event {
        ack: Some(0),
        name: "authenticate".to_owned(),
        args: vec![json!(object)],
    };
    socket.send(&event).await;
    let success = Packet::event("auth_success", json!({"message": "Authenticated"}));
    assert_eq!(socket.packet().await, Some(success));
    let acknowledged = Packet::Ack {
        id: 0,
        args: vec![json!(true)],
    };
    assert_eq!(socket.packet().await, Some(acknowledged));
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_hear_unfiltered_events_only() {
    let world = World::start(quiet_scenario(vec![])).await;
    let mut stranger = Socket::connect(&world).await;
    let mut miner = Socket::authenticated(&world).await;
    world.verified_gpus(1).await;
    miner.event("gpu_verified").await;
    world
        .act(json!({"action": "publish_chute", "name": "late"}))
        .await;
    let heard = stranger.event("chute_created").await;
    assert_eq!(heard["data"]["job_only"], false);
    assert!(heard.get("filter_recipients").is_none());
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_after_a_ping_ends_the_connection() {
    let mut scenario = quiet_scenario(vec![]);
    (scenario.socket.ping_interval_ms, scenario.socket.ping_timeout_ms) = (50, 100);
    let world = World::start(scenario).await;
    let mut socket = Socket::connect(&world).await;
    for _ in 0..3 {
        assert_eq!(socket.packet().await, Some(Packet::Ping(String::new())));
        socket.send(&Packet::Pong(String::new())).await;
    }
    assert_eq!(socket.packet().await, Some(Packet::Ping(String::new())));
    assert_eq!(socket.packet().await, None, "no answer, no connection");
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_this_protocol_and_transport_are_spoken() {
    let world = World::start(quiet_scenario(vec![chute("echo")])).await;
    for query in [
        "",
        "?EIO=3&transport=websocket",
        "?EIO=4&transport=polling",
        "?EIO=4",
    ] {
        let (status, text) = world
            .send("GET", &format!("/socket.io/{query}"), vec![], None)
            .await;
        assert_eq!(status, 400, "{query}: {text}");
    }
    let mut socket = Socket::connect(&world).await;
    socket.text("40/other,{}").await;
    assert_eq!(socket.packet().await, Some(Packet::Other("44".to_owned())));
    socket.text("9").await;
    assert_eq!(socket.packet().await, None, "a frame that is no packet");
    let mut socket = Socket::connect(&world).await;
    socket.text("42[\"miner_message\",1]").await;
    assert_eq!(socket.packet().await, Some(Packet::Disconnect));
    world.server.stop().await;
}

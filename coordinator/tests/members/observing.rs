//! A cluster that is founded to take over from another miner opens no validator's socket until it is told to act.

use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::cluster::Host;
use super::{PATIENCE, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_founded_observing_opens_no_socket_until_it_is_told_to_act() {
    let validator = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let mut host = Host::new(1);
    host.socket = validator.local_addr().expect("bound");
    host.found_observing = true;
    host.found();
    host.start();
    let observing = async |host: &Host| {
        until("the member answers", async || {
            let status = host.ask(Method::GET, "/v1/status", &Value::Null).await.ok()?;
            // Founded and configured, so its leader has begun.
            let cluster = status["cluster"].clone();
            cluster["miner"].is_string().then_some(cluster)
        })
        .await["observing_since"]
            .is_string()
    };
    assert!(observing(&host).await);
    host.stop().await;
    host.start();
    assert!(observing(&host).await, "also after a restart");
    // Written by the same leader, after it has begun.
    host.invite(json!({ "eligible": true })).await;
    let trial = async |host: &Host| host.ask(Method::GET, "/v1/observing/trial", &Value::Null).await;
    let tried = trial(&host).await.expect("it observes");
    let in_the_way = tried["in_the_way"].to_string();
    assert!(in_the_way.contains("no host has joined"), "{in_the_way}");
    let called = timeout(std::time::Duration::ZERO, validator.accept()).await;
    assert!(called.is_err(), "nobody opened it: {called:?}");

    let put = |observing: bool| json!({ "observing": observing });
    let set = async |host: &Host, observing| host.ask(Method::PUT, "/v1/observing", &put(observing)).await;
    let answer = set(&host, false).await.expect("it may");
    assert_eq!(answer, json!({ "observing": false, "changed": true }));
    let (status, refused) = trial(&host).await.expect_err("it acts");
    assert_eq!(status, 409, "{refused}");
    let (socket, _) = timeout(PATIENCE, validator.accept())
        .await
        .expect("it is opened soon")
        .expect("it can be");
    drop(socket);
    host.stop().await;
    host.start();
    assert!(!observing(&host).await, "a restart does not bring it back");

    let answer = set(&host, true).await.expect("it may");
    assert_eq!(answer["changed"], true);
    assert!(observing(&host).await);
    host.stop().await;
}

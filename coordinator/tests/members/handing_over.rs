//! A leader that hands over, or is stopped in order, records what it has received from a validator before another one
//! leads: the validator says it to nobody else.

use futures_util::{SinkExt as _, StreamExt as _};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, accept_async};

use super::cluster::{Host, cluster_of};
use super::until;

/// A validator that offers jobs: one with the session, and one more when it is told goodbye, which crosses with that.
async fn validator(listener: TcpListener) {
    let mut number = 0;
    while let Ok((stream, _)) = listener.accept().await {
        let Ok(mut peer) = accept_async(stream).await else {
            continue;
        };
        number += 1;
        // One at a time: there is one leader.
        serve(&mut peer, number).await;
    }
}

async fn serve(peer: &mut WebSocketStream<TcpStream>, number: u32) -> Option<()> {
    let open =
        r#"0{"sid":"x","upgrades":[],"pingTimeout":600000,"pingInterval":600000,"maxPayload":1000000}"#;
    peer.send(Message::text(open)).await.ok()?;
    while let Some(Ok(message)) = peer.next().await {
        let Message::Text(text) = message else { continue };
        match text.as_str() {
            "40" => peer.send(Message::text(r#"40{"sid":"abc"}"#)).await.ok()?,
            "41" => peer.send(job(&format!("{number}-late"))).await.ok()?,
            text if text.starts_with("42") => {
                let success = r#"42["auth_success",{"message":"Authenticated"}]"#;
                peer.send(Message::text(success)).await.ok()?;
                peer.send(job(&format!("{number}-early"))).await.ok()?;
            }
            _ => {}
        }
    }
    None
}

fn job(id: &str) -> Message {
    let data = json!({ "job_id": id, "chute_id": "c1", "method": "train", "gpu_count": 1 });
    let event = json!(["miner_broadcast", { "reason": "job_created", "data": data }]);
    Message::text(format!("42{event}"))
}

/// Jobs that were offered, as a member has them.
async fn jobs(host: &Host) -> Option<Vec<String>> {
    let state = host.ask(Method::GET, "/v1/state", &Value::Null).await.ok()?;
    let jobs = state["jobs"].as_array()?.iter();
    Some(
        jobs.filter_map(|job| Some(job["job_id"].as_str()?.to_owned()))
            .collect(),
    )
}

async fn until_offered(host: &Host, wanted: &[&str]) {
    until("the jobs are known", async || {
        let jobs = jobs(host).await?;
        wanted
            .iter()
            .all(|job| jobs.iter().any(|known| known == job))
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_leader_has_received_is_recorded_before_it_hands_over_or_stops() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let mut hosts = [1, 2, 3].map(Host::new);
    for host in &mut hosts {
        host.socket = listener.local_addr().expect("bound");
    }
    tokio::spawn(validator(listener));
    let [mut first, mut second, mut third] = cluster_of(hosts).await;
    until_offered(&third, &["1-early"]).await;

    // Nothing lists jobs here: what is not recorded now never is.
    let handed_over = json!({ "to": "host-2" });
    let answer = first.ask(Method::POST, "/v1/raft/transfer", &handed_over).await;
    assert_eq!(answer.expect("it follows")["host"], "host-2");
    assert_eq!(second.leader().await.as_deref(), Some("host-2"));
    let known = jobs(&second).await.expect("it leads");
    assert!(known.contains(&"1-late".to_owned()), "{known:?}");

    until_offered(&third, &["2-early"]).await;
    second.stop().await;
    until("another one leads", async || {
        third.leader().await.filter(|leader| leader != "host-2")
    })
    .await;
    let known = jobs(&third).await.expect("somebody leads");
    assert!(known.contains(&"2-late".to_owned()), "{known:?}");
    for host in [&mut first, &mut third] {
        host.stop().await;
    }
}

//! A leader that hands over, or is stopped in order, records what it has received from a validator before another one
//! leads: the validator says it to nobody else. One that cannot hand over ends nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use replica::Timing;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, accept_async};

use super::cluster::{Host, cluster_of};
use super::until;

/// A validator that offers jobs: one with the session, and one more when it is told goodbye, which crosses with that.
#[derive(Default)]
pub(crate) struct Validator {
    sessions: AtomicU32,
    pub(crate) goodbye: Notify,
}

impl Validator {
    async fn listen(self: Arc<Self>, listener: TcpListener) {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut peer) = accept_async(stream).await else {
                continue;
            };
            let number = self.sessions.fetch_add(1, Ordering::Relaxed) + 1;
            // One at a time: there is one leader.
            serve(&mut peer, number, &self.goodbye).await;
        }
    }
}

async fn serve(peer: &mut WebSocketStream<TcpStream>, number: u32, goodbye: &Notify) -> Option<()> {
    let open =
        r#"0{"sid":"x","upgrades":[],"pingTimeout":600000,"pingInterval":600000,"maxPayload":1000000}"#;
    peer.send(Message::text(open)).await.ok()?;
    while let Some(Ok(message)) = peer.next().await {
        let Message::Text(text) = message else { continue };
        match text.as_str() {
            "40" => peer.send(Message::text(r#"40{"sid":"abc"}"#)).await.ok()?,
            "41" => {
                goodbye.notify_one();
                peer.send(job(&format!("{number}-late"))).await.ok()?;
            }
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

pub(crate) async fn until_offered(host: &Host, wanted: &[&str]) {
    until("the jobs are known", async || {
        let jobs = jobs(host).await?;
        wanted
            .iter()
            .all(|job| jobs.iter().any(|known| known == job))
            .then_some(())
    })
    .await;
}

/// Three hosts, and their validator's socket.
pub(crate) async fn hosts_with_a_validator() -> ([Host; 3], Arc<Validator>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let mut hosts = [1, 2, 3].map(Host::new);
    for host in &mut hosts {
        host.socket = listener.local_addr().expect("bound");
        // On a busy machine nobody else is elected meanwhile.
        host.timing = Timing::Wan;
    }
    let validator = Arc::new(Validator::default());
    tokio::spawn(Arc::clone(&validator).listen(listener));
    (hosts, validator)
}

/// Three members of whom the first one leads.
async fn three_with_a_validator() -> ([Host; 3], Arc<Validator>) {
    let (hosts, validator) = hosts_with_a_validator().await;
    let hosts = cluster_of(hosts).await;
    until_offered(&hosts[2], &["1-early"]).await;
    (hosts, validator)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_leader_has_received_is_recorded_before_it_hands_over_or_stops() {
    let ([mut first, mut second, mut third], _) = three_with_a_validator().await;

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

/// Found in review: a member counts as alive for half a minute after its last answer, and is handed the lead only if it has
/// answered just now. The leader ended all that it did before it asked, every few seconds, and the validators with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_goes_on_undisturbed_while_the_one_that_is_to_lead_does_not_answer() {
    let ([mut first, mut second, mut third], validator) = three_with_a_validator().await;
    second.stop().await;
    until("the second one has not answered for a while", async || {
        let raft = first.ask(Method::GET, "/v1/raft", &Value::Null).await.ok()?;
        let members = raft["members"].as_array()?;
        let second = members.iter().find(|member| member["host"] == "host-2")?;
        (second["answered_ago_ms"].as_u64()? > 5_000).then_some(())
    })
    .await;
    let undisturbed = async || {
        let known = jobs(&first).await.expect("it leads");
        assert!(
            !known.contains(&"1-late".to_owned()),
            "it said goodbye to the validator"
        );
        assert_eq!(validator.sessions.load(Ordering::Relaxed), 1);
    };

    let dead = json!({ "to": "host-2" });
    let answer = first.ask(Method::POST, "/v1/raft/transfer", &dead).await;
    let (status, reason) = answer.expect_err("it is dead");
    assert_eq!(status, 409);
    assert!(reason.contains("not a voter that answers"), "{reason}");
    undisturbed().await;
    // Nothing is to be done.
    let itself = json!({ "to": "host-1" });
    let answer = first.ask(Method::POST, "/v1/raft/transfer", &itself).await;
    assert_eq!(answer.expect("it leads")["host"], "host-1");
    undisturbed().await;

    // The first one is to lead no more, and of the others the second one would.
    let never = json!({ "pin": "never" });
    let pinned = first.ask(Method::PUT, "/hosts/host-1/pin", &never).await;
    pinned.expect("it leads");
    tokio::time::sleep(Duration::from_secs(4)).await;
    undisturbed().await;
    // When the second one counts as dead, the third one takes over.
    until("the third one leads", async || {
        third.leader().await.filter(|leader| leader == "host-3")
    })
    .await;
    for host in [&mut first, &mut third] {
        host.stop().await;
    }
}

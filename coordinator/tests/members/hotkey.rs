//! The miner gets another hotkey while its members run: each host gets the new seed after the other, and none of them
//! does anything in the name of the old one meanwhile.

use futures_util::{SinkExt as _, StreamExt as _};
use protocol::hotkey::{Hotkey, Signer};
use protocol::sealing::{NONCE_BYTES, SealedKind, SealingKey};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_tungstenite::accept_async;
use tokio_tungstenite::tungstenite::Message;

use super::cluster::{Host, cluster_of};
use super::{PATIENCE, until};

const NEW: [u8; 32] = [7; 32];

fn hotkey(seed: &[u8; 32]) -> Hotkey {
    Signer::from_seed(seed).hotkey().clone()
}

/// What a validator sees of those who open its socket.
#[derive(Debug, PartialEq, Eq)]
enum Session {
    /// One has authenticated, as this miner.
    Of(Hotkey),
    /// It has ended.
    Ended,
}

/// A validator that lets everybody in and never ends a session.
fn validator(listener: TcpListener) -> mpsc::Receiver<Session> {
    let (seen, sessions) = mpsc::channel(64);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let seen = seen.clone();
            tokio::spawn(async move {
                if serve(stream, &seen).await.is_some() {
                    let _ = seen.send(Session::Ended).await;
                }
            });
        }
    });
    sessions
}

/// One session, until it ends; who had it, if anybody has authenticated.
async fn serve(stream: TcpStream, seen: &mpsc::Sender<Session>) -> Option<Hotkey> {
    let mut peer = accept_async(stream).await.ok()?;
    let open =
        r#"0{"sid":"x","upgrades":[],"pingTimeout":600000,"pingInterval":600000,"maxPayload":1000000}"#;
    peer.send(Message::text(open)).await.ok()?;
    let mut miner = None;
    while let Some(Ok(message)) = peer.next().await {
        let Message::Text(text) = message else { continue };
        if text.as_str() == "40" {
            peer.send(Message::text(r#"40{"sid":"abc"}"#)).await.ok()?;
        } else if let Some(event) = text.strip_prefix("42") {
            let event: Value = serde_json::from_str(event).ok()?;
            // It authenticates again and again.
            if event[0] == "authenticate" && miner.is_none() {
                let hotkey: Hotkey = serde_json::from_value(event[1]["X-Chutes-Hotkey"].clone()).ok()?;
                miner = Some(hotkey.clone());
                seen.send(Session::Of(hotkey)).await.ok()?;
                let success = r#"42["auth_success",{"message":"Authenticated"}]"#;
                peer.send(Message::text(success)).await.ok()?;
            }
        }
    }
    miner
}

async fn next(sessions: &mut mpsc::Receiver<Session>) -> Session {
    let next = timeout(PATIENCE, sessions.recv()).await;
    next.expect("in time").expect("the validator listens")
}

async fn status(host: &Host) -> Value {
    until("it says which hotkey the miner has", async || {
        host.ask(Method::GET, "/v1/hotkey", &Value::Null).await.ok()
    })
    .await
}

/// What an operator with both seeds sends.
async fn wish(host: &Host, old: &[u8; 32], new: &[u8; 32]) -> Value {
    let sealed = status(host).await["sealed_key"].as_str().map(hex::decode);
    let sealed = sealed.expect("it is founded").expect("hexadecimal");
    let key = SealingKey::from_seed(old).unseal(SealedKind::ClusterCaKey, &sealed);
    let key = key.expect("sealed with the old seed");
    let sealed = SealingKey::from_seed(new).seal(SealedKind::ClusterCaKey, [9; NONCE_BYTES], &key);
    let sealed = hex::encode(sealed.expect("short"));
    json!({ "old": hotkey(old), "new": hotkey(new), "sealed_key": sealed })
}

/// Whose seeds the members have, as one of them has found out.
async fn seeds(host: &Host) -> Vec<Hotkey> {
    let status = status(host).await;
    let members = status["members"].as_array().cloned().unwrap_or_default();
    let seed = |member: &Value| serde_json::from_value(member["seed_of"].clone()).ok();
    members.iter().filter_map(seed).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hotkey_of_running_members_is_replaced_and_the_new_seed_takes_over() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let mut hosts = [1, 2, 3].map(Host::new);
    for host in &mut hosts {
        host.socket = listener.local_addr().expect("bound");
    }
    let mut sessions = validator(listener);
    let [mut first, mut second, mut third] = cluster_of(hosts).await;
    let old = first.seed;
    assert_eq!(next(&mut sessions).await, Session::Of(hotkey(&old)));
    assert_eq!(status(&second).await["hotkey"], json!(hotkey(&old)));
    assert_eq!(seeds(&third).await, [hotkey(&old), hotkey(&old), hotkey(&old)]);

    let mut wrong = wish(&first, &old, &NEW).await;
    wrong["old"] = json!(hotkey(&[8; 32]));
    let (code, why) = first
        .ask(Method::POST, "/v1/hotkey", &wrong)
        .await
        .expect_err("it is not the miner");
    assert!(code == 409 && why.contains(hotkey(&old).as_str()), "{why}");

    // Asked of a member that does not lead.
    let wish = wish(&second, &old, &NEW).await;
    let replaced = second.ask(Method::POST, "/v1/hotkey", &wish).await;
    let replaced = replaced.expect("nothing is in the way");
    assert_eq!(replaced, json!({ "hotkey": hotkey(&NEW), "changed": true }));

    // Nobody acts in the name of the old one, nor takes its word.
    assert_eq!(next(&mut sessions).await, Session::Ended);
    for host in [&first, &second, &third] {
        until("the old key opens nothing", async || {
            let answer = host.ask(Method::GET, "/v1/hotkey", &Value::Null).await;
            matches!(answer, Err((401, _))).then_some(())
        })
        .await;
    }
    for host in [&mut first, &mut second, &mut third] {
        host.seed = NEW;
    }
    assert_eq!(seeds(&first).await, [hotkey(&old), hotkey(&old), hotkey(&old)]);
    let token = first.invite(json!({ "eligible": true })).await;
    let mut fourth = Host::new(4);
    fourth.seed = NEW;
    let refused = fourth.join(&token).await.expect_err("nobody can sign for it");
    let why = format!("runs with the seed of {}", hotkey(&old));
    assert!(refused.to_string().contains(&why), "{refused}");

    // One host follows: it leads, and can do what needs the seed.
    third.stop().await;
    third.start();
    until("the lead goes to the one with the new seed", async || {
        (third.leader().await? == "host-3").then_some(())
    })
    .await;
    let began = next(&mut sessions).await;
    assert_eq!(began, Session::Of(hotkey(&NEW)), "nobody came meanwhile");
    fourth.join(&token).await.expect("the token is still good");

    // The others follow.
    for host in [&mut first, &mut second] {
        host.stop().await;
        host.start();
    }
    until("all have the new seed", async || {
        (seeds(&second).await[..3] == [hotkey(&NEW), hotkey(&NEW), hotkey(&NEW)]).then_some(())
    })
    .await;
    for host in [&mut first, &mut second, &mut third] {
        host.stop().await;
    }
}

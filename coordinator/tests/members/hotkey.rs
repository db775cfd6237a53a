//! The miner gets another hotkey while its members run: each host gets the new seed after the other, and none of them
//! does anything in the name of the old one meanwhile.

use protocol::hotkey::{Hotkey, Signer};
use protocol::sealing::{NONCE_BYTES, SealedKind, SealingKey};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::cluster::{Host, cluster_of};
use super::{PATIENCE, until};

const NEW: [u8; 32] = [7; 32];

fn hotkey(seed: &[u8; 32]) -> Hotkey {
    Signer::from_seed(seed).hotkey().clone()
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
    let mut listeners = Vec::new();
    let mut hosts = [1, 2, 3].map(Host::new);
    for host in &mut hosts {
        let validator = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        host.socket = validator.local_addr().expect("bound");
        listeners.push(validator);
    }
    let [mut first, mut second, mut third] = cluster_of(hosts).await;
    let old = first.seed;
    let (mut socket, _) = timeout(PATIENCE, listeners[0].accept())
        .await
        .expect("the founder leads")
        .expect("it opens the validator's socket");
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
    let ended = async {
        let mut bytes = [0; 1024];
        while !matches!(socket.read(&mut bytes).await, Ok(0) | Err(_)) {}
    };
    timeout(PATIENCE, ended).await.expect("the socket is left");
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
    let called = timeout(PATIENCE, listeners[2].accept()).await;
    called.expect("it acts").expect("it opens the validator's socket");
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

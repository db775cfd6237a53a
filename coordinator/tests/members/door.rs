//! What knocks at the door and is no host: noise, silence, huge frames, certificates of nobody.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use coordinator::identity::Identity;
use coordinator::join::wire::ALPN as JOIN;
use protocol::link::ALPN as HOST;
use quinn::{ClientConfig, Endpoint};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::UdpSocket;

use super::cluster::{Host, copy};
use super::until;

async fn dial(identity: &Identity, host: &Host, protocol: &[u8]) -> Result<quinn::Connection, String> {
    let endpoint = Endpoint::client(([127, 0, 0, 1], 0).into()).expect("a free port");
    let tls = identity.quic_client(protocol).expect("good TLS");
    let config = ClientConfig::new(Arc::new(tls));
    let connecting = endpoint.connect_with(config, host.door, "coordinator.chutes.internal");
    let connecting = connecting.expect("a good name");
    connecting.await.map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_silence_and_huge_frames_do_no_harm() {
    let mut first = Host::new(1);
    first.found();
    first.start();
    until("it leads", async || first.leader().await).await;
    let identity = Identity::of_host(&first.identity()).expect("its own");

    // Datagrams that are no QUIC.
    let noise = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..200 {
        let bytes: Vec<u8> = (0..random.usize(1..1300)).map(|_| random.u8(..)).collect();
        noise.send_to(&bytes, first.door).await.expect("sent");
    }

    // A host's stream that claims a frame of 4 GiB, and one of nonsense; the connection ends.
    for frame in [&[0xff, 0xff, 0xff, 0xff][..], &[0, 0, 0, 3, 9, 9, 9]] {
        let connection = dial(&identity, &first, HOST).await.expect("it has a certificate");
        let (mut send, _receive) = connection.open_bi().await.expect("one stream");
        send.write_all(frame).await.expect("sent");
        let ended = tokio::time::timeout(Duration::from_secs(20), connection.closed()).await;
        ended.expect("it is closed");
    }
    // Nonsense at the gate.
    let connection = dial(&identity, &first, JOIN).await.expect("anybody may");
    let (mut send, _receive) = connection.open_bi().await.expect("one stream");
    send.write_all(&[0, 0, 0, 1, 0xff]).await.expect("sent");
    let ended = tokio::time::timeout(Duration::from_secs(20), connection.closed()).await;
    ended.expect("it is closed");

    // Somebody who says nothing holds nobody up.
    let _silent = dial(&identity, &first, HOST).await.expect("it has a certificate");
    let invited = first.ask(Method::POST, "/hosts/invites", &json!({})).await;
    assert!(invited.is_ok(), "{invited:?}");

    // The certificate of another cluster is none.
    let stranger = Host::new(2);
    stranger.found();
    let foreign = Identity::of_host(&stranger.identity()).expect("its own");
    let refused = dial(&foreign, &first, HOST).await;
    assert!(refused.is_err(), "it does not trust us, nor we it");
    let hosts = first
        .ask(Method::GET, "/hosts", &Value::Null)
        .await
        .expect("it answers");
    assert_eq!(hosts.as_array().map(Vec::len), Some(1));
    first.stop().await;
}

/// Those of a flood are forged: their sender gets no answer, and holds nothing that others need.
#[tokio::test(flavor = "multi_thread")]
async fn handshakes_that_nobody_ends_do_not_shut_the_door() {
    const FLOOD: usize = 300;
    const HELD_MAX: usize = 256;
    let mut first = Host::new(1);
    first.found();
    first.start();
    until("it leads", async || first.leader().await).await;
    let identity = Identity::of_host(&first.identity()).expect("its own");

    // First datagrams of connections that begin elsewhere.
    let elsewhere = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
    let to = elsewhere.local_addr().expect("bound");
    let endpoint = Endpoint::client(([127, 0, 0, 1], 0).into()).expect("a free port");
    let tls = identity.quic_client(HOST).expect("good TLS");
    let config = ClientConfig::new(Arc::new(tls));
    let forger = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
    let forger = Arc::new(forger);
    // All the time, so that none is lost for want of room.
    let told_to_try_again = tokio::spawn({
        let forger = Arc::clone(&forger);
        async move {
            let (mut answer, mut told) = ([0; 2048], 0);
            while told < FLOOD - HELD_MAX {
                forger.recv_from(&mut answer).await.expect("some answer");
                // A long header of type Retry (RFC 9000, 17.2.5).
                told += usize::from(answer[0] & 0xf0 == 0xf0);
            }
        }
    });
    let mut first_packet = [0; 2048];
    let (mut begun, mut names, mut flood) = (Vec::new(), HashSet::new(), Vec::new());
    for _ in 0..FLOOD {
        let connecting = endpoint.connect_with(config.clone(), to, "coordinator.chutes.internal");
        begun.push(connecting.expect("a good name"));
        // Not what is sent again for one that began before: it names the same connection (RFC 9000, 17.2).
        let bytes = loop {
            let (bytes, _) = elsewhere.recv_from(&mut first_packet).await.expect("it begins");
            let name = &first_packet[6..6 + usize::from(first_packet[5])];
            if names.insert(name.to_vec()) {
                break bytes;
            }
        };
        flood.push(first_packet[..bytes].to_vec());
    }
    // Again and again: the member gives up those that say nothing more, and a slow one takes its time.
    let flooding = async {
        for datagram in flood.iter().cycle() {
            forger.send_to(datagram, first.door).await.expect("sent");
            tokio::task::yield_now().await;
            if told_to_try_again.is_finished() {
                return;
            }
        }
    };
    let flooding = tokio::time::timeout(Duration::from_secs(60), flooding).await;
    flooding.expect("those beyond the limit hold nothing");
    told_to_try_again.await.expect("no panic");
    let connection = dial(&identity, &first, HOST).await;
    assert!(connection.is_ok(), "who answers gets in: {connection:?}");
    first.stop().await;
}

/// Its certificate is good, but no host of that key can be removed: it must get nothing to do.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_joined_after_what_the_cluster_goes_on_from_is_turned_away() {
    let mut first = Host::new(1);
    first.found();
    first.start();
    until("it leads", async || first.leader().await).await;
    first.stop().await;
    let before = tempfile::tempdir().expect("a folder");
    copy(&first.raft_folder(), before.path());
    first.start();
    until("it leads", async || first.leader().await).await;
    let second = Host::new(2);
    let token = first.invite(json!({ "eligible": false })).await;
    second.join(&token).await.expect("invited");
    let identity = Identity::of_host(&second.identity()).expect("its own");
    let connection = dial(&identity, &first, HOST).await.expect("it is known");
    let ended = tokio::time::timeout(Duration::from_millis(500), connection.closed()).await;
    assert!(ended.is_err(), "a host that is known was turned away: {ended:?}");
    drop(connection);

    first.stop().await;
    std::fs::remove_dir_all(first.raft_folder()).expect("removed");
    copy(before.path(), &first.raft_folder());
    first.start();
    until("it leads", async || first.leader().await).await;
    let connection = dial(&identity, &first, HOST)
        .await
        .expect("of the same authority");
    let ended = tokio::time::timeout(Duration::from_secs(20), connection.closed()).await;
    let reason = ended.expect("it is closed").to_string();
    assert!(reason.contains("does not know this host's key"), "{reason}");
    let own = Identity::of_host(&first.identity()).expect("its own");
    let connection = dial(&own, &first, HOST).await.expect("it founded the cluster");
    let ended = tokio::time::timeout(Duration::from_millis(500), connection.closed()).await;
    assert!(ended.is_err(), "the founder was turned away: {ended:?}");
    first.stop().await;
}

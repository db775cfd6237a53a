//! An image goes from Debian's `docker-registry` through the registry door to `skopeo`, byte for byte.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use crate::fake_upstream::Door;
use crate::peers::{blobs_of, have, run, start_registry, write_image};
use agent::registry::metrics::Outcome;
use agent::registry::store;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Passes connections on to the registry and keeps what is sent to it.
async fn start_relay(registry: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let kept = Arc::clone(&kept);
            tokio::spawn(async move {
                let server = TcpStream::connect(registry).await.expect("the registry listens");
                let (mut client_read, mut client_write) = client.into_split();
                let (mut server_read, mut server_write) = server.into_split();
                let upward = async move {
                    let mut buffer = [0; 4096];
                    while let Ok(read @ 1..) = client_read.read(&mut buffer).await {
                        kept.lock()
                            .expect("not poisoned")
                            .extend_from_slice(&buffer[..read]);
                        server_write.write_all(&buffer[..read]).await.expect("sent");
                    }
                };
                tokio::join!(upward, async move {
                    tokio::io::copy(&mut server_read, &mut client_write).await.ok()
                });
            });
        }
    });
    (address, seen)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skopeo_pulls_an_image_byte_for_byte() {
    if !have(&["skopeo", "docker-registry", "tar"]) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    write_image(&path("made"), 20 << 20).await;
    let (_registry, registry) = start_registry(folder.path()).await;
    let made = format!("oci:{}:v1", path("made").display());
    let origin = format!("docker://{registry}/user/name:v1");
    run(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "--preserve-digests",
            "--dest-tls-verify=false",
            &made,
            &origin,
        ],
    )
    .await;

    let (relay, seen) = start_relay(registry).await;
    let store = store::Config {
        directory: path("store"),
        bytes_max: 1 << 30,
        free_bytes_min: 0,
    };
    let blobs = blobs_of(&path("made"));
    for store in [None, Some(store)] {
        let kept = store.is_some();
        seen.lock().expect("not poisoned").clear();
        let door = Door::start(&[relay], store).await;
        for round in 1..=2 {
            let pulled = path(&format!("pulled-{kept}-{round}"));
            let from = format!("{}/user/name:v1", door.base.replace("http://", "docker://"));
            let into = format!("oci:{}:v1", pulled.display());
            run(
                "skopeo",
                &[
                    "--insecure-policy",
                    "copy",
                    "--preserve-digests",
                    "--src-tls-verify=false",
                    &from,
                    &into,
                ],
            )
            .await;
            assert!(
                blobs_of(&pulled) == blobs,
                "store {kept}, round {round}: not byte-identical"
            );
        }
        let requests = String::from_utf8_lossy(&seen.lock().expect("not poisoned")).to_lowercase();
        let heads: Vec<&str> = requests
            .split("\r\n\r\n")
            .filter(|head| !head.is_empty())
            .collect();
        assert!(!heads.is_empty());
        for head in &heads {
            for header in [
                "x-chutes-hotkey: miner",
                "x-chutes-nonce: 1735689600",
                "x-chutes-signature: ab12",
            ] {
                assert!(head.contains(header), "{header} is missing in {head}");
            }
            assert!(!head.contains("authorization"), "{head}");
        }
        let blob_requests = heads.iter().filter(|head| head.contains("/blobs/")).count();
        let expected = if kept { 3 } else { 6 };
        assert_eq!(
            blob_requests, expected,
            "store {kept}: config and two layers, in two rounds"
        );
        assert_eq!(door.metrics.requests(Outcome::Stored), if kept { 3 } else { 0 });
        door.stop().await;
    }
}

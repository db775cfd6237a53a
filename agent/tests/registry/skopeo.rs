//! An image goes from Debian's `docker-registry` through the registry door to `skopeo`, byte for byte.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use crate::fake_upstream::{Door, sha256};
use agent::registry::metrics::Outcome;
use agent::registry::store;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// False, with a word about it, when a foreign program is missing; a failure where peers are required.
fn have(programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    for program in programs {
        if !std::env::split_paths(&path).any(|folder| folder.join(program).is_file()) {
            assert!(
                std::env::var_os("REQUIRE_PEERS").is_none(),
                "{program} is required (see .ci/peers)"
            );
            eprintln!("NOT TESTED: pulling with a foreign client, since {program} is not installed");
            return false;
        }
    }
    true
}

async fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .kill_on_drop(true)
        .output()
        .await
        .expect("started");
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Starts `docker-registry` on a free port and reads from its log which one.
async fn start_registry(folder: &Path) -> (Child, SocketAddr) {
    let config = folder.join("registry.yml");
    let text = format!(
        "version: 0.1\nlog: {{level: info, formatter: json}}\nstorage: {{filesystem: {{rootdirectory: {:?}}}}}\nhttp: {{addr: \"127.0.0.1:0\"}}\n",
        folder.join("registry")
    );
    fs::write(&config, text).expect("written");
    let mut child = Command::new("docker-registry")
        .arg("serve")
        .arg(&config)
        .env("OTEL_TRACES_EXPORTER", "none")
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("started");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    loop {
        let line = lines
            .next_line()
            .await
            .expect("readable")
            .expect("the registry ended before it listened");
        if let Some((_, rest)) = line.split_once("listening on ") {
            let address = rest
                .split(['"', ' ', ','])
                .next()
                .and_then(|text| text.parse().ok());
            // Its log must go on being read, or it stops when the pipe is full.
            tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
            return (child, address.expect("an address"));
        }
    }
}

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

/// Writes an OCI layout with one image of two layers; returns its blobs by name.
async fn write_image(folder: &Path) {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("made");
    let content = folder.join("content");
    fs::create_dir_all(&content).expect("made");
    let mut random = fastrand::Rng::with_seed(7);
    let large: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(20 << 20).collect();
    fs::write(content.join("weights.bin"), large).expect("written");
    fs::write(content.join("hello.txt"), "hello").expect("written");
    let add = |bytes: &[u8]| {
        let digest = sha256(bytes);
        fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes).expect("written");
        (digest, bytes.len())
    };
    let mut layers = Vec::new();
    for file in ["weights.bin", "hello.txt"] {
        let tar = folder.join("layer.tar");
        let (into, from) = (tar.to_str().expect("text"), content.to_str().expect("text"));
        run("tar", &["-cf", into, "-C", from, file]).await;
        layers.push(add(&fs::read(&tar).expect("read")));
        fs::remove_file(tar).expect("removed");
    }
    fs::remove_dir_all(content).expect("removed");
    let diff_ids: Vec<&String> = layers.iter().map(|(digest, _)| digest).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let (config_digest, config_size) = add(config.to_string().as_bytes());
    let layers: Vec<serde_json::Value> = layers
        .iter()
        .map(|(digest, size)| {
            let kind = "application/vnd.oci.image.layer.v1.tar";
            serde_json::json!({"mediaType": kind, "digest": digest, "size": size})
        })
        .collect();
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": kind, "layers": layers,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config_size},
    });
    let (digest, size) = add(manifest.to_string().as_bytes());
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": kind, "digest": digest, "size": size,
            "annotations": {"org.opencontainers.image.ref.name": "v1"}}],
    });
    fs::write(folder.join("index.json"), index.to_string()).expect("written");
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("written");
}

fn blobs_of(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder.join("blobs/sha256")).expect("listed");
    entries
        .map(|entry| entry.expect("listed"))
        .map(|entry| {
            (
                entry.file_name().to_string_lossy().into_owned(),
                fs::read(entry.path()).expect("read"),
            )
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skopeo_pulls_an_image_byte_for_byte() {
    if !have(&["skopeo", "docker-registry", "tar"]) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    write_image(&path("made")).await;
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

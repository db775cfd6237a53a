//! An image, made here, and the foreign programs that keep and pull images.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// False, with a word about it, when a foreign program is missing; a failure where peers are required.
pub(crate) fn have(programs: &[&str]) -> bool {
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

/// Runs a program to its end, which must be a good one.
pub(crate) async fn run(program: &str, arguments: &[&str]) {
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
pub(crate) async fn start_registry(folder: &Path) -> (Child, SocketAddr) {
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

/// Writes an OCI layout with one image, `v1`, of two layers, of which one is so large.
pub(crate) async fn write_image(folder: &Path, bytes: usize) {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("made");
    let content = folder.join("content");
    fs::create_dir_all(&content).expect("made");
    let mut random = fastrand::Rng::with_seed(7);
    let large: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(bytes).collect();
    fs::write(content.join("weights.bin"), large).expect("written");
    fs::write(content.join("hello.txt"), "hello").expect("written");
    let add = |bytes: &[u8]| {
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(bytes)));
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

/// The blobs of an OCI layout by name.
pub(crate) fn blobs_of(folder: &Path) -> BTreeMap<String, Vec<u8>> {
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

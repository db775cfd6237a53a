//! `hotkey`: both seeds stay here, and the authority's key goes from one to the other.

use protocol::hotkey::Signer;
use protocol::sealing::{NONCE_BYTES, SealedKind, SealingKey};
use serde_json::{Value, json};

use crate::world::{World, set_mode};

const OLD: [u8; 32] = [1; 32];
const NEW: [u8; 32] = [7; 32];

fn hotkey(seed: &[u8; 32]) -> String {
    Signer::from_seed(seed).hotkey().to_string()
}

fn status(in_the_way: &[&str]) -> Value {
    let sealed = SealingKey::from_seed(&OLD).seal(SealedKind::ClusterCaKey, [3; NONCE_BYTES], b"the key");
    json!({
        "hotkey": hotkey(&OLD),
        "cluster": "miner-1a2b3c4d",
        "sealed_key": hex::encode(sealed.expect("short")),
        "in_the_way": in_the_way,
        "members": [
            { "host": "host-1", "member": 1, "seed_of": hotkey(&OLD) },
            { "host": "host-2", "member": 2, "seed_of": hotkey(&NEW) },
            { "host": "host-3", "member": 3, "seed_of": null },
        ],
    })
}

fn new_hotkey_file(folder: &tempfile::TempDir) -> String {
    let file = folder.path().join("new.json");
    let text = json!({ "secretSeed": format!("0x{}", hex::encode(NEW)) }).to_string();
    std::fs::write(&file, text).expect("write the key");
    set_mode(&file, 0o600);
    file.display().to_string()
}

#[tokio::test]
async fn the_hotkey_is_replaced_after_a_yes_and_no_seed_is_sent() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = new_hotkey_file(&folder);
    let replaced = json!({ "hotkey": hotkey(&NEW), "changed": true });
    let answers = [
        ("GET /v1/hotkey", 200, status(&[])),
        ("POST /v1/hotkey", 200, replaced),
    ];
    let world = World::new("hotkey-replace", &answers).await;
    let replace = ["hotkey", "replace", "--new-hotkey", &file];
    let run = world.run_with_input(&replace, "n\n").await;
    run.ends(0, "", &format!("belongs to the miner {}", hotkey(&OLD)));
    run.ends(0, "", &format!("belongs to {} afterwards", hotkey(&NEW)));
    assert!(!world.was_asked("POST /v1/hotkey"), "it was not meant");

    let run = world.run_with_input(&replace, "y\n").await;
    run.ends(0, &format!("The miner's hotkey is {} now.", hotkey(&NEW)), "");
    let asked = world.fake.asked.lock().expect("no panic").clone();
    let (_, body) = asked.last().expect("it was asked");
    assert_eq!(body["old"], hotkey(&OLD));
    assert_eq!(body["new"], hotkey(&NEW));
    let sealed = hex::decode(body["sealed_key"].as_str().expect("a text")).expect("hexadecimal");
    let opened = SealingKey::from_seed(&NEW).unseal(SealedKind::ClusterCaKey, &sealed);
    assert_eq!(
        opened.as_deref(),
        Some(&b"the key"[..]),
        "sealed for the new seed"
    );
    for seed in [OLD, NEW] {
        let told = asked
            .iter()
            .any(|(_, body)| body.to_string().contains(&hex::encode(seed)));
        assert!(
            !told && !format!("{run:?}").contains(&hex::encode(seed)),
            "a seed got out"
        );
    }

    let run = world
        .run(&[&replace[..], &["--yes", "--output", "json"]].concat())
        .await;
    run.ends(0, "\"changed\": true", "");
}

#[tokio::test]
async fn what_keeps_the_hotkey_is_said_before_anything_is_asked() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = new_hotkey_file(&folder);
    let reason = "server gpu-a works for the validator 5Cf: `chutes-miner delete-node --name gpu-a`";
    let answers = [("GET /v1/hotkey", 200, status(&[reason]))];
    let world = World::new("hotkey-kept", &answers).await;
    let run = world
        .run(&["hotkey", "replace", "--new-hotkey", &file, "--yes"])
        .await;
    run.ends(1, "", reason);
    assert!(!world.was_asked("POST /v1/hotkey"));
    let same = world.hotkey.display().to_string();
    let run = world
        .run(&["hotkey", "replace", "--new-hotkey", &same, "--yes"])
        .await;
    run.ends(1, "", "are the same one");
    let run = world
        .run(&["hotkey", "replace", "--new-hotkey", "/nowhere"])
        .await;
    run.ends(1, "", "read the hotkey file /nowhere (--new-hotkey names it)");

    let run = world.run(&["hotkey", "status"]).await;
    run.ends(0, &format!("The miner's hotkey: {}", hotkey(&OLD)), "");
    run.ends(0, "host-1 │ 1      │ the miner's hotkey", "");
    run.ends(0, &format!("host-2 │ 2      │ {}", hotkey(&NEW)), "");
    run.ends(0, "host-3 │ 3      │ it did not answer", "");
    run.ends(0, "and its agent was restarted: host-2.", "");
    run.ends(0, reason, "");
}

//! `snapshot` and `upgrade`.

use protocol::snapshot_file::{Head, Sealer, SnapshotKey, Summary};
use protocol::time::UnixMillis;
use serde_json::json;

use crate::world::World;

/// A snapshot file as a member would send it.
fn snapshot_for(key: &SnapshotKey) -> Vec<u8> {
    let head = Head {
        cluster: "miner-1a2b3c4d".to_owned(),
        created_at: UnixMillis(1_800_000_000_000),
        last_index: 77,
        format: 1,
        written_by: "0.1.0".to_owned(),
        recipient: String::new(),
    };
    let summary = Summary {
        members: std::collections::BTreeSet::from([1, 2, 3]),
        rows: std::collections::BTreeMap::from([("servers".to_owned(), 4)]),
        size_bytes: 5,
    };
    let made = Sealer::new(&key.recipient(), head, &summary, [9; 32]);
    let (mut sealer, mut file) = made.expect("a good key");
    file.extend(sealer.put(b"state"));
    file.extend(sealer.finish());
    file
}

#[tokio::test]
async fn snapshots_are_saved_for_a_key_and_inspected() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (key_file, saved) = (path("key"), path("saved"));
    let nobody = World::new("snapshot-keys", &[]).await;
    let run = nobody.run(&["snapshot", "keygen", &key_file]).await;
    run.ends(0, "", "keep it off the hosts");
    let text = std::fs::read_to_string(&key_file).expect("it was made");
    let key = SnapshotKey::parse(&text).expect("a key");
    let recipient = key.recipient().to_string();
    assert_eq!(run.stdout.trim(), recipient, "the word alone can be piped");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(&key_file)
            .expect("it was made")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let run = nobody.run(&["snapshot", "keygen", &key_file]).await;
    run.ends(1, "", "exists");
    assert_eq!(std::fs::read_to_string(&key_file).expect("as before"), text);

    let answers = vec![("POST /v1/snapshots", 200, snapshot_for(&key))];
    let world = World::of_bytes("snapshots", answers).await;
    let save = ["snapshot", "save", "--key", &key_file, "--to", &saved];
    let run = world.run(&save).await;
    run.ends(0, "sound: true", "");
    let asked = world.fake.asked.lock().expect("no panic").clone();
    assert_eq!(asked[0].1, json!({ "recipient": recipient }));
    let inspect = ["snapshot", "inspect", &saved];
    world
        .run(&inspect)
        .await
        .ends(0, "cluster: \"miner-1a2b3c4d\"", "");
    let opened = world.run(&[&inspect[..], &["--key", &key_file]].concat()).await;
    opened.ends(0, "servers: 4", "");
    let restore = ["snapshot", "restore", &saved, "--key", &key_file, "--cluster"];
    let run = world.run(&[&restore[..], &["miner-1a2b3c4d"]].concat()).await;
    run.ends(0, "chutes-agent restore", "is sound");
    let run = world.run(&[&restore[..], &["miner-2"]].concat()).await;
    run.ends(1, "", "not of \"miner-2\"");

    // Another key, and a file that was cut off.
    let other = path("other");
    world.run(&["snapshot", "keygen", &other]).await.ends(0, "", "");
    let run = world.run(&[&inspect[..], &["--key", &other]].concat()).await;
    run.ends(1, "", &key.recipient().id());
    let whole = std::fs::read(&saved).expect("it was saved");
    std::fs::write(&saved, &whole[..whole.len() - 1]).expect("ours");
    let run = world.run(&[&inspect[..], &["--key", &key_file]].concat()).await;
    assert_eq!(run.code, Some(1), "{run:?}");

    // What the member refuses leaves no file.
    let detail = json!({ "detail": "another snapshot is being saved: try again when it is done" });
    let busy = World::new("snapshots-busy", &[("POST /v1/snapshots", 409, detail)]).await;
    let to = path("none");
    let run = busy.run(&["snapshot", "save", "--to", &to]).await;
    run.ends(1, "", "another snapshot is being saved");
    assert!(!std::path::Path::new(&to).exists());
}

#[tokio::test]
async fn an_upgrade_is_looked_at_and_finalized() {
    let upgrade = |format: u32, changed: bool| {
        json!({
            "format": format, "newest": 2, "version": "0.2.0", "finalized": null, "changed": changed,
            "hosts": [
                { "server_id": "a", "name": "gpu-a", "version": "0.2.0+format.2", "knows": 2, "ready": true },
                { "server_id": "b", "name": "gpu-b", "version": "0.1.0", "knows": 1, "ready": false },
            ],
        })
    };
    let answers = [
        ("GET /v1/upgrade", 200, upgrade(1, false)),
        ("POST /v1/upgrade/finalize", 200, upgrade(2, true)),
    ];
    let world = World::new("upgrade", &answers).await;
    let run = world.run(&["upgrade", "status"]).await;
    run.ends(0, "│ gpu-b │ 0.1.0          │ 1            │ no", "");
    run.ends(0, "It stays off until chutes-miner upgrade finalize", "");
    let finalize = ["upgrade", "finalize", "--vouch", "gpu-b"];
    let run = world.run_with_input(&finalize, "n\n").await;
    run.ends(0, "", "does not start on this miner's data any more");
    assert!(!world.was_asked("POST /v1/upgrade/finalize"));
    let run = world.run_with_input(&finalize, "y\n").await;
    run.ends(0, "The data has format 2 from now on.", "");
    let asked = world.fake.asked.lock().expect("no panic").clone();
    assert_eq!(
        asked.last().map(|(_, body)| body),
        Some(&json!({ "vouch": ["gpu-b"] }))
    );

    let detail = json!({ "detail": "host gpu-b runs version 0.1.0, which knows formats up to 1, not 2" });
    let refused = World::new("upgrade-refused", &[("POST /v1/upgrade/finalize", 409, detail)]).await;
    let run = refused.run(&["upgrade", "finalize", "--yes"]).await;
    run.ends(1, "", "409 Conflict: host gpu-b runs version 0.1.0");
}

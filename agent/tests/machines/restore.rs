//! A cluster that is lost as a whole, in real processes: its machines and their disks are gone, a snapshot and the
//! operator's key are left. One new machine goes on with everything that was acknowledged before the snapshot, a
//! host of before finds it, and another machine joins.

use std::path::Path;

use protocol::snapshot_file::SnapshotKey;
use reqwest::Method;
use serde_json::{Value, json};

use super::machine::{Machine, SEED, three, until};

/// Hosts that only join: each is an acknowledged write.
const JOINED: u8 = 8;

async fn restored_state(machine: &Machine) -> Value {
    until("the member answers", async || {
        machine.ask(Method::GET, "/v1/state", &Value::Null).await.ok()
    })
    .await
}

/// The names of those hosts that belong to the cluster.
async fn hosts(machine: &Machine) -> Vec<String> {
    let hosts = machine.ask(Method::GET, "/hosts", &Value::Null).await;
    let hosts = hosts.expect("it answers");
    let hosts = hosts.as_array().expect("a list").iter();
    let within = hosts.filter(|host| host["revoked_at"].is_null());
    within
        .map(|host| host["name"].as_str().expect("a name").to_owned())
        .collect()
}

async fn has_reported(machine: &Machine, host: &str, incarnation: &Value) {
    until("the host reports", async || {
        let state = machine.ask(Method::GET, "/v1/state", &Value::Null).await.ok()?;
        let servers = state["servers"].as_array()?;
        let server = servers.iter().find(|server| server["server_id"] == host)?;
        (server["reported"]["incarnation"] == *incarnation).then_some(())
    })
    .await;
}

/// Machine 1 with two more members, and a host that is none.
async fn cluster() -> ([Machine; 3], Machine) {
    let members = three().await;
    let first = &members[0];
    let mut host = Machine::host(4);
    let token = first.invited(json!({})).await;
    host.done(&["join", &token], "as a host without a vote");
    host.start();
    let state = restored_state(first).await;
    has_reported(first, "host-4", &state["incarnation"]).await;
    (members, host)
}

/// Restoring with what does not fit is refused and leaves nothing behind.
fn refusals(new: &Machine, snapshot: &Path, key: &Path, cluster: &str) {
    let shown = |path: &Path| path.display().to_string();
    let (snapshot, key) = (shown(snapshot), shown(key));
    let other = Machine::new(9, [9; 32]);
    for (machine, key, cluster, why) in [
        (new, &key, "dev-00000000", "not of \"dev-00000000\""),
        (&other, &key, cluster, "this is a snapshot of the miner"),
        (new, &snapshot, cluster, "read the key file"),
    ] {
        machine.refused(&["restore", &snapshot, "--key", key, "--cluster", cluster], why);
        assert!(!machine.data().join("coordinator/raft").exists(), "{why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_cluster_goes_on_on_new_machines() {
    let (mut members, mut host) = cluster().await;
    let [first, second, _] = &members;
    for number in 20..20 + JOINED {
        let token = second.invited(json!({})).await;
        Machine::new(number, SEED).done(&["join", &token], "joined the cluster");
    }
    let pinned = second
        .ask(Method::PUT, "/hosts/host-2/pin", &json!({ "pin": "never" }))
        .await;
    pinned.expect("it is a member");

    // Saved by a member that does not lead, with all that others acknowledged.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (snapshot, key_file) = (folder.path().join("snapshot"), folder.path().join("key"));
    let key = SnapshotKey::new([7; 32]);
    std::fs::write(&key_file, key.file_text()).expect("ours");
    let recipient = key.recipient().to_string();
    let saved = second.saved(&json!({ "recipient": recipient })).await;
    std::fs::write(&snapshot, saved).expect("ours");
    let before = restored_state(second).await;
    let hosts_before = hosts(second).await;
    let status = first.ask(Method::GET, "/v1/status", &Value::Null).await;
    let cluster = status.expect("it answers")["cluster"]["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    // Lost, since it comes after the snapshot.
    let token = first.invited(json!({})).await;
    Machine::new(40, SEED).done(&["join", &token], "joined the cluster");

    let door = first.door;
    for member in &mut members {
        member.kill().await;
    }
    // Their folders go with them.
    drop(members);

    // The first one's address is given to the new machine: hosts look for members there.
    let mut new = Machine::at(5, SEED, door);
    refusals(&new, &snapshot, &key_file, &cluster);
    let (snapshot, key_file) = (snapshot.display().to_string(), key_file.display().to_string());
    let restore = ["restore", &snapshot, "--key", &key_file, "--cluster", &cluster];
    new.done(&restore, "the only one");
    new.refused(&restore, "belongs to no cluster");
    new.start();
    let after = restored_state(&new).await;
    assert_eq!(after["miner"], before["miner"]);
    let raised = |state: &Value| state["incarnation"].as_u64().expect("a number");
    assert!(raised(&after) > raised(&before));
    let mut expected: Vec<String> = hosts_before;
    expected.retain(|name| !["host-1", "host-2", "host-3"].contains(&name.as_str()));
    expected.push("host-5".to_owned());
    expected.sort();
    let mut found = hosts(&new).await;
    found.sort();
    assert_eq!(found, expected, "members of before are out, and nobody else");
    assert_eq!(found.len(), usize::from(JOINED) + 2);

    // The host of before comes by itself, and takes the higher incarnation.
    has_reported(&new, "host-4", &after["incarnation"]).await;
    // A new second machine comes back under a name of before.
    let mut again = Machine::new(2, SEED);
    let token = new.invited(json!({ "eligible": true })).await;
    again.done(&["join", &token], "joined the cluster");
    again.start();
    until("it follows", async || {
        let state = again.ask(Method::GET, "/v1/state", &Value::Null).await.ok()?;
        (state["incarnation"] == after["incarnation"]).then_some(())
    })
    .await;
    for machine in [&mut again, &mut host, &mut new] {
        machine.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schedule_puts_one_away_and_it_is_fetched_and_restored() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let key = SnapshotKey::new([7; 32]);
    let (away, key_file) = (folder.path().join("away"), folder.path().join("key"));
    std::fs::create_dir(&away).expect("ours");
    std::fs::write(&key_file, key.file_text()).expect("ours");
    let backup = format!(
        "[backup]\ndirectory = \"{}\"\nrecipient = \"{}\"",
        away.display(),
        key.recipient()
    );
    let mut first = Machine::with_backup(1, &backup);
    first.done(&["init"], "founded");
    first.start();
    let status = until("a snapshot is put away", async || {
        let status = first.ask(Method::GET, "/v1/status", &Value::Null).await.ok()?;
        status["backup"]["last"]["name"].is_string().then_some(status)
    })
    .await;
    let cluster = status["cluster"]["id"].as_str().expect("an id");
    let name = status["backup"]["last"]["name"].as_str().expect("a name");
    first.kill().await;

    let new = Machine::with_backup(2, &backup);
    let listed = new.done(&["snapshots", "list", "--cluster", cluster], name);
    assert_eq!(listed.trim(), name);
    let fetched = folder.path().join("fetched").display().to_string();
    new.done(&["snapshots", "fetch", name, &fetched], "");
    new.refused(&["snapshots", "fetch", name, &fetched], "exists already");
    let key_file = key_file.display().to_string();
    let restore = ["restore", &fetched, "--key", &key_file, "--cluster", cluster];
    new.done(&restore, "the only one");
}

//! The way back: a snapshot becomes the store of a new member, or is refused with nothing changed.

use std::path::Path;

use coordinator::backup::restore::{Error, Restoring};
use coordinator::signer::SealedKind;
use coordinator_core::state_machine::host::Standing;
use coordinator_core::state_machine::{Command, Faults, State};
use protocol::snapshot_file::SnapshotKey;

use super::member::{CLUSTER, Member, START, host, key, seed, server};

/// A cluster of which nothing is left but a snapshot file.
async fn lost(folder: &Path) -> (std::path::PathBuf, State) {
    let member = Member::founded(&folder.join("old")).await;
    for name in ["gpu-a", "gpu-b"] {
        let mut facts = super::golden::facts(name);
        facts.memory_gb = 512;
        member.propose(Command::RecordHost { facts }).await;
    }
    let file = folder.join("saved.chutes-snapshot");
    member.saved(&file).await;
    let state = member.machine.read(Clone::clone);
    lock_one(&member).await;
    member.replica.shutdown().await;
    (file, state)
}

/// A write that changes the state.
async fn lock_one(member: &Member) {
    let (server, locked) = (server("gpu-a"), true);
    member.propose(Command::LockServer { server, locked }).await;
}

fn names(folder: &Path) -> Vec<std::ffi::OsString> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect()
}

#[tokio::test]
async fn a_lost_cluster_goes_on_on_a_new_machine() {
    let folder = tempfile::tempdir().unwrap();
    let (file, before) = lost(folder.path()).await;
    let new = folder.path().join("new");
    std::fs::create_dir(&new).unwrap();
    let restoring = Restoring::open(&file, &key(), CLUSTER, &new).unwrap();
    assert_eq!(restoring.head().cluster, CLUSTER);
    assert_eq!(restoring.summary().rows["servers"], 2);
    let sealed = &restoring.cluster().unwrap().sealed_key;
    let authority = seed().unseal(SealedKind::ClusterCaKey, sealed).unwrap();
    assert_eq!(authority, b"the authority's key");
    assert_eq!(restoring.miner(), Some(seed().hotkey()));
    let later = START + 1000 * 3_600;
    let id = restoring
        .into_store(host("second", 2), new.join("raft"), later)
        .await
        .unwrap();
    assert_eq!(id, later.unix_seconds(), "an id that nobody had");
    assert_eq!(names(&new), ["raft"], "no plain snapshot is left");

    let member = Member::open(&new, id).await.unwrap();
    member.store.linearizable().await.unwrap();
    member.machine.read(|state| {
        assert!(state.settings().incarnation > before.settings().incarnation);
        let names = |state: &State| state.servers().keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(state), names(&before));
        assert!(
            matches!(state.standing(&[1; 32]), Standing::Removed(_)),
            "the lost member is out"
        );
        assert!(matches!(state.standing(&[2; 32]), Standing::In(_)));
    });
    assert!(member.replica.leadership().borrow().leads);
    lock_one(&member).await;
    member.replica.shutdown().await;
    assert!(
        Member::open(&new, 1).await.is_err(),
        "nobody else may use the store"
    );
}

#[tokio::test]
async fn what_does_not_fit_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (file, _) = lost(folder.path()).await;
    let new = folder.path().join("new");
    std::fs::create_dir(&new).unwrap();
    let refused = |file: &Path, key: &SnapshotKey, cluster: &str| {
        let error = Restoring::open(file, key, cluster, &new).unwrap_err();
        assert_eq!(names(&new), Vec::<std::ffi::OsString>::new(), "{error}");
        error
    };
    let other = refused(&file, &key(), "miner-2");
    assert!(matches!(&other, Error::OtherCluster { .. }), "{other}");
    assert!(
        other.to_string().contains("\"miner-1\", not of \"miner-2\""),
        "{other}"
    );
    let stranger = refused(&file, &SnapshotKey::new([4; 32]), CLUSTER).to_string();
    assert!(stranger.contains(&key().recipient().id()), "{stranger}");
    let missing = refused(&folder.path().join("missing"), &key(), CLUSTER).to_string();
    assert!(missing.contains("missing"), "{missing}");
    let whole = std::fs::read(&file).unwrap();
    let damaged = folder.path().join("damaged");
    for length in [0, 20, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&damaged, &whole[..length]).unwrap();
        refused(&damaged, &key(), CLUSTER);
    }

    // A store that is there is never written over.
    let restoring = Restoring::open(&file, &key(), CLUSTER, &new).unwrap();
    let id = restoring
        .into_store(host("second", 2), new.join("raft"), START)
        .await
        .unwrap();
    let again = Restoring::open(&file, &key(), CLUSTER, &new).unwrap();
    let again = again.into_store(host("third", 3), new.join("raft"), START).await;
    assert!(matches!(again, Err(Error::Store(_))), "{again:?}");
    let member = Member::open(&new, id).await.unwrap();
    member.replica.shutdown().await;
}

/// A snapshot of a cluster whose upgrade was finalized says so before anything else.
#[tokio::test]
async fn a_state_that_is_too_new_names_the_way_out() {
    let mut rows = super::golden::too_new_rows().into_iter();
    let refused = State::from_rows(&mut rows, Faults::none())
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("9.9.9") && refused.contains("format 99"),
        "{refused}"
    );
}

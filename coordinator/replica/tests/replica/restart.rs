//! One voter on real files: what was acknowledged is there after a restart, with and without snapshots.

use replica::{ProposeError, Start, Writer, reading, recovery};
use std::os::unix::fs::PermissionsExt;

use crate::cluster::{Cluster, propose_surely};
use crate::store::{Disk, Disks, Journal, files, open, position};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_every_acknowledged_command() {
    let directory = tempfile::tempdir().unwrap();
    let mut acknowledged = Vec::new();
    for round in 0..3u8 {
        let (replica, published) = open(files(directory.path())).await;
        replica.linearizable().await.unwrap();
        assert_eq!(published.lock().unwrap().applied, acknowledged, "round {round}");
        for number in 0..20u8 {
            let command = vec![round, number];
            let reply = replica.propose(command.clone()).await.unwrap();
            assert_eq!(position(&reply), acknowledged.len() as u64);
            acknowledged.push(command);
        }
        replica.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_dropped_without_shutdown_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (replica, _) = open(files(directory.path())).await;
    for number in 0..10u8 {
        replica.propose(vec![number]).await.unwrap();
    }
    drop(replica);
    // The files are free once the last task of the dropped replica has ended.
    let (replica, published) = loop {
        let (machine, published) = Journal::new();
        match replica::Replica::open(
            files(directory.path()),
            machine,
            std::sync::Arc::new(replica::Unconnected),
        )
        .await
        {
            Ok(replica) => break (replica, published),
            Err(replica::Error::AlreadyOpen { .. }) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    replica.linearizable().await.unwrap();
    assert_eq!(
        published.lock().unwrap().applied,
        (0..10u8).map(|number| vec![number]).collect::<Vec<_>>()
    );
    replica.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_purge_the_log_and_restarts_go_on_from_them() {
    let directory = tempfile::tempdir().unwrap();
    let config = || {
        let mut config = files(directory.path());
        config.snapshots.every_entries = Some(40);
        config.snapshots.keep_entries = 5;
        config.log_tail_bytes_max = 2_000;
        config
    };
    let mut count = 0u64;
    for round in 0..3 {
        let (replica, published) = open(config()).await;
        replica.linearizable().await.unwrap();
        assert_eq!(
            published.lock().unwrap().applied.len() as u64,
            count,
            "round {round}"
        );
        for _ in 0..100 {
            let reply = replica.propose(vec![7; 100]).await.unwrap();
            assert_eq!(position(&reply), count);
            count += 1;
        }
        replica.snapshot().await.unwrap();
        let mut leadership = replica.leadership();
        // The purge follows the snapshot: wait for the news of it.
        while replica.metrics().purged_index.is_none() {
            leadership.changed().await.unwrap();
        }
        let metrics = replica.metrics();
        assert!(metrics.snapshots_built >= 1, "{metrics:?}");
        assert!(metrics.snapshot_index.unwrap() >= count, "{metrics:?}");
        assert!(metrics.log_tail_bytes <= 2_000 + 500, "{metrics:?}");
        replica.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_state_file_is_rebuilt_from_the_snapshot_and_the_log() {
    // A crash may leave the state file older than the snapshot: the snapshot is taken over again.
    let disks = Disks::new(1);
    let mut config = disks.config(1);
    config.snapshots.keep_entries = 0;
    let (replica, _) = open(config).await;
    for number in 0..30u8 {
        replica.propose(vec![number]).await.unwrap();
    }
    replica.snapshot().await.unwrap();
    for number in 30..40u8 {
        replica.propose(vec![number]).await.unwrap();
    }
    replica.shutdown().await;

    let empty = Disks {
        state: Disk::new(2, disks.power.clone()),
        ..disks
    };
    let (replica, published) = open(empty.config(2)).await;
    replica.linearizable().await.unwrap();
    assert_eq!(
        published.lock().unwrap().applied,
        (0..40u8).map(|number| vec![number]).collect::<Vec<_>>()
    );
    assert_eq!(replica.metrics().snapshots_installed, 1);
    replica.shutdown().await;
}

#[tokio::test]
async fn files_are_readable_by_their_owner_only() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = files(directory.path());
    config.writer = Writer::Inline;
    let (replica, _) = open(config).await;
    replica.propose(b"a".to_vec()).await.unwrap();
    replica.snapshot().await.unwrap();
    replica.shutdown().await;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(
            entry.metadata().unwrap().permissions().mode() & 0o777,
            0o600,
            "{:?}",
            entry.path()
        );
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(names, ["member", "raft-log.redb", "state.redb", "state.snapshot"]);
}

#[tokio::test]
async fn after_a_shutdown_other_handles_are_told_so() {
    let directory = tempfile::tempdir().unwrap();
    let (replica, _) = open(files(directory.path())).await;
    let other = replica.clone();
    replica.shutdown().await;
    assert_eq!(other.propose(b"a".to_vec()).await, Err(ProposeError::Stopped));
    assert!(matches!(other.linearizable().await, Err(replica::Error::Stopped)));
    other.shutdown().await;
}

/// A full disk at the first start left a log of which redb had written no more than zeros.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_whose_making_was_cut_off_is_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("raft-log.new"), [0; 5000]).unwrap();
    std::fs::write(directory.path().join("state.redb"), []).unwrap();
    let (replica, _) = open(files(directory.path())).await;
    replica.propose(vec![1]).await.unwrap();
    replica.shutdown().await;
    assert!(!directory.path().join("raft-log.new").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_is_read_without_a_byte_being_written() {
    let directory = tempfile::tempdir().unwrap();
    let (machine, _) = Journal::new();
    let nothing = reading::read(files(directory.path()), machine).await;
    assert!(
        matches!(nothing, Err(replica::Error::Missing { .. })),
        "{nothing:?}"
    );
    let files_in = || {
        let mut found: Vec<_> = std::fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.clone(), std::fs::read(path).unwrap()))
            .collect();
        found.sort();
        found
    };
    assert!(files_in().is_empty());

    let (replica, _) = open(files(directory.path())).await;
    let mut acknowledged = Vec::new();
    for number in 0..20u8 {
        acknowledged.push(vec![number]);
        replica.propose(vec![number]).await.unwrap();
    }
    // As a crash leaves them: rows are not written, and the databases were not closed.
    let crashed = files_in();
    replica.shutdown().await;
    let in_order = files_in();
    for left in [crashed, in_order] {
        for (path, bytes) in &left {
            std::fs::write(path, bytes).unwrap();
        }
        let (machine, published) = Journal::new();
        let read = reading::read(files(directory.path()), machine).await.unwrap();
        assert_eq!(published.lock().unwrap().applied, acknowledged);
        assert_eq!(read.members.voters.into_keys().collect::<Vec<_>>(), [1]);
        assert_eq!(read.term, 1);
        assert_eq!(files_in(), left);
    }
    let (replica, published) = open(files(directory.path())).await;
    replica.linearizable().await.unwrap();
    assert_eq!(published.lock().unwrap().applied, acknowledged);
    replica.shutdown().await;
}

/// Rows are forced to the disk seldom: a crash may take all of them, and the log is longer than its part in memory.
#[tokio::test(start_paused = true)]
async fn the_members_are_known_from_the_whole_log() {
    let mut cluster = Cluster::new(60);
    cluster.configure = |config| config.log_tail_bytes_max = 1_000;
    cluster.found(3).await;
    for number in 0..20u8 {
        propose_surely(&cluster.up[&1], &[number; 200]).await;
    }
    cluster.up[&2].linearizable().await.unwrap();
    cluster.kill(2);
    let condition = recovery::inspect(cluster.config(2, Start::Join)).await.unwrap();
    assert!(condition.voters.into_iter().eq(1..=3));
    let (machine, _) = Journal::new();
    let read = reading::read(cluster.config(2, Start::Join), machine)
        .await
        .unwrap();
    assert!(read.members.voters.into_keys().eq(1..=3));
}

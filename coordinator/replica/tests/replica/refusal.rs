//! Stores that must not be used: the message names the file, and the way back where the data is in doubt.

use replica::{Config, Storage};
use std::path::Path;

use crate::store::{files, open, refusal};

async fn written(directory: &Path) {
    let (replica, _) = open(files(directory)).await;
    for number in 0..50u8 {
        replica
            .propose(vec![number; 200])
            .await
            .expect("the command is taken");
    }
    replica.snapshot().await.expect("the snapshot is written");
    replica.shutdown().await;
}

fn check(message: &str, file: &str) {
    assert!(message.contains(file), "{file} is not named: {message}");
    assert!(
        message.contains("The way back: stop the agent and run `chutes-agent rejoin`"),
        "no way back: {message}"
    );
}

#[tokio::test]
async fn truncated_and_missing_files_are_refused() {
    for file in ["raft-log.redb", "state.redb", "state.snapshot", "member"] {
        let directory = tempfile::tempdir().unwrap();
        written(directory.path()).await;
        let path = directory.path().join(file);
        let whole = std::fs::read(&path).unwrap();
        for length in [
            whole.len() * 3 / 4,
            whole.len() / 2,
            100.min(whole.len() - 1),
            10,
            0,
        ] {
            std::fs::write(&path, &whole[..length]).unwrap();
            check(&refusal(files(directory.path())).await, file);
        }
        if file.ends_with("redb") {
            std::fs::remove_file(&path).unwrap();
            check(&refusal(files(directory.path())).await, file);
        }
        std::fs::write(&path, &whole).unwrap();
        let (replica, published) = open(files(directory.path())).await;
        replica.linearizable().await.unwrap();
        assert_eq!(published.lock().unwrap().applied.len(), 50, "{file} restored");
        replica.shutdown().await;
    }
}

#[tokio::test]
async fn altered_files_are_refused() {
    for (file, needle) in [
        ("raft-log.redb", [7u8; 200]),
        ("state.redb", [9; 200]),
        ("state.snapshot", [9; 200]),
    ] {
        let directory = tempfile::tempdir().unwrap();
        written(directory.path()).await;
        let path = directory.path().join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        let found: Vec<_> = (0..bytes.len() - needle.len())
            .filter(|at| bytes[*at..*at + needle.len()] == needle)
            .collect();
        assert!(!found.is_empty(), "{file} holds the command");
        for at in found {
            bytes[at + 50] ^= 1;
        }
        std::fs::write(&path, &bytes).unwrap();
        check(&refusal(files(directory.path())).await, file);
    }
}

#[tokio::test]
async fn a_newer_format_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    written(directory.path()).await;
    for file in ["member", "state.snapshot"] {
        let path = directory.path().join(file);
        let whole = std::fs::read(&path).unwrap();
        let mut newer = whole.clone();
        // The version leads its envelope; that of a snapshot follows its magic and a length.
        newer[if file == "member" { 0 } else { 12 }] = 2;
        std::fs::write(&path, &newer).unwrap();
        let message = refusal(files(directory.path())).await;
        check(&message, file);
        assert!(message.contains("format 2"), "{message}");
        std::fs::write(&path, &whole).unwrap();
    }
    for file in ["raft-log.redb", "state.redb"] {
        let path = directory.path().join(file);
        let whole = std::fs::read(&path).unwrap();
        let database = redb::Database::open(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        let meta = redb::TableDefinition::<&str, &[u8]>::new("meta");
        transaction
            .open_table(meta)
            .unwrap()
            .insert("format", [2u8].as_slice())
            .unwrap();
        transaction.commit().unwrap();
        drop(database);
        let message = refusal(files(directory.path())).await;
        check(&message, file);
        assert!(message.contains("format 2"), "{message}");
        std::fs::write(&path, &whole).unwrap();
    }
}

#[tokio::test]
async fn a_store_of_another_member_or_cluster_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    written(directory.path()).await;
    let storage = || Storage::Files {
        directory: directory.path().to_owned(),
    };
    for config in [
        Config::new("test", 2, storage()),
        Config::new("other", 1, storage()),
    ] {
        check(&refusal(config).await, "member");
    }
    std::fs::remove_file(directory.path().join("member")).unwrap();
    for config in [
        Config::new("test", 2, storage()),
        Config::new("other", 1, storage()),
    ] {
        check(&refusal(config).await, "raft-log.redb");
    }
}

#[tokio::test]
async fn a_directory_in_use_is_refused_and_free_after_shutdown() {
    let directory = tempfile::tempdir().unwrap();
    let (replica, _) = open(files(directory.path())).await;
    let message = refusal(files(directory.path())).await;
    assert!(
        message.contains("raft-log.redb") && message.contains("in use by another process"),
        "{message}"
    );
    replica.propose(b"still works".to_vec()).await.unwrap();
    replica.shutdown().await;
    let (replica, _) = open(files(directory.path())).await;
    replica.shutdown().await;
}

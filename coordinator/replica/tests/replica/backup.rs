//! A snapshot file, and a cluster that begins again with one.

use replica::{Config, Error, Replica, Start, backup};
use std::path::Path;

use crate::cluster::{Cluster, propose_surely};
use crate::store::{files, open};

#[tokio::test(start_paused = true)]
async fn a_lost_cluster_begins_again_with_a_snapshot_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("saved");
    let lost = Cluster::of(700, 3).await;
    for number in 0..50u8 {
        lost.up[&2].propose(vec![number]).await.unwrap();
    }
    lost.up[&3].linearizable().await.unwrap();
    let saved = save(&lost.up[&3], &file).await;
    assert_eq!((saved.rows(), saved.members.len()), (51, 3));
    assert_eq!(saved.last_index, lost.up[&3].metrics().applied_index);
    assert_eq!(backup::Rows::open(&file).unwrap().count(), 51);
    assert_eq!(backup::Rows::open(&file).unwrap().finish().unwrap(), saved);
    lost.up[&1].propose(b"later".to_vec()).await.unwrap();
    let commands = lost.commands(3);

    let mut anew = Cluster::new(701);
    let restored = backup::restore(anew.config(1, Start::Found), file.clone(), Vec::new()).await;
    assert_eq!(restored.unwrap(), saved);
    let again = backup::restore(anew.config(1, Start::Found), file.clone(), Vec::new()).await;
    assert!(matches!(again, Err(Error::Membership(_))), "{again:?}");
    let first = anew.start(1, Start::Found).await;
    first.linearizable().await.unwrap();
    assert_eq!(anew.commands(1), commands[..50]);
    assert_eq!(first.membership().voters.into_keys().collect::<Vec<_>>(), [1]);
    propose_surely(&anew.up[&1], b"on").await;
    // OtherMembers join it by the same snapshot.
    anew.start(2, Start::Join).await;
    let first = anew.up[&1].clone();
    first.add_learner(2, "memory:2".to_owned()).await.unwrap();
    anew.caught_up(&first, 2).await;
    anew.up[&2].linearizable().await.unwrap();
    assert_eq!(anew.commands(2), anew.commands(1));
    assert_eq!(anew.commands(2).len(), 51);
}

/// Writes a snapshot of a running member into a file.
async fn save(replica: &Replica, file: &Path) -> backup::Contents {
    let saved = replica.save().await.expect("it runs");
    let mut bytes = Vec::new();
    loop {
        let offset = bytes.len() as u64;
        let piece = saved.read_at(offset).await.expect("it is on the disk");
        if piece.is_empty() {
            break;
        }
        bytes.extend(piece);
    }
    std::fs::write(file, bytes).expect("it can be written");
    saved.contents().clone()
}

/// A snapshot file of a small store.
async fn saved(folder: &Path) -> std::path::PathBuf {
    let (replica, _) = open(files(&folder.join("store"))).await;
    replica.propose(b"x".to_vec()).await.expect("it leads");
    let file = folder.join("saved");
    save(&replica, &file).await;
    replica.shutdown().await;
    file
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_does_not_fit_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = saved(folder.path()).await;
    let store = folder.path().join("anew");
    let mut other: Config = files(&store);
    other.cluster = "other".to_owned();
    let foreign = backup::restore(other, file.clone(), Vec::new()).await;
    assert!(matches!(foreign, Err(Error::Foreign { .. })), "{foreign:?}");

    let whole = std::fs::read(&file).unwrap();
    let damaged = folder.path().join("damaged");
    for position in [3, 20, whole.len() / 2, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[position] ^= 1;
        std::fs::write(&damaged, bytes).unwrap();
        let refused = backup::restore(files(&store), damaged.clone(), Vec::new()).await;
        let named = matches!(&refused, Err(Error::Damaged { file, .. } | Error::Newer { file, .. }) if *file == damaged);
        assert!(named, "byte {position}: {refused:?}");
    }
    let missing = backup::Rows::open(&folder.path().join("missing"));
    assert!(matches!(missing, Err(Error::Io { .. })), "{missing:?}");
    assert!(!store.exists(), "the store was not begun");

    backup::restore(files(&store), file, Vec::new()).await.unwrap();
    let (replica, published) = open(files(&store)).await;
    replica.linearizable().await.unwrap();
    assert_eq!(published.lock().unwrap().applied, [b"x".to_vec()]);
    replica.shutdown().await;
}

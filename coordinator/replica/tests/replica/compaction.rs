//! The log stays short, by bytes as well as by entries.

use replica::Start;
use std::time::Duration;

use crate::cluster::{Cluster, eventually};

#[tokio::test(start_paused = true)]
async fn many_bytes_cause_a_snapshot_and_a_purge_although_they_are_few_entries() {
    let mut cluster = Cluster::new(1);
    cluster.configure = |config| {
        config.snapshots.every_bytes = Some(1_000_000);
        config.log_tail_bytes_max = 200_000;
    };
    let replica = cluster.start(1, Start::Found).await;
    replica.linearizable().await.unwrap();
    // The snapshot grows with the log here, so each one comes after twice as much as the one before.
    for round in 1..=3u64 {
        for _ in 0..100 * round {
            replica.propose(vec![round as u8; 20_000]).await.unwrap();
        }
        // What is in memory is still in the log, and hardly more.
        eventually("the log is short", Duration::from_secs(10), || {
            let metrics = replica.metrics();
            metrics
                .purged_index
                .is_some_and(|purged| metrics.last_index < Some(purged + 20))
        })
        .await;
    }
    let metrics = replica.metrics();
    assert_eq!(metrics.snapshots_built, 3, "{metrics:?}");
    cluster.kill(1);
    let replica = cluster.restart(1).await;
    replica.linearizable().await.unwrap();
    assert_eq!(cluster.commands(1).len(), 600);
}

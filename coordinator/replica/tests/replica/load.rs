//! Many proposers at once: each command once, in one order, with few fsyncs; limits answer rather than wait.

use replica::ProposeError;
use std::collections::BTreeSet;

use crate::store::{files, open, position};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_proposers_get_each_command_once_in_one_order_with_few_fsyncs() {
    const PROPOSERS: u64 = 64;
    const COMMANDS_EACH: u64 = 32;
    let directory = tempfile::tempdir().unwrap();
    let (replica, published) = open(files(directory.path())).await;
    replica.linearizable().await.unwrap();
    let before = replica.metrics();
    let mut tasks = Vec::new();
    for proposer in 0..PROPOSERS {
        let replica = replica.clone();
        tasks.push(tokio::spawn(async move {
            let mut placed = Vec::new();
            for number in 0..COMMANDS_EACH {
                let command = [proposer.to_be_bytes(), number.to_be_bytes()].concat();
                let reply = replica.propose(command.clone()).await.unwrap();
                placed.push((position(&reply), command));
            }
            placed
        }));
    }
    let mut all = Vec::new();
    for task in tasks {
        let placed = task.await.unwrap();
        assert!(placed.is_sorted(), "a proposer's commands are in its own order");
        all.extend(placed);
    }
    let total = PROPOSERS * COMMANDS_EACH;
    let positions: BTreeSet<u64> = all.iter().map(|(position, _)| *position).collect();
    assert_eq!(positions, (0..total).collect(), "each position was given once");
    {
        let published = published.lock().unwrap();
        assert_eq!(published.applied.len() as u64, total);
        for (position, command) in &all {
            assert_eq!(&published.applied[usize::try_from(*position).unwrap()], command);
        }
    }
    let after = replica.metrics();
    let fsyncs = (after.log_fsyncs - before.log_fsyncs) + (after.state_fsyncs - before.state_fsyncs);
    let per_thousand = fsyncs * 1000 / total;
    println!(
        "{per_thousand} fsyncs per 1000 commands, {} entries",
        after.entries_proposed
    );
    assert!(per_thousand <= 200, "{fsyncs} fsyncs for {total} commands");
    assert_eq!(after.commands_acknowledged, total);
    replica.shutdown().await;
}

/// Those who came while an entry was on its way once took turns with those who were in it: twice as many entries.
#[tokio::test]
async fn two_groups_of_proposers_become_one() {
    const PROPOSERS: u64 = 16;
    const COMMANDS_EACH: u64 = 50;
    let directory = tempfile::tempdir().unwrap();
    let (replica, _) = open(files(directory.path())).await;
    replica.linearizable().await.unwrap();
    let before = replica.metrics().entries_proposed;
    let mut tasks = Vec::new();
    for proposer in 0..2 * PROPOSERS {
        let replica = replica.clone();
        tasks.push(tokio::spawn(async move {
            // The second half comes when the first has an entry on its way.
            while proposer >= PROPOSERS && replica.metrics().entries_proposed == before {
                tokio::task::yield_now().await;
            }
            for number in 0..COMMANDS_EACH {
                let command = [proposer.to_be_bytes(), number.to_be_bytes()].concat();
                replica.propose(command).await.unwrap();
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let entries = replica.metrics().entries_proposed - before;
    assert!(entries < COMMANDS_EACH * 3 / 2, "{entries} entries");
    replica.shutdown().await;
}

#[tokio::test]
async fn a_full_queue_and_a_large_command_are_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = files(directory.path());
    config.proposals.waiting_max = 4;
    config.proposals.entry_bytes_max = 1000;
    let (replica, published) = open(config).await;
    let large = replica.propose(vec![0; 1001]).await;
    assert_eq!(
        large,
        Err(ProposeError::TooLarge {
            size_bytes: 1001,
            size_bytes_max: 1000
        })
    );
    // On one thread nobody takes commands from the queue while these are put into it.
    let proposals = (0..50u8).map(|number| replica.propose(vec![number; 600]));
    let results = futures_util::future::join_all(proposals).await;
    let busy = results
        .iter()
        .filter(|result| **result == Err(ProposeError::Busy))
        .count();
    let acknowledged = results.iter().filter(|result| result.is_ok()).count();
    assert_eq!((acknowledged, busy), (4, 46));
    assert_eq!(published.lock().unwrap().applied.len(), 4);
    replica.shutdown().await;
}

#[tokio::test]
async fn leadership_tells_who_leads_and_how_far_the_state_is() {
    let directory = tempfile::tempdir().unwrap();
    let (replica, _) = open(files(directory.path())).await;
    let mut leadership = replica.leadership();
    let led = leadership.wait_for(|now| now.leads).await.unwrap().clone();
    assert_eq!(led.leader, Some(1));
    replica.propose(b"a".to_vec()).await.unwrap();
    let later = leadership
        .wait_for(|now| now.applied_index > led.applied_index)
        .await
        .unwrap()
        .clone();
    assert_eq!(
        (later.leads, later.since, later.term),
        (true, led.since, led.term)
    );
    replica.shutdown().await;
    leadership.wait_for(|now| !now.leads).await.unwrap();
}

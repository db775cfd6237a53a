//! Members come, move, are replaced and go: learners and snapshots, changes of voters, recovery of the last one.

use replica::{Error, ProposeError, Start, reading, recovery};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::sleep;

use crate::cluster::{Cluster, eventually, is_membership_error, propose_surely};
use crate::store::Journal;

#[tokio::test(start_paused = true)]
async fn a_learner_gets_a_snapshot_in_pieces_of_which_one_is_lost() {
    let mut cluster = Cluster::new(30);
    cluster.configure = |config| {
        config.snapshots.every_entries = None;
        config.snapshots.keep_entries = 0;
    };
    let first = cluster.start(1, Start::Found).await;
    first.linearizable().await.unwrap();
    for number in 0..40u8 {
        first.propose(vec![number; 100_000]).await.unwrap();
    }
    first.snapshot().await.unwrap();
    eventually("the log is purged", Duration::from_secs(10), || {
        first.metrics().purged_index >= Some(40)
    })
    .await;
    cluster.links.lose_large(2);
    let learner = cluster.start(2, Start::Join).await;
    first.add_learner(2, "memory:2".to_owned()).await.unwrap();
    cluster.caught_up(&first, 2).await;
    learner.linearizable().await.unwrap();
    assert_eq!(cluster.commands(2), cluster.commands(1));
    assert_eq!(learner.metrics().snapshots_installed, 1);
    let sizes: Vec<usize> = cluster.links.large().iter().map(|(_, size)| *size).collect();
    // 4 MB are four pieces; the one that was lost went twice, and no other.
    assert_eq!(sizes.len(), 5, "{sizes:?}");
    // It starts again from what it installed.
    cluster.kill(2);
    let learner = cluster.restart(2).await;
    learner.linearizable().await.unwrap();
    assert_eq!(cluster.commands(2), cluster.commands(1));
}

#[tokio::test(start_paused = true)]
async fn members_are_added_replaced_and_removed() {
    let mut cluster = Cluster::of(40, 3).await;
    let leader = cluster.leader().await;
    let first = cluster.up[&leader].clone();
    first.propose(b"before".to_vec()).await.unwrap();
    // One that is no member yet cannot vote.
    assert!(is_membership_error(
        first.set_voters(BTreeSet::from([1, 2, 9])).await
    ));
    assert!(is_membership_error(first.set_voters(BTreeSet::new()).await));
    cluster.kill(3);
    cluster.start(4, Start::Join).await;
    first.add_learner(4, "memory:4".to_owned()).await.unwrap();
    first.add_learner(4, "memory:4".to_owned()).await.unwrap();
    assert_eq!(
        first.membership().learners.keys().copied().collect::<Vec<_>>(),
        [4]
    );
    cluster.caught_up(&first, 4).await;
    first.set_voters(BTreeSet::from([1, 2, 4])).await.unwrap();
    let known = first.membership();
    assert_eq!(known.voters.keys().copied().collect::<Vec<_>>(), [1, 2, 4]);
    assert_eq!(
        known.learners.keys().copied().collect::<Vec<_>>(),
        [3],
        "it stays a learner"
    );
    first.remove_member(3).await.unwrap();
    first.remove_member(3).await.unwrap();
    assert!(first.membership().address(3).is_none());
    // The new one counts: without it there is no majority.
    cluster.kill(2);
    cluster.up[&4].propose(b"after".to_vec()).await.unwrap();
    assert_eq!(cluster.up[&4].membership(), first.membership());
    assert!(matches!(
        cluster.up[&4].set_voters(BTreeSet::from([4])).await,
        Err(Error::NotLeader { leader: Some(1) })
    ));
    assert!(cluster.up[&4].progress().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_only_voter_is_not_removed() {
    let cluster = Cluster::of(46, 1).await;
    let only = &cluster.up[&1];
    let refused = only.remove_member(1).await.unwrap_err();
    assert!(
        refused.to_string().contains("member 1 is the only voter"),
        "{refused}"
    );
    only.propose(b"after".to_vec()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_joiner_on_an_empty_store_waits_and_founds_nothing() {
    let mut cluster = Cluster::new(60);
    let joiner = cluster.start(2, Start::Join).await;
    sleep(Duration::from_secs(30)).await;
    let leadership = joiner.leadership().borrow().clone();
    assert!(!leadership.leads && leadership.leader.is_none());
    assert_eq!(joiner.metrics().term, 0);
    assert!(joiner.membership().voters.is_empty());
    let refused = joiner.propose(b"x".to_vec()).await.unwrap_err();
    assert_eq!(refused, ProposeError::Timeout);
    let first = cluster.start(1, Start::Found).await;
    first.linearizable().await.unwrap();
    first.add_learner(2, "memory:2".to_owned()).await.unwrap();
    cluster.caught_up(&first, 2).await;
    joiner.propose(b"x".to_vec()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_change_of_voters_ends_although_its_leader_dies() {
    let mut half_done = 0;
    for seed in 0..12 {
        let mut cluster = Cluster::of(100 + seed, 3).await;
        cluster.start(4, Start::Join).await;
        let first = cluster.up[&1].clone();
        first.add_learner(4, "memory:4".to_owned()).await.unwrap();
        cluster.caught_up(&first, 4).await;
        cluster.links.slow(Duration::from_millis(5));
        let change = tokio::spawn(async move { first.set_voters(BTreeSet::from([1, 2, 4])).await });
        sleep(Duration::from_millis(4 * seed)).await;
        cluster.kill(1);
        let leader = cluster.leader().await;
        let leader = cluster.up[&leader].clone();
        half_done += u32::from(leader.membership().changing);
        eventually("the change ends", Duration::from_secs(20), || {
            !leader.membership().changing
        })
        .await;
        propose_surely(&leader, b"after").await;
        let voters: Vec<u64> = leader.membership().voters.into_keys().collect();
        assert!(voters == [1, 2, 3] || voters == [1, 2, 4], "{voters:?}");
        change.abort();
    }
    assert!(half_done > 0, "no leader died between the two steps");
}

#[tokio::test(start_paused = true)]
async fn the_last_one_left_goes_on_alone_when_it_is_told_to() {
    let mut cluster = Cluster::of(500, 3).await;
    for number in 0..20u8 {
        cluster.up[&1].propose(vec![number]).await.unwrap();
    }
    // What is under way to a member that no write waited for is lost with the others.
    cluster.caught_up(&cluster.up[&1], 3).await;
    cluster.kill(1);
    cluster.kill(2);
    let written = cluster.up[&3].propose(b"nobody".to_vec()).await;
    assert!(written.is_err());
    cluster.stop(3).await;

    let inspected = recovery::inspect(cluster.config(3, Start::Join)).await.unwrap();
    assert_eq!(inspected.voters, BTreeSet::from([1, 2, 3]));
    assert_eq!(inspected.addresses[&2], "memory:2");
    let recovered = recovery::recover(cluster.config(3, Start::Join), vec![b"first".to_vec()])
        .await
        .unwrap();
    assert_eq!(recovered, inspected);
    let last = cluster.start(3, Start::Join).await;
    last.linearizable().await.unwrap();
    assert_eq!(cluster.commands(3).last(), Some(&b"first".to_vec()));
    let voters: Vec<u64> = last.membership().voters.into_keys().collect();
    assert_eq!(voters, [3]);
    assert!(last.membership().learners.is_empty());
    for number in 0..20u8 {
        assert!(cluster.commands(3).contains(&vec![number]));
    }
    propose_surely(&last, b"alone").await;
    cluster.start(4, Start::Join).await;
    last.add_learner(4, "memory:4".to_owned()).await.unwrap();
    cluster.caught_up(&last, 4).await;
    last.set_voters(BTreeSet::from([3, 4])).await.unwrap();
    propose_surely(&cluster.up[&4], b"together").await;
    // One of those that were given up comes back: it disturbs nobody and nobody hears it.
    let returned = cluster.restart(1).await;
    sleep(Duration::from_secs(5)).await;
    assert!(!returned.leadership().borrow().leads);
    assert!(returned.propose(b"stray".to_vec()).await.is_err());
    propose_surely(&last, b"still").await;
    assert!(!cluster.commands(3).contains(&b"stray".to_vec()));

    let mut empty = Cluster::new(501);
    let nothing = recovery::recover(empty.config(1, Start::Join), Vec::new()).await;
    assert!(matches!(nothing, Err(Error::Membership(_))), "{nothing:?}");
}

#[tokio::test(start_paused = true)]
async fn who_reads_the_store_of_a_member_sees_what_was_acknowledged_and_nothing_else() {
    let mut cluster = Cluster::of(510, 3).await;
    let mut acknowledged = Vec::new();
    let leader = cluster.leader().await;
    for number in 0..20u8 {
        acknowledged.push(vec![number]);
        cluster.up[&leader].propose(vec![number]).await.unwrap();
    }
    let others = cluster.others(leader);
    cluster.links.cut(leader, others, true);
    let cut_off = cluster.up[&leader].propose(b"nobody".to_vec()).await;
    assert!(cut_off.is_err());
    let last_index = cluster.up[&leader].metrics().last_index;
    cluster.stop(leader).await;
    let inspected = recovery::inspect(cluster.config(leader, Start::Join))
        .await
        .unwrap();
    assert_eq!(inspected.last_index, last_index, "its log has more than that");
    let (machine, published) = Journal::new();
    let read = reading::read(cluster.config(leader, Start::Join), machine)
        .await
        .unwrap();
    assert_eq!(published.lock().unwrap().applied, acknowledged);
    assert_eq!(read.members.voters.into_keys().collect::<Vec<_>>(), [1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_member_that_moves_is_found_at_its_new_address() {
    let cluster = Cluster::of(600, 3).await;
    let leader = cluster.leader().await;
    let first = cluster.up[&leader].clone();
    cluster.links.move_away(3);
    first.propose(b"unseen".to_vec()).await.unwrap();
    sleep(Duration::from_secs(3)).await;
    assert!(!cluster.commands(3).contains(&b"unseen".to_vec()));
    first.add_learner(3, "moved:3".to_owned()).await.unwrap();
    cluster.caught_up(&first, 3).await;
    cluster.up[&3].linearizable().await.unwrap();
    assert_eq!(cluster.commands(3), [b"unseen".to_vec()]);
    let known = cluster.up[&3].membership();
    assert_eq!(known.voters.get(&3).map(String::as_str), Some("moved:3"));
    assert_eq!(cluster.leader().await, leader);
}

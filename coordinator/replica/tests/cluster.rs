//! Three members over links in memory, on simulated time: election, forwarding, failover, check-quorum,
//! snapshots to learners, change of members, transfer, restart.

use replica::{Error, ProposeError, Start, Timing, recovery};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::{Instant, sleep};

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/store.rs"]
mod store;
use cluster::{Cluster, PACE, eventually, is_membership_error, propose_surely};
use store::position;

const LEASE: Duration = Duration::from_millis(PACE.election_max_ms);

#[tokio::test(start_paused = true)]
async fn three_members_elect_one_leader_and_all_apply_the_same() {
    let cluster = Cluster::of(1, 3).await;
    let leader = cluster.leader().await;
    assert_eq!(leader, 1, "nobody unseats the founder without need");
    for number in 0..20u8 {
        let reply = cluster.up[&leader].propose(vec![number]).await.unwrap();
        assert_eq!(position(&reply), u64::from(number));
    }
    let expected: Vec<_> = (0..20u8).map(|number| vec![number]).collect();
    for member in 1..=3 {
        cluster.up[&member].linearizable().await.unwrap();
        assert_eq!(cluster.commands(member), expected, "member {member}");
        let known = cluster.up[&member].membership();
        assert_eq!(known.voters.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(known.address(2), Some("memory:2"));
        assert!(!known.changing && known.learners.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_on_a_follower_is_forwarded_and_its_reply_comes_back() {
    let cluster = Cluster::of(2, 3).await;
    assert_eq!(cluster.leader().await, 1);
    let proposals = (0..50u8).map(|number| cluster.up[&(2 + u64::from(number % 2))].propose(vec![number]));
    let replies = futures_util::future::join_all(proposals).await;
    let positions: BTreeSet<u64> = replies
        .into_iter()
        .map(|reply| position(&reply.unwrap()))
        .collect();
    assert_eq!(positions, (0..50).collect(), "each position was given once");
    cluster.up[&3].linearizable().await.unwrap();
    assert_eq!(cluster.commands(3).len(), 50);
}

#[tokio::test(start_paused = true)]
async fn a_killed_leader_loses_nothing_acknowledged_and_writes_go_on() {
    for seed in 10..14 {
        let mut cluster = Cluster::of(seed, 3).await;
        let mut acknowledged = Vec::new();
        for round in 0..3u8 {
            let leader = cluster.leader().await;
            for number in 0..10u8 {
                let through = &cluster.up[&(1 + u64::from(number) % 3)];
                propose_surely(through, &[round, number]).await;
                acknowledged.push(vec![round, number]);
            }
            let started = Instant::now();
            cluster.kill(leader);
            let survivor = *cluster.up.keys().next().unwrap();
            propose_surely(&cluster.up[&survivor], &[round, 100]).await;
            acknowledged.push(vec![round, 100]);
            assert!(
                started.elapsed() < Duration::from_secs(3),
                "the next write took {:?}",
                started.elapsed()
            );
            cluster.restart(leader).await;
            for member in 1..=3 {
                cluster.up[&member].linearizable().await.unwrap();
                let applied = cluster.commands(member);
                for command in &acknowledged {
                    assert!(
                        applied.contains(command),
                        "seed {seed}, member {member}: {command:?}"
                    );
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_cut_off_stops_leading_before_another_leads() {
    let cluster = Cluster::of(20, 3).await;
    let old = cluster.leader().await;
    let mut leadership = cluster.up[&old].leadership();
    let started = Instant::now();
    cluster.links.cut(old, cluster.others(old), true);
    leadership.wait_for(|now| !now.leads).await.unwrap();
    let stopped = started.elapsed();
    assert!(stopped <= LEASE + Duration::from_millis(50), "after {stopped:?}");
    assert!(!cluster.up[&old].leads_now());
    for other in cluster.others(old) {
        assert!(!cluster.up[&other].leadership().borrow().leads, "too early");
    }
    let new = cluster.leader_of(&cluster.others(old)).await;
    cluster.up[&new].propose(b"new".to_vec()).await.unwrap();
    // What the old one says now could be stale: it says nothing.
    let read = cluster.up[&old].linearizable().await;
    assert!(
        matches!(read, Err(Error::NotLeader { .. } | Error::Timeout)),
        "{read:?}"
    );
    let written = cluster.up[&old].propose(b"old".to_vec()).await;
    assert!(written.is_err(), "{written:?}");
    assert_eq!(cluster.commands(old), Vec::<Vec<u8>>::new());
    // It comes back as a follower, and nobody's term grows by that.
    let term = cluster.up[&new].metrics().term;
    cluster.links.cut(old, cluster.others(old), false);
    cluster.up[&old].linearizable().await.unwrap();
    assert_eq!(cluster.commands(old)[0], b"new");
    assert_eq!(cluster.leader().await, new);
    assert_eq!(cluster.up[&new].metrics().term, term);
}

#[tokio::test(start_paused = true)]
async fn a_follower_that_was_cut_off_unseats_nobody() {
    let cluster = Cluster::of(21, 3).await;
    let leader = cluster.leader().await;
    let term = cluster.up[&leader].metrics().term;
    cluster.links.cut(3, [1, 2], true);
    for number in 0..100u8 {
        cluster.up[&leader].propose(vec![number]).await.unwrap();
        sleep(Duration::from_millis(100)).await;
    }
    cluster.links.cut(3, [1, 2], false);
    cluster.up[&3].linearizable().await.unwrap();
    assert_eq!(cluster.commands(3).len(), 100);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(cluster.leader().await, leader);
    assert_eq!(
        cluster.up[&leader].metrics().term,
        term,
        "pre-vote keeps the term"
    );
}

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
async fn the_lead_is_handed_over() {
    let mut cluster = Cluster::of(50, 3).await;
    assert_eq!(cluster.leader().await, 1);
    let started = Instant::now();
    cluster.up[&1].transfer(Some(3)).await.unwrap();
    assert_eq!(cluster.leader().await, 3);
    assert!(started.elapsed() < LEASE, "{:?}", started.elapsed());
    cluster.up[&1].propose(b"one".to_vec()).await.unwrap();
    assert!(matches!(
        cluster.up[&1].transfer(None).await,
        Err(Error::NotLeader { leader: Some(3) })
    ));
    assert!(is_membership_error(cluster.up[&3].transfer(Some(9)).await));
    cluster.kill(1);
    sleep(LEASE).await;
    assert!(is_membership_error(cluster.up[&3].transfer(Some(1)).await));
    cluster.restart(1).await;
    cluster.up[&1].linearizable().await.unwrap();
    // An orderly stop hands over as well: no election has to time out.
    let started = Instant::now();
    cluster.stop(3).await;
    let new = cluster.leader().await;
    assert!(new != 3 && started.elapsed() < LEASE, "{:?}", started.elapsed());
    cluster.up[&new].propose(b"two".to_vec()).await.unwrap();
    assert_eq!(cluster.commands(new).last().unwrap(), b"two");
}

#[tokio::test(start_paused = true)]
async fn a_transfer_that_fails_leaves_a_leader_that_works() {
    let cluster = Cluster::of(51, 3).await;
    assert_eq!(cluster.leader().await, 1);
    // The target answers the leader but reaches nobody itself.
    cluster.links.cut_one_way(3, 1, true);
    cluster.links.cut_one_way(3, 2, true);
    let transferred = cluster.up[&1].transfer(Some(3)).await;
    assert!(transferred.is_err(), "{transferred:?}");
    let leader = cluster.leader().await;
    assert_ne!(leader, 3);
    propose_surely(&cluster.up[&leader], b"after").await;
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
async fn all_three_start_again_with_everything() {
    let mut cluster = Cluster::of(70, 3).await;
    for number in 0..30u8 {
        propose_surely(&cluster.up[&(1 + u64::from(number) % 3)], &[number]).await;
    }
    for member in 1..=3 {
        cluster.kill(member);
    }
    for member in 1..=3 {
        cluster.restart(member).await;
    }
    let leader = cluster.leader().await;
    propose_surely(&cluster.up[&leader], b"again").await;
    for member in 1..=3 {
        cluster.up[&member].linearizable().await.unwrap();
        assert_eq!(cluster.commands(member).len(), 31, "member {member}");
    }
}

#[tokio::test(start_paused = true)]
async fn requests_that_make_no_sense_are_errors() {
    let cluster = Cluster::of(80, 3).await;
    let replica = &cluster.up[&2];
    let mut random = fastrand::Rng::with_seed(80);
    for _ in 0..2000 {
        let mut bytes: Vec<u8> = (0..random.usize(0..200)).map(|_| random.u8(..)).collect();
        if random.bool()
            && let Some(first) = bytes.first_mut()
        {
            *first = 1;
        }
        let answered = replica.answer(1, &bytes).await;
        assert!(
            matches!(answered, Err(Error::Refused { from: 1, .. })),
            "{bytes:?}"
        );
    }
    cluster.up[&1].propose(b"well".to_vec()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_idle_cluster_writes_nothing() {
    let cluster = Cluster::of(90, 3).await;
    cluster.up[&1].propose(b"last".to_vec()).await.unwrap();
    sleep(Duration::from_secs(5)).await;
    let fsyncs = |member: u64| {
        let metrics = cluster.up[&member].metrics();
        metrics.log_fsyncs + metrics.state_fsyncs
    };
    let before: Vec<u64> = (1..=3).map(fsyncs).collect();
    sleep(Duration::from_secs(120)).await;
    let after: Vec<u64> = (1..=3).map(fsyncs).collect();
    assert_eq!(before, after);
    assert_eq!(cluster.leader().await, 1);
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

/// Random cuts, kills and transfers: never two that lead at the same moment, nothing acknowledged is lost,
/// every reader after an acknowledgement sees it.
#[tokio::test(start_paused = true)]
async fn whatever_happens_one_leads_and_nothing_is_lost() {
    for seed in 200..203 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut cluster = Cluster::of(seed, 3).await;
        cluster.links.slow(Duration::from_millis(random.u64(0..20)));
        let mut acknowledged: Vec<Vec<u8>> = Vec::new();
        let mut down: Option<u64> = None;
        let (mut leads, mut writes) = (0u32, 0u32);
        for step in 0..40u32 {
            let member = random.u64(1..=3);
            match random.u8(0..8) {
                0 if down.is_none() => {
                    cluster.kill(member);
                    down = Some(member);
                }
                1 => cluster.links.cut(member, 1..=3, true),
                2 => cluster.links.cut_one_way(member, random.u64(1..=3), true),
                3 if cluster.up.contains_key(&member) => {
                    let replica = cluster.up[&member].clone();
                    tokio::spawn(async move { replica.transfer(None).await });
                }
                4 | 5 => (1..=3).for_each(|one| cluster.links.cut(one, 1..=3, down == Some(one))),
                6 if down.is_some() => {
                    cluster.restart(down.take().expect("it is down")).await;
                }
                _ => {}
            }
            for _ in 0..random.u8(1..30) {
                sleep(Duration::from_millis(random.u64(1..60))).await;
                let leaders: Vec<u64> = cluster
                    .up
                    .iter()
                    .filter(|(_, replica)| replica.leads_now())
                    .map(|(member, _)| *member)
                    .collect();
                assert!(leaders.len() <= 1, "seed {seed}: {leaders:?} lead");
                leads += u32::from(!leaders.is_empty());
            }
            let up: Vec<u64> = cluster.up.keys().copied().collect();
            let through = up[random.usize(0..up.len())];
            let command = step.to_be_bytes().to_vec();
            if cluster.up[&through].propose(command.clone()).await.is_ok() {
                acknowledged.push(command);
                writes += 1;
                let reader = up[random.usize(0..up.len())];
                if cluster.up[&reader].linearizable().await.is_ok() {
                    let applied = cluster.commands(reader);
                    let missing: Vec<_> = acknowledged
                        .iter()
                        .filter(|command| !applied.contains(command))
                        .collect();
                    assert!(
                        missing.is_empty(),
                        "seed {seed}, step {step}: {missing:?} unseen on {reader}"
                    );
                }
            }
        }
        (1..=3).for_each(|one| cluster.links.cut(one, 1..=3, false));
        if let Some(member) = down {
            cluster.restart(member).await;
        }
        for member in 1..=3 {
            let began = Instant::now();
            while cluster.up[&member].linearizable().await.is_err() {
                assert!(
                    began.elapsed() < Duration::from_secs(30),
                    "seed {seed}: no recovery"
                );
            }
            let applied = cluster.commands(member);
            assert!(acknowledged.iter().all(|command| applied.contains(command)));
        }
        println!("seed {seed}: {writes} of 40 writes, {leads} looks found a leader");
        assert!(
            writes > 10 && leads > 50,
            "seed {seed}: {writes} writes, {leads} leads"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_hands_over_stops_before_the_other_begins() {
    for seed in 300..310 {
        let cluster = Cluster::of(seed, 3).await;
        // The old leader hears late of the election: two of three win without it.
        cluster.links.slow(Duration::from_millis(seed % 20));
        let from = cluster.leader().await;
        let replica = cluster.up[&from].clone();
        let handed_over = tokio::spawn(async move { replica.transfer(None).await });
        cluster.links.cut_one_way(2, from, true);
        cluster.links.cut_one_way(3, from, true);
        let began = Instant::now();
        let mut seen = BTreeSet::new();
        while began.elapsed() < LEASE / 2 {
            let leaders: Vec<u64> = (1..=3).filter(|member| cluster.up[member].leads_now()).collect();
            assert!(leaders.len() <= 1, "seed {seed}: {leaders:?} lead");
            seen.extend(leaders);
            sleep(Duration::from_micros(500)).await;
        }
        assert!(seen.iter().any(|member| *member != from), "seed {seed}: {seen:?}");
        cluster.links.cut(from, cluster.others(from), false);
        handed_over.await.expect("no panic").unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn the_timing_follows_the_way_between_the_members() {
    let mut cluster = Cluster::new(400);
    cluster.configure = |config| config.timing = Timing::Auto;
    cluster.links.slow(Duration::from_millis(100));
    cluster.found(3).await;
    let paces =
        |cluster: &Cluster| -> Vec<u64> { cluster.up.values().map(|it| it.pace().heartbeat_ms).collect() };
    eventually("everybody slows down", Duration::from_secs(60), || {
        paces(&cluster).iter().all(|pace| (600..1000).contains(pace))
    })
    .await;
    let leader = cluster.leader().await;
    let before = cluster.up[&leader].leadership().borrow().since;
    for number in 0..30u8 {
        let through = &cluster.up[&(1 + u64::from(number) % 3)];
        through.propose(vec![number]).await.unwrap();
        sleep(Duration::from_secs(1)).await;
    }
    let now = cluster.up[&leader].leadership().borrow().clone();
    assert!(now.leads && now.since == before, "it led all the time");
    // One that starts again has the pace of the others at once.
    cluster.kill(3);
    let third = cluster.restart(3).await;
    assert_eq!(third.pace(), cluster.up[&1].pace());
    cluster.kill(leader);
    let survivor = *cluster.up.keys().next().unwrap();
    let began = Instant::now();
    propose_surely(&cluster.up[&survivor], b"after").await;
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    cluster.restart(leader).await;
    // The way gets shorter: a long time later so do the heartbeats, and nothing is lost on the way.
    cluster.links.slow(Duration::from_millis(1));
    eventually("everybody speeds up", Duration::from_secs(1000), || {
        paces(&cluster).iter().all(|pace| *pace == 100)
    })
    .await;
    propose_surely(&cluster.up[&survivor], b"last").await;
    for member in 1..=3 {
        cluster.up[&member].linearizable().await.unwrap();
        assert_eq!(cluster.commands(member), cluster.commands(survivor));
        assert!(cluster.commands(member).len() >= 32);
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_counts_on_the_shortest_lease_among_the_voters() {
    let mut cluster = Cluster::new(401);
    cluster.configure = |config| {
        let slow = Timing::Exact(replica::Pace::of_heartbeat(1000));
        config.timing = if config.node_id == 1 { slow } else { Timing::Lan };
    };
    cluster.found(3).await;
    sleep(Duration::from_secs(3)).await;
    let leader = cluster.up[&1].clone();
    let mut leadership = leader.leadership();
    leader.propose(b"x".to_vec()).await.unwrap();
    leadership.wait_for(|now| now.leads).await.unwrap();
    let began = Instant::now();
    cluster.links.cut(1, [2, 3], true);
    leadership.wait_for(|now| !now.leads).await.unwrap();
    assert!(began.elapsed() <= LEASE, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn wide_area_timing_holds_over_a_long_way() {
    let mut cluster = Cluster::new(402);
    cluster.configure = |config| config.timing = Timing::Wan;
    cluster.links.slow(Duration::from_millis(75));
    cluster.found(3).await;
    let leader = cluster.leader().await;
    let since = cluster.up[&leader].leadership().borrow().since;
    for number in 0..20u8 {
        let through = &cluster.up[&(1 + u64::from(number) % 3)];
        through.propose(vec![number]).await.unwrap();
        sleep(Duration::from_secs(1)).await;
    }
    let now = cluster.up[&leader].leadership().borrow().clone();
    assert!(now.leads && now.since == since, "it led all the time");
}

#[tokio::test(start_paused = true)]
async fn the_last_one_left_goes_on_alone_when_it_is_told_to() {
    let mut cluster = Cluster::of(500, 3).await;
    for number in 0..20u8 {
        cluster.up[&1].propose(vec![number]).await.unwrap();
    }
    cluster.kill(1);
    cluster.kill(2);
    let written = cluster.up[&3].propose(b"nobody".to_vec()).await;
    assert!(written.is_err());
    cluster.stop(3).await;

    let inspected = recovery::inspect(cluster.config(3, Start::Join)).await.unwrap();
    assert_eq!(inspected.voters, BTreeSet::from([1, 2, 3]));
    let recovered = recovery::recover(cluster.config(3, Start::Join)).await.unwrap();
    assert_eq!(recovered, inspected);
    let last = cluster.start(3, Start::Join).await;
    last.linearizable().await.unwrap();
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
    let nothing = recovery::recover(empty.config(1, Start::Join)).await;
    assert!(matches!(nothing, Err(Error::Membership(_))), "{nothing:?}");
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

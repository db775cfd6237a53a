//! Three members over links in memory, on simulated time: replication, forwarding, failover, restart.

use replica::Error;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::{Instant, sleep};

use crate::cluster::{Cluster, propose_surely};
use crate::store::position;

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

/// Every write once cost four requests: the entry to each of the others, and to each that it is committed.
#[tokio::test(start_paused = true)]
async fn under_load_a_write_is_one_request_to_a_majority_and_a_part_of_one_to_the_rest() {
    const WRITES: usize = 200;
    let cluster = Cluster::of(3, 3).await;
    assert_eq!(cluster.leader().await, 1);
    cluster.links.take_asked();
    for number in 0..WRITES {
        cluster.up[&1]
            .propose(number.to_be_bytes().to_vec())
            .await
            .unwrap();
    }
    let asked = cluster.links.take_asked();
    let (most, least) = (asked[&2].max(asked[&3]), asked[&2].min(asked[&3]));
    assert!((WRITES..WRITES + 10).contains(&most), "{asked:?}");
    assert!(least < WRITES / 3, "{asked:?}");
    for member in 1..=3 {
        cluster.up[&member].linearizable().await.unwrap();
        assert_eq!(cluster.commands(member).len(), WRITES, "member {member}");
    }
}

#[tokio::test(start_paused = true)]
async fn all_members_apply_the_last_write_within_milliseconds() {
    let cluster = Cluster::of(4, 3).await;
    for number in 0..50u8 {
        cluster.up[&1].propose(vec![number]).await.unwrap();
        if number % 10 == 9 {
            sleep(Duration::from_millis(60)).await;
            for member in 1..=3 {
                let applied = cluster.commands(member).len();
                assert_eq!(applied, usize::from(number) + 1, "member {member}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn whichever_member_is_cut_off_writes_wait_for_it_for_milliseconds_only() {
    for lost in [2, 3] {
        let cluster = Cluster::of(5, 3).await;
        for number in 0..50u8 {
            cluster.up[&1].propose(vec![number]).await.unwrap();
        }
        cluster.links.cut(lost, [1], true);
        for number in 50..100u8 {
            let began = Instant::now();
            cluster.up[&1].propose(vec![number]).await.unwrap();
            assert!(
                began.elapsed() < Duration::from_millis(20),
                "without {lost}: {:?}",
                began.elapsed()
            );
        }
    }
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

/// Reads share their barriers. One that comes while a round is under way must not be content with it: what was
/// acknowledged after the leader answered that round may not have come to this member yet.
#[tokio::test(start_paused = true)]
async fn a_read_that_comes_during_a_round_sees_what_was_acknowledged_before_it() {
    let cluster = Cluster::of(7, 3).await;
    let (leader, reader) = (cluster.up[&1].clone(), cluster.up[&3].clone());
    cluster.links.slow(Duration::from_millis(10));
    let acknowledged = AtomicUsize::new(0);
    let write = async {
        for number in 0..40u8 {
            leader.propose(vec![number]).await.unwrap();
            acknowledged.fetch_add(1, Ordering::SeqCst);
        }
    };
    let reads = (0..500u64).map(|start_ms| {
        let (cluster, reader, acknowledged) = (&cluster, &reader, &acknowledged);
        async move {
            sleep(Duration::from_millis(start_ms)).await;
            let before = acknowledged.load(Ordering::SeqCst);
            reader.linearizable().await.unwrap();
            let seen = cluster.commands(3).len();
            assert!(seen >= before, "begun at {start_ms} ms: {seen} of {before}");
        }
    });
    let ((), _) = tokio::join!(write, futures_util::future::join_all(reads));
    assert_eq!(acknowledged.load(Ordering::SeqCst), 40);
}

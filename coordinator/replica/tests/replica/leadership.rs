//! Who leads, and for how long: check-quorum, pre-vote, transfer, timing.

use replica::{Config, Error, Start, Timing};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use crate::cluster::{Cluster, PACE, eventually, is_membership_error, propose_surely};

const LEASE: Duration = Duration::from_millis(PACE.election_max_ms);

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

/// Looks at every moment of two leases: two leaders at once never, one at the end.
async fn no_two_lead(cluster: &Cluster, lease: Duration, case: &str) {
    let began = Instant::now();
    while began.elapsed() < 2 * lease {
        let up = cluster.up.iter();
        let leaders: Vec<u64> = up
            .filter(|(_, it)| it.leads_now())
            .map(|(member, _)| *member)
            .collect();
        assert!(
            leaders.len() <= 1,
            "{case}: {leaders:?} lead after {:?}",
            began.elapsed()
        );
        sleep(Duration::from_millis(1)).await;
    }
    let new = cluster.leader_of(&[2, 3]).await;
    propose_surely(&cluster.up[&new], b"after").await;
    assert!(
        began.elapsed() <= 4 * lease,
        "{case}: after {:?}",
        began.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_member_that_starts_again_elects_nobody_while_the_leader_counts_on_it() {
    for seed in 410..413 {
        for killed in [false, true] {
            let mut cluster = Cluster::of(seed, 3).await;
            assert_eq!(cluster.leader().await, 1);
            // Member 3 hears the leader no more and asks member 2 again and again.
            cluster.links.cut(1, [3], true);
            sleep(3 * LEASE + Duration::from_millis(90 * (seed - 410))).await;
            assert!(cluster.up[&1].leads_now());
            if killed {
                cluster.kill(2);
                cluster.links.cut(2, [3], false);
                cluster.start(2, Start::Join).await;
            } else {
                cluster.links.cut(1, [2], true);
                cluster.stop(2).await;
                cluster.start(2, Start::Join).await;
            }
            no_two_lead(&cluster, LEASE, &format!("seed {seed}, killed: {killed}")).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_member_that_changes_its_pace_elects_nobody_while_the_leader_counts_on_it() {
    for seed in 420..423 {
        let mut cluster = Cluster::new(seed);
        cluster.configure = |config| {
            if config.node_id == 2 {
                config.timing = Timing::Auto;
            }
        };
        cluster.found(3).await;
        assert_eq!(cluster.leader().await, 1);
        cluster.links.cut(1, [3], true);
        sleep(3 * LEASE).await;
        cluster.links.slow(Duration::from_millis(30));
        let began = Instant::now();
        while cluster.up[&2].pace() == PACE {
            assert!(began.elapsed() < Duration::from_secs(60), "the pace stays");
            sleep(Duration::from_millis(1)).await;
        }
        cluster.links.slow(Duration::ZERO);
        cluster.links.cut(1, [2], true);
        assert!(cluster.up[&1].leads_now());
        no_two_lead(&cluster, LEASE, &format!("seed {seed}")).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_member_that_starts_with_a_shorter_lease_keeps_to_the_longer_one_that_it_granted() {
    let wide = Duration::from_millis(replica::Pace::WAN.election_max_ms);
    let auto: fn(&mut Config) = |config| config.timing = Timing::Auto;
    let fixed: fn(&mut Config) = |config| config.timing = Timing::Exact(PACE);
    for (seed, configure) in [(440, auto), (441, auto), (442, fixed), (443, fixed)] {
        // It may hear of the leader's lease, or know its own only.
        for heard in [true, false] {
            let mut cluster = Cluster::new(seed);
            cluster.configure = |config| config.timing = Timing::Wan;
            cluster.found(3).await;
            assert_eq!(cluster.leader().await, 1);
            sleep(wide).await;
            cluster.links.cut(1, [3], true);
            sleep(3 * wide).await;
            cluster.stop(2).await;
            cluster.links.cut(1, [2], !heard);
            cluster.configure = configure;
            assert_eq!(cluster.start(2, Start::Join).await.pace(), PACE);
            cluster.links.cut(1, [2], true);
            assert!(cluster.up[&1].leads_now());
            no_two_lead(&cluster, wide, &format!("seed {seed}, heard: {heard}")).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn members_that_all_start_again_have_a_leader_as_soon_as_after_the_loss_of_one() {
    for seed in 430..433 {
        let mut cluster = Cluster::of(seed, 3).await;
        cluster.up[&1].propose(b"before".to_vec()).await.unwrap();
        for member in 1..=3 {
            cluster.kill(member);
        }
        for member in 1..=3 {
            cluster.restart(member).await;
        }
        let began = Instant::now();
        cluster.leader().await;
        assert!(began.elapsed() <= 4 * LEASE, "seed {seed}: {:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_heard_but_hears_nobody_is_followed_no_longer_than_an_unheard_one() {
    for heard in [true, false] {
        let cluster = Cluster::of(23, 3).await;
        let old = cluster.leader().await;
        let others = cluster.others(old);
        for other in &others {
            let (from, to) = if heard { (*other, old) } else { (old, *other) };
            cluster.links.cut_one_way(from, to, true);
        }
        // Something that it repeats, beside its heartbeats.
        let deaf = cluster.up[&old].clone();
        let vain = tokio::spawn(async move { deaf.propose(b"vain".to_vec()).await });
        let began = Instant::now();
        let new = cluster.leader_of(&others).await;
        propose_surely(&cluster.up[&new], b"after").await;
        let took = began.elapsed();
        assert!(took <= 4 * LEASE, "heard: {heard}, after {took:?}");
        assert!(vain.await.expect("no panic").is_err(), "nobody confirmed it");
        cluster.links.cut(old, others, false);
        cluster.up[&old].linearizable().await.unwrap();
        assert!(cluster.commands(old).contains(&b"after".to_vec()));
        assert_eq!(cluster.leader().await, new);
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_hears_a_majority_again_speaks_again() {
    let mut cluster = Cluster::of(24, 3).await;
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    let (lost, other) = (others[0], others[1]);
    cluster.links.cut(leader, [other], true);
    cluster.kill(lost);
    // Only this member has it: nobody else can be elected.
    let ahead = cluster.up[&leader].clone();
    let waiting = tokio::spawn(async move { ahead.propose(b"ahead".to_vec()).await });
    sleep(10 * LEASE).await;
    assert!(!cluster.up[&leader].leads_now());
    cluster.links.cut(leader, [other], false);
    let written = timeout(5 * LEASE, propose_surely(&cluster.up[&other], b"after")).await;
    assert!(written.is_ok(), "the leader stays silent");
    assert_eq!(cluster.leader().await, leader);
    // Proposed before; its caller may have given up by now.
    let _ = waiting.await.expect("no panic");
    cluster.up[&other].linearizable().await.unwrap();
    assert_eq!(cluster.commands(other), [b"ahead".to_vec(), b"after".to_vec()]);
}

#[tokio::test(start_paused = true)]
async fn a_read_that_asked_a_dead_leader_asks_the_next_one_at_once() {
    let mut cluster = Cluster::of(22, 3).await;
    let dead = cluster.leader().await;
    cluster.kill(dead);
    let mut reads = tokio::task::JoinSet::new();
    let survivors: Vec<_> = cluster.up.values().cloned().collect();
    let another_leads = |replica: &replica::Replica| {
        let leader = replica.leadership().borrow().leader;
        leader.is_some_and(|leader| leader != dead)
    };
    while !survivors.iter().all(another_leads) {
        for replica in &survivors {
            let replica = replica.clone();
            reads.spawn(async move { replica.linearizable().await.map(|()| Instant::now()) });
        }
        sleep(Duration::from_millis(20)).await;
    }
    let known = Instant::now();
    assert!(reads.len() > 10, "{}", reads.len());
    while let Some(read) = reads.join_next().await {
        let late = read.unwrap().unwrap().saturating_duration_since(known);
        assert!(
            late < Duration::from_millis(700),
            "{late:?} after a leader was known"
        );
    }
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
        paces(&cluster).iter().all(|pace| *pace == PACE.heartbeat_ms)
    })
    .await;
    propose_surely(&cluster.up[&survivor], b"last").await;
    for member in 1..=3 {
        cluster.up[&member].linearizable().await.unwrap();
        assert_eq!(cluster.commands(member), cluster.commands(survivor));
        assert!(cluster.commands(member).len() >= 32);
    }
}

/// Found in review: a leader whose timing changed handed over at once, and what it had received as such was lost.
#[tokio::test(start_paused = true)]
async fn a_leader_whose_timing_changes_ends_what_it_does_before_it_hands_over() {
    let mut cluster = Cluster::new(402);
    cluster.configure = |config| config.timing = Timing::Auto;
    cluster.found(3).await;
    let ended_leading = Arc::new(Mutex::new(Vec::new()));
    for replica in cluster.up.values() {
        let (asks, mut asked) = mpsc::channel::<oneshot::Sender<bool>>(1);
        replica.hand_over_through(move || {
            let asks = asks.clone();
            Box::pin(async move {
                let (done, outcome) = oneshot::channel();
                asks.send(done).await.is_ok() && outcome.await == Ok(true)
            })
        });
        let (replica, ended) = (replica.clone(), Arc::clone(&ended_leading));
        tokio::spawn(async move {
            while let Some(done) = asked.recv().await {
                sleep(Duration::from_secs(2)).await;
                ended.lock().unwrap().push(replica.leads_now());
                let _ = done.send(replica.transfer(None).await.is_ok());
            }
        });
    }
    cluster.links.slow(Duration::from_millis(20));
    eventually("everybody slows down", Duration::from_secs(60), || {
        let paces = cluster.up.values().map(|it| it.pace().heartbeat_ms);
        paces.into_iter().all(|pace| pace > PACE.heartbeat_ms)
    })
    .await;
    let ended = ended_leading.lock().unwrap().clone();
    assert!(!ended.is_empty() && ended.iter().all(|led| *led), "{ended:?}");
}

#[tokio::test(start_paused = true)]
async fn a_leader_counts_on_the_shortest_lease_among_the_voters() {
    let mut cluster = Cluster::new(401);
    // Still often enough for the others, which would elect somebody after 720 ms.
    cluster.configure = |config| {
        let slow = Timing::Exact(replica::Pace::of_heartbeat(600));
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

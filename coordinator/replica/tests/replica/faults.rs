//! Losses of power, full disks, failing syncs, a panicking machine: nothing acknowledged is lost, nothing is
//! acknowledged that could be, and the replica says that it failed.

use replica::{Config, Health, ProposeError, Replica, RowChange, StateMachine};
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::store::{Disks, Journal, open, position};

fn config(disks: &Disks, seed: u64) -> Config {
    let mut config = disks.config(seed);
    config.snapshots.every_entries = Some(15);
    config.snapshots.keep_entries = 3;
    config.log_tail_bytes_max = 3_000;
    config
}

/// Proposes in small groups until something fails or enough is done.
async fn load(
    replica: &Replica,
    next: &mut u64,
    acknowledged: &mut BTreeMap<u64, u64>,
    random: &mut fastrand::Rng,
) {
    for _ in 0..25 {
        let group: Vec<u64> = (0..random.u64(1..5)).map(|offset| *next + offset).collect();
        *next += group.len() as u64;
        let command = |number: &u64| number.to_be_bytes().repeat(40);
        let proposed = group.iter().map(|number| replica.propose(command(number)));
        let results = futures_util::future::join_all(proposed).await;
        let mut failed = false;
        for (number, result) in group.into_iter().zip(results) {
            match result {
                Ok(reply) => assert_eq!(
                    acknowledged.insert(position(&reply), number),
                    None,
                    "one position, two commands"
                ),
                Err(_) => failed = true,
            }
        }
        if failed {
            return;
        }
    }
}

async fn lives_of_a_machine(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let disks = Disks::new(seed);
    let (mut next, mut acknowledged) = (0, BTreeMap::new());
    for life in 0..6 {
        disks.power.fail_after(Some(random.u64(1..250)));
        let (machine, _) = Journal::new();
        // The power may go while the store is being opened: that is a life as well.
        if let Ok(replica) =
            Replica::open(config(&disks, seed), machine, Arc::new(replica::Unconnected)).await
        {
            load(&replica, &mut next, &mut acknowledged, &mut random).await;
            replica.shutdown().await;
        }
        disks.restart();
        let (replica, published) = open(config(&disks, seed ^ life)).await;
        replica.linearizable().await.expect("the only voter leads");
        let applied: Vec<u64> = {
            let published = published.lock().expect("no test panics with it");
            let number =
                |command: &Vec<u8>| u64::from_be_bytes(*command.first_chunk().expect("a number leads"));
            published.applied.iter().map(number).collect()
        };
        for (position, number) in &acknowledged {
            let found = applied.get(usize::try_from(*position).expect("64 bits"));
            assert_eq!(
                found,
                Some(number),
                "seed {seed}, life {life}: acknowledged at {position}"
            );
        }
        let mut once = applied.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(
            once.len(),
            applied.len(),
            "seed {seed}, life {life}: a command was applied twice"
        );
        assert!(
            once.last().is_none_or(|last| *last < next),
            "seed {seed}, life {life}: a command nobody proposed"
        );
        // What survived unacknowledged stays: from now on it has been seen.
        acknowledged.extend((0..).zip(applied));
        if random.bool() {
            load(&replica, &mut next, &mut acknowledged, &mut random).await;
            replica.shutdown().await;
        } else {
            // Killed in full flight: unsynced writes are torn although no error was seen.
            disks.restart();
            replica.shutdown().await;
        }
    }
    assert!(
        !acknowledged.is_empty(),
        "seed {seed}: the power lasted for no command"
    );
}

#[tokio::test]
async fn lost_and_torn_writes_take_nothing_acknowledged() {
    for seed in 0..12 {
        // The last line before a failure repeats it.
        println!("seed {seed}");
        lives_of_a_machine(seed).await;
    }
}

async fn check_failure(fail: impl Fn(&Disks)) {
    let disks = Disks::new(7);
    let (replica, _) = open(disks.config(7)).await;
    let mut health = replica.health();
    for number in 0..10u8 {
        replica.propose(vec![number]).await.expect("the disk works");
    }
    assert!(health.borrow().is_well());
    fail(&disks);
    let failed = replica
        .propose(vec![10])
        .await
        .expect_err("the disk does not work");
    assert!(matches!(failed, ProposeError::OutcomeUnknown(_)), "{failed}");
    let sick = health
        .wait_for(|health| !health.is_well())
        .await
        .expect("the replica lives")
        .clone();
    assert!(
        matches!(&sick, Health::Failed { reason } if reason.contains("log backend")),
        "{sick:?}"
    );
    replica
        .propose(vec![11])
        .await
        .expect_err("a failed replica stays so");
    assert!(matches!(
        replica.linearizable().await,
        Err(replica::Error::Failed(_))
    ));
    replica.shutdown().await;

    disks.log.fill(false);
    disks.log.fail_syncs(false);
    disks.restart();
    let (replica, published) = open(disks.config(8)).await;
    replica.linearizable().await.expect("the disk works again");
    let applied = published.lock().expect("no test panics with it").applied.clone();
    assert!(
        applied.len() >= 10,
        "an acknowledged command is gone: {applied:?}"
    );
    assert!(
        applied
            .iter()
            .zip(0u8..)
            .all(|(command, number)| *command == [number]),
        "{applied:?}"
    );
    replica.shutdown().await;
}

#[tokio::test]
async fn a_full_disk_fails_the_replica_and_loses_nothing() {
    check_failure(|disks| disks.log.fill(true)).await;
}

#[tokio::test]
async fn a_failed_sync_fails_the_replica_and_loses_nothing() {
    check_failure(|disks| disks.log.fail_syncs(true)).await;
}

/// Panics in the middle of a command, when a part of its rows has changed already.
struct Half(Box<Journal>);

impl StateMachine for Half {
    fn apply(&mut self, command: &[u8]) -> Vec<u8> {
        let reply = self.0.apply(command);
        assert_ne!(command, b"half", "the test wants a panic");
        reply
    }

    fn changed_rows(&mut self) -> Vec<RowChange> {
        self.0.changed_rows()
    }

    fn load(&mut self, rows: &mut dyn Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Result<(), String> {
        self.0.load(rows)
    }

    fn applied(&mut self, index: u64) {
        self.0.applied(index);
    }
}

#[tokio::test]
async fn half_a_command_never_gets_to_the_disk() {
    let disks = Disks::new(10);
    let (machine, _) = Journal::new();
    let transport = Arc::new(replica::Unconnected);
    let opened = Replica::open(disks.config(10), Box::new(Half(machine)), transport).await;
    let replica = opened.expect("the store is new");
    replica.propose(b"a".to_vec()).await.expect("the machine works");
    replica
        .propose(b"half".to_vec())
        .await
        .expect_err("the machine panicked");
    replica.shutdown().await;
    let (replica, published) = open(disks.config(11)).await;
    replica.linearizable().await.expect("the only voter leads");
    let applied = published.lock().expect("no test panics with it").applied.clone();
    assert_eq!(applied, [b"a".to_vec(), b"half".to_vec()]);
    replica.shutdown().await;
}

#[tokio::test]
async fn a_panic_of_the_machine_fails_the_replica() {
    let disks = Disks::new(9);
    let (replica, _) = open(disks.config(9)).await;
    replica.propose(b"a".to_vec()).await.expect("the machine works");
    replica
        .propose(b"panic".to_vec())
        .await
        .expect_err("the machine panicked");
    let mut health = replica.health();
    health
        .wait_for(|health| !health.is_well())
        .await
        .expect("the replica lives");
    replica
        .propose(b"b".to_vec())
        .await
        .expect_err("a failed replica stays so");
    replica.shutdown().await;
}

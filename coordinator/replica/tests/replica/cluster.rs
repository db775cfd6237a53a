//! Several members in one process on simulated time, over links in memory that can be cut.

use futures_util::future::BoxFuture;
use replica::{Config, Error, Pace, Progress, Replica, Start, Timing, Transport, Unreachable};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

use crate::store::{Disks, Journal, Published};

pub(crate) const PACE: Pace = Pace::LAN;

/// All links. Clones are the same ones.
#[derive(Clone, Default)]
pub(crate) struct Links(Arc<Mutex<LinksState>>);

#[derive(Default)]
struct LinksState {
    members: BTreeMap<u64, Replica>,
    /// From, to.
    cut: BTreeSet<(u64, u64)>,
    /// Requests to each member.
    asked: BTreeMap<u64, usize>,
    /// Largest requests that reached a member, to tell snapshots from heartbeats.
    large: Vec<(u64, usize)>,
    /// The so many-th large request from now on is lost.
    lose_large: Option<usize>,
    one_way: Duration,
    /// Members that nobody finds at their first address any more.
    moved: BTreeSet<u64>,
}

impl Links {
    fn with<T>(&self, run: impl FnOnce(&mut LinksState) -> T) -> T {
        run(&mut self.0.lock().expect("no test panics with it"))
    }

    /// Cuts or restores both directions between `one` and everyone in `others`.
    pub(crate) fn cut(&self, one: u64, others: impl IntoIterator<Item = u64>, cut: bool) {
        for other in others {
            self.cut_one_way(one, other, cut);
            self.cut_one_way(other, one, cut);
        }
    }

    pub(crate) fn cut_one_way(&self, from: u64, to: u64, cut: bool) {
        self.with(|links| {
            if cut {
                links.cut.insert((from, to));
            } else {
                links.cut.remove(&(from, to));
            }
        });
    }

    /// The member is at `moved:N` from now on.
    pub(crate) fn move_away(&self, member: u64) {
        self.with(|links| links.moved.insert(member));
    }

    fn address(&self, member: u64) -> String {
        let moved = self.with(|links| links.moved.contains(&member));
        format!("{}:{member}", if moved { "moved" } else { "memory" })
    }

    pub(crate) fn slow(&self, one_way: Duration) {
        self.with(|links| links.one_way = one_way);
    }

    pub(crate) fn lose_large(&self, number: usize) {
        self.with(|links| links.lose_large = Some(number));
    }

    /// Receivers and sizes of requests above 200 KB so far.
    pub(crate) fn large(&self) -> Vec<(u64, usize)> {
        self.with(|links| links.large.clone())
    }

    /// How many requests were made of each member since the last call.
    pub(crate) fn take_asked(&self) -> BTreeMap<u64, usize> {
        self.with(|links| std::mem::take(&mut links.asked))
    }

    fn target(&self, from: u64, to: u64, size: usize) -> Option<Replica> {
        self.with(|links| {
            *links.asked.entry(to).or_default() += 1;
            if size > 200_000 {
                links.large.push((to, size));
                match &mut links.lose_large {
                    Some(0) => {
                        links.lose_large = None;
                        return None;
                    }
                    Some(left) => *left -= 1,
                    None => {}
                }
            }
            let cut = links.cut.contains(&(from, to));
            links.members.get(&to).filter(|_| !cut).cloned()
        })
    }

    fn is_cut(&self, from: u64, to: u64) -> bool {
        self.with(|links| links.cut.contains(&(from, to)))
    }

    fn one_way(&self) -> Duration {
        self.with(|links| links.one_way)
    }
}

/// One member's end of the links.
pub(crate) struct End {
    pub(crate) from: u64,
    pub(crate) links: Links,
}

impl Transport for End {
    fn call<'a>(
        &'a self,
        member: u64,
        address: &'a str,
        request: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, Unreachable>> {
        let lost = move |what: &str| Unreachable {
            reason: format!("{what} {} -> {member}", self.from),
        };
        Box::pin(async move {
            let is_there = address == self.links.address(member);
            assert!(
                address.ends_with(&format!(":{member}")),
                "{address} of member {member}"
            );
            let ask = async {
                let started = Instant::now();
                sleep(self.links.one_way()).await;
                let target = self.links.target(self.from, member, request.len());
                let Some(replica) = target.filter(|_| is_there) else {
                    tokio::time::sleep_until(started + within).await;
                    return Err(lost("lost"));
                };
                let answer = replica.answer(self.from, &request).await;
                sleep(self.links.one_way()).await;
                if self.links.is_cut(member, self.from) {
                    tokio::time::sleep_until(started + within).await;
                    return Err(lost("answer lost"));
                }
                answer.map_err(|error| Unreachable {
                    reason: error.to_string(),
                })
            };
            timeout(within, ask)
                .await
                .unwrap_or_else(|_| Err(lost("no answer")))
        })
    }
}

/// Members, up or down, with their disks.
pub(crate) struct Cluster {
    pub(crate) links: Links,
    pub(crate) up: BTreeMap<u64, Replica>,
    pub(crate) published: BTreeMap<u64, Arc<Mutex<Published>>>,
    disks: BTreeMap<u64, Disks>,
    seed: u64,
    pub(crate) configure: fn(&mut Config),
}

impl Cluster {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            links: Links::default(),
            up: BTreeMap::new(),
            published: BTreeMap::new(),
            disks: BTreeMap::new(),
            seed,
            configure: |_| {},
        }
    }

    /// Settings of a member over its disks.
    pub(crate) fn config(&mut self, member: u64, start: Start) -> Config {
        let seed = self.seed ^ member.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let disks = self.disks.entry(member).or_insert_with(|| Disks::new(seed));
        let mut config = disks.config(seed);
        config.node_id = member;
        config.address = format!("memory:{member}");
        config.start = start;
        config.timing = Timing::Exact(PACE);
        (self.configure)(&mut config);
        config
    }

    /// Opens a member on its disks, which are empty the first time.
    pub(crate) async fn start(&mut self, member: u64, start: Start) -> Replica {
        let config = self.config(member, start);
        let (machine, published) = Journal::new();
        let end = End {
            from: member,
            links: self.links.clone(),
        };
        let opened = Replica::open(config, machine, Arc::new(end)).await;
        let replica = opened.expect("the store is sound");
        self.links
            .with(|links| links.members.insert(member, replica.clone()));
        self.up.insert(member, replica.clone());
        self.published.insert(member, published);
        replica
    }

    /// Member 1 founds, the others join as learners and become voters.
    pub(crate) async fn of(seed: u64, members: u64) -> Self {
        let mut cluster = Self::new(seed);
        cluster.found(members).await;
        cluster
    }

    pub(crate) async fn found(&mut self, members: u64) {
        let first = self.start(1, Start::Found).await;
        first.linearizable().await.expect("the only voter leads");
        for member in 2..=members {
            self.start(member, Start::Join).await;
            let added = first.add_learner(member, format!("memory:{member}")).await;
            added.expect("the leader adds a learner");
            self.caught_up(&first, member).await;
        }
        let voters = first.set_voters((1..=members).collect()).await;
        voters.expect("learners become voters");
    }

    pub(crate) async fn caught_up(&self, leader: &Replica, member: u64) {
        let last = leader.metrics().last_index;
        let there = || {
            let progress = leader.progress();
            progress
                .get(&member)
                .is_some_and(|it: &Progress| it.matched >= last)
        };
        eventually("the learner catches up", Duration::from_secs(30), there).await;
    }

    /// Ends in order.
    pub(crate) async fn stop(&mut self, member: u64) {
        let replica = self.up.remove(&member).expect("it is up");
        replica.shutdown().await;
        self.links.with(|links| links.members.remove(&member));
    }

    /// Ends like a machine that loses its power.
    pub(crate) fn kill(&mut self, member: u64) {
        let replica = self.up.remove(&member).expect("it is up");
        self.links.with(|links| links.members.remove(&member));
        self.links.cut(member, 1..10, true);
        self.disks[&member].restart();
        tokio::spawn(timeout(Duration::from_secs(60), replica.shutdown()));
    }

    /// After [`Cluster::kill`].
    pub(crate) async fn restart(&mut self, member: u64) -> Replica {
        self.links.cut(member, 1..10, false);
        self.start(member, Start::Join).await
    }

    /// The one member that leads, among these.
    pub(crate) async fn leader_of(&self, members: &[u64]) -> u64 {
        let leads = || -> Vec<u64> {
            let up = members.iter().filter(|member| self.up.contains_key(member));
            up.filter(|member| self.up[member].leadership().borrow().leads)
                .copied()
                .collect()
        };
        eventually("one member leads", Duration::from_secs(20), || leads().len() == 1).await;
        leads()[0]
    }

    pub(crate) async fn leader(&self) -> u64 {
        let up: Vec<u64> = self.up.keys().copied().collect();
        self.leader_of(&up).await
    }

    pub(crate) fn others(&self, member: u64) -> Vec<u64> {
        self.up.keys().copied().filter(|other| *other != member).collect()
    }

    pub(crate) fn commands(&self, member: u64) -> Vec<Vec<u8>> {
        self.published[&member]
            .lock()
            .expect("no test panics with it")
            .applied
            .clone()
    }
}

/// Looks again and again in simulated time.
pub(crate) async fn eventually(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    let looked = timeout(within, async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(looked.await.is_ok(), "{what}: not within {within:?}");
}

/// Proposes until it is acknowledged: what a caller with a request id does.
pub(crate) async fn propose_surely(replica: &Replica, command: &[u8]) {
    loop {
        match replica.propose(command.to_vec()).await {
            Ok(_) => return,
            Err(error) => {
                assert!(!matches!(error, replica::ProposeError::Stopped), "{error}");
                sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

pub(crate) fn is_membership_error(result: Result<(), Error>) -> bool {
    matches!(result, Err(Error::Membership(_)))
}

//! How long the ways to the others are, and what follows from it for heartbeats and elections.
//!
//! Every member asks every other one for an echo now and then. With [`Timing::Auto`] it sets its pace by the
//! worst of the ways to the voters: a heartbeat that takes longer than the interval between two counts as
//! lost, so a pace that is too fast for the way ends all writing. The Raft library takes its timing at its
//! start only, so it is started anew, over the same log and the same state; that takes milliseconds, and a
//! leader hands over first.
//!
//! An echo also tells the other's lease. A leader counts on the shortest one among the voters, so that a
//! member whose pace differs can never help to elect another one while this one still believes in itself.

use openraft::async_runtime::WatchReceiver;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::time::{Instant, sleep};

use crate::config::{Pace, Timing};
use crate::error::Error;
use crate::raft::{Raft, RaftMembership};
use crate::starting::{followed, keep_promise, shorten, write_down};
use crate::transport::{Network, Peer};
use crate::wire::{Answer, Request};
use crate::{Inner, Replica};

/// How often a leader asks, and everybody while little is known.
const OFTEN: Duration = Duration::from_secs(1);
/// How often others ask.
const SELDOM: Duration = Duration::from_secs(5);
/// An echo that takes longer is none.
const ECHO_MAX: Duration = Duration::from_secs(1);
/// Echoes of which the middle one counts, and how many there must be.
const ECHOES: usize = 5;
const ECHOES_MIN: usize = 3;
/// Slowest heartbeat, for ways of up to 600 ms.
const HEARTBEAT_MS_MAX: u64 = 1800;
/// How long the pace must have been found too slow before it gets faster. A machine that is busy now and then makes the
/// ways look longer: a leader that followed each change would hand over all the time.
const FASTER_AFTER: Duration = Duration::from_secs(600);

/// What is known of the way to one member.
#[derive(Debug, Default)]
struct Way {
    echoes: VecDeque<Duration>,
    lease: Option<Duration>,
}

/// What is known of the ways to all.
#[derive(Debug, Default)]
pub(crate) struct Ways(Mutex<BTreeMap<u64, Way>>);

impl Ways {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Way>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn heard(&self, member: u64, echo: Duration, lease: Duration) {
        let mut ways = self.lock();
        let way = ways.entry(member).or_default();
        way.lease = Some(lease);
        way.echoes.push_back(echo);
        if way.echoes.len() > ECHOES {
            way.echoes.pop_front();
        }
    }

    async fn measure(&self, peer: Peer) {
        let began = Instant::now();
        if let Ok(Answer::Echo { lease_ms }) = peer.ask(&Request::Echo, ECHO_MAX).await {
            self.heard(peer.member, began.elapsed(), Duration::from_millis(lease_ms));
        }
    }

    /// One round to all other members.
    async fn measure_round(&self, network: &Network, members: &RaftMembership, own: u64) {
        let others = members.nodes().filter(|(member, _)| **member != own);
        let peers = others.map(|(member, node)| self.measure(network.peer(*member, &node.addr)));
        futures_util::future::join_all(peers).await;
    }

    /// As many rounds as make a measurement; at most a second or so for members that are away.
    pub(crate) async fn measure_all(&self, network: &Network, members: &RaftMembership, own: u64) {
        let began = Instant::now();
        for _ in 0..ECHOES_MIN {
            if began.elapsed() < ECHO_MAX {
                self.measure_round(network, members, own).await;
            }
        }
    }

    /// Round trip to the voter farthest away, of those that are known well enough.
    pub(crate) fn worst(&self, members: &RaftMembership) -> Option<Duration> {
        let ways = self.lock();
        let known = members.voter_ids().filter_map(|voter| {
            let mut echoes: Vec<_> = ways.get(&voter)?.echoes.iter().copied().collect();
            echoes.sort_unstable();
            (echoes.len() >= ECHOES_MIN).then(|| echoes[echoes.len() / 2])
        });
        known.max()
    }

    /// The shortest lease among the voters, as far as they told.
    fn shortest_lease(&self, members: &RaftMembership) -> Option<Duration> {
        let ways = self.lock();
        members
            .voter_ids()
            .filter_map(|voter| ways.get(&voter)?.lease)
            .min()
    }

    /// The longest lease among the voters, as far as they told.
    pub(crate) fn longest_lease(&self, members: &RaftMembership) -> Option<Duration> {
        let ways = self.lock();
        members
            .voter_ids()
            .filter_map(|voter| ways.get(&voter)?.lease)
            .max()
    }

    /// Forgets those who are no members any more.
    fn keep_only(&self, members: &RaftMembership) {
        self.lock().retain(|member, _| members.get_node(member).is_some());
    }
}

/// The pace for a round trip: three of them between two heartbeats, in steps of a half, so that small changes
/// change nothing. Leaves a pace that is at most twice too slow as it is.
pub(crate) fn wanted(now: Pace, worst: Option<Duration>) -> Pace {
    let Some(worst) = worst else { return now };
    let needed = 3 * u64::try_from(worst.as_millis()).unwrap_or(u64::MAX / 3);
    let needed = needed.clamp(Pace::LAN.heartbeat_ms, HEARTBEAT_MS_MAX);
    if needed <= now.heartbeat_ms && now.heartbeat_ms <= 2 * needed {
        return now;
    }
    let mut heartbeat_ms = Pace::LAN.heartbeat_ms;
    while heartbeat_ms < needed {
        heartbeat_ms += heartbeat_ms / 2;
    }
    Pace::of_heartbeat(heartbeat_ms.min(HEARTBEAT_MS_MAX))
}

/// When a pace that is not the wanted one is changed: at once where it is too fast, after [`FASTER_AFTER`] where it is
/// too slow.
#[derive(Debug, Default)]
struct Patience {
    too_slow_since: Option<Instant>,
}

impl Patience {
    fn is_over(&mut self, now: Pace, wanted: Pace, at: Instant) -> bool {
        if wanted.heartbeat_ms >= now.heartbeat_ms {
            self.too_slow_since = None;
            return wanted.heartbeat_ms > now.heartbeat_ms;
        }
        let since = *self.too_slow_since.get_or_insert(at);
        let over = at.saturating_duration_since(since) >= FASTER_AFTER;
        if over {
            self.too_slow_since = None;
        }
        over
    }
}

pub(crate) fn set(config: &mut openraft::Config, pace: Pace) {
    config.heartbeat_interval = pace.heartbeat_ms;
    config.election_timeout_min = pace.election_min_ms;
    config.election_timeout_max = pace.election_max_ms;
}

fn pace_of(config: &openraft::Config) -> Pace {
    Pace {
        heartbeat_ms: config.heartbeat_interval,
        election_min_ms: config.election_timeout_min,
        election_max_ms: config.election_timeout_max,
    }
}

/// How long the confirmation of a majority holds, by the library's own settings.
pub(crate) fn lease(config: &openraft::Config) -> Duration {
    Duration::from_millis(config.election_timeout_max)
}

/// For how long a member that starts with the lease `own` takes its leader as heard: the leader may count on a
/// longer one, up to `before`, until it is told of this one.
pub(crate) fn silence(own: Duration, before: Option<Duration>) -> Duration {
    let longest = Duration::from_millis(Pace::of_heartbeat(HEARTBEAT_MS_MAX).election_max_ms);
    match before.map(|before| before.min(longest)) {
        Some(before) if before > own => before + OFTEN + ECHO_MAX,
        _ => own,
    }
}

impl Inner {
    fn own_lease(&self) -> Duration {
        lease(self.raft.borrow().config())
    }

    pub(crate) fn own_lease_ms(&self) -> u64 {
        u64::try_from(self.own_lease().as_millis()).unwrap_or(u64::MAX)
    }

    /// Counts on the shortest lease that any voter may go by.
    fn agree_on_lease(&self, members: &RaftMembership) {
        let own = self.own_lease();
        let agreed = self
            .ways
            .shortest_lease(members)
            .map_or(own, |shortest| own.min(shortest));
        self.lease_length.send_if_modified(|length| {
            let changed = *length != agreed;
            *length = agreed;
            changed
        });
    }
}

/// Measures for as long as the replica is there, and adapts.
pub(crate) async fn watch_ways(inner: Weak<Inner>, timing: Timing) {
    let (mut rounds, mut patience) = (0u32, Patience::default());
    loop {
        let leads = match inner.upgrade() {
            Some(inner) if !inner.queue.is_closed() => inner.leadership.borrow().leader == Some(inner.member),
            _ => return,
        };
        let pause = if leads || rounds < 10 { OFTEN } else { SELDOM };
        sleep(pause).await;
        rounds = rounds.saturating_add(1);
        let Some(inner) = inner.upgrade() else { return };
        let members = inner.raft().metrics().borrow_watched().membership_config.clone();
        inner.ways.keep_only(&members);
        inner
            .ways
            .measure_round(&inner.network, &members, inner.member)
            .await;
        inner.agree_on_lease(&members);
        if timing != Timing::Auto {
            continue;
        }
        let now = pace_of(inner.raft.borrow().config());
        let wanted = wanted(now, inner.ways.worst(&members));
        if patience.is_over(now, wanted, Instant::now()) {
            let replica = Replica(inner);
            if let Err(error) = replica.change_pace(wanted, &members).await {
                tracing::warn!(%error, "the timing could not be changed");
            }
        }
    }
}

impl Replica {
    /// Heartbeats and elections as they are now.
    #[must_use]
    pub fn pace(&self) -> Pace {
        pace_of(self.0.raft.borrow().config())
    }

    /// Starts the Raft library anew with other timing, over the same log and state.
    async fn change_pace(&self, pace: Pace, members: &RaftMembership) -> Result<(), Error> {
        tracing::info!(?pace, "changes the timing");
        self.hand_over().await;
        let mut running = self.0.running.lock().await;
        let Some(running) = running.as_mut() else {
            return Err(Error::Stopped);
        };
        if let Some(reason) = self.0.shared.failure() {
            return Err(Error::Failed(reason));
        }
        let old = self.0.raft();
        if let Err(error) = self.0.seed.scope(old.shutdown()).await {
            tracing::warn!(%error, "the raft task did not end in order");
        }
        let fail = |reason: String| {
            self.0.shared.fail(&reason);
            Error::Failed(reason)
        };
        // The library takes everything in the log for durable when it starts.
        let mut log = self.0.log.clone();
        log.settle().await.map_err(|error| fail(error.to_string()))?;
        set(&mut running.config, pace);
        let own = lease(&running.config);
        let before = self.0.ways.longest_lease(members).max(log.lease());
        let silence = silence(own, before);
        write_down(&log, own)
            .await
            .map_err(|error| fail(error.to_string()))?;
        let followed = followed(log.vote(), self.0.member);
        let machine = running.machine.succeed().await;
        running.machine = machine.keep();
        let config = Arc::new(running.config.clone());
        let started = Raft::new(
            self.0.member,
            config,
            self.0.network.clone(),
            log.clone(),
            machine,
        );
        let started = self.0.seed.scope(started).await;
        let raft = started.map_err(|fatal| fail(fatal.to_string()))?;
        let alone = raft.voter_ids().eq([self.0.member]);
        if let Some(leader) = followed {
            let promise = keep_promise(&raft, self.0.raft.subscribe(), leader, silence);
            self.0.seed.scope(promise).await;
        }
        self.0.raft.send_replace(raft.clone());
        let shortened = async { shorten(log, self.0.raft.subscribe(), own, silence) };
        self.0.seed.scope(shortened).await;
        self.0.agree_on_lease(members);
        if alone {
            let elected = self.0.seed.scope(raft.trigger().elect(false)).await;
            elected.map_err(|fatal| self.failed(&fatal))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A busy machine makes the ways look longer now and then: the leader handed over at each of these times.
    #[test]
    fn the_pace_gets_slower_at_once_and_faster_late() {
        let [fast, slow] = [100, 337].map(Pace::of_heartbeat);
        let mut patience = Patience::default();
        let began = Instant::now();
        let mut changes = |now, wanted, after| patience.is_over(now, wanted, began + after);
        assert!(changes(fast, slow, Duration::ZERO), "it is too fast for the way");
        assert!(!changes(slow, fast, Duration::ZERO));
        assert!(!changes(slow, fast, FASTER_AFTER / 2));
        assert!(!changes(slow, slow, FASTER_AFTER / 2), "it was right once more");
        assert!(!changes(slow, fast, FASTER_AFTER));
        assert!(!changes(slow, fast, 2 * FASTER_AFTER - Duration::from_millis(1)));
        assert!(changes(slow, fast, 2 * FASTER_AFTER), "for all of the time");
        assert!(!changes(slow, fast, 2 * FASTER_AFTER), "it begins anew");
    }

    #[test]
    fn the_pace_follows_the_worst_way_in_steps() {
        let after = |now: u64, worst_ms: u64| {
            wanted(Pace::of_heartbeat(now), Some(Duration::from_millis(worst_ms))).heartbeat_ms
        };
        for (now, worst_ms, expected) in [
            (80, 0, 80),
            (80, 26, 80),
            (80, 27, 120),
            (80, 200, 607),
            (607, 200, 607),
            (607, 130, 607),
            (607, 100, 405),
            (405, 0, 80),
            (80, 5000, 1800),
        ] {
            assert_eq!(after(now, worst_ms), expected, "{now} ms, way of {worst_ms} ms");
        }
        assert_eq!(wanted(Pace::WAN, None), Pace::WAN);
    }
}

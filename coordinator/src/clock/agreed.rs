//! The time that the voters agree on, so that a machine whose clock is off harms nobody.
//!
//! Every member asks the voters now and then what their clocks say. What most of them say is the time; a member whose
//! own clock says something else corrects it, and does not lead if one with a right clock can. Where no majority says the same, members
//! that had agreed before go on by the time that has passed since, and others go by any of them that answers. If nobody had, after a start of
//! all of them, the earliest clock counts that is not behind what the state has seen: deadlines that come late do less
//! harm than those that come early.
//!
//! In between the time goes on by itself, so that a clock that jumps changes nothing before it was compared again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Clock;

/// Clocks that differ by no more say the same: above what the way of a question adds, and below what a validator or a
/// deadline would notice.
const TOLERANCE_MS: u64 = 5_000;

/// What a member says of the time, both at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// Its machine's clock.
    pub machine: UnixMillis,
    /// The time that it goes by, if it has agreed on one since it was started.
    pub agreed: Option<UnixMillis>,
}

impl Reading {
    /// The same, so much later.
    #[must_use]
    pub fn after(self, passed: Duration) -> Self {
        Self {
            machine: self.machine + passed,
            agreed: self.agreed.map(|agreed| agreed + passed),
        }
    }
}

/// Who says what at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison<'r> {
    /// How many there are that vote.
    pub voters: usize,
    /// Of this member.
    pub own: Reading,
    /// Whether it votes.
    pub votes: bool,
    /// Of the other voters that have answered.
    pub others: &'r [Reading],
    /// The time of the newest command that was applied here.
    pub recorded: UnixMillis,
}

impl Comparison<'_> {
    /// The time, if enough is known to tell.
    #[must_use]
    pub fn time(&self) -> Option<UnixMillis> {
        if self.voters == 0 {
            return None;
        }
        let majority = self.voters / 2 + 1;
        let own = self.votes.then_some(self.own.machine);
        let others = self.others.iter().map(|other| other.machine);
        let mut machines: Vec<UnixMillis> = others.chain(own).collect();
        machines.sort_unstable();
        let same = (0..machines.len()).map(|first| {
            let all = machines[first..].iter();
            let count = all
                .take_while(|machine| machine.since(machines[first]) <= TOLERANCE_MS)
                .count();
            &machines[first..first + count]
        });
        // The first of the largest ones.
        let same = same.reduce(|best, next| if next.len() > best.len() { next } else { best });
        if let Some(same) = same.filter(|same| same.len() >= majority) {
            let middle = same[same.len() / 2];
            let is_right = self.own.machine.0.abs_diff(middle.0) <= TOLERANCE_MS;
            return Some(if is_right { self.own.machine } else { middle });
        }
        let mut agreed: Vec<UnixMillis> = self.others.iter().filter_map(|other| other.agreed).collect();
        agreed.sort_unstable();
        let before = self.own.agreed.or(agreed.get(agreed.len() / 2).copied());
        let sensible = || {
            let not_behind = |machine: &&UnixMillis| self.recorded.since(**machine) <= TOLERANCE_MS;
            machines.iter().find(not_behind).or(machines.last()).copied()
        };
        let enough = machines.len() >= majority;
        before.or_else(|| enough.then(sensible).flatten())
    }
}

fn is_off(ahead_ms: i64) -> bool {
    ahead_ms.unsigned_abs() > TOLERANCE_MS
}

#[derive(Debug)]
struct Shared {
    machine: Arc<dyn Clock>,
    /// When `base_ms` was the time.
    began: Instant,
    base_ms: AtomicU64,
    is_settled: AtomicBool,
    settled: Notify,
    /// By how much members' machines were ahead of the time when they were compared last, in ms.
    ahead_ms: Mutex<BTreeMap<u64, i64>>,
    own: u64,
}

/// The time that the voters agree on; clones are the same clock. Until it has been set it is the machine's.
#[derive(Debug, Clone)]
pub struct AgreedClock(Arc<Shared>);

impl AgreedClock {
    /// The clock of a member, which was not compared yet.
    #[must_use]
    pub fn new(own: u64, machine: Arc<dyn Clock>) -> Self {
        Self(Arc::new(Shared {
            machine,
            began: Instant::now(),
            base_ms: AtomicU64::new(0),
            is_settled: AtomicBool::new(false),
            settled: Notify::new(),
            ahead_ms: Mutex::default(),
            own,
        }))
    }

    /// What this member says of the time.
    #[must_use]
    pub fn reading(&self) -> Reading {
        Reading {
            machine: self.0.machine.now(),
            agreed: self.agreed(),
        }
    }

    /// Sets the time, now. `machines` are the clocks of other members' machines at this moment.
    pub fn set(&self, time: UnixMillis, machines: impl IntoIterator<Item = (u64, UnixMillis)>) {
        let shared = &self.0;
        let passed = u64::try_from(shared.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        shared
            .base_ms
            .store(time.0.saturating_sub(passed), Ordering::Relaxed);
        let own = (shared.own, shared.machine.now());
        let machines = machines.into_iter().chain([own]);
        let now: BTreeMap<u64, i64> = machines
            .map(|(member, machine)| (member, machine.0.wrapping_sub(time.0).cast_signed()))
            .collect();
        let before = std::mem::replace(&mut *self.ahead(), now.clone());
        for (member, ahead_ms) in now {
            let was_off = before.get(&member).is_some_and(|ms| is_off(*ms));
            match (was_off, is_off(ahead_ms)) {
                (false, true) => tracing::warn!(
                    member,
                    ahead_s = ahead_ms / 1000,
                    "the clock of a member's machine differs from those of most voters: run a time service (chrony) \
                     there; until then that member goes by theirs and leads only if nobody with a right one can"
                ),
                (true, false) => tracing::info!(member, "the clock of the member's machine is right again"),
                _ => {}
            }
        }
        if !shared.is_settled.swap(true, Ordering::Release) {
            shared.settled.notify_waiters();
        }
    }

    /// By how much the machines of members were ahead of the time when they were compared last, in ms.
    #[must_use]
    pub fn ahead_ms(&self) -> BTreeMap<u64, i64> {
        self.ahead().clone()
    }

    fn ahead(&self) -> MutexGuard<'_, BTreeMap<u64, i64>> {
        self.0.ahead_ms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was ever set.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.0.is_settled.load(Ordering::Acquire)
    }

    fn agreed(&self) -> Option<UnixMillis> {
        let base = UnixMillis(self.0.base_ms.load(Ordering::Relaxed));
        self.is_settled().then(|| base + self.0.began.elapsed())
    }
}

impl Clock for AgreedClock {
    fn now(&self) -> UnixMillis {
        self.agreed().unwrap_or_else(|| self.0.machine.now())
    }

    fn settling(&self) -> Option<BoxFuture<'_, ()>> {
        if self.is_settled() {
            return None;
        }
        let settled = self.0.settled.notified();
        // It may have been set meanwhile.
        (!self.is_settled()).then(|| Box::pin(settled) as _)
    }

    fn better(&self) -> Vec<u64> {
        let ahead = self.ahead();
        if !ahead.get(&self.0.own).is_some_and(|ms| is_off(*ms)) {
            return Vec::new();
        }
        let right = ahead.iter().filter(|(_, ms)| !is_off(**ms));
        right.map(|(member, _)| *member).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::ManualClock;
    use super::*;

    const HOUR_MS: u64 = 3_600_000;
    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    fn machine(ahead_ms: i64) -> Reading {
        Reading {
            machine: UnixMillis(NOW.0.saturating_add_signed(ahead_ms)),
            agreed: None,
        }
    }

    fn had_agreed(ahead_ms: i64) -> Reading {
        let agreed = Some(NOW);
        Reading {
            agreed,
            ..machine(ahead_ms)
        }
    }

    /// How far ahead the time is, in ms.
    fn time(voters: usize, own: Reading, others: &[Reading]) -> Option<i64> {
        let comparison = Comparison {
            voters,
            own,
            votes: true,
            others,
            recorded: UnixMillis(NOW.0 - 60_000),
        };
        comparison
            .time()
            .map(|time| time.0.wrapping_sub(NOW.0).cast_signed())
    }

    #[test]
    fn what_most_voters_say_is_the_time() {
        let hour = HOUR_MS.cast_signed();
        for off in [hour, -hour] {
            let (good, bad) = (machine(0), machine(off));
            for (what, voters, own, others, expected) in [
                ("alone", 1, bad, vec![], Some(off)),
                ("one of three is off", 3, bad, vec![good, good], Some(0)),
                ("another of three is off", 3, good, vec![good, bad], Some(0)),
                ("two are enough", 3, good, vec![good], Some(0)),
                ("one is not", 3, good, vec![], None),
                (
                    "two of five are off",
                    5,
                    bad,
                    vec![bad, good, good, good],
                    Some(0),
                ),
                ("nobody votes", 0, good, vec![good], None),
                // Which of them is right cannot be known.
                ("agreed before", 3, had_agreed(off), vec![good], Some(0)),
                ("asked one that had", 3, bad, vec![had_agreed(0)], Some(0)),
                ("one that had is enough", 5, bad, vec![had_agreed(0)], Some(0)),
                ("goes on alone", 3, had_agreed(off), vec![], Some(0)),
                ("none had", 3, bad, vec![good], Some(0)),
                ("none had, from the other", 3, good, vec![bad], Some(0)),
            ] {
                assert_eq!(time(voters, own, &others), expected, "{what}, off by {off} ms");
            }
        }
    }

    #[test]
    fn small_differences_are_left_alone() {
        let others = [machine(1_000), machine(4_000)];
        assert_eq!(time(3, machine(0), &others), Some(0), "its own clock is as good");
        assert_eq!(time(3, machine(9_500), &others), Some(4_000), "that of two");
    }

    #[test]
    fn who_does_not_vote_is_not_counted() {
        let comparison = Comparison {
            voters: 1,
            own: machine(HOUR_MS.cast_signed()),
            votes: false,
            others: &[machine(0)],
            recorded: NOW,
        };
        assert_eq!(comparison.time(), Some(NOW));
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_jumps_changes_nothing_before_it_is_compared() {
        let machine = ManualClock::at(NOW);
        let clock = AgreedClock::new(1, Arc::new(machine.clone()));
        assert_eq!((clock.now(), clock.is_settled()), (NOW, false));
        let waiting = tokio::spawn({
            let clock = clock.clone();
            async move { clock.settling().expect("not yet").await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        clock.set(NOW, []);
        waiting.await.expect("it is told");
        assert!(clock.settling().is_none());
        machine.set(NOW + HOUR_MS);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!((clock.now(), clock.better()), (NOW + 2_000, vec![]));
        clock.set(NOW + 2_000, [(2, NOW + 2_500), (3, NOW + HOUR_MS)]);
        assert_eq!(clock.better(), [2]);
        clock.set(NOW + 2_000, [(3, NOW + 2 * HOUR_MS)]);
        assert!(clock.better().is_empty(), "nobody else is right either");
        clock.set(NOW + 2_000, [(2, NOW + 2_500)]);
        assert_eq!(clock.ahead_ms(), [(1, 3_598_000), (2, 500)].into());
        clock.set(machine.now(), []);
        assert_eq!((clock.now(), clock.better()), (NOW + HOUR_MS, vec![]));
    }
}

//! Which members an entry waits for.
//!
//! A majority needs the quickest of the others only. What the rest is sent may be gathered for some milliseconds: under
//! load they write and answer once for several entries. Who is quick shows in how long each took to answer; one that
//! has been asked and is silent counts as at least that slow, so that another takes its place at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

use crate::membership::Membership;

/// A member takes the place of another that it is quicker than by half and by this much: otherwise the two would take
/// turns, and each change makes an entry wait.
const QUICKER_BY: Duration = Duration::from_millis(1);

/// How quickly members answered, and whom entries wait for. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Quickest(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// None for those that did not answer last time, or never.
    answers: BTreeMap<u64, Option<Duration>>,
    /// Since when members have owed an answer.
    asked: BTreeMap<u64, Instant>,
    waited_for: BTreeSet<u64>,
}

impl State {
    fn slowness(&self, member: u64) -> Option<Duration> {
        let usual = (*self.answers.get(&member)?)?;
        let owed = self.asked.get(&member).map_or(Duration::ZERO, Instant::elapsed);
        Some(usual.max(owed))
    }

    /// The slowest of those that are waited for, or the quickest of the others.
    fn edge(&self, others: &BTreeSet<u64>, waited_for: bool) -> Option<(Duration, u64)> {
        let members = others.iter().copied();
        let side = members.filter(|member| self.waited_for.contains(member) == waited_for);
        let known = side.filter_map(|member| Some((self.slowness(member)?, member)));
        if waited_for { known.max() } else { known.min() }
    }
}

impl Quickest {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Entries are sent to a member.
    pub(crate) fn asked(&self, member: u64) {
        self.state().asked.insert(member, Instant::now());
    }

    /// It answered, or could not be reached.
    pub(crate) fn answered(&self, member: u64, well: bool) {
        let mut state = self.state();
        let took = state
            .asked
            .remove(&member)
            .map_or(Duration::ZERO, |since| since.elapsed());
        let usual = state.answers.entry(member).or_default();
        *usual = well.then(|| usual.map_or(took, |usual| (usual * 3 + took) / 4));
    }

    /// Whether entries of the leader `own` wait for `member`.
    pub(crate) fn includes(&self, member: u64, own: u64, members: &Membership) -> bool {
        if members.changing {
            // Of two majorities.
            return true;
        }
        let mut others: BTreeSet<u64> = members.voters.keys().copied().collect();
        let majority = others.len() / 2 + 1;
        let needed = majority - usize::from(others.remove(&own));
        if !others.contains(&member) {
            // It only follows.
            return false;
        }
        let mut state = self.state();
        let mut waited_for = std::mem::take(&mut state.waited_for);
        waited_for.retain(|member| others.contains(member) && state.slowness(*member).is_some());
        while waited_for.len() > needed {
            waited_for.pop_last();
        }
        state.waited_for = waited_for;
        while state.waited_for.len() < needed {
            let Some((_, quickest)) = state.edge(&others, false) else {
                // Too few have answered for a choice.
                return true;
            };
            state.waited_for.insert(quickest);
        }
        if let (Some((slow, slowest)), Some((quick, quickest))) =
            (state.edge(&others, true), state.edge(&others, false))
            && quick * 2 + QUICKER_BY < slow
        {
            state.waited_for.remove(&slowest);
            state.waited_for.insert(quickest);
        }
        state.waited_for.contains(&member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    const MS: Duration = Duration::from_millis(1);

    fn voters(count: u64) -> Membership {
        Membership {
            voters: (1..=count).map(|member| (member, String::new())).collect(),
            ..Membership::default()
        }
    }

    async fn answer(quickest: &Quickest, member: u64, after: Duration, well: bool) {
        quickest.asked(member);
        advance(after).await;
        quickest.answered(member, well);
    }

    fn included(quickest: &Quickest, members: &Membership) -> Vec<u64> {
        let others = 2..=members.voters.len() as u64 + 1;
        others
            .filter(|member| quickest.includes(*member, 1, members))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn entries_wait_for_a_majority_and_not_for_the_rest() {
        let quickest = Quickest::default();
        let five = voters(5);
        assert_eq!(
            included(&quickest, &five),
            [2, 3, 4, 5],
            "nobody is known to be quick"
        );
        for (member, ms) in [(2, 9), (3, 2), (4, 1), (5, 30)] {
            answer(&quickest, member, ms * MS, true).await;
        }
        assert_eq!(included(&quickest, &five), [3, 4]);
        assert_eq!(included(&quickest, &voters(2)), [2], "the only other one");
    }

    #[tokio::test(start_paused = true)]
    async fn another_takes_the_place_of_a_silent_one_at_once_and_keeps_it() {
        let quickest = Quickest::default();
        let three = voters(3);
        answer(&quickest, 2, MS, true).await;
        answer(&quickest, 3, 2 * MS, true).await;
        assert!(quickest.includes(2, 1, &three) && !quickest.includes(3, 1, &three));
        quickest.asked(2);
        advance(5 * MS).await;
        assert!(!quickest.includes(3, 1, &three), "it may still answer in time");
        advance(MS).await;
        assert!(quickest.includes(3, 1, &three) && !quickest.includes(2, 1, &three));
        quickest.answered(2, true);
        assert!(
            quickest.includes(3, 1, &three),
            "a little quicker is no reason to change"
        );
        answer(&quickest, 3, 50 * MS, false).await;
        assert!(
            quickest.includes(2, 1, &three) && !quickest.includes(3, 1, &three),
            "it cannot be reached"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn while_voters_change_entries_wait_for_all() {
        let quickest = Quickest::default();
        answer(&quickest, 2, MS, true).await;
        let mut three = voters(3);
        assert!(!quickest.includes(3, 1, &three));
        three.changing = true;
        assert!(quickest.includes(3, 1, &three));
    }
}

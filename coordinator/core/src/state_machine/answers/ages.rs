//! In which order answers are forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use protocol::time::UnixMillis;

use super::Rows;
use crate::state_machine::command::RequestId;

/// Requests by the age of their answers, those of one millisecond by name.
///
/// Only the oldest second is kept in order. Of the others the first and the last name are: names begin with the time, so
/// that there are few others between them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ages {
    oldest: BTreeSet<(UnixMillis, RequestId)>,
    /// What was answered up to the end of this second is in `oldest`.
    ordered: Option<u64>,
    later: BTreeMap<u64, (RequestId, RequestId)>,
}

fn second(at: UnixMillis) -> u64 {
    at.0 / 1_000
}

impl Ages {
    pub(crate) fn insert(&mut self, at: UnixMillis, request: RequestId) {
        let second = second(at);
        if self.ordered.is_some_and(|ordered| second <= ordered) {
            self.oldest.insert((at, request));
            return;
        }
        let (first, last) = self.later.entry(second).or_insert((request, request));
        *first = request.min(*first);
        *last = request.max(*last);
    }

    /// The oldest of these answers.
    pub(crate) fn first(&mut self, rows: &Rows) -> Option<(UnixMillis, RequestId)> {
        while self.oldest.is_empty() {
            let (number, (first, last)) = self.later.pop_first()?;
            self.ordered = Some(number);
            self.oldest = of_second(rows, number, first..=last).collect();
        }
        self.oldest.first().copied()
    }

    pub(crate) fn pop_first(&mut self) {
        self.oldest.pop_first();
    }

    /// True if it has each of these answers, and no other.
    pub(crate) fn are_of(&self, rows: &Rows) -> bool {
        let mut all = self.oldest.clone();
        for (number, (first, last)) in &self.later {
            all.extend(of_second(rows, *number, *first..=*last));
        }
        let every = RequestId(0)..=RequestId(u128::MAX);
        all == rows.times(every).collect()
    }
}

fn of_second(
    rows: &Rows,
    number: u64,
    names: RangeInclusive<RequestId>,
) -> impl Iterator<Item = (UnixMillis, RequestId)> {
    rows.times(names).filter(move |(at, _)| second(*at) == number)
}

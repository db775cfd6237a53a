//! In which order answers are forgotten, in little room: a flood of writes leaves half a million of them.

use std::collections::{BTreeMap, BTreeSet};

use protocol::time::UnixMillis;

use super::command::RequestId;

/// Requests by the age of their answers, those of one millisecond by name.
///
/// Only the oldest second is kept in order. Of the others a name is all that is kept.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ages {
    oldest: BTreeSet<(UnixMillis, RequestId)>,
    /// What was answered up to the end of this second is in `oldest`.
    ordered: Option<u64>,
    later: BTreeMap<u64, Vec<RequestId>>,
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
        if !self.later.contains_key(&second)
            && let Some(mut before) = self.later.last_entry()
        {
            before.get_mut().shrink_to_fit();
        }
        self.later.entry(second).or_default().push(request);
    }

    /// The oldest answer; `at` says when each was given.
    pub(crate) fn first(
        &mut self,
        at: impl Fn(RequestId) -> Option<UnixMillis>,
    ) -> Option<(UnixMillis, RequestId)> {
        while self.oldest.is_empty() {
            let (second, requests) = self.later.pop_first()?;
            self.ordered = Some(second);
            self.oldest = requests
                .into_iter()
                .filter_map(|request| Some((at(request)?, request)))
                .collect();
        }
        self.oldest.first().copied()
    }

    pub(crate) fn pop_first(&mut self) {
        self.oldest.pop_first();
    }

    fn all(&self) -> BTreeSet<(u64, RequestId)> {
        let oldest = self.oldest.iter().map(|(at, request)| (second(*at), *request));
        let later = self.later.iter();
        let later = later.flat_map(|(second, requests)| requests.iter().map(|request| (*second, *request)));
        oldest.chain(later).collect()
    }
}

/// Equal when the same is known, however much of it is in order already.
impl PartialEq for Ages {
    fn eq(&self, other: &Self) -> bool {
        self.all() == other.all()
    }
}

impl Eq for Ages {}

//! What to evict from the model cache. Pure.
//!
//! The unit is one model folder or one file, never a chute's whole folder: what a chute did not share stays.
//! Chutes under a lease (running, or about to) are never touched, whatever their size or age. The rest goes
//! least recently used first, where use is what the deployment history says, since file access times mean
//! little: a model that is served from GPU memory for weeks looks unused on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use protocol::id::ChuteId;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

/// What a member of the coordinator, or the host, knows of the chutes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leases {
    /// Chutes that run here, or are about to: never evicted.
    pub running: BTreeSet<ChuteId>,
    /// When a chute was last deployed here.
    #[serde(default)]
    pub last_deployed: BTreeMap<ChuteId, UnixMillis>,
}

/// Limits of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// What was not used for so long goes.
    pub age_max: Duration,
    /// Everything together stays below this, in bytes.
    pub bytes_max: u64,
    /// So much stays free on the file system, in bytes.
    pub free_bytes_min: u64,
}

/// Something in the cache that can go on its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Whose folder it is in.
    pub chute: ChuteId,
    /// Where it is, below the chute's folder: one or two plain names.
    pub place: Place,
    /// Bytes on disk.
    pub bytes: u64,
    /// Newest access or change of a file in it.
    pub touched_at: UnixMillis,
}

/// Where an item is, below its chute's folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// `hub/<name>`: a repository of the Hugging Face cache.
    Hub(String),
    /// `civitai/<name>`: one downloaded model file.
    Civitai(String),
}

/// Why an item goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Not used for longer than the limit.
    Age,
    /// The cache is larger than the limit.
    Size,
    /// The file system is fuller than the limit.
    FreeSpace,
}

/// One thing to delete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eviction {
    /// What.
    pub item: Item,
    /// Why.
    pub cause: Cause,
}

/// The last use of an item: the deployment history's word or the files', whichever is later.
fn last_use(item: &Item, leases: &Leases) -> UnixMillis {
    let deployed = leases.last_deployed.get(&item.chute).copied().unwrap_or_default();
    deployed.max(item.touched_at)
}

/// Chooses what goes, least recently used first.
///
/// `other_bytes` is what lies in the cache beside the items and counts towards the size; `free_bytes` is what
/// is free on the file system now.
#[must_use]
pub fn plan(
    items: Vec<Item>,
    other_bytes: u64,
    leases: &Leases,
    limits: Limits,
    free_bytes: u64,
    now: UnixMillis,
) -> Vec<Eviction> {
    let mut total = items
        .iter()
        .fold(other_bytes, |sum, item| sum.saturating_add(item.bytes));
    let mut free = free_bytes;
    let age_max_ms = u64::try_from(limits.age_max.as_millis()).unwrap_or(u64::MAX);
    let mut candidates: Vec<(UnixMillis, Item)> = items
        .into_iter()
        .filter(|item| !leases.running.contains(&item.chute))
        .map(|item| (last_use(&item, leases), item))
        .collect();
    candidates
        .sort_by(|(a_use, a), (b_use, b)| (a_use, &a.chute, &a.place).cmp(&(b_use, &b.chute, &b.place)));
    let mut evictions = Vec::new();
    for (used_at, item) in candidates {
        let cause = if now.since(used_at) > age_max_ms {
            Cause::Age
        } else if total > limits.bytes_max {
            Cause::Size
        } else if free < limits.free_bytes_min {
            Cause::FreeSpace
        } else {
            break;
        };
        // What takes no room helps neither size nor free space; it goes when it is old.
        if item.bytes == 0 && cause != Cause::Age {
            continue;
        }
        total = total.saturating_sub(item.bytes);
        free = free.saturating_add(item.bytes);
        evictions.push(Eviction { item, cause });
    }
    evictions
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_MS: u64 = 86_400_000;
    const NOW: UnixMillis = UnixMillis(1_000 * DAY_MS);

    fn chute(name: &str) -> ChuteId {
        ChuteId::parse(name).expect("valid")
    }

    /// An item named by its chute, with its size and the days since its files were touched.
    fn item(name: &str, bytes: u64, days: u64) -> Item {
        let touched_at = NOW - days * DAY_MS;
        Item {
            chute: chute(name),
            place: Place::Hub(format!("models--x--{name}")),
            bytes,
            touched_at,
        }
    }

    struct Case {
        items: Vec<Item>,
        other_bytes: u64,
        running: &'static [&'static str],
        deployed_days_ago: &'static [(&'static str, u64)],
        free: u64,
        expected: &'static [(&'static str, Cause)],
    }

    fn check(case: Case) {
        let leases = Leases {
            running: case.running.iter().map(|name| chute(name)).collect(),
            last_deployed: case
                .deployed_days_ago
                .iter()
                .map(|(name, days)| (chute(name), NOW - days * DAY_MS))
                .collect(),
        };
        let limits = Limits {
            age_max: Duration::from_secs(30 * 86_400),
            bytes_max: 100,
            free_bytes_min: 50,
        };
        let planned = plan(case.items, case.other_bytes, &leases, limits, case.free, NOW);
        let planned: Vec<_> = planned
            .iter()
            .map(|gone| (gone.item.chute.as_str(), gone.cause))
            .collect();
        assert_eq!(planned, case.expected);
    }

    #[test]
    fn nothing_goes_while_all_limits_hold() {
        let items = vec![item("a", 50, 1), item("b", 50, 30)];
        check(Case {
            items,
            other_bytes: 0,
            running: &[],
            deployed_days_ago: &[],
            free: 50,
            expected: &[],
        });
    }

    #[test]
    fn the_old_go_whatever_the_size() {
        let items = vec![item("a", 1, 31), item("b", 1, 29), item("c", 0, 99)];
        let expected = &[("c", Cause::Age), ("a", Cause::Age)];
        check(Case {
            items,
            other_bytes: 0,
            running: &[],
            deployed_days_ago: &[],
            free: 99,
            expected,
        });
    }

    #[test]
    fn deployment_history_beats_file_times() {
        let items = vec![item("a", 60, 31), item("b", 60, 2)];
        let expected = &[("b", Cause::Size)];
        check(Case {
            items,
            other_bytes: 0,
            running: &[],
            deployed_days_ago: &[("a", 1)],
            free: 99,
            expected,
        });
    }

    #[test]
    fn running_chutes_stay_at_any_age_and_size() {
        let items = vec![item("a", 500, 400), item("b", 60, 1)];
        let expected = &[("b", Cause::Size)];
        check(Case {
            items,
            other_bytes: 0,
            running: &["a"],
            deployed_days_ago: &[],
            free: 0,
            expected,
        });
    }

    #[test]
    fn size_evicts_the_least_recently_used_and_not_the_largest() {
        let items = vec![item("new", 90, 1), item("mid", 20, 5), item("old", 20, 9)];
        let expected = &[("old", Cause::Size), ("mid", Cause::Size)];
        check(Case {
            items,
            other_bytes: 0,
            running: &[],
            deployed_days_ago: &[],
            free: 99,
            expected,
        });
    }

    #[test]
    fn what_lies_beside_the_items_counts_towards_the_size() {
        let items = vec![item("a", 30, 5), item("b", 30, 1)];
        let expected = &[("a", Cause::Size)];
        check(Case {
            items,
            other_bytes: 60,
            running: &[],
            deployed_days_ago: &[],
            free: 99,
            expected,
        });
    }

    #[test]
    fn a_full_disk_evicts_until_enough_is_free() {
        let items = vec![item("a", 20, 5), item("b", 30, 4), item("c", 30, 3)];
        let expected = &[("a", Cause::FreeSpace), ("b", Cause::FreeSpace)];
        check(Case {
            items,
            other_bytes: 0,
            running: &[],
            deployed_days_ago: &[],
            free: 5,
            expected,
        });
    }

    #[test]
    fn a_clock_that_ran_backwards_evicts_nothing() {
        let future = Item {
            touched_at: NOW + 900 * DAY_MS,
            ..item("a", 1, 0)
        };
        check(Case {
            items: vec![future],
            other_bytes: 0,
            running: &[],
            deployed_days_ago: &[],
            free: 99,
            expected: &[],
        });
    }
}

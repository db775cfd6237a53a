//! Victim selection: on which server, and who goes, so that the least is lost.
//!
//! On each server that would do, the cheapest set of victims that frees enough GPUs is found exactly (a
//! small knapsack over at most a server's GPUs); the best server wins. A greedy prefix in order of value
//! would stop small victims that a big one makes needless, and the first server that works is not the best.

use super::room::Room;
use super::view::{Evictable, Need, PoolIndex, View};
use crate::state_machine::chute::ChuteKey;

/// Who would have to go.
#[derive(Debug, Clone)]
pub struct Eviction<'a> {
    /// Where the room would be.
    pub pool: PoolIndex,
    /// Who goes; every one of them is needed.
    pub victims: Vec<Evictable<'a>>,
    /// What they earn together.
    pub loss: f64,
}

/// What a strategy thinks of possible victims.
pub trait Price {
    /// What a copy of this chute earns; none if it must stay.
    fn worth(&self, chute: &ChuteKey) -> Option<f64>;

    /// How many copies of this chute may go in all.
    fn removable(&self, chute: &ChuteKey) -> u32;
}

/// The eviction that loses least, over all servers; none if there is no set of victims that would do.
/// Copies of `chute` itself are no victims.
#[must_use]
pub fn cheapest<'a>(
    view: &View<'a>,
    room: &Room<'_, 'a>,
    need: &Need,
    chute: &ChuteKey,
    price: &dyn Price,
) -> Option<Eviction<'a>> {
    // Each chute is priced once, not each of its copies.
    let prices: Vec<Priced> = view
        .candidate_chutes()
        .iter()
        .map(|other| Priced {
            worth: price
                .worth(other)
                .filter(|worth| *worth >= 0.0 && *other != chute),
            removable: price.removable(other),
        })
        .collect();
    let mut best: Option<(Cover, PoolIndex, Vec<Item<'a>>)> = None;
    for pool in need.classes.iter().flat_map(|class| view.pools_of(*class)) {
        let pool = *pool;
        let unusable = view.server_of(pool).unavailable.is_some() || !room.has_disk(pool, need.disk_gb);
        if unusable || view.pools()[pool].total < need.gpu_count {
            continue;
        }
        let items = items(view, room, pool, &prices);
        let missing = need.gpu_count.saturating_sub(room.left(pool));
        let Some(cover) = cover(&items, missing) else {
            continue;
        };
        let is_better = |(other, other_pool, _): &(Cover, PoolIndex, _)| {
            cover.order(other).then(pool.cmp(other_pool)).is_lt()
        };
        if best.as_ref().is_none_or(is_better) {
            best = Some((cover, pool, items));
        }
    }
    let (cover, pool, items) = best?;
    let victims = items
        .iter()
        .enumerate()
        .filter(|(index, _)| cover.members & (1 << index) != 0)
        .map(|(_, item)| item.victim)
        .collect();
    Some(Eviction {
        pool,
        victims,
        loss: cover.loss,
    })
}

/// What is thought of a chute's copies.
#[derive(Debug, Clone, Copy)]
struct Priced {
    worth: Option<f64>,
    removable: u32,
}

/// A victim with its price.
#[derive(Debug, Clone, Copy)]
struct Item<'a> {
    victim: Evictable<'a>,
    group: usize,
    worth: f64,
    gpus: usize,
}

/// A set of victims, as bits over the items.
#[derive(Debug, Clone, Copy)]
struct Cover {
    loss: f64,
    count: u32,
    gpus: usize,
    members: u64,
}

impl Cover {
    const NONE: Self = Self {
        loss: 0.0,
        count: 0,
        gpus: 0,
        members: 0,
    };

    fn with(self, index: usize, item: &Item<'_>) -> Self {
        Self {
            loss: self.loss + item.worth,
            count: self.count + 1,
            gpus: self.gpus + item.gpus,
            members: self.members | (1 << index),
        }
    }

    /// Less is better. Of equal sets of one pool the one that was found first stays.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        let by_loss = self.loss.total_cmp(&other.loss);
        by_loss
            .then(self.count.cmp(&other.count))
            .then(self.gpus.cmp(&other.gpus))
    }
}

/// Possible victims of a pool. Of each chute only as many as may go in all, so that every set of them is
/// allowed.
fn items<'a>(view: &View<'a>, room: &Room<'_, 'a>, pool: PoolIndex, prices: &[Priced]) -> Vec<Item<'a>> {
    let mut items: Vec<Item<'a>> = Vec::new();
    for candidate in view.candidates(pool) {
        let Priced { worth, removable } = prices[candidate.group];
        let Some(worth) = worth else { continue };
        // 64 bits name the members; no server has so many deployments.
        if items.len() == 64 || room.is_victim(candidate.evictable.id) {
            continue;
        }
        let same = items.iter().filter(|item| item.group == candidate.group).count();
        if same >= usize::try_from(removable).unwrap_or(usize::MAX) {
            continue;
        }
        items.push(Item {
            victim: candidate.evictable,
            group: candidate.group,
            worth,
            gpus: candidate.evictable.gpus.len(),
        });
    }
    items
}

/// The best set that frees at least `missing` GPUs. A superfluous victim makes a set worse, even a
/// worthless one, so every member is needed.
fn cover(items: &[Item<'_>], missing: usize) -> Option<Cover> {
    if missing == 0 || items.iter().map(|item| item.gpus).sum::<usize>() < missing {
        return None;
    }
    let mut best: Vec<Option<Cover>> = vec![None; missing + 1];
    best[0] = Some(Cover::NONE);
    for (index, item) in items.iter().enumerate() {
        for freed in (0..missing).rev() {
            let Some(before) = best[freed] else { continue };
            let cover = before.with(index, item);
            let slot = &mut best[(freed + item.gpus).min(missing)];
            if slot.is_none_or(|other| cover.order(&other).is_lt()) {
                *slot = Some(cover);
            }
        }
    }
    best[missing]
}

//! The GPUs that one pass has left: a view's free GPUs without those that the pass has given away.
//!
//! Pools of one class lie in drawers by the number of GPUs they have left, the cheapest first, so that
//! finding the best one costs a few look-ups whatever the number of servers.

use std::collections::{BTreeMap, BTreeSet};

use protocol::id::{DeploymentId, GpuId};

use super::view::{Evictable, Need, PoolIndex, View};
use crate::state_machine::chute::ChuteKey;

/// What one GPU that would be left over on a server adds to its price, in percent: a large hole is worth
/// keeping whole, but not at any price.
const FRAGMENTATION_PERCENT: u64 = 1;

/// What is left.
#[derive(Debug)]
pub struct Room<'v, 'a> {
    view: &'v View<'a>,
    /// GPUs of each pool that were given away, from the front of its free ones.
    given: Vec<usize>,
    /// Disk left on each server, in GB.
    disk_gb: Vec<u32>,
    /// By class and by GPUs left: (cost, pool).
    drawers: Vec<Vec<BTreeSet<(u64, PoolIndex)>>>,
    victims: BTreeSet<&'a DeploymentId>,
    launched: BTreeMap<ChuteKey, u32>,
    evicted: BTreeMap<ChuteKey, u32>,
}

impl<'v, 'a> Room<'v, 'a> {
    /// All that is free.
    #[must_use]
    pub fn new(view: &'v View<'a>) -> Self {
        let mut drawers: Vec<Vec<BTreeSet<(u64, PoolIndex)>>> = vec![Vec::new(); view.class_count()];
        for (index, pool) in view.pools().iter().enumerate() {
            let server = &view.servers()[pool.server];
            if server.unavailable.is_some() || pool.free.is_empty() {
                continue;
            }
            let drawers = &mut drawers[pool.class];
            let left = pool.free.len();
            if drawers.len() <= left {
                drawers.resize(left + 1, BTreeSet::new());
            }
            drawers[left].insert((server.hourly_cost_usd_micros, index));
        }
        Self {
            view,
            given: vec![0; view.pools().len()],
            disk_gb: view.servers().iter().map(|server| server.disk_left_gb).collect(),
            drawers,
            victims: BTreeSet::new(),
            launched: BTreeMap::new(),
            evicted: BTreeMap::new(),
        }
    }

    /// The best pool that has room now: the cheapest class of servers, then the tightest fit.
    #[must_use]
    pub fn best(&self, need: &Need) -> Option<PoolIndex> {
        let mut best: Option<(u64, usize, PoolIndex)> = None;
        for class in &need.classes {
            let drawers = self.drawers[*class].iter().enumerate().skip(need.gpu_count);
            for (left, drawer) in drawers {
                let over = left - need.gpu_count;
                let percent = 100 + FRAGMENTATION_PERCENT * u64::try_from(over).unwrap_or(u64::MAX).min(100);
                for (cost, pool) in drawer {
                    let score = (cost.saturating_mul(percent), over, *pool);
                    if best.is_some_and(|best| best <= score) {
                        break;
                    }
                    if self.has_disk(*pool, need.disk_gb) {
                        best = Some(score);
                        break;
                    }
                }
            }
        }
        best.map(|(_, _, pool)| pool)
    }

    /// True if the pool's server has that much disk left.
    #[must_use]
    pub fn has_disk(&self, pool: PoolIndex, disk_gb: u32) -> bool {
        self.disk_gb[self.view.pools()[pool].server] >= disk_gb
    }

    /// Free GPUs that a pool has left.
    #[must_use]
    pub fn left(&self, pool: PoolIndex) -> usize {
        self.view.pools()[pool].free.len() - self.given[pool]
    }

    /// True if this pass takes the deployment down already.
    #[must_use]
    pub fn is_victim(&self, deployment: &DeploymentId) -> bool {
        self.victims.contains(deployment)
    }

    /// Copies of a chute that this pass launches.
    #[must_use]
    pub fn launched(&self, chute: &ChuteKey) -> u32 {
        self.launched.get(chute).copied().unwrap_or(0)
    }

    /// Copies of a chute that this pass takes down.
    #[must_use]
    pub fn evicted(&self, chute: &ChuteKey) -> u32 {
        self.evicted.get(chute).copied().unwrap_or(0)
    }

    /// Gives GPUs of a pool away: those of the victims, then free ones, which others could use at once. The
    /// caller has made sure that there are enough of them and that every victim is needed.
    pub fn take(
        &mut self,
        pool: PoolIndex,
        chute: &ChuteKey,
        need: &Need,
        victims: &[Evictable<'a>],
    ) -> Vec<GpuId> {
        let row = &self.view.pools()[pool];
        let from_victims = victims.iter().flat_map(|victim| victim.gpus);
        let mut gpus: Vec<GpuId> = from_victims.take(need.gpu_count).cloned().collect();
        let first = self.given[pool];
        let free_count = need.gpu_count - gpus.len();
        gpus.extend(row.free[first..first + free_count].iter().copied().cloned());
        self.give(pool, free_count);
        let disk_gb = &mut self.disk_gb[row.server];
        *disk_gb = disk_gb.saturating_sub(need.disk_gb);
        for victim in victims {
            self.retire(victim.id, victim.chute);
        }
        *self.launched.entry(chute.clone()).or_default() += 1;
        gpus
    }

    /// Says that this pass takes a deployment down.
    pub fn retire(&mut self, deployment: &'a DeploymentId, chute: &ChuteKey) {
        self.victims.insert(deployment);
        *self.evicted.entry(chute.clone()).or_default() += 1;
    }

    fn give(&mut self, pool: PoolIndex, count: usize) {
        let row = &self.view.pools()[pool];
        let left = self.left(pool);
        self.given[pool] += count;
        let entry = (self.view.server_of(pool).hourly_cost_usd_micros, pool);
        let drawers = &mut self.drawers[row.class];
        // A pool of an unavailable server lies in no drawer and must not get into one.
        if drawers.get_mut(left).is_some_and(|drawer| drawer.remove(&entry)) && left > count {
            drawers[left - count].insert(entry);
        }
    }
}

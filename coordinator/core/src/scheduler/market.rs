//! What the leader learnt of the network and keeps in memory: it is polled, it may be lost on a change of
//! leaders, so it is not in the log.
//!
//! Everything is optional. Unknown is not zero: a strategy that needs a number and does not have it leaves
//! the thing alone.

use std::collections::BTreeMap;

use protocol::hotkey::Hotkey;
use protocol::time::UnixMillis;

use crate::state_machine::chute::ChuteKey;

/// How long a chute's metrics are believed, in ms. They speak of the hour before they were read.
pub const METRICS_MEMORY_MS: u64 = 2 * 3_600_000;

/// All of it. [`Market::default`] is a leader that has just begun.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Market {
    /// When a validator's metrics were last read completely. Chutes that they do not list had no demand.
    pub metrics_read_at: BTreeMap<Hotkey, UnixMillis>,
    /// By chute.
    pub chutes: BTreeMap<ChuteKey, ChuteMarket>,
}

/// What is known of one chute on the whole network.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChuteMarket {
    /// Its last hour; none if no listing had it.
    pub metrics: Option<Metrics>,
    /// The validator's wishes.
    pub utilization: Option<Utilization>,
    /// When it was last used.
    pub last_invocation: LastInvocation,
    /// What an instance would earn per second if it were activated now; newer than the catalogue's.
    pub effective_multiplier: Option<f64>,
    /// Active instances of all miners, from the list of instances; newer than the metrics'.
    pub active_instances: Option<u32>,
    /// When those were counted; if that is not known, long ago.
    pub active_instances_read_at: UnixMillis,
}

/// One row of `/miner/metrics/`: the last hour on the whole network.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    /// Instances of all miners.
    pub instance_count: u32,
    /// Requests that were served.
    pub total_invocations: u64,
    /// Time that they took, in seconds.
    pub total_compute_time_s: f64,
    /// Weight of a second.
    pub compute_multiplier: f64,
    /// Requests that were refused; one request may be refused by several miners.
    pub rate_limit_count: u64,
    /// When it was read.
    pub read_at: UnixMillis,
}

/// One row of `/chutes/utilization`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Utilization {
    /// May grow; none if the row does not say.
    pub scalable: Option<bool>,
    /// Is being replaced by a new version.
    pub update_in_progress: bool,
    /// Instances that may be added.
    pub scale_allowance: Option<u32>,
    /// Instances that the validator wants.
    pub target_count: Option<u32>,
    /// When it was read.
    pub read_at: UnixMillis,
}

/// When a chute was last used, as far as we looked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LastInvocation {
    /// We do not know.
    #[default]
    Unknown,
    /// Then.
    At(UnixMillis),
    /// Never since then, when we began to look.
    NoneSince(UnixMillis),
}

impl ChuteMarket {
    /// Instances of all miners, if anything says so.
    #[must_use]
    pub fn instances(&self) -> Option<u32> {
        self.active_instances
            .or_else(|| self.metrics.as_ref().map(|metrics| metrics.instance_count))
    }

    /// When the number that [`ChuteMarket::instances`] gives was read.
    #[must_use]
    pub fn instances_read_at(&self) -> UnixMillis {
        match (&self.active_instances, &self.metrics) {
            (None, Some(metrics)) => metrics.read_at,
            _ => self.active_instances_read_at,
        }
    }

    /// Instances that may be added, if the validator says so.
    #[must_use]
    pub fn allowance(&self) -> Option<u32> {
        let utilization = self.utilization.as_ref()?;
        let by_target = || {
            utilization
                .target_count
                .zip(self.instances())
                .map(|(target, now)| target.saturating_sub(now))
        };
        utilization.scale_allowance.or_else(by_target)
    }
}

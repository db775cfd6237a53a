//! One periodic look at all that a validator lists, as one observation. Each resource is known, with the time
//! at which it was asked for, or unknown, with the reason; one failure does not hide the others.

use futures_util::future::{FutureExt, join_all};
use protocol::hotkey::Hotkey;
use protocol::time::UnixMillis;

use super::client::{Call, ValidatorApi};
use super::rows::{
    ActiveInstanceRow, BountyRow, ChuteRow, ImageRow, InstanceRow, JobRow, MetricRow, NodeRow,
    RollingUpdateRow, UtilizationRow,
};
use super::stream::Listing;
use crate::clock::Clock;

/// What one look at one resource brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observed<T> {
    /// Nothing that can be relied on: keep what was known before.
    Unknown {
        /// Why, for people.
        why: String,
    },
    /// The set as it was at some moment after `asked_at`.
    Known {
        /// When we asked. What happened to us after this moment may be missing from the rows.
        asked_at: UnixMillis,
        /// The rows that could be read.
        rows: Vec<T>,
        /// Rows that could not be read: while there are any, absence proves nothing.
        broken_rows: u64,
    },
}

impl<T> Observed<T> {
    /// The rows and the time, if this is known to be the whole set: only then does absence mean absence.
    #[must_use]
    pub fn complete(&self) -> Option<(UnixMillis, &[T])> {
        match self {
            Self::Known {
                asked_at,
                rows,
                broken_rows: 0,
            } => Some((*asked_at, rows)),
            _ => None,
        }
    }

    /// The rows that could be read, complete or not.
    #[must_use]
    pub fn rows(&self) -> &[T] {
        match self {
            Self::Unknown { .. } => &[],
            Self::Known { rows, .. } => rows,
        }
    }

    fn asked_at(&self) -> Option<UnixMillis> {
        match self {
            Self::Unknown { .. } => None,
            Self::Known { asked_at, .. } => Some(*asked_at),
        }
    }

    fn failure(&self) -> Option<&str> {
        match self {
            Self::Unknown { why } => Some(why),
            Self::Known { .. } => None,
        }
    }
}

/// All resources of one validator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    /// Whose they are.
    pub validator: Hotkey,
    /// The catalogue.
    pub chutes: Observed<ChuteRow>,
    /// The catalogue's images.
    pub images: Observed<ImageRow>,
    /// Our GPUs.
    pub nodes: Observed<NodeRow>,
    /// Our instances.
    pub instances: Observed<InstanceRow>,
    /// Jobs without instance.
    pub jobs: Observed<JobRow>,
    /// Open bounties.
    pub bounties: Observed<BountyRow>,
    /// Use in the last hour.
    pub metrics: Observed<MetricRow>,
    /// Load and targets.
    pub utilization: Observed<UtilizationRow>,
    /// Redeploys under way.
    pub rolling_updates: Observed<RollingUpdateRow>,
    /// Everybody's active instances.
    pub active_instances: Observed<ActiveInstanceRow>,
    /// The validator's clock minus ours, in ms.
    pub clock_offset_ms: Option<i64>,
}

impl Observation {
    /// When the first of what is known was asked for; none if nothing is.
    #[must_use]
    pub fn read_at(&self) -> Option<UnixMillis> {
        [
            self.chutes.asked_at(),
            self.images.asked_at(),
            self.nodes.asked_at(),
            self.instances.asked_at(),
            self.jobs.asked_at(),
            self.bounties.asked_at(),
            self.metrics.asked_at(),
            self.utilization.asked_at(),
            self.rolling_updates.asked_at(),
            self.active_instances.asked_at(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Name and reason of each resource that is unknown.
    #[must_use]
    pub fn unknown(&self) -> Vec<(&'static str, &str)> {
        [
            ("chutes", self.chutes.failure()),
            ("images", self.images.failure()),
            ("nodes", self.nodes.failure()),
            ("instances", self.instances.failure()),
            ("jobs", self.jobs.failure()),
            ("bounties", self.bounties.failure()),
            ("metrics", self.metrics.failure()),
            ("utilization", self.utilization.failure()),
            ("rolling_updates", self.rolling_updates.failure()),
            ("active_instances", self.active_instances.failure()),
        ]
        .into_iter()
        .filter_map(|(name, why)| why.map(|why| (name, why)))
        .collect()
    }
}

/// Asks for everything at once.
pub async fn observe(api: &dyn ValidatorApi, clock: &dyn Clock) -> Observation {
    let mut chutes = unasked();
    let mut images = unasked();
    let mut nodes = unasked();
    let mut instances = unasked();
    let mut jobs = unasked();
    let mut bounties = unasked();
    let mut metrics = unasked();
    let mut utilization = unasked();
    let mut rolling_updates = unasked();
    let mut active_instances = unasked();
    join_all([
        look(api.chutes(), clock, &mut chutes).boxed(),
        look(api.images(), clock, &mut images).boxed(),
        look(api.nodes(), clock, &mut nodes).boxed(),
        look(api.instances(), clock, &mut instances).boxed(),
        look(api.jobs(), clock, &mut jobs).boxed(),
        look(api.bounties(), clock, &mut bounties).boxed(),
        look(api.metrics(), clock, &mut metrics).boxed(),
        look(api.utilization(), clock, &mut utilization).boxed(),
        look(api.rolling_updates(), clock, &mut rolling_updates).boxed(),
        look(api.active_instances(), clock, &mut active_instances).boxed(),
    ])
    .await;
    Observation {
        validator: api.hotkey().clone(),
        chutes,
        images,
        nodes,
        instances,
        jobs,
        bounties,
        metrics,
        utilization,
        rolling_updates,
        active_instances,
        clock_offset_ms: api.clock_offset_ms(),
    }
}

fn unasked<T>() -> Observed<T> {
    Observed::Unknown {
        why: "not asked".to_owned(),
    }
}

async fn look<T>(call: Call<'_, Listing<T>>, clock: &dyn Clock, into: &mut Observed<T>) {
    let asked_at = clock.now();
    *into = match call.await {
        Ok(Listing::Known { rows, broken_rows }) => Observed::Known {
            asked_at,
            rows,
            broken_rows,
        },
        Ok(Listing::Unknown) => Observed::Unknown {
            why: "the listing is empty or was cut".to_owned(),
        },
        Err(error) => Observed::Unknown {
            why: error.to_string(),
        },
    };
}

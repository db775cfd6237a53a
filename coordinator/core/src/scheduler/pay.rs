//! What a copy of a chute earns in an hour, by the rules of pay in force (`scheduling`, sections 4.4 and 5).
//!
//! | rules | unit | one more copy | a running copy |
//! |---|---|---|---|
//! | 2025-09 | compute units | demand / (n + 1); the first also the bounty | demand / n |
//! | 2026 | effective multiplier | the multiplier, however many there are | the same |
//!
//! What cannot be known is none, never 0: a leader that has just begun must not think that all it runs is
//! worthless.

use std::collections::BTreeSet;

use protocol::gpu::{GPU_TYPES, gpu_type_of_short_ref};

use super::market::METRICS_MEMORY_MS;
use super::view::{ChuteView, View};
use crate::state_machine::command::PayProfile;

/// By how many miners one request may be refused (2025-09).
const REFUSALS_PER_REQUEST: f64 = 5.0;
/// From how many instances on refusals are divided by that.
const REFUSALS_SHARED_FROM: u32 = 5;
/// Factor of private chutes and jobs under 2025-09.
const PRIVATE_FACTOR_2025: f64 = 16.0;
/// Factor of private chutes and jobs under 2026.
const PRIVATE_FACTOR_2026: f64 = 2.0;
const SECONDS_PER_HOUR: f64 = 3600.0;

/// What one more copy would earn in an hour, when `added` copies are on their way that the network does not
/// count yet; or why that is not known.
///
/// # Errors
/// Why it is not known.
pub fn gain(view: &View<'_>, chute: &ChuteView<'_, '_>, added: u32) -> Result<f64, String> {
    match view.pay_profile() {
        PayProfile::Of2026 => {
            multiplier(chute).ok_or_else(|| "its effective multiplier is not known".to_owned())
        }
        PayProfile::Of2025September if chute.is_private() => by_the_second(chute),
        PayProfile::Of2025September => {
            #[expect(clippy::cast_precision_loss, reason = "bounties are far below 2^53")]
            let bounty = chute
                .bounty()
                .filter(|_| added == 0 && chute.own_copies().live == 0)
                .map(|amount| amount as f64);
            match (demand(view, chute), bounty) {
                (Some(demand), bounty) => Ok(
                    demand.compute_units / f64::from(demand.instances + added + 1) + bounty.unwrap_or(0.0)
                ),
                (None, Some(bounty)) => Ok(bounty),
                (None, None) => Err("no demand is known of it".to_owned()),
            }
        }
    }
}

/// What a job of this chute would earn in an hour.
///
/// # Errors
/// Why it is not known.
pub fn job_gain(view: &View<'_>, chute: &ChuteView<'_, '_>) -> Result<f64, String> {
    match view.pay_profile() {
        PayProfile::Of2026 => gain(view, chute, 0),
        PayProfile::Of2025September => by_the_second(chute),
    }
}

/// What a running copy earns in an hour; none if that is not known.
#[must_use]
pub fn worth(view: &View<'_>, chute: &ChuteView<'_, '_>) -> Option<f64> {
    match view.pay_profile() {
        PayProfile::Of2026 => multiplier(chute),
        PayProfile::Of2025September => match demand(view, chute) {
            Some(demand) => Some(demand.compute_units / f64::from(demand.instances.max(1))),
            // The validator lists every chute that was used in the last hour.
            None => chute.demand_is_known().then_some(0.0),
        },
    }
}

/// Demand of the last hour, served and refused.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Demand {
    /// Compute units.
    pub compute_units: f64,
    /// Instances that share it.
    pub instances: u32,
    /// Requests that were refused.
    pub refused: u64,
}

/// The demand for a chute in the last hour; none if no recent metrics have it.
#[must_use]
pub fn demand(view: &View<'_>, chute: &ChuteView<'_, '_>) -> Option<Demand> {
    let metrics = chute.market()?.metrics.as_ref()?;
    if view.now().since(metrics.read_at) >= METRICS_MEMORY_MS {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "counts of one hour are far below 2^53")]
    let (refused, invocations) = (
        metrics.rate_limit_count as f64,
        metrics.total_invocations.max(1) as f64,
    );
    let refused = if metrics.instance_count >= REFUSALS_SHARED_FROM {
        refused / REFUSALS_PER_REQUEST
    } else {
        refused
    };
    let served = metrics.total_compute_time_s * metrics.compute_multiplier;
    let compute_units = served + refused * served / invocations;
    (compute_units.is_finite() && compute_units >= 0.0).then_some(Demand {
        compute_units,
        instances: metrics.instance_count,
        refused: metrics.rate_limit_count,
    })
}

fn multiplier(chute: &ChuteView<'_, '_>) -> Option<f64> {
    let published = chute.effective_multiplier().filter(|m| m.is_finite());
    published.or_else(|| {
        let factor = if chute.is_private() {
            PRIVATE_FACTOR_2026
        } else {
            1.0
        };
        base_multiplier(chute.gpu_count(), chute.supported_gpus()).map(|base| base * factor)
    })
}

fn by_the_second(chute: &ChuteView<'_, '_>) -> Result<f64, String> {
    base_multiplier(chute.gpu_count(), chute.supported_gpus())
        .map(|base| base * PRIVATE_FACTOR_2025 * SECONDS_PER_HOUR)
        .ok_or_else(|| "the validator's price of its GPU types is not known".to_owned())
}

/// Compute multiplier without any factor: GPUs times the price of the **cheapest** type that it runs on,
/// in parts of the dearest type there is. Which GPU it really gets does not matter.
#[must_use]
pub fn base_multiplier(gpu_count: u32, supported_gpus: &BTreeSet<String>) -> Option<f64> {
    let dearest = GPU_TYPES.iter().map(|gpu| gpu.hourly_usd_micros).max()?;
    let cheapest = supported_gpus
        .iter()
        .filter_map(|short_ref| gpu_type_of_short_ref(short_ref))
        .map(|gpu| gpu.hourly_usd_micros)
        .min()?;
    #[expect(clippy::cast_precision_loss, reason = "prices are far below 2^53")]
    let unit = cheapest as f64 / dearest as f64;
    Some(f64::from(gpu_count) * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_supported_type_decides() {
        for (gpu_count, supported, expected) in [
            (1, &["b200"][..], Some(1.0)),
            (1, &["a6000", "h100"][..], Some(0.5 / 4.5)),
            (8, &["h100_sxm"][..], Some(8.0 * 2.35 / 4.5)),
            (1, &["abacus"][..], None),
        ] {
            let supported = supported
                .iter()
                .map(|short_ref| (*short_ref).to_owned())
                .collect();
            assert_eq!(base_multiplier(gpu_count, &supported), expected);
        }
    }
}

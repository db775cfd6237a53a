//! What instance time is worth under the rule of 2026: seconds times multiplier, 0.3 of it while starting,
//! nothing for a public instance that ends before it has vested. Pure.
//!
//! The multiplier is set at activation (with the bounty's boost), stays for 2 h, drifts towards the chute's
//! own value and reaches it after 8 h.

use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

const HOUR_MS: u64 = 3_600_000;

/// The numbers of the rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PayRule {
    /// A public instance that ends younger than this (since activation) earned nothing.
    pub vesting_seconds: u64,
    /// Share of the multiplier that the time before activation earns, in thousandths.
    pub startup_milli: u32,
    /// Multiplier of private chutes and jobs, in thousandths.
    pub private_milli: u32,
    /// Boost by a bounty at its creation and after 180 min, in thousandths.
    pub bounty_boost_milli: (u32, u32),
}

impl Default for PayRule {
    fn default() -> Self {
        Self {
            vesting_seconds: 3_600,
            startup_milli: 300,
            private_milli: 2_000,
            bounty_boost_milli: (1_500, 2_500),
        }
    }
}

impl PayRule {
    /// Boost of an open bounty of this age.
    #[must_use]
    pub fn bounty_boost(&self, age_ms: u64) -> f64 {
        let (low, high) = self.bounty_boost_milli;
        let minutes = (age_ms as f64 / 60_000.0).min(180.0);
        (f64::from(low) + (f64::from(high) - f64::from(low)) * minutes / 180.0) / 1000.0
    }
}

/// The life of one instance, as far as pay goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Life {
    /// Claimed.
    pub created_at: UnixMillis,
    /// Activated, if ever.
    pub activated_at: Option<UnixMillis>,
    /// Deleted, or billing stopped.
    pub ended_at: Option<UnixMillis>,
    /// Anyone may call it: only such instances must vest.
    pub public: bool,
    /// It ended by the validator's own will (old version, idle, job done): paid without vesting.
    pub valid_termination: bool,
    /// Multiplier at activation.
    pub multiplier: f64,
    /// The chute's own multiplier, without bounty.
    pub target: f64,
}

/// Active seconds of an activated instance, whatever becomes of it.
#[must_use]
pub fn paid_seconds(life: &Life, now: UnixMillis) -> f64 {
    life.activated_at.map_or(0.0, |activated| {
        end_of(life, now).since(activated) as f64 / 1000.0
    })
}

/// What the instance is worth so far. An instance that still lives counts in full.
#[must_use]
pub fn score(life: &Life, rule: &PayRule, now: UnixMillis) -> f64 {
    let Some(activated) = life.activated_at else {
        return 0.0;
    };
    let end = end_of(life, now);
    let lived_ms = end.since(activated);
    let ended = life.ended_at.is_some_and(|at| at <= now);
    let vested = !life.public || lived_ms >= rule.vesting_seconds * 1000;
    if ended && !vested && !life.valid_termination {
        return 0.0;
    }
    let startup = activated.since(life.created_at) as f64 / 1000.0 * f64::from(rule.startup_milli) / 1000.0
        * life.multiplier;
    let mut multiplier = life.multiplier;
    let (mut active, mut from_ms, mut hour) = (0.0, 0, 0_u64);
    while from_ms < lived_ms {
        let until_ms = lived_ms.min(from_ms + HOUR_MS);
        multiplier = drifted(multiplier, life.target, hour);
        active += (until_ms - from_ms) as f64 / 1000.0 * multiplier;
        (from_ms, hour) = (until_ms, hour + 1);
    }
    startup + active
}

fn end_of(life: &Life, now: UnixMillis) -> UnixMillis {
    life.ended_at.map_or(now, |end| end.min(now))
}

/// One hourly step of the drift, at so many whole hours since activation.
fn drifted(multiplier: f64, target: f64, hour: u64) -> f64 {
    match hour {
        0..=2 => multiplier,
        3..=7 => {
            let share = ((hour as f64 - 2.0) / 6.0).powi(2);
            multiplier * (1.0 - share) + target * share
        }
        _ => target,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: UnixMillis = UnixMillis(1_735_689_600_000);

    fn life(activated_after_s: Option<u64>, lived_s: Option<u64>) -> Life {
        let activated_at = activated_after_s.map(|s| START + s * 1000);
        Life {
            created_at: START,
            activated_at,
            ended_at: lived_s.map(|s| activated_at.unwrap_or(START) + s * 1000),
            public: true,
            valid_termination: false,
            multiplier: 0.5,
            target: 0.5,
        }
    }

    #[test]
    fn seconds_are_weighted_and_must_vest() {
        let later = START + 10 * 24 * HOUR_MS;
        let private = |l: Life| Life { public: false, ..l };
        let valid = |l: Life| Life {
            valid_termination: true,
            ..l
        };
        for (name, life, now, expected) in [
            ("never activated", life(None, Some(100)), later, 0.0),
            (
                "vested",
                life(Some(100), Some(3_600)),
                later,
                100.0 * 0.15 + 3_600.0 * 0.5,
            ),
            ("one second short", life(Some(100), Some(3_599)), later, 0.0),
            (
                "private need not vest",
                private(life(Some(0), Some(60))),
                later,
                30.0,
            ),
            (
                "ended by the validator",
                valid(life(Some(0), Some(60))),
                later,
                30.0,
            ),
            ("alive counts", life(Some(10), None), START + 70_000, 1.5 + 30.0),
        ] {
            let score = score(&life, &PayRule::default(), now);
            assert!((score - expected).abs() < 1e-9, "{name}: {score}");
        }
    }

    #[test]
    fn a_bounty_lifts_the_multiplier_which_drifts_back() {
        let rule = PayRule::default();
        for (minutes, boost) in [(0, 1.5), (90, 2.0), (180, 2.5), (900, 2.5)] {
            assert!((rule.bounty_boost(minutes * 60_000) - boost).abs() < 1e-9);
        }
        let boosted = Life {
            multiplier: 1.0,
            ..life(Some(0), None)
        };
        let earned = |hours: u64| score(&boosted, &rule, START + hours * HOUR_MS);
        assert!(
            (earned(3) - 3.0 * 3600.0).abs() < 1e-6,
            "unchanged for the first hours"
        );
        let ninth = earned(9) - earned(8);
        assert!((ninth - 1800.0).abs() < 1e-6, "at the chute's own value: {ninth}");
        let fifth = (earned(5) - earned(4)) / 3600.0;
        assert!(fifth < 1.0 && fifth > 0.5, "on the way: {fifth}");
    }

    #[test]
    fn paid_seconds_are_plain_active_time() {
        let now = START + 100_000;
        for (life, expected) in [
            (life(None, None), 0.0),
            (life(Some(10), None), 90.0),
            (life(Some(10), Some(5)), 5.0),
        ] {
            assert!((paid_seconds(&life, now) - expected).abs() < 1e-9);
        }
    }
}

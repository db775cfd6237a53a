//! When a launch is admitted: the capacity rules (`validator-protocol`, section 6.3), checked once at the
//! token and again at the claim. Pure.

/// All that the rules look at, for one chute and one miner.
#[derive(Debug, Clone, Default)]
pub(crate) struct Capacity {
    /// Instances of the chute, started ones included.
    pub(crate) total: u32,
    /// Of these, active and verified.
    pub(crate) active: u32,
    /// Of all, the asking miner's.
    pub(crate) yours: u32,
    /// What the autoscaler wants.
    pub(crate) target: u32,
    /// A rolling update runs; how many launches the miner has left in it, if quotas are kept.
    pub(crate) rolling_update: Option<Option<u32>>,
    pub(crate) private: bool,
    pub(crate) bounty: bool,
    /// Job launches skip all of it.
    pub(crate) job: bool,
}

/// Why a launch is locked out: HTTP 423.
pub(crate) fn admit(capacity: &Capacity) -> Result<(), &'static str> {
    let c = capacity;
    if c.job {
        return Ok(());
    }
    if c.private {
        if c.active == 0 && !c.bounty {
            return Err("private chute without an instance or a bounty");
        }
        if c.target > 0 && c.active >= c.target {
            return Err("private chute is at its target capacity");
        }
        return Ok(());
    }
    if c.total <= c.target + 2 && c.active == 0 {
        return Ok(());
    }
    if let Some(quota) = c.rolling_update
        && c.total + 2 >= c.target
    {
        return match quota {
            None | Some(1..) => Ok(()),
            Some(0) => Err("a rolling update is in progress and you have no launches left in it"),
        };
    }
    if c.total >= c.target {
        return Err("chute is at its target capacity");
    }
    if c.target - c.total <= 2 && c.total > 0 && c.yours == c.total {
        return Err("all existing instances are yours");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_apply_in_their_order() {
        let base = Capacity {
            target: 5,
            ..Capacity::default()
        };
        let with = |total, active, yours| Capacity {
            total,
            active,
            yours,
            ..base.clone()
        };
        let rolling = |quota, c: Capacity| Capacity {
            rolling_update: Some(quota),
            ..c
        };
        let private = |active, bounty, target| Capacity {
            private: true,
            active,
            bounty,
            target,
            ..base.clone()
        };
        for (name, capacity, admitted) in [
            ("nothing runs", with(0, 0, 0), true),
            ("many start, none active", with(7, 0, 0), true),
            ("too many start", with(8, 0, 0), false),
            ("room", with(2, 1, 2), true),
            ("monopoly near the target", with(3, 1, 3), false),
            ("others too", with(3, 1, 2), true),
            ("full", with(5, 5, 0), false),
            ("rolling with quota", rolling(Some(1), with(5, 5, 5)), true),
            ("rolling without quotas", rolling(None, with(5, 5, 5)), true),
            ("rolling, none left", rolling(Some(0), with(5, 5, 5)), false),
            (
                "rolling, far below the target",
                rolling(Some(0), with(2, 1, 1)),
                true,
            ),
            ("private, cold", private(0, false, 1), false),
            ("private, bounty", private(0, true, 1), true),
            ("private, warm, room", private(1, false, 2), true),
            ("private, full", private(2, true, 2), false),
            ("private, no target", private(2, false, 0), true),
            (
                "job",
                Capacity {
                    job: true,
                    ..with(9, 9, 9)
                },
                true,
            ),
        ] {
            assert_eq!(admit(&capacity).is_ok(), admitted, "{name}");
        }
    }
}

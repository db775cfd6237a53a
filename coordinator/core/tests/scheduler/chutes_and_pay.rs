//! Which chute, and how many of it.

use coordinator_core::scheduler::market::{Market, Utilization};
use coordinator_core::scheduler::strategy::{Decision, Trigger};
use coordinator_core::state_machine::Command;
use coordinator_core::state_machine::command::PayProfile;
use protocol::time::UnixMillis;

use crate::fleet::{
    Fleet, MINUTE, definition, demand, key, launches, multiplier, reason_for_nothing, version,
};

const PROFILES: [PayProfile; 2] = [PayProfile::Of2025September, PayProfile::Of2026];

fn values(decisions: &[Decision]) -> Vec<(String, f64)> {
    let launches = launches(decisions);
    launches
        .iter()
        .map(|launch| {
            (
                launch.chute.chute.to_string(),
                (launch.value * 1000.0).round() / 1000.0,
            )
        })
        .collect()
}

fn row(name: &str, value: f64) -> (String, f64) {
    (name.to_owned(), value)
}

#[test]
fn a_03_demand_is_shared_with_one_more_copy() {
    let mut fleet = Fleet::new(PayProfile::Of2025September);
    fleet.server("s", 1, "a6000", 1.0);
    let c1 = fleet.chute("c1", 1, &["a6000"]);
    let c2 = fleet.chute("c2", 1, &["a6000"]);
    fleet.know(&c1, demand(36_000.0, 3600, 1, 0));
    fleet.know(&c2, demand(36_000.0, 3600, 5, 18_000));
    let decisions = fleet.plan(Trigger::Tick);
    assert_eq!(
        values(&decisions),
        [row("c1", 18_000.0)],
        "exactly one launch fits"
    );
    fleet.carry_out(&decisions);

    let mut fleet = Fleet::new(PayProfile::Of2025September);
    fleet.server("s", 2, "a6000", 1.0);
    let c1 = fleet.chute("c1", 1, &["a6000"]);
    let c2 = fleet.chute("c2", 1, &["a6000"]);
    fleet.know(&c1, demand(36_000.0, 3600, 1, 0));
    fleet.know(&c2, demand(36_000.0, 3600, 5, 18_000));
    let decisions = fleet.plan(Trigger::Tick);
    assert_eq!(values(&decisions), [row("c1", 18_000.0), row("c2", 12_000.0)]);
    fleet.carry_out(&decisions);
}

#[test]
fn a_05_pay_per_dollar_decides_under_2026() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("big", 8, "h200", 2.0);
    fleet.server("small", 1, "a6000", 0.5);
    let c1 = fleet.chute("c1", 8, &["h200"]);
    let c2 = fleet.chute("c2", 1, &["a6000"]);
    fleet.know(&c1, multiplier(9.9, 1));
    fleet.know(&c2, multiplier(0.9, 1));
    let decisions = fleet.plan(Trigger::Tick);
    assert_eq!(values(&decisions), [row("c2", 1.8), row("c1", 0.619)]);
    let placed = fleet.carry_out(&decisions[..1]);
    assert_eq!(fleet.deployment(&placed[0]).chute, c2);
    fleet.server("small2", 1, "a6000", 0.5);
    let decisions = fleet.plan(Trigger::Tick);
    assert_eq!(values(&decisions), [row("c1", 0.619)], "c2 is pending");
    assert_eq!(reason_for_nothing(&decisions, &c2), "a copy is starting");
    fleet.carry_out(&decisions);
}

#[test]
fn a_06_copies_have_a_cap_and_need_demand() {
    for (own, instances, refused, launched) in [(3, 9, 50, 0), (2, 2, 0, 0), (2, 2, 7, 1), (2, 3, 0, 1)] {
        let mut fleet = Fleet::new(PayProfile::Of2025September);
        fleet.server("s", 8, "a6000", 1.0);
        let c = fleet.chute("c", 1, &["a6000"]);
        for _ in 0..own {
            fleet.serving(&c, "s");
        }
        fleet.know(&c, demand(36_000.0, 3600, instances, refused));
        let decisions = fleet.plan(Trigger::Tick);
        assert_eq!(
            launches(&decisions).len(),
            launched,
            "own {own} of {instances}, refused {refused}: {decisions:?}"
        );
        fleet.carry_out(&decisions);
    }
}

#[test]
fn a_06_has_no_cap_under_2026() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("s", 8, "a6000", 1.0);
    let c = fleet.chute("c", 1, &["a6000"]);
    fleet.know(&c, multiplier(1.0, 4));
    for copy in 0..4 {
        let placed = fleet.go(Trigger::Tick);
        assert_eq!(placed.len(), 1, "one after the other, copy {copy}");
        fleet.grant_tokens();
        fleet.bring_up(&placed[0]);
    }
}

#[test]
fn a_07_what_may_not_grow_is_left_alone() {
    let no_growth = Utilization {
        scalable: Some(false),
        ..Utilization::default()
    };
    let updating = Utilization {
        update_in_progress: true,
        ..Utilization::default()
    };
    let full = Utilization {
        scale_allowance: Some(0),
        ..Utilization::default()
    };
    for profile in PROFILES {
        for utilization in [&no_growth, &updating, &full] {
            let mut fleet = Fleet::new(profile);
            fleet.server("s", 2, "a6000", 1.0);
            let c = fleet.chute("c", 1, &["a6000"]);
            let other = fleet.chute("other", 1, &["a6000"]);
            for chute in [&c, &other] {
                fleet.know(chute, demand(36_000.0, 3600, 1, 0));
            }
            // However long ago the validator said so: there is nothing newer.
            fleet.utilization(&c, utilization.clone());
            fleet.pass(30 * MINUTE);
            let decisions = fleet.plan(Trigger::Tick);
            let launched: Vec<_> = launches(&decisions).iter().map(|l| l.chute.clone()).collect();
            assert!(
                launched.contains(&other) && !launched.contains(&c),
                "{decisions:?}"
            );
            fleet.carry_out(&decisions);
        }
    }
}

#[test]
fn a_08_a_refused_token_lets_the_next_chute_in() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 1, "a6000", 1.0);
        let best = fleet.chute("best", 1, &["a6000"]);
        let next = fleet.chute("next", 1, &["a6000"]);
        fleet.know(&best, demand(72_000.0, 3600, 1, 0));
        fleet.know(&next, demand(36_000.0, 3600, 1, 0));
        fleet.market.chutes.get_mut(&best).unwrap().effective_multiplier = Some(2.0);
        fleet.market.chutes.get_mut(&next).unwrap().effective_multiplier = Some(1.0);
        let placed = fleet.go(Trigger::Tick);
        assert_eq!(fleet.deployment(&placed[0]).chute, best);
        assert_eq!(fleet.refuse_tokens(423), 1);
        assert!(fleet.state.deployments().is_empty(), "no row remains");
        assert_eq!(fleet.free_gpus(), 1, "no GPU remains");
        let decisions = fleet.plan(Trigger::Tick);
        assert!(reason_for_nothing(&decisions, &best).contains("cools down"));
        let placed = fleet.carry_out(&decisions);
        assert_eq!(fleet.deployment(&placed[0]).chute, next);
        // The pause ends.
        fleet.refuse_tokens(423);
        fleet.pass(31_000);
        let placed = fleet.go(Trigger::Tick);
        assert_eq!(fleet.deployment(&placed[0]).chute, best);
    }
}

#[test]
fn a_09_a_new_chute_gets_one_copy() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 4, "a6000", 1.0);
        let c = fleet.chute("c", 1, &["a6000"]);
        let first = fleet.go(Trigger::ChuteCreated(c.clone()));
        fleet.chute("c", 1, &["a6000"]);
        let second = fleet.go(Trigger::ChuteCreated(c.clone()));
        assert_eq!((first.len(), second.len()), (1, 0), "the same event twice");

        let job_only = fleet.publish(coordinator_core::state_machine::chute::ChuteDefinition {
            serves_requests: false,
            ..definition("job-only", 1, &["a6000"])
        });
        let decisions = fleet.plan(Trigger::ChuteCreated(job_only.clone()));
        assert!(launches(&decisions).is_empty());
        assert_eq!(
            reason_for_nothing(&decisions, &job_only),
            "the chute only runs jobs"
        );
        fleet.know(&job_only, demand(36_000.0, 3600, 1, 0));
        assert!(
            !launches(&fleet.plan(Trigger::Tick))
                .iter()
                .any(|l| l.chute == job_only)
        );
    }
}

#[test]
fn a_37_what_was_missed_is_found_by_the_next_tick() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 2, "a6000", 1.0);
        let c = fleet.chute("c", 1, &["a6000"]);
        let runs_jobs = fleet.chute("jobs", 1, &["a6000"]);
        // The polls found them; no event came.
        fleet.bounty(&c, 100);
        let job = fleet.offer_job("j", &runs_jobs, 10);
        let decisions = fleet.plan(Trigger::Tick);
        let found = launches(&decisions);
        assert_eq!(found[0].job.as_ref(), Some(&job));
        assert_eq!(found[1].chute, c);
        fleet.carry_out(&decisions);
    }
}

#[test]
fn a_40_our_own_churn_pauses_a_chute_while_that_rule_is_on() {
    use coordinator_core::scheduler::strategy::Scheduler;
    use coordinator_core::scheduler::value_per_cost::ValuePerCost;
    use coordinator_core::scheduler::view::View;
    for by_us in [false, true] {
        let mut fleet = Fleet::new(PayProfile::Of2026);
        fleet.server("s", 1, "a6000", 1.0);
        let c = fleet.chute("c", 1, &["a6000"]);
        fleet.know(&c, multiplier(1.0, 3));
        let id = fleet.serving(&c, "s");
        fleet.pass(90 * MINUTE);
        if by_us {
            fleet.ok(Command::StopDeployments {
                deployments: vec![id],
                reason: coordinator_core::state_machine::deployment::StopReason::Operator(
                    "a test".to_owned(),
                ),
                allowance: coordinator_core::state_machine::command::Allowance::default(),
            });
        } else {
            let instance = fleet.deployment(&id).instance.clone().unwrap();
            fleet.ok(Command::RecordInstanceDeleted {
                config: None,
                instance,
                cause: "scaled down".to_owned(),
            });
        }
        fleet.drain();
        fleet.pass(30 * MINUTE);
        let rule_is_on = Scheduler::new(Box::new(ValuePerCost {
            churn_pause_ms: 120 * MINUTE,
        }));
        let view = View::new(&fleet.state, &fleet.market);
        let plan = rule_is_on.propose(&view, &Trigger::Tick, &|| 0);
        assert_eq!(launches(&plan.decisions).is_empty(), by_us, "{plan:?}");
        let rule_is_off = fleet.plan(Trigger::Tick);
        assert_eq!(launches(&rule_is_off).len(), 1);
        fleet.pass(91 * MINUTE);
        let view = View::new(&fleet.state, &fleet.market);
        let plan = rule_is_on.propose(&view, &Trigger::Tick, &|| 0);
        assert_eq!(launches(&plan.decisions).len(), 1, "two hours are over");
    }
}

#[test]
fn a_41_a_new_version_is_launched_beside_the_old_one_under_2026() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("s", 1, "a6000", 1.0);
    let c = fleet.chute("c", 1, &["a6000"]);
    fleet.know(&c, multiplier(1.0, 1));
    let old = fleet.serving(&c, "s");
    fleet.publish(coordinator_core::state_machine::chute::ChuteDefinition {
        version: version("v2"),
        ..definition("c", 1, &["a6000"])
    });
    fleet.bounty(&c, 100);
    fleet.pass(120 * MINUTE);
    let decisions = fleet.plan(Trigger::Bounty(c.clone()));
    assert!(
        launches(&decisions).is_empty(),
        "nobody is evicted for it: {decisions:?}"
    );
    fleet.server("s2", 1, "a6000", 1.0);
    let placed = fleet.go(Trigger::Bounty(c.clone()));
    assert_eq!(fleet.deployment(&placed[0]).version, version("v2"));
    assert_eq!(
        fleet.deployment(&old).version,
        version("v1"),
        "the old copy runs on"
    );
    fleet.server("s3", 1, "a6000", 1.0);
    assert!(
        launches(&fleet.plan(Trigger::Bounty(c))).is_empty(),
        "one v2 launch"
    );
}

#[test]
fn many_idle_gpus_are_filled_in_one_pass() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    for number in 0..13 {
        fleet.server(
            &format!("s{number:02}"),
            8,
            "a6000",
            0.3 + 0.01 * f64::from(number),
        );
    }
    for number in 0..10 {
        let chute = fleet.chute(&format!("c{number}"), 1, &["a6000"]);
        fleet.know(&chute, multiplier(1.0 + f64::from(number), 4));
        let wanted = Utilization {
            scale_allowance: Some(20),
            ..Utilization::default()
        };
        fleet.utilization(&chute, wanted);
    }
    assert_eq!(fleet.go(Trigger::Tick).len(), 104);
    assert_eq!(fleet.free_gpus(), 0);
    let best = fleet.state.deployments_of(&key("c9")).count();
    assert_eq!(best, 20, "the best chute first, as far as it may grow");
}

#[test]
fn a_leader_that_knows_nothing_of_the_market_places_nothing_by_value() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 2, "abacus", 1.0);
        let c = fleet.chute("c", 1, &["abacus"]);
        fleet.market = Market::default();
        let decisions = fleet.plan(Trigger::Tick);
        assert!(launches(&decisions).is_empty());
        assert!(
            reason_for_nothing(&decisions, &c).contains("known"),
            "{decisions:?}"
        );
    }
}

#[test]
fn metrics_that_are_too_old_are_not_believed() {
    let mut fleet = Fleet::new(PayProfile::Of2025September);
    fleet.server("s", 2, "a6000", 1.0);
    let c = fleet.chute("c", 1, &["a6000"]);
    fleet.know(&c, demand(36_000.0, 3600, 1, 0));
    fleet
        .market
        .chutes
        .get_mut(&c)
        .unwrap()
        .metrics
        .as_mut()
        .unwrap()
        .read_at = UnixMillis(fleet.now.0 - 121 * MINUTE);
    assert!(launches(&fleet.plan(Trigger::Tick)).is_empty());
}

#[test]
fn a_private_chute_waits_for_a_bounty() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 2, "a6000", 1.0);
        let c = fleet.publish(coordinator_core::state_machine::chute::ChuteDefinition {
            preemptible: false,
            ..definition("private", 1, &["a6000"])
        });
        assert!(launches(&fleet.plan(Trigger::Tick)).is_empty());
        assert!(launches(&fleet.plan(Trigger::ChuteCreated(c.clone()))).is_empty());
        fleet.bounty(&c, 100);
        assert_eq!(fleet.go(Trigger::Tick).len(), 1);
    }
}

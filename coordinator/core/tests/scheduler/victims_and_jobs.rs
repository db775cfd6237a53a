//! Who must go for whom, and jobs.

use coordinator_core::scheduler::market::{ChuteMarket, LastInvocation, Market};
use coordinator_core::scheduler::strategy::{Decision, Trigger};
use coordinator_core::state_machine::command::{Allowance, PayProfile, Rejection};
use coordinator_core::state_machine::deployment::{Phase, StopReason};
use coordinator_core::state_machine::effect::EffectKind;
use coordinator_core::state_machine::{Command, Reply};
use protocol::id::DeploymentId;

use crate::fleet::{
    Fleet, HOUR, MINUTE, definition, demand, job, launches, multiplier, reason_for_nothing, server_id,
    version,
};

const PROFILES: [PayProfile; 2] = [PayProfile::Of2025September, PayProfile::Of2026];

/// What a copy of a chute with `instances` copies on the network is worth, under either profile.
fn worth(value: f64, instances: u32) -> ChuteMarket {
    ChuteMarket {
        effective_multiplier: Some(value),
        ..demand(value * f64::from(instances), 10, instances, 0)
    }
}

/// Takes GPUs of a server out of the game: jobs are never evicted.
fn fill_with_job(fleet: &mut Fleet, server: &str, gpu_count: u32, short_ref: &str) -> DeploymentId {
    let filler = fleet.chute("filler", gpu_count, &[short_ref]);
    fleet.know(&filler, worth(0.0, 9));
    let job = fleet.offer_job(&format!("job-on-{server}"), &filler, 10);
    fleet.place(&filler, server, Some(job))
}

struct Crowded {
    fleet: Fleet,
    d1: DeploymentId,
    d2: DeploymentId,
}

/// Row A-11: `d1` is worth 5 and `d2` is worth 1, both on a full server; a bounty for `c` is open.
fn crowded(profile: PayProfile, d2_age_ms: u64, gain: u64) -> Crowded {
    let mut fleet = Fleet::new(profile);
    fleet.server("s", 8, "a6000", 0.3);
    fill_with_job(&mut fleet, "s", 6, "a6000");
    let (v1, v2) = (fleet.chute("v1", 1, &["a6000"]), fleet.chute("v2", 1, &["a6000"]));
    fleet.know(&v1, worth(5.0, 4));
    fleet.know(&v2, worth(1.0, 4));
    let d1 = fleet.serving(&v1, "s");
    fleet.pass(3 * HOUR - d2_age_ms);
    let d2 = fleet.serving(&v2, "s");
    fleet.pass(d2_age_ms);
    let c = fleet.chute("c", 1, &["a6000"]);
    fleet.bounty(&c, gain);
    fleet.know(
        &c,
        ChuteMarket {
            effective_multiplier: Some(gain as f64),
            active_instances: Some(0),
            ..ChuteMarket::default()
        },
    );
    Crowded { fleet, d1, d2 }
}

fn bounty_for_c() -> Trigger {
    Trigger::Bounty(crate::fleet::key("c"))
}

fn victims(decisions: &[Decision]) -> Vec<DeploymentId> {
    launches(decisions)
        .iter()
        .flat_map(|l| l.victims.clone())
        .collect()
}

#[test]
fn a_11_the_least_valuable_victim_goes_after_the_token() {
    for profile in PROFILES {
        let Crowded { mut fleet, d1, d2 } = crowded(profile, 3 * HOUR, 2);
        let placed = fleet.go(bounty_for_c());
        let d2_gpus = fleet.deployment(&d2).gpus.clone();
        assert_eq!(fleet.deployment(&placed[0]).victims, std::slice::from_ref(&d2));
        assert_eq!(
            fleet.deployment(&d2).phase,
            Phase::Serving,
            "nobody goes before the token"
        );
        assert_eq!(fleet.grant_tokens(), 1);
        assert_eq!(fleet.deployment(&d2).phase, Phase::Stopping);
        assert_eq!(
            fleet.deployment(&placed[0]).phase,
            Phase::Requested,
            "until d2 has drained"
        );
        fleet.drain();
        assert_eq!(fleet.deployment(&placed[0]).phase, Phase::Assigned);
        assert_eq!(fleet.deployment(&placed[0]).gpus, d2_gpus);
        assert_eq!(fleet.deployment(&d1).phase, Phase::Serving, "d1 is untouched");
    }
}

#[test]
fn a_12_a_refused_token_evicts_nobody() {
    for profile in PROFILES {
        let Crowded { mut fleet, d1, d2 } = crowded(profile, 3 * HOUR, 2);
        fleet.go(bounty_for_c());
        assert_eq!(fleet.refuse_tokens(423), 1);
        for id in [&d1, &d2] {
            assert_eq!(fleet.deployment(id).phase, Phase::Serving);
        }
        assert_eq!(fleet.state.deployments().len(), 3, "the launch is gone");
    }
}

#[test]
fn a_13_young_pay_is_protected() {
    for (profile, eligible_at) in [(PayProfile::Of2025September, 61), (PayProfile::Of2026, 63)] {
        let Crowded { fleet, d1, .. } = crowded(profile, 40 * MINUTE, 100);
        assert_eq!(
            victims(&fleet.plan(bounty_for_c())),
            [d1],
            "the net gain is positive"
        );
        let Crowded { fleet, .. } = crowded(profile, 40 * MINUTE, 2);
        let decisions = fleet.plan(bounty_for_c());
        assert_eq!(victims(&decisions), [], "2 is less than 5: {decisions:?}");
        let Crowded { mut fleet, d2, .. } = crowded(profile, eligible_at * MINUTE, 2);
        let decisions = fleet.plan(bounty_for_c());
        assert_eq!(victims(&decisions), [d2]);
        fleet.carry_out(&decisions);
    }
    let Crowded { fleet, .. } = crowded(PayProfile::Of2026, 62 * MINUTE, 2);
    assert_eq!(victims(&fleet.plan(bounty_for_c())), [], "63 min under 2026");
}

#[test]
fn a_15_the_last_copy_on_the_network_goes_only_when_it_is_idle() {
    for (profile, seen, may_go) in [
        (PayProfile::Of2025September, Some(3 * MINUTE), false),
        (PayProfile::Of2025September, Some(15 * MINUTE), true),
        (PayProfile::Of2025September, None, true),
        (PayProfile::Of2026, Some(3 * MINUTE), false),
        (PayProfile::Of2026, Some(15 * MINUTE), false),
        (PayProfile::Of2026, None, false),
    ] {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 1, "a6000", 0.3);
        let last = fleet.chute("last", 1, &["a6000"]);
        let d = fleet.serving(&last, "s");
        fleet.pass(30 * HOUR);
        let invoked = match seen {
            Some(ago) => LastInvocation::At(fleet.now - ago),
            // No metrics have it: nobody has used it since we look.
            None => LastInvocation::NoneSince(fleet.now - 24 * HOUR),
        };
        let market = ChuteMarket {
            last_invocation: invoked,
            active_instances: Some(1),
            effective_multiplier: Some(0.1),
            ..ChuteMarket::default()
        };
        fleet.know(&last, market);
        let c = fleet.chute("c", 1, &["a6000"]);
        fleet.know(&c, multiplier(9.0, 0));
        fleet.bounty(&c, 100);
        let decisions = fleet.plan(bounty_for_c());
        let expected = if may_go { vec![d] } else { vec![] };
        assert_eq!(victims(&decisions), expected, "{profile:?}, {seen:?} ago");
        fleet.carry_out(&decisions);
    }
}

#[test]
fn a_16_private_chutes_jobs_and_what_starts_are_no_victims() {
    for profile in PROFILES {
        for which in ["private", "job", "starting"] {
            let mut fleet = Fleet::new(profile);
            fleet.server("s", 1, "a6000", 0.3);
            let v = fleet.publish(coordinator_core::state_machine::chute::ChuteDefinition {
                preemptible: which != "private",
                ..definition("v", 1, &["a6000"])
            });
            fleet.know(&v, worth(0.1, 4));
            match which {
                "job" => {
                    let job = fleet.offer_job("j", &v, 10);
                    let id = fleet.place(&v, "s", Some(job));
                    fleet.bring_up(&id);
                }
                "starting" => {
                    fleet.place(&v, "s", None);
                    fleet.report("s");
                }
                _ => {
                    fleet.serving(&v, "s");
                }
            }
            fleet.pass(110 * MINUTE);
            let c = fleet.chute("c", 1, &["a6000"]);
            fleet.know(&c, multiplier(9.0, 0));
            fleet.bounty(&c, 1000);
            let decisions = fleet.plan(bounty_for_c());
            assert_eq!(victims(&decisions), [], "{which}");
            assert!(
                reason_for_nothing(&decisions, &c).contains("nobody may be evicted"),
                "{decisions:?}"
            );
        }
    }
}

#[test]
fn a_17_sums_are_compared() {
    for (gain, evicts) in [(0.5, false), (0.7, true)] {
        let mut fleet = Fleet::new(PayProfile::Of2026);
        fleet.server("s", 4, "a6000", 0.3);
        let v = fleet.chute("v", 1, &["a6000"]);
        fleet.know(&v, multiplier(0.2, 9));
        for _ in 0..3 {
            fleet.serving(&v, "s");
        }
        fleet.pass(3 * HOUR);
        let c = fleet.chute("c", 4, &["a6000"]);
        fleet.know(&c, multiplier(gain, 0));
        fleet.bounty(&c, 100);
        let decisions = fleet.plan(bounty_for_c());
        assert_eq!(
            victims(&decisions).len(),
            if evicts { 3 } else { 0 },
            "{decisions:?}"
        );
        fleet.carry_out(&decisions);
    }
}

#[test]
fn a_18_the_smallest_loss_that_makes_enough_room() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 5, "a6000", 0.3);
        let (a, b) = (fleet.chute("a", 1, &["a6000"]), fleet.chute("b", 4, &["a6000"]));
        fleet.know(&a, worth(1.0, 4));
        fleet.know(&b, worth(2.0, 4));
        fleet.serving(&a, "s");
        let b = fleet.serving(&b, "s");
        fleet.pass(3 * HOUR);
        let c = fleet.chute("c", 4, &["a6000"]);
        fleet.know(&c, multiplier(100.0, 0));
        fleet.bounty(&c, 100);
        let decisions = fleet.plan(bounty_for_c());
        assert_eq!(victims(&decisions), [b], "not a as well");
        fleet.carry_out(&decisions);
    }
}

#[test]
fn the_best_server_wins_not_the_first_that_would_do() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        for (server, value) in [("s1", 3.0), ("s2", 1.0), ("s3", 2.0)] {
            fleet.server(server, 1, "a6000", 0.3);
            let v = fleet.chute(&format!("on-{server}"), 1, &["a6000"]);
            fleet.know(&v, worth(value, 4));
            fleet.serving(&v, server);
        }
        fleet.pass(3 * HOUR);
        let c = fleet.chute("c", 1, &["a6000"]);
        fleet.know(&c, multiplier(9.0, 0));
        fleet.bounty(&c, 100);
        let decisions = fleet.plan(bounty_for_c());
        assert_eq!(launches(&decisions)[0].server, server_id("s2"));
    }
}

#[test]
fn two_bounties_of_one_pass_do_not_take_the_last_copies_together() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("s1", 1, "a6000", 0.3);
    fleet.server("s2", 1, "a6000", 0.3);
    let v = fleet.chute("v", 1, &["a6000"]);
    fleet.know(&v, worth(0.1, 2));
    fleet.serving(&v, "s1");
    fleet.serving(&v, "s2");
    fleet.pass(3 * HOUR);
    for name in ["c1", "c2"] {
        let c = fleet.chute(name, 1, &["a6000"]);
        fleet.know(&c, multiplier(9.0, 0));
        fleet.bounty(&c, 100);
    }
    let decisions = fleet.plan(Trigger::Tick);
    assert_eq!(victims(&decisions).len(), 1, "{decisions:?}");
    fleet.carry_out(&decisions);
    assert_eq!(victims(&fleet.plan(Trigger::Tick)), [], "nor in the next pass");
    fleet.grant_tokens();
    fleet.drain();
    assert_eq!(
        victims(&fleet.plan(Trigger::Tick)),
        [],
        "nor while the count is old"
    );
}

#[test]
fn nobody_goes_while_what_he_earns_is_not_known() {
    let Crowded { mut fleet, .. } = crowded(PayProfile::Of2025September, 3 * HOUR, 1000);
    fleet.market = Market::default();
    assert_eq!(victims(&fleet.plan(bounty_for_c())), []);
}

#[test]
fn w_31_a_copy_without_demand_is_worth_nothing() {
    let mut fleet = Fleet::new(PayProfile::Of2025September);
    fleet.server("s", 1, "a6000", 0.3);
    let idle = fleet.chute("idle", 1, &["a6000"]);
    // No metrics have it, but the list of instances has others.
    fleet.know(
        &idle,
        ChuteMarket {
            active_instances: Some(3),
            ..ChuteMarket::default()
        },
    );
    let d = fleet.serving(&idle, "s");
    fleet.pass(3 * HOUR);
    let c = fleet.chute("c", 1, &["a6000"]);
    fleet.bounty(&c, 1);
    assert_eq!(victims(&fleet.plan(bounty_for_c())), [d]);
}

#[test]
fn a_19_one_copy_is_enough_for_a_bounty() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 4, "a6000", 0.3);
        let c = fleet.chute("c", 1, &["a6000"]);
        fleet.bounty(&c, 100);
        assert_eq!(fleet.go(bounty_for_c()).len(), 1);
        let decisions = fleet.plan(bounty_for_c());
        assert_eq!(launches(&decisions).len(), 0, "even while it starts");
        assert_eq!(reason_for_nothing(&decisions, &c), "a copy of it exists");
    }
}

#[test]
fn a_20_a_job_goes_where_its_disk_is() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        for (server, disk_gb) in [("s1", 150), ("s2", 400)] {
            fleet.server(server, 1, "a6000", 0.3);
            fleet.change_facts(server, |facts| facts.disk_free_gb = disk_gb);
        }
        let c = fleet.chute("c", 1, &["a6000"]);
        let j = fleet.offer_job("j", &c, 200);
        let placed = fleet.go(Trigger::Job(j.clone()));
        let deployment = fleet.deployment(&placed[0]).clone();
        assert_eq!(
            (&deployment.server, &deployment.job),
            (&server_id("s2"), &Some(j.clone()))
        );
        let asks_for_the_job = |kind: &EffectKind| match kind {
            EffectKind::FetchLaunchConfig { job, .. } => job.as_ref() == Some(&j),
            _ => false,
        };
        assert!(
            fleet
                .state
                .outbox()
                .iter()
                .any(|effect| asks_for_the_job(&effect.kind))
        );
        fleet.grant_tokens();
        let desired = fleet.state.desired(&server_id("s2")).unwrap();
        assert_eq!(desired.workloads[0].spec.disk_gb, 200);
        // The launch fails: the job is given back.
        fleet.report_phase(
            "s2",
            &protocol::workload::WorkloadPhase::Ended {
                exit_code: Some(1),
                reason: "a test".to_owned(),
            },
        );
        let released = fleet
            .state
            .outbox()
            .iter()
            .any(|effect| effect.kind == EffectKind::ReleaseJob { job: j.clone() });
        assert!(released);
        assert!(
            launches(&fleet.plan(Trigger::Job(j))).is_empty(),
            "a job is tried once"
        );
    }
}

#[test]
fn a_claimed_job_is_given_back_before_its_instance_is_deleted() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("s", 1, "a6000", 0.3);
    let c = fleet.chute("c", 1, &["a6000"]);
    let told = |fleet: &Fleet| -> Vec<EffectKind> {
        let effects = fleet.state.outbox().iter();
        effects.map(|effect| effect.kind.clone()).collect()
    };
    // Its workload dies while it works; or the claim becomes known when it is being stopped.
    for (number, claimed_late) in [false, true].into_iter().enumerate() {
        let job = fleet.offer_job(&format!("j{number}"), &c, 10);
        let placed = fleet.go(Trigger::Job(job.clone()));
        fleet.grant_tokens();
        let instance = if claimed_late {
            None
        } else {
            Some(fleet.bring_up(&placed[0]))
        };
        fleet.report_phase(
            "s",
            &protocol::workload::WorkloadPhase::Ended {
                exit_code: None,
                reason: "killed".to_owned(),
            },
        );
        let release = EffectKind::ReleaseJob { job };
        let instance = instance.unwrap_or_else(|| {
            assert_eq!(told(&fleet), std::slice::from_ref(&release));
            fleet.tell_validator();
            let instance = protocol::id::InstanceId::parse("late").unwrap();
            fleet.ok(Command::RecordInstanceCreated {
                validator: c.validator.clone(),
                chute: c.chute.clone(),
                config: fleet.deployment(&placed[0]).config.clone(),
                instance: instance.clone(),
            });
            instance
        });
        let delete = EffectKind::DeleteInstance {
            chute: c.chute.clone(),
            instance,
        };
        assert_eq!(told(&fleet), [release, delete]);
        while fleet.tell_validator() > 0 {}
        fleet.report("s");
    }
}

#[test]
fn a_21_a_job_that_excludes_us_is_ignored() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("s", 1, "a6000", 0.3);
    let c = fleet.chute("c", 1, &["a6000"]);
    fleet.ok(Command::RecordJobOffer {
        job: job("j"),
        chute: c.clone(),
        gpu_count: 1,
        disk_gb: 10,
        excluded: true,
    });
    assert!(fleet.plan(Trigger::Job(job("j"))).is_empty());
    assert!(
        launches(&fleet.plan(Trigger::Tick))
            .iter()
            .all(|l| l.job.is_none())
    );
}

#[test]
fn a_22_a_job_is_left_alone_until_it_is_withdrawn() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 1, "a6000", 0.3);
        let c = fleet.chute("c", 1, &["a6000"]);
        fleet.know(&c, worth(0.1, 4));
        let j = fleet.offer_job("j", &c, 10);
        let placed = fleet.go(Trigger::Job(j.clone()));
        fleet.grant_tokens();
        let d = placed[0].clone();
        let instance = fleet.bring_up(&d);
        fleet.pass(3 * HOUR);
        // The chute is updated, and it is even said to be the job's turn.
        fleet.publish(coordinator_core::state_machine::chute::ChuteDefinition {
            version: version("v2"),
            ..definition("c", 1, &["a6000"])
        });
        fleet.ok(Command::RecordRollingUpdate {
            instance,
            version: version("v2"),
        });
        let other = fleet.chute("other", 1, &["a6000"]);
        fleet.know(&other, multiplier(99.0, 0));
        fleet.bounty(&other, 10_000);
        for trigger in [
            Trigger::Tick,
            Trigger::RollingUpdate(d.clone()),
            Trigger::Bounty(other.clone()),
        ] {
            let decisions = fleet.plan(trigger);
            assert!(victims(&decisions).is_empty(), "{decisions:?}");
            assert!(
                !decisions
                    .iter()
                    .any(|decision| matches!(decision, Decision::Retire { .. }))
            );
        }
        let purge = fleet.apply(Command::StopDeployments {
            deployments: vec![d.clone()],
            reason: StopReason::Operator("purge".to_owned()),
            allowance: Allowance {
                loss: true,
                ..Allowance::default()
            },
        });
        assert!(matches!(purge, Err(Rejection::Protected { .. })), "{purge:?}");
        assert_eq!(fleet.deployment(&d).phase, Phase::Serving);
        assert_eq!(
            fleet.apply(Command::RecordJobDeleted { job: j }),
            Ok(Reply::Stopping(vec![d]))
        );
    }
}

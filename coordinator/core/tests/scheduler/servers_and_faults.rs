//! Where, and what happens when the world misbehaves.

use coordinator_core::scheduler::strategy::Trigger;
use coordinator_core::state_machine::chute::{ChuteDefinition, ChuteKey};
use coordinator_core::state_machine::command::{
    ListedInstance, Listing, Observation, PayProfile, Placement, Rejection,
};
use coordinator_core::state_machine::deployment::Phase;
use coordinator_core::state_machine::effect::{EffectKind, EffectOutcome};
use coordinator_core::state_machine::{Command, State};
use protocol::id::{ConfigId, DeploymentId, InstanceId};
use protocol::workload::WorkloadPhase;

use crate::fleet::{
    Fleet, MINUTE, definition, launches, multiplier, reason_for_nothing, server_id, validator, version,
};

const PROFILES: [PayProfile; 2] = [PayProfile::Of2025September, PayProfile::Of2026];

fn three_servers(profile: PayProfile) -> (Fleet, ChuteKey) {
    let mut fleet = Fleet::new(profile);
    fleet.server("s1", 4, "a6000", 0.30);
    fleet.server("s2", 2, "a6000", 0.30);
    fleet.server("s3", 8, "h100", 1.5);
    let c = fleet.chute("c", 2, &["a6000", "h100"]);
    (fleet, c)
}

fn where_to(fleet: &Fleet, chute: &ChuteKey) -> Option<String> {
    let decisions = fleet.plan(Trigger::ChuteCreated(chute.clone()));
    let launches = launches(&decisions);
    launches.first().map(|launch| launch.server.to_string())
}

fn occupy(fleet: &mut Fleet, server: &str, gpu_count: u32, short_ref: &str) {
    let filler = fleet.chute(&format!("filler-{server}"), gpu_count, &[short_ref]);
    fleet.place(&filler, server, None);
}

#[test]
fn a_01_the_cheapest_class_then_the_tightest_fit() {
    for profile in PROFILES {
        let (mut fleet, c) = three_servers(profile);
        assert_eq!(where_to(&fleet, &c).as_deref(), Some("s2"));
        fleet.lock("s2", true);
        assert_eq!(where_to(&fleet, &c).as_deref(), Some("s1"));
        fleet.lock("s2", false);
        occupy(&mut fleet, "s1", 4, "a6000");
        occupy(&mut fleet, "s2", 2, "a6000");
        assert_eq!(where_to(&fleet, &c).as_deref(), Some("s3"));
        let placed = fleet.go(Trigger::ChuteCreated(c));
        assert_eq!(fleet.deployment(&placed[0]).gpus.len(), 2);
    }
}

#[test]
fn w_43_a_cent_does_not_break_a_large_hole() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("large", 8, "a6000", 0.29);
    fleet.server("small", 1, "a6000", 0.30);
    let c = fleet.chute("c", 1, &["a6000"]);
    assert_eq!(where_to(&fleet, &c).as_deref(), Some("small"));
    fleet.server("cheap", 8, "a6000", 0.20);
    assert_eq!(where_to(&fleet, &c).as_deref(), Some("cheap"), "but a third does");
}

#[test]
fn a_sealed_worker_is_for_chutes_that_need_one_and_they_for_it() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("open", 2, "h100", 0.30);
        let sealed = |tee| ChuteDefinition {
            tee,
            ..definition(if tee { "sealed" } else { "plain" }, 1, &["h100"])
        };
        let (plain, tee) = (fleet.publish(sealed(false)), fleet.publish(sealed(true)));
        for chute in [&plain, &tee] {
            fleet.know(chute, multiplier(1.0, 1));
        }
        let reason = reason_for_nothing(&fleet.plan(Trigger::ChuteCreated(tee.clone())), &tee);
        assert!(
            reason.contains("needs a sealed worker, and there is none"),
            "{reason}"
        );
        fleet.worker("worker", 2, "h100", 0.10);
        assert_eq!(where_to(&fleet, &tee).as_deref(), Some("worker"));
        assert_eq!(
            where_to(&fleet, &plain).as_deref(),
            Some("open"),
            "though it is dearer"
        );
        for (chute, wrong) in [(&plain, "worker"), (&tee, "open")] {
            let server = server_id(wrong);
            let gpus = fleet.state.gpus_of(&server).map(|gpu| gpu.id().clone());
            let placement = Placement {
                deployment: DeploymentId::parse("wrong").unwrap(),
                chute: chute.clone(),
                version: version("v1"),
                gpus: gpus.take(1).collect(),
                server: server.clone(),
                job: None,
                victims: vec![],
                reason: String::new(),
            };
            let answer = fleet.apply(Command::PlaceDeployment(placement));
            assert!(
                matches!(&answer, Err(Rejection::Placement(why)) if why.contains("sealed worker")),
                "{answer:?}"
            );
        }
        for chute in [plain, tee] {
            fleet.go(Trigger::ChuteCreated(chute));
        }
        assert_eq!(fleet.state.deployments().len(), 2);
    }
}

#[test]
fn chutes_of_newer_libraries_have_a_port_more_on_a_sealed_worker() {
    for (version, expected) in [("0.6.0", &[8000, 8001, 8002][..]), ("0.5.9", &[8000, 8001])] {
        let mut fleet = Fleet::new(PayProfile::Of2026);
        fleet.worker("worker", 1, "h100", 0.10);
        let chute = fleet.publish(ChuteDefinition {
            tee: true,
            chutes_version: Some(version.to_owned()),
            ..definition("sealed", 1, &["h100"])
        });
        fleet.place(&chute, "worker", None);
        let set = fleet.state.desired(&server_id("worker")).expect("it is a server");
        let ports = set.workloads[0].spec.ports.iter().map(|port| port.internal);
        assert_eq!(ports.collect::<Vec<_>>(), expected, "{version}");
    }
}

#[test]
fn a_02_disk_is_needed_and_unknown_is_none() {
    for disk_gb in [5, 0] {
        let (mut fleet, c) = three_servers(PayProfile::Of2026);
        fleet.change_facts("s2", |facts| facts.disk_free_gb = disk_gb);
        assert_eq!(where_to(&fleet, &c).as_deref(), Some("s1"));
        fleet.change_facts("s2", |facts| facts.disk_free_gb = 10);
        assert_eq!(where_to(&fleet, &c).as_deref(), Some("s2"));
    }
}

#[test]
fn a_02_disk_is_given_once() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("s", 4, "a6000", 0.3);
    fleet.change_facts("s", |facts| facts.disk_free_gb = 25);
    for number in 0..4 {
        let c = fleet.chute(&format!("c{number}"), 1, &["a6000"]);
        fleet.know(&c, multiplier(1.0, 1));
    }
    assert_eq!(fleet.go(Trigger::Tick).len(), 2, "10 GB each of 25 GB");
    assert_eq!(fleet.go(Trigger::Tick).len(), 0, "nor in the next pass");
}

#[test]
fn a_26_gpus_are_free_when_the_host_says_so() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 1, "a6000", 0.3);
        let c = fleet.chute("c", 1, &["a6000"]);
        fleet.know(&c, multiplier(1.0, 1));
        let d = fleet.serving(&c, "s");
        let instance = fleet.deployment(&d).instance.clone().unwrap();
        fleet.ok(Command::RecordInstanceDeleted {
            config: None,
            instance,
            cause: "a test".to_owned(),
        });
        assert_eq!(fleet.deployment(&d).phase, Phase::Stopping);
        let gone_already = |kind: &EffectKind| matches!(kind, EffectKind::DeleteInstance { .. });
        let done = fleet.finish(gone_already, &mut |_| EffectOutcome::Refused {
            status: 404,
            detail: "no such instance".to_owned(),
        });
        assert_eq!(done, 1, "404 is success");
        assert_eq!(fleet.deployment(&d).phase, Phase::Draining);
        assert_eq!(fleet.free_gpus(), 0);
        assert!(where_to(&fleet, &c).is_none());
        fleet.report("s");
        assert_eq!(fleet.free_gpus(), 1);
        assert!(where_to(&fleet, &c).is_some());
    }
}

fn listing(fleet: &Fleet, instances: Vec<ListedInstance>) -> Command {
    Command::Observe(Observation {
        validator: validator(1),
        read_at: fleet.now,
        chutes: Listing::Unknown,
        instances: Listing::Known(instances),
        gpus: Listing::Unknown,
    })
}

#[test]
fn a_27_an_early_instance_is_not_lost() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 1, "a6000", 0.3);
        let c = fleet.chute("c", 1, &["a6000"]);
        let placed = fleet.go(Trigger::ChuteCreated(c.clone()));
        let older_snapshot = listing(&fleet, vec![]);
        fleet.pass(1000);
        let (config, instance) = (ConfigId::parse("k").unwrap(), InstanceId::parse("i").unwrap());
        fleet.ok(Command::RecordInstanceCreated {
            validator: validator(1),
            chute: c.chute,
            config: Some(config.clone()),
            instance: instance.clone(),
        });
        let token = EffectOutcome::LaunchConfig {
            config,
            sealed_token: vec![1],
        };
        fleet.finish(|_| true, &mut |_| token.clone());
        assert_eq!(fleet.deployment(&placed[0]).instance, Some(instance));
        for _ in 0..3 {
            fleet.ok(older_snapshot.clone());
        }
        assert!(fleet.deployment(&placed[0]).phase.is_live());
    }
}

/// Whoever had applied both knew the deployment by both; a member that had read its rows, by the second only.
#[test]
fn a_second_instance_of_a_config_takes_the_place_of_the_first() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("s", 1, "a6000", 0.3);
    let c = fleet.chute("c", 1, &["a6000"]);
    let placed = fleet.place(&c, "s", None);
    let config = fleet.deployment(&placed).config.clone();
    assert!(config.is_some());
    let [first, second] = ["i", "j"].map(|name| InstanceId::parse(name).unwrap());
    for instance in [&first, &second] {
        fleet.ok(Command::RecordInstanceCreated {
            validator: validator(1),
            chute: c.chute.clone(),
            config: config.clone(),
            instance: instance.clone(),
        });
    }
    assert_eq!(fleet.state.deployment_of(None, &first), None);
    assert_eq!(fleet.state.deployment_of(None, &second), Some(&placed));
}

#[test]
fn a_28_progress_keeps_a_launch_alive() {
    for progress in [true, false] {
        let mut fleet = Fleet::new(PayProfile::Of2025September);
        fleet.server("s", 1, "a6000", 0.3);
        let c = fleet.chute("c", 1, &["a6000"]);
        let d = fleet.place(&c, "s", None);
        for minute in 1..=31 {
            let bytes_done = if progress { minute * 1_000_000 } else { 1 };
            fleet.report_phase("s", &WorkloadPhase::Pulling { bytes_done });
            fleet.pass(MINUTE);
        }
        let live = fleet
            .state
            .deployments()
            .get(&d)
            .is_some_and(|d| d.phase.is_live());
        assert_eq!(live, progress);
        if !progress {
            fleet.drain();
            assert_eq!(fleet.free_gpus(), 1);
            let chute = fleet.state.chutes().get(&c).unwrap();
            assert_eq!(chute.failures.get("a6000").map(|f| f.count), Some(1));
        }
    }
}

#[test]
fn a_29_a_stranger_goes_at_the_second_sight() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    let x = ListedInstance {
        instance: InstanceId::parse("x").unwrap(),
        chute: crate::fleet::key("c").chute,
        config: Some(ConfigId::parse("k").unwrap()),
        active: true,
        verified: true,
    };
    let deletes = |state: &State| {
        let deletion = |kind: &EffectKind| matches!(kind, EffectKind::DeleteInstance { .. });
        state
            .outbox()
            .iter()
            .filter(|effect| deletion(&effect.kind))
            .count()
    };
    for (seconds, expected) in [(0, 0), (10, 0), (50, 1), (60, 1)] {
        fleet.pass(seconds * 1000);
        let command = listing(&fleet, vec![x.clone()]);
        fleet.ok(command);
        assert_eq!(deletes(&fleet.state), expected, "after {seconds} s more");
    }
}

#[test]
fn a_30_an_unreachable_server_keeps_what_it_has_and_gets_nothing() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 2, "a6000", 0.3);
        let c = fleet.chute("c", 1, &["a6000"]);
        let other = fleet.chute("other", 1, &["a6000"]);
        fleet.know(&other, multiplier(9.0, 0));
        fleet.bounty(&other, 1000);
        let d = fleet.serving(&c, "s");
        fleet.ok(Command::RecordHostCondition {
            server: server_id("s"),
            reachable: false,
            quarantine: None,
        });
        fleet.pass(3 * 60 * MINUTE);
        assert_eq!(fleet.go(Trigger::Tick), []);
        assert_eq!(fleet.deployment(&d).phase, Phase::Serving);
        fleet.ok(Command::RecordHostCondition {
            server: server_id("s"),
            reachable: true,
            quarantine: None,
        });
        assert_eq!(fleet.go(Trigger::Tick).len(), 1);
    }
}

#[test]
fn a_31_gpus_that_vanish_for_a_while() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 8, "a6000", 0.3);
        let c = fleet.chute("c", 1, &["a6000"]);
        let other = fleet.chute("other", 1, &["a6000"]);
        let d = fleet.serving(&c, "s");
        let devices = fleet
            .state
            .servers()
            .get(&server_id("s"))
            .unwrap()
            .facts
            .devices
            .clone();
        fleet.change_facts("s", |facts| facts.devices.clear());
        fleet.pass(2 * MINUTE);
        assert_eq!(where_to(&fleet, &other), None, "nothing new");
        assert_eq!(fleet.deployment(&d).phase, Phase::Serving, "nothing stops");
        assert!(fleet.state.outbox().is_empty(), "the validator hears nothing");
        assert_eq!(fleet.state.gpus().len(), 8);
        fleet.change_facts("s", |facts| facts.devices = devices);
        assert_eq!(where_to(&fleet, &other).as_deref(), Some("s"));
    }
}

#[test]
fn a_32_an_empty_catalogue_deletes_nothing() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("s", 1, "a6000", 0.3);
    let c = fleet.chute("c", 1, &["a6000"]);
    let d = fleet.serving(&c, "s");
    for _ in 0..5 {
        fleet.pass(5 * MINUTE);
        fleet.ok(Command::Observe(Observation {
            validator: validator(1),
            read_at: fleet.now,
            chutes: Listing::Known(vec![]),
            instances: Listing::Unknown,
            gpus: Listing::Known(vec![]),
        }));
    }
    assert_eq!(fleet.deployment(&d).phase, Phase::Serving);
    assert!(fleet.state.chutes().contains_key(&c));
    assert!(fleet.state.outbox().is_empty());
}

#[test]
fn a_33_a_server_leaves() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("s", 2, "a6000", 0.3);
    let c = fleet.chute("c", 1, &["a6000"]);
    fleet.serving(&c, "s");
    let job = fleet.offer_job("j", &c, 10);
    let j = fleet.place(&c, "s", Some(job));
    fleet.bring_up(&j);
    let leave = |jobs| Command::RemoveServer {
        server: server_id("s"),
        jobs,
    };
    assert!(matches!(
        fleet.apply(leave(false)),
        Err(Rejection::Protected { .. })
    ));
    fleet.ok(leave(true));
    let effects = fleet.state.outbox().len();
    fleet.ok(leave(true));
    assert_eq!(
        fleet.state.outbox().len(),
        effects,
        "a repetition changes nothing"
    );
    assert_eq!(fleet.tell_validator(), 2, "an instance, and the job");
    assert_eq!(fleet.tell_validator(), 1, "then the job's instance");
    fleet.report("s");
    assert_eq!(fleet.state.deployments().len(), 0);
    while fleet.tell_validator() > 0 {}
    assert_eq!(fleet.state.gpus().len(), 0);
    assert!(
        fleet
            .state
            .servers()
            .get(&server_id("s"))
            .unwrap()
            .enrolment
            .is_none()
    );
    assert_eq!(where_to(&fleet, &c), None);
}

#[test]
fn a_34_a_new_leader_finishes_or_rolls_back() {
    for dies_with_token in [false, true] {
        let mut fleet = Fleet::new(PayProfile::Of2026);
        fleet.server("s", 1, "a6000", 0.3);
        let c = fleet.chute("c", 1, &["a6000"]);
        let d = fleet.place_without_token(&c, "s");
        let asks = |fleet: &Fleet| fleet.state.outbox().len();
        assert_eq!(asks(&fleet), 1, "the new leader finds what is to be done");
        assert!(
            fleet
                .plan(Trigger::Tick)
                .iter()
                .all(|d| launches(std::slice::from_ref(d)).is_empty())
        );
        if dies_with_token {
            fleet.grant_tokens();
            assert_eq!(asks(&fleet), 0, "the token is not asked for twice");
            let workloads = fleet.state.desired(&server_id("s")).unwrap().workloads;
            assert_eq!(workloads.len(), 1);
        } else {
            fleet.pass(11 * MINUTE);
            assert!(!fleet.deployment(&d).phase.is_live());
            fleet.refuse_tokens(409);
            fleet.drain();
            assert_eq!(fleet.free_gpus(), 1, "no GPU leaks");
        }
    }
}

#[test]
fn a_35_one_of_two_gets_the_last_gpu() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 1, "a6000", 0.3);
        let (one, two) = (
            fleet.chute("one", 1, &["a6000"]),
            fleet.chute("two", 1, &["a6000"]),
        );
        // Both were decided on the same view.
        let first = fleet.plan(Trigger::ChuteCreated(one));
        let second = fleet.plan(Trigger::ChuteCreated(two));
        fleet.carry_out(&first);
        let loser = launches(&second)[0].clone();
        let placement: Placement = loser.into_placement(DeploymentId::parse("loser").unwrap());
        let before = fleet.state.outbox().len();
        let answer = fleet.apply(Command::PlaceDeployment(placement));
        assert!(matches!(answer, Err(Rejection::Placement(_))), "{answer:?}");
        assert_eq!(
            (fleet.state.deployments().len(), fleet.state.outbox().len()),
            (1, before)
        );
    }
}

#[test]
fn a_36_a_price_of_zero() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server("s", 1, "a6000", 0.0);
        let c = fleet.chute("c", 1, &["a6000"]);
        fleet.know(&c, crate::fleet::demand(36_000.0, 3600, 1, 0));
        let decisions = fleet.plan(Trigger::Tick);
        assert!(launches(&decisions)[0].value.is_finite());
        assert_eq!(fleet.carry_out(&decisions).len(), 1);
    }
}

#[test]
fn a_38_servers_of_another_validator_do_not_count() {
    for profile in PROFILES {
        let mut fleet = Fleet::new(profile);
        fleet.server_of(&validator(2), "s", 8, "a6000", 0.3);
        let c = fleet.chute("c", 1, &["a6000"]);
        assert_eq!(where_to(&fleet, &c), None);
        fleet.bounty(&c, 100);
        assert_eq!(launches(&fleet.plan(Trigger::Tick)).len(), 0);
    }
}

#[test]
fn a_39_failures_keep_a_chute_off_a_gpu_type() {
    for profile in PROFILES {
        let (mut fleet, c) = three_servers(profile);
        fleet.lock("s1", true);
        for _ in 0..3 {
            let placed = fleet.go(Trigger::ChuteCreated(c.clone()));
            assert_eq!(fleet.deployment(&placed[0]).server, server_id("s2"));
            fleet.grant_tokens();
            fleet.report_phase(
                "s2",
                &WorkloadPhase::Ended {
                    exit_code: Some(1),
                    reason: "a test".to_owned(),
                },
            );
            fleet.drain();
        }
        assert_eq!(
            where_to(&fleet, &c).as_deref(),
            Some("s3"),
            "other classes are allowed"
        );
        fleet.lock("s3", true);
        let decisions = fleet.plan(Trigger::ChuteCreated(c.clone()));
        let why = reason_for_nothing(&decisions, &c);
        assert!(why.contains("3 launches in a row failed on a6000"), "{why}");
        let before = fleet.clone();
        fleet.pass(11 * MINUTE);
        assert_eq!(where_to(&fleet, &c).as_deref(), Some("s2"), "after the pause");
        let mut fleet = before;
        fleet.publish(ChuteDefinition {
            version: version("v2"),
            ..definition("c", 2, &["a6000", "h100"])
        });
        assert_eq!(
            where_to(&fleet, &c).as_deref(),
            Some("s2"),
            "an update clears the memory"
        );
    }
}

#[test]
fn a_42_one_gpu_is_verified() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("s", 4, "a6000", 0.3);
    fleet.change_facts("s", |facts| {
        facts.server = server_id("t");
        facts.name = "t".to_owned();
        for (number, device) in facts.devices.iter_mut().enumerate() {
            device.uuid = protocol::id::GpuId::from_device_uuid(&format!("{number:032x}ff")[2..]).unwrap();
        }
    });
    fleet.ok(Command::EnrolServer {
        server: server_id("t"),
        validator: validator(1),
        gpu_short_ref: "a6000".to_owned(),
        hourly_cost_usd_micros: 1,
    });
    let gpus: Vec<_> = fleet
        .state
        .gpus_of(&server_id("t"))
        .map(|gpu| gpu.id().clone())
        .collect();
    fleet.ok(Command::RecordGpuVerified { gpu: gpus[2].clone() });
    let verified: Vec<_> = fleet
        .state
        .gpus_of(&server_id("t"))
        .filter(|gpu| gpu.verified_at.is_some())
        .map(|gpu| gpu.id().clone())
        .collect();
    assert_eq!(verified, [gpus[2].clone()], "exactly that one");
}

#[test]
fn each_server_has_its_reason() {
    let (mut fleet, c) = three_servers(PayProfile::Of2026);
    fleet.server("s4", 8, "l40s", 0.5);
    fleet.server("s5", 8, "a6000", 0.5);
    fleet.server_of(&validator(2), "s6", 8, "a6000", 0.5);
    occupy(&mut fleet, "s1", 4, "a6000");
    fleet.lock("s2", true);
    fleet.change_facts("s5", |facts| facts.disk_free_gb = 9);
    let view = coordinator_core::scheduler::view::View::new(&fleet.state, &fleet.market);
    let chute = view.chute(&c).unwrap();
    let opinions = coordinator_core::scheduler::explain::servers_for(&view, &chute);
    let said: Vec<_> = opinions
        .iter()
        .map(|opinion| (opinion.server.as_str(), opinion.obstacle.as_deref()))
        .collect();
    assert_eq!(
        said,
        [
            ("s1", Some("0 of 4 a6000 are free, 2 are needed")),
            ("s2", Some("it is locked")),
            ("s3", None),
            ("s4", Some("the chute does not run on l40s")),
            ("s5", Some("9 GB of disk are left, 10 are needed")),
            ("s6", Some("it works for another validator")),
        ]
    );
}

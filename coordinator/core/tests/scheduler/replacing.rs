//! New versions of chutes.

use coordinator_core::scheduler::strategy::{Decision, Trigger};
use coordinator_core::state_machine::Command;
use coordinator_core::state_machine::chute::{ChuteDefinition, ChuteKey, VersionKey};
use coordinator_core::state_machine::command::{Listing, Observation, PayProfile};
use coordinator_core::state_machine::deployment::Phase;
use protocol::id::DeploymentId;

use crate::fleet::{Fleet, MINUTE, definition, launches, reason_for_nothing, server_id, validator, version};

const PROFILES: [PayProfile; 2] = [PayProfile::Of2025September, PayProfile::Of2026];

fn publish_v2(fleet: &mut Fleet, gpu_count: u32, supported: &[&str]) {
    fleet.publish(ChuteDefinition {
        version: version("v2"),
        ..definition("c", gpu_count, supported)
    });
}

fn supersede(fleet: &mut Fleet, id: &DeploymentId) {
    let instance = fleet.deployment(id).instance.clone().unwrap();
    fleet.ok(Command::RecordRollingUpdate {
        instance,
        version: version("v2"),
    });
}

fn three_copies(profile: PayProfile) -> (Fleet, ChuteKey, Vec<DeploymentId>) {
    let mut fleet = Fleet::new(profile);
    fleet.server("s", 4, "a6000", 0.3);
    let c = fleet.chute("c", 1, &["a6000"]);
    let copies = (0..3).map(|_| fleet.serving(&c, "s")).collect();
    fleet.pass(5 * MINUTE);
    (fleet, c, copies)
}

#[test]
fn a_23_a_copy_is_replaced_where_it_is() {
    for profile in PROFILES {
        for locked in [false, true] {
            let (mut fleet, _, copies) = three_copies(profile);
            publish_v2(&mut fleet, 1, &["a6000"]);
            supersede(&mut fleet, &copies[1]);
            fleet.lock("s", locked);
            let placed = fleet.go(Trigger::RollingUpdate(copies[1].clone()));
            let new = fleet.deployment(&placed[0]).clone();
            assert_eq!(new.version, version("v2"));
            assert_eq!(new.server, server_id("s"));
            assert_eq!(new.gpus, fleet.deployment(&copies[1]).gpus);
            assert!(
                fleet.plan(Trigger::RollingUpdate(copies[1].clone())).is_empty(),
                "once"
            );
            assert!(launches(&fleet.plan(Trigger::Tick)).is_empty(), "once");
            fleet.grant_tokens();
            fleet.drain();
            assert!(!fleet.state.deployments().contains_key(&copies[1]));
            assert_eq!(fleet.deployment(&placed[0]).phase, Phase::Assigned);
            for other in [&copies[0], &copies[2]] {
                assert_eq!(fleet.deployment(other).version, version("v1"));
                assert_eq!(fleet.deployment(other).phase, Phase::Serving);
            }
        }
    }
}

#[test]
fn a_23_a_lost_event_is_made_good_by_a_tick() {
    let (mut fleet, _, copies) = three_copies(PayProfile::Of2025September);
    publish_v2(&mut fleet, 1, &["a6000"]);
    supersede(&mut fleet, &copies[0]);
    supersede(&mut fleet, &copies[2]);
    let placed = fleet.go(Trigger::Tick);
    assert_eq!(placed.len(), 2);
}

#[test]
fn a_23_waits_until_the_new_version_is_known() {
    let (mut fleet, c, copies) = three_copies(PayProfile::Of2025September);
    supersede(&mut fleet, &copies[0]);
    let decisions = fleet.plan(Trigger::RollingUpdate(copies[0].clone()));
    assert!(launches(&decisions).is_empty());
    assert_eq!(
        reason_for_nothing(&decisions, &c),
        "version v2 is not the current one"
    );
}

#[test]
fn a_24_a_type_that_is_not_supported_any_more() {
    for profile in PROFILES {
        for elsewhere in [false, true] {
            let (mut fleet, c, copies) = three_copies(profile);
            if elsewhere {
                fleet.server("other", 1, "h100", 1.5);
            }
            publish_v2(&mut fleet, 1, &["h100"]);
            supersede(&mut fleet, &copies[0]);
            let decisions = fleet.plan(Trigger::RollingUpdate(copies[0].clone()));
            let placed = fleet.carry_out(&decisions);
            assert_eq!(fleet.deployment(&copies[0]).phase, Phase::Stopping);
            if elsewhere {
                assert_eq!(fleet.deployment(&placed[0]).server, server_id("other"));
            } else {
                assert_eq!(placed, []);
                let why = reason_for_nothing(&decisions, &c);
                assert!(why.contains("no server has 1 free h100"), "{why}");
            }
            assert_eq!(fleet.deployment(&copies[1]).phase, Phase::Serving);
        }
    }
}

#[test]
fn a_24_a_version_that_needs_more_gpus_takes_free_ones_too() {
    let (mut fleet, _, copies) = three_copies(PayProfile::Of2026);
    publish_v2(&mut fleet, 2, &["a6000"]);
    supersede(&mut fleet, &copies[0]);
    let placed = fleet.go(Trigger::RollingUpdate(copies[0].clone()));
    assert_eq!(fleet.deployment(&placed[0]).gpus.len(), 2);
    assert_eq!(fleet.deployment(&placed[0]).victims, [copies[0].clone()]);
    supersede(&mut fleet, &copies[1]);
    let decisions = fleet.plan(Trigger::RollingUpdate(copies[1].clone()));
    assert!(
        matches!(decisions[0], Decision::Retire { .. }),
        "no GPU is left: {decisions:?}"
    );
}

#[test]
fn a_25_an_update_stops_nothing_by_itself() {
    for profile in PROFILES {
        let (mut fleet, c, copies) = three_copies(profile);
        publish_v2(&mut fleet, 1, &["a6000"]);
        let instances = copies.iter().map(|id| {
            let deployment = fleet.deployment(id);
            coordinator_core::state_machine::command::ListedInstance {
                instance: deployment.instance.clone().unwrap(),
                chute: c.chute.clone(),
                config: deployment.config.clone(),
                active: true,
                verified: true,
            }
        });
        let mut observation = Observation {
            validator: validator(1),
            read_at: fleet.now,
            chutes: Listing::Known(vec![(c.chute.clone(), version("v2"))]),
            instances: Listing::Known(instances.collect()),
            gpus: Listing::Unknown,
        };
        for _ in 0..3 {
            fleet.pass(2 * MINUTE);
            observation.read_at = fleet.now;
            fleet.ok(Command::Observe(observation.clone()));
        }
        for id in &copies {
            assert_eq!(fleet.deployment(id).phase, Phase::Serving);
        }
        let code = |fleet: &Fleet, name: &str| {
            let key = VersionKey {
                chute: c.clone(),
                version: version(name),
            };
            fleet.state.codes().contains_key(&key)
        };
        assert!(code(&fleet, "v1") && code(&fleet, "v2"));
        for id in &copies {
            assert!(code(&fleet, "v1"), "while a copy runs");
            let instance = fleet.deployment(id).instance.clone().unwrap();
            fleet.ok(Command::RecordInstanceDeleted {
                config: None,
                instance,
                cause: "old version".to_owned(),
            });
            fleet.drain();
        }
        assert!(!code(&fleet, "v1") && code(&fleet, "v2"));
    }
}

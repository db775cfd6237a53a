//! Whatever the fleet and the market: each decision of the built-in strategy is accepted when the decisions
//! of a pass are carried out in their order, and no invariant breaks.

use coordinator_core::scheduler::market::{ChuteMarket, LastInvocation, Utilization};
use coordinator_core::scheduler::strategy::{Decision, Trigger};
use coordinator_core::state_machine::Command;
use coordinator_core::state_machine::chute::{ChuteDefinition, ChuteKey};
use coordinator_core::state_machine::command::PayProfile;
use coordinator_core::state_machine::deployment::{Flow, Phase};
use coordinator_core::state_machine::effect::{EffectKind, EffectOutcome};
use protocol::id::{DeploymentId, InstanceId};
use protocol::workload::WorkloadPhase;

use crate::fleet::{Fleet, MINUTE, definition, demand, server_id, version};

const TYPES: [&str; 3] = ["a6000", "h100", "l40s"];

#[derive(Debug, Default)]
struct Seen {
    launches: usize,
    victims: usize,
    replacements: usize,
    retired: usize,
    jobs: usize,
}

#[test]
fn every_decision_is_accepted() {
    let mut seen = Seen::default();
    for seed in 0..300 {
        println!("seed {seed}");
        grow(seed, 14, &mut seen);
    }
    println!("{seen:?}");
    assert!(seen.launches > 1000 && seen.victims > 40, "{seen:?}");
    assert!(
        seen.replacements > 50 && seen.retired > 20 && seen.jobs > 50,
        "{seen:?}"
    );
}

/// A fleet after `rounds` of whatever a seed brings.
pub(crate) fn grown(seed: u64, rounds: u32) -> Fleet {
    grow(seed, rounds, &mut Seen::default())
}

fn grow(seed: u64, rounds: u32, seen: &mut Seen) -> Fleet {
    let mut random = fastrand::Rng::with_seed(seed);
    let profile = if random.bool() {
        PayProfile::Of2026
    } else {
        PayProfile::Of2025September
    };
    let mut fleet = Fleet::new(profile);
    // After each pass: it is the state machine's own tests that check after each command.
    fleet.checks = false;
    let servers: Vec<String> = (0..random.usize(1..6))
        .map(|number| format!("s{number}"))
        .collect();
    for server in &servers {
        let cost = f64::from(random.u32(0..40)) / 10.0;
        let short_ref = TYPES[random.usize(..TYPES.len())];
        fleet.server(server, random.u32(1..9), short_ref, cost);
    }
    let names: Vec<String> = (0..random.usize(1..10))
        .map(|number| format!("c{number}"))
        .collect();
    for name in &names {
        publish(&mut fleet, &mut random, name, "v0");
    }
    for round in 0..rounds {
        disturb(&mut fleet, &mut random, &servers, &names, round);
        let trigger = trigger(&fleet, &mut random, &names);
        let decisions = fleet.plan(trigger);
        count(&decisions, &fleet, seen);
        fleet.carry_out(&decisions);
        fleet.check("a pass");
        settle(&mut fleet, &mut random, &servers);
    }
    fleet
}

fn count(decisions: &[Decision], fleet: &Fleet, seen: &mut Seen) {
    for decision in decisions {
        match decision {
            Decision::Launch(launch) => {
                seen.launches += 1;
                seen.jobs += usize::from(launch.job.is_some());
                for victim in &launch.victims {
                    let replaced = fleet.deployment(victim).chute == launch.chute;
                    seen.replacements += usize::from(replaced);
                    seen.victims += usize::from(!replaced);
                }
            }
            Decision::Retire { .. } => seen.retired += 1,
            Decision::Nothing { reason, .. } => assert!(!reason.is_empty()),
        }
    }
}

fn publish(fleet: &mut Fleet, random: &mut fastrand::Rng, name: &str, version_name: &str) -> ChuteKey {
    let supported: Vec<&str> = TYPES.into_iter().filter(|_| random.u8(..3) > 0).collect();
    let legacy = random.u8(..5) == 0;
    let key = fleet.publish(ChuteDefinition {
        version: version(version_name),
        preemptible: random.u8(..6) > 0,
        serves_requests: random.u8(..8) > 0,
        tee: random.u8(..20) == 0,
        chutes_version: Some(if legacy { "0.2.9" } else { "0.3.40" }.to_owned()),
        effective_multiplier_milli: random.bool().then(|| random.u64(0..3000)),
        ..definition(name, random.u32(1..5), &supported)
    });
    let market = learn(fleet, random);
    fleet.know(&key, market);
    key
}

fn learn(fleet: &Fleet, random: &mut fastrand::Rng) -> ChuteMarket {
    let compute_units = f64::from(random.u32(0..50_000));
    let mut market = demand(
        compute_units,
        random.u64(0..5000),
        random.u32(0..8),
        random.u64(0..500),
    );
    if random.u8(..4) == 0 {
        market.metrics = None;
    }
    market.active_instances = random.bool().then(|| random.u32(0..8));
    market.effective_multiplier = random.bool().then(|| f64::from(random.u32(0..300)) / 100.0);
    market.last_invocation = match random.u8(..3) {
        0 => LastInvocation::Unknown,
        1 => LastInvocation::At(fleet.now - random.u64(0..30) * MINUTE),
        _ => LastInvocation::NoneSince(fleet.now - random.u64(0..3000) * MINUTE),
    };
    if random.bool() {
        market.utilization = Some(Utilization {
            scalable: random.bool().then(|| random.u8(..4) > 0),
            update_in_progress: random.u8(..10) == 0,
            scale_allowance: random.bool().then(|| random.u32(0..6)),
            target_count: random.bool().then(|| random.u32(0..12)),
            read_at: fleet.now,
        });
    }
    market
}

fn disturb(fleet: &mut Fleet, random: &mut fastrand::Rng, servers: &[String], names: &[String], round: u32) {
    fleet.pass(random.u64(0..50) * MINUTE);
    let name = names[random.usize(..names.len())].clone();
    let server = servers[random.usize(..servers.len())].clone();
    match random.u8(..9) {
        0 => fleet.lock(&server, random.bool()),
        1 => fleet.change_facts(&server, |facts| facts.disk_free_gb = 200),
        2 => fleet.change_facts(&server, |facts| facts.disk_free_gb = 15),
        3 => fleet.ok(Command::RecordHostCondition {
            server: server_id(&server),
            reachable: random.bool(),
            quarantine: None,
        }),
        4 | 5 => {
            let key = publish(fleet, random, &name, &format!("v{}", round + 1));
            roll(fleet, random, &key);
        }
        6 | 7 => {
            let key = crate::fleet::key(&name);
            fleet.bounty(&key, random.u64(1..50_000));
        }
        _ => {
            let key = crate::fleet::key(&name);
            fleet.offer_job(&format!("job-{round}"), &key, random.u32(10..300));
        }
    }
}

fn roll(fleet: &mut Fleet, random: &mut fastrand::Rng, key: &ChuteKey) {
    let new = fleet.state.chutes().get(key).unwrap().definition.version.clone();
    let instances: Vec<InstanceId> = fleet
        .state
        .deployments_of(key)
        .filter(|d| d.version != new)
        .filter_map(|d| d.instance.clone())
        .collect();
    for instance in instances {
        if random.u8(..4) > 0 {
            fleet.ok(Command::RecordRollingUpdate {
                instance,
                version: new.clone(),
            });
        }
    }
}

fn trigger(fleet: &Fleet, random: &mut fastrand::Rng, names: &[String]) -> Trigger {
    let key = crate::fleet::key(&names[random.usize(..names.len())]);
    let superseded = fleet
        .state
        .deployments()
        .values()
        .find(|d| d.superseded_by.is_some());
    let job = fleet.state.jobs().iter().find(|(_, job)| job.is_open());
    match (random.u8(..8), superseded, job) {
        (0, ..) => Trigger::ChuteCreated(key),
        (1, ..) => Trigger::Bounty(key),
        (2, Some(deployment), _) => Trigger::RollingUpdate(deployment.id.clone()),
        (3, _, Some((job, _))) => Trigger::Job(job.clone()),
        _ => Trigger::Tick,
    }
}

/// Some of what was begun comes to its end.
fn settle(fleet: &mut Fleet, random: &mut fastrand::Rng, servers: &[String]) {
    if random.u8(..6) == 0 {
        fleet.refuse_tokens(423);
    } else if random.u8(..8) > 0 {
        fleet.grant_tokens();
    }
    if random.u8(..4) > 0 {
        fleet.drain();
    }
    for server in servers {
        match random.u8(..10) {
            0 => fleet.report_phase(
                server,
                &WorkloadPhase::Ended {
                    exit_code: Some(1),
                    reason: "by chance".to_owned(),
                },
            ),
            1 => {}
            _ => fleet.report(server),
        }
    }
    fleet.finish(
        |kind| matches!(kind, EffectKind::AnnounceInstance { .. }),
        &mut |kind| match kind {
            EffectKind::AnnounceInstance { deployment, .. } => EffectOutcome::Announced {
                instance: InstanceId::parse(&format!("announced-{deployment}")).unwrap(),
            },
            _ => EffectOutcome::Done,
        },
    );
    fleet.finish(
        |kind| matches!(kind, EffectKind::ActivateInstance { .. }),
        &mut |_| EffectOutcome::Activated { verified: true },
    );
    let starting: Vec<DeploymentId> = fleet
        .state
        .deployments()
        .values()
        .filter(|d| d.flow == Flow::LaunchConfig && matches!(d.phase, Phase::Assigned | Phase::Launched))
        .map(|d| d.id.clone())
        .collect();
    for id in starting {
        if random.u8(..5) > 0 {
            fleet.bring_up(&id);
        }
    }
}

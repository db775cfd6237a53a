//! Random commands against models of hosts and of a validator, with every invariant after each step.
//!
//! A seed gives everything. To repeat one: `WORLD_SEED=17 cargo test -p coordinator-core --test world`.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod checks;
mod host;
mod validator;
mod world;

use coordinator_core::state_machine::Faults;
use world::World;

const STEPS: u32 = 200;
/// Seeds in `cargo test`; CI runs 1,000.
const SEEDS: u64 = 150;

fn run(seed: u64, faults: Faults) -> Result<World, String> {
    let mut world = World::new(seed, faults);
    for step in 0..STEPS {
        world
            .step()
            .map_err(|error| format!("seed {seed}, step {step}: {error}"))?;
    }
    world
        .heal()
        .map_err(|error| format!("seed {seed}, healing: {error}"))?;
    world
        .replay()
        .map_err(|error| format!("seed {seed}, replay: {error}"))?;
    Ok(world)
}

fn seeds() -> std::ops::Range<u64> {
    match std::env::var("WORLD_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
    {
        Some(seed) => seed..seed + 1,
        None => {
            0..std::env::var("WORLD_SEEDS")
                .ok()
                .and_then(|n| n.parse().ok())
                .unwrap_or(SEEDS)
        }
    }
}

/// Random commands that never get anywhere would find nothing: every kind of end must come up too.
#[test]
fn random_commands_break_no_invariant_and_all_heals() {
    let seeds = seeds();
    let mut ends = std::collections::BTreeSet::new();
    for seed in seeds.clone() {
        match run(seed, Faults::none()) {
            Ok(world) => ends.extend(world.ends()),
            Err(error) => {
                panic!("{error}\nrepeat with: WORLD_SEED={seed} cargo test -p coordinator-core --test world")
            }
        }
    }
    if seeds.end - seeds.start < SEEDS {
        return;
    }
    for end in [
        "LaunchRefused",
        "DeadlinePassed",
        "WorkloadEnded",
        "InstanceDeleted",
        "InstanceMissing",
        "ChuteDeleted",
        "JobDeleted",
        "Preempted",
        "Superseded",
        "Operator",
        "ServerLeaving",
    ] {
        assert!(ends.contains(end), "no deployment ended by {end}: {ends:?}");
    }
}

/// The test above is worth something only if it finds these. Each must show within 300 seeds.
fn is_found(name: &str, faults: Faults) {
    let found = (0..300).find_map(|seed| run(seed, faults).err());
    assert!(
        found.is_some(),
        "the planted fault {name:?} was not found in 300 seeds"
    );
}

#[test]
fn planted_fault_double_allocation_is_found() {
    is_found(
        "double allocation",
        Faults {
            double_allocation: true,
            ..Faults::none()
        },
    );
}

#[test]
fn planted_fault_late_launch_config_revives_is_found() {
    is_found(
        "late launch config revives",
        Faults {
            late_config_revives: true,
            ..Faults::none()
        },
    );
}

#[test]
fn planted_fault_effects_out_of_order_is_found() {
    is_found(
        "effects out of order",
        Faults {
            effects_out_of_order: true,
            ..Faults::none()
        },
    );
}

#[test]
fn planted_fault_gpu_freed_early_is_found() {
    is_found(
        "GPU freed before the workload is gone",
        Faults {
            gpu_freed_early: true,
            ..Faults::none()
        },
    );
}

#[test]
fn planted_fault_unknown_is_empty_is_found() {
    is_found(
        "unknown listing counts as empty",
        Faults {
            unknown_is_empty: true,
            ..Faults::none()
        },
    );
}

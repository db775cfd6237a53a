//! The simulation in CI: many seeds without a violation, the same trace from the same seed, and planted
//! faults that it must find.

use std::time::Duration;

use chaos_tests::simulation::{Options, Report, run};
use coordinator_core::state_machine::Faults;

/// Seeds in all; `SIM_SEEDS` changes it.
fn seeds() -> u64 {
    let given = std::env::var("SIM_SEEDS").ok();
    given.map_or(100, |text| text.parse().expect("SIM_SEEDS is a number of seeds"))
}

/// Every `step`-th seed from `first`, so that the tests of this file share the machine's cores.
fn check(first: u64, step: usize) {
    let mut total = Vec::new();
    for seed in (first..seeds()).step_by(step) {
        let report = run(Options::new(seed));
        assert!(
            report.violations.is_empty(),
            "seed {seed}: {:#?}\nrepeat with: {}",
            report.violations,
            report.repeat_with()
        );
        assert!(
            report.fault_count() >= 20,
            "seed {seed}: {} faults are too few: {:?}",
            report.fault_count(),
            report.faults
        );
        total.push(report);
    }
    let sum = |count: fn(&Report) -> u64| total.iter().map(count).sum::<u64>();
    println!(
        "{} seeds, {} virtual s, {} faults (at least {} a seed), {} commands, {} acknowledged, 0 violations",
        total.len(),
        Duration::from_millis(sum(|report| report.virtual_ms)).as_secs(),
        sum(Report::fault_count),
        total.iter().map(Report::fault_count).min().unwrap_or(0),
        sum(|report| report.commands),
        sum(|report| report.acknowledged),
    );
    // A world in which nothing happens violates nothing.
    for kind in ["restarts", "activations", "launch configs", "workloads started"] {
        let happened = total
            .iter()
            .filter(|report| report.events.contains_key(kind))
            .count();
        assert!(
            happened * 10 >= total.len() * 9,
            "{kind}: in {happened} of {} runs",
            total.len()
        );
    }
}

#[test]
fn even_seeds_hold() {
    check(0, 2);
}

#[test]
fn odd_seeds_hold() {
    check(1, 2);
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let mut hashes = Vec::new();
    for seed in [3, 11, 27, 58, 99] {
        let (first, second) = (run(Options::new(seed)), run(Options::new(seed)));
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_eq!(first.commands, second.commands, "seed {seed}");
        hashes.push(first.trace_hash);
    }
    hashes.sort();
    hashes.dedup();
    assert_eq!(hashes.len(), 5, "different seeds give different traces");
}

/// The number of seeds until a planted fault is found, and how it was.
fn seeds_until_found(name: &str, planted: Faults) {
    const SEEDS_MAX: u64 = 30;
    for seed in 0..SEEDS_MAX {
        let report = run(Options {
            planted,
            ..Options::new(seed)
        });
        if let Some(violation) = report.violations.first() {
            println!("{name}: found by seed {seed}: {violation}");
            return;
        }
    }
    panic!("{name}: not found by {SEEDS_MAX} seeds");
}

#[test]
fn planted_faults_are_found() {
    let none = Faults::none();
    let planted = [
        (
            "gpu_freed_early",
            Faults {
                gpu_freed_early: true,
                ..none
            },
        ),
        (
            "late_config_revives",
            Faults {
                late_config_revives: true,
                ..none
            },
        ),
        (
            "unknown_is_empty",
            Faults {
                unknown_is_empty: true,
                ..none
            },
        ),
    ];
    for (name, planted) in planted {
        seeds_until_found(name, planted);
    }
}

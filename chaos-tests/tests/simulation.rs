//! The simulation in CI: many seeds without a violation, the same trace from the same seed, and planted
//! faults that it must find.

#![expect(clippy::print_stdout, reason = "the figures of a run")]

use std::time::Duration;

use chaos_tests::simulation::{Options, Report, planted, run};

/// Seeds in all; `SIM_SEEDS` changes it. CI runs 100 in an optimised build besides.
fn seeds() -> u64 {
    let given = std::env::var("SIM_SEEDS").ok();
    given.map_or(20, |text| text.parse().expect("SIM_SEEDS is a number of seeds"))
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
            happened * 5 >= total.len() * 4,
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
    const SEEDS: [u64; 3] = [3, 11, 27];
    let mut hashes = Vec::new();
    for seed in SEEDS {
        let (first, second) = (run(Options::new(seed)), run(Options::new(seed)));
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_eq!(first.commands, second.commands, "seed {seed}");
        hashes.push(first.trace_hash);
    }
    hashes.sort();
    hashes.dedup();
    assert_eq!(hashes.len(), SEEDS.len(), "different seeds give different traces");
}

/// Runs seeds until one finds the planted fault.
fn check_found(name: &str) {
    const SEEDS_MAX: u64 = 60;
    let faults = planted(name).expect("a known fault");
    for seed in 0..SEEDS_MAX {
        let report = run(Options {
            planted: faults,
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
fn a_gpu_that_is_freed_early_is_found() {
    check_found("gpu_freed_early");
}

#[test]
fn a_late_launch_config_that_revives_is_found() {
    check_found("late_config_revives");
}

#[test]
fn an_unknown_listing_taken_for_empty_is_found() {
    check_found("unknown_is_empty");
}

#[test]
fn a_gpu_given_twice_is_found() {
    check_found("double_allocation");
}

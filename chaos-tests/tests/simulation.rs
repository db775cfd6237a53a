//! The simulation in `cargo test`: some seeds without a violation, the same trace from the same seed, and planted
//! faults that it must find. CI runs more seeds in an optimised build besides.

#![expect(clippy::print_stdout, reason = "the figures of a run")]

use std::time::Duration;

use chaos_tests::simulation::{Options, Report, planted, run};

/// Seeds in all; `SIM_SEEDS` changes it.
fn seeds() -> u64 {
    let given = std::env::var("SIM_SEEDS").ok();
    given.map_or(10, |text| text.parse().expect("SIM_SEEDS is a number of seeds"))
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
        assert!(
            report.commands >= 500,
            "seed {seed}: {} commands are too few",
            report.commands
        );
        assert!(report.virtual_ms >= 120_000, "seed {seed}: it ended early");
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
    for kind in [
        "restarts",
        "activations",
        "launch configs",
        "workloads started",
        "leader changes",
        "linearizable reads",
        "signatures shown again",
        "writes repeated after an unknown outcome",
    ] {
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
    const SEEDS: [u64; 2] = [3, 11];
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
fn check_found(names: &[&str]) {
    const SEEDS_MAX: u64 = 40;
    for name in names {
        let planted = planted(name).expect("a known fault");
        let found = (0..SEEDS_MAX).find_map(|seed| {
            let report = run(Options {
                planted,
                ..Options::new(seed)
            });
            report.violations.into_iter().next().map(|what| (seed, what))
        });
        let (seed, what) = found.unwrap_or_else(|| panic!("{name}: not found by {SEEDS_MAX} seeds"));
        println!("{name}: found by seed {seed}: {what}");
    }
}

#[test]
fn planted_faults_of_the_replica_are_found() {
    check_found(&[
        "acknowledge_before_fsync",
        "stale_read",
        "two_votes_in_a_term",
        "snapshot_misses_a_table",
    ]);
}

#[test]
fn planted_faults_of_the_state_machine_are_found() {
    check_found(&[
        "outbox_entry_lost_at_leader_change",
        "effect_done_twice",
        "replay_guard_lost",
        "gpu_freed_early",
        "double_allocation",
    ]);
}

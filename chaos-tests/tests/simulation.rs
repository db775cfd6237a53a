//! The simulation in `cargo test`: a seed without a violation, the same trace when it runs again, and two planted
//! faults that it must find. CI runs 200 seeds and all planted faults besides, in an optimised build.

#![expect(clippy::print_stdout, reason = "the figures of a run")]

use std::time::Duration;

use chaos_tests::simulation::{Options, Report, planted, run};

/// Seeds in all; `SIM_SEEDS` changes it.
fn seeds() -> u64 {
    let given = std::env::var("SIM_SEEDS").ok();
    given.map_or(1, |text| text.parse().expect("SIM_SEEDS is a number of seeds"))
}

#[test]
fn seeds_hold_and_give_the_same_trace_again() {
    let mut total = Vec::new();
    for seed in 0..seeds() {
        let (report, again) = std::thread::scope(|scope| {
            let again = scope.spawn(|| run(Options::new(seed)));
            (run(Options::new(seed)), again.join().expect("it ran to its end"))
        });
        assert_eq!(report.trace_hash, again.trace_hash, "seed {seed}");
        assert_eq!(report.commands, again.commands, "seed {seed}");
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

/// Runs seeds until one finds the planted fault.
fn check_found(name: &str) {
    const SEEDS_MAX: u64 = 40;
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

#[test]
fn a_planted_fault_of_the_replica_is_found() {
    check_found("acknowledge_before_fsync");
}

#[test]
fn a_planted_fault_of_the_state_machine_is_found() {
    check_found("effect_done_twice");
}

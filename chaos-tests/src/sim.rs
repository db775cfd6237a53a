//! `chaos-tests sim`: runs seeds of the simulation on all cores and prints what came of them.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use anyhow::Context;
use clap::Args;

use crate::simulation::{self, Options, PLANTS, Report, planted};

/// Reports that wait to be printed.
const REPORTS_MAX: usize = 16;

/// What to run.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Seeds, the last one excluded, such as 0..100.
    #[arg(long, default_value = "0..20", value_parser = range, conflicts_with = "seed")]
    seeds: Range<u64>,
    /// One seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Virtual seconds with faults.
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Plant a fault and say how many seeds it takes to find it; `all` for one after the other.
    #[arg(long)]
    plant: Option<String>,
    /// Print the trace.
    #[arg(long)]
    trace: bool,
    /// Run each seed twice and compare the hashes of the traces.
    #[arg(long)]
    twice: bool,
    /// Seeds at the same time; as many as there are cores if not given.
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let parse = || {
        let (first, end) = text.split_once("..").context("such as 0..100")?;
        anyhow::Ok(first.parse()?..end.parse()?)
    };
    parse().map_err(|error| error.to_string())
}

impl Arguments {
    fn seeds(&self) -> Range<u64> {
        self.seed.map_or(self.seeds.clone(), |seed| seed..seed + 1)
    }

    fn options(&self, seed: u64) -> Options {
        Options {
            seconds: self.seconds,
            keep_trace: self.trace,
            ..Options::new(seed)
        }
    }

    fn jobs(&self) -> usize {
        let cores = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        self.jobs.unwrap_or_else(cores).get()
    }
}

/// Runs them and prints the reports; a failure if anything was violated, or a planted fault was not found.
///
/// # Errors
/// An unknown plant, or output that nobody takes.
pub fn run(arguments: &Arguments, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let good = match arguments.plant.as_deref() {
        None => run_seeds(arguments, out)?,
        Some("all") => {
            let mut good = true;
            for name in PLANTS {
                good &= find(arguments, name, out)?;
            }
            good
        }
        Some(name) => find(arguments, name, out)?,
    };
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs `each` for these seeds on several threads, whose runtimes share nothing; `take` gets the results as they
/// come and says whether to go on.
fn on_all_cores<T: Send>(
    jobs: usize,
    seeds: Range<u64>,
    each: impl Fn(u64) -> T + Sync,
    mut take: impl FnMut(T) -> io::Result<bool>,
) -> io::Result<()> {
    let next = AtomicU64::new(seeds.start);
    std::thread::scope(|scope| {
        let (results, received) = mpsc::sync_channel(REPORTS_MAX);
        for _ in 0..jobs {
            let (results, next, each) = (results.clone(), &next, &each);
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || results.send(each(seed)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(results);
        for result in received {
            if !take(result)? {
                break;
            }
        }
        Ok(())
    })
}

fn run_seeds(arguments: &Arguments, out: &mut impl Write) -> io::Result<bool> {
    let mut total = Total::default();
    let each = |seed| {
        let report = simulation::run(arguments.options(seed));
        let again = arguments.twice.then(|| simulation::run(arguments.options(seed)));
        (report, again)
    };
    on_all_cores(arguments.jobs(), arguments.seeds(), each, |(report, again)| {
        print(out, &report)?;
        if again.is_some_and(|again| again.trace_hash != report.trace_hash) {
            writeln!(out, "  DIFFERENT the second time")?;
            total.different += 1;
        }
        total.add(&report);
        Ok(true)
    })?;
    total.print(out, arguments.twice)?;
    Ok(total.violations == 0 && total.different == 0)
}

/// Runs seeds until one finds the planted fault.
fn find(arguments: &Arguments, name: &str, out: &mut impl Write) -> anyhow::Result<bool> {
    let planted = planted(name).map_err(|names| anyhow::anyhow!("no such plant; there is {names}"))?;
    let each = |seed| {
        simulation::run(Options {
            planted,
            ..arguments.options(seed)
        })
    };
    let mut unseen: BTreeMap<u64, Report> = BTreeMap::new();
    let mut seeds = arguments.seeds();
    let mut found = None;
    // Reports come in any order; the first seed counts.
    on_all_cores(arguments.jobs(), arguments.seeds(), each, |report| {
        unseen.insert(report.seed, report);
        while let Some(report) = unseen.remove(&seeds.start) {
            seeds.start += 1;
            if !report.violations.is_empty() {
                found = Some(report);
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    let tried = seeds.start - arguments.seeds().start;
    match &found {
        None => writeln!(out, "plant {name}: NOT FOUND by {tried} seeds")?,
        Some(report) => {
            let (seed, first) = (report.seed, &report.violations[0]);
            writeln!(
                out,
                "plant {name}: found by seed {seed}, the {tried}. one: {first}"
            )?;
            for line in &report.trace {
                writeln!(out, "{line}")?;
            }
        }
    }
    Ok(found.is_some())
}

/// Sums over all seeds.
#[derive(Debug, Default)]
struct Total {
    seeds: u64,
    virtual_ms: u64,
    commands: u64,
    commands_min: Option<u64>,
    acknowledged: u64,
    faults: BTreeMap<&'static str, u64>,
    faults_min: Option<u64>,
    events: BTreeMap<&'static str, u64>,
    violations: usize,
    different: usize,
    failed: Vec<u64>,
}

impl Total {
    fn add(&mut self, report: &Report) {
        let least = |known: Option<u64>, new: u64| Some(known.map_or(new, |known| known.min(new)));
        self.seeds += 1;
        self.virtual_ms += report.virtual_ms;
        self.commands += report.commands;
        self.commands_min = least(self.commands_min, report.commands);
        self.acknowledged += report.acknowledged;
        self.faults_min = least(self.faults_min, report.fault_count());
        for (kind, count) in &report.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        for (kind, count) in &report.events {
            *self.events.entry(kind).or_default() += count;
        }
        self.violations += report.violations.len();
        if !report.violations.is_empty() {
            self.failed.push(report.seed);
        }
    }

    fn print(&self, out: &mut impl Write, twice: bool) -> io::Result<()> {
        writeln!(out, "faults {:?}", self.faults)?;
        writeln!(out, "events {:?}", self.events)?;
        for seed in &self.failed {
            writeln!(
                out,
                "FAILED: cargo run --release -p chaos-tests -- sim --seed {seed} --trace"
            )?;
        }
        let event = |kind| self.events.get(kind).copied().unwrap_or_default();
        writeln!(
            out,
            "seeds {}, virtual seconds {}, faults {} (at least {} a seed), commands {} (at least {} a seed), \
             acknowledged writes {}, leader changes {}, elections {}, {}violations {}",
            self.seeds,
            self.virtual_ms / 1000,
            self.faults.values().sum::<u64>(),
            self.faults_min.unwrap_or_default(),
            self.commands,
            self.commands_min.unwrap_or_default(),
            self.acknowledged,
            event("leader changes"),
            event("elections"),
            if twice {
                format!("traces that differ {}, ", self.different)
            } else {
                String::new()
            },
            self.violations,
        )
    }
}

fn print(out: &mut impl Write, report: &Report) -> io::Result<()> {
    for line in &report.trace {
        writeln!(out, "{line}")?;
    }
    writeln!(
        out,
        "seed {}: {} members, {} virtual s, {} faults, {} commands, {} acknowledged, trace {}",
        report.seed,
        report.members,
        report.virtual_ms / 1000,
        report.fault_count(),
        report.commands,
        report.acknowledged,
        &report.trace_hash[..16],
    )?;
    for violation in &report.violations {
        writeln!(out, "  VIOLATION {violation}")?;
    }
    if !report.violations.is_empty() {
        writeln!(out, "  repeat with: {}", report.repeat_with())?;
    }
    Ok(())
}

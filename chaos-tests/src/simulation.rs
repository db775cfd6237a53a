//! The deterministic simulation: the coordinator's real leader, executor, host sessions and replica, between
//! models of the hosts and of the validator, on simulated time. Everything follows from one seed.
//!
//! ```text
//! operator --propose--> Store --> Log --> Replica --> disks that lose power
//!                         |                  +--> Machine, watched: invariants after every command
//! hosts <--channels--> session::serve        Leader: executor, followers, scheduler, deadlines
//!   |  chutes                                   |  ValidatorApi, Dial + websocket
//!   +-----claim, verify, activate-----> validator model
//! ```
//! In reading order: `recorder.rs` (trace, counts, violations), `clock.rs`, `disk.rs`, `watched.rs` (the state
//! machine and the log under watch), `member.rs`, `validator.rs` with `api.rs` and `socket.rs`, `host.rs`,
//! `operator.rs`, `market.rs` (what the validator does of itself), `fault.rs`, `liveness.rs`, `world.rs`.
//!
//! Not simulated: QUIC, the management API, redb's writer threads, several members.

mod api;
mod clock;
mod disk;
mod fault;
mod host;
mod liveness;
mod market;
mod member;
mod operator;
mod recorder;
mod socket;
mod validator;
mod watched;
mod world;

use std::collections::BTreeMap;

use coordinator_core::state_machine::Faults;

/// What to run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Everything follows from it.
    pub seed: u64,
    /// Virtual seconds with faults; healing comes on top.
    pub seconds: u64,
    /// Keep the lines of the trace, not only their hash.
    pub keep_trace: bool,
    /// Faults planted in the state machine, to show that they are found.
    pub planted: Faults,
}

impl Options {
    /// 120 virtual seconds, nothing planted.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            seconds: 120,
            keep_trace: false,
            planted: Faults::none(),
        }
    }
}

/// What came out of a run.
#[derive(Debug, Clone)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// Virtual time that passed, healing included, in ms.
    pub virtual_ms: u64,
    /// Injected faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Commands applied, replays after restarts included.
    pub commands: u64,
    /// Acknowledged writes that were looked for after restarts.
    pub acknowledged: u64,
    /// What happened that makes a run worth its time, by kind.
    pub events: BTreeMap<&'static str, u64>,
    /// What did not hold, in words.
    pub violations: Vec<String>,
    /// SHA-256 over the lines of the trace.
    pub trace_hash: String,
    /// The lines, if they were asked for.
    pub trace: Vec<String>,
}

impl Report {
    /// Injected faults in all.
    #[must_use]
    pub fn fault_count(&self) -> u64 {
        self.faults.values().sum()
    }

    /// The command that repeats this run.
    #[must_use]
    pub fn repeat_with(&self) -> String {
        format!(
            "cargo run --release -p chaos-tests -- sim --seed {} --trace",
            self.seed
        )
    }
}

/// The fault of the state machine with this name. Effects out of order are not among them: the executor takes
/// the oldest of each subject, whatever the state machine would accept.
///
/// # Errors
/// The names that there are.
pub fn planted(name: &str) -> Result<Faults, String> {
    let none = Faults::none();
    let known = [
        (
            "double_allocation",
            Faults {
                double_allocation: true,
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
            "gpu_freed_early",
            Faults {
                gpu_freed_early: true,
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
    let found = known.iter().find(|(other, _)| *other == name);
    found
        .map(|(_, faults)| *faults)
        .ok_or_else(|| known.map(|(name, _)| name).join(", "))
}

/// Runs one seed to its end, or to its first violation.
///
/// # Panics
/// When no runtime can be made.
#[must_use]
pub fn run(options: Options) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without threads or IO needs nothing");
    runtime.block_on(world::run(options))
}

//! The deterministic simulation: three to five coordinator members with their real leaders, executors, host
//! sessions and replicas, between models of the hosts and of the validator, on simulated time, network and
//! randomness. Everything follows from one seed.
//!
//! ```text
//! clients, operator --propose--> Store --> Log --> Replica <--network--> the other members' replicas
//!                                   |                 |  disks that lose power
//!                                   |                 +--> Machine, watched: invariants after every command
//! hosts <--pipes--> session::serve on any member    member::lead: executor, followers, scheduler, membership
//!   |  chutes                                          |  ValidatorApi, Dial + websocket
//!   +-----claim, verify, activate-----> validator model
//! ```
//! In reading order: `recorder.rs` (trace, counts, violations), `clock.rs`, `disk.rs`, `network.rs`, `ledger.rs`
//! (the same state at the same index), `watched.rs` (the state machine and the log under watch), `member.rs`,
//! `validator.rs` with `api.rs` and `socket.rs`, `host.rs`, `client.rs` with `founding.rs` and `operator.rs`,
//! `market.rs` (what the validator does of itself), `fault.rs`, `plant.rs`, `liveness.rs`, `world.rs`.
//!
//! Not simulated: QUIC, the management API, redb's writer threads, identity and certificates. A member that
//! stands still does so on the network only, see `network.rs`.

mod api;
mod client;
mod clock;
mod disk;
mod fault;
mod founding;
mod host;
mod ledger;
mod liveness;
mod market;
mod member;
mod network;
mod operator;
mod plant;
mod recorder;
mod socket;
mod validator;
mod watched;
mod world;

use std::collections::BTreeMap;

pub use plant::{NAMES as PLANTS, Planted, planted};

/// What to run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Everything follows from it.
    pub seed: u64,
    /// Virtual seconds with faults; healing comes on top.
    pub seconds: u64,
    /// Keep the lines of the trace, not only their hash.
    pub keep_trace: bool,
    /// Faults planted to show that they are found.
    pub planted: Planted,
}

impl Options {
    /// 120 virtual seconds, nothing planted.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            seconds: 120,
            keep_trace: false,
            planted: Planted::default(),
        }
    }
}

/// What came out of a run.
#[derive(Debug, Clone)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// How many members there were.
    pub members: usize,
    /// Virtual time that passed, healing included, in ms.
    pub virtual_ms: u64,
    /// Injected faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Commands applied; each counts once, on however many members.
    pub commands: u64,
    /// Acknowledged writes that were looked for in the state of every later leader.
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

//! Our replicated log against etcd: three members each, as separate processes on this machine, on the same disk.
//!
//! `cargo bench -p agent --bench replication` prints one JSON object on standard output and what it does on standard
//! error. `docs/benchmarks.md` says what is measured, what was expected and what came out. In reading order:
//! `ours.rs` and `etcd.rs` start the members; `load.rs` is the one load generator for both; `usage.rs` reads what the
//! members used; `report.rs` makes medians and ratios of it.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser as _;
use serde_json::{Value, json};

#[path = "replication/etcd.rs"]
mod etcd;
#[path = "replication/load.rs"]
mod load;
#[path = "replication/ours.rs"]
mod ours;
#[path = "replication/report.rs"]
mod report;
#[path = "replication/usage.rs"]
mod usage;

use load::{Load, Requests};
use report::Rounds;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How many clients write at a time.
const CLIENTS: [usize; 3] = [1, 64, 256];
/// Clients of the row with a signature for each request.
const SIGNED_CLIENTS: usize = 64;
/// Before each measurement the clients write for so long, uncounted.
const WARM_UP: Duration = Duration::from_millis(500);

/// Arguments.
#[derive(Debug, clap::Parser)]
struct Options {
    /// Alternating rounds
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Seconds for which idle members are watched, twice
    #[arg(long, default_value_t = 20)]
    idle_seconds: u64,
    /// Folder for the members' data, on a real disk
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    folder: PathBuf,
    /// Executable of the agent, instead of the one built with this benchmark
    #[arg(long, env = "REPLICATION_AGENT", default_value = env!("CARGO_BIN_EXE_chutes-agent"))]
    agent: PathBuf,
    /// Only our members: for profiling
    #[arg(long)]
    ours_only: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    // Fails when one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = runtime.block_on(measure(&options))?;
    Ok(writeln!(
        std::io::stdout(),
        "{}",
        serde_json::to_string_pretty(&report)?
    )?)
}

fn say(line: &str) {
    // Standard error may be closed; the figures do not depend on it.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A cluster under test.
struct System {
    name: &'static str,
    /// Process ids that each member consists of.
    members: Vec<Vec<u32>>,
    requests: Box<dyn Requests>,
    rounds: Rounds,
}

impl System {
    fn processes(&self) -> impl Iterator<Item = u32> {
        self.members.iter().flatten().copied()
    }

    /// Loads the cluster and takes down what its members used for each write.
    async fn round(&mut self, row: &str, clients: usize, signed: bool, time: Duration) -> anyhow::Result<()> {
        let mut load = Load::connect(self.requests.as_ref(), clients, signed).await?;
        load.run(WARM_UP).await?;
        let before = usage::time(self.processes());
        let written = load.run(time).await?;
        let used = usage::time(self.processes()).saturating_sub(before);
        let writes = written.latencies.len() as f64;
        let p = |share| written.percentile(share).as_secs_f64() * 1e3;
        let figures = [
            ("writes_per_second", writes / written.took.as_secs_f64()),
            ("cpu_us_per_write", used.as_secs_f64() * 1e6 / writes),
            ("p50_ms", p(0.50)),
            ("p99_ms", p(0.99)),
        ];
        say(&format!("{:>5} {row:<18} {figures:.3?}", self.name));
        for (figure, value) in figures {
            self.rounds.add(row, figure, value);
        }
        Ok(())
    }

    /// Counts the calls of fsync and fdatasync while clients write.
    async fn count_syncs(&mut self, clients: usize, time: Duration) -> anyhow::Result<()> {
        let mut load = Load::connect(self.requests.as_ref(), clients, false).await?;
        load.run(WARM_UP).await?;
        let counter = usage::Counter::attach(self.processes()).await?;
        let written = load.run(time).await?;
        let calls = counter.calls().await? as f64;
        let writes = written.latencies.len() as f64;
        let row = row_of(clients);
        say(&format!(
            "{:>5} {row:<18} {calls} syncs for {writes} writes",
            self.name
        ));
        self.rounds
            .add(&row, "syncs_per_1000_writes", calls * 1e3 / writes);
        Ok(())
    }
}

fn row_of(clients: usize) -> String {
    if clients == 1 {
        "1 client".to_owned()
    } else {
        format!("{clients} clients")
    }
}

async fn measure(options: &Options) -> anyhow::Result<Value> {
    usage::refuse_memory(&options.folder)?;
    std::fs::create_dir_all(&options.folder)?;
    let temporary = tempfile::Builder::new()
        .prefix("replication-")
        .tempdir_in(&options.folder)?;
    let folder = temporary.path();
    let load_average = || std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load_before = load_average();
    let disk = usage::disk_latency(folder)?;
    let ours = ours::Ours::start(&options.agent, &folder.join("ours")).await?;
    let etcd = match options.ours_only {
        true => None,
        false => Some(etcd::Etcd::start(&folder.join("etcd")).await?),
    };
    let mut systems = vec![System {
        name: "ours",
        members: ours.members(),
        requests: ours.requests().await?,
        rounds: Rounds::default(),
    }];
    if let Some(etcd) = &etcd {
        systems.push(System {
            name: "etcd",
            members: etcd.members(),
            requests: etcd.requests().await?,
            rounds: Rounds::default(),
        });
    }

    idle(&mut systems, Duration::from_secs(options.idle_seconds)).await?;
    let time = Duration::from_secs(options.seconds);
    for round in 0..options.rounds {
        say(&format!(
            "round {} of {}, load average {}",
            round + 1,
            options.rounds,
            load_average().trim()
        ));
        for clients in CLIENTS {
            for system in in_turn(&mut systems, round) {
                system.round(&row_of(clients), clients, false, time).await?;
            }
        }
        systems[0]
            .round("64 clients, signed", SIGNED_CLIENTS, true, time)
            .await?;
    }
    for clients in CLIENTS {
        for system in &mut systems {
            system.count_syncs(clients, time).await?;
        }
    }
    for system in &mut systems {
        for member in &system.members {
            let (all, each_once) = usage::resident_kib(member)?;
            let figures = [
                ("resident_mib_per_member", each_once),
                ("resident_mib_counted_per_process", all),
            ];
            for (figure, kib) in figures {
                system.rounds.add("after the run", figure, kib as f64 / 1024.0);
            }
        }
    }
    let disk_after = usage::disk_latency(folder)?;
    ours.stop().await;
    if let Some(etcd) = etcd {
        etcd.stop().await;
    }
    let tables: serde_json::Map<String, Value> = systems
        .iter()
        .map(|system| (system.name.to_owned(), system.rounds.table()))
        .collect();
    let mut report = json!({
        "rounds": options.rounds,
        "seconds": options.seconds,
        "command_bytes": load::COMMAND_BYTES,
        "folder": options.folder,
        "load_average": { "before": load_before.trim(), "after": load_average().trim() },
        "fdatasync_ms": { "before": disk, "after": disk_after },
        "systems": tables,
    });
    if let [ours, etcd] = systems.as_slice() {
        report["ratios"] = report::ratios(&ours.rounds, &etcd.rounds);
    }
    report["idle_aims"] = report::idle(&systems[0].rounds);
    Ok(report)
}

/// Each system in turn, another one first in each round.
fn in_turn(systems: &mut [System], round: u32) -> Vec<&mut System> {
    let mut systems: Vec<&mut System> = systems.iter_mut().collect();
    if round % 2 == 1 {
        systems.reverse();
    }
    systems
}

/// What the members use while nobody writes: first their time, then their calls of fsync.
async fn idle(systems: &mut [System], time: Duration) -> anyhow::Result<()> {
    say("idle");
    // What starting left over is done by then.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before: Vec<Duration> = systems
        .iter()
        .map(|system| usage::time(system.processes()))
        .collect();
    tokio::time::sleep(time).await;
    for (system, before) in systems.iter_mut().zip(before) {
        let used = usage::time(system.processes()).saturating_sub(before);
        let of_a_core = used.as_secs_f64() / time.as_secs_f64() / system.members.len() as f64;
        system
            .rounds
            .add("idle", "cpu_percent_per_member", of_a_core * 100.0);
    }
    for system in systems.iter_mut() {
        let counter = usage::Counter::attach(system.processes()).await?;
        tokio::time::sleep(time / 2).await;
        let calls = counter.calls().await? as f64;
        let rate = calls / (time / 2).as_secs_f64() / system.members.len() as f64;
        system.rounds.add("idle", "syncs_per_second_per_member", rate);
    }
    Ok(())
}

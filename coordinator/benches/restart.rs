//! How long a member takes from its start until it may be read, after a `kill -9` with a million commands behind it,
//! ten thousand servers in its state, and a hundred thousand commands after the last snapshot.
//!
//! Three processes, one after the other, over one folder: one writes and kills itself, one opens and says when it was
//! ready, one opens again after an orderly stop, for comparison. `cargo bench -p coordinator --bench restart`; the
//! last line is one JSON object.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::sync::Arc;

use anyhow::Context as _;
use coordinator::clock::{Clock, WallClock};
use coordinator::member::ReplicatedLog;
use coordinator::store::{Machine, Store};
use coordinator_core::state_machine::{Command, Faults};
use protocol::id::ServerId;
use protocol::report::HostFacts;
use replica::{Config, Replica, SnapshotPolicy, Storage};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

const SERVERS: u32 = 10_000;
const COMMANDS: u32 = 1_000_000;
/// Commands after the last snapshot. Their rows are written along, so that only the newest are applied again.
const SINCE_THE_SNAPSHOT: u32 = 100_000;
/// Writers at once.
const WRITERS: u32 = 512;

fn facts(server: u32, disk_free_gb: u32) -> HostFacts {
    HostFacts {
        server: ServerId::parse(&format!("server-{server}")).expect("an id"),
        name: format!("gpu-host-{server}"),
        address: "192.0.2.1".to_owned(),
        proof_port: 30443,
        devices: Vec::new(),
        cpu_count: 64,
        memory_gb: 1024,
        disk_free_gb,
        agent_version: "0.1.0".to_owned(),
    }
}

async fn open(folder: &Path, snapshots: bool) -> anyhow::Result<(Replica, Store)> {
    let machine = Machine::new(Faults::none());
    let storage = Storage::Files {
        directory: folder.to_owned(),
    };
    let mut config = Config::new("bench-1", 1, storage);
    if !snapshots {
        config.snapshots = SnapshotPolicy {
            every_entries: None,
            every_bytes: None,
            ..SnapshotPolicy::default()
        };
    }
    let replica = Replica::open(config, Box::new(machine.clone()), Arc::new(replica::Unconnected)).await?;
    replica.linearizable().await?;
    let log = Arc::new(ReplicatedLog::new(replica.clone()));
    let clock: Arc<dyn Clock> = Arc::new(WallClock);
    Ok((replica, Store::new(machine, log, clock, 1)))
}

/// Changes the servers' facts, so many commands in all, many at a time.
async fn write(store: &Store, from: u32, to: u32) -> anyhow::Result<()> {
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let store = store.clone();
        writers.spawn(async move {
            for number in (from + writer..to).step_by(WRITERS as usize) {
                let facts = facts(number % SERVERS, number);
                store.propose(Command::RecordHost { facts }).await?;
            }
            Ok::<_, coordinator::store::Error>(())
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended??;
    }
    Ok(())
}

/// Writes everything and dies.
async fn fill(folder: PathBuf) -> anyhow::Result<()> {
    let (replica, store) = open(&folder, true).await?;
    write(&store, 0, COMMANDS - SINCE_THE_SNAPSHOT).await?;
    // What is written so far is in the state's file for good.
    replica.snapshot().await?;
    replica.shutdown().await;
    let (_replica, store) = open(&folder, false).await?;
    write(&store, COMMANDS - SINCE_THE_SNAPSHOT, COMMANDS).await?;
    let own = rustix::process::getpid();
    Ok(rustix::process::kill_process(own, rustix::process::Signal::KILL)?)
}

/// Opens, and says how long it took until a read was current.
async fn start(folder: PathBuf) -> anyhow::Result<()> {
    let began = Instant::now();
    let (replica, store) = open(&folder, true).await?;
    let ready_ms = began.elapsed().as_millis();
    let servers = store.read(|state| state.servers().len());
    let last = store.read(|state| {
        let newest = state.servers().values().map(|server| server.facts.disk_free_gb);
        newest.max()
    });
    anyhow::ensure!(
        last == Some(COMMANDS - 1),
        "the last acknowledged write is lost: {last:?}"
    );
    let applied_again = replica.metrics().commands_applied;
    let said = json!({
        "ready_ms": u64::try_from(ready_ms)?,
        "servers": servers,
        "applied_again": applied_again,
    });
    writeln!(std::io::stdout(), "{said}")?;
    replica.shutdown().await;
    Ok(())
}

fn again(word: &str, folder: &Path) -> anyhow::Result<(bool, Value)> {
    let mut process = Process::new(std::env::current_exe()?);
    let output = process.arg(word).arg(folder).stderr(Stdio::inherit()).output()?;
    let line = String::from_utf8_lossy(&output.stdout)
        .lines()
        .last()
        .map(str::to_owned);
    let value = line.map_or(Value::Null, |line| {
        serde_json::from_str(&line).unwrap_or_default()
    });
    Ok((output.status.success(), value))
}

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1);
    let word = words.next().unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut folder = || words.next().map(PathBuf::from).context("a folder");
    match word.as_str() {
        "fill" => return runtime.block_on(fill(folder()?)),
        "start" => return runtime.block_on(start(folder()?)),
        _ => {}
    }
    let folder = tempfile::tempdir()?;
    let (lived, _) = again("fill", folder.path())?;
    anyhow::ensure!(!lived, "it should have killed itself");
    let (good, killed) = again("start", folder.path())?;
    anyhow::ensure!(good, "it does not start after the kill");
    let (good, stopped) = again("start", folder.path())?;
    anyhow::ensure!(good, "it does not start after the stop");
    let result = json!({
        "commands": COMMANDS,
        "since_the_snapshot": SINCE_THE_SNAPSHOT,
        "applied_again": killed["applied_again"],
        "servers": killed["servers"],
        "ready_after_kill_ms": killed["ready_ms"],
        "ready_after_stop_ms": stopped["ready_ms"],
    });
    Ok(writeln!(std::io::stdout(), "{result}")?)
}

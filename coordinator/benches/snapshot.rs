//! What writes feel of a new member that is sent a snapshot: three members under a steady load with ten thousand
//! servers in their state, and a fourth with an empty disk that joins, again and again.
//!
//! Each member is a process of its own, with one thread for its tasks as in production, over QUIC on loopback and with
//! real files. This process is the leader, and the writers are in it. The new member has the lowest priority: what it
//! does is done by another machine otherwise. `cargo bench -p coordinator --bench snapshot [-- --rounds 7 --folder
//! FOLDER]`; the last line is one JSON object.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use coordinator::clock::{Clock, WallClock};
use coordinator::door;
use coordinator::identity::{
    Authority, Bearer, CA_CERTIFICATE, HOST_CERTIFICATE, HostKey, Identity, Names, write_secret,
};
use coordinator::member::ReplicatedLog;
use coordinator::store::{Machine, Store};
use coordinator_core::state_machine::{Command, Faults};
use protocol::gpu::DeviceInfo;
use protocol::id::{GpuId, ServerId};
use protocol::report::HostFacts;
use replica::{Config, Replica, Start, Storage};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command as Process};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

const SERVERS: u32 = 10_000;
const GPUS: u32 = 8;
/// Writers of the load, and between two writes of one: 1,600 writes a second.
const WRITERS: u32 = 32;
const WRITE_EVERY: Duration = Duration::from_millis(20);
/// Writers that fill the state.
const FILLERS: u32 = 512;
/// Members with these numbers vote; the others come and go.
const VOTERS: u64 = 3;
const NICE_MAX: i32 = 19;
/// Before each measurement the load goes on for so long, uncounted.
const SETTLE: Duration = Duration::from_secs(2);
/// How long writes are measured while nothing else happens.
const QUIET: Duration = Duration::from_secs(5);
const JOIN_MAX: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(5);

fn server(number: u32) -> ServerId {
    ServerId::parse(&format!("server-{number}")).expect("an id")
}

fn facts(number: u32, disk_free_gb: u32) -> HostFacts {
    let device = |gpu: u32| DeviceInfo {
        uuid: GpuId::parse(&format!("{number:016x}{gpu:016x}")).expect("an id"),
        name: "NVIDIA H100 80GB HBM3".to_owned(),
        memory: 85_899_345_920,
        processors: 132,
        clock_rate_khz: 1_980_000,
        max_threads_per_processor: 2048,
    };
    HostFacts {
        server: server(number),
        name: format!("gpu-host-{number}"),
        address: "192.0.2.1".to_owned(),
        proof_port: 30443,
        devices: (0..GPUS).map(device).collect(),
        cpu_count: 64,
        memory_gb: 1024,
        disk_free_gb,
        agent_version: "0.1.0".to_owned(),
    }
}

/// A member of this process, with its door.
struct Member {
    replica: Replica,
    machine: Machine,
    address: SocketAddr,
}

impl Member {
    /// Opens what lies in `folder`, where the certificate is already, and answers other members from then on.
    async fn open(folder: &Path, number: u64, start: Start) -> anyhow::Result<Self> {
        let identity = Identity::of_host(folder)?;
        let endpoint = door::open(SocketAddr::from(([127, 0, 0, 1], 0)), &identity)?;
        let address = endpoint.local_addr()?;
        let peers = door::peers(endpoint.clone(), folder.to_owned());
        let machine = Machine::new(Faults::none());
        let storage = Storage::Files {
            directory: folder.join("raft"),
        };
        let mut config = Config::new("bench-1", number, storage);
        config.address = address.to_string();
        config.start = start;
        let replica = Replica::open(config, Box::new(machine.clone()), Arc::new(peers)).await?;
        let answering = replica.clone();
        tokio::spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let replica = answering.clone();
                tokio::spawn(async move {
                    let Ok(connection) = incoming.await else { return };
                    let Ok(Some(bearer)) = Bearer::of_peer(&connection) else {
                        return;
                    };
                    let of_replica = move |from, question: Vec<u8>| {
                        let replica = replica.clone();
                        async move {
                            let answer = replica.answer(from, &question).await;
                            answer.map_err(|error| error.to_string())
                        }
                    };
                    let of_coordinator = |_, _| std::future::ready(Err("no coordinator is here".to_owned()));
                    let from = bearer.member.unwrap_or_default();
                    replica::quic::serve(connection, from, of_replica, of_coordinator).await;
                });
            }
        });
        Ok(Self {
            replica,
            machine,
            address,
        })
    }
}

/// A certificate for a member, in a folder of its own.
fn admit(authority: &Authority, all: &Path, number: u64) -> anyhow::Result<PathBuf> {
    let folder = all.join(number.to_string());
    std::fs::create_dir_all(&folder)?;
    let names = Names {
        server: ServerId::parse(&format!("member-{number}.bench"))?,
        member: Some(number),
    };
    let key = HostKey::open_or_make(&folder)?;
    let certificate = authority.issue(&names, &key.public(), WallClock.now())?;
    write_secret(&folder.join(HOST_CERTIFICATE), &certificate)?;
    write_secret(&folder.join(CA_CERTIFICATE), authority.certificate_pem())?;
    Ok(folder)
}

/// The process of another member: says where its door is, and ends with the leader's.
async fn follow(folder: PathBuf, number: u64) -> anyhow::Result<()> {
    if number > VOTERS {
        rustix::process::nice(NICE_MAX)?;
    }
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let member = Member::open(&folder, number, Start::Join).await?;
    writeln!(std::io::stdout(), "{}", member.address)?;
    std::future::pending().await
}

/// Another member as this process sees it.
struct Other {
    process: Child,
    number: u64,
    address: String,
}

impl Other {
    async fn start(authority: &Authority, all: &Path, number: u64) -> anyhow::Result<Self> {
        let folder = admit(authority, all, number)?;
        let mut process = Process::new(std::env::current_exe()?);
        process.arg("follow").arg(folder).arg(number.to_string());
        process
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut process = process.spawn()?;
        let said = process.stdout.take().context("its standard output")?;
        let address = BufReader::new(said).lines().next_line().await?;
        Ok(Self {
            process,
            number,
            address: address.context("a member that does not start")?,
        })
    }
}

/// Writes that were acknowledged: when each was due, and how long after that it was.
type Written = Arc<Mutex<Vec<(Instant, Duration)>>>;

/// Writes at a steady rate for as long as the set lives. A write counts from the moment in which it was due.
fn keep_writing(store: &Store, written: &Written) -> JoinSet<anyhow::Result<()>> {
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (store, written) = (store.clone(), Arc::clone(written));
        writers.spawn(async move {
            let first = Instant::now() + WRITE_EVERY * writer / WRITERS;
            let mut due = tokio::time::interval_at(first, WRITE_EVERY);
            for number in (writer..).step_by(WRITERS as usize) {
                let at = due.tick().await;
                let facts = facts(number % SERVERS, number);
                store.propose(Command::RecordHost { facts }).await?;
                let took = at.elapsed();
                written
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push((at, took));
            }
            Ok(())
        });
    }
    writers
}

async fn fill(store: &Store) -> anyhow::Result<()> {
    let mut writers = JoinSet::new();
    for writer in 0..FILLERS {
        let store = store.clone();
        writers.spawn(async move {
            for number in (writer..SERVERS).step_by(FILLERS as usize) {
                let facts = facts(number, 0);
                store.propose(Command::RecordHost { facts }).await?;
            }
            Ok::<_, anyhow::Error>(())
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended??;
    }
    Ok(())
}

/// What writes took between two moments, in ms.
fn window(written: &Written, from: Instant, to: Instant) -> anyhow::Result<Window> {
    let written = written.lock().unwrap_or_else(PoisonError::into_inner);
    let within = written.iter().filter(|(at, _)| (from..to).contains(at));
    let mut took: Vec<Duration> = within.map(|(_, took)| *took).collect();
    took.sort_unstable();
    anyhow::ensure!(!took.is_empty(), "no write within {:?}", to - from);
    let share = |share: f64| took[((took.len() - 1) as f64 * share).round() as usize].as_secs_f64() * 1e3;
    Ok(Window {
        writes: took.len(),
        took_ms: (to - from).as_secs_f64() * 1e3,
        p50_ms: share(0.5),
        p99_ms: share(0.99),
        max_ms: share(1.0),
    })
}

#[derive(Debug, Clone, Copy)]
struct Window {
    writes: usize,
    took_ms: f64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

/// Median, least and most of a figure.
fn spread(rounds: &[[Window; 3]], figure: impl Fn(&[Window; 3]) -> f64) -> Value {
    let mut all: Vec<f64> = rounds.iter().map(figure).collect();
    all.sort_by(f64::total_cmp);
    let rounded = |value: f64| (value * 100.0).round() / 100.0;
    json!({
        "median": rounded(all[all.len() / 2]),
        "least": rounded(all[0]),
        "most": rounded(all[all.len() - 1]),
    })
}

fn report(rounds: &[[Window; 3]], snapshot_bytes: u64) -> Value {
    let of = |which: usize| {
        json!({
            "writes": spread(rounds, |round| round[which].writes as f64),
            "took_ms": spread(rounds, |round| round[which].took_ms),
            "p50_ms": spread(rounds, |round| round[which].p50_ms),
            "p99_ms": spread(rounds, |round| round[which].p99_ms),
            "max_ms": spread(rounds, |round| round[which].max_ms),
        })
    };
    json!({
        "servers": SERVERS,
        "rounds": rounds.len(),
        "snapshot_bytes": snapshot_bytes,
        "before": of(0),
        "while_a_snapshot_is_written": of(1),
        "while_a_member_joins": of(2),
        "p99_ratio_written": spread(rounds, |round| round[1].p99_ms / round[0].p99_ms),
        "p99_ratio_joins": spread(rounds, |round| round[2].p99_ms / round[0].p99_ms),
    })
}

/// One new member, from before it joins until it has everything.
async fn round(member: &Member, other: &Other, written: &Written) -> anyhow::Result<[Window; 3]> {
    let replica = &member.replica;
    sleep(SETTLE).await;
    let before = Instant::now();
    sleep(QUIET).await;
    let writes = Instant::now();
    replica.snapshot().await?;
    let done = Instant::now();
    sleep(SETTLE).await;
    anyhow::ensure!(
        replica.metrics().purged_index.is_some(),
        "the log has everything: no snapshot would be sent"
    );
    let joins = Instant::now();
    replica.add_learner(other.number, other.address.clone()).await?;
    let last = replica.metrics().last_index;
    timeout(JOIN_MAX, async {
        let there = || {
            replica
                .progress()
                .get(&other.number)
                .is_some_and(|progress| progress.matched >= last)
        };
        while !there() {
            sleep(LOOK_EVERY).await;
        }
    })
    .await
    .context("the new member does not catch up")?;
    let joined = Instant::now();
    // Those that were due until now are acknowledged.
    sleep(SETTLE).await;
    replica.remove_member(other.number).await?;
    anyhow::ensure!(replica.leads_now(), "another member leads");
    Ok([
        window(written, before, writes)?,
        window(written, writes, done)?,
        window(written, joins, joined)?,
    ])
}

async fn measure(rounds: u64, folder: &Path) -> anyhow::Result<Value> {
    let all = tempfile::tempdir_in(folder)?;
    let (authority, _) = Authority::make()?;
    let folder = admit(&authority, all.path(), 1)?;
    let member = Member::open(&folder, 1, Start::Found).await?;
    member.replica.linearizable().await?;
    let mut voters = Vec::new();
    for number in 2..=VOTERS {
        let other = Other::start(&authority, all.path(), number).await?;
        member.replica.add_learner(number, other.address.clone()).await?;
        voters.push(other);
    }
    member.replica.set_voters((1..=VOTERS).collect()).await?;
    let log = Arc::new(ReplicatedLog::new(member.replica.clone()));
    let store = Store::new(member.machine.clone(), log, Arc::new(WallClock), 1);
    fill(&store).await?;
    member.replica.snapshot().await?;
    let written = Written::default();
    let mut writers = keep_writing(&store, &written);
    let mut measured = Vec::new();
    for number in VOTERS + 1..=VOTERS + rounds {
        let mut other = Other::start(&authority, all.path(), number).await?;
        let windows = tokio::select! {
            windows = round(&member, &other, &written) => windows?,
            Some(ended) = writers.join_next() => anyhow::bail!("a writer ended: {ended:?}"),
        };
        other.process.kill().await?;
        let [before, writes, joins] = windows;
        writeln!(
            std::io::stderr(),
            "before {before:.2?}\n  snapshot {writes:.2?}\n  joins {joins:.2?}"
        )?;
        measured.push(windows);
        written.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
    let snapshot_bytes = std::fs::metadata(folder.join("raft/state.snapshot"))?.len();
    Ok(report(&measured, snapshot_bytes))
}

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut rounds, mut folder) = (7, PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word}: of what?"))?;
        match word.as_str() {
            "follow" => {
                let number = words.next().context("a number")?.parse()?;
                return runtime.block_on(follow(value.into(), number));
            }
            "--rounds" => rounds = value.parse()?,
            "--folder" => folder = value.into(),
            _ => anyhow::bail!("{word:?}: there are --rounds and --folder"),
        }
    }
    let result = runtime.block_on(measure(rounds, &folder))?;
    Ok(writeln!(std::io::stdout(), "{result}")?)
}

//! The storm: a development cluster of three in real processes, `kill -9` of one process of the leading host after
//! the other at moments from a seed,
//! writes all the time, and what must hold in spite of it.
//!
//! ```text
//! something to do -> a random moment -> kill -9 -> until it answers again -> checks -> ... -> settled -> checks
//! ```
//! The kernel, the disk and the clock are real, so a seed repeats the order of kills and about their moments,
//! not every interleaving: that is what the simulation is for. This file reads as the list of steps;
//! `cluster.rs` starts, finds and ends processes, `writes.rs` keeps promises, `checks.rs` says what must hold.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use validator_stand_in::ledger::{Entry, Record};

pub(crate) mod checks;
pub(crate) mod cluster;
pub(crate) mod doors;
pub(crate) mod processes;
pub(crate) mod writes;

use checks::Endings;
use cluster::Cluster;
pub use cluster::Victim;
use doors::Doors;
use processes::Process;
use writes::Promises;

/// Deployments that must serve before the first kill.
const SERVING_FIRST: usize = 2;
/// Chutes that nothing here can run, for writes that change nothing else.
const BANNED_CHUTES: usize = 4;
/// Who writes at the same time.
const WRITERS: usize = 2;
const CALM_PATIENCE: Duration = Duration::from_secs(120);
const RECOVERY_PATIENCE: Duration = Duration::from_secs(60);
/// A kill comes at most so long after something was given to do, in ms: launches take about as long.
const MOMENT_MAX_MS: u64 = 2_500;
/// Between two cheap questions.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// Between two looks at all sides.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What to do.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// How many processes are killed
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub kills: u32,
    /// Which process is killed each time; one kind after the other when absent
    #[arg(long, value_enum)]
    pub victim: Option<Victim>,
    /// Where the moments come from; a random one when absent
    #[arg(long)]
    pub seed: Option<u64>,
    /// The chutes-agent executable; the one beside this program when absent
    #[arg(long)]
    pub agent: Option<PathBuf>,
}

impl Options {
    /// What is killed, in order.
    fn victims(&self) -> impl Iterator<Item = Victim> {
        let kinds = self
            .victim
            .map_or_else(|| Victim::ALL.to_vec(), |victim| vec![victim]);
        (0..self.kills)
            .zip(kinds.into_iter().cycle())
            .map(|(_, victim)| victim)
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Why it is not good; empty if it is.
    pub reasons: Vec<String>,
    /// Kills of each kind of process.
    pub kills: BTreeMap<&'static str, u32>,
    seed: u64,
    answers_ms: Vec<u64>,
    started_ms: Vec<u64>,
    authenticated_ms: Vec<u64>,
    writes_acknowledged: u64,
    writes_repeated: u64,
    writes_lost: usize,
    doubled: usize,
    orphaned: usize,
    pids_kept: usize,
    pids_ended_by_scenario: usize,
    pids_lost: usize,
    looks: u64,
    invariant_violations: usize,
    deployments_verified: u64,
    development: Value,
}

/// `median`, `p99` and `max`, or nothing.
pub(crate) fn spread(times: &[u64]) -> Value {
    let mut times = times.to_vec();
    times.sort_unstable();
    let p99 = times.get((times.len() * 99).div_ceil(100).saturating_sub(1));
    json!({ "count": times.len(), "median": times.get(times.len() / 2), "p99": p99, "max": times.last() })
}

impl Report {
    /// All figures as one object.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "ok": self.reasons.is_empty(),
            "seed": self.seed,
            "kills": self.kills,
            "api_answers_ms": spread(&self.answers_ms),
            "process_started_ms": spread(&self.started_ms),
            "socket_authenticated_ms": spread(&self.authenticated_ms),
            "writes_acknowledged": self.writes_acknowledged,
            "writes_repeated": self.writes_repeated,
            "writes_lost": self.writes_lost,
            "doubled": self.doubled,
            "orphaned": self.orphaned,
            "pids_kept": self.pids_kept,
            "pids_ended_by_scenario": self.pids_ended_by_scenario,
            "pids_lost": self.pids_lost,
            "looks": self.looks,
            "invariant_violations": self.invariant_violations,
            "deployments_verified": self.deployments_verified,
            "development": self.development,
            "reasons": self.reasons,
        })
    }
}

/// Runs a storm on a cluster of its own.
///
/// # Errors
/// When there is no cluster to shake; whatever goes wrong in the storm is a reason in the report.
pub async fn run(options: &Options) -> anyhow::Result<Report> {
    // Fails when one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..));
    let agent = match &options.agent {
        Some(path) => path.canonicalize().with_context(|| path.display().to_string())?,
        None => cluster::agent_beside_us()?,
    };
    let folder = tempfile::Builder::new().prefix("chutes-storm-").tempdir()?;
    let report = shake(options, seed, &agent, folder.path()).await;
    if report.as_ref().is_ok_and(|report| report.reasons.is_empty()) {
        return report;
    }
    let kept = format!("logs and data are in {}", folder.keep().display());
    let mut report = report.context(kept.clone())?;
    report.reasons.push(kept);
    Ok(report)
}

async fn shake(options: &Options, seed: u64, agent: &Path, folder: &Path) -> anyhow::Result<Report> {
    let limit = Duration::from_secs(300 + 60 * u64::from(options.kills));
    let mut cluster = Cluster::start(agent, folder, limit).await?;
    let mut storm = Storm::begin(&mut cluster, seed).await?;
    let stop = CancellationToken::new();
    let writer = tokio::spawn(writes::keep_writing(
        storm.doors.clone(),
        storm.promises.clone(),
        WRITERS,
        stop.clone(),
    ));
    let mut random = fastrand::Rng::with_seed(seed);
    for victim in options.victims() {
        if let Err(error) = storm.strike(&mut cluster, victim, &mut random).await {
            let why = format!("after a kill of {}: {error:#}", victim.subcommand());
            storm.report.reasons.push(why);
            break;
        }
    }
    stop.cancel();
    writer.await.context("the writer")?;
    if let Err(error) = storm.settle(&mut cluster).await {
        storm.report.reasons.push(format!("at the end: {error:#}"));
    }
    let mut report = storm.conclude();
    let (_, last_line) = cluster.stop().await?;
    report.judge_development(&last_line);
    Ok(report)
}

impl Report {
    /// The cluster's own oracle watched too.
    fn judge_development(&mut self, last_line: &str) {
        self.development = serde_json::from_str(last_line).unwrap_or_default();
        for member in ["writes_lost", "invariant_violations", "events_lost"] {
            if self.development[member] != 0 {
                let is = &self.development[member];
                self.reasons
                    .push(format!("the development cluster says: {member} {is}"));
            }
        }
    }
}

/// A chute process that ran when something was killed.
#[derive(Debug, Clone)]
struct Ran {
    process: Process,
    row: Value,
}

/// All that is known in the middle of it.
struct Storm {
    doors: Doors,
    promises: Promises,
    report: Report,
    data: PathBuf,
    ledger: Vec<Entry>,
    doubled: BTreeSet<String>,
    violations: BTreeSet<String>,
    ran: BTreeMap<String, Ran>,
}

/// One look at all sides.
struct Look {
    state: Value,
    validator: Value,
    processes: Vec<Process>,
}

impl Storm {
    /// Waits until something serves, and has chutes published that writes can be about.
    async fn begin(cluster: &mut Cluster, seed: u64) -> anyhow::Result<Self> {
        let doors = cluster.doors().await?;
        let mut storm = Self {
            doors,
            promises: Promises::default(),
            report: Report {
                seed,
                ..Report::default()
            },
            data: cluster.data.clone(),
            ledger: Vec::new(),
            doubled: BTreeSet::new(),
            violations: BTreeSet::new(),
            ran: BTreeMap::new(),
        };
        for number in 1..=BANNED_CHUTES {
            let name = format!("storm-{number}");
            let spec = json!({ "action": "publish_chute", "name": name, "include": ["b200"] });
            storm.doors.act(&spec).await?;
        }
        let deadline = Instant::now() + CALM_PATIENCE;
        loop {
            cluster.must_run()?;
            let found = match storm.look().await {
                Ok(look) => {
                    let rows = |member: &str| look.state[member].as_array().cloned().unwrap_or_default();
                    let mut idle = rows("chutes");
                    idle.retain(|chute| chute["runs_on_known_gpus"] == false);
                    let deployments = rows("deployments");
                    let serving = deployments.iter().filter(|row| row["phase"] == "serving");
                    // The cluster's own oracle writes about the first of them.
                    let oracle_is_there = idle.first().is_some_and(|chute| !chute["ban_reason"].is_null());
                    let serving = serving.count();
                    if serving >= SERVING_FIRST && idle.len() > BANNED_CHUTES && oracle_is_there {
                        let ids = idle[1..].iter().filter_map(|chute| chute["chute_id"].as_str());
                        storm.promises = Promises::new(ids.map(str::to_owned).collect());
                        return Ok(storm);
                    }
                    format!(
                        "{serving} of {} deployments serve, {} chutes cannot run here, oracle: {oracle_is_there}",
                        deployments.len(),
                        idle.len()
                    )
                }
                Err(error) => format!("{error:#}"),
            };
            anyhow::ensure!(
                Instant::now() < deadline,
                "the cluster does not serve in time: {found}"
            );
            sleep(LOOK_EVERY).await;
        }
    }

    /// Reads all sides and checks what must hold at any time.
    async fn look(&mut self) -> anyhow::Result<Look> {
        let floors = self.promises.acknowledged_now();
        let state = self.doors.state().await?;
        self.promises.check(&floors, &state);
        let violations = state["violations"].as_array().into_iter().flatten();
        self.violations
            .extend(violations.map(|violation| violation.to_string()));
        self.read_ledger().await?;
        let look = Look {
            validator: self.doors.validator().await?,
            processes: Process::all(),
            state,
        };
        let doubled = checks::doubled(&look.validator, &self.chutes(&look.processes));
        if !doubled.is_empty() {
            // A list of /proc is no snapshot: what is doubled is so a moment later, too.
            let again = checks::doubled(&look.validator, &self.chutes(&Process::all()));
            self.doubled
                .extend(doubled.into_iter().filter(|text| again.contains(text)));
        }
        self.report.looks += 1;
        Ok(look)
    }

    fn chutes<'a>(&self, processes: &'a [Process]) -> BTreeMap<&'a str, usize> {
        let found = processes::chutes(processes, &self.data);
        found
            .into_iter()
            .map(|(deployment, tops)| (deployment, tops.len()))
            .collect()
    }

    async fn read_ledger(&mut self) -> anyhow::Result<()> {
        let after = self.ledger.last().map_or(0, |entry| entry.id);
        let new = self.doors.ledger(after).await?;
        self.ledger.extend(new);
        Ok(())
    }

    async fn look_when_it_answers(&mut self) -> anyhow::Result<Look> {
        let deadline = Instant::now() + RECOVERY_PATIENCE;
        loop {
            match self.look().await {
                Ok(look) => return Ok(look),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => sleep(LOOK_EVERY).await,
            }
        }
    }

    /// One kill, from something to do to the recovery.
    async fn strike(
        &mut self,
        cluster: &mut Cluster,
        victim: Victim,
        random: &mut fastrand::Rng,
    ) -> anyhow::Result<()> {
        self.give_something_to_do(random).await?;
        // The random moment itself, not a wait for something.
        sleep(Duration::from_millis(random.u64(..MOMENT_MAX_MS))).await;
        let before = self.look_when_it_answers().await?;
        let kept_before: BTreeSet<String> = self.remember_running(&before);
        let ledger_before = self.ledger.last().map_or(0, |entry| entry.id);
        let (host, _) = self.doors.leader().await?.context("nobody leads")?;
        let killed = until(RECOVERY_PATIENCE, || cluster.find(&host, victim)).await;
        let killed = killed.context("there is no such process")?;

        let began = Instant::now();
        cluster::kill_one(&killed)?;
        until(RECOVERY_PATIENCE, || (!killed.lives()).then_some(())).await;
        *self.report.kills.entry(victim.subcommand()).or_default() += 1;

        let deadline = began + RECOVERY_PATIENCE;
        while self.doors.state().await.is_err() {
            cluster.must_run()?;
            anyhow::ensure!(Instant::now() < deadline, "the management API does not answer");
            sleep(ASK_EVERY).await;
        }
        if victim.takes_the_coordinator() {
            self.report.answers_ms.push(ms(began));
        }
        let new = until(RECOVERY_PATIENCE, || cluster.find(&host, victim)).await;
        new.context("it was not started again")?;
        self.report.started_ms.push(ms(began));
        if victim.takes_the_coordinator() {
            self.until_authenticated(ledger_before, deadline).await?;
            self.report.authenticated_ms.push(ms(began));
        }
        loop {
            let look = self.look().await;
            if let Ok(look) = &look
                && look.state["servers"]
                    .as_array()
                    .is_some_and(|rows| rows.iter().all(|row| row["reachable"] == true))
            {
                self.check_running(look, &kept_before);
                return Ok(());
            }
            cluster.must_run()?;
            anyhow::ensure!(Instant::now() < deadline, "the host is not back");
            sleep(LOOK_EVERY).await;
        }
    }

    /// An update, a job or nothing, so that kills hit launches and stops too.
    async fn give_something_to_do(&self, random: &mut fastrand::Rng) -> anyhow::Result<()> {
        let update = json!({ "action": "update_chute", "chute": "embed" });
        let job = json!({ "action": "offer_job", "chute": "batch", "method": "train", "work_ms": 2_000 });
        let action = match random.u8(..4) {
            0 => update,
            1 | 2 => job,
            _ => return Ok(()),
        };
        let validator = self.doors.validator().await?;
        let mut published = validator["chutes"].as_array().into_iter().flatten();
        // The scenario may not be so far.
        if published.any(|chute| chute["name"] == action["chute"]) {
            self.doors.act(&action).await?;
        }
        Ok(())
    }

    async fn until_authenticated(&mut self, after: u64, deadline: Instant) -> anyhow::Result<()> {
        loop {
            self.read_ledger().await?;
            let mut new = self.ledger.iter().rev().take_while(|entry| entry.id > after);
            if new.any(|entry| matches!(entry.record, Record::SocketAuthenticated { .. })) {
                return Ok(());
            }
            anyhow::ensure!(Instant::now() < deadline, "the validator's socket is not back");
            sleep(ASK_EVERY).await;
        }
    }

    /// Notes the process of each live deployment; which ones there are.
    fn remember_running(&mut self, look: &Look) -> BTreeSet<String> {
        let mut running = BTreeSet::new();
        for (deployment, tops) in processes::chutes(&look.processes, &self.data) {
            let row = checks::row_of(&look.state, deployment);
            if let (Some(row), [process]) = (row.filter(|row| row["live"] == true), tops.as_slice()) {
                running.insert(deployment.to_owned());
                let known = self.ran.entry(deployment.to_owned()).or_insert_with(|| Ran {
                    process: (*process).clone(),
                    row: row.clone(),
                });
                // Its instance may be known by now.
                known.row = row.clone();
            }
        }
        running
    }

    /// Chutes that ran must still run, as the same process, unless somebody else than the miner ended them.
    fn check_running(&mut self, look: &Look, before: &BTreeSet<String>) {
        let endings = Endings::of(&self.ledger);
        let mut gone = Vec::new();
        for (deployment, ran) in &self.ran {
            if ran.process.lives() {
                self.report.pids_kept += usize::from(before.contains(deployment));
                continue;
            }
            gone.push(deployment.clone());
            let now = checks::row_of(&look.state, deployment).unwrap_or(&ran.row);
            if endings.explain(now) || endings.explain(&ran.row) {
                self.report.pids_ended_by_scenario += 1;
                continue;
            }
            self.report.pids_lost += 1;
            self.report.reasons.push(format!(
                "the process {} of deployment {deployment} of {} ended: {} ({})",
                ran.process.pid, now["chute_name"], now["phase"], now["stop_reason"]
            ));
        }
        for deployment in gone {
            self.ran.remove(&deployment);
        }
    }

    /// Waits until nothing is under way and each side has its other.
    async fn settle(&mut self, cluster: &mut Cluster) -> anyhow::Result<()> {
        let deadline = Instant::now() + CALM_PATIENCE;
        loop {
            cluster.must_run()?;
            let look = self.look_when_it_answers().await?;
            let orphaned = checks::orphaned(&look.state, &look.validator, &self.chutes(&look.processes));
            let under_way = checks::under_way(&look.state);
            let over = Instant::now() >= deadline;
            if over || (orphaned.is_empty() && under_way.is_empty()) {
                self.check_running(&look, &BTreeSet::new());
                self.report.orphaned = orphaned.len();
                self.report.reasons.extend(orphaned);
                self.report.reasons.extend(under_way);
                return Ok(());
            }
            sleep(LOOK_EVERY).await;
        }
    }

    fn conclude(mut self) -> Report {
        self.doubled.extend(checks::claimed_twice(&self.ledger));
        let verified = |entry: &&Entry| matches!(entry.record, Record::InstanceVerified { .. });
        let verified = self.ledger.iter().filter(verified).count();
        let mut report = self.report;
        report.writes_acknowledged = self.promises.acknowledged();
        report.writes_repeated = self.promises.repeated();
        report.writes_lost = self.promises.lost().len();
        report.doubled = self.doubled.len();
        report.invariant_violations = self.violations.len();
        report.deployments_verified = u64::try_from(verified).unwrap_or(u64::MAX);
        report.reasons.extend(self.promises.lost());
        report.reasons.extend(self.promises.trouble());
        report.reasons.extend(self.doubled);
        let violations = self.violations.into_iter();
        report
            .reasons
            .extend(violations.map(|text| format!("invariant: {text}")));
        if report.writes_acknowledged == 0 {
            report.reasons.push("no write was acknowledged".to_owned());
        }
        if report.pids_kept == 0 {
            report
                .reasons
                .push("no chute ran when something was killed".to_owned());
        }
        report
    }
}

fn ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Asks again and again until there is an answer.
async fn until<T>(patience: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience;
    loop {
        let answer = ask();
        if answer.is_some() || Instant::now() >= deadline {
            return answer;
        }
        sleep(ASK_EVERY).await;
    }
}

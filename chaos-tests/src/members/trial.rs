//! A cluster under load, from its start to its end: several writers, a reader at every member, and what must hold
//! of their answers, of the validator's ledger and of the state.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use coordinator::clock::{Clock as _, WallClock};
use coordinator::validator::times;
use protocol::time::UnixMillis;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use validator_stand_in::ledger::{Entry, Record};

use super::Common;
use super::cluster::{self, Cluster, Ground, Plan, Way};
use crate::storm::checks;
use crate::storm::doors::Doors;
use crate::storm::processes::{Process, chutes};
use crate::storm::writes::{Promises, keep_writing};

/// Chutes that nothing here can run, for writes that change nothing else.
const BANNED_CHUTES: usize = 12;
/// Who writes at the same time.
const WRITERS: usize = 6;
/// Between two reads of one member; a read does not wait for the one before it.
const READ_EVERY: Duration = Duration::from_millis(300);
/// Reads of one member that may be out.
const READS_MAX: usize = 200;
pub(super) const PATIENCE: Duration = Duration::from_secs(90);
pub(super) const ASK_EVERY: Duration = Duration::from_millis(20);

/// What readers found.
#[derive(Debug, Default)]
struct Findings {
    violations: Mutex<BTreeSet<String>>,
    reads: AtomicU64,
}

/// The whole of it.
pub(super) struct Trial {
    pub(super) cluster: Cluster,
    pub(super) doors: Doors,
    pub(super) promises: Promises,
    pub(super) random: fastrand::Rng,
    pub(super) ledger: Vec<Entry>,
    pub(super) reasons: Vec<String>,
    members: usize,
    findings: Arc<Findings>,
    stop: CancellationToken,
    writers: JoinHandle<()>,
    readers: JoinSet<()>,
    folder: TempDir,
}

/// The stand-in and the place of a cluster that is about to start.
pub(super) struct Place {
    pub(super) plan: Plan,
    pub(super) ground: Ground,
    pub(super) stand_in: tokio::process::Child,
    folder: TempDir,
    seed: u64,
}

impl Place {
    /// Starts the stand-in in a folder of its own.
    pub(super) async fn prepare(
        common: &Common,
        timing: &'static str,
        members: usize,
    ) -> anyhow::Result<Self> {
        // Fails when one is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::Builder::new().prefix("chutes-members-").tempdir()?;
        let plan = Plan {
            timing,
            members,
            data: folder.path().canonicalize()?,
            agent: common.executable()?,
        };
        Ok(Self {
            ground: Ground::Loopback(cluster::free_network()?),
            stand_in: cluster::start_stand_in(&plan.agent, &plan.data, None).await?,
            plan,
            folder,
            seed: common.seed(),
        })
    }
}

impl Trial {
    /// Starts members and load. `read_patience`: how long a reader waits for an answer.
    pub(super) async fn begin(
        place: Place,
        ways: &[Way],
        around: &dyn Fn(usize, &mut std::process::Command),
        read_patience: Duration,
    ) -> anyhow::Result<Self> {
        let (seed, members) = (place.seed, place.plan.members);
        let cluster = Cluster::start(place.plan, place.ground, place.stand_in, ways, around).await;
        let cluster = match cluster {
            Ok(cluster) => cluster,
            Err(error) => {
                let kept = place.folder.keep();
                return Err(error.context(format!("logs and data are in {}", kept.display())));
            }
        };
        let doors = cluster.doors.clone();
        let promises = Promises::new(banned_chutes(&doors).await?);
        let (stop, findings) = (CancellationToken::new(), Arc::<Findings>::default());
        let writing = keep_writing(doors.clone(), promises.clone(), WRITERS, stop.clone());
        let mut readers = JoinSet::new();
        for member in 0..members {
            let door = doors.only(member, read_patience);
            let (promises, findings) = (promises.clone(), Arc::clone(&findings));
            readers.spawn(keep_reading(member, door, promises, findings, stop.clone()));
        }
        Ok(Self {
            cluster,
            doors,
            promises,
            random: fastrand::Rng::with_seed(seed),
            ledger: Vec::new(),
            reasons: Vec::new(),
            members,
            findings,
            stop,
            writers: tokio::spawn(writing),
            readers,
            folder: place.folder,
        })
    }

    pub(super) fn complain(&mut self, reason: impl Into<String>) {
        self.reasons.push(reason.into());
    }

    /// Reads the ledger on; the number of its last entry.
    pub(super) async fn read_ledger(&mut self) -> anyhow::Result<u64> {
        let after = self.ledger.last().map_or(0, |entry| entry.id);
        let new = self.doors.ledger(after).await?;
        self.ledger.extend(new);
        Ok(self.ledger.last().map_or(0, |entry| entry.id))
    }

    /// When a socket of ours authenticated for the first time after an entry, as far as the ledger was read.
    pub(super) fn authenticated_since(&self, entry: u64) -> Option<UnixMillis> {
        let mut new = self.ledger.iter().filter(|known| known.id > entry);
        let found = new.find(|known| matches!(known.record, Record::SocketAuthenticated { .. }));
        found.map(|found| found.at)
    }

    /// Whether a socket of ours is open that has authenticated, as far as the ledger was read.
    pub(super) fn socket_is_open(&self) -> bool {
        let mut open = BTreeSet::new();
        for entry in &self.ledger {
            match &entry.record {
                Record::SocketAuthenticated { session, .. } => {
                    open.insert(session);
                }
                Record::SocketClosed { session, .. } => {
                    open.remove(session);
                }
                _ => {}
            }
        }
        !open.is_empty()
    }

    /// The same, waiting for it.
    pub(super) async fn authenticated_after(&mut self, entry: u64) -> anyhow::Result<UnixMillis> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.read_ledger().await?;
            if let Some(at) = self.authenticated_since(entry) {
                return Ok(at);
            }
            anyhow::ensure!(Instant::now() < deadline, "no socket authenticates");
            sleep(ASK_EVERY).await;
        }
    }

    /// When the first write that was sent after a moment was acknowledged.
    pub(super) async fn written_after(&self, moment: Instant) -> anyhow::Result<Duration> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.promises.first_after(moment) {
                return Ok(at - moment);
            }
            anyhow::ensure!(Instant::now() < deadline, "no write is acknowledged");
            sleep(ASK_EVERY).await;
        }
    }

    /// When members other than `member` can say who leads in a later term than `term`: they are asked all the time,
    /// since a question that came too early waits.
    pub(super) async fn other_leader(&self, member: usize, term: u64) -> anyhow::Result<UnixMillis> {
        let deadline = Instant::now() + PATIENCE;
        let others = self.doors.without(member);
        let mut asked = JoinSet::new();
        loop {
            let others = others.clone();
            asked.spawn(async move { others.leader().await });
            let pause = sleep(2 * ASK_EVERY);
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    Some(answer) = asked.join_next() => {
                        if let Ok(Ok(Some((_, later)))) = answer && later > term {
                            return Ok(WallClock.now());
                        }
                    }
                }
            }
            anyhow::ensure!(Instant::now() < deadline, "nobody else leads");
        }
    }

    /// When hosts were let in by another member after a moment: the agents of all machines say so in their logs, but for
    /// `left_out`.
    pub(super) fn hosts_moved(
        &self,
        moment: UnixMillis,
        left_out: Option<usize>,
    ) -> anyhow::Result<Vec<UnixMillis>> {
        let mut moved = Vec::new();
        for member in (0..self.cluster.plan.members).filter(|member| Some(*member) != left_out) {
            let log = self.cluster.folder(member).join("log");
            let text = std::fs::read(&log).with_context(|| log.display().to_string())?;
            let text = String::from_utf8_lossy(&text);
            let lines = text.lines().filter(|line| line.contains("host link is up"));
            let times = lines.filter_map(|line| line.split_whitespace().find_map(times::iso8601));
            moved.extend(times.filter(|time| *time >= moment).min());
        }
        Ok(moved)
    }

    /// A job, an update or nothing, so that faults hit launches and stops too.
    pub(super) async fn give_something_to_do(&mut self) -> anyhow::Result<()> {
        let action = match self.random.u8(..4) {
            0 => json!({ "action": "update_chute", "chute": "embed" }),
            1 | 2 => json!({ "action": "offer_job", "chute": "batch", "method": "train", "work_ms": 2_000 }),
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

    /// Waits until nothing is under way and each side has its other; complains of what is not so.
    pub(super) async fn settle(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.cluster.must_run()?;
            let over = Instant::now() >= deadline;
            if let Ok(state) = self.doors.state().await {
                let validator = self.doors.validator().await?;
                let processes = Process::all();
                let running: BTreeMap<&str, usize> = chutes(&processes, &self.cluster.plan.data)
                    .into_iter()
                    .map(|(deployment, tops)| (deployment, tops.len()))
                    .collect();
                let mut wrong = checks::orphaned(&state, &validator, &running);
                wrong.extend(checks::under_way(&state));
                wrong.extend(checks::doubled(&validator, &running));
                if over || wrong.is_empty() {
                    self.reasons.extend(wrong);
                    return Ok(());
                }
            }
            anyhow::ensure!(!over, "the state cannot be read");
            sleep(10 * ASK_EVERY).await;
        }
    }

    /// Ends the load, reads everything back from every member, and judges. `figures` is what was measured.
    pub(super) async fn conclude(mut self, mut figures: Value) -> anyhow::Result<super::Outcome> {
        self.stop.cancel();
        (&mut self.writers).await.context("the writers")?;
        while self.readers.join_next().await.is_some() {}
        let floors = self.promises.acknowledged_now();
        for member in 0..self.members {
            match self.cluster.state_of(member).await {
                Ok(state) => self.promises.check(&floors, &state),
                Err(error) => self.complain(format!("{error:#}")),
            }
        }
        if let Err(error) = self.settle().await {
            self.complain(format!("at the end: {error:#}"));
        }
        self.read_ledger().await?;
        let doubled = [
            checks::claimed_twice(&self.ledger),
            second_actors(&self.ledger),
            done_twice(&self.ledger),
        ]
        .concat();
        let lost = self.promises.lost();
        let violations = std::mem::take(
            &mut *self
                .findings
                .violations
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let more = json!({
            "writes_acknowledged": self.promises.acknowledged(),
            "writes_repeated": self.promises.repeated(),
            "writes_lost": lost.len(),
            "reads": self.findings.reads.load(Ordering::Relaxed),
            "invariant_violations": violations.len(),
            "second_actors_or_double_effects": doubled.len(),
        });
        self.reasons.extend(lost);
        self.reasons.extend(doubled);
        self.reasons.extend(violations);
        self.reasons.extend(self.promises.trouble());
        if self.promises.acknowledged() == 0 {
            self.reasons.push("no write was acknowledged".to_owned());
        }
        if let (Some(figures), Value::Object(more)) = (figures.as_object_mut(), more) {
            figures.extend(more);
        }
        drop(self.cluster);
        if !self.reasons.is_empty() {
            let kept = self.folder.keep();
            self.reasons
                .push(format!("logs and data are in {}", kept.display()));
        }
        figures["ok"] = json!(self.reasons.is_empty());
        figures["reasons"] = json!(self.reasons);
        Ok(super::Outcome {
            figures,
            reasons: self.reasons,
        })
    }
}

/// Publishes chutes that cannot run here, and waits until the miner knows them.
async fn banned_chutes(doors: &Doors) -> anyhow::Result<Vec<String>> {
    let mut ids = Vec::new();
    for number in 1..=BANNED_CHUTES {
        let name = format!("storm-{number}");
        let spec = json!({ "action": "publish_chute", "name": name, "include": ["b200"] });
        doors.act(&spec).await?;
    }
    let validator = doors.validator().await?;
    for chute in validator["chutes"].as_array().into_iter().flatten() {
        if chute["name"]
            .as_str()
            .is_some_and(|name| name.starts_with("storm-"))
        {
            ids.push(chute["chute_id"].as_str().context("a chute's id")?.to_owned());
        }
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let state = doors.state().await?;
        let rows = state["chutes"].as_array().into_iter().flatten();
        let known: BTreeSet<&str> = rows.filter_map(|row| row["chute_id"].as_str()).collect();
        if ids.len() == BANNED_CHUTES && ids.iter().all(|id| known.contains(id.as_str())) {
            return Ok(ids);
        }
        anyhow::ensure!(Instant::now() < deadline, "{} chutes are not known", ids.len());
        sleep(10 * ASK_EVERY).await;
    }
}

/// Reads one member again and again. What it answers must hold all that was acknowledged when it was asked.
async fn keep_reading(
    member: usize,
    door: Doors,
    promises: Promises,
    findings: Arc<Findings>,
    stop: CancellationToken,
) {
    let mut reads = JoinSet::new();
    while stop.run_until_cancelled(sleep(READ_EVERY)).await.is_some() {
        while reads.try_join_next().is_some() {}
        if reads.len() >= READS_MAX {
            continue;
        }
        let (door, promises, findings) = (door.clone(), promises.clone(), Arc::clone(&findings));
        reads.spawn(async move {
            let floors = promises.acknowledged_now();
            // No answer is fine.
            let Ok(state) = door.state().await else { return };
            promises.check(&floors, &state);
            findings.reads.fetch_add(1, Ordering::Relaxed);
            for violation in state["violations"].as_array().into_iter().flatten() {
                let found = format!("invariant, read at host-{}: {violation}", member + 1);
                findings
                    .violations
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(found);
            }
        });
    }
}

/// Sockets that acted after another one of the same hotkey had authenticated; all that may come of them is their end.
pub(super) fn second_actors(ledger: &[Entry]) -> Vec<String> {
    let mut order: Vec<u64> = Vec::new();
    let mut found = Vec::new();
    for entry in ledger {
        if let Record::SocketAuthenticated { session, .. } = &entry.record {
            match order.iter().position(|known| known == session) {
                None => order.push(*session),
                Some(place) if place + 1 == order.len() => {}
                Some(_) => found.push(format!(
                    "socket {session} authenticated again (entry {}) after {:?} had taken over",
                    entry.id,
                    order.last()
                )),
            }
        }
    }
    found
}

/// Jobs claimed and instances deleted more than once.
fn done_twice(ledger: &[Entry]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let names = ledger.iter().filter_map(|entry| match &entry.record {
        Record::JobClaimed { job, instance } => Some(format!("job {job} claimed by {instance}")),
        Record::InstanceDeleted { instance, .. } => Some(format!("instance {instance} deleted")),
        Record::InstanceActivated { instance, .. } => Some(format!("instance {instance} activated")),
        _ => None,
    });
    let twice = names.filter(|name| !seen.insert(name.clone()));
    twice.map(|name| format!("{name} more than once")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_authenticates_after_its_successor_is_a_second_actor() {
        let entry = |id: u64, session: u64| -> Entry {
            let row = json!({"id": id, "at": 1, "kind": "socket_authenticated", "session": session,
                "hotkey": "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq"});
            serde_json::from_value(row).expect("an entry")
        };
        assert!(second_actors(&[entry(1, 7), entry(2, 7), entry(3, 9), entry(4, 9)]).is_empty());
        assert_eq!(second_actors(&[entry(1, 7), entry(2, 9), entry(3, 7)]).len(), 1);
    }
}

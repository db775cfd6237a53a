//! The stand-in's ledger against the miner's state: what was lost, what was undone, what is still missing.
//!
//! The oracle remembers what it was promised: each acknowledged write of its own, each event that the ledger
//! says was published, with the effect that the event must have.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context;
use protocol::time::UnixMillis;
use serde_json::{Value, json};
use validator_stand_in::event::{Event, RequiredEffect};
use validator_stand_in::ledger::Record;

use super::hosts::Hosts;
use super::miner::Miner;
use super::stand_in::StandIn;

/// How long after an event its effect must be in the state, in ms.
const EFFECT_WITHIN_MS: u64 = 30_000;

/// An event of the ledger and what became of it.
#[derive(Debug)]
struct Published {
    at: UnixMillis,
    event: Event,
    sent_to: usize,
    /// Whether its effect was seen in the state.
    seen: bool,
}

/// What the miner's state and the stand-in's ledger say at one moment.
#[derive(Debug, Default)]
pub(super) struct Look {
    state: Value,
    score: Value,
    /// Rules that the state breaks.
    pub(super) violations: Vec<String>,
    first_events: BTreeMap<String, u64>,
    hosts: usize,
}

impl Look {
    /// All deployments, also those that are gone.
    pub(super) fn deployments(&self) -> impl Iterator<Item = &Value> {
        let rows = |member: &str| self.state[member].as_array().map_or(&[][..], Vec::as_slice);
        rows("audits").iter().chain(rows("deployments"))
    }

    /// When the validator first spoke of a deployment's chute.
    pub(super) fn event_at(&self, deployment: &Value) -> Option<u64> {
        let at = *self.first_events.get(deployment["chute_id"].as_str()?)?;
        // A chute that is placed long after its event was placed for another reason.
        deployment["created_at"]
            .as_u64()
            .filter(|created| *created >= at && created - at < 60_000)
            .map(|_| at)
    }

    fn live(&self) -> impl Iterator<Item = &Value> {
        let rows = self.state["deployments"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        rows.iter().filter(|deployment| deployment["live"] == true)
    }
}

/// Remembers what was promised.
#[derive(Debug, Default)]
pub(super) struct Oracle {
    ledger_read: u64,
    events: Vec<Published>,
    first_events: BTreeMap<String, u64>,
    invariants_checked: u64,
    violations: BTreeSet<String>,
    writes_acknowledged: u64,
    writes_lost: u64,
    /// The last acknowledged write: the reason of a ban.
    promised_ban: Option<(String, String)>,
    leader_kills: u64,
    leader_kills_wanted: u64,
    socket: SocketGaps,
}

/// Times in which no socket of the miner was authenticated at the validator.
#[derive(Debug, Default)]
struct SocketGaps {
    open: BTreeSet<u64>,
    /// Since when there is none; only after there was one.
    none_since: Option<UnixMillis>,
    longest_ms: u64,
}

impl SocketGaps {
    fn note(&mut self, at: UnixMillis, record: &Record) {
        match record {
            Record::SocketAuthenticated { session, .. } => {
                self.open.insert(*session);
                if let Some(since) = self.none_since.take() {
                    self.longest_ms = self.longest_ms.max(at.since(since));
                }
            }
            Record::SocketClosed { session, .. } if self.open.remove(session) && self.open.is_empty() => {
                self.none_since = Some(at);
            }
            _ => {}
        }
    }
}

impl Oracle {
    /// Remembers what was promised; the leader is to be killed at least so often.
    pub(super) fn new(leader_kills_wanted: u64) -> Self {
        Self {
            leader_kills_wanted,
            ..Self::default()
        }
    }

    /// The leader was killed once more.
    pub(super) fn leader_killed(&mut self) {
        self.leader_kills += 1;
    }

    /// Reads everything once, and makes one write of its own.
    pub(super) async fn look(
        &mut self,
        miner: &Miner,
        stand_in: &StandIn,
        hosts: &Hosts,
    ) -> anyhow::Result<Look> {
        let state = miner.get("/v1/state").await?;
        self.check_promise(&state);
        self.read_ledger(stand_in).await?;
        let violations: Vec<String> = state["violations"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|text| text.as_str().map(str::to_owned))
            .collect();
        self.invariants_checked += state["invariants_checked"].as_u64().unwrap_or(0);
        self.violations.extend(violations.iter().cloned());
        let mut look = Look {
            score: stand_in.score().await?,
            first_events: self.first_events.clone(),
            violations,
            hosts: hosts.count(),
            ..Look::default()
        };
        look.state = state;
        self.write(miner, &look).await?;
        Ok(look)
    }

    async fn read_ledger(&mut self, stand_in: &StandIn) -> anyhow::Result<()> {
        for entry in stand_in.ledger(self.ledger_read).await? {
            self.ledger_read = entry.id;
            self.socket.note(entry.at, &entry.record);
            let Record::EventPublished { event, sent_to, .. } = entry.record else {
                continue;
            };
            if let Some(chute) = event.data["chute_id"].as_str() {
                self.first_events.entry(chute.to_owned()).or_insert(entry.at.0);
            }
            self.events.push(Published {
                at: entry.at,
                event,
                sent_to,
                seen: false,
            });
        }
        Ok(())
    }

    /// An acknowledged write must be in every later read.
    fn check_promise(&mut self, state: &Value) {
        if let Some((chute, reason)) = &self.promised_ban {
            let row = state["chutes"]
                .as_array()
                .into_iter()
                .flatten()
                .find(|row| row["chute_id"] == chute.as_str());
            // A chute that the validator deleted takes its ban with it.
            if row.is_some_and(|row| row["ban_reason"] != reason.as_str()) {
                self.writes_lost += 1;
            }
        }
    }

    /// Bans a chute that nothing can run here, each time with another reason.
    async fn write(&mut self, miner: &Miner, look: &Look) -> anyhow::Result<()> {
        let chutes = look.state["chutes"].as_array().map_or(&[][..], Vec::as_slice);
        let unrunnable = |row: &&Value| row["runs_on_known_gpus"] == false;
        let Some(chute) = chutes
            .iter()
            .find(unrunnable)
            .and_then(|row| row["chute_id"].as_str())
        else {
            return Ok(());
        };
        let reason = format!("write {} of the development oracle", self.writes_acknowledged + 1);
        let body = json!({
            "chute_id": chute,
            "validator": look.state["chutes"].as_array().and_then(|rows| {
                rows.iter().find(|row| row["chute_id"] == chute).map(|row| row["validator"].clone())
            }),
            "reason": reason,
        });
        // While the answer is out, either reason may be read.
        self.promised_ban = None;
        miner.post("/v1/bans", &body).await.context("write")?;
        self.writes_acknowledged += 1;
        self.promised_ban = Some((chute.to_owned(), reason));
        Ok(())
    }

    /// What an event says of a chute is settled when a later one about the same chute is: the state went on.
    fn settle_superseded(&mut self) {
        let about_chute = |event: &Event| {
            let lasting = matches!(
                event.effect,
                RequiredEffect::ChuteKnown | RequiredEffect::ChuteGone
            );
            event.data["chute_id"]
                .as_str()
                .filter(|_| lasting)
                .map(str::to_owned)
        };
        let mut settled = BTreeSet::new();
        for published in self.events.iter_mut().rev() {
            let Some(chute) = about_chute(&published.event) else {
                continue;
            };
            if published.seen {
                settled.insert(chute);
            } else if settled.contains(&chute) {
                published.seen = true;
            }
        }
    }

    /// Compares what was promised and what the scenario wants with what is.
    pub(super) fn judge(&mut self, look: &Look, stand_in: &StandIn) -> Verdict {
        let now = look.state["now"].as_u64().unwrap_or_default();
        for published in self.events.iter_mut().filter(|published| !published.seen) {
            published.seen = effect_is_there(&published.event, &look.state);
        }
        self.settle_superseded();
        let lost =
            |published: &&Published| !published.seen && now.saturating_sub(published.at.0) > EFFECT_WITHIN_MS;
        let waiting = self.events.iter().filter(|published| !published.seen).count();
        let number = |member: &str| look.score[member].as_u64().unwrap_or_default();
        let mut verdict = Verdict {
            hosts: look.hosts,
            gpus_proved: number("gpus_proved"),
            deployments_verified: number("deployments_verified"),
            events_published: self.events.len(),
            events_lost: self.events.iter().filter(lost).count(),
            recovered_by_rest: self.events.iter().filter(|p| p.seen && p.sent_to == 0).count(),
            writes_acknowledged: self.writes_acknowledged,
            writes_lost: self.writes_lost,
            image_bytes_pulled: number("image_bytes_sent"),
            egress_allowed: number("egress_allowed"),
            egress_denied: number("egress_denied"),
            jobs_finished: number("jobs_finished"),
            paid_seconds: look.score["paid_seconds"].as_f64().unwrap_or_default(),
            event_to_running: running_times(look),
            leader_kills: self.leader_kills,
            socket_gap_ms_max: self.socket.longest_ms,
            invariants_checked: self.invariants_checked,
            violations: self.violations.iter().cloned().collect(),
            reasons: Vec::new(),
        };
        verdict.judge(look, stand_in, waiting);
        if self.leader_kills < self.leader_kills_wanted {
            let wanted = self.leader_kills_wanted;
            verdict.complain(format!("{} leaders killed, {wanted} wanted", self.leader_kills));
        }
        verdict
    }
}

/// True if the state has what an event must lead to, or has gone beyond it.
fn effect_is_there(event: &Event, state: &Value) -> bool {
    let data = &event.data;
    let rows = |table: &str| state[table].as_array().map_or(&[][..], Vec::as_slice);
    let find =
        |table: &str, member: &str, value: &Value| rows(table).iter().find(|row| row[member] == *value);
    let of_instance = || {
        let by_id = |table| find(table, "instance_id", &data["instance_id"]);
        by_id("deployments").or_else(|| by_id("audits"))
    };
    let live = |row: &Value| row["live"] == true;
    let runs = |chute: &Value| {
        rows("deployments")
            .iter()
            .any(|row| row["chute_id"] == *chute && live(row))
    };
    match event.effect {
        RequiredEffect::Nothing => true,
        RequiredEffect::GpuVerified => {
            find("gpus", "gpu_id", &data["gpu_id"]).is_some_and(|gpu| gpu["verified"] == true)
        }
        // A newer version, or the chute's deletion, may have overtaken it; what the catalogue says last counts
        // and is judged by the later event.
        RequiredEffect::ChuteKnown => {
            let wanted = data.get("version").or_else(|| data.get("new_version"));
            let known = find("chutes", "chute_id", &data["chute_id"]);
            known.is_some_and(|chute| wanted.is_none_or(|version| chute["version"] == *version))
        }
        RequiredEffect::ChuteGone => {
            find("chutes", "chute_id", &data["chute_id"]).is_none() && !runs(&data["chute_id"])
        }
        RequiredEffect::BountyKnown => {
            find("bounties", "chute_id", &data["chute_id"]).is_some()
                || rows("deployments")
                    .iter()
                    .chain(rows("audits"))
                    .any(|row| row["chute_id"] == data["chute_id"])
        }
        RequiredEffect::InstanceReplaced | RequiredEffect::InstanceGone => {
            of_instance().is_none_or(|deployment| !live(deployment))
        }
        RequiredEffect::InstanceKnown => of_instance().is_some(),
        RequiredEffect::InstanceVerified => {
            of_instance().is_some_and(|d| d["verified_at"].is_u64() || !live(d))
        }
        RequiredEffect::InstanceActive => of_instance().is_some_and(|d| d["active_at"].is_u64() || !live(d)),
        RequiredEffect::JobKnown => find("jobs", "job_id", &data["job_id"]).is_some(),
        RequiredEffect::JobGone => {
            let runs = rows("deployments")
                .iter()
                .any(|row| row["job_id"] == data["job_id"] && live(row));
            !runs
        }
    }
}

/// From the validator's first word of a chute to its running process, in ms; the first deployment of each.
fn running_times(look: &Look) -> Vec<u64> {
    let mut by_chute: BTreeMap<&str, u64> = BTreeMap::new();
    for deployment in look.deployments() {
        let (Some(chute), Some(event_at), Some(running_at)) = (
            deployment["chute_id"].as_str(),
            look.event_at(deployment),
            deployment["running_at"].as_u64(),
        ) else {
            continue;
        };
        let took = running_at.saturating_sub(event_at);
        by_chute
            .entry(chute)
            .and_modify(|known| *known = (*known).min(took))
            .or_insert(took);
    }
    let mut times: Vec<u64> = by_chute.into_values().collect();
    times.sort_unstable();
    times
}

/// The result of a run.
#[derive(Debug)]
pub(super) struct Verdict {
    hosts: usize,
    gpus_proved: u64,
    deployments_verified: u64,
    events_published: usize,
    events_lost: usize,
    recovered_by_rest: usize,
    writes_acknowledged: u64,
    writes_lost: u64,
    image_bytes_pulled: u64,
    egress_allowed: u64,
    egress_denied: u64,
    jobs_finished: u64,
    paid_seconds: f64,
    event_to_running: Vec<u64>,
    leader_kills: u64,
    socket_gap_ms_max: u64,
    invariants_checked: u64,
    violations: Vec<String>,
    /// Why it is not good; empty if it is.
    pub(super) reasons: Vec<String>,
}

impl Verdict {
    pub(super) fn complain(&mut self, reason: String) {
        self.reasons.push(reason);
    }

    fn judge(&mut self, look: &Look, stand_in: &StandIn, waiting: usize) {
        let goals = stand_in.goals();
        for (what, is, wanted) in [
            ("GPUs proved", self.gpus_proved, goals.gpus_proved),
            (
                "deployments verified",
                self.deployments_verified,
                goals.deployments_verified,
            ),
            (
                "connections to allowed sites",
                self.egress_allowed,
                goals.egress_allowed,
            ),
            (
                "refusals of forbidden sites",
                self.egress_denied,
                goals.egress_denied,
            ),
            ("jobs finished", self.jobs_finished, goals.jobs_finished),
        ] {
            if is < u64::from(wanted) {
                self.complain(format!("{is} {what}, {wanted} wanted"));
            }
        }
        let steps = stand_in.scenario().program.len();
        let published = look.score["program_steps_done"].as_u64();
        if published.is_some_and(|done| usize::try_from(done).is_ok_and(|done| done < steps)) {
            self.complain("the scenario's program is not through".to_owned());
        }
        for (what, count) in [
            ("events lost", self.events_lost),
            ("events without their effect yet", waiting),
        ] {
            if count > 0 {
                self.complain(format!("{count} {what}"));
            }
        }
        if self.writes_acknowledged == 0 {
            self.complain("no write was acknowledged".to_owned());
        }
        if self.writes_lost > 0 {
            self.complain(format!("{} acknowledged writes lost", self.writes_lost));
        }
        if look.score["egress_wrong"].as_u64().unwrap_or_default() > 0 {
            self.complain("a chute reached a forbidden site or did not reach an allowed one".to_owned());
        }
        if self.paid_seconds <= 0.0 {
            self.complain("nothing was paid".to_owned());
        }
        let starting = look
            .live()
            .filter(|deployment| deployment["phase"] != "serving")
            .count();
        if starting > 0 {
            self.complain(format!("{starting} deployments are still starting"));
        }
        self.reasons.extend(
            self.violations
                .iter()
                .map(|violation| format!("invariant: {violation}")),
        );
    }

    pub(super) fn to_json(&self) -> Value {
        let times = &self.event_to_running;
        json!({
            "ok": self.reasons.is_empty(),
            "hosts": self.hosts,
            "gpus_proved": self.gpus_proved,
            "deployments_verified": self.deployments_verified,
            "events_published": self.events_published,
            "events_lost": self.events_lost,
            "recovered_by_rest": self.recovered_by_rest,
            "writes_acknowledged": self.writes_acknowledged,
            "writes_lost": self.writes_lost,
            "image_bytes_pulled": self.image_bytes_pulled,
            "egress_allowed": self.egress_allowed,
            "egress_denied": self.egress_denied,
            "jobs_finished": self.jobs_finished,
            "paid_seconds": self.paid_seconds,
            "event_to_running_ms": { "p50": times.get(times.len() / 2), "max": times.last() },
            "leader_kills": self.leader_kills,
            "socket_gap_ms_max": self.socket_gap_ms_max,
            "invariants_checked": self.invariants_checked,
            "invariant_violations": self.violations.len(),
            "reasons": self.reasons,
        })
    }
}

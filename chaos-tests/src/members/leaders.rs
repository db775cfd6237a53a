//! `kill -9` of whoever leads: its coordinator and its whole agent by turns, at moments from a seed.

use std::time::Duration;

use coordinator::clock::{Clock as _, WallClock};
use serde_json::json;
use tokio::time::{Instant, sleep};
use validator_stand_in::ledger::Record;

use super::cluster::{MEMBERS, Way};
use super::trial::{ASK_EVERY, PATIENCE, Place, Trial};
use super::{Common, Outcome};
use crate::faults::signal;
use crate::storm::spread;

/// A kill comes at most so long after the last one's recovery, in ms.
const MOMENT_MAX_MS: u64 = 1_500;
/// What is published later than this after a takeover must be seen.
const TAKEOVER_MAX: Duration = Duration::from_secs(60);
/// Events that are published then.
const EVENTS: usize = 5;
const READ_PATIENCE: Duration = Duration::from_secs(5);

/// Kills leaders of three members.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Leaders {
    /// How many leaders are killed
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub kills: u32,
    /// Leave out what takes a minute after the last kill: events that must be seen by then
    #[arg(long)]
    pub brief: bool,
    /// What all of them may be told.
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Default)]
struct Times {
    writes: Vec<u64>,
    known: Vec<u64>,
    authenticated: Vec<u64>,
    authenticated_after_known: Vec<u64>,
    back: Vec<u64>,
    host_moved: Vec<u64>,
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Leaders {
    /// Runs it on a cluster of its own.
    ///
    /// # Errors
    /// When there is no cluster to shake; whatever goes wrong then is a reason in the outcome.
    pub async fn run(&self) -> anyhow::Result<Outcome> {
        let place = Place::prepare(&self.common, "lan", MEMBERS).await?;
        let ways = vec![Way::default(); MEMBERS];
        let mut trial = Trial::begin(place, &ways, &|_, _| {}, READ_PATIENCE).await?;
        let (mut times, mut killed) = (Times::default(), 0);
        for kill in 0..self.kills {
            if let Err(error) = strike(&mut trial, kill % 2 == 1, &mut times).await {
                trial.complain(format!("kill {}: {error:#}", kill + 1));
                break;
            }
            killed += 1;
        }
        let mut targeted = 0;
        if !self.brief {
            match late_events(&mut trial).await {
                Ok(seen) => targeted = seen,
                Err(error) => trial.complain(format!("events after a takeover: {error:#}")),
            }
        }
        let figures = json!({
            "kills": killed,
            "next_write_ms": spread(&times.writes),
            "leader_known_ms": spread(&times.known),
            "authenticated_ms": spread(&times.authenticated),
            "authenticated_after_known_ms": spread(&times.authenticated_after_known),
            "member_back_ms": spread(&times.back),
            "host_moved_ms": spread(&times.host_moved),
            "late_targeted_events_seen": targeted,
        });
        trial.conclude(figures).await
    }
}

/// One kill, and all until the member is back.
async fn strike(trial: &mut Trial, whole_agent: bool, times: &mut Times) -> anyhow::Result<()> {
    trial.cluster.must_run()?;
    trial.give_something_to_do().await?;
    let moment = trial.random.u64(..MOMENT_MAX_MS);
    // The random moment itself, not a wait for something.
    sleep(Duration::from_millis(moment)).await;
    let (leader, term) = trial.cluster.leader().await?;
    let ledger_before = trial.read_ledger().await?;
    let part = if whole_agent { "run" } else { "coordinator" };
    let victim = trial.cluster.process(leader, part).await?;
    let (began, began_at) = (Instant::now(), WallClock.now());
    signal::kill(victim.pid.unsigned_abs())?;

    let known_at = trial.other_leader(leader, term).await?;
    times.known.push(known_at.since(began_at));
    times.writes.push(ms(trial.written_after(began).await?));
    let authenticated_at = trial.authenticated_after(ledger_before).await?;
    times.authenticated.push(authenticated_at.since(began_at));
    times
        .authenticated_after_known
        .push(authenticated_at.since(known_at));
    while victim.lives() {
        sleep(ASK_EVERY).await;
    }
    if whole_agent {
        trial.cluster.run_again(leader).await?;
    }
    trial.cluster.until_it_answers(leader).await?;
    times.back.push(ms(began.elapsed()));
    // The host of an agent that was killed has begun anew and not moved.
    let moved = trial.hosts_moved(began_at, whole_agent.then_some(leader))?;
    let moved = moved.into_iter().map(|at| at.since(began_at));
    times.host_moved.extend(moved);
    Ok(())
}

/// Publishes targeted events a minute after the last takeover: the validator ends instances. Each must be sent to our
/// socket, and be in the state at last. Returns how many were.
async fn late_events(trial: &mut Trial) -> anyhow::Result<usize> {
    sleep(TAKEOVER_MAX).await;
    for number in 0..EVENTS {
        let before = trial.read_ledger().await?;
        let instance = some_instance(trial).await?;
        let action = json!({ "action": "delete_instance", "instance_id": instance });
        trial.doors.act(&action).await?;
        trial.read_ledger().await?;
        let sent_to = trial
            .ledger
            .iter()
            .filter(|entry| entry.id > before)
            .find_map(|entry| {
                let Record::EventPublished { event, sent_to, .. } = &entry.record else {
                    return None;
                };
                let about_it = event.recipients.is_some() && event.data["instance_id"] == *instance;
                about_it.then_some(*sent_to)
            });
        anyhow::ensure!(
            sent_to.is_some_and(|sockets| sockets > 0),
            "event {number}, about instance {instance}, was sent to {sent_to:?} sockets"
        );
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = trial.doors.state().await?;
            let mut rows = state["deployments"].as_array().into_iter().flatten();
            if !rows.any(|row| row["instance_id"] == *instance && row["live"] == true) {
                break;
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "the end of instance {instance} goes unseen"
            );
            sleep(ASK_EVERY).await;
        }
    }
    Ok(EVENTS)
}

/// An instance that the validator has, once there is one.
async fn some_instance(trial: &Trial) -> anyhow::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let validator = trial.doors.validator().await?;
        if let Some(instance) = validator["instances"][0]["instance_id"].as_str() {
            return Ok(instance.to_owned());
        }
        anyhow::ensure!(Instant::now() < deadline, "the validator has no instance");
        sleep(10 * ASK_EVERY).await;
    }
}

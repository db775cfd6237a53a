//! The leader stands still (SIGSTOP) for a while, others take over, and it wakes: it must not answer with what was
//! true before, nor act for the miner.

use std::collections::BTreeSet;
use std::time::Duration;

use coordinator::clock::{Clock as _, WallClock};
use serde_json::json;
use tokio::time::{Instant, sleep};
use validator_stand_in::ledger::Record;

use super::cluster::{MEMBERS, Way};
use super::trial::{Place, Trial};
use super::{Common, Outcome};
use crate::faults::signal::Paused;
use crate::storm::spread;

/// So long it is watched after it woke.
const AFTER: Duration = Duration::from_secs(15);

/// Stops the leader of three members for a while.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Pause {
    /// How long it stands still
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub seconds: u64,
    /// How often, one leader after the other
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub times: u32,
    /// What all of them may be told.
    #[command(flatten)]
    pub common: Common,
}

impl Pause {
    /// Runs it on a cluster of its own.
    ///
    /// # Errors
    /// When there is no cluster to stop; whatever goes wrong then is a reason in the outcome.
    pub async fn run(&self) -> anyhow::Result<Outcome> {
        let place = Place::prepare(&self.common, "lan", MEMBERS).await?;
        let length = Duration::from_secs(self.seconds);
        let ways = vec![Way::default(); MEMBERS];
        // What was asked while it stood still is answered, if at all, when it wakes.
        let mut trial = Trial::begin(place, &ways, &|_, _| {}, length + AFTER).await?;
        let (mut writes, mut authenticated, mut back) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.times {
            let paused = stand_still(&mut trial, length).await;
            match paused {
                Ok((write, auth, woken)) => {
                    writes.push(write);
                    authenticated.push(auth);
                    back.push(woken);
                }
                Err(error) => trial.complain(format!("{error:#}")),
            }
        }
        trial.read_ledger().await?;
        let figures = json!({
            "paused_seconds": self.seconds,
            "next_write_ms": spread(&writes),
            "authenticated_ms": spread(&authenticated),
            "answers_after_waking_ms": spread(&back),
            "tokens_without_claim": unused_tokens(&trial),
        });
        trial.conclude(figures).await
    }
}

/// One pause; times until the next write, the next authentication, and the first answer after waking, in ms.
async fn stand_still(trial: &mut Trial, length: Duration) -> anyhow::Result<(u64, u64, u64)> {
    trial.give_something_to_do().await?;
    let (leader, term) = trial.cluster.leader().await?;
    let before = trial.read_ledger().await?;
    let mut parts = Vec::new();
    for part in ["coordinator", "run"] {
        parts.push(trial.cluster.process(leader, part).await?.pid.unsigned_abs());
    }
    let (began, began_at) = (Instant::now(), WallClock.now());
    let paused: Vec<Paused> = parts
        .into_iter()
        .map(Paused::pause)
        .collect::<anyhow::Result<_>>()?;
    trial.other_leader(leader, term).await?;
    let write = trial.written_after(began).await?.as_millis();
    let authenticated_at = trial.authenticated_after(before).await?;
    trial.give_something_to_do().await?;
    tokio::time::sleep_until(began + length).await;
    drop(paused);
    let woke = Instant::now();
    trial.cluster.until_it_answers(leader).await?;
    let back = woke.elapsed().as_millis();
    // The time to watch itself: what it might do wrong it does now.
    sleep(AFTER).await;
    let ms = |time: u128| u64::try_from(time).unwrap_or(u64::MAX);
    Ok((ms(write), authenticated_at.since(began_at), ms(back)))
}

/// Launch tokens that nothing was started with: fetched again by a new leader, since nobody knew what its
/// predecessor had got.
fn unused_tokens(trial: &Trial) -> usize {
    let mut open = BTreeSet::new();
    for entry in &trial.ledger {
        match &entry.record {
            Record::TokenGranted { config, .. } => {
                open.insert(config.to_string());
            }
            Record::ClaimGranted { config, .. } => {
                open.remove(&config.to_string());
            }
            _ => {}
        }
    }
    open.len()
}

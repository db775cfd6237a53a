//! The clock of the leader's machine jumps by an hour while it runs, and the agent is started with it once more: nobody
//! else may notice.

use std::time::Duration;

use anyhow::Context as _;
use coordinator::clock::{Clock as _, WallClock};
use protocol::time::UnixMillis;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::cluster::{MEMBERS, Way};
use super::trial::{ASK_EVERY, PATIENCE, Place, Trial};
use super::{Common, Outcome};
use crate::faults::clock::MovableClock;
use crate::faults::signal;
use crate::storm::spread;

/// The time of the state may be ahead of ours by what members' clocks may differ.
const AHEAD_MAX_MS: u64 = 6_000;
const READ_PATIENCE: Duration = Duration::from_secs(5);

/// Sets leaders' clocks off.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Clocks {
    /// By how many seconds, ahead and behind by turns
    #[arg(long, default_value_t = 3600, value_parser = clap::value_parser!(i64).range(60..=86_400))]
    pub seconds: i64,
    /// How often
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub times: u32,
    /// What all of them may be told.
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Default)]
struct Times {
    handed_over: Vec<u64>,
    authenticated: Vec<u64>,
    quarantined: Vec<u64>,
    right_again: Vec<u64>,
}

impl Clocks {
    /// Runs it on a cluster of its own.
    ///
    /// # Errors
    /// When there is no cluster to shake; whatever goes wrong then is a reason in the outcome.
    pub async fn run(&self) -> anyhow::Result<Outcome> {
        let place = Place::prepare(&self.common, "lan", MEMBERS).await?;
        let clocks: Vec<MovableClock> = (0..MEMBERS)
            .map(|member| MovableClock::new(&place.plan.data.join(format!("clock-{}", member + 1))))
            .collect::<anyhow::Result<_>>()?;
        // Without faketime there is no command to give it to.
        clocks[0].give_to(&mut std::process::Command::new("true"))?;
        let around = |member: usize, command: &mut std::process::Command| {
            if let Err(error) = clocks[member].give_to(command) {
                tracing::warn!(%error, "the clock cannot be moved");
            }
        };
        let ways = vec![Way::default(); MEMBERS];
        let mut trial = Trial::begin(place, &ways, &around, READ_PATIENCE).await?;
        let mut times = Times::default();
        for time in 0..self.times {
            let seconds = if time % 2 == 0 {
                self.seconds
            } else {
                -self.seconds
            };
            if let Err(error) = jump(&mut trial, &clocks, seconds, &around, &mut times).await {
                trial.complain(format!("jump {} by {seconds} s: {error:#}", time + 1));
                break;
            }
        }
        let figures = json!({
            "seconds": self.seconds,
            "times": times.right_again.len(),
            "handed_over_ms": spread(&times.handed_over),
            "authenticated_ms": spread(&times.authenticated),
            "quarantined_ms": spread(&times.quarantined),
            "right_again_ms": spread(&times.right_again),
        });
        trial.conclude(figures).await
    }
}

fn ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// One jump, until all is as before.
async fn jump(
    trial: &mut Trial,
    clocks: &[MovableClock],
    seconds: i64,
    around: &dyn Fn(usize, &mut std::process::Command),
    times: &mut Times,
) -> anyhow::Result<()> {
    trial.cluster.must_run()?;
    trial.give_something_to_do().await?;
    let (leader, term) = trial.cluster.leader().await?;
    let before = trial.read_ledger().await?;
    let began = Instant::now();
    clocks[leader].set_off(seconds)?;

    trial.other_leader(leader, term).await?;
    times.handed_over.push(ms(began));
    trial.authenticated_after(before).await?;
    times.authenticated.push(ms(began));
    trial.written_after(Instant::now()).await?;

    // It turned its host away, which says what its clock says where it is let in.
    let its_own = format!("host-{}", leader + 1);
    let quarantined = until(trial, "it is quarantined", |state| {
        is_quarantined(state, &its_own).then_some(())
    });
    quarantined.await?;
    times.quarantined.push(ms(began));

    // Its agent is started with the wrong clock as well.
    let agent = trial.cluster.process(leader, "run").await?;
    signal::kill(agent.pid.unsigned_abs())?;
    trial.cluster.run_again_with(leader, around).await?;
    trial.cluster.until_it_answers(leader).await?;
    trial.give_something_to_do().await?;
    trial.written_after(Instant::now()).await?;

    let began = Instant::now();
    clocks[leader].set_off(0)?;
    // Hosts say what their clock says when they connect.
    let agent = trial.cluster.process(leader, "run").await?;
    signal::kill(agent.pid.unsigned_abs())?;
    trial.cluster.run_again_with(leader, around).await?;
    let right = until(trial, "it is right again", |state| {
        (!is_quarantined(state, &its_own)).then_some(())
    });
    right.await?;
    trial.cluster.until_it_answers(leader).await?;
    times.right_again.push(ms(began));
    Ok(())
}

fn servers(state: &Value) -> impl Iterator<Item = &Value> {
    state["servers"].as_array().into_iter().flatten()
}

fn is_quarantined(state: &Value, host: &str) -> bool {
    servers(state).any(|server| server["name"] == host && !server["quarantine"].is_null())
}

/// Looks at the state until it is so. All the time it is checked that no time but the machine's own is wrong.
async fn until<T>(trial: &Trial, what: &str, find: impl Fn(&Value) -> Option<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Ok(state) = trial.doors.state().await {
            let now = UnixMillis(state["now"].as_u64().context("the time of the state")?);
            let ahead_ms = now.since(WallClock.now());
            anyhow::ensure!(ahead_ms <= AHEAD_MAX_MS, "the state is {ahead_ms} ms ahead");
            let quarantined = servers(&state).filter(|server| !server["quarantine"].is_null());
            anyhow::ensure!(
                quarantined.count() <= 1,
                "hosts with a right clock are quarantined"
            );
            if let Some(found) = find(&state) {
                return Ok(found);
            }
        }
        anyhow::ensure!(Instant::now() < deadline, "not in time: {what}");
        sleep(ASK_EVERY).await;
    }
}

//! Nobody is killed: every fsync of every member takes 100 ms longer, the machine is busy, and whoever leads must go
//! on leading. A term that changes is a false election.

use std::time::Duration;

use anyhow::Context;
use kubernetes_control_plane::ends_with_us;
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use super::cluster::{MEMBERS, Way};
use super::trial::{Place, Trial};
use super::{Common, Outcome};
use crate::faults::fsync::Fsync;

/// Longer than any flush of a disk that is not broken.
const STALL: Duration = Duration::from_millis(100);
/// Programs that want a whole core each.
const BUSY: usize = 2;
const LOOK_EVERY: Duration = Duration::from_millis(500);
const READ_PATIENCE: Duration = Duration::from_secs(10);

/// Counts elections that nothing calls for.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Elections {
    /// How long
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub minutes: u64,
    /// What all of them may be told.
    #[command(flatten)]
    pub common: Common,
}

impl Elections {
    /// Runs it on a cluster of its own.
    ///
    /// # Errors
    /// When there is no cluster to slow down; whatever goes wrong then is a reason in the outcome.
    pub async fn run(&self) -> anyhow::Result<Outcome> {
        let folder = tempfile::tempdir()?;
        let fsync = Fsync::prepare(folder.path())?;
        let place = Place::prepare(&self.common, "lan", MEMBERS).await?;
        let ways = vec![Way::default(); MEMBERS];
        let mut trial = Trial::begin(place, &ways, &|_, agent| fsync.preload(agent), READ_PATIENCE).await?;
        let busy: Vec<Child> = (0..BUSY).map(|_| keep_busy()).collect::<anyhow::Result<_>>()?;
        fsync.delay(STALL)?;
        let calls = fsync.calls()?;
        let (_, first) = trial.cluster.leader().await?;
        let (mut term, mut changes) = (first, 0_u64);
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(60 * self.minutes) {
            trial.cluster.must_run()?;
            // No answer is no election; one is seen in the answer after it.
            if let Ok(Some((_, now))) = trial.doors.leader().await {
                changes += u64::from(now != term);
                term = now;
            }
            sleep(LOOK_EVERY).await;
        }
        let stalled = fsync.calls()? - calls;
        fsync.delay(Duration::ZERO)?;
        drop(busy);
        if changes > 0 {
            trial.complain(format!("{changes} elections, and nobody was killed"));
        }
        let figures = json!({
            "minutes": self.minutes,
            "stall_ms": STALL.as_millis(),
            "fsync_calls": stalled,
            "false_elections": changes,
            "terms": term - first,
        });
        trial.conclude(figures).await
    }
}

/// A program that takes all of a core that it gets, until dropped.
fn keep_busy() -> anyhow::Result<Child> {
    let mut command = Command::from(ends_with_us("KILL", "yes"));
    command.stdout(std::process::Stdio::null()).kill_on_drop(true);
    command.spawn().context("start what keeps the machine busy")
}

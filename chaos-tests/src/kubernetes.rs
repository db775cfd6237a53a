//! The whole miner on a real Kubernetes API server: nodes that KWOK plays, the chart installed by Helm, an agent for
//! each node, and chutes as Jobs, while the API server is killed again and again.
//!
//! ```text
//! control plane -> nodes -> helm install -> agents -> GPUs verified -> scenario -> events -> kills -> all removed
//! ```
//! This file reads as the list of steps; `nodes.rs` registers nodes, `agents.rs` plays the kubelet for the agents' own
//! pods, `pods.rs` for the chutes', `jobs.rs` notes when Jobs were seen, `fleet.rs` holds all of it together and says
//! what must hold. Not there: a kubelet, pulls, GPU injection, and the enforcement of network policies.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::members::{Common, Outcome};
use crate::storm::spread;

mod agents;
mod fleet;
mod jobs;
mod nodes;
mod pods;

use fleet::Fleet;

/// Label of the nodes whose agents are members.
const MEMBER_LABEL: &str = "node-restriction.kubernetes.io/chutes-member";
/// Port of the members' management API.
const API_PORT: u16 = 32000;
/// Chutes for the nodes to run, at most, beside those of the development scenario.
const CHUTES_MAX: usize = 60;
/// An API server that was killed stays away for at most so long, in ms.
const AWAY_MAX_MS: u64 = 2_000;
/// Between the start of something and a kill, at most, in ms: launches take about as long.
const MOMENT_MAX_MS: u64 = 1_500;
/// How soon all must be done after the API server is back, in ms.
const CONVERGED_MAX_MS: u64 = 10_000;
const CALM_PATIENCE: Duration = Duration::from_secs(240);

/// What to do.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// How many nodes there are
    #[arg(long, default_value_t = 50)]
    pub nodes: usize,
    /// Software GPUs of each node
    #[arg(long, default_value_t = 4)]
    pub gpus: usize,
    /// How often the API server is killed
    #[arg(long, default_value_t = 10)]
    pub kills: u32,
    /// How many new chutes are timed, from their event to their Job
    #[arg(long, default_value_t = 50)]
    pub events: u32,
    /// Folder of the control plane's programs, as chaos-tests/control-plane/build prints it
    #[arg(long, env = kubernetes_control_plane::FOLDER_VARIABLE)]
    pub control_plane: Option<PathBuf>,
    /// What all of them may be told.
    #[command(flatten)]
    pub common: Common,
}

/// What was measured.
#[derive(Debug, Default)]
struct Times {
    event_to_job: Vec<u64>,
    converged: Vec<u64>,
    away: Vec<u64>,
}

impl Options {
    /// Runs it on a control plane of its own.
    ///
    /// # Errors
    /// When there is nothing to shake; whatever goes wrong then is a reason in the outcome.
    pub async fn run(&self) -> anyhow::Result<Outcome> {
        let programs = self.control_plane.clone().context(
            "no Kubernetes control plane: --control-plane must name the folder that chaos-tests/control-plane/build \
             prints as its last line",
        )?;
        anyhow::ensure!(
            (2..=nodes::NODES_MAX).contains(&self.nodes),
            "--nodes must be 2 to {}, not {}",
            nodes::NODES_MAX,
            self.nodes
        );
        let mut random = fastrand::Rng::with_seed(self.common.seed());
        let mut fleet = Fleet::start(self, programs).await?;
        let mut times = Times::default();
        let mut steps = json!({});
        if let Err(error) = self.shake(&mut fleet, &mut random, &mut times, &mut steps).await {
            fleet.complain(format!("{error:#}"));
        }
        let figures = json!({
            "event_to_job_ms": spread(&times.event_to_job),
            "api_server_away_ms": spread(&times.away),
            "converged_ms": spread(&times.converged),
            "steps": steps,
        });
        let over = times
            .converged
            .iter()
            .filter(|ms| **ms > CONVERGED_MAX_MS)
            .count();
        if over > 0 {
            fleet.complain(format!(
                "{over} times it took more than {CONVERGED_MAX_MS} ms to converge"
            ));
        }
        fleet.conclude(figures).await
    }

    async fn shake(
        &self,
        fleet: &mut Fleet,
        random: &mut fastrand::Rng,
        times: &mut Times,
        steps: &mut Value,
    ) -> anyhow::Result<()> {
        let mut from = Instant::now();
        let mut step = |steps: &mut Value, name: &str| {
            steps[name] = json!(ms(from));
            tracing::info!(name, "done");
            from = Instant::now();
        };
        fleet.until_verified().await.context("GPUs")?;
        step(steps, "gpus_verified_ms");
        let chutes = (self.nodes * self.gpus / 4).clamp(1, CHUTES_MAX);
        for number in 1..=chutes {
            fleet.publish(&format!("fleet-{number}")).await?;
        }
        fleet.run_program().await.context("the scenario")?;
        fleet.settle(CALM_PATIENCE).await.context("the scenario")?;
        step(steps, "scenario_ms");
        let cpu = fleet.members_cpu();
        for number in 1..=self.events {
            let taken = fleet.time_event(&format!("timed-{number}")).await?;
            times.event_to_job.push(taken);
        }
        let spent = fleet.members_cpu().saturating_sub(cpu);
        fleet.settle(CALM_PATIENCE).await.context("the timed events")?;
        step(steps, "events_ms");
        steps["members_cpu_ms_per_event"] = json!(spent.as_secs_f64() * 1e3 / f64::from(self.events.max(1)));
        for kill in 1..=self.kills {
            self.strike(fleet, kill, random, times)
                .await
                .with_context(|| format!("kill {kill}"))?;
        }
        step(steps, "kills_ms");
        fleet.remove_all().await.context("all is removed")?;
        step(steps, "removed_ms");
        Ok(())
    }

    /// One kill of the API server, with something to do before it and while it is away.
    async fn strike(
        &self,
        fleet: &mut Fleet,
        kill: u32,
        random: &mut fastrand::Rng,
        times: &mut Times,
    ) -> anyhow::Result<()> {
        fleet.publish(&format!("before-{kill}")).await?;
        fleet.delete(&format!("fleet-{kill}")).await?;
        // The random moment itself, not a wait for something.
        sleep(Duration::from_millis(random.u64(..MOMENT_MAX_MS))).await;
        let kept = fleet.remember();
        let gone = Instant::now();
        fleet.plane.kill_server().await?;
        fleet.publish(&format!("meanwhile-{kill}")).await?;
        sleep(Duration::from_millis(random.u64(..AWAY_MAX_MS))).await;
        fleet.plane.start_server().await?;
        times.away.push(ms(gone));
        let back = Instant::now();
        fleet.settle(CALM_PATIENCE).await?;
        times.converged.push(ms(back));
        fleet.check_kept(&kept).await
    }
}

fn ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

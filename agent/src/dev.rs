//! `chutes-agent dev`: the whole miner on this machine, against a validator stand-in.
//!
//! ```text
//! dev --+-- validator-stand-in          127.0.0.1, real protocol, built-in or given scenario
//!       +-- run (host 1, 127.0.1.1) --- signer, coordinator, host, proof, data --- chutes
//!       +-- run (host N, 127.0.1.N) --- signer, coordinator, host, proof, data --- chutes
//! ```
//! Host 1 founds the cluster, the others join it with invitations.
//! Every part is a child process of this executable and speaks to the others as it would on real machines.
//! What is simulated is called so: the validator is a stand-in, the GPUs are software GPUs, the chutes are
//! chute stand-ins, and two names are resolved and dialled by a table. This file reads as the list of steps;
//! `hosts.rs` prepares and watches the children, `miner.rs` asks the management API, `account.rs` prints what
//! happens, `verdict.rs` compares the stand-in's ledger with the miner's state.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use coordinator_core::state_machine::desired::DISK_GB_DEFAULT;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::units::parse_duration;

mod account;
mod hosts;
mod miner;
mod stand_in;
mod verdict;

use hosts::Hosts;
use miner::Miner;
use stand_in::StandIn;
use verdict::{Oracle, Verdict};

/// Between two looks at miner and stand-in.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long the parts may take to serve.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// With leaders being killed: how long after the last of it everything may take to be well.
const SETTLE_MAX: Duration = Duration::from_secs(45);

/// Arguments of `dev`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Hosts to run; host N uses 127.0.1.N
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=9))]
    pub hosts: u8,
    /// Scenario file for the validator stand-in; the built-in development scenario when absent
    #[arg(long)]
    pub scenario: Option<PathBuf>,
    /// Folder to keep everything in; a temporary one, removed at the end, when absent
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// End when the scenario's goals are met; fail when they are not in time
    #[arg(long, conflicts_with = "run_for")]
    pub once: bool,
    /// End after this time, such as 3m, and judge then
    #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
    pub run_for: Option<Duration>,
    /// Kill the agent of the host that leads, and start it again, this often (with --for)
    #[arg(long, value_name = "DURATION", value_parser = duration, requires = "run_for")]
    pub kill_leader_every: Option<Duration>,
    /// What the last line on standard output is
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

impl Options {
    /// Five of six that there is time for: the hosts need some to start, and leaders some to be elected.
    fn leader_kills_wanted(&self) -> u64 {
        let time = self.kill_leader_every.zip(self.run_for);
        let kills = time.map_or(0, |(every, time)| time.as_millis() / every.as_millis().max(1));
        u64::try_from(kills * 5 / 6).unwrap_or(u64::MAX)
    }
}

/// Form of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// One JSON object; the account goes to standard error.
    Json,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}

/// Runs it.
///
/// # Errors
/// When a part does not start, or with the reasons why the scenario's goals were not met.
pub async fn main(options: Options) -> anyhow::Result<()> {
    // Fails when one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let interrupted = CancellationToken::new();
    tokio::spawn(cancel_on_interrupt(interrupted.clone()));
    let temporary;
    let data = match &options.data {
        Some(folder) => folder.clone(),
        None => {
            temporary = TemporaryFolder::create()?;
            temporary.0.clone()
        }
    };
    std::fs::create_dir_all(&data).with_context(|| format!("create {}", data.display()))?;
    let data = data
        .canonicalize()
        .with_context(|| format!("resolve {}", data.display()))?;
    check_disk(&data)?;
    hosts::check_addresses(options.hosts)?;
    let mut account = account::Account::new(options.output == Output::Json);
    account.heading(&options, &data);

    let began = Instant::now();
    let mut stand_in = StandIn::start(&data, options.scenario.as_deref()).await?;
    account.stand_in(&stand_in);
    let mut hosts = Hosts::start(&data, options.hosts, &stand_in)?;
    let ended = run(
        &options,
        &mut account,
        &mut stand_in,
        &mut hosts,
        began,
        &interrupted,
    )
    .await;
    let left = hosts.stop(options.data.is_none()).await;
    stand_in.stop().await;
    let mut verdict = ended?;
    if left > 0 {
        verdict.complain(format!("{left} chute processes were left behind"));
    }
    account.result(&verdict)?;
    match verdict.reasons.as_slice() {
        [] => Ok(()),
        reasons => anyhow::bail!("the scenario's goals were not met: {}", reasons.join("; ")),
    }
}

async fn run(
    options: &Options,
    account: &mut account::Account,
    stand_in: &mut StandIn,
    hosts: &mut Hosts,
    began: Instant,
    interrupted: &CancellationToken,
) -> anyhow::Result<Verdict> {
    let miner = Miner::new(hosts.api_addresses(), stand_in.validator().clone())?;
    let started = tokio::time::timeout(START_TIMEOUT, async {
        miner.until_it_serves(hosts).await?;
        hosts.join(&miner, account).await?;
        for name in hosts.names() {
            miner.add_node(&name, account).await?;
        }
        anyhow::Ok(())
    });
    tokio::select! {
        started = started => started.context("the hosts did not join and prove their GPUs in time")??,
        () = interrupted.cancelled() => anyhow::bail!("interrupted"),
    }
    let mut oracle = Oracle::new(options.leader_kills_wanted());
    let mut killer = options.kill_leader_every.map(Killer::new);
    let limit = options
        .run_for
        .or_else(|| options.once.then(|| stand_in.goals_within()));
    loop {
        let time_is_up = limit.is_some_and(|limit| began.elapsed() >= limit);
        if let Some(killer) = killer.as_mut().filter(|_| !time_is_up)
            && let Some(victim) = killer.strike(&miner, hosts).await
        {
            oracle.leader_killed();
            account.killed(&victim);
        }
        hosts.restart_dead(account)?;
        stand_in.restart_if_dead().await?;
        let verdict = match oracle.look(&miner, stand_in, hosts).await {
            Ok(look) => {
                account.progress(&look);
                Some(oracle.judge(&look, stand_in))
            }
            // A host that was killed a moment ago does not answer; it is being restarted.
            Err(error) => {
                tracing::debug!(%error, "no complete look at miner and stand-in");
                None
            }
        };
        // What a leader was killed in the middle of needs a moment to end well.
        let settle = killer.as_ref().map_or(Duration::ZERO, |_| SETTLE_MAX);
        let over = limit.is_some_and(|limit| began.elapsed() >= limit + settle) || interrupted.is_cancelled();
        let is_enough = options.once || time_is_up;
        match verdict {
            Some(verdict) if over || (is_enough && verdict.reasons.is_empty()) => return Ok(verdict),
            None if over => anyhow::bail!("the miner's management API did not answer at the end"),
            _ => {}
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = interrupted.cancelled() => {}
        }
    }
}

/// Kills the leader's agent every so often.
struct Killer {
    every: Duration,
    next: Instant,
}

impl Killer {
    fn new(every: Duration) -> Self {
        Self {
            every,
            next: Instant::now(),
        }
    }

    /// Kills it if it is time; the host that led.
    async fn strike(&mut self, miner: &Miner, hosts: &Hosts) -> Option<String> {
        if Instant::now() < self.next {
            return None;
        }
        // While nobody leads there is nobody to kill.
        let leader = miner.leader().await.ok().flatten()?;
        if !hosts.kill(&leader) {
            return None;
        }
        self.next += self.every;
        Some(leader)
    }
}

/// Chutes are placed only where there is room for them; without it nothing would happen, and nobody would
/// know why.
fn check_disk(folder: &std::path::Path) -> anyhow::Result<()> {
    let disk = rustix::fs::statvfs(folder).with_context(|| format!("look at {}", folder.display()))?;
    let free_gb = disk.f_bavail.saturating_mul(disk.f_frsize) >> 30;
    anyhow::ensure!(
        free_gb >= u64::from(DISK_GB_DEFAULT),
        "{free_gb} GB of disk are free at {}, and chutes are placed where {DISK_GB_DEFAULT} GB are; free some, or \
         name another folder with --data",
        folder.display()
    );
    Ok(())
}

async fn cancel_on_interrupt(token: CancellationToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    token.cancel();
}

/// A folder under the system's temporary folder that goes with this value.
struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    fn create() -> anyhow::Result<Self> {
        let folder = std::env::temp_dir().join(format!(
            "chutes-dev-{}-{:08x}",
            std::process::id(),
            fastrand::u32(..)
        ));
        std::fs::create_dir(&folder).with_context(|| format!("create {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            let _ = writeln!(std::io::stderr(), "{} was not removed: {error}", self.0.display());
        }
    }
}

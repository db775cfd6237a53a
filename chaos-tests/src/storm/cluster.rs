//! A development cluster as a child: `chutes-agent dev` with a data folder of its own, found in `/proc`, and
//! ended with everything that it left.

use std::fs::{File, TryLockError};
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use kubernetes_control_plane::ends_with_us;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use super::doors::Doors;
use super::processes::Process;

/// All development clusters of a machine use the same addresses: tests that start one wait for each other.
const LOCK_FILE: &str = "chutes-development-cluster.lock";
const LOCK_PATIENCE: Duration = Duration::from_secs(900);
/// Hosts of a development cluster; all are members.
const HOSTS: u8 = 3;
const START_PATIENCE: Duration = Duration::from_secs(90);
const STOP_PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A process of a host's agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Victim {
    /// The agent itself: with it all its other processes die
    #[value(name = "agent")]
    Supervisor,
    /// The member of the coordinator
    Coordinator,
    /// The host plane
    Host,
    /// The doors for images and egress
    Data,
    /// The process that holds the seed
    Signer,
    /// The one that proves GPUs
    Proof,
}

impl Victim {
    /// In this order they are killed.
    pub(crate) const ALL: [Self; 6] = [
        Self::Supervisor,
        Self::Coordinator,
        Self::Host,
        Self::Data,
        Self::Signer,
        Self::Proof,
    ];

    pub(crate) fn subcommand(self) -> &'static str {
        match self {
            Self::Supervisor => "run",
            Self::Coordinator => "coordinator",
            Self::Host => "host",
            Self::Data => "data",
            Self::Signer => "signer",
            Self::Proof => "proof",
        }
    }

    /// Whether the management API and the validator's socket go with it.
    pub(crate) fn takes_the_coordinator(self) -> bool {
        matches!(self, Self::Supervisor | Self::Coordinator)
    }
}

#[derive(Debug)]
pub(crate) struct Cluster {
    agent: PathBuf,
    pub(crate) data: PathBuf,
    child: Child,
    _lock: File,
}

impl Cluster {
    /// Starts one once the machine is free, and waits until its validator serves.
    pub(crate) async fn start(agent: &Path, data: &Path, limit: Duration) -> anyhow::Result<Self> {
        let lock = take_the_machine().await?;
        let data = data.canonicalize().context("the data folder")?;
        let file = |name: &str| File::create(data.join(name)).context("write into the data folder");
        // Asked to, it ends in order.
        let child = Command::from(ends_with_us("TERM", agent))
            .args(["dev", "--output", "json", "--data"])
            .arg(&data)
            .args(["--hosts", &HOSTS.to_string()])
            .args(["--for", &format!("{}s", limit.as_secs())])
            .stdin(Stdio::null())
            .stdout(file("dev.out")?)
            .stderr(file("dev.err")?)
            .spawn()
            .with_context(|| format!("start {}", agent.display()))?;
        Ok(Self {
            agent: agent.to_owned(),
            data,
            child,
            _lock: lock,
        })
    }

    /// The doors, once there are any.
    pub(crate) async fn doors(&mut self) -> anyhow::Result<Doors> {
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            if let Ok(doors) = Doors::of(&self.data, (1..=HOSTS).map(management).collect())
                && doors.answers().await
            {
                return Ok(doors);
            }
            self.must_run()?;
            anyhow::ensure!(
                Instant::now() < deadline,
                "the management API does not answer; see {}",
                self.data.join("host-1/log").display()
            );
            sleep(LOOK_EVERY).await;
        }
    }

    pub(crate) fn must_run(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let said = std::fs::read_to_string(self.data.join("dev.err")).unwrap_or_default();
            let last: Vec<&str> = said.lines().rev().take(3).collect();
            anyhow::bail!("the development cluster ended ({status}): {}", last.join(" | "));
        }
        Ok(())
    }

    /// A host's process of this kind, if it runs now.
    pub(crate) fn find(&self, host: &str, victim: Victim) -> Option<Process> {
        let host = self.data.join(host);
        let ours = |process: &Process| {
            process.subcommand() == victim.subcommand()
                && process
                    .arguments
                    .iter()
                    .any(|argument| Path::new(argument).starts_with(&host))
                && process.deployment.is_none()
        };
        Process::all().into_iter().find(ours)
    }

    /// Asks it to stop as an operator would, and gives the last line that it printed.
    pub(crate) async fn stop(mut self) -> anyhow::Result<(bool, String)> {
        signal(self.child.id(), Signal::TERM);
        let ended = tokio::time::timeout(STOP_PATIENCE, self.child.wait()).await;
        let status = ended.context("the development cluster does not stop")??;
        let mut said = String::new();
        File::open(self.data.join("dev.out"))?.read_to_string(&mut said)?;
        let last = said.lines().last().unwrap_or_default().to_owned();
        Ok((status.success(), last))
    }
}

impl Drop for Cluster {
    /// Chutes outlive their agent by design, so they are ended one by one; and whatever a failure left.
    fn drop(&mut self) {
        signal(self.child.id(), Signal::KILL);
        let own = std::process::id().cast_signed();
        let agent = self.agent.to_string_lossy().into_owned();
        // Supervisors first: they would start what is killed before them.
        for supervisors in [true, false] {
            for process in Process::all() {
                let part = process.arguments.first().is_some_and(|name| *name == agent)
                    && process
                        .arguments
                        .iter()
                        .any(|argument| Path::new(argument).starts_with(&self.data));
                let wanted = process.subcommand() == "run" || !supervisors;
                if process.pid != own && wanted && (part || process.is_chute_of(&self.data)) {
                    kill(process.pid);
                }
            }
        }
    }
}

fn signal(pid: Option<u32>, signal: Signal) {
    if let Some(pid) = pid.and_then(|pid| Pid::from_raw(pid.cast_signed())) {
        // It may have ended.
        let _ = kill_process(pid, signal);
    }
}

/// `kill -9`, of the whole group where the process leads one.
fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process_group(pid, Signal::KILL);
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// `kill -9` of one process.
pub(crate) fn kill_one(process: &Process) -> anyhow::Result<()> {
    let pid = Pid::from_raw(process.pid).context("a process id")?;
    kill_process(pid, Signal::KILL).context("kill")
}

/// Where a host of a development cluster has its management API.
fn management(host: u8) -> SocketAddr {
    SocketAddr::from(([127, 0, 1, host], 32000))
}

/// Waits until no other test has a development cluster, and nobody else its ports.
async fn take_the_machine() -> anyhow::Result<File> {
    let path = std::env::temp_dir().join(LOCK_FILE);
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match lock.try_lock() {
            Ok(()) if TcpListener::bind(management(1)).is_ok() => return Ok(lock),
            Ok(()) => lock.unlock()?,
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error).context("lock"),
        }
        anyhow::ensure!(
            Instant::now() < deadline,
            "another development cluster runs on this machine"
        );
        sleep(LOOK_EVERY).await;
    }
}

/// The executable of the workspace's agent, built with the same profile as this program.
pub(crate) fn agent_beside_us() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("find this program")?;
    // A test lies one folder deeper than a program.
    let folders = own.ancestors().skip(1).take(2);
    let mut candidates = folders.map(|folder| folder.join("chutes-agent"));
    candidates.find(|path| path.is_file()).with_context(|| {
        format!(
            "chutes-agent is not built beside {}: run `cargo build -p agent` with the same profile",
            own.display()
        )
    })
}

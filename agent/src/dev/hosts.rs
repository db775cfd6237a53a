//! The hosts of a development cluster: their configuration files, certificates and child processes.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use coordinator::clock::{Clock as _, WallClock};
use coordinator::join::{Admission, admission};
use protocol::id::ServerId;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::process::{Child, Command};
use validator_stand_in::scenario::DEVELOPMENT_MINER_SEED;

use super::account::Account;
use super::miner::Miner;
use super::stand_in::StandIn;

/// GPUs of a development cluster of one host. Several hosts share them out, and have some more so that chutes of two
/// GPUs find room.
const SOFTWARE_GPUS: usize = 8;
const SOFTWARE_GPUS_MIN: usize = 4;
const API_PORT: u16 = 32000;
/// How long a host may take to join.
const JOIN_TIMEOUT: Duration = Duration::from_secs(60);
/// A public address for the check of allowed sites; nothing is ever sent there, the table dials loopback.
const SITE_ADDRESS: &str = "8.8.8.8";
/// How long a host may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(25);

#[derive(Debug)]
struct Host {
    name: String,
    folder: PathBuf,
    /// None before it has joined.
    child: Option<Child>,
}

/// All hosts.
#[derive(Debug)]
pub(super) struct Hosts {
    data: PathBuf,
    hosts: Vec<Host>,
}

impl Hosts {
    /// Prepares what is missing in `data`, founds the cluster on the first host, and starts the agents of those hosts
    /// that belong to it.
    pub(super) fn start(data: &Path, count: u8, stand_in: &StandIn) -> anyhow::Result<Self> {
        let seed_file = data.join("miner-seed");
        write_private(&seed_file, DEVELOPMENT_MINER_SEED)?;
        let mut hosts = Vec::new();
        for number in 1..=count {
            let folder = data.join(format!("host-{number}"));
            let identity = folder.join("host");
            std::fs::create_dir_all(&identity)?;
            let config = configuration(number, count, &folder, &seed_file, stand_in)?;
            write_private(&folder.join("config.toml"), &config)?;
            if number == 1 {
                let door = format!("127.0.1.{number}:4433");
                let _founded_now =
                    admission::found(&identity, "dev", &server_id(number)?, &door, WallClock.now())?;
            }
            let belongs = Admission::read(&identity)?.is_some();
            let child = belongs.then(|| spawn(&folder)).transpose()?;
            hosts.push(Host {
                name: format!("host-{number}"),
                folder,
                child,
            });
        }
        Ok(Self {
            data: data.to_owned(),
            hosts,
        })
    }

    /// Lets the hosts join that have not, as an operator would, and starts their agents.
    pub(super) async fn join(&mut self, miner: &Miner, account: &mut Account) -> anyhow::Result<()> {
        for host in self.hosts.iter_mut().filter(|host| host.child.is_none()) {
            let invited = miner.invite().await?;
            let token = invited["token"]
                .as_str()
                .context("an invitation without a token")?;
            let mut command = Command::new(std::env::current_exe().context("find this executable")?);
            command.arg("join").arg(token);
            command.arg("--config").arg(host.folder.join("config.toml"));
            let joined = command.stdin(Stdio::null()).kill_on_drop(true).output();
            let joined = tokio::time::timeout(JOIN_TIMEOUT, joined)
                .await
                .with_context(|| format!("{} does not join", host.name))??;
            anyhow::ensure!(
                joined.status.success(),
                "{} did not join: {}",
                host.name,
                String::from_utf8_lossy(&joined.stderr).trim()
            );
            account.note(&host.name, String::from_utf8_lossy(&joined.stdout).trim());
            host.child = Some(spawn(&host.folder)?);
        }
        Ok(())
    }

    /// Kills the agent of a host at once, with all its processes but the chutes.
    pub(super) fn kill(&self, name: &str) -> bool {
        let host = self.hosts.iter().find(|host| host.name == name);
        let pid = host
            .and_then(|host| host.child.as_ref())
            .and_then(|child| Pid::from_raw(child.id()?.cast_signed()));
        pid.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
    }

    /// Where the management API is: every member has one.
    pub(super) fn api_addresses(&self) -> Vec<SocketAddr> {
        let count = u8::try_from(self.hosts.len()).unwrap_or(u8::MAX);
        (1..=count).map(api_address).collect()
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.hosts.iter().map(|host| host.name.clone()).collect()
    }

    /// True while every agent lives. A supervisor that ends did not even read its configuration.
    pub(super) fn all_run(&self) -> bool {
        let mut children = self.hosts.iter().filter_map(|host| host.child.as_ref());
        children.all(|child| {
            child
                .id()
                .is_some_and(|pid| Path::new(&format!("/proc/{pid}/exe")).exists())
        })
    }

    pub(super) fn count(&self) -> usize {
        self.hosts.len()
    }

    /// The last lines of the first host's log, for an error that a person must understand.
    pub(super) fn log_file(&self) -> PathBuf {
        self.data.join("host-1/log")
    }

    /// Starts agents that have ended again, as systemd or Kubernetes would.
    pub(super) fn restart_dead(&mut self, account: &mut Account) -> anyhow::Result<()> {
        for host in &mut self.hosts {
            let Some(child) = host.child.as_mut() else {
                continue;
            };
            if let Some(status) = child.try_wait()? {
                account.restarted(&host.name, &status.to_string());
                *child = spawn(&host.folder)?;
            }
        }
        Ok(())
    }

    /// Stops all agents, and the chutes too if asked; how many chute processes could not be ended.
    pub(super) async fn stop(mut self, chutes_too: bool) -> usize {
        let mut children: Vec<&mut Child> = self.hosts.iter_mut().filter_map(|h| h.child.as_mut()).collect();
        for child in &children {
            ask_to_stop(child);
        }
        for child in &mut children {
            terminate(child, STOP_TIMEOUT).await;
        }
        if chutes_too { end_chutes(&self.data) } else { 0 }
    }
}

fn server_id(number: u8) -> anyhow::Result<ServerId> {
    Ok(ServerId::parse(&format!("host-{number}.dev"))?)
}

/// Fails if the addresses of so many hosts are in use: with another cluster there, each would get the other's answers.
///
/// # Errors
/// The first address that cannot be had, and what to do.
pub(super) fn check_addresses(count: u8) -> anyhow::Result<()> {
    for address in (1..=count).map(api_address) {
        TcpListener::bind(address).with_context(|| {
            format!(
                "{address} cannot be listened on: does another `chutes-agent dev` run here, or are its agents still \
                 there? All use the same addresses; end it first"
            )
        })?;
    }
    Ok(())
}

fn api_address(number: u8) -> SocketAddr {
    ([127, 0, 1, number], API_PORT).into()
}

/// One host's configuration: the shipped ports on an address of its own.
fn configuration(
    number: u8,
    count: u8,
    folder: &Path,
    seed_file: &Path,
    stand_in: &StandIn,
) -> anyhow::Result<String> {
    let description = stand_in.description();
    let address = format!("127.0.1.{number}");
    let gpus = (SOFTWARE_GPUS / usize::from(count)).max(SOFTWARE_GPUS_MIN);
    let miner = protocol::hotkey::Signer::from_seed_hex(DEVELOPMENT_MINER_SEED)?;
    let rows: Vec<toml::Value> = description
        .sites
        .iter()
        .map(|site| {
            let row = BTreeMap::from([
                ("name", toml::Value::from(site.name.clone())),
                ("addresses", toml::Value::from(vec![SITE_ADDRESS.to_owned()])),
                ("listener", toml::Value::from(site.address.to_string())),
            ]);
            toml::Value::try_from(row).expect("plain texts")
        })
        .collect();
    let allowed: Vec<&str> = description
        .sites
        .iter()
        .filter(|site| site.allowed)
        .map(|site| site.name.as_str())
        .collect();
    let config = toml::toml! {
        [miner]
        [host]
        [coordinator]
        [proof]
        [registry]
        [egress]
        [runtime]
    };
    let mut config = toml::Value::Table(config);
    let mut set = |section: &str, key: &str, value: toml::Value| {
        let table = config.get_mut(section).and_then(toml::Value::as_table_mut);
        table.expect("listed above").insert(key.to_owned(), value);
    };
    set("miner", "hotkey", miner.hotkey().to_string().into());
    set("miner", "seed_on_gpu_host", true.into());
    set("miner", "seed_file", seed_file.display().to_string().into());
    set("host", "name", format!("host-{number}").into());
    set("host", "id", server_id(number)?.to_string().into());
    set("host", "address", address.clone().into());
    set("coordinator", "enabled", true.into());
    set("coordinator", "hosts_listen", format!("{address}:4433").into());
    set(
        "coordinator",
        "api_listen",
        api_address(number).to_string().into(),
    );
    set("coordinator", "tick", "3s".into());
    set("coordinator", "observe", "3s".into());
    set("proof", "listen", format!("{address}:30443").into());
    set("proof", "backend", "cpu".into());
    set("proof", "software_gpus", i64::try_from(gpus)?.into());
    set("registry", "listen", format!("{address}:30500").into());
    set("registry", "store_free_bytes_min", "1GiB".into());
    set("egress", "listen", format!("{address}:3128").into());
    set("egress", "allowed_also", toml::Value::try_from(allowed)?);
    set("egress", "table", toml::Value::Array(rows));
    set("runtime", "kind", "process".into());
    let root = config.as_table_mut().expect("a table");
    root.insert("data".to_owned(), folder.display().to_string().into());
    let validator = BTreeMap::from([
        ("hotkey", description.hotkey.to_string()),
        ("api", description.api_url.clone()),
        ("socket", description.socket_url.clone()),
        ("registry", description.registry_url.clone()),
    ]);
    root.insert(
        "validators".to_owned(),
        toml::Value::Array(vec![toml::Value::try_from(validator)?]),
    );
    Ok(toml::to_string(&config)?)
}

fn spawn(folder: &Path) -> anyhow::Result<Child> {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(folder.join("log"))?;
    let mut command = Command::new(std::env::current_exe().context("find this executable")?);
    command.args(["run", "--config"]).arg(folder.join("config.toml"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true);
    command
        .spawn()
        .with_context(|| format!("start the agent of {}", folder.display()))
}

fn ask_to_stop(child: &Child) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        // It may have ended already.
        let _ = kill_process(pid, Signal::TERM);
    }
}

/// Asks a process to end, waits, and ends it.
pub(super) async fn terminate(child: &mut Child, patience: Duration) {
    ask_to_stop(child);
    if tokio::time::timeout(patience, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

/// Ends the process groups of chutes that belong to this folder; how many are left.
fn end_chutes(data: &Path) -> usize {
    let mut left = 0;
    for pid in chutes_of(data) {
        if kill_process_group(pid, Signal::KILL).is_err() && kill_process(pid, Signal::KILL).is_err() {
            left += 1;
        }
    }
    left
}

/// Chute processes whose code lies in this folder: each names it in its environment.
fn chutes_of(data: &Path) -> Vec<Pid> {
    let marker = format!("CHUTES_CODE_FILE={}/", data.display());
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = processes.flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let environment = std::fs::read(entry.path().join("environ")).ok()?;
        let ours = environment
            .split(|byte| *byte == 0)
            .any(|v| v.starts_with(marker.as_bytes()));
        Pid::from_raw(pid).filter(|_| ours)
    });
    pids.collect()
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("write {}", path.display()))?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    Ok(())
}

//! Members as the processes that they are: `chutes-agent` founds, joins and runs, each host in a folder and on an
//! address of its own, against a validator stand-in.
//!
//! Unlike `dev` this leaves everything that is killed to who kills it, and lets members be reached through
//! something that spoils their links.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use kubernetes_control_plane::ends_with_us;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};
use validator_stand_in::scenario::DEVELOPMENT_MINER_SEED;

use crate::faults::network::Network;
use crate::storm::doors::{self, Doors};
use crate::storm::processes::Process;

/// Members of a cluster, where nothing else is asked for.
pub(super) const MEMBERS: usize = 3;
/// So many of the members run chutes.
const HOSTS_MAX: usize = 3;
const SOFTWARE_GPUS: usize = 4;
/// What a software GPU costs, in dollars per hour.
const HOURLY_COST_USD: f64 = 0.01;
/// A public address for the check of allowed sites; nothing is sent there, the table dials loopback.
const SITE_ADDRESS: &str = "8.8.8.8";
const START_PATIENCE: Duration = Duration::from_secs(90);
const ASK_EVERY: Duration = Duration::from_millis(50);

/// How one member is reached and what it reaches.
#[derive(Debug, Clone, Default)]
pub(super) struct Way {
    /// Where others reach its door; the door itself when absent.
    pub(super) advertise: Option<SocketAddr>,
    /// Where it reaches the validator; the stand-in itself when absent.
    pub(super) validator: Option<SocketAddr>,
    /// Whether it is a host without a vote, which knows the members' doors from joining only.
    pub(super) observes: bool,
}

/// Where the members are.
#[derive(Debug, Clone)]
pub(super) enum Ground {
    /// All in one network, at addresses below 127.77 and this number.
    Loopback(u8),
    /// Each on a host of its own, numbered from 1 as the hosts are.
    Hosts(Arc<Network>),
}

impl Ground {
    /// The address of a member. Clusters on one machine have networks of their own.
    fn address(&self, member: usize) -> String {
        match self {
            Self::Loopback(network) => format!("127.77.{network}.{}", member + 1),
            Self::Hosts(_) => Network::address(host_of(member)).to_string(),
        }
    }

    /// The doors for members and hosts of a cluster that is not there yet.
    pub(super) fn member_doors(&self, members: usize) -> Vec<SocketAddr> {
        let doors = (0..members).map(|member| format!("{}:4433", self.address(member)));
        doors.filter_map(|door| door.parse().ok()).collect()
    }

    /// A command that will run where the member is.
    fn command(&self, member: usize, program: &Path) -> Program {
        match self {
            Self::Loopback(_) => ends_with_us("KILL", program),
            Self::Hosts(network) => network.command(host_of(member), program),
        }
    }
}

/// The host on which a member is, where each has its own.
pub(super) fn host_of(member: usize) -> u8 {
    u8::try_from(member + 1).unwrap_or(u8::MAX)
}

/// What all members have in common.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// `raft.timing`.
    pub(super) timing: &'static str,
    /// How many there are.
    pub(super) members: usize,
    /// Folder of everything.
    pub(super) data: PathBuf,
    /// The `chutes-agent` executable.
    pub(super) agent: PathBuf,
}

/// A running cluster; everything ends when it is dropped.
pub(super) struct Cluster {
    pub(super) plan: Plan,
    ground: Ground,
    stand_in: Child,
    hosts: Vec<Option<Child>>,
    pub(super) doors: Doors,
}

/// A network that nobody uses now.
pub(super) fn free_network() -> anyhow::Result<u8> {
    let first = fastrand::u8(1..=250);
    let mut networks = (first..=250).chain(1..first);
    let free = |network: &u8| {
        let ground = Ground::Loopback(*network);
        (0..MEMBERS)
            .map(|member| format!("{}:32000", ground.address(member)))
            .all(|door| std::net::TcpListener::bind(door).is_ok())
    };
    networks
        .find(free)
        .context("all networks below 127.77 are in use")
}

/// Starts the stand-in with its data below `data`; the development scenario when no file of another is named.
pub(crate) async fn start_stand_in(
    agent: &Path,
    data: &Path,
    scenario: Option<&Path>,
) -> anyhow::Result<Child> {
    let folder = data.join("validator-stand-in");
    std::fs::create_dir_all(&folder)?;
    let mut command = Command::from(ends_with_us("KILL", agent));
    command.args(["validator-stand-in", "--listen", "127.0.0.1:0"]);
    if let Some(scenario) = scenario {
        command.arg("--scenario").arg(scenario);
    }
    command.arg("--data");
    command
        .arg(&folder)
        .arg("--ready-file")
        .arg(folder.join("ready.json"));
    let child = quiet(&mut command, &folder)?
        .spawn()
        .context("start the stand-in")?;
    let deadline = Instant::now() + START_PATIENCE;
    while doors::ready(data).is_err() {
        anyhow::ensure!(Instant::now() < deadline, "the stand-in does not serve");
        sleep(ASK_EVERY).await;
    }
    Ok(child)
}

fn quiet<'c>(command: &'c mut Command, folder: &Path) -> anyhow::Result<&'c mut Command> {
    let mut options = File::options();
    let log = options.create(true).append(true).open(folder.join("log"))?;
    Ok(command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true))
}

/// Writes a file that only its owner may read.
pub(crate) fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path).with_context(|| path.display().to_string())?;
    Ok(std::io::Write::write_all(&mut file, text.as_bytes())?)
}

impl Cluster {
    /// Founds on the first host, lets the others join, and waits until all vote and prove their GPUs. `ways` has one
    /// for each host, members first. `around` changes how an agent is started: what it preloads, say.
    pub(super) async fn start(
        plan: Plan,
        ground: Ground,
        stand_in: Child,
        ways: &[Way],
        around: &dyn Fn(usize, &mut Program),
    ) -> anyhow::Result<Self> {
        let apis = (0..plan.members).map(|member| format!("{}:32000", ground.address(member)));
        let apis = apis.map(|api| Ok(api.parse()?)).collect::<anyhow::Result<_>>()?;
        let mut cluster = Self {
            doors: Doors::of(&plan.data, apis)?,
            plan,
            ground,
            stand_in,
            hosts: Vec::new(),
        };
        cluster.write_private("miner-seed", DEVELOPMENT_MINER_SEED)?;
        for (member, way) in ways.iter().enumerate() {
            std::fs::create_dir_all(cluster.folder(member))?;
            let file = format!("host-{}/config.toml", member + 1);
            cluster.write_private(&file, &cluster.configuration(member, way)?)?;
            if member == 0 {
                cluster.call(member, &["init"]).await?;
            } else {
                let token = cluster.invite(!way.observes).await?;
                cluster.call(member, &["join", &token]).await?;
            }
            cluster.hosts.push(None);
            cluster.run_with(member, around)?;
            if !way.observes {
                cluster.until_it_answers(member).await?;
            }
        }
        cluster.until_all_vote().await?;
        let runs_chutes = |host: &usize| ways[*host].observes || *host < HOSTS_MAX;
        for (before, host) in (0..ways.len()).filter(runs_chutes).enumerate() {
            cluster.add_gpus(host, before).await?;
        }
        Ok(cluster)
    }

    /// An invitation, once the cluster is founded.
    async fn invite(&self, eligible: bool) -> anyhow::Result<String> {
        let invite = json!({ "eligible": eligible });
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            let invited = self.doors.write("/hosts/invites", &invite).await;
            match invited {
                Ok(invited) => {
                    let token = invited["token"].as_str();
                    return token.map(str::to_owned).context("an invitation without a token");
                }
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => sleep(ASK_EVERY).await,
            }
        }
    }

    fn write_private(&self, name: &str, text: &str) -> anyhow::Result<()> {
        write_private(&self.plan.data.join(name), text)
    }

    pub(super) fn folder(&self, member: usize) -> PathBuf {
        self.plan.data.join(format!("host-{}", member + 1))
    }

    fn configuration(&self, member: usize, way: &Way) -> anyhow::Result<String> {
        let ready = doors::ready(&self.plan.data)?;
        let address = self.ground.address(member);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (mut api, mut socket) = (text(&ready["api_url"]), text(&ready["socket_url"]));
        if let Some(validator) = way.validator {
            (api, socket) = (format!("http://{validator}"), format!("ws://{validator}"));
        }
        let sites = ready["sites"].as_array().cloned().unwrap_or_default();
        let allowed: Vec<&Value> = sites.iter().filter(|site| site["allowed"] == true).collect();
        let allowed: Vec<&Value> = allowed.iter().map(|site| &site["name"]).collect();
        let table: String = sites.iter().fold(String::new(), |table, site| {
            let (name, listener) = (&site["name"], &site["address"]);
            format!("{table}[[egress.table]]\nname = {name}\naddresses = [\"{SITE_ADDRESS}\"]\nlistener = {listener}\n")
        });
        let advertise = way
            .advertise
            .map_or_else(String::new, |at| format!("advertise = \"{at}\"\n"));
        let key = protocol::hotkey::Signer::from_seed_hex(DEVELOPMENT_MINER_SEED)?;
        let (host, number) = (self.folder(member), member + 1);
        Ok(format!(
            "data = {data:?}\n\
             [miner]\nhotkey = \"{miner}\"\nseed_on_gpu_host = true\nseed_file = {seed:?}\n\
             [host]\nname = \"host-{number}\"\nid = \"host-{number}.chaos\"\naddress = \"{address}\"\nenabled = {runs}\n\
             [coordinator]\nenabled = {votes}\nhosts_listen = \"{address}:4433\"\n{advertise}\
             api_listen = \"{address}:32000\"\ntick = \"3s\"\nobserve = \"3s\"\n\
             [raft]\ntiming = \"{timing}\"\n\
             [proof]\nlisten = \"{address}:30443\"\nbackend = \"cpu\"\nsoftware_gpus = {SOFTWARE_GPUS}\n\
             [registry]\nlisten = \"{inside}:30500\"\nstore_free_bytes_min = \"1GiB\"\n\
             [egress]\nlisten = \"{inside}:3128\"\nallowed_also = {allowed}\n{table}\
             [runtime]\nkind = \"process\"\n\
             [[validators]]\nhotkey = {validator}\napi = \"{api}\"\nsocket = \"{socket}\"\nregistry = {registry}\n",
            inside = match self.ground {
                Ground::Loopback(_) => &address,
                Ground::Hosts(_) => "127.0.0.1",
            },
            data = host.display().to_string(),
            miner = key.hotkey(),
            runs = way.observes || member < HOSTS_MAX,
            votes = !way.observes,
            seed = self.plan.data.join("miner-seed").display().to_string(),
            timing = self.plan.timing,
            allowed = json!(allowed),
            validator = ready["validator"],
            registry = ready["registry_url"],
        ))
    }

    fn command(&self, member: usize) -> Program {
        let mut command = self.ground.command(member, &self.plan.agent);
        command
            .arg("--config")
            .arg(self.folder(member).join("config.toml"));
        command
    }

    /// Runs a command of the agent to its end.
    async fn call(&self, member: usize, arguments: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::from(self.command(member));
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(START_PATIENCE, command.output()).await;
        let output = output.with_context(|| format!("{arguments:?} does not end"))??;
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "{arguments:?}: {}", said.trim());
        Ok(())
    }

    /// Starts a member's agent, for the first time or again.
    pub(super) fn run_with(
        &mut self,
        member: usize,
        around: &dyn Fn(usize, &mut Program),
    ) -> anyhow::Result<()> {
        let mut command = self.command(member);
        command.arg("run");
        around(member, &mut command);
        let mut command = Command::from(command);
        let child = quiet(&mut command, &self.folder(member))?.spawn();
        self.hosts[member] = Some(child.context("start an agent")?);
        Ok(())
    }

    /// Starts a member's agent again, once the old one has ended.
    pub(super) async fn run_again(&mut self, member: usize) -> anyhow::Result<()> {
        self.run_again_with(member, &|_, _| {}).await
    }

    /// The same, with something around it.
    pub(super) async fn run_again_with(
        &mut self,
        member: usize,
        around: &dyn Fn(usize, &mut Program),
    ) -> anyhow::Result<()> {
        if let Some(mut old) = self.hosts[member].take() {
            old.wait().await.context("the agent that was killed")?;
        }
        self.run_with(member, around)
    }

    /// The process of a member with this subcommand; `run` is the agent itself.
    pub(super) fn find(&self, member: usize, subcommand: &str) -> Option<Process> {
        let folder = self.folder(member);
        let ours = |process: &Process| {
            let mut arguments = process.arguments.iter();
            process.deployment.is_none()
                && process.arguments.iter().any(|argument| argument == subcommand)
                && arguments.any(|argument| Path::new(argument).starts_with(&folder))
        };
        Process::all().into_iter().find(ours)
    }

    /// The same, waiting for it.
    pub(super) async fn process(&self, member: usize, subcommand: &str) -> anyhow::Result<Process> {
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            if let Some(process) = self.find(member, subcommand) {
                return Ok(process);
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "host-{} has no {subcommand}",
                member + 1
            );
            sleep(ASK_EVERY).await;
        }
    }

    /// The member of this name.
    pub(super) fn member_called(name: &str) -> Option<usize> {
        name.strip_prefix("host-")?.parse::<usize>().ok()?.checked_sub(1)
    }

    /// Who leads, with the term; waits for somebody to.
    pub(super) async fn leader(&self) -> anyhow::Result<(usize, u64)> {
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            if let Ok(Some((name, term))) = self.doors.leader().await
                && let Some(member) = Self::member_called(&name)
            {
                return Ok((member, term));
            }
            anyhow::ensure!(Instant::now() < deadline, "nobody leads");
            sleep(ASK_EVERY).await;
        }
    }

    /// Waits until a member gives its state, which needs a leader.
    pub(super) async fn until_it_answers(&self, member: usize) -> anyhow::Result<()> {
        self.state_of(member).await.map(drop)
    }

    /// A member's state, once it gives it.
    pub(super) async fn state_of(&self, member: usize) -> anyhow::Result<Value> {
        let door = self.doors.only(member, Duration::from_secs(2));
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            let error = match door.state().await {
                Ok(state) => return Ok(state),
                Err(error) => error,
            };
            let log = self.folder(member).join("log");
            anyhow::ensure!(
                Instant::now() < deadline,
                "host-{} does not answer: {error:#}; see {}",
                member + 1,
                log.display()
            );
            sleep(ASK_EVERY).await;
        }
    }

    async fn until_all_vote(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            let raft = self.doors.get("/v1/raft").await;
            let rows = raft.as_ref().ok().and_then(|raft| raft["members"].as_array());
            let voters = rows.map_or(0, |rows| rows.iter().filter(|row| row["role"] == "voter").count());
            if voters == self.plan.members {
                return Ok(());
            }
            anyhow::ensure!(Instant::now() < deadline, "{voters} members vote: {raft:?}");
            sleep(ASK_EVERY).await;
        }
    }

    /// Adds a host's GPUs, after those of so many others; their verification ends before this does.
    async fn add_gpus(&self, member: usize, before: usize) -> anyhow::Result<()> {
        let body = json!({
            "name": format!("host-{}", member + 1),
            "validator": doors::ready(&self.plan.data)?["validator"],
            "hourly_cost": HOURLY_COST_USD,
            "gpu_short_ref": "software",
        });
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            // The stream outlasts patience at times; asked again, the host is known.
            let added = self.doors.write("/servers/", &body).await;
            let state = self.doors.state().await?;
            let verified = state["gpus"].as_array().into_iter().flatten();
            let verified = verified.filter(|gpu| gpu["verified"] == true).count();
            if verified >= (before + 1) * SOFTWARE_GPUS {
                return Ok(());
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "the GPUs of host-{} are not verified: {added:?}",
                member + 1
            );
            sleep(ASK_EVERY).await;
        }
    }

    /// The stand-in must live through everything.
    pub(super) fn must_run(&mut self) -> anyhow::Result<()> {
        let ended = self.stand_in.try_wait()?;
        anyhow::ensure!(ended.is_none(), "the stand-in ended: {ended:?}");
        Ok(())
    }
}

impl Drop for Cluster {
    /// Chutes outlive their agent by design, so they are ended one by one.
    fn drop(&mut self) {
        for child in self.hosts.iter_mut().flatten() {
            // It may have ended.
            let _ = child.start_kill();
        }
        let ours = |process: &Process| process.is_chute_of(&self.plan.data);
        for chute in Process::all().into_iter().filter(ours) {
            if let Some(pid) = Pid::from_raw(chute.pid) {
                let _ = kill_process_group(pid, Signal::KILL);
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

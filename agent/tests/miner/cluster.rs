//! Hosts as real processes on loopback addresses of their own, the first of them the member of the
//! coordinator; its management API, asked as an operator would; and the chutes' processes.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU8, Ordering};

use coordinator::clock::{Clock, WallClock};
use coordinator::join::admission;
use coordinator_core::state_machine::desired::DISK_GB_DEFAULT;
use protocol::hotkey::Signer;
use protocol::id::ServerId;
use reqwest::{Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::timeout;
use validator_stand_in::scenario::DEVELOPMENT_MINER_SEED;

use super::signed::signed;
use super::stand_in::StandIn;
use super::{PATIENCE, until};

/// Lines of each host's log that a failed test shows.
const LOG_LINES_SHOWN: usize = 40;

/// A host: for which validator it works, with how many software GPUs, and whether it is a member. The first always is.
pub(crate) struct Plan<'a> {
    pub(crate) works_for: &'a StandIn,
    pub(crate) gpus: usize,
    pub(crate) has_seed: bool,
}

struct Host {
    folder: PathBuf,
    agent: Child,
}

/// A running miner.
pub(crate) struct Miner {
    hosts: Vec<Host>,
    /// Of the members, the first host's first.
    apis: Vec<SocketAddr>,
    key: Signer,
    http: reqwest::Client,
    folder: TempDir,
}

impl Miner {
    /// Starts the hosts, waits until each has joined, and enrols it.
    pub(crate) async fn start(validators: &[&StandIn], plans: &[Plan<'_>]) -> Self {
        Self::start_with(validators, plans, "kind = \"process\"").await
    }

    /// As [`Self::start`], with these settings of `[runtime]`.
    pub(crate) async fn start_with(validators: &[&StandIn], plans: &[Plan<'_>], runtime: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let disk = rustix::fs::statvfs(folder.path()).expect("our own folder");
        let free_gb = disk.f_bavail.saturating_mul(disk.f_frsize) >> 30;
        assert!(
            free_gb >= u64::from(DISK_GB_DEFAULT),
            "chutes are placed where {DISK_GB_DEFAULT} GB of disk are free; here, {free_gb} GB are"
        );
        let seed_file = folder.path().join("seed");
        write_private(&seed_file, DEVELOPMENT_MINER_SEED);
        let key = Signer::from_seed_hex(DEVELOPMENT_MINER_SEED).expect("a seed");
        let mut member = None;
        let (mut hosts, mut apis) = (Vec::new(), Vec::new());
        for (index, plan) in plans.iter().enumerate() {
            let name = format!("host-{}", index + 1);
            let home = folder.path().join(&name);
            std::fs::create_dir_all(home.join("host")).expect("our own folder");
            let ports = Ports::free();
            let member = member.get_or_insert(ports);
            let is_member = index == 0 || plan.has_seed;
            let mut config = configuration(&name, &home, (ports, is_member), *member, plan.gpus, runtime);
            write!(config, "[miner]\nhotkey = \"{}\"\n", key.hotkey()).expect("a text");
            if is_member {
                apis.push(ports.api);
                let seed_file = seed_file.display();
                write!(config, "seed_file = \"{seed_file}\"\nseed_on_gpu_host = true\n").expect("a text");
            }
            for validator in validators {
                let (hotkey, address) = (&validator.hotkey, validator.address);
                write!(
                    config,
                    "[[validators]]\nhotkey = \"{hotkey}\"\napi = \"http://{address}\"\n\
                     socket = \"ws://{address}\"\nregistry = \"http://{address}\"\n"
                )
                .expect("a text");
            }
            write_private(&home.join("config.toml"), &config);
            if index == 0 {
                let id = ServerId::parse(&format!("{name}.test")).expect("an id");
                let door = member.hosts.to_string();
                admission::found(&home.join("host"), "test", &id, &door, WallClock.now()).expect("a cluster");
            }
            hosts.push(home);
        }
        let mut homes = hosts.into_iter();
        let first = homes.next().expect("one host at least");
        let agent = spawn(&first);
        let mut miner = Self {
            hosts: vec![Host { folder: first, agent }],
            apis,
            key,
            http: reqwest::Client::builder().no_proxy().build().expect("a client"),
            folder,
        };
        for (home, plan) in homes.zip(&plans[1..]) {
            miner.join(home, plan.has_seed).await;
        }
        for (index, plan) in plans.iter().enumerate() {
            miner
                .add_node(&format!("host-{}", index + 1), plan.works_for)
                .await;
        }
        miner
    }

    /// Lets a host in, and starts it.
    async fn join(&mut self, home: PathBuf, eligible: bool) {
        let invited = until("a member invites", async || {
            let (status, invited) = self
                .send(
                    Method::POST,
                    "/hosts/invites",
                    Some(&json!({ "eligible": eligible })),
                )
                .await?;
            status.is_success().then_some(invited)
        })
        .await;
        let token = invited["token"].as_str().expect("an invitation has a token");
        let mut join = Command::new(env!("CARGO_BIN_EXE_chutes-agent"));
        join.args(["join", token, "--config"])
            .arg(home.join("config.toml"));
        let joined = timeout(PATIENCE, join.output())
            .await
            .expect("soon")
            .expect("it runs");
        assert!(
            joined.status.success(),
            "{}",
            String::from_utf8_lossy(&joined.stderr)
        );
        let agent = spawn(&home);
        self.hosts.push(Host { folder: home, agent });
    }

    /// A signed request; its status and its body, which is JSON or text.
    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Option<(StatusCode, Value)> {
        self.send_to(self.apis[0], method, path, body).await
    }

    /// A read that each member must answer.
    pub(crate) async fn ask_all(&self, path: &str) -> Vec<(StatusCode, Value)> {
        let mut answers = Vec::new();
        for api in &self.apis {
            let answer = self.send_to(*api, Method::GET, path, None).await;
            answers.push(answer.unwrap_or_else(|| panic!("no answer of {api} to {path}")));
        }
        answers
    }

    async fn send_to(
        &self,
        api: SocketAddr,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Option<(StatusCode, Value)> {
        let body = body.unwrap_or(&Value::Null);
        let request = signed(&self.http, &self.key, api, method, path, body);
        let answer = timeout(PATIENCE, async {
            let response = request.send().await.ok()?;
            Some((response.status(), response.text().await.ok()?))
        });
        let (status, text) = answer.await.ok()??;
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Some((status, value))
    }

    /// A change that must be answered.
    pub(crate) async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> (StatusCode, Value) {
        let answer = self.send(method, path, body).await;
        answer.unwrap_or_else(|| panic!("no answer to {path}"))
    }

    /// The whole state, once it can be had.
    pub(crate) async fn state(&self) -> Value {
        let state = until("the management API answers", async || {
            let (status, state) = self.send(Method::GET, "/v1/state", None).await?;
            status.is_success().then_some(state)
        })
        .await;
        assert_eq!(state["violations"], json!([]), "invariants hold at every look");
        state
    }

    async fn add_node(&self, name: &str, validator: &StandIn) {
        let body = json!({
            "name": name,
            "validator": validator.hotkey,
            "hourly_cost": 0.01,
            "gpu_short_ref": proof::SOFTWARE.short_ref,
        });
        let frames = until("a host joins", async || {
            let (status, frames) = self.send(Method::POST, "/servers/", Some(&body)).await?;
            // It has not joined yet.
            if [StatusCode::NOT_FOUND, StatusCode::SERVICE_UNAVAILABLE].contains(&status) {
                return None;
            }
            assert!(status.is_success(), "{name}: {status}: {frames}");
            Some(frames.to_string())
        })
        .await;
        assert!(
            frames.contains("completed server bootstrapping"),
            "{name}: {frames}"
        );
    }

    /// The deployment of this chute that serves, once there is one.
    pub(crate) async fn serving(&self, validator: &StandIn, chute: &str) -> Value {
        until(&format!("{chute} serves"), async || {
            let state = self.state().await;
            let rows = rows(&state, "deployments");
            let serves = |row: &&Value| {
                row["chute_name"] == chute
                    && row["validator"] == validator.hotkey.as_str()
                    && row["phase"] == "serving"
            };
            rows.iter().find(serves).cloned()
        })
        .await
    }

    /// Waits until nothing is left of a deployment but the memory of it, which is returned.
    pub(crate) async fn gone(&self, deployment: &Value) -> Value {
        until("a deployment is gone", async || {
            let state = self.state().await;
            let same = |row: &&Value| row["deployment_id"] == deployment["deployment_id"];
            rows(&state, "audits").iter().find(same).cloned()
        })
        .await
    }

    /// Kills the agent of the member that leads, with all its processes, and waits until another leads.
    pub(crate) async fn kill_leader(&mut self) {
        let leader = async |miner: &Self| {
            let (status, hosts) = miner.send(Method::GET, "/hosts", None).await?;
            let leads = |row: &Value| row["leads"] == true;
            let hosts = hosts.as_array().filter(|_| status.is_success())?;
            let name = hosts.iter().find(|row| leads(row))?["name"].as_str()?;
            Some(name.to_owned())
        };
        assert_eq!(self.hosts.len(), self.apis.len(), "all are members");
        let name = until("somebody leads", async || leader(self).await).await;
        let is_it = |host: &Host| host.folder.ends_with(&name);
        let place = self.hosts.iter().position(is_it).expect("it is one of ours");
        let mut host = self.hosts.remove(place);
        self.apis.remove(place);
        host.agent.kill().await.expect("it runs");
        until("another leads", async || {
            leader(self).await.filter(|other| *other != name)
        })
        .await;
    }

    /// Processes of the chutes on a host, counted from 1.
    pub(crate) fn chutes_on(&self, host: usize) -> Vec<Pid> {
        chutes_of(&self.hosts[host - 1].folder)
    }

    /// Stops agents and chutes.
    pub(crate) async fn stop(mut self) {
        for host in &self.hosts {
            let pid = host.agent.id().and_then(|id| Pid::from_raw(id.cast_signed()));
            kill_process(pid.expect("it runs"), Signal::TERM).expect("it runs");
        }
        for host in &mut self.hosts {
            let ended = timeout(PATIENCE, host.agent.wait()).await;
            let status = ended.expect("it stops when asked").expect("it is ours");
            assert!(status.success(), "{}: {status}", host.folder.display());
        }
    }
}

impl Drop for Miner {
    fn drop(&mut self) {
        for host in &mut self.hosts {
            // Its children die with it; it may have ended already.
            let _ = host.agent.start_kill();
            if std::thread::panicking() {
                let log = std::fs::read_to_string(host.folder.join("log")).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let shown = &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..];
                eprintln!("{}:\n{}", host.folder.display(), shown.join("\n"));
            }
        }
        for pid in chutes_of(self.folder.path()) {
            end(pid);
        }
    }
}

/// Kills a chute with all that it started.
pub(crate) fn end(chute: Pid) {
    // It may have ended by itself.
    let _ = kill_process_group(chute, Signal::KILL);
}

/// Rows of a table of the state.
pub(crate) fn rows<'a>(state: &'a Value, table: &str) -> &'a [Value] {
    state[table].as_array().expect("a table")
}

/// Where the doors of a host are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) hosts: SocketAddr,
    pub(crate) api: SocketAddr,
    pub(crate) proof: SocketAddr,
    pub(crate) registry: SocketAddr,
    pub(crate) egress: SocketAddr,
}

impl Ports {
    /// Free ports on an address that no other host of this or another test process has.
    pub(crate) fn free() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(2);
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let ip = Ipv4Addr::new(127, 64 | (high & 63), low, NEXT.fetch_add(1, Ordering::Relaxed));
        let doors = [(); 4].map(|()| TcpListener::bind((ip, 0)).expect("a free port"));
        let [api, proof, registry, egress] = doors
            .each_ref()
            .map(|door| door.local_addr().expect("it is bound"));
        let hosts = UdpSocket::bind((ip, 0)).expect("a free port");
        Self {
            hosts: hosts.local_addr().expect("it is bound"),
            api,
            proof,
            registry,
            egress,
        }
    }
}

fn configuration(
    name: &str,
    home: &Path,
    (own, is_member): (Ports, bool),
    member: Ports,
    gpus: usize,
    runtime: &str,
) -> String {
    format!(
        r#"
data = "{home}"
[host]
name = "{name}"
id = "{name}.test"
address = "{address}"
coordinator = "{coordinator}"
[coordinator]
enabled = {is_member}
hosts_listen = "{hosts}"
api_listen = "{api}"
tick = "1s"
observe = "2s"
[proof]
listen = "{proof}"
backend = "cpu"
software_gpus = {gpus}
[registry]
listen = "{registry}"
store_free_bytes_min = "1MiB"
[egress]
listen = "{egress}"
[runtime]
{runtime}
"#,
        home = home.display(),
        address = own.api.ip(),
        coordinator = member.hosts,
        hosts = own.hosts,
        api = own.api,
        proof = own.proof,
        registry = own.registry,
        egress = own.egress,
    )
}

fn spawn(home: &Path) -> Child {
    let log = std::fs::File::create(home.join("log")).expect("our own folder");
    Command::new(env!("CARGO_BIN_EXE_chutes-agent"))
        .args(["run", "--config"])
        .arg(home.join("config.toml"))
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .expect("the program runs")
}

/// Chute processes whose code lies in this folder: each names it in its environment.
fn chutes_of(folder: &Path) -> Vec<Pid> {
    let marker = format!("CHUTES_CODE_FILE={}/", folder.display());
    let processes = std::fs::read_dir("/proc").expect("there is /proc");
    let pids = processes.flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let environment = std::fs::read(entry.path().join("environ")).ok()?;
        let ours = environment
            .split(|byte| *byte == 0)
            .any(|variable| variable.starts_with(marker.as_bytes()));
        Pid::from_raw(pid).filter(|_| ours)
    });
    let mut pids: Vec<Pid> = pids.collect();
    pids.sort_unstable_by_key(|pid| pid.as_raw_pid());
    pids
}

fn write_private(path: &Path, text: &str) {
    let mut file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .expect("our own folder");
    std::io::Write::write_all(&mut file, text.as_bytes()).expect("our own file");
}

//! A machine: a folder with a configuration, an address of its own, and an agent that runs there or not.

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use protocol::hotkey::Signer;
use reqwest::Method;
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::signed::signed;

pub(crate) const SEED: [u8; 32] = [1; 32];
/// Far above what is needed, on machines that have much else to do.
const PATIENCE: Duration = Duration::from_secs(90);

/// Waits until `look` finds something.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let found = tokio::time::timeout(PATIENCE, found).await;
    found.unwrap_or_else(|_| panic!("not in time: {what}"))
}

fn free_udp() -> SocketAddr {
    let door = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    door.local_addr().expect("bound")
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A machine of the miner.
pub(crate) struct Machine {
    folder: TempDir,
    /// Where its member listens.
    pub(crate) door: SocketAddr,
    api: SocketAddr,
    running: Option<Child>,
}

impl Machine {
    /// One that can be a member, at a free address.
    pub(crate) fn new(number: u8, seed: [u8; 32]) -> Self {
        Self::at(number, seed, free_udp())
    }

    /// One that can be a member.
    pub(crate) fn at(number: u8, seed: [u8; 32], door: SocketAddr) -> Self {
        Self::prepared(number, &seed, door, true, "")
    }

    /// One that can be a member, with a `[backup]`.
    pub(crate) fn with_backup(number: u8, backup: &str) -> Self {
        Self::prepared(number, &SEED, free_udp(), true, backup)
    }

    /// One that can be a member, and says that it is somewhere else than where it listens.
    pub(crate) fn advertising(number: u8, address: SocketAddr) -> Self {
        let advertise = format!("[coordinator]\nadvertise = \"{address}\"");
        Self::written(number, &SEED, free_udp(), true, "", &advertise)
    }

    /// One with a software GPU, and no vote.
    pub(crate) fn host(number: u8) -> Self {
        Self::prepared(number, &SEED, free_udp(), false, "")
    }

    fn prepared(number: u8, seed: &[u8; 32], door: SocketAddr, member: bool, backup: &str) -> Self {
        Self::written(number, seed, door, member, backup, "[coordinator]")
    }

    fn written(
        number: u8,
        seed: &[u8; 32],
        door: SocketAddr,
        member: bool,
        backup: &str,
        coordinator: &str,
    ) -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        // Another test of this process may have installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let api = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let api = api.local_addr().expect("bound");
        let seed_file = folder.path().join("seed");
        std::fs::write(&seed_file, hexadecimal(seed)).expect("ours");
        std::fs::set_permissions(&seed_file, std::fs::Permissions::from_mode(0o600)).expect("ours");
        let config = format!(
            r#"
data = "{data}"
[miner]
hotkey = "{hotkey}"
{seed}
[[validators]]
hotkey = "{validator}"
api = "http://127.0.0.1:9"
socket = "ws://127.0.0.1:9"
registry = "127.0.0.1:9"
[host]
enabled = {host}
name = "host-{number}"
id = "host-{number}"
address = "127.0.0.1"
{coordinator}
enabled = {member}
hosts_listen = "{door}"
api_listen = "{api}"
{planes}[raft]
timing = "lan"
{backup}
"#,
            planes = include_str!("../processes/planes.toml"),
            data = folder.path().join("data").display(),
            hotkey = Signer::from_seed(seed).hotkey(),
            seed = if member {
                format!("seed_file = \"{}\"", seed_file.display())
            } else {
                String::new()
            },
            validator = Signer::from_seed(&[2; 32]).hotkey(),
            host = !member,
            backup = if member { backup } else { "" },
        );
        std::fs::write(folder.path().join("config.toml"), config).expect("ours");
        Self {
            folder,
            door,
            api,
            running: None,
        }
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Runs a command of the operator, who types `input`: whether it went well, and all that it said.
    pub(crate) fn command(&self, arguments: &[&str], input: &str) -> (bool, String) {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_chutes-agent"));
        command.arg(arguments[0]);
        command
            .arg("--config")
            .arg(self.folder.path().join("config.toml"));
        command.args(&arguments[1..]).env_remove("RUST_LOG");
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program runs");
        // It may end without reading.
        let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
        let output = child.wait_with_output().expect("it ends");
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    /// Runs a command of the operator, which says so.
    pub(crate) fn done(&self, arguments: &[&str], said: &str) -> String {
        let (good, text) = self.command(arguments, "");
        assert!(good && text.contains(said), "{arguments:?}: {text}");
        text
    }

    /// Runs a command of the operator, which is refused for this reason.
    pub(crate) fn refused(&self, arguments: &[&str], why: &str) {
        let (good, text) = self.command(arguments, "");
        assert!(!good && text.contains(why), "{arguments:?}: {text}");
    }

    /// Starts the agent.
    pub(crate) fn start(&mut self) {
        let log = std::fs::File::create(self.folder.path().join("log")).expect("ours");
        let agent = Command::new(env!("CARGO_BIN_EXE_chutes-agent"))
            .arg("run")
            .arg("--config")
            .arg(self.folder.path().join("config.toml"))
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn();
        self.running = Some(agent.expect("the program runs"));
    }

    /// As a power cut would end it: its children end with it, and have ended when this returns.
    pub(crate) async fn kill(&mut self) {
        let mut agent = self.running.take().expect("it runs");
        let agent_id = agent.id().expect("it runs");
        let children = std::fs::read_to_string(format!("/proc/{agent_id}/task/{agent_id}/children"));
        let children = children.expect("it runs");
        agent.kill().await.expect("it is ours");
        until("its children end", async || {
            let ended = |child: &str| {
                let stat = std::fs::read_to_string(format!("/proc/{child}/stat"));
                // Nobody may have asked yet how it ended.
                stat.map_or(true, |stat| stat.contains(") Z "))
            };
            children.split_whitespace().all(ended).then_some(())
        })
        .await;
    }

    async fn send(&self, method: Method, path: &str, body: &Value) -> Result<reqwest::Response, String> {
        let http = reqwest::Client::builder().no_proxy().build().expect("a client");
        let request = signed(&http, &Signer::from_seed(&SEED), self.api, method, path, body);
        let response = request.send().await;
        let response = response.map_err(|error| error.to_string())?;
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(response.text().await.unwrap_or_default())
        }
    }

    /// An operator's request.
    pub(crate) async fn ask(&self, method: Method, path: &str, body: &Value) -> Result<Value, String> {
        let response = self.send(method, path, body).await?;
        response.json().await.map_err(|error| error.to_string())
    }

    /// A snapshot, as the operator gets it.
    pub(crate) async fn saved(&self, body: &Value) -> Vec<u8> {
        let response = self.send(Method::POST, "/v1/snapshots", body).await;
        let response = response.expect("it is saved");
        response.bytes().await.expect("all of it").to_vec()
    }

    /// A token for one more machine.
    pub(crate) async fn invited(&self, body: Value) -> String {
        until("an invitation", async || {
            let invited = self.ask(Method::POST, "/hosts/invites", &body).await.ok()?;
            invited["token"].as_str().map(str::to_owned)
        })
        .await
    }

    /// How many vote, as this member knows; none while it cannot say.
    pub(crate) async fn voters(&self) -> usize {
        let raft = self.ask(Method::GET, "/v1/raft", &Value::Null).await;
        let raft = raft.unwrap_or_default();
        let members = raft["members"].as_array().cloned().unwrap_or_default();
        members.iter().filter(|member| member["role"] == "voter").count()
    }
}

/// Three members that vote, each on a machine of its own.
pub(crate) async fn three() -> [Machine; 3] {
    let [mut first, mut second, mut third] = [1, 2, 3].map(|number| Machine::new(number, SEED));
    first.done(&["init"], "founded");
    first.start();
    for member in [&mut second, &mut third] {
        let token = first.invited(serde_json::json!({ "eligible": true })).await;
        member.done(&["join", &token], "joined the cluster");
        member.start();
    }
    until("three vote", async || (first.voters().await == 3).then_some(())).await;
    [first, second, third]
}

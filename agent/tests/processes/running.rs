//! A running agent whose log a test reads, on a folder of its own with free ports.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use tokio::time::timeout;

pub(crate) const HOTKEY: &str = "5CcyqxXnJucaCnQQvvUg5EPzj1uoNAxACZvzArHw5aVDvgNH";
pub(crate) const SEED: &str = "0101010101010101010101010101010101010101010101010101010101010101";
const VALIDATOR: &str = "5Dt7HZ7Zpw4DppPxFM7Ke3Cm7sDAWhsZXmM5ZAmE7dSVJbcQ";
/// Far above what is needed, on machines that have much else to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// A data folder with a configuration whose ports are all free ones, and a cluster of one.
pub(crate) fn prepare(folder: &Path, validator: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    let seed = folder.join("seed");
    std::fs::write(&seed, SEED).expect("our own folder");
    std::fs::set_permissions(&seed, std::fs::Permissions::from_mode(0o600)).expect("our own file");
    let config = format!(
        r#"
data = "{data}"
[miner]
hotkey = "{HOTKEY}"
seed_file = "{seed}"
seed_on_gpu_host = true
signer_user = "65534:65534"
[[validators]]
hotkey = "{VALIDATOR}"
api = "http://{validator}"
socket = "ws://{validator}"
registry = "{validator}"
[host]
name = "host-1"
id = "host-1"
address = "127.0.0.1"
coordinator = "127.0.0.1:9"
[coordinator]
enabled = true
hosts_listen = "127.0.0.1:0"
api_listen = "127.0.0.1:0"
observe = "1s"
{planes}[log]
format = "json"
"#,
        planes = include_str!("planes.toml"),
        data = folder.join("data").display(),
        seed = seed.display(),
    );
    let file = folder.join("config.toml");
    std::fs::write(&file, config).expect("our own folder");
    let mut init = std::process::Command::new(env!("CARGO_BIN_EXE_chutes-agent"));
    let init = init
        .args(["init", "--config"])
        .arg(&file)
        .output()
        .expect("the program runs");
    assert!(init.status.success(), "{}", String::from_utf8_lossy(&init.stderr));
}

/// A running agent, and the lines that it and its children log.
pub(crate) struct Agent {
    pub(crate) process: Child,
    lines: Lines<BufReader<ChildStderr>>,
    seen: Vec<String>,
}

impl Agent {
    pub(crate) fn start(folder: &Path) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_chutes-agent"))
            .arg("run")
            .arg("--config")
            .arg(folder.join("config.toml"))
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the program runs");
        let lines = BufReader::new(process.stderr.take().expect("piped")).lines();
        Self {
            process,
            lines,
            seen: Vec::new(),
        }
    }

    pub(crate) async fn next(&mut self) -> Option<String> {
        let line = timeout(PATIENCE, self.lines.next_line()).await;
        let line = line.unwrap_or_else(|_| panic!("nothing more is logged: {:#?}", self.seen));
        let line = line.expect("the pipe can be read");
        self.seen.extend(line.clone());
        line
    }

    /// The next line of a process with this message, as an object.
    pub(crate) async fn line(&mut self, process: &str, message: &str) -> Value {
        let found = async {
            while let Some(line) = self.next().await {
                let value: Value = serde_json::from_str(&line).unwrap_or_default();
                if value["process"] == process && value["message"] == message {
                    return Some(value);
                }
            }
            None
        };
        let found = timeout(PATIENCE, found).await.ok().flatten();
        found.unwrap_or_else(|| panic!("{process}: {message} was not logged in time: {:#?}", self.seen))
    }

    /// Process id of a child that is started from now on.
    pub(crate) async fn started(&mut self, child: &str) -> i32 {
        loop {
            let line = self.line("agent", "started").await;
            if line["child"] == child {
                return i32::try_from(line["pid"].as_i64().expect("a number")).expect("a process id");
            }
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send(self.process.id().expect("it runs").cast_signed(), signal);
    }

    /// Waits until nobody holds the pipe any more: the agent and all its children are gone.
    pub(crate) async fn all_gone(mut self) -> (ExitStatus, Vec<String>) {
        while self.next().await.is_some() {}
        let status = timeout(PATIENCE, self.process.wait()).await;
        (status.expect("it ends").expect("it is ours"), self.seen)
    }
}

pub(crate) fn send(pid: i32, signal: Signal) {
    let pid = Pid::from_raw(pid).expect("a process id");
    kill_process(pid, signal).expect("it runs");
}

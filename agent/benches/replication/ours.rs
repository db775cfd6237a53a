//! Three members of ours that are no hosts, as separate agents with the shipped defaults but for `raft.timing`, and a
//! validator stand-in that publishes a few chutes. Writes are bans of these chutes, each with a new reason, at the
//! leader's management API.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use coordinator::clock::{Clock as _, WallClock};
use protocol::hotkey::Signer;
use protocol::signing::{BoundRequest, SEQUENCE_HEADER};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::load::{Requests, value};
use super::usage::{family, terminate};

/// Chutes that are banned again and again.
pub(crate) const CHUTES: usize = 16;
const START_MAX: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Worthless: it stands in the source.
const SEED: &str = "0303030303030303030303030303030303030303030303030303030303030303";

pub(crate) fn chute_name(number: usize) -> String {
    format!("a-chute-that-is-banned-{number}")
}

pub(crate) struct Ours {
    stand_in: Child,
    members: Vec<Child>,
    operator: Operator,
}

fn api(member: usize) -> SocketAddr {
    SocketAddr::from(([127, 0, 3, u8::try_from(member).unwrap_or(u8::MAX)], 32000))
}

impl Ours {
    pub(crate) async fn start(agent: &Path, folder: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let operator = Operator {
            key: Signer::from_seed_hex(SEED)?,
            http: reqwest::Client::builder()
                .no_proxy()
                .pool_max_idle_per_host(0)
                .build()?,
        };
        let (stand_in, validator) = stand_in(agent, folder, &operator.key).await?;
        let mut ours = Self {
            stand_in,
            members: Vec::new(),
            operator,
        };
        for member in 1..=3 {
            let config = ours.configure(member, folder, &validator)?;
            if member == 1 {
                done(Command::new(agent).arg("init").arg("--config").arg(&config)).await?;
            } else {
                let invited = ours
                    .operator
                    .ask("POST", 1, "/hosts/invites", json!({ "eligible": true }))
                    .await?;
                let token = invited["token"]
                    .as_str()
                    .context("an invitation without a token")?;
                done(Command::new(agent).args(["join", token, "--config"]).arg(&config)).await?;
            }
            let log = std::fs::File::create(folder.join(format!("{member}.log")))?;
            let mut command = Command::new(agent);
            command
                .args(["run", "--config"])
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(Stdio::null());
            ours.members.push(command.stderr(log).kill_on_drop(true).spawn()?);
            ours.until(&format!("{member} members"), async |operator| {
                let raft = operator.ask("GET", 1, "/v1/raft", Value::Null).await?;
                // Of two, the second only follows: the loss of either would stop both.
                let counts = |row: &&Value| member < 3 || row["role"] == "voter";
                Ok(members_of(&raft).filter(counts).count() == member)
            })
            .await?;
        }
        ours.until("the chutes are known", async |operator| {
            for number in 0..CHUTES {
                let ban = json!({ "chute_id": chute_name(number), "reason": "to see whether it is known" });
                operator.ask("POST", 1, "/v1/bans", ban).await?;
            }
            Ok(true)
        })
        .await?;
        Ok(ours)
    }

    fn configure(&self, member: usize, folder: &Path, validator: &Value) -> anyhow::Result<PathBuf> {
        let seed_file = folder.join("seed");
        write_private(&seed_file, SEED)?;
        let address = api(member).ip();
        let text = |key: &str| validator[key].as_str().unwrap_or_default().to_owned();
        let config = json!({
            "data": folder.join(member.to_string()),
            "validators": [{
                "hotkey": text("validator"),
                "api": text("api_url"),
                "socket": text("socket_url"),
                "registry": text("registry_url"),
            }],
            "miner": { "hotkey": self.operator.key.hotkey(), "seed_file": seed_file },
            "host": { "enabled": false, "name": format!("member-{member}"), "id": format!("member-{member}.bench") },
            "coordinator": {
                "enabled": true,
                "hosts_listen": format!("{address}:4433"),
                "api_listen": api(member),
            },
            "raft": { "timing": "lan" },
        });
        let path = folder.join(format!("{member}.toml"));
        write_private(&path, &toml::to_string(&config)?)?;
        Ok(path)
    }

    async fn until(
        &self,
        what: &str,
        mut look: impl AsyncFnMut(&Operator) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_MAX;
        loop {
            let seen = look(&self.operator).await;
            if matches!(seen, Ok(true)) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                anyhow::bail!("waited too long: {what}: {seen:?}");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Supervisor, signer and coordinator of each member.
    pub(crate) fn members(&self) -> Vec<Vec<u32>> {
        self.members
            .iter()
            .map(|child| child.id().map(family).unwrap_or_default())
            .collect()
    }

    pub(crate) async fn requests(&self) -> anyhow::Result<Box<dyn Requests>> {
        let raft = self.operator.ask("GET", 1, "/v1/raft", Value::Null).await?;
        let leader = members_of(&raft)
            .find(|row| row["leads"] == true)
            .context("nobody leads")?;
        let name = leader["host"].as_str().context("a leader without a host")?;
        let member = name.trim_start_matches("member-").parse()?;
        Ok(Box::new(Bans {
            address: api(member),
            key: Signer::from_seed_hex(SEED)?,
        }))
    }

    pub(crate) async fn stop(mut self) {
        for member in &mut self.members {
            terminate(member).await;
        }
        terminate(&mut self.stand_in).await;
    }
}

fn members_of(raft: &Value) -> impl Iterator<Item = &Value> {
    raft["members"].as_array().into_iter().flatten()
}

/// Starts the stand-in with the chutes; what it says of itself.
async fn stand_in(agent: &Path, folder: &Path, miner: &Signer) -> anyhow::Result<(Child, Value)> {
    let program: Vec<Value> = (0..CHUTES)
        .map(|number| json!({ "at_ms": 0, "action": "publish_chute", "name": chute_name(number) }))
        .collect();
    let scenario = json!({ "name": "replication", "hotkeys": [miner.hotkey()], "program": program });
    let file = folder.join("scenario.toml");
    std::fs::write(&file, toml::to_string(&scenario)?)?;
    let ready = folder.join("ready.json");
    let log = std::fs::File::create(folder.join("stand-in.log"))?;
    let mut command = Command::new(agent);
    command
        .args(["validator-stand-in", "--data"])
        .arg(folder.join("stand-in"));
    command
        .arg("--scenario")
        .arg(&file)
        .arg("--ready-file")
        .arg(&ready);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true);
    let child = command.spawn().context("start the validator stand-in")?;
    let deadline = Instant::now() + START_MAX;
    while !ready.exists() {
        anyhow::ensure!(Instant::now() < deadline, "the validator stand-in does not serve");
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok((child, serde_json::from_str(&std::fs::read_to_string(&ready)?)?))
}

async fn done(command: &mut Command) -> anyhow::Result<()> {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{command:?}: {said}");
    Ok(())
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::File::options();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

/// Whoever prepares the cluster.
struct Operator {
    key: Signer,
    http: reqwest::Client,
}

impl Operator {
    async fn ask(&self, method: &str, member: usize, path: &str, body: Value) -> anyhow::Result<Value> {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let mut request = self
            .http
            .request(method.parse()?, format!("http://{}{path}", api(member)));
        for (name, value) in signed(&self.key, method, path, body.as_bytes()) {
            request = request.header(name, value);
        }
        let answer = request.timeout(Duration::from_secs(10)).body(body).send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        anyhow::ensure!(status.is_success(), "{method} {path}: {status} {text}");
        Ok(serde_json::from_str(&text)?)
    }
}

fn signed(key: &Signer, method: &str, path: &str, body: &[u8]) -> protocol::signing::Headers {
    let bound = BoundRequest {
        method,
        path_and_query: path,
        body,
    };
    bound.sign(key, WallClock.now(), fastrand::u128(..))
}

struct Bans {
    address: SocketAddr,
    key: Signer,
}

impl Bans {
    fn request(&self, path: &str, headers: &protocol::signing::Headers, body: &str) -> Vec<u8> {
        let mut text = format!("POST {path} HTTP/1.1\r\nHost: miner\r\nContent-Type: application/json\r\n");
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
        text.into_bytes()
    }
}

impl Requests for Bans {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn open(&self, signed_each: bool) -> Option<Vec<u8>> {
        let path = "/v1/connection";
        let open = || self.request(path, &signed(&self.key, "POST", path, b""), "");
        (!signed_each).then(open)
    }

    fn write(&self, client: usize, number: u64, signed_each: bool) -> Vec<u8> {
        let path = "/v1/bans";
        let chute = chute_name(client % CHUTES);
        let reason = value(client, number, chute.len());
        let body = format!(r#"{{"chute_id":"{chute}","reason":"{reason}"}}"#);
        let headers = if signed_each {
            signed(&self.key, "POST", path, body.as_bytes())
        } else {
            vec![(SEQUENCE_HEADER, number.to_string())]
        };
        self.request(path, &headers, &body)
    }
}

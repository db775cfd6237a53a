//! Three members of etcd, as Debian ships it, with its own defaults. Writes go to the leader's JSON gateway.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::load::{Requests, value};
use super::usage::terminate;

const START_MAX: Duration = Duration::from_secs(30);
/// Keys that are written again and again, as many as our side has chutes.
const KEYS: usize = super::ours::CHUTES;

pub(crate) struct Etcd {
    members: Vec<Child>,
    http: reqwest::Client,
}

fn url(member: usize, port: u16) -> String {
    format!("http://127.0.4.{member}:{port}")
}

impl Etcd {
    pub(crate) async fn start(folder: &Path) -> anyhow::Result<Self> {
        let named = |member: usize| format!("m{member}={}", url(member, 2380));
        let all = (1..=3).map(named).collect::<Vec<_>>().join(",");
        let mut members = Vec::new();
        for member in 1..=3 {
            let folder = folder.join(member.to_string());
            std::fs::create_dir_all(&folder)?;
            let log = std::fs::File::create(folder.join("log"))?;
            let (clients, peers) = (url(member, 2379), url(member, 2380));
            let mut command = Command::new("etcd");
            command
                .args(["--name", &format!("m{member}"), "--data-dir"])
                .arg(folder.join("data"));
            command.args([
                "--listen-client-urls",
                &clients,
                "--advertise-client-urls",
                &clients,
            ]);
            command.args([
                "--listen-peer-urls",
                &peers,
                "--initial-advertise-peer-urls",
                &peers,
            ]);
            command.args(["--initial-cluster", &all, "--initial-cluster-state", "new"]);
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log)
                .kill_on_drop(true);
            members.push(command.spawn().context("start etcd (.ci/peers installs it)")?);
        }
        let etcd = Self {
            members,
            http: reqwest::Client::builder().no_proxy().build()?,
        };
        let deadline = Instant::now() + START_MAX;
        while etcd.leader().await.is_err() {
            anyhow::ensure!(Instant::now() < deadline, "etcd has no leader");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(etcd)
    }

    /// Each is one process.
    pub(crate) fn members(&self) -> Vec<Vec<u32>> {
        self.members
            .iter()
            .map(|child| child.id().into_iter().collect())
            .collect()
    }

    async fn leader(&self) -> anyhow::Result<usize> {
        for member in 1..=3 {
            let url = format!("{}/v3/maintenance/status", url(member, 2379));
            let status: Value = self.http.post(url).body("{}").send().await?.json().await?;
            let leader = status["leader"].as_str().filter(|leader| *leader != "0");
            if leader.is_some() && status["header"]["member_id"].as_str() == leader {
                return Ok(member);
            }
        }
        anyhow::bail!("nobody leads")
    }

    pub(crate) async fn requests(&self) -> anyhow::Result<Box<dyn Requests>> {
        let address = url(self.leader().await?, 2379);
        let address = address.trim_start_matches("http://").parse()?;
        Ok(Box::new(Puts { address }))
    }

    pub(crate) async fn stop(mut self) {
        for member in &mut self.members {
            terminate(member).await;
        }
    }
}

struct Puts {
    address: SocketAddr,
}

impl Requests for Puts {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn open(&self, _: bool) -> Option<Vec<u8>> {
        None
    }

    fn write(&self, client: usize, number: u64, _: bool) -> Vec<u8> {
        let key = super::ours::chute_name(client % KEYS);
        let value = BASE64_STANDARD.encode(value(client, number, key.len()));
        let body = format!(r#"{{"key":"{}","value":"{value}"}}"#, BASE64_STANDARD.encode(key));
        format!(
            "POST /v3/kv/put HTTP/1.1\r\nHost: etcd\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    }
}

//! The doors that are knocked at: the members' management APIs, and the stand-in's control interface.
//!
//! A write is signed once. Whoever gets no answer sends the same signature again, to this member or another: a
//! signature is good for one command, so one that was used before says that the write was done.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use coordinator::clock::{Clock, WallClock};
use protocol::hotkey::Signer;
use protocol::signing::BoundRequest;
use reqwest::{Method, StatusCode};
use serde_json::Value;
use validator_stand_in::ledger::Entry;
use validator_stand_in::scenario::DEVELOPMENT_MINER_SEED;

/// A process that was killed answers nothing: there is no use in long patience.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// What a member says of a write that was done.
const DONE_BEFORE: &str = "this signature was used before";

#[derive(Debug, Clone)]
pub(crate) struct Doors {
    stand_in: String,
    members: Vec<SocketAddr>,
    /// The member that answered last.
    last: Arc<AtomicUsize>,
    patience: Duration,
    key: Arc<Signer>,
    http: reqwest::Client,
}

/// A signed request, which may be sent more than once.
#[derive(Debug, Clone)]
pub(crate) struct Signed {
    method: Method,
    path: String,
    body: Vec<u8>,
    headers: Vec<(&'static str, String)>,
}

impl Doors {
    /// Doors to these members and to the stand-in of this data folder.
    pub(crate) fn of(data: &Path, members: Vec<SocketAddr>) -> anyhow::Result<Self> {
        let ready = ready(data)?;
        let stand_in = ready["api_url"].as_str().context("the stand-in's address")?;
        let http = reqwest::Client::builder()
            .no_proxy()
            // A connection that outlived its process would fail the next request for nothing.
            .pool_max_idle_per_host(0)
            .build()?;
        Ok(Self {
            stand_in: stand_in.to_owned(),
            members,
            last: Arc::default(),
            patience: ANSWER_TIMEOUT,
            key: Arc::new(Signer::from_seed_hex(DEVELOPMENT_MINER_SEED)?),
            http,
        })
    }

    /// The same, knocking at another member first.
    pub(crate) fn beginning_with(&self, member: usize) -> Self {
        Self {
            last: Arc::new(AtomicUsize::new(member)),
            ..self.clone()
        }
    }

    /// The door of one member only, asked with this patience.
    pub(crate) fn only(&self, member: usize, patience: Duration) -> Self {
        Self {
            members: vec![self.members[member]],
            last: Arc::default(),
            patience,
            ..self.clone()
        }
    }

    /// The doors of all members but one.
    pub(crate) fn without(&self, member: usize) -> Self {
        let mut members = self.members.clone();
        members.remove(member);
        Self {
            members,
            last: Arc::default(),
            ..self.clone()
        }
    }

    fn addresses(&self) -> impl Iterator<Item = (usize, SocketAddr)> {
        let (first, count) = (self.last.load(Ordering::Relaxed), self.members.len());
        (first..first + count).map(move |number| (number, self.members[number % count]))
    }

    /// Whether any member answers.
    pub(crate) async fn answers(&self) -> bool {
        for (_, address) in self.addresses() {
            let ping = self.http.get(format!("http://{address}/ping"));
            let ping = ping.timeout(self.patience).send().await;
            if ping.is_ok_and(|response| response.status().is_success()) {
                return true;
            }
        }
        false
    }

    pub(crate) fn sign(&self, method: Method, path: &str, body: Vec<u8>) -> Signed {
        let bound = BoundRequest {
            method: method.as_str(),
            path_and_query: path,
            body: &body,
        };
        let headers = bound.sign(&self.key, WallClock.now(), fastrand::u128(..));
        Signed {
            method,
            path: path.to_owned(),
            body,
            headers,
        }
    }

    async fn send_to(&self, address: SocketAddr, signed: &Signed) -> anyhow::Result<(StatusCode, String)> {
        let url = format!("http://{address}{}", signed.path);
        let mut request = self
            .http
            .request(signed.method.clone(), url)
            .timeout(self.patience)
            .header("Content-Type", "application/json");
        for (name, value) in &signed.headers {
            request = request.header(*name, value);
        }
        let response = request.body(signed.body.clone()).send().await?;
        Ok((response.status(), response.text().await?))
    }

    /// Sends it to one member after the other until one answers for good.
    pub(crate) async fn send(&self, signed: &Signed) -> anyhow::Result<Value> {
        let mut failed = Err(anyhow::anyhow!("no member is known"));
        for (number, address) in self.addresses() {
            match self.send_to(address, signed).await {
                Ok((status, text)) if status.is_success() => {
                    self.last.store(number % self.members.len(), Ordering::Relaxed);
                    // A stream of events is no JSON; whoever asks for one wants its end.
                    return Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)));
                }
                Ok((StatusCode::UNAUTHORIZED, text)) if text.contains(DONE_BEFORE) => return Ok(Value::Null),
                Ok((status, text)) => {
                    failed = Err(anyhow::anyhow!("{address}{}: {status} {text}", signed.path));
                    if status.is_client_error() {
                        return failed;
                    }
                }
                Err(error) => failed = Err(error.context(format!("{address}{}", signed.path))),
            }
        }
        failed
    }

    /// A signed read.
    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.send(&self.sign(Method::GET, path, Vec::new())).await
    }

    /// The miner's state.
    pub(crate) async fn state(&self) -> anyhow::Result<Value> {
        self.get("/v1/state").await
    }

    /// A write; its answer is an acknowledgement.
    pub(crate) async fn write(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let body = serde_json::to_vec(body)?;
        self.send(&self.sign(Method::POST, path, body)).await
    }

    /// The member that leads, by its name, with its term; nothing while nobody does.
    pub(crate) async fn leader(&self) -> anyhow::Result<Option<(String, u64)>> {
        let raft = self.get("/v1/raft").await?;
        let mut members = raft["members"].as_array().into_iter().flatten();
        let leader = members.find(|member| member["leads"] == true);
        let name = leader.and_then(|member| member["host"].as_str());
        Ok(name.map(str::to_owned).zip(raft["term"].as_u64()))
    }

    /// What the validator has.
    pub(crate) async fn validator(&self) -> anyhow::Result<Value> {
        self.ask_stand_in("/_stand_in/state").await
    }

    /// Ledger entries after this number.
    pub(crate) async fn ledger(&self, after: u64) -> anyhow::Result<Vec<Entry>> {
        self.ask_stand_in(&format!("/_stand_in/ledger?after={after}"))
            .await
    }

    async fn ask_stand_in<T: serde::de::DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let asked = self.http.get(format!("{}{path}", self.stand_in));
        let response = asked.timeout(self.patience).send().await?.error_for_status()?;
        Ok(response.json().await?)
    }

    /// Something that users or owners do, and what the stand-in says of it.
    pub(crate) async fn act(&self, action: &Value) -> anyhow::Result<Value> {
        let url = format!("{}/_stand_in/action", self.stand_in);
        let asked = self.http.post(url).timeout(self.patience).json(action);
        let response = asked.send().await?;
        let (status, text) = (response.status(), response.text().await?);
        anyhow::ensure!(status.is_success(), "{action}: {status} {text}");
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }
}

/// What the stand-in of a data folder says of itself.
pub(crate) fn ready(data: &Path) -> anyhow::Result<Value> {
    let file = data.join("validator-stand-in/ready.json");
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    serde_json::from_str(&text).with_context(|| file.display().to_string())
}

/// Where the stand-in listens, by what it says of itself.
pub(crate) fn stand_in_address(ready: &Value) -> anyhow::Result<SocketAddr> {
    let url = ready["api_url"].as_str();
    let address = url.and_then(|url| url.strip_prefix("http://"));
    Ok(address.context("the stand-in's address")?.parse()?)
}

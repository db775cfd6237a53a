//! The management API of the development cluster, asked as an operator would.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use coordinator::clock::{Clock, WallClock};
use futures_util::StreamExt;
use protocol::hotkey::{Hotkey, Signer};
use protocol::signing::BoundRequest;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time::sleep;
use validator_stand_in::scenario::DEVELOPMENT_MINER_SEED;

use super::account::Account;
use super::hosts::Hosts;

/// Between two tries while something starts.
const RETRY_EVERY: Duration = Duration::from_millis(200);
/// How often an invitation is asked for before that is given up: for a minute, on a machine that has much else to do.
const INVITE_TRIES: u32 = 300;
/// What the operator says that a software GPU costs, in dollars per hour.
const HOURLY_COST_USD: f64 = 0.01;

/// The operator's side.
#[derive(Debug)]
pub(super) struct Miner {
    /// Every member answers; asked in turn until one does.
    members: Vec<SocketAddr>,
    /// The one that answered last.
    last: AtomicUsize,
    key: Signer,
    validator: Hotkey,
    http: reqwest::Client,
}

impl Miner {
    pub(super) fn new(members: Vec<SocketAddr>, validator: Hotkey) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(2))
            .build()?;
        let key = Signer::from_seed_hex(DEVELOPMENT_MINER_SEED)?;
        Ok(Self {
            members,
            last: AtomicUsize::new(0),
            key,
            validator,
            http,
        })
    }

    fn base(&self) -> String {
        let last = self.last.load(Ordering::Relaxed) % self.members.len();
        format!("http://{}", self.members[last])
    }

    /// A request with its time limit, at one member after the other until one answers.
    async fn ask(&self, method: &Method, path: &str, body: Option<&[u8]>) -> anyhow::Result<Value> {
        let mut asked = Err(anyhow::anyhow!("no member is known"));
        for _ in &self.members {
            let request = self.request(method.clone(), path, body);
            let answer = request.timeout(Duration::from_secs(10)).send().await;
            match answer.and_then(reqwest::Response::error_for_status) {
                Ok(response) => return Ok(response.json().await?),
                Err(error) if error.status().is_some_and(|status| status.is_client_error()) => {
                    return Err(error.into());
                }
                Err(error) => asked = Err(error.into()),
            }
            self.last.fetch_add(1, Ordering::Relaxed);
        }
        asked
    }

    /// The host that leads, as far as any member knows.
    pub(super) async fn leader(&self) -> anyhow::Result<Option<String>> {
        let raft = self.get("/v1/raft").await?;
        let members = raft["members"].as_array().map_or(&[][..], Vec::as_slice);
        let leader = members.iter().find(|member| member["leads"] == true);
        Ok(leader
            .and_then(|member| member["host"].as_str())
            .map(str::to_owned))
    }

    fn request(&self, method: Method, path: &str, body: Option<&[u8]>) -> reqwest::RequestBuilder {
        let bound = BoundRequest {
            method: method.as_str(),
            path_and_query: path,
            body: body.unwrap_or_default(),
        };
        let headers = bound.sign(&self.key, WallClock.now(), fastrand::u128(..));
        let mut request = self.http.request(method, format!("{}{path}", self.base()));
        for (name, value) in headers {
            request = request.header(name, value);
        }
        match body {
            Some(body) => request
                .header("Content-Type", "application/json")
                .body(body.to_vec()),
            None => request,
        }
    }

    /// A signed read.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.ask(&Method::GET, path, None).await
    }

    /// A signed write; its answer is an acknowledgement. Whoever asks for one is fine with it being done twice.
    pub(super) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let body = serde_json::to_vec(body)?;
        self.ask(&Method::POST, path, Some(&body)).await
    }

    /// An invitation for a host that is to be a member. The first member may have just begun to lead, and not have
    /// founded its cluster yet.
    pub(super) async fn invite(&self) -> anyhow::Result<Value> {
        let mut tries = 0;
        loop {
            match self.post("/hosts/invites", &json!({ "eligible": true })).await {
                Err(error) if tries < INVITE_TRIES && may_pass(&error) => {
                    tries += 1;
                    sleep(RETRY_EVERY).await;
                }
                invited => return invited.context("ask for an invitation"),
            }
        }
    }

    /// Waits until the API answers; an agent that ends meanwhile is an error that names its log.
    pub(super) async fn until_it_serves(&self, hosts: &Hosts) -> anyhow::Result<()> {
        loop {
            let ping = self
                .http
                .get(format!("{}/ping", self.base()))
                .timeout(Duration::from_secs(2))
                .send()
                .await;
            if ping.is_ok_and(|response| response.status().is_success()) {
                return Ok(());
            }
            anyhow::ensure!(
                hosts.all_run(),
                "an agent ended while it started; see {}",
                hosts.log_file().display()
            );
            sleep(RETRY_EVERY).await;
        }
    }

    /// Adds a host once it has joined, and follows its verification to the end.
    pub(super) async fn add_node(&self, name: &str, account: &mut Account) -> anyhow::Result<()> {
        let body = json!({
            "name": name,
            "validator": self.validator,
            "hourly_cost": HOURLY_COST_USD,
            "gpu_short_ref": proof::SOFTWARE.short_ref,
        });
        let body = serde_json::to_vec(&body)?;
        let response = loop {
            let response = self
                .request(Method::POST, "/servers/", Some(&body))
                .send()
                .await?;
            match response.status() {
                // It has not joined yet.
                StatusCode::NOT_FOUND | StatusCode::SERVICE_UNAVAILABLE => sleep(RETRY_EVERY).await,
                StatusCode::CONFLICT => return Ok(()),
                _ => break response.error_for_status().context("add the host")?,
            }
        };
        let mut frames = response.bytes_stream();
        let (mut text, mut last) = (String::new(), String::new());
        while let Some(bytes) = frames.next().await {
            // An enrolment that failed ends in the middle, after a frame that says why.
            let bytes = bytes.with_context(|| format!("{name} was not verified: {last}"))?;
            text.push_str(&String::from_utf8_lossy(&bytes));
            while let Some((line, rest)) = text.split_once('\n') {
                if let Some(frame) = line.strip_prefix("data: ") {
                    let frame: Value = serde_json::from_str(frame).context("a frame of add-node")?;
                    last = frame["message"].as_str().unwrap_or_default().to_owned();
                    account.note(name, &last);
                }
                text = rest.to_owned();
            }
        }
        anyhow::ensure!(
            last.contains("completed server bootstrapping"),
            "{name} was not verified: {last}"
        );
        Ok(())
    }
}

/// A member that is not there or cannot say yet may be soon; one that says no will not change its mind.
fn may_pass(error: &anyhow::Error) -> bool {
    let asked = error.downcast_ref::<reqwest::Error>();
    asked.is_some_and(|error| !error.status().is_some_and(|status| status.is_client_error()))
}

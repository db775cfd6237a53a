//! The doors that the storm knocks at: the miner's management API, and the stand-in's control interface.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use coordinator::clock::{Clock, WallClock};
use protocol::hotkey::Signer;
use protocol::signing::BoundRequest;
use serde_json::Value;
use validator_stand_in::ledger::Entry;
use validator_stand_in::scenario::DEVELOPMENT_MINER_SEED;

/// Where the first host of a development cluster has its management API.
pub(super) const MANAGEMENT: &str = "127.0.1.1:32000";
/// A process that was killed answers nothing: there is no use in long patience.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
pub(super) struct Doors {
    stand_in: String,
    key: Arc<Signer>,
    http: reqwest::Client,
}

impl Doors {
    /// Reads where the stand-in of this data folder is.
    pub(super) fn of(data: &Path) -> anyhow::Result<Self> {
        let file = data.join("validator-stand-in/ready.json");
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let ready: Value = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
        let stand_in = ready["api_url"].as_str().context("the stand-in's address")?;
        let http = reqwest::Client::builder()
            .no_proxy()
            // A connection that outlived its process would fail the next request for nothing.
            .pool_max_idle_per_host(0)
            .timeout(ANSWER_TIMEOUT)
            .build()?;
        Ok(Self {
            stand_in: stand_in.to_owned(),
            key: Arc::new(Signer::from_seed_hex(DEVELOPMENT_MINER_SEED)?),
            http,
        })
    }

    pub(super) async fn answers(&self) -> bool {
        let ping = self.http.get(format!("http://{MANAGEMENT}/ping")).send().await;
        ping.is_ok_and(|response| response.status().is_success())
    }

    async fn managed(&self, method: reqwest::Method, path: &str, body: Vec<u8>) -> anyhow::Result<Value> {
        let bound = BoundRequest {
            method: method.as_str(),
            path_and_query: path,
            body: &body,
        };
        let headers = bound.sign(&self.key, WallClock.now(), fastrand::u128(..));
        let url = format!("http://{MANAGEMENT}{path}");
        let mut request = self
            .http
            .request(method, url)
            .header("Content-Type", "application/json");
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let response = request.body(body).send().await?;
        let status = response.status();
        let text = response.text().await?;
        anyhow::ensure!(status.is_success(), "{path}: {status} {text}");
        Ok(serde_json::from_str(&text)?)
    }

    /// The miner's state.
    pub(super) async fn state(&self) -> anyhow::Result<Value> {
        self.managed(reqwest::Method::GET, "/v1/state", Vec::new()).await
    }

    /// A write; its answer is an acknowledgement.
    pub(super) async fn write(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let body = serde_json::to_vec(body)?;
        self.managed(reqwest::Method::POST, path, body).await
    }

    /// What the validator has.
    pub(super) async fn validator(&self) -> anyhow::Result<Value> {
        let url = format!("{}/_stand_in/state", self.stand_in);
        Ok(self
            .http
            .get(url)
            .send()
            .await?
            .error_for_status()?
            .json()
            .await?)
    }

    /// Ledger entries after this number.
    pub(super) async fn ledger(&self, after: u64) -> anyhow::Result<Vec<Entry>> {
        let url = format!("{}/_stand_in/ledger?after={after}", self.stand_in);
        Ok(self
            .http
            .get(url)
            .send()
            .await?
            .error_for_status()?
            .json()
            .await?)
    }

    /// Something that users or owners do.
    pub(super) async fn act(&self, action: &Value) -> anyhow::Result<()> {
        let url = format!("{}/_stand_in/action", self.stand_in);
        let response = self.http.post(url).json(action).send().await?;
        let status = response.status();
        anyhow::ensure!(
            status.is_success(),
            "{action}: {status} {}",
            response.text().await?
        );
        Ok(())
    }
}

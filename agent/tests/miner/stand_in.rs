//! A validator stand-in in this process, on a port that it keeps when it is stopped and started again.

use std::net::SocketAddr;
use std::path::PathBuf;

use protocol::hotkey::Hotkey;
use protocol::workload::Secret;
use serde_json::Value;
use tempfile::TempDir;
use validator_stand_in::ledger::{Entry, Record};
use validator_stand_in::scenario::{Action, ChuteSpec, Egress, Goals, Scenario, Step};
use validator_stand_in::server::{Config, Server};

/// A small scenario: these chutes from the start, and nothing else by itself.
pub(crate) fn scenario(name: &str, seed_byte: u8, chutes: Vec<ChuteSpec>) -> Scenario {
    let publish = |chute| Step {
        at_ms: 0,
        when_active: None,
        action: Action::PublishChute(Box::new(chute)),
    };
    Scenario {
        name: name.to_owned(),
        validator_seed: Secret::new(hex::encode([seed_byte; 32])),
        egress: Egress::default(),
        program: chutes.into_iter().map(publish).collect(),
        goals: Goals::default(),
        ..Scenario::development()
    }
}

/// A chute of which one instance is wanted.
pub(crate) fn chute(name: &str) -> ChuteSpec {
    ChuteSpec {
        name: name.to_owned(),
        ..ChuteSpec::default()
    }
}

/// The validator.
pub(crate) struct StandIn {
    pub(crate) hotkey: Hotkey,
    pub(crate) address: SocketAddr,
    scenario: Scenario,
    data: TempDir,
    server: Option<Server>,
    http: reqwest::Client,
}

impl StandIn {
    pub(crate) async fn start(scenario: Scenario) -> Self {
        let data = tempfile::tempdir().expect("a temporary folder");
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = serve(&scenario, data.path().to_owned(), listen).await;
        let address = server.api_url.trim_start_matches("http://");
        Self {
            hotkey: server.hotkey.clone(),
            address: address.parse().expect("an address with a port"),
            scenario,
            data,
            server: Some(server),
            http: reqwest::Client::builder().no_proxy().build().expect("a client"),
        }
    }

    pub(crate) async fn stop(&mut self) {
        self.server.take().expect("it runs").stop().await;
    }

    /// On the same port and data.
    pub(crate) async fn start_again(&mut self) {
        assert!(self.server.is_none(), "it runs");
        self.server = Some(serve(&self.scenario, self.data.path().to_owned(), self.address).await);
    }

    /// All that it published, granted and refused, from all its lives.
    pub(crate) fn ledger(&self) -> Vec<Entry> {
        self.server.as_ref().expect("it runs").ledger()
    }

    /// Records that fit.
    pub(crate) fn records<T>(&self, choose: impl Fn(&Record) -> Option<T>) -> Vec<T> {
        self.ledger()
            .iter()
            .filter_map(|entry| choose(&entry.record))
            .collect()
    }

    /// Makes it do something.
    pub(crate) async fn perform(&self, action: &Action) -> Value {
        let url = format!("http://{}/_stand_in/action", self.address);
        let answer = self.http.post(url).json(action).send().await.expect("it runs");
        let status = answer.status();
        let body = answer.text().await.expect("a whole answer");
        assert!(status.is_success(), "{action:?}: {status}: {body}");
        serde_json::from_str(&body).expect("JSON")
    }

    pub(crate) async fn publish(&self, chute: ChuteSpec) {
        self.perform(&Action::PublishChute(Box::new(chute))).await;
    }

    async fn state(&self) -> Value {
        let url = format!("http://{}/_stand_in/state", self.address);
        let answer = self.http.get(url).send().await.expect("it runs");
        answer.json().await.expect("JSON")
    }

    /// Its instances.
    pub(crate) async fn instances(&self) -> Vec<Value> {
        let state = self.state().await;
        state["instances"].as_array().expect("a list").clone()
    }

    /// One of its jobs.
    pub(crate) async fn job(&self, id: &str) -> Value {
        let state = self.state().await;
        let jobs = state["jobs"].as_array().expect("a list");
        let job = jobs.iter().find(|job| job["job_id"] == id);
        job.expect("a job stays until it is deleted").clone()
    }
}

async fn serve(scenario: &Scenario, data: PathBuf, listen: SocketAddr) -> Server {
    let config = Config {
        scenario: scenario.clone(),
        listen,
        data,
        chute_executable: env!("CARGO_BIN_EXE_chutes-agent").into(),
        hotkeys: Vec::new(),
    };
    Server::start(config).await.expect("the stand-in serves")
}

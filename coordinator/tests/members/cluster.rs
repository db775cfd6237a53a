//! A cluster whose members each have a folder, and an operator who asks their management API.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use coordinator::clock::{Clock, WallClock};
use coordinator::config::Config;
use coordinator::identity::HostKey;
use coordinator::join::wire::{Granted, Join, Question};
use coordinator::join::{Nodes, Token, admission, client};
use coordinator::member::{self, Error};
use coordinator::signer::{Key, LocalSigner, Seed};
use coordinator::validator::Directory;
use coordinator::validator::directory::ValidatorSettings;
use coordinator_core::state_machine::command::PayProfile;
use protocol::hotkey::{Hotkey, Signer};
use protocol::id::ServerId;
use protocol::signing::BoundRequest;
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{PATIENCE, until};

const SEED: [u8; 32] = [1; 32];
const NO_VALIDATOR: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9);

/// A host on which a member may run.
pub(crate) struct Host {
    pub(crate) number: u8,
    pub(crate) folder: TempDir,
    pub(crate) door: SocketAddr,
    api: SocketAddr,
    /// Where the validator's socket is: nobody listens there unless the test does.
    pub(crate) socket: SocketAddr,
    /// Where its REST interface is: nobody listens there unless the test does.
    pub(crate) validator: SocketAddr,
    pub(crate) found_observing: bool,
    /// Short, so that what waits for an election does not take long.
    pub(crate) timing: replica::Timing,
    /// The Kubernetes cluster whose nodes enter.
    pub(crate) nodes: Option<Arc<dyn Nodes>>,
    /// Where it says that it is; at its door unless the test wants otherwise.
    pub(crate) advertise: Option<String>,
    /// Where its configuration says that other members are.
    pub(crate) members: Vec<String>,
    /// The miner's, as this host has it; its operator signs with it too.
    pub(crate) seed: [u8; 32],
    running: Option<Running>,
}

struct Running {
    task: JoinHandle<Result<(), Error>>,
    stop: CancellationToken,
}

impl Host {
    pub(crate) fn new(number: u8) -> Self {
        // Another test of this process may have installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let door = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let api = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        Self {
            number,
            folder: tempfile::tempdir().expect("a temporary folder"),
            door: door.local_addr().expect("bound"),
            api: api.local_addr().expect("bound"),
            socket: NO_VALIDATOR,
            validator: NO_VALIDATOR,
            found_observing: false,
            timing: replica::Timing::Lan,
            nodes: None,
            advertise: None,
            members: Vec::new(),
            seed: SEED,
            running: None,
        }
    }

    pub(crate) fn miner(&self) -> Hotkey {
        Signer::from_seed(&self.seed).hotkey().clone()
    }

    pub(crate) fn name(&self) -> String {
        format!("host-{}", self.number)
    }

    pub(crate) fn identity(&self) -> PathBuf {
        let folder = self.folder.path().join("host");
        std::fs::create_dir_all(&folder).expect("ours");
        folder
    }

    pub(crate) fn raft_folder(&self) -> PathBuf {
        self.folder.path().join("coordinator/raft")
    }

    pub(crate) fn server(&self) -> ServerId {
        ServerId::parse(&self.name()).expect("an id")
    }

    pub(crate) fn found(&self) {
        let (server, door) = (self.server(), self.door.to_string());
        let founded = admission::found(&self.identity(), "test", &server, &door, WallClock.now());
        assert!(founded.expect("it can").is_some());
    }

    /// What this host would ask for with a token.
    pub(crate) fn wish(&self, token: &Token) -> Join {
        Join {
            invite: token.invite,
            secret: token.secret,
            server: self.server(),
            name: self.name(),
            site: format!("site-{}", self.number),
            address: self.door.to_string(),
            public_key: HostKey::open_or_make(&self.identity()).expect("a key").public(),
            hotkey: Some(self.miner()),
            clock: WallClock.now(),
        }
    }

    pub(crate) async fn join(&self, token: &Token) -> Result<Granted, client::Error> {
        let granted = client::join(token, &Question::Join(Box::new(self.wish(token)))).await?;
        admission::keep(&self.identity(), &granted).expect("ours");
        Ok(granted)
    }

    fn config(&self) -> Config {
        let validator = ValidatorSettings {
            hotkey: Signer::from_seed(&[2; 32]).hotkey().to_string(),
            api: format!("http://{}", self.validator),
            socket: format!("ws://{}", self.socket),
            registry: NO_VALIDATOR.to_string(),
        };
        Config {
            data: self.folder.path().join("coordinator"),
            identity: self.identity(),
            name: self.name(),
            site: format!("site-{}", self.number),
            advertise: self.advertise.clone().unwrap_or_else(|| self.door.to_string()),
            members: self.members.clone(),
            timing: self.timing,
            miner: self.miner(),
            validators: Directory::check(&[validator]).expect("good settings"),
            hosts_listen: self.door,
            api_listen: self.api,
            metrics_listen: None,
            pay_profile: PayProfile::Of2026,
            strategy: "value_per_cost".to_owned(),
            tick_every: Duration::from_secs(5),
            found_observing: self.found_observing,
            observe_every: Duration::from_secs(5),
            allow_plain_legacy_writes: false,
            backup: None,
        }
    }

    /// Why the member does not start.
    pub(crate) async fn refused(&self) -> Error {
        let clock: Arc<dyn Clock> = Arc::new(WallClock);
        let signer = LocalSigner::new(Key::new(&Seed::new(self.seed)), Arc::clone(&clock));
        let run = member::run(
            self.config(),
            Arc::new(signer),
            clock,
            None,
            None,
            CancellationToken::new(),
        );
        let ended = tokio::time::timeout(PATIENCE, Box::pin(run)).await;
        let ended = ended.expect("it ends at once, and does not serve");
        ended.expect_err("it must not start")
    }

    pub(crate) fn start(&mut self) {
        let clock: Arc<dyn Clock> = Arc::new(WallClock);
        let signer = LocalSigner::new(Key::new(&Seed::new(self.seed)), Arc::clone(&clock));
        let stop = CancellationToken::new();
        let running = Box::pin(member::run(
            self.config(),
            Arc::new(signer),
            clock,
            self.nodes.clone(),
            None,
            stop.clone(),
        ));
        let name = self.name();
        let task = tokio::spawn(async move {
            let ended = running.await;
            if let Err(error) = &ended {
                // Whoever waits for it will only say that it waited.
                eprintln!("{name} has ended: {error}");
            }
            ended
        });
        self.running = Some(Running { task, stop });
    }

    /// Gives the host another address; for one that does not run.
    pub(crate) fn move_away(&mut self) {
        let door = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        self.door = door.local_addr().expect("bound");
    }

    /// Stops the member in order.
    pub(crate) async fn stop(&mut self) {
        let running = self.running.take().expect("it runs");
        running.stop.cancel();
        let ended = tokio::time::timeout(PATIENCE, running.task).await;
        ended.expect("it stops").expect("no panic").expect("in order");
        // The socket goes with a task of its own, shortly afterwards: a member that starts again needs the port.
        until("the door is free", async || UdpSocket::bind(self.door).ok()).await;
    }

    /// An operator's request; its body, or status and reason.
    pub(crate) async fn ask(&self, method: Method, path: &str, body: &Value) -> Result<Value, (u16, String)> {
        let body = if body.is_null() {
            Vec::new()
        } else {
            serde_json::to_vec(body).expect("JSON")
        };
        let bound = BoundRequest {
            method: method.as_str(),
            path_and_query: path,
            body: &body,
        };
        let headers = bound.sign(
            &Signer::from_seed(&self.seed),
            WallClock.now(),
            fastrand::u128(..),
        );
        let http = reqwest::Client::builder().no_proxy().build().expect("a client");
        let mut request = http.request(method, format!("http://{}{path}", self.api));
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let unreachable = |error: reqwest::Error| (0, error.to_string());
        let response = request.body(body).send().await.map_err(unreachable)?;
        let status = response.status();
        let text = response.text().await.map_err(unreachable)?;
        if status.is_success() {
            Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
        } else {
            Err((status.as_u16(), text))
        }
    }

    pub(crate) async fn invite(&self, body: Value) -> Token {
        until("an invitation", async || {
            let invited = self.ask(Method::POST, "/hosts/invites", &body).await.ok()?;
            invited["token"].as_str()?.parse().ok()
        })
        .await
    }

    /// The names of those who vote, as this member is told; none while it cannot say.
    pub(crate) async fn voters(&self) -> Vec<String> {
        let raft = self
            .ask(Method::GET, "/v1/raft", &Value::Null)
            .await
            .unwrap_or_default();
        let members = raft["members"].as_array().cloned().unwrap_or_default();
        let mut voters: Vec<String> = members
            .iter()
            .filter(|member| member["role"] == "voter")
            .filter_map(|member| member["host"].as_str().map(str::to_owned))
            .collect();
        voters.sort();
        voters
    }

    pub(crate) async fn leader(&self) -> Option<String> {
        let raft = self.ask(Method::GET, "/v1/raft", &Value::Null).await.ok()?;
        let members = raft["members"].as_array()?;
        let leader = members.iter().find(|member| member["leads"] == true)?;
        leader["host"].as_str().map(str::to_owned)
    }
}

/// Members that have joined one after the other, all of them voters.
pub(crate) async fn three() -> [Host; 3] {
    cluster_of([1, 2, 3].map(Host::new)).await
}

/// The same, of these hosts.
pub(crate) async fn cluster_of(hosts: [Host; 3]) -> [Host; 3] {
    hosts[0].found();
    cluster_founded_by_the_first(hosts).await
}

/// The same, of which the first one has founded it.
pub(crate) async fn cluster_founded_by_the_first(mut hosts: [Host; 3]) -> [Host; 3] {
    let [first, others @ ..] = &mut hosts;
    first.start();
    for host in others {
        let token = first.invite(json!({ "eligible": true })).await;
        host.join(&token).await.expect("it is invited");
        host.start();
    }
    until("three vote", async || {
        (hosts[0].voters().await.len() == 3).then_some(())
    })
    .await;
    hosts
}

pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("ours");
    for entry in std::fs::read_dir(from).expect("it is there") {
        let entry = entry.expect("it is there");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("it is there").is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("ours");
        }
    }
}

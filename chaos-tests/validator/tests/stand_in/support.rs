//! A small miner: signed requests, a GPU proof API for software GPUs, a websocket, and containers.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use axum::Json;
use axum::extract::{Query, State};
use axum::routing::{get, post};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::{SinkExt, StreamExt};
use proof::Profile;
use protocol::gpu::DeviceInfo;
use protocol::hotkey::Signer;
use protocol::id::GpuId;
use protocol::signing::{Purpose, Tail, headers_to_validator};
use protocol::socket_io::Packet;
use protocol::time::UnixMillis;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use validator_stand_in::scenario::{Action, ChuteSpec, Scenario, Step};
use validator_stand_in::server::{Config, Server};

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

#[expect(clippy::disallowed_methods, reason = "nonces are wall time")]
pub(crate) fn now() -> UnixMillis {
    UnixMillis(0)
        + std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("after 1970")
}

/// The built-in scenario without its program, with these chutes published at once.
pub(crate) fn quiet_scenario(chutes: Vec<ChuteSpec>) -> Scenario {
    let mut scenario = Scenario::development();
    scenario.timers.device_info_challenges = 3;
    scenario.program = chutes
        .into_iter()
        .map(|spec| Step {
            at_ms: 0,
            when_active: None,
            action: Action::PublishChute(Box::new(spec)),
        })
        .collect();
    scenario
}

pub(crate) fn chute(name: &str) -> ChuteSpec {
    ChuteSpec {
        name: name.to_owned(),
        ..ChuteSpec::default()
    }
}

/// A server with a miner that is registered there.
pub(crate) struct World {
    pub(crate) server: Server,
    pub(crate) miner: Signer,
    pub(crate) client: reqwest::Client,
    pub(crate) data: PathBuf,
    folder: Option<tempfile::TempDir>,
}

impl World {
    pub(crate) async fn start(scenario: Scenario) -> Self {
        let chutes = scenario.program.len();
        let world = Self::unfinished(scenario).await;
        world.published(chutes).await;
        world
    }

    /// A server whose program may still run.
    pub(crate) async fn unfinished(scenario: Scenario) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let data = folder.path().to_owned();
        let mut world = Self::at(&data, scenario).await;
        world.folder = Some(folder);
        world
    }

    pub(crate) async fn at(data: &Path, scenario: Scenario) -> Self {
        if rustls::crypto::ring::default_provider()
            .install_default()
            .is_err()
        {
            // Another test of this process was first.
        }
        let executable = data.join("program");
        std::fs::write(&executable, b"#!/bin/sh\nexit 0\n").expect("written");
        let server = Server::start(Config {
            scenario,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            data: data.to_owned(),
            chute_executable: executable,
            hotkeys: vec![],
        })
        .await
        .expect("starts");
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .expect("a client");
        Self {
            server,
            miner: Signer::from_seed(&[1; 32]),
            client,
            data: data.to_owned(),
            folder: None,
        }
    }

    /// Waits until so many steps of the program are done.
    pub(crate) async fn published(&self, steps: usize) {
        self.until("the program is done", async |world| {
            let state = world.control("state").await;
            (state["steps_done"] == steps).then_some(())
        })
        .await;
    }

    /// Looks again and again, as the stand-in's own supervisor does; the limit is only for failing tests.
    pub(crate) async fn until<T>(&self, what: &str, look: impl AsyncFn(&Self) -> Option<T>) -> T {
        let looking = async {
            let mut pause = tokio::time::interval(Duration::from_millis(20));
            loop {
                pause.tick().await;
                if let Some(found) = look(self).await {
                    return found;
                }
            }
        };
        tokio::time::timeout(PATIENCE, looking)
            .await
            .unwrap_or_else(|_| panic!("never: {what}"))
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.server.api_url)
    }

    /// A request with a purpose and without a body.
    pub(crate) async fn call(&self, method: &str, path: &str, purpose: Purpose) -> (u16, String) {
        let headers = headers_to_validator(&self.miner, now(), &Tail::Purpose(purpose));
        self.send(method, path, headers, None).await
    }

    /// A request whose body is signed.
    pub(crate) async fn post(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let text = body.to_string();
        let headers = headers_to_validator(&self.miner, now(), &Tail::Body(text.as_bytes()));
        let (status, answer) = self.send(method, path, headers, Some(text)).await;
        (status, serde_json::from_str(&answer).unwrap_or(Value::Null))
    }

    /// A request of a container.
    pub(crate) async fn container(
        &self,
        method: &str,
        url: &str,
        token: &str,
        body: Option<Value>,
    ) -> (u16, Value) {
        let path = url.strip_prefix(&self.server.api_url).unwrap_or(url);
        let headers = vec![("authorization", token.to_owned())];
        let body = body.map(|body| body.to_string());
        let (status, answer) = self.send(method, path, headers, body).await;
        (status, serde_json::from_str(&answer).unwrap_or(Value::Null))
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: Vec<(&'static str, String)>,
        body: Option<String>,
    ) -> (u16, String) {
        let method = method.parse().expect("a method");
        let mut request = self.client.request(method, self.url(path));
        for (name, value) in headers {
            request = request.header(name, value);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let response = request.send().await.expect("an answer");
        let status = response.status().as_u16();
        (status, response.text().await.unwrap_or_default())
    }

    pub(crate) async fn control(&self, what: &str) -> Value {
        let (status, text) = self
            .send("GET", &format!("/_stand_in/{what}"), vec![], None)
            .await;
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).expect("JSON")
    }

    pub(crate) async fn act(&self, action: Value) -> Value {
        let (status, text) = self
            .send("POST", "/_stand_in/action", vec![], Some(action.to_string()))
            .await;
        assert_eq!(status, 200, "{action}: {text}");
        serde_json::from_str(&text).expect("JSON")
    }

    /// The rows of a stream.
    pub(crate) async fn rows(&self, what: &str) -> Vec<Value> {
        let (status, text) = self.call("GET", &format!("/miner/{what}/"), Purpose::Miner).await;
        assert_eq!(status, 200, "{text}");
        text.lines()
            .filter_map(|line| line.strip_prefix("data: {"))
            .map(|rest| serde_json::from_str(&format!("{{{rest}")).expect("a row"))
            .collect()
    }

    pub(crate) async fn chute_id(&self, name: &str) -> String {
        let rows = self.rows("chutes").await;
        let row = rows.iter().find(|row| row["name"] == name).expect("published");
        row["chute_id"].as_str().expect("text").to_owned()
    }

    /// Announces GPUs behind a new proof API; returns their ids and the task.
    pub(crate) async fn announce(&self, gpus: &[GpuId]) -> (u16, Value) {
        let address = proof_api(gpus);
        let nodes: Vec<Value> = gpus
            .iter()
            .enumerate()
            .map(|(index, gpu)| {
                let mut node = json!(proof::software_device(gpu.clone()));
                node["device_index"] = json!(index);
                node["gpu_identifier"] = json!("software");
                node["verification_host"] = json!("127.0.0.1");
                node["verification_port"] = json!(address.port());
                node
            })
            .collect();
        self.post("POST", "/nodes/", &json!({"server_id": "s", "nodes": nodes}))
            .await
    }

    pub(crate) async fn outcome_of(&self, task: &str) -> Value {
        let path = format!("/nodes/verification_status?task_id={task}");
        self.until("the verification ends", async |world| {
            let (status, text) = world.call("GET", &path, Purpose::Graval).await;
            assert_eq!(status, 200, "{text}");
            let answer: Value = serde_json::from_str(&text).expect("JSON");
            (answer["status"] != "pending").then_some(answer)
        })
        .await
    }

    /// Announces GPUs and waits until they are verified.
    pub(crate) async fn verified_gpus(&self, count: u8) -> Vec<GpuId> {
        let gpus: Vec<GpuId> = (0..count).map(gpu).collect();
        let (status, answer) = self.announce(&gpus).await;
        assert_eq!(status, 202, "{answer}");
        let outcome = self.outcome_of(answer["task_id"].as_str().expect("text")).await;
        assert_eq!(outcome["status"], "verified", "{outcome}");
        gpus
    }

    pub(crate) async fn launch_config(&self, query: &str) -> (u16, Value) {
        let path = format!("/instances/launch_config?{query}");
        let (status, text) = self.call("GET", &path, Purpose::Launch).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// Starts a container with a token; the task ends as the container does.
    pub(crate) async fn run_chute(
        &self,
        chute: &str,
        gpus: &[GpuId],
        flow: Flow<'_>,
        proxy: Option<String>,
    ) -> (tokio::task::JoinHandle<anyhow::Result<()>>, u16) {
        let rows = self.rows("chutes").await;
        let row = rows
            .iter()
            .find(|row| row["name"] == chute || row["chute_id"] == chute)
            .expect("published");
        let code = self.data.join(format!("code-{}.py", free_port()));
        std::fs::write(&code, row["code"].as_str().expect("text")).expect("written");
        let (primary, logging) = (free_port(), free_port());
        let devices: Vec<String> = gpus.iter().map(GpuId::visible_device).collect();
        let mut environment: BTreeMap<String, String> = [
            ("CHUTES_EXTERNAL_HOST", "127.0.0.1".to_owned()),
            ("CHUTES_PROCESS_BIND_HOST", "127.0.0.1".to_owned()),
            ("CHUTES_PORT_PRIMARY", primary.to_string()),
            ("CHUTES_PORT_LOGGING", logging.to_string()),
            ("NVIDIA_VISIBLE_DEVICES", devices.join(",")),
            ("CHUTES_CODE_FILE", code.display().to_string()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
        let mut line: Vec<String> = ["chutes", "run", "app:chute", "--port", "8000"]
            .map(str::to_owned)
            .to_vec();
        match flow {
            Flow::Token(token) => {
                environment.insert("CHUTES_LAUNCH_JWT".to_owned(), token.to_owned());
            }
            Flow::TokenWithPorts(token, ports) => {
                environment.insert("CHUTES_LAUNCH_JWT".to_owned(), token.to_owned());
                for name in ports {
                    environment.insert((*name).to_owned(), free_port().to_string());
                }
            }
            Flow::Seed(seed) => line.extend(["--graval-seed".to_owned(), seed.to_string()]),
        }
        if let Some(proxy) = proxy {
            environment.insert("HTTPS_PROXY".to_owned(), proxy);
        }
        let (miner, validator) = (self.miner.hotkey().to_string(), self.server.hotkey.to_string());
        line.extend(["--miner-ss58".to_owned(), miner]);
        line.extend(["--validator-ss58".to_owned(), validator]);
        let task = tokio::spawn(validator_stand_in::chute::run(line, environment));
        (task, primary)
    }

    /// Token, container and a wait until the chute's instance is active; returns its row.
    pub(crate) async fn launch(&self, name: &str, gpus: &[GpuId]) -> Value {
        let chute = self.chute_id(name).await;
        let (status, config) = self.launch_config(&format!("chute_id={chute}")).await;
        assert_eq!(status, 200, "{config}");
        let token = config["token"].as_str().expect("text");
        let (container, _) = self.run_chute(name, gpus, Flow::Token(token), None).await;
        let row = self
            .until("the instance is active", async |world| {
                assert!(!container.is_finished(), "the container ended");
                let rows = world.rows("instances").await;
                rows.into_iter()
                    .find(|row| row["config_id"] == config["config_id"] && row["active"] == true)
            })
            .await;
        assert_eq!(row["verified"], true);
        row
    }

    /// Kinds of all ledger entries.
    pub(crate) fn kinds(&self) -> Vec<String> {
        self.server
            .ledger()
            .iter()
            .map(|entry| {
                let value = serde_json::to_value(entry).expect("plain data");
                value["kind"].as_str().expect("text").to_owned()
            })
            .collect()
    }
}

/// How a container is told who it is.
pub(crate) enum Flow<'a> {
    Token(&'a str),
    TokenWithPorts(&'a str, &'a [&'a str]),
    Seed(u64),
}

pub(crate) fn gpu(number: u8) -> GpuId {
    GpuId::from_device_uuid(&hex::encode([number; 16])).expect("32 digits")
}

/// A port that nothing listens on. Below the range that the kernel gives to outgoing connections, since a
/// container opens it only later; each is given once, and processes begin at different places.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 10_000 + u16::try_from(std::process::id() % 200).expect("small") * 100;
    loop {
        let port = start + NEXT.fetch_add(1, Ordering::Relaxed) % 2_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

type Devices = std::sync::Arc<Vec<DeviceInfo>>;

/// The miner's GPU proof API, without its checks of signatures.
fn proof_api(gpus: &[GpuId]) -> SocketAddr {
    let devices: Devices = std::sync::Arc::new(gpus.iter().cloned().map(proof::software_device).collect());
    let router = axum::Router::new()
        .route("/info", get(info))
        .route("/prove", post(prove))
        .with_state(devices);
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.set_nonblocking(true).expect("possible");
    let address = listener.local_addr().expect("an address");
    let listener = tokio::net::TcpListener::from_std(listener).expect("possible");
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

async fn info(State(devices): State<Devices>, Query(query): Query<BTreeMap<String, String>>) -> String {
    proof::device_challenge_answer(&devices, &query["challenge"]).expect("a challenge")
}

async fn prove(State(devices): State<Devices>, Json(request): Json<Value>) -> Json<Value> {
    let seed = request["seed"].as_u64().expect("64 bits");
    let iterations = u32::try_from(request["iterations"].as_u64().expect("a number")).expect("small");
    let (mut proofs, mut plaintexts) = (json!({}), json!({}));
    for device in devices.iter() {
        let proved = proof::prove(device, seed, iterations, &Profile::DEVELOPMENT);
        let uuid = device.uuid.as_str();
        let sealed = request["ciphertext"][uuid].as_str().expect("text");
        let blob = STANDARD.decode(sealed).expect("base64");
        plaintexts[uuid] = json!(proof::decrypt(&proved, &blob).expect("ours"));
        proofs[uuid] = json!({"device_uuid": uuid, "work_product": proved.work_product});
    }
    Json(json!({"devices": *devices, "seed": seed, "proof": proofs, "plaintext": plaintexts}))
}

type Stream = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

/// A websocket of the miner.
pub(crate) struct Socket(Stream);

impl Socket {
    pub(crate) async fn connect(world: &World) -> Self {
        let url = format!("{}/socket.io/?transport=websocket&EIO=4", world.server.socket_url);
        let (stream, _) = tokio_tungstenite::connect_async(url).await.expect("connects");
        let mut socket = Self(stream);
        assert!(matches!(socket.packet().await, Some(Packet::Open(_))));
        socket.send(&Packet::Connect(None)).await;
        assert!(matches!(socket.packet().await, Some(Packet::Connect(Some(_)))));
        socket
    }

    pub(crate) async fn authenticated(world: &World) -> Self {
        let mut socket = Self::connect(world).await;
        socket.authenticate(&world.miner, now()).await;
        let Some(Packet::Event { name, .. }) = socket.packet().await else {
            panic!("an answer was expected");
        };
        assert_eq!(name, "auth_success");
        socket
    }

    pub(crate) async fn authenticate(&mut self, signer: &Signer, at: UnixMillis) {
        let headers: serde_json::Map<String, Value> =
            headers_to_validator(signer, at, &Tail::Purpose(Purpose::Sockets))
                .into_iter()
                .map(|(name, value)| (name.to_owned(), json!(value)))
                .collect();
        self.send(&Packet::event("authenticate", Value::Object(headers)))
            .await;
    }

    pub(crate) async fn send(&mut self, packet: &Packet) {
        self.text(&packet.to_frame()).await;
    }

    pub(crate) async fn text(&mut self, text: &str) {
        self.0.send(Message::text(text)).await.expect("sent");
    }

    /// The next packet; none at the end of the connection.
    pub(crate) async fn packet(&mut self) -> Option<Packet> {
        loop {
            let next = tokio::time::timeout(PATIENCE, self.0.next())
                .await
                .expect("in time");
            match next {
                Some(Ok(Message::Text(text))) => return Some(Packet::parse(&text).expect("a packet")),
                Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                Some(Ok(_)) => {}
            }
        }
    }

    /// The next broadcast with this reason.
    pub(crate) async fn event(&mut self, reason: &str) -> Value {
        loop {
            match self.packet().await {
                Some(Packet::Event { name, args, .. }) if name == "miner_broadcast" => {
                    let envelope = args.into_iter().next().expect("an argument");
                    if envelope["reason"] == reason {
                        return envelope;
                    }
                }
                Some(Packet::Ping(payload)) => self.send(&Packet::Pong(payload)).await,
                Some(_) => {}
                None => panic!("the connection ended before {reason}"),
            }
        }
    }
}

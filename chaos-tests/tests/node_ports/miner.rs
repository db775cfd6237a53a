//! A whole miner of one host as the real program, with a validator stand-in in this process, and its operator, who
//! reaches it from outside of the node.

use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use chaos_tests::faults::network::Network;
use coordinator::clock::{Clock as _, WallClock};
use coordinator::join::admission;
use kubernetes_control_plane::ends_with_us;
use protocol::hotkey::Signer;
use protocol::id::ServerId;
use protocol::workload::Secret;
use reqwest::{Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use validator_stand_in::scenario::{
    Action, ChuteSpec, DEVELOPMENT_MINER_SEED, Egress, Goals, Scenario, Step,
};
use validator_stand_in::server::{Config, Server};

use crate::cluster::NODE;
use crate::signed::signed;
use crate::spaces::awaited;
use crate::{NODE_HOST, until};

/// An answer that does not come.
const NEVER: Duration = Duration::from_secs(20);

/// The ports of an agent's doors over TCP.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Doors {
    pub(crate) registry: u16,
    pub(crate) api: u16,
    pub(crate) proof: u16,
}

/// The validator. Images come from elsewhere.
pub(crate) struct Validator {
    server: Server,
    http: reqwest::Client,
}

impl Validator {
    pub(crate) async fn start(folder: &Path) -> Self {
        let executable = folder.join("chute");
        std::fs::write(&executable, "nobody runs it").expect("our own folder");
        let first = Action::PublishChute(Box::new(chute("first")));
        let scenario = Scenario {
            validator_seed: Secret::new(hex::encode([0xd7; 32])),
            egress: Egress::default(),
            program: vec![Step {
                at_ms: 0,
                when_active: None,
                action: first,
            }],
            goals: Goals::default(),
            ..Scenario::development()
        };
        let config = Config {
            scenario,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            data: folder.join("validator"),
            chute_executable: executable,
            hotkeys: Vec::new(),
        };
        Self {
            server: Server::start(config).await.expect("the stand-in serves"),
            http: reqwest::Client::builder().no_proxy().build().expect("a client"),
        }
    }

    pub(crate) async fn publish(&self, name: &str) {
        let url = format!("{}/_stand_in/action", self.server.api_url);
        let action = Action::PublishChute(Box::new(chute(name)));
        let answer = self.http.post(url).json(&action).send().await;
        let answer = answer.expect("it runs");
        assert!(answer.status().is_success(), "{answer:?}");
    }

    /// The name by which images of this validator are asked for.
    pub(crate) fn label(&self) -> String {
        self.server.hotkey.lower()
    }
}

fn chute(name: &str) -> ChuteSpec {
    ChuteSpec {
        name: name.to_owned(),
        ..ChuteSpec::default()
    }
}

/// The agent, all of its processes.
pub(crate) struct Miner {
    folder: PathBuf,
    program: PathBuf,
    /// All that does not change, of its configuration.
    settings: String,
    key: Signer,
    outside: String,
    validator: String,
    agent: Option<Child>,
}

impl Miner {
    /// A miner that does not run yet. `registry` is where its validator's images are.
    pub(crate) fn new(
        network: &Network,
        folder: &Path,
        kubeconfig: &Path,
        validator: &Validator,
        registry: SocketAddr,
    ) -> Self {
        let folder = folder.join("miner");
        std::fs::create_dir_all(folder.join("host")).expect("our own folder");
        let key = Signer::from_seed_hex(DEVELOPMENT_MINER_SEED).expect("a seed");
        let seed = folder.join("seed");
        write_private(&seed, DEVELOPMENT_MINER_SEED);
        let server = &validator.server;
        let settings = format!(
            "data = {data:?}\n\
             [miner]\nhotkey = \"{miner}\"\nseed_on_gpu_host = true\nseed_file = {seed:?}\n\
             [[validators]]\nhotkey = \"{hotkey}\"\napi = \"{api}\"\nsocket = \"{socket}\"\n\
             registry = \"http://{registry}\"\n\
             [host]\nname = \"{NODE}\"\nid = \"{NODE}.test\"\naddress = \"{address}\"\n\
             [runtime]\nkind = \"kubernetes\"\nkubeconfig = {kubeconfig:?}\n",
            data = folder.display().to_string(),
            miner = key.hotkey(),
            seed = seed.display().to_string(),
            hotkey = server.hotkey,
            api = server.api_url,
            socket = server.socket_url,
            address = Network::address(NODE_HOST),
            kubeconfig = kubeconfig.display().to_string(),
        );
        let id = ServerId::parse(&format!("{NODE}.test")).expect("an id");
        let door = format!("{}:4433", Network::address(NODE_HOST));
        let founded = admission::found(&folder.join("host"), "test", &id, &door, WallClock.now());
        founded.expect("a cluster");
        Self {
            folder,
            program: beside_us("chutes-agent"),
            settings,
            key,
            outside: network.namespace(crate::OUTSIDE_HOST),
            validator: server.hotkey.to_string(),
            agent: None,
        }
    }

    /// Starts it in the network of this thread, with its doors there.
    pub(crate) fn start(&mut self, doors: Doors) {
        let address = Network::address(NODE_HOST);
        let Doors { registry, api, proof } = doors;
        let config = format!(
            "{settings}\
             [coordinator]\nenabled = true\nhosts_listen = \"{address}:4433\"\napi_listen = \"{address}:{api}\"\n\
             tick = \"1s\"\nobserve = \"2s\"\n\
             [proof]\nlisten = \"{address}:{proof}\"\nbackend = \"cpu\"\nsoftware_gpus = 2\n\
             [registry]\nlisten = \"127.0.0.1:{registry}\"\nstore_free_bytes_min = \"1MiB\"\n",
            settings = self.settings,
        );
        let file = self.folder.join("config.toml");
        write_private(&file, &config);
        let log = std::fs::File::create(self.log()).expect("our own folder");
        let mut command = Command::from(ends_with_us("KILL", &self.program));
        command.args(["run", "--config"]).arg(&file);
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(log).kill_on_drop(true);
        self.agent = Some(command.spawn().expect("the program runs"));
    }

    pub(crate) async fn stop(&mut self) {
        let mut agent = self.agent.take().expect("it runs");
        let pid = agent.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        kill_process(pid.expect("it runs"), Signal::TERM).expect("it runs");
        let ended = agent.wait().await.expect("it is ours");
        assert!(ended.success(), "{ended}");
    }

    fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// What it has said since it was started.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(self.log()).expect("our own file")
    }

    /// What the management API answers to the operator.
    pub(crate) fn ask(
        &self,
        api: u16,
        method: Method,
        path: &str,
        body: &Value,
    ) -> Result<(StatusCode, String), String> {
        let api = SocketAddr::from((Network::address(NODE_HOST), api));
        awaited(&self.outside, async || {
            let http = reqwest::Client::builder().no_proxy().timeout(NEVER).build();
            let http = http.expect("a client");
            let answer = signed(&http, &self.key, api, method, path, body).send().await;
            let answer = answer.map_err(|error| format!("{error:?}"))?;
            let status = answer.status();
            let text = answer.text().await.map_err(|error| format!("{error:?}"))?;
            Ok((status, text))
        })
    }

    /// Waits until the management API gives the state.
    pub(crate) async fn until_it_answers(&self, api: u16) {
        until("the management API answers", async || {
            let answer = self.ask(api, Method::GET, "/v1/state", &Value::Null);
            answer.is_ok_and(|(status, _)| status.is_success()).then_some(())
        })
        .await;
    }

    /// Gives the validator the node with its GPUs.
    pub(crate) async fn enrol(&self, api: u16) {
        let body = json!({ "name": NODE, "validator": self.validator, "hourly_cost": 0.01,
            "gpu_short_ref": Scenario::development().relaxed.gpu_types[0].short_ref });
        let told = until("the host joins", async || {
            let (status, told) = self.ask(api, Method::POST, "/servers/", &body).ok()?;
            if [StatusCode::NOT_FOUND, StatusCode::SERVICE_UNAVAILABLE].contains(&status) {
                return None;
            }
            assert!(status.is_success(), "{status}: {told}");
            Some(told)
        })
        .await;
        assert!(told.contains("completed server bootstrapping"), "{told}");
    }
}

impl Drop for Miner {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let said = std::fs::read_to_string(self.log()).unwrap_or_default();
            let lines: Vec<&str> = said.lines().collect();
            eprintln!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
    }
}

/// A program that was built with this test, one folder above it.
fn beside_us(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("this program");
    let folders = own.ancestors().skip(1).take(2);
    let mut found = folders
        .map(|folder| folder.join(name))
        .filter(|path| path.is_file());
    found
        .next()
        .expect("chutes-agent is not built: cargo build -p agent")
}

fn write_private(path: &Path, text: &str) {
    let mut options = std::fs::File::options();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path).expect("our own folder");
    std::io::Write::write_all(&mut file, text.as_bytes()).expect("our own file");
}

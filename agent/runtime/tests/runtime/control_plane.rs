//! A real Kubernetes control plane on loopback: etcd, API server and controllers, without nodes. The test plays the
//! kubelet: it says of a pod what a kubelet would, and lets pods go that are to go.
//!
//! `CHUTES_CONTROL_PLANE` names the folder of the programs, which `chaos-tests/control-plane/build` prints as its last
//! line. Without it nothing can be tested here; with `REQUIRE_PEERS=1`, as in CI, that is a failure.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service, ServiceAccount};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt as _};
use protocol::id::DeploymentId;
use runtime::kubernetes::{Config, Kubernetes};
use runtime::manifest::{DEPLOYMENT_LABEL, Settings, deployment_selector};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

const TOKEN: &str = "operator";
const START_PATIENCE: Duration = Duration::from_secs(240);
const ASK_EVERY: Duration = Duration::from_millis(50);
/// Node ports: half of them are reserved, so that one of ours is soon given.
const FEW_NODE_PORTS: &str = "30000-30063";
pub(crate) const RESERVED: std::ops::Range<u16> = 30000..30032;

/// The folder of the programs, or nothing with a word about it.
pub(crate) fn programs() -> Option<PathBuf> {
    let folder = std::env::var_os("CHUTES_CONTROL_PLANE").map(PathBuf::from);
    if folder.is_none() {
        let why = "no Kubernetes control plane: CHUTES_CONTROL_PLANE must name the folder that \
                   chaos-tests/control-plane/build prints";
        assert!(std::env::var("REQUIRE_PEERS").as_deref() != Ok("1"), "{why}");
        eprintln!("NOT TESTED: {why}");
    }
    folder
}

/// The control plane. Its processes end with it.
pub(crate) struct ControlPlane {
    programs: PathBuf,
    folder: TempDir,
    etcd: Child,
    server: Child,
    controllers: Child,
    etcd_port: u16,
    port: u16,
    node_ports: &'static str,
    pub(crate) client: Client,
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
    listener.local_addr().expect("it is bound").port()
}

fn start(program: &Path, folder: &Path, arguments: &[String]) -> Child {
    let name = program.file_name().expect("a program").to_string_lossy();
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(folder.join(format!("{name}.log")));
    let log = log.expect("the folder is writable");
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    command.stdout(log.try_clone().expect("a file")).stderr(log);
    command
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

impl ControlPlane {
    pub(crate) async fn start(programs: PathBuf) -> Self {
        Self::start_with(programs, FEW_NODE_PORTS).await
    }

    pub(crate) async fn start_with(programs: PathBuf, node_ports: &'static str) -> Self {
        // Any is fine: the other end is a test's own API server.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let (etcd_port, port) = (free_port(), free_port());
        let path = folder.path();
        std::fs::write(
            path.join("tokens.csv"),
            format!("{TOKEN},{TOKEN},1,\"system:masters\"\n"),
        )
        .expect("writable");
        let key = rcgen::KeyPair::generate().expect("keys can be made");
        std::fs::write(path.join("accounts.key"), key.serialize_pem()).expect("writable");
        std::fs::write(path.join("accounts.pub"), key.public_key_pem()).expect("writable");
        let kubeconfig = path.join("kubeconfig");
        std::fs::write(&kubeconfig, kubeconfig_text(port)).expect("writable");
        let peer = free_port();
        let etcd = start(
            &programs.join("etcd"),
            path,
            &[
                format!("--data-dir={}", path.join("etcd").display()),
                format!("--listen-client-urls=http://127.0.0.1:{etcd_port}"),
                format!("--advertise-client-urls=http://127.0.0.1:{etcd_port}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
                format!("--initial-cluster=default=http://127.0.0.1:{peer}"),
                "--unsafe-no-fsync".to_owned(),
            ],
        );
        let serve = || start_server(&programs, path, (etcd_port, port), node_ports);
        let mut server = serve();
        let client = runtime::kubernetes::client(Some(&kubeconfig))
            .await
            .expect("a good kubeconfig");
        until_ready(&client, path, &mut server, serve).await;
        let controllers = start_controllers(&programs, path);
        let class = json!({ "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "handler": "nvidia",
            "metadata": { "name": "nvidia" } });
        let classes: Api<k8s_openapi::api::node::v1::RuntimeClass> = Api::all(client.clone());
        let class = serde_json::from_value(class).expect("a runtime class");
        classes
            .create(&PostParams::default(), &class)
            .await
            .expect("the API server works");
        Self {
            programs,
            folder,
            etcd,
            server,
            controllers,
            etcd_port,
            port,
            node_ports,
            client,
        }
    }

    /// A client that shows a token instead of the operator's.
    pub(crate) fn client_of(&self, token: &str) -> Client {
        let server = format!("https://127.0.0.1:{}", self.port);
        let mut config = kube::Config::new(server.parse().expect("a URL"));
        config.accept_invalid_certs = true;
        config.auth_info.token = Some(token.to_owned().into());
        Client::try_from(config).expect("a good configuration")
    }

    /// Runs helm on the chart of the project; what it prints.
    pub(crate) async fn helm(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(self.programs.join("helm"));
        command.args(arguments).arg("--kubeconfig").arg(self.kubeconfig());
        let home = self.folder.path().join("helm");
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, &home);
        }
        let output = command.output().await.expect("helm can be started");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&output.stderr))
        }
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// `kill -9` of API server and controllers, which are one process in k3s.
    pub(crate) async fn kill_server(&mut self) {
        self.controllers.kill().await.expect("they run");
        self.server.kill().await.expect("it runs");
    }

    pub(crate) async fn start_server(&mut self) {
        let path = self.folder.path();
        let (programs, ports, node_ports) = (&self.programs, (self.etcd_port, self.port), self.node_ports);
        let serve = || start_server(programs, path, ports, node_ports);
        let mut server = serve();
        until_ready(&self.client, path, &mut server, serve).await;
        self.server = server;
        self.controllers = start_controllers(&self.programs, path);
    }

    /// A new namespace, ready for pods, with a kubelet for all of it.
    pub(crate) async fn namespace(&self, name: &str) -> Space {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let namespace = json!({ "metadata": { "name": name } });
        let namespace = serde_json::from_value(namespace).expect("a namespace");
        namespaces
            .create(&PostParams::default(), &namespace)
            .await
            .expect("the API server works");
        self.space(name).await
    }

    /// A namespace that is there, once it is ready for pods.
    pub(crate) async fn space(&self, name: &str) -> Space {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), name);
        let deadline = Instant::now() + START_PATIENCE;
        while accounts
            .get_opt("default")
            .await
            .expect("the API server works")
            .is_none()
        {
            assert!(
                Instant::now() < deadline,
                "no service account: are there controllers?"
            );
            sleep(ASK_EVERY).await;
        }
        Space::new(self.client.clone(), name)
    }

    /// Ends everything, and waits for it.
    pub(crate) async fn stop(mut self) {
        for child in [&mut self.controllers, &mut self.server, &mut self.etcd] {
            child.kill().await.expect("it runs");
        }
    }
}

fn start_server(programs: &Path, path: &Path, (etcd_port, port): (u16, u16), node_ports: &str) -> Child {
    let key = path.join("accounts.key");
    start(
        &programs.join("kube-apiserver"),
        path,
        &[
            format!("--etcd-servers=http://127.0.0.1:{etcd_port}"),
            format!("--secure-port={port}"),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            format!("--cert-dir={}", path.join("server").display()),
            format!("--token-auth-file={}", path.join("tokens.csv").display()),
            "--authorization-mode=Node,RBAC".to_owned(),
            format!(
                "--service-account-key-file={}",
                path.join("accounts.pub").display()
            ),
            format!("--service-account-signing-key-file={}", key.display()),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--service-cluster-ip-range=10.0.0.0/16".to_owned(),
            format!("--service-node-port-range={node_ports}"),
            "--endpoint-reconciler-type=none".to_owned(),
        ],
    )
}

fn start_controllers(programs: &Path, path: &Path) -> Child {
    let program = programs.join("kube-controller-manager");
    start(
        &program,
        path,
        &[
            format!("--kubeconfig={}", path.join("kubeconfig").display()),
            "--secure-port=0".to_owned(),
            format!(
                "--service-account-private-key-file={}",
                path.join("accounts.key").display()
            ),
            "--leader-elect=false".to_owned(),
            "--controllers=job-controller,garbage-collector-controller,serviceaccount-controller".to_owned(),
        ],
    )
}

fn kubeconfig_text(port: u16) -> String {
    let server = format!("https://127.0.0.1:{port}");
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{ "name": "test", "cluster": { "server": server, "insecure-skip-tls-verify": true } }],
        "users": [{ "name": "test", "user": { "token": TOKEN } }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
    })
    .to_string()
}

/// Waits until the API server is ready. One that ends by itself is started again, as its supervisor would: it does
/// when a Service is made at the moment in which it counts the addresses of all.
async fn until_ready(client: &Client, folder: &Path, server: &mut Child, again: impl Fn() -> Child) {
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        let request = http::Request::get("/readyz").body(Vec::new()).expect("a request");
        match client.request_text(request).await {
            Ok(_) => return,
            Err(error) => assert!(
                Instant::now() < deadline,
                "the API server is not ready ({error}): {}",
                std::fs::read_to_string(folder.join("kube-apiserver.log")).unwrap_or_default()
            ),
        }
        if server.try_wait().expect("it is ours").is_some() {
            *server = again();
        }
        sleep(ASK_EVERY).await;
    }
}

type Wishes = BTreeMap<DeploymentId, Value>;

/// A namespace and the kubelet of its pods.
pub(crate) struct Space {
    client: Client,
    pub(crate) name: String,
    wishes: watch::Sender<Wishes>,
    kubelet: JoinHandle<()>,
    /// Of the runtimes here.
    logs: TempDir,
}

impl Drop for Space {
    fn drop(&mut self) {
        self.kubelet.abort();
    }
}

impl Space {
    fn new(client: Client, name: &str) -> Self {
        let (wishes, wished) = watch::channel(Wishes::new());
        let pods = Api::namespaced(client.clone(), name);
        let kubelet = tokio::spawn(play_kubelet(pods, wished));
        Self {
            client,
            name: name.to_owned(),
            wishes,
            kubelet,
            logs: tempfile::tempdir().expect("temporary folders can be made"),
        }
    }

    /// As if another client had come.
    pub(crate) fn with_client(&self, client: Client) -> Self {
        Self::new(client, &self.name)
    }

    /// The settings of one node's agent here.
    pub(crate) fn config(&self, node: &str) -> Config {
        let mut settings = Settings::for_node(node);
        settings.namespace.clone_from(&self.name);
        let mut config = Config::new(settings, self.logs.path().join(node));
        config.reserved_ports = RESERVED.collect();
        config.patience = Duration::from_secs(1);
        config
    }

    /// Where runtimes keep what is left, each in a folder of its node's name.
    pub(crate) fn logs(&self) -> &Path {
        self.logs.path()
    }

    /// The runtime of a node, once it knows what exists.
    pub(crate) async fn open(&self, node: &str) -> Kubernetes {
        let runtime = Kubernetes::start(self.client.clone(), self.config(node));
        until_known(&runtime).await;
        runtime
    }

    /// What the kubelet says of a deployment's pod from now on.
    pub(crate) fn say(&self, deployment: &DeploymentId, status: Value) {
        self.wishes.send_modify(|wishes| {
            wishes.insert(deployment.clone(), status);
        });
    }

    pub(crate) fn jobs(&self) -> Api<Job> {
        Api::namespaced(self.client.clone(), &self.name)
    }

    pub(crate) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.name)
    }

    pub(crate) fn services(&self) -> Api<Service> {
        Api::namespaced(self.client.clone(), &self.name)
    }

    pub(crate) fn code(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.name)
    }

    /// Waits until a deployment has so many pods.
    pub(crate) async fn until_pods(&self, deployment: &DeploymentId, count: usize) {
        let ours = ListParams::default().labels(&deployment_selector(deployment));
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            let found = self
                .pods()
                .list(&ours)
                .await
                .expect("the API server works")
                .items
                .len();
            if found == count {
                return;
            }
            assert!(Instant::now() < deadline, "{found} pods, not {count}");
            sleep(ASK_EVERY).await;
        }
    }

    /// Waits until this client may not create a Job: the API server learns of a new policy a moment after it is there.
    pub(crate) async fn until_refused(&self, job: &Job) {
        let trial = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        let deadline = Instant::now() + START_PATIENCE;
        while self.jobs().create(&trial, job).await.is_ok() {
            assert!(Instant::now() < deadline, "it may be created all the time");
            sleep(ASK_EVERY).await;
        }
    }

    /// The names of all objects that a runtime may have left here.
    pub(crate) async fn remains(&self) -> Vec<String> {
        let (jobs, pods) = (names(&self.jobs()).await, names(&self.pods()).await);
        let (services, code) = (names(&self.services()).await, names(&self.code()).await);
        [jobs, pods, services, code].concat()
    }
}

async fn names<K>(api: &Api<K>) -> Vec<String>
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let all = api.list(&ListParams::default()).await;
    let all = all.expect("the API server works");
    all.iter().map(|object| object.name_any()).collect()
}

/// Waits until a runtime can say what exists.
pub(crate) async fn until_known(runtime: &dyn runtime::Runtime) {
    let mut changes = runtime.changes();
    let known = async {
        while runtime.observe().await.is_err() {
            changes.changed().await.expect("the runtime lives");
        }
    };
    tokio::time::timeout(START_PATIENCE, known)
        .await
        .expect("the API server lists its objects");
}

/// What a kubelet does, as far as the API shows it. Each status is told once; a pod that is to go, goes.
async fn play_kubelet(pods: Api<Pod>, mut wishes: watch::Receiver<Wishes>) {
    let known: Mutex<BTreeMap<String, Pod>> = Mutex::default();
    let told: Arc<Mutex<BTreeMap<String, Value>>> = Arc::default();
    let mut events = Box::pin(watcher(pods.clone(), watcher::Config::default()));
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(watcher::Event::Apply(pod) | watcher::Event::InitApply(pod))) => {
                    known.lock().expect("no panics").insert(pod.name_any(), pod);
                }
                Some(Ok(watcher::Event::Delete(pod))) => {
                    known.lock().expect("no panics").remove(&pod.name_any());
                }
                // The API server may be gone for a while.
                Some(Err(_)) => sleep(ASK_EVERY).await,
                Some(Ok(_)) => {}
                None => return,
            },
            changed = wishes.changed() => if changed.is_err() { return },
        }
        let all: Vec<Pod> = known.lock().expect("no panics").values().cloned().collect();
        for pod in all {
            let name = pod.name_any();
            if pod.metadata.deletion_timestamp.is_some() {
                let now = DeleteParams {
                    grace_period_seconds: Some(0),
                    ..DeleteParams::default()
                };
                // It may be gone already, or the API server be away: the next event brings it back here.
                let _ = pods.delete(&name, &now).await;
                continue;
            }
            let deployment = pod
                .labels()
                .get(DEPLOYMENT_LABEL)
                .and_then(|it| DeploymentId::parse(it).ok());
            let wish = deployment.and_then(|it| wishes.borrow().get(&it).cloned());
            let Some(wish) = wish.filter(|wish| told.lock().expect("no panics").get(&name) != Some(wish))
            else {
                continue;
            };
            let status = Patch::Merge(json!({ "status": wish }));
            if pods
                .patch_status(&name, &PatchParams::default(), &status)
                .await
                .is_ok()
            {
                told.lock().expect("no panics").insert(name, wish);
            }
        }
    }
}

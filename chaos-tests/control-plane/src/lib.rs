//! A real Kubernetes control plane on loopback, for tests: etcd, API server and controllers; where nodes are asked for,
//! a scheduler and KWOK, which plays them; and in a network namespace, kube-proxy. `build` beside this crate makes the
//! programs.
//!
//! Reading order: [`Settings`], [`ControlPlane`], [`ends_with_us`], then `stages.yaml`, which says what KWOK does with
//! nodes and pods.

use std::ffi::OsStr;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use serde_json::json;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

/// Names the folder of the programs, which `build` prints as its last line.
pub const FOLDER_VARIABLE: &str = "CHUTES_CONTROL_PLANE";
/// How long programs may take to serve, on machines that have much else to do.
pub const START_PATIENCE: Duration = Duration::from_secs(240);

const TOKEN: &str = "operator";
const ASK_EVERY: Duration = Duration::from_millis(50);
const STAGES: &str = include_str!("stages.yaml");

/// What it is like.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// `--service-node-port-range`.
    pub node_ports: &'static str,
    /// `--controllers`.
    pub controllers: &'static str,
    /// With a scheduler, and with KWOK, which keeps all nodes ready and all their pods running.
    pub plays_nodes: bool,
    /// With kube-proxy on the node of this name. It writes the rules of the network that the thread is in which starts
    /// the control plane: one that it has moved into, never that of the whole process.
    pub proxy_of: Option<&'static str>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            node_ports: "30000-32767",
            controllers: "job-controller,garbage-collector-controller,serviceaccount-controller",
            plays_nodes: false,
            proxy_of: None,
        }
    }
}

/// The control plane. Its processes end with it.
pub struct ControlPlane {
    launch: Launch,
    etcd: Child,
    server: Child,
    /// Controllers, and with nodes the scheduler and KWOK: what is one process with the API server in k3s, kubelet
    /// included.
    around: Vec<Child>,
    /// The operator's, who may do everything.
    pub client: Client,
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ControlPlane({})", self.launch.port)
    }
}

fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.port())
}

impl ControlPlane {
    /// Starts it, and waits until the API server is ready.
    ///
    /// # Errors
    /// With the end of the API server's log, when it does not become ready.
    pub async fn start(programs: PathBuf, settings: Settings) -> anyhow::Result<Self> {
        // Any is fine: the other end is our own API server.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir()?;
        let (etcd_port, port) = (free_port()?, free_port()?);
        let path = folder.path();
        let tokens = format!("{TOKEN},{TOKEN},1,\"system:masters\"\n");
        std::fs::write(path.join("tokens.csv"), tokens)?;
        let key = rcgen::KeyPair::generate()?;
        std::fs::write(path.join("accounts.key"), key.serialize_pem())?;
        std::fs::write(path.join("accounts.pub"), key.public_key_pem())?;
        let kubeconfig = kubeconfig_text(port, TOKEN);
        std::fs::write(path.join("kubeconfig"), &kubeconfig)?;
        std::fs::write(path.join("stages.yaml"), STAGES)?;
        let config = Kubeconfig::from_yaml(&kubeconfig)?;
        let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
        let client = Client::try_from(config)?;
        let launch = Launch {
            programs,
            folder,
            settings,
            etcd_port,
            port,
        };
        let etcd = launch.etcd()?;
        let server = launch.ready_server(&client).await?;
        let around = launch.around()?;
        let class = json!({ "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "handler": "nvidia",
            "metadata": { "name": "nvidia" } });
        let classes: Api<RuntimeClass> = Api::all(client.clone());
        let class = serde_json::from_value(class)?;
        classes.create(&PostParams::default(), &class).await?;
        Ok(Self {
            launch,
            etcd,
            server,
            around,
            client,
        })
    }

    /// A client that shows this token.
    ///
    /// # Errors
    /// When none can be made.
    pub fn client_of(&self, token: &str) -> anyhow::Result<Client> {
        let server = format!("https://127.0.0.1:{}", self.launch.port);
        let mut config = kube::Config::new(server.parse()?);
        config.accept_invalid_certs = true;
        config.auth_info.token = Some(token.to_owned().into());
        Ok(Client::try_from(config)?)
    }

    /// The token that a kubelet would give to a pod, good for these audiences; for the API server itself if none.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn token_of(&self, pod: &Pod, audiences: &[String]) -> anyhow::Result<String> {
        let namespace = pod
            .metadata
            .namespace
            .as_deref()
            .context("a pod without a namespace")?;
        let account = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.service_account_name.as_deref());
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let bound =
            json!({ "kind": "Pod", "apiVersion": "v1", "name": pod.metadata.name, "uid": pod.metadata.uid });
        let request = json!({ "metadata": {}, "spec": { "audiences": audiences, "boundObjectRef": bound } });
        let request: TokenRequest = serde_json::from_value(request)?;
        let account = account.unwrap_or("default");
        let post = PostParams::default();
        let granted = accounts.create_token_request(account, &post, &request).await?;
        Ok(granted.status.context("a token without a status")?.token)
    }

    /// The operator's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.launch.folder.path().join("kubeconfig")
    }

    /// A kubeconfig with this token.
    #[must_use]
    pub fn kubeconfig_with(&self, token: &str) -> String {
        kubeconfig_text(self.launch.port, token)
    }

    /// Runs helm; what it prints.
    ///
    /// # Errors
    /// What it complains of.
    pub async fn helm(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(self.launch.programs.join("helm"));
        command.args(arguments).arg("--kubeconfig").arg(self.kubeconfig());
        let home = self.launch.folder.path().join("helm");
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, &home);
        }
        let output = command.output().await.map_err(|error| format!("helm: {error}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&output.stderr))
        }
    }

    /// Installs a chart or upgrades its release, in a namespace that need not be there; what helm prints.
    ///
    /// # Errors
    /// What it complains of.
    pub async fn install(
        &self,
        (release, chart): (&str, &str),
        namespace: &str,
        values: &[&str],
    ) -> Result<String, String> {
        let install = [
            "upgrade",
            release,
            chart,
            "--install",
            "--namespace",
            namespace,
            "--create-namespace",
        ];
        let values = values.iter().flat_map(|value| ["--set", *value]);
        let arguments: Vec<&str> = install.into_iter().chain(values).collect();
        self.helm(&arguments).await
    }

    /// `kill -9` of API server and all around it, which are one process in k3s.
    ///
    /// # Errors
    /// When they cannot be killed.
    pub async fn kill_server(&mut self) -> anyhow::Result<()> {
        for child in &mut self.around {
            child.kill().await?;
        }
        Ok(self.server.kill().await?)
    }

    /// The API server gives out other node ports, from its next start on.
    pub fn set_node_ports(&mut self, range: &'static str) {
        self.launch.settings.node_ports = range;
    }

    /// Starts them again, and waits until the API server is ready.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_server(&mut self) -> anyhow::Result<()> {
        self.server = self.launch.ready_server(&self.client).await?;
        self.around = self.launch.around()?;
        Ok(())
    }

    /// Ends everything, and waits for it.
    ///
    /// # Errors
    /// When something cannot be killed.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        for child in self.around.iter_mut().chain([&mut self.server, &mut self.etcd]) {
            child.kill().await?;
        }
        Ok(())
    }
}

/// A command for a program that gets this signal when the present thread ends, however it does: whoever is killed
/// drops nothing. Threads of a tokio runtime end with it.
pub fn ends_with_us(signal: &str, program: impl AsRef<OsStr>) -> std::process::Command {
    let mut command = std::process::Command::new("setpriv");
    command.args(["--pdeathsig", signal, "--"]).arg(program);
    command
}

/// How its programs are started.
struct Launch {
    programs: PathBuf,
    folder: TempDir,
    settings: Settings,
    etcd_port: u16,
    port: u16,
}

impl Launch {
    fn start(&self, name: &str, arguments: &[String]) -> anyhow::Result<Child> {
        let program = self.programs.join(name);
        let mut options = std::fs::File::options();
        let log = options.create(true).append(true);
        let log = log.open(self.folder.path().join(format!("{name}.log")))?;
        // One that is not there would be complained about by `setpriv`, in the log only.
        let missing = || format!("{}: chaos-tests/control-plane/build makes it", program.display());
        anyhow::ensure!(program.is_file(), missing());
        let mut command = Command::from(ends_with_us("KILL", &program));
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        // What a program keeps in its home is no business of the next one.
        command.env("HOME", self.folder.path());
        command.stdout(log.try_clone()?).stderr(log);
        command.spawn().with_context(missing)
    }

    fn in_folder(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn etcd(&self) -> anyhow::Result<Child> {
        let (port, peer) = (self.etcd_port, free_port()?);
        self.start(
            "etcd",
            &[
                format!("--data-dir={}", self.in_folder("etcd")),
                format!("--listen-client-urls=http://127.0.0.1:{port}"),
                format!("--advertise-client-urls=http://127.0.0.1:{port}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
                format!("--initial-cluster=default=http://127.0.0.1:{peer}"),
                "--unsafe-no-fsync".to_owned(),
            ],
        )
    }

    fn server(&self) -> anyhow::Result<Child> {
        self.start(
            "kube-apiserver",
            &[
                format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
                format!("--secure-port={}", self.port),
                "--bind-address=127.0.0.1".to_owned(),
                "--advertise-address=127.0.0.1".to_owned(),
                format!("--cert-dir={}", self.in_folder("server")),
                format!("--token-auth-file={}", self.in_folder("tokens.csv")),
                "--authorization-mode=Node,RBAC".to_owned(),
                format!("--service-account-key-file={}", self.in_folder("accounts.pub")),
                format!(
                    "--service-account-signing-key-file={}",
                    self.in_folder("accounts.key")
                ),
                "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
                "--service-cluster-ip-range=10.0.0.0/16".to_owned(),
                format!("--service-node-port-range={}", self.settings.node_ports),
                "--endpoint-reconciler-type=none".to_owned(),
            ],
        )
    }

    /// One that is ready. One that ends by itself is started again, as its supervisor would: it does when a Service is
    /// made at the moment in which it counts the addresses of all.
    async fn ready_server(&self, client: &Client) -> anyhow::Result<Child> {
        let deadline = Instant::now() + START_PATIENCE;
        let mut server = self.server()?;
        loop {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            match client.request_text(request).await {
                Ok(_) => return Ok(server),
                Err(error) if Instant::now() >= deadline => {
                    let log = std::fs::read_to_string(self.folder.path().join("kube-apiserver.log"));
                    anyhow::bail!(
                        "the API server is not ready ({error}): {}",
                        log.unwrap_or_default()
                    );
                }
                Err(_) => {}
            }
            if server.try_wait()?.is_some() {
                server = self.server()?;
            }
            sleep(ASK_EVERY).await;
        }
    }

    /// What works beside the API server.
    fn around(&self) -> anyhow::Result<Vec<Child>> {
        let kubeconfig = format!("--kubeconfig={}", self.in_folder("kubeconfig"));
        let common = [
            kubeconfig,
            "--secure-port=0".to_owned(),
            "--leader-elect=false".to_owned(),
        ];
        let mut controllers = common.to_vec();
        let key = self.in_folder("accounts.key");
        controllers.push(format!("--service-account-private-key-file={key}"));
        controllers.push(format!("--controllers={}", self.settings.controllers));
        let mut around = vec![self.start("kube-controller-manager", &controllers)?];
        if self.settings.plays_nodes {
            around.push(self.start("kube-scheduler", &common)?);
            around.push(self.kwok()?);
        }
        if let Some(node) = self.settings.proxy_of {
            around.push(self.kube_proxy(node)?);
        }
        Ok(around)
    }

    /// As it is in k3s: by iptables, and so that node ports are taken on loopback, too.
    fn kube_proxy(&self, node: &str) -> anyhow::Result<Child> {
        let network_of = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/net"));
        anyhow::ensure!(
            network_of("thread-self")? != network_of("self")?,
            "kube-proxy would change the rules of a network that is not a namespace of this thread alone"
        );
        self.start(
            "kube-proxy",
            &[
                format!("--kubeconfig={}", self.in_folder("kubeconfig")),
                format!("--hostname-override={node}"),
                "--proxy-mode=iptables".to_owned(),
                // How many connections may be followed is set for the whole machine.
                "--conntrack-max-per-core=0".to_owned(),
                "--conntrack-min=0".to_owned(),
                "--conntrack-tcp-timeout-established=0".to_owned(),
                "--conntrack-tcp-timeout-close-wait=0".to_owned(),
            ],
        )
    }

    fn kwok(&self) -> anyhow::Result<Child> {
        self.start(
            "kwok",
            &[
                format!("--kubeconfig={}", self.in_folder("kubeconfig")),
                format!("--config={}", self.in_folder("stages.yaml")),
                "--manage-all-nodes=true".to_owned(),
                // With leases, one that is started again would wait until those of its predecessor have ended.
                "--node-lease-duration-seconds=0".to_owned(),
            ],
        )
    }
}

fn kubeconfig_text(port: u16, token: &str) -> String {
    let server = format!("https://127.0.0.1:{port}");
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{ "name": "test", "cluster": { "server": server, "insecure-skip-tls-verify": true } }],
        "users": [{ "name": "test", "user": { "token": token } }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
    })
    .to_string()
}

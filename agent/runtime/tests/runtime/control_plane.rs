//! A real Kubernetes control plane on loopback: etcd, API server and controllers, without nodes. The test plays the
//! kubelet: it says of a pod what a kubelet would, and lets pods go that are to go.
//!
//! `CHUTES_CONTROL_PLANE` names the folder of the programs, which `chaos-tests/control-plane/build` prints as its last
//! line. Without it nothing can be tested here; with `REQUIRE_PEERS=1`, as in CI, that is a failure.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Pod, ResourceQuota, Service, ServiceAccount};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt as _};
use kubernetes_control_plane::{FOLDER_VARIABLE, START_PATIENCE};
use protocol::id::DeploymentId;
use runtime::kubernetes::{Config, Kubernetes};
use runtime::manifest::{DEPLOYMENT_LABEL, Settings, deployment_selector};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

const ASK_EVERY: Duration = Duration::from_millis(50);
/// Node ports: so many of them are reserved that one of ours is soon given, and so few that twenty Services in a row are
/// not. Kubernetes gives the first 16 last.
const FEW_NODE_PORTS: &str = "30000-30063";
pub(crate) const RESERVED: std::ops::Range<u16> = 30000..30026;

/// The folder of the programs, or nothing with a word about it.
pub(crate) fn programs() -> Option<PathBuf> {
    let folder = std::env::var_os(FOLDER_VARIABLE).map(PathBuf::from);
    if folder.is_none() {
        let why = "no Kubernetes control plane: CHUTES_CONTROL_PLANE must name the folder that \
                   chaos-tests/control-plane/build prints";
        assert!(std::env::var("REQUIRE_PEERS").as_deref() != Ok("1"), "{why}");
        eprintln!("NOT TESTED: {why}");
    }
    folder
}

/// The control plane, with what tests do on it.
pub(crate) struct ControlPlane(kubernetes_control_plane::ControlPlane);

impl Deref for ControlPlane {
    type Target = kubernetes_control_plane::ControlPlane;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl ControlPlane {
    pub(crate) async fn start(programs: PathBuf) -> Self {
        Self::start_with(programs, FEW_NODE_PORTS).await
    }

    pub(crate) async fn start_with(programs: PathBuf, node_ports: &'static str) -> Self {
        let settings = kubernetes_control_plane::Settings {
            node_ports,
            ..Default::default()
        };
        let started = kubernetes_control_plane::ControlPlane::start(programs, settings);
        Self(started.await.expect("a control plane"))
    }

    /// `kill -9` of API server and controllers, which are one process in k3s.
    pub(crate) async fn kill_server(&mut self) {
        self.0.kill_server().await.expect("they run");
    }

    pub(crate) async fn start_server(&mut self) {
        self.0.start_server().await.expect("it starts again");
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
    pub(crate) async fn stop(self) {
        self.0.stop().await.expect("it runs");
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
        self.open_with(self.config(node)).await
    }

    /// The same with other settings.
    pub(crate) async fn open_with(&self, config: Config) -> Kubernetes {
        let runtime = Kubernetes::start(self.client.clone(), config);
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

    pub(crate) fn quotas(&self) -> Api<ResourceQuota> {
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

    /// Waits until an event with this reason tells of an object; its message.
    pub(crate) async fn until_said(&self, object: &str, reason: &str) -> String {
        let events: Api<Event> = Api::namespaced(self.client.clone(), &self.name);
        let about = format!("involvedObject.name={object},reason={reason}");
        let about = ListParams::default().fields(&about);
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            let told = events.list(&about).await.expect("the API server works");
            if let Some(event) = told.items.into_iter().next() {
                return event.message.unwrap_or_default();
            }
            assert!(Instant::now() < deadline, "no {reason} of {object}");
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

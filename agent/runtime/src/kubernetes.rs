//! Workloads as Jobs of a Kubernetes cluster: objects by server-side apply, what exists by watching.
//!
//! Reading order: [`crate::manifest`] (the objects; pure), [`phase`] (what objects say of a workload; pure),
//! [`seen`] (the objects that exist, kept by watches), [`life`] (what is done for one workload, in which order),
//! [`output`] (what its pods write), [`trouble`] (which refusals pass), [`node_ports`] (which are the agent's own).
//!
//! Only objects with the label of this node and our names are looked at. Whatever else is in the namespace is
//! nobody's business here: it is neither listed nor touched.
//!
//! What another miner started becomes ours when an operator marks it so (`chutes-miner import`), first with our labels
//! and last with a fence. Between the two it is shown, and it is not stopped: whether it is wanted is not known yet.
//!
//! Nothing is remembered outside of the cluster. A deployment's Service is made first and removed last, and says
//! whether the Job was ever made: a workload whose Job somebody removed has ended, it is not started again.

mod life;
pub mod node_ports;
mod output;
mod phase;
mod seen;
mod trouble;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Pod, Service};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use protocol::id::{DeploymentId, GpuId};
use protocol::logs::{Log, LogQuery, WorkloadEvent};
use protocol::report::WorkloadStatus;
use protocol::workload::{Fence, WorkloadPhase, WorkloadSpec};
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::life::{Doing, Life};
use self::seen::Seen;
use crate::logs::Kept;
use crate::manifest::Settings;
use crate::{Error, Observed, Runtime};

/// The client logs whole answers that it cannot read, and at `debug` all refusals: both may hold launch tokens. What
/// is worth knowing of them is logged here.
pub const QUIET_LOG_DIRECTIVE: &str = "kube_client=off";

/// How workloads run in a cluster.
#[derive(Debug, Clone)]
pub struct Config {
    /// What the objects have in common.
    pub settings: Settings,
    /// Folder for what is left of workloads that are gone.
    pub logs: PathBuf,
    /// Node ports that are ours: no chute may be given one.
    pub reserved_ports: Vec<u16>,
    /// How long a refusal that may pass (quota, webhook, missing namespace) is put up with.
    pub patience: Duration,
    /// How long one call may take.
    pub call_timeout: Duration,
}

impl Config {
    /// The usual values.
    #[must_use]
    pub fn new(settings: Settings, logs: PathBuf) -> Self {
        Self {
            settings,
            logs,
            reserved_ports: vec![30500, 32000],
            patience: Duration::from_secs(60),
            call_timeout: Duration::from_secs(10),
        }
    }
}

/// A client of the cluster that a kubeconfig file names, or else of the one that the surroundings offer: the usual
/// kubeconfig file, or the service account of the pod.
///
/// # Errors
/// [`Error::Refused`] when there is none, or none that can be used.
pub async fn client(kubeconfig: Option<&Path>) -> Result<Client, Error> {
    let Some(path) = kubeconfig else {
        let config = kube::Config::infer().await;
        let config = config.map_err(|error| {
            no_cluster(&format!(
                "set runtime.kubeconfig, or run in a pod of it ({error})"
            ))
        })?;
        return Client::try_from(config).map_err(|error| no_cluster(&error.to_string()));
    };
    let file = Kubeconfig::read_from(path);
    let file = file.map_err(|error| no_cluster(&format!("{}: {error}", path.display())))?;
    client_of(file)
        .await
        .map_err(|error| no_cluster(&format!("{}: {error}", path.display())))
}

/// A client of the cluster that is current in a kubeconfig.
///
/// # Errors
/// It cannot be used.
pub async fn client_of(kubeconfig: Kubeconfig) -> Result<Client, String> {
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    let config = config.map_err(|error| error.to_string())?;
    Client::try_from(config).map_err(|error| error.to_string())
}

fn no_cluster(why: &str) -> Error {
    Error::Refused(format!("no Kubernetes cluster: {why}"))
}

/// The runtime. Dropping it stops the watching; workloads go on.
#[derive(Debug)]
pub struct Kubernetes {
    cluster: Arc<Cluster>,
    tasks: Mutex<JoinSet<()>>,
}

/// What the lives of all workloads share.
struct Cluster {
    config: Config,
    jobs: Api<Job>,
    pods: Api<Pod>,
    services: Api<Service>,
    code: Api<ConfigMap>,
    events: Api<Event>,
    kept: Kept,
    seen: Seen,
    lives: Mutex<BTreeMap<DeploymentId, Arc<Life>>>,
    changes: watch::Sender<u64>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cluster({})", self.config.settings.node_name)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cluster {
    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Notes a life, unless its deployment has one: that one then.
    fn begin(&self, life: &Arc<Life>) -> Option<Arc<Life>> {
        let mut lives = lock(&self.lives);
        let present = lives.get(&life.deployment).cloned();
        if present.is_none() {
            lives.insert(life.deployment.clone(), Arc::clone(life));
        }
        present
    }
}

impl Kubernetes {
    /// Begins to watch what exists. Must be called inside a tokio runtime; does not wait for the API server, which
    /// may be down: until it has answered, everything here is an error.
    #[must_use]
    pub fn start(client: Client, config: Config) -> Self {
        let namespace = &config.settings.namespace;
        let (changes, _) = watch::channel(0);
        let mut tasks = JoinSet::new();
        let (jobs, pods, services) = (
            Api::namespaced(client.clone(), namespace),
            Api::namespaced(client.clone(), namespace),
            Api::namespaced(client.clone(), namespace),
        );
        let seen = Seen::start((&jobs, &pods, &services), &config.settings, &changes, &mut tasks);
        let cluster = Arc::new(Cluster {
            jobs,
            pods,
            services,
            code: Api::namespaced(client.clone(), namespace),
            events: Api::namespaced(client, namespace),
            kept: Kept::new(config.logs.clone()),
            seen,
            lives: Mutex::default(),
            changes,
            config,
        });
        tasks.spawn(adopt(Arc::clone(&cluster)));
        tasks.spawn(node_ports::look(cluster.services.clone(), cluster.config.clone()));
        Self {
            cluster,
            tasks: Mutex::new(tasks),
        }
    }

    fn live(&self, deployment: &DeploymentId, gpus: Vec<GpuId>, start: Option<(Fence, WorkloadSpec)>) {
        let life = Arc::new(Life::new(deployment.clone(), gpus));
        if start.is_none() {
            life.ask_to_stop();
        }
        if let Some(present) = self.cluster.begin(&life) {
            if start.is_none() {
                present.ask_to_stop();
            }
            return;
        }
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(life::live(Arc::clone(&self.cluster), life, start));
        drop(tasks);
        self.cluster.changed();
    }
}

/// Takes over what an earlier agent left: what it launched lives on, so that it is missed when it is removed. What it
/// had not marked as launched is removed, and begun anew if it is still wanted.
async fn adopt(cluster: Arc<Cluster>) {
    let mut changes = cluster.changes.subscribe();
    let left = loop {
        match cluster.seen.all() {
            Ok(left) => break left,
            Err(_) if changes.changed().await.is_err() => return,
            Err(_) => {}
        }
    };
    let mut adopted = Vec::new();
    for (deployment, objects) in left {
        let life = Arc::new(Life::new(deployment, objects.gpus()));
        if objects.was_launched() {
            life.adopt();
        } else {
            life.ask_to_stop();
        }
        // One that is being applied already goes on from there.
        if cluster.begin(&life).is_none() {
            adopted.push(life::live(Arc::clone(&cluster), life, None));
        }
    }
    futures_util::future::join_all(adopted).await;
}

impl Runtime for Kubernetes {
    fn apply<'a>(&'a self, fence: Fence, spec: &'a WorkloadSpec) -> BoxFuture<'a, Result<(), Error>> {
        async move {
            let objects = self.cluster.seen.objects(&spec.deployment)?;
            if !objects.was_launched() || objects.may_have_a_job() {
                let start = Some((fence, spec.clone()));
                self.live(&spec.deployment, spec.gpus.clone(), start);
            }
            Ok(())
        }
        .boxed()
    }

    fn stop<'a>(&'a self, deployment: &'a DeploymentId) -> BoxFuture<'a, Result<(), Error>> {
        async move {
            let objects = self.cluster.seen.objects(deployment)?;
            if objects.is_being_taken_over() {
                return Ok(());
            }
            let lives = lock(&self.cluster.lives).contains_key(deployment);
            if lives || !objects.is_empty() {
                self.live(deployment, objects.gpus(), None);
            }
            Ok(())
        }
        .boxed()
    }

    fn observe(&self) -> BoxFuture<'_, Result<Vec<Observed>, Error>> {
        std::future::ready(self.cluster.observe()).boxed()
    }

    fn log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<Option<Log>, Error>> {
        self.cluster.log(query).boxed()
    }

    fn events<'a>(
        &'a self,
        deployment: &'a DeploymentId,
    ) -> BoxFuture<'a, Result<Option<Vec<WorkloadEvent>>, Error>> {
        self.cluster.events(deployment).boxed()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.cluster.changes.subscribe()
    }
}

impl Cluster {
    fn observe(&self) -> Result<Vec<Observed>, Error> {
        // The lives first: one that ends in between has left nothing to see.
        let lives = lock(&self.lives).clone();
        let mut all = self.seen.all()?;
        let mut observed = Vec::new();
        for (deployment, life) in lives {
            let objects = all.remove(&deployment).unwrap_or_default();
            if objects.job.is_some() {
                life.note_seen();
            }
            let phase = match life.doing() {
                Doing::Starting => WorkloadPhase::Pending,
                // Unless it was started after all, and the answer was lost.
                Doing::Failed(reason) if objects.job.is_none() && objects.pods.is_empty() => {
                    WorkloadPhase::Ended {
                        exit_code: None,
                        reason,
                    }
                }
                // Made, and not shown by the watches yet.
                Doing::Started if objects.job.is_none() && !life.was_seen() => WorkloadPhase::Pending,
                Doing::Started if objects.is_empty() => WorkloadPhase::Ended {
                    exit_code: None,
                    reason: "its objects were removed".to_owned(),
                },
                Doing::Podless(reason) if objects.job.is_some() && objects.pods.is_empty() => {
                    WorkloadPhase::Ended {
                        exit_code: None,
                        reason,
                    }
                }
                Doing::Started | Doing::Failed(_) | Doing::Podless(_) => objects.phase(),
                Doing::Stopping => WorkloadPhase::Stopping,
                Doing::Gone => continue,
            };
            let gpus = life.gpus.clone();
            let status = WorkloadStatus { deployment, phase };
            observed.push(Observed { status, gpus });
        }
        // What an earlier agent started, until it is adopted.
        for (deployment, objects) in all {
            let phase = match (objects.may_have_a_job(), objects.holds_gpus()) {
                (true, false) => continue,
                // Whatever became of its Job.
                (true, true) => WorkloadPhase::Pending,
                (false, _) => objects.phase(),
            };
            let gpus = objects.gpus();
            let status = WorkloadStatus { deployment, phase };
            observed.push(Observed { status, gpus });
        }
        observed.sort_by(|a, b| a.status.deployment.cmp(&b.status.deployment));
        Ok(observed)
    }
}

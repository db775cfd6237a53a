//! What is done for one workload, in which order. One task for each workload that is begun or ended by this agent.
//!
//! ```text
//! start: Service (it says "launched"), code -> Job -> code once more
//! find:  the Job of one that was launched before
//! stop:  output and events are kept -> Job (foreground: its pods first) -> pods that are left
//!        -> nothing holds a GPU -> code, Service
//! ```
//! Each step may be repeated; an agent that dies in between leaves what the next one goes on from.
//! The code is shared by the deployments of a version. It is written before the Job, which needs it, and after it:
//! whoever removes it between looks for Jobs first, and whoever looks before the Job is there removes what comes back.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Service};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Resource, ResourceExt};
use protocol::id::{ChuteId, ChuteVersion, DeploymentId, GpuId};
use protocol::workload::{Fence, PortMapping, Secret, WorkloadPhase, WorkloadSpec};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::phase::{Objects, is_over};
use super::trouble::{Pauses, Trouble, is_conflict, is_missing};
use super::{Cluster, lock};
use crate::manifest::{self, FIELD_MANAGER, LAUNCHED_ANNOTATION};

/// How often a Service may be made anew because it was given a port of ours.
const PORT_ATTEMPTS: u32 = 20;
/// So often while a refusal is put up with, a Job's events are asked for what keeps it from making a pod.
const LOOKS_AT_EVENTS: u32 = 12;
/// A stop that does not end is complained about so often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// How far a life is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Doing {
    /// Its objects are being made.
    Starting,
    /// Its Job was made: the objects say the rest.
    Started,
    /// Its Job was made, and for this reason may have no pod.
    Podless(String),
    /// It could not be started, and never will be.
    Failed(String),
    /// Its objects are being removed.
    Stopping,
    /// Nothing is left.
    Gone,
}

/// One workload as this agent deals with it.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) deployment: DeploymentId,
    pub(super) gpus: Vec<GpuId>,
    doing: Mutex<Doing>,
    seen: AtomicBool,
    stop: watch::Sender<bool>,
}

impl Life {
    pub(super) fn new(deployment: DeploymentId, gpus: Vec<GpuId>) -> Self {
        Self {
            deployment,
            gpus,
            doing: Mutex::new(Doing::Starting),
            seen: AtomicBool::new(false),
            stop: watch::channel(false).0,
        }
    }

    pub(super) fn doing(&self) -> Doing {
        match lock(&self.doing).clone() {
            Doing::Starting | Doing::Started | Doing::Podless(_) if self.is_to_stop() => Doing::Stopping,
            doing => doing,
        }
    }

    pub(super) fn ask_to_stop(&self) {
        self.stop.send_replace(true);
    }

    /// Its Job was made by an earlier agent.
    pub(super) fn adopt(&self) {
        *lock(&self.doing) = Doing::Started;
        self.note_seen();
    }

    fn is_to_stop(&self) -> bool {
        *self.stop.borrow()
    }

    async fn stop_asked(&self) {
        // It ends only with the sender, which is ours.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Its Job was among the objects that exist; missing from now on means removed.
    pub(super) fn note_seen(&self) {
        self.seen.store(true, Ordering::Relaxed);
    }

    pub(super) fn was_seen(&self) -> bool {
        self.seen.load(Ordering::Relaxed)
    }
}

/// Lives through one workload, until nothing of it is left.
pub(super) async fn live(cluster: Arc<Cluster>, life: Arc<Life>, start: Option<(Fence, WorkloadSpec)>) {
    let work = Work {
        cluster: &cluster,
        life: &life,
        token: start.as_ref().and_then(|(_, spec)| spec.launch_token.as_ref()),
    };
    if let Some((fence, spec)) = &start
        && !life.is_to_stop()
    {
        match work.start(*fence, spec).await {
            Ok(()) | Err(Given::Stopped) => {}
            Err(Given::Up(reason)) => {
                tracing::warn!(deployment = %life.deployment, reason, "it was not started");
                work.set(Doing::Failed(reason));
            }
        }
    }
    tokio::select! {
        () = life.stop_asked() => {}
        _ = async { tokio::join!(work.until_it_has_a_pod(), work.keep_at_its_end()) } => life.stop_asked().await,
    }
    work.set(Doing::Stopping);
    work.remove().await;
    lock(&cluster.lives).remove(&life.deployment);
    work.set(Doing::Gone);
}

/// Why a start ended without a Job.
enum Given {
    Stopped,
    Up(String),
}

struct Work<'a> {
    cluster: &'a Cluster,
    life: &'a Life,
    /// Never to be logged or reported.
    token: Option<&'a Secret>,
}

impl Work<'_> {
    fn set(&self, doing: Doing) {
        *lock(&self.life.doing) = doing;
        self.cluster.changed();
    }

    /// Why a Job has no pod, while it has none: a quota, a webhook or a missing account refuse it, and only its events say
    /// so. What does not pass ends it, as the refusal of a Job does.
    async fn until_it_has_a_pod(&self) {
        let (cluster, deployment) = (self.cluster, &self.life.deployment);
        let patience = cluster.config.patience;
        let mut changes = cluster.changes.subscribe();
        let (mut since, mut next, mut told) = (None, Instant::now(), String::new());
        loop {
            let objects = cluster.seen.objects(deployment).unwrap_or_default();
            if !objects.pods.is_empty() {
                return;
            }
            // It may not be made or shown yet, or be gone.
            let waits = objects.job.is_some();
            if waits && since.is_none() {
                since = Some(Instant::now());
                next = Instant::now() + patience / LOOKS_AT_EVENTS;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = sleep_until(next), if waits => {
                    next = Instant::now() + patience / LOOKS_AT_EVENTS;
                    let Some(why) = cluster.why_it_has_no_pod(deployment).await else { continue };
                    if why != told {
                        tracing::warn!(%deployment, why, "its Job makes no pod");
                        told.clone_from(&why);
                    }
                    if since.is_some_and(|since| since.elapsed() >= patience) {
                        return self.set(Doing::Podless(why));
                    }
                }
            }
        }
    }

    /// Keeps what a workload left that has ended by itself: Kubernetes removes its pod after a while.
    async fn keep_at_its_end(&self) {
        let (cluster, deployment) = (self.cluster, &self.life.deployment);
        let mut changes = cluster.changes.subscribe();
        loop {
            let objects = cluster.seen.objects(deployment);
            let has_ended = |objects: &Objects| {
                !objects.pods.is_empty() && matches!(objects.phase(), WorkloadPhase::Ended { .. })
            };
            if objects.is_ok_and(|objects| has_ended(&objects)) {
                return cluster.keep(deployment).await;
            }
            // Its sender lives as long as the cluster.
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    async fn start(&self, fence: Fence, spec: &WorkloadSpec) -> Result<(), Given> {
        let cluster = self.cluster;
        if !spec.can_be_started() {
            return self.find(spec).await;
        }
        let settings = &cluster.config.settings;
        // Side by side: each is a call that the chute waits for.
        let (ports, written) = tokio::join!(self.ports(fence, spec), self.write_code(fence, spec, false));
        let ports = ports?;
        written?;
        let job = manifest::job(spec, fence, settings, &ports);
        let job = self.insist_on("create its Job", || create(&cluster.jobs, &job));
        ours("Job", &job.await?)?;
        self.set(Doing::Started);
        // It runs already. Without its code, its pod would say so.
        match self.write_code(fence, spec, true).await {
            Err(Given::Up(_)) | Ok(()) => Ok(()),
            stopped => stopped,
        }
    }

    /// A sealed worker's chutes get theirs from the validator.
    async fn write_code(&self, fence: Fence, spec: &WorkloadSpec, launched: bool) -> Result<(), Given> {
        let cluster = self.cluster;
        let settings = &cluster.config.settings;
        if settings.sealed {
            return Ok(());
        }
        let code = manifest::code(spec, fence, settings, launched);
        self.insist("write its code", || apply(&cluster.code, &code))
            .await
    }

    /// What was launched before is here, although the watches do not show it yet, or it has ended.
    async fn find(&self, spec: &WorkloadSpec) -> Result<(), Given> {
        let cluster = self.cluster;
        let name = manifest::job_name(&spec.deployment);
        let job = self
            .insist_on("look for its Job", || cluster.jobs.get_opt(&name))
            .await?;
        match job {
            Some(job) if manifest::is_of_node(&job, &cluster.config.settings) => {
                self.set(Doing::Started);
                Ok(())
            }
            Some(_) => Err(Given::Up(
                "it was launched before, and its Job is another miner's".to_owned(),
            )),
            None => Err(Given::Up(
                "it was launched before, and its Job is not there any more".to_owned(),
            )),
        }
    }

    /// Makes the Service, until it is given ports that are not ours.
    async fn ports(&self, fence: Fence, spec: &WorkloadSpec) -> Result<Vec<PortMapping>, Given> {
        let cluster = self.cluster;
        let service = manifest::service(spec, fence, &cluster.config.settings);
        for _ in 0..PORT_ATTEMPTS {
            let made = self.claim(&service).await?;
            let ports = manifest::node_ports(spec, &made)
                .ok_or_else(|| Given::Up("its Service was given no node ports".to_owned()))?;
            let reserved = &cluster.config.reserved_ports;
            if !ports.iter().any(|port| reserved.contains(&port.external)) {
                return Ok(ports);
            }
            self.insist("make its Service anew", || remove(&cluster.services, &made))
                .await?;
        }
        let why = format!(
            "each of {PORT_ATTEMPTS} Services was given a port of the agent's own: give the API server more node ports, \
             and a range without these (--service-node-port-range)"
        );
        Err(Given::Up(why))
    }

    /// Makes the Service. Whoever has one of this name has the deployment: a miner makes it first and removes it last.
    async fn claim(&self, service: &Service) -> Result<Service, Given> {
        let services = &self.cluster.services;
        let made = self.insist_on("make its Service", || create(services, service));
        let made = made.await?;
        ours("Service", &made)?;
        if made.annotations().contains_key(LAUNCHED_ANNOTATION) {
            return Ok(made);
        }
        // An agent that marked it later was before this one.
        self.insist_on("note the launch", || apply(services, service))
            .await
    }

    async fn insist<F, T>(&self, what: &str, call: impl Fn() -> F) -> Result<(), Given>
    where
        F: Future<Output = kube::Result<T>>,
    {
        self.insist_on(what, call).await.map(|_| ())
    }

    /// Repeats a call while that may help. A stop is noticed between calls, never in the middle of one.
    async fn insist_on<F, T>(&self, what: &str, call: impl Fn() -> F) -> Result<T, Given>
    where
        F: Future<Output = kube::Result<T>>,
    {
        let mut pauses = Pauses::new();
        let mut refused_since = None;
        loop {
            if self.life.is_to_stop() {
                return Err(Given::Stopped);
            }
            let trouble = match self.call(call()).await {
                Ok(done) => return Ok(done),
                Err(trouble) => trouble,
            };
            tracing::warn!(deployment = %self.life.deployment, what, ?trouble, "the API server did not do it");
            match trouble {
                Trouble::Invalid(why) => return Err(Given::Up(format!("{what}: {why}"))),
                Trouble::Refused(why) => {
                    let since = *refused_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= self.cluster.config.patience {
                        return Err(Given::Up(format!("{what}: {why}")));
                    }
                }
                Trouble::Unreachable(_) => refused_since = None,
            }
            tokio::select! {
                () = pauses.pause() => {}
                () = self.life.stop_asked() => return Err(Given::Stopped),
            }
        }
    }

    async fn call<T>(&self, call: impl Future<Output = kube::Result<T>>) -> Result<T, Trouble> {
        match timeout(self.cluster.config.call_timeout, call).await {
            Ok(result) => result.map_err(|error| match self.token {
                Some(token) => Trouble::of(&error).without(token.reveal()),
                None => Trouble::of(&error),
            }),
            Err(_) => Err(Trouble::Unreachable("no answer in time".to_owned())),
        }
    }

    /// Removes all objects, however long it takes; what is being taken over is left alone.
    async fn remove(&self) {
        // Also when it was kept at its end: the node may not have answered then.
        self.cluster.keep(&self.life.deployment).await;
        let (mut pauses, mut changes) = (Pauses::new(), self.cluster.changes.subscribe());
        let mut complained = Instant::now();
        loop {
            let seen = self.cluster.seen.objects(&self.life.deployment);
            if seen.is_ok_and(|seen| seen.is_being_taken_over()) {
                return;
            }
            let waits = match self.remove_once().await {
                Ok(None)
                    if self
                        .cluster
                        .seen
                        .objects(&self.life.deployment)
                        .is_ok_and(|seen| seen.is_empty()) =>
                {
                    return;
                }
                Ok(None) => "the watches show it still".to_owned(),
                Ok(Some(waits)) => waits,
                Err(Trouble::Unreachable(why) | Trouble::Refused(why) | Trouble::Invalid(why)) => why,
            };
            if complained.elapsed() >= COMPLAIN_EVERY {
                complained = Instant::now();
                tracing::warn!(deployment = %self.life.deployment, waits, "it is not removed yet");
            }
            tokio::select! {
                _ = changes.changed() => pauses = Pauses::new(),
                () = pauses.pause() => {}
            }
        }
    }

    /// One step towards removal; what it waits for, or nothing when all is gone. It asks the API server and not the
    /// watches, which may be behind.
    async fn remove_once(&self) -> Result<Option<String>, Trouble> {
        let (cluster, deployment) = (self.cluster, &self.life.deployment);
        let job = self
            .call(cluster.jobs.get_opt(&manifest::job_name(deployment)))
            .await?;
        if job.as_ref().is_some_and(|job| manifest::fence_of(job).is_none()) {
            // Another miner's. A Service that was made here is ours, and not one that is only being handed over.
            let made_here = |fence| fence != Fence::default();
            return self.remove_service(made_here).await.map(|()| None);
        }
        if let Some(job) = &job
            && job.metadata.deletion_timestamp.is_none()
        {
            self.call(remove(&cluster.jobs, job)).await?;
            return Ok(Some("the Job is being removed".to_owned()));
        }
        let ours = ListParams::default().labels(&manifest::deployment_selector(deployment));
        let pods = self.call(cluster.pods.list(&ours)).await?.items;
        if job.is_none() {
            // Its Job was removed without them.
            for pod in pods
                .iter()
                .filter(|pod| pod.metadata.deletion_timestamp.is_none())
            {
                self.call(remove(&cluster.pods, pod)).await?;
            }
        }
        if let Some(pod) = pods.iter().find(|pod| !is_over(pod)).or(pods.first()) {
            return Ok(Some(waits_for("pod", pod)));
        }
        if let Some(job) = &job {
            return Ok(Some(waits_for("Job", job)));
        }
        self.remove_service(|_| true).await.map(|()| None)
    }

    /// Removes the Service, and the code unless another Job needs it. Another miner's are left alone.
    async fn remove_service(&self, is_ours: impl Fn(Fence) -> bool) -> Result<(), Trouble> {
        let services = &self.cluster.services;
        let name = manifest::service_name(&self.life.deployment);
        let service = self.call(services.get_opt(&name)).await?;
        let Some(service) = service.filter(|service| manifest::fence_of(service).is_some_and(is_ours)) else {
            return Ok(());
        };
        if let Some((chute, version)) = manifest::version_of(&service) {
            self.remove_code(&chute, &version).await?;
        }
        self.call(remove(services, &service)).await
    }

    /// Removes a version's code once no Job needs it. What another miner wrote under this name has no label of ours.
    async fn remove_code(&self, chute: &ChuteId, version: &ChuteVersion) -> Result<(), Trouble> {
        let cluster = self.cluster;
        let code: Option<ConfigMap> = self
            .call(cluster.code.get_opt(&manifest::code_name(chute, version)))
            .await?;
        let Some(code) = code.filter(manifest::is_code) else {
            return Ok(());
        };
        let users = ListParams::default().labels(&manifest::version_selector(chute, version));
        if self.call(cluster.jobs.list(&users)).await?.items.is_empty() {
            let unchanged = Preconditions {
                uid: code.uid(),
                resource_version: code.resource_version(),
            };
            let parameters = DeleteParams {
                preconditions: Some(unchanged),
                ..DeleteParams::default()
            };
            let name = code.name_any();
            let deleted = async { gone(cluster.code.delete(&name, &parameters).await.map(|_| ())) };
            self.call(deleted).await?;
        }
        Ok(())
    }
}

/// Refuses what another miner made under a name of ours.
fn ours(kind: &str, object: &impl ResourceExt) -> Result<(), Given> {
    match manifest::fence_of(object) {
        Some(_) => Ok(()),
        None => Err(Given::Up(format!(
            "the {kind} {} is another miner's",
            object.name_any()
        ))),
    }
}

/// What keeps an object that is to go.
fn waits_for<K: Resource>(kind: &str, object: &K) -> String {
    let finalizers = object.meta().finalizers.clone().unwrap_or_default();
    let name = object.meta().name.clone().unwrap_or_default();
    format!("{kind} {name} is still there, finalizers {finalizers:?}")
}

async fn apply<K>(api: &Api<K>, object: &K) -> kube::Result<K>
where
    K: Resource + Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    api.patch(&object.name_any(), &parameters, &Patch::Apply(object))
        .await
}

/// Creates an object, or gives the one that is there already under this name: this one, if an answer was lost.
async fn create<K>(api: &Api<K>, object: &K) -> kube::Result<K>
where
    K: Resource + Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    let parameters = PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    match api.create(&parameters, object).await {
        Err(error) if is_conflict(&error) => api.get(&object.name_any()).await,
        result => result,
    }
}

/// Removes this very object. One that took its place meanwhile is left alone. A Job goes after its pods.
async fn remove<K>(api: &Api<K>, object: &K) -> kube::Result<()>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let parameters = if K::kind(&()) == "Job" {
        DeleteParams::foreground()
    } else {
        DeleteParams::background()
    };
    let this = Preconditions {
        uid: object.uid(),
        resource_version: None,
    };
    let parameters = parameters.preconditions(this);
    gone(api.delete(&object.name_any(), &parameters).await.map(|_| ()))
}

/// What is not there, or is another one by now, was removed.
fn gone(result: kube::Result<()>) -> kube::Result<()> {
    match result {
        Err(error) if is_missing(&error) || is_conflict(&error) => Ok(()),
        result => result,
    }
}

//! The objects of this node that exist, kept by watches: nothing here is polled.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt as _, StreamExt as _};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::runtime::reflector::{Lookup, Store};
use kube::runtime::{WatchStreamExt as _, reflector, watcher};
use kube::{Api, Resource, ResourceExt};
use protocol::id::DeploymentId;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::phase::{Objects, why_it_waits};
use super::trouble::Pauses;
use crate::Error;
use crate::manifest::{DEPLOYMENT_LABEL, Settings, job_name, node_selector, service_name};

/// Watches that fail are complained about so often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

pub(super) struct Seen {
    jobs: Store<Job>,
    pods: Store<Pod>,
    services: Store<Service>,
}

impl Seen {
    /// Starts the watches; each change is counted.
    pub(super) fn start(
        (jobs, pods, services): (&Api<Job>, &Api<Pod>, &Api<Service>),
        settings: &Settings,
        changes: &watch::Sender<u64>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let selector = node_selector(settings);
        Self {
            jobs: keep(jobs, &selector, changes, tasks),
            pods: keep(pods, &selector, changes, tasks),
            services: keep(services, &selector, changes, tasks),
        }
    }

    /// All that exists, by deployment.
    ///
    /// # Errors
    /// [`Error::Unknown`] until each kind was listed once.
    pub(super) fn all(&self) -> Result<BTreeMap<DeploymentId, Objects>, Error> {
        // Jobs before pods: a Job whose pods are not there yet waits, pods without a Job would be taken for remains.
        let (jobs, pods, services) = (listed(&self.jobs)?, listed(&self.pods)?, listed(&self.services)?);
        let mut all: BTreeMap<DeploymentId, Objects> = BTreeMap::new();
        for job in jobs {
            if let Some(deployment) = owner(&*job, job_name) {
                all.entry(deployment).or_default().job = Some(job);
            }
        }
        for service in services {
            if let Some(deployment) = owner(&*service, service_name) {
                all.entry(deployment).or_default().service = Some(service);
            }
        }
        for pod in pods {
            // Whoever made it: it may hold what the deployment was given.
            if let Some(deployment) = deployment_of(&*pod) {
                let objects = all.entry(deployment).or_default();
                objects.pods.insert(pod.name_any(), pod);
            }
        }
        Ok(all)
    }

    /// What exists of one deployment.
    ///
    /// # Errors
    /// As [`Self::all`].
    pub(super) fn objects(&self, deployment: &DeploymentId) -> Result<Objects, Error> {
        Ok(self.all()?.remove(deployment).unwrap_or_default())
    }
}

fn listed<K>(store: &Store<K>) -> Result<Vec<Arc<K>>, Error>
where
    K: Lookup + Clone + 'static,
    K::DynamicType: Eq + std::hash::Hash + Clone,
{
    // Only asked, never awaited: of several that wait, the store wakes the last one.
    if store.wait_until_ready().now_or_never().is_none() {
        return Err(Error::Unknown("the API server has not listed it yet".to_owned()));
    }
    Ok(store.state())
}

fn deployment_of(object: &impl ResourceExt) -> Option<DeploymentId> {
    DeploymentId::parse(object.labels().get(DEPLOYMENT_LABEL)?).ok()
}

/// The deployment of an object that bears the name which we give.
fn owner(object: &impl ResourceExt, name: fn(&DeploymentId) -> String) -> Option<DeploymentId> {
    let deployment = deployment_of(object)?;
    (object.name_any() == name(&deployment)).then_some(deployment)
}

fn keep<K>(api: &Api<K>, selector: &str, changes: &watch::Sender<u64>, tasks: &mut JoinSet<()>) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let events = watcher(api.clone(), watcher::Config::default().labels(selector));
    let events = events.backoff(Pauses::new()).reflect(writer);
    let (changes, what) = (changes.clone(), std::any::type_name::<K>());
    tasks.spawn(async move {
        let mut events = std::pin::pin!(events);
        let mut complained: Option<Instant> = None;
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
                Ok(watcher::Event::Apply(object)) => {
                    explain(&object);
                    changes.send_modify(|count| *count += 1);
                }
                Ok(watcher::Event::Delete(_) | watcher::Event::InitDone) => {
                    changes.send_modify(|count| *count += 1);
                }
                Err(error) => {
                    if complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
                        complained = Some(Instant::now());
                        tracing::warn!(what, %error, "the API server cannot be watched; trying on");
                    }
                }
            }
        }
    });
    store
}

/// Says why a pod waits: its phase alone does not.
fn explain<K: 'static>(object: &K) {
    let Some(pod) = (object as &dyn std::any::Any).downcast_ref::<Pod>() else {
        return;
    };
    if let (Some(deployment), Some((reason, message))) = (deployment_of(pod), why_it_waits(pod)) {
        tracing::warn!(%deployment, reason, message, "its pod does not start");
    }
}

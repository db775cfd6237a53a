//! The original miner's objects in the cluster: listed by their label, and given labels and annotations. Nothing else of
//! them is ever written, so that they stay the objects which they are.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Resource, ResourceExt};
use runtime::manifest::{
    DEPLOYMENT_LABEL, FENCE_ANNOTATION, FIELD_MANAGER, GPUS_ANNOTATION, LAUNCHED_ANNOTATION, NODE_LABEL,
    PORTS_ANNOTATION,
};
use serde::de::DeserializeOwned;
use serde_json::json;

/// Annotations that make an object ours.
const MARKS: [&str; 4] = [
    FENCE_ANNOTATION,
    GPUS_ANNOTATION,
    LAUNCHED_ANNOTATION,
    PORTS_ANNOTATION,
];

/// What the original labels with a deployment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Objects {
    pub(crate) jobs: Vec<Job>,
    pub(crate) services: Vec<Service>,
    pub(crate) pods: Vec<Pod>,
}

/// Which kind of object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Job,
    Service,
    Pod,
}

/// One of them. Another of the same name that came later is not meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Object {
    kind: Kind,
    name: String,
    uid: String,
}

impl Object {
    pub(crate) fn of(kind: Kind, object: &impl ResourceExt) -> Self {
        Self {
            kind,
            name: object.name_any(),
            // Those that were listed have one.
            uid: object.uid().unwrap_or_default(),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.kind, self.name)
    }
}

impl Objects {
    /// Those that an agent of ours would take for its own.
    pub(crate) fn marked(&self) -> Vec<Object> {
        fn of<K: ResourceExt>(kind: Kind, objects: &[K]) -> impl Iterator<Item = Object> {
            let is_marked = |object: &&K| object.labels().contains_key(NODE_LABEL);
            objects
                .iter()
                .filter(is_marked)
                .map(move |object| Object::of(kind, object))
        }
        let jobs = of(Kind::Job, &self.jobs);
        let services = of(Kind::Service, &self.services);
        jobs.chain(services).chain(of(Kind::Pod, &self.pods)).collect()
    }
}

/// Labels and annotations that an object lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) object: Object,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
}

/// The namespace of the chutes.
#[derive(Debug)]
pub(crate) struct Cluster {
    jobs: Api<Job>,
    services: Api<Service>,
    pods: Api<Pod>,
    namespace: String,
    nodes: Api<Node>,
    everywhere: Api<Pod>,
}

impl Cluster {
    pub(crate) async fn open(kubeconfig: Option<&Path>, namespace: &str) -> Result<Self> {
        let client = runtime::kubernetes::client(kubeconfig).await;
        let client = client.context("open the original miner's cluster; --kubeconfig names its file")?;
        Ok(Self {
            jobs: Api::namespaced(client.clone(), namespace),
            services: Api::namespaced(client.clone(), namespace),
            pods: Api::namespaced(client.clone(), namespace),
            namespace: namespace.to_owned(),
            nodes: Api::all(client.clone()),
            everywhere: Api::all(client),
        })
    }

    /// All objects of deployments.
    pub(crate) async fn list(&self) -> Result<Objects> {
        Ok(Objects {
            jobs: self.all(&self.jobs, "Jobs").await?,
            services: self.all(&self.services, "Services").await?,
            pods: self.all(&self.pods, "pods").await?,
        })
    }

    async fn all<K>(&self, api: &Api<K>, what: &str) -> Result<Vec<K>>
    where
        K: Resource + Clone + fmt::Debug + DeserializeOwned,
    {
        let listed = api.list(&ListParams::default().labels(DEPLOYMENT_LABEL)).await;
        let listed = listed.with_context(|| {
            let namespace = &self.namespace;
            format!(
                "cannot list the {what} of the namespace {namespace}; are --kubeconfig and --namespace right?"
            )
        })?;
        Ok(listed.items)
    }

    /// Ids of the cluster's nodes by their names.
    pub(crate) async fn nodes(&self) -> Result<BTreeMap<String, String>> {
        let listed = self.nodes.list_metadata(&ListParams::default()).await;
        let listed = listed.context("cannot list the nodes of the cluster; is --kubeconfig right?")?;
        let named = listed.items.iter();
        Ok(named
            .filter_map(|node| Some((node.name_any(), node.uid()?)))
            .collect())
    }

    /// Pods with these labels, in any namespace.
    pub(crate) async fn pods_with(&self, labels: &str) -> Result<Vec<String>> {
        let listed = self
            .everywhere
            .list_metadata(&ListParams::default().labels(labels))
            .await;
        let listed = listed.context("cannot list the pods of the cluster; is --kubeconfig right?")?;
        let pods = listed.items.iter();
        Ok(pods
            .map(|pod| format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()))
            .collect())
    }

    /// Takes our marks off an object, unless it was replaced or went meanwhile.
    pub(crate) async fn release(&self, object: &Object) -> Result<()> {
        let annotations: BTreeMap<&str, ()> = MARKS.iter().map(|name| (*name, ())).collect();
        let metadata = json!({ "labels": { NODE_LABEL: null }, "annotations": annotations });
        let written = self.patch(object, metadata).await;
        written.with_context(|| format!("cannot release the {object}; what is there now? Run it again"))
    }

    /// Writes a mark, unless its object was replaced or went meanwhile.
    pub(crate) async fn write(&self, mark: &Mark) -> Result<()> {
        let metadata = json!({ "labels": mark.labels, "annotations": mark.annotations });
        let written = self.patch(&mark.object, metadata).await;
        written.with_context(|| format!("cannot mark the {}; what is there now? Run it again", mark.object))
    }

    async fn patch(&self, object: &Object, mut metadata: serde_json::Value) -> kube::Result<()> {
        // With another uid than that of the object the API server refuses it.
        metadata["uid"] = json!(object.uid);
        let patch = Patch::Merge(json!({ "metadata": metadata }));
        let how = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let name = &object.name;
        match object.kind {
            Kind::Job => self.jobs.patch_metadata(name, &how, &patch).await.map(drop),
            Kind::Service => self.services.patch_metadata(name, &how, &patch).await.map(drop),
            Kind::Pod => self.pods.patch_metadata(name, &how, &patch).await.map(drop),
        }
    }
}

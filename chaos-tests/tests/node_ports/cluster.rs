//! A real cluster of one node: control plane and kube-proxy in the node's network, Services that take NodePorts, and
//! the one pod to which all of them lead.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use kubernetes_control_plane::{ControlPlane, Settings};
use serde_json::json;

use crate::until;

pub(crate) const NODE: &str = "host-1";
/// Where the pod is, and its port.
pub(crate) const POD: &str = "10.42.0.7";
pub(crate) const POD_PORT: u16 = 8000;
/// Of the Services that take ports.
const NAMESPACE: &str = "others";
/// Of the agent's chutes.
const CHUTES: &str = "chutes";

pub(crate) struct Cluster {
    plane: ControlPlane,
}

impl Cluster {
    /// Starts it in the network of this thread.
    pub(crate) async fn start(programs: PathBuf, range: &'static str, address: &str) -> Self {
        let settings = Settings {
            node_ports: range,
            proxy_of: Some(NODE),
            ..Settings::default()
        };
        let plane = ControlPlane::start(programs, settings).await;
        let plane = plane.expect("a control plane with kube-proxy");
        let cluster = Self { plane };
        for name in [NAMESPACE, CHUTES] {
            cluster
                .create::<Namespace>(&cluster.all(), json!({ "metadata": { "name": name } }))
                .await;
        }
        // What the kubelet would say of the node.
        let nodes: Api<Node> = cluster.all();
        cluster
            .create(&nodes, json!({ "metadata": { "name": NODE } }))
            .await;
        let addresses = json!([{ "type": "InternalIP", "address": address }]);
        let status = Patch::Merge(json!({ "status": { "addresses": addresses } }));
        let told = nodes.patch_status(NODE, &PatchParams::default(), &status).await;
        told.expect("the API server works");
        cluster
    }

    fn all<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::ClusterResourceScope, DynamicType = ()>,
    {
        Api::all(self.plane.client.clone())
    }

    fn of<K>(&self, namespace: &str) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.plane.client.clone(), namespace)
    }

    async fn create<K>(&self, api: &Api<K>, object: serde_json::Value)
    where
        K: Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
    {
        let object = serde_json::from_value(object).expect("an object of this kind");
        let created = api.create(&PostParams::default(), &object).await;
        created.expect("the API server takes it");
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.plane.kubeconfig()
    }

    /// Starts API server and kube-proxy anew, with other NodePorts.
    pub(crate) async fn start_again_with(&mut self, range: &'static str) {
        self.plane.kill_server().await.expect("it runs");
        self.plane.set_node_ports(range);
        self.plane.start_server().await.expect("it starts again");
    }

    /// The NodePorts that all Services have.
    async fn given(&self) -> Vec<u16> {
        let services: Api<Service> = Api::all(self.plane.client.clone());
        let services = services.list(&ListParams::default()).await;
        let services = services.expect("the API server works");
        let ports = services
            .iter()
            .filter_map(|service| service.spec.as_ref()?.ports.as_ref());
        let ports = ports.flatten().filter_map(|port| port.node_port);
        ports.filter_map(|port| u16::try_from(port).ok()).collect()
    }

    /// Takes all NodePorts but the last so many of those that nobody has, by one Service: each leads to the pod.
    pub(crate) async fn take_all_but(&self, free: usize, range: RangeInclusive<u16>) -> Vec<u16> {
        let given = self.given().await;
        let mut ports: Vec<u16> = range.filter(|port| !given.contains(port)).collect();
        ports.truncate(ports.len() - free);
        let name = format!("from-{}", ports[0]);
        let wanted = ports.iter().map(
            |port| json!({ "name": format!("p{port}"), "port": port, "nodePort": port, "targetPort": POD_PORT }),
        );
        let spec = json!({ "type": "NodePort", "externalTrafficPolicy": "Local",
            "ports": wanted.collect::<Vec<_>>() });
        let service = json!({ "metadata": { "name": name }, "spec": spec });
        self.create::<Service>(&self.of(NAMESPACE), service).await;
        let lead = ports
            .iter()
            .map(|port| json!({ "name": format!("p{port}"), "port": POD_PORT, "protocol": "TCP" }));
        // What a controller would write if the pod were one of the API server.
        let slice = json!({
            "metadata": { "name": name, "labels": { "kubernetes.io/service-name": name } },
            "addressType": "IPv4",
            "ports": lead.collect::<Vec<_>>(),
            "endpoints": [{ "addresses": [POD], "nodeName": NODE, "conditions": { "ready": true } }],
        });
        self.create::<EndpointSlice>(&self.of(NAMESPACE), slice).await;
        ports
    }

    /// Fails unless each NodePort is taken: nobody can have another one.
    pub(crate) async fn must_be_full(&self, range: RangeInclusive<u16>) {
        let given = self.given().await;
        let left: Vec<u16> = range.filter(|port| !given.contains(port)).collect();
        assert!(left.is_empty(), "not taken: {left:?}");
        let further = json!({ "metadata": { "name": "further" },
            "spec": { "type": "NodePort", "ports": [{ "port": 1 }] } });
        let further = serde_json::from_value(further).expect("a Service");
        let services: Api<Service> = self.of(NAMESPACE);
        let refused = services.create(&PostParams::default(), &further).await;
        let why = refused.expect_err("there is no port for it").to_string();
        assert!(why.contains("range is full"), "{why}");
    }

    /// The image of a pod that was made after so many others of the agent, by the name that the agent gave it.
    pub(crate) async fn image_of_pod_after(&self, others: usize) -> String {
        let pods: Api<Pod> = self.of(CHUTES);
        let pod = until("a pod for the chute", async || {
            let pods = pods.list(&ListParams::default()).await.ok()?;
            let mut pods = pods.items;
            pods.sort_by_key(|pod| pod.creation_timestamp().map(|time| time.0));
            pods.into_iter().nth(others)
        })
        .await;
        let image = pod
            .spec
            .and_then(|spec| spec.containers.into_iter().next()?.image);
        image.expect("a container with an image")
    }

    /// Ends all of its processes.
    pub(crate) async fn stop(self) {
        self.plane.stop().await.expect("it runs");
    }
}

//! The Helm chart on a real API server: what it installs, and what the agent's service account may and may not do.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Secret, Service};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::{conditions, wait::await_condition};
use kube::{Api, Client};
use protocol::workload::WorkloadSpec;
use runtime::kubernetes::Kubernetes;
use runtime::manifest::{self, Settings, job_name, service_name};
use serde_json::{Value, json};

use crate::control_plane::{ControlPlane, Space, until_known};
use crate::kubernetes::{spec, start, stop};
use crate::support::{FENCE, write_line};

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../charts/chutes-miner");
const MINER: &str = "miner";
const CHUTES: &str = "chutes-installed";
const ACCOUNT: &str = "gpu-chutes-miner";
const HOTKEY: &str = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY";

fn object<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).expect("a good object")
}

/// Installs the chart, and looks at it from all sides.
pub(crate) async fn chart(plane: &ControlPlane) {
    kinds_of_prometheus(plane).await;
    every_set_of_values(plane).await;
    let nodes: Api<Node> = Api::all(plane.client.clone());
    for name in ["node-1", "node-2"] {
        let node = object(json!({ "metadata": { "name": name } }));
        nodes
            .create(&PostParams::default(), &node)
            .await
            .expect("it works");
    }
    let namespace = format!("runtime.namespace={CHUTES}");
    let hotkey = format!("miner.hotkey={HOTKEY}");
    let values = [&namespace, &hotkey, "cluster.tokenSecret=invitation"];
    let found: Vec<&str> = values.into_iter().chain(["cluster.found=true"]).collect();
    let release = ("gpu", CHART);
    let refused = plane.install(release, MINER, &found).await;
    assert!(
        refused.is_err_and(|why| why.contains("would found a cluster of its own")),
        "each node would be the first"
    );
    for what in ["it installs", "it upgrades"] {
        plane.install(release, MINER, &values).await.expect(what);
    }

    // Nobody runs its pod here: the API server takes it, and it waits.
    let test = ["test", "gpu", "--namespace", MINER, "--timeout", "1s"];
    assert!(plane.helm(&test).await.is_err());
    let pods: Api<Pod> = Api::namespaced(plane.client.clone(), MINER);
    let now = DeleteParams::default().grace_period(0);
    let deleted = pods.delete("gpu-chutes-miner-test-ready", &now).await;
    deleted.expect("it is there");
    Box::pin(what_an_agent_may(plane, ACCOUNT)).await;
    plane
        .helm(&["uninstall", "gpu", "--namespace", MINER])
        .await
        .expect("it goes");
    let shared = format!("cluster.shared=true,miner.seedSecret=seed,{namespace},{hotkey}");
    for what in ["it installs for a shared cluster", "it upgrades"] {
        plane.install(release, MINER, &[&shared]).await.expect(what);
    }
    for kind in ["members", "hosts"] {
        Box::pin(what_an_agent_may(plane, &format!("{ACCOUNT}-{kind}"))).await;
    }
    plane
        .helm(&["uninstall", "gpu", "--namespace", MINER])
        .await
        .expect("it goes");
    let sets: Api<DaemonSet> = Api::namespaced(plane.client.clone(), MINER);
    assert!(
        sets.list(&ListParams::default())
            .await
            .expect("it answers")
            .items
            .is_empty()
    );
    let namespaces: Api<Namespace> = Api::all(plane.client.clone());
    let kept = namespaces.get_opt(CHUTES).await.expect("it answers");
    assert!(
        kept.is_some_and(|kept| kept.metadata.deletion_timestamp.is_none()),
        "chutes outlive a release"
    );
}

/// What the agent of a node does with the rights of its account, and what it must not do.
async fn what_an_agent_may(plane: &ControlPlane, account: &str) {
    let client = agent_on(plane, "node-1", account).await;
    let operator = plane.space(CHUTES).await;
    let before = operator.remains().await;
    let space = operator.with_client(client.clone());
    let mut elsewhere = Settings::for_node("node-2");
    elsewhere.namespace.clone_from(&operator.name);
    let foreign = manifest::job(&spec(&format!("elsewhere-{account}")), FENCE, &elsewhere, &[]);
    space.until_refused(&foreign).await;
    let mut config = operator.config("node-1");
    config.reserved_ports.clear();
    let runtime = Kubernetes::start(client.clone(), config);
    until_known(&runtime).await;
    let running = spec(&format!("installed-{account}"));
    start(&operator, &runtime, &running).await;
    let refused = Box::pin(forbidden(&client, &operator, &running, account)).await;
    write_line(&format!(
        "kubernetes: {refused} forbidden actions of {account} were refused"
    ));
    assert!(refused >= 20, "{refused}");
    stop(&runtime, &running).await;
    drop(space);
    assert_eq!(operator.remains().await, before);
}

/// The kinds of the Prometheus operator, as far as the API server needs to know them: what is in such an object is not
/// checked.
async fn kinds_of_prometheus(plane: &ControlPlane) {
    let definitions: Api<CustomResourceDefinition> = Api::all(plane.client.clone());
    for kind in ["ServiceMonitor", "PrometheusRule"] {
        let singular = kind.to_lowercase();
        let name = format!("{singular}s.monitoring.coreos.com");
        let anything = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
        let definition = object(json!({
            "metadata": { "name": name },
            "spec": {
                "group": "monitoring.coreos.com",
                "scope": "Namespaced",
                "names": { "plural": format!("{singular}s"), "singular": singular, "kind": kind },
                "versions": [{
                    "name": "v1",
                    "served": true,
                    "storage": true,
                    "schema": { "openAPIV3Schema": anything },
                }],
            },
        }));
        let created = definitions.create(&PostParams::default(), &definition).await;
        created.expect("a good definition");
        let known = await_condition(definitions.clone(), &name, conditions::is_crd_established());
        known.await.expect("the API server takes it");
    }
}

/// Each documented setting is taken by the templates and by the API server; what is misspelt is refused.
async fn every_set_of_values(plane: &ControlPlane) {
    let digest = format!("image.digest=sha256:{}", "a".repeat(64));
    let hotkey = format!("miner.hotkey={HOTKEY}");
    let good: &[&[&str]] = &[
        &[],
        &[
            "host.enabled=false",
            "coordinator.enabled=true",
            "miner.seedSecret=seed",
            "cluster.found=true",
            &hotkey,
        ],
        &[
            "runtime.createNamespace=false",
            "networkPolicy.enabled=false",
            "settings.coordinator\\.found_observing=true",
            "coordinator.enabled=true",
            "coordinator.advertise=192.0.2.1:4433",
            "minerApi.listen=[::1]:32000",
        ],
        &[
            "cluster.tokenSecret=invitation",
            "host.address=192.0.2.1",
            "host.site=somewhere",
            &digest,
        ],
        &[
            "image.tag=1.0.0",
            "image.pullSecret=regcred",
            "agent.runtimeClass=",
            "proof.backend=cpu",
        ],
        &[
            "coordinator.enabled=true",
            "metrics.enabled=true",
            "metrics.hostPort=19464",
            "metrics.memberPort=19465",
            "metrics.serviceMonitor=true",
            "metrics.rules=true",
            "metrics.dashboard=true",
            "metrics.labels.release=prometheus",
        ],
        &["metrics.enabled=true", "host.enabled=false"],
        &[
            "networkPolicy.enabled=false",
            "admissionPolicy.enabled=false",
            "podDisruptionBudget.minAvailable=2",
        ],
        &[
            "packetFilter.enabled=true",
            "packetFilter.trustedNamespaces={kube-system,default}",
            "packetFilter.networks={10.42.0.0/16,fd00:42::/48}",
            "settings.packet_filter\\.open=[\"udp/53\"]",
        ],
        &["packetFilter.remove=true"],
        &[
            "agent.priorityClass.create=false",
            "agent.priorityClass.name=system-node-critical",
        ],
        &[
            "settings.log\\.level=debug",
            "settings.backup\\.keep=5",
            "agent.nodeSelector.gpu=here",
        ],
        &["cluster.shared=true", "miner.seedSecret=seed", &hotkey],
        &[
            "cluster.shared=true",
            "miner.seedSecret=seed",
            &hotkey,
            "coordinator.chutes=false",
            "coordinator.nodeSelector.role=member",
            "agent.nodeSelector.gpu=here",
            "podDisruptionBudget.minAvailable=2",
            "metrics.enabled=true",
            "metrics.serviceMonitor=true",
            "host.addresses.gpu-1=203.0.113.7",
            "runtime.namespace=default",
        ],
        &[
            "cluster.shared=true",
            "miner.seedSecret=seed",
            &hotkey,
            "host.enabled=false",
            "packetFilter.enabled=true",
            "admissionPolicy.enabled=false",
            "networkPolicy.enabled=false",
        ],
        &[
            "runtime.namespace=default",
            "cache.directory=/srv/cache",
            "data.directory=/srv/agent",
        ],
    ];
    for values in good {
        let dry = [
            "install",
            "dry",
            CHART,
            "--namespace",
            "default",
            "--dry-run=server",
        ];
        let set = values.iter().flat_map(|value| ["--set", *value]);
        let arguments: Vec<&str> = dry.into_iter().chain(set).collect();
        let done = plane.helm(&arguments).await;
        assert!(done.is_ok(), "{values:?}: {done:?}");
        let lint: Vec<&str> = ["lint", "--strict", CHART]
            .into_iter()
            .chain(arguments[6..].iter().copied())
            .collect();
        let done = plane.helm(&lint).await;
        assert!(done.is_ok(), "{values:?}: {done:?}");
    }
    let bad = [
        ("minerApi.lisen=127.0.0.1:1", "lisen"),
        ("hosts.enabled=true", "hosts"),
        ("image.tag=latest", "tag"),
        ("miner.hotkey=5abc", "hotkey"),
        ("proof.port=70000", "port"),
        ("host.addresses.gpu-1=", "addresses"),
        ("metrics.port=9464", "port"),
        ("packetFilter.networks={10.42}", "networks"),
    ];
    for (value, named) in bad {
        let refused = plane.helm(&["template", "bad", CHART, "--set", value]).await;
        assert!(refused.is_err_and(|why| why.contains(named)), "{value}");
    }
    // What makes no sense where nodes enter by themselves, or would hand out the seed.
    let shared = format!("cluster.shared=true,miner.seedSecret=seed,{hotkey}");
    let unguarded = "coordinator.nodeSelector.node-restriction\\.kubernetes\\.io/chutes-member=null,\
                     coordinator.nodeSelector.role=member";
    for (values, named) in [
        ("miner.hotkey=", "miner.hotkey is missing"),
        ("miner.seedSecret=", "miner.seedSecret is missing"),
        ("cluster.found=true", "cluster.found"),
        ("cluster.tokenSecret=token", "cluster.tokenSecret"),
        ("coordinator.advertise=192.0.2.1:4433", "coordinator.advertise"),
        ("host.address=192.0.2.1", "host.address"),
        (unguarded, "cannot give to itself"),
    ] {
        let arguments = ["template", "bad", CHART, "--set", &shared, "--set", values];
        let refused = plane.helm(&arguments).await;
        assert!(
            refused.as_ref().is_err_and(|why| why.contains(named)),
            "{values}: {refused:?}"
        );
    }
}

/// A client with the token that the agent's pod on a node is given.
async fn agent_on(plane: &ControlPlane, node: &str, account: &str) -> Client {
    let pods: Api<Pod> = Api::namespaced(plane.client.clone(), MINER);
    let pod = object(json!({
        "metadata": { "name": format!("{account}-{node}") },
        "spec": { "serviceAccountName": account, "nodeName": node, "containers": [{ "name": "agent", "image": "a" }] },
    }));
    let pod = pods.create(&PostParams::default(), &pod).await.expect("it works");
    let token = plane.token_of(&pod, &[]).await.expect("it was given");
    plane.client_of(&token).expect("a good configuration")
}

/// Tries what an agent must not be able to do; how much of it was refused. All of it must be.
async fn forbidden(client: &Client, operator: &Space, own: &WorkloadSpec, account: &str) -> usize {
    let other = spec(&format!("of-node-2-{account}"));
    let settings = |node: &str| {
        let mut settings = Settings::for_node(node);
        settings.namespace.clone_from(&operator.name);
        settings
    };
    let post = PostParams::default();
    let foreign_job = manifest::job(&other, FENCE, &settings("node-2"), &[]);
    operator
        .jobs()
        .create(&post, &foreign_job)
        .await
        .expect("the operator may");
    let foreign_service = manifest::service(&other, FENCE, &settings("node-2"));
    operator
        .services()
        .create(&post, &foreign_service)
        .await
        .expect("the operator may");
    let map = json!({ "metadata": { "name": "settings" }, "data": { "key": "value" } });
    operator
        .code()
        .create(&post, &object(map))
        .await
        .expect("the operator may");
    operator.until_pods(&other.deployment, 1).await;
    let foreign_pods = operator
        .pods()
        .list(&other_pods(&other))
        .await
        .expect("it answers");
    let foreign_pod = foreign_pods.items[0]
        .metadata
        .name
        .clone()
        .expect("it has a name");

    let here = &operator.name;
    let jobs: Api<Job> = Api::namespaced(client.clone(), here);
    let services: Api<Service> = Api::namespaced(client.clone(), here);
    let pods: Api<Pod> = Api::namespaced(client.clone(), here);
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), here);
    let secrets: Api<Secret> = Api::namespaced(client.clone(), here);
    let miner_pods: Api<Pod> = Api::namespaced(client.clone(), MINER);
    let miner_secrets: Api<Secret> = Api::namespaced(client.clone(), MINER);
    let miner_jobs: Api<Job> = Api::namespaced(client.clone(), MINER);
    let miner_maps: Api<ConfigMap> = Api::namespaced(client.clone(), MINER);
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), MINER);
    let nodes: Api<Node> = Api::all(client.clone());
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let (delete, list, patch) = (
        DeleteParams::default(),
        ListParams::default(),
        PatchParams::default(),
    );
    let label =
        |value: &str| Patch::Merge(json!({ "metadata": { "labels": { "chutes-agent/node": value } } }));
    let (new, of_two) = (spec(&format!("new-{account}")), settings("node-2"));
    let mut lies = manifest::job(&new, FENCE, &settings("node-1"), &[]);
    let template = lies.spec.as_mut().and_then(|spec| spec.template.spec.as_mut());
    template.expect("it has one").node_name = Some("node-2".to_owned());
    let mut anywhere = manifest::job(&new, FENCE, &settings("node-1"), &[]);
    let template = anywhere
        .spec
        .as_mut()
        .and_then(|spec| spec.template.spec.as_mut());
    template.expect("it has one").node_name = None;
    let mut unlabelled = manifest::service(&new, FENCE, &settings("node-1"));
    unlabelled.metadata.labels = None;
    let plain_pod: Pod = object(
        json!({ "metadata": { "name": "p", "labels": { "chutes-agent/node": "node-1" } },
        "spec": { "nodeName": "node-1", "containers": [{ "name": "c", "image": "i" }] } }),
    );
    let plain_map: ConfigMap = object(json!({ "metadata": { "name": "mine" } }));
    let secret: Secret = object(json!({ "metadata": { "name": "mine" } }));
    let proxy = http::Request::get("/api/v1/nodes/node-1/proxy/pods")
        .body(Vec::new())
        .expect("a request");

    let tried: BTreeMap<&str, kube::Result<()>> = BTreeMap::from([
        (
            "create another node's Job",
            drop_value(
                jobs.create(&post, &manifest::job(&new, FENCE, &of_two, &[]))
                    .await,
            ),
        ),
        (
            "create a Job that runs on another node",
            drop_value(jobs.create(&post, &lies).await),
        ),
        (
            "create a Job that runs anywhere",
            drop_value(jobs.create(&post, &anywhere).await),
        ),
        (
            "delete another node's Job",
            drop_value(jobs.delete(&job_name(&other.deployment), &delete).await),
        ),
        (
            "change a Job",
            drop_value(
                jobs.patch(&job_name(&own.deployment), &patch, &label("node-1"))
                    .await,
            ),
        ),
        (
            "delete all Jobs",
            drop_value(jobs.delete_collection(&delete, &list).await),
        ),
        (
            "delete another node's pod",
            drop_value(pods.delete(&foreign_pod, &delete).await),
        ),
        ("create a pod", drop_value(pods.create(&post, &plain_pod).await)),
        (
            "read the log of the miner's pods",
            drop_value(
                miner_pods
                    .logs(&format!("{account}-node-1"), &Default::default())
                    .await,
            ),
        ),
        (
            "evict a pod",
            drop_value(pods.evict(&foreign_pod, &Default::default()).await),
        ),
        (
            "create another node's Service",
            drop_value(
                services
                    .create(&post, &manifest::service(&new, FENCE, &of_two))
                    .await,
            ),
        ),
        (
            "create a Service without a label",
            drop_value(services.create(&post, &unlabelled).await),
        ),
        (
            "take another node's Service",
            drop_value(
                services
                    .patch(&service_name(&other.deployment), &patch, &label("node-1"))
                    .await,
            ),
        ),
        (
            "give a Service away",
            drop_value(
                services
                    .patch(&service_name(&own.deployment), &patch, &label("node-2"))
                    .await,
            ),
        ),
        (
            "delete another node's Service",
            drop_value(services.delete(&service_name(&other.deployment), &delete).await),
        ),
        (
            "create a ConfigMap that is no code",
            drop_value(maps.create(&post, &plain_map).await),
        ),
        (
            "delete a ConfigMap that is no code",
            drop_value(maps.delete("settings", &delete).await),
        ),
        (
            "change a ConfigMap that is no code",
            drop_value(maps.patch("settings", &patch, &label("node-1")).await),
        ),
        ("list ConfigMaps", drop_value(maps.list(&list).await)),
        ("list Secrets", drop_value(secrets.list(&list).await)),
        (
            "create a Secret",
            drop_value(secrets.create(&post, &secret).await),
        ),
        (
            "list the miner's Secrets",
            drop_value(miner_secrets.list(&list).await),
        ),
        (
            "read the miner's configuration",
            drop_value(miner_maps.get(account).await),
        ),
        ("list the miner's Jobs", drop_value(miner_jobs.list(&list).await)),
        ("list DaemonSets", drop_value(sets.list(&list).await)),
        ("list nodes", drop_value(nodes.list(&list).await)),
        (
            "change a node",
            drop_value(nodes.patch("node-1", &patch, &label("node-1")).await),
        ),
        ("reach a kubelet", drop_value(client.request_text(proxy).await)),
        ("list namespaces", drop_value(namespaces.list(&list).await)),
        (
            "delete the namespace",
            drop_value(namespaces.delete(here, &delete).await),
        ),
    ]);
    for (what, result) in &tried {
        let refused = matches!(result, Err(kube::Error::Api(status)) if matches!(status.code, 403 | 422));
        assert!(refused, "an agent may not {what}: {result:?}");
    }
    let works = "the operator may";
    operator
        .jobs()
        .delete(&job_name(&other.deployment), &DeleteParams::foreground())
        .await
        .expect(works);
    operator
        .services()
        .delete(&service_name(&other.deployment), &delete)
        .await
        .expect(works);
    operator.code().delete("settings", &delete).await.expect(works);
    operator.until_pods(&other.deployment, 0).await;
    tried.len()
}

fn other_pods(spec: &WorkloadSpec) -> ListParams {
    ListParams::default().labels(&manifest::deployment_selector(&spec.deployment))
}

fn drop_value<T>(result: kube::Result<T>) -> kube::Result<()> {
    result.map(|_| ())
}

//! Who is trusted by the packet filter of a node, with the rights that the chart gives, on a real API server.
//!
//! The table itself is tried in `chaos-tests/tests/packet_filter.rs`.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use agent::packet_filter::trusted;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use kubernetes_control_plane::{ControlPlane, FOLDER_VARIABLE, Settings};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/chutes-miner");
const SOON: Duration = Duration::from_secs(60);
const MINER: &str = "miner";

/// The folder of the programs, or nothing with a word about it.
fn programs() -> Option<PathBuf> {
    let folder = std::env::var_os(FOLDER_VARIABLE).map(PathBuf::from);
    if folder.is_none() {
        assert!(
            std::env::var("REQUIRE_PEERS").as_deref() != Ok("1"),
            "CHUTES_CONTROL_PLANE is not set"
        );
        eprintln!("NOT TESTED: who is trusted by the packet filter: CHUTES_CONTROL_PLANE is not set");
    }
    folder
}

fn object<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).expect("a good object")
}

/// A pod as a kubelet shows it, with an address.
async fn pod(client: &Client, namespace: &str, name: &str, node: &str, address: &str) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pod = json!({
        "metadata": { "name": name },
        "spec": {
            "nodeName": node,
            "automountServiceAccountToken": false,
            "containers": [{ "name": "c", "image": "i" }],
        },
    });
    pods.create(&PostParams::default(), &object(pod))
        .await
        .expect("it works");
    status(
        client,
        namespace,
        name,
        json!({ "phase": "Running", "podIPs": [{ "ip": address }] }),
    )
    .await;
}

async fn status(client: &Client, namespace: &str, name: &str, status: Value) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let patch = Patch::Merge(json!({ "status": status }));
    let patched = pods.patch_status(name, &PatchParams::default(), &patch).await;
    patched.expect("it works");
}

/// Waits until these are trusted, and nobody else.
async fn until(trusted: &mut watch::Receiver<BTreeSet<IpAddr>>, expected: &[&str]) {
    let expected: BTreeSet<IpAddr> = expected
        .iter()
        .map(|it| it.parse().expect("an address"))
        .collect();
    let seen = timeout(SOON, trusted.wait_for(|it| *it == expected))
        .await
        .is_ok();
    assert!(seen, "waited for {expected:?}, there is {:?}", trusted.borrow());
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_the_trusted_namespaces_are_followed_with_the_rights_of_the_chart() {
    let Some(programs) = programs() else { return };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let plane = ControlPlane::start(programs, Settings::default())
        .await
        .expect("it starts");
    let operator = plane.client.clone();
    let namespaces: Api<Namespace> = Api::all(operator.clone());
    for name in ["gpu-operator", "closed"] {
        let namespace = object(json!({ "metadata": { "name": name } }));
        namespaces
            .create(&PostParams::default(), &namespace)
            .await
            .expect("it works");
    }
    let values = [
        "miner.hotkey=5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY",
        "packetFilter.enabled=true",
        "packetFilter.trustedNamespaces={kube-system,gpu-operator}",
    ];
    plane
        .install(("gpu", CHART), MINER, &values)
        .await
        .expect("it installs");

    pod(&operator, "kube-system", "dns", "node-1", "10.42.0.2").await;
    pod(&operator, "kube-system", "of-another-node", "node-2", "10.42.1.2").await;
    pod(&operator, "closed", "other", "node-1", "10.42.0.9").await;
    let agents: Api<Pod> = Api::namespaced(operator.clone(), MINER);
    let agent = object(json!({
        "metadata": { "name": "agent" },
        "spec": {
            "serviceAccountName": "gpu-chutes-miner",
            "nodeName": "node-1",
            "containers": [{ "name": "agent", "image": "a" }],
        },
    }));
    let agent = agents
        .create(&PostParams::default(), &agent)
        .await
        .expect("it works");
    let token = plane.token_of(&agent, &[]).await.expect("it is given");
    let client = plane.client_of(&token).expect("a good configuration");

    let (tell, mut seen) = watch::channel(BTreeSet::new());
    // In one of them the chart gives no right to look: the others are followed all the same.
    let names = ["kube-system", "closed", "gpu-operator"].map(str::to_owned);
    let following = tokio::spawn(async move { trusted::follow(client, &names, "node-1", &tell).await });
    until(&mut seen, &["10.42.0.2"]).await;
    pod(&operator, "gpu-operator", "plugin", "node-1", "10.42.0.3").await;
    until(&mut seen, &["10.42.0.2", "10.42.0.3"]).await;
    status(
        &operator,
        "gpu-operator",
        "plugin",
        json!({ "phase": "Succeeded" }),
    )
    .await;
    until(&mut seen, &["10.42.0.2"]).await;
    pod(&operator, "kube-system", "dns-2", "node-1", "fd00:42::4").await;
    until(&mut seen, &["10.42.0.2", "fd00:42::4"]).await;
    // Asked to go, it is not trusted any more, though it is there until its kubelet says that it is gone.
    let pods: Api<Pod> = Api::namespaced(operator.clone(), "kube-system");
    pods.delete("dns", &DeleteParams::default())
        .await
        .expect("it works");
    until(&mut seen, &["fd00:42::4"]).await;
    assert!(pods.get_opt("dns").await.expect("it answers").is_some());
    assert!(!following.is_finished());
    following.abort();
    plane.stop().await.expect("it ends");
}

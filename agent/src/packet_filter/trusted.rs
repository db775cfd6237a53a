//! Which pods of this node are not filtered: those of the trusted namespaces that have an address of their own, as long
//! as they run.

use std::collections::BTreeSet;
use std::net::IpAddr;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::reflector::Store;
use kube::runtime::{WatchStreamExt as _, reflector, watcher};
use kube::{Api, Client};
use tokio::sync::watch;

/// Tells `trusted` the addresses of the pods of these namespaces on a node, whenever they change; for ever.
pub async fn follow(
    client: Client,
    namespaces: &[String],
    node: &str,
    trusted: &watch::Sender<BTreeSet<IpAddr>>,
) {
    let mut stores: Vec<Store<Pod>> = Vec::new();
    let mut streams = Vec::new();
    for namespace in namespaces {
        let (store, writer) = reflector::store();
        stores.push(store);
        let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let these = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
        let events = watcher(pods, these).default_backoff().reflect(writer);
        streams.push(events.map(move |event| (namespace, event)).boxed());
    }
    let mut events = futures_util::stream::select_all(streams);
    let mut complained = BTreeSet::new();
    while let Some((namespace, event)) = events.next().await {
        match event {
            Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
            Ok(_) => {
                complained.remove(namespace);
                let pods: Vec<_> = stores.iter().flat_map(Store::state).collect();
                let now: BTreeSet<IpAddr> = pods.iter().flat_map(|pod| addresses(pod)).collect();
                trusted.send_if_modified(|before| {
                    let news = *before != now;
                    *before = now;
                    news
                });
            }
            Err(error) => {
                if complained.insert(namespace.clone()) {
                    tracing::warn!(
                        namespace,
                        %error,
                        "its pods cannot be watched; those that are not known are kept from this host. Tried on"
                    );
                }
            }
        }
    }
}

/// What a pod sends from, while it may send.
fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let on_the_host = pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
    let Some(status) = &pod.status else {
        return Vec::new();
    };
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    // Its address may soon be another pod's.
    if on_the_host || ended || pod.metadata.deletion_timestamp.is_some() {
        return Vec::new();
    }
    let all = status.pod_ips.iter().flatten();
    all.filter_map(|it| it.ip.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn check(pod: Value, expected: &[&str]) {
        let pod: Pod = serde_json::from_value(pod.clone()).expect("a pod");
        let expected: Vec<IpAddr> = expected
            .iter()
            .map(|it| it.parse().expect("an address"))
            .collect();
        assert_eq!(addresses(&pod), expected, "{pod:?}");
    }

    #[test]
    fn a_pod_is_trusted_while_it_has_its_address() {
        let ips = json!([{ "ip": "10.42.0.5" }, { "ip": "fd00:42::5" }]);
        let running = json!({ "metadata": {}, "status": { "phase": "Running", "podIPs": ips } });
        check(running.clone(), &["10.42.0.5", "fd00:42::5"]);
        check(json!({ "metadata": {} }), &[]);
        check(json!({ "metadata": {}, "status": { "phase": "Pending" } }), &[]);
        for phase in ["Succeeded", "Failed"] {
            let mut ended = running.clone();
            ended["status"]["phase"] = json!(phase);
            check(ended, &[]);
        }
        let mut ending = running.clone();
        ending["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        check(ending, &[]);
        let mut of_the_host = running;
        of_the_host["spec"] = json!({ "hostNetwork": true, "containers": [] });
        check(of_the_host, &[]);
    }
}

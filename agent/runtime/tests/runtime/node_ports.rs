//! Node ports on a real API server: the agent knows whether chutes may be given its own, and a cluster that has none left
//! is a reason.

use k8s_openapi::api::core::v1::Service;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt as _};
use protocol::workload::WorkloadPhase;
use runtime::Runtime as _;
use runtime::kubernetes::{Config, Kubernetes, node_ports};
use runtime::manifest::Settings;
use serde_json::json;

use crate::control_plane::{ControlPlane, RESERVED, programs, until_known};
use crate::kubernetes::{running, spec, start, stop};
use crate::support::{FENCE, is_ended, is_running, phase, until};

/// Where an agent listens unless it is told otherwise.
const DOORS: [u16; 5] = [30500, 30443, 32000, 3128, 4433];

/// Takes a node port; false if somebody has it, or the cluster has no such port.
async fn take(services: &Api<Service>, port: u16) -> bool {
    let service = json!({
        "metadata": { "name": format!("taken-{port}") },
        "spec": { "type": "NodePort", "ports": [{ "port": port, "nodePort": port }] },
    });
    let service = serde_json::from_value(service).expect("a Service");
    match services.create(&PostParams::default(), &service).await {
        Ok(_) => true,
        Err(kube::Error::Api(status)) if status.code == 422 => false,
        Err(error) => panic!("{error}"),
    }
}

/// Why a further chute does not run.
async fn why_not(runtime: &Kubernetes) -> String {
    let further = spec("further");
    runtime.apply(FENCE, &further).await.expect("it is accepted");
    let ended = until(runtime, &further.deployment, "ended", is_ended).await;
    let Some(WorkloadPhase::Ended { reason, .. }) = ended else {
        unreachable!("it was waited for")
    };
    stop(runtime, &further).await;
    reason
}

/// The range leaves the agent's doors out, as Ansible sets it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_without_node_ports_is_a_reason_and_takes_no_door_away() {
    let Some(programs) = programs() else { return };
    let plane = ControlPlane::start_with(programs, "31000-31007").await;
    let space = plane.namespace("full").await;
    let mut config = space.config("node-1");
    config.reserved_ports = DOORS.to_vec();
    let range = node_ports::range(&space.services(), &config).await;
    let range = range.expect("the API server says so");
    assert_eq!(range, 31000..=31007);
    let ours = config.reserved_ports.iter().filter(|port| range.contains(port));
    assert_eq!(ours.count(), 0, "no chute is ever given one of them");
    let runtime = Kubernetes::start(plane.client.clone(), config);
    until_known(&runtime).await;
    let first = spec("first");
    start(&space, &runtime, &first).await;
    for door in DOORS {
        assert!(!take(&space.services(), door).await, "{door} can be taken");
    }
    let mut taken = Vec::new();
    for port in 31000..=31007 {
        if take(&space.services(), port).await {
            taken.push(port);
        }
    }
    assert_eq!(taken.len(), 8 - first.ports.len(), "{taken:?}");

    let why = why_not(&runtime).await;
    assert!(
        why.contains("make its Service: the cluster has no node port left"),
        "{why}"
    );
    let still = phase(&runtime, &first.deployment).await;
    assert!(is_running(still.as_ref()), "what runs goes on: {still:?}");

    // What waits for ports gets them when they are free.
    let waiting = spec("waiting");
    space.say(&waiting.deployment, running());
    runtime.apply(FENCE, &waiting).await.expect("it is accepted");
    for port in taken {
        let name = format!("taken-{port}");
        let deleted = space.services().delete(&name, &DeleteParams::default()).await;
        deleted.expect("it is there");
    }
    until(&runtime, &waiting.deployment, "running", is_running).await;
    stop(&runtime, &waiting).await;
    stop(&runtime, &first).await;
    assert_eq!(space.remains().await, Vec::<String>::new());
    plane.stop().await;
}

/// The range has ports of the agent's own: this is known, and none is given away although no other is left.
pub(crate) async fn ports_of_ours(plane: &ControlPlane) {
    let space = plane.namespace("own-ports").await;
    let services = space.services();
    let config = space.config("node-1");
    let range = node_ports::range(&services, &config).await;
    assert_eq!(range, Ok(30000..=30063), "with {RESERVED:?} in it");
    let nowhere = Config::new(Settings::for_node("node-1"), space.logs().to_owned());
    let missing: Api<Service> = Api::namespaced(plane.client.clone(), "nowhere");
    let unknown = node_ports::range(&missing, &nowhere).await;
    assert!(
        unknown.is_err_and(|why| why.contains("nowhere")),
        "nothing is said then"
    );

    for port in RESERVED.end..=30063 {
        assert!(take(&services, port).await, "{port}");
    }
    let runtime = space.open("node-1").await;
    let why = why_not(&runtime).await;
    assert!(
        why.contains("a port of the agent's own") && why.contains("--service-node-port-range"),
        "{why}"
    );
    for service in services.list(&Default::default()).await.expect("it answers") {
        let deleted = services
            .delete(&service.name_any(), &DeleteParams::default())
            .await;
        deleted.expect("it is there");
    }
}

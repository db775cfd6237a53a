//! `helm test` of the release: the pod that it makes, with this test as its kubelet, which runs the pod's command against
//! a member.

use std::process::Output;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{Patch, PatchParams};
use kube::runtime::wait::await_condition;
use serde_json::json;
use tokio::process::Command;
use tokio::time::timeout;

use super::{Home, MEMBERS, MINER, PATIENCE, Shared};

const POD: &str = "gpu-chutes-miner-test-ready";
/// Where the pod has its configuration.
const CONFIG: &str = "/etc/chutes-agent/config/config.toml";

/// What helm says of its test, and what the pod's command says on the node of this member. `more`: what the command is
/// told besides.
pub(super) async fn tested(
    shared: &Shared,
    member: &Home,
    more: &[&str],
) -> (Result<String, String>, String) {
    let helm = shared
        .plane
        .helm(&["test", "gpu", "--namespace", MINER, "--timeout", "3m"]);
    let (helm, output) = tokio::join!(helm, kubelet(shared, member, more));
    let said = [output.stdout, output.stderr].concat();
    (helm, String::from_utf8_lossy(&said).into_owned())
}

/// Runs the pod's command, once there is a pod, and reports its end.
async fn kubelet(shared: &Shared, member: &Home, more: &[&str]) -> Output {
    let pods: Api<Pod> = shared.api();
    let waits = |pod: Option<&Pod>| {
        let phase = pod.and_then(|pod| pod.status.as_ref()?.phase.as_deref());
        phase == Some("Pending")
    };
    let pod = timeout(PATIENCE, await_condition(pods.clone(), POD, waits)).await;
    let pod = pod.expect("in time").expect("it can be watched");
    let spec = pod.expect("it waits").spec.expect("it has one");
    let container = &spec.containers[0];
    let sets: Api<DaemonSet> = shared.api();
    let set = sets.get(MEMBERS).await.expect("one of the release");
    let agent = set.spec.and_then(|spec| spec.template.spec).expect("it has one");
    assert_eq!(container.image, agent.containers[0].image, "our own image");
    assert_eq!(spec.node_selector, agent.node_selector, "on a member's node");
    let mounted = json!(spec.volumes);
    assert_eq!(
        mounted[0]["configMap"]["name"], MEMBERS,
        "and nothing else: {mounted}"
    );
    assert_eq!(mounted.as_array().map(Vec::len), Some(1), "{mounted}");

    let config = member.folder.join("config.toml").display().to_string();
    let arguments = container.args.iter().flatten();
    let arguments = arguments.map(|argument| argument.replace(CONFIG, &config));
    let mut command = Command::new(env!("CARGO_BIN_EXE_chutes-agent"));
    command.args(arguments).args(more).env_clear().kill_on_drop(true);
    let output = timeout(PATIENCE, command.output()).await.expect("it ends");
    let output = output.expect("the program runs");
    let phase = if output.status.success() {
        "Succeeded"
    } else {
        "Failed"
    };
    let status = Patch::Merge(json!({ "status": { "phase": phase } }));
    let told = pods.patch_status(POD, &PatchParams::default(), &status).await;
    told.expect("it is there");
    output
}

//! What another miner started becomes ours, marked step by step as `chutes-miner import` does, and nothing is stopped
//! on the way.

use std::time::Duration;

use kube::ResourceExt as _;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use protocol::workload::{PortMapping, PortProtocol, WorkloadPhase};
use runtime::Runtime as _;
use runtime::manifest::{
    self, FENCE_ANNOTATION, GPUS_ANNOTATION, LAUNCHED_ANNOTATION, NODE_LABEL, PORTS_ANNOTATION, job_name,
    service_name,
};
use serde_json::json;
use tokio::time::sleep;

use crate::control_plane::Space;
use crate::kubernetes::{running, spec, stop};
use crate::support::{FENCE, until};

/// Longer than a runtime takes to act on what it sees.
const A_WHILE: Duration = Duration::from_secs(1);

/// Objects as the original makes them, which an operator marks step by step.
pub(crate) async fn taken_over(space: &Space) {
    let settings = space.config("node-1").settings;
    let mut spec = spec("taken-over");
    let ports = [PortMapping {
        internal: 8000,
        external: 31_000,
        protocol: PortProtocol::Tcp,
    }];
    let made = manifest::job(&spec, FENCE, &settings, &ports);
    let (mut job, mut service) = (made.clone(), manifest::service(&spec, FENCE, &settings));
    let mut code = manifest::code(&spec, FENCE, &settings, true);
    let template = job.spec.as_mut().expect("a spec").template.metadata.as_mut();
    let template = template.expect("it has labels");
    for metadata in [
        &mut job.metadata,
        template,
        &mut service.metadata,
        &mut code.metadata,
    ] {
        let labels = metadata.labels.get_or_insert_default();
        labels.retain(|name, _| name.starts_with("chutes/") && name != "chutes/code");
        metadata.annotations = None;
    }
    let post = PostParams::default();
    space.code().create(&post, &code).await.expect("it works");
    space.services().create(&post, &service).await.expect("it works");
    let job = space.jobs().create(&post, &job).await.expect("it works");
    space.say(&spec.deployment, running());
    space.until_pods(&spec.deployment, 1).await;
    let runtime = space.open("node-1").await;
    assert_eq!(
        runtime.observe().await.expect("known"),
        [],
        "it is another miner's"
    );

    // What starts it was used by the other miner.
    spec.launch_token = None;
    let name = job_name(&spec.deployment);
    let ours = json!({ NODE_LABEL: "node-1" });
    let gpus = made.annotations()[GPUS_ANNOTATION].clone();
    let mark = |annotations: serde_json::Value| {
        Patch::Merge(json!({ "metadata": { "labels": ours, "annotations": annotations } }))
    };
    let (jobs, services, patch) = (space.jobs(), space.services(), PatchParams::default());
    let service_name = service_name(&spec.deployment);
    let with_gpus = mark(json!({ GPUS_ANNOTATION: gpus }));
    let launched = mark(json!({ GPUS_ANNOTATION: gpus, LAUNCHED_ANNOTATION: "true" }));
    let sealed = mark(json!({ FENCE_ANNOTATION: "0/0" }));
    let there = "it is there";
    let pods = space.pods().list(&ListParams::default()).await.expect("it works");
    for pod in pods {
        let marked = space.pods().patch(&pod.name_any(), &patch, &with_gpus).await;
        marked.expect(there);
    }

    // As if the watch of Jobs were behind: what is shown without its Job has not ended, and is not stopped.
    for step in [&launched, &sealed] {
        services.patch(&service_name, &patch, step).await.expect(there);
        let blind = space.open("node-1").await;
        blind.stop(&spec.deployment).await.expect("it is known");
        let seen = blind.observe().await.expect("known");
        let over = |seen: &runtime::Observed| matches!(seen.status.phase, WorkloadPhase::Ended { .. });
        assert!(!seen.iter().any(over), "{seen:?}");
        // It asks once more for as long as it is not shown whole.
        sleep(A_WHILE).await;
        assert_eq!(space.remains().await.len(), 4, "Job, pod, Service and code");
    }
    let unsealed = mark(json!({ FENCE_ANNOTATION: null }));
    services
        .patch(&service_name, &patch, &unsealed)
        .await
        .expect(there);

    let ports_text = serde_json::to_string(&ports).expect("plain data");
    let marked = mark(json!({ GPUS_ANNOTATION: gpus, PORTS_ANNOTATION: ports_text }));
    jobs.patch(&name, &patch, &marked).await.expect(there);
    // The state hears of it before the watches do.
    runtime.apply(FENCE, &spec).await.expect("it is asked about");
    let is = WorkloadPhase::Running {
        ports: ports.to_vec(),
        ready: true,
    };
    until(&runtime, &spec.deployment, "running", |phase| phase == Some(&is)).await;
    assert_eq!(runtime.observe().await.expect("known")[0].gpus, spec.gpus);
    runtime.stop(&spec.deployment).await.expect("it is known");
    let same = jobs.get(&name).await.expect("it was not stopped");
    assert!(same.metadata.deletion_timestamp.is_none() && same.uid() == job.uid());
    let seen = runtime.observe().await.expect("known");
    assert_eq!(
        seen.first().map(|seen| &seen.status.phase),
        Some(&is),
        "nor begun to be"
    );

    services.patch(&service_name, &patch, &sealed).await.expect(there);
    jobs.patch(&name, &patch, &sealed).await.expect(there);
    // Until the watches show the last mark, it is left alone.
    let mut changes = runtime.changes();
    loop {
        runtime.stop(&spec.deployment).await.expect("it is known");
        if runtime.observe().await.expect("known").is_empty() {
            break;
        }
        changes.changed().await.expect("the runtime lives");
    }
    let code_name = manifest::code_name(&spec.chute, &spec.version);
    assert_eq!(space.remains().await, [code_name], "which the other miner wrote");

    runtime.apply(FENCE, &spec).await.expect("it is asked about");
    until(&runtime, &spec.deployment, "ended", |phase| {
        matches!(phase, Some(WorkloadPhase::Ended { reason, .. }) if reason.contains("launched before"))
    })
    .await;
    stop(&runtime, &spec).await;
}

//! What another miner started becomes ours, marked step by step as `chutes-miner import` does, and nothing is stopped
//! on the way.

use kube::ResourceExt as _;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use protocol::workload::{PortMapping, PortProtocol, WorkloadPhase};
use runtime::Runtime as _;
use runtime::manifest::{
    self, FENCE_ANNOTATION, GPUS_ANNOTATION, LAUNCHED_ANNOTATION, NODE_LABEL, PORTS_ANNOTATION, job_name,
    service_name,
};
use serde_json::json;

use crate::control_plane::Space;
use crate::kubernetes::{running, spec, stop};
use crate::support::{FENCE, until};

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
    let (mut job, mut service) = (made.clone(), manifest::service(&spec, FENCE, &settings, true));
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
    let marked = mark(json!({
        GPUS_ANNOTATION: gpus,
        PORTS_ANNOTATION: serde_json::to_string(&ports).expect("plain data"),
    }));
    let patch = PatchParams::default();
    space
        .jobs()
        .patch(&name, &patch, &marked)
        .await
        .expect("it is there");
    // The state hears of it before the watches do.
    runtime.apply(FENCE, &spec).await.expect("it is asked about");
    let pods = space.pods().list(&ListParams::default()).await.expect("it works");
    let with_gpus = mark(json!({ GPUS_ANNOTATION: gpus }));
    for pod in pods {
        let marked = space.pods().patch(&pod.name_any(), &patch, &with_gpus).await;
        marked.expect("it is there");
    }
    let launched = mark(json!({ GPUS_ANNOTATION: gpus, LAUNCHED_ANNOTATION: "true" }));
    let service_name = service_name(&spec.deployment);
    let marked = space.services().patch(&service_name, &patch, &launched).await;
    marked.expect("it is there");
    let is = WorkloadPhase::Running {
        ports: ports.to_vec(),
        ready: true,
    };
    until(&runtime, &spec.deployment, "running", |phase| phase == Some(&is)).await;
    assert_eq!(runtime.observe().await.expect("known")[0].gpus, spec.gpus);
    runtime.stop(&spec.deployment).await.expect("it is known");
    let there = space.jobs().get(&name).await.expect("it was not stopped");
    assert!(there.metadata.deletion_timestamp.is_none() && there.uid() == job.uid());
    let seen = runtime.observe().await.expect("known");
    assert_eq!(
        seen.first().map(|seen| &seen.status.phase),
        Some(&is),
        "nor begun to be"
    );

    let sealed = Patch::Merge(json!({ "metadata": { "annotations": { FENCE_ANNOTATION: "0/0" } } }));
    space
        .services()
        .patch(&service_name, &patch, &sealed)
        .await
        .expect("it is there");
    space
        .jobs()
        .patch(&name, &patch, &sealed)
        .await
        .expect("it is there");
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

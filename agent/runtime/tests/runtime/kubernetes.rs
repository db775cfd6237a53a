//! The Kubernetes runtime against a real API server. One control plane serves all; each case has a namespace.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Event;
use kube::Api;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use protocol::id::{ChuteId, DeploymentId, GpuId};
use protocol::logs::WorkloadEvent;
use protocol::workload::{WorkloadPhase, WorkloadSpec};
use runtime::Runtime;
use runtime::diff::diff;
use runtime::kubernetes::{Config, Kubernetes};
use runtime::manifest::{self, Settings, job_name, service_name};
use serde_json::{Value, json};

use crate::contract::{Subject, contract};
use crate::control_plane::{ControlPlane, RESERVED, Space, programs};
use crate::kubelet::Kubelet;
use crate::support::{self, FENCE, is_ended, is_running, log, phase, until, write_line};

/// A spec that can stand in labels and on a node of its own.
pub(crate) fn spec(name: &str) -> WorkloadSpec {
    let mut spec = support::spec(name, "print()");
    let text = format!("{name}-{:08x}", fastrand::u32(..));
    spec.deployment = DeploymentId::parse(&text).expect("valid");
    spec.gpus = vec![GpuId::from_device_uuid(&format!("{:032x}", fastrand::u128(..))).expect("valid")];
    spec
}

fn container(state: &Value, ready: bool) -> Value {
    json!([{ "name": "chute", "image": "i", "imageID": "i", "ready": ready, "restartCount": 0, "state": state }])
}

pub(crate) fn running() -> Value {
    let state = json!({ "running": { "startedAt": "2026-01-01T00:00:00Z" } });
    json!({ "phase": "Running", "containerStatuses": container(&state, true) })
}

fn failed(code: i32) -> Value {
    let state = json!({ "terminated": { "exitCode": code, "reason": "Error" } });
    json!({ "phase": "Failed", "containerStatuses": container(&state, false) })
}

struct Node<'a> {
    runtime: Kubernetes,
    space: &'a Space,
}

impl Subject for Node<'_> {
    fn runtime(&self) -> &dyn Runtime {
        &self.runtime
    }
    fn lasting(&self) -> WorkloadSpec {
        spec("lasting")
    }
    fn ending(&self) -> WorkloadSpec {
        spec("ending")
    }
    fn get_on(&self, deployment: &DeploymentId, phase: WorkloadPhase) {
        let status = match phase {
            WorkloadPhase::Ended { exit_code, .. } => failed(exit_code.unwrap_or(1)),
            _ => running(),
        };
        self.space.say(deployment, status);
    }
    fn let_go(&self, _: &DeploymentId) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubernetes_runs_what_it_is_given_and_leaves_nothing() {
    let Some(programs) = programs() else { return };
    let mut plane = ControlPlane::start(programs).await;
    let says = |what: &str| write_line(&format!("kubernetes: {what}"));

    says("the contract of all runtimes, and nothing is left");
    let space = plane.namespace("contract").await;
    let before = space.remains().await;
    let node = Node {
        runtime: space.open("node-1").await,
        space: &space,
    };
    contract(&node).await;
    assert_eq!(space.remains().await, before);

    says("another agent finds what runs, and does not start it again");
    adoption(&plane.namespace("adoption").await).await;
    says("what another miner started is taken over");
    Box::pin(crate::taken_over::taken_over(
        &plane.namespace("taken-over").await,
    ))
    .await;
    says("a Job that somebody removed has ended");
    removed_job(&plane.namespace("removed").await).await;
    all_removed(&plane.namespace("all-removed").await).await;
    says("pods without their Job hold their GPUs until they are gone");
    orphaned_pods(&plane.namespace("orphans").await).await;
    says("a finalizer that does not end keeps the workload listed");
    finalizer(&plane.namespace("finalizer").await).await;
    says("refusals end a start with their reason");
    refusals(&plane.namespace("refusals").await).await;
    says("a pod that is refused is a reason, once that does not pass");
    refused_pods(&plane.namespace("refused-pods").await).await;
    says("foreign objects are neither listed nor touched");
    foreign(&plane.namespace("foreign").await).await;
    taken_names(&plane.namespace("taken-names").await).await;
    says("output and events can be read, and are kept");
    output(&plane.namespace("output").await, &plane.client).await;
    says("code goes with the last deployment of its version");
    shared_code(&plane.namespace("code").await).await;
    says("no chute is given a port of ours");
    ports(&plane.namespace("ports").await).await;
    Box::pin(crate::node_ports::ports_of_ours(&plane)).await;
    says("a namespace that is missing is a reason");
    missing_namespace(&plane).await;
    says("the chart, and what it lets an agent do");
    Box::pin(crate::chart::chart(&plane)).await;
    says("the API server is killed ten times");
    outages(&mut plane).await;
    plane.stop().await;
}

#[tokio::test]
async fn without_an_answer_of_the_api_server_nothing_is_known() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let nowhere = kube::Config::new("http://127.0.0.1:1".parse().expect("a URL"));
    let client = kube::Client::try_from(nowhere).expect("a client");
    let logs = tempfile::tempdir().expect("temporary folders can be made");
    let config = Config::new(Settings::for_node("node-1"), logs.path().to_owned());
    let runtime = Kubernetes::start(client, config);
    let spec = spec("unknown");
    assert!(runtime.observe().await.is_err());
    assert!(runtime.apply(FENCE, &spec).await.is_err());
    assert!(runtime.stop(&spec.deployment).await.is_err());
}

pub(crate) async fn start(space: &Space, runtime: &Kubernetes, spec: &WorkloadSpec) {
    space.say(&spec.deployment, running());
    runtime.apply(FENCE, spec).await.expect("it is accepted");
    until(runtime, &spec.deployment, "running", is_running).await;
}

pub(crate) async fn stop(runtime: &Kubernetes, spec: &WorkloadSpec) {
    runtime.stop(&spec.deployment).await.expect("it can be stopped");
    until(runtime, &spec.deployment, "gone", |phase| phase.is_none()).await;
}

async fn adoption(space: &Space) {
    let spec = spec("adopted");
    let first = space.open("node-1").await;
    start(space, &first, &spec).await;
    let seen = first.observe().await.expect("known");
    drop(first);
    let job = space
        .jobs()
        .get(&job_name(&spec.deployment))
        .await
        .expect("it runs");
    let second = space.open("node-1").await;
    assert_eq!(
        second.observe().await.expect("known"),
        seen,
        "ports, GPUs and all"
    );
    second.apply(FENCE, &spec).await.expect("it is there already");
    let same = space
        .jobs()
        .get(&job_name(&spec.deployment))
        .await
        .expect("it runs");
    assert_eq!(same.uid(), job.uid());
    let WorkloadPhase::Running { ports, ready: true } = &seen[0].status.phase else {
        panic!("{seen:?}");
    };
    let service = space
        .services()
        .get(&service_name(&spec.deployment))
        .await
        .expect("it has one");
    assert_eq!(Some(ports), manifest::node_ports(&spec, &service).as_ref());
    half_made(space).await;
    let other = space.open("node-2").await;
    assert_eq!(other.observe().await.expect("known"), [], "it is another node's");
    stop(&second, &spec).await;
    assert_eq!(space.remains().await, Vec::<String>::new());
}

/// An agent of an earlier release died after it had made a Service, and before that said so much as that there is a Job.
async fn half_made(space: &Space) {
    let spec = spec("half-made");
    let config = space.config("node-3");
    let mut service = manifest::service(&spec, FENCE, &config.settings);
    let annotations = service.metadata.annotations.get_or_insert_default();
    annotations
        .remove(manifest::LAUNCHED_ANNOTATION)
        .expect("it says so");
    space
        .services()
        .create(&PostParams::default(), &service)
        .await
        .expect("it works");
    let runtime = space.open("node-3").await;
    until(&runtime, &spec.deployment, "gone", |phase| phase.is_none()).await;
    start(space, &runtime, &spec).await;
    stop(&runtime, &spec).await;
}

async fn removed_job(space: &Space) {
    let spec = spec("removed");
    let runtime = space.open("node-1").await;
    start(space, &runtime, &spec).await;
    let foreground = DeleteParams::foreground();
    space
        .jobs()
        .delete(&job_name(&spec.deployment), &foreground)
        .await
        .expect("it is there");
    let ended = until(&runtime, &spec.deployment, "ended", is_ended).await;
    let reason = "its Job was removed".to_owned();
    assert_eq!(
        ended,
        Some(WorkloadPhase::Ended {
            exit_code: None,
            reason
        })
    );
    runtime.apply(FENCE, &spec).await.expect("it is known");
    let next = space.open("node-1").await;
    next.apply(FENCE, &spec).await.expect("it is known");
    assert_eq!(
        phase(&next, &spec.deployment).await,
        ended,
        "also to the next agent"
    );
    assert!(
        space
            .jobs()
            .get_opt(&job_name(&spec.deployment))
            .await
            .expect("it answers")
            .is_none()
    );
    stop(&next, &spec).await;
    assert_eq!(space.remains().await, Vec::<String>::new());
}

/// Whoever removes everything of a deployment ends it; its launch token was used.
async fn all_removed(space: &Space) {
    for adopted in [false, true] {
        let spec = spec("all-removed");
        let mut runtime = space.open("node-1").await;
        start(space, &runtime, &spec).await;
        if adopted {
            drop(runtime);
            runtime = space.open("node-1").await;
        }
        let name = service_name(&spec.deployment);
        space
            .services()
            .delete(&name, &DeleteParams::default())
            .await
            .expect("it is there");
        let name = job_name(&spec.deployment);
        space
            .jobs()
            .delete(&name, &DeleteParams::foreground())
            .await
            .expect("it is there");
        until(&runtime, &spec.deployment, "ended", is_ended).await;
        runtime.apply(FENCE, &spec).await.expect("it is known");
        assert!(is_ended(phase(&runtime, &spec.deployment).await.as_ref()));
        stop(&runtime, &spec).await;
        let name = manifest::code_name(&spec.chute, &spec.version);
        space
            .code()
            .delete(&name, &DeleteParams::default())
            .await
            .expect("nothing says any more whose it is");
    }
    assert_eq!(space.remains().await, Vec::<String>::new());
}

async fn orphaned_pods(space: &Space) {
    let spec = spec("orphaned");
    let runtime = space.open("node-1").await;
    start(space, &runtime, &spec).await;
    let orphan = DeleteParams::orphan();
    space
        .jobs()
        .delete(&job_name(&spec.deployment), &orphan)
        .await
        .expect("it is there");
    let goes_on =
        |phase: Option<&WorkloadPhase>| matches!(phase, Some(WorkloadPhase::Running { ready: false, .. }));
    until(&runtime, &spec.deployment, "going on without its Job", goes_on).await;
    assert_eq!(
        space
            .pods()
            .list(&Default::default())
            .await
            .expect("it answers")
            .items
            .len(),
        1
    );
    let observed = runtime.observe().await.expect("known");
    assert!(observed[0].holds_gpus());
    assert_eq!(observed[0].gpus, spec.gpus);
    let plan = diff(&[], &observed);
    assert_eq!(
        plan.stop,
        std::slice::from_ref(&spec.deployment),
        "whoever does not want it ends it"
    );
    stop(&runtime, &spec).await;
    assert_eq!(space.remains().await, Vec::<String>::new());
}

async fn finalizer(space: &Space) {
    let spec = spec("finalizer");
    let runtime = space.open("node-1").await;
    start(space, &runtime, &spec).await;
    let (jobs, name) = (space.jobs(), job_name(&spec.deployment));
    let held = Patch::Merge(json!({ "metadata": { "finalizers": ["example.org/held"] } }));
    jobs.patch(&name, &PatchParams::default(), &held)
        .await
        .expect("it is there");
    runtime.stop(&spec.deployment).await.expect("it can be stopped");
    space.until_pods(&spec.deployment, 0).await;
    assert_eq!(
        phase(&runtime, &spec.deployment).await,
        Some(WorkloadPhase::Stopping)
    );
    let free = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
    jobs.patch(&name, &PatchParams::default(), &free)
        .await
        .expect("it is there");
    until(&runtime, &spec.deployment, "gone", |phase| phase.is_none()).await;
    assert_eq!(space.remains().await, Vec::<String>::new());
}

async fn refusals(space: &Space) {
    let runtime = space.open("node-1").await;
    let mut invalid = spec("invalid");
    invalid.filename = "no/key.py".to_owned();
    allow_none(space, "count/jobs.batch").await;
    for (spec, words) in [(invalid, "(422 Invalid)"), (spec("quota"), "exceeded quota")] {
        runtime.apply(FENCE, &spec).await.expect("it is accepted");
        let ended = until(&runtime, &spec.deployment, "ended", is_ended).await;
        let Some(WorkloadPhase::Ended { reason, .. }) = ended else {
            unreachable!("it was waited for")
        };
        assert!(reason.contains(words), "{reason}");
        assert!(!runtime.observe().await.expect("known")[0].holds_gpus());
        stop(&runtime, &spec).await;
    }
    assert_eq!(space.remains().await, Vec::<String>::new());
}

/// Lets a namespace have none of something.
async fn allow_none(space: &Space, what: &str) {
    let quota = json!({ "apiVersion": "v1", "kind": "ResourceQuota", "metadata": { "name": "none" },
        "spec": { "hard": { what: "0" } } });
    let quota = serde_json::from_value(quota).expect("a quota");
    let quotas = space.quotas();
    let made = quotas.create(&PostParams::default(), &quota).await;
    made.expect("it works");
    // There is no controller that counts.
    let counted = Patch::Merge(json!({ "status": { "hard": { what: "0" }, "used": { what: "0" } } }));
    let told = quotas
        .patch_status("none", &PatchParams::default(), &counted)
        .await;
    told.expect("it works");
}

/// A Job whose pod is refused says nothing of that; its events do.
async fn refused_pods(space: &Space) {
    allow_none(space, "pods").await;
    let runtime = space.open("node-1").await;
    let refused = spec("refused");
    runtime.apply(FENCE, &refused).await.expect("it is accepted");
    let ended = until(&runtime, &refused.deployment, "ended", is_ended).await;
    let Some(WorkloadPhase::Ended { reason, .. }) = ended else {
        unreachable!("it was waited for")
    };
    let words = reason.starts_with("FailedCreate: ") && reason.contains("exceeded quota: none");
    assert!(words, "{reason}");
    assert!(!runtime.observe().await.expect("known")[0].holds_gpus());
    stop(&runtime, &refused).await;
    drop(runtime);

    // One that passes is put up with, also by the next agent.
    let mut config = space.config("node-1");
    config.patience = std::time::Duration::from_secs(600);
    let patient = space.open_with(config.clone()).await;
    let waits = spec("waits");
    space.say(&waits.deployment, running());
    patient.apply(FENCE, &waits).await.expect("it is accepted");
    let said = space
        .until_said(&job_name(&waits.deployment), "FailedCreate")
        .await;
    assert!(said.contains("exceeded quota: none"), "{said}");
    let pending = Some(WorkloadPhase::Pending);
    assert_eq!(phase(&patient, &waits.deployment).await, pending);
    drop(patient);
    let next = space.open_with(config).await;
    assert_eq!(phase(&next, &waits.deployment).await, pending);
    let deleted = space.quotas().delete("none", &DeleteParams::default()).await;
    deleted.expect("it is there");
    until(&next, &waits.deployment, "running", is_running).await;
    stop(&next, &waits).await;
    assert_eq!(space.remains().await, Vec::<String>::new());
}

async fn foreign(space: &Space) {
    let config = space.config("node-1");
    let mut foreign = spec("foreign");
    foreign.chute = ChuteId::parse("chute-2").expect("valid");
    let mut job = manifest::job(&foreign, FENCE, &config.settings, &[]);
    job.metadata.name = Some("somebody-else".to_owned());
    job.spec.as_mut().expect("a spec").suspend = Some(true);
    let jobs: Api<Job> = space.jobs();
    jobs.create(&PostParams::default(), &job).await.expect("it works");
    let runtime = space.open("node-1").await;
    assert_eq!(runtime.observe().await.expect("known"), []);
    runtime.stop(&foreign.deployment).await.expect("nothing to do");
    let ours = spec("ours");
    start(space, &runtime, &ours).await;
    stop(&runtime, &ours).await;
    assert_eq!(space.remains().await, ["somebody-else"]);
}

/// Another miner has the name of a deployment: it keeps what it has, and nothing of ours stays.
async fn taken_names(space: &Space) {
    let config = space.config("node-1");
    let spec = spec("taken");
    let (job, service) = (job_name(&spec.deployment), service_name(&spec.deployment));
    let mut theirs = manifest::job(&spec, FENCE, &config.settings, &[]);
    let pods = theirs.spec.as_mut().expect("a spec");
    pods.suspend = Some(true);
    let template = pods.template.metadata.as_mut().expect("it has labels");
    let mut door = manifest::service(&spec, FENCE, &config.settings);
    for metadata in [&mut theirs.metadata, template, &mut door.metadata] {
        metadata
            .labels
            .get_or_insert_default()
            .remove(manifest::NODE_LABEL);
        metadata.annotations = None;
    }
    let post = PostParams::default();
    space.jobs().create(&post, &theirs).await.expect("it works");
    for with_service in [false, true] {
        if with_service {
            space.services().create(&post, &door).await.expect("it works");
        }
        let runtime = space.open("node-1").await;
        runtime.apply(FENCE, &spec).await.expect("it is known");
        let taken = if with_service {
            format!("the Service {service}")
        } else {
            format!("the Job {job}")
        };
        let ended = until(&runtime, &spec.deployment, "ended", is_ended).await;
        let reason = format!("{taken} is another miner's");
        assert_eq!(
            ended,
            Some(WorkloadPhase::Ended {
                exit_code: None,
                reason
            })
        );
        stop(&runtime, &spec).await;
    }
    let mut remains = space.remains().await;
    let code = manifest::code_name(&spec.chute, &spec.version);
    remains.retain(|name| *name != code);
    assert_eq!(remains, [job, service.clone()]);
    // Its port is needed below.
    let deleted = space.services().delete(&service, &DeleteParams::default()).await;
    deleted.expect("it is there");
}

async fn shared_code(space: &Space) {
    let (one, two) = (space.open("node-1").await, space.open("node-2").await);
    let (first, second) = (spec("first"), spec("second"));
    start(space, &one, &first).await;
    start(space, &two, &second).await;
    let name = manifest::code_name(&first.chute, &first.version);
    stop(&one, &first).await;
    assert!(
        space.code().get_opt(&name).await.expect("it answers").is_some(),
        "node-2 needs it"
    );
    stop(&two, &second).await;
    assert_eq!(space.remains().await, Vec::<String>::new());
}

async fn ports(space: &Space) {
    let runtime = space.open("node-1").await;
    let all: Vec<WorkloadSpec> = (0..6).map(|_| spec("ports")).collect();
    for spec in &all {
        start(space, &runtime, spec).await;
    }
    for observed in runtime.observe().await.expect("known") {
        let WorkloadPhase::Running { ports, .. } = observed.status.phase else {
            panic!("{observed:?}")
        };
        assert_eq!(ports.len(), 3);
        assert!(
            ports.iter().all(|port| !RESERVED.contains(&port.external)),
            "{ports:?}"
        );
    }
    for spec in &all {
        stop(&runtime, spec).await;
    }
    assert_eq!(space.remains().await, Vec::<String>::new());
}

async fn missing_namespace(plane: &ControlPlane) {
    let client = runtime::kubernetes::client(Some(&plane.kubeconfig()))
        .await
        .expect("a good kubeconfig");
    let logs = std::env::temp_dir().join("of-a-missing-namespace");
    let mut config = Config::new(Settings::for_node("node-1"), logs);
    config.settings.namespace = "nowhere".to_owned();
    config.patience = std::time::Duration::from_millis(500);
    let runtime = Kubernetes::start(client, config);
    crate::control_plane::until_known(&runtime).await;
    let spec = spec("nowhere");
    runtime.apply(FENCE, &spec).await.expect("it is accepted");
    let ended = until(&runtime, &spec.deployment, "ended", is_ended).await;
    let Some(WorkloadPhase::Ended { reason, .. }) = ended else {
        unreachable!("it was waited for")
    };
    assert!(reason.contains("namespaces \"nowhere\" not found"), "{reason}");
    stop(&runtime, &spec).await;
}

/// What runs stays, what is started or stopped meanwhile is so afterwards; nothing is lost and nothing doubled.
async fn outages(plane: &mut ControlPlane) {
    let space = plane.namespace("outages").await;
    let runtime = space.open("node-1").await;
    let lasting = spec("lasting");
    start(&space, &runtime, &lasting).await;
    let job = space
        .jobs()
        .get(&job_name(&lasting.deployment))
        .await
        .expect("it runs");
    let mut before = spec("before");
    start(&space, &runtime, &before).await;
    let mut longest = std::time::Duration::ZERO;
    for _ in 0..10 {
        plane.kill_server().await;
        let meanwhile = spec("meanwhile");
        space.say(&meanwhile.deployment, running());
        runtime.apply(FENCE, &meanwhile).await.expect("it is accepted");
        runtime.stop(&before.deployment).await.expect("it is accepted");
        assert_eq!(
            phase(&runtime, &meanwhile.deployment).await,
            Some(WorkloadPhase::Pending)
        );
        assert_eq!(
            phase(&runtime, &before.deployment).await,
            Some(WorkloadPhase::Stopping)
        );
        assert!(
            is_running(phase(&runtime, &lasting.deployment).await.as_ref()),
            "as it was last seen"
        );
        plane.start_server().await;
        let back = tokio::time::Instant::now();
        until(&runtime, &meanwhile.deployment, "running", is_running).await;
        until(&runtime, &before.deployment, "gone", |phase| phase.is_none()).await;
        before = meanwhile;
        longest = longest.max(back.elapsed());
    }
    write_line(&format!(
        "kubernetes: at most {longest:?} after its return all was done"
    ));
    let same = space
        .jobs()
        .get(&job_name(&lasting.deployment))
        .await
        .expect("it runs");
    assert_eq!(same.uid(), job.uid());
    assert_eq!(
        space
            .jobs()
            .list(&Default::default())
            .await
            .expect("it answers")
            .items
            .len(),
        2
    );
    stop(&runtime, &before).await;
    stop(&runtime, &lasting).await;
    assert_eq!(space.remains().await, Vec::<String>::new());
}

async fn output(space: &Space, client: &kube::Client) {
    let kubelet = Kubelet::start(client, "node-7").await;
    let runtime = space.open("node-7").await;
    let spec = spec("talks");
    let id = &spec.deployment;
    assert_eq!(log(&runtime, id, None).await, None, "it was never here");
    assert_eq!(runtime.events(id).await.expect("known"), None);
    start(space, &runtime, &spec).await;
    let pods = space.pods().list(&ListParams::default()).await.expect("it works");
    let pod = pods.items[0].name_any();
    let first = "2026-01-01T00:00:00.5Z token eyJhbGciOi.eyJzdWIi.c2ln\n2026-01-01T00:00:01.6Z two\n";
    kubelet.write(&pod, "chute", first);
    let said = log(&runtime, id, None).await.expect("there");
    assert_eq!((said.text.as_str(), said.gone), ("token [token]\ntwo\n", false));
    // In the second in which the last one was written.
    let all = format!("{first}2026-01-01T00:00:01.9Z three\n");
    kubelet.write(&pod, "chute", &all);
    let more = log(&runtime, id, said.next).await.expect("there");
    assert_eq!(more.text, "three\n");
    let event = json!({ "metadata": { "name": "e" }, "type": "Warning", "reason": "BackOff", "message": "again",
        "count": 2, "lastTimestamp": "2026-01-01T00:00:03Z",
        "involvedObject": { "kind": "Pod", "name": pod, "namespace": space.name } });
    let happened: Api<Event> = Api::namespaced(client.clone(), &space.name);
    let event = serde_json::from_value(event).expect("an event");
    happened
        .create(&PostParams::default(), &event)
        .await
        .expect("it works");
    let is_told = |events: &[WorkloadEvent]| {
        let told = events
            .iter()
            .find(|event| event.reason == "BackOff" && event.count == 2);
        told.is_some_and(|event| event.object == format!("Pod {pod}"))
    };
    let events = runtime.events(id).await.expect("readable").expect("there");
    assert!(is_told(&events), "{events:?}");
    // The Job controller has its say too.
    assert!(
        events.iter().any(|event| event.reason == "SuccessfulCreate"),
        "{events:?}"
    );

    stop(&runtime, &spec).await;
    let kept = log(&runtime, id, None).await.expect("kept");
    assert_eq!(
        (kept.text.as_str(), kept.gone),
        ("token [token]\ntwo\nthree\n", true)
    );
    let rest = log(&runtime, id, more.next).await.expect("kept");
    assert_eq!((rest.text.as_str(), rest.gone), ("", true));
    let events = runtime.events(id).await.expect("readable").expect("kept");
    assert!(is_told(&events), "{events:?}");
    drop(runtime);
    output_of_one_that_ended(space, &kubelet).await;
}

/// A pod that has ended is removed by Kubernetes after a while, whether anybody asks or not.
async fn output_of_one_that_ended(space: &Space, kubelet: &Kubelet) {
    let runtime = space.open("node-7").await;
    let spec = spec("ends");
    let id = &spec.deployment;
    start(space, &runtime, &spec).await;
    let pods = space.pods().list(&ListParams::default()).await.expect("it works");
    let pod = pods.items[0].name_any();
    kubelet.write(&pod, "chute", "2026-01-01T00:00:01Z last words\n");
    space.say(id, failed(3));
    until(&runtime, id, "ended", is_ended).await;
    // It is read once more from the pod, until it is kept.
    let is_kept = async {
        let logs = space.logs().join("node-7");
        while !logs.join(format!("{id}.json")).exists() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let soon = std::time::Duration::from_secs(30);
    tokio::time::timeout(soon, is_kept).await.expect("it is kept");
    let job = job_name(id);
    space
        .jobs()
        .delete(&job, &DeleteParams::background())
        .await
        .expect("it works");
    space.until_pods(id, 0).await;
    stop(&runtime, &spec).await;
    let kept = log(&runtime, id, None).await.expect("kept");
    assert_eq!((kept.text.as_str(), kept.gone), ("last words\n", true));
}

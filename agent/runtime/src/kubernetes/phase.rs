//! What the objects of one deployment say of it (pure).

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus, Service};
use kube::ResourceExt as _;
use protocol::id::GpuId;
use protocol::workload::{Fence, WorkloadPhase};

use crate::manifest::{CHUTE_CONTAINER, LAUNCHED_ANNOTATION, fence_of, gpus_of, ports_of};

/// Reasons for which a container waits that no waiting ends.
const HOPELESS: [&str; 2] = ["InvalidImageName", "ErrImageNeverPull"];

/// The objects of one deployment.
#[derive(Debug, Clone, Default)]
pub(super) struct Objects {
    pub(super) job: Option<Arc<Job>>,
    pub(super) service: Option<Arc<Service>>,
    pub(super) pods: BTreeMap<String, Arc<Pod>>,
}

impl Objects {
    pub(super) fn is_empty(&self) -> bool {
        self.job.is_none() && self.service.is_none() && self.pods.is_empty()
    }

    /// Whether its Job was made once; it may be gone since.
    pub(super) fn was_launched(&self) -> bool {
        let service = self.service.as_ref();
        let noted = service.is_some_and(|service| service.annotations().contains_key(LAUNCHED_ANNOTATION));
        noted || self.job.is_some() || !self.pods.is_empty()
    }

    /// Another miner made it, and an operator has begun to hand it to us, or the watches do not show the end of that.
    pub(super) fn is_being_taken_over(&self) -> bool {
        match (&self.job, &self.service) {
            (Some(job), _) => fence_of(&**job).is_none(),
            (None, Some(service)) => fence_of(&**service).is_none(),
            (None, None) => false,
        }
    }

    /// It was another miner's, and whether its Job is gone or only not shown yet is to be asked of the API server.
    pub(super) fn may_have_a_job(&self) -> bool {
        let seal =
            |service: &Arc<Service>| fence_of(&**service).is_none_or(|fence| fence == Fence::default());
        self.job.is_none() && self.service.as_ref().is_some_and(seal)
    }

    /// A pod of it is not over.
    pub(super) fn holds_gpus(&self) -> bool {
        self.pods.values().any(|pod| !is_over(pod))
    }

    /// The GPUs that it was given, as far as its objects say.
    pub(super) fn gpus(&self) -> Vec<GpuId> {
        let job = self.job.as_deref().and_then(gpus_of);
        let service = self.service.as_deref().and_then(gpus_of);
        let pod = || self.pods.values().find_map(|pod| gpus_of(&**pod));
        job.or(service).or_else(pod).unwrap_or_default()
    }

    /// How far it is. A workload whose pods are all over holds no GPU; one with any other pod does, whatever became
    /// of its Job.
    pub(super) fn phase(&self) -> WorkloadPhase {
        let holding = self.pods.values().find(|pod| !is_over(pod));
        let Some(job) = &self.job else {
            return match holding {
                Some(pod) if pod.metadata.deletion_timestamp.is_some() => WorkloadPhase::Stopping,
                // Nobody ends it but us: it goes on until it is not wanted.
                Some(_) => WorkloadPhase::Running {
                    ports: Vec::new(),
                    ready: false,
                },
                None if self.was_launched() => ended(None, "its Job was removed"),
                None => WorkloadPhase::Pending,
            };
        };
        if job.metadata.deletion_timestamp.is_some() {
            return WorkloadPhase::Stopping;
        }
        let over = self.pods.values().next_back();
        match (holding, over) {
            (Some(pod), _) => under_way(pod, job),
            (None, Some(pod)) => end_of(pod),
            (None, None) => match end_of_job(job) {
                Some(reason) => ended(None, &reason),
                None => WorkloadPhase::Pending,
            },
        }
    }
}

fn ended(exit_code: Option<i32>, reason: &str) -> WorkloadPhase {
    WorkloadPhase::Ended {
        exit_code,
        reason: reason.to_owned(),
    }
}

fn status(pod: &Pod) -> Option<&PodStatus> {
    pod.status.as_ref()
}

fn pod_phase(pod: &Pod) -> &str {
    status(pod)
        .and_then(|status| status.phase.as_deref())
        .unwrap_or("Pending")
}

/// Its containers have ended and it holds nothing any more.
pub(super) fn is_over(pod: &Pod) -> bool {
    matches!(pod_phase(pod), "Succeeded" | "Failed")
}

fn containers(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = status(pod);
    let first = status.and_then(|status| status.init_container_statuses.as_ref());
    let then = status.and_then(|status| status.container_statuses.as_ref());
    first.into_iter().chain(then).flatten()
}

fn under_way(pod: &Pod, job: &Job) -> WorkloadPhase {
    if pod_phase(pod) == "Running" || pod_phase(pod) == "Unknown" {
        let containers = status(pod).and_then(|status| status.container_statuses.as_ref());
        let ready = containers.is_some_and(|all| !all.is_empty() && all.iter().all(|one| one.ready));
        let ports = ports_of(job).unwrap_or_default();
        // One that is being removed is about to lose its traffic.
        let ready = ready && pod.metadata.deletion_timestamp.is_none();
        return WorkloadPhase::Running { ports, ready };
    }
    match why_it_waits(pod) {
        Some((reason, message)) if HOPELESS.contains(&reason) => ended(None, &format!("{reason}: {message}")),
        // The kubelet does not say how many bytes it has.
        _ => WorkloadPhase::Pulling { bytes_done: 0 },
    }
}

/// Why a pod that has not started yet waits: the kubelet's word for it, and its explanation in one line.
pub(super) fn why_it_waits(pod: &Pod) -> Option<(&str, String)> {
    let waiting = |container: &'_ ContainerStatus| {
        let waiting = container.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_deref()?;
        // These are how it starts, not why it does not.
        let usual = matches!(reason, "ContainerCreating" | "PodInitializing");
        (!usual).then(|| (container.name.clone(), waiting.message.clone()))
    };
    for container in containers(pod) {
        if let Some((name, message)) = waiting(container) {
            let reason = container.state.as_ref()?.waiting.as_ref()?.reason.as_deref()?;
            return Some((
                reason,
                one_line(&format!("container {name}: {}", message.unwrap_or_default())),
            ));
        }
    }
    let conditions = status(pod)?.conditions.as_ref()?;
    let unscheduled = conditions
        .iter()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False")?;
    let message = unscheduled.message.clone().unwrap_or_default();
    Some((
        unscheduled.reason.as_deref().unwrap_or("Unscheduled"),
        one_line(&message),
    ))
}

/// The container whose output says most of a pod: the chute's once it has started, before that the one that keeps it
/// from starting. None while nothing has started.
pub(super) fn speaks(pod: &Pod) -> Option<&str> {
    let has_started = |container: &&ContainerStatus| {
        let state = container.state.as_ref();
        let has_state = state.is_some_and(|state| state.running.is_some() || state.terminated.is_some());
        has_state || container.restart_count > 0
    };
    let started: Vec<&ContainerStatus> = containers(pod).filter(has_started).collect();
    let chute = started.iter().find(|container| container.name == CHUTE_CONTAINER);
    chute.or(started.last()).map(|container| container.name.as_str())
}

/// How a pod that is over has ended: the kubelet's verdict on the pod, else what its containers say.
fn end_of(pod: &Pod) -> WorkloadPhase {
    if let Some((reason, message)) = status(pod).and_then(|status| {
        let reason = status.reason.as_deref()?;
        Some((reason, status.message.clone().unwrap_or_default()))
    }) {
        return ended(
            exit_code(pod),
            one_line(&format!("{reason}: {message}")).trim_end_matches([':', ' ']),
        );
    }
    let ends = containers(pod).filter_map(|container| {
        let end = container.state.as_ref()?.terminated.as_ref()?;
        Some((container.name.as_str(), end))
    });
    // The container that failed first explains the rest; the chute itself comes last.
    let mut last = None;
    for (name, end) in ends {
        last = Some((name, end));
        if end.exit_code != 0 {
            break;
        }
    }
    let Some((name, end)) = last else {
        return ended(None, "its pod is over and says nothing of its containers");
    };
    let what = match end.reason.as_deref() {
        Some("OOMKilled") => format!("killed: out of memory (exit code {})", end.exit_code),
        _ => format!("exit code {}", end.exit_code),
    };
    let told = end.message.as_deref().unwrap_or_default();
    let mut reason = if name == CHUTE_CONTAINER {
        what
    } else {
        format!("container {name}: {what}")
    };
    if !told.is_empty() {
        reason = format!("{reason}: {told}");
    }
    ended(Some(end.exit_code), &one_line(&reason))
}

fn exit_code(pod: &Pod) -> Option<i32> {
    let mut chute = containers(pod).filter(|container| container.name == CHUTE_CONTAINER);
    Some(chute.next()?.state.as_ref()?.terminated.as_ref()?.exit_code)
}

/// A Job whose pod is gone: why it will make no other one.
fn end_of_job(job: &Job) -> Option<String> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    let end = conditions.iter().find(|condition| {
        condition.status == "True" && matches!(condition.type_.as_str(), "Failed" | "Complete")
    })?;
    let reason = end.reason.clone().unwrap_or_else(|| end.type_.clone());
    let message = end.message.clone().unwrap_or_default();
    Some(one_line(&format!(
        "its pod is gone; the Job says {reason}: {message}"
    )))
}

/// The first part of a text, without line breaks.
pub(super) fn one_line(text: &str) -> String {
    const CHARACTERS_MAX: usize = 400;
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(CHARACTERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::environment::tests::spec;
    use crate::manifest::{self, Settings};
    use protocol::workload::{PortMapping, PortProtocol};

    const FENCE: Fence = Fence {
        incarnation: 1,
        revision: 2,
    };

    fn ports() -> Vec<PortMapping> {
        vec![PortMapping {
            internal: 8000,
            external: 31000,
            protocol: PortProtocol::Tcp,
        }]
    }

    fn job(status: Value) -> Job {
        let mut job = manifest::job(&spec(), FENCE, &Settings::for_node("n"), &ports());
        job.status = serde_json::from_value(status).expect("a Job's status");
        job
    }

    fn objects(job: Option<Job>, pods: &[Value]) -> Objects {
        let pods = pods.iter().enumerate().map(|(number, status)| {
            let pod: Pod =
                serde_json::from_value(json!({ "metadata": {}, "status": status })).expect("a pod");
            (format!("pod-{number}"), Arc::new(pod))
        });
        Objects {
            job: job.map(Arc::new),
            service: None,
            pods: pods.collect(),
        }
    }

    fn chute(state: &Value) -> Value {
        json!([{ "name": "chute", "image": "", "imageID": "", "ready": true, "restartCount": 0, "state": state }])
    }

    fn terminated(code: i32, reason: &str) -> Value {
        json!({ "terminated": { "exitCode": code, "reason": reason } })
    }

    #[test]
    fn each_state_of_a_pod_is_a_phase() {
        let waiting = |reason: &str| json!({ "waiting": { "reason": reason, "message": "a\nb" } });
        let pulling = WorkloadPhase::Pulling { bytes_done: 0 };
        let rows = [
            (json!({}), pulling.clone()),
            (
                json!({ "phase": "Pending", "containerStatuses": chute(&waiting("ImagePullBackOff")) }),
                pulling.clone(),
            ),
            (
                json!({ "phase": "Pending", "containerStatuses": chute(&waiting("InvalidImageName")) }),
                ended(None, "InvalidImageName: container chute: a b"),
            ),
            (
                json!({ "phase": "Running", "containerStatuses": chute(&json!({ "running": {} })) }),
                WorkloadPhase::Running {
                    ports: ports(),
                    ready: true,
                },
            ),
            (
                json!({ "phase": "Running" }),
                WorkloadPhase::Running {
                    ports: ports(),
                    ready: false,
                },
            ),
            (
                json!({ "phase": "Unknown" }),
                WorkloadPhase::Running {
                    ports: ports(),
                    ready: false,
                },
            ),
            (
                json!({ "phase": "Failed", "containerStatuses": chute(&terminated(3, "Error")) }),
                ended(Some(3), "exit code 3"),
            ),
            (
                json!({ "phase": "Failed", "containerStatuses": chute(&terminated(137, "OOMKilled")) }),
                ended(Some(137), "killed: out of memory (exit code 137)"),
            ),
            (
                json!({ "phase": "Failed", "reason": "OutOfmemory", "message": "Node didn't have enough" }),
                ended(None, "OutOfmemory: Node didn't have enough"),
            ),
            (
                json!({ "phase": "Failed", "reason": "Evicted", "containerStatuses": chute(&terminated(137, "Error")) }),
                ended(Some(137), "Evicted"),
            ),
            (
                json!({ "phase": "Succeeded", "containerStatuses": chute(&terminated(0, "Completed")) }),
                ended(Some(0), "exit code 0"),
            ),
            (
                json!({ "phase": "Failed" }),
                ended(None, "its pod is over and says nothing of its containers"),
            ),
        ];
        for (pod, expected) in rows {
            assert_eq!(
                objects(Some(job(json!({}))), std::slice::from_ref(&pod)).phase(),
                expected,
                "{pod}"
            );
        }
    }

    #[test]
    fn an_init_container_that_failed_explains_the_end() {
        let mut init = chute(&terminated(2, "Error"));
        init[0]["name"] = json!("cache-init");
        let pod = json!({ "phase": "Failed", "initContainerStatuses": init, "containerStatuses": chute(&json!({})) });
        let expected = ended(Some(2), "container cache-init: exit code 2");
        assert_eq!(objects(Some(job(json!({}))), &[pod]).phase(), expected);
    }

    #[test]
    fn a_gpu_is_held_as_long_as_any_pod_is_not_over() {
        let (running, failed) = (json!({ "phase": "Running" }), json!({ "phase": "Failed" }));
        let orphan = objects(None, std::slice::from_ref(&running));
        let goes_on = WorkloadPhase::Running {
            ports: Vec::new(),
            ready: false,
        };
        assert_eq!(orphan.phase(), goes_on, "its Job is gone");
        let both = objects(Some(job(json!({}))), &[failed.clone(), running]);
        assert!(matches!(both.phase(), WorkloadPhase::Running { .. }));
        let mut deleted = job(json!({}));
        let now = k8s_openapi::jiff::Timestamp::UNIX_EPOCH;
        deleted.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
        assert_eq!(objects(Some(deleted), &[failed]).phase(), WorkloadPhase::Stopping);
    }

    #[test]
    fn a_job_without_pods_waits_for_one_or_has_ended() {
        assert_eq!(objects(Some(job(json!({}))), &[]).phase(), WorkloadPhase::Pending);
        let failed = json!({ "conditions": [
            { "type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "no more" } ] });
        let expected = ended(
            None,
            "its pod is gone; the Job says BackoffLimitExceeded: no more",
        );
        assert_eq!(objects(Some(job(failed)), &[]).phase(), expected);
    }

    #[test]
    fn a_service_tells_a_job_that_was_removed_from_one_that_never_was() {
        let only = |launched| {
            let mut service = manifest::service(&spec(), FENCE, &Settings::for_node("n"));
            let annotations = service.metadata.annotations.get_or_insert_default();
            annotations.retain(|name, _| launched || name != LAUNCHED_ANNOTATION);
            Objects {
                service: Some(Arc::new(service)),
                ..Objects::default()
            }
        };
        assert_eq!(only(false).phase(), WorkloadPhase::Pending);
        assert_eq!(only(true).phase(), ended(None, "its Job was removed"));
        assert_eq!(only(true).gpus(), spec().gpus);
    }
}

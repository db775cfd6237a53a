//! What pods write and what happens to them, as the API server says; and what is kept of it before they go.
//!
//! Output is read with the times of its lines, which are the places in it: the kubelet knows no others.

use std::time::Duration;

use futures_util::AsyncReadExt as _;
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{ListParams, LogParams};
use protocol::id::DeploymentId;
use protocol::logs::{LOG_BYTES_MAX, Log, LogQuery, WorkloadEvent};
use protocol::time::UnixMillis;
use tokio::time::timeout;

use super::phase::{Objects, is_over, one_line, speaks};
use super::trouble::Trouble;
use super::{Cluster, lock};
use crate::Error;
use crate::logs::{Remains, last_lines, redacted};
use crate::manifest::{job_name, service_name};

/// Lines that are asked for when the end of an output is wanted.
const LINES_MAX: i64 = 10_000;
/// What is to be kept must be read within this time: GPUs wait for the removal.
const KEEP_MAX: Duration = Duration::from_secs(5);
/// What the Job controller says of a pod that it was not allowed to make.
const POD_REFUSED: &str = "FailedCreate";
const CHUNK_BYTES: usize = 64 * 1024;

/// The pod that speaks for a deployment.
fn newest(objects: &Objects) -> Option<&Pod> {
    let pods = objects.pods.values().map(AsRef::as_ref);
    pods.max_by_key(|pod| (pod.creation_timestamp(), pod.name_any()))
}

impl Cluster {
    pub(super) async fn log(&self, query: &LogQuery) -> Result<Option<Log>, Error> {
        let deployment = &query.deployment;
        let objects = self.seen.objects(deployment)?;
        let after = query.place::<Timestamp>().map_err(Error::Refused)?;
        if let Some(pod) = newest(&objects) {
            let lines = self.lines(pod, query.previous, after).await?;
            return Ok(Some(log_of(&lines, after, false)));
        }
        if query.previous {
            let why = "it has no pod any more, and what was kept is of its last run";
            return Err(Error::Refused(why.to_owned()));
        }
        let is_there = lock(&self.lives).contains_key(deployment) || !objects.is_empty();
        match self.kept.get(deployment).map_err(Error::kept)? {
            Some(remains) => Ok(Some(log_of(&remains.log, after, !is_there))),
            None => Ok(is_there.then(|| log_of("", after, false))),
        }
    }

    pub(super) async fn events(
        &self,
        deployment: &DeploymentId,
    ) -> Result<Option<Vec<WorkloadEvent>>, Error> {
        let objects = self.seen.objects(deployment)?;
        let is_there = lock(&self.lives).contains_key(deployment) || !objects.is_empty();
        if is_there {
            return self.events_of(deployment, &objects).await.map(Some);
        }
        let kept = self.kept.get(deployment).map_err(Error::kept)?;
        Ok(kept.map(|remains| remains.events))
    }

    /// Reads what a pod's chute wrote, or whatever keeps it from starting; whole lines with their times.
    async fn lines(&self, pod: &Pod, previous: bool, after: Option<Timestamp>) -> Result<String, Error> {
        let Some(container) = speaks(pod) else {
            return Ok(String::new());
        };
        let parameters = LogParams {
            container: Some(container.to_owned()),
            previous,
            // Whole seconds only, and rounded to the nearest if they are not.
            since_time: after.and_then(|after| Timestamp::from_second(after.as_second()).ok()),
            tail_lines: after.is_none().then_some(LINES_MAX),
            timestamps: true,
            ..LogParams::default()
        };
        let read = async {
            let stream = self.pods.log_stream(&pod.name_any(), &parameters).await;
            let stream = stream.map_err(|error| match Trouble::of(&error) {
                Trouble::Invalid(why) => Error::Refused(why),
                Trouble::Refused(why) | Trouble::Unreachable(why) => Error::Unknown(why),
            })?;
            let mut stream = std::pin::pin!(stream);
            let mut lines = Lines::after(after);
            let mut chunk = vec![0; CHUNK_BYTES];
            loop {
                let read = stream.read(&mut chunk).await;
                let read = read.map_err(|error| Error::Unknown(error.to_string()))?;
                if read == 0 || lines.push(&chunk[..read]) {
                    break;
                }
            }
            Ok(lines.end(previous || is_over(pod)))
        };
        match timeout(self.config.call_timeout, read).await {
            Ok(lines) => lines,
            Err(_) => Err(Error::Unknown("the node did not answer in time".to_owned())),
        }
    }

    async fn events_of(
        &self,
        deployment: &DeploymentId,
        objects: &Objects,
    ) -> Result<Vec<WorkloadEvent>, Error> {
        let names = [service_name(deployment), job_name(deployment)];
        let mut all = Vec::new();
        for name in names.iter().chain(objects.pods.keys()) {
            all.extend(self.events_about(name).await?);
        }
        all.sort_by(|a, b| a.at.cmp(&b.at).then_with(|| a.reason.cmp(&b.reason)));
        Ok(all)
    }

    async fn events_about(&self, name: &str) -> Result<Vec<WorkloadEvent>, Error> {
        let about = ListParams::default().fields(&format!("involvedObject.name={name}"));
        let listed = timeout(self.config.call_timeout, self.events.list(&about)).await;
        let listed = listed.map_err(|_| Error::Unknown("the API server did not answer".to_owned()))?;
        let listed = listed.map_err(|error| Error::Unknown(error.to_string()))?;
        Ok(listed.items.iter().map(event_of).collect())
    }

    /// Why a deployment's Job makes no pod, as the newest of its events says; None while it is not known.
    pub(super) async fn why_it_has_no_pod(&self, deployment: &DeploymentId) -> Option<String> {
        let events = self.events_about(&job_name(deployment)).await.ok()?;
        let refused = events.into_iter().filter(|event| event.reason == POD_REFUSED);
        let newest = refused.max_by_key(|event| event.at)?;
        Some(one_line(&format!("{}: {}", newest.reason, newest.message)))
    }

    /// Keeps what is known of a workload that is about to be removed.
    pub(super) async fn keep(&self, deployment: &DeploymentId) {
        let Ok(objects) = self.seen.objects(deployment) else {
            return;
        };
        let log = async {
            match newest(&objects) {
                Some(pod) => self.lines(pod, false, None).await,
                None => Ok(String::new()),
            }
        };
        let late = |_| Err(Error::Unknown("it took too long".to_owned()));
        let (log, events) = tokio::join!(
            timeout(KEEP_MAX, log),
            timeout(KEEP_MAX, self.events_of(deployment, &objects))
        );
        let told = |error| tracing::warn!(%deployment, %error, "not all of what it left is kept");
        let log = log.unwrap_or_else(late).map_err(told).unwrap_or_default();
        let late = |_| Err(Error::Unknown("it took too long".to_owned()));
        let events = events.unwrap_or_else(late).map_err(told).unwrap_or_default();
        // An earlier agent may have kept more, when there was more.
        if log.is_empty() && (events.is_empty() || matches!(self.kept.get(deployment), Ok(Some(_)))) {
            return;
        }
        let end = log_of(&log, None, true).next;
        let remains = Remains { log, end, events };
        if let Err(error) = self.kept.put(deployment, &remains) {
            tracing::warn!(%deployment, %error, "what it left is not kept");
        }
    }
}

/// Whole lines as they come in, as many as are answered at once: the first ones after a time, else the last ones.
struct Lines {
    after: Option<Timestamp>,
    whole: String,
    /// A line whose end has not come yet.
    begun: Vec<u8>,
}

impl Lines {
    fn after(after: Option<Timestamp>) -> Self {
        Self {
            after,
            whole: String::new(),
            begun: Vec::new(),
        }
    }

    /// Takes the next bytes; true when no more are needed.
    fn push(&mut self, bytes: &[u8]) -> bool {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.begun.extend_from_slice(piece);
            // A line that is too long is cut.
            if (piece.ends_with(b"\n") || self.begun.len() >= LOG_BYTES_MAX) && self.take_line() {
                return true;
            }
        }
        false
    }

    fn take_line(&mut self) -> bool {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.begun)).into_owned();
        match self.after {
            None => {
                self.whole.push_str(&line);
                if self.whole.len() > 2 * LOG_BYTES_MAX {
                    self.whole = last_lines(&self.whole).to_owned();
                }
                false
            }
            Some(after) => {
                let is_full = !self.whole.is_empty() && self.whole.len() + line.len() > LOG_BYTES_MAX;
                if !is_full && timed(&line).is_some_and(|(at, _)| at > after) {
                    self.whole.push_str(&line);
                }
                is_full
            }
        }
    }

    /// All of it, without tokens. The end of a line that is still being written is to come with its beginning.
    fn end(mut self, is_over: bool) -> String {
        if is_over && !self.begun.is_empty() {
            self.take_line();
        }
        redacted(last_lines(&self.whole))
    }
}

/// A line's time and the rest of it.
fn timed(line: &str) -> Option<(Timestamp, &str)> {
    let (time, line) = line.split_once(' ')?;
    Some((time.parse().ok()?, line))
}

/// Lines with their times as an answer: those after a time, without it. What has no time is not the workload's.
fn log_of(lines: &str, after: Option<Timestamp>, gone: bool) -> Log {
    let (mut text, mut last) = (String::new(), after);
    for line in lines.split_inclusive('\n') {
        match timed(line) {
            Some((at, _)) if after.is_some_and(|after| at <= after) => {}
            Some((at, line)) => {
                text.push_str(line);
                last = last.max(Some(at));
            }
            None if after.is_none() => text.push_str(line),
            None => {}
        }
    }
    Log {
        text,
        next: last.map(|last| last.to_string()),
        gone,
    }
}

fn event_of(event: &Event) -> WorkloadEvent {
    let series = event.series.as_ref();
    let last = series.and_then(|series| series.last_observed_time.as_ref().map(|time| time.0));
    let last = last.or(event.last_timestamp.as_ref().map(|time| time.0));
    let at = last.or(event.event_time.as_ref().map(|time| time.0)).or(event
        .metadata
        .creation_timestamp
        .as_ref()
        .map(|time| time.0));
    let object = &event.involved_object;
    let part = |part: &Option<String>| part.clone().unwrap_or_default();
    let count = event.count.or(series.and_then(|series| series.count));
    WorkloadEvent {
        at: UnixMillis(at.map_or(0, |at| u64::try_from(at.as_millisecond()).unwrap_or(0))),
        object: format!("{} {}", part(&object.kind), part(&object.name)),
        reason: part(&event.reason),
        message: redacted(&part(&event.message)),
        count: count.and_then(|count| u32::try_from(count).ok()).unwrap_or(1),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn times_of_lines_are_the_places_in_an_output() {
        let lines = "2026-01-01T00:00:00.1Z one\n2026-01-01T00:00:00.12Z \n2026-01-01T00:00:02Z three: 3\n";
        let whole = log_of(lines, None, false);
        assert_eq!(whole.text, "one\n\nthree: 3\n");
        let place = "2026-01-01T00:00:00.1Z".parse().expect("a time");
        let later = log_of(lines, Some(place), false);
        assert_eq!((later.text.as_str(), &later.next), ("\nthree: 3\n", &whole.next));
        let end = whole.next.expect("there are lines").parse().expect("a time");
        let none = log_of(lines, Some(end), true);
        assert_eq!((none.text.as_str(), none.gone), ("", true));
        assert_eq!(none.next, Some(end.to_string()), "the place stays");
    }

    fn read(text: &str, after: Option<&str>, is_over: bool) -> String {
        let mut lines = Lines::after(after.map(|after| after.parse().expect("a time")));
        // In pieces that end anywhere.
        for piece in text.as_bytes().chunks(7) {
            if lines.push(piece) {
                break;
            }
        }
        lines.end(is_over)
    }

    #[test]
    fn whole_lines_after_a_time_are_read_and_none_is_passed_over() {
        let text = "2026-01-01T00:00:00.6Z ü\n2026-01-01T00:00:00.9Z b\n2026-01-01T00:00:01Z c";
        let second = "2026-01-01T00:00:00.9Z b\n";
        assert_eq!(read(text, Some("2026-01-01T00:00:00.6Z"), false), second);
        assert_eq!(read(text, Some("2026-01-01T00:00:00.9Z"), false), "");
        let last = "2026-01-01T00:00:01Z c";
        assert_eq!(read(text, Some("2026-01-01T00:00:00.9Z"), true), last);
        assert_eq!(read(text, None, true), text);
        // More than is answered at once: the first of it, up to a whole line.
        let long = "x".repeat(LOG_BYTES_MAX / 2);
        let line = |second: u32| format!("2026-01-01T00:00:0{second}Z {long}\n");
        let all: String = (1..5).map(line).collect();
        assert_eq!(read(&all, Some("2026-01-01T00:00:01Z"), false), line(2));
        assert_eq!(read(&all, Some("2026-01-01T00:00:02Z"), false), line(3));
        assert_eq!(read(&all, None, false), line(4), "the end of it");
    }

    #[test]
    fn lines_without_a_time_are_shown_once() {
        let lines = "unable to retrieve container logs\n";
        assert_eq!(log_of(lines, None, false).text, lines);
        let place = "2026-01-01T00:00:00Z".parse().expect("a time");
        assert_eq!(log_of(lines, Some(place), false).text, "");
    }

    #[test]
    fn both_forms_of_events_are_read() {
        let old = json!({ "metadata": {}, "involvedObject": { "kind": "Pod", "name": "p" }, "reason": "BackOff",
            "message": "token eyJhbGciOi.eyJzdWIi.c2ln", "count": 3, "lastTimestamp": "1970-01-01T00:00:01Z" });
        let new = json!({ "metadata": {}, "involvedObject": { "kind": "Pod", "name": "p" }, "reason": "BackOff",
            "message": "token [token]", "eventTime": "1970-01-01T00:00:00Z",
            "series": { "count": 3, "lastObservedTime": "1970-01-01T00:00:01.000000Z" } });
        for event in [old, new] {
            let event = event_of(&serde_json::from_value(event).expect("an event"));
            let expected = WorkloadEvent {
                at: UnixMillis(1000),
                object: "Pod p".to_owned(),
                reason: "BackOff".to_owned(),
                message: "token [token]".to_owned(),
                count: 3,
            };
            assert_eq!(event, expected);
        }
    }
}

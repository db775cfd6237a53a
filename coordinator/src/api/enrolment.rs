//! `POST /servers/`: puts a host to work for a validator, and follows it while the client listens.
//!
//! The enrolment itself is a command and goes on whether anybody listens or not. Frames are
//! `data: {"timestamp","message"}`; the last one also has `state`: `ready` or `failed`. After `failed` the
//! body is cut, which is the only failure that original clients notice.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use coordinator_core::state_machine::Command;
use coordinator_core::state_machine::server::{ENROLMENT_TIMEOUT_MS, EnrolmentPhase};
use futures_util::stream;
use protocol::hotkey::Hotkey;
use protocol::id::ServerId;
use protocol::time::UnixMillis;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Api;
use super::auth::Caller;
use super::error::{ApiError, Result};
use crate::store::{BoxFuture, Changes, Store};
use crate::validator::ValidatorApi;

/// A frame at least this often.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Nobody is followed for longer; the state's own deadline comes first.
const FOLLOW_MAX: Duration = Duration::from_millis(ENROLMENT_TIMEOUT_MS + 60_000);
/// Dollars per GPU and hour beyond which a cost is a slip of the pen.
const HOURLY_COST_MAX: f64 = 1000.0;

/// GPU types that validators take.
pub trait SupportedGpus: fmt::Debug + Send + Sync {
    /// Short references of one validator; the text says why there are none.
    fn supported_gpus<'a>(
        &'a self,
        validator: &'a Hotkey,
    ) -> BoxFuture<'a, std::result::Result<BTreeSet<String>, String>>;
}

impl SupportedGpus for BTreeMap<Hotkey, Arc<dyn ValidatorApi>> {
    fn supported_gpus<'a>(
        &'a self,
        validator: &'a Hotkey,
    ) -> BoxFuture<'a, std::result::Result<BTreeSet<String>, String>> {
        Box::pin(async move {
            let api = self.get(validator).ok_or("the validator is not configured")?;
            let types = api.supported_gpus().await.map_err(|error| error.to_string())?;
            Ok(types.into_keys().collect())
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct AddServer {
    name: String,
    validator: String,
    gpu_short_ref: String,
    hourly_cost_usd_micros: u64,
}

/// Dollars per GPU and hour in millionths; none if that is no cost.
pub(super) fn micros(dollars: f64) -> Option<u64> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and a thousand million"
    )]
    (0.0..=HOURLY_COST_MAX)
        .contains(&dollars)
        .then(|| (dollars * 1e6).round() as u64)
}

impl AddServer {
    /// Reads the body; unknown members (`agent_api` of newer clients) are left alone.
    fn parse(body: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(body).map_err(|error| {
            let at = json!(["body", error.column()]);
            let input = json!({});
            let ctx = json!({ "error": error.to_string() });
            let (kind, msg) = ("json_invalid", "JSON decode error");
            ApiError::invalid(vec![
                json!({ "type": kind, "loc": at, "msg": msg, "input": input, "ctx": ctx }),
            ])
        })?;
        let Some(object) = value.as_object() else {
            return Err(ApiError::invalid(vec![json!({
                "type": "model_attributes_type",
                "loc": ["body"],
                "msg": "Input should be a valid dictionary or object to extract fields from",
                "input": value,
            })]));
        };
        let mut problems = Vec::new();
        let mut problem = |name: &str, kind: &str, msg: &str, input: &Value| {
            problems.push(json!({ "type": kind, "loc": ["body", name], "msg": msg, "input": input }));
        };
        let mut text = |name: &str| match object.get(name) {
            None => {
                problem(name, "missing", "Field required", &value);
                String::new()
            }
            Some(Value::String(text)) => text.clone(),
            Some(other) => {
                problem(name, "string_type", "Input should be a valid string", other);
                String::new()
            }
        };
        let (name, validator, gpu_short_ref) = (text("name"), text("validator"), text("gpu_short_ref"));
        let hourly_cost_usd_micros = match object.get("hourly_cost") {
            None => {
                problem("hourly_cost", "missing", "Field required", &value);
                0
            }
            Some(given) => {
                let number = match given {
                    Value::String(text) => text.trim().parse::<f64>().ok(),
                    other => other.as_f64(),
                };
                match number.map(micros) {
                    Some(Some(micros)) => micros,
                    Some(None) => {
                        let msg = "Input should be dollars per GPU and hour, from 0 to 1000";
                        problem("hourly_cost", "out_of_range", msg, given);
                        0
                    }
                    None => {
                        problem(
                            "hourly_cost",
                            "float_type",
                            "Input should be a valid number",
                            given,
                        );
                        0
                    }
                }
            }
        };
        if !problems.is_empty() {
            return Err(ApiError::invalid(problems));
        }
        Ok(Self {
            name,
            validator,
            gpu_short_ref,
            hourly_cost_usd_micros,
        })
    }
}

pub(super) async fn add(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Response> {
    let asked = AddServer::parse(&body)?;
    let AddServer {
        name, gpu_short_ref, ..
    } = &asked;
    api.store.linearizable().await?;
    let server = api.store.read(|record| {
        let server = record.present_servers().find(|server| server.facts.name == *name);
        let server = server.ok_or_else(|| {
            let detail = format!("No kubernetes node with name={name} found!");
            ApiError::new(StatusCode::NOT_FOUND, detail)
        })?;
        if server.enrolment.is_some() {
            let detail = format!("Server with name={name} is already provisioned!");
            return Err(ApiError::new(StatusCode::CONFLICT, detail));
        }
        Ok(server.id().clone())
    })?;
    let not_configured = || {
        let detail = format!("validator {} is not configured", asked.validator);
        ApiError::new(StatusCode::BAD_REQUEST, detail)
    };
    if api.store.read(|record| record.settings().validators.is_empty()) {
        let detail = "the leader has not recorded its configuration yet: try again in a moment";
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, detail));
    }
    let validator = Hotkey::parse(&asked.validator).map_err(|_| not_configured())?;
    if !api
        .store
        .read(|record| record.settings().validators.contains(&validator))
    {
        return Err(not_configured());
    }
    let supported = api.deps.supported_gpus.supported_gpus(&validator).await;
    let supported = supported.map_err(|why| {
        let detail = format!("Error fetching validator's supported GPUs to check short ref: {why}");
        ApiError::new(StatusCode::BAD_GATEWAY, detail)
    })?;
    if !supported.contains(gpu_short_ref) {
        let detail = format!("{gpu_short_ref} is not supported by validator {validator}: {supported:?}");
        return Err(ApiError::new(StatusCode::BAD_REQUEST, detail));
    }
    let command = Command::EnrolServer {
        server: server.clone(),
        validator: validator.clone(),
        gpu_short_ref: gpu_short_ref.clone(),
        hourly_cost_usd_micros: asked.hourly_cost_usd_micros,
    };
    // Subscribed before the proposal, so that no change is missed.
    let changes = api.store.changes();
    api.propose(&caller, command).await?;
    let follower = Follower {
        store: api.store.clone(),
        changes,
        server,
        name: asked.name,
        validator,
        started: Instant::now(),
        next: Step::Added,
    };
    let frames = stream::unfold(follower, |mut follower| async move {
        let frame = follower.next_frame().await?;
        Some((frame, follower))
    });
    Ok((
        [(header::CONTENT_TYPE, "text/event-stream")],
        Body::from_stream(frames),
    )
        .into_response())
}

/// Where a follower is. The order is the reference's.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Added,
    Recorded,
    Devices,
    Advertising,
    AwaitAdvertised,
    AwaitVerified,
    Completed,
    Cut,
    End,
}

/// How far the enrolment is, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Progress {
    Advertising,
    Verifying,
    Ready,
    Failed(String),
}

#[derive(Debug)]
struct Follower {
    store: Store,
    changes: Changes,
    server: ServerId,
    name: String,
    validator: Hotkey,
    started: Instant,
    next: Step,
}

impl Follower {
    async fn next_frame(&mut self) -> Option<io::Result<Bytes>> {
        let (message, next) = match self.next {
            Step::Added => {
                let (name, server) = (&self.name, &self.server);
                (
                    format!("adding node {name} server_id={server} to server inventory"),
                    Step::Recorded,
                )
            }
            Step::Recorded => {
                let name = &self.name;
                let text = format!("server {name} is tracked in the database, it proves its GPUs by GraVal");
                (text, Step::Devices)
            }
            Step::Devices => (self.devices(), Step::Advertising),
            Step::Advertising => {
                let text = format!("advertising the GPUs to validator {}", self.validator);
                (text, Step::AwaitAdvertised)
            }
            Step::AwaitAdvertised => match self.wait(&Progress::Advertising).await {
                Ok(Some(Progress::Advertising)) => {
                    let text = format!("waiting for validator {} to take the GPUs", self.validator);
                    (text, Step::AwaitAdvertised)
                }
                Ok(Some(Progress::Verifying | Progress::Ready)) => {
                    let text = format!("GPUs advertised to validator {}, seed received", self.validator);
                    (text, Step::AwaitVerified)
                }
                Ok(Some(Progress::Failed(why))) | Err(why) => return self.fail(&why),
                Ok(None) => return None,
            },
            Step::AwaitVerified => match self.wait(&Progress::Verifying).await {
                Ok(Some(Progress::Advertising | Progress::Verifying)) => {
                    let text = format!("waiting for validator {} to verify the GPUs ...", self.validator);
                    (text, Step::AwaitVerified)
                }
                Ok(Some(Progress::Ready)) => {
                    let text = format!("validator {} has verified all GPUs", self.validator);
                    (text, Step::Completed)
                }
                Ok(Some(Progress::Failed(why))) | Err(why) => return self.fail(&why),
                Ok(None) => return None,
            },
            Step::Completed => {
                self.next = Step::End;
                let seconds = self.started.elapsed().as_secs_f64();
                let text = format!("completed server bootstrapping in {seconds:.1} seconds");
                return Some(Ok(self.frame(&text, Some("ready"))));
            }
            Step::Cut => {
                // Lets what was written before go out: an error drops what is buffered.
                tokio::task::yield_now().await;
                self.next = Step::End;
                return Some(Err(io::Error::other("the server was not added")));
            }
            Step::End => return None,
        };
        self.next = next;
        Some(Ok(self.frame(&message, None)))
    }

    fn fail(&mut self, why: &str) -> Option<io::Result<Bytes>> {
        self.next = Step::Cut;
        let text = format!("server {} was not added: {why}", self.name);
        Some(Ok(self.frame(&text, Some("failed"))))
    }

    fn frame(&self, message: &str, state: Option<&str>) -> Bytes {
        let mut frame = json!({ "timestamp": naive_utc(self.store.clock().now()), "message": message });
        if let Some(state) = state {
            frame["state"] = json!(state);
            frame["server_id"] = json!(self.server);
        }
        format!("data: {frame}\n\n").into()
    }

    fn devices(&self) -> String {
        self.store.read(|record| {
            let gpus: Vec<_> = record.gpus_of(&self.server).collect();
            let model = gpus.first().map_or("none", |gpu| gpu.device.name.as_str());
            format!(
                "discovered {} GPUs [{model}], advertising to 1 validator",
                gpus.len()
            )
        })
    }

    fn progress(&self) -> Progress {
        self.store.read(|record| {
            let server = record.servers().get(&self.server);
            let failure = server.and_then(|server| server.last_failure.clone());
            match server
                .and_then(|server| server.enrolment.as_ref())
                .map(|e| &e.phase)
            {
                Some(EnrolmentPhase::Advertising) => Progress::Advertising,
                Some(EnrolmentPhase::Verifying { .. }) => Progress::Verifying,
                Some(EnrolmentPhase::Ready) => Progress::Ready,
                Some(EnrolmentPhase::Leaving { reason }) => {
                    Progress::Failed(failure.unwrap_or_else(|| reason.clone()))
                }
                None => Progress::Failed(failure.unwrap_or_else(|| "it was removed".to_owned())),
            }
        })
    }

    /// Waits until the progress is another than `seen`, or a keep-alive is due. `None` when the state is gone.
    async fn wait(&mut self, seen: &Progress) -> std::result::Result<Option<Progress>, String> {
        if self.started.elapsed() > FOLLOW_MAX {
            return Err("the validator has not decided in time; it may still do so".to_owned());
        }
        let due = Instant::now() + KEEP_ALIVE;
        loop {
            let progress = self.progress();
            if progress != *seen {
                return Ok(Some(progress));
            }
            if tokio::time::timeout_at(due, self.changes.changed())
                .await
                .is_err()
            {
                return Ok(Some(progress));
            }
        }
    }
}

/// As the original prints times in frames: UTC without saying so, microseconds.
fn naive_utc(at: UnixMillis) -> String {
    let text = at.iso8601();
    text.strip_suffix("+00:00").unwrap_or(&text).to_owned()
}

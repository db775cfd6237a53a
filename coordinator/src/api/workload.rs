//! `GET /v1/deployments/{id}/log` and `.../events`: what a workload wrote and what happened to it, as its host says.
//! Any member finds the host; seven days after the end there is still what was kept.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use protocol::id::{DeploymentId, ServerId};
use protocol::logs::{HostAnswer, HostQuestion, LogQuery};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::deployments::no_deployment;
use super::error::{ApiError, Result};

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    /// Of the run before the present one.
    #[serde(default)]
    previous: bool,
    /// Only what came after this place: `next` of an earlier answer.
    after: Option<String>,
}

pub(super) async fn log(
    State(api): State<Arc<Api>>,
    Path(text): Path<String>,
    Query(part): Query<Part>,
) -> Result<Json<Value>> {
    let place = place(&api, &text)?;
    let question = HostQuestion::Log(LogQuery {
        deployment: place.deployment.clone(),
        previous: part.previous,
        after: part.after,
    });
    match place.ask(&api, question).await? {
        HostAnswer::Log(log) => Ok(Json(json!({
            "deployment_id": place.deployment,
            "server_id": place.server,
            "server_name": place.name,
            "text": log.text,
            "next": log.next,
            "gone": log.gone,
        }))),
        other => Err(place.failed(other)),
    }
}

pub(super) async fn events(State(api): State<Arc<Api>>, Path(text): Path<String>) -> Result<Json<Value>> {
    let place = place(&api, &text)?;
    let question = HostQuestion::Events(place.deployment.clone());
    match place.ask(&api, question).await? {
        HostAnswer::Events(events) => {
            let row = |event: protocol::logs::WorkloadEvent| {
                json!({
                    "at": event.at.iso8601(),
                    "object": event.object,
                    "reason": event.reason,
                    "message": event.message,
                    "count": event.count,
                })
            };
            Ok(Json(json!({
                "deployment_id": place.deployment,
                "server_id": place.server,
                "server_name": place.name,
                "events": events.into_iter().map(row).collect::<Vec<_>>(),
            })))
        }
        other => Err(place.failed(other)),
    }
}

/// Where a deployment is or was.
struct Place {
    deployment: DeploymentId,
    server: ServerId,
    name: String,
}

/// Where a deployment runs, or ran before it went.
fn place(api: &Api, text: &str) -> Result<Place> {
    let id = DeploymentId::parse(text).map_err(|_| no_deployment(text))?;
    api.store.read(|record| {
        let gone = || record.audits().get(&id).map(|audit| &audit.deployment);
        let deployment = record.deployments().get(&id).or_else(gone);
        let server = deployment.ok_or_else(|| no_deployment(text))?.server.clone();
        let name = record
            .servers()
            .get(&server)
            .map(|server| server.facts.name.clone());
        Ok(Place {
            name: name.unwrap_or_else(|| server.to_string()),
            deployment: id.clone(),
            server,
        })
    })
}

impl Place {
    /// Asks the host, wherever it is connected.
    async fn ask(&self, api: &Api, question: HostQuestion) -> Result<HostAnswer> {
        let answer = match api.deps.hosts.ask(&self.server, question.clone()) {
            Some(asked) => asked.await,
            None => api.deps.others.ask_host(&self.server, &question).await,
        };
        answer.map_err(|why| {
            let detail = format!("host {} did not answer: {why}", self.name);
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, detail)
        })
    }

    /// What an answer that is none says.
    fn failed(&self, answer: HostAnswer) -> ApiError {
        let name = &self.name;
        match answer {
            HostAnswer::Failed(why) => ApiError::new(StatusCode::BAD_GATEWAY, format!("host {name}: {why}")),
            HostAnswer::Refused(why) => ApiError::new(StatusCode::BAD_REQUEST, format!("host {name}: {why}")),
            HostAnswer::Unknown => ApiError::new(
                StatusCode::NOT_FOUND,
                format!(
                    "host {name} has nothing of deployment {}: it never started there, or ended more than 7 days ago",
                    self.deployment
                ),
            ),
            HostAnswer::Log(_) | HostAnswer::Events(_) => ApiError::new(
                StatusCode::BAD_GATEWAY,
                format!("host {name} answered another question"),
            ),
        }
    }
}

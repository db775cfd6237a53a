//! `/deployments`: taking deployments down, by the rules of the original with its promise about jobs kept.

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use coordinator_core::state_machine::command::Allowance;
use coordinator_core::state_machine::deployment::{Deployment, StopReason};
use coordinator_core::state_machine::{Command, Reply, State as Record};
use protocol::id::{DeploymentId, ServerId};
use serde_json::{Value, json};

use super::Api;
use super::auth::Caller;
use super::error::{ApiError, Result};
use super::objects::PurgedObject;
use super::servers::JobsQuery;

pub(super) async fn purge(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<JobsQuery>,
) -> Result<Json<Value>> {
    purge_where(&api, caller, query, "all deployments are purged", |_, _| true).await
}

/// An unknown server has no deployments, as in the original.
pub(super) async fn purge_server(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    Query(query): Query<JobsQuery>,
) -> Result<Json<Value>> {
    api.store.linearizable().await?;
    let server: Option<ServerId> = api.store.read(|record| {
        record
            .server_by_name_or_id(&name)
            .map(|server| server.id().clone())
    });
    let of_server = move |_: &Record, deployment: &Deployment| Some(&deployment.server) == server.as_ref();
    purge_where(&api, caller, query, "the server is purged", of_server).await
}

async fn purge_where(
    api: &Api,
    caller: Caller,
    query: JobsQuery,
    reason: &str,
    wanted: impl Fn(&Record, &Deployment) -> bool,
) -> Result<Json<Value>> {
    // The original signature does not cover the query, so it cannot ask for jobs.
    let jobs = query.include_jobs && caller.is_bound;
    api.store.linearizable().await?;
    let chosen: Vec<(DeploymentId, PurgedObject)> = api.store.read(|record| {
        let live = record.deployments().values().filter(|deployment| {
            deployment.phase.is_live() && (jobs || deployment.job.is_none()) && wanted(record, deployment)
        });
        live.map(|deployment| (deployment.id.clone(), PurgedObject::of(record, deployment)))
            .collect()
    });
    // Also without any: the command spends the signature.
    let stopping = stop(
        api,
        caller,
        chosen.iter().map(|(id, _)| id.clone()).collect(),
        reason,
    )
    .await?;
    let purged: Vec<PurgedObject> = chosen
        .into_iter()
        .filter(|(id, _)| stopping.contains(id))
        .map(|(_, object)| object)
        .collect();
    Ok(Json(
        json!({ "status": "initiated", "deployments_purged": purged }),
    ))
}

pub(super) async fn stop_one(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(text): Path<String>,
) -> Result<Json<Value>> {
    let unknown = || no_deployment(&text);
    let id = DeploymentId::parse(&text).map_err(|_| unknown())?;
    let object = api
        .find(|record| {
            let deployment = record.deployments().get(&id).ok_or_else(unknown)?;
            Ok(PurgedObject::of(record, deployment))
        })
        .await?;
    stop(&api, caller, vec![id], "it was named").await?;
    Ok(Json(
        json!({ "status": "initiated", "deployment_purged": object }),
    ))
}

async fn stop(
    api: &Api,
    caller: Caller,
    deployments: Vec<DeploymentId>,
    reason: &str,
) -> Result<Vec<DeploymentId>> {
    let command = Command::StopDeployments {
        deployments,
        reason: StopReason::Operator(reason.to_owned()),
        // What is chosen was chosen by a person, jobs included or left out before.
        allowance: Allowance {
            loss: true,
            jobs: true,
            budgeted: false,
        },
    };
    Ok(match api.propose(&caller, command).await? {
        Reply::Stopping(stopping) => stopping,
        Reply::Done | Reply::Unchanged | Reply::Joined { .. } => Vec::new(),
    })
}

/// 404 of a deployment, in the words of the reference.
pub(super) fn no_deployment(text: &str) -> ApiError {
    let detail = format!("No deploymentwith id {text} found!");
    ApiError::new(StatusCode::NOT_FOUND, detail)
}

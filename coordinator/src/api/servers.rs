//! `/servers`: the inventory, lock and removal.

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::{Extension, Json};
use coordinator_core::state_machine::server::Server;
use coordinator_core::state_machine::{Command, State as Record};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::auth::Caller;
use super::error::{ApiError, Result};
use super::objects::{DeploymentObject, ServerObject};

/// Query of routes that may stop jobs.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(super) struct JobsQuery {
    #[serde(default)]
    pub(super) include_jobs: bool,
}

/// A server that works for a validator; others do not exist for these routes.
pub(super) fn enrolled<'a>(record: &'a Record, name: &str) -> Result<&'a Server> {
    record
        .server_by_name_or_id(name)
        .filter(|server| server.enrolment.is_some())
        .ok_or_else(|| ApiError::no_server(name))
}

pub(super) async fn list(State(api): State<Arc<Api>>) -> Json<Vec<ServerObject>> {
    let servers = api.store.read(|record| {
        let servers = record.servers().values();
        servers
            .filter_map(|server| ServerObject::of(record, server))
            .collect()
    });
    Json(servers)
}

pub(super) async fn lock(
    state: State<Arc<Api>>,
    caller: Extension<Caller>,
    name: Path<String>,
) -> Result<Json<ServerObject>> {
    set_lock(state, caller, name, true).await
}

pub(super) async fn unlock(
    state: State<Arc<Api>>,
    caller: Extension<Caller>,
    name: Path<String>,
) -> Result<Json<ServerObject>> {
    set_lock(state, caller, name, false).await
}

async fn set_lock(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    locked: bool,
) -> Result<Json<ServerObject>> {
    let server = api
        .find(|record| enrolled(record, &name).map(|server| server.id().clone()))
        .await?;
    api.propose_and_see(&caller, Command::LockServer { server, locked })
        .await?;
    let object = api.store.read(|record| {
        let server = enrolled(record, &name).ok()?;
        ServerObject::of(record, server)
    });
    object.map(Json).ok_or_else(|| ApiError::no_server(&name))
}

/// Jobs that a removal would stop. Flat: the original's cyclic object could never be printed.
pub(super) async fn delete_preflight(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
) -> Result<Json<Value>> {
    let jobs = api.store.read(|record| {
        let server = enrolled(record, &name)?;
        let deployments = record.deployments_on(server.id());
        let jobs = deployments.filter(|deployment| deployment.job.is_some() && deployment.phase.is_live());
        Ok::<_, ApiError>(
            jobs.map(|deployment| DeploymentObject::of(record, deployment))
                .collect::<Vec<_>>(),
        )
    })?;
    Ok(Json(json!({ "jobs": jobs })))
}

/// An original client asks about jobs itself, by the preflight, and its signature covers no query: it means
/// jobs too. Ours says so.
pub(super) async fn remove(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    Query(query): Query<JobsQuery>,
) -> Result<Json<Value>> {
    let (server, name) = api
        .find(|record| enrolled(record, &name).map(|server| (server.id().clone(), server.facts.name.clone())))
        .await?;
    let jobs = query.include_jobs || !caller.is_bound;
    let command = Command::RemoveServer {
        server: server.clone(),
        jobs,
    };
    api.propose(&caller, command).await?;
    Ok(Json(json!({
        "status": "started",
        "detail": format!(
            "Deletion of server.name='{name}' server.server_id='{server}' started, and will be processed \
             asynchronously by gepetto."
        ),
    })))
}

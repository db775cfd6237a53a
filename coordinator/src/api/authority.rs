//! `/v1/ca`: the authority that signs hosts' certificates, and changing over to another one.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use coordinator_core::state_machine::host::HostRecord;
use coordinator_core::state_machine::{Command, Rejection, State as Record};
use serde_json::{Value, json};

use super::Api;
use super::auth::Caller;
use super::error::{ApiError, Result};
use crate::identity::fingerprint;
use crate::join::authority;

/// A row of `GET /v1/ca`: which authority a host's certificate is of, and whether it trusts one that it need not.
fn row(record: &Record, host: &HostRecord) -> Value {
    let to_do = record.authorities_to_tell(&host.host.server).is_some();
    let certificate = match (record.rotation(), to_do) {
        (None, _) => "current",
        (Some(_), true) => "old",
        (Some(_), false) => "new",
    };
    json!({
        "host": host.host.name,
        "server_id": host.host.server,
        "member": host.member,
        "certificate": certificate,
        "trusts_old": record.rotation().is_none() && to_do,
    })
}

fn status_of(record: &Record) -> Result<Value> {
    let cluster = record.cluster().ok_or(Rejection::NotFounded)?;
    let rotation = record.rotation();
    let hosts = record.hosts().values().filter(|host| host.is_in());
    let hosts: Vec<Value> = hosts.map(|host| row(record, host)).collect();
    Ok(json!({
        "authority": fingerprint(&cluster.authority_pem).map(hex::encode),
        "next": rotation.map(|rotation| hex::encode(rotation.new)),
        "begun_at": rotation.map(|rotation| rotation.begun_at.iso8601()),
        "hosts": hosts,
    }))
}

pub(super) async fn status(State(api): State<Arc<Api>>) -> Result<Json<Value>> {
    Ok(Json(api.store.read(status_of)?))
}

pub(super) async fn rotate(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>> {
    api.store.linearizable().await?;
    let cluster = api.store.read(|record| match record.rotation() {
        Some(_) => Err(Rejection::RotationUnderWay),
        None => record.cluster().cloned().ok_or(Rejection::NotFounded),
    })?;
    let now = api.store.clock().now();
    let rotation = authority::successor(api.deps.signer.as_ref(), &cluster, now).await;
    let rotation =
        rotation.map_err(|error| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string()))?;
    api.propose_and_see(&caller, Command::RotateAuthority { rotation })
        .await?;
    Ok(Json(api.store.read(status_of)?))
}

pub(super) async fn finish(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<Value>> {
    let rotation = |record: &Record| record.rotation().map(|rotation| rotation.new);
    let new = api
        .find(|record| Ok(rotation(record).ok_or(Rejection::NoRotation)?))
        .await?;
    api.propose_and_see(&caller, Command::FinishRotation { new })
        .await?;
    Ok(Json(api.store.read(status_of)?))
}

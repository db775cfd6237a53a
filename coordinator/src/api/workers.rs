//! `/v1/workers`: sealed workers. Adding one shows its kubeconfig to this member, which looks at the cluster behind it and
//! seals it; nothing gives it out again.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use coordinator_core::state_machine::{Command, Rejection, State as Record};
use protocol::id::ServerId;
use protocol::workload::Secret;
use serde::Deserialize;
use serde_json::{Value, json};

use super::auth::Caller;
use super::error::{ApiError, Result};
use super::operate::parse;
use super::{Api, Peer};
use crate::sealed_worker::{self, ATTESTATION_SERVICE_PORT, Workers, attestation, facts};
use crate::signer::SealedKind;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    kubeconfig: Secret,
    context: Option<String>,
    address: Option<String>,
    attestation_port: Option<u16>,
}

impl From<sealed_worker::Error> for ApiError {
    fn from(error: sealed_worker::Error) -> Self {
        let status = match error {
            sealed_worker::Error::Refused(_) => StatusCode::BAD_REQUEST,
            sealed_worker::Error::Unavailable(_) => StatusCode::BAD_GATEWAY,
        };
        Self::new(status, error.to_string())
    }
}

fn row(record: &Record, id: &ServerId) -> Option<Value> {
    let worker = record.workers().get(id)?;
    let server = record.servers().get(id)?;
    Some(json!({
        "server_id": id,
        "name": server.facts.name,
        "address": server.facts.address,
        "gpus": server.facts.devices.len(),
        "reachable": server.reachable,
        "validator": server.enrolment.as_ref().map(|enrolment| &enrolment.validator),
        "added_at": worker.added_at.iso8601(),
    }))
}

pub(super) async fn list(State(api): State<Arc<Api>>) -> Json<Vec<Value>> {
    Json(api.store.read(|record| {
        let ids = record.workers().keys();
        ids.filter_map(|id| row(record, id)).collect()
    }))
}

pub(super) async fn add(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Extension(peer): Extension<Peer>,
    body: Bytes,
) -> Result<Json<Value>> {
    if !peer.is_loopback() {
        let detail = "a kubeconfig is taken from this machine itself only, since others could read it on the way: run the \
                      command on a member, or through `ssh -L 32000:127.0.0.1:32000 MEMBER`";
        return Err(ApiError::new(StatusCode::FORBIDDEN, detail));
    }
    let body: Body = parse(&body)?;
    let workers: &dyn Workers = api
        .deps
        .workers
        .as_deref()
        .ok_or_else(|| ApiError::new(StatusCode::NOT_IMPLEMENTED, "this member drives no workers"))?;
    let kubeconfig = workers.reduce(&body.kubeconfig, body.context.as_deref())?;
    let node = workers.node(&kubeconfig).await?;
    let address = body.address.or_else(|| node.address.clone()).ok_or_else(|| {
        let detail = format!(
            "node {} has no address: say where validators reach it (address)",
            node.name
        );
        ApiError::new(StatusCode::BAD_REQUEST, detail)
    })?;
    let port = body.attestation_port.unwrap_or(ATTESTATION_SERVICE_PORT);
    // What is wrong with the node shows first: asking for its GPUs takes long where nobody answers.
    let devices = if node.sealed {
        attestation::devices(api.deps.signer.as_ref(), &address, port).await?
    } else {
        Vec::new()
    };
    let facts = facts(node, address, port, devices)?;
    let id = facts.server.clone();
    let sealed = api
        .deps
        .signer
        .seal(SealedKind::Kubeconfig, kubeconfig.reveal().as_bytes())
        .await;
    let sealed_kubeconfig = sealed.map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the kubeconfig is not kept: {error}"),
        )
    })?;
    let command = Command::AddWorker {
        facts,
        sealed_kubeconfig,
    };
    api.propose_and_see(&caller, command).await?;
    Ok(Json(
        api.store.read(|record| row(record, &id)).unwrap_or(Value::Null),
    ))
}

/// The worker that an operator means by its name or id.
fn named<'a>(record: &'a Record, text: &str) -> Option<&'a ServerId> {
    let server = record.server_by_name_or_id(text)?.id();
    record.workers().contains_key(server).then_some(server)
}

pub(super) async fn remove(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<Value>> {
    let server = api
        .find(|record: &Record| {
            let named = named(record, &name).cloned();
            named.ok_or_else(|| {
                ApiError::from(Rejection::Unknown {
                    kind: "worker".to_owned(),
                    name: name.clone(),
                })
            })
        })
        .await?;
    let command = Command::RemoveWorker {
        server: server.clone(),
    };
    api.propose(&caller, command).await?;
    Ok(Json(
        json!({ "server_id": server, "name": name, "removed": true }),
    ))
}

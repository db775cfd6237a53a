//! `POST /v1/snapshots`: a snapshot of the state as a file for the operator, and how the schedule goes.

use std::sync::Arc;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use coordinator_core::state_machine::Command;
use futures_util::stream;
use protocol::snapshot_file::Recipient;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::auth::Caller;
use super::error::{ApiError, Result};
use super::operate::{invalid, parse};
use crate::backup::{Error, Name, Report, Stream};

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct SaveBody {
    recipient: Option<String>,
}

pub(super) async fn save(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Response> {
    let body: SaveBody = parse(&body)?;
    let door = &api.deps.backup;
    let named = body.recipient.as_deref().map(str::parse::<Recipient>).transpose();
    let named = named.map_err(|error| invalid(&error.to_string()))?;
    let Some(recipient) = named.or(door.recipient().copied()) else {
        let detail =
            "no key: name a recipient, or set backup.recipient (`chutes-miner snapshot keygen` makes one)";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, detail));
    };
    let snapshots = door.snapshots().ok_or_else(|| {
        let detail = "this member keeps no state on its disk";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    })?;
    let turn = door.turn().ok_or_else(|| {
        let detail = "another snapshot is being saved: try again when it is done";
        ApiError::new(StatusCode::CONFLICT, detail)
    })?;
    // The signature is good for one snapshot: whoever saw it cannot have another.
    api.propose(&caller, Command::PassTime).await?;
    let stream = snapshots.sealed(&recipient).await.map_err(|error| {
        let status = match error {
            Error::Key(_) => StatusCode::BAD_REQUEST,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        ApiError::new(status, error.to_string())
    })?;
    let head = stream.head();
    let name = Name {
        at: head.created_at,
        last_index: head.last_index,
    };
    let disposition = format!("attachment; filename=\"{}\"", name.text(&head.cluster));
    let pieces = stream::unfold(Some((stream, turn)), |state| async {
        let (mut stream, turn): (Stream, _) = state?;
        match stream.next().await {
            Ok(Some(piece)) => Some((Ok(Bytes::from(piece)), Some((stream, turn)))),
            Ok(None) => None,
            // The connection is cut: the file does not open.
            Err(error) => {
                tracing::warn!(%error, "a snapshot was cut off");
                Some((Err(error), None))
            }
        }
    });
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_DISPOSITION, disposition),
    ];
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// How the schedule goes, for `GET /v1/status`; null where this member has seen nothing of it.
pub(super) fn of_report(report: &Report) -> Value {
    if *report == Report::default() {
        return Value::Null;
    }
    let last = report.last.as_ref();
    let last =
        last.map(|done| json!({ "at": done.at.iso8601(), "name": done.name, "size_bytes": done.size_bytes }));
    let failure = report.failure.as_ref();
    let failure = failure.map(|(at, text)| json!({ "at": at.iso8601(), "text": text }));
    json!({ "last": last, "failure": failure })
}

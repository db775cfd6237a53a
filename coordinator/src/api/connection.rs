//! A connection that one signature has opened: later requests on it carry a number that counts up, instead of a
//! signature each. For scripts with many requests; over loopback only, where nobody else can write into it.

use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use coordinator_core::state_machine::Command;
use protocol::hotkey::Hotkey;
use protocol::signing::SEQUENCE_HEADER;
use protocol::time::UnixMillis;
use serde_json::{Value, json};

use super::auth::Caller;
use super::error::ApiError;
use super::{Api, Peer};

/// It must be opened again after so long, in ms.
const LIFE_MS: u64 = 3_600_000;

/// Whether a connection is open, shared by all its requests. [`super::serve`] gives one to each connection.
#[derive(Debug, Clone, Default)]
pub struct Connection(Arc<Mutex<Option<Opened>>>);

#[derive(Debug)]
struct Opened {
    by: Hotkey,
    next: u64,
    ends_at: UnixMillis,
}

impl Connection {
    fn open(&self, by: Hotkey, now: UnixMillis) -> UnixMillis {
        let ends_at = now + LIFE_MS;
        let opened = Opened { by, next: 1, ends_at };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(opened);
        ends_at
    }

    /// Lets a request with this number in, once, if it was `miner` who opened the connection.
    pub(super) fn take(&self, sequence: &str, miner: &Hotkey, now: UnixMillis) -> Result<(), ApiError> {
        let mut opened = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_open = |opened: &&mut Opened| now < opened.ends_at && opened.by == *miner;
        let Some(opened) = opened.as_mut().filter(is_open) else {
            return Err(ApiError::unauthorised(format!(
                "go away: {SEQUENCE_HEADER} without an open connection: POST /v1/connection on it first, signed"
            )));
        };
        if sequence.parse() != Ok(opened.next) {
            return Err(ApiError::unauthorised(format!(
                "go away: {SEQUENCE_HEADER} should be {}, the last number plus one",
                opened.next
            )));
        }
        opened.next += 1;
        Ok(())
    }
}

/// `POST /v1/connection`: requests that follow on this connection need a number only.
pub(super) async fn open(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Extension(peer): Extension<Peer>,
    connection: Option<Extension<Connection>>,
) -> Result<Json<Value>, ApiError> {
    if !peer.is_loopback() {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "a connection may be opened over loopback only; sign each request, or use an SSH tunnel",
        ));
    }
    let Some(Extension(connection)) = connection else {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "this is no connection that could stay open",
        ));
    };
    // The signature is good for one connection: whoever saw it cannot open another.
    api.propose(&caller, Command::PassTime).await?;
    let ends_at = connection.open(api.miner(), api.store.clock().now());
    Ok(Json(json!({ "next": 1, "ends_at": ends_at.iso8601() })))
}

//! An operator's request to the management API of a real agent.

use std::fmt::Display;

use coordinator::clock::{Clock as _, WallClock};
use protocol::hotkey::Signer;
use protocol::signing::BoundRequest;
use reqwest::{Client, Method, RequestBuilder};
use serde_json::Value;

/// A request to `api` (`host:port`), signed now; no body for null.
pub(crate) fn signed(
    http: &Client,
    key: &Signer,
    api: impl Display,
    method: Method,
    path: &str,
    body: &Value,
) -> RequestBuilder {
    let body = if body.is_null() {
        Vec::new()
    } else {
        serde_json::to_vec(body).expect("JSON")
    };
    let bound = BoundRequest {
        method: method.as_str(),
        path_and_query: path,
        body: &body,
    };
    let headers = bound.sign(key, WallClock.now(), fastrand::u128(..));
    let request = http.request(method, format!("http://{api}{path}"));
    let request = headers
        .into_iter()
        .fold(request, |request, (name, value)| request.header(name, value));
    request.header("Content-Type", "application/json").body(body)
}

//! Requests that only the leader can answer, since they are about what it remembers besides the state: another
//! member checks the signature, passes the rest on, and gives back what the leader said.
//! The way to the other members is also the one to hosts that are connected to them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http_body_util::BodyExt as _;
use protocol::hotkey::Hotkey;
use protocol::id::ServerId;
use protocol::logs::{HostAnswer, HostQuestion};
use tower_service::Service as _;

use super::auth::Caller;
use super::{Api, LocalRead, diff, hosts, raft, read_body, trial};
use crate::member_link;
use crate::store::BoxFuture;

/// The way to the other members.
pub trait OtherMembers: fmt::Debug + Send + Sync {
    /// Passes a request on to the leader; none when this member leads, or nobody does.
    fn pass_on(
        &self,
        request: member_link::Request,
    ) -> Option<BoxFuture<'_, Result<member_link::Response, String>>>;

    /// Asks a host through the member that it is connected to.
    fn ask_host<'a>(
        &'a self,
        server: &'a ServerId,
        question: &'a HostQuestion,
    ) -> BoxFuture<'a, Result<HostAnswer, String>>;

    /// Whose seed each of them runs with; none for those that did not answer.
    fn hotkeys(&self) -> BoxFuture<'_, BTreeMap<u64, Option<Hotkey>>>;
}

/// Of a member without others.
#[derive(Debug, Clone, Copy)]
pub struct Alone;

impl OtherMembers for Alone {
    fn pass_on(
        &self,
        _: member_link::Request,
    ) -> Option<BoxFuture<'_, Result<member_link::Response, String>>> {
        None
    }

    fn ask_host<'a>(
        &'a self,
        _: &'a ServerId,
        _: &'a HostQuestion,
    ) -> BoxFuture<'a, Result<HostAnswer, String>> {
        Box::pin(std::future::ready(Err("there is no other member".to_owned())))
    }

    fn hotkeys(&self) -> BoxFuture<'_, BTreeMap<u64, Option<Hotkey>>> {
        Box::pin(std::future::ready(BTreeMap::new()))
    }
}

impl OtherMembers for member_link::Asking {
    fn pass_on(
        &self,
        request: member_link::Request,
    ) -> Option<BoxFuture<'_, Result<member_link::Response, String>>> {
        self.leader()?;
        Some(Box::pin(member_link::Asking::pass_on(
            self,
            request,
            super::PASS_ON_MAX,
        )))
    }

    fn ask_host<'a>(
        &'a self,
        server: &'a ServerId,
        question: &'a HostQuestion,
    ) -> BoxFuture<'a, Result<HostAnswer, String>> {
        let asked = member_link::Asking::ask_host(self, server, question, super::HOST_ANSWER_MAX);
        Box::pin(asked)
    }

    fn hotkeys(&self) -> BoxFuture<'_, BTreeMap<u64, Option<Hotkey>>> {
        Box::pin(member_link::Asking::hotkeys(self))
    }
}

/// The reads of the leader alone.
pub(super) fn reads() -> Router<Arc<Api>> {
    Router::new()
        .route("/hosts", get(hosts::list))
        .route("/v1/raft", get(raft::raft))
        .route("/v1/diff", get(diff::diff))
        .route("/v1/observing/trial", get(trial::trial).post(trial::trial_with))
}

/// The writes of the leader alone; both need a signature that binds the request.
pub(super) fn writes() -> Router<Arc<Api>> {
    Router::new().route("/v1/raft/transfer", post(raft::transfer))
}

/// Passes a request on if another member leads. When that one does not answer, or need not be asked, this one says what
/// it knows.
pub(super) async fn or_pass_on(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    if request.extensions().get::<LocalRead>().is_some() {
        return next.run(request).await;
    }
    let (head, body) = request.into_parts();
    let body = match read_body(body, api.config.limits.body_bytes_max).await {
        Ok(body) => body,
        Err(error) => return error.into_response(),
    };
    let caller = head.extensions.get::<Caller>().copied();
    let passed = member_link::Request {
        method: head.method.to_string(),
        path: head
            .uri
            .path_and_query()
            .map_or("/", |path| path.as_str())
            .to_owned(),
        body: body.to_vec(),
        guard: caller.and_then(|caller| caller.guard),
        is_bound: caller.is_some_and(|caller| caller.is_bound),
    };
    if let Some(passed) = api.deps.others.pass_on(passed) {
        match passed.await {
            Ok(answer) => {
                let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::BAD_GATEWAY);
                return (status, [(header::CONTENT_TYPE, "application/json")], answer.body).into_response();
            }
            Err(error) => tracing::warn!(error, path = head.uri.path(), "the leader was not asked"),
        }
    }
    next.run(Request::from_parts(head, Body::from(body))).await
}

/// Answers what another member passed on.
pub(super) async fn answer(api: Arc<Api>, request: member_link::Request) -> member_link::Response {
    let refused = |status: StatusCode| member_link::Response {
        status: status.as_u16(),
        body: Vec::new(),
    };
    let caller = Caller {
        guard: request.guard,
        is_bound: request.is_bound,
    };
    let built = Request::builder()
        .method(request.method.as_str())
        .uri(&request.path)
        .extension(caller)
        .body(Body::from(request.body));
    let Ok(built) = built else {
        return refused(StatusCode::BAD_REQUEST);
    };
    if let Err(error) = api.store.linearizable().await {
        tracing::info!(%error, "a request that was passed on is not answered");
        return refused(StatusCode::SERVICE_UNAVAILABLE);
    }
    let mut routes: Router = reads().merge(writes()).with_state(api);
    let Ok(response) = routes.call(built).await;
    let response = super::error::as_json(response);
    let (head, body) = response.into_parts();
    match body.collect().await {
        Ok(body) => member_link::Response {
            status: head.status.as_u16(),
            body: body.to_bytes().to_vec(),
        },
        Err(_) => refused(StatusCode::INTERNAL_SERVER_ERROR),
    }
}

//! The management API: what operators ask of the miner over HTTP. `docs/protocol/management.md` describes it.
//!
//! ```text
//! connection --> limits --> signature (auth.rs) --> handler --> Store::propose_as
//!                                             \--> linearizable state --> handler that only reads
//! ```
//! In reading order: `error.rs`, `auth.rs`, `connection.rs`, `objects.rs`; the routes of the original (`servers.rs`,
//! `enrolment.rs`, `deployments.rs`); our own under `/v1` (`status.rs`, `timeline.rs`, `diff.rs`, `explain.rs`,
//! `operate.rs`, `import.rs`, `trial.rs`); the cluster itself (`hosts.rs`, `raft.rs`, `authority.rs`, `hotkey.rs`, `snapshots.rs`, `upgrade.rs`, and
//! `leader.rs` for what only the leader can answer); `metrics.rs`. Handlers read the state and propose commands; nothing here decides.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use coordinator_core::state_machine::State as Record;
use futures_util::FutureExt as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use protocol::hotkey::Hotkey;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower_layer::layer_fn;
use tower_service::Service;

use crate::backup::Door;
use crate::leader::Scheduling;
use crate::member_link::AnswerRequest;
use crate::sealed_worker::Workers;
use crate::signer::Sign;
use crate::store::{BoxFuture, Store};
use auth::{Access, Asked, Caller};
use error::ApiError;

mod auth;
mod authority;
mod connection;
mod deployments;
mod diff;
mod enrolment;
mod error;
mod explain;
mod hosts;
mod hotkey;
mod import;
mod leader;
mod metrics;
mod objects;
mod operate;
mod raft;
mod servers;
mod snapshots;
mod state;
mod status;
mod timeline;
mod trial;
mod upgrade;
mod workers;
mod workload;

pub use connection::Connection;
pub use diff::{Hosts, ValidatorListing};
pub use enrolment::SupportedGpus;
pub use leader::{Alone, OtherMembers};
pub use raft::{ClusterView, Progress, ReplicatedCluster, Roles};

/// What is under way at a stop may take this long.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// How long the leader may take with what another member passes on to it.
const PASS_ON_MAX: Duration = Duration::from_secs(15);
/// A member that has caught up shows it within this time.
const READY_MAX: Duration = Duration::from_secs(2);
/// How long a host may take with a question about a workload; and a member to which it may be connected.
const HOST_ANSWER_MAX: Duration = Duration::from_secs(12);
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A limit on everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bodies up to this many bytes are read.
    pub body_bytes_max: usize,
    /// Connections that are served at a time; more are closed at once.
    pub connections_max: usize,
    /// An answer must begin within this time. The progress of an enrolment may then go on for longer.
    pub answer_max: Duration,
    /// The head of a request, and then its body, must have arrived within this time each.
    pub request_read_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes_max: 1024 * 1024,
            connections_max: 256,
            answer_max: Duration::from_secs(30),
            request_read_max: Duration::from_secs(10),
        }
    }
}

/// Settings of the API.
#[derive(Debug, Clone)]
pub struct Config {
    /// Whose key signs, as long as the state does not say it.
    pub miner: Hotkey,
    /// Name of this member, for people.
    pub member: String,
    /// Original clients may change things over plain, non-loopback connections. Off: a captured read could be
    /// repeated as a purge.
    pub allow_plain_legacy_writes: bool,
    /// How much and how long.
    pub limits: Limits,
}

/// What the API asks of others.
#[derive(Debug, Clone)]
pub struct Deps {
    /// GPU types that a validator takes.
    pub supported_gpus: Arc<dyn SupportedGpus>,
    /// What hosts reported last, and the way to those that are connected here.
    pub hosts: Arc<dyn Hosts>,
    /// What validators listed last.
    pub validator_listing: Arc<dyn ValidatorListing>,
    /// By what this member would place chutes, if it led and the cluster acted.
    pub scheduling: Scheduling,
    /// The members of the replicated log.
    pub cluster: Arc<dyn ClusterView>,
    /// Snapshots that leave the cluster.
    pub backup: Door,
    /// The way to the other members.
    pub others: Arc<dyn OtherMembers>,
    /// Opens and seals the authorities' keys and workers' kubeconfigs.
    pub signer: Arc<dyn Sign>,
    /// The way to the clusters of sealed workers, if this program knows one.
    pub workers: Option<Arc<dyn Workers>>,
}

/// Where a connection comes from. Requests without it count as foreign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

impl Peer {
    /// True for this machine itself.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.0.ip().to_canonical().is_loopback()
    }

    fn of(request: &Request) -> Self {
        let foreign = Self(SocketAddr::from(([0, 0, 0, 0], 0)));
        request.extensions().get::<Self>().copied().unwrap_or(foreign)
    }
}

/// What all handlers share.
struct Api {
    config: Config,
    store: Store,
    deps: Deps,
    door: auth::Door,
    counters: metrics::Counters,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Api({})", self.config.miner)
    }
}

/// All routes. Requests should carry a [`Peer`] extension; [`serve`] puts it there.
pub fn router(config: Config, store: Store, deps: Deps) -> Router {
    routes(config, store, deps).operators
}

/// What answers whom.
#[expect(missing_debug_implementations, reason = "a function has none")]
pub struct Routes {
    /// Operators. Requests should carry a [`Peer`] extension; [`serve`] puts it there.
    pub operators: Router,
    /// Prometheus: `/metrics` without a signature.
    pub metrics: Router,
    /// Other members, with requests that they pass on to this one.
    pub members: Arc<AnswerRequest>,
}

/// All routes.
pub fn routes(config: Config, store: Store, deps: Deps) -> Routes {
    let door = auth::Door::new(config.allow_plain_legacy_writes, store.clock().now());
    let api = Arc::new(Api {
        config,
        store,
        deps,
        door,
        counters: metrics::Counters::default(),
    });
    let around = |routes: Router<Arc<Api>>, access: Option<Access>| {
        let api = Arc::clone(&api);
        routes.route_layer(layer_fn(move |inner| Around {
            api: Arc::clone(&api),
            access,
            inner,
        }))
    };
    let on_leader = |routes: Router<Arc<Api>>| {
        routes.route_layer(from_fn_with_state(Arc::clone(&api), leader::or_pass_on))
    };
    let reads = Router::new()
        .route("/servers/", get(servers::list))
        .route(
            "/servers/{server}/delete_preflight",
            get(servers::delete_preflight),
        )
        .route("/v1/status", get(status::status))
        .route("/v1/state", get(state::state))
        .route("/v1/deployments", get(timeline::deployments))
        .route("/v1/audits", get(timeline::audits))
        .route("/v1/explain", get(explain::explain))
        .route("/v1/ca", get(authority::status))
        .route("/v1/hotkey", get(hotkey::status))
        .route("/v1/bans", get(operate::bans))
        .route("/v1/workers", get(workers::list))
        .route("/v1/upgrade", get(upgrade::show))
        .route("/v1/deployments/{deployment}/log", get(workload::log))
        .route("/v1/deployments/{deployment}/events", get(workload::events));
    let writes = Router::new()
        .route("/servers/", post(enrolment::add))
        .route("/servers/{server}", delete(servers::remove))
        .route("/servers/{server}/lock", get(servers::lock).post(servers::lock))
        .route(
            "/servers/{server}/unlock",
            get(servers::unlock).post(servers::unlock),
        )
        .route("/servers/{server}/deployments", delete(deployments::purge_server))
        .route("/deployments/purge", delete(deployments::purge))
        .route("/deployments/{deployment}", delete(deployments::stop_one));
    let bound_writes = Router::new()
        .route("/hosts/invites", post(hosts::invite))
        .route("/hosts/{host}", delete(hosts::remove))
        .route("/hosts/{host}/pin", put(hosts::pin))
        .route("/v1/snapshots", post(snapshots::save))
        .route("/v1/upgrade/finalize", post(upgrade::finalize))
        .route("/v1/ca/rotate", post(authority::rotate))
        .route("/v1/ca/finish", post(authority::finish))
        .route("/v1/hotkey", post(hotkey::replace))
        .route("/v1/connection", post(connection::open))
        .route("/v1/stop", post(operate::stop))
        .route("/v1/observing", put(operate::set_observing))
        .route("/v1/import", post(import::import))
        .route("/v1/workers", post(workers::add))
        .route("/v1/workers/{worker}", delete(workers::remove))
        .route("/v1/bans", post(operate::ban).delete(operate::unban));
    let open = Router::new()
        .route("/ping", get(ping))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics::metrics))
        .route("/servers", axum::routing::any(with_slash));
    let metrics = Router::new()
        .route("/metrics", get(metrics::unsigned))
        .with_state(Arc::clone(&api));
    let members = {
        let api = Arc::clone(&api);
        Arc::new(move |request| leader::answer(Arc::clone(&api), request).boxed())
    };
    let operators = Router::new()
        .merge(around(
            reads.merge(on_leader(leader::reads())),
            Some(Access::Read),
        ))
        .merge(around(writes, Some(Access::Write)))
        .merge(around(
            bound_writes.merge(on_leader(leader::writes())),
            Some(Access::BoundWrite),
        ))
        .merge(around(open, None))
        .fallback(no_such_path)
        // Without it the guards of the routes would answer for methods that no route has.
        .method_not_allowed_fallback(no_such_method)
        .with_state(api);
    Routes {
        operators,
        metrics,
        members,
    }
}

/// Serves the API on a listener until `shutdown`; then what is under way may end within a few seconds.
pub async fn serve(routes: Router, limits: Limits, listener: TcpListener, shutdown: CancellationToken) {
    let slots = Arc::new(Semaphore::new(limits.connections_max));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            tracing::warn!(%peer, "too many connections: one is closed");
            continue;
        };
        let (routes, shutdown) = (routes.clone(), shutdown.clone());
        connections.spawn(async move {
            serve_connection(stream, Peer(peer), routes, limits, shutdown).await;
            drop(slot);
        });
    }
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_MAX, drained).await.is_err() {
        tracing::info!("connections were cut off by the stop");
    }
}

async fn serve_connection(
    stream: TcpStream,
    peer: Peer,
    routes: Router,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let opened = Connection::default();
    // Not as layers: each would be called, boxed and copied with every request.
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        request.extensions_mut().insert(opened.clone());
        routes.clone().call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.request_read_max)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Around each route: a time limit, the signature if one is needed, one form for all errors, a count. As two functions
/// in layers of the framework's they cost the leader 5 to 8 % of its writes per second (docs/benchmarks.md).
#[derive(Clone)]
struct Around<S> {
    api: Arc<Api>,
    /// None for routes that are open to all.
    access: Option<Access>,
    inner: S,
}

impl<S> Service<Request> for Around<S>
where
    S: Service<Request, Response = Response, Error = Infallible, Future: Send> + Clone + Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        // The one that is ready, and not the copy.
        let copy = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, copy);
        let (api, access) = (Arc::clone(&self.api), self.access);
        Box::pin(async move {
            let method = request.method().clone();
            let answer = async {
                match access {
                    Some(access) => admit(&api, access, request, &mut inner).await,
                    None => inner
                        .call(request)
                        .await
                        .map_err(|never: Infallible| match never {}),
                }
            };
            let answer = tokio::time::timeout(api.config.limits.answer_max, answer).await;
            let answer = answer.unwrap_or_else(|_| {
                Err(ApiError::new(
                    StatusCode::GATEWAY_TIMEOUT,
                    "no answer in time; look before you try again",
                ))
            });
            let response = answer.unwrap_or_else(IntoResponse::into_response);
            Ok(api.finish(&method, response))
        })
    }
}

async fn no_such_path(State(api): State<Arc<Api>>, method: Method) -> Response {
    api.finish(&method, StatusCode::NOT_FOUND.into_response())
}

async fn no_such_method(State(api): State<Arc<Api>>, method: Method) -> Response {
    api.finish(&method, StatusCode::METHOD_NOT_ALLOWED.into_response())
}

/// With the value [`LOCAL`], a read is answered from what this member has applied, without a question to any other: also
/// without a quorum and when its storage has failed. The answer says so by the same header.
pub const READ_HEADER: &str = "x-chutes-read";
/// See [`READ_HEADER`].
pub const LOCAL: &str = "local";

/// Marks a read that may be stale.
#[derive(Debug, Clone, Copy)]
struct LocalRead;

/// Reads the body and checks the signature. What only reads then waits until it sees every acknowledged write, unless
/// it is content with less; what writes does so where it decides by what it read, see [`Api::find`].
async fn admit<S>(api: &Api, access: Access, request: Request, inner: &mut S) -> Result<Response, ApiError>
where
    S: Service<Request, Response = Response, Error = Infallible>,
{
    let peer = Peer::of(&request);
    let (mut head, body) = request.into_parts();
    let limits = api.config.limits;
    let body = tokio::time::timeout(limits.request_read_max, read_body(body, limits.body_bytes_max))
        .await
        .map_err(|_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time"))??;
    let asked = Asked {
        method: &head.method,
        path_and_query: head.uri.path_and_query().map_or("/", |path| path.as_str()),
        headers: &head.headers,
        body: &body,
        peer,
        connection: head.extensions.get::<Connection>(),
    };
    if access != Access::Read {
        // A used signature is known again by the time of its nonce.
        api.store.settled().await?;
    }
    let caller = api
        .door
        .admit(&asked, access, &api.miner(), api.store.clock().now())
        .inspect_err(|refusal| {
            tracing::warn!(peer = %peer.0, method = %head.method, path = head.uri.path(), ?refusal,
                "a request is not let in");
        })?;
    let is_local = access == Access::Read && head.headers.get(READ_HEADER).is_some_and(|how| how == LOCAL);
    if is_local {
        head.extensions.insert(LocalRead);
    } else if access == Access::Read {
        api.store.linearizable().await?;
    }
    head.extensions.insert(caller);
    head.extensions.get_or_insert(peer);
    let request = Request::from_parts(head, Body::from(body));
    let mut response = inner
        .call(request)
        .await
        .unwrap_or_else(|never: Infallible| match never {});
    if is_local {
        let local = header::HeaderValue::from_static(LOCAL);
        response.headers_mut().insert(READ_HEADER, local);
    }
    Ok(response)
}

async fn read_body(body: Body, bytes_max: usize) -> Result<Bytes, ApiError> {
    let refused = |error: Box<dyn std::error::Error + Send + Sync>| {
        if error.is::<LengthLimitError>() {
            let why = format!("a body of at most {bytes_max} bytes is accepted");
            return ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, why);
        }
        ApiError::new(StatusCode::BAD_REQUEST, "the body was cut off")
    };
    let read = Limited::new(body, bytes_max).collect().await.map_err(refused)?;
    Ok(read.to_bytes())
}

async fn ping() -> impl IntoResponse {
    axum::Json(serde_json::json!({ "message": "pong" }))
}

/// Whether this member is in touch with a leader and has caught up with it: it sees every acknowledged write.
async fn ready(State(api): State<Arc<Api>>) -> Result<impl IntoResponse, ApiError> {
    match tokio::time::timeout(READY_MAX, api.store.linearizable()).await {
        Ok(seen) => seen?,
        Err(_) => {
            let why = "this member has not caught up with the leader yet";
            return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why));
        }
    }
    Ok(axum::Json(serde_json::json!({ "ready": true })))
}

/// Clients of the original expect the slash to be added for them, method and body kept.
async fn with_slash(_: Method, uri: Uri, headers: axum::http::HeaderMap) -> Response {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let query = uri.query().map_or_else(String::new, |query| format!("?{query}"));
    let path = format!("{}/{query}", uri.path());
    let location = host.map_or_else(|| path.clone(), |host| format!("http://{host}{path}"));
    (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, location)]).into_response()
}

impl Api {
    /// What every answer goes through last.
    fn finish(&self, method: &Method, response: Response) -> Response {
        self.counters.answered(method, response.status());
        error::as_json(response)
    }

    /// Whose key signs: a hotkey that was replaced opens nothing any more, on any member.
    fn miner(&self) -> Hotkey {
        let known = self.store.read(|record| record.settings().miner.clone());
        known.unwrap_or_else(|| self.config.miner.clone())
    }

    /// Looks up what a write is about. Before it says no, it looks again with every acknowledged write in sight; a
    /// yes that has become wrong is noticed by the command.
    async fn find<T>(&self, look: impl Fn(&Record) -> error::Result<T>) -> error::Result<T> {
        if let Ok(found) = self.store.read(&look) {
            return Ok(found);
        }
        self.store.linearizable().await?;
        self.store.read(look)
    }

    /// Proposes what a request asks for, under the guard of its signature if it has one.
    async fn propose(
        &self,
        caller: &Caller,
        command: coordinator_core::state_machine::Command,
    ) -> Result<coordinator_core::state_machine::Reply, ApiError> {
        let request = self.store.new_request();
        Ok(self.store.propose_as(request, caller.guard, command).await?)
    }

    /// The same, and waits until this member sees what was written: where another one leads it may still be on its way.
    async fn propose_and_see(
        &self,
        caller: &Caller,
        command: coordinator_core::state_machine::Command,
    ) -> Result<coordinator_core::state_machine::Reply, ApiError> {
        let reply = self.propose(caller, command).await?;
        self.store.linearizable().await.map_err(|error| {
            let detail = format!("it was done, but this member does not see it yet: {error}");
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, detail)
        })?;
        Ok(reply)
    }
}

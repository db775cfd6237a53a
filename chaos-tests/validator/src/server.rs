//! One listener with everything on it: REST, websocket, registry, control. [`Server::start`] is what tests
//! and supervisors call.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Request, State as Shared};
use axum::http::{StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{any, delete, get, patch, post, put};
use axum::{Json, Router};
use futures_util::StreamExt;
use protocol::hotkey::Hotkey;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::auth;
use crate::faults::HttpAction;
use crate::identity::uuid_of_name;
use crate::image::Images;
use crate::ledger::{Entry, Record};
use crate::problem::Problem;
use crate::scenario::{InvalidScenario, Scenario};
use crate::sites::{self, Site};
use crate::validator::{Parts, Validator};
use crate::{
    control, instances, jobs, launch, nodes, program, registry, servers, socket, streams, verification,
};

/// The largest body that is read, in bytes.
const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How a server is started.
#[derive(Debug, Clone)]
pub struct Config {
    /// What it publishes and how it behaves.
    pub scenario: Scenario,
    /// Where it listens; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Folder of state, ledger and image layer. One server at a time.
    pub data: PathBuf,
    /// Executable that the images hold as the chute.
    pub chute_executable: PathBuf,
    /// Miners that are registered besides the scenario's.
    pub hotkeys: Vec<Hotkey>,
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The scenario is impossible.
    #[error("scenario: {0}")]
    Scenario(#[from] InvalidScenario),
    /// The image cannot be built.
    #[error("build the image layer: {0}")]
    Image(#[source] io::Error),
    /// State or ledger cannot be opened.
    #[error("open the records: {0}")]
    Records(#[source] io::Error),
    /// The address cannot be listened on.
    #[error("listen on {0}: {1}")]
    Listen(SocketAddr, #[source] io::Error),
}

/// A running stand-in. Dropping it does not stop it; [`Server::stop`] does.
#[derive(Debug)]
pub struct Server {
    /// `http://address:port`.
    pub api_url: String,
    /// `ws://address:port`; the path is `/socket.io/`.
    pub socket_url: String,
    /// `http://address:port`; the path is `/v2/`.
    pub registry_url: String,
    /// Sites for egress tests.
    pub sites: Vec<Site>,
    /// The validator's address.
    pub hotkey: Hotkey,
    /// What is less strict than in the real network, a line each.
    pub relaxed: Vec<String>,
    validator: Arc<Validator>,
    serving: JoinHandle<()>,
}

impl Server {
    /// Builds the image, opens the records and listens. The caller must have installed a rustls provider.
    ///
    /// # Errors
    /// [`Error`], naming the step.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let signer = config.scenario.signer()?;
        let folder = config.data.join("image");
        let executable = config.chute_executable.clone();
        let images = crate::compute::away(move || Images::build(&executable, &folder))
            .await
            .map_err(Error::Image)?;
        let listen_error = |error| Error::Listen(config.listen, error);
        let listener = TcpListener::bind(config.listen).await.map_err(listen_error)?;
        let address = listener.local_addr().map_err(listen_error)?;
        let shutdown = CancellationToken::new();
        let egress = &config.scenario.egress;
        let names = egress
            .allowed
            .iter()
            .map(|name| (name.clone(), true))
            .chain(egress.forbidden.iter().map(|name| (name.clone(), false)));
        let sites = sites::start(names, address.ip(), &shutdown)
            .await
            .map_err(listen_error)?;
        let api_url = format!("http://{address}");
        let validator = Validator::open(Parts {
            signer,
            api_url: api_url.clone(),
            data: config.data,
            images,
            sites: sites.clone(),
            extra_hotkeys: config.hotkeys,
            scenario: config.scenario,
            shutdown: shutdown.clone(),
        })
        .map_err(Error::Records)?;
        verification::resume_all(&validator);
        tokio::spawn(program::run(validator.clone()));
        let service = router(validator.clone()).into_make_service_with_connect_info::<SocketAddr>();
        let serving = tokio::spawn(async move {
            let stopping = shutdown.clone();
            let served = axum::serve(listener, service)
                .with_graceful_shutdown(async move { stopping.cancelled().await });
            if let Err(error) = served.await {
                tracing::error!(%error, "the listener failed");
            }
        });
        Ok(Self {
            socket_url: format!("ws://{address}"),
            registry_url: api_url.clone(),
            api_url,
            sites,
            hotkey: validator.signer.hotkey().clone(),
            relaxed: validator.scenario.relaxed_lines(),
            validator,
            serving,
        })
    }

    /// What [`Server`] says of itself, as one JSON object.
    #[must_use]
    pub fn description(&self) -> Value {
        control::description(&self.validator)
    }

    /// All ledger entries that are in memory.
    #[must_use]
    pub fn ledger(&self) -> Vec<Entry> {
        self.validator.ledger(|ledger| ledger.all().cloned().collect())
    }

    /// Stops listening, cuts sockets, and waits briefly for answers under way.
    pub async fn stop(mut self) {
        self.validator.shutdown.cancel();
        if tokio::time::timeout(Duration::from_secs(2), &mut self.serving)
            .await
            .is_err()
        {
            self.serving.abort();
        }
    }
}

fn router(validator: Arc<Validator>) -> Router {
    let api = Router::new()
        .route("/ping", get(async || Json(json!({"message": "pong"}))))
        .route("/miner/{what}/", get(streams::rows_of))
        .route("/miner/chutes/{chute_id}/{version}", get(streams::chute_version))
        .route("/miner/jobs/{job_id}", delete(jobs::release))
        .route("/miner/inventory", get(streams::inventory))
        .route("/miner/stats", get(streams::stats))
        .route("/miner/scores", get(streams::scores))
        .route(
            "/miner/unique_chute_history/{hotkey}",
            get(streams::unique_chute_history),
        )
        .route("/miner/metagraph", get(streams::metagraph))
        .route("/nodes/", get(nodes::list).post(nodes::announce))
        .route("/nodes/supported", get(nodes::supported))
        .route("/nodes/verification_status", get(nodes::verification_status))
        .route("/nodes/{uuid}", delete(nodes::delete))
        .route("/servers/", post(servers::add))
        .route("/servers/{server}", delete(servers::delete))
        .route("/instances/launch_config", get(launch::issue))
        .route(
            "/instances/launch_config/{config_id}",
            post(launch::claim).put(launch::verify),
        )
        .route(
            "/instances/launch_config/{config_id}/activate",
            get(launch::activate),
        )
        .route("/instances/token_check", get(token_check))
        .route("/instances/{chute_id}/", post(instances::announce_legacy))
        .route(
            "/instances/{chute_id}/{instance_id}",
            patch(instances::activate_legacy).delete(instances::delete),
        )
        .route("/jobs/{job_id}", post(jobs::report).put(jobs::finish))
        .route("/jobs/{job_id}/upload", put(jobs::upload))
        .route("/chutes/utilization", get(streams::utilization))
        .route("/chutes/rolling_updates", get(streams::rolling_updates))
        .route("/bounties/", get(streams::bounties))
        .route("/audit/miner_data", post(audit))
        .route("/registry/auth", get(registry::check_auth))
        .route("/v2/", any(registry::serve))
        .route("/v2/{*path}", any(registry::serve))
        .route("/_storage/{digest}", get(registry::storage))
        .layer(axum::middleware::from_fn_with_state(
            validator.clone(),
            plant_faults,
        ));
    Router::new()
        .merge(api)
        .merge(control::routes())
        .route("/socket.io/", get(socket::upgrade))
        .fallback(not_found)
        .method_not_allowed_fallback(async || {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed")
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(validator)
}

/// Routes that end in a slash are found without it by a redirect, as in the real one.
async fn not_found(uri: Uri) -> Response {
    let path = uri.path();
    let slashed = ["/nodes", "/bounties"].contains(&path)
        || path.strip_prefix("/miner/").is_some_and(|rest| {
            ["chutes", "images", "nodes", "instances", "jobs", "metrics"].contains(&rest)
        });
    if slashed {
        let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        return Redirect::temporary(&format!("{path}/{query}")).into_response();
    }
    Problem::not_found("Not Found").into_response()
}

async fn plant_faults(Shared(validator): Shared<Arc<Validator>>, request: Request, next: Next) -> Response {
    let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
    let fault = validator.planted().of_request(&method, &path);
    let Some(fault) = fault else {
        return next.run(request).await;
    };
    validator.record(Record::FaultInjected {
        method,
        path,
        fault: format!("{fault:?}"),
    });
    match fault {
        HttpAction::Refuse { status } => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
            Problem::new(status, "planted fault").into_response()
        }
        HttpAction::LoseAnswer => {
            drop(next.run(request).await);
            Problem::new(StatusCode::BAD_GATEWAY, "planted fault: the answer was lost").into_response()
        }
        HttpAction::Delay { ms } => {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            next.run(request).await
        }
        HttpAction::Truncate { after_bytes } => {
            let (parts, body) = next.run(request).await.into_parts();
            Response::from_parts(parts, truncated(body, after_bytes))
        }
        HttpAction::Empty => {
            let (mut parts, _) = next.run(request).await.into_parts();
            parts.headers.remove("content-length");
            Response::from_parts(parts, Body::empty())
        }
    }
}

/// The first bytes of a body, then a broken connection. The pause lets the bytes out before the break.
fn truncated(body: Body, after_bytes: usize) -> Body {
    let cut = futures_util::stream::unfold(
        (body.into_data_stream(), after_bytes),
        |(mut chunks, left)| async move {
            match chunks.next().await {
                Some(Ok(mut chunk)) if left > 0 => {
                    chunk.truncate(left);
                    let left = left - chunk.len();
                    Some((Ok::<Bytes, io::Error>(chunk), (chunks, left)))
                }
                _ => None,
            }
        },
    );
    let end = futures_util::stream::once(async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        Err(io::Error::other("planted fault: cut"))
    });
    Body::from_stream(cut.chain(end))
}

/// `GET /instances/token_check`: tells which address a caller comes from.
async fn token_check(
    axum::extract::ConnectInfo(peer): axum::extract::ConnectInfo<SocketAddr>,
    Shared(validator): Shared<Arc<Validator>>,
    axum::extract::Query(query): axum::extract::Query<std::collections::BTreeMap<String, String>>,
) -> Json<Value> {
    let secret = validator.tokens.tag("token check");
    let salt = query
        .get("salt")
        .map(|salt| format!(":{salt}"))
        .unwrap_or_default();
    Json(json!({"token": uuid_of_name(&format!("{}:{secret}{salt}", peer.ip()))}))
}

/// `POST /audit/miner_data`: accepted and not kept.
async fn audit(
    Shared(validator): Shared<Arc<Validator>>,
    headers: axum::http::HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Problem> {
    let miner = auth::miner(&validator, &headers, &protocol::signing::Tail::Body(&body))?;
    let block = headers
        .get("x-chutes-block")
        .and_then(|value| value.to_str().ok())
        .ok_or_else(|| Problem::bad_request("X-Chutes-Block is missing"))?;
    Ok(Json(json!({
        "entry_id": uuid_of_name(&format!("{miner}.{block}")),
        "hotkey": miner,
        "block": block,
        "path": format!("audit/miner/{miner}/{block}.json"),
    })))
}

//! The HTTP door through which validators verify GPUs (`validator-protocol`, section 5.1), and the local one
//! for this host's other processes.
//!
//! | Route | Signed by | Tail |
//! |---|---|---|
//! | `GET /ping` | nobody | |
//! | `GET /devices` | the miner itself | `graval` |
//! | `GET /info?challenge=` | a validator | `graval` |
//! | `POST /prove` | a validator | body hash |
//! | `POST /remote_token` | a validator | body hash or `graval` |
//!
//! Refusals are 401, bad input 400, 413 or 422, too much of it 429 or 503; all with `{"detail": text}`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use proof::WorkProduct;
use protocol::gpu::DeviceInfo;
use protocol::id::GpuId;
use protocol::signing::{Purpose, Tail};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::gpu::guard::{Guard, RateLimit, Refusal, Who};
use crate::gpu::metrics::Metrics;
use crate::gpu::prover;
use crate::gpu::remote_token::{self, TokenClient};
use crate::gpu::worker::{Ciphertext, Worker};

/// Longest body that is read, in bytes. Ten ciphertexts take about 2 KiB.
pub const BODY_BYTES_MAX: usize = 64 * 1024;
/// A body must be here within this time.
const BODY_READ_MAX: Duration = Duration::from_secs(10);
/// Longest ciphertext of one device after decoding, in bytes.
const CIPHERTEXT_BYTES_MAX: usize = 4 * 1024;
/// Requests of one address per second, and at once: a verification makes 21.
const REQUESTS: (u32, u32) = (100, 200);

/// Where a request comes from; the connection's server adds it to each request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

/// Everything that the routes need.
#[derive(Debug)]
pub struct Api {
    worker: Worker,
    guard: Guard,
    tokens: TokenClient,
    rate: RateLimit,
    metrics: Metrics,
}

impl Api {
    /// Puts the parts together.
    #[must_use]
    pub fn new(worker: Worker, guard: Guard, tokens: TokenClient) -> Self {
        let metrics = Metrics::new(worker.devices().len());
        Self {
            worker,
            guard,
            tokens,
            rate: RateLimit::new(REQUESTS.0, REQUESTS.1),
            metrics,
        }
    }
}

/// The public door.
pub fn public_routes(api: Arc<Api>) -> Router {
    Router::new()
        .route("/ping", get(async || "pong"))
        .route("/devices", get(devices))
        .route("/info", get(info))
        .route("/prove", post(prove))
        .route("/remote_token", post(remote_token))
        .fallback(async || Refused::new(StatusCode::NOT_FOUND, "there is nothing here"))
        .method_not_allowed_fallback(async || {
            Refused::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this route does not have that method",
            )
        })
        .layer(from_fn_with_state(Arc::clone(&api), count_and_limit))
        .with_state(api)
}

/// The local door: no signatures, since only this host's processes can open its socket.
pub fn local_routes(api: Arc<Api>) -> Router {
    Router::new()
        .route("/devices", get(local_devices))
        .route("/metrics", get(local_metrics))
        .with_state(api)
}

/// `GET /devices`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesAnswer {
    /// In the backend's order, which is also that of device challenges.
    pub devices: Vec<DeviceInfo>,
}

/// `POST /prove`, asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProveRequest {
    /// All 64 bits are used.
    pub seed: u64,
    /// 1 to 10.
    #[serde(default = "one")]
    pub iterations: u32,
    /// Device to base64 of its ciphertext.
    #[serde(default)]
    pub ciphertext: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

/// `POST /prove`, answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProveAnswer {
    /// All devices, in order.
    pub devices: Vec<DeviceInfo>,
    /// As asked.
    pub seed: u64,
    /// The proof of each device.
    pub proof: BTreeMap<GpuId, DeviceProof>,
    /// The text of each ciphertext.
    pub plaintext: BTreeMap<GpuId, String>,
}

/// The proof of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceProof {
    /// Its place in the order.
    pub device_id: usize,
    /// Its identity.
    pub device_uuid: GpuId,
    /// Its product name.
    pub device_name: String,
    /// What it shows.
    pub work_product: WorkProduct,
}

/// An answer other than success.
#[derive(Debug)]
struct Refused {
    status: StatusCode,
    detail: String,
}

impl Refused {
    fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            status,
            detail: detail.into(),
        }
    }

    fn unprocessable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, detail)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(json!({ "detail": self.detail }))).into_response();
        if matches!(
            self.status,
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS
        ) {
            let seconds = header::HeaderValue::from_static("5");
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        let status = match refusal {
            Refusal::Signature(_) | Refusal::Replayed => StatusCode::UNAUTHORIZED,
            Refusal::Full => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, refusal.to_string())
    }
}

impl From<prover::Error> for Refused {
    fn from(error: prover::Error) -> Self {
        use prover::Error;
        let status = match error {
            Error::BadChallenge | Error::BadCiphertext => StatusCode::UNPROCESSABLE_ENTITY,
            Error::NoDevice | Error::Busy | Error::Stopped => StatusCode::SERVICE_UNAVAILABLE,
            Error::Unsupported(_) => StatusCode::NOT_IMPLEMENTED,
            Error::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Error::NotProved | Error::Backend(_) | Error::Crashed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(%error, "GPU proof failed");
        }
        Self::new(status, error.to_string())
    }
}

impl From<remote_token::Error> for Refused {
    fn from(error: remote_token::Error) -> Self {
        let status = match error {
            remote_token::Error::BadUrl | remote_token::Error::OtherHost => StatusCode::UNPROCESSABLE_ENTITY,
            remote_token::Error::Fetch(_) => StatusCode::BAD_GATEWAY,
        };
        Self::new(status, error.to_string())
    }
}

async fn count_and_limit(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let route = ["/ping", "/devices", "/info", "/prove", "/remote_token"]
        .into_iter()
        .find(|route| *route == request.uri().path())
        .unwrap_or("other");
    // Requests without a known peer share one bucket.
    let unknown = Peer(Ipv4Addr::UNSPECIFIED.into());
    let Peer(from) = request.extensions().get().copied().unwrap_or(unknown);
    let response = if api.rate.take(from) {
        next.run(request).await
    } else {
        Refused::new(StatusCode::TOO_MANY_REQUESTS, "too many requests").into_response()
    };
    let status = response.status();
    api.metrics.request(route, status.as_u16());
    if status == StatusCode::UNAUTHORIZED {
        tracing::warn!(route, %from, "refused an unsigned or wrongly signed request");
    } else {
        tracing::debug!(route, status = status.as_u16(), "answered");
    }
    response
}

async fn devices(State(api): State<Arc<Api>>, headers: HeaderMap) -> Result<Json<DevicesAnswer>, Refused> {
    let tails = [Tail::Purpose(Purpose::Graval)];
    api.guard
        .admit(&headers, Who::Miner, &tails, "GET /devices", b"")?;
    Ok(local_devices(State(api)).await)
}

#[derive(Debug, Deserialize)]
struct InfoQuery {
    challenge: String,
}

async fn info(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    query: Result<Query<InfoQuery>, QueryRejection>,
) -> Result<String, Refused> {
    let tails = [Tail::Purpose(Purpose::Graval)];
    // Not bound to the challenge: a client may use one signature for several reads.
    api.guard
        .admit(&headers, Who::Validator, &tails, "GET /info", b"")?;
    let Query(query) = query.map_err(|_| Refused::unprocessable("the parameter challenge is missing"))?;
    Ok(api.worker.answer(query.challenge).await?)
}

async fn prove(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<ProveAnswer>, Refused> {
    let body = read(body).await?;
    let validator = api.guard.admit(
        &headers,
        Who::Validator,
        &[Tail::Body(&body)],
        "POST /prove",
        &body,
    )?;
    let request: ProveRequest = parse(&body)?;
    if !(1..=proof::ITERATIONS_MAX).contains(&request.iterations) {
        let most = proof::ITERATIONS_MAX;
        return Err(Refused::unprocessable(format!("iterations must be 1 to {most}")));
    }
    let devices = api.worker.devices().to_vec();
    let ciphertexts = ciphertexts(&devices, &request.ciphertext)?;
    let addressed: Vec<GpuId> = ciphertexts
        .iter()
        .map(|(place, _)| devices[*place].uuid.clone())
        .collect();

    let started = tokio::time::Instant::now();
    let answer = api
        .worker
        .prove(request.seed, request.iterations, ciphertexts)
        .await?;
    let took = started.elapsed();
    if answer.worked {
        api.metrics.proof(took);
    }
    tracing::info!(
        %validator,
        devices = devices.len(),
        iterations = request.iterations,
        took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        kept = !answer.worked,
        "proved the GPUs"
    );
    let proof = devices
        .iter()
        .zip(answer.products.iter())
        .enumerate()
        .map(|(device_id, (device, work_product))| {
            let proof = DeviceProof {
                device_id,
                device_uuid: device.uuid.clone(),
                device_name: device.name.clone(),
                work_product: work_product.clone(),
            };
            (device.uuid.clone(), proof)
        })
        .collect();
    Ok(Json(ProveAnswer {
        devices,
        seed: request.seed,
        proof,
        plaintext: addressed.into_iter().zip(answer.texts).collect(),
    }))
}

/// Finds the device of each ciphertext and decodes it.
fn ciphertexts(devices: &[DeviceInfo], asked: &BTreeMap<String, String>) -> Result<Vec<Ciphertext>, Refused> {
    let bad = |uuid: &str, what: &str| {
        let uuid: String = uuid.chars().take(64).collect();
        Refused::unprocessable(format!("ciphertext of {uuid:?}: {what}"))
    };
    asked
        .iter()
        .map(|(uuid, text)| {
            let place = devices
                .iter()
                .position(|device| device.uuid.as_str() == uuid)
                .ok_or_else(|| bad(uuid, "there is no such GPU on this host"))?;
            let blob = BASE64.decode(text).map_err(|_| bad(uuid, "it is not base64"))?;
            if blob.len() > CIPHERTEXT_BYTES_MAX {
                return Err(bad(uuid, "it is too long"));
            }
            Ok((place, blob))
        })
        .collect()
}

#[derive(Debug, Deserialize)]
struct RemoteTokenRequest {
    token_url: String,
}

async fn remote_token(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    body: Body,
) -> Result<String, Refused> {
    let body = read(body).await?;
    // Validators sign the body, the original server expected the word: both are accepted.
    let validator = api.guard.admit(
        &headers,
        Who::Validator,
        &[Tail::Body(&body), Tail::Purpose(Purpose::Graval)],
        "POST /remote_token",
        &body,
    )?;
    let request: RemoteTokenRequest = parse(&body)?;
    Ok(api.tokens.fetch(&validator, &request.token_url).await?)
}

async fn read(body: Body) -> Result<Bytes, Refused> {
    let whole = Limited::new(body, BODY_BYTES_MAX).collect();
    match tokio::time::timeout(BODY_READ_MAX, whole).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Refused::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("a body has at most {BODY_BYTES_MAX} bytes"),
        )),
        Ok(Err(_)) => Err(Refused::new(StatusCode::BAD_REQUEST, "the body broke off")),
        Err(_) => Err(Refused::new(
            StatusCode::REQUEST_TIMEOUT,
            "the body came too slowly",
        )),
    }
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Refused> {
    serde_json::from_slice(body).map_err(|error| Refused::unprocessable(format!("body: {error}")))
}

async fn local_devices(State(api): State<Arc<Api>>) -> Json<DevicesAnswer> {
    Json(DevicesAnswer {
        devices: api.worker.devices().to_vec(),
    })
}

async fn local_metrics(State(api): State<Arc<Api>>) -> impl IntoResponse {
    let form = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, form)], api.metrics.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_have_their_status() {
        use prover::Error;
        for (error, status, retry) in [
            (Error::Busy, 503, true),
            (Error::Stopped, 503, true),
            (Error::NoDevice, 503, true),
            (Error::TimedOut, 504, false),
            (Error::Unsupported("no kernels"), 501, false),
            (Error::BadChallenge, 422, false),
            (Error::BadCiphertext, 422, false),
            (Error::Crashed, 500, false),
            (Error::NotProved, 500, false),
            (Error::Backend("why".to_owned()), 500, false),
        ] {
            let response = Refused::from(error.clone()).into_response();
            assert_eq!(response.status().as_u16(), status, "{error:?}");
            assert_eq!(
                response.headers().contains_key(header::RETRY_AFTER),
                retry,
                "{error:?}"
            );
        }
        let full = Refused::from(Refusal::Full).into_response();
        assert_eq!(full.status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}

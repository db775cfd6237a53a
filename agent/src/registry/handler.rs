//! One request of the registry door: check it, answer it from the store, or ask the upstream.
//!
//! Our own faults are 503 with an OCI error body, never 401: a kubelet must not take an outage for a wrong
//! password. What the upstream itself answers, its 401 included, is passed on as it is.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::header::{
    ACCEPT_RANGES, ALLOW, CONNECTION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_RANGE, RANGE,
    RETRY_AFTER, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::{Body, Incoming};
use tokio::sync::mpsc;

use crate::registry::body::{BodyError, ResponseBody, UpstreamBody};
use crate::registry::digest::Verifier;
use crate::registry::metrics::Outcome;
use crate::registry::path::{self, Digest, Reference};
use crate::registry::range::{Wanted, wanted};
use crate::registry::store::{Blob, Claim, Found};
use crate::registry::{Door, upstream};

/// Manifests up to this size are checked before a byte of them is sent, in bytes (distribution's own limit).
const MANIFEST_BYTES_MAX: u64 = 4 * 1024 * 1024;
const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const HOP_BY_HOP: [HeaderName; 6] = [
    CONNECTION,
    TRANSFER_ENCODING,
    TRAILER,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-authenticate"),
];

type Answer = Response<ResponseBody>;

/// Answers one request.
pub async fn handle(door: Arc<Door>, request: Request<Incoming>) -> Answer {
    let checked = match check(&door, &request) {
        Ok(checked) => checked,
        Err(refusal) => {
            door.metrics.count(Outcome::Refused);
            return refusal.answer(&door);
        }
    };
    match checked {
        (upstream, path::Request::Blob { name, digest }) if door.store.is_some() => {
            blob(
                &door,
                upstream,
                path::Request::Blob {
                    name,
                    digest: digest.clone(),
                },
                &digest,
                request.method(),
                request.headers(),
            )
            .await
        }
        (upstream, wanted) => direct(&door, upstream, &wanted, request.method(), request.headers()).await,
    }
}

/// Method, form and path of a request, and whose registry it is for.
fn check(door: &Door, request: &Request<Incoming>) -> Result<(usize, path::Request), Problem> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Err(Problem::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            "only GET and HEAD are served here",
        ));
    }
    let uri = request.uri();
    if uri.authority().is_some() || request.body().size_hint().lower() > 0 {
        let text = "absolute request targets and request bodies are not accepted";
        return Err(Problem::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", text));
    }
    let parsed = path::Request::parse(uri.path(), uri.query()).map_err(|refusal| {
        let status = match refusal {
            path::Refusal::NotServed => StatusCode::NOT_FOUND,
            _ => StatusCode::BAD_REQUEST,
        };
        Problem::new(status, refusal.code(), refusal.to_string())
    })?;
    // Two Host headers are a trick; text that is not ASCII names no validator.
    let mut hosts = request.headers().get_all(http::header::HOST).iter();
    let host = hosts.next().map(|host| host.to_str().unwrap_or("?"));
    if hosts.next().is_some() {
        return Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "UNSUPPORTED",
            "more than one Host header",
        ));
    }
    let index = door
        .hosts
        .lookup(host)
        .map_err(|unknown| Problem::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", unknown.to_string()))?;
    Ok((index, parsed))
}

/// Passes a request to the upstream, and what it answers to the client.
async fn direct(
    door: &Arc<Door>,
    index: usize,
    wanted: &path::Request,
    method: &Method,
    headers: &HeaderMap,
) -> Answer {
    match ask(door, index, wanted, method, headers).await {
        Ok(response) => pass(door, wanted, method, response).await,
        Err(problem) => problem.answer(door),
    }
}

/// Asks the upstream; our own faults come back as an answer for the client.
async fn ask(
    door: &Door,
    index: usize,
    wanted: &path::Request,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Response<Incoming>, Problem> {
    let upstream = &door.upstreams[index];
    let signed = door.credentials.get(&upstream.validator).map_err(|missing| {
        door.metrics.count(Outcome::NoSignature);
        tracing::warn!(validator = %upstream.validator, "{missing}");
        Problem::unavailable(missing.to_string())
    })?;
    upstream
        .ask(method.clone(), &wanted.upstream_path(), headers, &signed)
        .await
        .map_err(|failure| {
            door.metrics.count(Outcome::UpstreamDown);
            tracing::warn!(validator = %upstream.validator, "{failure}");
            let text = match failure {
                upstream::Error::Silent { .. } => "the validator's registry did not answer in time",
                _ => "the validator's registry cannot be reached",
            };
            Problem::unavailable(text)
        })
}

/// Turns the upstream's response into ours, checked against the digest where one was asked for.
async fn pass(
    door: &Arc<Door>,
    wanted: &path::Request,
    method: &Method,
    response: Response<Incoming>,
) -> Answer {
    let (mut parts, incoming) = response.into_parts();
    for name in &HOP_BY_HOP {
        parts.headers.remove(name);
    }
    let refused = parts.status.is_client_error() || parts.status.is_server_error();
    let upstream = UpstreamBody::new(incoming, door.idle_timeout, door.metrics.clone());
    let whole = parts.status == StatusCode::OK && method == Method::GET;
    let digest = match wanted {
        path::Request::Blob { digest, .. } => Some(digest),
        path::Request::Manifest {
            reference: Reference::Digest(digest),
            ..
        } => Some(digest),
        _ => None,
    };
    let body = match digest {
        Some(digest) if whole => {
            let is_manifest = matches!(wanted, path::Request::Manifest { .. });
            let fits = upstream
                .announced_bytes()
                .is_some_and(|bytes| bytes <= MANIFEST_BYTES_MAX);
            if is_manifest && fits {
                match collect_checked(upstream, digest).await {
                    Ok(bytes) => ResponseBody::full(bytes, &door.metrics),
                    Err(failure) => return manifest_failed(door, digest, &failure),
                }
            } else {
                ResponseBody::Checked {
                    upstream,
                    verifier: Some(Box::new(Verifier::new(digest.clone()))),
                    held: None,
                }
            }
        }
        _ => ResponseBody::Passing(upstream),
    };
    door.metrics.count(if refused {
        Outcome::UpstreamRefused
    } else {
        Outcome::Upstream
    });
    Response::from_parts(parts, body)
}

async fn collect_checked(mut upstream: UpstreamBody, digest: &Digest) -> Result<Bytes, BodyError> {
    let announced = upstream
        .announced_bytes()
        .unwrap_or(MANIFEST_BYTES_MAX)
        .min(MANIFEST_BYTES_MAX);
    let mut whole = BytesMut::with_capacity(usize::try_from(announced).unwrap_or(0));
    while let Some(piece) = upstream.next().await {
        whole.extend_from_slice(&piece?);
    }
    let mut verifier = Verifier::new(digest.clone());
    verifier.update(&whole);
    if verifier.matches() {
        Ok(whole.freeze())
    } else {
        Err(BodyError::Mismatch)
    }
}

fn manifest_failed(door: &Door, digest: &Digest, failure: &BodyError) -> Answer {
    tracing::warn!(%digest, "manifest: {failure}");
    if matches!(failure, BodyError::Mismatch) {
        door.metrics.digest_mismatches.inc();
        door.metrics.count(Outcome::DigestMismatch);
        let text = format!("the validator's registry sent a manifest that is not {digest}");
        return Problem::new(StatusCode::BAD_GATEWAY, "DIGEST_INVALID", text).answer(door);
    }
    door.metrics.count(Outcome::UpstreamDown);
    Problem::unavailable("the validator's registry broke off").answer(door)
}

/// A blob with the store on: from disk, from a download under way, or downloaded by this request.
async fn blob(
    door: &Arc<Door>,
    index: usize,
    wanted: path::Request,
    digest: &Digest,
    method: &Method,
    headers: &HeaderMap,
) -> Answer {
    let Some(store) = &door.store else {
        return direct(door, index, &wanted, method, headers).await;
    };
    match store.find(digest).await {
        Found::Blob(blob) => {
            let outcome = if blob.is_arriving() {
                Outcome::Joined
            } else {
                Outcome::Stored
            };
            match from_store(door, &blob, digest, method, headers) {
                Some(answer) => {
                    door.metrics.count(outcome);
                    answer
                }
                None => direct(door, index, &wanted, method, headers).await,
            }
        }
        // A part or a mere look is not worth a whole download.
        Found::Claim(claim) if method == Method::GET && !headers.contains_key(RANGE) => {
            download(door, index, wanted, claim, digest, headers).await
        }
        Found::Claim(_) | Found::Unavailable => direct(door, index, &wanted, method, headers).await,
    }
}

async fn download(
    door: &Arc<Door>,
    index: usize,
    wanted: path::Request,
    claim: Claim,
    digest: &Digest,
    headers: &HeaderMap,
) -> Answer {
    // Conditions are the client's business with its own copy; the store needs the blob itself.
    let response = match ask(door, index, &wanted, &Method::GET, &HeaderMap::new()).await {
        Ok(response) => response,
        Err(problem) => return problem.answer(door),
    };
    let response = match &door.follower {
        Some(follower) => follower.follow(response).await,
        None => response,
    };
    let size = response.body().size_hint().exact();
    let (StatusCode::OK, Some(size)) = (response.status(), size) else {
        return pass(door, &wanted, &Method::GET, response).await;
    };
    let Some((blob, pieces)) = claim.receive(size) else {
        return pass(door, &wanted, &Method::GET, response).await;
    };
    let upstream = UpstreamBody::new(response.into_body(), door.idle_timeout, door.metrics.clone());
    door.tasks.spawn(pump(upstream, pieces));
    door.metrics.count(Outcome::Upstream);
    from_store(door, &blob, digest, &Method::GET, headers)
        .unwrap_or_else(|| Problem::unavailable("too many transfers at once; try again").answer(door))
}

/// Moves a download into the store, also when the client that caused it has gone.
async fn pump(mut upstream: UpstreamBody, pieces: mpsc::Sender<Bytes>) {
    while let Some(piece) = upstream.next().await {
        match piece {
            Ok(piece) => {
                if pieces.send(piece).await.is_err() {
                    return;
                }
            }
            Err(failure) => {
                tracing::warn!("blob: {failure}");
                return;
            }
        }
    }
}

fn from_store(
    door: &Door,
    blob: &Blob,
    digest: &Digest,
    method: &Method,
    headers: &HeaderMap,
) -> Option<Answer> {
    let etag = format!("\"{digest}\"");
    let same = headers
        .get(IF_RANGE)
        .is_none_or(|value| value.as_bytes() == etag.as_bytes());
    let range = headers
        .get(RANGE)
        .filter(|_| same)
        .and_then(|value| value.to_str().ok());
    let (status, part) = match wanted(range, blob.size()) {
        Wanted::Whole => (StatusCode::OK, 0..blob.size()),
        Wanted::Part(part) => (StatusCode::PARTIAL_CONTENT, part),
        Wanted::Unsatisfiable => {
            let mut answer = Problem::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "RANGE_INVALID",
                "the blob is shorter",
            )
            .answer(door);
            let text = format!("bytes */{}", blob.size());
            answer
                .headers_mut()
                .insert(CONTENT_RANGE, HeaderValue::try_from(text).expect("digits"));
            return Some(answer);
        }
    };
    let mut answer = match *method {
        Method::HEAD => Response::new(ResponseBody::full(Bytes::new(), &door.metrics)),
        _ => Response::new(door.store.as_ref()?.body(blob, part.clone())?),
    };
    *answer.status_mut() = status;
    let text = |text: String| HeaderValue::try_from(text).expect("digits and hexadecimal only");
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(part.end - part.start));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(ETAG, text(etag));
    headers.insert(DOCKER_CONTENT_DIGEST, text(digest.to_string()));
    if status == StatusCode::PARTIAL_CONTENT {
        headers.insert(
            CONTENT_RANGE,
            text(format!("bytes {}-{}/{}", part.start, part.end - 1, blob.size())),
        );
    }
    Some(answer)
}

/// Why there is no proper answer, as the distribution specification puts it.
#[derive(Debug)]
struct Problem {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl Problem {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
        }
    }

    /// Our own fault, or the upstream's: worth another try.
    fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", message)
    }

    fn answer(self, door: &Door) -> Answer {
        let body = serde_json::json!({"errors": [{"code": self.code, "message": self.message}]}).to_string();
        let mut answer = Response::new(ResponseBody::full(body, &door.metrics));
        *answer.status_mut() = self.status;
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match self.status {
            StatusCode::SERVICE_UNAVAILABLE => headers.insert(RETRY_AFTER, HeaderValue::from_static("5")),
            StatusCode::METHOD_NOT_ALLOWED => headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD")),
            _ => None,
        };
        answer
    }
}

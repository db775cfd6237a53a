//! The registry behind the validator (`validator-protocol`, section 4.3): `/v2/`, GET and HEAD only, every
//! request signed by a registered miner, 401 without a challenge. Blobs may be answered by a redirect to
//! storage with a pre-signed address.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State as Shared};
use axum::http::{HeaderMap, Method, Response, StatusCode};
use futures_util::Stream;
use protocol::hotkey::Hotkey;
use protocol::signing::Purpose;
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use crate::auth;
use crate::clock;
use crate::image::{Blob, MANIFEST_TYPE};
use crate::ledger::Record;
use crate::state::Image;
use crate::validator::Validator;

const STORAGE_ADDRESS_SECONDS: u64 = 300;

/// What was found for a request.
enum Content {
    Small(Blob, &'static str),
    Layer,
    Base,
}

/// `GET /registry/auth`: what the proxy in front of the real registry asks.
pub(crate) async fn check_auth(
    Shared(validator): Shared<Arc<Validator>>,
    headers: HeaderMap,
) -> Result<axum::Json<serde_json::Value>, crate::problem::Problem> {
    auth::miner_for(&validator, &headers, Purpose::Registry)?;
    Ok(axum::Json(json!({"authenticated": true})))
}

/// `/v2/` and everything below.
pub(crate) async fn serve(
    Shared(validator): Shared<Arc<Validator>>,
    method: Method,
    uri: axum::http::Uri,
    headers: HeaderMap,
) -> Response<Body> {
    let path = uri.path().to_owned();
    if method != Method::GET && method != Method::HEAD {
        return refused(&validator, None, &method, &path, StatusCode::FORBIDDEN, None);
    }
    let Ok(miner) = auth::miner_for(&validator, &headers, Purpose::Registry) else {
        return refused(&validator, None, &method, &path, StatusCode::UNAUTHORIZED, None);
    };
    let rest = path.strip_prefix("/v2/").unwrap_or_default();
    let Some(content) = find(&validator, rest) else {
        let code = if rest.contains("/blobs/") {
            "BLOB_UNKNOWN"
        } else {
            "MANIFEST_UNKNOWN"
        };
        return refused(
            &validator,
            Some(miner),
            &method,
            &path,
            StatusCode::NOT_FOUND,
            Some(code),
        );
    };
    match content {
        Content::Base => small(
            &validator,
            miner,
            &method,
            &path,
            &Blob {
                digest: String::new(),
                bytes: b"{}".to_vec(),
            },
            "application/json",
        ),
        Content::Small(blob, kind) => small(&validator, miner, &method, &path, &blob, kind),
        Content::Layer if validator.scenario.redirect_blobs && method == Method::GET => {
            redirect(&validator, miner, &path)
        }
        Content::Layer => layer(&validator, Some(miner), &method, &path, &headers).await,
    }
}

fn find(validator: &Validator, rest: &str) -> Option<Content> {
    if rest.is_empty() {
        return Some(Content::Base);
    }
    let (rest, last) = rest.rsplit_once('/')?;
    let (repository, kind) = rest.rsplit_once('/')?;
    let references: Vec<String> = validator.read(|state, _| {
        state
            .images
            .values()
            .map(Image::reference)
            .filter(|reference| reference.split(':').next() == Some(repository))
            .collect()
    });
    let images = &validator.images;
    match kind {
        "manifests" => {
            let named = format!("{repository}:{last}");
            references
                .iter()
                .map(|reference| (reference, images.manifest(reference)))
                .find(|(reference, manifest)| **reference == named || manifest.digest == last)
                .map(|(_, manifest)| Content::Small(manifest, MANIFEST_TYPE))
        }
        "blobs" if references.is_empty() => None,
        "blobs" if last == images.layer().digest => Some(Content::Layer),
        "blobs" => references
            .iter()
            .map(|reference| images.config(reference))
            .find(|config| config.digest == last)
            .map(|config| Content::Small(config, "application/octet-stream")),
        _ => None,
    }
}

fn note(
    validator: &Arc<Validator>,
    miner: Option<Hotkey>,
    method: &Method,
    path: &str,
    status: StatusCode,
    bytes: u64,
) {
    validator.record(Record::RegistryRequest {
        hotkey: miner,
        method: method.to_string(),
        path: path.to_owned(),
        status: status.as_u16(),
        bytes,
    });
}

fn refused(
    validator: &Arc<Validator>,
    miner: Option<Hotkey>,
    method: &Method,
    path: &str,
    status: StatusCode,
    code: Option<&str>,
) -> Response<Body> {
    note(validator, miner, method, path, status, 0);
    let body = code.map_or(Body::empty(), |code| {
        let errors = json!({"errors": [{"code": code, "message": "unknown to registry", "detail": null}]});
        Body::from(errors.to_string())
    });
    Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .body(body)
        .expect("constant headers are valid")
}

fn small(
    validator: &Arc<Validator>,
    miner: Hotkey,
    method: &Method,
    path: &str,
    blob: &Blob,
    kind: &str,
) -> Response<Body> {
    let head = method == Method::HEAD;
    let sent = if head { 0 } else { blob.bytes.len() as u64 };
    note(validator, Some(miner), method, path, StatusCode::OK, sent);
    let response = Response::builder()
        .header("content-type", kind)
        .header("content-length", blob.bytes.len())
        .header("docker-distribution-api-version", "registry/2.0");
    let response = if blob.digest.is_empty() {
        response
    } else {
        response
            .header("docker-content-digest", &blob.digest)
            .header("etag", format!("\"{}\"", blob.digest))
    };
    let body = if head {
        Body::empty()
    } else {
        Body::from(blob.bytes.clone())
    };
    response.body(body).expect("digests are valid header values")
}

fn redirect(validator: &Arc<Validator>, miner: Hotkey, path: &str) -> Response<Body> {
    let digest = &validator.images.layer().digest;
    let expires = clock::now().unix_seconds() + STORAGE_ADDRESS_SECONDS;
    let signature = validator.tokens.tag(&format!("{digest} {expires}"));
    let location = format!(
        "{}/_storage/{digest}?expires={expires}&signature={signature}",
        validator.api_url
    );
    note(
        validator,
        Some(miner),
        &Method::GET,
        path,
        StatusCode::TEMPORARY_REDIRECT,
        0,
    );
    Response::builder()
        .status(StatusCode::TEMPORARY_REDIRECT)
        .header("location", location)
        .body(Body::empty())
        .expect("addresses are valid header values")
}

#[derive(Debug, Deserialize)]
pub(crate) struct StorageQuery {
    expires: u64,
    signature: String,
}

/// `GET /_storage/{digest}`: object storage, open to whoever has a pre-signed address.
pub(crate) async fn storage(
    Shared(validator): Shared<Arc<Validator>>,
    Path(digest): Path<String>,
    Query(query): Query<StorageQuery>,
    method: Method,
    headers: HeaderMap,
) -> Response<Body> {
    let signature = validator.tokens.tag(&format!("{digest} {}", query.expires));
    let valid = signature == query.signature
        && query.expires > clock::now().unix_seconds()
        && digest == validator.images.layer().digest;
    let path = format!("/_storage/{digest}");
    if !valid {
        return refused(&validator, None, &method, &path, StatusCode::FORBIDDEN, None);
    }
    layer(&validator, None, &method, &path, &headers).await
}

async fn layer(
    validator: &Arc<Validator>,
    miner: Option<Hotkey>,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
) -> Response<Body> {
    let layer = validator.images.layer();
    let size = layer.size_bytes;
    let asked = headers.get("range").and_then(|value| value.to_str().ok());
    let range = match asked.map(|text| parse_range(text, size)) {
        None => None,
        Some(Some(range)) => Some(range),
        Some(None) => {
            let status = StatusCode::RANGE_NOT_SATISFIABLE;
            let mut response = refused(validator, miner, method, path, status, None);
            if let Ok(value) = format!("bytes */{size}").parse() {
                response.headers_mut().insert("content-range", value);
            }
            return response;
        }
    };
    let (first, length) = range.map_or((0, size), |(first, last)| (first, last - first + 1));
    let status = if range.is_some() {
        StatusCode::PARTIAL_CONTENT
    } else {
        StatusCode::OK
    };
    let mut response = Response::builder()
        .status(status)
        .header("content-type", "application/octet-stream")
        .header("content-length", length)
        .header("accept-ranges", "bytes")
        .header("docker-content-digest", &layer.digest);
    if let Some((first, last)) = range {
        response = response.header("content-range", format!("bytes {first}-{last}/{size}"));
    }
    if method == Method::HEAD {
        note(validator, miner, method, path, status, 0);
        return response
            .body(Body::empty())
            .expect("digests are valid header values");
    }
    let opened = async {
        let mut file = tokio::fs::File::open(&layer.path).await?;
        file.seek(std::io::SeekFrom::Start(first)).await?;
        Ok::<_, std::io::Error>(file)
    };
    match opened.await {
        Ok(file) => {
            let counted = Counted {
                inner: ReaderStream::with_capacity(file.take(length), 64 * 1024),
                validator: validator.clone(),
                miner,
                method: method.clone(),
                path: path.to_owned(),
                status,
                sent: 0,
            };
            response
                .body(Body::from_stream(counted))
                .expect("digests are valid header values")
        }
        Err(error) => {
            tracing::error!(%error, "the layer cannot be read");
            refused(
                validator,
                miner,
                method,
                path,
                StatusCode::INTERNAL_SERVER_ERROR,
                None,
            )
        }
    }
}

/// First and last byte of a single range; nothing when it cannot be satisfied.
fn parse_range(text: &str, size: u64) -> Option<(u64, u64)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = match (first, last) {
        ("", suffix) => (size.saturating_sub(suffix.parse().ok()?), size.checked_sub(1)?),
        (first, "") => (first.parse().ok()?, size.checked_sub(1)?),
        (first, last) => (
            first.parse().ok()?,
            last.parse::<u64>().ok()?.min(size.checked_sub(1)?),
        ),
    };
    (first <= last && first < size).then_some((first, last))
}

/// Counts what was really sent, and tells the ledger at its end.
struct Counted<S> {
    inner: S,
    validator: Arc<Validator>,
    miner: Option<Hotkey>,
    method: Method,
    path: String,
    status: StatusCode,
    sent: u64,
}

impl<S: Stream<Item = std::io::Result<Bytes>> + Unpin> Stream for Counted<S> {
    type Item = std::io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = Pin::new(&mut self.inner).poll_next(context);
        if let Poll::Ready(Some(Ok(bytes))) = &next {
            self.sent += bytes.len() as u64;
        }
        next
    }
}

impl<S> Drop for Counted<S> {
    fn drop(&mut self) {
        let miner = self.miner.take();
        note(
            &self.validator,
            miner,
            &self.method,
            &self.path,
            self.status,
            self.sent,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_they_are_meant() {
        for (text, range) in [
            ("bytes=0-9", Some((0, 9))),
            ("bytes=90-", Some((90, 99))),
            ("bytes=-10", Some((90, 99))),
            ("bytes=-1000", Some((0, 99))),
            ("bytes=50-1000", Some((50, 99))),
            ("bytes=100-", None),
            ("bytes=9-5", None),
            ("bytes=", None),
            ("items=0-1", None),
            ("bytes=a-b", None),
        ] {
            assert_eq!(parse_range(text, 100), range, "{text}");
        }
        assert_eq!(parse_range("bytes=0-", 0), None);
    }
}

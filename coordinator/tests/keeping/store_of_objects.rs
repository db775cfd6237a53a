//! An S3-compatible store in this process. It checks every signature by itself, from the request as it came.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, request::Parts};
use axum::response::{IntoResponse, Response};
use ring::hmac::{HMAC_SHA256, Key, sign};
use sha2::{Digest, Sha256};

pub(crate) const ACCESS_KEY: &str = "AKIDTEST";
pub(crate) const SECRET_KEY: &str = "s3cr3t/key+of=the-bucket";
pub(crate) const REGION: &str = "test-1";
pub(crate) const BUCKET: &str = "snapshots";
/// Names in one page of a listing.
const PAGE: usize = 2;

#[derive(Default)]
pub(crate) struct Objects {
    pub(crate) stored: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Requests that were let in.
    pub(crate) served: Mutex<Vec<String>>,
}

/// Serves an empty bucket until the test ends.
pub(crate) async fn serve() -> (SocketAddr, Arc<Objects>) {
    let objects = Arc::new(Objects::default());
    let routes = Router::new().fallback(answer).with_state(Arc::clone(&objects));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (address, objects)
}

fn refuse(code: &str, message: &str) -> Response {
    let xml =
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{message}</Message></Error>");
    (StatusCode::FORBIDDEN, xml).into_response()
}

async fn answer(State(objects): State<Arc<Objects>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    if head.method == Method::PUT && !head.headers.contains_key("content-length") {
        return refuse(
            "MissingContentLength",
            "You must provide the Content-Length HTTP header.",
        );
    }
    let body = to_bytes(body, 64 << 20).await.unwrap();
    if let Err(why) = check(&head, &body) {
        return refuse("SignatureDoesNotMatch", &why);
    }
    objects
        .served
        .lock()
        .unwrap()
        .push(format!("{} {}", head.method, head.uri));
    let mut stored = objects.stored.lock().unwrap();
    let Some(object) = head.uri.path().strip_prefix(&format!("/{BUCKET}")) else {
        return (StatusCode::NOT_FOUND, "<Error><Code>NoSuchBucket</Code></Error>").into_response();
    };
    match (&head.method, object.trim_start_matches('/')) {
        (&Method::GET, "") => list(&stored, head.uri.query().unwrap_or_default()),
        (&Method::GET, name) => match stored.get(name) {
            Some(bytes) => Body::from(bytes.clone()).into_response(),
            None => (StatusCode::NOT_FOUND, "<Error><Code>NoSuchKey</Code></Error>").into_response(),
        },
        (&Method::PUT, name) => {
            stored.insert(name.to_owned(), body.to_vec());
            StatusCode::OK.into_response()
        }
        (&Method::DELETE, name) => {
            stored.remove(name);
            StatusCode::NO_CONTENT.into_response()
        }
        _ => StatusCode::METHOD_NOT_ALLOWED.into_response(),
    }
}

fn list(stored: &BTreeMap<String, Vec<u8>>, query: &str) -> Response {
    let value = |name: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let value = pairs
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.replace("%2F", "/"));
        value.unwrap_or_default()
    };
    assert_eq!(value("list-type"), "2");
    let (prefix, after) = (value("prefix"), value("continuation-token"));
    let names: Vec<&String> = stored
        .keys()
        .filter(|name| name.starts_with(&prefix) && **name > after)
        .collect();
    let page = &names[..names.len().min(PAGE)];
    let more = names.len() > PAGE;
    let rows: String = page
        .iter()
        .map(|name| format!("<Contents><Key>{name}</Key></Contents>"))
        .collect();
    let token = page.last().filter(|_| more);
    let token = token.map_or(String::new(), |name| {
        format!("<NextContinuationToken>{name}</NextContinuationToken>")
    });
    format!("<ListBucketResult><IsTruncated>{more}</IsTruncated>{token}{rows}</ListBucketResult>")
        .into_response()
}

/// Amazon's rules, read the other way: what was sent is put into the canonical form and signed again.
fn check(head: &Parts, body: &[u8]) -> Result<(), String> {
    let header = |name: &str| {
        let value = head
            .headers
            .get(name)
            .ok_or_else(|| format!("{name} is missing"))?;
        value.to_str().map_err(|error| error.to_string())
    };
    let said = header("authorization")?;
    let said = said.strip_prefix("AWS4-HMAC-SHA256 ").ok_or("another scheme")?;
    let part = |name: &str| {
        let mut parts = said.split(',').filter_map(|part| part.trim().split_once('='));
        parts
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.to_owned())
            .ok_or("a part is missing")
    };
    let (credential, names, signature) = (part("Credential")?, part("SignedHeaders")?, part("Signature")?);
    let mut credential = credential.split('/');
    let mut next = || credential.next().unwrap_or_default().to_owned();
    let (access, day, region, service, end) = (next(), next(), next(), next(), next());
    if (access.as_str(), region.as_str(), service.as_str(), end.as_str())
        != (ACCESS_KEY, REGION, "s3", "aws4_request")
    {
        return Err("another key or scope".to_owned());
    }
    for needed in ["host", "x-amz-date", "x-amz-content-sha256"] {
        if !names.split(';').any(|name| name == needed) {
            return Err(format!("{needed} is not signed"));
        }
    }
    let body_hash = header("x-amz-content-sha256")?;
    if hex::encode(Sha256::digest(body)) != body_hash {
        return Err("the body is another one".to_owned());
    }
    let mut query: Vec<&str> = head
        .uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty())
        .collect();
    query.sort_unstable();
    let mut canonical = vec![
        head.method.to_string(),
        head.uri.path().to_owned(),
        query.join("&"),
    ];
    for name in names.split(';') {
        canonical.push(format!("{name}:{}", header(name)?.trim()));
    }
    canonical.extend([String::new(), names.clone(), body_hash.to_owned()]);
    let time = header("x-amz-date")?;
    if !time.starts_with(&day) {
        return Err("another day".to_owned());
    }
    let hash = hex::encode(Sha256::digest(canonical.join("\n")));
    let text = [
        "AWS4-HMAC-SHA256",
        time,
        &format!("{day}/{REGION}/s3/aws4_request"),
        &hash,
    ]
    .join("\n");
    let mac = |key: &[u8], text: &str| {
        sign(&Key::new(HMAC_SHA256, key), text.as_bytes())
            .as_ref()
            .to_vec()
    };
    let of_day = mac(format!("AWS4{SECRET_KEY}").as_bytes(), &day);
    let of_service = mac(&mac(&of_day, REGION), "s3");
    let wanted = hex::encode(mac(&mac(&of_service, "aws4_request"), &text));
    if wanted == signature {
        Ok(())
    } else {
        Err("another signature".to_owned())
    }
}

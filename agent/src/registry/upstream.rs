//! One validator's registry: where it is, and the client that keeps connections to it.
//!
//! Certificates are verified and the name is sent (SNI). Plain HTTP is possible to loopback only, for
//! development. What goes upstream is written here from scratch: the few headers that matter to a pull, and
//! the signed set. The client's `Authorization` and its own `X-Chutes-*` headers have no way through.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, HOST, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, RANGE, USER_AGENT};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use protocol::hotkey::Hotkey;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::registry::credentials::HeaderSet;

/// What of a client's headers goes upstream.
const FORWARDED: [http::HeaderName; 5] = [ACCEPT, RANGE, IF_RANGE, IF_NONE_MATCH, IF_MODIFIED_SINCE];
/// How we name ourselves to registries and storage.
pub(super) const AGENT: HeaderValue =
    HeaderValue::from_static(concat!("chutes-agent/", env!("CARGO_PKG_VERSION")));
const IDLE_CONNECTIONS_MAX: usize = 64;
const IDLE_CONNECTION_AGE: Duration = Duration::from_secs(55);

/// A registry and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The validator.
    pub validator: Hotkey,
    /// Its registry.
    pub origin: Origin,
    /// Certificates to trust instead of the public ones (PEM), for a private validator.
    pub ca_file: Option<PathBuf>,
}

/// Scheme, host and port of a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    scheme: Scheme,
    authority: Authority,
}

/// Why a registry's place is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOrigin {
    /// Not a host with an optional port.
    #[error("{0:?} is not a registry: write host, host:port or https://host:port, without a path")]
    Syntax(String),
    /// Plain HTTP to somewhere else.
    #[error("{0:?}: plain http is possible to loopback addresses only; images would come unprotected")]
    PlainHttp(String),
}

impl Origin {
    /// Reads `host`, `host:port` or a URL without a path; `https` unless it says otherwise.
    ///
    /// # Errors
    /// [`InvalidOrigin`].
    pub fn parse(text: &str) -> Result<Self, InvalidOrigin> {
        let syntax = || InvalidOrigin::Syntax(text.chars().take(128).collect());
        let (scheme, rest) = match text.split_once("://") {
            Some(("https", rest)) => (Scheme::HTTPS, rest),
            Some(("http", rest)) => (Scheme::HTTP, rest),
            Some(_) => return Err(syntax()),
            None => (Scheme::HTTPS, text),
        };
        let authority: Authority = rest.trim_end_matches('/').parse().map_err(|_| syntax())?;
        if authority.host().is_empty() || authority.as_str().contains('@') {
            return Err(syntax());
        }
        if scheme == Scheme::HTTP && !host_is_loopback(authority.host()) {
            return Err(InvalidOrigin::PlainHttp(text.to_owned()));
        }
        Ok(Self { scheme, authority })
    }

    /// Host without port, as the egress policy wants it.
    #[must_use]
    pub fn host(&self) -> &str {
        self.authority.host()
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority)
    }
}

fn host_is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Why a client could not be made, or a request had no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file with certificates is missing or not PEM.
    #[error("read the certificates in {path}: {reason}")]
    Certificates {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// TLS could not be set up.
    #[error("set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// No connection, or it broke before the answer.
    #[error("ask {origin}: {reason}")]
    Unreachable {
        /// Where.
        origin: Origin,
        /// Why, the whole chain.
        reason: String,
    },
    /// No answer in time.
    #[error("ask {origin}: no answer within {after:?}")]
    Silent {
        /// Where.
        origin: Origin,
        /// How long we waited.
        after: Duration,
    },
}

/// The client of one registry.
#[derive(Debug)]
pub struct Upstream {
    /// Whose registry it is.
    pub validator: Hotkey,
    origin: Origin,
    host: HeaderValue,
    answer_timeout: Duration,
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
}

impl Upstream {
    /// Makes the client; connects when first asked.
    ///
    /// # Errors
    /// [`Error::Certificates`] or [`Error::Tls`].
    pub fn new(config: &Config, connect_timeout: Duration, answer_timeout: Duration) -> Result<Self, Error> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(connect_timeout));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls_config(config.ca_file.as_ref())?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_CONNECTION_AGE)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .set_host(false)
            .build(connector);
        let host = HeaderValue::from_str(config.origin.authority.as_str())
            .expect("an authority holds nothing that a header may not");
        Ok(Self {
            validator: config.validator.clone(),
            origin: config.origin.clone(),
            host,
            answer_timeout,
            client,
        })
    }

    /// Asks for a path that was written from a checked request.
    ///
    /// # Errors
    /// [`Error::Unreachable`] or [`Error::Silent`].
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        client_headers: &HeaderMap,
        signed: &HeaderSet,
    ) -> Result<Response<Incoming>, Error> {
        let unreachable = |reason: String| Error::Unreachable {
            origin: self.origin.clone(),
            reason,
        };
        let path = PathAndQuery::try_from(path).map_err(|error| unreachable(error.to_string()))?;
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.origin.scheme.clone());
        parts.authority = Some(self.origin.authority.clone());
        parts.path_and_query = Some(path);
        let mut request = Request::new(Empty::new());
        *request.method_mut() = method;
        *request.uri_mut() = Uri::from_parts(parts).expect("scheme, authority and path are all there");
        let headers = request.headers_mut();
        headers.reserve(FORWARDED.len() + signed.len() + 2);
        headers.insert(HOST, self.host.clone());
        headers.insert(USER_AGENT, AGENT);
        for name in FORWARDED {
            for value in client_headers.get_all(&name) {
                headers.append(name.clone(), value.clone());
            }
        }
        for (name, value) in signed.iter() {
            headers.insert(name.clone(), value.clone());
        }
        match tokio::time::timeout(self.answer_timeout, self.client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(unreachable(chain(&error))),
            Err(_) => Err(Error::Silent {
                origin: self.origin.clone(),
                after: self.answer_timeout,
            }),
        }
    }
}

pub(super) fn tls_config(ca_file: Option<&PathBuf>) -> Result<rustls::ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let Some(path) = ca_file else {
        return Ok(builder.with_webpki_roots().with_no_client_auth());
    };
    let failed = |reason: String| Error::Certificates {
        path: path.clone(),
        reason,
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| failed(error.to_string()))? {
        let certificate = certificate.map_err(|error| failed(error.to_string()))?;
        roots
            .add(certificate)
            .map_err(|error| failed(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(failed("there is none".to_owned()));
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// An error with all its causes, since the outermost of a client only says "client error".
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_https_unless_loopback() {
        for (text, expected) in [
            ("registry.example", "https://registry.example"),
            ("registry.example:8443", "https://registry.example:8443"),
            ("https://registry.example/", "https://registry.example"),
            ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
            ("http://[::1]:5000", "http://[::1]:5000"),
            ("http://localhost:5000", "http://localhost:5000"),
        ] {
            assert_eq!(
                Origin::parse(text).map(|origin| origin.to_string()),
                Ok(expected.to_owned())
            );
        }
        for bad in [
            "",
            "http://registry.example",
            "http://10.0.0.1",
            "ftp://registry.example",
            "https://registry.example/v2",
            "user@registry.example",
            "http://127.0.0.1.example",
            "https://",
        ] {
            assert!(Origin::parse(bad).is_err(), "{bad}");
        }
    }
}

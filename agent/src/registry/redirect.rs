//! Redirects of blobs to object storage: followed by us when the store is on, so that a layer is fetched
//! once and shared; otherwise the client gets the redirect as it is.
//!
//! Only `https` is followed, without any header of ours or of the client's. Storage is wherever a validator
//! says, so connections go through the same resolve, check and dial as a chute's: never to an address that
//! was not checked.

use std::future::Future;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, LOCATION, USER_AGENT};
use http::uri::Scheme;
use http::{HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;

use crate::egress::Network;
use crate::egress::policy::{Decision, Name, Reason};
use crate::registry::upstream;

const HOPS_MAX: usize = 3;
const LOCATION_BYTES_MAX: usize = 8 * 1024;
const HTTPS_PORT: u16 = 443;
const IDLE_CONNECTION_AGE: Duration = Duration::from_secs(30);

/// What a follower needs.
#[derive(Debug, Clone)]
pub struct Config {
    /// The resolve/dial seam.
    pub network: Network,
    /// Addresses of this host that its interfaces do not carry.
    pub own_addresses: Vec<IpAddr>,
    /// Certificates to trust instead of the public ones (PEM), for private storage.
    pub ca_file: Option<PathBuf>,
    /// Longest time to resolve, and to connect.
    pub connect_timeout: Duration,
    /// Longest time to an answer.
    pub answer_timeout: Duration,
}

/// Follows redirects.
#[derive(Debug)]
pub struct Follower {
    client: Client<HttpsConnector<Connector>, Empty<Bytes>>,
    answer_timeout: Duration,
}

impl Follower {
    /// Makes the client; connects when first needed.
    ///
    /// # Errors
    /// [`upstream::Error`] when the certificates cannot be read.
    pub fn new(config: Config) -> Result<Self, upstream::Error> {
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(upstream::tls_config(config.ca_file.as_ref())?)
            .https_only()
            .enable_http1()
            .wrap_connector(Connector {
                network: config.network,
                own_addresses: config.own_addresses.into(),
                timeout: config.connect_timeout,
            });
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_CONNECTION_AGE)
            .set_host(false)
            .build(connector);
        Ok(Self {
            client,
            answer_timeout: config.answer_timeout,
        })
    }

    /// Follows a redirect if there is one. When it leads to anything but the blob, the redirect itself comes
    /// back, so that the client can try for itself.
    pub async fn follow(&self, first: Response<Incoming>) -> Response<Incoming> {
        let mut next = target(&first);
        for _ in 0..HOPS_MAX {
            let Some(uri) = next else {
                return first;
            };
            match self.get(uri).await {
                Ok(response) if response.status() == StatusCode::OK => return response,
                Ok(response) => next = target(&response),
                Err(failure) => {
                    tracing::warn!("follow a redirect of a blob: {failure}");
                    return first;
                }
            }
        }
        first
    }

    async fn get(&self, uri: Uri) -> Result<Response<Incoming>, String> {
        let authority = uri
            .authority()
            .map(|authority| authority.as_str())
            .unwrap_or_default();
        let host = HeaderValue::from_str(authority).map_err(|error| error.to_string())?;
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = uri;
        request.headers_mut().insert(HOST, host);
        request.headers_mut().insert(USER_AGENT, upstream::AGENT);
        match tokio::time::timeout(self.answer_timeout, self.client.request(request)).await {
            Ok(response) => response.map_err(|error| upstream::chain(&error)),
            Err(_) => Err("no answer in time".to_owned()),
        }
    }
}

/// Where a response redirects to, if that is a place that we go to: `https`, no user name.
fn target(response: &Response<Incoming>) -> Option<Uri> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    let location = response.headers().get(LOCATION)?.to_str().ok()?;
    if location.len() > LOCATION_BYTES_MAX {
        return None;
    }
    let uri: Uri = location.parse().ok()?;
    let plain = uri
        .authority()
        .is_some_and(|authority| !authority.as_str().contains('@'));
    (uri.scheme() == Some(&Scheme::HTTPS) && plain).then_some(uri)
}

/// Connects through the egress seam.
#[derive(Debug, Clone)]
struct Connector {
    network: Network,
    own_addresses: Arc<[IpAddr]>,
    timeout: Duration,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(Decision);

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = Refused;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Refused>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let Self {
            network,
            own_addresses,
            timeout,
        } = self.clone();
        Box::pin(async move {
            let name = Name::parse(uri.host().unwrap_or_default()).map_err(|reason: Reason| {
                Refused(Decision::deny(reason, "storage is not named by a host name"))
            })?;
            let port = uri.port_u16().unwrap_or(HTTPS_PORT);
            let stream = network
                .connect(&name, port, &own_addresses, timeout)
                .await
                .map_err(Refused)?;
            Ok(TokioIo::new(stream))
        })
    }
}

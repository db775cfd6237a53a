//! The registry door: images are pulled through it, with signatures that a member of the coordinator made.
//!
//! ```text
//! containerd -> 127.0.0.1:30500 -> check path and Host -> blob store?  -> client
//!                                                      \-> https://<that validator's registry> + signed headers
//! ```
//!
//! Reading order: [`path`] and [`host`] (pure), [`credentials`], [`handler`], [`upstream`], [`redirect`],
//! [`store`], [`body`], [`digest`], [`range`], [`metrics`]. The door holds no seed; it listens on loopback
//! only, since whoever can reach it pulls what this miner may pull.

pub mod body;
pub mod credentials;
pub mod digest;
pub mod handler;
pub mod host;
pub mod metrics;
pub mod path;
pub mod range;
pub mod redirect;
pub mod store;
pub mod upstream;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use protocol::hotkey::{Hotkey, InvalidKey};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::units::{Size, Span};
use crate::registry::credentials::Credentials;
use crate::registry::metrics::Metrics;
use crate::registry::redirect::Follower;
use crate::registry::store::Store;
use crate::registry::upstream::{InvalidOrigin, Origin, Upstream};

const HEAD_TIMEOUT: Duration = Duration::from_secs(65);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECTION_BUFFER_BYTES: usize = 128 * 1024;

/// Settings of the registry door as written, but for the validators, which all rooms share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawConfig {
    /// Where containerd connects; a loopback address.
    pub listen: SocketAddr,
    /// Longest time to connect to a registry.
    pub connect_timeout: Span,
    /// Longest silence of a registry, before its answer and between two pieces.
    pub idle_timeout: Span,
    /// Most client connections at once.
    pub connections_max: usize,
    /// Keep blobs on disk, so that a layer is fetched once.
    pub store: bool,
    /// Most bytes of blobs on disk.
    pub store_bytes_max: Size,
    /// Store nothing if less than this would stay free.
    pub store_free_bytes_min: Size,
    /// Certificates (PEM) to trust instead of the public ones for storage that registries redirect to.
    pub storage_ca_file: Option<PathBuf>,
}

impl Default for RawConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 30500)),
            connect_timeout: Span::seconds(10),
            idle_timeout: Span::seconds(60),
            connections_max: 256,
            store: true,
            store_bytes_max: Size(100 << 30),
            store_free_bytes_min: Size(10 << 30),
            storage_ca_file: None,
        }
    }
}

/// A validator's registry as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawUpstream {
    /// The validator's SS58 address.
    pub hotkey: String,
    /// Host, host:port or URL of its registry.
    pub registry: String,
    /// Certificates (PEM) to trust instead of the public ones.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
}

/// Settings as checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where containerd connects; loopback.
    pub listen: SocketAddr,
    /// Registries by validator; the first is the default. Never empty.
    pub upstreams: Vec<upstream::Config>,
    /// Longest time to connect.
    pub connect_timeout: Duration,
    /// Longest silence of a registry.
    pub idle_timeout: Duration,
    /// Most client connections at once.
    pub connections_max: usize,
    /// Blob store, if wanted.
    pub store: Option<store::Config>,
    /// Certificates for storage, instead of the public ones.
    pub storage_ca_file: Option<PathBuf>,
}

/// Why settings are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// Anyone could pull in this miner's name.
    #[error(
        "registry.listen = \"{0}\" is not a loopback address: whoever reaches this door pulls images in the miner's name"
    )]
    NotLoopback(SocketAddr),
    /// Nothing to pull from.
    #[error("no validator with a registry is configured")]
    NoValidator,
    /// Two registries for one validator.
    #[error("validator {0} is configured twice")]
    Twice(Hotkey),
    /// Not an address.
    #[error("validator hotkey: {0}")]
    Hotkey(#[from] InvalidKey),
    /// Not a place.
    #[error("validator registry: {0}")]
    Origin(#[from] InvalidOrigin),
    /// A limit of nothing.
    #[error("registry.{0} must be more than zero")]
    Zero(&'static str),
}

impl Config {
    /// Checks settings. `store_directory` is where blobs go if the store is on.
    ///
    /// # Errors
    /// [`InvalidConfig`].
    pub fn check(
        raw: &RawConfig,
        validators: &[RawUpstream],
        store_directory: PathBuf,
    ) -> Result<Self, InvalidConfig> {
        if !raw.listen.ip().is_loopback() {
            return Err(InvalidConfig::NotLoopback(raw.listen));
        }
        let mut upstreams: Vec<upstream::Config> = Vec::with_capacity(validators.len());
        for validator in validators {
            let hotkey = Hotkey::parse(&validator.hotkey)?;
            if upstreams
                .iter()
                .any(|known| known.validator.lower() == hotkey.lower())
            {
                return Err(InvalidConfig::Twice(hotkey));
            }
            upstreams.push(upstream::Config {
                validator: hotkey,
                origin: Origin::parse(&validator.registry)?,
                ca_file: validator.ca_file.clone(),
            });
        }
        let limits = [
            ("connect_timeout", raw.connect_timeout.0.is_zero()),
            ("idle_timeout", raw.idle_timeout.0.is_zero()),
            ("connections_max", raw.connections_max == 0),
        ];
        if let Some((name, _)) = limits.iter().find(|(_, zero)| *zero) {
            return Err(InvalidConfig::Zero(name));
        }
        if upstreams.is_empty() {
            return Err(InvalidConfig::NoValidator);
        }
        let store = store::Config {
            directory: store_directory,
            bytes_max: raw.store_bytes_max.0,
            free_bytes_min: raw.store_free_bytes_min.0,
        };
        Ok(Self {
            listen: raw.listen,
            upstreams,
            connect_timeout: raw.connect_timeout.0,
            idle_timeout: raw.idle_timeout.0,
            connections_max: raw.connections_max,
            store: raw.store.then_some(store),
            storage_ca_file: raw.storage_ca_file.clone(),
        })
    }
}

/// Why the door cannot open.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is taken or not ours.
    #[error("listen on {address} for the registry door: {source}")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A client could not be made.
    #[error(transparent)]
    Upstream(#[from] upstream::Error),
    /// The blob store could not be opened.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// What all requests share.
#[derive(Debug)]
pub struct Door {
    upstreams: Vec<Upstream>,
    hosts: host::Table,
    credentials: Credentials,
    store: Option<Store>,
    follower: Option<Follower>,
    metrics: Arc<Metrics>,
    idle_timeout: Duration,
    tasks: TaskTracker,
}

/// A registry door that listens.
#[derive(Debug)]
pub struct Service {
    listener: TcpListener,
    door: Arc<Door>,
    connections: Arc<Semaphore>,
}

impl Service {
    /// Opens store and listener. Without a follower, redirects of blobs are passed on to the client.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn bind(
        config: &Config,
        credentials: Credentials,
        follower: Option<Follower>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, Error> {
        let upstreams = config
            .upstreams
            .iter()
            .map(|upstream| Upstream::new(upstream, config.connect_timeout, config.idle_timeout))
            .collect::<Result<_, _>>()?;
        let store = config
            .store
            .clone()
            .map(|store| Store::open(store, metrics.clone()))
            .transpose()?;
        let door = Door {
            upstreams,
            hosts: host::Table::new(config.upstreams.iter().map(|upstream| &upstream.validator)),
            credentials,
            store,
            follower,
            metrics,
            idle_timeout: config.idle_timeout,
            tasks: TaskTracker::new(),
        };
        let failed = |source| Error::Listen {
            address: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        Ok(Self {
            listener,
            door: Arc::new(door),
            connections: Arc::new(Semaphore::new(config.connections_max)),
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`; then lets requests under way finish for a bounded time.
    pub async fn serve(self, shutdown: CancellationToken) {
        loop {
            // A place first, then a client: beyond the limit they wait in the listener's queue.
            let place = tokio::select! {
                place = Arc::clone(&self.connections).acquire_owned() => place.expect("never closed"),
                () = shutdown.cancelled() => break,
            };
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = shutdown.cancelled() => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    let connection = serve_connection(Arc::clone(&self.door), stream, shutdown.clone());
                    self.door.tasks.spawn(async move {
                        connection.await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept on the registry door");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        self.door.tasks.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, self.door.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("transfers of the registry door were cut off at shutdown");
        }
    }
}

async fn serve_connection(door: Arc<Door>, stream: TcpStream, shutdown: CancellationToken) {
    let _ = stream.set_nodelay(true);
    let metrics = door.metrics.clone();
    metrics.connections.inc();
    let service = service_fn(move |request| {
        let door = Arc::clone(&door);
        async move { Ok::<_, Infallible>(handler::handle(door, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(CONNECTION_BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a client of the registry door");
    }
    metrics.connections.dec();
}

//! The data-plane process: registry door, egress door and cache cleaner, and the admin socket through which
//! the host process feeds them.
//!
//! ```text
//! <data dir>/run/data.sock (0600)   PUT /registry/headers   JSON array of `protocol::link::RegistryHeaders`
//!                                   PUT /cache/leases       JSON of `cache::policy::Leases`
//!                                   GET /metrics            Prometheus text
//!                                   GET /ping
//! ```
//!
//! This process parses what strangers send; it has no seed, no Raft store and no Kubernetes token.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use protocol::link::RegistryHeaders;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use crate::cache::{self, SharedLeases};
use crate::egress;
use crate::registry::credentials::Credentials;
use crate::registry::redirect::{self, Follower};
use crate::{egress::network::NotResolved, registry};
use coordinator::clock::{Clock, WallClock};

const ADMIN_BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Settings of the process.
#[derive(Debug, Clone)]
pub struct Config {
    /// The registry door.
    pub registry: registry::Config,
    /// The egress door.
    pub egress: egress::Config,
    /// The cache cleaner, if there is a cache.
    pub cache: Option<cache::Config>,
    /// The admin socket.
    pub socket: PathBuf,
}

/// Why the process cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The registry door.
    #[error("registry: {0}")]
    Registry(#[from] registry::Error),
    /// The egress door.
    #[error("egress: {0}")]
    Egress(#[from] egress::Error),
    /// Name resolution.
    #[error("egress: {0}")]
    Resolve(#[from] NotResolved),
    /// The admin socket.
    #[error("admin socket {path}: {source}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The process, listening everywhere but not serving yet.
#[derive(Debug)]
pub struct DataPlane {
    registry: registry::Service,
    egress: egress::Service,
    cache: Option<cache::Config>,
    cache_metrics: cache::Metrics,
    admin: Admin,
    socket: UnixListener,
    socket_path: PathBuf,
    clock: Arc<dyn Clock>,
}

#[derive(Debug, Clone)]
struct Admin {
    credentials: Credentials,
    leases: SharedLeases,
    metrics: Arc<Registry>,
}

/// Runs the process until `shutdown`.
///
/// # Errors
/// [`Error`].
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), Error> {
    raise_descriptor_limit();
    DataPlane::bind(config, Arc::new(WallClock))
        .await?
        .serve(shutdown)
        .await
}

/// A tunnel takes up to six descriptors, and the usual limit is 1024: takes what the system grants.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit on open files stays as it is");
    }
}

impl DataPlane {
    /// Opens stores and listeners.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn bind(config: Config, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        let mut metrics = Registry::with_prefix("chutes");
        let credentials = Credentials::new(clock.clone());
        let registry_metrics = Arc::new(registry::metrics::Metrics::default());
        registry_metrics.register(&mut metrics);
        let egress_metrics = Arc::new(egress::metrics::Metrics::default());
        egress_metrics.register(&mut metrics);
        let network = egress::Network::new(&config.egress)?;
        let follower = Follower::new(redirect::Config {
            network: network.clone(),
            own_addresses: config.egress.own_addresses.clone(),
            ca_file: config.registry.storage_ca_file.clone(),
            connect_timeout: config.registry.connect_timeout,
            answer_timeout: config.registry.idle_timeout,
        })
        .map_err(registry::Error::from)?;
        let registry = registry::Service::bind(
            &config.registry,
            credentials.clone(),
            Some(follower),
            registry_metrics,
        )
        .await?;
        let egress = egress::Service::bind(&config.egress, network, egress_metrics).await?;
        let cache_metrics = cache::Metrics::default();
        cache_metrics.register(&mut metrics);
        let socket = listen(&config.socket).map_err(|source| Error::Socket {
            path: config.socket.clone(),
            source,
        })?;
        Ok(Self {
            registry,
            egress,
            cache: config.cache,
            cache_metrics,
            admin: Admin {
                credentials,
                leases: SharedLeases::default(),
                metrics: Arc::new(metrics),
            },
            socket,
            socket_path: config.socket,
            clock,
        })
    }

    /// Where the registry door and the egress door listen.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn local_addrs(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.registry.local_addr()?, self.egress.local_addr()?))
    }

    /// Serves until `shutdown`, then lets transfers finish for a bounded time.
    ///
    /// # Errors
    /// [`Error::Socket`] when the admin socket fails.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), Error> {
        if let (Ok(registry), Ok(egress)) = (self.registry.local_addr(), self.egress.local_addr()) {
            tracing::info!(%registry, %egress, socket = %self.socket_path.display(), "the data plane serves");
        }
        let leases = self.admin.leases.clone();
        let stop_admin = shutdown.clone();
        let admin = axum::serve(self.socket, routes(self.admin))
            .with_graceful_shutdown(async move { stop_admin.cancelled().await });
        let sweeping = async {
            match self.cache {
                Some(cache) => {
                    cache::run(cache, leases, self.cache_metrics, self.clock, shutdown.clone()).await
                }
                None => shutdown.cancelled().await,
            }
        };
        let admin = async {
            let ended = admin.await;
            // Without its admin socket the process is blind: it ends, and is started anew.
            shutdown.cancel();
            ended
        };
        let (ended, (), (), ()) = tokio::join!(
            admin,
            self.registry.serve(shutdown.clone()),
            self.egress.serve(shutdown.clone()),
            sweeping
        );
        let _ = fs::remove_file(&self.socket_path);
        ended.map_err(|source| Error::Socket {
            path: self.socket_path,
            source,
        })
    }
}

/// Listens on a socket that only this user can reach; an old socket file is removed first.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn routes(admin: Admin) -> Router {
    Router::new()
        .route("/ping", get(|| std::future::ready("pong")))
        .route("/metrics", get(metrics))
        .route("/registry/headers", put(put_headers))
        .route("/cache/leases", put(put_leases))
        .layer(DefaultBodyLimit::max(ADMIN_BODY_BYTES_MAX))
        .with_state(admin)
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &admin.metrics) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn put_headers(State(admin): State<Admin>, Json(sets): Json<Vec<RegistryHeaders>>) -> Response {
    match admin.credentials.replace(sets) {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    }
}

async fn put_leases(State(admin): State<Admin>, Json(leases): Json<cache::policy::Leases>) -> Response {
    admin.leases.replace(leases);
    StatusCode::NO_CONTENT.into_response()
}

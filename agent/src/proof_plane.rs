//! The GPU proof as a process of its own: it parses what strangers send and talks to drivers, so it holds no
//! seed, no token and no store, and may die without taking anything along.
//!
//! Two doors: HTTP for validators, signed; and a Unix socket that only root can open, for this host's other
//! processes (`GET /devices`, `GET /metrics`).

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::{Extension, Router};
use coordinator::clock::{Clock, WallClock};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use proof::Profile;
use protocol::hotkey::Hotkey;
use reqwest::Url;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::gpu::api::{Api, Peer, local_routes, public_routes};
use crate::gpu::cpu::{self, Cpu};
use crate::gpu::cuda::{Cuda, ProbeError};
use crate::gpu::guard::{Guard, caller};
use crate::gpu::prover::Prover;
use crate::gpu::remote_token::TokenClient;
use crate::gpu::worker::{Limits, Worker};

/// Connections that may be open at one door.
const CONNECTIONS_MAX: usize = 128;
/// Connections that one address may have open; a validator needs one or two.
const CONNECTIONS_OF_CALLER_MAX: usize = 32;
/// A request's head must be here within this time; idle connections are closed after it.
const HEAD_READ_MAX: Duration = Duration::from_secs(15);
/// How long open requests may go on after a stop.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// Pause after the system refused to accept a connection.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Settings, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where validators connect; port 0 picks a free one.
    pub listen: SocketAddr,
    /// The local door, `<data dir>/run/proof.sock`.
    pub socket: PathBuf,
    /// This miner.
    pub miner: Hotkey,
    /// Who may ask, and the root of their API. Empty means nobody.
    pub validators: Vec<(Hotkey, Url)>,
    /// What proves.
    pub backend: Backend,
    /// How large a proof is.
    pub profile: Profile,
    /// Queue and time limits.
    pub limits: Limits,
}

/// What proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// Software GPUs on the CPU, for development and tests.
    Cpu {
        /// How many.
        count: usize,
        /// Their identities derive from this text; unique in the network.
        uuid_seed: String,
    },
    /// The cards that the CUDA driver shows.
    Cuda,
}

/// Why the process cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The CPU backend refuses its configuration.
    #[error("CPU backend: {0}")]
    Cpu(#[from] cpu::ConfigError),
    /// No cards.
    #[error("CUDA backend: {0}")]
    Cuda(#[from] ProbeError),
    /// The port cannot be had.
    #[error("listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The Unix socket cannot be had.
    #[error("listen on {}: {source}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Runs until `shutdown`.
///
/// # Errors
/// [`Error`], before anything is served.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), Error> {
    let plane = Plane::bind(config, Arc::new(WallClock)).await?;
    plane.serve(shutdown).await;
    Ok(())
}

/// A proof process that has its doors and does not serve yet.
#[derive(Debug)]
pub struct Plane {
    listener: TcpListener,
    address: SocketAddr,
    local: UnixListener,
    api: Arc<Api>,
}

impl Plane {
    /// Starts the backend and takes the doors.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn bind(config: Config, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        let prover: Arc<dyn Prover> = match &config.backend {
            Backend::Cpu { count, uuid_seed } => Arc::new(Cpu::new(*count, uuid_seed, config.profile)?),
            Backend::Cuda => Arc::new(Cuda::discover()?),
        };
        for device in prover.devices() {
            tracing::info!(uuid = %device.uuid, name = device.name, memory = device.memory, "GPU");
        }
        if config.validators.is_empty() {
            tracing::warn!("no validator is configured: every proof request will be refused");
        }
        let hotkeys = config
            .validators
            .iter()
            .map(|(hotkey, _)| hotkey.clone())
            .collect();
        let api = Api::new(
            Worker::start(prover, config.limits),
            Guard::new(config.miner, hotkeys, clock),
            TokenClient::new(config.validators),
        );
        let failed = |source| Error::Listen {
            address: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let local = bind_private(&config.socket).map_err(|source| Error::Socket {
            path: config.socket.clone(),
            source,
        })?;
        tracing::info!(%address, socket = %config.socket.display(), "GPU proof listens");
        Ok(Self {
            listener,
            address,
            local,
            api: Arc::new(api),
        })
    }

    /// Where validators connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves both doors until `shutdown`, then lets open requests end for a while.
    pub async fn serve(self, shutdown: CancellationToken) {
        let Self {
            listener, local, api, ..
        } = self;
        let public = serve_door(listener, public_routes(Arc::clone(&api)), shutdown.clone());
        let private = serve_door(local, local_routes(api), shutdown);
        tokio::join!(public, private);
    }
}

/// A Unix socket that only its owner can open. It gets its mode before it gets its name, and replaces what a
/// dead process left.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let unnamed = path.with_extension("new");
    if let Err(error) = fs::remove_file(&unnamed)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let listener = UnixListener::bind(&unnamed)?;
    fs::set_permissions(&unnamed, Permissions::from_mode(0o600))?;
    fs::rename(&unnamed, path)?;
    Ok(listener)
}

/// What connections come in at.
trait Door: Send + 'static {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// A connection and the address it comes from; processes of this host have none.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Self::Stream, Option<IpAddr>)>>;
}

impl Door for TcpListener {
    type Stream = TcpStream;
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, Option<IpAddr>)>> {
        Self::poll_accept(self, cx).map_ok(|(stream, address)| (stream, Some(address.ip())))
    }
}

impl Door for UnixListener {
    type Stream = UnixStream;
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(UnixStream, Option<IpAddr>)>> {
        Self::poll_accept(self, cx).map_ok(|(stream, _)| (stream, None))
    }
}

/// Open connections of each caller.
type OpenByCaller = Arc<Mutex<BTreeMap<IpAddr, usize>>>;

/// A place among the open connections; gives it back when dropped.
struct Place {
    _slot: OwnedSemaphorePermit,
    of: Option<(IpAddr, OpenByCaller)>,
}

impl Place {
    fn take(slots: &Arc<Semaphore>, open: &OpenByCaller, peer: Option<IpAddr>) -> Option<Self> {
        let slot = Arc::clone(slots).try_acquire_owned().ok()?;
        let of = match peer.map(caller) {
            Some(caller) => {
                let mut counts = open.lock().unwrap_or_else(PoisonError::into_inner);
                let count = counts.entry(caller).or_default();
                if *count >= CONNECTIONS_OF_CALLER_MAX {
                    return None;
                }
                *count += 1;
                Some((caller, Arc::clone(open)))
            }
            None => None,
        };
        Some(Self { _slot: slot, of })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some((caller, open)) = &self.of {
            let mut counts = open.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(count) = counts.get_mut(caller) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(caller);
                }
            }
        }
    }
}

/// Accepts and serves connections up to the limits; more are closed at once.
async fn serve_door(door: impl Door, routes: Router, shutdown: CancellationToken) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let open = OpenByCaller::default();
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = poll_fn(|cx| door.poll_accept(cx)) => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Some(place) = Place::take(&slots, &open, peer) else {
            tracing::warn!(?peer, "too many connections: one is closed");
            continue;
        };
        let routes = match peer {
            Some(peer) => routes.clone().layer(Extension(Peer(peer))),
            None => routes.clone(),
        };
        let shutdown = shutdown.clone();
        connections.spawn(async move {
            serve_connection(stream, routes, shutdown).await;
            drop(place);
        });
    }
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_MAX, drained).await.is_err() {
        tracing::warn!("requests were cut off by the stop");
    }
}

async fn serve_connection<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    routes: Router,
    shutdown: CancellationToken,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_READ_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
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

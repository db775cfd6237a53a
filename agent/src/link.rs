//! The host's end of the host link: one QUIC connection to a member of the coordinator, kept for ever.
//!
//! The messages are those of [`protocol::link`]. What goes out is always the newest state of a kind, never
//! a queue of old ones; what comes in is handed on in order. [`Link`] is the seam that a simulation replaces.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use protocol::link::{ALPN, Decoder, FrameError, FromHost, ToHost, encode};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::workload::Fence;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{
    ClientConfig, Connection, Endpoint, IdleTimeout, RecvStream, SendStream, TransportConfig, VarInt,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use coordinator::clock::Clock;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A message that the other side does not take for so long ends the connection.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
const KEEP_ALIVE: Duration = Duration::from_secs(4);
const BACKOFF_FIRST: Duration = Duration::from_millis(300);
const BACKOFF_MAX: Duration = Duration::from_secs(20);
/// A connection that lasted so long was a good one.
const GOOD_AFTER: Duration = Duration::from_secs(30);
const CHUNK_BYTES: usize = 64 * 1024;

/// What a link carries.
#[derive(Debug)]
pub struct Ends {
    /// What the host says of itself; nothing is sent before it is known.
    pub facts: watch::Receiver<Option<HostFacts>>,
    /// Fence of the set on disk.
    pub stored: watch::Receiver<Fence>,
    /// The newest report.
    pub report: watch::Receiver<Option<WorkloadReport>>,
    /// Fence of the last report that was given to the coordinator.
    pub delivered: watch::Sender<Fence>,
    /// What the coordinator says.
    pub inbound: mpsc::Sender<ToHost>,
}

/// The way to the coordinator.
pub trait Link: std::fmt::Debug + Send {
    /// Carries messages until `shutdown`, over however many connections.
    fn run(self: Box<Self>, ends: Ends, shutdown: CancellationToken) -> BoxFuture<'static, ()>;
}

/// The link over QUIC.
#[derive(Debug, Clone)]
pub struct Config {
    /// Members of the coordinator as `address:port`, tried in turn.
    pub members: Vec<String>,
    /// Name in their certificates.
    pub server_name: String,
    /// Folder with `host.pem` (our chain), `host.key` and `ca.pem`; read anew for each connection, so that
    /// certificates can be replaced.
    pub certificates: PathBuf,
}

/// Why a connection ended or was never made.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("certificate file {path}: {reason}")]
    Certificate { path: PathBuf, reason: String },
    #[error("connect to {member}: {reason}")]
    Connect { member: String, reason: String },
    #[error("connection: {0}")]
    Lost(String),
    #[error("what came from the coordinator: {0}")]
    Frame(#[from] FrameError),
}

fn lost(error: impl std::fmt::Display) -> Error {
    Error::Lost(error.to_string())
}

/// The link over QUIC.
#[derive(Debug)]
pub struct Quic {
    config: Config,
    clock: Arc<dyn Clock>,
}

impl Quic {
    /// A link to the members of the configuration.
    #[must_use]
    pub fn new(config: Config, clock: Arc<dyn Clock>) -> Self {
        Self { config, clock }
    }

    async fn keep(self, mut ends: Ends) {
        if self.config.members.is_empty() {
            tracing::error!("no member of the coordinator is configured: nothing will run here");
        }
        let mut pause = BACKOFF_FIRST;
        for member in self.config.members.iter().cycle() {
            let began = Instant::now();
            match self.carry(member, &mut ends).await {
                // The other ends are gone: the process is ending.
                Ok(()) => return,
                Err(error) => tracing::warn!(%error, member, "host link"),
            }
            if began.elapsed() >= GOOD_AFTER {
                pause = BACKOFF_FIRST;
            }
            sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
            pause = (pause * 2).min(BACKOFF_MAX);
        }
    }

    /// One connection, from the greeting to its end.
    async fn carry(&self, member: &str, ends: &mut Ends) -> Result<(), Error> {
        let Ok(facts) = ends
            .facts
            .wait_for(Option::is_some)
            .await
            .map(|facts| facts.clone())
        else {
            return Ok(());
        };
        let Some(facts) = facts else { return Ok(()) };
        let (_endpoint, connection) = self.connect(member).await?;
        let (mut out, mut incoming) = connection.open_bi().await.map_err(lost)?;
        let hello = FromHost::Hello {
            facts,
            fence: *ends.stored.borrow(),
            clock: self.clock.now(),
        };
        write(&mut out, &hello).await?;
        tracing::info!(member, "host link is up");
        ends.report.mark_changed();
        let mut decoder = Decoder::default();
        loop {
            tokio::select! {
                read = read(&mut incoming, &mut decoder) => {
                    read?;
                    while let Some(message) = decoder.take_next::<ToHost>()? {
                        if ends.inbound.send(message).await.is_err() {
                            return Ok(());
                        }
                    }
                }
                changed = ends.report.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let report = ends.report.borrow_and_update().clone();
                    if let Some(report) = report {
                        let fence = report.fence;
                        write(&mut out, &FromHost::Report(report)).await?;
                        ends.delivered.send_replace(fence);
                    }
                }
                changed = ends.facts.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let facts = ends.facts.borrow_and_update().clone();
                    if let Some(facts) = facts {
                        write(&mut out, &FromHost::Facts(facts)).await?;
                    }
                }
            }
        }
    }

    async fn connect(&self, member: &str) -> Result<(Endpoint, Connection), Error> {
        let failed = |reason: String| Error::Connect {
            member: member.to_owned(),
            reason,
        };
        let config = client_config(&self.config.certificates)?;
        let addresses = tokio::net::lookup_host(member)
            .await
            .map_err(|e| failed(e.to_string()))?;
        let mut last = "the name has no address".to_owned();
        for address in addresses {
            let local: SocketAddr = match address {
                SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
                SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
            };
            let endpoint = Endpoint::client(local).map_err(|e| failed(e.to_string()))?;
            let connecting = endpoint
                .connect_with(config.clone(), address, &self.config.server_name)
                .map_err(|e| failed(e.to_string()))?;
            match timeout(CONNECT_TIMEOUT, connecting).await {
                Ok(Ok(connection)) => return Ok((endpoint, connection)),
                Ok(Err(error)) => last = error.to_string(),
                Err(_) => last = format!("no answer within {CONNECT_TIMEOUT:?}"),
            }
        }
        Err(failed(last))
    }
}

impl Link for Quic {
    fn run(self: Box<Self>, ends: Ends, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
        async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = self.keep(ends) => {}
            }
        }
        .boxed()
    }
}

async fn write(out: &mut SendStream, message: &impl Serialize) -> Result<(), Error> {
    let frame = encode(message)?;
    match timeout(WRITE_TIMEOUT, out.write_all(&frame)).await {
        Ok(written) => written.map_err(lost),
        Err(_) => Err(lost("the coordinator takes no more")),
    }
}

/// Takes what has arrived. Nothing is lost when it is given up while it waits.
async fn read(incoming: &mut RecvStream, decoder: &mut Decoder) -> Result<(), Error> {
    match incoming.read_chunk(CHUNK_BYTES, true).await.map_err(lost)? {
        Some(chunk) => {
            decoder.push(&chunk.bytes);
            Ok(())
        }
        None => Err(lost("the coordinator has ended the stream")),
    }
}

fn client_config(folder: &Path) -> Result<ClientConfig, Error> {
    let file = |name: &str| folder.join(name);
    let bad = |name: &str| {
        let path = file(name);
        move |reason: String| Error::Certificate { path, reason }
    };
    let chain = |name: &str| -> Result<Vec<CertificateDer<'static>>, Error> {
        let list = CertificateDer::pem_file_iter(file(name)).and_then(Iterator::collect);
        list.map_err(|error: rustls::pki_types::pem::Error| bad(name)(error.to_string()))
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in chain("ca.pem")? {
        roots
            .add(certificate)
            .map_err(|error| bad("ca.pem")(error.to_string()))?;
    }
    let key = PrivateKeyDer::from_pem_file(file("host.key"));
    let key = key.map_err(|error| bad("host.key")(error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(lost)?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain("host.pem")?, key)
        .map_err(|error| bad("host.pem")(error.to_string()))?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(lost)?));
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(IdleTimeout::try_from(IDLE_TIMEOUT).ok())
        .keep_alive_interval(Some(KEEP_ALIVE))
        // The host opens the only stream; the coordinator opens none.
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

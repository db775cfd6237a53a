//! The host's end of the host link: one QUIC connection to a member of the coordinator, kept for ever. When that
//! member dies, or cannot reach the others any more, the host goes to another one at once: the members' doors are
//! known from joining, and told anew by each member.
//!
//! The messages are those of [`protocol::link`]. What goes out is always the newest state of a kind, never
//! a queue of old ones; what comes in is handed on in order. [`Link`] is the seam that a simulation replaces.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use protocol::link::{ALPN, Decoder, FrameError, FromHost, ToHost, encode};
use protocol::logs::{HostAnswer, HostQuestion};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::workload::Fence;
use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream, VarInt};
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use coordinator::clock::Clock;
use coordinator::host_link::quic::{KEEP_ALIVE, transport};
use coordinator::identity::{Identity, IdentityError};
use coordinator::join::{Admission, client};

/// How long a member may take to let the host in, in the first round over all members and at most.
const CONNECT_FIRST: Duration = Duration::from_millis(1500);
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// A message that the other side does not take for so long ends the connection.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause after a round in which no member let the host in.
const BACKOFF_FIRST: Duration = Duration::from_millis(300);
const BACKOFF_MAX: Duration = Duration::from_secs(20);
/// A connection that lasted so long was a good one.
const GOOD_AFTER: Duration = Duration::from_secs(5);
/// Between two looks at the age of the certificate.
const RENEW_EVERY: Duration = Duration::from_secs(60 * 60);
/// Between two tries to change over to another authority.
const CHANGE_OVER_AGAIN: Duration = Duration::from_secs(5);
const CHUNK_BYTES: usize = 64 * 1024;
/// Questions that are answered at a time; further ones wait.
const QUESTIONS_MAX: u32 = 4;
const QUESTION_BYTES_MAX: usize = 64 * 1024;

/// Answers a question about a workload of this host.
pub type AnswerQuestion = dyn Fn(HostQuestion) -> BoxFuture<'static, HostAnswer> + Send + Sync;

/// What a link carries.
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
    /// Answers what the coordinator asks.
    pub answers: Arc<AnswerQuestion>,
}

impl std::fmt::Debug for Ends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ends")
            .field("stored", &self.stored)
            .finish_non_exhaustive()
    }
}

/// The way to the coordinator.
pub trait Link: std::fmt::Debug + Send {
    /// Carries messages until `shutdown`, over however many connections.
    fn run(self: Box<Self>, ends: Ends, shutdown: CancellationToken) -> BoxFuture<'static, ()>;
}

/// The link over QUIC.
#[derive(Debug, Clone)]
pub struct Config {
    /// Member to try first, as `address:port`.
    pub first: Option<String>,
    /// Name in members' certificates.
    pub server_name: String,
    /// Folder with our certificate and our admission; read anew for each connection, so that both can be replaced.
    pub certificates: PathBuf,
}

/// Why a connection ended or was never made.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Identity(#[from] IdentityError),
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
    /// The authorities to change over to, as the coordinator says; empty if it says none.
    authorities: watch::Sender<Vec<[u8; 32]>>,
}

impl Quic {
    /// A link to the members of the configuration.
    #[must_use]
    pub fn new(config: Config, clock: Arc<dyn Clock>) -> Self {
        let authorities = watch::Sender::default();
        Self {
            config,
            clock,
            authorities,
        }
    }

    /// The members that are known now: the first one, then the others in an order of chance, so that many hosts
    /// spread over them.
    fn doors(&self) -> Vec<String> {
        let mut doors = match Admission::read(&self.config.certificates) {
            Ok(admission) => admission.map_or_else(Vec::new, |admission| admission.doors),
            Err(error) => {
                tracing::warn!(%error, "the members' doors are not known");
                Vec::new()
            }
        };
        fastrand::shuffle(&mut doors);
        let first = self.config.first.clone();
        doors.retain(|door| Some(door) != first.as_ref());
        first.into_iter().chain(doors).collect()
    }

    async fn keep(self, mut ends: Ends) {
        let (mut pause, mut patience) = (BACKOFF_FIRST, CONNECT_FIRST);
        loop {
            let doors = self.doors();
            if doors.is_empty() {
                tracing::error!("no member of the coordinator is known: nothing will run here");
            }
            for member in &doors {
                let began = Instant::now();
                match self.carry(member, patience, &mut ends).await {
                    // The other ends are gone: the process is ending.
                    Ok(()) => return,
                    Err(error) => tracing::warn!(%error, member, "host link"),
                }
                if began.elapsed() >= GOOD_AFTER {
                    (pause, patience) = (BACKOFF_FIRST, CONNECT_FIRST);
                    break;
                }
            }
            sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
            pause = (pause * 2).min(BACKOFF_MAX);
            patience = (patience * 2).min(CONNECT_MAX);
        }
    }

    /// Remembers the doors, for when this member dies and for the next start.
    fn remember(&self, doors: Vec<String>) {
        if let Err(error) = Admission::remember_doors(&self.config.certificates, doors) {
            tracing::warn!(%error, "the members' doors are not remembered");
        }
    }

    /// One connection, from the greeting to its end.
    async fn carry(&self, member: &str, patience: Duration, ends: &mut Ends) -> Result<(), Error> {
        let Ok(facts) = ends
            .facts
            .wait_for(Option::is_some)
            .await
            .map(|facts| facts.clone())
        else {
            return Ok(());
        };
        let Some(facts) = facts else { return Ok(()) };
        let (_endpoint, connection) = self.connect(member, patience).await?;
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
        // They end with the connection.
        let mut answering = JoinSet::new();
        loop {
            tokio::select! {
                question = connection.accept_bi() => {
                    let (send, receive) = question.map_err(lost)?;
                    while answering.try_join_next().is_some() {}
                    answering.spawn(answer(Arc::clone(&ends.answers), send, receive));
                }
                read = read(&mut incoming, &mut decoder) => {
                    read?;
                    while let Some(message) = decoder.take_next::<ToHost>()? {
                        if let ToHost::Doors(doors) = message {
                            self.remember(doors);
                        } else if let ToHost::Authorities(authorities) = message {
                            self.authorities.send_replace(authorities);
                        } else if ends.inbound.send(message).await.is_err() {
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

    async fn connect(&self, member: &str, patience: Duration) -> Result<(Endpoint, Connection), Error> {
        let failed = |reason: String| Error::Connect {
            member: member.to_owned(),
            reason,
        };
        let tls = Identity::of_host(&self.config.certificates)?.quic_client(ALPN)?;
        let mut config = ClientConfig::new(Arc::new(tls));
        let mut transport = transport();
        // The host opens the stream of messages; the member opens one for each question.
        transport.max_concurrent_bidi_streams(VarInt::from_u32(QUESTIONS_MAX));
        transport.keep_alive_interval(Some(KEEP_ALIVE));
        config.transport_config(Arc::new(transport));
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
            match timeout(patience, connecting).await {
                Ok(Ok(connection)) => return Ok((endpoint, connection)),
                Ok(Err(error)) => last = error.to_string(),
                Err(_) => last = format!("no answer within {patience:?}"),
            }
        }
        Err(failed(last))
    }
}

impl Link for Quic {
    fn run(self: Box<Self>, ends: Ends, shutdown: CancellationToken) -> BoxFuture<'static, ()> {
        let folder = self.config.certificates.clone();
        let certificate = keep_certificate(folder, Arc::clone(&self.clock), self.authorities.subscribe());
        async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = self.keep(ends) => {}
                () = certificate => {}
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

/// Answers one question on the stream that it came on. Whoever asks notices when it fails.
async fn answer(answers: Arc<AnswerQuestion>, mut send: SendStream, mut receive: RecvStream) {
    let answered = async {
        let mut decoder = Decoder::default();
        let bytes = receive.read_to_end(QUESTION_BYTES_MAX).await.map_err(lost)?;
        decoder.push(&bytes);
        let question = decoder
            .take_next()?
            .ok_or_else(|| lost("a question is cut off"))?;
        write(&mut send, &answers(question).await).await?;
        send.finish().map_err(lost)
    };
    if let Err(error) = answered.await {
        tracing::debug!(%error, "a question was not answered");
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

/// Renews the certificate of a host that is no member: in time, and when the cluster changes over to another
/// authority. Ends with the link.
async fn keep_certificate(
    folder: PathBuf,
    clock: Arc<dyn Clock>,
    mut authorities: watch::Receiver<Vec<[u8; 32]>>,
) {
    let mut looks = tokio::time::interval(RENEW_EVERY);
    let mut changed_over_to = Vec::new();
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            changed = authorities.changed() => if changed.is_err() { return },
        }
        let is_member = Admission::read(&folder).is_ok_and(|it| it.is_some_and(|it| it.member.is_some()));
        if is_member {
            continue;
        }
        let wanted = authorities.borrow_and_update().clone();
        if wanted.is_empty() || wanted == changed_over_to {
            if let Err(error) = client::renew_if_due(&folder, clock.now()).await {
                tracing::warn!(%error, "the certificate was not renewed; it is tried again in an hour");
            }
            continue;
        }
        match client::change_over(&folder, &wanted).await {
            Ok(()) => {
                tracing::info!("the certificate is of the cluster's newest authority");
                changed_over_to = wanted;
            }
            Err(error) => {
                tracing::warn!(%error, "the certificate was not changed over; it is tried again in a moment");
                looks.reset_after(CHANGE_OVER_AGAIN);
            }
        }
    }
}

//! The host's end of the host link: one QUIC connection to a member of the coordinator, kept for ever. When that
//! member dies, or cannot reach the others any more, the host goes to another one at once: the members' doors are
//! known from joining, and told anew by each member.
//!
//! The messages are those of [`protocol::link`]. What goes out is always the newest state of a kind, never
//! a queue of old ones; what comes in is handed on in order. [`Link`] is the seam that a simulation replaces.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use protocol::link::{ALPN, Decoder, FrameError, FromHost, ToHost, encode};
use protocol::logs::{HostAnswer, HostQuestion};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::workload::Fence;
use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream};
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use coordinator::clock::Clock;
use coordinator::host_link::quic::host_transport;
use coordinator::identity::{Identity, IdentityError};
use coordinator::join::{Admission, client};

/// After so long without an answer at one door the host knocks at the next one as well.
const NEXT_DOOR_AFTER: Duration = Duration::from_millis(100);
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

/// A connection to a member, and the door at which it answered.
struct Entered {
    door: String,
    /// It carries the connection.
    _endpoint: Endpoint,
    connection: Connection,
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
    /// spread over them; the one that was `left` last of all.
    fn doors(&self, left: Option<&str>) -> VecDeque<String> {
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
        let mut doors: VecDeque<_> = first.into_iter().chain(doors).collect();
        if let Some(place) = doors.iter().position(|door| Some(door.as_str()) == left) {
            let door = doors.remove(place);
            doors.extend(door);
        }
        doors
    }

    /// Knocks at one door after the other until a member lets the host in, without waiting for those that do not answer.
    /// What is left in `doors` was not tried to its end.
    async fn knock(&self, doors: &mut VecDeque<String>, patience: Duration) -> Option<Entered> {
        let mut answers = FuturesUnordered::new();
        let mut knocked = Vec::new();
        loop {
            if let Some(door) = doors.pop_front() {
                knocked.push(door.clone());
                answers.push(async move {
                    let connected = self.connect(&door, patience).await;
                    (door, connected)
                });
            }
            tokio::select! {
                answer = answers.next() => {
                    let (door, connected) = answer?;
                    knocked.retain(|other| *other != door);
                    match connected {
                        Ok((endpoint, connection)) => {
                            doors.extend(knocked);
                            return Some(Entered { door, _endpoint: endpoint, connection });
                        }
                        Err(error) => tracing::warn!(%error, member = door, "host link"),
                    }
                }
                () = sleep(NEXT_DOOR_AFTER), if !doors.is_empty() => {}
            }
        }
    }

    async fn keep(self, mut ends: Ends) {
        // Nobody is greeted before the host can say what it is.
        if ends.facts.wait_for(Option::is_some).await.is_err() {
            return;
        }
        let (mut pause, mut patience) = (BACKOFF_FIRST, CONNECT_FIRST);
        let mut left = None;
        loop {
            let mut doors = self.doors(left.as_deref());
            if doors.is_empty() {
                tracing::error!("no member of the coordinator is known: nothing will run here");
            }
            let mut was_good = false;
            while !was_good && let Some(entered) = self.knock(&mut doors, patience).await {
                let began = Instant::now();
                match self.carry(&entered, &mut ends).await {
                    // The other ends are gone: the process is ending.
                    Ok(()) => return,
                    Err(error) => tracing::warn!(%error, member = entered.door, "host link"),
                }
                was_good = began.elapsed() >= GOOD_AFTER;
                left = Some(entered.door);
            }
            if was_good {
                // A good member is gone: another one is there.
                (pause, patience) = (BACKOFF_FIRST, CONNECT_FIRST);
                continue;
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
    async fn carry(&self, entered: &Entered, ends: &mut Ends) -> Result<(), Error> {
        let Some(facts) = ends.facts.borrow_and_update().clone() else {
            return Ok(());
        };
        let Entered { door, connection, .. } = entered;
        let (mut out, mut incoming) = connection.open_bi().await.map_err(lost)?;
        let hello = FromHost::Hello {
            facts,
            fence: *ends.stored.borrow(),
            clock: self.clock.now(),
        };
        write(&mut out, &hello).await?;
        ends.report.mark_changed();
        let mut decoder = Decoder::default();
        // They end with the connection.
        let mut answering = JoinSet::new();
        let mut is_let_in = false;
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
                        // Who is turned away is told nothing before.
                        if !std::mem::replace(&mut is_let_in, true) {
                            tracing::info!(member = door, "host link is up");
                        }
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
        config.transport_config(Arc::new(host_transport(QUESTIONS_MAX)));
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

#[cfg(test)]
mod tests {
    use coordinator::clock::WallClock;
    use coordinator::identity::Identity;
    use coordinator::join::admission;
    use tokio::net::UdpSocket;

    use super::*;

    const FIRST: &str = "127.0.0.1:9";

    /// A host that knows these doors besides the first.
    fn host(folder: &std::path::Path, first: &str, others: &[String]) -> Quic {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let server = "host-1".parse().expect("an id");
        admission::found(folder, "test", &server, first, WallClock.now()).expect("founded");
        Admission::remember_doors(folder, others.to_vec()).expect("written");
        let config = Config {
            first: Some(first.to_owned()),
            server_name: coordinator::identity::COORDINATOR_NAME.to_owned(),
            certificates: folder.to_owned(),
        };
        Quic::new(config, Arc::new(WallClock))
    }

    #[test]
    fn the_member_that_was_left_is_tried_last() {
        let folder = tempfile::tempdir().expect("a folder");
        let others = ["127.0.0.1:10", "127.0.0.1:11"].map(str::to_owned);
        let host = host(folder.path(), FIRST, &others);
        assert_eq!(host.doors(None)[0], FIRST);
        for left in [FIRST, &others[0], &others[1]] {
            let doors = host.doors(Some(left));
            assert_eq!((doors.len(), doors[2].as_str()), (3, left));
        }
        assert_eq!(host.doors(Some("127.0.0.1:12"))[0], FIRST, "no member any more");
    }

    /// The way to a dead member says nothing: its patience was over before another one was tried. The next one is reached
    /// over IPv6.
    #[tokio::test]
    async fn a_door_that_does_not_answer_holds_nobody_up() {
        let folder = tempfile::tempdir().expect("a folder");
        let mute = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
        let mute = mute.local_addr().expect("bound").to_string();
        let host = host(folder.path(), &mute, &[]);
        let identity = Identity::of_host(folder.path()).expect("its own");
        let config = coordinator::door::server_config(&identity).expect("good TLS");
        let member = Endpoint::server(config, (Ipv6Addr::LOCALHOST, 0).into()).expect("a free port");
        let door = member.local_addr().expect("bound").to_string();
        Admission::remember_doors(folder.path(), vec![door.clone()]).expect("written");
        tokio::spawn(async move {
            while let Some(incoming) = member.accept().await {
                drop(incoming.await);
            }
        });
        let mut doors = host.doors(None);
        assert_eq!(doors, [mute.clone(), door.clone()]);
        let for_ever = Duration::from_secs(60 * 60);
        let entered = timeout(Duration::from_secs(60), host.knock(&mut doors, for_ever)).await;
        let entered = entered
            .expect("it waits for the first")
            .expect("the second lets it in");
        assert_eq!(entered.door, door);
        assert_eq!(doors, [mute], "not tried to its end");
    }
}

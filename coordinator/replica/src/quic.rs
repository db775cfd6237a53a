//! Members over QUIC: [`Peers`] is the [`Transport`] of production, [`serve`] its other end.
//!
//! One connection to each peer, kept and dialled again when it is lost, and one bidirectional stream for
//! each question, so that a slow answer holds up no other. On the wire:
//!
//! ```text
//! question:  kind (1: of the replica, 2: of the coordinator) | length (4, little endian) | bytes
//! answer:    0, bytes   or   1, reason (text)
//! ```
//!
//! The endpoint, the certificates and the check that a caller is the member it says it is belong to whoever
//! owns the UDP port: this file gets connections that are authenticated already. It is a seam: sockets and
//! names of the outside world end here.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream, VarInt};
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::transport::{Transport, Unreachable};
use crate::wire::MESSAGE_BYTES_MAX;

/// Protocol name of members in the TLS handshake.
pub const ALPN: &[u8] = b"chutes-member/1";

/// How long a connection may take to come up.
const DIAL_MAX: Duration = Duration::from_secs(5);
/// After a failed attempt, the same error is the answer for this long.
const REDIAL_AFTER: Duration = Duration::from_millis(100);
/// A connection on which questions wait and nothing at all arrives for this long is given up: its other end
/// has probably started again and knows nothing of it.
const SILENCE_MAX: Duration = Duration::from_secs(1);
/// Silence after which QUIC itself gives a connection up.
const IDLE_MAX: Duration = Duration::from_secs(5);
/// How often either side says that it is there.
const KEEP_ALIVE: Duration = Duration::from_millis(1500);
/// Questions of one peer that are answered at once; further ones wait at the peer.
const QUESTIONS_MAX: u32 = 64;
/// Kilobytes of questions of one peer that are held at once.
const HELD_KIB_MAX: u32 = 4 * (MESSAGE_BYTES_MAX / 1024) as u32;
/// How long a question may take to arrive.
const QUESTION_MAX: Duration = Duration::from_secs(30);
/// Bytes of a reason.
const REASON_BYTES_MAX: usize = 500;

const OF_REPLICA: u8 = 1;
const OF_COORDINATOR: u8 = 2;
const WELL: u8 = 0;
const REFUSED: u8 = 1;

/// The name that a member's certificate must carry.
#[must_use]
pub fn server_name(member: u64) -> String {
    format!("member-{member}.chutes.internal")
}

/// QUIC settings of connections between members; [`Peers`] puts them into what it dials with.
///
/// # Panics
/// Never: the timeout fits.
#[must_use]
pub fn transport_config() -> quinn::TransportConfig {
    let mut config = quinn::TransportConfig::default();
    config.max_idle_timeout(Some(IDLE_MAX.try_into().expect("5 s fit")));
    config.keep_alive_interval(Some(KEEP_ALIVE));
    config.max_concurrent_bidi_streams(0_u8.into());
    config.max_concurrent_uni_streams(0_u8.into());
    config
}

type Dialled = Option<Result<Connection, String>>;

/// The connection to one peer, or the attempt to get one.
struct Link {
    places: Vec<String>,
    begun: Instant,
    dialled: watch::Receiver<Dialled>,
    /// Datagrams received when a question was given up without any new one, and since when.
    silent: Option<(u64, Instant)>,
}

impl Link {
    /// Whether it is up, on its way up, or failed only just now.
    fn is_usable(&self, places: &[String]) -> bool {
        self.places.first() == places.first()
            && match &*self.dialled.borrow() {
                Some(Ok(connection)) => connection.close_reason().is_none(),
                Some(Err(_)) => self.begun.elapsed() < REDIAL_AFTER,
                // An attempt that ended without a result never comes back.
                None => self.dialled.has_changed().is_ok(),
            }
    }
}

/// A member that says that it is elsewhere than where it is looked for.
struct Moved {
    to: String,
    /// Where it was looked for when that was first needed; told another address, this is old.
    from: Option<String>,
}

/// Gives the TLS settings to dial a member with: they change when certificates do.
pub type ClientConfigs = dyn Fn(u64) -> Result<ClientConfig, String> + Send + Sync;

struct Shared {
    endpoint: Endpoint,
    client: Box<ClientConfigs>,
    transport: Arc<quinn::TransportConfig>,
    links: Mutex<BTreeMap<u64, Link>>,
    moved: Mutex<BTreeMap<u64, Moved>>,
}

/// The connections to other members. Clones share them.
#[derive(Clone)]
pub struct Peers(Arc<Shared>);

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members: Vec<u64> = self.links().keys().copied().collect();
        f.debug_struct("Peers").field("members", &members).finish()
    }
}

impl Peers {
    /// Connections that leave from `endpoint`, with what `client` gives for a member: a configuration with
    /// our certificate, that trusts the cluster's authority and says [`ALPN`]. The member is dialled under
    /// [`server_name`].
    pub fn new(
        endpoint: Endpoint,
        client: impl Fn(u64) -> Result<ClientConfig, String> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Shared {
            endpoint,
            client: Box::new(client),
            transport: Arc::new(transport_config()),
            links: Mutex::default(),
            moved: Mutex::default(),
        }))
    }

    /// Asks the coordinator of `member` at `address` (host:port); the answer comes from the second handler
    /// of [`serve`].
    ///
    /// # Errors
    /// The member cannot be reached, refused, or did not answer in time. It may have got the question.
    pub async fn ask(
        &self,
        member: u64,
        address: &str,
        question: Vec<u8>,
        within: Duration,
    ) -> Result<Vec<u8>, Unreachable> {
        self.exchange(OF_COORDINATOR, member, address, question, within)
            .await
    }

    /// Closes all connections, so that certificates are checked anew; questions under way fail.
    pub fn disconnect(&self) {
        for link in std::mem::take(&mut *self.links()).into_values() {
            if let Some(Ok(connection)) = &*link.dialled.borrow() {
                connection.close(VarInt::from_u32(0), b"disconnected");
            }
        }
    }

    /// From now on `member` is dialled at `address` (host:port) first, until it is looked for there anyway, or at
    /// another place than now. Whoever answers there has to have its certificate, as everywhere.
    pub fn note_moved(&self, member: u64, address: String) {
        let moved = Moved {
            to: address,
            from: None,
        };
        self.moved().insert(member, moved);
    }

    /// Where members say that they are that are looked for elsewhere.
    #[must_use]
    pub fn moved_to(&self) -> Vec<String> {
        self.moved().values().map(|moved| moved.to.clone()).collect()
    }

    /// Where to dial a member that is looked for at `address`, best first.
    fn places(&self, member: u64, address: &str) -> Vec<String> {
        let mut all = self.moved();
        if let Some(moved) = all.get_mut(&member) {
            if moved.to != address && moved.from.get_or_insert_with(|| address.to_owned()) == address {
                return vec![moved.to.clone(), address.to_owned()];
            }
            all.remove(&member);
        }
        vec![address.to_owned()]
    }

    fn moved(&self) -> MutexGuard<'_, BTreeMap<u64, Moved>> {
        self.0.moved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn links(&self) -> MutexGuard<'_, BTreeMap<u64, Link>> {
        self.0.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn exchange(
        &self,
        kind: u8,
        member: u64,
        address: &str,
        question: Vec<u8>,
        within: Duration,
    ) -> Result<Vec<u8>, Unreachable> {
        if question.len() > MESSAGE_BYTES_MAX {
            let reason = format!(
                "a question of {} bytes, the limit is {MESSAGE_BYTES_MAX}",
                question.len()
            );
            return Err(Unreachable { reason });
        }
        let deadline = Instant::now() + within;
        let late = |what: &str| format!("{what} within {within:?}");
        let connection = timeout_at(deadline, self.connection(member, address)).await;
        let connection = connection.unwrap_or_else(|_| Err(late("no connection")));
        let connection = connection.map_err(|reason| Unreachable { reason })?;
        let mut waiting = Waiting {
            peers: self,
            member,
            received: received(&connection),
            begun: Instant::now(),
            connection: &connection,
            answered: false,
        };
        let answered = timeout_at(deadline, question_and_answer(&connection, kind, question)).await;
        waiting.answered = answered.is_ok();
        answered
            .unwrap_or_else(|_| Err(late("no answer")))
            .map_err(|reason| Unreachable { reason })
    }

    async fn connection(&self, member: u64, address: &str) -> Result<Connection, String> {
        let mut dialled = self.dialled(member, address);
        let dialled = dialled.wait_for(Option::is_some).await;
        match dialled.as_deref() {
            Ok(Some(result)) => result.clone(),
            Ok(None) | Err(_) => Err("the attempt to connect ended early".to_owned()),
        }
    }

    /// The link to a member; begins one if there is none that works.
    fn dialled(&self, member: u64, address: &str) -> watch::Receiver<Dialled> {
        let places = self.places(member, address);
        let mut links = self.links();
        if let Some(link) = links.get(&member).filter(|link| link.is_usable(&places)) {
            return link.dialled.clone();
        }
        let (done, dialled) = watch::channel(None);
        let (shared, to) = (self.0.clone(), places.clone());
        // A task of its own: a question that is given up must not end the attempt for the others.
        tokio::spawn(async move {
            let result = timeout(DIAL_MAX, dial(&shared, member, &to)).await;
            let result = result.unwrap_or_else(|_| Err(format!("no connection within {DIAL_MAX:?}")));
            done.send_replace(Some(result));
        });
        let link = Link {
            places,
            begun: Instant::now(),
            dialled: dialled.clone(),
            silent: None,
        };
        if let Some(before) = links.insert(member, link)
            && let Some(Ok(connection)) = &*before.dialled.borrow()
        {
            connection.close(VarInt::from_u32(0), b"replaced");
        }
        dialled
    }

    /// A question was given up on a connection on which nothing arrived meanwhile.
    fn was_silent(&self, member: u64, connection: &Connection, received: u64, since: Instant) {
        let mut links = self.links();
        let Some(link) = links.get_mut(&member) else {
            return;
        };
        let is_same = matches!(
            &*link.dialled.borrow(),
            Some(Ok(current)) if current.stable_id() == connection.stable_id()
        );
        if !is_same {
            return;
        }
        match link.silent {
            Some((before, since)) if before == received => {
                if since.elapsed() >= SILENCE_MAX {
                    connection.close(VarInt::from_u32(0), b"silent");
                }
            }
            _ => link.silent = Some((received, since)),
        }
    }
}

fn received(connection: &Connection) -> u64 {
    connection.stats().udp_rx.datagrams
}

/// A question under way. Dropped unanswered, by the deadline or by whoever asked, it counts as silence.
struct Waiting<'a> {
    peers: &'a Peers,
    member: u64,
    connection: &'a Connection,
    received: u64,
    begun: Instant,
    answered: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.answered && received(self.connection) == self.received {
            self.peers
                .was_silent(self.member, self.connection, self.received, self.begun);
            if self.begun.elapsed() >= SILENCE_MAX {
                self.connection.close(VarInt::from_u32(0), b"silent");
            }
        }
    }
}

impl Transport for Peers {
    fn call<'a>(
        &'a self,
        member: u64,
        address: &'a str,
        request: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, Unreachable>> {
        Box::pin(self.exchange(OF_REPLICA, member, address, request, within))
    }
}

async fn dial(shared: &Shared, member: u64, places: &[String]) -> Result<Connection, String> {
    let mut config = (shared.client)(member)?;
    config.transport_config(shared.transport.clone());
    let own = shared.endpoint.local_addr().map_err(|error| error.to_string())?;
    let mut last = format!("{}: no usable address", places.join(", "));
    let mut candidates: Vec<SocketAddr> = Vec::new();
    for address in places {
        match tokio::net::lookup_host(address).await {
            // An IPv6 socket reaches both.
            Ok(found) => candidates.extend(found.filter(|it| own.is_ipv6() || it.is_ipv4())),
            Err(error) => last = format!("{address}: {error}"),
        }
    }
    let each = DIAL_MAX / u32::try_from(candidates.len().max(1)).unwrap_or(u32::MAX);
    for candidate in candidates {
        let name = server_name(member);
        let connecting = shared.endpoint.connect_with(config.clone(), candidate, &name);
        let connecting = connecting.map_err(|error| error.to_string())?;
        match timeout(each, connecting).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) => last = format!("{candidate}: {error}"),
            Err(_) => last = format!("{candidate}: no answer"),
        }
    }
    Err(last)
}

async fn question_and_answer(
    connection: &Connection,
    kind: u8,
    question: Vec<u8>,
) -> Result<Vec<u8>, String> {
    let text = |error: &dyn fmt::Display| error.to_string();
    let (mut send, mut receive) = connection.open_bi().await.map_err(|error| text(&error))?;
    let length = u32::try_from(question.len()).map_err(|error| text(&error))?;
    let mut head = [kind; 5];
    head[1..].copy_from_slice(&length.to_le_bytes());
    // Handed over as they are: bytes that are written by reference are copied once more.
    let mut pieces = [Bytes::copy_from_slice(&head), Bytes::from(question)];
    let written = send.write_all_chunks(&mut pieces).await;
    written.map_err(|error| text(&error))?;
    send.finish().map_err(|error| text(&error))?;
    let mut status = [REFUSED];
    receive
        .read_exact(&mut status)
        .await
        .map_err(|error| text(&error))?;
    let limit = if status == [WELL] {
        MESSAGE_BYTES_MAX
    } else {
        REASON_BYTES_MAX
    };
    let answer = receive.read_to_end(limit).await.map_err(|error| text(&error))?;
    match status {
        [WELL] => Ok(answer),
        _ => Err(String::from_utf8_lossy(&answer).into_owned()),
    }
}

/// Answers what a member asks on a connection that was accepted elsewhere, until it is closed. `from` is the
/// member that its certificate names. `replica` answers the replica's questions (see
/// [`crate::Replica::answer`]), `coordinator` those of [`Peers::ask`]; an error's text goes back as the
/// reason.
pub async fn serve<A, B, FA, FB>(connection: Connection, from: u64, replica: A, coordinator: B)
where
    A: Fn(u64, Vec<u8>) -> FA,
    B: Fn(u64, Vec<u8>) -> FB,
    FA: Future<Output = Result<Vec<u8>, String>> + Send + 'static,
    FB: Future<Output = Result<Vec<u8>, String>> + Send + 'static,
{
    connection.set_max_concurrent_bi_streams(QUESTIONS_MAX.into());
    connection.set_max_concurrent_uni_streams(0_u8.into());
    let held = Arc::new(Semaphore::new(HELD_KIB_MAX as usize));
    let mut arriving = JoinSet::new();
    let mut answering = JoinSet::new();
    loop {
        tokio::select! {
            accepted = connection.accept_bi() => {
                let Ok((send, receive)) = accepted else { break };
                let held = held.clone();
                arriving.spawn(async move {
                    let question = timeout(QUESTION_MAX, read_question(receive, held)).await;
                    question.ok().flatten().map(|question| (send, question))
                });
            }
            Some(arrived) = arriving.join_next() => {
                let Ok(Some((send, Question { kind, bytes, permit }))) = arrived else { continue };
                let answer: BoxFuture<'static, _> = match kind {
                    OF_REPLICA => Box::pin(replica(from, bytes)),
                    _ => Box::pin(coordinator(from, bytes)),
                };
                answering.spawn(async move {
                    let answer = answer.await;
                    drop(permit);
                    write_answer(send, answer).await;
                });
            }
            Some(ended) = answering.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(from, %error, "an answer to a member ended abnormally");
                }
            }
        }
    }
}

struct Question {
    kind: u8,
    bytes: Vec<u8>,
    permit: tokio::sync::OwnedSemaphorePermit,
}

/// Reads a whole question; none when it is cut short or nonsense.
async fn read_question(mut receive: RecvStream, held: Arc<Semaphore>) -> Option<Question> {
    let mut head = [0; 5];
    receive.read_exact(&mut head).await.ok()?;
    let [kind, length @ ..] = head;
    let length = u32::from_le_bytes(length);
    if !matches!(kind, OF_REPLICA | OF_COORDINATOR) || length as usize > MESSAGE_BYTES_MAX {
        // Tells the peer that nobody reads on.
        let _ = receive.stop(VarInt::from_u32(1));
        return None;
    }
    let permit = held.acquire_many_owned(length / 1024 + 1).await.ok()?;
    let mut bytes = vec![0; length as usize];
    receive.read_exact(&mut bytes).await.ok()?;
    Some(Question { kind, bytes, permit })
}

/// Errors mean that nobody waits for the answer any more.
async fn write_answer(mut send: SendStream, answer: Result<Vec<u8>, String>) {
    let answer = match answer {
        Ok(answer) if answer.len() > MESSAGE_BYTES_MAX => Err("the answer is too large".to_owned()),
        other => other,
    };
    let (status, bytes) = match &answer {
        Ok(bytes) => (WELL, bytes.as_slice()),
        Err(reason) => (REFUSED, &reason.as_bytes()[..reason.len().min(REASON_BYTES_MAX)]),
    };
    if send.write_all(&[status]).await.is_ok() && send.write_all(bytes).await.is_ok() {
        let _ = send.finish();
    }
}

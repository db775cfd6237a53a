//! The websocket of a validator: connected, authenticated and listened to for as long as we lead.
//!
//! ```text
//! dial -> websocket -> "0{open}" -> send "40" -> "40{sid}" -> send authenticate -> "auth_success" -> events
//!   ^                                                              ^ again after 10, 30, 50 s, then every 5 min
//!   +--- backoff <- any end: refused, auth failed, "41", "1", close, silence, malformed transport
//! ```
//! A validator keeps one session for each hotkey, and when *any* session of that hotkey closes, the others
//! silently stop getting what is meant for them; hence the repeated authentication. What was lost meanwhile
//! comes back by REST: [`SocketEvent::RestObservationDue`] says when to look.
//!
//! Frames that are no packets, and packets of no interest, are counted and dropped. Text that is not UTF-8
//! and messages above the limit end the connection (RFC 6455, 8.1 and 10.4), and the next one begins.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use protocol::hotkey::Hotkey;
use protocol::socket_io::{FRAME_BYTES_MAX, Open, Packet};
use reqwest::Url;
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{Connector, MaybeTlsStream, WebSocketStream, client_async_tls_with_config};
use tokio_util::sync::CancellationToken;

use super::event::{self, Event, shortened};
use super::{LeadsNow, ValidatorConfig};
use crate::signer::{MessageKind, Sign};

mod dial;

pub use dial::{Dial, TcpDial, Transport};

/// What the socket reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketEvent {
    /// The validator has accepted our Socket.IO connection. Broadcasts may arrive from now on.
    Connected,
    /// It has accepted our signature, for the first time or again.
    Authenticated,
    /// It has not, with its reason. The connection ends and another one follows.
    AuthFailed(String),
    /// Something happened, says the validator.
    Event(Event),
    /// Events may have been missed: list everything by REST.
    RestObservationDue,
    /// The connection has ended, with the reason; another one follows.
    Disconnected(String),
}

/// Times of the socket. All are lower in tests than in production and nowhere else.
#[derive(Debug, Clone)]
pub struct Timing {
    /// For the connection, the TLS and websocket handshakes and the first packets, each.
    pub handshake: Duration,
    /// For the answer to an authentication.
    pub authentication: Duration,
    /// Silence after which a connection is dead, until the validator has told its own intervals.
    pub silence: Duration,
    /// When to authenticate again, after the first success on a connection.
    pub again_after: Vec<Duration>,
    /// Pause between further authentications.
    pub again_every: Duration,
    /// Pause before the second attempt to connect; doubled for each further one.
    pub backoff_min: Duration,
    /// The longest pause.
    pub backoff_max: Duration,
    /// A connection that was authenticated for this long resets the backoff.
    pub stable_after: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            authentication: Duration::from_secs(20),
            silence: Duration::from_secs(45),
            again_after: [10, 30, 50].map(Duration::from_secs).to_vec(),
            again_every: Duration::from_secs(300),
            backoff_min: Duration::from_secs(1),
            backoff_max: Duration::from_secs(30),
            stable_after: Duration::from_secs(60),
        }
    }
}

/// How to reach a validator's socket.
pub struct Config {
    /// Whose socket it is.
    pub validator: Hotkey,
    /// `ws://` or `wss://`; without a path, `/socket.io/` is meant.
    pub url: Url,
    /// How byte streams are opened.
    pub dial: Arc<dyn Dial>,
    /// Trust other roots than the public ones; for tests.
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// Its times.
    pub timing: Timing,
    /// Whether this member leads at this very moment. A process that stood still hears late that it does not, and by
    /// authenticating once more it would make the validator deaf to its successor.
    pub leads_now: LeadsNow,
}

impl Config {
    /// The socket of a configured validator, over the machine's network.
    #[must_use]
    pub fn new(validator: &ValidatorConfig, leads_now: LeadsNow) -> Self {
        Self {
            validator: validator.hotkey.clone(),
            url: validator.socket.clone(),
            dial: Arc::new(TcpDial),
            tls: None,
            timing: Timing::default(),
            leads_now,
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "socket::Config({} at {})", self.validator, self.url)
    }
}

/// What happened on a socket, for metrics. Counts only grow.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections begun.
    pub attempts: AtomicU64,
    /// Authentications that succeeded.
    pub authenticated: AtomicU64,
    /// Authentications that failed.
    pub auth_failed: AtomicU64,
    /// Events passed on.
    pub events: AtomicU64,
    /// Frames that are no packets, dropped, and those that ended a connection.
    pub malformed_frames: AtomicU64,
    /// Binary frames and packets of no interest.
    pub ignored_frames: AtomicU64,
    /// Broadcasts that are no events.
    pub malformed_events: AtomicU64,
    /// Events dropped because nobody took them; a listing follows.
    pub dropped_events: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// One validator's socket.
#[derive(Debug)]
pub struct Socket {
    config: Config,
    signer: Arc<dyn Sign>,
    counters: Arc<Counters>,
    out: mpsc::Sender<SocketEvent>,
    rng: fastrand::Rng,
    observation_owed: bool,
}

impl Socket {
    /// A socket that reports to `out`; `rng` jitters the backoff.
    #[must_use]
    pub fn new(
        config: Config,
        signer: Arc<dyn Sign>,
        out: mpsc::Sender<SocketEvent>,
        rng: fastrand::Rng,
    ) -> Self {
        Self {
            config,
            signer,
            counters: Arc::default(),
            out,
            rng,
            observation_owed: false,
        }
    }

    /// Counts, for metrics.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Connects, and connects again, until cancelled (then it says goodbye) or nobody listens any more.
    pub async fn run(mut self, cancel: CancellationToken) {
        let timing = self.config.timing.clone();
        let mut backoff = timing.backoff_min;
        loop {
            count(&self.counters.attempts);
            let session = cancel.run_until_cancelled(self.connect()).await;
            let end = match session {
                None => return,
                Some(Err(why)) => End {
                    why,
                    authenticated_at: None,
                },
                Some(Ok(websocket)) => match self.listen(websocket, &cancel).await {
                    Some(end) => end,
                    None => return,
                },
            };
            tracing::info!(
                validator = self.config.validator.as_str(),
                why = end.why,
                "socket disconnected"
            );
            if end
                .authenticated_at
                .is_some_and(|at| at.elapsed() >= timing.stable_after)
            {
                backoff = timing.backoff_min;
            }
            let pause = backoff.mul_f64(0.5 + self.rng.f64());
            backoff = (backoff * 2).min(timing.backoff_max);
            let told = cancel
                .run_until_cancelled(self.out.send(SocketEvent::Disconnected(end.why)))
                .await;
            if !matches!(told, Some(Ok(()))) || cancel.run_until_cancelled(sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// Bytes, TLS, websocket.
    async fn connect(&self) -> Result<WebSocket, String> {
        let Config { url, timing, .. } = &self.config;
        let host = url.host_str().ok_or("the address has no host")?;
        let port = url.port_or_known_default().ok_or("the address has no port")?;
        let bare_host = host.trim_start_matches('[').trim_end_matches(']');
        let dialled = timeout(timing.handshake, self.config.dial.dial(bare_host, port)).await;
        let stream = dialled
            .map_err(|_| "connect: timed out".to_owned())?
            .map_err(|e| format!("connect: {e}"))?;
        let limits = WebSocketConfig::default()
            .max_message_size(Some(FRAME_BYTES_MAX))
            .max_frame_size(Some(FRAME_BYTES_MAX))
            .read_buffer_size(16 * 1024);
        let connector = self.config.tls.clone().map(Connector::Rustls);
        let handshake = client_async_tls_with_config(request_url(url), stream, Some(limits), connector);
        match timeout(timing.handshake, Box::pin(handshake)).await {
            Err(_) => Err("handshake: timed out".to_owned()),
            Ok(Err(error)) => Err(shortened(&format!("handshake: {error}"))),
            Ok(Ok((websocket, _))) => Ok(websocket),
        }
    }

    /// One connection, from its first packet to its end. `None`: we are to stop.
    async fn listen(&mut self, mut websocket: WebSocket, cancel: &CancellationToken) -> Option<End> {
        let mut session = Session::new(&self.config.timing);
        loop {
            self.settle_owed_observation();
            let step = tokio::select! {
                biased;
                () = cancel.cancelled() => {
                    self.say_goodbye(&mut session, &mut websocket).await;
                    return None;
                }
                message = websocket.next() => session.on_message(message, &self.counters),
                () = sleep_until(session.next_deadline()) => session.on_deadline(),
            };
            let done = tokio::select! {
                biased;
                () = cancel.cancelled() => None,
                done = self.carry_out(step, &mut session, &mut websocket) => Some(done),
            };
            let Some(done) = done else {
                self.say_goodbye(&mut session, &mut websocket).await;
                return None;
            };
            match done {
                Ok(()) => {}
                Err(Stop::Reconnect(why)) => {
                    self.say_goodbye(&mut session, &mut websocket).await;
                    let authenticated_at = session.authenticated_at;
                    return Some(End {
                        why,
                        authenticated_at,
                    });
                }
                Err(Stop::NobodyListens) => return None,
            }
        }
    }

    async fn carry_out(
        &mut self,
        step: Step,
        session: &mut Session,
        websocket: &mut WebSocket,
    ) -> Result<(), Stop> {
        match step {
            Step::Nothing => Ok(()),
            Step::Send(packet) => send(websocket, &packet).await,
            Step::End(why) => Err(Stop::Reconnect(why)),
            Step::Connected => {
                tracing::debug!(validator = self.config.validator.as_str(), "socket connected");
                self.tell(SocketEvent::Connected).await?;
                self.tell(SocketEvent::RestObservationDue).await?;
                self.authenticate(session, websocket).await
            }
            Step::Authenticate => self.authenticate(session, websocket).await,
            Step::Authenticated => {
                count(&self.counters.authenticated);
                self.tell(SocketEvent::Authenticated).await?;
                self.tell(SocketEvent::RestObservationDue).await
            }
            Step::AuthFailed(why) => {
                count(&self.counters.auth_failed);
                let validator = self.config.validator.as_str();
                tracing::warn!(validator, why, "the validator's socket refuses our signature");
                self.tell(SocketEvent::AuthFailed(why)).await?;
                Err(Stop::Reconnect("authentication failed".to_owned()))
            }
            Step::Broadcast(envelope) => match event::parse(&envelope, self.signer.hotkey()) {
                Ok(event) => self.pass_on(event),
                Err(error) => {
                    count(&self.counters.malformed_events);
                    tracing::warn!(validator = self.config.validator.as_str(), %error, "broadcast dropped");
                    // It may have meant something to us.
                    self.observation_owed = true;
                    Ok(())
                }
            },
        }
    }

    async fn authenticate(&self, session: &mut Session, websocket: &mut WebSocket) -> Result<(), Stop> {
        let signed = self.signer.to_validator(MessageKind::SocketAuth).await;
        let headers = signed.map_err(|e| Stop::Reconnect(format!("sign: {e}")))?;
        let members: Map<String, Value> = headers
            .into_iter()
            .map(|(name, value)| (name.to_owned(), Value::String(value)))
            .collect();
        if !(self.config.leads_now)() {
            return Err(Stop::Reconnect("this member leads no more".to_owned()));
        }
        send(websocket, &Packet::event("authenticate", Value::Object(members))).await?;
        session.authentication_sent();
        Ok(())
    }

    /// Leaves the namespace and closes; a validator that does not answer is not waited for. What it says before it hears
    /// of that it says to nobody else.
    async fn say_goodbye(&mut self, session: &mut Session, websocket: &mut WebSocket) {
        let goodbye = async {
            let left = websocket.send(Message::text(Packet::Disconnect.to_frame())).await;
            if left.is_err() || websocket.close(None).await.is_err() {
                return;
            }
            while let Some(message @ Ok(_)) = websocket.next().await {
                if let Step::Broadcast(envelope) = session.on_message(Some(message), &self.counters)
                    && let Ok(event) = event::parse(&envelope, self.signer.hotkey())
                    && self.pass_on(event).is_err()
                {
                    return;
                }
            }
        };
        let _ = timeout(Duration::from_secs(1), goodbye).await;
    }

    /// Says what must not be lost; waits for room.
    async fn tell(&self, event: SocketEvent) -> Result<(), Stop> {
        self.out.send(event).await.map_err(|_| Stop::NobodyListens)
    }

    /// Passes an event on if there is room. If not, the listing that follows makes up for it.
    fn pass_on(&mut self, event: Event) -> Result<(), Stop> {
        match self.out.try_send(SocketEvent::Event(event)) {
            Ok(()) => count(&self.counters.events),
            Err(TrySendError::Full(_)) => {
                count(&self.counters.dropped_events);
                self.observation_owed = true;
            }
            Err(TrySendError::Closed(_)) => return Err(Stop::NobodyListens),
        }
        Ok(())
    }

    fn settle_owed_observation(&mut self) {
        if self.observation_owed && self.out.try_send(SocketEvent::RestObservationDue).is_ok() {
            self.observation_owed = false;
        }
    }
}

type WebSocket = WebSocketStream<MaybeTlsStream<Box<dyn Transport>>>;

/// How a connection ended.
struct End {
    why: String,
    authenticated_at: Option<Instant>,
}

/// Why carrying out a step ended the connection.
enum Stop {
    Reconnect(String),
    NobodyListens,
}

/// What a message or a deadline asks for.
#[derive(Debug, PartialEq)]
enum Step {
    Nothing,
    Send(Packet),
    Connected,
    Authenticate,
    Authenticated,
    AuthFailed(String),
    Broadcast(Value),
    End(String),
}

/// Where a connection stands; decides, and does nothing itself.
#[derive(Debug)]
struct Session {
    timing: Timing,
    silence: Duration,
    heard_at: Instant,
    /// Until when the packet must come that we wait for, and what it is.
    expected: Option<(Instant, &'static str)>,
    opened: bool,
    connected: bool,
    authenticated_at: Option<Instant>,
    again_at: Option<Instant>,
    authentications: usize,
}

impl Session {
    fn new(timing: &Timing) -> Self {
        let now = Instant::now();
        Self {
            timing: timing.clone(),
            silence: timing.silence,
            heard_at: now,
            expected: Some((now + timing.handshake, "open packet")),
            opened: false,
            connected: false,
            authenticated_at: None,
            again_at: None,
            authentications: 0,
        }
    }

    fn next_deadline(&self) -> Instant {
        let silence = self.heard_at + self.silence;
        let expected = self.expected.map(|(at, _)| at);
        [expected, self.again_at]
            .into_iter()
            .flatten()
            .fold(silence, Instant::min)
    }

    fn on_deadline(&mut self) -> Step {
        let now = Instant::now();
        if let Some((_, what)) = self.expected.filter(|(at, _)| *at <= now) {
            return Step::End(format!("no {what} in time"));
        }
        if self.heard_at + self.silence <= now {
            return Step::End(format!("nothing heard for {:?}", self.silence));
        }
        if self.again_at.is_some_and(|at| at <= now) {
            self.again_at = None;
            return Step::Authenticate;
        }
        Step::Nothing
    }

    fn authentication_sent(&mut self) {
        let deadline = Instant::now() + self.timing.authentication;
        self.expected = Some((deadline, "answer to our authentication"));
    }

    fn on_message(
        &mut self,
        message: Option<Result<Message, tungstenite::Error>>,
        counters: &Counters,
    ) -> Step {
        let text = match message {
            None => return Step::End("closed".to_owned()),
            Some(Err(error)) => {
                use tungstenite::Error as E;
                if matches!(error, E::Utf8(_) | E::Capacity(_) | E::Protocol(_)) {
                    count(&counters.malformed_frames);
                }
                return Step::End(shortened(&format!("broken: {error}")));
            }
            Some(Ok(Message::Close(frame))) => {
                let frame = frame.map(|frame| format!(" ({} {})", frame.code, frame.reason));
                return Step::End(shortened(&format!(
                    "closed by the validator{}",
                    frame.unwrap_or_default()
                )));
            }
            // Pings of the transport prove that a proxy lives, not that the validator does.
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => return Step::Nothing,
            Some(Ok(Message::Binary(_))) => {
                count(&counters.ignored_frames);
                return Step::Nothing;
            }
            Some(Ok(Message::Text(text))) => text,
        };
        self.heard_at = Instant::now();
        match Packet::parse(&text) {
            Ok(packet) => self.on_packet(packet, counters),
            Err(error) => {
                count(&counters.malformed_frames);
                tracing::debug!(%error, "frame dropped");
                Step::Nothing
            }
        }
    }

    fn on_packet(&mut self, packet: Packet, counters: &Counters) -> Step {
        match packet {
            Packet::Open(open) if !self.opened => {
                self.opened = true;
                self.silence = silence_of(&open, self.timing.silence);
                self.expected = Some((Instant::now() + self.timing.handshake, "connection packet"));
                Step::Send(Packet::Connect(None))
            }
            Packet::Connect(_) if self.opened && !self.connected => {
                self.connected = true;
                self.expected = None;
                Step::Connected
            }
            Packet::Ping(payload) => Step::Send(Packet::Pong(payload)),
            Packet::Close => Step::End("closed by the validator".to_owned()),
            Packet::Disconnect => Step::End("disconnected by the validator".to_owned()),
            Packet::ConnectError(why) => {
                let why = why.map(|why| why.to_string()).unwrap_or_default();
                Step::End(shortened(&format!("connection refused: {why}")))
            }
            Packet::Event { name, mut args, .. } => match name.as_str() {
                event::EVENT_NAME if !args.is_empty() => Step::Broadcast(args.swap_remove(0)),
                "auth_success" if self.connected => self.on_authenticated(),
                "auth_failed" => Step::AuthFailed(auth_error(args.first())),
                _ => {
                    count(&counters.ignored_frames);
                    Step::Nothing
                }
            },
            Packet::Open(_)
            | Packet::Connect(_)
            | Packet::Pong(_)
            | Packet::Ack { .. }
            | Packet::Other(_) => {
                count(&counters.ignored_frames);
                Step::Nothing
            }
        }
    }

    fn on_authenticated(&mut self) -> Step {
        let now = Instant::now();
        self.expected = None;
        let first = *self.authenticated_at.get_or_insert(now);
        let planned = self
            .timing
            .again_after
            .get(self.authentications)
            .map(|after| first + *after);
        self.authentications += 1;
        self.again_at = Some(planned.unwrap_or(now + self.timing.again_every));
        Step::Authenticated
    }
}

/// The validator's own intervals, unless they are absurd.
fn silence_of(open: &Open, default: Duration) -> Duration {
    match open.ping_interval.saturating_add(open.ping_timeout) {
        ms @ 1..=600_000 => Duration::from_millis(ms),
        _ => default,
    }
}

fn auth_error(arg: Option<&Value>) -> String {
    let error = arg.and_then(|arg| arg.get("error")).and_then(Value::as_str);
    shortened(error.unwrap_or("no reason given"))
}

/// The address with what Socket.IO needs in it.
fn request_url(url: &Url) -> String {
    let mut url = url.clone();
    if matches!(url.path(), "" | "/") {
        url.set_path("/socket.io/");
    }
    url.set_query(Some("EIO=4&transport=websocket"));
    url.into()
}

async fn send(websocket: &mut WebSocket, packet: &Packet) -> Result<(), Stop> {
    let sent = timeout(
        Duration::from_secs(10),
        websocket.send(Message::text(packet.to_frame())),
    )
    .await;
    match sent {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Stop::Reconnect(shortened(&format!("send: {error}")))),
        Err(_) => Err(Stop::Reconnect("send: timed out".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: &str = r#"0{"sid":"x","upgrades":[],"pingTimeout":20000,"pingInterval":25000}"#;
    const AUTH_SUCCESS: &str = r#"42["auth_success",{}]"#;

    fn hear(session: &mut Session, text: &str) -> Step {
        session.on_message(Some(Ok(Message::text(text))), &Counters::default())
    }

    fn near(at: Option<Instant>, expected: Instant) -> bool {
        at.is_some_and(|at| at.max(expected) - at.min(expected) < Duration::from_secs(2))
    }

    /// The times that decide whether targeted events go on arriving.
    #[test]
    fn it_authenticates_after_10_30_and_50_seconds_and_then_every_5_minutes() {
        let mut session = Session::new(&Timing::default());
        assert_eq!(hear(&mut session, OPEN), Step::Send(Packet::Connect(None)));
        assert_eq!(session.silence, Duration::from_secs(45));
        assert_eq!(
            hear(&mut session, AUTH_SUCCESS),
            Step::Nothing,
            "not connected yet"
        );
        assert_eq!(hear(&mut session, "40{}"), Step::Connected);
        let start = Instant::now();
        for after in [10, 30, 50] {
            session.authentication_sent();
            assert_eq!(hear(&mut session, AUTH_SUCCESS), Step::Authenticated);
            let expected = start + Duration::from_secs(after);
            assert!(
                near(session.again_at, expected),
                "{after}: {:?}",
                session.again_at
            );
            assert!(session.expected.is_none());
        }
        for _ in 0..3 {
            assert_eq!(hear(&mut session, AUTH_SUCCESS), Step::Authenticated);
            assert!(near(session.again_at, Instant::now() + Duration::from_secs(300)));
        }
    }

    #[test]
    fn a_silent_server_is_dead_after_45_seconds_or_its_own_intervals() {
        let open = |ping_interval, ping_timeout| Open {
            sid: String::new(),
            upgrades: Vec::new(),
            ping_interval,
            ping_timeout,
            max_payload: 0,
        };
        let default = Timing::default().silence;
        assert_eq!(default, Duration::from_secs(45));
        for (interval, timeout, seconds) in [
            (25_000, 20_000, 45),
            (5_000, 1_000, 6),
            (0, 0, 45),
            (u64::MAX, u64::MAX, 45),
            (1 << 40, 0, 45),
        ] {
            let silence = silence_of(&open(interval, timeout), default);
            assert_eq!(silence, Duration::from_secs(seconds), "{interval} {timeout}");
        }
        let mut session = Session::new(&Timing::default());
        assert!(near(
            Some(session.next_deadline()),
            Instant::now() + Timing::default().handshake
        ));
        hear(&mut session, OPEN);
        hear(&mut session, "40{}");
        assert!(near(Some(session.next_deadline()), Instant::now() + default));
    }

    #[test]
    fn addresses_get_what_socket_io_needs() {
        for (url, expected) in [
            (
                "wss://ws.chutes.ai/",
                "wss://ws.chutes.ai/socket.io/?EIO=4&transport=websocket",
            ),
            (
                "ws://[::1]:7",
                "ws://[::1]:7/socket.io/?EIO=4&transport=websocket",
            ),
            (
                "wss://a.example/other/",
                "wss://a.example/other/?EIO=4&transport=websocket",
            ),
        ] {
            assert_eq!(request_url(&url.parse().expect("a URL")), expected);
        }
    }
}

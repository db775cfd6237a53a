//! The websocket: Engine.IO v4 and Socket.IO v5, websocket transport only, one namespace
//! (`validator-protocol`, section 2). The [`Hub`] knows the sessions and delivers events with the real
//! server's quirk: one session per hotkey.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use protocol::hotkey::Hotkey;
use protocol::signing::{
    HOTKEY_HEADER, NONCE_HEADER, Purpose, SIGNATURE_HEADER, Tail, VALIDATOR_NONCE_WINDOW_SECONDS,
    check_request_to_validator,
};
use protocol::socket_io::{Open, Packet};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::event::Event;
use crate::identity::random_uuid;
use crate::ledger::Record;
use crate::scenario::{DropHow, SocketSettings};
use crate::validator::Validator;

/// Advertised limit of what a client may send, in bytes.
const CLIENT_MESSAGE_BYTES_MAX: usize = 1_000_000;
/// Frames that may wait for a slow client; a client that lets more wait is cut off.
const WAITING_FRAMES_MAX: usize = 1_024;

/// All sessions.
#[derive(Debug)]
pub(crate) struct Hub {
    settings: SocketSettings,
    sessions: Mutex<Sessions>,
}

#[derive(Debug, Default)]
struct Sessions {
    next: u64,
    open: BTreeMap<u64, Session>,
    /// The one session that gets a hotkey's events.
    of_hotkey: BTreeMap<Hotkey, u64>,
}

#[derive(Debug)]
struct Session {
    out: mpsc::Sender<Order>,
    connected: bool,
    hotkey: Option<Hotkey>,
}

/// What a session's task is told to do.
#[derive(Debug)]
enum Order {
    Send(String),
    Drop(DropHow),
}

impl Hub {
    pub(crate) fn new(settings: SocketSettings) -> Self {
        Self {
            settings,
            sessions: Mutex::default(),
        }
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().expect("no holder of the lock panics")
    }

    /// Sends an event to whom it concerns; returns to how many sockets. Events without recipients go to
    /// every connected socket, authenticated or not.
    pub(crate) fn broadcast(&self, event: &Event) -> usize {
        let frame = Packet::event("miner_broadcast", event.envelope()).to_frame();
        let mut sessions = self.sessions();
        let targets: Vec<u64> = match &event.recipients {
            None => sessions
                .open
                .iter()
                .filter(|(_, session)| session.connected)
                .map(|(id, _)| *id)
                .collect(),
            Some(hotkeys) if self.settings.one_session_per_hotkey => hotkeys
                .iter()
                .filter_map(|hotkey| sessions.of_hotkey.get(hotkey).copied())
                .collect(),
            Some(hotkeys) => sessions
                .open
                .iter()
                .filter(|(_, session)| session.hotkey.as_ref().is_some_and(|h| hotkeys.contains(h)))
                .map(|(id, _)| *id)
                .collect(),
        };
        targets
            .into_iter()
            .filter(|id| {
                let Some(session) = sessions.open.get(id) else {
                    return false;
                };
                let sent = session.out.try_send(Order::Send(frame.clone())).is_ok();
                if !sent {
                    sessions.open.remove(id);
                }
                sent
            })
            .count()
    }

    /// Ends all sockets.
    pub(crate) fn drop_all(&self, how: DropHow) -> usize {
        let mut sessions = self.sessions();
        let count = sessions.open.len();
        sessions
            .open
            .retain(|_, session| session.out.try_send(Order::Drop(how)).is_ok());
        count
    }

    /// Hotkeys whose events reach someone, with the session that gets them.
    pub(crate) fn listeners(&self) -> BTreeMap<Hotkey, u64> {
        self.sessions().of_hotkey.clone()
    }

    fn open(&self) -> (u64, mpsc::Receiver<Order>) {
        let (out, orders) = mpsc::channel(WAITING_FRAMES_MAX);
        let mut sessions = self.sessions();
        sessions.next += 1;
        let id = sessions.next;
        let session = Session {
            out,
            connected: false,
            hotkey: None,
        };
        sessions.open.insert(id, session);
        (id, orders)
    }

    fn connect(&self, id: u64, connected: bool) {
        if let Some(session) = self.sessions().open.get_mut(&id) {
            session.connected = connected;
        }
    }

    fn authenticate(&self, id: u64, hotkey: &Hotkey) {
        let mut sessions = self.sessions();
        if let Some(session) = sessions.open.get_mut(&id) {
            session.hotkey = Some(hotkey.clone());
            sessions.of_hotkey.insert(hotkey.clone(), id);
        }
    }

    /// Forgets a session's authentication, as at its disconnect: whoever else has that hotkey stops
    /// getting its events too.
    fn leave(&self, id: u64) -> Option<Hotkey> {
        let mut sessions = self.sessions();
        let session = sessions.open.get_mut(&id)?;
        session.connected = false;
        let hotkey = session.hotkey.take()?;
        sessions.of_hotkey.remove(&hotkey);
        Some(hotkey)
    }

    fn close(&self, id: u64) -> Option<Hotkey> {
        let hotkey = self.leave(id);
        self.sessions().open.remove(&id);
        hotkey
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct EngineQuery {
    #[serde(rename = "EIO")]
    version: Option<String>,
    transport: Option<String>,
}

/// `GET /socket.io/`.
pub(crate) async fn upgrade(
    State(validator): State<Arc<Validator>>,
    Query(query): Query<EngineQuery>,
    socket: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Response {
    let refuse = |code: u8, message: &str| {
        let body = axum::Json(json!({"code": code, "message": message}));
        (StatusCode::BAD_REQUEST, body).into_response()
    };
    if query.version.as_deref() != Some("4") {
        return refuse(5, "Unsupported protocol version");
    }
    if query.transport.as_deref() != Some("websocket") {
        return refuse(0, "Transport unknown");
    }
    match socket {
        Ok(socket) => socket
            .max_message_size(CLIENT_MESSAGE_BYTES_MAX)
            .max_frame_size(CLIENT_MESSAGE_BYTES_MAX)
            .on_upgrade(move |socket| session(validator, socket)),
        Err(_) => refuse(3, "Bad request"),
    }
}

async fn session(validator: Arc<Validator>, mut socket: WebSocket) {
    let (id, orders) = validator.hub.open();
    let reason = serve(&validator, &mut socket, id, orders).await;
    let hotkey = validator.hub.close(id);
    validator.record(Record::SocketClosed {
        session: id,
        hotkey,
        reason: reason.to_owned(),
    });
}

/// Serves one websocket until it ends; returns why it did.
async fn serve(
    validator: &Arc<Validator>,
    socket: &mut WebSocket,
    id: u64,
    mut orders: mpsc::Receiver<Order>,
) -> &'static str {
    let settings = &validator.scenario.socket;
    let open = Packet::Open(Open {
        sid: random_uuid(),
        upgrades: vec![],
        ping_interval: settings.ping_interval_ms,
        ping_timeout: settings.ping_timeout_ms,
        max_payload: CLIENT_MESSAGE_BYTES_MAX as u64,
    });
    if !send(socket, open.to_frame()).await {
        return "gone before the handshake";
    }
    let interval = Duration::from_millis(settings.ping_interval_ms);
    let patience = Duration::from_millis(settings.ping_timeout_ms);
    // A ping goes out at `next_ping`; without an answer the session ends at `silent_at`.
    let mut next_ping = Instant::now() + interval;
    let mut silent_at: Option<Instant> = None;
    loop {
        let wake = silent_at.unwrap_or(next_ping);
        tokio::select! {
            () = validator.shutdown.cancelled() => {
                return "the server stops";
            }
            () = tokio::time::sleep_until(wake) => {
                if silent_at.is_some() {
                    close(socket).await;
                    return "no answer to a ping";
                }
                if !send(socket, Packet::Ping(String::new()).to_frame()).await {
                    return "connection lost";
                }
                silent_at = Some(Instant::now() + patience);
            }
            order = orders.recv() => match order {
                Some(Order::Send(frame)) => {
                    if !send(socket, frame).await {
                        return "connection lost";
                    }
                }
                Some(Order::Drop(DropHow::Abrupt)) => return "cut by a planted fault",
                Some(Order::Drop(DropHow::Close)) => {
                    send(socket, Packet::Close.to_frame()).await;
                    close(socket).await;
                    return "closed by a planted fault";
                }
                Some(Order::Drop(DropHow::Disconnect)) => {
                    send(socket, Packet::Disconnect.to_frame()).await;
                    validator.hub.leave(id);
                }
                None => return "too slow: its queue was full",
            },
            message = socket.recv() => match message {
                Some(Ok(Message::Text(text))) => match Packet::parse(&text) {
                    Ok(Packet::Pong(_)) => {
                        next_ping = Instant::now() + interval;
                        silent_at = None;
                    }
                    Ok(Packet::Close) => {
                        close(socket).await;
                        return "closed by the client";
                    }
                    Ok(packet) => {
                        for frame in answers(validator, id, packet, &text) {
                            if !send(socket, frame.to_frame()).await {
                                return "connection lost";
                            }
                        }
                    }
                    Err(error) => {
                        tracing::warn!(session = id, %error, "frame that is no packet");
                        close(socket).await;
                        return "malformed frame";
                    }
                },
                Some(Ok(Message::Close(_))) | None => return "closed by the client",
                Some(Ok(Message::Binary(_))) => {
                    close(socket).await;
                    return "binary frame";
                }
                Some(Ok(_)) => {}
                Some(Err(_)) => return "connection lost",
            },
        }
    }
}

async fn send(socket: &mut WebSocket, frame: String) -> bool {
    let sent = tokio::time::timeout(Duration::from_secs(10), socket.send(Message::Text(frame.into())));
    matches!(sent.await, Ok(Ok(())))
}

async fn close(socket: &mut WebSocket) {
    let frame = CloseFrame {
        code: 1000,
        reason: "".into(),
    };
    let sent = socket.send(Message::Close(Some(frame)));
    if !matches!(
        tokio::time::timeout(Duration::from_secs(1), sent).await,
        Ok(Ok(()))
    ) {
        tracing::debug!("the close frame was not sent");
    }
}

fn answers(validator: &Arc<Validator>, id: u64, packet: Packet, frame: &str) -> Vec<Packet> {
    match packet {
        Packet::Connect(auth) => {
            validator.hub.connect(id, true);
            // With an auth object the real server's handler raises and never confirms.
            let confirmed = auth.is_none_or(|auth| auth.as_object().is_some_and(serde_json::Map::is_empty));
            let confirmation = Packet::Connect(Some(json!({"sid": random_uuid()})));
            if confirmed { vec![confirmation] } else { vec![] }
        }
        Packet::Disconnect => {
            validator.hub.leave(id);
            vec![]
        }
        Packet::Event { ack, name, args } if name == "authenticate" => {
            let mut packets = authenticate(validator, id, args.first());
            if let Some(ack) = ack {
                let success = packets.len() == 1;
                packets.push(Packet::Ack {
                    id: ack,
                    args: vec![json!(success)],
                });
            }
            packets
        }
        Packet::Event { .. } => {
            let authenticated = validator.hub.listeners().values().any(|session| *session == id);
            if authenticated {
                vec![]
            } else {
                validator.hub.leave(id);
                vec![Packet::Disconnect]
            }
        }
        Packet::Other(_) => match frame.strip_prefix("40/") {
            Some(rest) => {
                let namespace = rest.split(',').next().unwrap_or_default();
                vec![Packet::Other(format!("44/{namespace},\"Unable to connect\""))]
            }
            None => vec![],
        },
        _ => vec![],
    }
}

fn authenticate(validator: &Arc<Validator>, id: u64, headers: Option<&Value>) -> Vec<Packet> {
    match check(validator, headers) {
        Ok(hotkey) => {
            validator.hub.authenticate(id, &hotkey);
            validator.record(Record::SocketAuthenticated { session: id, hotkey });
            vec![Packet::event("auth_success", json!({"message": "Authenticated"}))]
        }
        Err(reason) => {
            validator.hub.leave(id);
            let text = format!("Authentication failed: {reason}");
            validator.record(Record::SocketRefused { session: id, reason });
            vec![
                Packet::event("auth_failed", json!({"error": text})),
                Packet::Disconnect,
            ]
        }
    }
}

fn check(validator: &Arc<Validator>, headers: Option<&Value>) -> Result<Hotkey, String> {
    let headers = headers
        .and_then(Value::as_object)
        .ok_or("the argument is no object")?;
    for name in [HOTKEY_HEADER, NONCE_HEADER, SIGNATURE_HEADER] {
        if !headers.get(name).is_some_and(Value::is_string) {
            return Err(format!("{name} is missing or no string"));
        }
    }
    let hotkey = check_request_to_validator(
        |name| headers.get(name).and_then(Value::as_str),
        validator.nonce_clock(),
        VALIDATOR_NONCE_WINDOW_SECONDS,
        &Tail::Purpose(Purpose::Sockets),
    )
    .map_err(|refusal| refusal.to_string())?;
    if validator.read(|state, _| state.hotkeys.contains(&hotkey)) {
        Ok(hotkey)
    } else {
        Err("hotkey not registered on netuid 64".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use protocol::hotkey::Signer;

    use super::*;
    use crate::event::RequiredEffect;

    fn event(recipients: Option<Vec<Hotkey>>) -> Event {
        Event {
            reason: "x".to_owned(),
            data: json!({}),
            message: None,
            recipients,
            effect: RequiredEffect::Nothing,
        }
    }

    #[test]
    fn the_last_session_of_a_hotkey_wins_and_any_end_silences_it() {
        let hub = Hub::new(SocketSettings::default());
        let hotkey = Signer::from_seed(&[1; 32]).hotkey().clone();
        let to_owner = event(Some(vec![hotkey.clone()]));
        let (old, mut old_orders) = hub.open();
        let (new, mut new_orders) = hub.open();
        for id in [old, new] {
            hub.connect(id, true);
            hub.authenticate(id, &hotkey);
        }
        assert_eq!(hub.broadcast(&to_owner), 1);
        assert!(old_orders.try_recv().is_err());
        assert!(new_orders.try_recv().is_ok());
        assert_eq!(hub.broadcast(&event(None)), 2, "unfiltered ones reach everybody");
        assert_eq!(hub.close(old), Some(hotkey.clone()));
        assert_eq!(hub.broadcast(&to_owner), 0, "the newer session is silenced too");
        hub.authenticate(new, &hotkey);
        assert_eq!(hub.broadcast(&to_owner), 1);
    }

    #[test]
    fn a_client_that_does_not_read_is_cut_off() {
        let hub = Hub::new(SocketSettings::default());
        let (id, orders) = hub.open();
        hub.connect(id, true);
        for _ in 0..WAITING_FRAMES_MAX {
            assert_eq!(hub.broadcast(&event(None)), 1);
        }
        assert_eq!(hub.broadcast(&event(None)), 0);
        assert_eq!(hub.drop_all(DropHow::Abrupt), 0);
        drop(orders);
    }
}

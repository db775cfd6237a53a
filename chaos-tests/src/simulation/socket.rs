//! The validator model's websocket: Engine.IO and Socket.IO over a byte stream in memory, so that the real
//! client runs to its last line but for the network.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use coordinator::clock::Clock;
use coordinator::validator::socket::{Dial, Transport};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, SinkExt, StreamExt};
use protocol::signing::{Purpose, Tail, VALIDATOR_NONCE_WINDOW_SECONDS, check_request_to_validator};
use protocol::socket_io::{Open, Packet};
use serde_json::{Value, json};
use tokio::io::DuplexStream;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::clock::SimulatedClock;
use super::validator::{Session, Validator};

/// Bytes under way in each direction.
const WINDOW_BYTES: usize = 64 * 1024;
/// Packets that wait for a slow reader.
const PACKETS_MAX: usize = 1024;
/// A socket through which nothing passes for so long is closed.
const SILENCE_MAX: Duration = Duration::from_secs(40);
const PING_EVERY: Duration = Duration::from_secs(25);

/// Dials the model.
#[derive(Debug, Clone)]
pub(super) struct ModelDial {
    pub(super) validator: Validator,
    pub(super) clock: Arc<SimulatedClock>,
}

impl Dial for ModelDial {
    fn dial<'a>(&'a self, _host: &'a str, _port: u16) -> BoxFuture<'a, io::Result<Box<dyn Transport>>> {
        async move {
            let (delay_ms, down) = {
                let mut inner = self.validator.lock();
                let delay_ms = inner.random.u64(1..100);
                let now = self.validator.recorder.now_ms();
                (delay_ms, inner.trouble.socket_down_until_ms > now)
            };
            sleep(Duration::from_millis(delay_ms)).await;
            if down || !self.validator.is_reached(Duration::from_secs(5)).await {
                self.validator.recorder.fault("socket refused", "");
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let (client, server) = tokio::io::duplex(WINDOW_BYTES);
            let dial = self.clone();
            tokio::spawn(async move {
                if let Err(why) = Box::pin(dial.serve(server)).await {
                    dial.validator
                        .recorder
                        .note(format_args!("validator: socket ends: {why}"));
                }
            });
            Ok(Box::new(client) as Box<dyn Transport>)
        }
        .boxed()
    }
}

type Socket = WebSocketStream<DuplexStream>;

impl ModelDial {
    async fn serve(&self, stream: DuplexStream) -> Result<(), String> {
        let accepted = tokio_tungstenite::accept_async(stream).await;
        let mut socket = accepted.map_err(|error| error.to_string())?;
        let open = Open {
            sid: "simulated".to_owned(),
            upgrades: Vec::new(),
            ping_interval: 25_000,
            ping_timeout: 20_000,
            max_payload: 1_000_000,
        };
        send(&mut socket, &Packet::Open(open)).await?;
        let (out, mut packets) = mpsc::channel(PACKETS_MAX);
        let kick = Arc::new(Notify::new());
        let number = {
            let mut inner = self.validator.lock();
            inner.name("session");
            let number = inner.next_session();
            inner.session = Some(Session {
                number,
                out,
                kick: Arc::clone(&kick),
            });
            number
        };
        let end = self.talk(&mut socket, &mut packets, &kick, number).await;
        self.validator.lock().authenticated.remove(&number);
        // The closing of any session of a hotkey is noticed late and stops what is meant for it.
        let (validator, late_ms) = (self.validator.clone(), self.validator.lock().random.u64(0..5000));
        tokio::spawn(async move {
            sleep(Duration::from_millis(late_ms)).await;
            let mut inner = validator.lock();
            inner.targeted = false;
            if inner
                .session
                .as_ref()
                .is_some_and(|session| session.number == number)
            {
                inner.session = None;
            }
        });
        end
    }

    async fn talk(
        &self,
        socket: &mut Socket,
        packets: &mut mpsc::Receiver<Packet>,
        kick: &Notify,
        number: u64,
    ) -> Result<(), String> {
        let mut ping_at = Instant::now() + PING_EVERY;
        loop {
            if !self.validator.is_reached(SILENCE_MAX).await {
                return Err("the other end is silent".to_owned());
            }
            tokio::select! {
                biased;
                () = kick.notified() => return Err("kicked".to_owned()),
                Some(packet) = packets.recv() => send(socket, &packet).await?,
                () = sleep_until(ping_at) => {
                    ping_at = Instant::now() + PING_EVERY;
                    send(socket, &Packet::Ping(String::new())).await?;
                }
                message = socket.next() => {
                    let text = match message {
                        Some(Ok(Message::Text(text))) => text,
                        Some(Ok(Message::Close(_))) | None => return Ok(()),
                        Some(Ok(_)) => continue,
                        Some(Err(error)) => return Err(error.to_string()),
                    };
                    match Packet::parse(&text).map_err(|error| error.to_string())? {
                        Packet::Connect(_) => send(socket, &Packet::Connect(Some(json!({"sid": "s"})))).await?,
                        Packet::Event { name, args, .. } if name == "authenticate" => {
                            self.authenticate(socket, args.first(), number).await?;
                        }
                        Packet::Disconnect => return Ok(()),
                        _ => {}
                    }
                }
            }
        }
    }

    async fn authenticate(
        &self,
        socket: &mut Socket,
        headers: Option<&Value>,
        number: u64,
    ) -> Result<(), String> {
        let recorder = &self.validator.recorder;
        let header = |name: &str| headers?.get(name)?.as_str();
        let tail = Tail::Purpose(Purpose::Sockets);
        let checked =
            check_request_to_validator(header, self.clock.now(), VALIDATOR_NONCE_WINDOW_SECONDS, &tail);
        if let Err(refusal) = checked {
            recorder.violation(format_args!("5: our authentication is not valid: {refusal}"));
        }
        let (delay_ms, fails) = {
            let mut inner = self.validator.lock();
            let window = inner.trouble.auth_fails_until_ms > recorder.now_ms();
            (inner.random.u64(5..400), window || inner.one_in(12, recorder))
        };
        sleep(Duration::from_millis(delay_ms)).await;
        if fails {
            recorder.fault("authentication failed", "");
            return send(
                socket,
                &Packet::event("auth_failed", json!({"error": "simulated"})),
            )
            .await;
        }
        if let Some((member, network)) = &self.validator.seen_by {
            {
                let mut inner = self.validator.lock();
                inner.targeted = true;
                inner.authenticated.insert(number, *member);
            }
            recorder.note(format_args!("validator: member {member} is authenticated"));
            self.validator.check_sockets(network);
        }
        send(socket, &Packet::event("auth_success", json!({}))).await
    }
}

async fn send(socket: &mut Socket, packet: &Packet) -> Result<(), String> {
    socket
        .send(Message::text(packet.to_frame()))
        .await
        .map_err(|error| error.to_string())
}

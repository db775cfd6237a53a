//! The validator's socket against a scripted validator in this process: authentication again and again,
//! bad frames, and every way in which a connection can end.
//!
//! The bytes go through memory pipes behind the dial seam, so no port is opened. Times are short, and
//! nothing here passes because something was slow: every step awaits what it expects.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coordinator::clock::{Clock, WallClock};
use coordinator::signer::key::{Key, Seed};
use coordinator::signer::{LocalSigner, Sign};
use coordinator::validator::event::Event;
use coordinator::validator::socket::{Config, Counters, Dial, Socket, SocketEvent, Timing, Transport};
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::{SinkExt, StreamExt};
use protocol::hotkey::{Hotkey, Signer};
use protocol::signing::{Purpose, Tail, check_request_to_validator};
use protocol::socket_io::Packet;
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, accept_async};
use tokio_util::sync::CancellationToken;

/// Nothing takes this long unless it never happens.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct PipeDial(mpsc::Sender<Option<DuplexStream>>);

impl Dial for PipeDial {
    fn dial<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Box<dyn Transport>>> {
        async move {
            assert_eq!((host, port), ("::1", 7));
            let (ours, theirs) = duplex(1 << 20);
            let closed = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
            self.0.send(Some(theirs)).await.map_err(closed)?;
            Ok(Box::new(ours) as Box<dyn Transport>)
        }
        .boxed()
    }
}

struct Validator {
    pipes: mpsc::Receiver<Option<DuplexStream>>,
}

type Peer = WebSocketStream<DuplexStream>;

impl Validator {
    async fn pipe(&mut self) -> DuplexStream {
        let pipe = timeout(PATIENCE, self.pipes.recv()).await.expect("it dials");
        pipe.flatten().expect("the socket lives")
    }

    async fn websocket(&mut self) -> Peer {
        let pipe = self.pipe().await;
        accept_async(pipe).await.expect("a websocket handshake")
    }

    /// Up to the authentication that the client sends.
    async fn connected(&mut self) -> Peer {
        let mut peer = self.websocket().await;
        say(&mut peer, &open_frame(25_000, 20_000)).await;
        assert_eq!(
            hear(&mut peer).await,
            "40",
            "no auth object: the real server breaks on it"
        );
        say(&mut peer, r#"40{"sid":"abc"}"#).await;
        check_authentication(&hear(&mut peer).await);
        peer
    }

    async fn authenticated(&mut self) -> Peer {
        let mut peer = self.connected().await;
        say(&mut peer, AUTH_SUCCESS).await;
        peer
    }

    /// The same, and the client has said so.
    async fn authenticated_to(&mut self, client: &mut Client) -> Peer {
        let peer = self.authenticated().await;
        client.expect_connected().await;
        client.expect_authenticated().await;
        peer
    }
}

const AUTH_SUCCESS: &str = r#"42["auth_success",{"message":"Authenticated"}]"#;

fn open_frame(interval: u64, timeout: u64) -> String {
    let open = json!({"sid": "x", "upgrades": [], "pingTimeout": timeout, "pingInterval": interval, "maxPayload": 1_000_000});
    format!("0{open}")
}

async fn say(peer: &mut Peer, text: &str) {
    peer.send(Message::text(text)).await.expect("the client listens");
}

async fn hear(peer: &mut Peer) -> String {
    loop {
        match timeout(PATIENCE, peer.next()).await.expect("the client speaks") {
            Some(Ok(Message::Text(text))) => return text.to_string(),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            other => panic!("text was expected, not {other:?}"),
        }
    }
}

fn check_authentication(frame: &str) {
    let Ok(Packet::Event {
        name,
        args,
        ack: None,
    }) = Packet::parse(frame)
    else {
        panic!("an event was expected, not {frame}");
    };
    assert_eq!((name.as_str(), args.len()), ("authenticate", 1));
    // The real server looks these up by their exact spelling, and wants text.
    let header = |name: &str| args[0].get(name).and_then(Value::as_str);
    let tail = Tail::Purpose(Purpose::Sockets);
    let miner = check_request_to_validator(header, WallClock.now(), 600, &tail).expect("well signed");
    assert_eq!(&miner, Signer::from_seed(&[1; 32]).hotkey());
}

struct Client {
    events: mpsc::Receiver<SocketEvent>,
    counters: Arc<Counters>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Client {
    async fn next(&mut self) -> SocketEvent {
        timeout(PATIENCE, self.events.recv())
            .await
            .expect("an event comes")
            .expect("the socket lives")
    }

    async fn expect(&mut self, expected: SocketEvent) {
        assert_eq!(self.next().await, expected);
    }

    async fn expect_connected(&mut self) {
        self.expect(SocketEvent::Connected).await;
        self.expect(SocketEvent::RestObservationDue).await;
    }

    async fn expect_authenticated(&mut self) {
        self.expect(SocketEvent::Authenticated).await;
        self.expect(SocketEvent::RestObservationDue).await;
    }

    async fn stop(self) {
        self.cancel.cancel();
        crate::ended(self.task, PATIENCE).await;
    }
}

fn quick() -> Timing {
    Timing {
        again_after: [10, 30, 50].map(Duration::from_millis).to_vec(),
        again_every: Duration::from_millis(40),
        backoff_min: Duration::from_millis(1),
        backoff_max: Duration::from_millis(8),
        ..Timing::default()
    }
}

fn calm() -> Timing {
    Timing {
        again_after: Vec::new(),
        again_every: Duration::from_secs(3600),
        ..quick()
    }
}

fn start(timing: Timing, queue: usize, url: &str) -> (Validator, Client) {
    start_while(Arc::new(|| true), timing, queue, url)
}

fn start_while(
    leads_now: Arc<dyn Fn() -> bool + Send + Sync>,
    timing: Timing,
    queue: usize,
    url: &str,
) -> (Validator, Client) {
    let (dial, pipes) = mpsc::channel(1);
    let (out, events) = mpsc::channel(queue);
    let key = Key::new(&Seed::new([1; 32]));
    let signer: Arc<dyn Sign> = Arc::new(LocalSigner::new(key, Arc::new(WallClock)));
    let config = Config {
        validator: Signer::from_seed(&[2; 32]).hotkey().clone(),
        url: url.parse().expect("a URL"),
        dial: Arc::new(PipeDial(dial)),
        tls: None,
        timing,
        leads_now,
    };
    let socket = Socket::new(config, signer, out, fastrand::Rng::with_seed(3));
    let (counters, cancel) = (socket.counters(), CancellationToken::new());
    let task = tokio::spawn(socket.run(cancel.clone()));
    let client = Client {
        events,
        counters,
        cancel,
        task,
    };
    (Validator { pipes }, client)
}

const URL: &str = "ws://[::1]:7/";

fn broadcast(reason: &str, data: &Value) -> String {
    Packet::event(
        "miner_broadcast",
        json!({"reason": reason, "data": data, "filter_recipients": []}),
    )
    .to_frame()
}

fn image_created(image: &str) -> (String, SocketEvent) {
    let event = Event::ImageCreated {
        image: image.to_owned(),
    };
    (
        broadcast("image_created", &json!({"image_id": image})),
        SocketEvent::Event(event),
    )
}

#[tokio::test]
async fn it_authenticates_again_and_again_on_one_socket() {
    let (mut validator, mut client) = start(quick(), 64, URL);
    let mut peer = validator.authenticated_to(&mut client).await;
    for _ in 0..6 {
        check_authentication(&hear(&mut peer).await);
        say(&mut peer, AUTH_SUCCESS).await;
        client.expect_authenticated().await;
    }
    assert_eq!(client.counters.attempts.load(Ordering::Relaxed), 1);
    client.stop().await;
}

/// A leader that was paused authenticated once more when it woke, before it heard that another one led.
#[tokio::test]
async fn a_member_that_leads_no_more_does_not_authenticate_again() {
    let leads = Arc::new(AtomicBool::new(true));
    let asked = Arc::clone(&leads);
    let leads_now = Arc::new(move || asked.load(Ordering::Relaxed));
    let (mut validator, mut client) = start_while(leads_now, quick(), 64, URL);
    let mut peer = validator.authenticated_to(&mut client).await;
    leads.store(false, Ordering::Relaxed);
    let mut heard = Vec::new();
    while let Ok(Some(Ok(message))) = timeout(PATIENCE, peer.next()).await {
        if let Message::Text(text) = message {
            heard.push(text.to_string());
        }
        assert!(heard.len() < 4, "{heard:?}");
    }
    // One may have been on its way; then it says goodbye.
    heard.retain(|text| text != "41");
    assert!(heard.len() <= 1, "{heard:?}");
    loop {
        match client.next().await {
            SocketEvent::Disconnected(why) => {
                assert_eq!(why, "this member leads no more");
                break;
            }
            SocketEvent::Authenticated | SocketEvent::RestObservationDue => {}
            other => panic!("{other:?} was not expected"),
        }
    }
    client.stop().await;
}

#[tokio::test]
async fn pings_are_answered_and_events_passed_on_in_order_repeated_or_not() {
    let (mut validator, mut client) = start(calm(), 64, URL);
    let mut peer = validator.websocket().await;
    // Some servers ping before anything else.
    say(&mut peer, "2").await;
    assert_eq!(hear(&mut peer).await, "3");
    say(&mut peer, &open_frame(25_000, 20_000)).await;
    assert_eq!(hear(&mut peer).await, "40");
    // A broadcast may overtake everything: it proves no authentication.
    let (early, early_event) = image_created("early");
    say(&mut peer, &early).await;
    client.expect(early_event).await;
    say(&mut peer, r#"40{"sid":"abc"}"#).await;
    client.expect_connected().await;
    check_authentication(&hear(&mut peer).await);
    say(&mut peer, AUTH_SUCCESS).await;
    client.expect_authenticated().await;
    say(&mut peer, "2probe").await;
    assert_eq!(hear(&mut peer).await, "3probe");
    for image in ["a", "b", "a", "a"] {
        let (frame, event) = image_created(image);
        say(&mut peer, &frame).await;
        client.expect(event).await;
    }
    client.stop().await;
}

#[tokio::test]
async fn bad_frames_are_dropped_and_the_connection_stays() {
    let (mut validator, mut client) = start(calm(), 64, URL);
    let mut peer = validator.authenticated_to(&mut client).await;
    let (good, event) = image_created("good");
    let cuts = (1..good.len()).step_by(7).map(|end| good[..end].to_owned());
    let malformed: Vec<String> = [
        "",
        "7",
        "x",
        "4",
        "47",
        "42",
        "42[",
        "42[]",
        "42[1]",
        "42{}",
        "0",
        "0{",
        "\u{0}",
        "42[\"a\"]]",
    ]
    .map(str::to_owned)
    .into_iter()
    .chain(cuts)
    .collect();
    let ignored = [
        "5",
        "6",
        "3",
        "430[true]",
        "42/other,[\"x\"]",
        "451-[\"b\",{}]",
        "42[\"unheard_of\",1]",
        "40{}",
    ];
    let wrong_events = [
        "null",
        "7",
        "[]",
        "{}",
        r#"{"reason":"chute_created","data":{}}"#,
        r#"{"reason":1,"data":{}}"#,
    ];
    for frame in &malformed {
        say(&mut peer, frame).await;
    }
    for frame in ignored {
        say(&mut peer, frame).await;
    }
    peer.send(Message::binary(vec![0xff, 0, 1]))
        .await
        .expect("the client listens");
    say(&mut peer, r#"42["miner_broadcast"]"#).await;
    for envelope in wrong_events {
        say(&mut peer, &format!("42[\"miner_broadcast\",{envelope}]")).await;
    }
    say(&mut peer, &good).await;
    // Each broadcast that cannot be read may have meant us.
    let mut next = client.next().await;
    while next == SocketEvent::RestObservationDue {
        next = client.next().await;
    }
    assert_eq!(next, event);
    let unknown = broadcast("moon_phase", &json!({"a": [1, {"b": null}]}));
    say(&mut peer, &unknown).await;
    client
        .expect(SocketEvent::Event(Event::Unknown("moon_phase".to_owned())))
        .await;
    let counters = &client.counters;
    // Cuts like "4" or "42" stand in both lists; the cut `42["miner_broadcast"...` never parses.
    assert_eq!(
        counters.malformed_frames.load(Ordering::Relaxed),
        malformed.len() as u64
    );
    assert_eq!(
        counters.ignored_frames.load(Ordering::Relaxed),
        ignored.len() as u64 + 2
    );
    assert_eq!(
        counters.malformed_events.load(Ordering::Relaxed),
        wrong_events.len() as u64
    );
    assert_eq!(counters.attempts.load(Ordering::Relaxed), 1);
    client.stop().await;
}

#[tokio::test]
async fn large_events_are_accepted_and_huge_frames_end_the_connection() {
    let (mut validator, mut client) = start(calm(), 64, URL);
    let mut peer = validator.authenticated_to(&mut client).await;
    let padding = |bytes| {
        broadcast(
            "image_created",
            &json!({"image_id": "fat", "more": "x".repeat(bytes)}),
        )
    };
    say(&mut peer, &padding(4 * 1024 * 1024)).await;
    let fat = Event::ImageCreated {
        image: "fat".to_owned(),
    };
    client.expect(SocketEvent::Event(fat)).await;
    // The client may hang up while this is being sent.
    let _ = peer.send(Message::text(padding(32 * 1024 * 1024))).await;
    let SocketEvent::Disconnected(why) = client.next().await else {
        panic!("it must not accept 32 MiB");
    };
    assert!(why.contains("long"), "{why}");
    let _peer = validator.authenticated_to(&mut client).await;
    client.stop().await;
}

/// Each row ends a connection in its own way; the next connection follows on the same client.
#[tokio::test]
async fn every_end_is_followed_by_another_connection() {
    let (mut validator, mut client) = start(calm(), 64, URL);
    let ended = async |client: &mut Client, expected: &str| {
        let mut failed = false;
        loop {
            match client.next().await {
                SocketEvent::Disconnected(why) => {
                    assert!(why.contains(expected), "{why:?} does not say {expected:?}");
                    return failed;
                }
                SocketEvent::AuthFailed(why) => {
                    assert_eq!(why, "Authentication failed: nope");
                    failed = true;
                }
                SocketEvent::Event(event) => panic!("{event:?}"),
                SocketEvent::Connected | SocketEvent::Authenticated | SocketEvent::RestObservationDue => {}
            }
        }
    };
    // Before there is a websocket.
    drop(validator.pipe().await);
    ended(&mut client, "handshake").await;
    let mut pipe = validator.pipe().await;
    pipe.write_all(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
        .await
        .expect("open");
    ended(&mut client, "503").await;
    let mut pipe = validator.pipe().await;
    pipe.write_all(&[0xff; 100]).await.expect("open");
    ended(&mut client, "handshake").await;
    // Before it is connected.
    drop(validator.websocket().await);
    ended(&mut client, "").await;
    let mut peer = validator.websocket().await;
    say(&mut peer, &open_frame(25_000, 20_000)).await;
    say(&mut peer, r#"44{"message":"Unable to connect"}"#).await;
    ended(&mut client, "Unable to connect").await;
    // Refused, with and without the 41 that follows; in the end accepted.
    for farewell in [true, false] {
        let mut peer = validator.connected().await;
        say(
            &mut peer,
            r#"42["auth_failed",{"error":"Authentication failed: nope"}]"#,
        )
        .await;
        if farewell {
            let _ = peer.send(Message::text("41")).await;
        }
        assert!(ended(&mut client, "authentication failed").await);
    }
    // After it was authenticated.
    for (frame, why) in [
        ("41", "disconnected by the validator"),
        ("1", "closed by the validator"),
    ] {
        let mut peer = validator.authenticated().await;
        say(&mut peer, frame).await;
        ended(&mut client, why).await;
    }
    let mut peer = validator.authenticated().await;
    peer.close(None).await.expect("open");
    ended(&mut client, "closed").await;
    drop(validator.authenticated().await);
    ended(&mut client, "").await;
    // Text that is not UTF-8, as raw bytes of a frame: the transport's own rules end the connection.
    let mut peer = validator.authenticated().await;
    peer.get_mut()
        .write_all(&[0x81, 2, 0xc3, 0x28])
        .await
        .expect("open");
    ended(&mut client, "").await;
    // A reserved bit and an unknown opcode.
    let mut peer = validator.authenticated().await;
    peer.get_mut().write_all(&[0xf3, 0]).await.expect("open");
    ended(&mut client, "").await;
    // And still it comes back.
    let mut peer = validator.authenticated().await;
    let (frame, event) = image_created("alive");
    say(&mut peer, &frame).await;
    client.expect_connected().await;
    client.expect_authenticated().await;
    client.expect(event).await;
    assert_eq!(client.counters.attempts.load(Ordering::Relaxed), 14);
    assert_eq!(client.counters.auth_failed.load(Ordering::Relaxed), 2);
    // The last two, and those whose websocket was dropped without a goodbye.
    assert!(client.counters.malformed_frames.load(Ordering::Relaxed) >= 2);
    client.stop().await;
}

#[tokio::test]
async fn silence_and_missing_answers_end_a_connection() {
    let short = Duration::from_millis(30);
    let timing = Timing {
        handshake: short,
        authentication: short,
        ..calm()
    };
    let (mut validator, mut client) = start(timing, 64, URL);
    let why = async |client: &mut Client| loop {
        if let SocketEvent::Disconnected(why) = client.next().await {
            return why;
        }
    };
    let _silent_pipe = validator.pipe().await;
    assert!(why(&mut client).await.contains("handshake: timed out"));
    let _no_open = validator.websocket().await;
    assert_eq!(why(&mut client).await, "no open packet in time");
    let mut no_connect = validator.websocket().await;
    say(&mut no_connect, &open_frame(25_000, 20_000)).await;
    assert_eq!(why(&mut client).await, "no connection packet in time");
    let _no_auth = validator.connected().await;
    assert_eq!(why(&mut client).await, "no answer to our authentication in time");
    // The validator's own intervals count, and pings of the transport do not.
    let mut peer = validator.websocket().await;
    say(&mut peer, &open_frame(60, 40)).await;
    assert_eq!(hear(&mut peer).await, "40");
    say(&mut peer, r#"40{"sid":"abc"}"#).await;
    check_authentication(&hear(&mut peer).await);
    say(&mut peer, AUTH_SUCCESS).await;
    peer.send(Message::Ping(vec![1].into())).await.expect("open");
    assert_eq!(why(&mut client).await, "nothing heard for 100ms");
    client.stop().await;
}

#[tokio::test]
async fn a_full_queue_drops_events_and_asks_for_a_listing() {
    let (mut validator, mut client) = start(calm(), 4, URL);
    let mut peer = validator.authenticated_to(&mut client).await;
    for number in 0..50 {
        say(&mut peer, &image_created(&format!("i{number}")).0).await;
    }
    say(&mut peer, "2").await;
    assert_eq!(
        hear(&mut peer).await,
        "3",
        "a slow reader must not keep it from answering pings"
    );
    for number in 0..4 {
        client.expect(image_created(&format!("i{number}")).1).await;
    }
    // The next thing that happens finds room.
    say(&mut peer, "2").await;
    client.expect(SocketEvent::RestObservationDue).await;
    assert_eq!(client.counters.dropped_events.load(Ordering::Relaxed), 46);
    client.stop().await;
}

#[tokio::test]
async fn when_cancelled_it_says_goodbye() {
    let (mut validator, mut client) = start(calm(), 64, URL);
    let mut peer = validator.authenticated_to(&mut client).await;
    client.cancel.cancel();
    assert_eq!(hear(&mut peer).await, "41");
    let closed = timeout(PATIENCE, peer.next()).await.expect("it closes");
    assert!(matches!(closed, Some(Ok(Message::Close(_)))), "{closed:?}");
    drop(peer);
    timeout(PATIENCE, client.task)
        .await
        .expect("it ends")
        .expect("it does not panic");
    assert_eq!(client.events.recv().await, None);
}

/// The validator says it to nobody else.
#[tokio::test]
async fn what_crosses_with_the_goodbye_is_passed_on() {
    let (mut validator, mut client) = start(calm(), 64, URL);
    let mut peer = validator.authenticated_to(&mut client).await;
    client.cancel.cancel();
    assert_eq!(hear(&mut peer).await, "41");
    let (frame, event) = image_created("i1");
    say(&mut peer, &frame).await;
    let closed = timeout(PATIENCE, peer.next()).await.expect("it closes");
    assert!(matches!(closed, Some(Ok(Message::Close(_)))), "{closed:?}");
    client.expect(event).await;
    drop(peer);
    client.stop().await;
}

#[tokio::test]
async fn it_ends_at_any_point_when_cancelled_or_when_nobody_listens() {
    // In the handshake, before the open packet, before the answer to the authentication.
    for point in 0..3 {
        let (mut validator, client) = start(calm(), 64, URL);
        match point {
            0 => drop(Box::pin(validator.pipe()).await),
            1 => drop(Box::pin(validator.websocket()).await),
            _ => drop(Box::pin(validator.connected()).await),
        }
        client.stop().await;
    }
    let (mut validator, client) = start(calm(), 64, URL);
    drop(client.events);
    let ends = async {
        let mut peer = validator.websocket().await;
        say(&mut peer, &open_frame(25_000, 20_000)).await;
        say(&mut peer, "40{}").await;
        client.task.await.expect("it does not panic");
    };
    timeout(PATIENCE, ends).await.expect("nobody listens");
}

#[tokio::test]
async fn a_failed_tls_handshake_is_tried_again() {
    let (mut validator, mut client) = start(calm(), 64, "wss://[::1]:7/");
    for _ in 0..3 {
        let mut pipe = validator.pipe().await;
        pipe.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .await
            .expect("open");
        let SocketEvent::Disconnected(why) = client.next().await else {
            panic!("this is no TLS");
        };
        assert!(why.contains("handshake"), "{why}");
    }
    client.stop().await;
}

/// Nothing of a signer that fails reaches the validator, and the socket keeps trying.
#[tokio::test]
async fn without_signer_it_keeps_trying() {
    #[derive(Debug)]
    struct Broken(Hotkey);
    impl Sign for Broken {
        fn hotkey(&self) -> &Hotkey {
            &self.0
        }
        fn to_validator(
            &self,
            _: coordinator::signer::MessageKind,
        ) -> BoxFuture<'_, coordinator::signer::Result<protocol::signing::Headers>> {
            let error = coordinator::signer::Error::Unavailable("restarting".to_owned());
            std::future::ready(Err(error)).boxed()
        }
        fn seal<'a>(
            &'a self,
            _: coordinator::signer::SealedKind,
            _: &'a [u8],
        ) -> BoxFuture<'a, coordinator::signer::Result<Vec<u8>>> {
            unreachable!("a socket seals nothing")
        }
        fn unseal<'a>(
            &'a self,
            _: coordinator::signer::SealedKind,
            _: &'a [u8],
        ) -> BoxFuture<'a, coordinator::signer::Result<Vec<u8>>> {
            unreachable!("a socket opens nothing")
        }
    }
    let (dial, pipes) = mpsc::channel(1);
    let (out, mut events) = mpsc::channel(64);
    let hotkey = Signer::from_seed(&[1; 32]).hotkey().clone();
    let config = Config {
        validator: hotkey.clone(),
        url: URL.parse().expect("a URL"),
        dial: Arc::new(PipeDial(dial)),
        tls: None,
        timing: calm(),
        leads_now: Arc::new(|| true),
    };
    let socket = Socket::new(config, Arc::new(Broken(hotkey)), out, fastrand::Rng::with_seed(1));
    let cancel = CancellationToken::new();
    let task = tokio::spawn(socket.run(cancel.clone()));
    let mut validator = Validator { pipes };
    for _ in 0..2 {
        let mut peer = validator.websocket().await;
        say(&mut peer, &open_frame(25_000, 20_000)).await;
        say(&mut peer, "40{}").await;
        loop {
            if let SocketEvent::Disconnected(why) = events.recv().await.expect("it lives") {
                assert!(why.contains("sign:"), "{why}");
                break;
            }
        }
    }
    cancel.cancel();
    timeout(PATIENCE, task)
        .await
        .expect("it ends")
        .expect("it does not panic");
}

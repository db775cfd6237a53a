//! Interoperability with code that is not ours: our socket against python-socketio, our signatures against
//! substrate-interface and bittensor-wallet, and theirs against ours.
//!
//! `chaos-tests/peers/install.sh` installs them. Without them this prints what was not tested, and fails when
//! `REQUIRE_PEERS=1` is set.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use coordinator::clock::{Clock, WallClock};
use coordinator::signer::key::{Key, Seed};
use coordinator::signer::{LocalSigner, MessageKind, Sign};
use coordinator::validator::event::Event;
use coordinator::validator::socket::{Config, Socket, SocketEvent, TcpDial, Timing};
use protocol::hotkey::{Hotkey, Signer};
use protocol::signing::{NONCE_HEADER, SIGNATURE_HEADER};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Nothing takes this long unless it never happens.
const PATIENCE: Duration = Duration::from_secs(60);

/// The Python of the peers, if they are installed.
fn python(untested: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = std::env::var_os("CHUTES_PEERS").map_or_else(|| root.join("target/peers"), PathBuf::from);
    let python = folder.join("bin/python");
    if folder.join("requirements.installed").exists() && python.exists() {
        return Some(python);
    }
    // Written directly, since the harness keeps what a passing test prints.
    let note = format!("NOT TESTED: {untested}: run chaos-tests/peers/install.sh first\n");
    std::io::stderr()
        .write_all(note.as_bytes())
        .expect("standard error is open");
    let required = std::env::var_os("REQUIRE_PEERS").is_some_and(|value| value == "1");
    assert!(!required, "REQUIRE_PEERS=1 and the peers are not installed");
    None
}

/// A Python program that speaks JSON lines.
struct Peer {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Peer {
    fn start(python: &Path, program: &str, settings: &Value) -> Self {
        let program = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/peers")
            .join(program);
        let mut child = Command::new(python)
            .arg(program)
            .arg(settings.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the peer's Python starts");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, input, output }
    }

    async fn hear(&mut self) -> Value {
        let line = timeout(PATIENCE, self.output.next_line())
            .await
            .expect("the peer speaks");
        let line = line.expect("readable").expect("the peer lives");
        serde_json::from_str(&line).expect("JSON")
    }

    async fn expect(&mut self, happened: &str) -> Value {
        loop {
            let heard = self.hear().await;
            // A session's end is told at some time after the next one's beginning.
            if heard["happened"] != "disconnect" || happened == "disconnect" {
                assert_eq!(heard["happened"], happened, "{heard}");
                return heard;
            }
        }
    }

    async fn order(&mut self, order: &Value) {
        self.input
            .write_all(format!("{order}\n").as_bytes())
            .await
            .expect("the peer listens");
    }

    async fn kill(mut self) {
        self.child.kill().await.expect("our child");
    }
}

fn server(port: u16, refuse: u32) -> Value {
    json!({"port": port, "interval": 25, "timeout": 20, "refuse": refuse})
}

struct Client {
    events: mpsc::Receiver<SocketEvent>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Client {
    fn start(url: &str, tls: Option<Arc<rustls::ClientConfig>>) -> Self {
        let (out, events) = mpsc::channel(64);
        let signer = LocalSigner::new(Key::new(&Seed::new([1; 32])), Arc::new(WallClock));
        let config = Config {
            leads_now: Arc::new(|| true),
            validator: Signer::from_seed(&[2; 32]).hotkey().clone(),
            url: url.parse().expect("a URL"),
            dial: Arc::new(TcpDial),
            tls,
            timing: Timing {
                backoff_min: Duration::from_millis(20),
                backoff_max: Duration::from_millis(200),
                ..Timing::default()
            },
        };
        let socket = Socket::new(config, Arc::new(signer), out, fastrand::Rng::with_seed(5));
        let cancel = CancellationToken::new();
        let task = tokio::spawn(socket.run(cancel.clone()));
        Self { events, cancel, task }
    }

    /// Waits for an event; those that tell of the way there are passed over.
    async fn expect(&mut self, expected: SocketEvent) {
        let found = timeout(PATIENCE, async {
            while let Some(event) = self.events.recv().await {
                if event == expected {
                    return;
                }
                let other_event = matches!(event, SocketEvent::Event(_));
                assert!(!other_event, "{expected:?} was expected, not {event:?}");
            }
            panic!("the socket ended");
        });
        found.await.unwrap_or_else(|_| panic!("{expected:?} never came"));
    }

    async fn disconnected(&mut self) -> String {
        let found = timeout(PATIENCE, async {
            loop {
                if let Some(SocketEvent::Disconnected(why)) = self.events.recv().await {
                    return why;
                }
            }
        });
        found.await.expect("it notices")
    }

    async fn stop(self) {
        self.cancel.cancel();
        crate::ended(self.task, PATIENCE).await;
    }
}

fn image(name: &str) -> (Value, SocketEvent) {
    let event = Event::ImageCreated {
        image: name.to_owned(),
    };
    let order = json!({"emit": {"reason": "image_created", "data": {"image_id": name}}});
    (order, SocketEvent::Event(event))
}

#[tokio::test]
async fn python_socketio_serves_our_socket() {
    let Some(python) = python("our socket against python-socketio") else {
        return;
    };
    // Refused twice, then accepted.
    let mut peer = Peer::start(&python, "socket_server.py", &server(0, 2));
    let port = peer.expect("listening").await["port"].as_u64().expect("a port");
    let port = u16::try_from(port).expect("a port");
    let mut client = Client::start(&format!("ws://127.0.0.1:{port}/"), None);
    for _ in 0..2 {
        let connected = peer.expect("connect").await;
        assert_eq!(connected["transport"], "EIO=4&transport=websocket");
        assert_eq!(
            peer.expect("refused").await["good"],
            true,
            "the signature itself was good"
        );
        client
            .expect(SocketEvent::AuthFailed(
                "Authentication failed: refused".to_owned(),
            ))
            .await;
    }
    peer.expect("connect").await;
    let authenticated = peer.expect("authenticated").await;
    assert_eq!(
        authenticated["hotkey"],
        Signer::from_seed(&[1; 32]).hotkey().as_str()
    );
    client.expect(SocketEvent::Authenticated).await;
    // Events, small and fat, with text beyond ASCII.
    let (order, event) = image("one");
    peer.order(&order).await;
    client.expect(event).await;
    let fat = json!({"emit": {"reason": "image_created", "message": "ü", "data": {"image_id": "fat", "x": "ä".repeat(1_000_000)}}});
    peer.order(&fat).await;
    client.expect(image("fat").1).await;
    // Put out by the server, then back.
    peer.order(&json!({"disconnect": true})).await;
    assert_eq!(client.disconnected().await, "disconnected by the validator");
    peer.expect("connect").await;
    peer.expect("authenticated").await;
    client.expect(SocketEvent::Authenticated).await;
    // The server dies, stays away for a while, and is started again on the same port.
    peer.kill().await;
    client.disconnected().await;
    assert!(
        client.disconnected().await.contains("connect"),
        "while nobody listens"
    );
    let mut peer = Peer::start(&python, "socket_server.py", &server(port, 0));
    peer.expect("listening").await;
    peer.expect("connect").await;
    peer.expect("authenticated").await;
    client.expect(SocketEvent::Authenticated).await;
    let (order, event) = image("after");
    peer.order(&order).await;
    client.expect(event).await;
    // A goodbye is understood.
    client.stop().await;
    peer.expect("disconnect").await;
    peer.kill().await;
}

#[tokio::test]
async fn pings_of_python_socketio_are_answered_and_their_absence_noticed() {
    let Some(python) = python("keep-alive against python-socketio") else {
        return;
    };
    let quick = json!({"port": 0, "interval": 1, "timeout": 0.5, "refuse": 0});
    let mut peer = Peer::start(&python, "socket_server.py", &quick);
    let port = &peer.expect("listening").await["port"];
    let mut client = Client::start(&format!("ws://127.0.0.1:{port}/"), None);
    peer.expect("connect").await;
    peer.expect("authenticated").await;
    client.expect(SocketEvent::Authenticated).await;
    // A client that does not answer a ping is put out 0.5 s later. Some rounds on, it is still there: the
    // server would have told of a disconnect or another connect.
    let rounds = timeout(Duration::from_secs(4), peer.hear()).await;
    assert!(rounds.is_err(), "{rounds:?}");
    let (order, event) = image("still-there");
    peer.order(&order).await;
    client.expect(event).await;
    // Stopped, the server neither pings nor closes: the silence must be noticed.
    let process = i32::try_from(peer.child.id().expect("it runs")).expect("a process id");
    signal(process, "STOP").await;
    assert_eq!(client.disconnected().await, "nothing heard for 1.5s");
    signal(process, "CONT").await;
    client.expect(SocketEvent::Authenticated).await;
    client.stop().await;
    peer.kill().await;
}

async fn signal(process: i32, name: &str) {
    let sent = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(process.to_string())
        .status()
        .await;
    assert!(sent.expect("kill is there").success());
}

#[tokio::test]
async fn tls_of_python_is_trusted_by_its_root_and_refused_without() {
    let Some(python) = python("our socket over TLS against python-socketio") else {
        return;
    };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = tempfile::tempdir().expect("a folder");
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).expect("a certificate");
    let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).expect("writable");
    std::fs::write(&key, made.signing_key.serialize_pem()).expect("writable");
    let settings = json!({"port": 0, "interval": 25, "timeout": 20, "refuse": 0, "cert": cert, "key": key});
    let mut peer = Peer::start(&python, "socket_server.py", &settings);
    let port = &peer.expect("listening").await["port"];
    let url = format!("wss://127.0.0.1:{port}/");
    let mut distrusting = Client::start(&url, None);
    for _ in 0..2 {
        let why = distrusting.disconnected().await;
        assert!(why.contains("handshake") && why.contains("certificate"), "{why}");
    }
    distrusting.stop().await;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).expect("a certificate");
    let tls = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut client = Client::start(&url, Some(Arc::new(tls)));
    peer.expect("connect").await;
    peer.expect("authenticated").await;
    client.expect(SocketEvent::Authenticated).await;
    let (order, event) = image("sealed");
    peer.order(&order).await;
    client.expect(event).await;
    client.stop().await;
    peer.kill().await;
}

#[tokio::test]
async fn signatures_agree_with_substrate_interface_and_bittensor_wallet() {
    let Some(python) = python("signatures against substrate-interface and bittensor-wallet") else {
        return;
    };
    let mut peer = Peer::start(&python, "signatures.py", &Value::Null);
    for byte in [1_u8, 2, 0x5a] {
        let key = Key::new(&Seed::new([byte; 32]));
        let signer = LocalSigner::new(key, Arc::new(WallClock));
        let hotkey = signer.hotkey().clone();
        // Ours, checked by them.
        let headers = signer
            .to_validator(MessageKind::LaunchConfig)
            .await
            .expect("signed");
        let header = |name| &headers.iter().find(|(n, _)| *n == name).expect("all are there").1;
        let message = format!("{hotkey}:{}:launch", header(NONCE_HEADER));
        for (text, good) in [(message.clone(), true), (format!("{message}x"), false)] {
            peer.order(&json!({"verify": [hotkey.as_str(), text, header(SIGNATURE_HEADER)]}))
                .await;
            assert_eq!(peer.hear().await, json!({"substrate": good, "bittensor": good}));
        }
        // Theirs, checked by us.
        let seed = format!("0x{}", hex::encode([byte; 32]));
        let message = format!("{hotkey}:{}:registry", WallClock.now().unix_seconds());
        peer.order(&json!({"sign": [seed, message]})).await;
        let signed = peer.hear().await;
        assert_eq!(signed["ss58"], hotkey.as_str());
        for library in ["substrate", "bittensor"] {
            let signature = hex::decode(signed[library].as_str().expect("hex")).expect("hex");
            let theirs = Hotkey::parse(signed["ss58"].as_str().expect("text")).expect("an address");
            assert!(theirs.verifies(message.as_bytes(), &signature), "{library}");
            assert!(!theirs.verifies(b"another message", &signature), "{library}");
        }
    }
    peer.kill().await;
}

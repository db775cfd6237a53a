//! A registry that answers what a test tells it to, byte by byte, and remembers what it was asked.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use agent::registry::credentials::Credentials;
use agent::registry::metrics::Metrics;
use agent::registry::redirect::Follower;
use agent::registry::upstream::Origin;
use agent::registry::{Config, Service, store, upstream};
use coordinator::clock::ManualClock;
use protocol::hotkey::Hotkey;
use protocol::link::RegistryHeaders;
use protocol::time::UnixMillis;
use ring::digest::{SHA256, digest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub(crate) const NOW: UnixMillis = UnixMillis(1_000_000);

/// One step of an answer.
pub(crate) enum Step {
    Send(Vec<u8>),
    /// Waits until the test gives a permit.
    Wait(Arc<Semaphore>),
    Close,
}

/// A whole answer with a length.
pub(crate) fn answer(status: &str, headers: &str, body: &[u8]) -> Vec<Step> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    vec![Step::Send([head.as_bytes(), body].concat())]
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(digest(&SHA256, bytes)))
}

type Script = dyn Fn(&str) -> Vec<Step> + Send + Sync;

pub(crate) struct FakeUpstream {
    pub(crate) address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
}

impl FakeUpstream {
    /// Serves `script`, which gets the head of each request.
    pub(crate) async fn start(script: impl Fn(&str) -> Vec<Step> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let heads = Arc::new(Mutex::new(Vec::new()));
        let (script, kept): (Arc<Script>, _) = (Arc::new(script), Arc::clone(&heads));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&script), Arc::clone(&kept)));
            }
        });
        Self { address, heads }
    }

    /// Heads of all requests so far.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.heads.lock().expect("not poisoned").clone()
    }
}

async fn serve(mut stream: TcpStream, script: Arc<Script>, heads: Arc<Mutex<Vec<String>>>) {
    let mut bytes = Vec::new();
    loop {
        while !bytes.ends_with(b"\r\n\r\n") {
            match stream.read_buf(&mut bytes).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
        let head = String::from_utf8(std::mem::take(&mut bytes)).expect("heads are text");
        heads.lock().expect("not poisoned").push(head.clone());
        for step in script(&head) {
            match step {
                Step::Send(bytes) => {
                    if stream.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
                Step::Wait(gate) => gate.acquire().await.expect("open").forget(),
                Step::Close => return,
            }
        }
    }
}

/// A registry door in front of upstreams, one validator for each, all signed for.
pub(crate) struct Door {
    pub(crate) base: String,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) credentials: Credentials,
    pub(crate) validators: Vec<Hotkey>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) served: tokio::task::JoinHandle<()>,
}

impl Door {
    pub(crate) async fn start(upstreams: &[SocketAddr], store: Option<store::Config>) -> Self {
        Self::start_following(upstreams, store, None).await
    }

    pub(crate) async fn start_following(
        upstreams: &[SocketAddr],
        store: Option<store::Config>,
        follower: Option<Follower>,
    ) -> Self {
        let validators: Vec<Hotkey> = (1..=upstreams.len())
            .map(|n| Hotkey::from_public_key(&[n as u8; 32]))
            .collect();
        let config = Config {
            listen: "127.0.0.1:0".parse().expect("an address"),
            upstreams: validators
                .iter()
                .zip(upstreams)
                .map(|(validator, address)| upstream::Config {
                    validator: validator.clone(),
                    origin: Origin::parse(&format!("http://{address}")).expect("loopback"),
                    ca_file: None,
                })
                .collect(),
            connect_timeout: std::time::Duration::from_secs(2),
            idle_timeout: std::time::Duration::from_secs(2),
            connections_max: 64,
            store,
            storage_ca_file: None,
        };
        let credentials = Credentials::new(Arc::new(ManualClock::at(NOW)));
        credentials
            .replace(
                validators
                    .iter()
                    .map(|validator| signed(validator, NOW + 60_000))
                    .collect(),
            )
            .expect("valid headers");
        let metrics = Arc::new(Metrics::default());
        let service = Service::bind(&config, credentials.clone(), follower, Arc::clone(&metrics))
            .await
            .expect("a free port");
        let base = format!("http://{}", service.local_addr().expect("bound"));
        let shutdown = CancellationToken::new();
        let served = tokio::spawn(service.serve(shutdown.clone()));
        Self {
            base,
            metrics,
            credentials,
            validators,
            shutdown,
            served,
        }
    }

    /// Ends it and waits, so that its store may be opened again.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        self.served.await.expect("no panic");
    }
}

/// A header set as a member of the coordinator makes it.
pub(crate) fn signed(validator: &Hotkey, expires_at: UnixMillis) -> RegistryHeaders {
    let headers = [
        ("X-Chutes-Hotkey", "miner"),
        ("X-Chutes-Nonce", "1735689600"),
        ("X-Chutes-Signature", "ab12"),
    ];
    RegistryHeaders {
        validator: validator.clone(),
        headers: headers
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        expires_at,
    }
}

/// A client that follows no redirect and keeps no proxy of the environment.
pub(crate) fn client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .build()
        .expect("a client")
}

/// Sends bytes as they are and reads to the end.
pub(crate) async fn raw(base: &str, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(base.trim_start_matches("http://"))
        .await
        .expect("listening");
    stream.write_all(request).await.expect("sent");
    stream.shutdown().await.expect("half closed");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("read");
    String::from_utf8_lossy(&answer).into_owned()
}

//! Blobs that a registry redirects to object storage: followed over TLS, through the egress seam, shared.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::fake_upstream::{Door, FakeUpstream, answer, client, sha256};
use agent::egress::Network;
use agent::egress::address::Checked;
use agent::egress::network::{Dial, DialError, NotResolved, Pending, Resolve};
use agent::egress::policy::Name;
use agent::registry::redirect::{Config, Follower};
use agent::registry::store;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpStream;

const STORAGE: &str = "storage.example";

/// Resolves every name to one address and sends what passes the check to one listener.
struct FakeNetwork {
    address: IpAddr,
    listener: SocketAddr,
}

impl Resolve for FakeNetwork {
    fn resolve<'a>(&'a self, _: &'a Name) -> Pending<'a, Result<Vec<IpAddr>, NotResolved>> {
        Box::pin(std::future::ready(Ok(vec![self.address])))
    }
}

impl Dial for FakeNetwork {
    fn dial(&self, _: Checked) -> Pending<'_, Result<TcpStream, DialError>> {
        Box::pin(async move { Ok(TcpStream::connect(self.listener).await?) })
    }
}

/// TLS storage for [`STORAGE`] that answers every request with `blob`; heads and its certificate's file.
fn start_storage(
    blob: Vec<u8>,
    folder: &tempfile::TempDir,
) -> (SocketAddr, Arc<Mutex<Vec<String>>>, PathBuf) {
    let made = rcgen::generate_simple_self_signed([STORAGE.to_owned()]).expect("a certificate");
    let ca_file = folder.path().join("storage.pem");
    std::fs::write(&ca_file, made.cert.pem()).expect("written");
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring speaks them")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .expect("a fitting key");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let (config, heads) = (Arc::new(config), Arc::new(Mutex::new(Vec::new())));
    let kept = Arc::clone(&heads);
    #[expect(
        clippy::disallowed_methods,
        reason = "a blocking TLS server beside the runtime under test"
    )]
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let session = rustls::ServerConnection::new(Arc::clone(&config)).expect("a session");
            let mut stream = rustls::StreamOwned::new(session, stream.expect("accepted"));
            let (mut head, mut byte) = (Vec::new(), [0]);
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
                head.push(byte[0]);
            }
            if head.is_empty() {
                continue;
            }
            kept.lock()
                .expect("not poisoned")
                .push(String::from_utf8_lossy(&head).to_lowercase());
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                blob.len()
            );
            let _ = stream
                .write_all(answer.as_bytes())
                .and_then(|()| stream.write_all(&blob));
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    });
    (address, heads, ca_file)
}

fn follower(address: &str, listener: SocketAddr, ca_file: Option<PathBuf>) -> Option<Follower> {
    let fake = Arc::new(FakeNetwork {
        address: address.parse().expect("an address"),
        listener,
    });
    let network = Network {
        resolve: Arc::<FakeNetwork>::clone(&fake),
        dial: fake,
    };
    let timeout = Duration::from_secs(5);
    let config = Config {
        network,
        own_addresses: Vec::new(),
        ca_file,
        connect_timeout: timeout,
        answer_timeout: timeout,
    };
    Some(Follower::new(config).expect("certificates"))
}

fn store_in(folder: &tempfile::TempDir, name: &str) -> Option<store::Config> {
    Some(store::Config {
        directory: folder.path().join(name),
        bytes_max: 1 << 30,
        free_bytes_min: 0,
    })
}

async fn redirecting(location: String) -> FakeUpstream {
    FakeUpstream::start(move |_| {
        answer(
            "307 Temporary Redirect",
            &format!("Location: {location}\r\n"),
            b"",
        )
    })
    .await
}

#[tokio::test]
async fn a_redirected_blob_is_fetched_once_without_credentials_and_shared() {
    let folder = tempfile::tempdir().expect("a folder");
    let blob = vec![42; 1 << 20];
    let (storage, heads, ca_file) = start_storage(blob.clone(), &folder);
    let upstream = redirecting(format!("https://{STORAGE}/bucket/x?signature=y")).await;
    let follower = follower("8.8.8.8", storage, Some(ca_file));
    let door = Door::start_following(&[upstream.address], store_in(&folder, "store"), follower).await;
    for _ in 0..3 {
        let url = format!("{}/v2/a/blobs/{}", door.base, sha256(&blob));
        let response = client()
            .get(url)
            .header("Authorization", "Basic x")
            .send()
            .await
            .expect("a head");
        assert_eq!(response.status(), 200);
        assert!(response.bytes().await.expect("whole") == blob);
    }
    let heads = heads.lock().expect("not poisoned").clone();
    assert_eq!((heads.len(), upstream.heads().len()), (1, 1));
    assert!(
        heads[0].starts_with("get /bucket/x?signature=y http/1.1\r\n"),
        "{}",
        heads[0]
    );
    assert!(heads[0].contains(&format!("host: {STORAGE}\r\n")));
    assert!(
        !heads[0].contains("x-chutes") && !heads[0].contains("authorization"),
        "{}",
        heads[0]
    );
}

#[tokio::test]
async fn redirects_to_where_we_do_not_go_are_left_to_the_client() {
    let folder = tempfile::tempdir().expect("a folder");
    let blob = vec![42; 1000];
    let (storage, heads, ca_file) = start_storage(blob.clone(), &folder);
    let good = format!("https://{STORAGE}/x");
    for (n, (location, address, trusted)) in [
        (good.clone(), "10.0.0.1", true),
        (good.clone(), "169.254.169.254", true),
        (good.clone(), "127.0.0.1", true),
        (good, "8.8.8.8", false),
        (format!("http://{STORAGE}/x"), "8.8.8.8", true),
        (format!("https://127.0.0.1:{}/x", storage.port()), "8.8.8.8", true),
        (format!("https://user@{STORAGE}/x"), "8.8.8.8", true),
        ("https://other.example/x".to_owned(), "8.8.8.8", true),
        ("/relative".to_owned(), "8.8.8.8", true),
    ]
    .into_iter()
    .enumerate()
    {
        let upstream = redirecting(location.clone()).await;
        let follower = follower(address, storage, trusted.then(|| ca_file.clone()));
        let store = store_in(&folder, &format!("store-{n}"));
        let door = Door::start_following(&[upstream.address], store, follower).await;
        let url = format!("{}/v2/a/blobs/{}", door.base, sha256(&blob));
        let response = client().get(url).send().await.expect("a head");
        assert_eq!(response.status(), 307, "{location} at {address}");
        assert_eq!(response.headers()["location"], location.as_str());
        door.stop().await;
    }
    assert_eq!(heads.lock().expect("not poisoned").len(), 0);
}

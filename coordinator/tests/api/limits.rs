//! Over a real connection on loopback: sizes, times, broken requests, a log that does not answer, a stop.

use std::sync::Arc;
use std::time::Duration;

use crate::fixture::LastListings;
use coordinator::api::{Alone, Config, Deps, Limits, router, serve};
use coordinator::backup::Door;
use coordinator::leader::Scheduling;
use coordinator::store::{BoxFuture, Error, Log, Machine, Store};
use coordinator_core::state_machine::codec::encode_answer;
use coordinator_core::state_machine::{Faults, Reply};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::fixture::{Fixture, LOOPBACK, Members, Reports, Types, signer};

/// Sends bytes, reads until the other side closes.
async fn exchange(address: std::net::SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The other side may close before it has read everything.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

async fn served(
    fixture: &Fixture,
    limits: Limits,
) -> (
    std::net::SocketAddr,
    CancellationToken,
    tokio::task::JoinHandle<()>,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let config = Config {
        miner: fixture.miner.hotkey().clone(),
        member: "host-1".to_owned(),
        allow_plain_legacy_writes: false,
        limits,
    };
    let deps = Deps {
        supported_gpus: Arc::new(Types::default()),
        hosts: Arc::new(Reports::default()),
        validator_listing: Arc::new(LastListings::default()),
        scheduling: Scheduling::default(),
        cluster: Arc::new(Members::default()),
        others: Arc::new(Alone),
        backup: Door::default(),
        signer: signer(),
        workers: None,
    };
    let limits = config.limits;
    let routes = router(config, fixture.store.clone(), deps);
    let task = tokio::spawn(serve(routes, limits, listener, stop.clone()));
    (address, stop, task)
}

#[tokio::test]
async fn a_real_connection_serves_and_stops() {
    let fixture = Fixture::busy().await;
    let (address, stop, task) = served(&fixture, Limits::default()).await;
    let get = |path: &str, headers: &[(&'static str, String)]| {
        let headers: String = headers
            .iter()
            .map(|(name, value)| format!("{name}: {value}\r\n"))
            .collect();
        format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{headers}Connection: close\r\n\r\n")
    };
    let answer = exchange(
        address,
        get("/servers/", &fixture.original("GET", b"")).as_bytes(),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    let lock = "/servers/gpu-a/lock";
    let answer = exchange(address, get(lock, &fixture.original("GET", b"")).as_bytes()).await;
    assert!(
        answer.contains(r#""locked":true"#),
        "the peer counts as loopback: {answer}"
    );
    let answer = exchange(address, b"NONSENSE\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(10), task)
        .await
        .expect("it stops")
        .expect("without a panic");
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_before_it_is_checked() {
    let fixture = Fixture::busy().await;
    let body = "x".repeat(Limits::default().body_bytes_max + 1);
    for path in ["/servers/", "/v1/stop"] {
        let answer = fixture.ask("POST", path, &body).await;
        assert_eq!(answer.status.as_u16(), 413, "{path}");
        assert!(answer.detail().contains("1048576 bytes"), "{}", answer.text());
    }
    let answer = fixture.send("POST", "/servers/", &[], &body, LOOPBACK).await;
    assert_eq!(answer.status.as_u16(), 413);
    let answer = fixture.ask("POST", "/servers/", &body[1..]).await;
    assert_eq!(answer.status.as_u16(), 422, "the largest one is read");
    // The length is not believed either: pieces are counted.
    let (address, _stop, _task) = served(&fixture, Limits::default()).await;
    let head = "POST /servers/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut request = head.as_bytes().to_vec();
    for _ in 0..3 {
        request.extend_from_slice(format!("{:x}\r\n{}\r\n", 500_000, "y".repeat(500_000)).as_bytes());
    }
    let answer = exchange(address, &request).await;
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 413"),
        "{answer}"
    );
}

#[tokio::test]
async fn who_sends_nothing_is_let_go() {
    let fixture = Fixture::new().await;
    let limits = Limits {
        request_read_max: Duration::from_millis(200),
        connections_max: 1,
        ..Limits::default()
    };
    let (address, _stop, _task) = served(&fixture, limits).await;
    // The one place is taken: the next one is closed at once, until the first is let go.
    let _idle = TcpStream::connect(address).await.unwrap();
    let answer = exchange(
        address,
        b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert_eq!(answer, "");
    while !exchange(
        address,
        b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    .await
    .contains("pong")
    {
        tokio::task::yield_now().await;
    }
    let answer = exchange(address, b"GET /ping HTT").await;
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 408"),
        "{answer}"
    );
    let head = b"POST /servers/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 10\r\n\r\n12345";
    let answer = exchange(address, head).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("the body did not arrive in time"), "{answer}");
}

/// A log without a quorum.
#[derive(Debug)]
struct NoQuorum;

impl Log for NoQuorum {
    fn propose(&self, _: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, Error>> {
        Box::pin(std::future::ready(Err(Error::OutcomeUnknown(
            "no quorum".to_owned(),
        ))))
    }

    fn linearizable(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(std::future::ready(Err(Error::Unavailable(
            "no quorum".to_owned(),
        ))))
    }

    fn leads_now(&self) -> bool {
        false
    }
}

/// A log that loses its quorum right after a write.
#[derive(Debug)]
struct LastWrite;

impl Log for LastWrite {
    fn propose(&self, _: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, Error>> {
        Box::pin(std::future::ready(Ok(encode_answer(&Ok(Reply::Done)))))
    }

    fn linearizable(&self) -> BoxFuture<'_, Result<(), Error>> {
        NoQuorum.linearizable()
    }

    fn leads_now(&self) -> bool {
        false
    }
}

/// It was said that nothing was changed.
#[tokio::test]
async fn a_write_that_is_not_seen_yet_is_said_to_be_done() {
    let fixture = Fixture::with(false, |store| {
        let machine = Machine::new(Faults::none());
        Store::new(machine, Arc::new(LastWrite), Arc::clone(store.clock()), 1)
    })
    .await;
    let hotkey = |seed| protocol::hotkey::Signer::from_seed(&[seed; 32]).hotkey().clone();
    let (old, new) = (hotkey(1), hotkey(2));
    let body = format!(r#"{{"old":"{old}","new":"{new}","sealed_key":"00"}}"#);
    let answer = fixture.ask("POST", "/v1/hotkey", &body).await;
    assert_eq!(answer.status.as_u16(), 503);
    assert!(
        answer.detail().starts_with("it was done, but"),
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn without_a_quorum_nothing_is_claimed() {
    let fixture = Fixture::with(false, |store| {
        let machine = Machine::new(Faults::none());
        Store::new(machine, Arc::new(NoQuorum), Arc::clone(store.clock()), 1)
    })
    .await;
    for (method, path) in [
        ("GET", "/servers/"),
        ("GET", "/v1/status"),
        ("DELETE", "/deployments/purge"),
        ("GET", "/servers/gpu-a/lock"),
    ] {
        let answer = fixture.ask(method, path, "").await;
        assert_eq!(answer.status.as_u16(), 503, "{method} {path}");
        assert!(answer.detail().contains("no quorum"), "{}", answer.text());
    }
    let read = fixture.ask("GET", "/servers/", "").await;
    assert!(read.detail().contains("nothing was changed"), "{}", read.text());
    let written = fixture
        .ask("PUT", "/v1/observing", r#"{"observing":false}"#)
        .await;
    assert!(written.detail().contains("it is not known"), "{}", written.text());
    for (path, status) in [("/ping", 200), ("/ready", 503)] {
        let answer = fixture.send("GET", path, &[], "", LOOPBACK).await;
        assert_eq!(answer.status.as_u16(), status, "{path}");
    }
    let (_, metrics) = fixture.prometheus("/metrics").await;
    assert!(metrics.contains("coordinator_leads 0\n"), "{metrics}");
}

//! The egress door as a chute meets it: with curl where it is installed, and byte by byte.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use agent::config::units::Span;
use agent::egress::address::Checked;
use agent::egress::metrics::Metrics;
use agent::egress::network::{Dial, DialError, NotResolved, Pending, Resolve};
use agent::egress::policy::{Mode, Name, Reason};
use agent::egress::{Config, Network, RawConfig, Service};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

const PUBLIC: &str = "8.8.8.8";

/// Names with the addresses that they resolve to; whatever passes the check is answered by one listener.
struct FakeNetwork {
    names: BTreeMap<&'static str, &'static [&'static str]>,
    listener: SocketAddr,
}

impl Resolve for FakeNetwork {
    fn resolve<'a>(&'a self, name: &'a Name) -> Pending<'a, Result<Vec<IpAddr>, NotResolved>> {
        let found = self.names.get(name.as_str());
        let addresses = found.map(|texts| {
            texts
                .iter()
                .map(|text| text.parse().expect("an address"))
                .collect()
        });
        Box::pin(std::future::ready(
            addresses.ok_or_else(|| NotResolved("no such name".to_owned())),
        ))
    }
}

impl Dial for FakeNetwork {
    fn dial(&self, address: Checked) -> Pending<'_, Result<TcpStream, DialError>> {
        Box::pin(async move {
            assert_eq!(
                address.socket_addr().ip().to_string(),
                PUBLIC,
                "only public addresses get here"
            );
            Ok(TcpStream::connect(self.listener).await?)
        })
    }
}

struct Door {
    address: SocketAddr,
    metrics: Arc<Metrics>,
    _shutdown: tokio_util::sync::DropGuard,
}

impl Door {
    async fn start(change: impl FnOnce(&mut RawConfig), listener: SocketAddr) -> Self {
        let names = BTreeMap::from([
            ("cdn.hf.co", &[PUBLIC][..]),
            ("api.validator.example", &[PUBLIC]),
            ("nope.example", &[PUBLIC]),
            ("loopback.hf.co", &["127.0.0.1"]),
            ("private.hf.co", &["10.1.2.3"]),
            ("metadata.hf.co", &["169.254.169.254"]),
            ("mapped.hf.co", &["::ffff:10.0.0.1"]),
            ("cgnat.hf.co", &["100.64.0.1"]),
            ("mixed.hf.co", &[PUBLIC, "192.168.0.1"]),
            ("own.hf.co", &["9.9.9.9"]),
            ("empty.hf.co", &[]),
        ]);
        let mut raw = RawConfig {
            listen: "127.0.0.1:0".parse().expect("an address"),
            own_addresses: vec!["9.9.9.9".parse().expect("an address")],
            ..RawConfig::default()
        };
        change(&mut raw);
        let config = Config::check(&raw, ["api.validator.example", "127.0.1.1"]).expect("valid");
        let fake = Arc::new(FakeNetwork { names, listener });
        let network = Network {
            resolve: Arc::<FakeNetwork>::clone(&fake),
            dial: fake,
        };
        let metrics = Arc::new(Metrics::default());
        let service = Service::bind(&config, network, Arc::clone(&metrics))
            .await
            .expect("a free port");
        let address = service.local_addr().expect("bound");
        let shutdown = CancellationToken::new();
        tokio::spawn(service.serve(shutdown.clone()));
        Self {
            address,
            metrics,
            _shutdown: shutdown.drop_guard(),
        }
    }

    /// Sends a head and returns all that comes back.
    async fn ask(&self, head: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.expect("listening");
        stream.write_all(head.as_bytes()).await.expect("sent");
        stream.shutdown().await.expect("half closed");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        answer
    }
}

/// A site that answers every HTTP request with one word.
async fn start_site() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut bytes = Vec::new();
                while !bytes.ends_with(b"\r\n\r\n")
                    && stream.read_buf(&mut bytes).await.is_ok_and(|read| read > 0)
                {}
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\nreached";
                let _ = stream.write_all(answer).await;
            });
        }
    });
    address
}

/// Echoes until the other side ends, then ends too.
async fn start_echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    address
}

#[tokio::test]
async fn curl_reaches_allowed_names_and_nothing_else() {
    let installed = Command::new("curl").arg("--version").output().await.is_ok();
    if !installed {
        assert!(
            std::env::var_os("REQUIRE_PEERS").is_none(),
            "curl is required (see .ci/peers)"
        );
        eprintln!("NOT TESTED: the egress door with curl, since it is not installed");
        return;
    }
    let door = Door::start(|_| {}, start_site().await).await;
    let proxy = format!("http://{}", door.address);
    let curl = |arguments: &[&str]| {
        let mut command = Command::new("curl");
        command
            .args(["-sS", "-i", "--noproxy", "", "--max-time", "20", "-x", &proxy])
            .args(arguments);
        async move {
            let output = command.kill_on_drop(true).output().await.expect("started");
            (
                output.status.success(),
                String::from_utf8_lossy(&output.stdout).into_owned(),
            )
        }
    };
    for url in [
        "http://cdn.hf.co:443/",
        "http://CDN.HF.CO.:443/",
        "http://api.validator.example:443/",
    ] {
        let (fine, text) = curl(&["-p", url]).await;
        assert!(fine && text.ends_with("reached"), "{url}: {text}");
    }
    for (url, status, reason) in [
        ("http://nope.example:443/", 403, "not-listed"),
        ("http://hf.co.nope.example:443/", 403, "not-listed"),
        ("http://127.0.0.1:443/", 403, "ip-literal"),
        ("http://8.8.8.8:443/", 403, "ip-literal"),
        ("http://2130706433:443/", 403, "ip-literal"),
        ("http://0x7f000001:443/", 403, "ip-literal"),
        ("http://0177.0.0.1:443/", 403, "ip-literal"),
        ("http://127.1:443/", 403, "ip-literal"),
        ("http://[::1]:443/", 403, "ip-literal"),
        ("http://[2606:4700::1111]:443/", 403, "ip-literal"),
        ("http://[::ffff:127.0.0.1]:443/", 403, "ip-literal"),
        ("http://loopback.hf.co:443/", 403, "address"),
        ("http://private.hf.co:443/", 403, "address"),
        ("http://metadata.hf.co:443/", 403, "address"),
        ("http://mapped.hf.co:443/", 403, "address"),
        ("http://cdn.hf.co:8443/", 403, "port"),
        ("http://cdn.hf.co:80/", 403, "port"),
        ("http://unknown.hf.co:443/", 502, "not-resolved"),
    ] {
        let (fine, text) = curl(&["-p", url]).await;
        assert!(!fine, "{url}: {text}");
        assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{url}: {text}");
        assert!(
            text.contains(&format!("X-Chutes-Egress-Reason: {reason}\r\n")),
            "{url}: {text}"
        );
    }
    // Without a tunnel: plain HTTP, as the original let through.
    let (_, text) = curl(&["http://cdn.hf.co/"]).await;
    assert!(
        text.starts_with("HTTP/1.1 405 ") && text.contains("X-Chutes-Egress-Reason: method"),
        "{text}"
    );
    assert_eq!(door.metrics.allowed(Reason::Listed), 2);
    assert_eq!(door.metrics.allowed(Reason::Validator), 1);
    assert_eq!(door.metrics.denied(Reason::IpLiteral), 9);
    assert_eq!(door.metrics.denied(Reason::Address), 4);
}

#[tokio::test]
async fn every_refusal_carries_its_reason() {
    let door = Door::start(|_| {}, start_site().await).await;
    let connect = |target: &str| format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
    for (head, status, reason) in [
        (connect("2130706433:443"), "403", "ip-literal"),
        (connect("0x7f.1:443"), "403", "ip-literal"),
        (connect("017700000001:443"), "403", "ip-literal"),
        (connect("127.0.0.1.:443"), "403", "ip-literal"),
        (connect("::ffff:127.0.0.1:443"), "403", "ip-literal"),
        (connect("[fe80::1%25eth0]:443"), "403", "ip-literal"),
        (connect("user@cdn.hf.co:443"), "403", "invalid-name"),
        (connect("localhost:443"), "403", "invalid-name"),
        (connect("cgnat.hf.co:443"), "403", "address"),
        (connect("mixed.hf.co:443"), "403", "address"),
        (connect("own.hf.co:443"), "403", "address"),
        (connect("empty.hf.co:443"), "502", "not-resolved"),
        (connect("cdn.hf.co:22"), "403", "port"),
        (connect("cdn.hf.co"), "400", "bad-request"),
        (connect("cdn.hf.co:99999"), "400", "bad-request"),
        (
            "GET http://cdn.hf.co/ HTTP/1.1\r\n\r\n".to_owned(),
            "405",
            "method",
        ),
        (
            "POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc".to_owned(),
            "405",
            "method",
        ),
        (
            "CONNECT cdn.hf.co:443 HTTP/1.1\nX: y\r\n\r\n".to_owned(),
            "400",
            "bad-request",
        ),
        (
            format!(
                "CONNECT cdn.hf.co:443 HTTP/1.1\r\nX: {}\r\n\r\n",
                "y".repeat(9000)
            ),
            "400",
            "bad-request",
        ),
    ] {
        let answer = door.ask(&head).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{head:.60}: {answer}"
        );
        assert!(
            answer.contains(&format!("X-Chutes-Egress-Reason: {reason}\r\n")),
            "{head:.60}: {answer}"
        );
        assert!(
            answer.contains(&format!("denied ({reason}): ")),
            "{head:.60}: {answer}"
        );
    }
}

#[tokio::test]
async fn report_mode_still_checks_addresses() {
    let door = Door::start(|raw| raw.mode = Mode::Report, start_site().await).await;
    let connect = |name: &str| format!("CONNECT {name}:443 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n");
    let answer = door.ask(&connect("nope.example")).await;
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("reached"),
        "{answer}"
    );
    assert_eq!(door.metrics.allowed(Reason::ReportedOnly), 1);
    for (name, reason) in [("loopback.hf.co", "address"), ("127.0.0.1", "ip-literal")] {
        assert!(
            door.ask(&connect(name))
                .await
                .contains(&format!("Reason: {reason}")),
            "{name}"
        );
    }
}

#[tokio::test]
async fn tunnels_carry_both_ways_and_close_by_halves() {
    let door = Door::start(|_| {}, start_echo().await).await;
    let mut stream = TcpStream::connect(door.address).await.expect("listening");
    // What follows the head in the same packet belongs to the tunnel.
    stream
        .write_all(b"CONNECT cdn.hf.co:443 HTTP/1.1\r\n\r\nearly")
        .await
        .expect("sent");
    let established = b"HTTP/1.1 200 Connection established\r\n\r\n";
    let mut answer = vec![0; established.len() + 5];
    stream.read_exact(&mut answer).await.expect("read");
    assert_eq!(answer, [&established[..], b"early"].concat());
    let sent: Vec<u8> = (0..5_000_000_u32).map(|n| (n / 7) as u8).collect();
    let (mut read, mut write) = stream.split();
    let mut echoed = Vec::new();
    let writing = async {
        write.write_all(&sent).await.expect("sent");
        write.shutdown().await.expect("half closed");
    };
    let (_, got) = tokio::join!(writing, read.read_to_end(&mut echoed));
    got.expect("read to the end");
    assert!(echoed == sent);
    assert_eq!(door.metrics.sent_bytes.get(), sent.len() as u64 + 5);
    assert_eq!(door.metrics.received_bytes.get(), sent.len() as u64 + 5);
}

#[tokio::test]
async fn slow_heads_idle_tunnels_and_crowds_are_ended() {
    let brief = Span(Duration::from_millis(200));
    let door = Door::start(
        |raw| {
            raw.head_timeout = brief;
            raw.idle_timeout = brief;
            raw.connections_max = 2;
        },
        start_echo().await,
    )
    .await;
    let mut slow = TcpStream::connect(door.address).await.expect("listening");
    slow.write_all(b"CONNECT cdn.hf.co").await.expect("sent");
    let mut answer = String::new();
    slow.read_to_string(&mut answer).await.expect("read");
    assert!(
        answer.starts_with("HTTP/1.1 400 ") && answer.contains("took too long"),
        "{answer}"
    );
    drop(slow);

    let mut open = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(door.address).await.expect("listening");
        stream
            .write_all(b"CONNECT cdn.hf.co:443 HTTP/1.1\r\n\r\n")
            .await
            .expect("sent");
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.expect("read");
        open.push(stream);
    }
    let answer = door.ask("").await;
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.contains("Reason: busy"),
        "{answer}"
    );
    for mut stream in open {
        let mut rest = Vec::new();
        // Cut from our side, by an end or a reset: what matters is that it ends.
        let _ = stream.read_to_end(&mut rest).await;
    }
}

#[cfg(feature = "dev")]
mod table {
    use super::*;
    use agent::egress::table::{Row, Table};

    #[tokio::test]
    async fn the_development_table_replaces_the_seam_and_not_the_checks() {
        let site = start_site().await;
        let row = |name: &str, address: &str| Row {
            name: name.to_owned(),
            addresses: vec![address.parse().expect("an address")],
            listener: site,
        };
        let raw = RawConfig {
            listen: "127.0.0.1:0".parse().expect("an address"),
            table: Some(vec![row("cdn.hf.co", "8.8.8.8"), row("inside.hf.co", "10.0.0.1")]),
            ..RawConfig::default()
        };
        let config = Config::check(&raw, []).expect("valid");
        let network = Network::new(&config).expect("a table");
        let service = Service::bind(&config, network, Arc::default())
            .await
            .expect("a free port");
        let address = service.local_addr().expect("bound");
        tokio::spawn(service.serve(CancellationToken::new()));
        let ask = |name: &'static str| async move {
            let mut stream = TcpStream::connect(address).await.expect("listening");
            let text = format!("CONNECT {name}:443 HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n");
            stream.write_all(text.as_bytes()).await.expect("sent");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("read");
            answer
        };
        assert!(ask("cdn.hf.co").await.ends_with("reached"));
        assert!(ask("inside.hf.co").await.contains("Reason: address"));
        assert!(ask("other.hf.co").await.contains("Reason: not-resolved"));
        let outside = Row {
            listener: "8.8.8.8:443".parse().expect("an address"),
            ..row("x.hf.co", "8.8.8.8")
        };
        assert!(Table::new(&[outside]).is_err());
    }
}

/// Without the feature `dev` there is no setting that replaces the seam.
#[cfg(not(feature = "dev"))]
#[test]
fn shipped_builds_know_no_table() {
    let refused = serde_json::from_str::<RawConfig>(r#"{"table": []}"#);
    assert!(refused.is_err_and(|error| error.to_string().contains("unknown field `table`")));
}

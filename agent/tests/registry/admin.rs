//! The data plane as a process runs it: fed through its admin socket, asked through its doors.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use agent::data_plane::{Config, DataPlane};
use agent::{cache, egress, registry};
use coordinator::clock::ManualClock;
use protocol::hotkey::Hotkey;
use protocol::time::UnixMillis;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio_util::sync::CancellationToken;

/// One request over the admin socket; status and body come back.
async fn admin(socket: &Path, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).await.expect("listening");
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("sent");
    stream.write_all(body.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|word| word.parse().ok())
        .expect("a status");
    (
        status,
        answer.split_once("\r\n\r\n").expect("a head").1.to_owned(),
    )
}

#[tokio::test]
async fn the_admin_socket_feeds_the_doors() {
    let folder = tempfile::tempdir().expect("a folder");
    let upstream = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = upstream.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = upstream.accept().await {
            let mut bytes = Vec::new();
            while !bytes.ends_with(b"\r\n\r\n")
                && stream.read_buf(&mut bytes).await.is_ok_and(|read| read > 0)
            {}
            let signed = String::from_utf8_lossy(&bytes)
                .to_lowercase()
                .contains("x-chutes-nonce: 5\r\n");
            let body = if signed { "signed" } else { "absent" };
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n{body}");
            stream.write_all(answer.as_bytes()).await.expect("sent");
        }
    });
    let validator = Hotkey::from_public_key(&[1; 32]);
    let any = "127.0.0.1:0".parse().expect("an address");
    let raw_registry = registry::RawConfig {
        listen: any,
        ..registry::RawConfig::default()
    };
    let upstreams = [registry::RawUpstream {
        hotkey: validator.to_string(),
        registry: format!("http://{address}"),
        ca_file: None,
    }];
    let name_servers = vec!["127.0.0.1".parse().expect("an address")];
    let raw_egress = egress::RawConfig {
        listen: any,
        name_servers,
        ..egress::RawConfig::default()
    };
    let models = folder.path().join("models");
    std::fs::create_dir_all(models.join("c1/hub/models--a--b")).expect("made");
    let raw_cache = cache::RawConfig {
        directory: Some(models),
        ..cache::RawConfig::default()
    };
    let socket = folder.path().join("run/data.sock");
    let config = Config {
        registry: registry::Config::check(&raw_registry, &upstreams, folder.path().join("blobs"))
            .expect("valid"),
        egress: egress::Config::check(&raw_egress, []).expect("valid"),
        cache: cache::Config::check(&raw_cache).expect("valid"),
        socket: socket.clone(),
    };
    let plane = DataPlane::bind(config, Arc::new(ManualClock::at(UnixMillis(1_000))))
        .await
        .expect("free ports");
    let (door, _) = plane.local_addrs().expect("bound");
    let shutdown = CancellationToken::new();
    let served = tokio::spawn(plane.serve(shutdown.clone()));
    let mode = std::fs::metadata(&socket).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    assert_eq!(admin(&socket, "GET", "/ping", "").await, (200, "pong".to_owned()));
    let pull = || async move {
        let mut stream = tokio::net::TcpStream::connect(door).await.expect("listening");
        let head = b"GET /v2/a/manifests/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        stream.write_all(head).await.expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        answer
    };
    assert!(pull().await.starts_with("HTTP/1.1 503 "));
    let headers =
        format!(r#"[{{"validator":"{validator}","headers":[["X-Chutes-Nonce","5"]],"expires_at":2000}}]"#);
    assert_eq!(admin(&socket, "PUT", "/registry/headers", &headers).await.0, 204);
    assert!(pull().await.ends_with("signed"));
    let forged = headers.replace("X-Chutes-Nonce", "Authorization");
    assert_eq!(admin(&socket, "PUT", "/registry/headers", &forged).await.0, 400);
    assert_eq!(admin(&socket, "PUT", "/registry/headers", "[{").await.0, 400);
    assert_eq!(
        admin(
            &socket,
            "PUT",
            "/cache/leases",
            r#"{"running":["c1"],"last_deployed":{"c2":5}}"#
        )
        .await
        .0,
        204
    );
    assert_eq!(
        admin(&socket, "PUT", "/cache/leases", r#"{"running":["../c1"],"x":1}"#)
            .await
            .0,
        422
    );
    assert_eq!(
        admin(&socket, "PUT", "/cache/leases", &" ".repeat((4 << 20) + 1))
            .await
            .0,
        413
    );
    let (status, text) = admin(&socket, "GET", "/metrics", "").await;
    assert_eq!(status, 200);
    for line in [
        "chutes_registry_upstream_bytes_total 6",
        r#"chutes_registry_requests_total{outcome="Upstream"} 1"#,
        r#"chutes_registry_requests_total{outcome="NoSignature"} 1"#,
        "chutes_egress_connections 0",
        "chutes_cache_evictions_total 0",
    ] {
        assert!(text.contains(line), "{line} is missing in {text}");
    }
    shutdown.cancel();
    served.await.expect("no panic").expect("no error");
    assert!(!socket.exists());
}

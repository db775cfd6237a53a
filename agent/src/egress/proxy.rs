//! The explicit door: a CONNECT proxy for chutes that are told of it by environment.
//!
//! One task per connection: read the head, ask the policy, resolve, check every address, dial one that was
//! checked, answer, move bytes. One log line per decision.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::egress::head::{self, Connect, HEAD_BYTES_MAX, Parsed};
use crate::egress::policy::{Decision, Reason};
use crate::egress::{Door, tunnel};

/// The header of every refusal that carries its reason.
pub const REASON_HEADER: &str = "X-Chutes-Egress-Reason";
/// How long a refused client may take to read why.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES_MAX: usize = 64 * 1024;

/// Serves one connection to its end.
pub async fn serve(door: Arc<Door>, mut client: TcpStream, peer: SocketAddr) {
    let _ = client.set_nodelay(true);
    let head = match tokio::time::timeout(door.head_timeout, read_head(&mut client)).await {
        Ok(Ok(head)) => head,
        Ok(Err(Some(decision))) => return refuse(&door, client, peer, &decision).await,
        Ok(Err(None)) => return,
        Err(_) => {
            let decision = Decision::deny(Reason::BadRequest, "the request head took too long");
            return refuse(&door, client, peer, &decision).await;
        }
    };
    let (name, decision) = match door.policy.decide(&head.connect.host, head.connect.port) {
        Ok(going) => going,
        Err(decision) => return refuse(&door, client, peer, &decision).await,
    };
    let mut server = match door
        .network
        .connect(
            &name,
            head.connect.port,
            &door.own_addresses,
            door.connect_timeout,
        )
        .await
    {
        Ok(server) => server,
        Err(decision) => return refuse(&door, client, peer, &decision).await,
    };
    account(&door, peer, &decision);
    let opened = async {
        client
            .write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
            .await?;
        // What a client sends before our answer belongs to the tunnel.
        server.write_all(&head.early).await?;
        door.metrics.sent_bytes.inc_by(head.early.len() as u64);
        io::Result::Ok(())
    };
    if opened.await.is_err() {
        return;
    }
    drop(head);
    let metrics = &door.metrics;
    if let Err(error) = tunnel::run(
        &mut client,
        &mut server,
        door.tunnel,
        &metrics.sent_bytes,
        &metrics.received_bytes,
    )
    .await
    {
        tracing::debug!(%name, %error, "tunnel");
    }
}

/// Refuses a connection beyond the limit.
pub async fn refuse_busy(door: &Door, client: TcpStream, peer: SocketAddr) {
    let decision = Decision::deny(Reason::Busy, "too many connections at once");
    refuse(door, client, peer, &decision).await;
}

struct Head {
    connect: Connect,
    early: Vec<u8>,
}

/// Reads a head; `Err(None)` when the client went away.
async fn read_head(client: &mut TcpStream) -> Result<Head, Option<Decision>> {
    let mut bytes = Vec::with_capacity(512);
    loop {
        let seen = bytes.len();
        let room = HEAD_BYTES_MAX + 1 - seen;
        let read = (&mut *client)
            .take(room as u64)
            .read_buf(&mut bytes)
            .await
            .map_err(|_| None)?;
        if read == 0 {
            return Err(None);
        }
        match head::parse(&bytes, seen) {
            Parsed::Partial => {}
            Parsed::Connect(connect, end) => {
                return Ok(Head {
                    connect,
                    early: bytes.split_off(end),
                });
            }
            Parsed::OtherMethod(method, target) => {
                let detail = format!("{method} {target}: only CONNECT is served here");
                return Err(Some(Decision::deny(Reason::Method, detail)));
            }
            Parsed::Bad(why) => return Err(Some(Decision::deny(Reason::BadRequest, why))),
        }
    }
}

fn account(door: &Door, peer: SocketAddr, decision: &Decision) {
    door.metrics.count(decision.allowed, decision.reason);
    tracing::info!(%peer, reason = decision.reason.as_str(), allowed = decision.allowed, "egress: {}", decision.detail);
}

/// Says no, with the reason in a header and in the body.
async fn refuse(door: &Door, mut client: TcpStream, peer: SocketAddr, decision: &Decision) {
    account(door, peer, decision);
    let status = match decision.reason {
        Reason::Method => "405 Method Not Allowed\r\nAllow: CONNECT",
        Reason::BadRequest => "400 Bad Request",
        Reason::Busy => "503 Service Unavailable",
        Reason::NotResolved | Reason::Unreachable => "502 Bad Gateway",
        _ => "403 Forbidden",
    };
    let body = format!("{decision}\n");
    let answer = format!(
        "HTTP/1.1 {status}\r\n{REASON_HEADER}: {}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        decision.reason.as_str(),
        body.len(),
    );
    let farewell = async {
        client.write_all(answer.as_bytes()).await?;
        client.shutdown().await?;
        // Closing with unread bytes would reset the connection before the client has read the answer.
        let mut rest = [0; 1024];
        let mut drained = 0;
        while drained < LINGER_BYTES_MAX {
            match client.read(&mut rest).await? {
                0 => break,
                read => drained += read,
            }
        }
        io::Result::Ok(())
    };
    // Whether the client hears it or not changes nothing.
    let _ = tokio::time::timeout(LINGER, farewell).await;
}

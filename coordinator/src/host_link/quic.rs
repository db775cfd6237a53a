//! The host link over QUIC with mutual TLS: one connection, one bidirectional stream, frames of
//! `protocol::link`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use protocol::id::ServerId;
use protocol::link::{Decoder, FromHost, ToHost, encode};
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::session::{Context, serve};
use crate::identity::{Identity, IdentityError};

/// Protocol name in the TLS handshake.
pub const ALPN: &[u8] = b"chutes-host/1";
/// Connections at once.
const CONNECTIONS_MAX: usize = 4096;
/// Messages that may wait in either direction.
const QUEUE: usize = 16;
/// Silence after which a connection is dead.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
/// How often either side says that it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(4);

/// Why the door cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The certificate or its key is unusable.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The address is taken or not ours.
    #[error("listen for hosts on UDP {0}: {1}")]
    Listen(SocketAddr, std::io::Error),
}

/// Transport settings that both ends of the link use.
///
/// # Panics
/// Never: the timeout fits.
#[must_use]
pub fn transport() -> quinn::TransportConfig {
    let mut transport = quinn::TransportConfig::default();
    transport.max_idle_timeout(Some(IDLE_TIMEOUT.try_into().expect("15 s fit")));
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    transport.max_concurrent_bidi_streams(1_u8.into());
    transport.max_concurrent_uni_streams(0_u8.into());
    transport
}

/// Opens the door for hosts.
///
/// # Errors
/// [`Error`].
pub fn listen(address: SocketAddr, identity: &Identity) -> Result<Endpoint, Error> {
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(identity.quic_server(ALPN)?));
    config.transport_config(Arc::new(transport()));
    Endpoint::server(config, address).map_err(|error| Error::Listen(address, error))
}

/// Serves hosts until cancelled.
pub async fn accept(endpoint: Endpoint, context: Context, cancel: CancellationToken) {
    let mut sessions = JoinSet::new();
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            Some(ended) = sessions.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a host's session ended abnormally");
                }
            }
            incoming = endpoint.accept() => {
                let Some(incoming) = incoming else { break };
                if sessions.len() >= CONNECTIONS_MAX {
                    incoming.refuse();
                } else {
                    sessions.spawn(session(incoming, context.clone()));
                }
            }
        }
    }
    endpoint.close(0_u8.into(), b"stopping");
    sessions.shutdown().await;
    endpoint.wait_idle().await;
}

async fn session(incoming: Incoming, context: Context) {
    let remote = incoming.remote_address();
    match connect(incoming, context).await {
        Ok(()) => {}
        Err(error) => tracing::info!(%remote, %error, "host disconnected"),
    }
}

async fn connect(
    incoming: Incoming,
    context: Context,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let connection = incoming.await?;
    let certificate = peer_certificate(&connection).ok_or("the host showed no certificate")?;
    let (send, receive) = connection.accept_bi().await?;
    let (from_host, incoming) = mpsc::channel(QUEUE);
    let (outgoing, to_host) = mpsc::channel(QUEUE);
    let is_identity = |server: &ServerId| names(&certificate, server.as_str());
    let end = tokio::select! {
        end = serve(context, is_identity, incoming, outgoing) => end.map_err(Into::into),
        end = read(receive, from_host) => end,
        end = write(send, to_host) => end,
    };
    connection.close(0_u8.into(), b"session ended");
    end
}

async fn read(
    mut stream: RecvStream,
    messages: mpsc::Sender<FromHost>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut decoder = Decoder::default();
    while let Some(chunk) = stream.read_chunk(64 * 1024, true).await? {
        decoder.push(&chunk.bytes);
        while let Some(message) = decoder.take_next()? {
            messages.send(message).await?;
        }
    }
    Ok(())
}

async fn write(
    mut stream: SendStream,
    mut messages: mpsc::Receiver<ToHost>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    while let Some(message) = messages.recv().await {
        stream.write_all(&encode(&message)?).await?;
    }
    Ok(())
}

fn peer_certificate(connection: &Connection) -> Option<CertificateDer<'static>> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    chain.first().cloned()
}

/// True if a certificate, already verified against the cluster's CA, names this server.
fn names(certificate: &CertificateDer<'static>, name: &str) -> bool {
    let parsed = rustls::server::ParsedCertificate::try_from(certificate);
    let (Ok(parsed), Ok(name)) = (parsed, ServerName::try_from(name.to_owned())) else {
        return false;
    };
    rustls::client::verify_server_name(&parsed, &name).is_ok()
}

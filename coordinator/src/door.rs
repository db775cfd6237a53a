//! The one UDP port of a member: hosts, other members and hosts that want to join come in here, each by the
//! protocol that it names in the TLS handshake.
//!
//! ```text
//! chutes-host/1    a host with a certificate     host_link: a session
//! chutes-member/1  a member's certificate        the replica's and the coordinator's questions
//! chutes-join/1    anybody                       join::gate: one question
//! ```
//! A certificate of a host that was removed is refused here, and its connections are closed as soon as this
//! member knows of the removal; so is a host's that the state knows nothing of. The same is done to a member under an
//! id that it has no more: one that a recovery gave up, and that went on without us.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coordinator_core::state_machine::host::Standing;
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, Endpoint, Incoming};
use replica::Replica;
use replica::quic::{ALPN as MEMBER_ALPN, Peers, serve as serve_member};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::host_link::quic as host_link;
use crate::host_link::session;
use crate::identity::{Bearer, Identity, IdentityError};
use crate::join::wire::ALPN as JOIN_ALPN;
use crate::join::{Gate, STRANGER};
use crate::member_link::Answering;
use crate::store::Store;

/// Connections at once.
const CONNECTIONS_MAX: usize = 8192;
/// Handshakes under way whose other end may be anybody: a datagram's sender is easily forged. With more of them, who
/// comes next must first show that it gets our answers.
const UNPROVEN_MAX: usize = 256;
/// How long a handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Why the door cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The certificate or its key is unusable.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The address is taken or not ours.
    #[error("listen on UDP {0}: {1}")]
    Listen(SocketAddr, std::io::Error),
}

/// Binds the port. Nobody is served before [`serve`].
///
/// # Errors
/// [`Error`].
pub fn open(address: SocketAddr, identity: &Identity) -> Result<Endpoint, Error> {
    Endpoint::server(server_config(identity)?, address).map_err(|error| Error::Listen(address, error))
}

/// Settings of the port, made anew when the certificate is.
///
/// # Errors
/// [`IdentityError`].
pub fn server_config(identity: &Identity) -> Result<quinn::ServerConfig, IdentityError> {
    let tls = identity.quic_server(&[protocol::link::ALPN, MEMBER_ALPN, JOIN_ALPN])?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(Arc::new(host_link::transport()));
    Ok(config)
}

/// Connections to other members that leave from this port, with the certificate that lies in `folder` at the time.
#[must_use]
pub fn peers(endpoint: Endpoint, folder: PathBuf) -> Peers {
    Peers::new(endpoint, move |_| {
        let tls = Identity::of_host(&folder).and_then(|identity| identity.quic_client(MEMBER_ALPN));
        let tls = tls.map_err(|error| error.to_string())?;
        Ok(quinn::ClientConfig::new(Arc::new(tls)))
    })
}

/// Who answers at the door.
#[derive(Debug, Clone)]
pub struct Services {
    /// Hosts.
    pub hosts: session::Context,
    /// Members, about Raft.
    pub replica: Replica,
    /// Members, about everything else.
    pub members: Answering,
    /// Those who want to join.
    pub gate: Gate,
}

/// Serves until cancelled.
pub async fn serve(endpoint: Endpoint, services: Services, cancel: CancellationToken) {
    let mut connections = JoinSet::new();
    let unproven = Arc::new(Semaphore::new(UNPROVEN_MAX));
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended
                    && error.is_panic()
                {
                    tracing::error!(%error, "a connection ended abnormally");
                }
            }
            incoming = endpoint.accept() => {
                let Some(incoming) = incoming else { break };
                if connections.len() >= CONNECTIONS_MAX {
                    incoming.refuse();
                } else if incoming.remote_address_validated() {
                    connections.spawn(admit(incoming, None, services.clone()));
                } else if let Ok(permit) = Arc::clone(&unproven).try_acquire_owned() {
                    connections.spawn(admit(incoming, Some(permit), services.clone()));
                } else if let Err(error) = incoming.retry() {
                    tracing::warn!(%error, "a connection was not made");
                }
            }
        }
    }
    endpoint.close(0_u8.into(), b"stopping");
    connections.shutdown().await;
    endpoint.wait_idle().await;
}

async fn admit(incoming: Incoming, unproven: Option<OwnedSemaphorePermit>, services: Services) {
    let remote = incoming.remote_address();
    let connected = timeout(HANDSHAKE_MAX, incoming).await;
    drop(unproven);
    let connection = match connected {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::info!(%remote, %error, "a connection was not made"),
        Err(_) => return,
    };
    let bearer = match Bearer::of_peer(&connection) {
        Ok(bearer) => bearer,
        Err(error) => return tracing::warn!(%remote, %error, "a certificate is refused"),
    };
    let protocol = protocol_of(&connection);
    let store = services.gate.store.clone();
    let served = async {
        match (protocol.as_deref(), bearer.as_ref()) {
            (Some(JOIN_ALPN), bearer) => services.gate.serve(&connection, bearer).await,
            (
                Some(MEMBER_ALPN),
                Some(Bearer {
                    member: Some(member), ..
                }),
            ) => {
                let (replica, members) = (services.replica, services.members);
                let of_replica = move |from, bytes: Vec<u8>| {
                    let replica = replica.clone();
                    async move {
                        let answer = replica.answer(from, &bytes).await;
                        answer.map_err(|error| error.to_string())
                    }
                };
                let of_coordinator = move |from, bytes| members.clone().answer(from, bytes);
                serve_member(connection.clone(), *member, of_replica, of_coordinator).await;
            }
            (Some(protocol::link::ALPN), Some(bearer)) => {
                if is_stranger(&services.gate.store, bearer).await {
                    tracing::warn!(%remote, server = %bearer.server, "a host that nobody let in is turned away");
                    return connection.close(2_u8.into(), STRANGER.as_bytes());
                }
                let server = bearer.server.clone();
                if let Err(error) = host_link::serve(&connection, server, services.hosts).await {
                    tracing::info!(%remote, %error, "host disconnected");
                }
            }
            _ => connection.close(1_u8.into(), b"a certificate of this cluster is needed"),
        }
    };
    let Some(bearer) = &bearer else {
        return served.await;
    };
    let speaks_as_member = protocol_of(&connection).as_deref() == Some(MEMBER_ALPN);
    tokio::select! {
        why = turned_away(&store, bearer, speaks_as_member) => {
            tracing::warn!(%remote, server = %bearer.server, why, "a host is turned away");
            connection.close(2_u8.into(), why.as_bytes());
        }
        () = served => {}
    }
}

/// Whether the owner of a key is none of the cluster's hosts, though its authority signed the certificate: the cluster
/// goes on from a snapshot of before the host joined. It could not be removed, so it gets nothing to do. Without a
/// majority nobody can tell; then it may be one that just joined.
async fn is_stranger(store: &Store, bearer: &Bearer) -> bool {
    let unknown = || {
        store.read(|state| {
            state.cluster().is_some() && matches!(state.standing(&bearer.key_hash), Standing::Unknown)
        })
    };
    unknown() && store.linearizable().await.is_ok() && unknown()
}

fn protocol_of(connection: &Connection) -> Option<Vec<u8>> {
    connection
        .handshake_data()?
        .downcast::<HandshakeData>()
        .ok()?
        .protocol
}

/// Waits until the owner of a key is known to be removed, or to be no more the member that it says it is; why.
async fn turned_away(store: &Store, bearer: &Bearer, speaks_as_member: bool) -> &'static str {
    let member = bearer.member.filter(|_| speaks_as_member);
    let mut changes = store.changes();
    loop {
        let (removed, former) = store.read(|state| {
            let former = |member| state.is_former_member(&bearer.key_hash, member);
            let removed = state.is_removed(&bearer.server, &bearer.key_hash);
            (removed, member.is_some_and(former))
        });
        match (removed, former) {
            (true, _) => return "this host was removed from the cluster",
            (false, true) => {
                return "the cluster goes on without this member: stop it, then chutes-agent rejoin";
            }
            (false, false) => changes.changed().await,
        }
    }
}

//! The asking side of the gate: a host that joins, renews its certificate, or comes back.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint, TransportConfig};
use tokio::time::timeout;

use super::wire::{ALPN, Answer, Granted, Question, read, write};
use super::{Admission, Notice, Token, admission};
use crate::host_link::quic::KEEP_ALIVE;
use crate::identity::{COORDINATOR_NAME, Identity, IdentityError, JoinVerifier, LIFE_MS};
use protocol::time::UnixMillis;

/// How long one member may take.
const EACH_MAX: Duration = Duration::from_secs(10);

/// Why nothing was granted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cluster said no.
    #[error("the cluster refused: {0}")]
    Refused(String),
    /// No member could be asked, each with what went wrong.
    #[error("no member could be asked: {}; is UDP open between here and there?", .0.join("; "))]
    Unreachable(Vec<String>),
    /// Our own certificate.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Asks with an invitation.
///
/// # Errors
/// [`Error`].
pub async fn join(token: &Token, question: &Question) -> Result<Granted, Error> {
    let tls = JoinVerifier::quic_client(vec![token.authority], ALPN)?;
    granted(ask(&token.doors, tls, question).await?)
}

/// Asks as a node that has read the notice.
///
/// # Errors
/// [`Error`].
pub async fn enter(notice: &Notice, question: &Question) -> Result<Granted, Error> {
    let tls = JoinVerifier::quic_client(notice.authorities.clone(), ALPN)?;
    granted(ask(&notice.doors, tls, question).await?)
}

/// Asks with the certificate in `folder`.
///
/// # Errors
/// [`Error`].
pub async fn ask_as_host(doors: &[String], folder: &Path, question: &Question) -> Result<Answer, Error> {
    let tls = Identity::of_host(folder)?.quic_client(ALPN)?;
    ask(doors, tls, question).await
}

/// What was granted.
///
/// # Errors
/// [`Error::Refused`] for every other answer.
pub fn granted(answer: Answer) -> Result<Granted, Error> {
    match answer {
        Answer::Granted(granted) => Ok(*granted),
        Answer::Refused(reason) | Answer::Unavailable(reason) => Err(Error::Refused(reason)),
        Answer::Probed { .. } | Answer::Noted => {
            Err(Error::Refused("another question was answered".to_owned()))
        }
    }
}

/// Asks for a new certificate when a third of the life of the one in `folder` is left; true if there is a new one.
///
/// # Errors
/// [`Error`]; the old certificate is still good for weeks.
pub async fn renew_if_due(folder: &Path, now: UnixMillis) -> Result<bool, Error> {
    let Some(admission) = Admission::read(folder)? else {
        return Ok(false);
    };
    if admission.certificate_until.since(now) > LIFE_MS / 3 {
        return Ok(false);
    }
    renew(folder, &admission).await?;
    Ok(true)
}

async fn renew(folder: &Path, admission: &Admission) -> Result<(), Error> {
    let answer = ask_as_host(&admission.doors, folder, &Question::Renew).await?;
    Ok(admission::keep(folder, &granted(answer)?)?)
}

/// Sees to it that the authorities trusted in `folder` are the `wanted` ones, with a new certificate if they are not,
/// and tells the cluster: the old authority is dropped only when every host has said so.
///
/// # Errors
/// [`Error`]; there may be a new certificate all the same, which is good. Try again.
pub async fn change_over(folder: &Path, wanted: &[[u8; 32]]) -> Result<(), Error> {
    let Some(admission) = Admission::read(folder)? else {
        return Ok(());
    };
    if Identity::of_host(folder)?.trusted() != wanted {
        renew(folder, &admission).await?;
    }
    let trusted = Identity::of_host(folder)?.trusted();
    match ask_as_host(&admission.doors, folder, &Question::Trusts(trusted)).await? {
        Answer::Noted => Ok(()),
        other => granted(other).map(drop),
    }
}

/// Tells the cluster where the host with the certificate in `folder` is to be found from now on.
///
/// # Errors
/// [`Error`].
pub async fn tell_address(doors: &[String], folder: &Path, address: &str) -> Result<(), Error> {
    match ask_as_host(doors, folder, &Question::Moved(address.to_owned())).await? {
        Answer::Noted => Ok(()),
        other => granted(other).map(drop),
    }
}

/// Asks one member after the other until one decides.
async fn ask(doors: &[String], tls: QuicClientConfig, question: &Question) -> Result<Answer, Error> {
    let mut config = ClientConfig::new(Arc::new(tls));
    let mut transport = TransportConfig::default();
    // A member takes a silent connection for dead long before it has probed a port, or found a leader.
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    config.transport_config(Arc::new(transport));
    let mut failures = Vec::new();
    for door in doors {
        match timeout(EACH_MAX, ask_one(door, config.clone(), question)).await {
            Ok(Ok(Answer::Unavailable(reason))) => failures.push(format!("{door}: {reason}")),
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(reason)) => failures.push(format!("{door}: {reason}")),
            Err(_) => failures.push(format!("{door}: no answer within {EACH_MAX:?}")),
        }
    }
    if doors.is_empty() {
        failures.push("none is known".to_owned());
    }
    Err(Error::Unreachable(failures))
}

async fn ask_one(door: &str, config: ClientConfig, question: &Question) -> Result<Answer, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let found = tokio::net::lookup_host(door)
        .await
        .map_err(|error| text(&error))?;
    let mut last = "the name has no address".to_owned();
    for address in found {
        let local: SocketAddr = match address {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let endpoint = Endpoint::client(local).map_err(|error| text(&error))?;
        let connecting = endpoint.connect_with(config.clone(), address, COORDINATOR_NAME);
        let connection = match connecting.map_err(|error| text(&error))?.await {
            Ok(connection) => connection,
            Err(error) => {
                last = text(&error);
                continue;
            }
        };
        let exchange = async {
            let (mut out, mut incoming) = connection.open_bi().await.map_err(|error| text(&error))?;
            write(&mut out, question).await.map_err(|error| text(&error))?;
            read(&mut incoming).await.map_err(|error| text(&error))
        };
        let answer = exchange.await;
        // The member says why when it ends the connection.
        let why = |error: String| connection.close_reason().map_or(error, |reason| text(&reason));
        let answer = answer.map_err(why)?;
        connection.close(0_u8.into(), b"thanks");
        endpoint.wait_idle().await;
        return Ok(answer);
    }
    Err(last)
}

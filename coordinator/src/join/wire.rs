//! What is asked at the gate, one question on a stream of its own, and answered there. Frames are those of
//! [`protocol::link`].

use protocol::hotkey::Hotkey;
use protocol::id::ServerId;
use protocol::link::{Decoder, FrameError, encode};
use protocol::time::UnixMillis;
use quinn::{RecvStream, SendStream};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Admission;

/// Protocol name of the gate in the TLS handshake.
pub const ALPN: &[u8] = b"chutes-join/1";

/// A question to a member. All but those to be let in need the certificate of a host. New ones go to the end: the
/// position is what is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// Let me in.
    Join(Box<Join>),
    /// Sign my key again: the certificate ends soon.
    Renew,
    /// I am a member that has lost its store: give me another member id.
    Rejoin,
    /// Dial the address that I told when I joined, and say whether anybody answers there.
    Probe,
    /// I trust the authorities with these fingerprints, and the last one has signed the certificate that I carry.
    Trusts(Vec<[u8; 32]>),
    /// Let me in: my pod's token says which node of the shared Kubernetes cluster I am.
    Enter(Box<Enter>),
    /// I am to be found at this `host:port` from now on.
    Moved(String),
}

/// A host that wants to join.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// Which invitation.
    pub invite: u128,
    /// What proves that it was given to this host.
    pub secret: [u8; 32],
    /// The host's id.
    pub server: ServerId,
    /// Its name.
    pub name: String,
    /// Provider or place; empty if it has none.
    pub site: String,
    /// `host:port` where members would reach it.
    pub address: String,
    /// A point of P-256, uncompressed.
    pub public_key: Vec<u8>,
    /// Whose seed it has; none without one.
    pub hotkey: Option<Hotkey>,
    /// Its wall clock.
    pub clock: UnixMillis,
}

impl std::fmt::Debug for Join {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Join")
            .field("invite", &format_args!("{:032x}", self.invite))
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

/// A node of a Kubernetes cluster that wants to join. It says neither its name nor its id: its token does.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enter {
    /// Token of the service account of its agent's pod, made for this alone.
    pub token: String,
    /// Provider or place; empty if it has none.
    pub site: String,
    /// `host:port` where members would reach it.
    pub address: String,
    /// A point of P-256, uncompressed.
    pub public_key: Vec<u8>,
    /// Whose seed it has; none without one.
    pub hotkey: Option<Hotkey>,
    /// Its wall clock.
    pub clock: UnixMillis,
}

impl std::fmt::Debug for Enter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enter")
            .field("token", &"hidden")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// What a host is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// Its place.
    pub admission: Admission,
    /// Its certificate.
    pub certificate_pem: String,
    /// Certificates of the authorities to trust; the last one has signed it.
    pub authority_pem: String,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Yes.
    Granted(Box<Granted>),
    /// No, and why, for a person.
    Refused(String),
    /// Not now: another try, or another member, may do.
    Unavailable(String),
    /// What became of a probe.
    Probed {
        /// Where to.
        address: String,
        /// Something answered.
        reached: bool,
        /// What, or why not.
        detail: String,
    },
    /// What was said is recorded.
    Noted,
}

/// Why a message did not get through.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// What arrived is no message.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The stream broke.
    #[error("the connection broke: {0}")]
    Lost(String),
}

/// Writes one message and ends the stream.
///
/// # Errors
/// [`Error`].
pub async fn write(stream: &mut SendStream, message: &impl Serialize) -> Result<(), Error> {
    let frame = encode(message)?;
    let lost = |error: &dyn std::fmt::Display| Error::Lost(error.to_string());
    stream.write_all(&frame).await.map_err(|error| lost(&error))?;
    stream.finish().map_err(|error| lost(&error))
}

/// Reads one message.
///
/// # Errors
/// [`Error`].
pub async fn read<T: DeserializeOwned>(stream: &mut RecvStream) -> Result<T, Error> {
    let lost = |error: &dyn std::fmt::Display| Error::Lost(error.to_string());
    let mut decoder = Decoder::default();
    while let Some(chunk) = stream
        .read_chunk(64 * 1024, true)
        .await
        .map_err(|error| lost(&error))?
    {
        decoder.push(&chunk.bytes);
        if let Some(message) = decoder.take_next()? {
            return Ok(message);
        }
    }
    Err(Error::Lost("it ended in the middle of a message".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hosts and members of different versions speak with each other: what a question is sent as never changes.
    #[test]
    fn questions_are_sent_as_they_always_were() {
        let enter = Enter {
            token: "t".to_owned(),
            site: "s".to_owned(),
            address: "a:1".to_owned(),
            public_key: vec![4, 5],
            hotkey: None,
            clock: UnixMillis(300),
        };
        assert!(!format!("{enter:?}").contains("\"t\""), "{enter:?}");
        for (question, bytes) in [
            (Question::Renew, "01"),
            (Question::Rejoin, "02"),
            (Question::Probe, "03"),
            (Question::Trusts(Vec::new()), "0400"),
            (
                Question::Enter(Box::new(enter)),
                "0501740173 03613a31 020405 00 ac02",
            ),
            (Question::Moved("a:1".to_owned()), "0603613a31"),
        ] {
            let sent = postcard::to_stdvec(&question).expect("it can be sent");
            assert_eq!(hex::encode(sent), bytes.replace(' ', ""), "{question:?}");
        }
    }
}

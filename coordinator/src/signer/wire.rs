//! The datagrams between the signer process and those that ask it.
//!
//! ```text
//! request:  version | id (8 bytes, little endian) | postcard of Ask
//! answer:   version | the request's id            | postcard of Answer
//! ```
//! One request is one datagram, so a signer that dies between two of them leaves no half message behind,
//! and the next signer on the same socket goes on.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::key::Signed;
use super::{Error, MessageKind, Result, SealedKind};

/// Version of the format.
pub const VERSION: u8 = 1;
/// Longest datagram in bytes.
pub const DATAGRAM_BYTES_MAX: usize = 64 * 1024;

const HEADER_BYTES: usize = 9;

/// What may be asked.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// Which hotkey signs here?
    Hotkey,
    /// A signature.
    Sign(MessageKind),
    /// Seal these bytes.
    Seal(SealedKind, Vec<u8>),
    /// Open these bytes.
    Unseal(SealedKind, Vec<u8>),
    /// How much was signed and refused so far?
    Counts,
}

impl fmt::Debug for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hotkey => f.write_str("Hotkey"),
            Self::Sign(kind) => write!(f, "Sign({})", kind.label()),
            Self::Seal(kind, bytes) => write!(f, "Seal({}, {} bytes)", kind.label(), bytes.len()),
            Self::Unseal(kind, bytes) => write!(f, "Unseal({}, {} bytes)", kind.label(), bytes.len()),
            Self::Counts => f.write_str("Counts"),
        }
    }
}

/// How often a kind was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindCount {
    /// Name of the kind.
    pub kind: String,
    /// Granted since the signer started.
    pub granted: u64,
    /// Refused for the limit since the signer started.
    pub limited: u64,
}

/// What is answered.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The address.
    Hotkey(String),
    /// A signature.
    Signed(Signed),
    /// Sealed or opened bytes.
    Bytes(Vec<u8>),
    /// Counts for each kind.
    Counts(Vec<KindCount>),
    /// Not signed, with the reason.
    Refused(String),
    /// The limit of this kind is reached.
    Limited(String),
    /// The sealed value does not open.
    NotOpened,
    /// The plain text is too long.
    TooLong(u64),
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the bytes: they may be an opened secret.
        match self {
            Self::Hotkey(_) => f.write_str("Hotkey"),
            Self::Signed(_) => f.write_str("Signed"),
            Self::Bytes(bytes) => write!(f, "Bytes({})", bytes.len()),
            Self::Counts(_) => f.write_str("Counts"),
            Self::Refused(why) => write!(f, "Refused({why})"),
            Self::Limited(kind) => write!(f, "Limited({kind})"),
            Self::NotOpened => f.write_str("NotOpened"),
            Self::TooLong(length) => write!(f, "TooLong({length})"),
        }
    }
}

/// Why a datagram is no request or answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not even an id: nothing can be answered.
    #[error("the datagram has no header")]
    NoHeader,
    /// The id is known, the rest is of another version or of an unknown kind.
    #[error("request {id} is of version {version} or of an unknown kind")]
    Unknown {
        /// The request's id.
        id: u64,
        /// Its version.
        version: u8,
    },
}

/// Encodes a request or an answer.
///
/// # Errors
/// [`Error::TooLong`] when it does not fit into a datagram.
pub fn encode<T: Serialize>(id: u64, body: &T) -> Result<Vec<u8>> {
    let mut datagram = vec![VERSION];
    datagram.extend_from_slice(&id.to_le_bytes());
    let datagram = postcard::to_extend(body, datagram).map_err(|_| Error::Malformed)?;
    if datagram.len() > DATAGRAM_BYTES_MAX {
        return Err(Error::TooLong(datagram.len()));
    }
    Ok(datagram)
}

/// Decodes a request or an answer. Nothing may follow it.
///
/// # Errors
/// [`Unreadable`].
pub fn decode<'a, T: Deserialize<'a>>(datagram: &'a [u8]) -> std::result::Result<(u64, T), Unreadable> {
    let (header, body) = datagram
        .split_at_checked(HEADER_BYTES)
        .ok_or(Unreadable::NoHeader)?;
    let (version, id) = header.split_first().ok_or(Unreadable::NoHeader)?;
    let id = u64::from_le_bytes(id.try_into().map_err(|_| Unreadable::NoHeader)?);
    let unknown = Unreadable::Unknown {
        id,
        version: *version,
    };
    if *version != VERSION {
        return Err(unknown);
    }
    match postcard::take_from_bytes(body) {
        Ok((body, [])) => Ok((id, body)),
        _ => Err(unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signer::BodyRoute;

    /// The bytes of version 1: a signer and a coordinator of different builds must understand each other.
    #[test]
    fn requests_have_golden_bytes() {
        let sign = |kind| hex::encode(encode(7, &Ask::Sign(kind)).expect("short"));
        assert_eq!(sign(MessageKind::SocketAuth), "0107000000000000000100");
        assert_eq!(sign(MessageKind::OwnDevices), "0107000000000000000108");
        let body = MessageKind::Body {
            route: BodyRoute::UploadAudit,
            sha256: [0xab; 32],
        };
        assert_eq!(
            sign(body),
            format!("0107000000000000000109{}{}", "03", "ab".repeat(32))
        );
        assert_eq!(sign(MessageKind::DeleteServer), "010700000000000000010a");
        assert_eq!(sign(MessageKind::AttestedDevices), "010700000000000000010b");
        let seal = encode(1, &Ask::Seal(SealedKind::LaunchToken, b"t".to_vec())).expect("short");
        assert_eq!(hex::encode(seal), "01010000000000000002010174");
    }

    #[test]
    fn what_cannot_be_read_is_told_apart() {
        let good = encode(9, &Ask::Hotkey).expect("short");
        assert!(matches!(decode::<Ask>(&good), Ok((9, Ask::Hotkey))));
        assert_eq!(decode::<Ask>(&good[..8]).err(), Some(Unreadable::NoHeader));
        let unknown = |version| Some(Unreadable::Unknown { id: 9, version });
        assert_eq!(decode::<Ask>(&good[..9]).err(), unknown(1));
        let mut newer = good.clone();
        newer[0] = 2;
        assert_eq!(decode::<Ask>(&newer).err(), unknown(2));
        let mut other_kind = good.clone();
        other_kind[9] = 99;
        assert_eq!(decode::<Ask>(&other_kind).err(), unknown(1));
        let mut longer = good;
        longer.push(0);
        assert_eq!(decode::<Ask>(&longer).err(), unknown(1));
    }
}

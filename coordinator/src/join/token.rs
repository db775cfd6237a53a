//! The one word that an invited host is given: where to knock, whom to trust there, and the secret that opens.
//!
//! ```text
//! chutes-join-1.<hex: first 4 bytes of the SHA-256 of the rest, then the rest as postcard>
//! ```
//! The checksum is against cut and mistyped tokens; what keeps strangers out is the secret.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// How every token of this version begins.
pub const PREFIX: &str = "chutes-join-1.";
/// How every token begins, whatever its version.
const PREFIX_OF_ALL: &str = "chutes-join-";
/// Members that a token names at most.
pub const DOORS_MAX: usize = 32;
/// Characters of a token.
const TEXT_MAX: usize = 16 * 1024;
const CHECKSUM_BYTES: usize = 4;

/// An invitation as the host gets it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Id of the cluster, for people and against mix-ups.
    pub cluster: String,
    /// Which invitation it is.
    pub invite: u128,
    /// Known to the invited alone; the cluster has its SHA-256.
    pub secret: [u8; 32],
    /// SHA-256 of the DER of the certificate of the cluster's authority: only members that show it are talked to.
    pub authority: [u8; 32],
    /// `host:port` of members' QUIC doors; any of them will do.
    pub doors: Vec<String>,
}

/// Why a text is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Something else.
    #[error("this is no join token: one begins with {PREFIX}")]
    Other,
    /// A newer one, say.
    #[error("this join token is of another version: this program reads those that begin with {PREFIX}")]
    Version,
    /// Cut off, or with a wrong character.
    #[error("the join token is cut off or mistyped: copy all of it, as one word")]
    Damaged,
}

impl Token {
    /// The secret as the cluster knows it.
    #[must_use]
    pub fn secret_hash(&self) -> [u8; 32] {
        secret_hash(&self.secret)
    }
}

/// An invitation's secret as the cluster knows it.
#[must_use]
pub fn secret_hash(secret: &[u8; 32]) -> [u8; 32] {
    Sha256::digest(secret).into()
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("cluster", &self.cluster)
            .field("invite", &format_args!("{:032x}", self.invite))
            .field("secret", &"hidden")
            .field("authority", &hex::encode(self.authority))
            .field("doors", &self.doors)
            .finish()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body = postcard::to_stdvec(self).map_err(|_| fmt::Error)?;
        write!(
            f,
            "{PREFIX}{}{}",
            hex::encode(checksum(&body)),
            hex::encode(&body)
        )
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let Some(digits) = text.strip_prefix(PREFIX) else {
            let is_token = text.starts_with(PREFIX_OF_ALL) && text.contains('.');
            let is_cut = !text.is_empty() && PREFIX.starts_with(text);
            return Err(match (is_token, is_cut) {
                (true, _) => TokenError::Version,
                (false, true) => TokenError::Damaged,
                (false, false) => TokenError::Other,
            });
        };
        if text.len() > TEXT_MAX {
            return Err(TokenError::Damaged);
        }
        let bytes = hex::decode(digits).map_err(|_| TokenError::Damaged)?;
        let (sum, body) = bytes
            .split_first_chunk::<CHECKSUM_BYTES>()
            .ok_or(TokenError::Damaged)?;
        if checksum(body) != *sum {
            return Err(TokenError::Damaged);
        }
        let (token, rest) = postcard::take_from_bytes::<Self>(body).map_err(|_| TokenError::Damaged)?;
        if !rest.is_empty() || token.doors.len() > DOORS_MAX {
            return Err(TokenError::Damaged);
        }
        Ok(token)
    }
}

fn checksum(body: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let hash: [u8; 32] = Sha256::digest(body).into();
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&hash[..CHECKSUM_BYTES]);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token {
            cluster: "cluster-1".to_owned(),
            invite: 7,
            secret: [0xab; 32],
            authority: [2; 32],
            doors: vec!["198.51.100.7:4433".to_owned(), "gpu-b.example:4433".to_owned()],
        }
    }

    #[test]
    fn a_token_is_one_word_that_is_read_back() {
        let text = token().to_string();
        assert!(text.starts_with(PREFIX), "{text}");
        assert!(
            text.chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.')
        );
        assert_eq!(text.parse(), Ok(token()));
        assert_eq!(format!(" {text}\n").parse(), Ok(token()), "as it is pasted");
    }

    #[test]
    fn every_cut_and_every_mistyped_character_is_noticed() {
        let text = token().to_string();
        for length in 1..text.len() {
            assert_eq!(
                text[..length].parse::<Token>(),
                Err(TokenError::Damaged),
                "{length}"
            );
        }
        for at in PREFIX.len()..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
            let changed = String::from_utf8(bytes).expect("it is ASCII");
            assert_eq!(changed.parse::<Token>(), Err(TokenError::Damaged), "{at}");
        }
        assert_eq!(format!("{text}00").parse::<Token>(), Err(TokenError::Damaged));
    }

    #[test]
    fn other_texts_are_named_as_what_they_are() {
        assert_eq!("".parse::<Token>(), Err(TokenError::Other));
        assert_eq!("hello".parse::<Token>(), Err(TokenError::Other));
        assert_eq!("chutes-join-2.00".parse::<Token>(), Err(TokenError::Version));
    }

    #[test]
    fn more_doors_than_a_host_would_try_are_refused() {
        let mut token = token();
        token.doors = vec!["a:1".to_owned(); DOORS_MAX + 1];
        assert_eq!(token.to_string().parse::<Token>(), Err(TokenError::Damaged));
    }

    #[test]
    fn the_secret_is_not_shown() {
        let debug = format!("{:?}", token());
        assert!(debug.contains("hidden"), "{debug}");
        assert!(!debug.contains("abab") && !debug.contains("171, 171"), "{debug}");
    }
}

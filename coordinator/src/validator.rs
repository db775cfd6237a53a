//! The connection to validators: what they say, what we ask of them. Wire types stay in this room; the
//! executor and the leader turn its results into commands.
//!
//! In reading order:
//! - `directory.rs`: which validators there are and where;
//! - `event.rs`: what arrives over a validator's websocket (pure);
//! - `socket.rs`: the websocket itself, kept alive, authenticated and reconnected for ever;
//! - `stream.rs`, `rows.rs`, `times.rs`: listings and their rows (pure);
//! - `client.rs`, `http.rs`: the REST calls, behind the trait [`ValidatorApi`];
//! - `inventory.rs`: one periodic look at everything, as one observation;
//! - `intake.rs`: events and listings become commands (pure).
//!
//! Events are hints: they are lost, repeated and reordered. The listings are what counts, and there unknown
//! is not empty: see [`stream::Listing`].

pub mod client;
pub mod directory;
pub mod event;
pub mod http;
pub mod intake;
pub mod inventory;
pub mod rows;
pub mod socket;
pub mod stream;
pub mod times;

pub use client::ValidatorApi;
pub use directory::{Directory, ValidatorConfig};
pub use event::Event;
pub use http::Client;
pub use inventory::{Observation, observe};
pub use socket::SocketEvent;
pub use stream::Listing;

use std::sync::Arc;

use crate::signer;

/// Whether this member leads at this very moment: asked right before what only one member may do at a validator.
pub type LeadsNow = Arc<dyn Fn() -> bool + Send + Sync>;

/// Why a call to a validator brought no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The validator answered, and not with success.
    #[error("the validator answers {status}: {detail}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What it said, shortened to one line.
        detail: String,
    },
    /// No answer: connection, TLS or timeout.
    #[error("the validator cannot be reached: {0}")]
    Unreachable(String),
    /// An answer that is not what the protocol says.
    #[error("the validator's answer is malformed: {0}")]
    Protocol(String),
    /// An answer larger than we accept.
    #[error("the validator's answer has more than {0} bytes")]
    TooLarge(usize),
    /// The request could not be signed.
    #[error("sign the request")]
    Signer(#[from] signer::Error),
    /// Nothing was sent: only the leader changes anything at a validator.
    #[error("this member leads no more")]
    NotLeading,
}

/// Result of this room.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The HTTP status of a refusal.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// 423: no room at the moment. Normal flow control: wait, and undeploy nothing for it.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.status() == Some(423)
    }

    /// 404: there is no such thing (any more), or it is not ours.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.status() == Some(404)
    }

    /// 401: clock, registration or key. 403: blacklisted, or not for us.
    #[must_use]
    pub fn is_forbidden(&self) -> bool {
        matches!(self.status(), Some(401 | 403))
    }

    /// 409: somebody was faster, or it exists already.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.status() == Some(409)
    }

    /// 429: too often.
    #[must_use]
    pub fn is_too_often(&self) -> bool {
        self.status() == Some(429)
    }

    /// True if the same call may succeed later without anything else changing. 423 and 409 depend on the
    /// call and are left to the caller.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Refused { status, .. } => matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504),
            Self::Unreachable(_) | Self::NotLeading => true,
            Self::Signer(error) => error.is_transient(),
            Self::Protocol(_) | Self::TooLarge(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_apart() {
        let refused = |status| Error::Refused {
            status,
            detail: String::new(),
        };
        for (status, transient) in [
            (400, false),
            (401, false),
            (403, false),
            (404, false),
            (409, false),
            (422, false),
            (423, false),
            (429, true),
            (500, true),
            (503, true),
        ] {
            assert_eq!(refused(status).is_transient(), transient, "{status}");
        }
        assert!(refused(423).is_locked() && refused(404).is_not_found() && refused(403).is_forbidden());
        assert!(refused(409).is_conflict() && refused(429).is_too_often());
        assert!(Error::Unreachable(String::new()).is_transient());
    }
}

//! Who may do what: two schemes of signatures, each good for 30 s and, where something changes, for once.
//!
//! The original scheme signs `miner:signer:nonce:tail`, where the tail is the body's hash or a fixed word. It
//! covers neither method nor path, so it may change things only over loopback (or where a setting allows it),
//! and never with a signature that was used for a read. The newer scheme binds all of a request
//! ([`BoundRequest`]). The guard against repetition is a part of the command that the signature authorises;
//! reads write nothing. A connection that the newer scheme has opened needs no further signatures
//! (`connection.rs`).

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use axum::http::{HeaderMap, Method, StatusCode};
use protocol::hotkey::Hotkey;
use protocol::signing::{
    BoundRequest, MINER_NONCE_WINDOW_SECONDS, NONCE_HEADER, Purpose, Refusal, SCHEME_HEADER, SEQUENCE_HEADER,
    SIGNATURE_HEADER, Tail, check_request_to_miner,
};
use protocol::time::UnixMillis;
use sha2::{Digest, Sha256};

use super::Peer;
use super::connection::Connection;
use super::error::ApiError;

/// Signatures of reads that are remembered at most. Only the key's owner can make them.
pub(super) const READS_REMEMBERED_MAX: usize = 10_000;

/// What a route lets a signature do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Looks.
    Read,
    /// Changes something; both schemes.
    Write,
    /// Changes something; the newer scheme only.
    BoundWrite,
}

/// Who asks, and how well the request is covered by the signature.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caller {
    /// Hash of the signature: goes into the command that it authorises. None on an open connection.
    pub(super) guard: Option<[u8; 32]>,
    /// Method, path and query are signed, or the connection is open.
    pub(super) is_bound: bool,
}

/// A request as far as it decides about access.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) method: &'a Method,
    pub(super) path_and_query: &'a str,
    pub(super) headers: &'a HeaderMap,
    pub(super) body: &'a [u8],
    pub(super) peer: Peer,
    pub(super) connection: Option<&'a Connection>,
}

/// The door.
#[derive(Debug)]
pub(super) struct Door {
    allow_plain_legacy_writes: bool,
    /// What was read before is not in `reads`, so a write may not be older.
    opened_at: UnixMillis,
    /// Signatures that authorised a read, and when they end.
    reads: Mutex<BTreeMap<[u8; 32], UnixMillis>>,
}

impl Door {
    pub(super) fn new(allow_plain_legacy_writes: bool, opened_at: UnixMillis) -> Self {
        if allow_plain_legacy_writes {
            tracing::warn!(
                "allow_plain_legacy_writes is on: whoever sees a request of an original client on the network \
                 can repeat it as another within 30 s"
            );
        }
        Self {
            allow_plain_legacy_writes,
            opened_at,
            reads: Mutex::new(BTreeMap::new()),
        }
    }

    /// Lets a request in that `miner` has signed, or says why not.
    pub(super) fn admit(
        &self,
        asked: &Asked<'_>,
        access: Access,
        miner: &Hotkey,
        now: UnixMillis,
    ) -> Result<Caller, ApiError> {
        let header = |name: &str| asked.headers.get(name).and_then(|value| value.to_str().ok());
        if let Some(sequence) = header(SEQUENCE_HEADER) {
            let never_opened = Connection::default();
            asked
                .connection
                .unwrap_or(&never_opened)
                .take(sequence, miner, now)?;
            return Ok(Caller {
                guard: None,
                is_bound: true,
            });
        }
        let is_bound = asked.headers.contains_key(SCHEME_HEADER);
        if is_bound {
            BoundRequest {
                method: asked.method.as_str(),
                path_and_query: asked.path_and_query,
                body: asked.body,
            }
            .check(header, miner, now, MINER_NONCE_WINDOW_SECONDS)
            .map_err(|refusal| ApiError::unauthorised(format!("go away: {refusal}")))?;
        } else {
            let tail = match *asked.method {
                Method::POST | Method::PUT | Method::PATCH => Tail::Body(asked.body),
                _ => Tail::Purpose(Purpose::Management),
            };
            let signers = std::slice::from_ref(miner);
            check_request_to_miner(header, miner, signers, now, MINER_NONCE_WINDOW_SECONDS, &tail)
                .map_err(original_words)?;
        }
        let signature = header(SIGNATURE_HEADER).and_then(|text| hex::decode(text).ok());
        let guard = Sha256::digest(signature.unwrap_or_default()).into();
        let caller = Caller {
            guard: Some(guard),
            is_bound,
        };
        if is_bound {
            return Ok(caller);
        }
        match access {
            Access::Read => self.remember_read(guard, now)?,
            Access::BoundWrite => {
                return Err(ApiError::unauthorised(format!(
                    "go away: this route needs a signature with {SCHEME_HEADER}"
                )));
            }
            Access::Write => self.admit_original_write(asked, guard, header(NONCE_HEADER))?,
        }
        Ok(caller)
    }

    fn admit_original_write(
        &self,
        asked: &Asked<'_>,
        guard: [u8; 32],
        nonce: Option<&str>,
    ) -> Result<(), ApiError> {
        if !asked.peer.is_loopback() {
            if !self.allow_plain_legacy_writes {
                return Err(ApiError::unauthorised(
                    "go away: the original signature covers neither method nor path, so it changes things over \
                     loopback only; use this project's chutes-miner, or an SSH tunnel",
                ));
            }
            tracing::warn!(peer = %asked.peer.0, method = %asked.method, path = asked.path_and_query,
                "a change with the original signature over an open network");
        }
        let signed_at = nonce.and_then(|nonce| nonce.parse().ok()).unwrap_or(0);
        if signed_at < self.opened_at.unix_seconds() {
            return Err(ApiError::unauthorised(
                "go away: the signature is older than this process; sign again",
            ));
        }
        let reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        if reads.contains_key(&guard) {
            return Err(ApiError::unauthorised(
                "go away: this signature was used for a read before",
            ));
        }
        Ok(())
    }

    fn remember_read(&self, guard: [u8; 32], now: UnixMillis) -> Result<(), ApiError> {
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        if reads.len() >= READS_REMEMBERED_MAX {
            reads.retain(|_, ends_at| *ends_at > now);
        }
        if reads.len() >= READS_REMEMBERED_MAX && !reads.contains_key(&guard) {
            return Err(ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too many reads with original signatures in a minute",
            ));
        }
        // A nonce may be as far ahead of this clock as behind.
        reads.insert(guard, now + 2 * MINER_NONCE_WINDOW_SECONDS * 1000);
        Ok(())
    }
}

/// The texts that original clients know. The expected message is never echoed.
fn original_words(refusal: Refusal) -> ApiError {
    ApiError::unauthorised(match refusal {
        Refusal::MalformedSignature | Refusal::Mismatch => format!("go away: (sig): {refusal}"),
        _ => "go away (missing)".to_owned(),
    })
}

//! Who may ask, when, and how often: signatures, a replay guard, and a rate limit.
//!
//! The signature that validators send covers neither method nor path. So each accepted signature is
//! remembered while its nonce is valid, together with what it was used for: whoever captures it can repeat
//! that one request and nothing else. An empty list of validators lets nobody in.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use coordinator::clock::Clock;
use http::HeaderMap;
use protocol::hotkey::Hotkey;
use protocol::signing::{self, MINER_NONCE_WINDOW_SECONDS, NONCE_HEADER, SIGNATURE_HEADER, Tail};
use protocol::time::UnixMillis;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

/// Signatures that are remembered; each for at most twice the nonce window.
const SEEN_MAX: usize = 4096;

/// Whose signature a route wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// One of the configured validators.
    Validator,
    /// This miner itself.
    Miner,
}

/// Why a request is turned away before anything is done for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The signature, its time or its signer: HTTP 401.
    #[error(transparent)]
    Signature(#[from] signing::Refusal),
    /// The signature was used for another request: HTTP 401.
    #[error("the signature was already used for another request")]
    Replayed,
    /// More valid requests than can be remembered: HTTP 503.
    #[error("too many signed requests at once")]
    Full,
}

/// Checks signed requests.
#[derive(Debug)]
pub struct Guard {
    miner: Vec<Hotkey>,
    validators: Vec<Hotkey>,
    clock: Arc<dyn Clock>,
    seen: Mutex<BTreeMap<Vec<u8>, Seen>>,
}

#[derive(Debug)]
struct Seen {
    until: UnixMillis,
    request: [u8; 32],
}

impl Guard {
    /// For a miner and the validators that it trusts.
    #[must_use]
    pub fn new(miner: Hotkey, validators: Vec<Hotkey>, clock: Arc<dyn Clock>) -> Self {
        Self {
            miner: vec![miner],
            validators,
            clock,
            seen: Mutex::default(),
        }
    }

    /// Admits a request whose signature ends in one of the `tails`, and says who signed it. `route` and
    /// `bound` are what the signature may be used for again.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn admit(
        &self,
        headers: &HeaderMap,
        who: Who,
        tails: &[Tail<'_>],
        route: &str,
        bound: &[u8],
    ) -> Result<Hotkey, Refusal> {
        let now = self.clock.now();
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let allowed = match who {
            Who::Validator => &self.validators,
            Who::Miner => &self.miner,
        };
        let mut result = Err(signing::Refusal::Mismatch);
        for tail in tails {
            result = signing::check_request_to_miner(
                header,
                &self.miner[0],
                allowed,
                now,
                MINER_NONCE_WINDOW_SECONDS,
                tail,
            );
            // Only a mismatch can become a match with another tail.
            if result != Err(signing::Refusal::Mismatch) {
                break;
            }
        }
        let signer = result?;
        let nonce = signing::check_nonce(
            header(NONCE_HEADER).unwrap_or_default(),
            now,
            MINER_NONCE_WINDOW_SECONDS,
        )?;
        let signature = hex::decode(header(SIGNATURE_HEADER).unwrap_or_default())
            .map_err(|_| signing::Refusal::MalformedSignature)?;
        let until = UnixMillis::from_unix_seconds(nonce.saturating_add(MINER_NONCE_WINDOW_SECONDS + 1));
        self.remember(now, signature, until, route, bound)?;
        Ok(signer)
    }

    fn remember(
        &self,
        now: UnixMillis,
        signature: Vec<u8>,
        until: UnixMillis,
        route: &str,
        bound: &[u8],
    ) -> Result<(), Refusal> {
        let request = Sha256::new()
            .chain_update(route)
            .chain_update([0])
            .chain_update(bound)
            .finalize()
            .into();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = seen.get(&signature) {
            return if before.request == request {
                Ok(())
            } else {
                Err(Refusal::Replayed)
            };
        }
        if seen.len() >= SEEN_MAX {
            seen.retain(|_, entry| entry.until > now);
        }
        if seen.len() >= SEEN_MAX {
            return Err(Refusal::Full);
        }
        seen.insert(signature, Seen { until, request });
        Ok(())
    }
}

/// A bucket of requests for each address, which refills steadily; the time comes from `tokio::time`. One
/// caller that asks too much does not take the place of the others.
pub struct RateLimit {
    per_second: u32,
    burst: u32,
    buckets: Mutex<BTreeMap<IpAddr, Bucket>>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    at: Instant,
    /// In millionths of a request, so that a refill of a few microseconds is not lost.
    left: u64,
}

impl fmt::Debug for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RateLimit({}/s, burst {})", self.per_second, self.burst)
    }
}

/// One request, in the unit of buckets.
const REQUEST: u64 = 1_000_000;
/// Addresses with a bucket that is not full; callers from more are turned away until one has refilled.
const ADDRESSES_MAX: usize = 1024;

impl RateLimit {
    /// Full buckets.
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self {
            per_second,
            burst,
            buckets: Mutex::default(),
        }
    }

    /// Takes one request out of an address's bucket; false if it is empty.
    #[must_use]
    pub fn take(&self, from: IpAddr) -> bool {
        self.take_at(from, Instant::now())
    }

    fn take_at(&self, from: IpAddr, now: Instant) -> bool {
        let full = u64::from(self.burst) * REQUEST;
        let refilled = |bucket: &Bucket| {
            let elapsed = now.saturating_duration_since(bucket.at).as_micros();
            let refill = u64::try_from(elapsed)
                .unwrap_or(u64::MAX)
                .saturating_mul(u64::from(self.per_second));
            bucket.left.saturating_add(refill).min(full)
        };
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let from = caller(from);
        if !buckets.contains_key(&from) && buckets.len() >= ADDRESSES_MAX {
            buckets.retain(|_, bucket| refilled(bucket) < full);
            if buckets.len() >= ADDRESSES_MAX {
                return false;
            }
        }
        let bucket = buckets.entry(from).or_insert(Bucket { at: now, left: full });
        let left = refilled(bucket);
        let taken = left.checked_sub(REQUEST);
        *bucket = Bucket {
            at: now.max(bucket.at),
            left: taken.unwrap_or(left),
        };
        taken.is_some()
    }
}

/// What counts as one caller: an IPv4 address, or the /64 that one IPv6 customer has at the least.
#[must_use]
pub fn caller(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[derive(Debug)]
    struct Still;

    impl Clock for Still {
        fn now(&self) -> UnixMillis {
            UnixMillis::from_unix_seconds(1_735_689_600)
        }
    }

    fn guard() -> Guard {
        let miner = Hotkey::from_public_key(&[1; 32]);
        Guard::new(miner, vec![], Arc::new(Still))
    }

    #[test]
    fn remembered_signatures_repeat_their_request_and_are_bounded() {
        let guard = guard();
        let now = Still.now();
        let remember = |number: usize, until, bound: &[u8]| {
            guard.remember(now, number.to_le_bytes().to_vec(), until, "POST /prove", bound)
        };
        assert_eq!(remember(0, now + 1, b"a"), Ok(()));
        assert_eq!(remember(0, now + 1, b"a"), Ok(()), "the identical request");
        assert_eq!(remember(0, now + 1, b"b"), Err(Refusal::Replayed));
        for number in 1..SEEN_MAX {
            assert_eq!(remember(number, now + u64::from(number != 7), b"a"), Ok(()));
        }
        assert_eq!(remember(SEEN_MAX, now + 1, b"a"), Ok(()), "number 7 has expired");
        assert_eq!(remember(SEEN_MAX + 1, now + 1, b"a"), Err(Refusal::Full));
        assert_eq!(remember(0, now + 1, b"a"), Ok(()), "known ones still pass");
    }

    #[test]
    fn the_rate_limit_empties_and_refills() {
        let start = Instant::now();
        let limit = RateLimit::new(10, 3);
        let address: IpAddr = [192, 0, 2, 1].into();
        let take = |ms| limit.take_at(address, start + Duration::from_millis(ms));
        assert_eq!([take(0), take(0), take(0), take(0)], [true, true, true, false]);
        assert!(
            limit.take_at([192, 0, 2, 2].into(), start),
            "another address has its own"
        );
        assert_eq!([take(150), take(160), take(210)], [true, false, true]);
        let later = [60_000; 4].map(take);
        assert_eq!(later, [true, true, true, false], "never more than the burst");
    }

    #[test]
    fn the_rate_limit_remembers_a_bounded_number_of_addresses() {
        let start = Instant::now();
        let limit = RateLimit::new(10, 3);
        let address = |number: usize| IpAddr::from(u32::try_from(number).expect("small").to_be_bytes());
        for number in 0..ADDRESSES_MAX {
            assert!(limit.take_at(address(number), start));
        }
        assert!(!limit.take_at(address(ADDRESSES_MAX), start), "no room");
        assert!(limit.take_at(address(0), start), "known ones go on");
        let later = start + Duration::from_secs(1);
        assert!(
            limit.take_at(address(ADDRESSES_MAX), later),
            "the others have refilled"
        );
        assert_eq!(limit.buckets.lock().expect("not poisoned").len(), 1);
    }

    #[test]
    fn callers_are_ipv4_addresses_and_ipv6_networks() {
        for (address, expected) in [
            ("192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ] {
            let address: IpAddr = address.parse().expect("an address");
            assert_eq!(caller(address).to_string(), expected);
        }
    }
}

//! The signed header sets that a member of the coordinator pushes: one per validator, each short-lived.
//!
//! No seed is here and no signature is made here. A set is looked up once per request; only `X-Chutes-*`
//! headers are accepted, so that a push can never inject any other header into what goes upstream.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use http::{HeaderName, HeaderValue};
use protocol::hotkey::Hotkey;
use protocol::link::RegistryHeaders;
use protocol::time::UnixMillis;

use coordinator::clock::Clock;

const HEADERS_PER_SET_MAX: usize = 8;
const VALIDATORS_MAX: usize = 64;
/// What every header of a set starts with (HTTP header names are compared in lower case).
pub const HEADER_PREFIX: &str = "x-chutes-";

/// Why a push is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidHeaders {
    /// More sets or headers than any configuration needs.
    #[error("more than {VALIDATORS_MAX} sets or {HEADERS_PER_SET_MAX} headers in a set")]
    TooMany,
    /// Not a header of the signature scheme. The value is not repeated.
    #[error("header {0:?} is not a valid X-Chutes-* header")]
    Header(String),
}

/// Why there is no set to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// Never received.
    #[error("no signature was received from the coordinator yet")]
    NotReceived,
    /// Received, but too old by now.
    #[error("no fresh signature was received from the coordinator: the last one expired")]
    Expired,
}

/// One usable set.
pub type HeaderSet = Arc<[(HeaderName, HeaderValue)]>;

struct Entry {
    headers: HeaderSet,
    expires_at: UnixMillis,
}

/// The table that the admin socket fills and the registry door reads.
#[derive(Clone)]
pub struct Credentials {
    clock: Arc<dyn Clock>,
    table: Arc<RwLock<BTreeMap<Hotkey, Entry>>>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

impl Credentials {
    /// An empty table.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            table: Arc::default(),
        }
    }

    /// Replaces the sets of the validators named; all or nothing.
    ///
    /// # Errors
    /// [`InvalidHeaders`]; the table is then as before.
    pub fn replace(&self, sets: Vec<RegistryHeaders>) -> Result<(), InvalidHeaders> {
        if sets.len() > VALIDATORS_MAX {
            return Err(InvalidHeaders::TooMany);
        }
        let mut checked = Vec::with_capacity(sets.len());
        for set in sets {
            if set.headers.len() > HEADERS_PER_SET_MAX {
                return Err(InvalidHeaders::TooMany);
            }
            let headers: Vec<_> = set.headers.iter().map(check_header).collect::<Result<_, _>>()?;
            checked.push((
                set.validator,
                Entry {
                    headers: headers.into(),
                    expires_at: set.expires_at,
                },
            ));
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.extend(checked);
        while table.len() > VALIDATORS_MAX {
            table.pop_first();
        }
        Ok(())
    }

    /// The set for a validator, if it may still be used.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn get(&self, validator: &Hotkey) -> Result<HeaderSet, Missing> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let entry = table.get(validator).ok_or(Missing::NotReceived)?;
        if entry.expires_at <= self.clock.now() {
            return Err(Missing::Expired);
        }
        Ok(Arc::clone(&entry.headers))
    }
}

fn check_header((name, value): &(String, String)) -> Result<(HeaderName, HeaderValue), InvalidHeaders> {
    let invalid = || InvalidHeaders::Header(name.chars().take(64).collect());
    let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| invalid())?;
    let mut value = HeaderValue::from_str(value).map_err(|_| invalid())?;
    if !name.as_str().starts_with(HEADER_PREFIX) {
        return Err(invalid());
    }
    value.set_sensitive(true);
    Ok((name, value))
}

#[cfg(test)]
mod tests {

    use coordinator::clock::ManualClock;

    use super::*;

    fn set(validator: &Hotkey, name: &str, value: &str, expires_at: u64) -> RegistryHeaders {
        RegistryHeaders {
            validator: validator.clone(),
            headers: vec![(name.to_owned(), value.to_owned())],
            expires_at: UnixMillis(expires_at),
        }
    }

    #[test]
    fn sets_expire_and_are_replaced_whole() {
        let clock = ManualClock::at(UnixMillis(1_000));
        let credentials = Credentials::new(Arc::new(clock.clone()));
        let [a, b] = [[1; 32], [2; 32]].map(|key| Hotkey::from_public_key(&key));
        assert_eq!(credentials.get(&a), Err(Missing::NotReceived));
        credentials
            .replace(vec![set(&a, "X-Chutes-Nonce", "1", 2_000)])
            .expect("valid");
        assert_eq!(credentials.get(&a).expect("fresh")[0].1, "1");
        assert_eq!(credentials.get(&b), Err(Missing::NotReceived));
        clock.set(UnixMillis(2_000));
        assert_eq!(credentials.get(&a), Err(Missing::Expired));

        let refused = credentials.replace(vec![
            set(&a, "X-Chutes-Nonce", "2", 9_000),
            set(&b, "Authorization", "Basic x", 9_000),
        ]);
        assert_eq!(refused, Err(InvalidHeaders::Header("Authorization".to_owned())));
        assert_eq!(credentials.get(&a), Err(Missing::Expired), "all or nothing");
        for (name, value) in [
            ("X-Chutes-Nonce", "1\r\nHost: x"),
            ("X-Chutes Nonce", "1"),
            ("Host", "x"),
        ] {
            assert!(
                credentials.replace(vec![set(&a, name, value, 9_000)]).is_err(),
                "{name}"
            );
        }
    }
}

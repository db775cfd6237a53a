//! What is signed, which headers carry it, and how it is checked. Pure: the caller gives the time.
//!
//! The strings are fixed by the validator (`validator-protocol`, sections 1.2 to 1.6). A message ends in a
//! *tail*: the lower-case hexadecimal SHA-256 of the exact body, or a fixed purpose word.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::hotkey::{Hotkey, Signer};
use crate::time::UnixMillis;

/// Header with the signer's address, miner to validator.
pub const HOTKEY_HEADER: &str = "X-Chutes-Hotkey";
/// Header with the time of signing in whole Unix seconds.
pub const NONCE_HEADER: &str = "X-Chutes-Nonce";
/// Header with the signature, 128 hexadecimal digits.
pub const SIGNATURE_HEADER: &str = "X-Chutes-Signature";
/// Header with the miner's address, validator to miner and management.
pub const MINER_HEADER: &str = "X-Chutes-Miner";
/// Header with the signer's address, validator to miner and management.
pub const VALIDATOR_HEADER: &str = "X-Chutes-Validator";

/// Header that names a scheme of the management API; absent in the original one.
pub const SCHEME_HEADER: &str = "X-Chutes-Scheme";
/// Header with 32 random hexadecimal digits, so that two requests of one second differ.
pub const RANDOM_HEADER: &str = "X-Chutes-Random";
/// Header with a request's number on a connection that a signature has opened; it stands in place of a signature.
pub const SEQUENCE_HEADER: &str = "X-Chutes-Sequence";
/// The scheme that binds method, path, query and body into the signature.
pub const BOUND_SCHEME: &str = "2";

/// Validators accept nonces this far from their own clock, in seconds, either way.
pub const VALIDATOR_NONCE_WINDOW_SECONDS: u64 = 600;
/// The miner's own doors (management, GPU proof) accept nonces this far from their clock, in seconds.
pub const MINER_NONCE_WINDOW_SECONDS: u64 = 30;

/// The words that stand in place of a body hash (`validator-protocol`, section 1.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Websocket `authenticate`.
    Sockets,
    /// Every registry request.
    Registry,
    /// All authenticated `/miner/*` routes.
    Miner,
    /// `GET /instances/launch_config`.
    Launch,
    /// `DELETE /instances/{chute_id}/{instance_id}`.
    Instances,
    /// `DELETE /nodes/{uuid}`.
    Nodes,
    /// GPU verification.
    Graval,
    /// Management API, GET and DELETE.
    Management,
    /// Validator to chute container.
    Chutes,
    /// `/servers/...` of a validator: sealed workers.
    Tee,
    /// The attestation service of a sealed worker.
    Attest,
    /// The kubeconfig of a sealed worker, from its agent.
    Registration,
}

impl Purpose {
    /// The word as it is signed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sockets => "sockets",
            Self::Registry => "registry",
            Self::Miner => "miner",
            Self::Launch => "launch",
            Self::Instances => "instances",
            Self::Nodes => "nodes",
            Self::Graval => "graval",
            Self::Management => "management",
            Self::Chutes => "chutes",
            Self::Tee => "tee",
            Self::Attest => "attest",
            Self::Registration => "registration",
        }
    }
}

/// The end of a signed message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tail<'a> {
    /// A route's fixed word.
    Purpose(Purpose),
    /// The exact bytes of a body; signed as their SHA-256.
    Body(&'a [u8]),
}

impl fmt::Display for Tail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Purpose(purpose) => f.write_str(purpose.as_str()),
            Self::Body(body) => f.write_str(&body_hash(body)),
        }
    }
}

/// Lower-case hexadecimal SHA-256 of a body.
#[must_use]
pub fn body_hash(body: &[u8]) -> String {
    hex::encode(Sha256::digest(body))
}

/// What a miner signs towards a validator.
#[must_use]
pub fn message_to_validator(miner: &Hotkey, nonce: &str, tail: &Tail<'_>) -> String {
    format!("{miner}:{nonce}:{tail}")
}

/// What a validator signs towards a miner, and a miner towards its own doors (then both are the miner).
#[must_use]
pub fn message_to_miner(miner: &Hotkey, signer: &Hotkey, nonce: &str, tail: &Tail<'_>) -> String {
    format!("{miner}:{signer}:{nonce}:{tail}")
}

/// Header names with their values, ready to be sent.
pub type Headers = Vec<(&'static str, String)>;

/// The three headers of a request from a miner to a validator.
#[must_use]
pub fn headers_to_validator(signer: &Signer, now: UnixMillis, tail: &Tail<'_>) -> Headers {
    let nonce = now.unix_seconds().to_string();
    let signature = signer.sign_hex(message_to_validator(signer.hotkey(), &nonce, tail).as_bytes());
    vec![
        (HOTKEY_HEADER, signer.hotkey().to_string()),
        (NONCE_HEADER, nonce),
        (SIGNATURE_HEADER, signature),
    ]
}

/// The four headers of a request to a miner's door, by a validator or by the miner itself.
#[must_use]
pub fn headers_to_miner(signer: &Signer, miner: &Hotkey, now: UnixMillis, tail: &Tail<'_>) -> Headers {
    let nonce = now.unix_seconds().to_string();
    let signature = signer.sign_hex(message_to_miner(miner, signer.hotkey(), &nonce, tail).as_bytes());
    vec![
        (MINER_HEADER, miner.to_string()),
        (VALIDATOR_HEADER, signer.hotkey().to_string()),
        (NONCE_HEADER, nonce),
        (SIGNATURE_HEADER, signature),
    ]
}

/// Why a signed request is refused. The text names the check and never the expected message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A header is absent or empty.
    #[error("missing header {0}")]
    Missing(&'static str),
    /// The request is addressed to another miner.
    #[error("{MINER_HEADER} is not this miner")]
    OtherMiner,
    /// The signer is not allowed here.
    #[error("the signer is not allowed")]
    SignerNotAllowed,
    /// The nonce is not a whole number of seconds.
    #[error("the nonce is not a whole number of seconds")]
    MalformedNonce,
    /// The nonce lies outside the accepted window.
    #[error("the nonce is {seconds} s away from this clock, {window} s are accepted: check the clocks")]
    NonceOutsideWindow {
        /// Distance between the nonce and the verifier's clock.
        seconds: u64,
        /// What would have been accepted.
        window: u64,
    },
    /// The scheme is none that is known.
    #[error("{SCHEME_HEADER} names an unknown scheme, \"{BOUND_SCHEME}\" is known")]
    UnknownScheme,
    /// The random part is not 32 hexadecimal digits.
    #[error("{RANDOM_HEADER} is not 32 hexadecimal digits")]
    MalformedRandom,
    /// The signature is not 64 bytes of hexadecimal.
    #[error("the signature is not 128 hexadecimal digits")]
    MalformedSignature,
    /// The signature does not belong to the signer and the message.
    #[error("the signature does not match")]
    Mismatch,
}

/// Checks a nonce against a clock, in both directions: `distance >= window` is refused.
///
/// # Errors
/// [`Refusal::MalformedNonce`], [`Refusal::NonceOutsideWindow`].
pub fn check_nonce(nonce: &str, now: UnixMillis, window_seconds: u64) -> Result<u64, Refusal> {
    if nonce.is_empty() || nonce.len() > 20 || !nonce.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Refusal::MalformedNonce);
    }
    let seconds: u64 = nonce.parse().map_err(|_| Refusal::MalformedNonce)?;
    let distance = now.unix_seconds().abs_diff(seconds);
    if distance >= window_seconds {
        return Err(Refusal::NonceOutsideWindow {
            seconds: distance,
            window: window_seconds,
        });
    }
    Ok(seconds)
}

/// Checks a hexadecimal signature over a message.
///
/// # Errors
/// [`Refusal::MalformedSignature`], [`Refusal::Mismatch`].
pub fn check_signature(signer: &Hotkey, message: &str, signature_hex: &str) -> Result<(), Refusal> {
    let signature = hex::decode(signature_hex).map_err(|_| Refusal::MalformedSignature)?;
    if signature.len() != 64 {
        return Err(Refusal::MalformedSignature);
    }
    if signer.verifies(message.as_bytes(), &signature) {
        Ok(())
    } else {
        Err(Refusal::Mismatch)
    }
}

/// Checks a request to a miner's door. `header` looks a header up by its (case-insensitive) name; the
/// signer must be one of `allowed`.
///
/// # Errors
/// A [`Refusal`]; every one of them is HTTP 401.
pub fn check_request_to_miner<'a>(
    header: impl Fn(&str) -> Option<&'a str>,
    miner: &Hotkey,
    allowed: &[Hotkey],
    now: UnixMillis,
    window_seconds: u64,
    tail: &Tail<'_>,
) -> Result<Hotkey, Refusal> {
    let get = |name: &'static str| {
        header(name)
            .filter(|value| !value.is_empty())
            .ok_or(Refusal::Missing(name))
    };
    let (to, from) = (get(MINER_HEADER)?, get(VALIDATOR_HEADER)?);
    let (nonce, signature) = (get(NONCE_HEADER)?, get(SIGNATURE_HEADER)?);
    if to != miner.as_str() {
        return Err(Refusal::OtherMiner);
    }
    let signer = allowed
        .iter()
        .find(|key| key.as_str() == from)
        .ok_or(Refusal::SignerNotAllowed)?;
    check_nonce(nonce, now, window_seconds)?;
    check_signature(signer, &message_to_miner(miner, signer, nonce, tail), signature)?;
    Ok(signer.clone())
}

/// A management request as the newer scheme signs it: all that decides what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoundRequest<'a> {
    /// In capitals.
    pub method: &'a str,
    /// Path with `?` and query, if there is one, exactly as sent.
    pub path_and_query: &'a str,
    /// The exact bytes; empty where there is no body.
    pub body: &'a [u8],
}

impl BoundRequest<'_> {
    /// What is signed. The parts behind the path have no colon in them, so the text reads one way only.
    #[must_use]
    pub fn message(&self, miner: &Hotkey, nonce: &str, random: &str) -> String {
        let (method, path) = (self.method, self.path_and_query);
        let body = body_hash(self.body);
        format!("chutes-miner:{BOUND_SCHEME}:{method}:{path}:{miner}:{nonce}:{random}:{body}")
    }

    /// The five headers of a request to the miner's own management API. `random` must not repeat.
    #[must_use]
    pub fn sign(&self, signer: &Signer, now: UnixMillis, random: u128) -> Headers {
        let (nonce, random) = (now.unix_seconds().to_string(), format!("{random:032x}"));
        let signature = signer.sign_hex(self.message(signer.hotkey(), &nonce, &random).as_bytes());
        vec![
            (SCHEME_HEADER, BOUND_SCHEME.to_owned()),
            (MINER_HEADER, signer.hotkey().to_string()),
            (NONCE_HEADER, nonce),
            (RANDOM_HEADER, random),
            (SIGNATURE_HEADER, signature),
        ]
    }

    /// Checks that `miner` signed this request, less than `window_seconds` from `now`.
    ///
    /// # Errors
    /// A [`Refusal`]; every one of them is HTTP 401.
    pub fn check<'h>(
        &self,
        header: impl Fn(&str) -> Option<&'h str>,
        miner: &Hotkey,
        now: UnixMillis,
        window_seconds: u64,
    ) -> Result<(), Refusal> {
        let get = |name: &'static str| {
            header(name)
                .filter(|value| !value.is_empty())
                .ok_or(Refusal::Missing(name))
        };
        if get(SCHEME_HEADER)? != BOUND_SCHEME {
            return Err(Refusal::UnknownScheme);
        }
        let (to, nonce) = (get(MINER_HEADER)?, get(NONCE_HEADER)?);
        let (random, signature) = (get(RANDOM_HEADER)?, get(SIGNATURE_HEADER)?);
        if to != miner.as_str() {
            return Err(Refusal::OtherMiner);
        }
        if random.len() != 32 || !random.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Refusal::MalformedRandom);
        }
        check_nonce(nonce, now, window_seconds)?;
        check_signature(miner, &self.message(miner, nonce, random), signature)
    }
}

/// Checks a request from a miner, as a validator does.
///
/// # Errors
/// A [`Refusal`]; every one of them is HTTP 401.
pub fn check_request_to_validator<'a>(
    header: impl Fn(&str) -> Option<&'a str>,
    now: UnixMillis,
    window_seconds: u64,
    tail: &Tail<'_>,
) -> Result<Hotkey, Refusal> {
    let get = |name: &'static str| {
        header(name)
            .filter(|value| !value.is_empty())
            .ok_or(Refusal::Missing(name))
    };
    let miner = Hotkey::parse(get(HOTKEY_HEADER)?).map_err(|_| Refusal::SignerNotAllowed)?;
    let (nonce, signature) = (get(NONCE_HEADER)?, get(SIGNATURE_HEADER)?);
    check_nonce(nonce, now, window_seconds)?;
    check_signature(&miner, &message_to_validator(&miner, nonce, tail), signature)?;
    Ok(miner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMillis = UnixMillis(1_735_689_600_000);

    fn lookup<'a>(headers: &'a Headers) -> impl Fn(&str) -> Option<&'a str> {
        move |name| {
            headers
                .iter()
                .find(|(n, _)| n.eq_ignore_ascii_case(name))
                .map(|(_, v)| v.as_str())
        }
    }

    #[test]
    fn what_is_signed_is_accepted_and_bound_to_its_tail() {
        let miner = Signer::from_seed(&[1; 32]);
        let body = br#"{"active":true}"#;
        let headers = headers_to_validator(&miner, NOW, &Tail::Body(body));
        let check = |tail: &Tail<'_>| {
            check_request_to_validator(lookup(&headers), NOW, VALIDATOR_NONCE_WINDOW_SECONDS, tail)
        };
        assert_eq!(check(&Tail::Body(body)), Ok(miner.hotkey().clone()));
        assert_eq!(check(&Tail::Body(b"{}")), Err(Refusal::Mismatch));
        assert_eq!(check(&Tail::Purpose(Purpose::Miner)), Err(Refusal::Mismatch));
    }

    #[test]
    fn a_miners_door_checks_address_signer_and_time() {
        let (miner, validator) = (Signer::from_seed(&[1; 32]), Signer::from_seed(&[2; 32]));
        let tail = Tail::Purpose(Purpose::Graval);
        let headers = headers_to_miner(&validator, miner.hotkey(), NOW, &tail);
        let allowed = [validator.hotkey().clone()];
        let check = |miner: &Hotkey, allowed: &[Hotkey], now| {
            check_request_to_miner(
                lookup(&headers),
                miner,
                allowed,
                now,
                MINER_NONCE_WINDOW_SECONDS,
                &tail,
            )
        };
        assert_eq!(
            check(miner.hotkey(), &allowed, NOW + 29_000),
            Ok(allowed[0].clone())
        );
        assert_eq!(check(validator.hotkey(), &allowed, NOW), Err(Refusal::OtherMiner));
        assert_eq!(check(miner.hotkey(), &[], NOW), Err(Refusal::SignerNotAllowed));
        for shifted in [NOW + 30_000, NOW - 30_000] {
            assert!(matches!(
                check(miner.hotkey(), &allowed, shifted),
                Err(Refusal::NonceOutsideWindow {
                    seconds: 30,
                    window: 30
                })
            ));
        }
    }

    #[test]
    fn a_bound_request_is_good_for_itself_only() {
        let miner = Signer::from_seed(&[1; 32]);
        let request = BoundRequest {
            method: "DELETE",
            path_and_query: "/servers/a?include_jobs=true",
            body: b"",
        };
        let headers = request.sign(&miner, NOW, 7);
        let check = |request: BoundRequest<'_>, now| {
            request.check(lookup(&headers), miner.hotkey(), now, MINER_NONCE_WINDOW_SECONDS)
        };
        assert_eq!(check(request, NOW + 29_000), Ok(()));
        let others = [
            BoundRequest {
                method: "GET",
                ..request
            },
            BoundRequest {
                path_and_query: "/servers/b?include_jobs=true",
                ..request
            },
            BoundRequest {
                path_and_query: "/servers/a",
                ..request
            },
            BoundRequest {
                body: b"{}",
                ..request
            },
        ];
        for other in others {
            assert_eq!(check(other, NOW), Err(Refusal::Mismatch), "{other:?}");
        }
        for now in [NOW + 30_000, NOW - 30_000] {
            assert!(matches!(
                check(request, now),
                Err(Refusal::NonceOutsideWindow { .. })
            ));
        }
        for (name, value, refusal) in [
            (SCHEME_HEADER, "3", Refusal::UnknownScheme),
            (SCHEME_HEADER, "", Refusal::Missing(SCHEME_HEADER)),
            (MINER_HEADER, "5x", Refusal::OtherMiner),
            (NONCE_HEADER, "1e9", Refusal::MalformedNonce),
            (RANDOM_HEADER, "7", Refusal::MalformedRandom),
            (RANDOM_HEADER, &format!("{:032x}", 8), Refusal::Mismatch),
            (SIGNATURE_HEADER, "zz", Refusal::MalformedSignature),
        ] {
            let mut changed = headers.clone();
            changed
                .iter_mut()
                .find(|(n, _)| *n == name)
                .expect("a header of ours")
                .1 = value.to_owned();
            let answer = request.check(lookup(&changed), miner.hotkey(), NOW, MINER_NONCE_WINDOW_SECONDS);
            assert_eq!(answer, Err(refusal));
        }
    }

    #[test]
    fn malformed_nonces_and_signatures_are_refusals() {
        for nonce in ["", "1.5", "-1", "1e9", " 1735689600", "99999999999999999999999"] {
            assert_eq!(
                check_nonce(nonce, NOW, 30),
                Err(Refusal::MalformedNonce),
                "{nonce:?}"
            );
        }
        let key = Signer::from_seed(&[1; 32]);
        for signature in ["", "zz", "00", &"0".repeat(126)] {
            assert_eq!(
                check_signature(key.hotkey(), "m", signature),
                Err(Refusal::MalformedSignature)
            );
        }
        assert_eq!(
            check_signature(key.hotkey(), "m", &"0".repeat(128)),
            Err(Refusal::Mismatch)
        );
        assert!(check_signature(key.hotkey(), "m", &format!("0x{}", key.sign_hex(b"m"))).is_err());
    }
}

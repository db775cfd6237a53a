//! JSON web tokens (HS256): launch tokens and job tokens. The key stays with the validator; a container
//! reads the claims without checking them.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use serde_json::{Value, json};

/// Why a token is refused. All are HTTP 401.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Invalid {
    /// Not three parts of base64url JSON.
    #[error("malformed token")]
    Malformed,
    /// Not signed by this validator with HS256.
    #[error("invalid token signature")]
    Signature,
    /// `exp` has passed.
    #[error("token has expired")]
    Expired,
}

/// The signing key of one validator.
pub(crate) struct TokenKey(hmac::Key);

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenKey")
    }
}

impl TokenKey {
    /// From the validator's secret: the key is the hexadecimal SHA-256 of it.
    pub(crate) fn from_secret(secret: &[u8]) -> Self {
        let hexadecimal = protocol::signing::body_hash(secret);
        Self(hmac::Key::new(hmac::HMAC_SHA256, hexadecimal.as_bytes()))
    }

    /// Signs claims.
    pub(crate) fn sign(&self, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!(
            "{}.{}",
            part(&json!({"alg": "HS256", "typ": "JWT"})),
            part(claims)
        );
        let tag = hmac::sign(&self.0, message.as_bytes());
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(tag))
    }

    /// Checks algorithm, signature and, when there is one, expiry; returns the claims.
    pub(crate) fn check(&self, token: &str, now_seconds: u64) -> Result<Value, Invalid> {
        let (message, signature) = token.rsplit_once('.').ok_or(Invalid::Malformed)?;
        let (header, _) = message.split_once('.').ok_or(Invalid::Malformed)?;
        let header: Value = part_of(header)?;
        if header["alg"] != "HS256" {
            return Err(Invalid::Signature);
        }
        let signature = URL_SAFE_NO_PAD
            .decode(signature)
            .map_err(|_| Invalid::Malformed)?;
        hmac::verify(&self.0, message.as_bytes(), &signature).map_err(|_| Invalid::Signature)?;
        let claims = claims_of(token)?;
        match claims
            .get("exp")
            .map(|exp| exp.as_u64().ok_or(Invalid::Malformed))
        {
            Some(exp) if exp? <= now_seconds => Err(Invalid::Expired),
            _ => Ok(claims),
        }
    }

    /// A hexadecimal tag over any text, for pre-signed addresses.
    pub(crate) fn tag(&self, text: &str) -> String {
        hex::encode(hmac::sign(&self.0, text.as_bytes()))
    }
}

/// The claims of a token, unchecked, as a container reads them.
pub(crate) fn claims_of(token: &str) -> Result<Value, Invalid> {
    let mut parts = token.split('.');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(_), Some(claims), Some(_), None) => part_of(claims),
        _ => Err(Invalid::Malformed),
    }
}

fn part_of(text: &str) -> Result<Value, Invalid> {
    let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| Invalid::Malformed)?;
    serde_json::from_slice(&bytes).map_err(|_| Invalid::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_checked_for_form_signature_and_age() {
        let key = TokenKey::from_secret(b"s");
        let token = key.sign(&json!({"sub": "a", "exp": 100}));
        assert_eq!(key.check(&token, 99).map(|c| c["sub"].clone()), Ok(json!("a")));
        assert_eq!(key.check(&token, 100), Err(Invalid::Expired));
        assert_eq!(
            TokenKey::from_secret(b"t").check(&token, 99),
            Err(Invalid::Signature)
        );
        assert_eq!(key.check("a.b", 99), Err(Invalid::Malformed));
        assert_eq!(key.check("", 99), Err(Invalid::Malformed));
        let unsigned = format!("{}.{}.", URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#), "e30");
        assert_eq!(key.check(&unsigned, 99), Err(Invalid::Signature));
        let swapped = {
            let mut parts: Vec<&str> = token.split('.').collect();
            parts[1] = "eyJzdWIiOiJiIn0";
            parts.join(".")
        };
        assert_eq!(key.check(&swapped, 99), Err(Invalid::Signature));
    }

    #[test]
    fn the_bytes_are_those_of_another_implementation() {
        // From Python: hmac-sha256 with key = hex sha256 of "secret" over compact JSON parts.
        let key = TokenKey::from_secret(b"secret");
        assert_eq!(
            key.sign(&json!({"sub": "x"})),
            "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJ4In0.D8Xcsuf5b_gFahOhuIfHMLMkWa2DR5IRkzSo1bQV4vA"
        );
    }
}

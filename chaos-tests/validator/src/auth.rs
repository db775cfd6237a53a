//! Who asks: hotkey signatures of miners, strict where the real validator falls back to other schemes.

use std::sync::Arc;

use axum::http::HeaderMap;
use protocol::hotkey::Hotkey;
use protocol::signing::{
    HOTKEY_HEADER, Purpose, Tail, VALIDATOR_NONCE_WINDOW_SECONDS, check_request_to_validator,
};
use serde::de::DeserializeOwned;

use crate::problem::Problem;
use crate::validator::Validator;

/// Checks a miner's signature over a purpose or a body, and that the hotkey is registered.
pub(crate) fn miner(
    validator: &Arc<Validator>,
    headers: &HeaderMap,
    tail: &Tail<'_>,
) -> Result<Hotkey, Problem> {
    let hotkey = check_request_to_validator(
        |name| headers.get(name).and_then(|value| value.to_str().ok()),
        validator.nonce_clock(),
        VALIDATOR_NONCE_WINDOW_SECONDS,
        tail,
    )
    .map_err(|refusal| Problem::unauthorized(refusal.to_string()))?;
    if validator.read(|state, _| state.hotkeys.contains(&hotkey)) {
        Ok(hotkey)
    } else {
        let text = format!("{HOTKEY_HEADER}: not registered on netuid 64");
        Err(Problem::unauthorized(text))
    }
}

/// The same for a route with a purpose.
pub(crate) fn miner_for(
    validator: &Arc<Validator>,
    headers: &HeaderMap,
    purpose: Purpose,
) -> Result<Hotkey, Problem> {
    miner(validator, headers, &Tail::Purpose(purpose))
}

/// Refuses hotkeys on the scenario's blacklist.
pub(crate) fn not_blacklisted(validator: &Validator, hotkey: &Hotkey) -> Result<(), Problem> {
    match validator
        .scenario
        .gates
        .blacklist
        .iter()
        .find(|(listed, _)| listed == hotkey)
    {
        Some((_, reason)) => Err(Problem::forbidden(format!(
            "Your hotkey has been blacklisted: {reason}"
        ))),
        None => Ok(()),
    }
}

/// The launch or job token in `Authorization`: the last word of it.
pub(crate) fn bearer(headers: &HeaderMap) -> Result<&str, Problem> {
    headers
        .get("authorization")
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_whitespace().last())
        .ok_or_else(|| Problem::unauthorized("Invalid or missing Authorization header"))
}

/// Reads a JSON body as FastAPI does: another content type than JSON, or other members, is 422.
pub(crate) fn json_body<T: DeserializeOwned>(headers: &HeaderMap, body: &[u8]) -> Result<T, Problem> {
    let kind = headers
        .get("content-type")
        .map(|value| value.to_str().unwrap_or_default());
    let is_json = kind.is_none_or(|kind| {
        let essence = kind.split(';').next().unwrap_or_default().trim().to_lowercase();
        essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
    });
    if !is_json {
        let text = "Input should be a valid dictionary or object to extract fields from";
        return Err(Problem::invalid("model_attributes_type", &["body"], text));
    }
    serde_json::from_slice(body).map_err(|error| {
        let kind = if error.is_data() {
            "value_error"
        } else {
            "json_invalid"
        };
        Problem::invalid(kind, &["body"], error.to_string())
    })
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use serde_json::Value;

    use super::*;

    #[test]
    fn bodies_must_be_json_in_name_and_form() {
        for (kind, body, good) in [
            (None, "{}", true),
            (Some("application/json"), "{}", true),
            (Some("Application/JSON; charset=utf-8"), "{}", true),
            (Some("application/vnd.x+json"), "{}", true),
            (Some("text/plain"), "{}", false),
            (Some("application/octet-stream"), "{}", false),
            (Some("application/json"), "{", false),
            (None, "", false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(kind) = kind {
                headers.insert("content-type", HeaderValue::from_static(kind));
            }
            let read = json_body::<Value>(&headers, body.as_bytes());
            assert_eq!(read.is_ok(), good, "{kind:?} {body}");
            assert!(read.is_ok() || read.is_err_and(|problem| problem.status == 422));
        }
    }

    #[test]
    fn the_token_is_the_last_word() {
        for (value, token) in [("abc", Some("abc")), ("Bearer abc", Some("abc")), ("", None)] {
            let mut headers = HeaderMap::new();
            headers.insert("authorization", HeaderValue::from_static(value));
            assert_eq!(bearer(&headers).ok(), token);
        }
    }
}

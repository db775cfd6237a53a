//! `POST /remote_token`: the validator learns which address this host calls from, by having it fetch a
//! token. The address comes from outside, so only the asking validator's own API host is ever called.

use std::time::Duration;

use protocol::hotkey::Hotkey;
use reqwest::Url;
use serde::Deserialize;

/// The validator gives the whole exchange 15 s.
const FETCH_MAX: Duration = Duration::from_secs(10);
/// Longest answer that is read, in bytes.
const ANSWER_BYTES_MAX: usize = 16 * 1024;
/// Longest token that is handed on, in bytes.
const TOKEN_BYTES_MAX: usize = 4 * 1024;

/// Why there is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not an absolute http or https address without user name.
    #[error("token_url is not a plain http or https address")]
    BadUrl,
    /// The address is not on the API of the validator that asks.
    #[error("token_url is not on the API of the validator that asks")]
    OtherHost,
    /// The validator's API did not answer as expected.
    #[error("fetch the token: {0}")]
    Fetch(String),
}

/// Fetches tokens.
#[derive(Debug)]
pub struct TokenClient {
    apis: Vec<(Hotkey, Url)>,
    http: Result<reqwest::Client, String>,
}

impl TokenClient {
    /// For these validators and their APIs.
    #[must_use]
    pub fn new(apis: Vec<(Hotkey, Url)>) -> Self {
        // Fails only if it is installed already, by us or by another service of this process.
        drop(rustls::crypto::ring::default_provider().install_default());
        let http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(FETCH_MAX)
            .build()
            .map_err(|error| error.to_string());
        Self { apis, http }
    }

    /// The `token` member of what `token_url` answers.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn fetch(&self, validator: &Hotkey, token_url: &str) -> Result<String, Error> {
        let url = self.allowed(validator, token_url)?;
        let failed = |error: reqwest::Error| Error::Fetch(error.without_url().to_string());
        let http = self.http.as_ref().map_err(|error| Error::Fetch(error.clone()))?;
        let mut response = http.get(url).send().await.map_err(failed)?;
        if !response.status().is_success() {
            return Err(Error::Fetch(format!("status {}", response.status())));
        }
        let mut answer = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if answer.len() + chunk.len() > ANSWER_BYTES_MAX {
                return Err(Error::Fetch("the answer is too long".to_owned()));
            }
            answer.extend_from_slice(&chunk);
        }
        token_of(&answer)
    }

    fn allowed(&self, validator: &Hotkey, token_url: &str) -> Result<Url, Error> {
        let url = Url::parse(token_url).map_err(|_| Error::BadUrl)?;
        let plain =
            matches!(url.scheme(), "http" | "https") && url.username().is_empty() && url.password().is_none();
        if !plain {
            return Err(Error::BadUrl);
        }
        let same_origin = |api: &Url| api.origin() == url.origin();
        let allowed = self
            .apis
            .iter()
            .any(|(hotkey, api)| hotkey == validator && same_origin(api));
        if allowed { Ok(url) } else { Err(Error::OtherHost) }
    }
}

fn token_of(answer: &[u8]) -> Result<String, Error> {
    #[derive(Deserialize)]
    struct Answer {
        token: String,
    }
    let answer: Answer = serde_json::from_slice(answer)
        .map_err(|_| Error::Fetch("there is no token in the answer".to_owned()))?;
    if answer.token.len() > TOKEN_BYTES_MAX {
        return Err(Error::Fetch("the token is too long".to_owned()));
    }
    Ok(answer.token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_asking_validators_own_api_is_called() {
        let [first, second] = [1, 2].map(|byte| Hotkey::from_public_key(&[byte; 32]));
        let api = |text: &str| Url::parse(text).expect("a good address");
        let client = TokenClient::new(vec![
            (first.clone(), api("https://api.first.example")),
            (second, api("http://second.example:8000/")),
        ]);
        for (url, expected) in [
            ("https://api.first.example/instances/token_check?salt=1", Ok(())),
            ("https://API.first.example:443/", Ok(())),
            ("http://api.first.example/", Err(Error::OtherHost)),
            ("https://api.first.example:8443/", Err(Error::OtherHost)),
            ("https://api.first.example.evil.example/", Err(Error::OtherHost)),
            ("http://second.example:8000/", Err(Error::OtherHost)),
            ("http://127.0.0.1/", Err(Error::OtherHost)),
            ("https://api.first.example@evil.example/", Err(Error::BadUrl)),
            ("file:///etc/passwd", Err(Error::BadUrl)),
            ("//api.first.example/", Err(Error::BadUrl)),
            ("", Err(Error::BadUrl)),
        ] {
            assert_eq!(client.allowed(&first, url).map(|_| ()), expected, "{url}");
        }
    }

    #[test]
    fn tokens_are_strings_of_bounded_length() {
        assert_eq!(token_of(br#"{"token":"abc","more":1}"#).as_deref(), Ok("abc"));
        let long = format!(r#"{{"token":"{}"}}"#, "x".repeat(TOKEN_BYTES_MAX + 1));
        for bad in ["", "{}", r#"{"token":1}"#, r#""token""#, long.as_str()] {
            assert!(
                matches!(token_of(bad.as_bytes()), Err(Error::Fetch(_))),
                "{bad:.20}"
            );
        }
    }
}

//! What both APIs have in common: the hotkey file, URLs, answers, their errors, the clock.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use futures_util::StreamExt;
use protocol::hotkey::{Signer, seed_from_hotkey_file};
use protocol::time::UnixMillis;
use reqwest::{Response, StatusCode, Url};
use serde_json::Value;

use crate::output::warn;

/// A whole answer must be there within this time.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Answers up to this many bytes are read: an inventory repeats the code of each chute.
const ANSWER_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Now, for nonces.
#[expect(
    clippy::disallowed_methods,
    reason = "the command line has no clock seam: its requests are signed now"
)]
pub(crate) fn now() -> UnixMillis {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}

/// Reads the key, and says so if others can read it too.
pub(crate) fn signer(path: &Path) -> Result<Signer> {
    Ok(Signer::from_seed(&seed(path, "--hotkey or HOTKEY")?))
}

/// Reads the seed out of a hotkey file that an option names.
pub(crate) fn seed(path: &Path, option: &str) -> Result<[u8; 32]> {
    let shown = path.display();
    let text = fs::read_to_string(path)
        .with_context(|| format!("read the hotkey file {shown} ({option} names it)"))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(path)?.permissions().mode();
        if mode & 0o077 != 0 {
            warn(&format!("Warning: others can read {shown}: chmod 600 {shown}"));
        }
    }
    seed_from_hotkey_file(&text).with_context(|| format!("read the hotkey file {shown}"))
}

/// A client whose connections and answers have limits; `answer_max` is for the whole answer.
pub(crate) fn client(answer_max: Option<Duration>) -> Result<reqwest::Client> {
    let builder = reqwest::Client::builder()
        .connect_timeout(Duration::from_secs(10))
        .read_timeout(Duration::from_secs(30))
        // A signature is for one path: it must not follow elsewhere.
        .redirect(reqwest::redirect::Policy::none())
        .timeout(answer_max.unwrap_or(ANSWER_MAX));
    builder.build().context("set up HTTP")
}

/// Base and path as one URL.
pub(crate) fn url(base: &str, path: &str) -> Result<Url> {
    let base = base.trim_end_matches('/');
    Url::parse(&format!("{base}{path}")).with_context(|| format!("{base} is not the URL of an API"))
}

/// A text as one segment of a path or one value of a query.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

/// Who answers, for messages.
pub(crate) async fn send(request: reqwest::RequestBuilder, whom: &str, way_out: &str) -> Result<Response> {
    let sent = request.send().await;
    sent.map_err(reqwest::Error::without_url)
        .with_context(|| format!("cannot reach {whom}; {way_out}"))
}

/// True if nothing was sent, since no connection came about.
pub(crate) fn is_unconnected(error: &anyhow::Error) -> bool {
    let sent = error.downcast_ref::<reqwest::Error>();
    sent.is_some_and(reqwest::Error::is_connect)
}

/// True if a reading request may be answered when it is repeated: nobody was there, or could say.
pub(crate) fn may_pass(error: &anyhow::Error) -> bool {
    let refused = error.downcast_ref::<Refused>();
    match refused {
        Some(refused) => refused.status.is_server_error(),
        None => error.downcast_ref::<reqwest::Error>().is_some(),
    }
}

/// The whole body of an answer.
pub(crate) async fn body(response: Response) -> Result<Vec<u8>> {
    let mut stream = response.bytes_stream();
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        let piece = piece
            .map_err(reqwest::Error::without_url)
            .context("the answer was cut off")?;
        if bytes.len() + piece.len() > ANSWER_BYTES_MAX {
            bail!("the answer has more than {ANSWER_BYTES_MAX} bytes");
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

/// A refusal with its status, for callers that treat some of them as an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) status: StatusCode,
    pub(crate) detail: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.status, self.detail)?;
        if self.status == StatusCode::UNAUTHORIZED {
            f.write_str(" (is --hotkey this miner's key, and are the clocks right?)")?;
        }
        Ok(())
    }
}

impl std::error::Error for Refused {}

/// JSON of a good answer, or what the other side says.
pub(crate) async fn json(response: Response) -> Result<Value> {
    let status = response.status();
    let bytes = body(response).await?;
    if !status.is_success() {
        return Err(refused(status, &bytes).into());
    }
    serde_json::from_slice(&bytes).context("the answer is not JSON: is this the API's address?")
}

/// The `detail` of an error, or its text.
pub(crate) fn refused(status: StatusCode, body: &[u8]) -> Refused {
    let detail = match serde_json::from_slice::<Value>(body) {
        Ok(Value::Object(mut object)) => match object.remove("detail") {
            Some(Value::String(text)) => text,
            Some(other) => other.to_string(),
            None => Value::Object(object).to_string(),
        },
        _ => String::from_utf8_lossy(body).chars().take(500).collect(),
    };
    Refused { status, detail }
}

/// True if the other side says that there is no such thing.
pub(crate) fn is_not_found(error: &anyhow::Error) -> bool {
    let refused = error.downcast_ref::<Refused>();
    refused.is_some_and(|refused| refused.status == StatusCode::NOT_FOUND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_become_one_segment() {
        for (text, escaped) in [
            ("gpu-a", "gpu-a"),
            ("a/b?c", "a%2Fb%3Fc"),
            ("ü", "%C3%BC"),
            ("..", ".."),
        ] {
            assert_eq!(escape(text), escaped);
        }
    }

    #[test]
    fn details_are_found_in_any_error() {
        for (body, detail) in [
            (r#"{"detail":"no"}"#, "no"),
            (r#"{"detail":[{"msg":"x"}]}"#, r#"[{"msg":"x"}]"#),
            (r#"{"error":1}"#, r#"{"error":1}"#),
            ("Internal Server Error", "Internal Server Error"),
        ] {
            assert_eq!(refused(StatusCode::BAD_REQUEST, body.as_bytes()).detail, detail);
        }
    }
}

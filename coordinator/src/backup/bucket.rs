//! A bucket of an S3-compatible store: PUT, GET, DELETE and ListObjectsV2, addressed by path, each request signed.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use reqwest::{Method, Response, Url};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use super::signature::{Request, Scope, authorization, canonical_query, escaped};
use super::target::in_file;
use super::{Error, Result};
use crate::clock::{Clock, WallClock};

/// To connect, TLS included.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Longest silence of the store.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// For a whole snapshot.
const TRANSFER_MAX: Duration = Duration::from_secs(60 * 60);
/// An answer that is no snapshot.
const ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Pages of a listing, of a thousand names each.
const PAGES_MAX: usize = 100;
const NO_BODY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// A bucket, as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketSettings {
    /// Base URL of the store, such as `https://s3.eu-central-1.amazonaws.com`.
    pub endpoint: Url,
    /// As the store calls it.
    pub region: String,
    /// Its name.
    pub bucket: String,
    /// What the names of our objects begin with; may be empty.
    pub prefix: String,
    /// File with the two keys, as Amazon's tools write it.
    pub key_file: PathBuf,
}

/// The two keys. The second is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Name of the key.
    pub access_key: String,
    /// The key.
    pub secret_key: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.access_key)
    }
}

impl Credentials {
    /// Reads `aws_access_key_id = ...` and `aws_secret_access_key = ...`; other lines are left out.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| {
            let lines = text.lines().filter_map(|line| line.split_once('='));
            let mut values = lines.filter(|(key, _)| key.trim() == name);
            let value = values
                .next()
                .map(|(_, value)| value.trim().trim_matches('"').to_owned());
            value.filter(|value| !value.is_empty())
        };
        Some(Self {
            access_key: value("aws_access_key_id")?,
            secret_key: value("aws_secret_access_key")?,
        })
    }

    fn read(file: &Path) -> Result<Self> {
        let failed = |source| in_file(file, source);
        let mode = std::fs::metadata(file).map_err(failed)?.permissions().mode() & 0o777;
        let shown = file.display();
        if mode & 0o077 != 0 {
            let why =
                format!("{shown} has mode {mode:04o}, others can read the keys in it: chmod 600 {shown}");
            return Err(Error::Bucket(why));
        }
        let text = std::fs::read_to_string(file).map_err(failed)?;
        Self::parse(&text).ok_or_else(|| {
            Error::Bucket(format!(
                "{shown} must have the lines aws_access_key_id = ... and aws_secret_access_key = ..."
            ))
        })
    }
}

/// A bucket with its keys.
#[derive(Debug)]
pub struct Bucket {
    settings: BucketSettings,
    credentials: Credentials,
    http: reqwest::Client,
}

impl Bucket {
    pub(super) fn open(settings: &BucketSettings) -> Result<Self> {
        let credentials = Credentials::read(&settings.key_file)?;
        // Fails when a provider is installed already: then that one is used.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_MAX)
            .read_timeout(SILENCE_MAX)
            .timeout(TRANSFER_MAX)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("chutes-miner/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| unreachable(&error))?;
        Ok(Self {
            settings: settings.clone(),
            credentials,
            http,
        })
    }

    /// A signed request for an object, or for the bucket itself where `object` is empty.
    fn request(
        &self,
        method: Method,
        object: &str,
        query: &[(&str, &str)],
        body_sha256: &str,
    ) -> reqwest::RequestBuilder {
        let settings = &self.settings;
        let base = settings.endpoint.path().trim_end_matches('/');
        let mut path = format!("{base}/{}", settings.bucket);
        if !object.is_empty() {
            path = format!("{path}/{}{object}", settings.prefix);
        }
        let mut url = settings.endpoint.clone();
        url.set_path(&escaped(&path, true));
        let sent_query = canonical_query(query);
        url.set_query((!query.is_empty()).then_some(sent_query.as_str()));
        let host = url.host_str().unwrap_or_default();
        let host = url
            .port()
            .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        let time = super::name::compact(WallClock.now());
        let headers = [
            ("host", host.as_str()),
            ("x-amz-content-sha256", body_sha256),
            ("x-amz-date", time.as_str()),
        ];
        let request = Request {
            method: method.as_str(),
            path: &path,
            query,
            headers: &headers,
            body_sha256,
        };
        let scope = Scope {
            access_key: &self.credentials.access_key,
            secret_key: &self.credentials.secret_key,
            region: &settings.region,
            time: &time,
        };
        let authorization = authorization(&request, &scope);
        let mut builder = self
            .http
            .request(method, url)
            .header("authorization", authorization);
        for (name, value) in headers {
            builder = builder.header(name, value);
        }
        builder
    }

    pub(super) async fn put(
        &self,
        name: &str,
        file: &Path,
        size_bytes: u64,
        sha256: &[u8; 32],
    ) -> Result<()> {
        let opened = File::open(file).await.map_err(|source| in_file(file, source))?;
        let request = self.request(Method::PUT, name, &[], &hex::encode(sha256));
        let request = request
            .header("content-length", size_bytes)
            .header("content-type", "application/octet-stream")
            .body(reqwest::Body::wrap_stream(ReaderStream::new(opened)));
        good(request.send().await.map_err(|error| unreachable(&error))?).await?;
        Ok(())
    }

    pub(super) async fn get(&self, name: &str, out: &mut File, to: &Path) -> Result<()> {
        let request = self.request(Method::GET, name, &[], NO_BODY);
        let answer = good(request.send().await.map_err(|error| unreachable(&error))?).await?;
        let mut stream = answer.bytes_stream();
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|error| unreachable(&error))?;
            out.write_all(&piece)
                .await
                .map_err(|source| in_file(to, source))?;
        }
        out.flush().await.map_err(|source| in_file(to, source))
    }

    pub(super) async fn delete(&self, name: &str) -> Result<()> {
        let request = self.request(Method::DELETE, name, &[], NO_BODY);
        let answer = request.send().await.map_err(|error| unreachable(&error))?;
        if answer.status() == reqwest::StatusCode::NOT_FOUND {
            return Ok(());
        }
        good(answer).await.map(drop)
    }

    /// Names that begin with `start`, without the prefix of the configuration.
    pub(super) async fn list(&self, start: &str) -> Result<Vec<String>> {
        let prefix = format!("{}{start}", self.settings.prefix);
        let (mut names, mut token) = (Vec::new(), None::<String>);
        for _ in 0..PAGES_MAX {
            let mut query = vec![("list-type", "2"), ("prefix", prefix.as_str())];
            if let Some(token) = &token {
                query.push(("continuation-token", token));
            }
            let request = self.request(Method::GET, "", &query, NO_BODY);
            let answer = request.send().await.map_err(|error| unreachable(&error))?;
            let page = text_of(good(answer).await?).await?;
            let keys = elements(&page, "Key").into_iter();
            names.extend(keys.filter_map(|key| Some(key.strip_prefix(&self.settings.prefix)?.to_owned())));
            token = elements(&page, "NextContinuationToken").pop();
            if elements(&page, "IsTruncated") != ["true"] || token.is_none() {
                return Ok(names);
            }
        }
        let why = format!(
            "it lists more than {PAGES_MAX} pages under {prefix}: give the snapshots a prefix of their own"
        );
        Err(Error::Bucket(why))
    }
}

fn unreachable(error: &reqwest::Error) -> Error {
    use std::error::Error as _;
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    Error::Bucket(text)
}

async fn text_of(answer: Response) -> Result<String> {
    let mut stream = answer.bytes_stream();
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|error| unreachable(&error))?;
        if bytes.len() + piece.len() > ANSWER_BYTES_MAX {
            return Err(Error::Bucket(format!(
                "it answers more than {ANSWER_BYTES_MAX} bytes"
            )));
        }
        bytes.extend_from_slice(&piece);
    }
    String::from_utf8(bytes).map_err(|_| Error::Bucket("its answer is no text".to_owned()))
}

/// The answer, or what the store says about it: its code and its message, and nothing of the signature.
async fn good(answer: Response) -> Result<Response> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let body = text_of(answer).await.unwrap_or_default();
    let say = |name| elements(&body, name).into_iter().next().unwrap_or_default();
    let (code, message) = (say("Code"), say("Message"));
    Err(Error::Bucket(
        format!("{status} {code} {message}").trim_end().to_owned(),
    ))
}

/// The texts of all elements with this name. The answers of S3 have no attributes where we look, and no element
/// within one of its own name.
fn elements(xml: &str, name: &str) -> Vec<String> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let pieces = xml.split(&open).skip(1);
    let texts = pieces.filter_map(|piece| piece.split_once(&close).map(|(text, _)| text));
    let plain = |text: &str| {
        let named = text
            .replace("&lt;", "<")
            .replace("&gt;", ">")
            .replace("&quot;", "\"");
        named.replace("&apos;", "'").replace("&amp;", "&")
    };
    texts.map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_amazons_tools_write_them() {
        let text = "[default]\naws_access_key_id = AKIA\naws_secret_access_key=a/b=c\nregion = x\n";
        let credentials = Credentials::parse(text).expect("both are there");
        assert_eq!(
            (credentials.access_key.as_str(), credentials.secret_key.as_str()),
            ("AKIA", "a/b=c")
        );
        assert!(!format!("{credentials:?}").contains("a/b=c"));
        for bad in [
            "",
            "aws_access_key_id = AKIA",
            "aws_access_key_id =\naws_secret_access_key = b",
        ] {
            assert_eq!(Credentials::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn elements_are_found_and_unescaped() {
        let xml = "<R><Key>a&amp;b</Key><Name>n</Name><Key>c</Key><IsTruncated>true</IsTruncated></R>";
        assert_eq!(elements(xml, "Key"), ["a&b", "c"]);
        assert_eq!(elements(xml, "IsTruncated"), ["true"]);
        assert_eq!(elements("<Key>cut", "Key"), Vec::<String>::new());
    }
}

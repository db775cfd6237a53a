//! The REST client: signs, sends, bounds, and reads answers into rows.
//!
//! Reads are repeated a few times on 503 and on broken connections, since the validator's API recycles its
//! processes. Writes are sent once, and only while this member leads: that is asked after the signature, right before
//! they leave. Redirects are not followed: signatures must not reach another host.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::FutureExt;
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, ConfigId, GpuId, InstanceId, JobId, ServerId};
use protocol::signing::Headers;
use protocol::workload::Secret;
use reqwest::{Method, RequestBuilder, Response, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::time::sleep;

use super::client::{Call, Deletion, SupportedGpus, ValidatorApi};
use super::event::shortened;
use super::rows::{
    ActiveInstanceRow, Advertised, BountyRow, ChuteRow, ImageRow, InstanceRow, JobRow, LaunchConfig,
    MetricRow, NewServer, NodeAdvertisement, NodeRow, RollingUpdateRow, UtilizationRow, VerificationStatus,
};
use super::stream::{Listing, Reader};
use super::{Error, LeadsNow, Result, ValidatorConfig, times};
use crate::clock::Clock;
use crate::signer::{BodyRoute, MessageKind, Sign};

/// From this difference between the clocks a warning is logged, in ms. The tightest nonce window is 30 s.
pub const CLOCK_OFFSET_WARN_MS: u64 = 5_000;

/// Limits of the client.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For the TCP and TLS handshake.
    pub connect: Duration,
    /// Between two pieces of an answer.
    pub silence: Duration,
    /// For a whole call that is no stream.
    pub call: Duration,
    /// For a whole stream.
    pub stream: Duration,
    /// Longest answer that is no stream, in bytes.
    pub body_bytes: usize,
    /// How often a read is tried in all.
    pub tries: u32,
    /// Pause before the second try; doubled for each further one.
    pub pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            silence: Duration::from_secs(30),
            call: Duration::from_secs(30),
            stream: Duration::from_secs(180),
            body_bytes: 32 * 1024 * 1024,
            tries: 3,
            pause: Duration::from_millis(300),
        }
    }
}

/// The REST interface of one validator.
pub struct Client {
    hotkey: Hotkey,
    api: Url,
    http: reqwest::Client,
    signer: Arc<dyn Sign>,
    clock: Arc<dyn Clock>,
    limits: Limits,
    leads_now: LeadsNow,
    rng: Mutex<fastrand::Rng>,
    clock_offset_ms: AtomicI64,
    clock_warned: AtomicBool,
}

/// No offset was measured yet.
const OFFSET_UNKNOWN: i64 = i64::MIN;

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({} at {})", self.hotkey, self.api)
    }
}

impl Client {
    /// A client for this validator. `rng` jitters repetitions; nothing is written while `leads_now` denies it.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when TLS cannot be set up on this machine.
    pub fn new(
        validator: &ValidatorConfig,
        signer: Arc<dyn Sign>,
        clock: Arc<dyn Clock>,
        limits: Limits,
        leads_now: LeadsNow,
        rng: fastrand::Rng,
    ) -> Result<Self> {
        // Fails when a provider is installed already: then that one is used.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .connect_timeout(limits.connect)
            .read_timeout(limits.silence)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .pool_max_idle_per_host(4)
            .pool_idle_timeout(Duration::from_secs(60))
            .user_agent(concat!("chutes-miner/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| Error::Unreachable(chain(&e)))?;
        Ok(Self {
            hotkey: validator.hotkey.clone(),
            api: validator.api.clone(),
            http,
            signer,
            clock,
            limits,
            leads_now,
            rng: Mutex::new(rng),
            clock_offset_ms: AtomicI64::new(OFFSET_UNKNOWN),
            clock_warned: AtomicBool::new(false),
        })
    }

    /// A route; `segments` are percent-encoded, a final empty one gives the trailing slash.
    fn url(&self, segments: &[&str], query: &[(&str, &str)]) -> Url {
        let mut url = self.api.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        url
    }

    async fn signed(&self, request: RequestBuilder, kind: Option<MessageKind>) -> Result<RequestBuilder> {
        let headers: Headers = match kind {
            Some(kind) => self.signer.to_validator(kind).await?,
            None => Vec::new(),
        };
        Ok(headers
            .into_iter()
            .fold(request, |request, (name, value)| request.header(name, value)))
    }

    /// Sends once, measures the clock, and turns refusals into errors.
    async fn send(&self, request: RequestBuilder, limit: Duration) -> Result<Response> {
        let before = self.clock.now();
        let response = request.timeout(limit).send().await.map_err(unreachable)?;
        let after = self.clock.now();
        if let Some(theirs) = response
            .headers()
            .get(http::header::DATE)
            .and_then(|value| value.to_str().ok())
            .and_then(times::http_date)
        {
            // The header is cut to the second: on average the truth is half a second later.
            let middle = before.0 / 2 + after.0 / 2;
            let offset =
                i64::try_from(theirs.0 + 500).unwrap_or(i64::MAX) - i64::try_from(middle).unwrap_or(0);
            self.note_clock_offset(offset);
        }
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        // The text only explains; a refusal stays one when its body breaks off.
        let body = self.body(response, 64 * 1024).await.unwrap_or_default();
        Err(Error::Refused {
            status,
            detail: detail(&body),
        })
    }

    /// Sends what changes something, unless another member may lead by now.
    async fn send_write(&self, request: RequestBuilder) -> Result<Response> {
        if !(self.leads_now)() {
            return Err(Error::NotLeading);
        }
        self.send(request, self.limits.call).await
    }

    fn note_clock_offset(&self, offset_ms: i64) {
        self.clock_offset_ms.store(offset_ms, Ordering::Relaxed);
        let off = offset_ms.unsigned_abs() > CLOCK_OFFSET_WARN_MS;
        if off != self.clock_warned.swap(off, Ordering::Relaxed) {
            let validator = self.hotkey.as_str();
            match off {
                true => tracing::warn!(
                    validator,
                    offset_ms,
                    "our clock differs from the validator's: run NTP"
                ),
                false => tracing::info!(
                    validator,
                    offset_ms,
                    "our clock agrees with the validator's again"
                ),
            }
        }
    }

    async fn body(&self, response: Response, limit: usize) -> Result<Vec<u8>> {
        if response
            .content_length()
            .is_some_and(|length| length > limit as u64)
        {
            return Err(Error::TooLarge(limit));
        }
        let mut body = Vec::new();
        let mut pieces = response.bytes_stream();
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(unreachable)?;
            if body.len() + piece.len() > limit {
                return Err(Error::TooLarge(limit));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }

    async fn get_json<T: DeserializeOwned>(&self, url: Url, kind: Option<MessageKind>) -> Result<T> {
        let mut last = Err(Error::Protocol("not asked".to_owned()));
        let mut pause = self.limits.pause;
        for tries in 1..=self.limits.tries.max(1) {
            last = self.get_json_once(&url, kind).await;
            match &last {
                Err(error) if tries < self.limits.tries && worth_repeating(error) => {}
                _ => break,
            }
            self.pause(&mut pause).await;
        }
        last
    }

    async fn get_json_once<T: DeserializeOwned>(&self, url: &Url, kind: Option<MessageKind>) -> Result<T> {
        let request = self.signed(self.http.get(url.clone()), kind).await?;
        let response = self.send(request, self.limits.call).await?;
        parse(&self.body(response, self.limits.body_bytes).await?)
    }

    /// Waits before a read is repeated, longer each time.
    async fn pause(&self, pause: &mut Duration) {
        let jitter = self.rng.lock().unwrap_or_else(PoisonError::into_inner).f64() + 0.5;
        sleep(pause.mul_f64(jitter)).await;
        *pause *= 2;
    }

    /// One of the streams of `/miner/`.
    async fn stream<T: DeserializeOwned>(&self, name: &str, query: &[(&str, &str)]) -> Result<Listing<T>> {
        let url = self.url(&["miner", name, ""], query);
        let mut last = Ok(Listing::Unknown);
        let mut pause = self.limits.pause;
        for tries in 1..=self.limits.tries.max(1) {
            last = self.stream_once(&url, name).await;
            match &last {
                Err(error) if tries < self.limits.tries && worth_repeating(error) => {}
                _ => break,
            }
            self.pause(&mut pause).await;
        }
        last
    }

    async fn stream_once<T: DeserializeOwned>(&self, url: &Url, name: &str) -> Result<Listing<T>> {
        let request = self
            .signed(self.http.get(url.clone()), Some(MessageKind::MinerRead))
            .await?;
        let response = self.send(request, self.limits.stream).await?;
        let mut reader = Reader::default();
        let mut pieces = response.bytes_stream();
        while let Some(piece) = pieces.next().await {
            let piece = match piece {
                Ok(piece) => piece,
                Err(error) => {
                    // Cut after the headers: rows are missing, nobody knows which.
                    tracing::warn!(stream = name, error = chain(&error), "listing broken off");
                    return Ok(Listing::Unknown);
                }
            };
            if let Err(error) = reader.push(&piece) {
                return Err(Error::Protocol(format!("listing of {name}: {error}")));
            }
        }
        let listing = reader.finish();
        match &listing {
            Listing::Unknown => tracing::debug!(stream = name, "empty or cut listing: unknown"),
            Listing::Known { broken_rows, .. } if *broken_rows > 0 => {
                tracing::warn!(stream = name, broken_rows, "unreadable rows in a listing");
            }
            Listing::Known { .. } => {}
        }
        Ok(listing)
    }

    /// A listing that is a JSON array: here empty means empty.
    async fn array<T: DeserializeOwned>(&self, url: Url, kind: Option<MessageKind>) -> Result<Listing<T>> {
        let values: Vec<Value> = self.get_json(url, kind).await?;
        let count = values.len();
        let rows: Vec<T> = values
            .into_iter()
            .filter_map(|value| serde_json::from_value(value).ok())
            .collect();
        let broken_rows = (count - rows.len()) as u64;
        if broken_rows > 0 {
            tracing::warn!(
                validator = self.hotkey.as_str(),
                broken_rows,
                "unreadable rows in a listing"
            );
        }
        Ok(Listing::Known { rows, broken_rows })
    }

    async fn delete(&self, url: Url, kind: MessageKind) -> Result<Deletion> {
        let request = self.signed(self.http.delete(url), Some(kind)).await?;
        match self.send_write(request).await {
            Ok(_) => Ok(Deletion::Deleted),
            Err(error) if error.is_not_found() => Ok(Deletion::AlreadyGone),
            Err(error) => Err(error),
        }
    }

    async fn with_body(
        &self,
        method: Method,
        url: Url,
        route: BodyRoute,
        body: Vec<u8>,
        header: Option<(&'static str, String)>,
    ) -> Result<Vec<u8>> {
        let kind = MessageKind::Body {
            route,
            sha256: Sha256::digest(&body).into(),
        };
        let mut request = self
            .http
            .request(method, url)
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(body);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let request = self.signed(request, Some(kind)).await?;
        let response = self.send_write(request).await?;
        self.body(response, self.limits.body_bytes).await
    }
}

fn worth_repeating(error: &Error) -> bool {
    matches!(
        error,
        Error::Unreachable(_)
            | Error::Refused {
                status: 502..=504,
                ..
            }
    )
}

fn unreachable(error: reqwest::Error) -> Error {
    Error::Unreachable(chain(&error.without_url()))
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    shortened(&text)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    serde_json::from_slice(body).map_err(|e| {
        // Line and column, not serde's text: it may repeat a token.
        Error::Protocol(format!(
            "unexpected JSON at line {}, column {}",
            e.line(),
            e.column()
        ))
    })
}

/// What a refusal says: `detail` of the JSON if there is one, else the beginning of the body.
fn detail(body: &[u8]) -> String {
    let text = match serde_json::from_slice::<Value>(body) {
        Ok(Value::Object(mut object)) => match object.remove("detail") {
            Some(Value::String(text)) => text,
            Some(other) => other.to_string(),
            None => String::from_utf8_lossy(body).into_owned(),
        },
        _ => String::from_utf8_lossy(body).into_owned(),
    };
    shortened(&text).trim().to_owned()
}

impl ValidatorApi for Client {
    fn hotkey(&self) -> &Hotkey {
        &self.hotkey
    }

    fn clock_offset_ms(&self) -> Option<i64> {
        let offset = self.clock_offset_ms.load(Ordering::Relaxed);
        (offset != OFFSET_UNKNOWN).then_some(offset)
    }

    fn ping(&self) -> Call<'_, ()> {
        async move {
            self.get_json::<Value>(self.url(&["ping"], &[]), None)
                .await
                .map(drop)
        }
        .boxed()
    }

    fn chutes(&self) -> Call<'_, Listing<ChuteRow>> {
        self.stream("chutes", &[]).boxed()
    }

    fn images(&self) -> Call<'_, Listing<ImageRow>> {
        self.stream("images", &[]).boxed()
    }

    fn nodes(&self) -> Call<'_, Listing<NodeRow>> {
        self.stream("nodes", &[]).boxed()
    }

    fn instances(&self) -> Call<'_, Listing<InstanceRow>> {
        self.stream("instances", &[("explicit_null", "True")]).boxed()
    }

    fn jobs(&self) -> Call<'_, Listing<JobRow>> {
        self.stream("jobs", &[]).boxed()
    }

    fn metrics(&self) -> Call<'_, Listing<MetricRow>> {
        self.stream("metrics", &[]).boxed()
    }

    fn active_instances(&self) -> Call<'_, Listing<ActiveInstanceRow>> {
        let url = self.url(&["miner", "active_instances", ""], &[]);
        self.array(url, Some(MessageKind::MinerRead)).boxed()
    }

    fn utilization(&self) -> Call<'_, Listing<UtilizationRow>> {
        self.array(self.url(&["chutes", "utilization"], &[]), None)
            .boxed()
    }

    fn rolling_updates(&self) -> Call<'_, Listing<RollingUpdateRow>> {
        self.array(self.url(&["chutes", "rolling_updates"], &[]), None)
            .boxed()
    }

    fn bounties(&self) -> Call<'_, Listing<BountyRow>> {
        self.array(self.url(&["bounties", ""], &[]), None).boxed()
    }

    fn supported_gpus(&self) -> Call<'_, SupportedGpus> {
        self.get_json(self.url(&["nodes", "supported"], &[]), None)
            .boxed()
    }

    fn chute<'a>(&'a self, chute: &'a ChuteId, version: &'a ChuteVersion) -> Call<'a, Option<ChuteRow>> {
        async move {
            let url = self.url(&["miner", "chutes", chute.as_str(), version.as_str()], &[]);
            match self.get_json(url, Some(MessageKind::MinerRead)).await {
                Ok(row) => Ok(Some(row)),
                Err(error) if error.is_not_found() => Ok(None),
                Err(error) => Err(error),
            }
        }
        .boxed()
    }

    fn advertise<'a>(&'a self, server: &'a ServerId, gpus: &'a [NodeAdvertisement]) -> Call<'a, Advertised> {
        async move {
            let body = json!({ "server_id": server, "nodes": gpus })
                .to_string()
                .into_bytes();
            let url = self.url(&["nodes", ""], &[]);
            let answer = self
                .with_body(Method::POST, url, BodyRoute::AdvertiseNodes, body, None)
                .await?;
            parse(&answer)
        }
        .boxed()
    }

    fn add_server<'a>(&'a self, server: &'a NewServer) -> Call<'a, ()> {
        async move {
            let mut body = json!(server);
            for gpu in body["gpus"].as_array_mut().into_iter().flatten() {
                if let Some(gpu) = gpu.as_object_mut() {
                    // What an attestation service did not say.
                    gpu.retain(|key, value| {
                        *value != 0 || !["processors", "max_threads_per_processor"].contains(&key.as_str())
                    });
                }
            }
            let body = body.to_string().into_bytes();
            let url = self.url(&["servers", ""], &[]);
            self.with_body(Method::POST, url, BodyRoute::AddServer, body, None)
                .await
                .map(drop)
        }
        .boxed()
    }

    fn delete_server<'a>(&'a self, server: &'a ServerId) -> Call<'a, Deletion> {
        self.delete(
            self.url(&["servers", server.as_str()], &[]),
            MessageKind::DeleteServer,
        )
        .boxed()
    }

    fn verification_status<'a>(&'a self, task_id: &'a str) -> Call<'a, VerificationStatus> {
        #[derive(Deserialize)]
        struct Answer {
            status: String,
            #[serde(default)]
            detail: Value,
            #[serde(default)]
            error: Value,
        }
        async move {
            let url = self.url(&["nodes", "verification_status"], &[("task_id", task_id)]);
            let answer: Answer = self.get_json(url, Some(MessageKind::VerificationStatus)).await?;
            let text = |value: Value| match value {
                Value::String(text) => shortened(&text),
                other => shortened(&other.to_string()),
            };
            match answer.status.as_str() {
                "pending" => Ok(VerificationStatus::Pending),
                "verified" => Ok(VerificationStatus::Verified),
                "failed" => Ok(VerificationStatus::Failed(text(answer.detail))),
                "error" => Ok(VerificationStatus::Failed(text(answer.error))),
                other => Err(Error::Protocol(format!(
                    "verification status {:?}",
                    shortened(other)
                ))),
            }
        }
        .boxed()
    }

    fn delete_node<'a>(&'a self, gpu: &'a GpuId) -> Call<'a, Deletion> {
        self.delete(self.url(&["nodes", gpu.as_str()], &[]), MessageKind::DeleteNode)
            .boxed()
    }

    fn launch_config<'a>(&'a self, chute: &'a ChuteId, job: Option<&'a JobId>) -> Call<'a, LaunchConfig> {
        #[derive(Deserialize)]
        struct Answer {
            token: String,
            config_id: String,
        }
        async move {
            let mut query = vec![("chute_id", chute.as_str())];
            query.extend(job.map(|job| ("job_id", job.as_str())));
            // Sent once: for a job the first attempt counts, and a repetition would be refused.
            let request = self.http.get(self.url(&["instances", "launch_config"], &query));
            let request = self.signed(request, Some(MessageKind::LaunchConfig)).await?;
            let response = self.send_write(request).await?;
            let answer: Answer = parse(&self.body(response, 64 * 1024).await?)?;
            Ok(LaunchConfig {
                config: ConfigId::parse(&answer.config_id).map_err(|e| Error::Protocol(e.to_string()))?,
                token: Secret::new(answer.token),
            })
        }
        .boxed()
    }

    fn delete_instance<'a>(&'a self, chute: &'a ChuteId, instance: &'a InstanceId) -> Call<'a, Deletion> {
        let url = self.url(&["instances", chute.as_str(), instance.as_str()], &[]);
        self.delete(url, MessageKind::DeleteInstance).boxed()
    }

    fn release_job<'a>(&'a self, job: &'a JobId) -> Call<'a, Deletion> {
        self.delete(
            self.url(&["miner", "jobs", job.as_str()], &[]),
            MessageKind::ReleaseJob,
        )
        .boxed()
    }

    fn announce_instance<'a>(
        &'a self,
        chute: &'a ChuteId,
        gpus: &'a [GpuId],
        host: &'a str,
        port: u16,
    ) -> Call<'a, InstanceRow> {
        async move {
            let body = json!({ "node_ids": gpus, "host": host, "port": port })
                .to_string()
                .into_bytes();
            let url = self.url(&["instances", chute.as_str(), ""], &[]);
            parse(
                &self
                    .with_body(Method::POST, url, BodyRoute::AnnounceInstance, body, None)
                    .await?,
            )
        }
        .boxed()
    }

    fn activate_instance<'a>(
        &'a self,
        chute: &'a ChuteId,
        instance: &'a InstanceId,
    ) -> Call<'a, InstanceRow> {
        async move {
            let body = br#"{"active":true}"#.to_vec();
            let url = self.url(&["instances", chute.as_str(), instance.as_str()], &[]);
            parse(
                &self
                    .with_body(Method::PATCH, url, BodyRoute::ActivateInstance, body, None)
                    .await?,
            )
        }
        .boxed()
    }

    fn upload_audit<'a>(&'a self, report: &'a [u8], block: u64) -> Call<'a, ()> {
        async move {
            let url = self.url(&["audit", "miner_data"], &[]);
            let header = Some(("X-Chutes-Block", block.to_string()));
            self.with_body(Method::POST, url, BodyRoute::UploadAudit, report.to_vec(), header)
                .await
                .map(drop)
        }
        .boxed()
    }
}

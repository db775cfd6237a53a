//! Requests to the miner's management API, signed by the scheme that covers all of them.

use std::time::Duration;

use anyhow::{Result, bail};
use protocol::hotkey::Signer;
use protocol::signing::BoundRequest;
use reqwest::{Method, Response};
use serde_json::Value;

use crate::args;
use crate::output::warn;
use crate::request::{self, escape};

/// The API and the key for it.
#[derive(Debug)]
pub(crate) struct Miner {
    /// Members' addresses, in the order in which they are tried.
    bases: Vec<String>,
    signer: Signer,
}

impl Miner {
    pub(crate) fn new(arguments: &args::Miner) -> Result<Self> {
        let signer = request::signer(&arguments.key.hotkey)?;
        let bases = arguments.miner_api.split(',').map(str::trim);
        let bases = bases.map(str::to_owned).collect();
        Ok(Self { bases, signer })
    }

    /// Sends a request; the answer is open. Only where no connection comes about is the next address tried:
    /// what was sent may have been done.
    pub(crate) async fn open(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        answer_max: Option<Duration>,
    ) -> Result<Response> {
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let mut bases = self.bases.iter().peekable();
        loop {
            let Some(base) = bases.next() else {
                bail!("--miner-api names no address");
            };
            match self.open_at(base, &method, path, &body, answer_max).await {
                Err(error) if bases.peek().is_some() && request::is_unconnected(&error) => {
                    warn(&format!(
                        "Warning: cannot reach {base}: the next address is tried"
                    ));
                }
                opened => return opened,
            }
        }
    }

    async fn open_at(
        &self,
        base: &str,
        method: &Method,
        path: &str,
        body: &[u8],
        answer_max: Option<Duration>,
    ) -> Result<Response> {
        let url = request::url(base, path)?;
        let sent_path = match url.query() {
            Some(query) => format!("{}?{query}", url.path()),
            None => url.path().to_owned(),
        };
        let bound = BoundRequest {
            method: method.as_str(),
            path_and_query: &sent_path,
            body,
        };
        let headers = bound.sign(&self.signer, request::now(), fastrand::u128(..));
        let mut builder = request::client(answer_max)?.request(method.clone(), url);
        for (name, value) in headers {
            builder = builder.header(name, value);
        }
        if !body.is_empty() {
            builder = builder
                .header("Content-Type", "application/json")
                .body(body.to_vec());
        }
        let whom = format!("the miner's API at {base}");
        request::send(builder, &whom, "does its agent run, and is --miner-api right?").await
    }

    /// Sends a request; the JSON of its answer.
    pub(crate) async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
        request::json(self.open(method, path, body, None).await?).await
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Value> {
        self.ask(Method::GET, path, None).await
    }

    /// Jobs that would end with a server.
    pub(crate) async fn jobs_on(&self, server: &str) -> Result<usize> {
        let path = format!("/servers/{}/delete_preflight", escape(server));
        let preflight = self.get(&path).await?;
        Ok(preflight["jobs"].as_array().map_or(0, Vec::len))
    }
}

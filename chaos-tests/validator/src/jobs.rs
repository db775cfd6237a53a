//! Jobs: offered to all, run by the first container that claims one, finished by it (`validator-protocol`,
//! section 6.7).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State as Shared};
use axum::http::HeaderMap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use protocol::id::JobId;
use protocol::signing::Purpose;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::auth;
use crate::cipher;
use crate::clock;
use crate::event::Event;
use crate::instances;
use crate::ledger::{DeletedBy, Record};
use crate::problem::Problem;
use crate::state::{Instance, PortMapping};
use crate::validator::Validator;

const PORT_TEST_TIMEOUT: Duration = Duration::from_secs(10);

/// `DELETE /miner/jobs/{job_id}`: the miner gives it back.
pub(crate) async fn release(
    Shared(validator): Shared<Arc<Validator>>,
    Path(job): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, Problem> {
    let miner = auth::miner_for(&validator, &headers, Purpose::Miner)?;
    validator.change(|state, out| {
        let found = JobId::parse(&job)
            .ok()
            .and_then(|id| state.jobs.get_mut(&id))
            .filter(|job| job.hotkey.as_ref() == Some(&miner) && job.finished_at.is_none());
        let Some(found) = found else {
            out.untouched();
            return Err(Problem::not_found(format!("Job {job} not found")));
        };
        found.hotkey = None;
        found.started_at = None;
        found.status = "pending".to_owned();
        let instance = found.instance.take();
        let again = found.clone();
        if let Some(id) = instance {
            // Unassigned first, so that the end of the instance does not fail the job.
            if let Some(row) = state.instances.get_mut(&id) {
                row.job = None;
            }
            instances::end(
                state,
                out,
                &id,
                DeletedBy::Miner,
                "job released by its miner",
                true,
            );
        }
        out.record(Record::JobReleased {
            job: again.id.clone(),
            hotkey: miner,
        });
        if let Some(chute) = state.chutes.get(&again.chute) {
            out.publish(Event::job_created(&again, chute, true));
        }
        Ok(Json(Value::Null))
    })
}

#[derive(Debug, Deserialize)]
pub(crate) struct TokenQuery {
    token: Option<String>,
}

fn checked_job(validator: &Validator, job: &str, query: &TokenQuery) -> Result<JobId, Problem> {
    let token = query.token.as_deref().unwrap_or_default();
    let claims = validator
        .tokens
        .check(token, clock::now().unix_seconds())
        .map_err(|invalid| Problem::unauthorized(invalid.to_string()))?;
    if claims["sub"] != job || claims["iss"] != "chutes" {
        return Err(Problem::unauthorized("The token is not for this job"));
    }
    JobId::parse(job).map_err(|_| Problem::not_found("Job not found"))
}

#[derive(Debug, Deserialize)]
struct Outcome {
    status: String,
    #[serde(default)]
    result: Value,
    #[serde(default)]
    detail: Option<String>,
    #[serde(default)]
    output_filenames: Vec<String>,
}

/// `POST /jobs/{job_id}?token=`: the container tells how it ended.
pub(crate) async fn report(
    Shared(validator): Shared<Arc<Validator>>,
    Path(job): Path<String>,
    Query(query): Query<TokenQuery>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Problem> {
    let id = checked_job(&validator, &job, &query)?;
    let outcome: Outcome = auth::json_body(&headers, &body)?;
    validator.change(|state, out| {
        let found = state.jobs.get_mut(&id).filter(|job| job.finished_at.is_none());
        let Some(found) = found else {
            out.untouched();
            return Err(Problem::not_found(format!("Job {job} not found or finished")));
        };
        found.status = outcome.status;
        found.result = outcome.result;
        found.error_detail = outcome.detail;
        found.output_files = outcome.output_filenames;
        let urls: Value = found
            .output_files
            .iter()
            .map(|name| json!({"filename": name, "upload_url": format!("{}/jobs/{id}/upload", validator.api_url)}))
            .collect();
        Ok(Json(json!({"job_id": id, "output_storage_urls": urls})))
    })
}

/// `PUT /jobs/{job_id}/upload?token=`: output is accepted and not kept.
pub(crate) async fn upload(
    Shared(validator): Shared<Arc<Validator>>,
    Path(job): Path<String>,
    Query(query): Query<TokenQuery>,
    body: Bytes,
) -> Result<Json<Value>, Problem> {
    checked_job(&validator, &job, &query)?;
    Ok(Json(json!({"uploaded": true, "bytes": body.len()})))
}

/// `PUT /jobs/{job_id}?token=`: the container is done; its instance ends without an event.
pub(crate) async fn finish(
    Shared(validator): Shared<Arc<Validator>>,
    Path(job): Path<String>,
    Query(query): Query<TokenQuery>,
) -> Result<Json<Value>, Problem> {
    let id = checked_job(&validator, &job, &query)?;
    validator.change(|state, out| {
        let found = state.jobs.get_mut(&id).filter(|job| job.finished_at.is_none());
        let Some(found) = found else {
            out.untouched();
            return Err(Problem::not_found(format!("Job {job} not found or finished")));
        };
        found.finished_at = Some(out.now);
        let (instance, status) = (found.instance.clone(), found.status.clone());
        out.record(Record::JobFinished {
            job: id.clone(),
            status,
        });
        if let Some(instance) = instance {
            instances::end(state, out, &instance, DeletedBy::JobDone, "job finished", false);
        }
        Ok(Json(json!({"ok": true})))
    })
}

/// Connects to every port of a job and expects the sealed answer of the container behind it.
pub(crate) async fn test_ports(instance: &Instance) -> Result<(), String> {
    let extra = instance
        .port_mappings
        .iter()
        .filter(|mapping| ![8000, 8001].contains(&mapping.internal_port));
    for mapping in extra {
        let place = format!("{} port {}", mapping.proto, mapping.internal_port);
        let answer = tokio::time::timeout(PORT_TEST_TIMEOUT, ask_port(&instance.host, mapping))
            .await
            .map_err(|_| format!("{place}: no answer"))?
            .map_err(|error| format!("{place}: {error}"))?;
        let expected = port_answer(mapping);
        if opened(&instance.symmetric_key, &answer).as_deref() != Some(expected.as_bytes()) {
            return Err(format!("{place}: wrong answer"));
        }
    }
    Ok(())
}

/// What the container behind a port must answer.
pub(crate) fn port_answer(mapping: &PortMapping) -> String {
    format!(
        "response from {} {}",
        mapping.proto.to_lowercase(),
        mapping.internal_port
    )
}

fn opened(key: &str, answer: &str) -> Option<Vec<u8>> {
    let (iv, sealed) = answer.trim().split_once('|')?;
    let key = cipher::block_from_hex(key)?;
    cipher::decrypt(&key, &cipher::block_from_hex(iv)?, &STANDARD.decode(sealed).ok()?)
}

async fn ask_port(host: &str, mapping: &PortMapping) -> std::io::Result<String> {
    let mut answer = vec![0; 4096];
    let address = (host, mapping.external_port);
    let length = if mapping.proto.eq_ignore_ascii_case("udp") {
        let target: SocketAddr = tokio::net::lookup_host(address)
            .await?
            .next()
            .ok_or_else(|| std::io::Error::other("the host has no address"))?;
        let any: SocketAddr = if target.is_ipv4() {
            ([0, 0, 0, 0], 0).into()
        } else {
            ([0; 8], 0).into()
        };
        let socket = tokio::net::UdpSocket::bind(any).await?;
        socket.connect(target).await?;
        socket.send(b"test").await?;
        socket.recv(&mut answer).await?
    } else {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream.write_all(b"test").await?;
        stream.read(&mut answer).await?
    };
    answer.truncate(length);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

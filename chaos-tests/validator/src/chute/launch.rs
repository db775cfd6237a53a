//! The calls of a container to its validator: claim, proof, activation, and those of a job.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proof::{Profile, Proved};
use protocol::signing::body_hash;
use reqwest::{Client, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::chute::Log;
use crate::chute::doors::Doors;
use crate::chute::settings::{LaunchToken, Settings};
use crate::cipher;
use crate::compute;
use crate::identity::random_bytes;

const ACTIVATION_TRIES: u64 = 10;
const TIMEOUT: Duration = Duration::from_secs(60);

/// What the launch led to.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) activation_url: String,
    pub(crate) job: Option<JobOrder>,
}

/// A job to work on.
#[derive(Debug, Clone)]
pub(crate) struct JobOrder {
    method: String,
    work_ms: u64,
    status_url: String,
}

#[derive(Debug, Deserialize)]
struct Claimed {
    seed: u64,
    iterations: u32,
    symmetric_key: SealedKey,
}

#[derive(Debug, Deserialize)]
struct SealedKey {
    ciphertext: String,
    uuid: String,
    response_plaintext: String,
}

fn client() -> anyhow::Result<Client> {
    // The validator is reached directly, whatever proxy the container was given.
    Ok(Client::builder().no_proxy().timeout(TIMEOUT).build()?)
}

async fn accepted(response: reqwest::Response, what: &str) -> anyhow::Result<Value> {
    let status = response.status();
    let text = response.text().await.with_context(|| what.to_owned())?;
    ensure!(status.is_success(), "{what}: {status}: {text}");
    serde_json::from_str(&text).with_context(|| format!("{what}: {text}"))
}

/// Claims the launch config and shows the proof.
pub(crate) async fn claim_and_prove(
    settings: &Settings,
    token: &LaunchToken,
    log: &Log,
    doors: &Doors,
) -> anyhow::Result<Launched> {
    let client = client()?;
    let body = json!({
        "gpus": settings.devices,
        "host": settings.external_host,
        "port_mappings": settings.ports.iter().map(|mapping| json!({
            "internal_port": mapping.internal_port,
            "external_port": mapping.external_port,
            "proto": mapping.proto,
            "default": mapping.internal_port == 8000,
        })).collect::<Vec<_>>(),
        "env": null,
        "code": null,
        "code_digest": (!settings.code.is_empty()).then(|| body_hash(settings.code.as_bytes())),
        "fsv": null,
    });
    let response = client
        .post(&token.url)
        .header("authorization", &token.token)
        .json(&body)
        .send()
        .await
        .context("claim")?;
    let claimed: Claimed = serde_json::from_value(accepted(response, "claim").await?).context("claim")?;
    log.say(format!("claimed {}", token.config));
    let proofs = prove_all(settings, claimed.seed, claimed.iterations).await;
    let key = opened_key(&claimed.symmetric_key, &proofs)?;
    doors.set_key(key);
    let iv = random_bytes();
    let sealed = cipher::encrypt(&key, &iv, claimed.symmetric_key.response_plaintext.as_bytes());
    let shown: serde_json::Map<String, Value> = proofs
        .iter()
        .map(|(uuid, proved)| (uuid.clone(), json!({"work_product": proved.work_product})))
        .collect();
    let body = json!({"response": STANDARD.encode(sealed), "iv": hex::encode(iv), "proof": shown});
    let response = client
        .put(&token.url)
        .header("authorization", &token.token)
        .json(&body)
        .send()
        .await
        .context("proof")?;
    let answer = accepted(response, "proof").await?;
    log.say(format!("verified as {}", answer["instance_id"]));
    let activation_url = answer["activation_url"]
        .as_str()
        .context("the answer has no activation_url")?
        .to_owned();
    let job = answer["job_id"].as_str().map(|_| JobOrder {
        method: answer["job_method"].as_str().unwrap_or_default().to_owned(),
        work_ms: answer["job_data"]["work_ms"].as_u64().unwrap_or(0),
        status_url: answer["job_status_url"].as_str().unwrap_or_default().to_owned(),
    });
    Ok(Launched { activation_url, job })
}

async fn prove_all(settings: &Settings, seed: u64, iterations: u32) -> Vec<(String, Proved)> {
    let devices = settings.devices.clone();
    compute::away(move || {
        devices
            .iter()
            .map(|device| {
                let proved = proof::prove(device, seed, iterations, &Profile::DEVELOPMENT);
                (device.uuid.to_string(), proved)
            })
            .collect()
    })
    .await
}

fn opened_key(sealed: &SealedKey, proofs: &[(String, Proved)]) -> anyhow::Result<[u8; 16]> {
    let (_, proved) = proofs
        .iter()
        .find(|(uuid, _)| *uuid == sealed.uuid)
        .context("the key is sealed to a GPU that is not here")?;
    let blob = STANDARD.decode(&sealed.ciphertext).context("sealed key")?;
    let text = proof::decrypt(proved, &blob).context("sealed key")?;
    cipher::block_from_hex(&text).context("the key is not 32 hexadecimal digits")
}

/// Activates; locked out is final, everything else is tried again for a while.
pub(crate) async fn activate(token: &LaunchToken, url: &str, log: &Log) -> anyhow::Result<()> {
    let client = client()?;
    let mut last = String::new();
    for attempt in 0..ACTIVATION_TRIES {
        tokio::time::sleep(Duration::from_secs(attempt)).await;
        let sent = client.get(url).header("authorization", &token.token).send().await;
        match sent {
            Ok(response) if response.status().is_success() => {
                log.say("active".to_owned());
                return Ok(());
            }
            Ok(response) if response.status() == StatusCode::LOCKED => bail!("activation: locked out"),
            Ok(response) => last = response.status().to_string(),
            Err(error) => last = error.to_string(),
        }
    }
    bail!("activation failed {ACTIVATION_TRIES} times, last: {last}")
}

/// Works on a job for as long as it says, reports, and hands in.
pub(crate) async fn work(job: &JobOrder, log: &Log) -> anyhow::Result<()> {
    log.say(format!("job {} begins", job.method));
    tokio::time::sleep(Duration::from_millis(job.work_ms)).await;
    let client = client()?;
    let outcome = json!({
        "status": "complete", "result": {"method": job.method}, "detail": null, "output_filenames": [],
    });
    let response = client
        .post(&job.status_url)
        .json(&outcome)
        .send()
        .await
        .context("job report")?;
    accepted(response, "job report").await?;
    let response = client.put(&job.status_url).send().await.context("job hand-in")?;
    accepted(response, "job hand-in").await?;
    log.say(format!("job {} done", job.method));
    Ok(())
}

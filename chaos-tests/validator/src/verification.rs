//! Verification of announced GPUs against the miner's proof API, strictly in the real order: device
//! challenges, then one proof for the whole server within its time window (`validator-protocol`, section 5.3).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proof::{Profile, WorkProduct};
use protocol::gpu::DeviceInfo;
use protocol::hotkey::Hotkey;
use protocol::id::GpuId;
use protocol::signing::{Headers, Purpose, Tail, headers_to_miner};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::clock;
use crate::compute;
use crate::event::Event;
use crate::identity::random_bytes;
use crate::ledger::Record;
use crate::state::TaskOutcome;
use crate::validator::Validator;

const INFO_TIMEOUT: Duration = Duration::from_secs(12);
/// What a miner may answer to `/prove`, in bytes.
const PROOF_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Everything that a verification needs of the state.
#[derive(Debug, Clone)]
struct Plan {
    miner: Hotkey,
    devices: Vec<DeviceInfo>,
    base_url: String,
    seed: u64,
    iterations: u32,
    estimate_ms: u64,
    window_ms: (u64, u64),
}

/// Starts the verification of a task.
pub(crate) fn start(validator: &Arc<Validator>, task: String) {
    let validator = validator.clone();
    tokio::spawn(async move {
        let Some(plan) = plan_of(&validator, &task) else {
            return;
        };
        let outcome = tokio::select! {
            () = validator.shutdown.cancelled() => return,
            outcome = verify(&validator, &plan) => outcome,
        };
        finish(&validator, &task, &plan, outcome);
    });
}

/// Goes on with what a restart interrupted.
pub(crate) fn resume_all(validator: &Arc<Validator>) {
    let pending: Vec<String> = validator.read(|state, _| {
        state
            .tasks
            .iter()
            .filter(|(_, task)| task.outcome.is_none())
            .map(|(id, _)| id.clone())
            .collect()
    });
    for task in pending {
        start(validator, task);
    }
}

fn plan_of(validator: &Validator, task: &str) -> Option<Plan> {
    validator.read(|state, _| {
        let task = state.tasks.get(task).filter(|task| task.outcome.is_none())?;
        let nodes: Vec<_> = task
            .uuids
            .iter()
            .filter_map(|uuid| state.nodes.get(uuid))
            .collect();
        let first = nodes.first()?;
        let accepted = validator.gpus.of_short_ref(&first.gpu_identifier)?;
        let host = match first.verification_host.parse::<std::net::Ipv6Addr>() {
            Ok(address) => format!("[{address}]"),
            Err(_) => first.verification_host.clone(),
        };
        Some(Plan {
            miner: task.hotkey.clone(),
            devices: nodes.iter().map(|node| node.device.clone()).collect(),
            base_url: format!("http://{host}:{}", first.verification_port),
            seed: first.seed,
            iterations: accepted.iterations,
            estimate_ms: accepted.estimate_ms,
            window_ms: accepted.prove_window_ms,
        })
    })
}

fn finish(validator: &Arc<Validator>, task: &str, plan: &Plan, outcome: Result<u64, String>) {
    validator.change(|state, out| {
        let Some(entry) = state.tasks.get_mut(task) else {
            return;
        };
        entry.finished_at = Some(out.now);
        let uuids = entry.uuids.clone();
        match outcome {
            Ok(elapsed_ms) => {
                entry.outcome = Some(TaskOutcome::Verified);
                out.record(Record::NodesVerified {
                    hotkey: plan.miner.clone(),
                    uuids: uuids.clone(),
                    elapsed_ms,
                });
                for uuid in &uuids {
                    if let Some(node) = state.nodes.get_mut(uuid) {
                        node.verified_at = Some(out.now);
                        node.verification_error = None;
                        out.publish(Event::gpu_verified(node));
                    }
                }
            }
            Err(reason) => {
                entry.outcome = Some(TaskOutcome::Failed(reason.clone()));
                let new_seed = (u64::from_le_bytes(random_bytes()) >> 1).max(1);
                for uuid in &uuids {
                    if let Some(node) = state.nodes.get_mut(uuid) {
                        node.verification_error = Some(reason.clone());
                        node.seed = new_seed;
                    }
                }
                out.record(Record::NodesFailed {
                    hotkey: plan.miner.clone(),
                    uuids,
                    reason,
                });
            }
        }
    });
}

fn signed(validator: &Validator, miner: &Hotkey, tail: &Tail<'_>) -> Headers {
    headers_to_miner(&validator.signer, miner, clock::now(), tail)
}

fn request(
    validator: &Validator,
    method: reqwest::Method,
    url: String,
    headers: Headers,
) -> reqwest::RequestBuilder {
    headers
        .into_iter()
        .fold(validator.client.request(method, url), |request, (name, value)| {
            request.header(name, value)
        })
}

async fn verify(validator: &Validator, plan: &Plan) -> Result<u64, String> {
    for _ in 0..validator.scenario.timers.device_info_challenges {
        challenge(validator, plan).await?;
    }
    prove(validator, plan).await
}

async fn challenge(validator: &Validator, plan: &Plan) -> Result<(), String> {
    let challenge = hex::encode(random_bytes::<32>());
    let url = format!("{}/info?challenge={challenge}", plan.base_url);
    let headers = signed(validator, &plan.miner, &Tail::Purpose(Purpose::Graval));
    let response = request(validator, reqwest::Method::GET, url, headers)
        .timeout(INFO_TIMEOUT)
        .send()
        .await
        .map_err(|error| format!("device info challenge: {}", chain(&error)))?;
    let status = response.status();
    let answer = response
        .text()
        .await
        .map_err(|error| format!("device info challenge: {}", chain(&error)))?;
    if status != 200 {
        return Err(format!("device info challenge: status {status}"));
    }
    if proof::verify_device_challenge(&plan.devices, &challenge, answer.trim()) {
        Ok(())
    } else {
        Err("device info challenge: wrong answer".to_owned())
    }
}

#[derive(Debug, Deserialize)]
struct ProveAnswer {
    proof: BTreeMap<GpuId, ProofOfDevice>,
    plaintext: BTreeMap<GpuId, String>,
}

#[derive(Debug, Deserialize)]
struct ProofOfDevice {
    work_product: WorkProduct,
}

async fn prove(validator: &Validator, plan: &Plan) -> Result<u64, String> {
    let (secrets, ciphertexts) = sealed_secrets(plan).await;
    let body =
        json!({"seed": plan.seed, "iterations": plan.iterations, "ciphertext": ciphertexts}).to_string();
    let mut headers = signed(validator, &plan.miner, &Tail::Body(body.as_bytes()));
    headers.push(("content-type", "application/json".to_owned()));
    let url = format!("{}/prove", plan.base_url);
    let patience = plan.estimate_ms * 5 / 2;
    let began = Instant::now();
    let response = request(validator, reqwest::Method::POST, url, headers)
        .timeout(Duration::from_millis(patience.max(plan.window_ms.1)))
        .body(body)
        .send()
        .await
        .map_err(|error| format!("proof: {}", chain(&error)))?;
    if response.status() != 200 {
        return Err(format!("proof: status {}", response.status()));
    }
    let bytes = response
        .bytes()
        .await
        .map_err(|error| format!("proof: {}", chain(&error)))?;
    let elapsed = began.elapsed();
    check_time(elapsed, plan.window_ms)?;
    if bytes.len() > PROOF_BYTES_MAX {
        return Err(format!("proof: an answer of {} bytes", bytes.len()));
    }
    let answer: ProveAnswer = serde_json::from_slice(&bytes).map_err(|error| format!("proof: {error}"))?;
    for (uuid, secret) in &secrets {
        if answer.plaintext.get(uuid) != Some(secret) {
            return Err(format!("proof: the secret of {uuid} was not decrypted"));
        }
    }
    let (plan, proofs) = (plan.clone(), answer.proof);
    compute::away(move || check_proofs(&plan, &proofs)).await?;
    Ok(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}

fn check_proofs(plan: &Plan, proofs: &BTreeMap<GpuId, ProofOfDevice>) -> Result<(), String> {
    for device in &plan.devices {
        let uuid = &device.uuid;
        let shown = proofs
            .get(uuid)
            .ok_or_else(|| format!("proof: nothing for {uuid}"))?;
        if !check_work(device, plan.seed, plan.iterations, &shown.work_product) {
            return Err(format!("proof: the work of {uuid} is wrong"));
        }
    }
    Ok(())
}

/// Checks one root, picked at random, of a proof with the iterations that were asked for.
pub(crate) fn check_work(device: &DeviceInfo, seed: u64, iterations: u32, work: &WorkProduct) -> bool {
    let count = work.intermediate_hashes.len();
    if count == 0 || work.total_iterations != iterations {
        return false;
    }
    let pick = u64::from_le_bytes(random_bytes()) % count as u64;
    let index = usize::try_from(pick).expect("below a length");
    proof::check(device, seed, work, index, &Profile::DEVELOPMENT)
}

type Secrets = BTreeMap<GpuId, String>;

async fn sealed_secrets(plan: &Plan) -> (Secrets, Secrets) {
    let plan = plan.clone();
    compute::away(move || {
        let mut secrets = Secrets::new();
        let mut ciphertexts = Secrets::new();
        for device in &plan.devices {
            let secret = hex::encode(random_bytes::<16>());
            let iv = random_bytes();
            let blob = proof::encrypt(
                device,
                &secret,
                plan.seed,
                plan.iterations,
                iv,
                &Profile::DEVELOPMENT,
            );
            secrets.insert(device.uuid.clone(), secret);
            ciphertexts.insert(device.uuid.clone(), STANDARD.encode(blob));
        }
        (secrets, ciphertexts)
    })
    .await
}

fn check_time(elapsed: Duration, (min_ms, max_ms): (u64, u64)) -> Result<(), String> {
    if elapsed <= Duration::from_millis(min_ms) || elapsed >= Duration::from_millis(max_ms) {
        return Err(format!(
            "proof: took {elapsed:?}, expected more than {min_ms} ms and less than {max_ms} ms"
        ));
    }
    Ok(())
}

/// An error with all its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// A row of the legacy check: what a device challenge at a chute must answer.
pub(crate) async fn chute_challenge(
    validator: &Validator,
    miner: &Hotkey,
    base_url: &str,
    devices: &[DeviceInfo],
) -> Result<(), String> {
    let challenge = hex::encode(random_bytes::<32>());
    let url = format!("{base_url}/_device_challenge?challenge={challenge}");
    let headers = signed(validator, miner, &Tail::Purpose(Purpose::Chutes));
    let answer = request(validator, reqwest::Method::GET, url, headers)
        .timeout(INFO_TIMEOUT)
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(|error| format!("device challenge: {}", chain(&error)))?
        .text()
        .await
        .map_err(|error| format!("device challenge: {}", chain(&error)))?;
    if proof::verify_device_challenge(devices, &challenge, answer.trim()) {
        Ok(())
    } else {
        Err("device challenge: wrong answer".to_owned())
    }
}

/// Asks a chute's log server for its list, as the validator does during a claim.
pub(crate) async fn log_server(validator: &Validator, miner: &Hotkey, url: String) -> Result<Value, String> {
    let headers = signed(validator, miner, &Tail::Purpose(Purpose::Chutes));
    request(validator, reqwest::Method::GET, url, headers)
        .timeout(Duration::from_secs(5))
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(|error| chain(&error))?
        .json()
        .await
        .map_err(|error| chain(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_fast_fails_as_well_as_too_slow() {
        for (elapsed, good) in [(54, false), (55, false), (56, true), (169, true), (170, false)] {
            let took = Duration::from_millis(elapsed);
            assert_eq!(check_time(took, (55, 170)).is_ok(), good, "{elapsed}");
        }
    }

    #[test]
    fn a_lower_limit_of_nothing_refuses_no_proof_however_fast() {
        assert_eq!(check_time(Duration::from_nanos(1), (0, 170)), Ok(()));
    }

    #[test]
    fn a_proof_must_have_the_iterations_asked_for() {
        let uuid = GpuId::from_device_uuid(&"5a".repeat(16)).expect("32 digits");
        let device = proof::software_device(uuid);
        let mut work = proof::prove(&device, 7, 2, &Profile::DEVELOPMENT).work_product;
        assert!(check_work(&device, 7, 2, &work));
        assert!(!check_work(&device, 7, 1, &work));
        assert!(!check_work(&device, 8, 2, &work));
        work.intermediate_hashes.clear();
        assert!(!check_work(&device, 7, 2, &work));
    }
}

//! GPUs of miners: announce, poll, delete (`validator-protocol`, sections 5.2 and 5.4).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State as Shared};
use axum::http::{HeaderMap, StatusCode};
use protocol::gpu::DeviceInfo;
use protocol::hotkey::Hotkey;
use protocol::id::GpuId;
use protocol::signing::{Purpose, Tail};
use protocol::time::UnixMillis;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth;
use crate::identity::{random_bytes, random_uuid};
use crate::ledger::{DeletedBy, Record};
use crate::problem::Problem;
use crate::rows;
use crate::state::{Node, NodeHistory, State, Task, TaskOutcome};
use crate::validator::{Out, Validator};
use crate::verification;

const NODES_PER_CALL_MAX: usize = 10;
const DAY_MS: u64 = 86_400_000;

#[derive(Debug, Deserialize)]
struct Announcement {
    #[serde(default)]
    server_id: Option<String>,
    nodes: Vec<NodeArgs>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct NodeArgs {
    #[serde(flatten)]
    pub(crate) device: DeviceInfo,
    device_index: u32,
    pub(crate) gpu_identifier: String,
    verification_host: String,
    verification_port: u16,
}

impl NodeArgs {
    /// The GPU as it is kept, not verified yet.
    pub(crate) fn into_node(
        self,
        miner: &Hotkey,
        server_id: Option<String>,
        seed: u64,
        now: UnixMillis,
    ) -> Node {
        Node {
            device: self.device,
            hotkey: miner.clone(),
            gpu_identifier: self.gpu_identifier,
            device_index: self.device_index,
            server_id,
            seed,
            verification_host: self.verification_host,
            verification_port: self.verification_port,
            verification_error: None,
            created_at: now,
            verified_at: None,
            attested: false,
        }
    }
}

/// `POST /nodes/`.
pub(crate) async fn announce(
    Shared(validator): Shared<Arc<Validator>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), Problem> {
    let miner = auth::miner(&validator, &headers, &Tail::Body(&body))?;
    let outcome = accept(&validator, &miner, &headers, &body).await;
    if let Err(problem) = &outcome {
        validator.record(Record::NodesRefused {
            hotkey: miner,
            status: problem.status.as_u16(),
            reason: problem.reason(),
        });
    }
    outcome
}

async fn accept(
    validator: &Arc<Validator>,
    miner: &Hotkey,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(StatusCode, Json<Value>), Problem> {
    auth::not_blacklisted(validator, miner)?;
    let mut announcement: Announcement = auth::json_body(headers, body)?;
    announcement.nodes.sort_by_key(|node| node.device_index);
    check_form(&announcement.nodes)?;
    for host in announcement
        .nodes
        .iter()
        .map(|node| node.verification_host.as_str())
        .collect::<BTreeSet<_>>()
    {
        check_public(host, validator.scenario.relaxed.loopback_hosts).await?;
    }
    for node in &announcement.nodes {
        validator
            .gpus
            .check(&node.device, &node.gpu_identifier)
            .map_err(Problem::bad_request)?;
    }
    let (task, nodes) = validator.change(|state, out| {
        let uuids: Vec<GpuId> = announcement.nodes.iter().map(|n| n.device.uuid.clone()).collect();
        let checked = check_known(state, miner, &uuids, out.now.0);
        if let Err(problem) = checked {
            out.untouched();
            return Err(problem);
        }
        let seed = u64::from_le_bytes(random_bytes()) >> 1;
        let seed = seed.max(1);
        let task = format!("{miner}::{}", random_uuid());
        for args in announcement.nodes {
            let uuid = args.device.uuid.clone();
            state.node_history.push(NodeHistory {
                uuid: uuid.clone(),
                hotkey: miner.clone(),
                at: out.now,
            });
            let node = args.into_node(miner, announcement.server_id.clone(), seed, out.now);
            state.nodes.insert(uuid, node);
        }
        let pending = Task {
            hotkey: miner.clone(),
            uuids: uuids.clone(),
            outcome: None,
            finished_at: None,
        };
        state.tasks.insert(task.clone(), pending);
        let rows: Vec<Value> = uuids
            .iter()
            .filter_map(|uuid| state.nodes.get(uuid))
            .map(|node| rows::node(node, &validator.gpus))
            .collect();
        out.record(Record::NodesAnnounced {
            hotkey: miner.clone(),
            uuids,
            task: task.clone(),
        });
        Ok((task, rows))
    })?;
    verification::start(validator, task.clone());
    let answer = json!({"nodes": nodes, "task_id": task});
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

pub(crate) fn check_form(nodes: &[NodeArgs]) -> Result<(), Problem> {
    if nodes.is_empty() {
        return Err(Problem::invalid(
            "too_short",
            &["body", "nodes"],
            "List should have at least 1 item",
        ));
    }
    if nodes.len() > NODES_PER_CALL_MAX {
        return Err(Problem::bad_request("At most 10 nodes can be added at once"));
    }
    for node in nodes {
        if GpuId::from_device_uuid(node.device.uuid.as_str()) != Ok(node.device.uuid.clone()) {
            let text = "uuid should be 32 lower-case hexadecimal digits";
            return Err(Problem::invalid(
                "string_pattern_mismatch",
                &["body", "nodes", "uuid"],
                text,
            ));
        }
        if node.device_index >= 10 {
            let text = "Input should be less than 10";
            return Err(Problem::invalid(
                "less_than",
                &["body", "nodes", "device_index"],
                text,
            ));
        }
        if node.verification_port < 80 {
            let text = "Input should be greater than or equal to 80";
            let place = ["body", "nodes", "verification_port"];
            return Err(Problem::invalid("greater_than_equal", &place, text));
        }
    }
    let distinct: BTreeSet<&GpuId> = nodes.iter().map(|node| &node.device.uuid).collect();
    if distinct.len() < nodes.len() {
        return Err(Problem::bad_request("Duplicate GPUs in one request"));
    }
    Ok(())
}

/// Known GPUs, and GPUs that moved between hotkeys too often.
pub(crate) fn check_known(
    state: &State,
    miner: &Hotkey,
    uuids: &[GpuId],
    now_ms: u64,
) -> Result<(), Problem> {
    let known: Vec<&str> = uuids
        .iter()
        .filter(|uuid| state.nodes.contains_key(uuid))
        .map(GpuId::as_str)
        .collect();
    if !known.is_empty() {
        return Err(Problem::conflict(format!(
            "One or more nodes already exist in inventory: {}",
            known.join(", ")
        )));
    }
    for uuid in uuids {
        let recent: Vec<&NodeHistory> = state
            .node_history
            .iter()
            .filter(|row| &row.uuid == uuid && now_ms.saturating_sub(row.at.0) < DAY_MS)
            .collect();
        let mut hotkeys: BTreeSet<&Hotkey> = recent.iter().map(|row| &row.hotkey).collect();
        hotkeys.insert(miner);
        if recent.len() > 2 && hotkeys.len() >= 2 {
            let text = format!("GPU {uuid} was moved between hotkeys too often");
            return Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, text));
        }
    }
    Ok(())
}

/// A public address, or a name all of whose addresses are public.
pub(crate) async fn check_public(host: &str, loopback_allowed: bool) -> Result<(), Problem> {
    let refuse = |why: &str| Problem::bad_request(format!("Invalid verification_host {host:?}: {why}"));
    if host.is_empty() || host.len() > 255 {
        return Err(refuse("1 to 255 characters are allowed"));
    }
    let addresses: Vec<IpAddr> = match host.parse() {
        Ok(address) => vec![address],
        Err(_) => tokio::net::lookup_host((host, 80))
            .await
            .map_err(|_| refuse("it does not resolve"))?
            .map(|address| address.ip())
            .collect(),
    };
    let fits = |address: &IpAddr| is_public(*address) || (loopback_allowed && address.is_loopback());
    if !addresses.is_empty() && addresses.iter().all(fits) {
        Ok(())
    } else {
        Err(refuse("it is not public"))
    }
}

fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(a) => {
            let [first, second, ..] = a.octets();
            let shared = first == 100 && (64..128).contains(&second);
            let reserved = first == 0 || first >= 240 || (first == 198 && (second == 18 || second == 19));
            !(a.is_private()
                || a.is_loopback()
                || a.is_link_local()
                || a.is_multicast()
                || a.is_broadcast()
                || a.is_unspecified()
                || shared
                || reserved)
        }
        IpAddr::V6(a) => {
            !(a.is_loopback()
                || a.is_unspecified()
                || a.is_multicast()
                || a.is_unique_local()
                || a.is_unicast_link_local())
        }
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct StatusQuery {
    task_id: Option<String>,
}

/// `GET /nodes/verification_status`.
pub(crate) async fn verification_status(
    Shared(validator): Shared<Arc<Validator>>,
    Query(query): Query<StatusQuery>,
    headers: HeaderMap,
) -> Result<Json<Value>, Problem> {
    let miner = auth::miner_for(&validator, &headers, Purpose::Graval)?;
    let task = query
        .task_id
        .ok_or_else(|| Problem::invalid("missing", &["query", "task_id"], "Field required"))?;
    if !task.starts_with(&format!("{miner}::")) {
        return Err(Problem::unauthorized("Authentication missing"));
    }
    let life_ms = validator.scenario.timers.verification_result_seconds * 1000;
    Ok(Json(validator.read(|state, now| {
        let outcome = state
            .tasks
            .get(&task)
            .filter(|task| task.finished_at.is_none_or(|at| now.since(at) < life_ms))
            .and_then(|task| task.outcome.clone());
        match outcome {
            // Unknown and forgotten tasks read as pending, as in the real one.
            None => json!({"status": "pending"}),
            Some(TaskOutcome::Verified) => json!({"status": "verified"}),
            Some(TaskOutcome::Failed(detail)) => json!({"status": "failed", "detail": detail}),
        }
    })))
}

/// Takes a GPU away, and the instance that runs on it.
pub(crate) fn remove(state: &mut State, out: &mut Out, gpu: &GpuId, why: &str) {
    if let Some(instance) = state.instance_of_gpu(gpu).map(|instance| instance.id.clone()) {
        crate::instances::end(state, out, &instance, DeletedBy::Cascade, why, false);
    }
    state.nodes.remove(gpu);
}

/// `DELETE /nodes/{uuid}`.
pub(crate) async fn delete(
    Shared(validator): Shared<Arc<Validator>>,
    Path(uuid): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, Problem> {
    let miner = auth::miner_for(&validator, &headers, Purpose::Nodes)?;
    validator.change(|state, out| {
        let id = GpuId::parse(&uuid).ok();
        let Some(id) = id.filter(|id| state.nodes.get(id).is_some_and(|node| node.hotkey == miner)) else {
            out.untouched();
            return Err(Problem::not_found(format!("Node {uuid} not found")));
        };
        remove(state, out, &id, "its GPU was deleted");
        out.record(Record::NodeDeleted {
            hotkey: miner,
            uuid: id.clone(),
        });
        Ok(Json(json!({"node_id": id, "deleted": true})))
    })
}

/// `GET /nodes/supported`.
pub(crate) async fn supported(Shared(validator): Shared<Arc<Validator>>) -> Json<Value> {
    Json(validator.gpus.as_json())
}

#[derive(Debug, Deserialize)]
pub(crate) struct ListQuery {
    detailed: Option<String>,
    hotkey: Option<String>,
}

/// `GET /nodes/`: counts per GPU type, or per miner what is in use and what is idle.
pub(crate) async fn list(
    Shared(validator): Shared<Arc<Validator>>,
    Query(query): Query<ListQuery>,
) -> Json<Value> {
    let detailed = query
        .detailed
        .is_some_and(|text| text.eq_ignore_ascii_case("true"));
    Json(validator.read(|state, _| {
        let mut answer = json!({});
        for node in state.nodes.values() {
            if query
                .hotkey
                .as_deref()
                .is_some_and(|asked| asked != node.hotkey.as_str())
            {
                continue;
            }
            let kind = node.gpu_identifier.as_str();
            let count = if detailed {
                let used = state.instance_of_gpu(&node.device.uuid).is_some();
                let group = if used { "provisioned" } else { "idle" };
                &mut answer[node.hotkey.as_str()][group][kind]
            } else {
                &mut answer[kind]
            };
            *count = json!(count.as_u64().unwrap_or(0) + 1);
        }
        answer
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_public_hosts_are_accepted() {
        for (host, loopback_allowed, good) in [
            ("8.8.8.8", false, true),
            ("127.0.0.1", false, false),
            ("127.0.1.1", true, true),
            ("10.0.0.1", true, false),
            ("169.254.169.254", true, false),
            ("100.64.0.1", true, false),
            ("224.0.0.1", true, false),
            ("::1", false, false),
            ("::ffff:10.0.0.1", true, false),
            ("fd00::1", true, false),
            ("", true, false),
            ("no such host", true, false),
        ] {
            let checked = check_public(host, loopback_allowed).await;
            assert_eq!(checked.is_ok(), good, "{host}");
        }
    }

    #[test]
    fn known_and_hopping_gpus_are_refused() {
        let gpu = GpuId::from_device_uuid(&"ab".repeat(16)).expect("32 digits");
        let key = |byte| protocol::hotkey::Signer::from_seed(&[byte; 32]).hotkey().clone();
        let row = |byte, at| NodeHistory {
            uuid: gpu.clone(),
            hotkey: key(byte),
            at: protocol::time::UnixMillis(at),
        };
        let now = 10 * DAY_MS;
        let check = |history: Vec<NodeHistory>| {
            let state = State {
                node_history: history,
                ..State::default()
            };
            check_known(&state, &key(1), std::slice::from_ref(&gpu), now)
                .map_err(|problem| problem.status.as_u16())
        };
        assert_eq!(check(vec![]), Ok(()));
        assert_eq!(
            check(vec![row(1, now); 5]),
            Ok(()),
            "one's own GPU may come again"
        );
        assert_eq!(check(vec![row(1, now), row(2, now), row(1, now)]), Err(429));
        assert_eq!(
            check(vec![row(2, 0), row(2, 0), row(1, now)]),
            Ok(()),
            "a day ago"
        );
    }
}

//! Sealed workers of miners: announce, delete (`validator-protocol`, section 8.2). The real validator lets the worker attest
//! itself; the stand-in takes the miner's word.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State as Shared};
use axum::http::{HeaderMap, StatusCode};
use protocol::id::GpuId;
use protocol::signing::{Purpose, Tail};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::auth;
use crate::ledger::Record;
use crate::nodes::{self, NodeArgs, check_form, check_known, check_public};
use crate::problem::Problem;
use crate::validator::Validator;

#[derive(Debug, Deserialize)]
struct NewServer {
    host: String,
    id: String,
    name: String,
    gpus: Vec<NodeArgs>,
}

/// `POST /servers/`.
pub(crate) async fn add(
    Shared(validator): Shared<Arc<Validator>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), Problem> {
    let miner = auth::miner(&validator, &headers, &Tail::Body(&body))?;
    auth::not_blacklisted(&validator, &miner)?;
    let server: NewServer = auth::json_body(&headers, &body)?;
    check_form(&server.gpus)?;
    check_public(&server.host, validator.scenario.relaxed.loopback_hosts).await?;
    for gpu in &server.gpus {
        let checked = validator.gpus.check(&gpu.device, &gpu.gpu_identifier);
        checked.map_err(Problem::bad_request)?;
    }
    validator.change(|state, out| {
        let uuids: Vec<GpuId> = server.gpus.iter().map(|gpu| gpu.device.uuid.clone()).collect();
        if let Err(problem) = check_known(state, &miner, &uuids, out.now.0) {
            out.untouched();
            return Err(problem);
        }
        for gpu in server.gpus {
            let mut node = gpu.into_node(&miner, Some(server.id.clone()), 0, out.now);
            node.attested = true;
            node.verified_at = Some(out.now);
            state.nodes.insert(node.device.uuid.clone(), node);
        }
        out.record(Record::ServerAdded {
            hotkey: miner,
            server: server.id.clone(),
            uuids,
        });
        let answer = json!({ "server_id": server.id, "name": server.name, "ip": server.host });
        Ok((StatusCode::CREATED, Json(answer)))
    })
}

/// `DELETE /servers/{id}`.
pub(crate) async fn delete(
    Shared(validator): Shared<Arc<Validator>>,
    Path(server): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, Problem> {
    let miner = auth::miner_for(&validator, &headers, Purpose::Tee)?;
    validator.change(|state, out| {
        let of_it = state.nodes.iter().filter(|(_, node)| {
            node.hotkey == miner && node.attested && node.server_id.as_deref() == Some(&server)
        });
        let uuids: BTreeSet<GpuId> = of_it.map(|(uuid, _)| uuid.clone()).collect();
        if uuids.is_empty() {
            out.untouched();
            return Err(Problem::not_found(format!("Server {server} not found")));
        }
        for uuid in &uuids {
            nodes::remove(state, out, uuid, "its server was deleted");
        }
        out.record(Record::ServerDeleted {
            hotkey: miner,
            server: server.clone(),
        });
        Ok(Json(json!({ "server_id": server, "deleted": true })))
    })
}

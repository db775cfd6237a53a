//! `/v1/stop`, `/v1/bans` and `/v1/observing`: what an operator decides. Signed by the newer scheme only.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use coordinator_core::state_machine::chute::ChuteKey;
use coordinator_core::state_machine::command::Allowance;
use coordinator_core::state_machine::deployment::StopReason;
use coordinator_core::state_machine::{Command, Reply, State as Record};
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, DeploymentId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Api;
use super::auth::Caller;
use super::error::{ApiError, Result};

/// Deployments in one request.
const STOP_MAX: usize = 1000;
/// Characters of a reason.
const REASON_CHARS_MAX: usize = 500;

/// 422 with one text.
pub(super) fn invalid(message: &str) -> ApiError {
    ApiError::invalid(vec![
        json!({ "type": "invalid", "loc": ["body"], "msg": message, "input": null }),
    ])
}

/// Our own routes refuse what they do not know: a mistyped allowance must not be lost. No body is an empty object.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|error| invalid(&error.to_string()))
}

fn reason_text(reason: String) -> Result<String> {
    let reason = reason.trim().to_owned();
    if reason.is_empty() || reason.chars().count() > REASON_CHARS_MAX {
        let detail = format!("a reason of 1 to {REASON_CHARS_MAX} characters is needed");
        return Err(ApiError::new(StatusCode::BAD_REQUEST, detail));
    }
    Ok(reason)
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct StopBody {
    deployments: Vec<String>,
    #[serde(default = "asked_for")]
    reason: String,
    #[serde(default)]
    allow_loss: bool,
    #[serde(default)]
    include_jobs: bool,
    #[serde(default = "yes")]
    budgeted: bool,
}

fn asked_for() -> String {
    "it was selected".to_owned()
}

fn yes() -> bool {
    true
}

pub(super) async fn stop(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<Value>> {
    let body: StopBody = parse(&body)?;
    if body.deployments.is_empty() || body.deployments.len() > STOP_MAX {
        let detail = format!("1 to {STOP_MAX} deployments are stopped at a time");
        return Err(ApiError::new(StatusCode::BAD_REQUEST, detail));
    }
    let named: std::result::Result<Vec<DeploymentId>, _> = body
        .deployments
        .iter()
        .map(|text| DeploymentId::parse(text))
        .collect();
    let named = named.map_err(|error| invalid(&error.to_string()))?;
    let command = Command::StopDeployments {
        deployments: named.clone(),
        reason: StopReason::Operator(reason_text(body.reason)?),
        allowance: Allowance {
            loss: body.allow_loss,
            jobs: body.include_jobs,
            budgeted: body.budgeted,
        },
    };
    let stopping = match api.propose_and_see(&caller, command).await? {
        Reply::Stopping(stopping) => stopping,
        Reply::Done | Reply::Unchanged | Reply::Joined { .. } => Vec::new(),
    };
    let left: Vec<DeploymentId> = api.store.read(|record| {
        let live = |id: &DeploymentId| record.deployments().get(id).is_some_and(|d| d.phase.is_live());
        named.into_iter().filter(|id| live(id)).collect()
    });
    Ok(Json(json!({ "stopping": stopping, "left_by_the_budget": left })))
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct ObservingBody {
    observing: bool,
}

/// Lets the cluster only watch, or act.
pub(super) async fn set_observing(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<Value>> {
    let ObservingBody { observing } = parse(&body)?;
    let reply = api.propose(&caller, Command::SetObserving { observing }).await?;
    Ok(Json(
        json!({ "observing": observing, "changed": reply == Reply::Done }),
    ))
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct BanBody {
    chute_id: String,
    validator: Option<String>,
    reason: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UnbanQuery {
    chute_id: String,
    validator: Option<String>,
}

pub(super) async fn bans(State(api): State<Arc<Api>>) -> Json<Value> {
    let bans: Vec<Value> = api.store.read(|record| {
        let chutes = record.chutes().iter();
        let banned = chutes.filter_map(|(key, chute)| {
            let reason = chute.ban_reason.as_ref()?;
            Some(json!({
                "chute_id": key.chute,
                "validator": key.validator,
                "name": chute.definition.name,
                "reason": reason,
            }))
        });
        banned.collect()
    });
    Json(json!({ "bans": bans }))
}

/// Whether a chute is banned now.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Banned {
    banned: bool,
    chute_id: ChuteId,
    validator: Hotkey,
}

impl Banned {
    fn answer(chute: &ChuteKey, banned: bool) -> Self {
        Self {
            banned,
            chute_id: chute.chute.clone(),
            validator: chute.validator.clone(),
        }
    }
}

pub(super) async fn ban(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<Banned>> {
    let body: BanBody = parse(&body)?;
    let chute = one_chute(&api, &body.chute_id, body.validator.as_deref()).await?;
    let reason = Some(reason_text(body.reason)?);
    let answer = Banned::answer(&chute, true);
    api.propose(&caller, Command::BanChute { chute, reason }).await?;
    Ok(Json(answer))
}

pub(super) async fn unban(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<UnbanQuery>,
) -> Result<Json<Banned>> {
    let chute = one_chute(&api, &query.chute_id, query.validator.as_deref()).await?;
    let answer = Banned::answer(&chute, false);
    let command = Command::BanChute { chute, reason: None };
    api.propose(&caller, command).await?;
    Ok(Json(answer))
}

/// The chute that an operator means by its id or name. Two validators may use one id
/// for different chutes.
async fn one_chute(api: &Api, text: &str, validator: Option<&str>) -> Result<ChuteKey> {
    let validator = validator.map(Hotkey::parse).transpose();
    let validator = validator.map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, error.to_string()))?;
    let asked = |key: &ChuteKey| {
        validator
            .as_ref()
            .is_none_or(|validator| key.validator == *validator)
    };
    api.find(|record| {
        let mut found = with_id(record, text);
        if found.is_empty() {
            let chutes = record.chutes().iter();
            let named =
                chutes.filter(|(key, chute)| key.chute.as_str() == text || chute.definition.name == text);
            found = named.map(|(key, _)| key.clone()).collect();
        }
        found.retain(asked);
        match (found.pop(), found.len()) {
            (Some(key), 0) => Ok(key),
            (None, _) => {
                let detail = format!("no chute with id or name {text} is known");
                Err(ApiError::new(StatusCode::NOT_FOUND, detail))
            }
            (Some(_), _) => {
                let detail = format!("{text} means several chutes: name the validator, or use the id");
                Err(ApiError::new(StatusCode::CONFLICT, detail))
            }
        }
    })
    .await
}

/// The chutes with this id at the validators we work for.
fn with_id(record: &Record, text: &str) -> Vec<ChuteKey> {
    let Ok(chute) = ChuteId::parse(text) else {
        return Vec::new();
    };
    let keys = record.settings().validators.iter().map(|validator| ChuteKey {
        validator: validator.clone(),
        chute: chute.clone(),
    });
    keys.filter(|key| record.chutes().contains_key(key)).collect()
}

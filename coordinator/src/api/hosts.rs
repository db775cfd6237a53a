//! `/hosts`: who belongs to the cluster. Inviting, listing, removing, and saying who should vote.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use coordinator_core::state_machine::host::{HostRecord, Invite, InviteId, Pin};
use coordinator_core::state_machine::{Command, Rejection, Reply, State as Record};
use protocol::id::ServerId;
use ring::rand::{SecureRandom, SystemRandom};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::auth::Caller;
use super::error::{ApiError, Result};
use super::operate::{invalid, parse};
use super::raft::Roles;
use crate::identity::fingerprint;
use crate::join::Token;
use crate::join::token::DOORS_MAX;

/// How long an invitation is good unless the operator says otherwise.
const TTL_SECONDS: u64 = 60 * 60;
/// And at most.
const TTL_SECONDS_MAX: u64 = 24 * 60 * 60;
/// Invitations that are neither used nor expired.
const OPEN_INVITES_MAX: usize = 1000;
/// Characters of a site.
const SITE_CHARS_MAX: usize = 64;

/// The host that an operator means by its name or id. Of several that had a name, the one that is in.
pub(super) fn host_named<'a>(record: &'a Record, name: &str) -> Result<&'a HostRecord> {
    let hosts = || record.hosts().values();
    let named = |host: &&HostRecord| host.host.name == name;
    hosts()
        .find(|host| host.host.server.as_str() == name)
        .or_else(|| hosts().find(|host| host.is_in() && named(host)))
        .or_else(|| hosts().find(named))
        .ok_or_else(|| {
            ApiError::from(Rejection::Unknown {
                kind: "host".to_owned(),
                name: name.to_owned(),
            })
        })
}

async fn id_of(api: &Api, name: &str) -> Result<(ServerId, String)> {
    let id = |record: &Record| {
        let host = &host_named(record, name)?.host;
        Ok((host.server.clone(), host.name.clone()))
    };
    api.find(id).await
}

/// A row of `GET /hosts`. `connected` is known to the leader only: hosts report to it.
fn row(host: &HostRecord, role: &str, roles: &Roles, connected: Option<bool>) -> Value {
    json!({
        "server_id": host.host.server,
        "name": host.host.name,
        "site": host.host.site,
        "address": host.host.address,
        "member": host.member,
        "eligible": host.member.is_some(),
        "role": role,
        "leads": roles.leads(host),
        "pin": host.pin.as_str(),
        "joined_at": host.joined_at.iso8601(),
        "revoked_at": host.revoked_at.map(|at| at.iso8601()),
        "connected": connected,
    })
}

pub(super) async fn list(State(api): State<Arc<Api>>) -> Json<Vec<Value>> {
    let roles = api.deps.cluster.roles();
    let leads = roles.leader == Some(roles.own);
    let hosts: Vec<(HostRecord, &str)> = api.store.read(|record| {
        let hosts = record.hosts().values();
        hosts
            .map(|host| (host.clone(), roles.word(record, host)))
            .collect()
    });
    let row = |(host, role): &(HostRecord, &str)| {
        let report = || api.deps.hosts.last_report(&host.host.server);
        row(host, role, &roles, leads.then(|| report().is_some()))
    };
    Json(hosts.iter().map(row).collect())
}

/// Rows of the members for `GET /v1/status`, and their names: all of them hold the seed.
pub(super) fn members(record: &Record, roles: &Roles) -> (Vec<Value>, Vec<String>) {
    let hosts = record.hosts().values();
    let members = hosts.filter(|host| host.is_in() && host.member.is_some());
    let row = |host: &HostRecord| {
        let row = json!({
            "host": host.host.name,
            "server_id": host.host.server,
            "member": host.member,
            "role": roles.word(record, host),
            "leads": roles.leads(host),
            "site": host.host.site,
            "address": host.host.address,
            "pin": host.pin.as_str(),
        });
        (row, host.host.name.clone())
    };
    members.map(row).unzip()
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct InviteBody {
    #[serde(default)]
    eligible: bool,
    ttl: Option<Ttl>,
    site: Option<String>,
}

/// Seconds, or a text such as `10m`.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Ttl {
    Seconds(u64),
    Text(String),
}

impl Ttl {
    fn seconds(&self) -> Result<u64> {
        let seconds = match self {
            Self::Seconds(seconds) => Some(*seconds),
            Self::Text(text) => seconds_of(text),
        };
        seconds
            .filter(|seconds| (1..=TTL_SECONDS_MAX).contains(seconds))
            .ok_or_else(|| invalid("ttl is seconds, or a text such as 90s, 10m or 2h; 24h at most"))
    }
}

fn seconds_of(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

fn checked_site(site: String) -> Result<String> {
    let site = site.trim().to_owned();
    let is_good =
        !site.is_empty() && site.chars().count() <= SITE_CHARS_MAX && !site.chars().any(char::is_control);
    if is_good {
        Ok(site)
    } else {
        let detail = format!("site is a word of 1 to {SITE_CHARS_MAX} characters, or left out");
        Err(invalid(&detail))
    }
}

pub(super) async fn invite(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<Value>> {
    let body: InviteBody = parse(&body)?;
    let ttl_seconds = body.ttl.map_or(Ok(TTL_SECONDS), |ttl| ttl.seconds())?;
    let site = body.site.map(checked_site).transpose()?;
    api.store.linearizable().await?;
    let now = api.store.clock().now();
    let (authority, doors, open) = api.store.read(|record| {
        let authority = record.inviting_authority().ok_or(Rejection::NotFounded)?;
        let members = record.members();
        let doors: Vec<String> = members.map(|(_, host)| host.host.address.clone()).collect();
        let is_open = |invite: &&Invite| invite.used_by.is_none() && invite.expires_at > now;
        let open = record.invites().values().filter(is_open).count();
        Ok::<_, Rejection>((fingerprint(authority), doors, open))
    })?;
    let broken = |what: &str| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, what);
    let authority = authority.ok_or_else(|| broken("the cluster's certificate cannot be read"))?;
    if open >= OPEN_INVITES_MAX {
        let detail = format!("{open} invitations are open: use them, or wait until some have expired");
        return Err(ApiError::new(StatusCode::CONFLICT, detail));
    }
    let mut random = [0; 48];
    SystemRandom::new()
        .fill(&mut random)
        .map_err(|_| broken("this machine has no random numbers"))?;
    let (secret, id) = random.split_at(32);
    let token = Token {
        cluster: api.deps.cluster.name(),
        invite: u128::from_be_bytes(id.try_into().expect("48 bytes less 32")),
        secret: secret.try_into().expect("the first 32 bytes"),
        authority,
        doors: doors.into_iter().take(DOORS_MAX).collect(),
    };
    let expires_at = now + ttl_seconds * 1000;
    let command = Command::InviteHost {
        id: InviteId(token.invite),
        invite: Invite {
            secret_hash: token.secret_hash(),
            expires_at,
            eligible: body.eligible,
            site,
            used_by: None,
        },
    };
    api.propose(&caller, command).await?;
    Ok(Json(json!({
        "invite": format!("{:032x}", token.invite),
        "token": token.to_string(),
        "eligible": body.eligible,
        "expires_at": expires_at.iso8601(),
    })))
}

pub(super) async fn remove(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<Value>> {
    let (server, name) = id_of(&api, &name).await?;
    let roles = api.deps.cluster.roles();
    let others_follow = api.store.read(|record| {
        let member = record.hosts().get(&server).and_then(|host| host.member);
        member.is_some_and(|member| roles.voters.iter().eq([&member])) && record.members().count() > 1
    });
    if others_follow {
        let why = format!(
            "host {name} is the only one that votes, and without it nothing is decided any more: let another one vote \
             first, with `chutes-miner host pin {name} never`, and see `chutes-miner raft status`"
        );
        return Err(ApiError::new(StatusCode::CONFLICT, why));
    }
    let command = Command::RemoveHost {
        server: server.clone(),
    };
    let reply = api.propose(&caller, command).await?;
    let changed = reply != Reply::Unchanged;
    Ok(Json(
        json!({ "server_id": server, "name": name, "role": "removed", "changed": changed }),
    ))
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct PinBody {
    pin: String,
}

pub(super) async fn pin(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Json<Value>> {
    let body: PinBody = parse(&body)?;
    let pin = Pin::parse(&body.pin).ok_or_else(|| invalid("pin is one of auto, voter, never"))?;
    let (server, name) = id_of(&api, &name).await?;
    let command = Command::PinHost {
        server: server.clone(),
        pin,
    };
    api.propose(&caller, command).await?;
    Ok(Json(
        json!({ "server_id": server, "name": name, "pin": pin.as_str() }),
    ))
}

#[cfg(test)]
mod tests {
    use super::seconds_of;

    #[test]
    fn times_are_read_with_their_unit() {
        for (text, seconds) in [
            ("90", Some(90)),
            ("90s", Some(90)),
            ("10m", Some(600)),
            ("2h", Some(7200)),
            ("", None),
            ("m", None),
            ("1d", None),
            ("-1m", None),
            ("99999999999999999999h", None),
            ("9999999999999999999h", None),
        ] {
            assert_eq!(seconds_of(text), seconds, "{text}");
        }
    }
}

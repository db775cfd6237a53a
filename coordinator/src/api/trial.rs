//! `GET` and `POST /v1/observing/trial`: what a cluster that observes would do now if it acted. Nothing is done, written or
//! proposed: the core tries it on a copy of the state.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use coordinator_core::scheduler::strategy::Launch;
use coordinator_core::state_machine::State as Record;
use coordinator_core::state_machine::adoption::Adoption;
use coordinator_core::state_machine::chute::ChuteKey;
use coordinator_core::state_machine::effect::{Effect, EffectKind};
use coordinator_core::trial::{Obstacle, Placed, Stopped, Trial, Unaccounted, When, Why};
use protocol::id::ServerId;
use protocol::time::UnixMillis;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::error::{ApiError, Result};
use super::import::{There, no_host};
use super::operate::parse;
use super::status::effect_word;
use super::timeline::stop_words;
use crate::leader::Look;

#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(super) struct TrialQuery {
    /// Also the chutes that would be left alone.
    #[serde(default)]
    all: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct TrialBody {
    #[serde(default)]
    servers: Vec<There>,
}

pub(super) async fn trial(
    State(api): State<Arc<Api>>,
    Query(query): Query<TrialQuery>,
) -> Result<Json<Value>> {
    answer(&api, query, Vec::new())
}

/// With servers of another miner as if they were taken over.
pub(super) async fn trial_with(
    State(api): State<Arc<Api>>,
    Query(query): Query<TrialQuery>,
    body: Bytes,
) -> Result<Json<Value>> {
    let TrialBody { servers } = parse(&body)?;
    answer(&api, query, servers)
}

fn answer(api: &Api, query: TrialQuery, servers: Vec<There>) -> Result<Json<Value>> {
    let record = api.store.read(Record::clone);
    let Some(since) = record.observing_since() else {
        let detail = "the cluster acts, for real: there is nothing to try. `chutes-miner explain` says why something is \
                      where it is, or is not; `chutes-miner diff` compares the record with hosts and validators";
        return Err(ApiError::new(StatusCode::CONFLICT, detail));
    };
    let at = api.store.clock().now();
    let (adoptions, not_taken) = taken_over(&record, servers, at)?;
    let validators = record.settings().validators.iter();
    let looks: Vec<Look> = validators
        .map(|validator| {
            let look = api.deps.validator_listing.last_look(validator);
            (validator.clone(), look)
        })
        .collect();
    let trial = api
        .deps
        .scheduling
        .trial(&record, at, &api.miner(), adoptions, &looks);
    let said = Said {
        record: &record,
        trial: &trial,
    };
    let obstacles = not_taken.iter().chain(&trial.obstacles);
    let left_alone = trial.left_alone.iter().filter(|_| query.all);
    Ok(Json(json!({
        "at": at.iso8601(),
        "observing_since": since.iso8601(),
        "in_the_way": obstacles.map(ToString::to_string).collect::<Vec<_>>(),
        "listings": looks.iter().map(listing).collect::<Vec<_>>(),
        "strategy": trial.strategy,
        "strategy_failure": trial.strategy_failure,
        "placed": trial.placed.iter().map(|placed| said.placed(placed)).collect::<Vec<_>>(),
        "stopped": trial.stopped.iter().map(|stopped| said.stopped(stopped)).collect::<Vec<_>>(),
        "unaccounted": trial.unaccounted.iter().map(|it| said.unaccounted(it)).collect::<Vec<_>>(),
        "told": trial.told.iter().map(|effect| said.told(effect)).collect::<Vec<_>>(),
        "go_on": trial.go_on,
        "left_alone": trial.left_alone.len(),
        "left_alone_because": left_alone.map(|(chute, why)| said.left_alone(chute, why)).collect::<Vec<_>>(),
    })))
}

/// The servers of the other miner that are hosts of ours, and what is in the way of the others.
fn taken_over(
    record: &Record,
    servers: Vec<There>,
    now: UnixMillis,
) -> Result<(Vec<Adoption>, Vec<Obstacle>)> {
    let (mut adoptions, mut not_taken) = (Vec::new(), Vec::new());
    for there in servers {
        let server = there.name().to_owned();
        match there.find(record, now)? {
            Some(found) => match found.problem {
                None => adoptions.push(found.adoption),
                Some(problem) => not_taken.push(Obstacle::NotTakenOver { server, why: problem }),
            },
            None => {
                let why = no_host(&server);
                not_taken.push(Obstacle::NotTakenOver { server, why });
            }
        }
    }
    Ok((adoptions, not_taken))
}

fn listing((validator, look): &Look) -> Value {
    let read_at = look.as_ref().and_then(|look| look.read_at());
    let unknown = look.iter().flat_map(|look| look.unknown());
    json!({
        "validator": validator,
        "read_at": read_at.map(UnixMillis::iso8601),
        "unknown": unknown.map(|(resource, why)| json!({ "resource": resource, "why": why })).collect::<Vec<_>>(),
    })
}

/// The trial in the words of the other routes.
struct Said<'a> {
    record: &'a Record,
    trial: &'a Trial,
}

impl Said<'_> {
    fn chute_name<'n>(&'n self, chute: &'n ChuteKey) -> &'n str {
        let name = self.trial.chutes.get(chute);
        name.map_or_else(|| chute.chute.as_str(), String::as_str)
    }

    fn server_name(&self, server: &ServerId) -> Option<&String> {
        let server = self.record.servers().get(server)?;
        Some(&server.facts.name)
    }

    fn launch(&self, launch: &Launch) -> String {
        let name = self.chute_name(&launch.chute);
        match self.server_name(&launch.server) {
            Some(server) => format!("{name} on {server}"),
            None => name.to_owned(),
        }
    }

    fn placed(&self, placed: &Placed) -> Value {
        let Placed { launch, refused } = placed;
        json!({
            "chute_id": launch.chute.chute,
            "chute_name": self.chute_name(&launch.chute),
            "validator": launch.chute.validator,
            "version": launch.version,
            "server_id": launch.server,
            "server_name": self.server_name(&launch.server),
            "gpus": launch.gpus,
            "stops": launch.victims,
            "job_id": launch.job,
            "reason": launch.reason,
            "refused_because": refused,
        })
    }

    fn stopped(&self, stopped: &Stopped) -> Value {
        let deployment = &stopped.deployment;
        let when = match stopped.when {
            When::AtOnce => "at once",
            When::WithTheToken => "with the launch token of what comes",
            When::SecondSight => "when the next listing says the same",
        };
        let reason = match &stopped.why {
            Why::Reason(reason) => stop_words(reason),
            Why::MakesRoom(number) => {
                let placed = self.trial.placed.get(*number);
                let what = placed.map(|placed| self.launch(&placed.launch));
                format!("it makes room for {}", what.unwrap_or_default())
            }
        };
        json!({
            "deployment_id": deployment.id,
            "chute_id": deployment.chute.chute,
            "chute_name": self.chute_name(&deployment.chute),
            "server_id": deployment.server,
            "server_name": self.server_name(&deployment.server),
            "gpus": deployment.gpus,
            "job_id": deployment.job,
            "instance_id": deployment.instance,
            "when": when,
            "reason": reason,
        })
    }

    fn unaccounted(&self, unaccounted: &Unaccounted) -> Value {
        let stranger = &unaccounted.stranger;
        let chute = ChuteKey {
            validator: stranger.validator.clone(),
            chute: stranger.chute.clone(),
        };
        json!({
            "instance_id": unaccounted.instance,
            "chute_id": chute.chute,
            "chute_name": self.chute_name(&chute),
            "validator": chute.validator,
            "config_id": stranger.config,
            "deleted": unaccounted.is_deleted,
            "reason": if unaccounted.is_deleted {
                "no deployment accounts for it: it is deleted when the next listing says the same"
            } else {
                "no deployment accounts for it: it is reported, and stays while the deletion budget is spent"
            },
        })
    }

    fn told(&self, effect: &Effect) -> Value {
        json!({
            "what": effect_word(&effect.kind),
            "about": self.about(&effect.kind),
            "validator": effect.validator,
        })
    }

    fn about(&self, kind: &EffectKind) -> String {
        let of_server = |server: &ServerId| {
            let gpus = self.record.gpus_of(server).count();
            let name = self.server_name(server).map_or(server.as_str(), String::as_str);
            format!("{gpus} GPUs of {name}")
        };
        match kind {
            EffectKind::FetchLaunchConfig { deployment, .. }
            | EffectKind::AnnounceInstance { deployment, .. } => format!("deployment {deployment}"),
            EffectKind::ActivateInstance { instance, .. } | EffectKind::DeleteInstance { instance, .. } => {
                format!("instance {instance}")
            }
            EffectKind::ReleaseJob { job } => format!("job {job}"),
            EffectKind::AdvertiseGpus { server } | EffectKind::AwaitVerification { server, .. } => {
                of_server(server)
            }
            EffectKind::DeleteGpu { gpu } => format!("GPU {gpu}"),
        }
    }

    fn left_alone(&self, chute: &ChuteKey, why: &str) -> Value {
        json!({
            "chute_id": chute.chute,
            "chute_name": self.chute_name(chute),
            "validator": chute.validator,
            "reason": why,
        })
    }
}

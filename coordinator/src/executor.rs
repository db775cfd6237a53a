//! Does what the outbox says, at the validators, and reports how it ended.
//!
//! The oldest effect of each subject is done, effects of different subjects side by side. An effect is
//! repeated until it has an outcome; whether it is still wanted is asked before every try. Only the leader
//! runs this, and whether it still leads the client asks right before each call: after a pause of the process nothing
//! more is sent. A straggler does no harm: an effect is safe to repeat, and a late result changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use coordinator_core::state_machine::Command;
use coordinator_core::state_machine::effect::{Effect, EffectId, EffectKind, EffectOutcome, Subject};
use protocol::hotkey::Hotkey;
use protocol::id::ServerId;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::signer::{SealedKind, Sign};
use crate::store::{self, Store};
use crate::validator::client::{Verification, await_verification};
use crate::validator::rows::{NewServer, NodeAdvertisement};
use crate::validator::{self, ValidatorApi};

/// Effects under way at once.
const IN_FLIGHT_MAX: usize = 64;
/// First pause before an effect is tried again; doubled up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// The longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A launch config is asked for this often at most: afterwards another chute may have the GPUs.
const LAUNCH_TRIES_MAX: u32 = 4;
/// Between two questions after a verification.
const VERIFICATION_POLL: Duration = Duration::from_secs(1);
/// What is being asked of a validator when the lead is given up may take so long to be answered and recorded.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// Status of an outcome that no validator gave: the effect was not wanted any more.
const NOT_WANTED: u16 = 410;
/// Status of an outcome that no validator gave: the answer was not usable.
const UNUSABLE: u16 = 502;

/// Validators by their hotkeys.
pub type Validators = BTreeMap<Hotkey, Arc<dyn ValidatorApi>>;

/// The outbox dispatcher.
#[derive(Debug, Clone)]
pub struct Executor {
    store: Store,
    signer: Arc<dyn Sign>,
    validators: Arc<Validators>,
}

impl Executor {
    /// A dispatcher for the effects at these validators.
    #[must_use]
    pub fn new(store: Store, signer: Arc<dyn Sign>, validators: Arc<Validators>) -> Self {
        Self {
            store,
            signer,
            validators,
        }
    }

    /// Works until cancelled. Nothing is begun then, and what was asked already is recorded, if the answer comes soon: a
    /// launch config, say, is given to a job once, and refused to the next leader.
    pub async fn run(self, cancel: CancellationToken, mut random: fastrand::Rng) {
        let mut changes = self.store.changes();
        let mut tasks: JoinSet<EffectId> = JoinSet::new();
        let mut under_way: BTreeSet<EffectId> = BTreeSet::new();
        loop {
            let ready: Vec<Effect> = self.store.read(|state| {
                let fresh = state
                    .outbox()
                    .ready()
                    .filter(|effect| !under_way.contains(&effect.id));
                fresh
                    .take(IN_FLIGHT_MAX - under_way.len().min(IN_FLIGHT_MAX))
                    .cloned()
                    .collect()
            });
            for effect in ready {
                under_way.insert(effect.id);
                let (executor, random, cancel) = (self.clone(), random.fork(), cancel.clone());
                tasks.spawn(async move {
                    let id = effect.id;
                    executor.finish(effect, random, &cancel).await;
                    id
                });
            }
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                Some(ended) = tasks.join_next() => match ended {
                    Ok(id) => { under_way.remove(&id); }
                    Err(error) => {
                        tracing::error!(%error, "an effect's task ended abnormally");
                        under_way.clear();
                        tasks.shutdown().await;
                    }
                },
                () = changes.changed() => {}
            }
        }
        let all_ended = async { while tasks.join_next().await.is_some() {} };
        if timeout(DRAIN_MAX, all_ended).await.is_err() {
            let dropped = tasks.len();
            tracing::warn!(
                dropped,
                "not all effects have ended; the next leader does them again"
            );
        }
    }

    /// Tries an effect until it has an outcome, and reports that. When cancelled it does not try once more.
    async fn finish(&self, effect: Effect, mut random: fastrand::Rng, cancel: &CancellationToken) {
        let mut pause = PAUSE_MIN;
        let mut tries = 0;
        let outcome = loop {
            let wanted = self.store.read(|state| state.effect_is_wanted(&effect));
            if !wanted {
                break EffectOutcome::Refused {
                    status: NOT_WANTED,
                    detail: "not wanted any more".to_owned(),
                };
            }
            if cancel.is_cancelled() {
                return;
            }
            tries += 1;
            let performed = self.perform(&effect);
            let performed = match effect.kind {
                // It may take minutes, and the next leader asks as well as this one.
                EffectKind::AwaitVerification { .. } => cancel.run_until_cancelled(performed).await,
                _ => Some(performed.await),
            };
            let Some(performed) = performed else { return };
            match performed {
                Ok(outcome) => break outcome,
                Err(error) if gives_up(&effect.kind, &error, tries) => {
                    let status = error.status().unwrap_or(UNUSABLE);
                    let detail = match error {
                        validator::Error::Refused { detail, .. } => detail,
                        other => other.to_string(),
                    };
                    break EffectOutcome::Refused { status, detail };
                }
                Err(error) => {
                    tracing::warn!(effect = effect.id, kind = label(&effect.kind), %error, tries, "effect failed, trying again");
                    let pausing = tokio::time::sleep(pause.mul_f64(0.5 + random.f64()));
                    cancel.run_until_cancelled(pausing).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        };
        tracing::info!(
            effect = effect.id,
            kind = label(&effect.kind),
            ?outcome,
            tries,
            "effect ended"
        );
        let request = self.store.new_request();
        let mut pause = PAUSE_MIN;
        let command = Command::FinishEffect {
            effect: effect.id,
            outcome,
        };
        while let Err(error) = self.store.propose_as(request, None, command.clone()).await {
            match error {
                store::Error::Rejected(rejection) => {
                    tracing::error!(effect = effect.id, %rejection, "the outcome of an effect was rejected");
                    return;
                }
                store::Error::Unavailable(reason) | store::Error::OutcomeUnknown(reason) => {
                    tracing::warn!(
                        effect = effect.id,
                        reason,
                        "the outcome of an effect is not recorded yet"
                    );
                    tokio::time::sleep(pause.mul_f64(0.5 + random.f64())).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    async fn perform(&self, effect: &Effect) -> validator::Result<EffectOutcome> {
        let Some(api) = self.validators.get(&effect.validator) else {
            let detail = format!("validator {} is not configured any more", effect.validator);
            return Ok(EffectOutcome::Refused { status: 404, detail });
        };
        let api = api.as_ref();
        Ok(match &effect.kind {
            EffectKind::FetchLaunchConfig { chute, job, .. } => {
                let answer = api.launch_config(chute, job.as_ref()).await?;
                let token = answer.token.reveal().as_bytes();
                let sealed_token = self.signer.seal(SealedKind::LaunchToken, token).await?;
                EffectOutcome::LaunchConfig {
                    config: answer.config,
                    sealed_token,
                }
            }
            EffectKind::AnnounceInstance {
                chute,
                gpus,
                host,
                port,
                ..
            } => {
                let row = api.announce_instance(chute, gpus, host, *port).await?;
                EffectOutcome::Announced {
                    instance: row.instance_id,
                }
            }
            EffectKind::ActivateInstance { chute, instance, .. } => {
                let row = api.activate_instance(chute, instance).await?;
                EffectOutcome::Activated {
                    verified: row.verified,
                }
            }
            EffectKind::DeleteInstance { chute, instance } => {
                api.delete_instance(chute, instance).await?;
                EffectOutcome::Done
            }
            EffectKind::ReleaseJob { job } => {
                api.release_job(job).await?;
                EffectOutcome::Done
            }
            EffectKind::AdvertiseGpus { server } if self.worker_of(effect).is_some() => {
                self.announce_worker(api, server).await?
            }
            EffectKind::AdvertiseGpus { server } => self.advertise(api, server).await?,
            EffectKind::AwaitVerification { task, until, .. } => {
                let left = Duration::from_millis(until.since(self.store.clock().now()));
                match await_verification(api, task, VERIFICATION_POLL, left).await? {
                    Verification::Verified => EffectOutcome::Verified,
                    Verification::Failed(detail) => EffectOutcome::VerificationFailed { detail },
                    Verification::TimedOut => EffectOutcome::VerificationFailed {
                        detail: "no decision in time".to_owned(),
                    },
                }
            }
            EffectKind::DeleteGpu { gpu } => {
                match self.worker_of(effect) {
                    // With all its GPUs; for each of the others it is gone already.
                    Some(worker) => api.delete_server(worker).await?,
                    None => api.delete_node(gpu).await?,
                };
                EffectOutcome::Done
            }
        })
    }

    /// The sealed worker that an effect is about, if it is one.
    fn worker_of<'a>(&self, effect: &'a Effect) -> Option<&'a ServerId> {
        match &effect.subject {
            Subject::Server(server) => self
                .store
                .read(|state| state.workers().contains_key(server))
                .then_some(server),
            Subject::Deployment(_) | Subject::Instance(_) => None,
        }
    }

    /// Announces a sealed worker. After a lost answer it is in its own way, as GPUs are.
    async fn announce_worker(
        &self,
        api: &dyn ValidatorApi,
        server: &ServerId,
    ) -> validator::Result<EffectOutcome> {
        let facts = self.store.read(|state| {
            let server = state.servers().get(server)?;
            Some(server.facts.clone())
        });
        let Some(facts) = facts else {
            let detail = "the worker was removed".to_owned();
            return Ok(EffectOutcome::Refused {
                status: NOT_WANTED,
                detail,
            });
        };
        let worker = NewServer {
            host: facts.address,
            id: server.clone(),
            name: facts.name,
            gpus: self.advertisements(server),
        };
        match api.add_server(&worker).await {
            Err(error) if error.is_conflict() => {
                api.delete_server(server).await?;
                api.add_server(&worker).await?;
            }
            other => other?,
        }
        Ok(EffectOutcome::Verified)
    }

    /// Announcing is not idempotent: after a lost answer our own GPUs are in the way, so they are taken out
    /// and announced again.
    async fn advertise(&self, api: &dyn ValidatorApi, server: &ServerId) -> validator::Result<EffectOutcome> {
        let nodes = self.advertisements(server);
        let first = api.advertise(server, &nodes).await;
        let answer = match first {
            Err(error) if error.is_conflict() => {
                let listed = api.nodes().await?;
                for row in listed.rows() {
                    if nodes.iter().any(|node| node.device.uuid == row.gpu) {
                        api.delete_node(&row.gpu).await?;
                    }
                }
                api.advertise(server, &nodes).await?
            }
            other => other?,
        };
        let mut seeds: Vec<u64> = answer.nodes.iter().filter_map(|node| node.seed).collect();
        seeds.dedup();
        match seeds[..] {
            [seed] => Ok(EffectOutcome::Advertised {
                task: answer.task_id,
                seed,
            }),
            _ => Err(validator::Error::Protocol(format!(
                "{} seeds for one server",
                seeds.len()
            ))),
        }
    }

    /// The GPUs of a server, as a validator wants to know them.
    fn advertisements(&self, server: &ServerId) -> Vec<NodeAdvertisement> {
        self.store.read(|state| {
            let facts = state.servers().get(server).map(|server| server.facts.clone());
            let short_ref = state.gpus_of(server).next().map(|gpu| gpu.short_ref.clone());
            let (Some(facts), Some(short_ref)) = (facts, short_ref) else {
                return Vec::new();
            };
            let devices = facts.devices.iter().zip(0_u32..);
            devices
                .map(|(device, device_index)| NodeAdvertisement {
                    device: device.clone(),
                    device_index,
                    gpu_identifier: short_ref.clone(),
                    verification_host: facts.address.clone(),
                    verification_port: facts.proof_port,
                })
                .collect()
        })
    }
}

/// True if an error is this effect's end. Refusals are, unless they say "later"; a launch that the validator
/// cannot answer is given up after some tries, since another chute may use the GPUs meanwhile; what must be
/// deleted is tried for ever.
fn gives_up(kind: &EffectKind, error: &validator::Error, tries: u32) -> bool {
    if *error == validator::Error::NotLeading {
        // The next leader does it.
        return false;
    }
    match kind {
        EffectKind::DeleteInstance { .. } | EffectKind::DeleteGpu { .. } | EffectKind::ReleaseJob { .. } => {
            matches!(error.status(), Some(400 | 404 | 405 | 422))
        }
        EffectKind::FetchLaunchConfig { .. } | EffectKind::AnnounceInstance { .. } => {
            !error.is_transient() || tries >= LAUNCH_TRIES_MAX
        }
        EffectKind::ActivateInstance { .. }
        | EffectKind::AdvertiseGpus { .. }
        | EffectKind::AwaitVerification { .. } => !error.is_transient(),
    }
}

fn label(kind: &EffectKind) -> &'static str {
    match kind {
        EffectKind::FetchLaunchConfig { .. } => "FetchLaunchConfig",
        EffectKind::AnnounceInstance { .. } => "AnnounceInstance",
        EffectKind::ActivateInstance { .. } => "ActivateInstance",
        EffectKind::DeleteInstance { .. } => "DeleteInstance",
        EffectKind::ReleaseJob { .. } => "ReleaseJob",
        EffectKind::AdvertiseGpus { .. } => "AdvertiseGpus",
        EffectKind::AwaitVerification { .. } => "AwaitVerification",
        EffectKind::DeleteGpu { .. } => "DeleteGpu",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_sent_for_want_of_the_lead_is_no_outcome() {
        let chute = protocol::id::ChuteId::parse("c1").expect("an id");
        let deployment = protocol::id::DeploymentId::parse("d1").expect("an id");
        let launch = EffectKind::FetchLaunchConfig {
            deployment,
            chute,
            job: None,
        };
        let away = validator::Error::Unreachable(String::new());
        assert!(gives_up(&launch, &away, LAUNCH_TRIES_MAX));
        assert!(!gives_up(
            &launch,
            &validator::Error::NotLeading,
            LAUNCH_TRIES_MAX
        ));
    }
}

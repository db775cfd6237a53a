//! Anti-entropy: a listing of a validator against the record, repairs as changes and effects.
//!
//! Three rules keep a listing from doing harm. Unknown is not empty. A listing says nothing about what came
//! after it was asked for, so what is young is left alone; and only the second sight in a row counts. What is
//! deleted by listings alone stays within a budget per window; beyond it a person must look.

use std::collections::{BTreeMap, BTreeSet};

use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, DeploymentId, GpuId, InstanceId};
use protocol::time::UnixMillis;

use super::command::{Answer, ListedInstance, Listing, Observation, Rejection, Reply};
use super::deployment::StopReason;
use super::effect::{EffectKind, Subject};
use super::state::{State, Stranger};

/// Between two sights of a difference before it is acted on, and how old a thing must be, in ms.
pub const SIGHT_MARGIN_MS: u64 = 45_000;
/// Length of the deletion budget's window, in ms.
pub const BUDGET_WINDOW_MS: u64 = 10 * 60_000;

impl State {
    /// Deletions that may happen in one window without an operator.
    #[must_use]
    pub fn deletion_budget(&self) -> u32 {
        u32::try_from(self.deployments.len() / 5)
            .unwrap_or(u32::MAX)
            .max(2)
    }

    /// Takes one deletion from the window's budget.
    pub(crate) fn spend_budget(&mut self) -> Result<(), Rejection> {
        let limit = self.deletion_budget();
        let settings = self.settings_mut();
        if settings.now.since(settings.budget_window_start) >= BUDGET_WINDOW_MS {
            settings.budget_window_start = settings.now;
            settings.budget_used = 0;
        }
        if settings.budget_used >= limit {
            return Err(Rejection::BudgetSpent {
                used: settings.budget_used,
                limit,
            });
        }
        settings.budget_used += 1;
        Ok(())
    }

    pub(crate) fn observe(&mut self, observation: Observation) -> Answer {
        let Observation {
            validator,
            read_at,
            chutes,
            instances,
            gpus,
        } = observation;
        if !self.settings.validators.contains(&validator) {
            return Err(Rejection::UnknownValidator(validator));
        }
        let instances = match instances {
            Listing::Unknown if self.faults.unknown_is_empty => Listing::Known(Vec::new()),
            other => other,
        };
        if let Listing::Known(listed) = &instances {
            self.observe_instances(&validator, read_at, listed);
        }
        // These lists have no word for "none": one without rows proves nothing.
        if let Listing::Known(listed) = &chutes
            && !listed.is_empty()
        {
            self.observe_chutes(&validator, read_at, listed);
        }
        if let Listing::Known(listed) = &gpus {
            self.observe_gpus(listed);
        }
        Ok(Reply::Done)
    }

    fn observe_instances(&mut self, validator: &Hotkey, read_at: UnixMillis, listed: &[ListedInstance]) {
        let by_id: BTreeMap<&InstanceId, &ListedInstance> = listed
            .iter()
            .map(|instance| (&instance.instance, instance))
            .collect();
        for instance in listed {
            self.observe_instance(validator, read_at, instance);
        }
        let gone: Vec<InstanceId> = self
            .strangers
            .iter()
            .filter(|(id, stranger)| {
                stranger.validator == *validator
                    && !by_id.contains_key(id)
                    && stranger.first_seen_at + SIGHT_MARGIN_MS <= read_at
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            self.strangers.remove(&id);
        }
        let mut missing: Vec<DeploymentId> = Vec::new();
        for deployment in self.deployments.values() {
            let known_long = deployment
                .facts
                .claimed_at
                .is_some_and(|at| at + SIGHT_MARGIN_MS <= read_at);
            let ours = deployment.chute.validator == *validator && deployment.phase.is_live();
            let unlisted = deployment
                .instance
                .as_ref()
                .is_some_and(|id| !by_id.contains_key(id));
            if ours && known_long && unlisted {
                missing.push(deployment.id.clone());
            }
        }
        for id in missing {
            self.miss_instance(&id, read_at);
        }
    }

    fn miss_instance(&mut self, id: &DeploymentId, read_at: UnixMillis) {
        let Some(deployment) = self.deployments.get(id) else {
            return;
        };
        match deployment.missing_since {
            None => {
                self.deployments.get_mut(id).expect("seen just now").missing_since = Some(read_at);
            }
            Some(first) if first + SIGHT_MARGIN_MS <= read_at => {
                if self.spend_budget().is_ok() {
                    self.stop(id, StopReason::InstanceMissing);
                }
            }
            Some(_) => {}
        }
    }

    fn observe_instance(&mut self, validator: &Hotkey, read_at: UnixMillis, listed: &ListedInstance) {
        let Some(id) = self
            .deployment_of(listed.config.as_ref(), &listed.instance)
            .cloned()
        else {
            self.observe_stranger(validator, read_at, listed);
            return;
        };
        self.strangers.remove(&listed.instance);
        let Some(deployment) = self.deployments.get(&id) else {
            self.delete_late_instance(&id, listed.instance.clone());
            return;
        };
        let known = deployment.instance.as_ref() == Some(&listed.instance);
        let current = deployment.missing_since.is_none();
        if !known || deployment.facts.claimed_at.is_none() {
            self.claim_instance(&id, listed.instance.clone());
        }
        if !current {
            self.deployments
                .get_mut(&id)
                .expect("seen just now")
                .missing_since = None;
        }
        if listed.verified {
            let _ = self.record_instance_verified(&listed.instance);
        }
        if listed.active {
            let _ = self.record_instance_activated(listed.config.as_ref(), &listed.instance);
        }
    }

    fn observe_stranger(&mut self, validator: &Hotkey, read_at: UnixMillis, listed: &ListedInstance) {
        let Some(stranger) = self.strangers.get(&listed.instance) else {
            let stranger = Stranger {
                validator: validator.clone(),
                chute: listed.chute.clone(),
                config: listed.config.clone(),
                first_seen_at: read_at,
            };
            self.strangers.insert(listed.instance.clone(), stranger);
            return;
        };
        let subject = Subject::Instance(listed.instance.clone());
        let asked = self.outbox.of_subject(&subject).next().is_some();
        if asked || stranger.first_seen_at + SIGHT_MARGIN_MS > read_at || self.spend_budget().is_err() {
            return;
        }
        let kind = EffectKind::DeleteInstance {
            chute: listed.chute.clone(),
            instance: listed.instance.clone(),
        };
        self.push_effect(subject, validator.clone(), kind);
    }

    fn observe_chutes(
        &mut self,
        validator: &Hotkey,
        read_at: UnixMillis,
        listed: &[(ChuteId, ChuteVersion)],
    ) {
        let listed: BTreeSet<&ChuteId> = listed.iter().map(|(chute, _)| chute).collect();
        let ours: Vec<_> = self
            .chutes
            .keys()
            .filter(|key| key.validator == *validator)
            .cloned()
            .collect();
        for key in ours {
            let chute = self.chutes.get(&key).expect("listed just now");
            let missing = !listed.contains(&key.chute);
            match chute.missing_since {
                None if missing && chute.recorded_at + SIGHT_MARGIN_MS <= read_at => {
                    self.chutes.get_mut(&key).expect("seen just now").missing_since = Some(read_at);
                }
                Some(_) if !missing => {
                    self.chutes.get_mut(&key).expect("seen just now").missing_since = None;
                }
                Some(first) if first + SIGHT_MARGIN_MS <= read_at => {
                    let runs = self
                        .deployments_of(&key)
                        .any(|d| d.phase.is_live() && d.job.is_none());
                    if !runs || self.spend_budget().is_ok() {
                        let _ = self.record_chute_deleted(&key);
                    }
                }
                _ => {}
            }
        }
    }

    fn observe_gpus(&mut self, listed: &[(GpuId, bool)]) {
        for (gpu, verified) in listed {
            if *verified {
                let _ = self.record_gpu_verified(gpu);
            }
        }
    }

    /// True if taking this observation in would change anything. The leader asks before it proposes, so that
    /// a listing which only confirms the record costs no log entry.
    #[must_use]
    pub fn observation_matters(&self, observation: &Observation) -> bool {
        let mut copy = self.without_answers();
        copy.clear_changes();
        copy.observe(observation.clone()).is_ok() && copy.has_changes()
    }
}

//! A validator as the state machine's tests need it: it keeps instances and tells events, which the world
//! may lose, repeat and reorder.

use std::collections::{BTreeMap, BTreeSet};

use coordinator_core::state_machine::Command;
use coordinator_core::state_machine::command::{ListedInstance, Listing, Observation};
use coordinator_core::state_machine::effect::{Effect, EffectId, EffectKind, EffectOutcome, Subject};
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, ConfigId, GpuId, InstanceId, JobId};
use protocol::time::UnixMillis;

#[derive(Debug, Clone)]
pub(crate) struct Instance {
    pub(crate) chute: ChuteId,
    pub(crate) config: Option<ConfigId>,
    pub(crate) verified: bool,
    pub(crate) active: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Validator {
    pub(crate) instances: BTreeMap<InstanceId, Instance>,
    pub(crate) configs: BTreeMap<ConfigId, (ChuteId, bool)>,
    pub(crate) jobs_tried: BTreeSet<JobId>,
    pub(crate) gpus: BTreeMap<GpuId, bool>,
    pub(crate) chutes: BTreeMap<ChuteId, ChuteVersion>,
    next: u64,
    done: BTreeMap<Subject, EffectId>,
}

impl Validator {
    pub(crate) fn name(&mut self, prefix: &str) -> String {
        self.next += 1;
        format!("{prefix}-{}", self.next)
    }

    /// Does an effect. Its place in the order of its subject is checked here, where it takes place.
    pub(crate) fn perform(
        &mut self,
        effect: &Effect,
        refuse: bool,
        gpus: &[GpuId],
    ) -> Result<EffectOutcome, String> {
        let last = self.done.insert(effect.subject.clone(), effect.id);
        if last.is_some_and(|last| last > effect.id) {
            return Err(format!(
                "effect {} of {:?} was done after a later one",
                effect.id, effect.subject
            ));
        }
        let refused = |status| EffectOutcome::Refused {
            status,
            detail: "refused by the model".to_owned(),
        };
        Ok(match &effect.kind {
            EffectKind::FetchLaunchConfig { job: Some(job), .. } if !self.jobs_tried.insert(job.clone()) => {
                refused(403)
            }
            EffectKind::FetchLaunchConfig { .. } if refuse => refused(423),
            EffectKind::FetchLaunchConfig { chute, .. } => {
                let config = ConfigId::parse(&self.name("config")).unwrap();
                self.configs.insert(config.clone(), (chute.clone(), false));
                EffectOutcome::LaunchConfig {
                    config,
                    sealed_token: vec![1, 2, 3],
                }
            }
            EffectKind::AnnounceInstance { .. } if refuse => refused(409),
            EffectKind::AnnounceInstance { chute, .. } => {
                let instance = InstanceId::parse(&self.name("instance")).unwrap();
                let row = Instance {
                    chute: chute.clone(),
                    config: None,
                    verified: false,
                    active: false,
                };
                self.instances.insert(instance.clone(), row);
                EffectOutcome::Announced { instance }
            }
            EffectKind::ActivateInstance { instance, .. } => match self.instances.get_mut(instance) {
                Some(row) => {
                    (row.active, row.verified) = (true, true);
                    EffectOutcome::Activated { verified: true }
                }
                None => refused(404),
            },
            EffectKind::DeleteInstance { instance, .. } => {
                self.instances.remove(instance);
                EffectOutcome::Done
            }
            EffectKind::ReleaseJob { .. } => EffectOutcome::Done,
            EffectKind::AdvertiseGpus { .. } => {
                for gpu in gpus {
                    self.gpus.insert(gpu.clone(), false);
                }
                EffectOutcome::Advertised {
                    task: self.name("task"),
                    seed: u64::MAX >> 1,
                }
            }
            EffectKind::AwaitVerification { .. } if refuse => EffectOutcome::VerificationFailed {
                detail: "too fast".to_owned(),
            },
            EffectKind::AwaitVerification { .. } => {
                for gpu in gpus {
                    self.gpus.insert(gpu.clone(), true);
                }
                EffectOutcome::Verified
            }
            EffectKind::DeleteGpu { gpu } => {
                self.gpus.remove(gpu);
                EffectOutcome::Done
            }
        })
    }

    /// A workload claims its launch config; the event that follows, if the claim is accepted.
    pub(crate) fn claim(&mut self, validator: &Hotkey, config: &ConfigId) -> Option<Command> {
        let (chute, used) = self.configs.get_mut(config)?;
        if std::mem::replace(used, true) {
            return None;
        }
        let chute = chute.clone();
        let instance = InstanceId::parse(&self.name("instance")).unwrap();
        let row = Instance {
            chute: chute.clone(),
            config: Some(config.clone()),
            verified: false,
            active: false,
        };
        self.instances.insert(instance.clone(), row);
        Some(Command::RecordInstanceCreated {
            validator: validator.clone(),
            chute,
            config: Some(config.clone()),
            instance,
        })
    }

    pub(crate) fn listing(&self, validator: &Hotkey, read_at: UnixMillis) -> Observation {
        let instances = self.instances.iter().map(|(id, row)| ListedInstance {
            instance: id.clone(),
            chute: row.chute.clone(),
            config: row.config.clone(),
            active: row.active,
            verified: row.verified,
        });
        Observation {
            validator: validator.clone(),
            read_at,
            chutes: Listing::Known(self.chutes.iter().map(|(c, v)| (c.clone(), v.clone())).collect()),
            instances: Listing::Known(instances.collect()),
            gpus: Listing::Known(
                self.gpus
                    .iter()
                    .map(|(gpu, verified)| (gpu.clone(), *verified))
                    .collect(),
            ),
        }
    }
}

//! How a deployment moves: placed, assigned, stopped, gone. The only writer of `Gpu::holder`,
//! `Gpu::promised_to` and `Server::revision`.

use protocol::id::{ConfigId, DeploymentId, GpuId, ServerId};
use protocol::time::UnixMillis;

use super::chute::{ChuteKey, Cooldown, Failures, uses_launch_config};
use super::command::{Answer, Placement, Rejection, Reply};
use super::deployment::{Audit, Deployment, Facts, Flow, Phase, Stop, StopReason};
use super::effect::{Effect, EffectKind, EffectOutcome, Subject};
use super::state::State;

/// First pause of a chute after the validator said that it is full (423) or busy (409, 429), in ms.
const COOLDOWN_FULL_MS: u64 = 30_000;
/// First pause of a chute after the validator forbade it to us (403, 404), in ms.
const COOLDOWN_FORBIDDEN_MS: u64 = 3_600_000;

impl State {
    /// Writes an admitted placement down: GPUs that are free are held, the others promised.
    pub(crate) fn place(&mut self, placement: Placement) -> Answer {
        if self.is_observing() {
            return Err(Rejection::Placement("the cluster observes".to_owned()));
        }
        self.admit(&placement)?;
        let now = self.settings.now;
        let id = placement.deployment.clone();
        let chute = &self.chutes.get(&placement.chute).expect("admitted").definition;
        let flow = if uses_launch_config(chute.chutes_version.as_deref()) {
            Flow::LaunchConfig
        } else {
            Flow::Legacy
        };
        let deployment = Deployment {
            id: id.clone(),
            chute: placement.chute.clone(),
            version: placement.version,
            image: chute.image.clone(),
            chutes_version: chute.chutes_version.clone(),
            server: placement.server,
            gpus: placement.gpus,
            job: placement.job.clone(),
            preemptible: chute.preemptible,
            flow,
            phase: Phase::Requested,
            phase_since: now,
            deadline: now + Phase::Requested.patience_ms(),
            reason: placement.reason,
            victims: placement.victims,
            config: None,
            sealed_token: None,
            instance: None,
            facts: Facts::default(),
            ports: Vec::new(),
            bytes_pulled: 0,
            assigned_at_revision: None,
            missing_since: None,
            superseded_by: None,
            stop: None,
            created_at: now,
        };
        for gpu in deployment.gpus.clone() {
            let gpu = self.gpus.get_mut(&gpu).expect("admitted");
            if gpu.holder.is_none() || self.faults.double_allocation {
                gpu.holder = Some(id.clone());
            } else {
                gpu.promised_to = Some(id.clone());
            }
        }
        if let Some(job) = placement.job.as_ref().and_then(|job| self.jobs.get_mut(job)) {
            job.attempt = Some(id.clone());
        }
        self.insert_deployment(deployment);
        match flow {
            Flow::LaunchConfig => {
                let kind = EffectKind::FetchLaunchConfig {
                    deployment: id.clone(),
                    chute: placement.chute.chute,
                    job: placement.job,
                };
                self.push_effect(Subject::Deployment(id), placement.chute.validator, kind);
            }
            // Nothing can be refused before the workload runs, so there is nothing to wait for.
            Flow::Legacy => self.claim_room(&id),
        }
        Ok(Reply::Done)
    }

    /// Takes a launch config in. Too late for a deployment that is being stopped: the token just dies, but
    /// its name is kept so that an instance made with it is known for ours.
    pub(crate) fn take_launch_config(&mut self, id: &DeploymentId, config: ConfigId, sealed_token: Vec<u8>) {
        if self.deployment_of_config(&config).is_some() {
            self.stop(
                id,
                StopReason::LaunchRefused("the validator repeated a launch config".to_owned()),
            );
            return;
        }
        self.set_config(id, config.clone());
        let revives = self.faults.late_config_revives;
        let Some(deployment) = self.deployments.get_mut(id) else {
            return;
        };
        if revives && !deployment.phase.is_live() {
            deployment.phase = Phase::Requested;
            deployment.stop = None;
        }
        if deployment.phase != Phase::Requested {
            return;
        }
        deployment.sealed_token = Some(sealed_token);
        let known = self
            .strangers
            .iter()
            .find(|(_, stranger)| stranger.config.as_ref() == Some(&config));
        if let Some(instance) = known.map(|(instance, _)| instance.clone()) {
            self.strangers.remove(&instance);
            self.set_instance(id, instance);
        }
        self.claim_room(id);
    }

    /// Stops the victims, now that what replaces them is certain, and assigns if nothing is in the way. While the
    /// cluster observes, neither.
    pub(crate) fn claim_room(&mut self, id: &DeploymentId) {
        let Some(deployment) = self.deployments.get(id).filter(|_| !self.is_observing()) else {
            return;
        };
        let superseding = deployment.chute.clone();
        for victim in deployment.victims.clone() {
            let same_chute = self
                .deployments
                .get(&victim)
                .is_some_and(|v| v.chute == superseding);
            let reason = if same_chute {
                StopReason::Superseded(id.clone())
            } else {
                StopReason::Preempted(id.clone())
            };
            self.stop(&victim, reason);
        }
        self.try_assign(id);
    }

    /// Puts a deployment into its server's desired set once it has its GPUs and its token.
    fn try_assign(&mut self, id: &DeploymentId) {
        let Some(deployment) = self.deployments.get(id).filter(|_| !self.is_observing()) else {
            return;
        };
        let has_token = deployment.flow == Flow::Legacy || deployment.sealed_token.is_some();
        let holds = |gpu: &GpuId| {
            self.gpus
                .get(gpu)
                .is_some_and(|gpu| gpu.holder.as_ref() == Some(id))
        };
        if deployment.phase != Phase::Requested || !has_token || !deployment.gpus.iter().all(holds) {
            return;
        }
        let (now, server) = (self.settings.now, deployment.server.clone());
        let revision = self.bump_revision(&server);
        if let Some(deployment) = self.deployments.get_mut(id) {
            deployment.enter(Phase::Assigned, now);
            deployment.assigned_at_revision = revision;
        }
    }

    /// Says that a server's desired set is another one now.
    pub(crate) fn bump_revision(&mut self, server: &ServerId) -> Option<u64> {
        let server = self.servers.get_mut(server)?;
        server.revision += 1;
        Some(server.revision)
    }

    /// Takes a deployment down; false if it was on its way out already.
    pub(crate) fn stop(&mut self, id: &DeploymentId, reason: StopReason) -> bool {
        let Some(deployment) = self.deployments.get(id).filter(|d| d.phase.is_live()) else {
            return false;
        };
        let now = self.settings.now;
        let (server, gpus) = (deployment.server.clone(), deployment.gpus.clone());
        let was_desired = deployment.phase.is_desired();
        let failed = reason.is_launch_failure() && !deployment.earns() && deployment.job.is_none();
        let revision = if was_desired {
            self.bump_revision(&server)
        } else {
            None
        };
        for gpu in &gpus {
            if self
                .gpus
                .get(gpu)
                .is_some_and(|gpu| gpu.promised_to.as_ref() == Some(id))
            {
                self.gpus.get_mut(gpu).expect("seen just now").promised_to = None;
            }
        }
        let deployment = self.deployments.get_mut(id).expect("seen just now");
        deployment.enter(Phase::Stopping, now);
        deployment.sealed_token = None;
        deployment.victims.clear();
        // What was never in a desired set was never started.
        deployment.stop = Some(Stop {
            reason,
            at: now,
            removed_at_revision: revision,
            absent: !was_desired,
        });
        if self.is_observing() {
            // Another miner speaks with the validator.
            self.withdraw(&Subject::Deployment(id.clone()));
        } else {
            self.tell_of_the_end(id);
        }
        if failed {
            self.remember_failure(id);
        }
        self.try_finish(id);
        true
    }

    /// Gives back the job of a deployment that is being taken down, and deletes its instance.
    pub(crate) fn tell_of_the_end(&mut self, id: &DeploymentId) {
        let Some(deployment) = self.deployments.get(id) else {
            return;
        };
        let stop = deployment.stop.as_ref();
        let job = stop.and_then(|stop| deployment.job_to_give_back(&stop.reason).cloned());
        let (instance, subject) = (deployment.instance.clone(), Subject::Deployment(id.clone()));
        let ChuteKey { validator, chute } = deployment.chute.clone();
        // First: a job whose instance we delete counts as failed, and nobody else may do it.
        if let Some(job) = job {
            self.push_effect(subject.clone(), validator.clone(), EffectKind::ReleaseJob { job });
        }
        if let Some(instance) = instance {
            self.push_effect(subject, validator, EffectKind::DeleteInstance { chute, instance });
        }
    }

    fn remember_failure(&mut self, id: &DeploymentId) {
        let Some(deployment) = self.deployments.get(id) else {
            return;
        };
        let short_ref = deployment
            .gpus
            .first()
            .and_then(|gpu| self.gpus.get(gpu))
            .map(|g| g.short_ref.clone());
        let (Some(short_ref), now) = (short_ref, self.settings.now) else {
            return;
        };
        if let Some(chute) = self.chutes.get_mut(&deployment.chute.clone()) {
            let next = Failures::after_one_more(chute.failures.get(&short_ref), now);
            chute.failures.insert(short_ref, next);
        }
    }

    /// The end of a deployment, one step after the other: the validator was told (nothing of it is pending
    /// any more), the host has confirmed that it is gone.
    pub(crate) fn try_finish(&mut self, id: &DeploymentId) {
        let told = self
            .outbox
            .of_subject(&Subject::Deployment(id.clone()))
            .next()
            .is_none();
        let now = self.settings.now;
        let Some(deployment) = self.deployments.get(id) else {
            return;
        };
        if deployment.phase == Phase::Stopping && told {
            self.deployments
                .get_mut(id)
                .expect("seen just now")
                .enter(Phase::Draining, now);
        }
        let Some(deployment) = self.deployments.get(id) else {
            return;
        };
        if deployment.phase != Phase::Draining {
            return;
        }
        if self.faults.gpu_freed_early {
            for heir in self.release_gpus(id) {
                self.try_assign(&heir);
            }
        }
        // Told again: a claim may have come in while it drained.
        let absent = self
            .deployments
            .get(id)
            .and_then(|d| d.stop.as_ref())
            .is_some_and(|stop| stop.absent);
        if told && absent {
            self.bury(id);
        }
    }

    /// Gives the GPUs back and leaves an audit row.
    fn bury(&mut self, id: &DeploymentId) {
        let heirs = self.release_gpus(id);
        let Some(deployment) = self.remove_deployment(id) else {
            return;
        };
        let (server, version) = (deployment.server.clone(), deployment.version_key());
        self.insert_audit(Audit {
            deployment,
            gone_at: self.settings.now,
        });
        self.forget_unused_version(&version.chute, &version.version);
        for heir in heirs {
            self.try_assign(&heir);
        }
        self.try_leave(&server);
    }

    fn release_gpus(&mut self, id: &DeploymentId) -> Vec<DeploymentId> {
        let gpus = self
            .deployments
            .get(id)
            .map(|d| d.gpus.clone())
            .unwrap_or_default();
        let mut heirs = Vec::new();
        for gpu in gpus {
            if self
                .gpus
                .get(&gpu)
                .is_none_or(|gpu| gpu.holder.as_ref() != Some(id))
            {
                continue;
            }
            let gpu = self.gpus.get_mut(&gpu).expect("seen just now");
            gpu.holder = gpu.promised_to.take();
            heirs.extend(gpu.holder.clone());
        }
        heirs.dedup();
        heirs
    }

    /// Serving is a conclusion from the facts.
    pub(crate) fn conclude_serving(&mut self, id: &DeploymentId) {
        let now = self.settings.now;
        let Some(deployment) = self.deployments.get(id) else {
            return;
        };
        if !deployment.earns() || !matches!(deployment.phase, Phase::Assigned | Phase::Launched) {
            return;
        }
        let (chute, gpu) = (deployment.chute.clone(), deployment.gpus.first().cloned());
        let short_ref = gpu
            .and_then(|gpu| self.gpus.get(&gpu))
            .map(|gpu| gpu.short_ref.clone());
        self.erase_token(id);
        if let Some(deployment) = self.deployments.get_mut(id) {
            deployment.enter(Phase::Serving, now);
        }
        if let Some(chute) = self.chutes.get_mut(&chute) {
            chute.cooldown = None;
            if let Some(short_ref) = short_ref {
                chute.failures.remove(&short_ref);
            }
        }
    }

    /// A token is good for one claim: afterwards it is only a secret to be lost.
    pub(crate) fn erase_token(&mut self, id: &DeploymentId) {
        let Some(deployment) = self.deployments.get(id).filter(|d| d.sealed_token.is_some()) else {
            return;
        };
        let (server, desired) = (deployment.server.clone(), deployment.phase.is_desired());
        if let Some(deployment) = self.deployments.get_mut(id) {
            deployment.sealed_token = None;
        }
        if desired {
            self.bump_revision(&server);
        }
    }

    /// Takes the outcome of an effect about a deployment in. The effect is out of the outbox already.
    pub(crate) fn finish_deployment_effect(
        &mut self,
        id: &DeploymentId,
        effect: &Effect,
        outcome: EffectOutcome,
    ) {
        match outcome {
            EffectOutcome::LaunchConfig { config, sealed_token } => {
                self.take_launch_config(id, config, sealed_token);
            }
            EffectOutcome::Announced { instance } => self.claim_instance(id, instance),
            EffectOutcome::Activated { verified } => {
                let now = self.settings.now;
                if let Some(deployment) = self.deployments.get_mut(id) {
                    deployment.facts.active_at.get_or_insert(now);
                    if verified {
                        deployment.facts.verified_at.get_or_insert(now);
                    }
                }
                self.conclude_serving(id);
            }
            EffectOutcome::Refused { status, detail } => {
                if matches!(effect.kind, EffectKind::FetchLaunchConfig { .. }) {
                    self.remember_refusal(id, status, &detail);
                }
                let is_deletion = matches!(
                    effect.kind,
                    EffectKind::DeleteInstance { .. } | EffectKind::ReleaseJob { .. }
                );
                if !is_deletion {
                    self.stop(id, StopReason::LaunchRefused(format!("{status}: {detail}")));
                }
            }
            EffectOutcome::Done
            | EffectOutcome::Advertised { .. }
            | EffectOutcome::Verified
            | EffectOutcome::VerificationFailed { .. } => {}
        }
        self.try_finish(id);
    }

    fn remember_refusal(&mut self, id: &DeploymentId, status: u16, detail: &str) {
        let now = self.settings.now;
        let live = self
            .deployments
            .get(id)
            .filter(|d| d.phase.is_live() && d.job.is_none());
        let Some(chute) = live.map(|deployment| deployment.chute.clone()) else {
            return;
        };
        if let Some(chute) = self.chutes.get_mut(&chute) {
            let first_ms = if matches!(status, 403 | 404) {
                COOLDOWN_FORBIDDEN_MS
            } else {
                COOLDOWN_FULL_MS
            };
            let reason = format!("{status}: {detail}");
            chute.cooldown = Some(Cooldown::after_refusal(
                chute.cooldown.as_ref(),
                now,
                first_ms,
                reason,
            ));
        }
    }

    /// Deadlines that have passed.
    pub(crate) fn pass_deadlines(&mut self) -> bool {
        let now = self.settings.now;
        let due: Vec<(DeploymentId, Phase)> = self
            .deployments
            .values()
            .filter(|d| d.deadline <= now)
            .map(|d| (d.id.clone(), d.phase))
            .collect();
        for (id, phase) in &due {
            if phase.is_live() {
                self.stop(id, StopReason::DeadlinePassed(*phase));
            } else if let Some(deployment) = self.deployments.get_mut(id) {
                // Nothing but an answer from outside can end these: keep asking, and say so again.
                deployment.progressed(now);
                let server = deployment.server.clone();
                self.bump_revision(&server);
            }
        }
        !due.is_empty()
    }

    /// When the next deadline of any kind passes.
    #[must_use]
    pub fn next_deadline(&self) -> Option<UnixMillis> {
        let deployments = self.deployments.values().map(|d| d.deadline);
        let enrolments = self.servers.values().filter_map(|server| {
            let enrolment = server.enrolment.as_ref()?;
            enrolment.waits_for_verification().then_some(enrolment.deadline)
        });
        let bounties = self.bounties.values().map(|bounty| bounty.expires_at);
        if self.is_observing() {
            return bounties.min();
        }
        deployments.chain(enrolments).chain(bounties).min()
    }

    /// True if the executor should still do this effect: what it was for may be on its way out.
    #[must_use]
    pub fn effect_is_wanted(&self, effect: &Effect) -> bool {
        match &effect.kind {
            EffectKind::FetchLaunchConfig { deployment, .. }
            | EffectKind::AnnounceInstance { deployment, .. }
            | EffectKind::ActivateInstance { deployment, .. } => self
                .deployments
                .get(deployment)
                .is_some_and(|d| d.phase.is_live()),
            EffectKind::AdvertiseGpus { server } | EffectKind::AwaitVerification { server, .. } => {
                let enrolment = self
                    .servers
                    .get(server)
                    .and_then(|server| server.enrolment.as_ref());
                enrolment.is_some_and(super::server::Enrolment::waits_for_verification)
            }
            EffectKind::DeleteInstance { .. }
            | EffectKind::ReleaseJob { .. }
            | EffectKind::DeleteGpu { .. } => true,
        }
    }
}

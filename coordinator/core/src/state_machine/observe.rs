//! What is seen outside becomes facts: reports of hosts, events of validators.

use std::collections::BTreeMap;

use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::report::WorkloadReport;
use protocol::workload::{PRIMARY_PORT, WorkloadPhase};

use super::chute::{Bounty, Chute, ChuteCode, ChuteDefinition, ChuteKey, VersionKey};
use super::command::{Answer, Rejection, Reply};
use super::deployment::{Deployment, Flow, Phase, StopReason};
use super::effect::{EffectKind, Subject};
use super::job::Job;
use super::state::{State, Stranger};

/// How long a bounty is remembered that nothing renews, in ms (the validator's own limit).
const BOUNTY_MEMORY_MS: u64 = 86_400_000;

fn listed_in(report: &WorkloadReport) -> BTreeMap<&DeploymentId, &WorkloadPhase> {
    let listed = report.workloads.iter();
    listed.map(|status| (&status.deployment, &status.phase)).collect()
}

impl State {
    pub(crate) fn record_workloads(&mut self, id: &ServerId, report: &WorkloadReport) -> Answer {
        let server = self.known_server(id)?;
        let overtaken = server.reported.is_some_and(|fence| fence > report.fence);
        if report.fence.incarnation != self.settings.incarnation || overtaken {
            return Ok(Reply::Unchanged);
        }
        let listed = listed_in(report);
        let strangers = self.strangers_among(&listed);
        if server.reported != Some(report.fence) || server.strangers != strangers {
            let server = self.servers.get_mut(id).expect("known");
            server.reported = Some(report.fence);
            server.strangers = strangers;
        }
        let ours: Vec<DeploymentId> = self.deployments_on(id).map(|d| d.id.clone()).collect();
        for deployment in ours {
            self.record_workload(
                &deployment,
                report.fence.revision,
                listed.get(&deployment).copied(),
            );
        }
        Ok(Reply::Done)
    }

    /// Whether the state says of a server what its report says, or what one of a later set does. Reports of one set bear no
    /// order: one that was long under way may have been recorded after a newer one.
    #[must_use]
    pub fn holds_report(&self, id: &ServerId, report: &WorkloadReport) -> bool {
        let Some(server) = self.servers.get(id) else {
            return true;
        };
        let overtaken = server.reported.is_some_and(|fence| fence > report.fence);
        if report.fence.incarnation != self.settings.incarnation || overtaken {
            return true;
        }
        let listed = listed_in(report);
        let same_ports = |deployment: &Deployment| match listed.get(&deployment.id) {
            Some(WorkloadPhase::Running { ports, .. }) if deployment.phase.is_desired() => {
                deployment.ports == *ports
            }
            _ => true,
        };
        server.reported == Some(report.fence)
            && server.strangers == self.strangers_among(&listed)
            && self.deployments_on(id).all(same_ports)
    }

    fn strangers_among(&self, listed: &BTreeMap<&DeploymentId, &WorkloadPhase>) -> Vec<DeploymentId> {
        let strangers = listed.keys().filter(|id| !self.deployments.contains_key(id));
        strangers.map(|id| (*id).clone()).collect()
    }

    fn record_workload(&mut self, id: &DeploymentId, revision: u64, seen: Option<&WorkloadPhase>) {
        let now = self.settings.now;
        let Some(deployment) = self.deployments.get(id) else {
            return;
        };
        match (deployment.phase, seen) {
            (Phase::Requested, _) => {}
            (Phase::Stopping | Phase::Draining, None) => {
                let stop = deployment.stop.as_ref();
                let removed_at = stop.and_then(|stop| stop.removed_at_revision);
                if removed_at.is_some_and(|removed_at| removed_at <= revision) {
                    let deployment = self.deployments.get_mut(id).expect("seen just now");
                    deployment.stop.as_mut().expect("it is stopping").absent = true;
                    self.try_finish(id);
                }
            }
            (Phase::Stopping | Phase::Draining, Some(_)) => {}
            (_, None) => {
                if deployment
                    .assigned_at_revision
                    .is_some_and(|assigned_at| assigned_at <= revision)
                {
                    self.stop(id, StopReason::WorkloadVanished);
                }
            }
            (_, Some(WorkloadPhase::Pulling { bytes_done })) => {
                if *bytes_done > deployment.bytes_pulled {
                    let deployment = self.deployments.get_mut(id).expect("seen just now");
                    deployment.bytes_pulled = *bytes_done;
                    deployment.progressed(now);
                }
            }
            (_, Some(WorkloadPhase::Running { ports, ready })) => {
                let first = deployment.facts.running_at.is_none();
                let newly_ready = *ready && deployment.facts.ready_at.is_none();
                if first || newly_ready || deployment.ports != *ports {
                    let deployment = self.deployments.get_mut(id).expect("seen just now");
                    deployment.facts.running_at.get_or_insert(now);
                    if *ready {
                        deployment.facts.ready_at.get_or_insert(now);
                    }
                    deployment.ports.clone_from(ports);
                    deployment.enter(Phase::Launched, now);
                    if first && deployment.flow == Flow::Legacy {
                        // Its server's set holds no seed for it any more.
                        let server = deployment.server.clone();
                        self.bump_revision(&server);
                    }
                    self.go_on_with_legacy(id, first, newly_ready);
                    self.conclude_serving(id);
                }
            }
            (_, Some(WorkloadPhase::Ended { reason, .. })) => {
                self.stop(id, StopReason::WorkloadEnded(reason.clone()));
            }
            (_, Some(WorkloadPhase::Pending | WorkloadPhase::Stopping)) => {}
        }
    }

    /// In the legacy flow we announce the instance when it runs, and activate it when it is ready.
    /// While the cluster observes, another miner does.
    pub(crate) fn go_on_with_legacy(&mut self, id: &DeploymentId, first: bool, newly_ready: bool) {
        let legacy = |deployment: &&Deployment| deployment.flow == Flow::Legacy;
        let Some(deployment) = self
            .deployments
            .get(id)
            .filter(legacy)
            .filter(|_| !self.is_observing())
        else {
            return;
        };
        let (chute, subject) = (deployment.chute.clone(), Subject::Deployment(id.clone()));
        let port = deployment
            .ports
            .iter()
            .find(|port| port.internal == PRIMARY_PORT)
            .map(|port| port.external);
        let host = self
            .servers
            .get(&deployment.server)
            .map(|server| server.facts.address.clone());
        let (gpus, instance) = (deployment.gpus.clone(), deployment.instance.clone());
        if let (true, None, Some(port), Some(host)) = (first, &instance, port, host) {
            let kind = EffectKind::AnnounceInstance {
                deployment: id.clone(),
                chute: chute.chute.clone(),
                gpus,
                host,
                port,
            };
            self.push_effect(subject.clone(), chute.validator.clone(), kind);
        }
        if let (true, Some(instance)) = (newly_ready, instance) {
            self.push_activation(id, &chute, instance);
        }
    }

    fn push_activation(&mut self, id: &DeploymentId, chute: &ChuteKey, instance: InstanceId) {
        if self.is_observing() {
            return;
        }
        let kind = EffectKind::ActivateInstance {
            deployment: id.clone(),
            chute: chute.chute.clone(),
            instance,
        };
        self.push_effect(Subject::Deployment(id.clone()), chute.validator.clone(), kind);
    }

    /// Ties an instance to a deployment that is not gone.
    pub(crate) fn claim_instance(&mut self, id: &DeploymentId, instance: InstanceId) {
        let now = self.settings.now;
        let Some(deployment) = self.deployments.get(id) else {
            return;
        };
        if deployment.instance.as_ref() == Some(&instance) && deployment.facts.claimed_at.is_some() {
            return;
        }
        let (live, chute) = (deployment.phase.is_live(), deployment.chute.clone());
        let is_new = deployment.instance.as_ref() != Some(&instance);
        let legacy_ready = deployment.flow == Flow::Legacy && deployment.facts.ready_at.is_some();
        if is_new {
            self.set_instance(id, instance.clone());
        }
        let deployment = self.deployments.get_mut(id).expect("seen just now");
        deployment.facts.claimed_at.get_or_insert(now);
        if live {
            deployment.progressed(now);
        }
        if !live && is_new {
            // It was claimed while it was being stopped: the validator must be told after all.
            let stop = deployment.stop.as_ref();
            let job = stop.and_then(|stop| deployment.job_to_give_back(&stop.reason).cloned());
            let subject = Subject::Deployment(id.clone());
            if let Some(job) = job {
                let kind = EffectKind::ReleaseJob { job };
                self.push_effect(subject.clone(), chute.validator.clone(), kind);
            }
            let kind = EffectKind::DeleteInstance {
                chute: chute.chute.clone(),
                instance: instance.clone(),
            };
            self.push_effect(subject, chute.validator.clone(), kind);
        } else if live && is_new && legacy_ready {
            self.push_activation(id, &chute, instance);
        }
        self.erase_token(id);
    }

    pub(crate) fn record_instance_created(
        &mut self,
        validator: Hotkey,
        chute: ChuteId,
        config: Option<ConfigId>,
        instance: InstanceId,
    ) -> Answer {
        let Some(id) = self.deployment_of(config.as_ref(), &instance).cloned() else {
            if self.strangers.contains_key(&instance) {
                return Ok(Reply::Unchanged);
            }
            let first_seen_at = self.settings.now;
            self.strangers.insert(
                instance,
                Stranger {
                    validator,
                    chute,
                    config,
                    first_seen_at,
                },
            );
            return Ok(Reply::Done);
        };
        if self.deployments.contains_key(&id) {
            self.claim_instance(&id, instance);
        } else {
            self.delete_late_instance(&id, instance);
        }
        Ok(Reply::Done)
    }

    /// An instance turned up whose deployment is gone.
    pub(crate) fn delete_late_instance(&mut self, id: &DeploymentId, instance: InstanceId) {
        let Some(audit) = self.audits.get(id) else { return };
        let subject = Subject::Instance(instance.clone());
        if self.outbox.of_subject(&subject).next().is_some() {
            return;
        }
        let chute = audit.deployment.chute.clone();
        self.set_audit_instance(id, instance.clone());
        let kind = EffectKind::DeleteInstance {
            chute: chute.chute,
            instance,
        };
        self.push_effect(subject, chute.validator, kind);
    }

    pub(crate) fn record_instance_verified(&mut self, instance: &InstanceId) -> Answer {
        let Some(id) = self.deployment_of(None, instance).cloned() else {
            return Ok(Reply::Unchanged);
        };
        self.record_fact(&id, |facts, now| facts.verified_at.get_or_insert(now) == &now)
    }

    pub(crate) fn record_instance_activated(
        &mut self,
        config: Option<&ConfigId>,
        instance: &InstanceId,
    ) -> Answer {
        let Some(id) = self.deployment_of(config, instance).cloned() else {
            return Ok(Reply::Unchanged);
        };
        self.claim_instance(&id, instance.clone());
        self.record_fact(&id, |facts, now| facts.active_at.get_or_insert(now) == &now)
    }

    fn record_fact(
        &mut self,
        id: &DeploymentId,
        record: impl Fn(&mut super::deployment::Facts, protocol::time::UnixMillis) -> bool,
    ) -> Answer {
        let now = self.settings.now;
        let Some(deployment) = self.deployments.get_mut(id) else {
            return Ok(Reply::Unchanged);
        };
        let new = record(&mut deployment.facts, now);
        if new && deployment.phase.is_live() {
            deployment.progressed(now);
        }
        self.conclude_serving(id);
        Ok(if new { Reply::Done } else { Reply::Unchanged })
    }

    pub(crate) fn record_instance_deleted(
        &mut self,
        config: Option<&ConfigId>,
        instance: &InstanceId,
        cause: String,
    ) -> Answer {
        self.strangers.remove(instance);
        let Some(id) = self.deployment_of(config, instance).cloned() else {
            return Ok(Reply::Unchanged);
        };
        if self.deployments.get(&id).is_some_and(|d| d.instance.is_none()) {
            self.set_instance(&id, instance.clone());
        }
        let stopped = self.stop(&id, StopReason::InstanceDeleted(cause));
        Ok(if stopped {
            Reply::Stopping(vec![id])
        } else {
            Reply::Unchanged
        })
    }

    pub(crate) fn record_rolling_update(&mut self, instance: &InstanceId, version: ChuteVersion) -> Answer {
        let id = self.deployment_of(None, instance).cloned();
        let Some(deployment) = id.and_then(|id| self.deployments.get_mut(&id)) else {
            return Ok(Reply::Unchanged);
        };
        deployment.superseded_by = Some(version);
        Ok(Reply::Done)
    }

    pub(crate) fn record_gpu_verified(&mut self, gpu: &GpuId) -> Answer {
        let now = self.settings.now;
        match self.gpus.get(gpu) {
            Some(gpu) if gpu.verified_at.is_none() => {}
            _ => return Ok(Reply::Unchanged),
        }
        self.gpus.get_mut(gpu).expect("seen just now").verified_at = Some(now);
        Ok(Reply::Done)
    }

    pub(crate) fn record_chute(&mut self, definition: ChuteDefinition, code: ChuteCode) -> Answer {
        if !self.settings.validators.contains(&definition.key.validator) {
            return Err(Rejection::UnknownValidator(definition.key.validator));
        }
        let key = definition.key.clone();
        let version = VersionKey {
            chute: key.clone(),
            version: definition.version.clone(),
        };
        let same_code = self.codes.get(&version) == Some(&code);
        if !same_code {
            self.codes.insert(version, code);
        }
        let Some(chute) = self.chutes.get(&key) else {
            let recorded_at = self.settings.now;
            let chute = Chute {
                definition,
                recorded_at,
                ban_reason: None,
                cooldown: None,
                failures: BTreeMap::new(),
                missing_since: None,
            };
            self.chutes.insert(key, chute);
            return Ok(Reply::Done);
        };
        if chute.definition == definition && same_code && chute.missing_since.is_none() {
            return Ok(Reply::Unchanged);
        }
        let old_version = chute.definition.version.clone();
        let chute = self.chutes.get_mut(&key).expect("seen just now");
        if old_version != definition.version || chute.definition.image != definition.image {
            chute.failures.clear();
            chute.cooldown = None;
        }
        chute.missing_since = None;
        chute.definition = definition;
        self.forget_unused_version(&key, &old_version);
        Ok(Reply::Done)
    }

    pub(crate) fn forget_unused_version(&mut self, chute: &ChuteKey, version: &ChuteVersion) {
        if !self.version_is_used(chute, version) {
            self.codes.remove(&VersionKey {
                chute: chute.clone(),
                version: version.clone(),
            });
        }
    }

    /// Jobs of a deleted chute run on: they end by themselves or are withdrawn.
    pub(crate) fn record_chute_deleted(&mut self, key: &ChuteKey) -> Answer {
        let Some(chute) = self.chutes.remove(key) else {
            return Ok(Reply::Unchanged);
        };
        self.bounties.remove(key);
        let running: Vec<DeploymentId> = self
            .deployments_of(key)
            .filter(|d| d.job.is_none())
            .map(|d| d.id.clone())
            .collect();
        let mut stopping = Vec::new();
        for id in running {
            if self.stop(&id, StopReason::ChuteDeleted) {
                stopping.push(id);
            }
        }
        self.forget_unused_version(key, &chute.definition.version);
        Ok(Reply::Stopping(stopping))
    }

    pub(crate) fn record_image(
        &mut self,
        key: &ChuteKey,
        image: String,
        chutes_version: Option<String>,
    ) -> Answer {
        let Some(chute) = self.chutes.get_mut(key) else {
            return Ok(Reply::Unchanged);
        };
        chute.definition.image = image;
        if chutes_version.is_some() {
            chute.definition.chutes_version = chutes_version;
        }
        chute.failures.clear();
        chute.cooldown = None;
        Ok(Reply::Done)
    }

    pub(crate) fn record_bounty(&mut self, chute: ChuteKey, amount: u64) -> Answer {
        if !self.chutes.contains_key(&chute) {
            return Err(Rejection::Unknown {
                kind: "chute".to_owned(),
                name: chute.chute.to_string(),
            });
        }
        let now = self.settings.now;
        let seen_at = self.bounties.get(&chute).map_or(now, |bounty| bounty.seen_at);
        self.bounties.insert(
            chute,
            Bounty {
                amount,
                seen_at,
                expires_at: now + BOUNTY_MEMORY_MS,
            },
        );
        Ok(Reply::Done)
    }

    pub(crate) fn record_job_offer(&mut self, id: JobId, offer: Job) -> Answer {
        match self.jobs.get_mut(&id) {
            // A job that was tried or withdrawn stays so, however often it is offered.
            Some(job) => {
                job.offered_at = offer.offered_at;
                job.closed |= offer.closed;
            }
            None => self.jobs.insert(id, offer),
        }
        Ok(Reply::Done)
    }

    pub(crate) fn record_job_deleted(&mut self, id: &JobId) -> Answer {
        let Some(job) = self.jobs.get_mut(id) else {
            return Ok(Reply::Unchanged);
        };
        job.closed = true;
        let attempt = job.attempt.clone();
        let stopped = attempt.filter(|attempt| self.stop(attempt, StopReason::JobDeleted));
        Ok(stopped.map_or(Reply::Done, |id| Reply::Stopping(vec![id])))
    }
}

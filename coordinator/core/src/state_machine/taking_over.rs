//! How servers with what runs on them are taken over from another miner, and the state in which that is possible: an
//! observing cluster does nothing at its validators and places nothing, so that another miner may act meanwhile.
//!
//! ```text
//! founded observing --> AdoptServer, once for each server --> SetObserving { false }: it acts
//! ```
//! What is taken over was started by somebody else. It is never started here: its host has it or it has ended.

use std::collections::BTreeSet;

use protocol::id::{ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::time::UnixMillis;

use super::adoption::{AdoptedDeployment, Adoption};
use super::chute::uses_launch_config;
use super::command::{Answer, Rejection, Reply};
use super::deployment::{Deployment, Facts, Flow, Phase};
use super::desired::DISK_GB_DEFAULT;
use super::effect::{EffectKind, Subject};
use super::job::Job;
use super::server::{ENROLMENT_TIMEOUT_MS, Enrolment, EnrolmentPhase, Gpu, Server};
use super::state::State;

/// What taking a server over would change here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// One line each, for people.
    pub changes: Vec<String>,
    /// Why it is not possible, one line each.
    pub problems: Vec<String>,
}

impl State {
    /// Since when the cluster only watches; none while it acts.
    #[must_use]
    pub fn observing_since(&self) -> Option<UnixMillis> {
        self.observing.get(&0).copied()
    }

    /// True while the cluster does nothing at its validators and places nothing.
    #[must_use]
    pub fn is_observing(&self) -> bool {
        self.observing_since().is_some()
    }

    pub(crate) fn set_observing(&mut self, observing: bool) -> Answer {
        if observing == self.is_observing() {
            return Ok(Reply::Unchanged);
        }
        let ids: Vec<DeploymentId> = self.deployments.keys().cloned().collect();
        if observing {
            self.observing.insert(0, self.settings.now);
            for id in ids {
                if self.deployments.get(&id).is_some_and(|it| !it.phase.is_live()) {
                    // Nobody is told any more; what is left to tell is told when it acts again.
                    self.withdraw(&Subject::Deployment(id.clone()));
                    self.try_finish(&id);
                }
            }
            return Ok(Reply::Done);
        }
        let since = self.observing.remove(&0).unwrap_or_default();
        self.forget_what_was_missing();
        for id in ids {
            self.act_again_on(&id);
        }
        self.give_back_jobs_that_ended_since(since);
        Ok(Reply::Done)
    }

    /// Gives back the jobs of deployments that are gone since then: nobody was told while the cluster observed, and the
    /// other miner may have been stopped before it saw the end. Giving back one that it has given back changes nothing.
    /// An instance that is still listed is deleted by the listings, and not before this is done: its subject is taken.
    fn give_back_jobs_that_ended_since(&mut self, since: UnixMillis) {
        let ended: Vec<_> = self
            .audits
            .values()
            .filter(|audit| audit.gone_at >= since)
            .filter_map(|audit| {
                let gone = &audit.deployment;
                let job = gone.job_to_give_back(&gone.stop.as_ref()?.reason)?;
                Some((gone.chute.validator.clone(), job.clone(), gone.instance.clone()?))
            })
            .collect();
        for (validator, job, instance) in ended {
            let subject = Subject::Instance(instance);
            self.withdraw(&subject);
            self.push_effect(subject, validator, EffectKind::ReleaseJob { job });
        }
    }

    /// Takes back what waits for a validator about a subject.
    pub(crate) fn withdraw(&mut self, subject: &Subject) {
        let waiting: Vec<_> = self.outbox.of_subject(subject).map(|effect| effect.id).collect();
        for effect in waiting {
            self.outbox.remove(effect);
        }
    }

    /// Nobody waited for a verification meanwhile, and no chute was seen to be missing.
    fn forget_what_was_missing(&mut self) {
        let now = self.settings.now;
        let servers: Vec<ServerId> = self.servers.keys().cloned().collect();
        for id in servers {
            let enrolment = self.servers.get(&id).and_then(|server| server.enrolment.as_ref());
            if enrolment.is_some_and(Enrolment::waits_for_verification)
                && let Some(server) = self.servers.get_mut(&id)
                && let Some(enrolment) = &mut server.enrolment
            {
                enrolment.deadline = now + ENROLMENT_TIMEOUT_MS;
            }
        }
        let chutes = self
            .chutes
            .iter()
            .filter(|(_, chute)| chute.missing_since.is_some());
        let chutes: Vec<_> = chutes.map(|(key, _)| key.clone()).collect();
        for key in chutes {
            if let Some(chute) = self.chutes.get_mut(&key) {
                chute.missing_since = None;
            }
        }
    }

    /// Goes on with a deployment as if it had come so far now.
    fn act_again_on(&mut self, id: &DeploymentId) {
        let now = self.settings.now;
        let Some(deployment) = self.deployments.get_mut(id) else {
            return;
        };
        deployment.missing_since = None;
        if deployment.phase != Phase::Serving {
            deployment.progressed(now);
        }
        let (phase, flow, facts) = (deployment.phase, deployment.flow, deployment.facts.clone());
        let has_token = deployment.sealed_token.is_some();
        let subject = Subject::Deployment(id.clone());
        if self.outbox.of_subject(&subject).next().is_some() {
            return;
        }
        if !phase.is_live() {
            self.tell_of_the_end(id);
        } else if phase == Phase::Requested {
            if has_token || flow == Flow::Legacy {
                self.claim_room(id);
            }
        } else if facts.active_at.is_none() {
            self.go_on_with_legacy(id, facts.running_at.is_some(), facts.ready_at.is_some());
        }
    }

    /// What taking a server over would change, and what is in the way.
    #[must_use]
    pub fn difference(&self, adoption: &Adoption) -> Difference {
        let mut found = Difference::default();
        let Some(server) = self.servers.get(&adoption.server) else {
            let problem = format!("server {} is not known", adoption.server);
            found.problems.push(problem);
            return found;
        };
        self.compare_terms(server, adoption, &mut found);
        self.compare_gpus(server, adoption, &mut found);
        let mut names = Names::default();
        for deployment in &adoption.deployments {
            self.compare_deployment(adoption, deployment, &mut names, &mut found);
        }
        found
    }

    fn compare_terms(&self, server: &Server, adoption: &Adoption, found: &mut Difference) {
        let validator = &adoption.validator;
        if !self.settings.validators.contains(validator) {
            let problem = format!("validator {validator} is not configured");
            found.problems.push(problem);
        }
        match &server.enrolment {
            None => {
                let seed = adoption.seed.map_or("no seed", |_| "a seed");
                found.changes.push(format!(
                    "works for {validator} as {}, at {} $ per GPU and hour, with {seed}",
                    adoption.gpu_short_ref,
                    dollars(adoption.hourly_cost_usd_micros),
                ));
            }
            Some(enrolment) if enrolment.validator != *validator => found.problems.push(format!(
                "it works for {} here, and for {validator} there",
                enrolment.validator
            )),
            Some(enrolment) if enrolment.phase != EnrolmentPhase::Ready => found
                .problems
                .push(format!("its enrolment here is not over: {:?}", enrolment.phase)),
            Some(enrolment) => {
                if enrolment.hourly_cost_usd_micros != cost_of(adoption) {
                    let cost = dollars(cost_of(adoption));
                    found.changes.push(format!("{cost} $ per GPU and hour"));
                }
                if enrolment.seed != adoption.seed {
                    found.changes.push("another seed".to_owned());
                }
            }
        }
        if adoption.locked != server.locked {
            let word = if adoption.locked { "locked" } else { "unlocked" };
            found.changes.push(word.to_owned());
        }
    }

    fn compare_gpus(&self, server: &Server, adoption: &Adoption, found: &mut Difference) {
        let mut seen = BTreeSet::new();
        for (gpu, verified) in &adoption.gpus {
            if !seen.insert(gpu) {
                found.problems.push(format!("GPU {gpu} is named twice"));
            }
            match self.gpus.get(gpu) {
                Some(known) if known.server != adoption.server => {
                    found
                        .problems
                        .push(format!("GPU {gpu} belongs to server {}", known.server));
                }
                Some(known) if *verified && known.verified_at.is_none() => {
                    found.changes.push(format!("GPU {gpu} is verified"));
                }
                Some(_) => {}
                None if !server.facts.devices.iter().any(|device| device.uuid == *gpu) => {
                    found.problems.push(format!("its agent does not see GPU {gpu}"));
                }
                None => {
                    let word = if *verified { "verified" } else { "not verified" };
                    found.changes.push(format!("GPU {gpu}, {word}"));
                }
            }
        }
        if adoption.gpus.is_empty() {
            found.problems.push("it has no GPUs there".to_owned());
        }
    }

    fn compare_deployment(
        &self,
        adoption: &Adoption,
        deployment: &AdoptedDeployment,
        names: &mut Names,
        found: &mut Difference,
    ) {
        let id = &deployment.id;
        if let Some(known) = self.deployments.get(id) {
            if known.server != adoption.server {
                let problem = format!("deployment {id} is on server {}", known.server);
                found.problems.push(problem);
            } else if !known.phase.is_live() {
                found
                    .problems
                    .push(format!("deployment {id} is being stopped here"));
            } else {
                if known.instance.is_none() {
                    self.compare_instance(deployment, names, found);
                }
                let news = deployment.news_for(known).into_iter();
                let news: Vec<&str> = news.filter_map(|(word, is_new)| is_new.then_some(word)).collect();
                if !news.is_empty() {
                    found
                        .changes
                        .push(format!("deployment {id}: {}", news.join(", ")));
                }
            }
            return;
        }
        let mut problem = |why: String| found.problems.push(format!("deployment {id}: {why}"));
        let validator = &deployment.chute.key.validator;
        if *validator != adoption.validator {
            problem(format!("its chute is of another validator, {validator}"));
        }
        if deployment.gpus.is_empty() {
            problem("it has no GPUs".to_owned());
        }
        for gpu in &deployment.gpus {
            let row = self.gpus.get(gpu);
            let holder = row.and_then(|gpu| gpu.holder.as_ref().or(gpu.promised_to.as_ref()));
            if let Some(holder) = holder {
                problem(format!("its GPU {gpu} is held by {holder}"));
            } else if !adoption.gpus.iter().any(|(listed, _)| listed == gpu) {
                problem(format!("its GPU {gpu} is not of this server"));
            } else if !names.gpus.insert(gpu.clone()) {
                problem(format!("its GPU {gpu} is given to two deployments"));
            }
        }
        if !names.deployments.insert(id.clone()) {
            problem("it is named twice".to_owned());
        }
        if let Some(config) = &deployment.config
            && (self.deployment_of_config(config).is_some_and(|other| other != id)
                || !names.configs.insert(config.clone()))
        {
            problem(format!("its launch config {config} is another's"));
        }
        if let Some(job) = &deployment.job {
            let attempt = self.jobs.get(job).and_then(|job| job.attempt.as_ref());
            let tried = attempt.is_some_and(|other| other != id);
            if tried || !names.jobs.insert(job.clone()) {
                problem(format!("its job {job} was tried by another"));
            }
        }
        self.compare_instance(deployment, names, found);
        let state = match (deployment.facts.verified_at, deployment.facts.active_at) {
            (Some(_), Some(_)) => "verified and active",
            (Some(_), None) => "verified",
            (None, _) => "not verified yet",
        };
        found.changes.push(format!(
            "deployment {id} of chute {} on {} GPUs, {state}",
            deployment.chute.name,
            deployment.gpus.len()
        ));
    }

    fn compare_instance(&self, deployment: &AdoptedDeployment, names: &mut Names, found: &mut Difference) {
        let Some(instance) = &deployment.instance else {
            return;
        };
        let other = self.deployment_of(None, instance);
        let is_another = other.is_some_and(|other| *other != deployment.id);
        if is_another || !names.instances.insert(instance.clone()) {
            found.problems.push(format!(
                "deployment {}: its instance {instance} is another's",
                deployment.id
            ));
        }
    }

    pub(crate) fn adopt_server(&mut self, adoption: Adoption) -> Answer {
        self.known_server(&adoption.server)?;
        if !self.is_observing() {
            return Err(Rejection::NotObserving);
        }
        let difference = self.difference(&adoption);
        if !difference.problems.is_empty() {
            return Err(Rejection::Adoption(difference.problems));
        }
        if difference.changes.is_empty() {
            return Ok(Reply::Unchanged);
        }
        let now = self.settings.now;
        let id = &adoption.server;
        let server = self.servers.get_mut(id).expect("seen just now");
        server.locked = adoption.locked;
        let devices = server.facts.devices.clone();
        let cost = cost_of(&adoption);
        if let Some(enrolment) = &mut server.enrolment {
            enrolment.hourly_cost_usd_micros = cost;
            enrolment.seed = adoption.seed;
        } else {
            server.last_failure = None;
            server.enrolment = Some(Enrolment {
                validator: adoption.validator.clone(),
                gpu_short_ref: adoption.gpu_short_ref.clone(),
                hourly_cost_usd_micros: cost,
                seed: adoption.seed,
                phase: EnrolmentPhase::Ready,
                added_at: now,
                deadline: now,
            });
        }
        for (gpu, verified) in &adoption.gpus {
            if !self.gpus.contains_key(gpu) {
                let device = devices.iter().find(|device| device.uuid == *gpu);
                self.insert_gpu(Gpu {
                    device: device.expect("compared just now").clone(),
                    server: id.clone(),
                    short_ref: adoption.gpu_short_ref.clone(),
                    verified_at: None,
                    holder: None,
                    promised_to: None,
                });
            }
            let gpu = self.gpus.get_mut(gpu).expect("it is there now");
            if *verified {
                gpu.verified_at.get_or_insert(now);
            }
        }
        let (known, news): (Vec<_>, Vec<_>) = adoption
            .deployments
            .into_iter()
            .partition(|deployment| self.deployments.contains_key(&deployment.id));
        for deployment in known {
            self.learn_of(&deployment);
        }
        if news.is_empty() {
            return Ok(Reply::Done);
        }
        let revision = self.bump_revision(&adoption.server);
        for deployment in news {
            self.adopt_deployment(&adoption.server, revision, deployment)?;
        }
        Ok(Reply::Done)
    }

    /// An instance is ours after all: it is no stranger, and must not be deleted as one.
    fn account_for(&mut self, instance: &InstanceId) {
        self.strangers.remove(instance);
        self.withdraw(&Subject::Instance(instance.clone()));
    }

    /// Takes in what the other miner has learnt since a deployment was taken over.
    fn learn_of(&mut self, adopted: &AdoptedDeployment) {
        let (id, now) = (&adopted.id, self.settings.now);
        if let Some(instance) = &adopted.instance
            && self
                .deployments
                .get(id)
                .is_some_and(|known| known.instance.is_none())
        {
            self.account_for(instance);
            self.claim_instance(id, instance.clone());
        }
        if let Some(known) = self.deployments.get_mut(id) {
            let past = |at: Option<UnixMillis>| at.map(|at| at.min(now));
            known.facts.verified_at = known.facts.verified_at.or(past(adopted.facts.verified_at));
            known.facts.active_at = known.facts.active_at.or(past(adopted.facts.active_at));
        }
        self.conclude_serving(id);
    }

    /// Writes down what was compared already.
    fn adopt_deployment(
        &mut self,
        server: &ServerId,
        revision: Option<u64>,
        adopted: AdoptedDeployment,
    ) -> Result<(), Rejection> {
        let now = self.settings.now;
        // It ended here once, after it was handed back say, and runs there.
        self.remove_audit(&adopted.id);
        let key = adopted.chute.key.clone();
        if !self.chutes.contains_key(&key) {
            self.record_chute(adopted.chute.clone(), adopted.code.clone())?;
        }
        let past = |at: Option<UnixMillis>| at.map(|at| at.min(now));
        let facts = Facts {
            // It was launched: whoever finds nothing of it must not start it.
            running_at: past(adopted.facts.running_at).or(Some(now)),
            ready_at: past(adopted.facts.ready_at),
            claimed_at: past(adopted.facts.claimed_at),
            verified_at: past(adopted.facts.verified_at),
            active_at: past(adopted.facts.active_at),
        };
        let flow = if uses_launch_config(adopted.chutes_version.as_deref()) {
            Flow::LaunchConfig
        } else {
            Flow::Legacy
        };
        if let Some(job) = &adopted.job {
            let offer = Job {
                chute: key.clone(),
                gpu_count: u32::try_from(adopted.gpus.len()).unwrap_or(u32::MAX),
                disk_gb: DISK_GB_DEFAULT,
                attempt: None,
                closed: false,
                offered_at: now,
            };
            self.record_job_offer(job.clone(), offer)?;
            self.jobs.get_mut(job).expect("recorded just now").attempt = Some(adopted.id.clone());
        }
        for gpu in &adopted.gpus {
            self.gpus.get_mut(gpu).expect("compared").holder = Some(adopted.id.clone());
        }
        let mut deployment = Deployment {
            id: adopted.id,
            chute: key,
            version: adopted.version,
            image: adopted.image,
            chutes_version: adopted.chutes_version,
            server: server.clone(),
            gpus: adopted.gpus,
            job: adopted.job,
            preemptible: adopted.preemptible,
            flow,
            phase: Phase::Launched,
            phase_since: now,
            deadline: now,
            reason: "taken over from another miner".to_owned(),
            victims: Vec::new(),
            config: adopted.config,
            sealed_token: None,
            instance: adopted.instance,
            facts,
            ports: adopted.ports,
            bytes_pulled: 0,
            assigned_at_revision: revision,
            missing_since: None,
            superseded_by: None,
            stop: None,
            created_at: past(adopted.created_at).unwrap_or(now),
        };
        deployment.progressed(now);
        if let Some(instance) = &deployment.instance {
            self.account_for(instance);
        }
        let (id, version) = (deployment.id.clone(), deployment.version_key());
        self.insert_deployment(deployment);
        if !self.codes.contains_key(&version) {
            self.codes.insert(version, adopted.code);
        }
        self.conclude_serving(&id);
        Ok(())
    }
}

/// What is named within one adoption.
#[derive(Debug, Default)]
struct Names {
    deployments: BTreeSet<DeploymentId>,
    gpus: BTreeSet<GpuId>,
    configs: BTreeSet<ConfigId>,
    instances: BTreeSet<InstanceId>,
    jobs: BTreeSet<JobId>,
}

/// As with a server that an operator adds: a price of zero would make every value infinite.
fn cost_of(adoption: &Adoption) -> u64 {
    adoption.hourly_cost_usd_micros.max(1)
}

/// An amount as people write it.
fn dollars(micros: u64) -> String {
    let text = format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

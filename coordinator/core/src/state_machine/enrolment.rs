//! How a server comes to work for a validator, and how it leaves.

use protocol::hotkey::Hotkey;
use protocol::id::{GpuId, ServerId};
use protocol::report::HostFacts;

use super::command::{Answer, Rejection, Reply};
use super::deployment::StopReason;
use super::effect::{Effect, EffectKind, EffectOutcome, Subject};
use super::server::{ENROLMENT_TIMEOUT_MS, Enrolment, EnrolmentPhase, Gpu, Server};
use super::state::State;

impl Enrolment {
    /// True until the validator has decided.
    #[must_use]
    pub fn waits_for_verification(&self) -> bool {
        matches!(
            self.phase,
            EnrolmentPhase::Advertising | EnrolmentPhase::Verifying { .. }
        )
    }
}

impl State {
    pub(crate) fn record_host(&mut self, facts: HostFacts) -> Answer {
        let id = facts.server.clone();
        if self
            .present_servers_named(&facts.name)
            .any(|other| *other.id() != id)
        {
            return Err(Rejection::NameTaken(facts.name));
        }
        let now = self.settings.now;
        let Some(server) = self.servers.get(&id) else {
            self.insert_server(Server::new(facts, now));
            return Ok(Reply::Done);
        };
        if server.facts == facts && server.reachable {
            return Ok(Reply::Unchanged);
        }
        let differ = server.facts != facts;
        self.servers.get_mut(&id).expect("seen just now").reachable = true;
        if differ {
            self.set_facts(facts);
        }
        Ok(Reply::Done)
    }

    pub(crate) fn record_host_condition(
        &mut self,
        id: &ServerId,
        reachable: bool,
        quarantine: Option<String>,
    ) -> Answer {
        let server = self.known_server(id)?;
        if server.reachable == reachable && server.quarantine == quarantine {
            return Ok(Reply::Unchanged);
        }
        let server = self.servers.get_mut(id).expect("seen just now");
        server.reachable = reachable;
        server.quarantine = quarantine;
        Ok(Reply::Done)
    }

    pub(crate) fn known_server(&self, id: &ServerId) -> Result<&Server, Rejection> {
        let unknown = || Rejection::Unknown {
            kind: "server".to_owned(),
            name: id.to_string(),
        };
        self.servers.get(id).ok_or_else(unknown)
    }

    pub(crate) fn enrol_server(
        &mut self,
        id: &ServerId,
        validator: Hotkey,
        gpu_short_ref: String,
        hourly_cost_usd_micros: u64,
    ) -> Answer {
        let server = self.known_server(id)?;
        let name = server.facts.name.clone();
        if server.enrolment.is_some() {
            return Err(Rejection::AlreadyEnrolled(name));
        }
        if !self.settings.validators.contains(&validator) {
            return Err(Rejection::UnknownValidator(validator));
        }
        if server.facts.devices.is_empty() {
            return Err(Rejection::NoGpus(name));
        }
        if let Some(device) = server
            .facts
            .devices
            .iter()
            .find(|device| self.gpus.contains_key(&device.uuid))
        {
            return Err(Rejection::GpuElsewhere(device.uuid.clone()));
        }
        let now = self.settings.now;
        for device in server.facts.devices.clone() {
            self.insert_gpu(Gpu {
                device,
                server: id.clone(),
                short_ref: gpu_short_ref.clone(),
                verified_at: None,
                holder: None,
                promised_to: None,
            });
        }
        let server = self.servers.get_mut(id).expect("seen just now");
        server.last_failure = None;
        server.enrolment = Some(Enrolment {
            validator: validator.clone(),
            gpu_short_ref,
            // A price of zero would make every value infinite.
            hourly_cost_usd_micros: hourly_cost_usd_micros.max(1),
            seed: None,
            phase: EnrolmentPhase::Advertising,
            added_at: now,
            deadline: now + ENROLMENT_TIMEOUT_MS,
        });
        let kind = EffectKind::AdvertiseGpus { server: id.clone() };
        self.push_effect(Subject::Server(id.clone()), validator, kind);
        Ok(Reply::Done)
    }

    pub(crate) fn lock_server(&mut self, id: &ServerId, locked: bool) -> Answer {
        if self.known_server(id)?.locked == locked {
            return Ok(Reply::Unchanged);
        }
        self.servers.get_mut(id).expect("seen just now").locked = locked;
        Ok(Reply::Done)
    }

    pub(crate) fn remove_server(&mut self, id: &ServerId, jobs: bool) -> Answer {
        let enrolment = self.known_server(id)?.enrolment.as_ref();
        if enrolment.is_none_or(|enrolment| matches!(enrolment.phase, EnrolmentPhase::Leaving { .. })) {
            return Ok(Reply::Unchanged);
        }
        let job = self
            .deployments_on(id)
            .find(|d| d.job.is_some() && d.phase.is_live());
        if let Some(deployment) = job.filter(|_| !jobs) {
            let why = "it runs a job; allow jobs to be stopped".to_owned();
            return Err(Rejection::Protected {
                deployment: deployment.id.clone(),
                why,
            });
        }
        self.leave(id, "removed by the operator".to_owned());
        Ok(Reply::Done)
    }

    /// Starts the end of an enrolment: stops what runs, then tells the validator.
    fn leave(&mut self, id: &ServerId, reason: String) {
        let Some(server) = self.servers.get_mut(id) else {
            return;
        };
        let Some(enrolment) = &mut server.enrolment else {
            return;
        };
        enrolment.phase = EnrolmentPhase::Leaving { reason };
        let running: Vec<_> = self.deployments_on(id).map(|d| d.id.clone()).collect();
        for deployment in running {
            self.stop(&deployment, StopReason::ServerLeaving);
        }
        self.try_leave(id);
    }

    /// Goes on with a leaving server: instances go before their GPUs, GPUs before the enrolment.
    pub(crate) fn try_leave(&mut self, id: &ServerId) {
        let Some(enrolment) = self.servers.get(id).and_then(|server| server.enrolment.as_ref()) else {
            return;
        };
        let EnrolmentPhase::Leaving { .. } = enrolment.phase else {
            return;
        };
        if self.deployments_on(id).next().is_some() {
            return;
        }
        let validator = enrolment.validator.clone();
        let gpus: Vec<GpuId> = self.gpus_of(id).map(|gpu| gpu.id().clone()).collect();
        for gpu in gpus {
            self.remove_gpu(&gpu);
            let kind = EffectKind::DeleteGpu { gpu };
            self.push_effect(Subject::Server(id.clone()), validator.clone(), kind);
        }
        if self
            .outbox
            .of_subject(&Subject::Server(id.clone()))
            .next()
            .is_none()
            && let Some(server) = self.servers.get_mut(id)
        {
            server.enrolment = None;
        }
    }

    fn fail_enrolment(&mut self, id: &ServerId, reason: String) {
        if let Some(server) = self.servers.get_mut(id) {
            server.last_failure = Some(reason.clone());
        }
        self.leave(id, reason);
    }

    /// Takes the outcome of an effect about a server in. The effect is out of the outbox already.
    pub(crate) fn finish_server_effect(&mut self, id: &ServerId, effect: &Effect, outcome: EffectOutcome) {
        let now = self.settings.now;
        let enrolment = self.servers.get(id).and_then(|server| server.enrolment.as_ref());
        let waits = enrolment.is_some_and(Enrolment::waits_for_verification);
        match outcome {
            EffectOutcome::Advertised { task, seed } if waits => {
                let server = self.servers.get_mut(id).expect("waits");
                let enrolment = server.enrolment.as_mut().expect("waits");
                enrolment.seed = Some(seed);
                enrolment.phase = EnrolmentPhase::Verifying { task: task.clone() };
                let until = enrolment.deadline;
                let kind = EffectKind::AwaitVerification {
                    server: id.clone(),
                    task,
                    until,
                };
                self.push_effect(Subject::Server(id.clone()), effect.validator.clone(), kind);
            }
            EffectOutcome::Verified if waits => {
                let server = self.servers.get_mut(id).expect("waits");
                server.enrolment.as_mut().expect("waits").phase = EnrolmentPhase::Ready;
                let gpus: Vec<GpuId> = self.gpus_of(id).map(|gpu| gpu.id().clone()).collect();
                for gpu in gpus {
                    let gpu = self.gpus.get_mut(&gpu).expect("listed just now");
                    gpu.verified_at.get_or_insert(now);
                }
            }
            EffectOutcome::VerificationFailed { detail } if waits => {
                self.fail_enrolment(id, format!("the validator did not accept the GPUs: {detail}"));
            }
            EffectOutcome::Refused { status, detail } if waits => {
                self.fail_enrolment(id, format!("the validator refused the GPUs: {status}: {detail}"));
            }
            _ => {}
        }
        self.try_leave(id);
    }

    /// Enrolments whose validator did not decide in time.
    pub(crate) fn pass_enrolment_deadlines(&mut self) -> bool {
        let now = self.settings.now;
        let late = |server: &&Server| {
            let enrolment = server.enrolment.as_ref();
            enrolment.is_some_and(|e| e.waits_for_verification() && e.deadline <= now)
        };
        let due: Vec<ServerId> = self
            .servers
            .values()
            .filter(late)
            .map(|s| s.id().clone())
            .collect();
        for id in &due {
            self.fail_enrolment(id, "the validator did not verify the GPUs in time".to_owned());
        }
        !due.is_empty()
    }
}

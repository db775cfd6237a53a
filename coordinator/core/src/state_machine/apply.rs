//! The transition function: one match over [`Command`].

use protocol::time::UnixMillis;

use super::command::{
    Allowance, Answer, Command, GUARD_MEMORY_MS, Proposal, REQUEST_MEMORY_MS, Rejection, Reply,
};
use super::deployment::{AUDIT_MEMORY_MS, AUDIT_ROWS_MAX, StopReason};
use super::effect::{EffectId, EffectOutcome, Subject};
use super::job::{JOB_MEMORY_MS, Job};
use super::state::State;

/// Applies one proposal. A repeated request gets its first answer and changes nothing.
pub fn apply(state: &mut State, proposal: Proposal) -> Answer {
    let Proposal {
        request,
        at,
        guard,
        command,
    } = proposal;
    state.pass_to(at);
    if let Some(answer) = state.answer_to(request) {
        return answer;
    }
    let answer = match guard {
        Some(guard) if state.guards.contains_key(&guard) => Err(Rejection::Replayed),
        _ => {
            if let Some(guard) = guard.filter(|_| !state.faults.replay_guard_lost) {
                let now = state.settings.now;
                state.guards.insert(guard, now);
            }
            state.apply_command(command)
        }
    };
    state.remember_answer(request, answer.clone());
    answer
}

impl State {
    fn pass_to(&mut self, at: UnixMillis) {
        if at > self.settings.now {
            self.settings_mut().now = at;
        }
    }

    /// Applies a command to a copy that is thrown away: nobody repeats it, so no answer is remembered.
    pub(crate) fn rehearse(&mut self, at: UnixMillis, command: Command) -> Answer {
        self.pass_to(at);
        self.apply_command(command)
    }

    fn apply_command(&mut self, command: Command) -> Answer {
        match command {
            Command::Configure {
                miner,
                validators,
                pay_profile,
            } => {
                let oldest = self.outbox.iter().next().map(|effect| effect.id);
                if self.faults.outbox_entry_lost_at_leader_change
                    && let Some(oldest) = oldest
                {
                    self.outbox.remove(oldest);
                }
                let settings = &self.settings;
                if let Some(other) = settings.miner.as_ref().filter(|other| **other != miner) {
                    return Err(Rejection::OtherMiner(other.clone()));
                }
                if settings.miner.as_ref() == Some(&miner)
                    && settings.validators == validators
                    && settings.pay_profile == pay_profile
                {
                    return Ok(Reply::Unchanged);
                }
                let settings = self.settings_mut();
                settings.miner = Some(miner);
                settings.validators = validators;
                settings.pay_profile = pay_profile;
                if settings.incarnation == 0 {
                    // The time of founding: a cluster that begins anew after a loss outranks what its hosts
                    // remember of the lost one.
                    settings.incarnation = settings.now.unix_seconds().max(1);
                }
                Ok(Reply::Done)
            }

            Command::RecordHost { facts } => self.record_host(facts),
            Command::RecordHostCondition {
                server,
                reachable,
                quarantine,
            } => self.record_host_condition(&server, reachable, quarantine),
            Command::RecordWorkloads { server, report } => self.record_workloads(&server, &report),

            Command::EnrolServer {
                server,
                validator,
                gpu_short_ref,
                hourly_cost_usd_micros,
            } => self.enrol_server(&server, validator, gpu_short_ref, hourly_cost_usd_micros),
            Command::LockServer { server, locked } => self.lock_server(&server, locked),
            Command::RemoveServer { server, jobs } => self.remove_server(&server, jobs),
            Command::StopDeployments {
                deployments,
                reason,
                allowance,
            } => self.stop_deployments(&deployments, &reason, allowance),
            Command::BanChute { chute, reason } => {
                let unknown = || Rejection::Unknown {
                    kind: "chute".to_owned(),
                    name: chute.chute.to_string(),
                };
                self.chutes.get_mut(&chute).ok_or_else(unknown)?.ban_reason = reason;
                Ok(Reply::Done)
            }

            Command::RecordChute { definition, code } => self.record_chute(definition, code),
            Command::RecordChuteDeleted { chute } => self.record_chute_deleted(&chute),
            Command::RecordImage {
                chute,
                image,
                chutes_version,
            } => self.record_image(&chute, image, chutes_version),
            Command::RecordBounty { chute, amount } => self.record_bounty(chute, amount),
            Command::RecordBountyOver { chute } => Ok(self
                .bounties
                .remove(&chute)
                .map_or(Reply::Unchanged, |_| Reply::Done)),
            Command::RecordJobOffer {
                job,
                chute,
                gpu_count,
                disk_gb,
                excluded,
            } => {
                let offered_at = self.settings.now;
                let offer = Job {
                    chute,
                    gpu_count,
                    disk_gb,
                    attempt: None,
                    closed: excluded,
                    offered_at,
                };
                self.record_job_offer(job, offer)
            }
            Command::RecordJobDeleted { job } => self.record_job_deleted(&job),
            Command::RecordGpuVerified { gpu } => self.record_gpu_verified(&gpu),
            Command::RecordInstanceCreated {
                validator,
                chute,
                config,
                instance,
            } => self.record_instance_created(validator, chute, config, instance),
            Command::RecordInstanceVerified { instance } => self.record_instance_verified(&instance),
            Command::RecordInstanceActivated { config, instance } => {
                self.record_instance_activated(config.as_ref(), &instance)
            }
            Command::RecordInstanceDeleted {
                config,
                instance,
                cause,
            } => self.record_instance_deleted(config.as_ref(), &instance, cause),
            Command::RecordRollingUpdate { instance, version } => {
                self.record_rolling_update(&instance, version)
            }
            Command::Observe(observation) => self.observe(observation),

            Command::PlaceDeployment(placement) => self.place(placement),
            Command::FinishEffect { effect, outcome } => self.finish_effect(effect, outcome),
            Command::PassTime => self.pass_time(),

            Command::FoundCluster {
                authority_pem,
                sealed_key,
                founder,
            } => self.found_cluster(authority_pem, sealed_key, founder),
            Command::InviteHost { id, invite } => self.invite_host(id, invite),
            Command::JoinHost {
                id,
                secret_hash,
                host,
            } => self.join_host(id, &secret_hash, host),
            Command::RemoveHost { server } => self.remove_host(&server),
            Command::PinHost { server, pin } => self.pin_host(&server, pin),
            Command::RejoinHost { server } => self.rejoin_host(&server),
            Command::FinalizeFormat {
                format,
                program,
                vouched,
            } => self.finalize_format(format, program, &vouched),
            Command::Recover { member } => Ok(self.recover(member)),
            Command::RotateAuthority { rotation } => self.rotate_authority(rotation),
            Command::RecordAuthorities { server, trusted } => self.record_authorities(server, trusted),
            Command::FinishRotation { new } => self.finish_rotation(&new),
            Command::SetObserving { observing } => self.set_observing(observing),
            Command::AdoptServer(adoption) => self.adopt_server(adoption),
            Command::RecordAddress { server, address } => self.record_address(&server, address),
            Command::ReplaceHotkey { old, new, sealed_key } => self.replace_hotkey(&old, new, sealed_key),
            Command::AddWorker {
                facts,
                sealed_kubeconfig,
            } => self.add_worker(facts, sealed_kubeconfig),
            Command::RemoveWorker { server } => self.remove_worker(&server),
        }
    }

    fn stop_deployments(
        &mut self,
        deployments: &[protocol::id::DeploymentId],
        reason: &StopReason,
        allowance: Allowance,
    ) -> Answer {
        for id in deployments {
            let unknown = || Rejection::Unknown {
                kind: "deployment".to_owned(),
                name: id.to_string(),
            };
            let deployment = self.deployments.get(id).ok_or_else(unknown)?;
            if deployment.phase.is_live()
                && let Some(why) = self.protection_of(deployment, allowance)
            {
                return Err(Rejection::Protected {
                    deployment: id.clone(),
                    why,
                });
            }
        }
        let mut stopping = Vec::new();
        for id in deployments {
            if allowance.budgeted && self.deployments.get(id).is_some_and(|d| d.phase.is_live()) {
                match self.spend_budget() {
                    Ok(()) => {}
                    Err(rejection) if stopping.is_empty() => return Err(rejection),
                    Err(_) => break,
                }
            }
            if self.stop(id, reason.clone()) {
                stopping.push(id.clone());
            }
        }
        Ok(Reply::Stopping(stopping))
    }

    fn finish_effect(&mut self, id: EffectId, outcome: EffectOutcome) -> Answer {
        // A late or repeated result changes nothing.
        let Some(effect) = self.outbox.get(id).cloned() else {
            return Ok(Reply::Unchanged);
        };
        if !self.outbox.is_ready(&effect) && !self.faults.effects_out_of_order {
            return Err(Rejection::OutOfOrder(id));
        }
        if !self.faults.effect_done_twice {
            self.outbox.remove(id);
        }
        match &effect.subject {
            Subject::Deployment(deployment) => {
                self.finish_deployment_effect(&deployment.clone(), &effect, outcome);
            }
            Subject::Server(server) => self.finish_server_effect(&server.clone(), &effect, outcome),
            Subject::Instance(instance) => {
                self.strangers.remove(instance);
            }
        }
        Ok(Reply::Done)
    }

    fn pass_time(&mut self) -> Answer {
        // What is not acted on cannot be late.
        let acts = !self.is_observing();
        let deployments = acts && self.pass_deadlines();
        let enrolments = acts && self.pass_enrolment_deadlines();
        let forgotten = self.forget_the_old();
        Ok(if deployments || enrolments || forgotten {
            Reply::Done
        } else {
            Reply::Unchanged
        })
    }

    fn forget_the_old(&mut self) -> bool {
        let now = self.settings.now;
        let guards: Vec<[u8; 32]> = self
            .guards
            .iter()
            .filter(|(_, at)| now.since(**at) >= GUARD_MEMORY_MS)
            .map(|(guard, _)| *guard)
            .collect();
        let bounties: Vec<_> = self
            .bounties
            .iter()
            .filter(|(_, bounty)| bounty.expires_at <= now)
            .map(|(chute, _)| chute.clone())
            .collect();
        let jobs: Vec<_> = self
            .jobs
            .iter()
            .filter(|(_, job)| {
                let runs = job
                    .attempt
                    .as_ref()
                    .is_some_and(|id| self.deployments.contains_key(id));
                !runs && now.since(job.offered_at) >= JOB_MEMORY_MS
            })
            .map(|(job, _)| job.clone())
            .collect();
        let mut audits: Vec<_> = self
            .audits
            .iter()
            .map(|(id, audit)| (audit.gone_at, id.clone()))
            .collect();
        audits.sort_unstable();
        let surplus = audits.len().saturating_sub(AUDIT_ROWS_MAX);
        let audits: Vec<_> = audits
            .into_iter()
            .enumerate()
            .filter(|(place, (gone_at, _))| *place < surplus || now.since(*gone_at) >= AUDIT_MEMORY_MS)
            .map(|(_, (_, id))| id)
            .collect();
        let invites = self.old_invites(now);
        let count = guards.len() + bounties.len() + jobs.len() + audits.len() + invites.len();
        for invite in invites {
            self.invites.remove(&invite);
        }
        for guard in guards {
            self.guards.remove(&guard);
        }
        for chute in bounties {
            self.bounties.remove(&chute);
        }
        for job in jobs {
            self.jobs.remove(&job);
        }
        for audit in audits {
            self.remove_audit(&audit);
        }
        let mut any = count > 0;
        while self.forget_answer(REQUEST_MEMORY_MS) {
            any = true;
        }
        any
    }
}

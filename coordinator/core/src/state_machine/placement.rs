//! The one rulebook of placement: may this chute use these GPUs, may this deployment be stopped for it.

use std::collections::BTreeSet;

use protocol::id::{DeploymentId, ServerId};
use protocol::time::UnixMillis;

use super::chute::Chute;
use super::command::{Allowance, PayProfile, Placement, Rejection};
use super::deployment::{Deployment, Phase};
use super::desired::DISK_GB_DEFAULT;
use super::server::Server;
use super::state::State;

impl PayProfile {
    /// When a deployment's pay is safe, and stopping it costs only the future; none while it earns nothing.
    #[must_use]
    pub fn vests_at(self, deployment: &Deployment) -> Option<UnixMillis> {
        const MINUTE: u64 = 60_000;
        match self {
            Self::Of2025September => deployment.facts.verified_at.map(|at| at + 60 * MINUTE),
            Self::Of2026 => deployment.facts.active_at.map(|at| at + 63 * MINUTE),
        }
    }
}

impl State {
    /// Why a deployment must not be stopped for another's sake; none if it may.
    #[must_use]
    pub fn protection_of(&self, deployment: &Deployment, allowance: Allowance) -> Option<String> {
        if !deployment.phase.is_live() {
            return Some("it is being stopped already".to_owned());
        }
        if deployment.job.is_some() && !allowance.jobs {
            return Some("it runs a job".to_owned());
        }
        if allowance.loss || deployment.job.is_some() {
            return None;
        }
        if !deployment.preemptible {
            return Some("it is a private chute".to_owned());
        }
        if deployment.phase != Phase::Serving {
            return Some("it is still starting".to_owned());
        }
        match self.settings.pay_profile.vests_at(deployment) {
            Some(vests_at) if vests_at <= self.settings.now => None,
            Some(vests_at) => {
                let minutes = vests_at.since(self.settings.now).div_ceil(60_000);
                Some(format!("its pay vests in {minutes} min"))
            }
            None => Some("its pay has not begun to vest".to_owned()),
        }
    }

    /// Why a server takes no new work; none if it does.
    #[must_use]
    pub fn unavailable(&self, server: &Server) -> Option<String> {
        let why = if server.ready_enrolment().is_none() {
            "it is not enrolled"
        } else if server.locked {
            "it is locked"
        } else if !server.reachable {
            "it is unreachable"
        } else if let Some(reason) = &server.quarantine {
            return Some(format!("it is quarantined: {reason}"));
        } else if !server.strangers.is_empty() {
            "it runs workloads that are not ours to account for yet"
        } else if server.reported.is_none() {
            "it has not reported yet"
        } else {
            return None;
        };
        Some(why.to_owned())
    }

    /// Why a chute must not be placed at all; none if it may.
    #[must_use]
    pub fn unplaceable(&self, chute: &Chute, for_job: bool) -> Option<String> {
        if let Some(reason) = &chute.ban_reason {
            return Some(format!("the chute is banned: {reason}"));
        }
        if chute.missing_since.is_some() {
            return Some("the validator did not list the chute".to_owned());
        }
        if chute.definition.tee && self.workers.is_empty() {
            return Some("the chute needs a sealed worker, and there is none".to_owned());
        }
        if for_job {
            return None;
        }
        if !chute.definition.serves_requests {
            return Some("the chute only runs jobs".to_owned());
        }
        let cooldown = chute
            .cooldown
            .as_ref()
            .filter(|cooldown| cooldown.until > self.settings.now)?;
        Some(format!(
            "the chute cools down until {} after {}",
            cooldown.until, cooldown.reason
        ))
    }

    /// Why a chute does not run on this kind of server; none if it does.
    #[must_use]
    pub fn other_kind(&self, chute: &Chute, server: &ServerId) -> Option<&'static str> {
        match (chute.definition.tee, self.workers.contains_key(server)) {
            (true, false) => Some("the chute needs a sealed worker"),
            (false, true) => Some("a sealed worker runs chutes that need one only"),
            (true, true) | (false, false) => None,
        }
    }

    /// Why a chute is kept off a GPU type; none if it is not.
    #[must_use]
    pub fn kept_off(&self, chute: &Chute, short_ref: &str) -> Option<String> {
        let failures = chute
            .failures
            .get(short_ref)
            .filter(|failures| failures.until > self.settings.now)?;
        Some(format!(
            "{} launches in a row failed on {short_ref}; next at {}",
            failures.count, failures.until
        ))
    }

    /// Disk that a placement needs, in GB.
    #[must_use]
    pub fn disk_gb_needed(&self, placement: &Placement) -> u32 {
        let job = placement.job.as_ref().and_then(|job| self.jobs.get(job));
        job.map_or(DISK_GB_DEFAULT, |job| job.disk_gb)
    }

    /// Checks a placement against every rule. Nothing a strategy proposes gets around this.
    pub(crate) fn admit(&self, placement: &Placement) -> Result<(), Rejection> {
        let refuse = |why: String| Err(Rejection::Placement(why));
        let id = &placement.deployment;
        if self.deployments.contains_key(id) || self.audits.contains_key(id) {
            return refuse(format!("deployment {id} exists already"));
        }
        let Some(chute) = self.chutes.get(&placement.chute) else {
            return refuse(format!("chute {} is not known", placement.chute.chute));
        };
        let Some(server) = self.servers.get(&placement.server) else {
            return refuse(format!("server {} is not known", placement.server));
        };
        if chute.definition.version != placement.version {
            return refuse(format!("version {} is not current", placement.version));
        }
        let replaces = |victim: &DeploymentId| {
            self.deployments.get(victim).is_some_and(|victim| {
                victim.chute == placement.chute
                    && victim.superseded_by.as_ref() == Some(&placement.version)
                    && victim.job.is_none()
            })
        };
        let is_replacement = !placement.victims.is_empty() && placement.victims.iter().all(replaces);
        if let Some(why) = self.unplaceable(chute, placement.job.is_some()) {
            return refuse(why);
        }
        self.admit_job(placement)?;
        // The validator asked for a replacement, so a lock does not stop it (it would lose the copy).
        if let Some(why) = self
            .unavailable(server)
            .filter(|_| !(is_replacement && server.locked))
        {
            return refuse(format!("server {}: {why}", server.facts.name));
        }
        if server
            .ready_enrolment()
            .is_none_or(|e| e.validator != placement.chute.validator)
        {
            return refuse(format!(
                "server {} works for another validator",
                server.facts.name
            ));
        }
        if let Some(why) = self.other_kind(chute, &placement.server) {
            return refuse(format!("server {}: {why}", server.facts.name));
        }
        let needed = self.disk_gb_needed(placement);
        if server.facts.disk_free_gb < needed {
            let free = server.facts.disk_free_gb;
            return refuse(format!(
                "server {} has {free} GB of disk, {needed} GB are needed",
                server.facts.name
            ));
        }
        for victim in &placement.victims {
            let deployment = self
                .deployments
                .get(victim)
                .filter(|d| d.server == placement.server);
            let Some(deployment) = deployment else {
                return refuse(format!("victim {victim} is not on the server"));
            };
            if replaces(victim) && deployment.phase.is_live() {
                continue;
            }
            if let Some(why) = self.protection_of(deployment, Allowance::default()) {
                return Err(Rejection::Protected {
                    deployment: victim.clone(),
                    why,
                });
            }
        }
        self.admit_gpus(placement, chute, server)
    }

    fn admit_job(&self, placement: &Placement) -> Result<(), Rejection> {
        let Some(job) = &placement.job else { return Ok(()) };
        match self.jobs.get(job) {
            Some(known) if known.is_open() && known.chute == placement.chute => Ok(()),
            Some(_) => Err(Rejection::Placement(format!("job {job} is not open to us"))),
            None => Err(Rejection::Placement(format!("job {job} is not known"))),
        }
    }

    fn admit_gpus(&self, placement: &Placement, chute: &Chute, server: &Server) -> Result<(), Rejection> {
        let refuse = |why: String| Err(Rejection::Placement(why));
        let wanted: BTreeSet<_> = placement.gpus.iter().collect();
        let needed = usize::try_from(chute.definition.gpu_count).unwrap_or(usize::MAX);
        if wanted.len() != placement.gpus.len() || wanted.len() != needed {
            return refuse(format!(
                "{} different GPUs are needed, {} were named",
                needed,
                wanted.len()
            ));
        }
        let mut useful_victims = BTreeSet::new();
        for id in &placement.gpus {
            let Some(gpu) = self.gpus.get(id).filter(|gpu| gpu.server == placement.server) else {
                return refuse(format!("GPU {id} is not on server {}", server.facts.name));
            };
            if gpu.verified_at.is_none() {
                return refuse(format!("GPU {id} is not verified"));
            }
            if !server.facts.devices.iter().any(|device| device.uuid == *id) {
                return refuse(format!("GPU {id} is not reported by its host at present"));
            }
            if !chute.definition.supported_gpus.contains(&gpu.short_ref) {
                return refuse(format!("the chute does not run on {}", gpu.short_ref));
            }
            if let Some(why) = self.kept_off(chute, &gpu.short_ref) {
                return refuse(why);
            }
            if self.faults.double_allocation {
                continue;
            }
            if let Some(other) = &gpu.promised_to {
                return refuse(format!("GPU {id} is promised to {other}"));
            }
            match &gpu.holder {
                None => {}
                Some(holder) if placement.victims.contains(holder) => {
                    useful_victims.insert(holder);
                }
                Some(holder) => return refuse(format!("GPU {id} is held by {holder}")),
            }
        }
        match placement
            .victims
            .iter()
            .find(|victim| !useful_victims.contains(victim))
        {
            Some(victim) if !self.faults.double_allocation => {
                refuse(format!("victim {victim} holds none of the GPUs"))
            }
            _ => Ok(()),
        }
    }
}

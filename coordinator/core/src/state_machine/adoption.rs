//! How servers with what runs on them are taken over from another miner, and the state in which that is possible: an
//! observing cluster does nothing at its validators and places nothing, so that another miner may act meanwhile.
//!
//! ```text
//! founded observing --> AdoptServer, once for each server --> SetObserving { false }: it acts
//! ```
//! What is taken over was started by somebody else. It is never started here: its host has it or it has ended.

use std::collections::BTreeSet;

use protocol::hotkey::Hotkey;
use protocol::id::{ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::time::UnixMillis;
use protocol::workload::PortMapping;
use serde::{Deserialize, Serialize};

use super::chute::{ChuteCode, ChuteDefinition, uses_launch_config};
use super::command::{Answer, Rejection, Reply};
use super::deployment::{Deployment, Facts, Flow, Phase};
use super::desired::DISK_GB_DEFAULT;
use super::job::Job;
use super::server::{Enrolment, EnrolmentPhase, Gpu, Server};
use super::state::State;

/// A server as the other miner's record has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adoption {
    /// Which of ours it is.
    pub server: ServerId,
    /// For whom it works.
    pub validator: Hotkey,
    /// GPU type in the validator's words.
    pub gpu_short_ref: String,
    /// Cost of one GPU for an hour, in millionths of a dollar.
    pub hourly_cost_usd_micros: u64,
    /// Seed that the validator gave with the verification.
    pub seed: Option<u64>,
    /// It gets no new work.
    pub locked: bool,
    /// Its GPUs, and whether the validator has accepted them.
    pub gpus: Vec<(GpuId, bool)>,
    /// What runs on it.
    pub deployments: Vec<AdoptedDeployment>,
}

/// A deployment as the other miner's record and the cluster have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedDeployment {
    /// Its name, which stays.
    pub id: DeploymentId,
    /// Its chute, as the other miner knows it.
    pub chute: ChuteDefinition,
    /// Code of that version.
    pub code: ChuteCode,
    /// The version that runs.
    pub version: ChuteVersion,
    /// The image that runs, without registry.
    pub image: String,
    /// Version of the chutes library in it.
    pub chutes_version: Option<String>,
    /// Its GPUs.
    pub gpus: Vec<GpuId>,
    /// Its job, if it is for one.
    pub job: Option<JobId>,
    /// Its launch config.
    pub config: Option<ConfigId>,
    /// The validator's record.
    pub instance: Option<InstanceId>,
    /// May be stopped for another.
    pub preemptible: bool,
    /// What is known of it; what is in the future counts as now.
    pub facts: Facts,
    /// Where its ports are reached.
    pub ports: Vec<PortMapping>,
    /// When it was placed.
    pub created_at: Option<UnixMillis>,
}

/// What taking a server over would change here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// One line each, for people.
    pub changes: Vec<String>,
    /// Why it is not possible, one line each.
    pub problems: Vec<String>,
}

impl AdoptedDeployment {
    /// What is known of it there and not here.
    fn news_for(&self, known: &Deployment) -> [(&'static str, bool); 3] {
        let is_new = |there: Option<UnixMillis>, here: Option<UnixMillis>| there.is_some() && here.is_none();
        let (there, here) = (&self.facts, &known.facts);
        [
            ("claimed", self.instance.is_some() && known.instance.is_none()),
            ("verified", is_new(there.verified_at, here.verified_at)),
            ("active", is_new(there.active_at, here.active_at)),
        ]
    }
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
        let now = self.settings.now;
        if observing {
            self.observing.insert(0, now);
            return Ok(Reply::Done);
        }
        self.observing.remove(&0);
        let waiting: Vec<DeploymentId> = self
            .deployments
            .values()
            .filter(|deployment| deployment.phase != Phase::Serving)
            .map(|deployment| deployment.id.clone())
            .collect();
        for id in waiting {
            let deployment = self.deployments.get_mut(&id).expect("listed just now");
            // Nobody waited for anything meanwhile.
            deployment.progressed(now);
            let (phase, facts) = (deployment.phase, deployment.facts.clone());
            if phase == Phase::Requested {
                if deployment.sealed_token.is_some() || deployment.flow == Flow::Legacy {
                    self.claim_room(&id);
                }
            } else if phase.is_live() && facts.active_at.is_none() {
                self.go_on_with_legacy(&id, facts.running_at.is_some(), facts.ready_at.is_some());
            }
        }
        Ok(Reply::Done)
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
        if let Some(instance) = &deployment.instance
            && (self
                .deployment_of(None, instance)
                .is_some_and(|other| other != id)
                || !names.instances.insert(instance.clone()))
        {
            problem(format!("its instance {instance} is another's"));
        }
        if let Some(job) = &deployment.job {
            let attempt = self.jobs.get(job).and_then(|job| job.attempt.as_ref());
            let tried = attempt.is_some_and(|other| other != id);
            if tried || !names.jobs.insert(job.clone()) {
                problem(format!("its job {job} was tried by another"));
            }
        }
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

    /// Takes in what the other miner has learnt since a deployment was taken over.
    fn learn_of(&mut self, adopted: &AdoptedDeployment) {
        let (id, now) = (&adopted.id, self.settings.now);
        if let Some(instance) = &adopted.instance
            && self
                .deployments
                .get(id)
                .is_some_and(|known| known.instance.is_none())
        {
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
            running_at: past(adopted.facts.running_at),
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
        let phase = match facts.running_at {
            Some(_) => Phase::Launched,
            None => Phase::Assigned,
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
            phase,
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
            self.strangers.remove(instance);
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use protocol::gpu::DeviceInfo;
    use protocol::hotkey::Signer;
    use protocol::id::ChuteId;
    use protocol::report::{HostFacts, WorkloadReport, WorkloadStatus};
    use protocol::workload::WorkloadPhase;

    use super::*;
    use crate::state_machine::chute::ChuteKey;
    use crate::state_machine::codec::Row;
    use crate::state_machine::command::{Command, PayProfile, Placement};
    use crate::state_machine::state::Faults;
    use crate::state_machine::testing::{World, id};

    const NOW: u64 = 5_000_000;

    fn validator() -> Hotkey {
        Signer::from_seed(&[2; 32]).hotkey().clone()
    }

    fn gpu(number: u8) -> GpuId {
        GpuId::parse(&format!("{number:032x}")).expect("32 digits")
    }

    /// An observing cluster with one host of four GPUs.
    fn observing() -> World {
        let mut world = World::empty();
        for command in [
            Command::SetObserving { observing: true },
            Command::Configure {
                miner: Signer::from_seed(&[1; 32]).hotkey().clone(),
                validators: BTreeSet::from([validator()]),
                pay_profile: PayProfile::Of2026,
            },
            Command::RecordHost {
                facts: HostFacts {
                    server: id("server-1"),
                    name: "gpu-1".to_owned(),
                    address: "203.0.113.1".to_owned(),
                    proof_port: 1,
                    devices: (1..=4).map(device).collect(),
                    cpu_count: 32,
                    memory_gb: 256,
                    disk_free_gb: 500,
                    agent_version: "0.1.0".to_owned(),
                },
            },
        ] {
            assert_eq!(world.at(NOW, command), Ok(Reply::Done));
        }
        world
    }

    fn device(number: u8) -> DeviceInfo {
        DeviceInfo {
            uuid: gpu(number),
            name: "NVIDIA RTX A6000".to_owned(),
            memory: 48 << 30,
            processors: 84,
            clock_rate_khz: 1_800_000,
            max_threads_per_processor: 1536,
        }
    }

    fn deployment(name: &str, gpus: &[u8], facts: Facts) -> AdoptedDeployment {
        let version = ChuteVersion::parse("v1").expect("good");
        let key = ChuteKey {
            validator: validator(),
            chute: ChuteId::parse("chute-1").expect("good"),
        };
        AdoptedDeployment {
            id: DeploymentId::parse(name).expect("good"),
            chute: ChuteDefinition {
                key,
                // A newer one is published than the one that runs.
                version: ChuteVersion::parse("v2").expect("good"),
                name: "acme/model".to_owned(),
                image: "acme/model:2".to_owned(),
                chutes_version: Some("0.3.40".to_owned()),
                gpu_count: 1,
                supported_gpus: BTreeSet::from(["a6000".to_owned()]),
                preemptible: true,
                tee: false,
                serves_requests: true,
                job_ports: Vec::new(),
                effective_multiplier_milli: None,
            },
            code: ChuteCode {
                filename: "app.py".to_owned(),
                code: "print()".to_owned(),
                ref_str: "app:chute".to_owned(),
            },
            version,
            image: "acme/model:1".to_owned(),
            chutes_version: Some("0.3.40".to_owned()),
            gpus: gpus.iter().map(|number| gpu(*number)).collect(),
            job: None,
            config: Some(ConfigId::parse(&format!("config-of-{name}")).expect("good")),
            instance: Some(InstanceId::parse(&format!("instance-of-{name}")).expect("good")),
            preemptible: true,
            facts,
            ports: Vec::new(),
            created_at: Some(UnixMillis(1_000)),
        }
    }

    fn earning() -> Facts {
        let at = Some(UnixMillis(2_000));
        Facts {
            running_at: at,
            ready_at: at,
            claimed_at: at,
            verified_at: at,
            active_at: at,
        }
    }

    fn adoption(deployments: Vec<AdoptedDeployment>) -> Adoption {
        Adoption {
            server: id("server-1"),
            validator: validator(),
            gpu_short_ref: "a6000".to_owned(),
            hourly_cost_usd_micros: 1_250_000,
            seed: Some(u64::MAX),
            locked: true,
            gpus: (1..=3).map(|number| (gpu(number), number < 3)).collect(),
            deployments,
        }
    }

    #[test]
    fn a_server_is_taken_over_with_what_it_runs() {
        let mut world = observing();
        let waiting = Facts {
            claimed_at: Some(UnixMillis(2_000)),
            ..Facts::default()
        };
        let taken = adoption(vec![
            deployment("earns", &[1], earning()),
            deployment("starts", &[2, 3], waiting),
        ]);
        let difference = world.0.difference(&taken);
        assert_eq!(difference.problems, Vec::<String>::new());
        assert_eq!(difference.changes.len(), 7, "{difference:?}");
        assert!(difference.changes[0].contains("at 1.25 $"), "{difference:?}");
        assert_eq!(
            world.at(NOW, Command::AdoptServer(taken.clone())),
            Ok(Reply::Done)
        );

        let server = world.0.servers().get(&id("server-1")).expect("it has joined");
        let terms = server.ready_enrolment().expect("it needs no verification");
        assert_eq!(
            (terms.seed, terms.hourly_cost_usd_micros, server.locked),
            (Some(u64::MAX), 1_250_000, true)
        );
        let verified: Vec<bool> = world
            .0
            .gpus()
            .values()
            .map(|gpu| gpu.verified_at.is_some())
            .collect();
        assert_eq!(verified, [true, true, false], "the fourth is not there");
        let of = |name: &str| {
            let id = DeploymentId::parse(name).expect("good");
            world.0.deployments().get(&id).expect("taken over").clone()
        };
        assert_eq!(of("earns").phase, Phase::Serving);
        assert_eq!(of("earns").created_at, UnixMillis(1_000));
        assert_eq!(of("starts").phase, Phase::Assigned);
        assert_eq!(world.0.outbox().iter().count(), 0, "nobody is told anything");
        let desired = world.0.desired(&id("server-1")).expect("it has joined");
        assert_eq!(desired.workloads.len(), 2);
        for workload in desired.workloads {
            let spec = workload.spec;
            assert!(
                workload.sealed_token.is_none() && spec.legacy_seed.is_none(),
                "{spec:?}"
            );
        }

        assert_eq!(world.0.difference(&taken), Difference::default());
        assert_eq!(world.at(NOW, Command::AdoptServer(taken)), Ok(Reply::Unchanged));
    }

    #[test]
    fn what_ended_here_and_runs_there_is_taken_over_afresh() {
        let mut world = observing();
        let taken = adoption(vec![deployment("earns", &[1], earning())]);
        world
            .at(NOW, Command::AdoptServer(taken.clone()))
            .expect("a good one");
        let server = id("server-1");
        let report = |world: &World, workloads| Command::RecordWorkloads {
            server: server.clone(),
            report: WorkloadReport {
                fence: world.0.fence_of(&server).expect("it has joined"),
                workloads,
            },
        };
        let deployment = DeploymentId::parse("earns").expect("good");
        let ended = WorkloadStatus {
            deployment: deployment.clone(),
            phase: WorkloadPhase::Ended {
                exit_code: Some(1),
                reason: "exit code 1".to_owned(),
            },
        };
        let command = report(&world, vec![ended]);
        world.at(NOW, command).expect("it belongs to it");
        let gone = report(&world, Vec::new());
        world.at(NOW, gone).expect("it belongs to it");
        assert_eq!(
            world.0.outbox().iter().count(),
            0,
            "the other miner tells the validator"
        );
        assert!(world.0.audits().contains_key(&deployment));
        assert_eq!(world.at(NOW, Command::AdoptServer(taken)), Ok(Reply::Done));
        assert!(world.0.audits().get(&deployment).is_none());
        let again = world.0.deployments().get(&deployment).expect("it is back");
        assert_eq!(again.phase, Phase::Serving);
    }

    #[test]
    fn what_does_not_fit_is_named_and_nothing_is_changed() {
        let good = || deployment("one", &[1], earning());
        let mut foreign = adoption(vec![good()]);
        foreign.validator = Signer::from_seed(&[9; 32]).hotkey().clone();
        let mut blind = adoption(vec![]);
        blind.gpus.push((gpu(9), true));
        let mut twin = deployment("two", &[2], earning());
        twin.instance.clone_from(&good().instance);
        let mut same_config = deployment("two", &[2], earning());
        same_config.config.clone_from(&good().config);
        let mut none = adoption(vec![]);
        none.gpus.clear();
        for (taken, word) in [
            (foreign, "is not configured"),
            (blind, "does not see GPU 0000"),
            (none, "it has no GPUs there"),
            (
                adoption(vec![good(), twin]),
                "its instance instance-of-one is another's",
            ),
            (
                adoption(vec![good(), same_config]),
                "its launch config config-of-one is another's",
            ),
            (adoption(vec![good(), good()]), "it is named twice"),
            (
                adoption(vec![good(), deployment("two", &[1], earning())]),
                "is given to two deployments",
            ),
            (
                adoption(vec![deployment("two", &[4], earning())]),
                "is not of this server",
            ),
            (
                adoption(vec![deployment("two", &[], earning())]),
                "it has no GPUs",
            ),
        ] {
            let mut world = observing();
            world.0.drain_rows();
            let answer = world.at(NOW, Command::AdoptServer(taken));
            let Err(Rejection::Adoption(problems)) = answer else {
                panic!("{word}: {answer:?}");
            };
            assert!(
                problems.iter().any(|problem| problem.contains(word)),
                "{word}: {problems:?}"
            );
            let touched: BTreeSet<u8> = world.0.drain_rows().iter().map(|row| row.table).collect();
            assert_eq!(touched, BTreeSet::from([12]), "only the answer is remembered");
        }
    }

    #[test]
    fn what_changed_there_is_taken_in() {
        let mut world = observing();
        let mut taken = adoption(vec![deployment("starts", &[1], Facts::default())]);
        taken.deployments[0].instance = None;
        world
            .at(NOW, Command::AdoptServer(taken.clone()))
            .expect("a good one");
        taken.locked = false;
        taken.hourly_cost_usd_micros = 1_500_000;
        taken.seed = Some(7);
        taken.deployments = vec![deployment("starts", &[1], earning())];
        let changes = world.0.difference(&taken).changes;
        assert_eq!(
            changes,
            [
                "1.5 $ per GPU and hour",
                "another seed",
                "unlocked",
                "deployment starts: claimed, verified, active"
            ]
        );
        assert_eq!(
            world.at(NOW, Command::AdoptServer(taken.clone())),
            Ok(Reply::Done)
        );
        assert_eq!(world.0.difference(&taken), Difference::default());
        let server = world.0.servers().get(&id("server-1")).expect("it has joined");
        let terms = server.ready_enrolment().expect("ready");
        assert_eq!(
            (server.locked, terms.seed, terms.hourly_cost_usd_micros),
            (false, Some(7), 1_500_000)
        );
        let known = world.0.deployments().values().next().expect("it is there");
        assert_eq!(known.phase, Phase::Serving);
    }

    #[test]
    fn nothing_is_announced_or_placed_while_it_observes() {
        let mut world = observing();
        let facts = Facts {
            running_at: Some(UnixMillis(2_000)),
            ..Facts::default()
        };
        let mut legacy = deployment("legacy", &[1], facts);
        legacy.chutes_version = Some("0.2.9".to_owned());
        (legacy.config, legacy.instance) = (None, None);
        world
            .at(NOW, Command::AdoptServer(adoption(vec![legacy.clone()])))
            .expect("a good one");
        let server = id("server-1");
        let report = WorkloadReport {
            fence: world.0.fence_of(&server).expect("it has joined"),
            workloads: vec![WorkloadStatus {
                deployment: legacy.id.clone(),
                phase: WorkloadPhase::Running {
                    ports: vec![PortMapping {
                        internal: 8000,
                        external: 31_000,
                        protocol: protocol::workload::PortProtocol::Tcp,
                    }],
                    ready: true,
                },
            }],
        };
        let command = Command::RecordWorkloads {
            server: server.clone(),
            report,
        };
        world.at(NOW, command).expect("it belongs to it");
        assert_eq!(world.0.outbox().iter().count(), 0, "the other miner announces it");
        let placement = Placement {
            deployment: DeploymentId::parse("new").expect("good"),
            chute: legacy.chute.key.clone(),
            version: legacy.chute.version.clone(),
            server,
            gpus: vec![gpu(2)],
            victims: Vec::new(),
            job: None,
            reason: String::new(),
        };
        let refused = world.at(NOW, Command::PlaceDeployment(placement));
        assert_eq!(
            refused,
            Err(Rejection::Placement("the cluster observes".to_owned()))
        );
        let act = Command::SetObserving { observing: false };
        world.at(NOW, act).expect("it observes");
        assert_eq!(world.0.outbox().iter().count(), 1, "nobody else will");
    }

    #[test]
    fn a_cluster_that_acts_takes_nothing_over() {
        let mut world = observing();
        let act = Command::SetObserving { observing: false };
        world.at(NOW, act).expect("it observes");
        let taken = adoption(vec![deployment("one", &[1], earning())]);
        assert_eq!(
            world.at(NOW, Command::AdoptServer(taken)),
            Err(Rejection::NotObserving)
        );
    }

    #[test]
    fn nothing_is_late_while_nobody_acts() {
        let mut world = observing();
        let taken = adoption(vec![deployment("starts", &[1], Facts::default())]);
        world.at(NOW, Command::AdoptServer(taken)).expect("a good one");
        let day = 24 * 3_600_000;
        assert_eq!(world.0.next_deadline(), None);
        world.at(NOW + day, Command::PassTime).expect("always accepted");
        let phase = |world: &World| world.0.deployments().values().next().expect("it is there").phase;
        assert_eq!(phase(&world), Phase::Assigned);
        let act = Command::SetObserving { observing: false };
        world.at(NOW + day, act).expect("it observes");
        world.at(NOW + day, Command::PassTime).expect("always accepted");
        assert_eq!(
            phase(&world),
            Phase::Assigned,
            "it has the whole time from now on"
        );
        world
            .at(NOW + 2 * day, Command::PassTime)
            .expect("always accepted");
        assert_eq!(phase(&world), Phase::Stopping);
    }

    /// The row that says so must be read for ever.
    #[test]
    fn observing_has_golden_bytes() {
        let mut world = World::empty();
        let set = Command::SetObserving { observing: true };
        assert_eq!(world.at(3_000, set.clone()), Ok(Reply::Done));
        assert_eq!(world.at(4_000, set), Ok(Reply::Unchanged));
        let rows = world.0.drain_rows();
        let row = rows.iter().find(|row| row.table == 20).expect("it is stored");
        let Row { key, value, .. } = row;
        assert_eq!(
            (&key[..], value.as_deref()),
            (&[0, 0][..], Some(&[0, 0xb8, 0x17][..]))
        );
        let mut stored = rows.into_iter().map(|row| {
            let value = row.value.expect("nothing went");
            (row.table, row.key, value)
        });
        let read = State::from_rows(&mut stored, Faults::none()).expect("good rows");
        assert_eq!(read.observing_since(), Some(UnixMillis(3_000)));
    }
}

//! The world around the state machine: what happens next is drawn from a seed.

use std::collections::{BTreeMap, BTreeSet};

use coordinator_core::state_machine::chute::{ChuteCode, ChuteDefinition, ChuteKey};
use coordinator_core::state_machine::codec::{Row, decode_proposal, encode_proposal};
use coordinator_core::state_machine::command::{
    Allowance, Answer, Listing, PayProfile, Placement, RequestId,
};
use coordinator_core::state_machine::deployment::{Phase, StopReason};
use coordinator_core::state_machine::effect::{Effect, EffectKind, EffectOutcome, Subject};
use coordinator_core::state_machine::invariant::violations;
use coordinator_core::state_machine::state::Settings;
use coordinator_core::state_machine::{Command, Faults, Proposal, State, apply};
use protocol::hotkey::{Hotkey, Signer};
use protocol::id::{ChuteId, ChuteVersion, DeploymentId, GpuId, JobId, ServerId};
use protocol::time::UnixMillis;

use crate::checks::{Before, missing_is_true};
use crate::host::Host;
use crate::validator::Validator;

mod taking_over;

pub(crate) struct World {
    random: fastrand::Rng,
    faults: Faults,
    state: State,
    rows: BTreeMap<(u8, Vec<u8>), Vec<u8>>,
    log: Vec<Vec<u8>>,
    /// Effects are counted from here.
    first_effect: u64,
    now: UnixMillis,
    hosts: Vec<Host>,
    key: Hotkey,
    validator: Validator,
    /// Commands that happened outside and have not arrived yet, in any order.
    in_flight: Vec<Command>,
    next: u64,
}

type Step = Result<(), String>;

/// An empty state of a cluster that has done so many effects before.
fn beginning(faults: Faults, effects: u64) -> State {
    let settings = Settings {
        next_effect: effects,
        ..Settings::default()
    };
    const VERSION_1: u8 = 0;
    const SETTINGS: u8 = 1;
    let value = postcard::to_stdvec(&(VERSION_1, settings)).expect("plain data");
    State::from_rows(&mut std::iter::once((SETTINGS, vec![], value)), faults).expect("a good row")
}

impl World {
    pub(crate) fn new(seed: u64, faults: Faults) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let hosts = (1..=random.u8(1..=3))
            .map(|number| Host::new(number, random.u8(1..=4)))
            .collect();
        let key = Signer::from_seed(&[2; 32]).hotkey().clone();
        // Soon come numbers whose bytes sort otherwise than they do: 255 and 256, 383 and 384.
        let first_effect = 128 * random.u64(2..=3) - random.u64(..80);
        let mut world = Self {
            random,
            faults,
            first_effect,
            state: beginning(faults, first_effect),
            rows: BTreeMap::new(),
            log: vec![],
            now: UnixMillis(1_800_000_000_000),
            hosts,
            key: key.clone(),
            validator: Validator::default(),
            in_flight: vec![],
            next: 0,
        };
        let configure = Command::Configure {
            miner: Signer::from_seed(&[1; 32]).hotkey().clone(),
            validators: BTreeSet::from([key]),
            pay_profile: PayProfile::Of2026,
        };
        world
            .propose(configure)
            .expect("an empty state has no violations")
            .expect("always accepted");
        for index in 0..world.hosts.len() {
            world.join(index).expect("joining breaks nothing");
        }
        // Most of a life happens on a fleet that stands.
        if world.random.u8(..4) > 0 {
            world.set_up().expect("an orderly start breaks nothing");
        }
        world
    }

    fn set_up(&mut self) -> Step {
        for host in 0..self.hosts.len() {
            let (server, validator) = (self.hosts[host].facts.server.clone(), self.key.clone());
            let (gpu_short_ref, hourly_cost_usd_micros) = ("a6000".to_owned(), 300_000);
            self.send(Command::EnrolServer {
                server,
                validator,
                gpu_short_ref,
                hourly_cost_usd_micros,
            })?;
        }
        for _ in 0..6 {
            self.change_catalogue()?;
        }
        self.heal()?;
        for _ in 0..6 {
            self.place()?;
        }
        self.heal()
    }

    fn name(&mut self, prefix: &str) -> String {
        self.next += 1;
        format!("{prefix}-{}", self.next)
    }

    fn propose(&mut self, command: Command) -> Result<Answer, String> {
        self.next += 1;
        let request = RequestId(u128::from(self.next));
        let proposal = Proposal {
            request,
            at: self.now,
            guard: None,
            command,
        };
        let bytes = encode_proposal(&proposal);
        let before = Before::of(&self.state);
        let decoded = decode_proposal(&bytes).map_err(|error| error.to_string())?;
        if decoded != proposal {
            return Err("a proposal changed on its way through the log".to_owned());
        }
        let answer = apply(&mut self.state, decoded);
        self.log.push(bytes);
        for Row { table, key, value } in self.state.drain_rows() {
            match value {
                Some(value) => self.rows.insert((table, key), value),
                None => self.rows.remove(&(table, key)),
            };
        }
        let found = violations(&self.state);
        if !found.is_empty() {
            return Err(format!(
                "after {:?} -> {answer:?}: {}",
                proposal.command,
                found.join("; ")
            ));
        }
        before
            .check(&self.state)
            .map_err(|e| format!("after {:?}: {e}", proposal.command))?;
        missing_is_true(&before, &self.state, &self.validator)?;
        if self.random.u8(..) < 8 {
            let again = apply(&mut self.state, proposal.clone());
            if again != answer || !self.state.drain_rows().is_empty() {
                return Err(format!("repeating {:?} was answered {again:?}", proposal.command));
            }
        }
        Ok(answer)
    }

    fn send(&mut self, command: Command) -> Step {
        self.propose(command).map(|_| ())
    }

    fn join(&mut self, host: usize) -> Step {
        let facts = self.hosts[host].facts.clone();
        self.send(Command::RecordHost { facts })
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.random.usize(..from.len())].clone())
    }

    pub(crate) fn step(&mut self) -> Step {
        self.now = self.now + self.random.u64(1..5_000);
        match self.random.u32(..100) {
            0..=5 => self.change_catalogue(),
            6..=21 => self.place(),
            22..=43 => self.do_effect(false),
            44..=49 => self.sync_host(),
            50..=60 => self.converge_host(),
            61..=66 => self.report_host(),
            67..=77 => self.advance_container(),
            78..=85 => self.deliver(),
            86..=88 => self.operate(),
            89..=91 => self.observe(),
            92..=93 => self.offer_job(),
            94 => self.pass_time(),
            95 => self.delete_instance(),
            96 => self.restart(),
            97 => self.ask_for_replacement(),
            98 => self.preempt(),
            _ => self.pass_time(),
        }?;
        match self.hosts.iter().find_map(Host::shared_gpu) {
            Some(shared) => Err(shared),
            None => Ok(()),
        }
    }

    fn change_catalogue(&mut self) -> Step {
        let number = self.random.u8(..6);
        let chute = ChuteId::parse(&format!("chute-{number}")).unwrap();
        let key = ChuteKey {
            validator: self.key.clone(),
            chute: chute.clone(),
        };
        match self.random.u8(..10) {
            0 => {
                self.validator.chutes.remove(&chute);
                self.send(Command::RecordChuteDeleted { chute: key })
            }
            1 => self.send(Command::RecordBounty {
                chute: key,
                amount: 100,
            }),
            2 => self.send(Command::RecordBountyOver { chute: key }),
            _ => {
                let version = ChuteVersion::parse(&format!("v{}", self.random.u8(..3))).unwrap();
                self.validator.chutes.insert(chute, version.clone());
                let legacy = number == 5;
                let definition = ChuteDefinition {
                    key,
                    version,
                    name: "acme/model".to_owned(),
                    image: "acme/model:1".to_owned(),
                    chutes_version: Some(if legacy { "0.2.9" } else { "0.3.40" }.to_owned()),
                    gpu_count: u32::from(number % 3) + 1,
                    supported_gpus: BTreeSet::from(["a6000".to_owned()]),
                    preemptible: number != 4,
                    tee: false,
                    serves_requests: true,
                    job_ports: vec![],
                    effective_multiplier_milli: Some(1000),
                };
                let code = ChuteCode {
                    filename: "app.py".to_owned(),
                    code: "print()".to_owned(),
                    ref_str: "app:chute".to_owned(),
                };
                self.send(Command::RecordChute { definition, code })
            }
        }
    }

    fn place(&mut self) -> Step {
        let chutes: Vec<_> = self
            .state
            .chutes()
            .values()
            .map(|chute| chute.definition.clone())
            .collect();
        let servers: Vec<ServerId> = self.state.servers().keys().cloned().collect();
        let (Some(chute), Some(server)) = (self.pick(&chutes), self.pick(&servers)) else {
            return Ok(());
        };
        let mut gpus: Vec<GpuId> = self.state.gpus_of(&server).map(|gpu| gpu.id().clone()).collect();
        self.random.shuffle(&mut gpus);
        let sloppy = self.random.u8(..10) == 0;
        // Now and then somebody's GPUs are wanted although others are free.
        if !sloppy && self.random.u8(..4) > 0 {
            gpus.sort_by_key(|gpu| !self.state.gpus().get(gpu).is_some_and(|gpu| gpu.is_free()));
        }
        gpus.truncate(usize::try_from(chute.gpu_count).unwrap());
        let mut victims: Vec<DeploymentId> = gpus
            .iter()
            .filter_map(|gpu| self.state.gpus().get(gpu)?.holder.clone())
            .collect();
        victims.sort();
        victims.dedup();
        let open: Vec<JobId> = self
            .state
            .jobs()
            .iter()
            .filter(|(_, job)| job.chute == chute.key && (job.is_open() || sloppy))
            .map(|(id, _)| id.clone())
            .collect();
        let job = if self.random.bool() {
            self.pick(&open)
        } else {
            None
        };
        let deployment = DeploymentId::parse(&self.name("deployment")).unwrap();
        self.send(Command::PlaceDeployment(Placement {
            deployment,
            chute: chute.key,
            version: chute.version,
            server,
            gpus,
            victims,
            job,
            reason: "random".to_owned(),
        }))
    }

    /// Does an effect. Its result may be lost, late or repeated; a lost one means that it is done again.
    fn do_effect(&mut self, healing: bool) -> Step {
        let anything = self.faults.effects_out_of_order && !healing;
        let ready: Vec<Effect> = if anything {
            self.state.outbox().iter().cloned().collect()
        } else {
            self.state.outbox().ready().cloned().collect()
        };
        let Some(effect) = self.pick(&ready) else {
            return Ok(());
        };
        let gpus: Vec<GpuId> = match &effect.subject {
            Subject::Server(server) => self.state.gpus_of(server).map(|gpu| gpu.id().clone()).collect(),
            _ => vec![],
        };
        let refuse = !healing && self.random.u8(..10) == 0;
        let outcome = if self.state.effect_is_wanted(&effect) {
            self.validator.perform(&effect, refuse, &gpus)?
        } else {
            EffectOutcome::Refused {
                status: 410,
                detail: "not wanted any more".to_owned(),
            }
        };
        let finish = Command::FinishEffect {
            effect: effect.id,
            outcome,
        };
        match self.random.u8(..10) {
            _ if healing => self.send(finish),
            // Only what is safe to do twice may lose its result; a job's launch config is answered once, and
            // then the repetition is refused.
            0 if !matches!(effect.kind, EffectKind::AnnounceInstance { .. }) => Ok(()),
            1..=3 => {
                self.in_flight.push(finish);
                Ok(())
            }
            4 => {
                self.in_flight.push(finish.clone());
                self.send(finish)
            }
            _ => self.send(finish),
        }
    }

    fn any_host(&mut self) -> usize {
        self.random.usize(..self.hosts.len())
    }

    fn sync_host(&mut self) -> Step {
        let host = self.any_host();
        if let Some(set) = self.state.desired(&self.hosts[host].facts.server) {
            self.hosts[host].take(set);
        }
        Ok(())
    }

    fn converge_host(&mut self) -> Step {
        let host = self.any_host();
        self.hosts[host].converge_once(&mut self.random);
        Ok(())
    }

    fn report_host(&mut self) -> Step {
        let host = self.any_host();
        let server = self.hosts[host].facts.server.clone();
        let report = self.hosts[host].report();
        let command = Command::RecordWorkloads { server, report };
        // Reports of one host stay in order: they come over one stream. They may be lost.
        if self.random.u8(..10) == 0 {
            Ok(())
        } else {
            self.send(command)
        }
    }

    fn advance_container(&mut self) -> Step {
        let host = self.any_host();
        let running: Vec<DeploymentId> = self.hosts[host].running.keys().cloned().collect();
        let Some(id) = self.pick(&running) else {
            return Ok(());
        };
        let crash = self.random.u8(..20) == 0;
        let workload = self.hosts[host].running.get_mut(&id).unwrap();
        if crash {
            workload.ended = true;
        }
        if workload.ended {
            return Ok(());
        }
        workload.ready = true;
        if let Some(config) = workload.config.clone() {
            let events = self.advance_instance(&config);
            self.in_flight.extend(events);
        }
        Ok(())
    }

    fn advance_instance(&mut self, config: &protocol::id::ConfigId) -> Vec<Command> {
        let known = self
            .validator
            .instances
            .iter_mut()
            .find(|(_, row)| row.config.as_ref() == Some(config));
        match known {
            None => self.validator.claim(&self.key, config).into_iter().collect(),
            Some((id, row)) if !row.verified => {
                row.verified = true;
                vec![Command::RecordInstanceVerified { instance: id.clone() }]
            }
            Some((id, row)) if !row.active => {
                row.active = true;
                vec![Command::RecordInstanceActivated {
                    config: Some(config.clone()),
                    instance: id.clone(),
                }]
            }
            Some(_) => vec![],
        }
    }

    fn deliver(&mut self) -> Step {
        if self.in_flight.is_empty() {
            return Ok(());
        }
        let at = self.random.usize(..self.in_flight.len());
        let command = if self.random.u8(..8) == 0 {
            self.in_flight[at].clone()
        } else {
            self.in_flight.swap_remove(at)
        };
        let is_event = !matches!(command, Command::FinishEffect { .. });
        if is_event && self.random.u8(..8) == 0 {
            Ok(())
        } else {
            self.send(command)
        }
    }

    fn operate(&mut self) -> Step {
        let host = self.any_host();
        let server = self.hosts[host].facts.server.clone();
        match self.random.u8(..13) {
            12 => self.take_over(server),
            0 => self.send(Command::LockServer {
                server,
                locked: self.random.clone().bool(),
            }),
            1 => self.send(Command::RemoveServer {
                server,
                jobs: self.random.clone().bool(),
            }),
            2 => {
                let reachable = self.random.bool();
                self.send(Command::RecordHostCondition {
                    server,
                    reachable,
                    quarantine: None,
                })
            }
            3 => self.join(host),
            4..=6 => {
                let all: Vec<DeploymentId> = self.state.deployments().keys().cloned().collect();
                let Some(id) = self.pick(&all) else { return Ok(()) };
                let allowance = Allowance {
                    loss: true,
                    jobs: self.random.bool(),
                    budgeted: self.random.bool(),
                };
                let reason = StopReason::Operator("random".to_owned());
                self.send(Command::StopDeployments {
                    deployments: vec![id],
                    reason,
                    allowance,
                })
            }
            _ => {
                let (validator, hourly_cost_usd_micros) = (self.key.clone(), 300_000);
                let gpu_short_ref = "a6000".to_owned();
                self.send(Command::EnrolServer {
                    server,
                    validator,
                    gpu_short_ref,
                    hourly_cost_usd_micros,
                })
            }
        }
    }

    fn observe(&mut self) -> Step {
        let mut listing = self.validator.listing(&self.key, self.now);
        match self.random.u8(..6) {
            0 => listing.instances = Listing::Unknown,
            1 => listing.chutes = Listing::Unknown,
            2 => listing.chutes = Listing::Known(vec![]),
            _ => {}
        }
        self.now = self.now + self.random.u64(1..90_000);
        self.send(Command::Observe(listing.clone()))?;
        if self.random.bool() {
            return Ok(());
        }
        // The same again a while later: only a second sight counts.
        let mut again = self.validator.listing(&self.key, self.now + 60_000);
        if listing.instances == Listing::Unknown {
            again.instances = Listing::Unknown;
        }
        self.now = self.now + 61_000;
        self.send(Command::Observe(again))
    }

    fn offer_job(&mut self) -> Step {
        let chutes: Vec<ChuteKey> = self.state.chutes().keys().cloned().collect();
        let Some(chute) = self.pick(&chutes) else {
            return Ok(());
        };
        let tried: Vec<JobId> = self
            .state
            .jobs()
            .iter()
            .filter(|(_, job)| job.attempt.is_some())
            .map(|(id, _)| id.clone())
            .collect();
        if let (true, Some(job)) = (self.random.bool(), self.pick(&tried)) {
            return self.send(Command::RecordJobDeleted { job });
        }
        let job = JobId::parse(&format!("job-{}", self.random.u8(..40))).unwrap();
        self.send(Command::RecordJobOffer {
            job,
            chute,
            gpu_count: 1,
            disk_gb: 20,
            excluded: false,
        })
    }

    fn delete_instance(&mut self) -> Step {
        let all: Vec<_> = self.validator.instances.keys().cloned().collect();
        let Some(instance) = self.pick(&all) else {
            return Ok(());
        };
        let row = self.validator.instances.remove(&instance).unwrap();
        let cause = "deleted by the model".to_owned();
        self.in_flight.push(Command::RecordInstanceDeleted {
            config: row.config,
            instance,
            cause,
        });
        Ok(())
    }

    /// The validator asks for an instance to be replaced by the chute's current version.
    fn ask_for_replacement(&mut self) -> Step {
        let outdated = |d: &&coordinator_core::state_machine::deployment::Deployment| {
            let current = self
                .state
                .chutes()
                .get(&d.chute)
                .map(|chute| &chute.definition.version);
            d.instance.is_some() && current.is_some_and(|current| *current != d.version)
        };
        let wanted: Vec<_> = self
            .state
            .deployments()
            .values()
            .filter(outdated)
            .cloned()
            .collect();
        let Some(deployment) = self.pick(&wanted) else {
            return Ok(());
        };
        let version = self
            .state
            .chutes()
            .get(&deployment.chute)
            .unwrap()
            .definition
            .version
            .clone();
        let instance = deployment.instance.unwrap();
        self.send(Command::RecordRollingUpdate {
            instance,
            version: version.clone(),
        })?;
        self.next += 1;
        self.send(Command::PlaceDeployment(Placement {
            deployment: DeploymentId::parse(&format!("deployment-{}", self.next)).unwrap(),
            chute: deployment.chute,
            version,
            server: deployment.server,
            gpus: deployment.gpus,
            victims: vec![deployment.id],
            job: None,
            reason: "rolling update".to_owned(),
        }))
    }

    /// Wants the GPUs of a deployment that has served long enough for another chute of the same size.
    fn preempt(&mut self) -> Step {
        let serving: Vec<_> = self
            .state
            .deployments()
            .values()
            .filter(|d| d.phase == Phase::Serving)
            .cloned()
            .collect();
        let Some(victim) = self.pick(&serving) else {
            return Ok(());
        };
        self.now = self.now + 64 * 60_000;
        let others: Vec<_> = self
            .state
            .chutes()
            .values()
            .map(|chute| chute.definition.clone())
            .filter(|d| d.gpu_count as usize == victim.gpus.len() && d.key != victim.chute)
            .collect();
        let Some(other) = self.pick(&others) else {
            return Ok(());
        };
        let deployment = DeploymentId::parse(&self.name("deployment")).unwrap();
        self.send(Command::PlaceDeployment(Placement {
            deployment,
            chute: other.key,
            version: other.version,
            server: victim.server,
            gpus: victim.gpus,
            victims: vec![victim.id],
            job: None,
            reason: "worth more".to_owned(),
        }))
    }

    /// The state must be what its rows say, at any moment.
    fn restart(&mut self) -> Step {
        let mut rows = self
            .rows
            .iter()
            .map(|((table, key), value)| (*table, key.clone(), value.clone()));
        let restored = State::from_rows(&mut rows, self.faults).map_err(|error| error.to_string())?;
        if restored != self.state {
            return Err("the state read back from its rows is another one".to_owned());
        }
        self.state = restored;
        Ok(())
    }

    fn pass_time(&mut self) -> Step {
        self.now = self.now + self.random.u64(1..70 * 60_000);
        self.send(Command::PassTime)
    }

    /// Ends all faults and lets everything that can happen happen.
    pub(crate) fn heal(&mut self) -> Step {
        for round in 0..400 {
            for command in std::mem::take(&mut self.in_flight) {
                self.send(command)?;
            }
            while self.state.outbox().ready().next().is_some() {
                self.do_effect(true)?;
            }
            for host in 0..self.hosts.len() {
                let server = self.hosts[host].facts.server.clone();
                if let Some(set) = self.state.desired(&server) {
                    self.hosts[host].take(set);
                }
                while self.hosts[host].converge_once(&mut self.random) {}
                let report = self.hosts[host].report();
                self.send(Command::RecordWorkloads { server, report })?;
                let alive: Vec<_> = self.hosts[host]
                    .running
                    .values()
                    .filter(|w| !w.ended)
                    .filter_map(|w| w.config.clone())
                    .collect();
                for workload in self.hosts[host].running.values_mut() {
                    workload.ready = true;
                }
                for config in alive {
                    let events = self.advance_instance(&config);
                    self.in_flight.extend(events);
                }
            }
            self.now = self.now + 60_000;
            if round % 2 == 0 {
                let listing = self.validator.listing(&self.key, self.now);
                self.send(Command::Observe(listing))?;
            }
            self.send(Command::PassTime)?;
            if let Some(shared) = self.hosts.iter().find_map(Host::shared_gpu) {
                return Err(shared);
            }
            if round > 10 && self.is_healed() {
                return Ok(());
            }
        }
        let left: Vec<String> = self
            .state
            .deployments()
            .values()
            .filter(|d| d.phase != Phase::Serving)
            .map(|d| format!("{d:?}"))
            .collect();
        Err(format!(
            "not healed after 400 rounds: {left:?}, outbox {:?}, instances {:?}",
            self.state.outbox().iter().collect::<Vec<_>>(),
            self.validator.instances
        ))
    }

    fn is_healed(&self) -> bool {
        let serving = self
            .state
            .deployments()
            .values()
            .all(|d| d.phase == Phase::Serving);
        let instances: BTreeSet<_> = self.validator.instances.keys().collect();
        let recorded: BTreeSet<_> = self
            .state
            .deployments()
            .values()
            .filter_map(|d| d.instance.as_ref())
            .collect();
        let running: BTreeSet<_> = self.hosts.iter().flat_map(|host| host.running.keys()).collect();
        let known: BTreeSet<_> = self.state.deployments().keys().collect();
        serving
            && self.in_flight.is_empty()
            && self.state.outbox().is_empty()
            && instances == recorded
            && running == known
    }

    /// Why deployments came to an end here, without what was said.
    pub(crate) fn ends(&self) -> BTreeSet<String> {
        let reason = |text: String| text.split(['(', ' ']).next().unwrap_or_default().to_owned();
        let stops = self
            .state
            .audits()
            .values()
            .filter_map(|audit| audit.deployment.stop.as_ref());
        stops.map(|stop| reason(format!("{:?}", stop.reason))).collect()
    }

    /// The same log gives the same state, and the same rows.
    pub(crate) fn replay(&mut self) -> Step {
        let mut state = beginning(self.faults, self.first_effect);
        for bytes in &self.log {
            let _ = apply(
                &mut state,
                decode_proposal(bytes).map_err(|error| error.to_string())?,
            );
        }
        let _ = state.drain_rows();
        if state != self.state {
            return Err("replaying the log gives another state".to_owned());
        }
        self.restart()
    }
}

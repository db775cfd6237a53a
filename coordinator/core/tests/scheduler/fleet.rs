//! A fleet made of real commands, with hosts that do what they are told at once.

use std::collections::{BTreeMap, BTreeSet};

use coordinator_core::scheduler::command_for;
use coordinator_core::scheduler::market::{ChuteMarket, Market, Metrics, Utilization};
use coordinator_core::scheduler::strategy::{Decision, Launch, Scheduler, Trigger};
use coordinator_core::scheduler::view::View;
use coordinator_core::state_machine::chute::{ChuteCode, ChuteDefinition, ChuteKey};
use coordinator_core::state_machine::command::{Answer, PayProfile, Placement, RequestId};
use coordinator_core::state_machine::deployment::{Deployment, Phase};
use coordinator_core::state_machine::effect::{EffectKind, EffectOutcome};
use coordinator_core::state_machine::invariant::violations;
use coordinator_core::state_machine::{Command, Faults, Proposal, State, apply};
use protocol::gpu::DeviceInfo;
use protocol::hotkey::{Hotkey, Signer};
use protocol::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::report::{HostFacts, WorkloadReport, WorkloadStatus};
use protocol::time::UnixMillis;
use protocol::workload::{PRIMARY_PORT, PortMapping, PortProtocol, WorkloadPhase};

pub(crate) const MINUTE: u64 = 60_000;
pub(crate) const HOUR: u64 = 60 * MINUTE;

#[derive(Debug, Clone)]
pub(crate) struct Fleet {
    pub(crate) state: State,
    pub(crate) market: Market,
    pub(crate) now: UnixMillis,
    next: u128,
    devices: u64,
    /// Checks every invariant after every command; large fleets check at the end.
    pub(crate) checks: bool,
}

pub(crate) fn validator(number: u8) -> Hotkey {
    Hotkey::from_public_key(&[100 + number; 32])
}

pub(crate) fn server_id(name: &str) -> ServerId {
    ServerId::parse(name).unwrap()
}

pub(crate) fn version(name: &str) -> ChuteVersion {
    ChuteVersion::parse(name).unwrap()
}

pub(crate) fn key(name: &str) -> ChuteKey {
    ChuteKey {
        validator: validator(1),
        chute: ChuteId::parse(name).unwrap(),
    }
}

pub(crate) fn job(name: &str) -> JobId {
    JobId::parse(name).unwrap()
}

/// A public chute in version `v1` that needs `gpu_count` of `supported`.
pub(crate) fn definition(name: &str, gpu_count: u32, supported: &[&str]) -> ChuteDefinition {
    ChuteDefinition {
        key: key(name),
        version: version("v1"),
        name: name.to_owned(),
        image: "acme/model:1".to_owned(),
        chutes_version: Some("0.3.40".to_owned()),
        gpu_count,
        supported_gpus: supported
            .iter()
            .map(|short_ref| (*short_ref).to_owned())
            .collect(),
        preemptible: true,
        tee: false,
        serves_requests: true,
        job_ports: vec![],
        effective_multiplier_milli: None,
    }
}

/// Metrics with this many compute units, requests, instances and refusals in the last hour.
pub(crate) fn demand(compute_units: f64, invocations: u64, instances: u32, refused: u64) -> ChuteMarket {
    ChuteMarket {
        metrics: Some(Metrics {
            instance_count: instances,
            total_invocations: invocations,
            total_compute_time_s: compute_units,
            compute_multiplier: 1.0,
            rate_limit_count: refused,
            read_at: UnixMillis(0),
        }),
        ..ChuteMarket::default()
    }
}

/// A chute that a 2026 validator pays so much per second.
pub(crate) fn multiplier(effective: f64, instances: u32) -> ChuteMarket {
    ChuteMarket {
        effective_multiplier: Some(effective),
        active_instances: Some(instances),
        ..ChuteMarket::default()
    }
}

pub(crate) fn launches(decisions: &[Decision]) -> Vec<&Launch> {
    fn launch(decision: &Decision) -> Option<&Launch> {
        match decision {
            Decision::Launch(launch) => Some(launch),
            _ => None,
        }
    }
    decisions.iter().filter_map(launch).collect()
}

/// The reason that a plan gives for leaving a chute alone.
pub(crate) fn reason_for_nothing(decisions: &[Decision], chute: &ChuteKey) -> String {
    let reason = |decision: &Decision| match decision {
        Decision::Nothing { chute: other, reason } if other == chute => Some(reason.clone()),
        _ => None,
    };
    let found: Vec<String> = decisions.iter().filter_map(reason).collect();
    found.join("; ")
}

impl Fleet {
    pub(crate) fn new(pay_profile: PayProfile) -> Self {
        let mut fleet = Self {
            state: State::new(Faults::none()),
            market: Market::default(),
            now: UnixMillis(1_800_000_000_000),
            next: 0,
            devices: 0,
            checks: true,
        };
        fleet.ok(Command::Configure {
            miner: Signer::from_seed(&[1; 32]).hotkey().clone(),
            validators: BTreeSet::from([validator(1), validator(2)]),
            pay_profile,
        });
        fleet.metrics_were_read();
        fleet
    }

    pub(crate) fn metrics_were_read(&mut self) {
        self.market.metrics_read_at.insert(validator(1), self.now);
    }

    pub(crate) fn apply(&mut self, command: Command) -> Answer {
        self.next += 1;
        let proposal = Proposal {
            request: RequestId(self.next),
            at: self.now,
            guard: None,
            command: command.clone(),
        };
        let answer = apply(&mut self.state, proposal);
        if self.checks {
            self.check(&format!("{command:?}"));
        }
        answer
    }

    pub(crate) fn check(&self, after: &str) {
        assert_eq!(violations(&self.state), Vec::<String>::new(), "after {after}");
    }

    pub(crate) fn ok(&mut self, command: Command) {
        let text = format!("{command:?}");
        if let Err(rejection) = self.apply(command) {
            panic!("{text} was rejected: {rejection}");
        }
    }

    /// Time passes for us and for the market's listings, which stay as fresh as they were.
    pub(crate) fn pass(&mut self, ms: u64) {
        self.now = self.now + ms;
        self.ok(Command::PassTime);
        self.metrics_were_read();
        for market in self.market.chutes.values_mut() {
            if let Some(metrics) = &mut market.metrics {
                metrics.read_at = self.now;
            }
        }
    }

    /// A server whose GPUs validator 1 has verified.
    pub(crate) fn server(&mut self, name: &str, gpu_count: u32, short_ref: &str, cost_usd: f64) {
        self.server_of(&validator(1), name, gpu_count, short_ref, cost_usd);
    }

    pub(crate) fn server_of(
        &mut self,
        validator: &Hotkey,
        name: &str,
        gpu_count: u32,
        short_ref: &str,
        cost_usd: f64,
    ) {
        let facts = self.facts(name, gpu_count);
        self.ok(Command::RecordHost { facts });
        self.enrol(validator, name, short_ref, cost_usd);
    }

    /// A sealed worker.
    pub(crate) fn worker(&mut self, name: &str, gpu_count: u32, short_ref: &str, cost_usd: f64) {
        let facts = self.facts(name, gpu_count);
        self.ok(Command::AddWorker {
            facts,
            sealed_kubeconfig: vec![1],
        });
        self.enrol(&validator(1), name, short_ref, cost_usd);
    }

    fn facts(&mut self, name: &str, gpu_count: u32) -> HostFacts {
        let mut device = || {
            self.devices += 1;
            DeviceInfo {
                uuid: GpuId::from_device_uuid(&format!("{:032x}", self.devices)).unwrap(),
                name: "NVIDIA RTX A6000".to_owned(),
                memory: 51_000_000_000,
                processors: 84,
                clock_rate_khz: 1_800_000,
                max_threads_per_processor: 1536,
            }
        };
        HostFacts {
            server: server_id(name),
            name: name.to_owned(),
            address: "203.0.113.1".to_owned(),
            proof_port: 30443,
            devices: (0..gpu_count).map(|_| device()).collect(),
            cpu_count: 64,
            memory_gb: 512,
            disk_free_gb: 1000,
            agent_version: "0.1.0".to_owned(),
        }
    }

    fn enrol(&mut self, validator: &Hotkey, name: &str, short_ref: &str, cost_usd: f64) {
        self.ok(Command::EnrolServer {
            server: server_id(name),
            validator: validator.clone(),
            gpu_short_ref: short_ref.to_owned(),
            hourly_cost_usd_micros: (cost_usd * 1e6) as u64,
        });
        let advertised = EffectOutcome::Advertised {
            task: "task".to_owned(),
            seed: 7,
        };
        self.finish(
            |kind| matches!(kind, EffectKind::AdvertiseGpus { .. }),
            &mut |_| advertised.clone(),
        );
        self.finish(
            |kind| matches!(kind, EffectKind::AwaitVerification { .. }),
            &mut |_| EffectOutcome::Verified,
        );
        self.report(name);
    }

    /// Finishes all pending effects of a kind.
    pub(crate) fn finish(
        &mut self,
        wanted: impl Fn(&EffectKind) -> bool,
        outcome: &mut dyn FnMut(&EffectKind) -> EffectOutcome,
    ) -> usize {
        let ready: Vec<_> = self
            .state
            .outbox()
            .ready()
            .filter(|effect| wanted(&effect.kind))
            .cloned()
            .collect();
        for effect in &ready {
            let outcome = outcome(&effect.kind);
            self.ok(Command::FinishEffect {
                effect: effect.id,
                outcome,
            });
        }
        ready.len()
    }

    /// The host runs all that it should, and says so.
    pub(crate) fn report(&mut self, name: &str) {
        self.report_phase(
            name,
            &WorkloadPhase::Running {
                ports: vec![PortMapping {
                    internal: PRIMARY_PORT,
                    external: 31_000,
                    protocol: PortProtocol::Tcp,
                }],
                ready: true,
            },
        );
    }

    pub(crate) fn report_phase(&mut self, name: &str, phase: &WorkloadPhase) {
        let server = server_id(name);
        let workloads = self
            .state
            .desired_ids(&server)
            .into_iter()
            .map(|deployment| WorkloadStatus {
                deployment,
                phase: phase.clone(),
            })
            .collect();
        let fence = self.state.fence_of(&server).unwrap();
        self.ok(Command::RecordWorkloads {
            server,
            report: WorkloadReport { fence, workloads },
        });
    }

    pub(crate) fn change_facts(&mut self, name: &str, change: impl FnOnce(&mut HostFacts)) {
        let mut facts = self.state.servers().get(&server_id(name)).unwrap().facts.clone();
        change(&mut facts);
        self.ok(Command::RecordHost { facts });
        self.report(name);
    }

    pub(crate) fn lock(&mut self, name: &str, locked: bool) {
        self.ok(Command::LockServer {
            server: server_id(name),
            locked,
        });
    }

    pub(crate) fn publish(&mut self, definition: ChuteDefinition) -> ChuteKey {
        let key = definition.key.clone();
        let code = ChuteCode {
            filename: "app.py".to_owned(),
            code: format!("print({:?})", definition.version),
            ref_str: "app:chute".to_owned(),
        };
        self.ok(Command::RecordChute { definition, code });
        key
    }

    pub(crate) fn chute(&mut self, name: &str, gpu_count: u32, supported: &[&str]) -> ChuteKey {
        self.publish(definition(name, gpu_count, supported))
    }

    pub(crate) fn know(&mut self, chute: &ChuteKey, market: ChuteMarket) {
        self.market.chutes.insert(chute.clone(), market);
        let now = self.now;
        if let Some(metrics) = &mut self.market.chutes.get_mut(chute).unwrap().metrics {
            metrics.read_at = now;
        }
    }

    pub(crate) fn utilization(&mut self, chute: &ChuteKey, utilization: Utilization) {
        self.market.chutes.entry(chute.clone()).or_default().utilization = Some(utilization);
    }

    pub(crate) fn bounty(&mut self, chute: &ChuteKey, amount: u64) {
        self.ok(Command::RecordBounty {
            chute: chute.clone(),
            amount,
        });
    }

    pub(crate) fn offer_job(&mut self, name: &str, chute: &ChuteKey, disk_gb: u32) -> JobId {
        self.ok(Command::RecordJobOffer {
            job: job(name),
            chute: chute.clone(),
            gpu_count: 1,
            disk_gb,
            excluded: false,
        });
        job(name)
    }

    /// What the built-in strategy wants.
    pub(crate) fn plan(&self, trigger: Trigger) -> Vec<Decision> {
        let view = View::new(&self.state, &self.market);
        let plan = Scheduler::default().propose(&view, &trigger, &|| 0);
        assert_eq!(plan.failure, None);
        plan.decisions
    }

    /// Carries decisions out in their order; each must be accepted.
    pub(crate) fn carry_out(&mut self, decisions: &[Decision]) -> Vec<DeploymentId> {
        let mut placed = vec![];
        for decision in decisions {
            let id = self.new_id();
            let Some(command) = command_for(decision.clone(), &self.state, id.clone()) else {
                continue;
            };
            if let Err(rejection) = self.apply(command) {
                panic!("{decision:?} was rejected: {rejection}");
            }
            if matches!(decision, Decision::Launch(_)) {
                placed.push(id);
            }
        }
        placed
    }

    /// Plans, carries out, and says what was placed.
    pub(crate) fn go(&mut self, trigger: Trigger) -> Vec<DeploymentId> {
        let decisions = self.plan(trigger);
        self.carry_out(&decisions)
    }

    fn new_id(&mut self) -> DeploymentId {
        self.next += 1;
        DeploymentId::parse(&format!("deployment-{:04}", self.next)).unwrap()
    }

    pub(crate) fn deployment(&self, id: &DeploymentId) -> &Deployment {
        self.state.deployments().get(id).unwrap()
    }

    /// Launch configs for all that wait for one.
    pub(crate) fn grant_tokens(&mut self) -> usize {
        let mut number = self.next;
        self.finish(
            |kind| matches!(kind, EffectKind::FetchLaunchConfig { .. }),
            &mut |_| {
                number += 1;
                EffectOutcome::LaunchConfig {
                    config: ConfigId::parse(&format!("config-{number}")).unwrap(),
                    sealed_token: vec![1, 2, 3],
                }
            },
        )
    }

    pub(crate) fn refuse_tokens(&mut self, status: u16) -> usize {
        self.finish(
            |kind| matches!(kind, EffectKind::FetchLaunchConfig { .. }),
            &mut |_| EffectOutcome::Refused {
                status,
                detail: "no".to_owned(),
            },
        )
    }

    /// The validator is told whatever waits to be told.
    pub(crate) fn tell_validator(&mut self) -> usize {
        self.finish(
            |kind| {
                matches!(
                    kind,
                    EffectKind::DeleteInstance { .. }
                        | EffectKind::ReleaseJob { .. }
                        | EffectKind::DeleteGpu { .. }
                )
            },
            &mut |_| EffectOutcome::Done,
        )
    }

    /// Brings a deployment from its assignment to serving, now.
    pub(crate) fn bring_up(&mut self, id: &DeploymentId) -> InstanceId {
        let deployment = self.deployment(id).clone();
        self.report(deployment.server.as_str());
        let instance = InstanceId::parse(&format!("instance-of-{id}")).unwrap();
        self.ok(Command::RecordInstanceCreated {
            validator: deployment.chute.validator.clone(),
            chute: deployment.chute.chute.clone(),
            config: deployment.config.clone(),
            instance: instance.clone(),
        });
        self.ok(Command::RecordInstanceVerified {
            instance: instance.clone(),
        });
        self.ok(Command::RecordInstanceActivated {
            config: deployment.config,
            instance: instance.clone(),
        });
        assert_eq!(self.deployment(id).phase, Phase::Serving);
        instance
    }

    /// Places a copy on a server's first free GPUs, outside of any strategy.
    pub(crate) fn place(&mut self, chute: &ChuteKey, server: &str, job: Option<JobId>) -> DeploymentId {
        let deployment = self.request(chute, server, job);
        self.grant_tokens();
        deployment
    }

    pub(crate) fn place_without_token(&mut self, chute: &ChuteKey, server: &str) -> DeploymentId {
        self.request(chute, server, None)
    }

    fn request(&mut self, chute: &ChuteKey, server: &str, job: Option<JobId>) -> DeploymentId {
        let definition = &self.state.chutes().get(chute).unwrap().definition;
        let (count, version) = (definition.gpu_count as usize, definition.version.clone());
        let on_server = server_id(server);
        let free = self.state.gpus_of(&on_server).filter(|gpu| gpu.is_free());
        let gpus = free.take(count).map(|gpu| gpu.id().clone()).collect();
        let deployment = self.new_id();
        self.ok(Command::PlaceDeployment(Placement {
            deployment: deployment.clone(),
            chute: chute.clone(),
            version,
            server: on_server,
            gpus,
            victims: vec![],
            job,
            reason: "a test".to_owned(),
        }));
        deployment
    }

    /// A copy that serves since now.
    pub(crate) fn serving(&mut self, chute: &ChuteKey, server: &str) -> DeploymentId {
        let id = self.place(chute, server, None);
        self.bring_up(&id);
        id
    }

    /// Everything that is being taken down goes: validators are told, hosts confirm.
    pub(crate) fn drain(&mut self) {
        let servers: BTreeMap<ServerId, ()> = self
            .state
            .deployments()
            .values()
            .map(|d| (d.server.clone(), ()))
            .collect();
        while self.tell_validator() > 0 {}
        for server in servers.keys() {
            self.report(server.as_str());
        }
    }

    pub(crate) fn free_gpus(&self) -> usize {
        self.state.gpus().values().filter(|gpu| gpu.is_free()).count()
    }
}

//! Every replicated fact, in tables of rows, with the queries that need more than one of them.

use std::collections::{BTreeMap, BTreeSet};

use protocol::hotkey::Hotkey;
use protocol::id::{ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::report::HostFacts;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use super::answers::{Answered, Answers};
use super::chute::{Bounty, Chute, ChuteCode, ChuteKey, VersionKey};
use super::command::{ANSWERS_MAX, Answer, PayProfile, REQUEST_MEMORY_LEAST_MS, RequestId};
use super::deployment::{Audit, Deployment};
use super::effect::{Effect, EffectId, EffectKind, Subject};
use super::format::Finalized;
use super::host::{Cluster, HostRecord, Invite, InviteId, KeyHash, Rotation};
use super::job::Job;
use super::outbox::Outbox;
use super::server::{Gpu, Server};
use super::table::Table;
use super::worker::Worker;

/// Facts of which there is one each.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The largest time that a proposal carried.
    pub now: UnixMillis,
    /// Us; none before the first `Configure`.
    pub miner: Option<Hotkey>,
    /// For whom we work.
    pub validators: BTreeSet<Hotkey>,
    /// Rules of pay that protect instances.
    pub pay_profile: PayProfile,
    /// Raised by restore and recovery; half of every fence.
    pub incarnation: u64,
    /// The next effect's name.
    pub next_effect: EffectId,
    /// Start of the deletion budget's window.
    pub budget_window_start: UnixMillis,
    /// Deleted without an operator in this window.
    pub budget_used: u32,
}

/// An instance that a validator lists as ours and that no deployment accounts for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stranger {
    /// At which validator.
    pub validator: Hotkey,
    /// What it runs.
    pub chute: protocol::id::ChuteId,
    /// Its launch config.
    pub config: Option<ConfigId>,
    /// When it was first seen.
    pub first_seen_at: UnixMillis,
}

/// Planted faults, for tests that must show that they can fail. Production passes [`Faults::none`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// A GPU that is held may be given again.
    pub double_allocation: bool,
    /// A launch config that comes late revives a stopping deployment.
    pub late_config_revives: bool,
    /// Effects of one subject may be done in any order.
    pub effects_out_of_order: bool,
    /// A GPU is free as soon as the validator was told.
    pub gpu_freed_early: bool,
    /// A listing that is unknown counts as empty.
    pub unknown_is_empty: bool,
    /// The first write of a new leader loses the oldest entry of the outbox.
    pub outbox_entry_lost_at_leader_change: bool,
    /// An effect stays in the outbox although its end was reported.
    pub effect_done_twice: bool,
    /// Nobody remembers which signatures were used.
    pub replay_guard_lost: bool,
}

impl Faults {
    /// No faults.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }
}

/// The replicated state. Everything in it follows from the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    pub(crate) faults: Faults,
    pub(crate) settings: Settings,
    pub(crate) settings_changed: bool,
    pub(crate) servers: Table<ServerId, Server>,
    pub(crate) gpus: Table<GpuId, Gpu>,
    pub(crate) chutes: Table<ChuteKey, Chute>,
    pub(crate) codes: Table<VersionKey, ChuteCode>,
    pub(crate) bounties: Table<ChuteKey, Bounty>,
    pub(crate) jobs: Table<JobId, Job>,
    pub(crate) deployments: Table<DeploymentId, Deployment>,
    pub(crate) audits: Table<DeploymentId, Audit>,
    pub(crate) strangers: Table<InstanceId, Stranger>,
    pub(crate) outbox: Outbox,
    pub(crate) answers: Answers,
    pub(crate) guards: Table<[u8; 32], UnixMillis>,
    pub(crate) hosts: Table<ServerId, HostRecord>,
    pub(crate) invites: Table<InviteId, Invite>,
    /// One row, under 0, once it is founded.
    pub(crate) cluster: Table<u8, Cluster>,
    /// One row, under 0, once an upgrade was finalized.
    pub(crate) format: Table<u8, Finalized>,
    /// Member ids that a recovery gave up, and when; until their hosts rejoin under another id.
    pub(crate) given_up: Table<u64, UnixMillis>,
    /// One row, under 0, while the cluster changes over to another authority.
    pub(crate) rotation: Table<u8, Rotation>,
    /// What hosts have said that they trust. None for those that know the cluster's authority only.
    pub(crate) trusted: Table<ServerId, Vec<KeyHash>>,
    /// One row, under 0, since when the cluster only watches; none while it acts.
    pub(crate) observing: Table<u8, UnixMillis>,
    pub(crate) workers: Table<ServerId, Worker>,
    index: Index,
}

/// Derived from the tables, never stored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Index {
    servers_by_name: BTreeMap<String, BTreeSet<ServerId>>,
    gpus_by_server: BTreeMap<ServerId, BTreeSet<GpuId>>,
    deployments_by_server: BTreeMap<ServerId, BTreeSet<DeploymentId>>,
    deployments_by_chute: BTreeMap<ChuteKey, BTreeSet<DeploymentId>>,
    by_config: BTreeMap<ConfigId, BTreeSet<DeploymentId>>,
    by_instance: BTreeMap<InstanceId, BTreeSet<DeploymentId>>,
}

impl State {
    /// An empty state.
    #[must_use]
    pub fn new(faults: Faults) -> Self {
        Self {
            faults,
            ..Self::default()
        }
    }

    /// A copy for a look at what would be: of what was answered, which may be most of it, nothing.
    pub(crate) fn without_answers(&self) -> Self {
        Self {
            faults: self.faults,
            settings: self.settings.clone(),
            settings_changed: self.settings_changed,
            servers: self.servers.clone(),
            gpus: self.gpus.clone(),
            chutes: self.chutes.clone(),
            codes: self.codes.clone(),
            bounties: self.bounties.clone(),
            jobs: self.jobs.clone(),
            deployments: self.deployments.clone(),
            audits: self.audits.clone(),
            strangers: self.strangers.clone(),
            outbox: self.outbox.clone(),
            answers: Answers::default(),
            guards: self.guards.clone(),
            hosts: self.hosts.clone(),
            invites: self.invites.clone(),
            cluster: self.cluster.clone(),
            format: self.format.clone(),
            given_up: self.given_up.clone(),
            rotation: self.rotation.clone(),
            trusted: self.trusted.clone(),
            observing: self.observing.clone(),
            workers: self.workers.clone(),
            index: self.index.clone(),
        }
    }

    /// Facts of which there is one each.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn settings_mut(&mut self) -> &mut Settings {
        self.settings_changed = true;
        &mut self.settings
    }

    /// Hosts that have joined, also those that were removed since.
    #[must_use]
    pub fn servers(&self) -> &Table<ServerId, Server> {
        &self.servers
    }

    /// Servers without those whose host was removed and that work for nobody any more: a name is used once among these.
    pub fn present_servers(&self) -> impl Iterator<Item = &Server> {
        self.servers.values().filter(|server| self.is_present(server))
    }

    pub(crate) fn present_servers_named(&self, name: &str) -> impl Iterator<Item = &Server> {
        let ids = self.index.servers_by_name.get(name).into_iter().flatten();
        let servers = ids.filter_map(|id| self.servers.get(id));
        servers.filter(|server| self.is_present(server))
    }

    fn is_present(&self, server: &Server) -> bool {
        server.enrolment.is_some() || self.hosts.get(server.id()).is_none_or(HostRecord::is_in)
    }

    /// Sealed workers.
    #[must_use]
    pub fn workers(&self) -> &Table<ServerId, Worker> {
        &self.workers
    }

    /// GPUs of enrolled servers.
    #[must_use]
    pub fn gpus(&self) -> &Table<GpuId, Gpu> {
        &self.gpus
    }

    /// The catalogue.
    #[must_use]
    pub fn chutes(&self) -> &Table<ChuteKey, Chute> {
        &self.chutes
    }

    /// Code of the versions that are current or run.
    #[must_use]
    pub fn codes(&self) -> &Table<VersionKey, ChuteCode> {
        &self.codes
    }

    /// Open bounties.
    #[must_use]
    pub fn bounties(&self) -> &Table<ChuteKey, Bounty> {
        &self.bounties
    }

    /// Jobs that were offered.
    #[must_use]
    pub fn jobs(&self) -> &Table<JobId, Job> {
        &self.jobs
    }

    /// Deployments that are not gone.
    #[must_use]
    pub fn deployments(&self) -> &Table<DeploymentId, Deployment> {
        &self.deployments
    }

    /// Deployments that are gone.
    #[must_use]
    pub fn audits(&self) -> &Table<DeploymentId, Audit> {
        &self.audits
    }

    /// Instances that nobody accounts for.
    #[must_use]
    pub fn strangers(&self) -> &Table<InstanceId, Stranger> {
        &self.strangers
    }

    /// Effects to be done.
    #[must_use]
    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// The answer to a request, as long as it is remembered.
    #[must_use]
    pub fn answer_to(&self, request: RequestId) -> Option<Answer> {
        self.answers.get(request).map(|answered| answered.answer)
    }

    pub(crate) fn remember_answer(&mut self, request: RequestId, answer: Answer) {
        while self.answers.len() >= ANSWERS_MAX && self.forget_answer(REQUEST_MEMORY_LEAST_MS) {}
        let at = self.settings.now;
        self.answers.insert(request, Answered { at, answer });
    }

    /// Forgets the oldest answer, if it was given `age_ms` ago or earlier; says whether it was.
    pub(crate) fn forget_answer(&mut self, age_ms: u64) -> bool {
        self.answers.forget_oldest(self.settings.now, age_ms)
    }

    /// GPUs of one server, in order.
    pub fn gpus_of(&self, server: &ServerId) -> impl Iterator<Item = &Gpu> {
        self.index
            .gpus_by_server
            .get(server)
            .into_iter()
            .flatten()
            .filter_map(|id| self.gpus.get(id))
    }

    /// What hosts reported so far says nothing of what this state does not know: nothing is placed on a server before it
    /// reports again.
    pub(crate) fn ask_for_reports(&mut self) {
        let servers: Vec<_> = self.servers.keys().cloned().collect();
        for server in servers {
            if let Some(server) = self.servers.get_mut(&server) {
                server.reported = None;
            }
        }
    }

    /// Deployments on one server, in order.
    pub fn deployments_on(&self, server: &ServerId) -> impl Iterator<Item = &Deployment> {
        let ids = self.index.deployments_by_server.get(server);
        ids.into_iter()
            .flatten()
            .filter_map(|id| self.deployments.get(id))
    }

    /// Deployments of one chute, in any version.
    pub fn deployments_of(&self, chute: &ChuteKey) -> impl Iterator<Item = &Deployment> {
        let ids = self.index.deployments_by_chute.get(chute);
        ids.into_iter()
            .flatten()
            .filter_map(|id| self.deployments.get(id))
    }

    /// The server with this name or id, as operators write it.
    #[must_use]
    pub fn server_by_name_or_id(&self, text: &str) -> Option<&Server> {
        self.present_servers()
            .find(|s| s.facts.name == text || s.facts.server.as_str() == text)
    }

    /// The deployment that a validator means by a launch config or an instance.
    #[must_use]
    pub fn deployment_of(&self, config: Option<&ConfigId>, instance: &InstanceId) -> Option<&DeploymentId> {
        let by_config = config.and_then(|config| self.deployment_of_config(config));
        by_config.or_else(|| self.one_of(self.index.by_instance.get(instance)?))
    }

    pub(crate) fn deployment_of_config(&self, config: &ConfigId) -> Option<&DeploymentId> {
        self.one_of(self.index.by_config.get(config)?)
    }

    /// A name is one deployment's. Of several that a validator gave it to, one that is not gone is meant.
    fn one_of<'a>(&self, ids: &'a BTreeSet<DeploymentId>) -> Option<&'a DeploymentId> {
        let here = ids.iter().find(|id| self.deployments.contains_key(id));
        here.or_else(|| ids.first())
    }

    pub(crate) fn insert_server(&mut self, server: Server) {
        self.index.add_server(&server);
        self.servers.insert(server.id().clone(), server);
    }

    /// Replaces what a known server said of itself, from which specifications of workloads are derived.
    pub(crate) fn set_facts(&mut self, facts: HostFacts) {
        if let Some(server) = self.servers.get_mut(&facts.server) {
            remove_from(&mut self.index.servers_by_name, &server.facts.name, server.id());
            server.facts = facts;
            server.revision += 1;
            self.index.add_server(server);
        }
    }

    pub(crate) fn forget_server(&mut self, id: &ServerId) {
        if let Some(server) = self.servers.remove(id) {
            remove_from(&mut self.index.servers_by_name, &server.facts.name, id);
        }
    }

    pub(crate) fn insert_gpu(&mut self, gpu: Gpu) {
        self.index
            .gpus_by_server
            .entry(gpu.server.clone())
            .or_default()
            .insert(gpu.id().clone());
        self.gpus.insert(gpu.id().clone(), gpu);
    }

    pub(crate) fn remove_gpu(&mut self, id: &GpuId) {
        if let Some(gpu) = self.gpus.remove(id) {
            remove_from(&mut self.index.gpus_by_server, &gpu.server, id);
        }
    }

    pub(crate) fn insert_deployment(&mut self, deployment: Deployment) {
        self.index.add(&deployment);
        self.deployments.insert(deployment.id.clone(), deployment);
    }

    pub(crate) fn remove_deployment(&mut self, id: &DeploymentId) -> Option<Deployment> {
        let deployment = self.deployments.remove(id)?;
        remove_from(&mut self.index.deployments_by_server, &deployment.server, id);
        remove_from(&mut self.index.deployments_by_chute, &deployment.chute, id);
        // The names stay known to the audit row: a late instance of it is still ours to delete.
        Some(deployment)
    }

    /// Names of a deployment that the validator chose; both stay findable after it is gone.
    pub(crate) fn set_config(&mut self, id: &DeploymentId, config: ConfigId) {
        if let Some(deployment) = self.deployments.get_mut(id) {
            if let Some(former) = deployment.config.replace(config.clone()) {
                remove_from(&mut self.index.by_config, &former, id);
            }
            self.index.by_config.entry(config).or_default().insert(id.clone());
        }
    }

    pub(crate) fn set_instance(&mut self, id: &DeploymentId, instance: InstanceId) {
        if let Some(deployment) = self.deployments.get_mut(id) {
            let former = deployment.instance.replace(instance.clone());
            self.index.rename_instance(id, former, instance);
        }
    }

    pub(crate) fn insert_audit(&mut self, audit: Audit) {
        self.audits.insert(audit.deployment.id.clone(), audit);
    }

    pub(crate) fn set_audit_instance(&mut self, id: &DeploymentId, instance: InstanceId) {
        if let Some(audit) = self.audits.get_mut(id) {
            let former = audit.deployment.instance.replace(instance.clone());
            self.index.rename_instance(id, former, instance);
        }
    }

    pub(crate) fn remove_audit(&mut self, id: &DeploymentId) {
        if let Some(audit) = self.audits.remove(id) {
            if let Some(config) = &audit.deployment.config {
                remove_from(&mut self.index.by_config, config, id);
            }
            if let Some(instance) = &audit.deployment.instance {
                remove_from(&mut self.index.by_instance, instance, id);
            }
        }
    }

    /// Adds something to do at a validator.
    pub(crate) fn push_effect(&mut self, subject: Subject, validator: Hotkey, kind: EffectKind) {
        let settings = self.settings_mut();
        let (id, created_at) = (settings.next_effect, settings.now);
        settings.next_effect += 1;
        self.outbox.push(Effect {
            id,
            subject,
            validator,
            kind,
            created_at,
        });
    }

    /// Builds what is derived, after rows were read from disk.
    pub(crate) fn rebuild_index(&mut self) {
        self.index = self.derive_index();
    }

    /// True if what is derived is what the tables say.
    pub(crate) fn index_is_right(&self) -> bool {
        self.derive_index() == self.index && self.answers.are_consistent()
    }

    fn derive_index(&self) -> Index {
        let mut index = Index::default();
        for server in self.servers.values() {
            index.add_server(server);
        }
        for gpu in self.gpus.values() {
            index
                .gpus_by_server
                .entry(gpu.server.clone())
                .or_default()
                .insert(gpu.id().clone());
        }
        for deployment in self.deployments.values() {
            index.add(deployment);
        }
        for audit in self.audits.values() {
            index.add_names(&audit.deployment);
        }
        index
    }
}

impl Index {
    fn add_server(&mut self, server: &Server) {
        let ids = self.servers_by_name.entry(server.facts.name.clone()).or_default();
        ids.insert(server.id().clone());
    }

    fn add(&mut self, deployment: &Deployment) {
        let id = deployment.id.clone();
        self.deployments_by_server
            .entry(deployment.server.clone())
            .or_default()
            .insert(id.clone());
        self.deployments_by_chute
            .entry(deployment.chute.clone())
            .or_default()
            .insert(id);
        self.add_names(deployment);
    }

    fn add_names(&mut self, deployment: &Deployment) {
        if let Some(config) = &deployment.config {
            let ids = self.by_config.entry(config.clone()).or_default();
            ids.insert(deployment.id.clone());
        }
        if let Some(instance) = &deployment.instance {
            let ids = self.by_instance.entry(instance.clone()).or_default();
            ids.insert(deployment.id.clone());
        }
    }

    fn rename_instance(&mut self, id: &DeploymentId, former: Option<InstanceId>, instance: InstanceId) {
        if let Some(former) = former {
            remove_from(&mut self.by_instance, &former, id);
        }
        self.by_instance.entry(instance).or_default().insert(id.clone());
    }
}

fn remove_from<K: Ord, V: Ord>(index: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(values) = index.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            index.remove(key);
        }
    }
}

//! What a strategy may ask about the state. A strategy uses this and nothing of the state itself, so that a
//! change inside the state never breaks a miner's strategy.
//!
//! A view is made once per pass. What every pass needs (servers, their free GPUs by type, versions to be
//! replaced) is gathered at once; what only some need (who could be evicted) when it is first asked for.
//! Every rule about what is allowed comes from the state machine's rulebook.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};

use protocol::gpu::DeviceInfo;
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, DeploymentId, GpuId, JobId, ServerId};
use protocol::time::UnixMillis;

use super::market::{ChuteMarket, METRICS_MEMORY_MS, Market};
use crate::state_machine::chute::{Chute, ChuteKey};
use crate::state_machine::command::{Allowance, PayProfile};
use crate::state_machine::deployment::{Deployment, Phase, StopReason};
use crate::state_machine::state::State;

pub use crate::state_machine::desired::DISK_GB_DEFAULT;

/// Names a pool within one view.
pub type PoolIndex = usize;
/// Names a class within one view.
pub type ClassIndex = usize;
/// Names a server within one view.
pub type ServerIndex = usize;

/// An enrolled server.
#[derive(Debug)]
pub struct ServerView<'a> {
    /// Which.
    pub id: &'a ServerId,
    /// Its name, for people.
    pub name: &'a str,
    /// For whom it works.
    pub validator: &'a Hotkey,
    /// Cost of one GPU for an hour, in millionths of a dollar; never 0.
    pub hourly_cost_usd_micros: u64,
    /// Disk that is free and not spoken for by deployments that have not started yet, in GB.
    pub disk_left_gb: u32,
    /// Why it takes no new work; none if it does.
    pub unavailable: Option<String>,
    /// The operator locked it, and nothing else is the matter.
    pub only_locked: bool,
    /// A sealed worker: for chutes that need one, and for no others.
    pub sealed: bool,
}

/// The GPUs of one type on one server.
#[derive(Debug)]
pub struct Pool<'a> {
    /// Where.
    pub server: ServerIndex,
    /// Type, validator, and whether sealed.
    pub class: ClassIndex,
    /// GPUs that a placement could have at once.
    pub free: Vec<&'a GpuId>,
    /// Free or not.
    pub total: usize,
}

/// Own copies of a chute that are not being taken down, jobs left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OwnCopies {
    /// In any version.
    pub live: u32,
    /// In the current version.
    pub current: u32,
    /// Of those in any version: not serving yet.
    pub pending: u32,
    /// Of those in any version: serving, and not about to make room for another deployment.
    pub serving: u32,
    /// Copies that served and are going, or went after the network was last counted.
    pub leaving: u32,
}

/// A deployment that may be stopped for another.
#[derive(Debug, Clone, Copy)]
pub struct Evictable<'a> {
    /// Which.
    pub id: &'a DeploymentId,
    /// What it runs.
    pub chute: &'a ChuteKey,
    /// Its GPUs, all of one pool.
    pub gpus: &'a [GpuId],
}

/// A possible victim; those of one chute share a group.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Position in [`View::candidate_chutes`].
    pub group: usize,
    /// Who.
    pub evictable: Evictable<'a>,
}

#[derive(Debug)]
struct Candidates<'a> {
    by_pool: Vec<Vec<Candidate<'a>>>,
    chutes: Vec<&'a ChuteKey>,
}

/// A deployment that its validator wants replaced by another version.
#[derive(Debug, Clone, Copy)]
pub struct Superseded<'a> {
    /// Which.
    pub id: &'a DeploymentId,
    /// What it runs.
    pub chute: &'a ChuteKey,
    /// By which version.
    pub version: &'a ChuteVersion,
    /// Its GPUs.
    pub gpus: &'a [GpuId],
    /// Where they are; none unless the host reports all of them, as one type.
    pub pool: Option<PoolIndex>,
}

/// A job that we may still try.
#[derive(Debug, Clone, Copy)]
pub struct OpenJob<'a> {
    /// Which.
    pub id: &'a JobId,
    /// What it runs.
    pub chute: &'a ChuteKey,
    /// Disk that it needs, in GB.
    pub disk_gb: u32,
}

/// What a placement needs of a pool.
#[derive(Debug, Clone)]
pub struct Need {
    /// Classes that would do.
    pub classes: Vec<ClassIndex>,
    /// GPUs.
    pub gpu_count: usize,
    /// Disk in GB.
    pub disk_gb: u32,
}

/// Validator, GPU type, and whether on sealed workers.
type ClassName<'a> = (&'a Hotkey, &'a str, bool);

/// Read-only questions about the state and the market.
#[derive(Debug)]
pub struct View<'a> {
    state: &'a State,
    market: &'a Market,
    servers: Vec<ServerView<'a>>,
    pools: Vec<Pool<'a>>,
    classes: Vec<ClassName<'a>>,
    class_by_name: BTreeMap<ClassName<'a>, ClassIndex>,
    pools_by_class: Vec<Vec<PoolIndex>>,
    pools_by_server: Vec<Vec<PoolIndex>>,
    devices: Vec<&'a [DeviceInfo]>,
    superseded: Vec<Superseded<'a>>,
    /// Victims of placements that wait for their token.
    doomed: BTreeSet<&'a DeploymentId>,
    candidates: OnceCell<Candidates<'a>>,
    gone: OnceCell<BTreeMap<&'a ChuteKey, Vec<&'a Deployment>>>,
}

impl<'a> View<'a> {
    /// Looks at the state and the market as they are.
    #[must_use]
    pub fn new(state: &'a State, market: &'a Market) -> Self {
        let mut view = Self {
            state,
            market,
            servers: Vec::with_capacity(state.servers().len()),
            pools: Vec::with_capacity(state.servers().len()),
            classes: Vec::new(),
            class_by_name: BTreeMap::new(),
            pools_by_class: Vec::new(),
            pools_by_server: Vec::new(),
            devices: Vec::new(),
            superseded: Vec::new(),
            doomed: BTreeSet::new(),
            candidates: OnceCell::new(),
            gone: OnceCell::new(),
        };
        view.gather_servers();
        view.gather_deployments();
        view
    }

    fn gather_servers(&mut self) {
        for server in self.state.servers().values() {
            let Some(enrolment) = &server.enrolment else {
                continue;
            };
            let unavailable = self.state.unavailable(server);
            let only_locked = server.locked && {
                let mut unlocked = server.clone();
                unlocked.locked = false;
                self.state.unavailable(&unlocked).is_none()
            };
            self.devices.push(&server.facts.devices);
            self.pools_by_server.push(Vec::new());
            self.servers.push(ServerView {
                id: server.id(),
                name: &server.facts.name,
                validator: &enrolment.validator,
                hourly_cost_usd_micros: enrolment.hourly_cost_usd_micros.max(1),
                disk_left_gb: server.facts.disk_free_gb,
                unavailable,
                only_locked,
                sealed: self.state.workers().contains_key(server.id()),
            });
        }
        self.gather_gpus();
    }

    /// One walk over all GPUs: asking for those of each server would look every one of them up.
    fn gather_gpus(&mut self) {
        let mut by_id = BTreeMap::new();
        for (index, server) in self.servers.iter().enumerate() {
            by_id.insert(server.id, index);
        }
        for gpu in self.state.gpus().values() {
            let Some(server) = by_id.get(&gpu.server).copied() else {
                continue;
            };
            let pool = self.pool_for(server, &gpu.short_ref);
            self.pools[pool].total += 1;
            if gpu.is_free() && self.devices[server].iter().any(|device| device.uuid == *gpu.id()) {
                self.pools[pool].free.push(gpu.id());
            }
        }
    }

    fn pool_for(&mut self, server: ServerIndex, short_ref: &'a str) -> PoolIndex {
        let known = self.pools_by_server[server]
            .iter()
            .find(|pool| self.classes[self.pools[**pool].class].1 == short_ref);
        if let Some(pool) = known {
            return *pool;
        }
        let ServerView {
            validator, sealed, ..
        } = self.servers[server];
        let name = (validator, short_ref, sealed);
        let next_class = self.classes.len();
        let class = *self.class_by_name.entry(name).or_insert(next_class);
        if class == next_class {
            self.classes.push(name);
            self.pools_by_class.push(Vec::new());
        }
        let pool = self.pools.len();
        self.pools.push(Pool {
            server,
            class,
            free: Vec::new(),
            total: 0,
        });
        self.pools_by_class[class].push(pool);
        self.pools_by_server[server].push(pool);
        pool
    }

    fn gather_deployments(&mut self) {
        for deployment in self.state.deployments().values() {
            if deployment.phase <= Phase::Assigned {
                self.doomed.extend(&deployment.victims);
                if let Some(server) = self.server_index(&deployment.server) {
                    let job = deployment.job.as_ref().and_then(|job| self.state.jobs().get(job));
                    let needed = job.map_or(DISK_GB_DEFAULT, |job| job.disk_gb);
                    let left = &mut self.servers[server].disk_left_gb;
                    *left = left.saturating_sub(needed);
                }
            }
            if let Some(version) = &deployment.superseded_by
                && deployment.phase.is_live()
                && deployment.job.is_none()
            {
                self.superseded.push(Superseded {
                    id: &deployment.id,
                    chute: &deployment.chute,
                    version,
                    gpus: &deployment.gpus,
                    pool: self.pool_of_deployment(deployment),
                });
            }
        }
        let doomed = &self.doomed;
        self.superseded
            .retain(|superseded| !doomed.contains(superseded.id));
    }

    fn server_index(&self, id: &ServerId) -> Option<ServerIndex> {
        self.servers.binary_search_by(|server| server.id.cmp(id)).ok()
    }

    /// The pool that has all GPUs of a deployment; none unless the host reports every one of them.
    fn pool_of_deployment(&self, deployment: &Deployment) -> Option<PoolIndex> {
        let server = self.server_index(&deployment.server)?;
        let mut found = None;
        for id in &deployment.gpus {
            let gpu = self.state.gpus().get(id)?;
            let pool = self.pools_by_server[server]
                .iter()
                .find(|pool| self.classes[self.pools[**pool].class].1 == gpu.short_ref);
            let reported = self.devices[server].iter().any(|device| device.uuid == *id);
            if pool.is_none() || !reported || found.is_some_and(|found| pool != Some(found)) {
                return None;
            }
            found = pool;
        }
        found.copied()
    }

    /// The time of the state.
    #[must_use]
    pub fn now(&self) -> UnixMillis {
        self.state.settings().now
    }

    /// Which rules of pay are in force.
    #[must_use]
    pub fn pay_profile(&self) -> PayProfile {
        self.state.settings().pay_profile
    }

    /// Enrolled servers in order of their ids.
    #[must_use]
    pub fn servers(&self) -> &[ServerView<'a>] {
        &self.servers
    }

    /// Pools in order of their first GPUs.
    #[must_use]
    pub fn pools(&self) -> &[Pool<'a>] {
        &self.pools
    }

    /// The server of a pool.
    #[must_use]
    pub fn server_of(&self, pool: PoolIndex) -> &ServerView<'a> {
        &self.servers[self.pools[pool].server]
    }

    /// GPU type of a class.
    #[must_use]
    pub fn short_ref(&self, class: ClassIndex) -> &'a str {
        self.classes[class].1
    }

    /// How many classes there are.
    #[must_use]
    pub fn class_count(&self) -> usize {
        self.classes.len()
    }

    /// Pools of a class.
    #[must_use]
    pub fn pools_of(&self, class: ClassIndex) -> &[PoolIndex] {
        &self.pools_by_class[class]
    }

    /// The catalogue in order of its keys.
    pub fn chutes(&self) -> impl Iterator<Item = ChuteView<'_, 'a>> {
        self.state
            .chutes()
            .values()
            .map(|chute| ChuteView { view: self, chute })
    }

    /// One chute of the catalogue.
    #[must_use]
    pub fn chute(&self, key: &ChuteKey) -> Option<ChuteView<'_, 'a>> {
        let chute = self.state.chutes().get(key)?;
        Some(ChuteView { view: self, chute })
    }

    /// Chutes with an open bounty.
    pub fn bounties(&self) -> impl Iterator<Item = ChuteView<'_, 'a>> {
        self.state.bounties().keys().filter_map(|key| self.chute(key))
    }

    /// Jobs that we may still try.
    pub fn open_jobs(&self) -> impl Iterator<Item = OpenJob<'a>> {
        let open = self.state.jobs().iter().filter(|(_, job)| job.is_open());
        open.map(|(id, job)| OpenJob {
            id,
            chute: &job.chute,
            disk_gb: job.disk_gb,
        })
    }

    /// One open job.
    #[must_use]
    pub fn open_job(&self, id: &JobId) -> Option<OpenJob<'a>> {
        let (id, job) = self
            .state
            .jobs()
            .range_from(id)
            .next()
            .filter(|(key, _)| *key == id)?;
        job.is_open().then_some(OpenJob {
            id,
            chute: &job.chute,
            disk_gb: job.disk_gb,
        })
    }

    /// Deployments that wait to be replaced, without those whose replacement is on its way.
    #[must_use]
    pub fn superseded(&self) -> &[Superseded<'a>] {
        &self.superseded
    }

    /// Deployments of a pool that may be stopped for another, by the rulebook.
    #[must_use]
    pub fn candidates(&self, pool: PoolIndex) -> &[Candidate<'a>] {
        &self.evictable().by_pool[pool]
    }

    /// The chutes of all candidates; a candidate's group is a position in this.
    #[must_use]
    pub fn candidate_chutes(&self) -> &[&'a ChuteKey] {
        &self.evictable().chutes
    }

    fn evictable(&self) -> &Candidates<'a> {
        self.candidates.get_or_init(|| self.gather_candidates())
    }

    fn gather_candidates(&self) -> Candidates<'a> {
        let mut by_pool = vec![Vec::new(); self.pools.len()];
        let mut chutes = Vec::new();
        let mut groups: BTreeMap<&ChuteKey, usize> = BTreeMap::new();
        for deployment in self.state.deployments().values() {
            // The rulebook says the same; asking this first spares us thousands of explanations.
            if deployment.phase != Phase::Serving || deployment.job.is_some() {
                continue;
            }
            if self
                .state
                .protection_of(deployment, Allowance::default())
                .is_some()
            {
                continue;
            }
            // One that makes room for somebody already has a promised GPU.
            let unpromised = |id: &GpuId| {
                let gpu = self.state.gpus().get(id);
                gpu.is_some_and(|gpu| gpu.promised_to.is_none() && gpu.verified_at.is_some())
            };
            if let Some(pool) = self.pool_of_deployment(deployment)
                && deployment.gpus.iter().all(unpromised)
            {
                let group = *groups.entry(&deployment.chute).or_insert_with(|| {
                    chutes.push(&deployment.chute);
                    chutes.len() - 1
                });
                by_pool[pool].push(Candidate {
                    group,
                    evictable: Evictable {
                        id: &deployment.id,
                        chute: &deployment.chute,
                        gpus: &deployment.gpus,
                    },
                });
            }
        }
        Candidates { by_pool, chutes }
    }

    /// Deployments of a chute that went within the last hours.
    fn gone(&self, key: &ChuteKey) -> &[&'a Deployment] {
        let gone = self.gone.get_or_init(|| {
            let mut gone: BTreeMap<&ChuteKey, Vec<&Deployment>> = BTreeMap::new();
            for audit in self.state.audits().values() {
                if self.now().since(audit.gone_at) < METRICS_MEMORY_MS {
                    gone.entry(&audit.deployment.chute)
                        .or_default()
                        .push(&audit.deployment);
                }
            }
            gone
        });
        gone.get(key).map_or(&[], Vec::as_slice)
    }
}

/// Questions about one chute.
#[derive(Debug, Clone, Copy)]
pub struct ChuteView<'v, 'a> {
    view: &'v View<'a>,
    chute: &'a Chute,
}

impl<'a> ChuteView<'_, 'a> {
    /// Which.
    #[must_use]
    pub fn key(&self) -> &'a ChuteKey {
        &self.chute.definition.key
    }

    /// Its id at its validator.
    #[must_use]
    pub fn id(&self) -> &'a ChuteId {
        &self.chute.definition.key.chute
    }

    /// Its current version.
    #[must_use]
    pub fn version(&self) -> &'a ChuteVersion {
        &self.chute.definition.version
    }

    /// GPUs that one copy needs.
    #[must_use]
    pub fn gpu_count(&self) -> u32 {
        self.chute.definition.gpu_count
    }

    /// GPU types that it runs on.
    #[must_use]
    pub fn supported_gpus(&self) -> &'a BTreeSet<String> {
        &self.chute.definition.supported_gpus
    }

    /// A private chute: billed by the hour, never preempted.
    #[must_use]
    pub fn is_private(&self) -> bool {
        !self.chute.definition.preemptible
    }

    /// Amount of its open bounty.
    #[must_use]
    pub fn bounty(&self) -> Option<u64> {
        self.view
            .state
            .bounties()
            .get(self.key())
            .map(|bounty| bounty.amount)
    }

    /// What an instance would earn per second if it were activated now, if the validator says so.
    #[must_use]
    pub fn effective_multiplier(&self) -> Option<f64> {
        let catalogue = self.chute.definition.effective_multiplier_milli;
        #[expect(clippy::cast_precision_loss, reason = "multipliers are far below 2^53")]
        let catalogue = catalogue.map(|milli| milli as f64 / 1000.0);
        self.market()
            .and_then(|market| market.effective_multiplier)
            .or(catalogue)
    }

    /// What is known of it on the network.
    #[must_use]
    pub fn market(&self) -> Option<&'a ChuteMarket> {
        self.view.market.chutes.get(self.key())
    }

    /// True if its validator's metrics were read lately: then a chute that they lack had no demand.
    #[must_use]
    pub fn demand_is_known(&self) -> bool {
        let read_at = self.view.market.metrics_read_at.get(&self.key().validator);
        read_at.is_some_and(|at| self.view.now().since(*at) < METRICS_MEMORY_MS)
    }

    /// Why it must not be placed at all; none if it may.
    #[must_use]
    pub fn unplaceable(&self, for_job: bool) -> Option<String> {
        self.view.state.unplaceable(self.chute, for_job)
    }

    /// Why it is for another kind of server; none if it is for this one.
    #[must_use]
    pub fn other_kind(&self, server: &ServerView<'_>) -> Option<&'static str> {
        self.view.state.other_kind(self.chute, server.id)
    }

    /// Why it is kept off a GPU type; none if it is not.
    #[must_use]
    pub fn kept_off(&self, short_ref: &str) -> Option<String> {
        self.view.state.kept_off(self.chute, short_ref)
    }

    /// What a copy of it needs. Types that it is kept off are left out.
    #[must_use]
    pub fn need(&self, disk_gb: u32) -> Need {
        let class = |short_ref: &String| {
            let name = (
                &self.key().validator,
                short_ref.as_str(),
                self.chute.definition.tee,
            );
            let class = *self.view.class_by_name.get(&name)?;
            self.kept_off(short_ref).is_none().then_some(class)
        };
        Need {
            classes: self.supported_gpus().iter().filter_map(class).collect(),
            gpu_count: usize::try_from(self.gpu_count()).unwrap_or(usize::MAX),
            disk_gb,
        }
    }

    /// Our copies of it.
    #[must_use]
    pub fn own_copies(&self) -> OwnCopies {
        let mut own = OwnCopies::default();
        for deployment in self.view.state.deployments_of(self.key()) {
            if deployment.job.is_some() {
                continue;
            }
            if !deployment.phase.is_live() {
                own.leaving += u32::from(deployment.earns());
                continue;
            }
            own.live += 1;
            own.current += u32::from(deployment.version == *self.version());
            if deployment.phase != Phase::Serving {
                own.pending += 1;
            } else if self.view.doomed.contains(&deployment.id) {
                own.leaving += 1;
            } else {
                own.serving += 1;
            }
        }
        own
    }

    /// Own copies that are gone but were probably still counted when the network was looked at.
    #[must_use]
    pub fn gone_since_counted(&self) -> u32 {
        let read_at = self
            .market()
            .map(ChuteMarket::instances_read_at)
            .unwrap_or_default();
        let stopped_later = |deployment: &&&Deployment| {
            deployment.job.is_none()
                && deployment.earns()
                && deployment.stop.as_ref().is_some_and(|stop| stop.at >= read_at)
        };
        let count = self.view.gone(self.key()).iter().filter(stopped_later).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// When we last took a copy of it down ourselves, within the last two hours.
    #[must_use]
    pub fn we_stopped_it_at(&self) -> Option<UnixMillis> {
        let stopping = self.view.state.deployments_of(self.key());
        let gone = self.view.gone(self.key()).iter().copied();
        stopping
            .chain(gone)
            .filter(|deployment| deployment.earns() && deployment.job.is_none())
            .filter_map(|deployment| deployment.stop.as_ref())
            .filter(|stop| {
                matches!(
                    stop.reason,
                    StopReason::Preempted(_)
                        | StopReason::Operator(_)
                        | StopReason::Strategy(_)
                        | StopReason::ServerLeaving
                )
            })
            .map(|stop| stop.at)
            .max()
    }
}

//! The strategy that is built in: what a copy earns, divided by what its GPUs cost.
//!
//! It follows the reference's behaviour of September 2025, or the rules of pay of 2026, without the faults
//! that the reference is known for: it goes through the whole list and not only the best entry, refused
//! chutes do not starve others, unknown is not zero, and who makes room is found by sums.
//!
//! A tick does, in this order: replace what validators want replaced, run jobs, earn bounties, fill free
//! GPUs. Each event asks for one of these at once, so a lost event is made good by the next tick.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use protocol::id::{DeploymentId, JobId};

use super::market::LastInvocation;
use super::pay;
use super::preemption::{self, Price};
use super::room::Room;
use super::strategy::{Decision, Failure, Launch, Strategy, Trigger};
use super::view::{
    ChuteView, DISK_GB_DEFAULT, Evictable, Need, OpenJob, OwnCopies, PoolIndex, Superseded, View,
};
use crate::state_machine::chute::ChuteKey;
use crate::state_machine::command::PayProfile;

/// Own copies of one chute under 2025-09.
const COPIES_MAX_2025: u32 = 3;
/// Launches of one pass: each is a request to a validator.
const LAUNCHES_MAX: usize = 256;
/// Searches for victims of one pass: they look at every server.
const SEARCHES_MAX: u32 = 16;
/// Idle time after which the last copy on the network may go (2025-09), in ms.
const IDLE_MS: u64 = 10 * 60_000;
/// The same if it was never used as long as we looked, in ms.
const NEVER_USED_MS: u64 = 24 * 3_600_000;
/// What is left of a launch's pay after its start, which pays little or nothing: 10 minutes of 4 hours.
const START_UP_SHARE: f64 = 0.96;

/// The built-in strategy.
#[derive(Debug, Clone, Default)]
pub struct ValuePerCost {
    /// How long a chute is not launched again after we took a copy of it down ourselves, in ms, up to two
    /// hours. 0 since the validators dropped their rule against this (May 2026).
    pub churn_pause_ms: u64,
}

impl ValuePerCost {
    /// As the configuration names it.
    pub const NAME: &str = "value_per_cost";
}

impl Strategy for ValuePerCost {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn propose(&self, view: &View<'_>, trigger: &Trigger) -> Result<Vec<Decision>, Failure> {
        let mut pass = Pass::new(self, view);
        match trigger {
            Trigger::Tick => {
                for superseded in view.superseded() {
                    pass.replace(superseded);
                }
                for job in view.open_jobs() {
                    pass.run_job(&job);
                }
                pass.earn_bounties();
                pass.fill();
            }
            Trigger::ChuteCreated(key) => match view.chute(key) {
                Some(chute) => pass.try_new(&chute),
                None => pass.nothing(key, "it is not in the catalogue"),
            },
            Trigger::Bounty(key) => match view.chute(key) {
                Some(chute) => pass.earn_bounty(&chute),
                None => pass.nothing(key, "it is not in the catalogue"),
            },
            Trigger::Job(id) => pass.run_job_by_id(id),
            Trigger::RollingUpdate(id) => {
                if let Some(superseded) = view.superseded().iter().find(|superseded| superseded.id == id) {
                    pass.replace(superseded);
                }
            }
        }
        Ok(pass.decisions)
    }
}

/// One call: what is left, and what was decided.
struct Pass<'s, 'v, 'a> {
    settings: &'s ValuePerCost,
    view: &'v View<'a>,
    room: Room<'v, 'a>,
    launches: usize,
    searches: u32,
    decisions: Vec<Decision>,
}

/// A chute that could be launched, with what that is worth now.
#[derive(Debug, Clone, Copy)]
struct Offer {
    value: f64,
    /// Position in the catalogue: of equal values the first one wins.
    chute: Reverse<usize>,
    pool: PoolIndex,
    gain: f64,
}

impl Ord for Offer {
    fn cmp(&self, other: &Self) -> Ordering {
        self.value
            .total_cmp(&other.value)
            .then(self.chute.cmp(&other.chute))
    }
}
impl PartialOrd for Offer {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Offer {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Offer {}

impl<'s, 'v, 'a> Pass<'s, 'v, 'a> {
    fn new(settings: &'s ValuePerCost, view: &'v View<'a>) -> Self {
        Self {
            settings,
            view,
            room: Room::new(view),
            launches: 0,
            searches: 0,
            decisions: Vec::new(),
        }
    }

    fn nothing(&mut self, chute: &ChuteKey, reason: impl Into<String>) {
        self.decisions.push(Decision::Nothing {
            chute: chute.clone(),
            reason: reason.into(),
        });
    }

    /// Fills free GPUs, the most valuable chute first. What a chute is worth falls with its copies and with
    /// the price of what is left, so each is valued again before it is launched.
    fn fill(&mut self) {
        let chutes: Vec<ChuteView<'v, 'a>> = self.view.chutes().collect();
        let mut offers = BinaryHeap::new();
        for (index, chute) in chutes.iter().enumerate() {
            match self.appraise(index, chute) {
                Ok(offer) => offers.push(offer),
                Err(reason) => self.nothing(chute.key(), reason),
            }
        }
        while let Some(Offer {
            chute: Reverse(index),
            ..
        }) = offers.pop()
        {
            let chute = &chutes[index];
            let offer = match self.appraise(index, chute) {
                Ok(offer) => offer,
                Err(reason) => {
                    if self.room.launched(chute.key()) == 0 {
                        self.nothing(chute.key(), reason);
                    }
                    continue;
                }
            };
            if offers.peek().is_some_and(|next| *next > offer) {
                offers.push(offer);
                continue;
            }
            if self.launches >= LAUNCHES_MAX {
                self.nothing(chute.key(), "enough was launched in this pass");
                break;
            }
            let reason = format!("value {:.3}: {}", offer.value, self.earning(offer.gain));
            let need = chute.need(DISK_GB_DEFAULT);
            self.launch(chute, offer.pool, &need, &[], None, offer.value, reason);
            offers.extend(self.appraise(index, chute));
        }
    }

    fn earning(&self, gain: f64) -> String {
        match self.view.pay_profile() {
            PayProfile::Of2025September => format!("one more copy earns {gain:.3} compute units an hour"),
            PayProfile::Of2026 => format!("one more copy earns a multiplier of {gain:.3}"),
        }
    }

    /// What one more copy is worth on free GPUs, or why there should be none.
    fn appraise(&self, index: usize, chute: &ChuteView<'v, 'a>) -> Result<Offer, String> {
        if let Some(why) = chute.unplaceable(false).or_else(|| self.blocked(chute)) {
            return Err(why);
        }
        self.churn_is_over(chute)?;
        let launched = self.room.launched(chute.key());
        let own = chute.own_copies();
        self.may_add(chute, &own, launched)?;
        let gain = pay::gain(self.view, chute, own.pending + launched)?;
        if gain <= 0.0 {
            return Err("one more copy would earn nothing".to_owned());
        }
        let need = chute.need(DISK_GB_DEFAULT);
        let pool = self.room.best(&need).ok_or_else(|| self.no_room(chute, &need))?;
        Ok(Offer {
            value: gain / self.cost_usd(pool, chute.gpu_count()),
            chute: Reverse(index),
            pool,
            gain,
        })
    }

    /// May there be one more copy, given those that there are and those that this pass has launched?
    fn may_add(&self, chute: &ChuteView<'v, 'a>, own: &OwnCopies, launched: u32) -> Result<(), String> {
        let pending = own.pending + launched;
        let instances = chute.market().and_then(super::market::ChuteMarket::instances);
        let first_is_wanted = chute.bounty().is_some() && own.live + launched == 0;
        if chute.is_private() && !first_is_wanted && instances.unwrap_or(0) == 0 {
            return Err("a private chute without a bounty that nobody runs".to_owned());
        }
        let allowance = chute.market().and_then(super::market::ChuteMarket::allowance);
        if allowance.is_some_and(|allowance| allowance <= pending) {
            return Err("the validator wants no more copies".to_owned());
        }
        match self.view.pay_profile() {
            PayProfile::Of2026 => {
                // How many more are wanted is not known: one after the other.
                if allowance.is_none() && pending > 0 {
                    return Err("a copy is starting".to_owned());
                }
            }
            PayProfile::Of2025September => {
                let copies = own.live + launched;
                if copies >= COPIES_MAX_2025 {
                    return Err(format!("there are {copies} own copies"));
                }
                if let Some(demand) = pay::demand(self.view, chute)
                    && copies >= 1
                    && copies >= demand.instances
                    && demand.refused == 0
                    && !chute.is_private()
                {
                    return Err("all instances are ours and no request was refused".to_owned());
                }
            }
        }
        Ok(())
    }

    /// The validator would refuse one more, as far as we know.
    fn blocked(&self, chute: &ChuteView<'v, 'a>) -> Option<String> {
        let utilization = chute.market()?.utilization.as_ref()?;
        if utilization.update_in_progress {
            return Some("it is being updated".to_owned());
        }
        (utilization.scalable == Some(false)).then(|| "the validator does not let it grow".to_owned())
    }

    fn churn_is_over(&self, chute: &ChuteView<'v, 'a>) -> Result<(), String> {
        if self.settings.churn_pause_ms == 0 {
            return Ok(());
        }
        let until = chute
            .we_stopped_it_at()
            .map(|at| at + self.settings.churn_pause_ms);
        match until.filter(|until| *until > self.view.now()) {
            Some(until) => Err(format!("we took a copy down lately; next at {until}")),
            None => Ok(()),
        }
    }

    fn no_room(&self, chute: &ChuteView<'v, 'a>, need: &Need) -> String {
        let supported = chute.supported_gpus();
        let kept_off = supported.iter().find_map(|short_ref| chute.kept_off(short_ref));
        let kept_off = kept_off.map(|why| format!(" ({why})")).unwrap_or_default();
        format!(
            "no server has {} free {} and {} GB of disk{kept_off}",
            need.gpu_count,
            types(chute),
            need.disk_gb
        )
    }

    fn cost_usd(&self, pool: PoolIndex, gpu_count: u32) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "costs are far below 2^53")]
        let one = self.view.server_of(pool).hourly_cost_usd_micros as f64 / 1e6;
        one * f64::from(gpu_count.max(1))
    }

    #[expect(clippy::too_many_arguments, reason = "one decision, member by member")]
    fn launch(
        &mut self,
        chute: &ChuteView<'v, 'a>,
        pool: PoolIndex,
        need: &Need,
        victims: &[Evictable<'a>],
        job: Option<&JobId>,
        value: f64,
        reason: String,
    ) {
        let gpus = self.room.take(pool, chute.key(), need, victims);
        self.launches += 1;
        self.decisions.push(Decision::Launch(Launch {
            chute: chute.key().clone(),
            version: chute.version().clone(),
            server: self.view.server_of(pool).id.clone(),
            gpus,
            victims: victims.iter().map(|victim| victim.id.clone()).collect(),
            job: job.cloned(),
            reason,
            value,
        }));
    }

    /// A new chute gets one copy on free GPUs: nobody knows its demand yet.
    fn try_new(&mut self, chute: &ChuteView<'v, 'a>) {
        let why_not = chute
            .unplaceable(false)
            .or_else(|| self.blocked(chute))
            .or_else(|| {
                let exists = chute.own_copies().live > 0;
                exists.then(|| "a copy of it exists".to_owned())
            });
        let private = chute.is_private() && chute.bounty().is_none();
        let why_not = why_not.or_else(|| private.then(|| "a private chute without a bounty".to_owned()));
        if let Some(why) = why_not {
            return self.nothing(chute.key(), why);
        }
        let need = chute.need(DISK_GB_DEFAULT);
        match self.room.best(&need) {
            Some(pool) => {
                let gain = pay::gain(self.view, chute, 0).unwrap_or(0.0);
                let value = gain / self.cost_usd(pool, chute.gpu_count());
                self.launch(
                    chute,
                    pool,
                    &need,
                    &[],
                    None,
                    value,
                    "the chute is new".to_owned(),
                );
            }
            None => {
                let why = self.no_room(chute, &need);
                self.nothing(chute.key(), why);
            }
        }
    }

    fn earn_bounties(&mut self) {
        let mut chutes: Vec<(f64, ChuteView<'v, 'a>)> = self
            .view
            .bounties()
            .map(|chute| {
                let gain = pay::gain(self.view, &chute, 0).unwrap_or(0.0);
                (gain / f64::from(chute.gpu_count().max(1)), chute)
            })
            .collect();
        chutes.sort_by(|(one, _), (other, _)| other.total_cmp(one));
        for (_, chute) in chutes {
            self.earn_bounty(&chute);
        }
    }

    /// The first instance of a chute: worth evicting others for, if that earns more than they do.
    fn earn_bounty(&mut self, chute: &ChuteView<'v, 'a>) {
        let own = chute.own_copies();
        let is_2026 = self.view.pay_profile() == PayProfile::Of2026;
        let copies = if is_2026 { own.current } else { own.live };
        let cold = chute.market().and_then(super::market::ChuteMarket::instances) == Some(0);
        let why_not = if chute.bounty().is_none() {
            Some("no bounty is open".to_owned())
        } else if copies + self.room.launched(chute.key()) > 0 {
            Some("a copy of it exists".to_owned())
        } else if self.launches >= LAUNCHES_MAX {
            Some("enough was launched in this pass".to_owned())
        } else {
            let blocked = || self.blocked(chute).filter(|_| !cold);
            chute
                .unplaceable(false)
                .or_else(blocked)
                .or_else(|| self.churn_is_over(chute).err())
        };
        if let Some(why) = why_not {
            return self.nothing(chute.key(), why);
        }
        let need = chute.need(DISK_GB_DEFAULT);
        let gain = pay::gain(self.view, chute, own.pending);
        if let Some(pool) = self.room.best(&need) {
            let value = gain.unwrap_or(0.0) / self.cost_usd(pool, chute.gpu_count());
            return self.launch(
                chute,
                pool,
                &need,
                &[],
                None,
                value,
                "a bounty is open".to_owned(),
            );
        }
        if own.live > 0 {
            // The old version still earns, and the bounty only announces the new one.
            let why = "its old version runs, so nobody is evicted for it";
            return self.nothing(chute.key(), why);
        }
        self.preempt(chute, &need, None, gain, "a bounty is open");
    }

    fn run_job_by_id(&mut self, id: &JobId) {
        if let Some(job) = self.view.open_job(id) {
            self.run_job(&job);
        }
    }

    fn run_job(&mut self, job: &OpenJob<'a>) {
        let Some(chute) = self.view.chute(job.chute) else {
            return self.nothing(job.chute, format!("job {}: it is not in the catalogue", job.id));
        };
        if let Some(why) = chute.unplaceable(true) {
            return self.nothing(job.chute, format!("job {}: {why}", job.id));
        }
        if self.launches >= LAUNCHES_MAX {
            return self.nothing(job.chute, "enough was launched in this pass");
        }
        let need = chute.need(job.disk_gb);
        let gain = pay::job_gain(self.view, &chute);
        if let Some(pool) = self.room.best(&need) {
            let value = gain.unwrap_or(0.0) / self.cost_usd(pool, chute.gpu_count());
            let reason = format!("job {}", job.id);
            return self.launch(&chute, pool, &need, &[], Some(job.id), value, reason);
        }
        self.preempt(&chute, &need, Some(job.id), gain, &format!("job {}", job.id));
    }

    /// Makes room, if what is gained is more than what all victims earn together.
    fn preempt(
        &mut self,
        chute: &ChuteView<'v, 'a>,
        need: &Need,
        job: Option<&JobId>,
        gain: Result<f64, String>,
        why: &str,
    ) {
        let no_room = self.no_room(chute, need);
        let gain = match gain {
            Ok(gain) => gain,
            Err(unknown) => return self.nothing(chute.key(), format!("{why}, but {no_room}, and {unknown}")),
        };
        self.searches += 1;
        if self.searches > SEARCHES_MAX {
            return self.nothing(chute.key(), format!("{why}, but {no_room}; victims: next pass"));
        }
        let prices = Prices {
            view: self.view,
            room: &self.room,
        };
        let Some(eviction) = preemption::cheapest(self.view, &self.room, need, chute.key(), &prices) else {
            return self.nothing(
                chute.key(),
                format!("{why}, but {no_room}, and nobody may be evicted"),
            );
        };
        let loss = eviction.loss;
        if gain * START_UP_SHARE <= loss {
            let text = format!("{why}, but {no_room}, and it earns {gain:.3} where {loss:.3} would be lost");
            return self.nothing(chute.key(), text);
        }
        let value = (gain - loss) / self.cost_usd(eviction.pool, chute.gpu_count());
        let count = eviction.victims.len();
        let reason = format!("{why}: earns {gain:.3} where {count} that earn {loss:.3} make room");
        self.launch(chute, eviction.pool, need, &eviction.victims, job, value, reason);
    }

    /// The new version takes the place of the old one: on its GPUs if they still do, elsewhere if not.
    fn replace(&mut self, old: &Superseded<'a>) {
        let Some(chute) = self.view.chute(old.chute) else {
            return self.nothing(old.chute, "it is not in the catalogue");
        };
        if chute.version() != old.version {
            let why = format!("version {} is not the current one", old.version);
            return self.nothing(old.chute, why);
        }
        if let Some(why) = chute.unplaceable(false) {
            return self.nothing(old.chute, format!("{}: {why}", old.id));
        }
        let need = chute.need(DISK_GB_DEFAULT);
        let Some(pool) = old.pool else {
            return self.nothing(old.chute, format!("{}: its GPUs are not all of one pool", old.id));
        };
        let server = self.view.server_of(pool);
        if let Some(why) = server.unavailable.as_ref().filter(|_| !server.only_locked) {
            return self.nothing(old.chute, format!("{}: {}: {why}", old.id, server.name));
        }
        let gain = pay::gain(self.view, &chute, 0).unwrap_or(0.0);
        let short_ref = self.view.short_ref(self.view.pools()[pool].class);
        if let Some(why) = chute.kept_off(short_ref) {
            return self.nothing(old.chute, format!("{}: {why}", old.id));
        }
        if !self.room.has_disk(pool, need.disk_gb) {
            let why = format!("{}: {} lacks {} GB of disk", old.id, server.name, need.disk_gb);
            return self.nothing(old.chute, why);
        }
        let free = if server.only_locked {
            0
        } else {
            self.room.left(pool)
        };
        let runs_on_it = need.classes.contains(&self.view.pools()[pool].class);
        if runs_on_it && old.gpus.len() + free >= need.gpu_count {
            let victim = Evictable {
                id: old.id,
                chute: old.chute,
                gpus: old.gpus,
            };
            let value = gain / self.cost_usd(pool, chute.gpu_count());
            let reason = format!("version {} replaces {}", old.version, old.id);
            return self.launch(&chute, pool, &need, &[victim], None, value, reason);
        }
        let why = if runs_on_it {
            let there = old.gpus.len() + free;
            format!(
                "version {} needs {} GPUs, {there} are there",
                old.version, need.gpu_count
            )
        } else {
            format!("version {} does not run on {short_ref}", old.version)
        };
        self.retire(old, why);
        match self.room.best(&need) {
            Some(pool) => {
                let value = gain / self.cost_usd(pool, chute.gpu_count());
                let reason = format!("version {} replaces {} of another server", old.version, old.id);
                self.launch(&chute, pool, &need, &[], None, value, reason);
            }
            None => {
                let why = format!("{} is not replaced: {}", old.id, self.no_room(&chute, &need));
                self.nothing(old.chute, why);
            }
        }
    }

    fn retire(&mut self, old: &Superseded<'a>, reason: String) {
        let deployment: &'a DeploymentId = old.id;
        self.room.retire(deployment, old.chute);
        self.decisions.push(Decision::Retire {
            deployment: deployment.clone(),
            reason,
        });
    }
}

fn types(chute: &ChuteView<'_, '_>) -> String {
    let types: Vec<&str> = chute.supported_gpus().iter().map(String::as_str).collect();
    types.join(" or ")
}

/// What possible victims earn, and how many copies of a chute may go.
struct Prices<'p, 'v, 'a> {
    view: &'v View<'a>,
    room: &'p Room<'v, 'a>,
}

impl Price for Prices<'_, '_, '_> {
    fn worth(&self, chute: &ChuteKey) -> Option<f64> {
        pay::worth(self.view, &self.view.chute(chute)?)
    }

    fn removable(&self, key: &ChuteKey) -> u32 {
        let Some(chute) = self.view.chute(key) else {
            return 0;
        };
        let own = chute.own_copies();
        let instances = chute.market().and_then(super::market::ChuteMarket::instances);
        // Without a count of the network we must think that ours are all there are.
        let left = instances.map_or(own.serving, |all| {
            all.saturating_sub(own.leaving + chute.gone_since_counted())
        });
        let left = left.saturating_sub(self.room.evicted(key));
        if self.last_may_go(&chute) {
            left
        } else {
            left.saturating_sub(1)
        }
    }
}

impl Prices<'_, '_, '_> {
    /// May the last copy on the network go? Under 2026 its miner would lose its pay.
    fn last_may_go(&self, chute: &ChuteView<'_, '_>) -> bool {
        if self.view.pay_profile() == PayProfile::Of2026 {
            return false;
        }
        let now = self.view.now();
        match chute
            .market()
            .map(|market| market.last_invocation)
            .unwrap_or_default()
        {
            LastInvocation::Unknown => false,
            LastInvocation::At(at) => now.since(at) >= IDLE_MS,
            LastInvocation::NoneSince(at) => now.since(at) >= NEVER_USED_MS,
        }
    }
}

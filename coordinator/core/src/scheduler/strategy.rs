//! What a strategy is, and what guards us against a bad one.

use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};

use protocol::id::{ChuteVersion, DeploymentId, GpuId, JobId, ServerId};

use super::value_per_cost::ValuePerCost;
use super::view::View;
use crate::state_machine::chute::ChuteKey;
use crate::state_machine::command::Placement;

/// How long a strategy may think about one event, in ms.
pub const EVENT_BUDGET_MS: u64 = 50;
/// How long a strategy may think about a tick, in ms.
pub const TICK_BUDGET_MS: u64 = 500;
/// Decisions that are taken from one call.
pub const DECISIONS_MAX: usize = 20_000;

/// Why a strategy is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trigger {
    /// Time passed: look at everything.
    Tick,
    /// A chute is new.
    ChuteCreated(ChuteKey),
    /// A bounty was opened.
    Bounty(ChuteKey),
    /// A job is on offer.
    Job(JobId),
    /// It is a deployment's turn to be replaced by a newer version.
    RollingUpdate(DeploymentId),
}

impl Trigger {
    /// How long the answer may take, in ms.
    #[must_use]
    pub fn budget_ms(&self) -> u64 {
        match self {
            Self::Tick => TICK_BUDGET_MS,
            _ => EVENT_BUDGET_MS,
        }
    }
}

/// A placement that a strategy wants; it has no name yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// What.
    pub chute: ChuteKey,
    /// In which version.
    pub version: ChuteVersion,
    /// Where.
    pub server: ServerId,
    /// On which GPUs.
    pub gpus: Vec<GpuId>,
    /// Who must go for it.
    pub victims: Vec<DeploymentId>,
    /// For which job.
    pub job: Option<JobId>,
    /// Why, for people.
    pub reason: String,
    /// What it was worth to the strategy, in its own unit.
    pub value: f64,
}

impl Launch {
    /// The placement, under a name.
    #[must_use]
    pub fn into_placement(self, deployment: DeploymentId) -> Placement {
        Placement {
            deployment,
            chute: self.chute,
            version: self.version,
            server: self.server,
            gpus: self.gpus,
            victims: self.victims,
            job: self.job,
            reason: self.reason,
        }
    }
}

/// What a strategy says. Decisions are carried out in their order.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Place this.
    Launch(Launch),
    /// Take this down; nothing takes its place there.
    Retire {
        /// Which.
        deployment: DeploymentId,
        /// Why.
        reason: String,
    },
    /// Leave a chute alone.
    Nothing {
        /// Which.
        chute: ChuteKey,
        /// Why.
        reason: String,
    },
}

/// A strategy gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Failure(pub String);

/// Decides what to place where. It sees a view, does nothing itself, and must answer alike when asked alike.
pub trait Strategy: Send + Sync + Debug {
    /// As the configuration names it.
    fn name(&self) -> &'static str;

    /// What to do now.
    ///
    /// # Errors
    /// [`Failure`] if it cannot say. A strategy that runs foreign code bounds its steps and memory itself.
    fn propose(&self, view: &View<'_>, trigger: &Trigger) -> Result<Vec<Decision>, Failure>;
}

/// Names that a configuration may give.
pub const NAMES: [&str; 1] = [ValuePerCost::NAME];

/// The strategy that a configuration names.
#[must_use]
pub fn by_name(name: &str) -> Option<Box<dyn Strategy>> {
    match name {
        ValuePerCost::NAME => Some(Box::new(ValuePerCost::default())),
        _ => None,
    }
}

/// What came out of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What to do.
    pub decisions: Vec<Decision>,
    /// Who decided.
    pub strategy: &'static str,
    /// Why the chosen strategy did not; the operator must see this.
    pub failure: Option<String>,
}

/// A strategy with the built-in one behind it: a failure of the first never stops scheduling.
#[derive(Debug)]
pub struct Scheduler {
    chosen: Box<dyn Strategy>,
    built_in: ValuePerCost,
}

impl Default for Scheduler {
    fn default() -> Self {
        Self::new(Box::new(ValuePerCost::default()))
    }
}

impl Scheduler {
    /// With this strategy.
    #[must_use]
    pub fn new(chosen: Box<dyn Strategy>) -> Self {
        Self {
            chosen,
            built_in: ValuePerCost::default(),
        }
    }

    /// What to do now. `clock_ms` is any clock that grows; it is read before and after.
    pub fn propose(&self, view: &View<'_>, trigger: &Trigger, clock_ms: &dyn Fn() -> u64) -> Plan {
        let started_ms = clock_ms();
        let answer = guarded(self.chosen.as_ref(), view, trigger);
        let elapsed_ms = clock_ms().saturating_sub(started_ms);
        let failure = match answer {
            Ok(decisions) if decisions.len() > DECISIONS_MAX => {
                format!("made {} decisions, {DECISIONS_MAX} are allowed", decisions.len())
            }
            // The built-in one is what we would fall back to: its answer is late, not lost.
            Ok(_) if elapsed_ms > trigger.budget_ms() && self.chosen.name() != ValuePerCost::NAME => {
                format!("took {elapsed_ms} ms of {} ms", trigger.budget_ms())
            }
            Ok(decisions) => {
                return Plan {
                    decisions,
                    strategy: self.chosen.name(),
                    failure: None,
                };
            }
            Err(failure) => failure.0,
        };
        let failure = format!("strategy {}: {failure}", self.chosen.name());
        match guarded(&self.built_in, view, trigger) {
            Ok(decisions) => Plan {
                decisions,
                strategy: ValuePerCost::NAME,
                failure: Some(failure),
            },
            Err(second) => Plan {
                decisions: Vec::new(),
                strategy: ValuePerCost::NAME,
                failure: Some(format!("{failure}; strategy {}: {second}", ValuePerCost::NAME)),
            },
        }
    }
}

fn guarded(strategy: &dyn Strategy, view: &View<'_>, trigger: &Trigger) -> Result<Vec<Decision>, Failure> {
    // The view is only read, and what it gathers late is complete or absent.
    catch_unwind(AssertUnwindSafe(|| strategy.propose(view, trigger))).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Failure(format!("panicked: {}", text.unwrap_or("without a text"))))
    })
}

//! What a cluster that observes would do if it acted: tried on a copy of the state, which is then thrown away. No
//! effect is carried out, nothing is written or proposed.
//!
//! ```text
//! copy --> servers that would be taken over --> SetObserving { false } --> each listing, taken in
//!      --> one pass of the strategy, its decisions carried out --> the same listings once more, 45 s later
//! ```
//! These are the steps of a leader that begins to act, in its order and by the same commands. What comes of the calls at
//! validators is not guessed: a placement stands there as if its launch token had been granted.

use std::collections::{BTreeMap, BTreeSet};

use protocol::hotkey::Hotkey;
use protocol::id::{DeploymentId, InstanceId, ServerId};
use protocol::time::UnixMillis;

use crate::scheduler::command_for;
use crate::scheduler::market::Market;
use crate::scheduler::strategy::{Decision, Launch, Scheduler, Trigger};
use crate::scheduler::view::View;
use crate::state_machine::adoption::Adoption;
use crate::state_machine::chute::ChuteKey;
use crate::state_machine::command::{Command, Listing, Observation};
use crate::state_machine::deployment::{Deployment, StopReason};
use crate::state_machine::effect::{Effect, EffectKind, Subject};
use crate::state_machine::reconcile::SIGHT_MARGIN_MS;
use crate::state_machine::state::{State, Stranger};

/// What a validator listed last.
#[expect(missing_debug_implementations, reason = "a function has none")]
pub struct Listed<'a> {
    /// Whose listing.
    pub validator: Hotkey,
    /// What is wrong to rely on, and when it was asked for; none before the first listing.
    pub observation: Option<Observation>,
    /// What the leader would propose when it takes the listing in, catalogue, bounties and jobs included.
    pub commands: &'a dyn Fn(&State) -> Vec<Command>,
}

/// By what the trial decides.
#[expect(missing_debug_implementations, reason = "functions have none")]
pub struct Means<'a> {
    /// Now.
    pub at: UnixMillis,
    /// Servers of the other miner that count as taken over.
    pub adoptions: Vec<Adoption>,
    /// Of each validator that we work for.
    pub listed: Vec<Listed<'a>>,
    /// What is known of the network.
    pub market: &'a Market,
    /// Who decides.
    pub strategy: &'a Scheduler,
    /// Any clock that grows, in ms.
    pub clock_ms: &'a dyn Fn() -> u64,
}

/// Why less is shown than would be done, or nothing; each with the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// Nobody to work for.
    #[error("no validator is configured: name one in validators.supported")]
    NoValidator,
    /// Nowhere to run anything.
    #[error("no host has joined: the agents of the GPU hosts come first")]
    NoHost,
    /// Nothing is there to decide about.
    #[error(
        "no server works for a validator: `chutes-miner import` takes them over, `chutes-miner import --observe` tries as \
         if it had"
    )]
    NoServer,
    /// It cannot be taken over as it is.
    #[error("server {server} counts as it is here, since it cannot be taken over: {why}")]
    NotTakenOver {
        /// Its name, or its id.
        server: String,
        /// What is in the way.
        why: String,
    },
    /// Nothing is known of the validator.
    #[error(
        "the leader has not read the listing of validator {0} yet: ask again in a minute; if it stays so, look whether \
         the leader's host reaches that validator"
    )]
    NotListed(Hotkey),
    /// Its catalogue proves nothing.
    #[error(
        "the catalogue of validator {0} was empty, cut or refused when it was read last: chutes that are new are not \
         shown; ask again after the next listing"
    )]
    NoCatalogue(Hotkey),
    /// Its list of our instances proves nothing.
    #[error(
        "the instances at validator {0} were not read when they were asked for last: nothing is concluded from them; ask \
         again after the next listing"
    )]
    NoInstances(Hotkey),
}

/// A chute that would be placed.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    /// What, where, on which GPUs, who must go for it, and why.
    pub launch: Launch,
    /// Why the rulebook refuses it all the same; none if it does not.
    pub refused: Option<String>,
}

/// When a deployment would be stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum When {
    /// As soon as the cluster acts and has read the listings.
    AtOnce,
    /// When what replaces it has its launch token.
    WithTheToken,
    /// When the listings say the same once more.
    SecondSight,
}

/// A deployment that would be stopped.
#[derive(Debug, Clone, PartialEq)]
pub struct Stopped {
    /// As it is now.
    pub deployment: Deployment,
    /// When.
    pub when: When,
    /// Why.
    pub why: Why,
}

/// Why a deployment would be stopped.
#[derive(Debug, Clone, PartialEq)]
pub enum Why {
    /// As it is recorded when it happens.
    Reason(StopReason),
    /// It makes room for the placement of this number, from 0.
    MakesRoom(usize),
}

/// An instance that no deployment accounts for.
#[derive(Debug, Clone, PartialEq)]
pub struct Unaccounted {
    /// Which.
    pub instance: InstanceId,
    /// What is known of it.
    pub stranger: Stranger,
    /// It would be deleted at the second sight; if not, the deletion budget of that time is spent.
    pub is_deleted: bool,
}

/// What would be done.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    /// What keeps it from being all.
    pub obstacles: Vec<Obstacle>,
    /// By the first pass of the strategy, in its order.
    pub placed: Vec<Placed>,
    /// Each once; those of each moment together, the first one first.
    pub stopped: Vec<Stopped>,
    /// In order of their names.
    pub unaccounted: Vec<Unaccounted>,
    /// What validators would be told at once, besides what comes with placements.
    pub told: Vec<Effect>,
    /// Chutes that would be left alone, and why.
    pub left_alone: Vec<(ChuteKey, String)>,
    /// Live deployments that would go on.
    pub go_on: usize,
    /// Who decided.
    pub strategy: &'static str,
    /// Why the chosen strategy did not.
    pub strategy_failure: Option<String>,
    /// Names of all chutes that the listings and the record have.
    pub chutes: BTreeMap<ChuteKey, String>,
}

/// Tries on a copy what would be done. The state is to be one that observes.
#[must_use]
pub fn trial(state: &State, means: Means<'_>) -> Trial {
    let Means {
        at,
        adoptions,
        listed,
        market,
        strategy,
        clock_ms,
    } = means;
    let mut copy = state.without_answers();
    let mut obstacles = take_over(&mut copy, at, adoptions);
    obstacles.extend(in_the_way(&copy, &listed));
    let before = live(&copy);

    let _ = copy.rehearse(at, Command::SetObserving { observing: false });
    for validator in &listed {
        for command in (validator.commands)(&copy) {
            // What is rejected would be logged and no more.
            let _ = copy.rehearse(at, command);
        }
    }
    let told = copy
        .outbox()
        .iter()
        .filter(|effect| copy.effect_is_wanted(effect));
    let told = told.cloned().collect();
    let chutes = copy.chutes().iter();
    let chutes = chutes.map(|(key, chute)| (key.clone(), chute.definition.name.clone()));
    let chutes = chutes.collect();
    let plan = strategy.propose(&View::new(&copy, market), &Trigger::Tick, clock_ms);
    let (mut placed, mut left_alone) = (Vec::new(), Vec::new());
    for decision in plan.decisions {
        let command = command_for(decision.clone(), &copy, name(placed.len()));
        let answer = command.map(|command| copy.rehearse(at, command));
        match decision {
            Decision::Launch(launch) => placed.push(Placed {
                launch,
                refused: answer
                    .and_then(Result::err)
                    .map(|rejection| rejection.to_string()),
            }),
            Decision::Nothing { chute, reason } => left_alone.push((chute, reason)),
            Decision::Retire { .. } => {}
        }
    }
    let mut stopped = Stops::default();
    stopped.add_gone(&before, &copy, When::AtOnce);
    stopped.add_victims(&placed, &copy);
    look_again(&mut copy, at + SIGHT_MARGIN_MS, &listed);
    stopped.add_gone(&before, &copy, When::SecondSight);
    Trial {
        obstacles,
        placed,
        unaccounted: unaccounted(&copy),
        told,
        left_alone,
        go_on: before.len() - stopped.rows.len(),
        stopped: stopped.rows,
        chutes,
        strategy: plan.strategy,
        strategy_failure: plan.failure,
    }
}

/// Servers of the other miner, as the operator would take them over before the cluster acts.
fn take_over(copy: &mut State, at: UnixMillis, adoptions: Vec<Adoption>) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    for adoption in adoptions {
        let server = adoption.server.clone();
        if let Err(rejection) = copy.rehearse(at, Command::AdoptServer(adoption)) {
            obstacles.push(Obstacle::NotTakenOver {
                server: name_of(copy, &server),
                why: rejection.to_string(),
            });
        }
    }
    obstacles
}

fn name_of(state: &State, server: &ServerId) -> String {
    let known = state.servers().get(server);
    known.map_or_else(|| server.to_string(), |server| server.facts.name.clone())
}

fn in_the_way(state: &State, listed: &[Listed<'_>]) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    if listed.is_empty() {
        obstacles.push(Obstacle::NoValidator);
    }
    if state.servers().is_empty() {
        obstacles.push(Obstacle::NoHost);
    } else if state.servers().values().all(|server| server.enrolment.is_none()) {
        obstacles.push(Obstacle::NoServer);
    }
    for Listed {
        validator,
        observation,
        ..
    } in listed
    {
        let Some(observation) = observation else {
            obstacles.push(Obstacle::NotListed(validator.clone()));
            continue;
        };
        if !matches!(&observation.chutes, Listing::Known(chutes) if !chutes.is_empty()) {
            obstacles.push(Obstacle::NoCatalogue(validator.clone()));
        }
        if observation.instances == Listing::Unknown {
            obstacles.push(Obstacle::NoInstances(validator.clone()));
        }
    }
    obstacles
}

/// The deployments that are not being stopped.
fn live(state: &State) -> Vec<Deployment> {
    let live = state.deployments().values().filter(|it| it.phase.is_live());
    live.cloned().collect()
}

/// Each deployment that would be stopped, at the first moment that does it.
#[derive(Default)]
struct Stops {
    rows: Vec<Stopped>,
    known: BTreeSet<DeploymentId>,
}

impl Stops {
    fn add(&mut self, deployment: &Deployment, when: When, why: Why) {
        if self.known.insert(deployment.id.clone()) {
            let deployment = deployment.clone();
            self.rows.push(Stopped {
                deployment,
                when,
                why,
            });
        }
    }

    /// Those that were live before and are being stopped now, or gone already.
    fn add_gone(&mut self, before: &[Deployment], after: &State, when: When) {
        for deployment in before {
            let gone = || after.audits().get(&deployment.id).map(|audit| &audit.deployment);
            let now = after.deployments().get(&deployment.id).or_else(gone);
            let Some(stop) = now.and_then(|now| now.stop.as_ref()) else {
                continue;
            };
            let why = match &stop.reason {
                StopReason::Preempted(other) | StopReason::Superseded(other) => number_of(other),
                _ => None,
            };
            let why = why.map_or_else(|| Why::Reason(stop.reason.clone()), Why::MakesRoom);
            self.add(deployment, when, why);
        }
    }

    /// Those that wait for the token of what replaces them. What needs none has stopped them at once.
    fn add_victims(&mut self, placed: &[Placed], after: &State) {
        for (number, placed) in placed.iter().enumerate().filter(|(_, it)| it.refused.is_none()) {
            for victim in &placed.launch.victims {
                if let Some(deployment) = after.deployments().get(victim) {
                    self.add(deployment, When::WithTheToken, Why::MakesRoom(number));
                }
            }
        }
    }
}

/// The same listings a while later.
fn look_again(copy: &mut State, at: UnixMillis, listed: &[Listed<'_>]) {
    for observation in listed.iter().filter_map(|it| it.observation.clone()) {
        let again = Observation {
            read_at: observation.read_at + SIGHT_MARGIN_MS,
            ..observation
        };
        let _ = copy.rehearse(at, Command::Observe(again));
    }
}

fn unaccounted(after: &State) -> Vec<Unaccounted> {
    let strangers = after.strangers().iter();
    strangers
        .map(|(instance, stranger)| {
            let subject = Subject::Instance(instance.clone());
            let mut waiting = after.outbox().of_subject(&subject);
            Unaccounted {
                instance: instance.clone(),
                stranger: stranger.clone(),
                is_deleted: waiting.any(|effect| matches!(effect.kind, EffectKind::DeleteInstance { .. })),
            }
        })
        .collect()
}

/// What a placement is called, on the copy only.
const NAME: &str = "trial-placement-";

fn name(number: usize) -> DeploymentId {
    DeploymentId::parse(&format!("{NAME}{number}")).expect("letters, digits and dashes")
}

fn number_of(name: &DeploymentId) -> Option<usize> {
    name.as_str().strip_prefix(NAME)?.parse().ok()
}

//! Bad strategies do no harm.

use std::cell::Cell;

use coordinator_core::scheduler::command_for;
use coordinator_core::scheduler::strategy::{
    DECISIONS_MAX, Decision, Failure, Launch, Scheduler, Strategy, TICK_BUDGET_MS, Trigger, by_name,
};
use coordinator_core::scheduler::view::View;
use coordinator_core::state_machine::command::{PayProfile, Rejection};
use protocol::id::DeploymentId;

use crate::fleet::{Fleet, key, launches, multiplier, server_id, version};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Bad {
    Panics,
    Fails,
    IsSlow,
    TalksTooMuch,
    BreaksRules,
}

impl Strategy for Bad {
    fn name(&self) -> &'static str {
        "bad"
    }

    fn propose(&self, view: &View<'_>, _: &Trigger) -> Result<Vec<Decision>, Failure> {
        match self {
            Self::Panics => panic!("by intention: {}", view.servers().len()),
            Self::Fails => Err(Failure("out of ideas".to_owned())),
            Self::IsSlow => Ok(vec![]),
            Self::TalksTooMuch => {
                let nothing = Decision::Nothing {
                    chute: key("c"),
                    reason: String::new(),
                };
                Ok(vec![nothing; DECISIONS_MAX + 1])
            }
            Self::BreaksRules => Ok(vec![Decision::Launch(Launch {
                chute: key("c"),
                version: version("v1"),
                server: server_id("s"),
                gpus: vec![],
                victims: vec![],
                job: None,
                reason: "why not".to_owned(),
                value: f64::NAN,
            })]),
        }
    }
}

fn fleet() -> Fleet {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.server("s", 1, "a6000", 0.3);
    let c = fleet.chute("c", 1, &["a6000"]);
    fleet.know(&c, multiplier(1.0, 1));
    fleet
}

#[test]
fn the_built_in_strategy_takes_over_and_says_why() {
    for (bad, failure) in [
        (Bad::Panics, "strategy bad: panicked: by intention: 1"),
        (Bad::Fails, "strategy bad: out of ideas"),
        (Bad::IsSlow, "strategy bad: took 501 ms of 500 ms"),
        (
            Bad::TalksTooMuch,
            "strategy bad: made 20001 decisions, 20000 are allowed",
        ),
    ] {
        let fleet = fleet();
        let view = View::new(&fleet.state, &fleet.market);
        let time = Cell::new(0);
        let clock = || {
            let now = time.get();
            time.set(now + if bad == Bad::IsSlow { TICK_BUDGET_MS + 1 } else { 1 });
            now
        };
        let plan = Scheduler::new(Box::new(bad)).propose(&view, &Trigger::Tick, &clock);
        assert_eq!(plan.failure.as_deref(), Some(failure));
        assert_eq!(plan.strategy, "value_per_cost");
        assert_eq!(launches(&plan.decisions).len(), 1, "scheduling goes on");
    }
}

#[test]
fn what_breaks_a_rule_is_refused_by_the_state_machine() {
    let mut fleet = fleet();
    let view = View::new(&fleet.state, &fleet.market);
    let plan = Scheduler::new(Box::new(Bad::BreaksRules)).propose(&view, &Trigger::Tick, &|| 0);
    assert_eq!((plan.strategy, &plan.failure), ("bad", &None));
    let id = DeploymentId::parse("new").unwrap();
    let command = command_for(plan.decisions[0].clone(), &fleet.state, id).unwrap();
    assert!(matches!(fleet.apply(command), Err(Rejection::Placement(_))));
}

#[test]
fn only_what_is_superseded_may_be_retired_before_its_time() {
    let mut fleet = fleet();
    let d = fleet.serving(&key("c"), "s");
    let retire = Decision::Retire {
        deployment: d,
        reason: "no reason".to_owned(),
    };
    let id = DeploymentId::parse("new").unwrap();
    let command = command_for(retire, &fleet.state, id).unwrap();
    assert!(matches!(fleet.apply(command), Err(Rejection::Protected { .. })));
}

#[test]
fn strategies_are_chosen_by_name() {
    assert_eq!(
        by_name("value_per_cost").map(|s| s.name()),
        Some("value_per_cost")
    );
    assert!(by_name("other").is_none());
}

//! What an observing cluster says that it would do: case by case, and, whatever the fleet, what is really done when the
//! same state acts and the same listing comes.

use std::collections::{BTreeMap, BTreeSet};

use coordinator_core::scheduler::command_for;
use coordinator_core::scheduler::strategy::{Decision, Launch, Scheduler, Trigger};
use coordinator_core::state_machine::adoption::Adoption;
use coordinator_core::state_machine::chute::ChuteCode;
use coordinator_core::state_machine::command::{ListedInstance, Listing, Observation, PayProfile};
use coordinator_core::state_machine::deployment::StopReason;
use coordinator_core::state_machine::effect::{EffectKind, Subject};
use coordinator_core::state_machine::reconcile::SIGHT_MARGIN_MS;
use coordinator_core::state_machine::{Command, State};
use coordinator_core::trial::{Listed, Means, Obstacle, Trial, When, Why, trial};
use protocol::id::{ChuteId, ConfigId, DeploymentId, InstanceId};
use protocol::time::UnixMillis;

use crate::fleet::{Fleet, HOUR, definition, demand, key, server_id, validator, version};
use crate::random_fleets;

impl Fleet {
    /// Serves `old` on the one GPU since long, and observes since now.
    fn observing(old: &str) -> (Self, DeploymentId) {
        let mut fleet = Self::new(PayProfile::Of2025September);
        fleet.server("s", 1, "a6000", 0.3);
        let old = fleet.chute(old, 1, &["a6000"]);
        fleet.know(&old, demand(10.0, 5, 4, 0));
        let serves = fleet.serving(&old, "s");
        fleet.pass(3 * HOUR);
        fleet.observe(true);
        (fleet, serves)
    }

    fn observe(&mut self, observing: bool) {
        self.ok(Command::SetObserving { observing });
    }

    /// A listing that agrees with the record.
    fn listing(&self) -> Observation {
        let chutes = self.state.chutes().iter();
        let chutes = chutes.map(|(key, chute)| (key.chute.clone(), chute.definition.version.clone()));
        let live = self.state.deployments().values().filter(|it| it.phase.is_live());
        let instances = live.filter_map(|it| {
            Some(ListedInstance {
                instance: it.instance.clone()?,
                chute: it.chute.chute.clone(),
                config: it.config.clone(),
                active: it.facts.active_at.is_some(),
                verified: it.facts.verified_at.is_some(),
            })
        });
        Observation {
            validator: validator(1),
            read_at: self.now,
            chutes: Listing::Known(chutes.collect()),
            instances: Listing::Known(instances.collect()),
            gpus: Listing::Unknown,
        }
    }

    fn try_out(&self, listing: &Observation) -> Trial {
        self.try_with(listing, &[], Vec::new())
    }

    fn try_with(&self, listing: &Observation, news: &[Command], adoptions: Vec<Adoption>) -> Trial {
        let before = bytes(&self.state);
        let commands = |_: &State| [news, &[Command::Observe(listing.clone())]].concat();
        let listed = Listed {
            validator: validator(1),
            observation: Some(listing.clone()),
            commands: &commands,
        };
        let tried = self.try_means(vec![listed], adoptions);
        assert_eq!(bytes(&self.state), before);
        tried
    }

    fn try_means(&self, listed: Vec<Listed<'_>>, adoptions: Vec<Adoption>) -> Trial {
        let means = Means {
            at: self.now,
            adoptions,
            listed,
            market: &self.market,
            strategy: &Scheduler::default(),
            clock_ms: &|| 0,
        };
        trial(&self.state, means)
    }
}

/// Every row as it is stored.
fn bytes(state: &State) -> Vec<(u8, Vec<u8>, Option<Vec<u8>>)> {
    let rows = state.clone().drain_rows();
    rows.into_iter()
        .map(|row| (row.table, row.key, row.value))
        .collect()
}

fn stops(tried: &Trial) -> Vec<(&str, When, &Why)> {
    let stopped = tried.stopped.iter();
    stopped
        .map(|it| (it.deployment.id.as_str(), it.when, &it.why))
        .collect()
}

fn stranger(name: &str) -> ListedInstance {
    ListedInstance {
        instance: InstanceId::parse(name).unwrap(),
        chute: ChuteId::parse("elsewhere").unwrap(),
        config: Some(ConfigId::parse(&format!("config-of-{name}")).unwrap()),
        active: true,
        verified: true,
    }
}

fn instances(listing: &mut Observation) -> &mut Vec<ListedInstance> {
    match &mut listing.instances {
        Listing::Known(instances) => instances,
        Listing::Unknown => panic!("it is known"),
    }
}

#[test]
fn a_chute_that_only_the_listing_has_is_placed() {
    let mut fleet = Fleet::new(PayProfile::Of2025September);
    fleet.server("s", 2, "a6000", 0.3);
    fleet.observe(true);
    let new = key("new");
    fleet.know(&new, demand(100.0, 5, 1, 0));
    let news = Command::RecordChute {
        definition: definition("new", 2, &["a6000"]),
        code: ChuteCode {
            filename: "app.py".to_owned(),
            code: "print()".to_owned(),
            ref_str: "app:chute".to_owned(),
        },
    };
    let mut listing = fleet.listing();
    listing.chutes = Listing::Known(vec![(new.chute.clone(), version("v1"))]);
    let tried = fleet.try_with(&listing, &[news], Vec::new());
    assert_eq!(tried.obstacles, []);
    let [placed] = &tried.placed[..] else {
        panic!("{tried:?}");
    };
    assert_eq!((&placed.launch.chute, placed.launch.gpus.len()), (&new, 2));
    assert_eq!((&placed.launch.server, &placed.refused), (&server_id("s"), &None));
    assert!(placed.launch.reason.starts_with("value "), "{placed:?}");
    assert_eq!(tried.chutes[&new], "new");
    assert!(tried.stopped.is_empty() && tried.told.is_empty() && tried.unaccounted.is_empty());
    assert!(fleet.state.chutes().is_empty(), "it was tried on a copy");
}

#[test]
fn who_must_go_for_a_bounty_is_named() {
    let (mut fleet, serves) = Fleet::observing("old");
    let bounty = fleet.chute("bounty", 1, &["a6000"]);
    fleet.know(&bounty, demand(100_000.0, 500, 0, 50));
    fleet.bounty(&bounty, 5000);
    let tried = fleet.try_out(&fleet.listing());
    assert_eq!(tried.placed.len(), 1, "{tried:?}");
    assert_eq!(tried.placed[0].launch.victims, std::slice::from_ref(&serves));
    let expected = (serves.as_str(), When::WithTheToken, &Why::MakesRoom(0));
    assert_eq!((stops(&tried), tried.go_on), (vec![expected], 0));
}

/// A chute that needs no token stops those in its way at once, and their reason names what only the copy has.
#[test]
fn what_needs_no_token_makes_room_at_once() {
    let (mut fleet, serves) = Fleet::observing("old");
    let mut legacy = definition("bounty", 1, &["a6000"]);
    legacy.chutes_version = Some("0.2.9".to_owned());
    let bounty = fleet.publish(legacy);
    fleet.know(&bounty, demand(100_000.0, 500, 0, 50));
    fleet.bounty(&bounty, 5000);
    let tried = fleet.try_out(&fleet.listing());
    let expected = (serves.as_str(), When::AtOnce, &Why::MakesRoom(0));
    assert_eq!(stops(&tried), [expected]);
}

#[test]
fn what_only_one_side_has_is_acted_on_at_the_second_sight() {
    let (fleet, serves) = Fleet::observing("old");
    let mut listing = fleet.listing();
    *instances(&mut listing) = ["x", "y", "z"].map(stranger).to_vec();
    let tried = fleet.try_out(&listing);
    let unaccounted = tried.unaccounted.iter();
    let unaccounted = unaccounted.map(|it| (it.instance.as_str(), it.is_deleted));
    assert_eq!(
        unaccounted.collect::<Vec<_>>(),
        [("x", true), ("y", true), ("z", false)],
        "two deletions are in the budget of a small fleet"
    );
    assert_eq!((stops(&tried), tried.go_on), (vec![], 1), "the budget is spent");

    instances(&mut listing).truncate(1);
    let tried = fleet.try_out(&listing);
    let missing = Why::Reason(StopReason::InstanceMissing);
    assert_eq!(stops(&tried), [(serves.as_str(), When::SecondSight, &missing)]);

    // Unknown is not empty.
    listing.instances = Listing::Unknown;
    let tried = fleet.try_out(&listing);
    assert_eq!(stops(&tried), []);
    assert_eq!(tried.obstacles, [Obstacle::NoInstances(validator(1))]);
}

#[test]
fn a_chute_that_is_not_listed_goes_with_its_copies() {
    let (fleet, serves) = Fleet::observing("old");
    let mut listing = fleet.listing();
    listing.chutes = Listing::Known(vec![(ChuteId::parse("other").unwrap(), version("v1"))]);
    let tried = fleet.try_out(&listing);
    let deleted = Why::Reason(StopReason::ChuteDeleted);
    assert_eq!(stops(&tried), [(serves.as_str(), When::SecondSight, &deleted)]);
    assert_eq!(tried.chutes[&key("old")], "old", "the name is known all the same");
}

#[test]
fn what_waits_for_validators_is_told() {
    let (mut fleet, serves) = Fleet::observing("old");
    let instance = fleet.deployment(&serves).instance.clone().unwrap();
    fleet.ok(Command::StopDeployments {
        deployments: vec![serves],
        reason: StopReason::Operator("a test".to_owned()),
        allowance: coordinator_core::state_machine::command::Allowance {
            loss: true,
            ..Default::default()
        },
    });
    assert!(
        fleet.state.outbox().is_empty(),
        "nobody is told while it observes"
    );
    let tried = fleet.try_out(&fleet.listing());
    let told: Vec<&EffectKind> = tried.told.iter().map(|effect| &effect.kind).collect();
    let deletion = EffectKind::DeleteInstance {
        chute: key("old").chute,
        instance,
    };
    assert_eq!(told, [&deletion]);
}

#[test]
fn a_server_that_was_being_added_is_announced() {
    let (mut fleet, _) = Fleet::observing("old");
    fleet.observe(false);
    let mut facts = fleet.state.servers().get(&server_id("s")).unwrap().facts.clone();
    (facts.server, facts.name) = (server_id("t"), "t".to_owned());
    facts.devices[0].uuid = protocol::id::GpuId::from_device_uuid(&"f".repeat(32)).unwrap();
    fleet.ok(Command::RecordHost { facts });
    fleet.ok(Command::EnrolServer {
        server: server_id("t"),
        validator: validator(1),
        gpu_short_ref: "a6000".to_owned(),
        hourly_cost_usd_micros: 300_000,
    });
    fleet.observe(true);
    let tried = fleet.try_out(&fleet.listing());
    let announced = EffectKind::AdvertiseGpus {
        server: server_id("t"),
    };
    let told: Vec<&EffectKind> = tried.told.iter().map(|effect| &effect.kind).collect();
    assert_eq!(told, [&announced]);
}

#[test]
fn a_server_of_the_other_miner_counts_as_if_it_was_taken_over() {
    let mut fleet = Fleet::new(PayProfile::Of2025September);
    fleet.server("s", 2, "a6000", 0.3);
    fleet.ok(Command::RemoveServer {
        server: server_id("s"),
        jobs: false,
    });
    fleet.tell_validator();
    fleet.tell_validator();
    fleet.observe(true);
    let chute = fleet.chute("new", 2, &["a6000"]);
    fleet.know(&chute, demand(100.0, 5, 1, 0));
    let listing = fleet.listing();
    let alone = fleet.try_out(&listing);
    assert_eq!(
        (&alone.obstacles[..], alone.placed.len()),
        (&[Obstacle::NoServer][..], 0)
    );

    let facts = &fleet.state.servers().get(&server_id("s")).unwrap().facts;
    let gpus = facts.devices.iter().map(|device| (device.uuid.clone(), true));
    let mut adoption = Adoption {
        server: server_id("s"),
        validator: validator(1),
        gpu_short_ref: "a6000".to_owned(),
        hourly_cost_usd_micros: 300_000,
        seed: None,
        locked: false,
        gpus: gpus.collect(),
        deployments: vec![],
    };
    let tried = fleet.try_with(&listing, &[], vec![adoption.clone()]);
    assert_eq!((&tried.obstacles[..], tried.placed.len()), (&[][..], 1));
    adoption.gpus.clear();
    let tried = fleet.try_with(&listing, &[], vec![adoption]);
    let text: Vec<String> = tried.obstacles.iter().map(ToString::to_string).collect();
    assert!(text[0].contains("server s counts as it is here"), "{text:?}");
    assert!(text[0].contains("it has no GPUs there"), "{text:?}");
}

#[test]
fn what_is_in_the_way_is_said_with_the_way_out() {
    let mut fleet = Fleet::new(PayProfile::Of2026);
    fleet.observe(true);
    let said = |tried: Trial| tried.obstacles;
    assert_eq!(
        said(fleet.try_means(vec![], vec![])),
        [Obstacle::NoValidator, Obstacle::NoHost]
    );
    let nothing = |_: &State| vec![];
    let unread = || Listed {
        validator: validator(1),
        observation: None,
        commands: &nothing,
    };
    let mut listing = fleet.listing();
    (listing.chutes, listing.instances) = (Listing::Unknown, Listing::Unknown);
    let unknown = Listed {
        observation: Some(listing),
        ..unread()
    };
    assert_eq!(
        said(fleet.try_means(vec![unread()], vec![])),
        [Obstacle::NoHost, Obstacle::NotListed(validator(1))]
    );
    assert_eq!(
        said(fleet.try_means(vec![unknown], vec![])),
        [
            Obstacle::NoHost,
            Obstacle::NoCatalogue(validator(1)),
            Obstacle::NoInstances(validator(1))
        ]
    );
}

/// What a fleet does from the moment it acts until the listing was taken in twice.
#[derive(Debug, Default, PartialEq)]
struct Done {
    placed: Vec<(Launch, Option<String>)>,
    stopped: BTreeMap<DeploymentId, bool>,
    deleted: BTreeSet<InstanceId>,
}

impl Done {
    fn tried(tried: Trial) -> Self {
        let at_token = |it: &&coordinator_core::trial::Stopped| it.when != When::WithTheToken;
        let stopped = tried.stopped.iter().filter(at_token);
        let deleted = tried.unaccounted.iter().filter(|it| it.is_deleted);
        Self {
            stopped: stopped
                .map(|it| (it.deployment.id.clone(), it.when == When::AtOnce))
                .collect(),
            deleted: deleted.map(|it| it.instance.clone()).collect(),
            placed: tried
                .placed
                .into_iter()
                .map(|it| (it.launch, it.refused))
                .collect(),
        }
    }

    /// Carried out on the fleet itself, command by command.
    fn really(fleet: &mut Fleet, listing: &Observation) -> Self {
        let live = |fleet: &Fleet| -> BTreeSet<DeploymentId> {
            let live = fleet.state.deployments().values().filter(|it| it.phase.is_live());
            live.map(|it| it.id.clone()).collect()
        };
        let mut done = Self::default();
        let before = live(fleet);
        fleet.observe(false);
        let _ = fleet.apply(Command::Observe(listing.clone()));
        for (number, decision) in fleet.plan(Trigger::Tick).into_iter().enumerate() {
            let id = DeploymentId::parse(&format!("really-{number}")).unwrap();
            let command = command_for(decision.clone(), &fleet.state, id);
            let answer = command.map(|command| fleet.apply(command));
            if let Decision::Launch(launch) = decision {
                let refused = answer
                    .and_then(Result::err)
                    .map(|rejection| rejection.to_string());
                done.placed.push((launch, refused));
            }
        }
        let at_once = live(fleet);
        fleet.now = fleet.now + SIGHT_MARGIN_MS;
        let mut again = listing.clone();
        again.read_at = again.read_at + SIGHT_MARGIN_MS;
        let _ = fleet.apply(Command::Observe(again));
        let victims: BTreeSet<&DeploymentId> = done
            .placed
            .iter()
            .filter(|(_, refused)| refused.is_none())
            .flat_map(|(launch, _)| &launch.victims)
            .collect();
        let after = live(fleet);
        for id in before.difference(&after) {
            let is_at_once = !at_once.contains(id);
            // A victim that waits for the token is shown as such, whatever the listings bring.
            if is_at_once || !victims.contains(id) {
                done.stopped.insert(id.clone(), is_at_once);
            }
        }
        for instance in fleet.state.strangers().keys() {
            let subject = Subject::Instance(instance.clone());
            if fleet.state.outbox().of_subject(&subject).next().is_some() {
                done.deleted.insert(instance.clone());
            }
        }
        done
    }
}

#[test]
fn what_is_said_is_what_is_done() {
    let (mut placed, mut with_victims, mut at_once, mut later, mut deleted) = (0, 0, 0, 0, 0);
    for seed in 0..200 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut fleet = random_fleets::grown(seed, random.u32(0..14));
        fleet.observe(true);
        fleet.pass(random.u64(0..4 * HOUR));
        let chutes: Vec<_> = fleet.state.chutes().keys().cloned().collect();
        for chute in chutes.iter().step_by(random.usize(1..4)) {
            fleet.bounty(chute, random.u64(1..50_000));
        }
        let mut listing = fleet.listing();
        listing.read_at = UnixMillis(fleet.now.0 - random.u64(0..60_000));
        instances(&mut listing).retain(|_| random.u8(..6) > 0);
        let strangers = (0..random.u8(..4)).map(|number| stranger(&format!("stranger-{number}")));
        instances(&mut listing).extend(strangers);
        if let Listing::Known(chutes) = &mut listing.chutes {
            chutes.retain(|_| random.u8(..8) > 0);
        }
        if random.u8(..8) == 0 {
            listing.instances = Listing::Unknown;
        }
        let tried = Done::tried(fleet.try_out(&listing));
        let done = Done::really(&mut fleet, &listing);
        assert_eq!(tried, done, "seed {seed}");
        fleet.check("the end");
        placed += done.placed.len();
        with_victims += done
            .placed
            .iter()
            .filter(|(launch, _)| !launch.victims.is_empty())
            .count();
        at_once += done.stopped.values().filter(|is_at_once| **is_at_once).count();
        later += done.stopped.values().filter(|is_at_once| !**is_at_once).count();
        deleted += done.deleted.len();
    }
    assert!(placed > 150 && with_victims > 10 && at_once > 2 && later > 40 && deleted > 100);
}

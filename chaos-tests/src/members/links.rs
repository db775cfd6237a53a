//! Five members and a host without a vote. All that members and hosts say to each other goes through relays, one in front of each member, and all that a
//! member says to the validator through a gate. They are spoilt in one way after the other; after each the cluster
//! must be whole again within a bound.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};

use super::cluster::{Way, member_doors};
use super::trial::{ASK_EVERY, Place, Trial};
use super::{Common, Outcome};
use crate::faults::gate::Gate;
use crate::faults::relay::{Direction, Quality, Relay};

/// So many can lose two and go on.
const MEMBERS: usize = 5;
/// How long each fault lasts.
const FAULT: Duration = Duration::from_secs(12);
/// A host that is cut off counts as silent after half a minute, and that is noticed every five seconds.
const FAULT_OF_HOSTS: Duration = Duration::from_secs(45);
/// Everything must be well again so soon after a fault.
const RECOVERY_MAX: Duration = Duration::from_secs(60);
/// Writes must go on so soon, where a majority hears each other.
const WRITES_MAX: Duration = Duration::from_secs(20);
const READ_PATIENCE: Duration = Duration::from_secs(10);
/// A leader heard every member so lately.
const HEARD_MS_MAX: u64 = 3_000;

/// Spoils the links of five members and a host without a vote.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Links {
    /// Only these faults, by their names in the figures (repeatable)
    #[arg(long = "only")]
    pub only: Vec<String>,
    /// What all of them may be told.
    #[command(flatten)]
    pub common: Common,
}

/// What goes wrong, with its name in the figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    LeaderAlone,
    LeaderWithMinority,
    LeaderUnheard,
    LeaderDeaf,
    Loss,
    LongWay,
    Flapping,
    HostsCutFromVoters,
    ValidatorCutFromLeader,
    SiteCut,
}

const FAULTS: [(Fault, &str); 10] = [
    (Fault::LeaderAlone, "leader_alone"),
    (Fault::LeaderWithMinority, "leader_with_minority"),
    (Fault::LeaderUnheard, "leader_unheard"),
    (Fault::LeaderDeaf, "leader_deaf"),
    (Fault::Loss, "loss_30_percent"),
    (Fault::LongWay, "round_trip_200_ms"),
    (Fault::Flapping, "flapping"),
    (Fault::HostsCutFromVoters, "hosts_cut_from_voters"),
    (Fault::ValidatorCutFromLeader, "validator_cut_from_leader"),
    (Fault::SiteCut, "site_cut"),
];

impl Fault {
    fn lasts(self) -> Duration {
        match self {
            Self::HostsCutFromVoters => FAULT_OF_HOSTS,
            _ => FAULT,
        }
    }
}

/// What everything goes through.
struct Between {
    relays: Vec<Relay>,
    gates: Vec<Gate>,
    /// Members send from the address of their door.
    addresses: Vec<IpAddr>,
}

impl Between {
    /// Datagrams from one member to another are like this from now on, whoever began to speak.
    fn set(&self, from: usize, to: usize, quality: Quality) {
        self.relays[to].set_for(self.addresses[from], Direction::There, quality);
        self.relays[from].set_for(self.addresses[to], Direction::Back, quality);
    }

    fn set_both(&self, one: usize, other: usize, quality: Quality) {
        self.set(one, other, quality);
        self.set(other, one, quality);
    }

    /// These and all others hear nothing of each other.
    fn isolate(&self, group: &[usize]) {
        for one in group {
            for other in (0..MEMBERS).filter(|other| !group.contains(other)) {
                self.set_both(*one, other, Quality::CUT);
            }
        }
    }

    fn set_all(&self, quality: Quality) {
        for one in 0..MEMBERS {
            for other in (0..MEMBERS).filter(|other| *other != one) {
                self.set(one, other, quality);
            }
        }
    }

    fn heal(&self) {
        for relay in &self.relays {
            relay.heal();
        }
        for gate in &self.gates {
            gate.cut(false);
        }
    }

    /// Begins a fault; `leader` leads.
    fn begin(&self, fault: Fault, leader: usize) {
        let next = (leader + 1) % MEMBERS;
        let others = (0..MEMBERS).filter(|other| *other != leader);
        match fault {
            Fault::LeaderAlone | Fault::Flapping => self.isolate(&[leader]),
            Fault::LeaderWithMinority => self.isolate(&[leader, next]),
            Fault::SiteCut => self.isolate(&[next, (leader + 2) % MEMBERS]),
            Fault::LeaderUnheard => others.for_each(|other| self.set(leader, other, Quality::CUT)),
            Fault::LeaderDeaf => others.for_each(|other| self.set(other, leader, Quality::CUT)),
            Fault::Loss => self.set_all(Quality {
                loss: 0.3,
                ..Quality::default()
            }),
            Fault::LongWay => self.set_all(Quality {
                delay: Duration::from_millis(100),
                ..Quality::default()
            }),
            Fault::HostsCutFromVoters => {
                for relay in &self.relays {
                    relay.set_both(Quality::CUT);
                }
                // What members say to each other is not meant.
                self.set_all(Quality::default());
            }
            Fault::ValidatorCutFromLeader => self.gates[leader].cut(true),
        }
    }
}

impl Links {
    /// Runs it on a cluster of its own.
    ///
    /// # Errors
    /// When there is no cluster to spoil; whatever goes wrong then is a reason in the outcome.
    pub async fn run(&self) -> anyhow::Result<Outcome> {
        let place = Place::prepare(&self.common, "auto", MEMBERS).await?;
        let (between, ways) = between(&place).await?;
        let mut trial = Trial::begin(place, &ways, &|_, _| {}, READ_PATIENCE).await?;
        let mut figures = Map::new();
        for (fault, name) in FAULTS {
            if !self.only.is_empty() && !self.only.iter().any(|only| only == name) {
                continue;
            }
            let came = spoil(&mut trial, &between, fault).await;
            between.heal();
            match came {
                Ok(times) => {
                    figures.insert(name.to_owned(), times);
                }
                Err(error) => trial.complain(format!("{name}: {error:#}")),
            }
        }
        trial.conclude(Value::Object(figures)).await
    }
}

/// A relay in front of each member, a gate in front of the validator for each.
async fn between(place: &Place) -> anyhow::Result<(Between, Vec<Way>)> {
    let ready = crate::storm::doors::ready(&place.plan.data)?;
    let validator = ready["api_url"]
        .as_str()
        .and_then(|url| url.strip_prefix("http://"));
    let validator = validator.context("the stand-in's address")?.parse()?;
    let mut between = Between {
        relays: Vec::new(),
        gates: Vec::new(),
        addresses: Vec::new(),
    };
    let mut ways = Vec::new();
    for door in member_doors(place.network, MEMBERS) {
        let (relay, gate) = (Relay::start(door, 1).await?, Gate::start(validator).await?);
        ways.push(Way {
            advertise: Some(relay.address()),
            validator: Some(gate.address()),
            observes: false,
        });
        between.relays.push(relay);
        between.gates.push(gate);
        between.addresses.push(door.ip());
    }
    ways.push(Way {
        observes: true,
        ..Way::default()
    });
    Ok((between, ways))
}

/// One fault from its beginning to the recovery from it.
async fn spoil(trial: &mut Trial, between: &Between, fault: Fault) -> anyhow::Result<Value> {
    trial.cluster.must_run()?;
    trial.give_something_to_do().await?;
    let (leader, _) = trial.cluster.leader().await?;
    let began = Instant::now();
    between.begin(fault, leader);
    let write = tokio::time::timeout(WRITES_MAX, trial.written_after(began)).await;
    let write = write.context("no write is acknowledged while it lasts")??;
    while began.elapsed() < fault.lasts() {
        if fault == Fault::Flapping {
            let cut = began.elapsed().as_secs().is_multiple_of(2);
            let quality = if cut { Quality::CUT } else { Quality::default() };
            for other in (0..MEMBERS).filter(|other| *other != leader) {
                between.set_both(leader, other, quality);
            }
        }
        sleep(ASK_EVERY).await;
    }
    if fault == Fault::HostsCutFromVoters {
        let missing = missing(trial).await?;
        let silent = missing.iter().any(|what| what.starts_with("server"));
        anyhow::ensure!(silent, "a host that is cut off counts as reachable");
    }
    let ledger = trial.read_ledger().await?;
    let healed = Instant::now();
    between.heal();
    until_whole(trial, healed).await?;
    let whole = healed.elapsed();
    let mut times = json!({ "next_write_ms": ms(write), "whole_again_ms": ms(whole) });
    if fault == Fault::ValidatorCutFromLeader {
        // An authentication after the cut is the proof that the validator hears us again.
        let back = tokio::time::timeout(2 * RECOVERY_MAX, trial.authenticated_after(ledger)).await;
        back.context("the validator's socket is not back")??;
        times["authenticated_again_ms"] = json!(ms(healed.elapsed()));
    }
    Ok(times)
}

/// Waits until one leads, hears all, all answer, and every host is heard.
async fn until_whole(trial: &Trial, healed: Instant) -> anyhow::Result<()> {
    loop {
        let missing = missing(trial).await;
        match missing {
            Ok(missing) if missing.is_empty() => break,
            other => anyhow::ensure!(
                healed.elapsed() < RECOVERY_MAX,
                "not whole after {RECOVERY_MAX:?}: {other:?}"
            ),
        }
        sleep(5 * ASK_EVERY).await;
    }
    for member in 0..MEMBERS {
        trial.cluster.until_it_answers(member).await?;
    }
    Ok(())
}

async fn missing(trial: &Trial) -> anyhow::Result<BTreeSet<String>> {
    let mut missing = BTreeSet::new();
    let raft = trial.doors.get("/v1/raft").await?;
    let rows = raft["members"].as_array().context("members")?;
    for row in rows.iter().filter(|row| row["leads"] != true) {
        let ago = row["answered_ago_ms"].as_u64();
        if ago.is_none_or(|ago| ago > HEARD_MS_MAX) {
            missing.insert(format!("{} was heard {ago:?} ms ago", row["host"]));
        }
    }
    if !rows.iter().any(|row| row["leads"] == true) {
        missing.insert("a leader".to_owned());
    }
    let state = trial.doors.state().await?;
    for server in state["servers"].as_array().into_iter().flatten() {
        if server["reachable"] != true {
            missing.insert(format!("server {}", server["name"]));
        }
    }
    Ok(missing)
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

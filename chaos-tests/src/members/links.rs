//! Five members and a host without a vote, whose links are spoilt in one way after the other; after each the cluster
//! must be whole again within a bound.
//!
//! - `relays.rs`: all that members and hosts say to each other goes through relays, one in front of each member, and
//!   all that a member says to the validator through a gate;
//! - `hosts.rs`: each is in a network namespace of its own, and the kernel drops what shall not arrive.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};

use super::trial::{ASK_EVERY, Place, Trial};
use super::{Common, Outcome};
use crate::faults::relay::Quality;

mod hosts;
mod relays;

pub use hosts::Forward;

use hosts::Hosts;
use relays::Relays;

/// So many can lose two and go on.
const MEMBERS: usize = 5;
/// How long each fault lasts.
const FAULT: Duration = Duration::from_secs(12);
/// A host that is cut off counts as silent after half a minute, and that is noticed every five seconds.
const FAULT_OF_HOSTS: Duration = Duration::from_secs(45);
/// Everything must be well again so soon after a fault.
const RECOVERY_MAX: Duration = Duration::from_secs(60);
/// Within this time the stand-in has pinged a socket and closed it if there was no answer: 25 s and 20 s.
const PINGED_WITHIN: Duration = Duration::from_secs(46);
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
    /// Each member in a network namespace of its own, with cuts by the kernel instead of relays; needs root
    #[arg(long)]
    pub namespaces: bool,
    /// How long each fault lasts, but that of a host without a vote
    #[arg(long)]
    pub fault_seconds: Option<u64>,
    /// The network of namespaces that this process runs in already
    #[arg(long, hide = true)]
    pub within: Option<String>,
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
    PortsChange,
    HostsCutFromVoters,
    ValidatorCutFromLeader,
    SiteCut,
}

const FAULTS: [(Fault, &str); 11] = [
    (Fault::LeaderAlone, "leader_alone"),
    (Fault::LeaderWithMinority, "leader_with_minority"),
    (Fault::LeaderUnheard, "leader_unheard"),
    (Fault::LeaderDeaf, "leader_deaf"),
    (Fault::Loss, "loss_30_percent"),
    (Fault::LongWay, "round_trip_200_ms"),
    (Fault::Flapping, "flapping"),
    (Fault::PortsChange, "ports_change"),
    (Fault::HostsCutFromVoters, "hosts_cut_from_voters"),
    (Fault::ValidatorCutFromLeader, "validator_cut_from_leader"),
    (Fault::SiteCut, "site_cut"),
];

/// What everything goes through.
enum Between {
    Relays(Relays),
    Hosts(Hosts),
}

impl Between {
    /// From now on nothing that the first of each pair says to the second arrives.
    fn cut(&self, pairs: &[(usize, usize)]) -> anyhow::Result<()> {
        match self {
            Self::Relays(relays) => relays.cut(pairs),
            Self::Hosts(hosts) => return hosts.cut(pairs),
        }
        Ok(())
    }

    /// These and all other members hear nothing of each other.
    fn isolate(&self, group: &[usize]) -> anyhow::Result<()> {
        let outside = || (0..MEMBERS).filter(|other| !group.contains(other));
        let pairs = group
            .iter()
            .flat_map(|one| outside().map(move |other| (*one, other)));
        let both: Vec<_> = pairs
            .flat_map(|(one, other)| [(one, other), (other, one)])
            .collect();
        self.cut(&both)
    }

    fn heal(&self) -> anyhow::Result<()> {
        match self {
            Self::Relays(relays) => relays.heal(),
            Self::Hosts(hosts) => return hosts.heal(),
        }
        Ok(())
    }

    /// Begins a fault; `leader` leads.
    fn begin(&self, fault: Fault, leader: usize) -> anyhow::Result<()> {
        let next = (leader + 1) % MEMBERS;
        let others = (0..MEMBERS).filter(|other| *other != leader);
        match (fault, self) {
            (Fault::LeaderAlone | Fault::Flapping, _) => self.isolate(&[leader])?,
            (Fault::LeaderWithMinority, _) => self.isolate(&[leader, next])?,
            (Fault::SiteCut, _) => self.isolate(&[next, (leader + 2) % MEMBERS])?,
            (Fault::LeaderUnheard, _) => {
                self.cut(&others.map(|other| (leader, other)).collect::<Vec<_>>())?
            }
            (Fault::LeaderDeaf, _) => self.cut(&others.map(|other| (other, leader)).collect::<Vec<_>>())?,
            (Fault::Loss, Self::Relays(relays)) => relays.set_all(Quality {
                loss: 0.3,
                ..Quality::default()
            }),
            (Fault::LongWay, Self::Relays(relays)) => relays.set_all(Quality {
                delay: Duration::from_millis(100),
                ..Quality::default()
            }),
            (Fault::PortsChange, Self::Relays(relays)) => relays.change_ports(),
            (Fault::Loss | Fault::LongWay | Fault::PortsChange, Self::Hosts(_)) => {
                anyhow::bail!("only relays lose some datagrams, delay them, or change ports");
            }
            (Fault::HostsCutFromVoters, Self::Relays(relays)) => relays.cut_hosts(),
            (Fault::HostsCutFromVoters, Self::Hosts(hosts)) => hosts.cut_observer()?,
            (Fault::ValidatorCutFromLeader, Self::Relays(relays)) => relays.cut_validator_from(leader),
            (Fault::ValidatorCutFromLeader, Self::Hosts(hosts)) => hosts.cut_validator_from(leader)?,
        }
        Ok(())
    }
}

impl Links {
    fn lasts(&self, fault: Fault) -> Duration {
        match fault {
            Fault::HostsCutFromVoters => FAULT_OF_HOSTS,
            _ => self.fault_seconds.map_or(FAULT, Duration::from_secs),
        }
    }

    /// Runs it on a cluster of its own.
    ///
    /// # Errors
    /// When there is no cluster to spoil; whatever goes wrong then is a reason in the outcome.
    pub async fn run(&self) -> anyhow::Result<Outcome> {
        if self.namespaces && self.within.is_none() {
            return hosts::run_within(self).await;
        }
        let network = self.within.as_deref().map(hosts::enter).transpose()?;
        let mut place = Place::prepare(&self.common, "auto", MEMBERS).await?;
        let (between, ways) = match network {
            Some(network) => {
                let (hosts, ways) = Hosts::around(&mut place, network).await?;
                (Between::Hosts(hosts), ways)
            }
            None => {
                let (relays, ways) = Relays::around(&place).await?;
                (Between::Relays(relays), ways)
            }
        };
        let mut trial = Trial::begin(place, &ways, &|_, _| {}, READ_PATIENCE).await?;
        let mut figures = Map::new();
        for (fault, name) in FAULTS {
            let asked_for = self.only.is_empty() || self.only.iter().any(|only| only == name);
            let by_relays_only = matches!(fault, Fault::Loss | Fault::LongWay | Fault::PortsChange);
            if !asked_for || (self.namespaces && by_relays_only) {
                continue;
            }
            let came = spoil(&mut trial, &between, fault, self.lasts(fault)).await;
            between.heal()?;
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

/// One fault from its beginning to the recovery from it.
async fn spoil(trial: &mut Trial, between: &Between, fault: Fault, lasts: Duration) -> anyhow::Result<Value> {
    trial.cluster.must_run()?;
    trial.give_something_to_do().await?;
    let (leader, _) = trial.cluster.leader().await?;
    between.begin(fault, leader)?;
    // Not earlier: the kernel is told host by host, and a write in between may get through.
    let began = Instant::now();
    let write = tokio::time::timeout(WRITES_MAX, trial.written_after(began)).await;
    let write = write.context("no write is acknowledged while it lasts")??;
    let mut is_cut = true;
    while began.elapsed() < lasts {
        let cut = began.elapsed().as_secs().is_multiple_of(2);
        if cut != is_cut {
            is_cut = cut;
            match fault {
                Fault::Flapping if cut => between.isolate(&[leader])?,
                Fault::Flapping => between.heal()?,
                Fault::PortsChange => between.begin(fault, leader)?,
                _ => {}
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
    between.heal()?;
    until_whole(trial, healed).await?;
    let whole = healed.elapsed();
    let mut times = json!({ "next_write_ms": ms(write), "whole_again_ms": ms(whole) });
    if fault == Fault::ValidatorCutFromLeader {
        let heard = tokio::time::timeout(2 * RECOVERY_MAX, until_heard(trial, ledger, healed)).await;
        heard.context("the validator's socket is not back")??;
        times["validator_hears_ms"] = json!(ms(healed.elapsed()));
    }
    Ok(times)
}

/// Waits until the validator hears us again: a socket authenticates, or the one of before a short cut has answered the
/// validator's pings since.
async fn until_heard(trial: &mut Trial, ledger: u64, healed: Instant) -> anyhow::Result<()> {
    loop {
        trial.read_ledger().await?;
        let outlived = healed.elapsed() > PINGED_WITHIN && trial.socket_is_open();
        if outlived || trial.authenticated_since(ledger).is_some() {
            return Ok(());
        }
        sleep(5 * ASK_EVERY).await;
    }
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

//! Each member, and the host without a vote, in a network namespace of its own; the validator stand-in and this
//! process, which writes, reads and cuts, in one more.
//!
//! An agent that runs chutes as processes takes no validator but one on its own machine. So in each namespace
//! something listens where the stand-in does in its own, and passes on what it hears.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::sync::Arc;

use anyhow::Context;
use rustix::process::{Signal, set_parent_process_death_signal};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::{Links, MEMBERS, Outcome};
use crate::faults::gate::Gate;
use crate::faults::network::Network;
use crate::members::cluster::{Ground, Way, host_of};
use crate::members::trial::Place;
use crate::storm::doors;

/// Where the host without a vote is.
const OBSERVER: usize = MEMBERS;
/// Where the stand-in and this process are.
const OPERATOR: usize = MEMBERS + 1;

/// Makes the namespaces and runs this program within.
pub(super) async fn run_within(options: &Links) -> anyhow::Result<Outcome> {
    let network = Network::create(host_of(OPERATOR))?;
    let mut command = network.command(host_of(OPERATOR), std::env::current_exe()?);
    command.args(["links", "--namespaces", "--within", network.name()]);
    for only in &options.only {
        command.args(["--only", only]);
    }
    if let Some(seconds) = options.fault_seconds {
        command.args(["--fault-seconds", &seconds.to_string()]);
    }
    if let Some(seed) = options.common.seed {
        command.args(["--seed", &seed.to_string()]);
    }
    if let Some(agent) = &options.common.agent {
        command.arg("--agent").arg(agent);
    }
    let mut command = Command::from(command);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let output = command.spawn()?.wait_with_output().await?;
    let said = String::from_utf8_lossy(&output.stdout);
    let figures = said.lines().last().context("the program within says nothing")?;
    let figures: Value = serde_json::from_str(figures)?;
    let reasons = figures["reasons"].as_array().into_iter().flatten();
    Ok(Outcome {
        reasons: reasons
            .map(|reason| reason.as_str().unwrap_or_default().to_owned())
            .collect(),
        figures,
    })
}

/// The namespaces, seen from within. Without who made them there is nothing to do there but to end what runs in them.
pub(super) fn enter(name: &str) -> anyhow::Result<Arc<Network>> {
    let network = Network::of_another(name.to_owned(), host_of(OPERATOR));
    set_parent_process_death_signal(Some(Signal::TERM))?;
    Ok(Arc::new(network))
}

/// Who is in them.
pub(super) struct Hosts {
    network: Arc<Network>,
    validator: u16,
    _gates: Vec<Gate>,
    _forwards: Vec<Child>,
}

impl Hosts {
    /// Those of a cluster that is not there yet, and how its hosts are reached.
    pub(super) async fn around(place: &mut Place, network: Arc<Network>) -> anyhow::Result<(Self, Vec<Way>)> {
        place.ground = Ground::Hosts(Arc::clone(&network));
        let ready = doors::ready(&place.plan.data)?;
        let api = doors::stand_in_address(&ready)?;
        let sites = ready["sites"].as_array().into_iter().flatten();
        let sites = sites.filter_map(|site| site["address"].as_str()?.parse::<SocketAddr>().ok());
        let ports: Vec<u16> = [api]
            .into_iter()
            .chain(sites)
            .map(|address| address.port())
            .collect();
        let here = Network::address(host_of(OPERATOR));
        let mut gates = Vec::new();
        for port in &ports {
            let target = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
            gates.push(Gate::start_at(SocketAddr::from((here, *port)), target).await?);
        }
        let mut forwards = Vec::new();
        for member in 0..=OBSERVER {
            forwards.push(forward(&network, member, here, &ports).await?);
        }
        let ways = (0..=OBSERVER).map(|host| Way {
            observes: host == OBSERVER,
            ..Way::default()
        });
        let hosts = Self {
            network,
            validator: api.port(),
            _gates: gates,
            _forwards: forwards,
        };
        Ok((hosts, ways.collect()))
    }

    pub(super) fn cut(&self, pairs: &[(usize, usize)]) -> anyhow::Result<()> {
        let hosts = pairs.iter().map(|(from, to)| (host_of(*from), host_of(*to)));
        self.network.cut(&hosts.collect::<Vec<_>>())
    }

    /// Members hear nothing of the host without a vote, and it nothing of them.
    pub(super) fn cut_observer(&self) -> anyhow::Result<()> {
        let both = (0..MEMBERS).flat_map(|member| [(member, OBSERVER), (OBSERVER, member)]);
        self.cut(&both.collect::<Vec<_>>())
    }

    pub(super) fn cut_validator_from(&self, member: usize) -> anyhow::Result<()> {
        self.network
            .cut_service(host_of(OPERATOR), self.validator, host_of(member))
    }

    pub(super) fn heal(&self) -> anyhow::Result<()> {
        self.network.heal()
    }
}

/// Starts what passes the stand-in's ports on, on one host, and waits until it listens.
async fn forward(network: &Network, member: usize, to: Ipv4Addr, ports: &[u16]) -> anyhow::Result<Child> {
    let mut command = network.command(host_of(member), std::env::current_exe()?);
    command.args(["forward", "--to", &to.to_string()]);
    for port in ports {
        command.args(["--port", &port.to_string()]);
    }
    let mut command = Command::from(command);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().context("start what passes ports on")?;
    let said = child.stdout.take().context("its standard output")?;
    let line = BufReader::new(said).lines().next_line().await?;
    line.context("what passes ports on has ended")?;
    Ok(child)
}

/// Passes connections on from ports of this machine to the same ports of another.
#[derive(Debug, Clone, clap::Args)]
pub struct Forward {
    /// Where they go
    #[arg(long)]
    to: Ipv4Addr,
    /// Which ports (repeatable)
    #[arg(long = "port")]
    ports: Vec<u16>,
}

impl Forward {
    /// Says a line once it listens.
    ///
    /// # Errors
    /// When a port is taken.
    pub async fn run(&self, out: &mut impl std::io::Write) -> anyhow::Result<()> {
        let mut gates = Vec::new();
        for port in &self.ports {
            let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
            gates.push(Gate::start_at(listen, SocketAddr::from((self.to, *port))).await?);
        }
        writeln!(out, "listens")?;
        out.flush()?;
        std::future::pending().await
    }
}

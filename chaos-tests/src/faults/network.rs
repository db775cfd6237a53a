//! Hosts with networks of their own: one namespace each, joined by a bridge in another, and cuts between them
//! by nftables.
//!
//! Nothing outside is touched: the bridge and both ends of every cable lie in the namespaces, which have no way
//! out of this machine. What runs in them ends with them.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::process::Command;

use kubernetes_control_plane::ends_with_us;

use super::{run, signal};

/// The longest packet of each cable: the least that there is with IPv6.
const MTU_BYTES: &str = "1280";

/// Namespaces on one bridge; they are deleted, and what runs in them is killed, when this is dropped by whichever of
/// the processes that know them comes first.
#[derive(Debug)]
pub struct Network {
    name: String,
    hosts: u8,
}

impl Network {
    /// Makes so many hosts, numbered from 1.
    ///
    /// # Errors
    /// What `ip` or `nft` said: they need root.
    pub fn create(hosts: u8) -> anyhow::Result<Self> {
        // Several may exist on one machine.
        let name = format!("chaos{}x{:04x}", std::process::id(), fastrand::u16(..));
        let network = Self { name, hosts };
        let switch = network.switch();
        run("ip", &["netns", "add", &switch])?;
        run("ip", &["-n", &switch, "link", "add", "bridge0", "type", "bridge"])?;
        run("ip", &["-n", &switch, "link", "set", "bridge0", "up"])?;
        for host in 1..=hosts {
            network.add(host)?;
        }
        Ok(network)
    }

    /// A network that another process has created.
    #[must_use]
    pub fn of_another(name: String, hosts: u8) -> Self {
        Self { name, hosts }
    }

    /// What other processes find it by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn add(&self, host: u8) -> anyhow::Result<()> {
        let (switch, space, port) = (self.switch(), self.namespace(host), format!("port{host}"));
        let address = format!("{}/24", Self::address(host));
        run("ip", &["netns", "add", &space])?;
        let cable = [
            "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &space,
        ];
        run("ip", &[&["-n", switch.as_str()], cable.as_slice()].concat())?;
        for (space, end) in [(&switch, port.as_str()), (&space, "eth0")] {
            run("ip", &["-n", space, "link", "set", end, "mtu", MTU_BYTES])?;
        }
        run(
            "ip",
            &["-n", &switch, "link", "set", &port, "master", "bridge0", "up"],
        )?;
        run("ip", &["-n", &space, "link", "set", "lo", "up"])?;
        run("ip", &["-n", &space, "address", "add", &address, "dev", "eth0"])?;
        run("ip", &["-n", &space, "link", "set", "eth0", "up"])?;
        let rules = "add table inet chaos; add chain inet chaos in { type filter hook input priority 0; }";
        self.nft(host, rules)
    }

    fn nft(&self, host: u8, rules: &str) -> anyhow::Result<()> {
        run("ip", &["netns", "exec", &self.namespace(host), "nft", rules]).map(drop)
    }

    fn switch(&self) -> String {
        format!("{}s", self.name)
    }

    /// The name of a host's namespace.
    #[must_use]
    pub fn namespace(&self, host: u8) -> String {
        format!("{}h{host}", self.name)
    }

    /// A host's address, the same in every network. It looks like a public one, since validators take no other; no
    /// packet leaves the namespaces.
    #[must_use]
    pub fn address(host: u8) -> Ipv4Addr {
        Ipv4Addr::new(11, 77, 0, host)
    }

    /// A command that will run on a host, and end with this process.
    #[must_use]
    pub fn command(&self, host: u8, program: impl AsRef<OsStr>) -> Command {
        let mut command = ends_with_us("KILL", "ip");
        command
            .args(["netns", "exec", &self.namespace(host)])
            .arg(program);
        command
    }

    /// From now on nothing that `from` sends arrives at `to`.
    ///
    /// # Errors
    /// What `nft` said.
    pub fn cut_one_way(&self, from: u8, to: u8) -> anyhow::Result<()> {
        self.cut(&[(from, to)])
    }

    /// From now on nothing that the first of each pair sends arrives at the second.
    ///
    /// # Errors
    /// What `nft` said.
    pub fn cut(&self, pairs: &[(u8, u8)]) -> anyhow::Result<()> {
        (1..=self.hosts).try_for_each(|to| {
            let from = pairs.iter().filter(|(_, target)| *target == to);
            let rules: String = from
                .map(|(from, _)| {
                    let address = Self::address(*from);
                    format!("add rule inet chaos in ip saddr {address} drop;")
                })
                .collect();
            if rules.is_empty() {
                Ok(())
            } else {
                self.nft(to, &rules)
            }
        })
    }

    /// From now on no answer of a TCP service of `from` arrives at `to`.
    ///
    /// # Errors
    /// What `nft` said.
    pub fn cut_service(&self, from: u8, port: u16, to: u8) -> anyhow::Result<()> {
        let address = Self::address(from);
        let rule = format!("add rule inet chaos in ip saddr {address} tcp sport {port} drop");
        self.nft(to, &rule)
    }

    /// From now on these hosts and all others hear nothing of each other.
    ///
    /// # Errors
    /// What `nft` said.
    pub fn isolate(&self, group: &[u8]) -> anyhow::Result<()> {
        let outside = || (1..=self.hosts).filter(|host| !group.contains(host));
        let pairs = group
            .iter()
            .flat_map(|inside| outside().map(|outside| (*inside, outside)));
        let both: Vec<(u8, u8)> = pairs
            .flat_map(|(one, other)| [(one, other), (other, one)])
            .collect();
        self.cut(&both)
    }

    /// Whether `to` answers a ping of `from` within a second.
    ///
    /// # Errors
    /// When there is no `ping`.
    pub fn hears(&self, from: u8, to: u8) -> anyhow::Result<bool> {
        let to = Self::address(to).to_string();
        let mut ping = self.command(from, "ping");
        let output = ping.args(["-n", "-c", "1", "-W", "1", &to]).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        // It says so on standard output when nobody answers.
        anyhow::ensure!(said.trim().is_empty(), "ping: {}", said.trim());
        Ok(output.status.success())
    }

    /// All cuts end.
    ///
    /// # Errors
    /// What `nft` said.
    pub fn heal(&self) -> anyhow::Result<()> {
        (1..=self.hosts).try_for_each(|host| self.nft(host, "flush chain inet chaos in"))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let hosts = (1..=self.hosts).map(|host| self.namespace(host));
        for namespace in hosts.chain([self.switch()]) {
            // It may not have come so far, or another process was first.
            let within = run("ip", &["netns", "pids", &namespace]).unwrap_or_default();
            let within = within.lines().filter_map(|line| line.trim().parse().ok());
            for pid in within.filter(|pid| *pid != std::process::id()) {
                // It may have ended.
                let _ = signal::kill(pid);
            }
            let _ = run("ip", &["netns", "delete", &namespace]);
        }
    }
}

/// Whether namespaces and cuts work here.
pub(super) fn probe() -> anyhow::Result<()> {
    let network = Network::create(2)?;
    anyhow::ensure!(network.hears(1, 2)?, "one namespace does not hear the other");
    network.isolate(&[1])?;
    anyhow::ensure!(
        !network.hears(1, 2)?,
        "one namespace hears the other through a cut"
    );
    network.heal()
}

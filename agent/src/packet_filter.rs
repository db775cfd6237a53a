//! The packet filter: what pods of this host reach of the host itself, and of what lies around it.
//!
//! ```text
//! pod --> an address of this host   before and after translation (NodePorts, ClusterIPs): doors only
//!     --> metadata services         no
//!     --> anything else             not our business: network policies, the egress door
//! ```
//!
//! One nftables table of our own, replaced as a whole and never flushed: nobody else's rules are touched, and none of
//! ours can be half there. Pods are told by the interface on which their packets come in, or by their network. All of
//! them are refused but those of the namespaces that are trusted: the cluster's DNS asks the API server, which is on
//! this host. Whoever is not known is refused, so that a pod that starts while nobody looks is refused as well.
//!
//! The table stays when the agent ends, since chutes go on. Where it was switched off, the next start removes it.
//!
//! Reading order: [`rules`] (the table as text; pure), [`table`] (the program `nft`), [`trusted`] (which pods are).

pub mod rules;
pub mod table;
pub mod trusted;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::Client;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::timeout;

use self::rules::{Door, Network, Pattern, Protocol, Rules};
use self::table::Table;

/// It is made anew so often, as it was: somebody may flush all rules of the host.
const RENEW_EVERY: Duration = Duration::from_secs(20);

/// Settings as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawConfig {
    /// Keep pods from all addresses of this host but its doors, and from metadata services, by a table of nftables
    /// (`kubernetes` only). Needs the program `nft` and the right `NET_ADMIN`; without them no chute is started. Switched
    /// off again, the table is removed at the next start.
    pub enabled: bool,
    /// Interfaces on which packets of pods come in; a `*` at the end stands for anything.
    pub interfaces: Vec<String>,
    /// Networks of pods, such as `10.42.0.0/16`: whatever comes from there is a pod's too, on any interface. Needed where
    /// pods of other nodes get here without a tunnel, and where no interface is known.
    pub networks: Vec<String>,
    /// Ports of this host that pods reach nonetheless, such as `"udp/53"` of a name server on the host. The egress door
    /// is open by itself, unless it is on loopback, where no pod gets.
    pub open: Vec<String>,
    /// Networks around this host that pods do not reach either, such as other nodes' addresses; metadata services never.
    pub refused: Vec<String>,
    /// Namespaces whose pods are not filtered, such as that of the cluster's DNS, which asks the API server. The agent
    /// must be allowed to list pods there.
    pub trusted_namespaces: Vec<String>,
}

impl Default for RawConfig {
    fn default() -> Self {
        let interfaces = [
            "cni0",
            "cbr0",
            "veth*",
            "flannel*",
            "cali*",
            "vxlan.calico",
            "tunl0",
            "lxc*",
        ];
        Self {
            enabled: false,
            interfaces: interfaces.map(str::to_owned).to_vec(),
            networks: Vec::new(),
            open: Vec::new(),
            refused: Vec::new(),
            trusted_namespaces: vec!["kube-system".to_owned()],
        }
    }
}

/// Settings as checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What is let through.
    pub rules: Rules,
    /// Namespaces whose pods are not filtered.
    pub trusted_namespaces: Vec<String>,
}

impl Config {
    /// Checks settings; `egress_door` is where chutes connect. None if it is switched off.
    ///
    /// # Errors
    /// What is wrong, naming the key.
    pub fn check(written: &RawConfig, egress_door: SocketAddr) -> Result<Option<Self>, String> {
        if !written.enabled {
            return Ok(None);
        }
        let interfaces: Vec<Pattern> = all("interfaces", &written.interfaces)?;
        let networks: Vec<Network> = all("networks", &written.networks)?;
        if interfaces.is_empty() && networks.is_empty() {
            return Err(
                "packet_filter.interfaces and packet_filter.networks are both empty: no pod would be \
                        filtered"
                    .to_owned(),
            );
        }
        let mut doors: Vec<Door> = all("open", &written.open)?;
        if !egress_door.ip().is_loopback() {
            doors.push(Door {
                protocol: Protocol::Tcp,
                address: Some(egress_door.ip()).filter(|address| !address.is_unspecified()),
                port: egress_door.port(),
            });
        }
        Ok(Some(Self {
            rules: Rules {
                interfaces,
                networks,
                doors,
                refused: all("refused", &written.refused)?,
            },
            trusted_namespaces: written.trusted_namespaces.clone(),
        }))
    }
}

fn all<T: std::str::FromStr<Err = String>>(key: &str, texts: &[String]) -> Result<Vec<T>, String> {
    let read = |text: &String| {
        text.parse()
            .map_err(|error| format!("packet_filter.{key}: {error}"))
    };
    texts.iter().map(read).collect()
}

/// Why pods are not filtered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program.
    #[error(transparent)]
    Table(#[from] table::Error),
    /// The file in which it is noted that there is a table.
    #[error("note the table in {path}: {source}")]
    Note {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// What interfaces there are.
    #[error("look at the interfaces of this host: {0}")]
    Interfaces(#[source] io::Error),
    /// Rules that would not do what they should.
    #[error("{0}")]
    Useless(String),
}

/// The filter, installed.
#[derive(Debug)]
pub struct Filter {
    rules: Rules,
    table: Table,
    trusted: watch::Receiver<BTreeSet<IpAddr>>,
    renew_every: Duration,
}

impl Filter {
    /// Installs it; `folder` is the agent's, in which it is noted.
    ///
    /// # Errors
    /// [`Error`]: then no chute must be started.
    pub async fn install(
        rules: Rules,
        table: Table,
        trusted: watch::Receiver<BTreeSet<IpAddr>>,
        folder: &Path,
    ) -> Result<Self, Error> {
        useful(&rules, &interfaces().map_err(Error::Interfaces)?).map_err(Error::Useless)?;
        // First, so that a crash leaves no table of which nobody knows.
        note(folder)?;
        let mut filter = Self {
            rules,
            table,
            trusted,
            renew_every: RENEW_EVERY,
        };
        filter.write().await?;
        Ok(filter)
    }

    /// Makes it anew so often, instead of every 20 s.
    #[must_use]
    pub fn renewed_every(self, renew_every: Duration) -> Self {
        Self { renew_every, ..self }
    }

    async fn write(&mut self) -> Result<(), Error> {
        let text = self.rules.text(&self.trusted.borrow_and_update());
        Ok(self.table.load(&text).await?)
    }

    /// Keeps it as it should be, until that is not possible any more: it may be gone then.
    pub async fn keep(mut self) -> Error {
        loop {
            let news = async {
                if self.trusted.changed().await.is_err() {
                    // Nobody says any more who is trusted: as it was, then.
                    std::future::pending::<()>().await;
                }
            };
            // Either way it is written: nobody else's change of it is adopted.
            let _ = timeout(self.renew_every, news).await;
            if let Err(error) = self.write().await {
                return error;
            }
        }
    }
}

/// Installs it; what comes back keeps it for pods of a node, until that is not possible any more.
///
/// # Errors
/// [`Error`]: then no chute must be started.
pub async fn start(
    config: Config,
    client: Client,
    node: String,
    folder: &Path,
) -> Result<impl Future<Output = Error> + Send + 'static, Error> {
    // Nobody is trusted before the API server has said who is there.
    let (tell, trusted) = watch::channel(BTreeSet::new());
    let filter = Filter::install(config.rules, Table::default(), trusted, folder).await?;
    tracing::info!("pods are filtered");
    Ok(async move {
        let follow = async {
            trusted::follow(client, &config.trusted_namespaces, &node, &tell).await;
            std::future::pending().await
        };
        tokio::select! {
            error = filter.keep() => error,
            error = follow => error,
        }
    })
}

/// The interfaces that this thread sees.
fn interfaces() -> io::Result<Vec<String>> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    let names = text.lines().filter_map(|line| line.split_once(':'));
    Ok(names.map(|(name, _)| name.trim().to_owned()).collect())
}

/// Whether the rules mean on this host what they should.
fn useful(rules: &Rules, interfaces: &[String]) -> Result<(), String> {
    if interfaces.iter().any(|name| name == "kube-ipvs0") {
        return Err(
            "kube-proxy runs in IPVS mode here, in which addresses of services are addresses of the host, and pods \
             would reach none of them: let it run in the mode iptables or nftables, or set packet_filter.enabled = false"
                .to_owned(),
        );
    }
    let asks = |protocol| {
        rules
            .doors
            .iter()
            .any(|it| it.protocol == protocol && it.port == 53)
    };
    if interfaces.iter().any(|name| name == "nodelocaldns") && !(asks(Protocol::Udp) && asks(Protocol::Tcp)) {
        return Err("the name server that pods ask is on this host (NodeLocal DNSCache), and would be closed to them: set \
                    packet_filter.open = [\"udp/53\", \"tcp/53\"]"
            .to_owned());
    }
    let known = |name: &String| rules.interfaces.iter().any(|pattern| pattern.matches(name));
    if rules.networks.is_empty() && !interfaces.iter().any(known) {
        return Err(format!(
            "none of the interfaces of this host ({}) is one of packet_filter.interfaces, so that no pod would be \
             filtered: add the one on which pods' packets come in, or set packet_filter.networks to the network of the \
             cluster's pods",
            interfaces.join(", ")
        ));
    }
    Ok(())
}

fn note_file(folder: &Path) -> PathBuf {
    folder.join("packet-filter")
}

/// Names this run of the kernel: a table does not outlive it.
fn boot() -> io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
}

fn note(folder: &Path) -> Result<(), Error> {
    let path = note_file(folder);
    let written = boot().and_then(|boot| fs::write(&path, boot));
    written.map_err(|source| Error::Note { path, source })
}

/// Whether it was installed, by the agent of this folder, since the machine was started.
///
/// # Errors
/// [`Error::Note`].
pub fn was_installed(folder: &Path) -> Result<bool, Error> {
    let path = note_file(folder);
    let noted = match fs::read_to_string(&path) {
        Ok(noted) => noted,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(Error::Note { path, source }),
    };
    let boot = boot().map_err(|source| Error::Note { path, source })?;
    Ok(noted == boot)
}

/// Removes the table, if it is there, and the note of it.
///
/// # Errors
/// [`Error`]: it may still be there.
pub async fn remove(table: &Table, folder: &Path) -> Result<(), Error> {
    table.load(&rules::removal()).await?;
    let path = note_file(folder);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Note { path, source }),
        _ => Ok(()),
    }
}

/// Where it is switched off: removes what an earlier agent has installed. What cannot be removed is told to people, and
/// holds nothing up.
pub async fn switched_off(table: &Table, folder: &Path) {
    let removed = match was_installed(folder) {
        Ok(false) => return,
        Ok(true) => remove(table, folder).await,
        Err(error) => Err(error),
    };
    match removed {
        Ok(()) => tracing::info!("the packet filter is switched off, and its table removed"),
        Err(error) => tracing::error!(
            %error,
            "the packet filter is switched off, and its table is still there: on the node, as root, `nft delete table \
             inet {}` removes it, and so does a restart of the machine",
            rules::TABLE
        ),
    }
}

/// Gives up the right to change packet rules, for this thread and all that it starts. Before any other is started.
///
/// # Errors
/// What the system said.
pub fn give_up_the_right() -> io::Result<()> {
    let mut sets = capabilities(None)?;
    let all = sets.effective | sets.permitted | sets.inheritable;
    if !all.contains(CapabilitySet::NET_ADMIN) {
        return Ok(());
    }
    for set in [&mut sets.effective, &mut sets.permitted, &mut sets.inheritable] {
        set.remove(CapabilitySet::NET_ADMIN);
    }
    Ok(set_capabilities(None, sets)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> RawConfig {
        RawConfig {
            enabled: true,
            ..RawConfig::default()
        }
    }

    fn door(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn checked(written: &RawConfig) -> Result<Config, String> {
        let config = Config::check(written, door("127.0.0.1:3128"))?;
        Ok(config.expect("it is switched on"))
    }

    #[test]
    fn what_is_wrong_is_named() {
        type Change = fn(&mut RawConfig);
        let wrong: [(&str, Change); 8] = [
            ("packet_filter.interfaces: \"lo\"", |it| {
                it.interfaces.push("lo".to_owned())
            }),
            ("packet_filter.interfaces: \"*\"", |it| {
                it.interfaces.push("*".to_owned())
            }),
            ("packet_filter.networks: \"10.42.0.0/33\"", |it| {
                it.networks.push("10.42.0.0/33".to_owned())
            }),
            ("packet_filter.networks: \"10.42.0.1/16\"", |it| {
                it.networks.push("10.42.0.1/16".to_owned())
            }),
            ("packet_filter.open: \"53\"", |it| it.open.push("53".to_owned())),
            ("packet_filter.open: \"tcp/0\"", |it| {
                it.open.push("tcp/0".to_owned())
            }),
            ("packet_filter.refused: \"here\"", |it| {
                it.refused.push("here".to_owned())
            }),
            ("are both empty", |it| it.interfaces.clear()),
        ];
        for (why, set) in wrong {
            let mut written = written();
            set(&mut written);
            let error = checked(&written).expect_err("it is wrong");
            assert!(error.contains(why), "{error} does not say {why}");
        }
    }

    #[test]
    fn the_egress_door_is_open_where_pods_get_to_it() {
        let doors = |listen: &str| {
            let config = Config::check(&written(), door(listen)).expect("good settings");
            config.expect("it is switched on").rules.doors
        };
        let tcp = |address: Option<&str>| Door {
            protocol: Protocol::Tcp,
            address: address.map(|text| text.parse().expect("an address")),
            port: 3128,
        };
        assert_eq!(doors("127.0.0.1:3128"), []);
        assert_eq!(doors("0.0.0.0:3128"), [tcp(None)]);
        assert_eq!(doors("10.42.0.1:3128"), [tcp(Some("10.42.0.1"))]);
        assert_eq!(
            Config::check(&RawConfig::default(), door("0.0.0.0:3128")),
            Ok(None)
        );
    }

    #[test]
    fn rules_that_would_filter_nothing_or_too_much_are_refused() {
        let rules = checked(&written()).expect("good settings").rules;
        let names = |names: &[&str]| -> Vec<String> { names.iter().map(|it| (*it).to_owned()).collect() };
        assert_eq!(useful(&rules, &names(&["lo", "eth0", "cni0"])), Ok(()));
        assert_eq!(useful(&rules, &names(&["lo", "eth0", "cali12345"])), Ok(()));
        let why = useful(&rules, &names(&["lo", "eth0"])).expect_err("no pod would be seen");
        assert!(
            why.contains("lo, eth0") && why.contains("packet_filter.networks"),
            "{why}"
        );
        let mut by_network = rules.clone();
        by_network
            .networks
            .push("10.42.0.0/16".parse().expect("a network"));
        assert_eq!(useful(&by_network, &names(&["lo", "eth0"])), Ok(()));
        let why =
            useful(&by_network, &names(&["lo", "cni0", "kube-ipvs0"])).expect_err("services would be cut");
        assert!(why.contains("IPVS"), "{why}");
        let local_dns = names(&["lo", "cni0", "nodelocaldns"]);
        let mut open = rules.clone();
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let why = useful(&open, &local_dns).expect_err("pods would know no names");
            assert!(why.contains("packet_filter.open"), "{why}");
            open.doors.push(Door {
                protocol,
                address: None,
                port: 53,
            });
        }
        assert_eq!(useful(&open, &local_dns), Ok(()));
    }

    #[test]
    fn a_note_counts_until_the_machine_is_started_anew() {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let installed = || was_installed(folder.path()).expect("readable");
        assert!(!installed());
        note(folder.path()).expect("writable");
        assert!(installed());
        fs::write(note_file(folder.path()), "another start").expect("writable");
        assert!(!installed());
    }
}

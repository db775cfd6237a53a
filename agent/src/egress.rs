//! The egress door: what chutes may reach, by name, and never an address that was not checked.
//!
//! ```text
//! chute -> CONNECT name:443 -> policy (name, port) -> resolve once -> check every address -> dial -> tunnel
//! ```
//!
//! Reading order: [`policy`] and [`address`] (pure), [`head`] (pure), [`network`] (the resolve/dial seam),
//! [`proxy`], [`tunnel`], [`metrics`]; with the feature `dev` also `table`, the replaced seam.

pub mod address;
pub mod head;
pub mod metrics;
pub mod network;
pub mod policy;
pub mod proxy;
#[cfg(feature = "dev")]
pub mod table;
pub mod tunnel;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::units::Span;
use crate::egress::metrics::Metrics;
use crate::egress::network::{Dial, DialError, Direct, Hickory, NotResolved, Resolve};
use crate::egress::policy::{DEFAULT_ALLOWED, Decision, InvalidEntry, Mode, Name, Policy, Reason};

/// Tunnels are cut after this long at shutdown: they may live for hours.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Refusals for lack of places that are written at once; beyond it connections are dropped.
const BUSY_ANSWERS_MAX: usize = 32;

/// Settings as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawConfig {
    /// Where chutes connect.
    pub listen: SocketAddr,
    /// Refuse names that are not listed, or only report them.
    pub mode: Mode,
    /// Ports that may be reached.
    pub ports: Vec<u16>,
    /// The allow-list; none means the one that we ship.
    pub allowed: Option<Vec<String>>,
    /// Added to the allow-list.
    pub allowed_also: Vec<String>,
    /// Name servers; none means the system's.
    pub name_servers: Vec<IpAddr>,
    /// This host's public addresses, where its interfaces do not carry them.
    pub own_addresses: Vec<IpAddr>,
    /// Most connections at once.
    pub connections_max: usize,
    /// Longest time for a request head.
    pub head_timeout: Span,
    /// Longest time to resolve, and to connect.
    pub connect_timeout: Span,
    /// Longest silence of a tunnel.
    pub idle_timeout: Span,
    /// Longest silence once one side has ended.
    pub half_closed_timeout: Span,
    /// Replaces name resolution and connections, for development.
    #[cfg(feature = "dev")]
    pub table: Option<Vec<table::Row>>,
}

impl Default for RawConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 3128)),
            mode: Mode::Enforce,
            ports: vec![443],
            allowed: None,
            allowed_also: Vec::new(),
            name_servers: Vec::new(),
            own_addresses: Vec::new(),
            connections_max: 1024,
            head_timeout: Span::seconds(10),
            connect_timeout: Span::seconds(10),
            idle_timeout: Span::seconds(600),
            half_closed_timeout: Span::seconds(60),
            #[cfg(feature = "dev")]
            table: None,
        }
    }
}

/// Settings as checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where chutes connect.
    pub listen: SocketAddr,
    /// The compiled policy.
    pub policy: Policy,
    /// Name servers; none means the system's.
    pub name_servers: Vec<IpAddr>,
    /// Addresses of this host that its interfaces do not carry.
    pub own_addresses: Vec<IpAddr>,
    /// Most connections at once.
    pub connections_max: usize,
    /// Longest time for a request head.
    pub head_timeout: Duration,
    /// Longest time to resolve, and to connect.
    pub connect_timeout: Duration,
    /// Limits of tunnels.
    pub tunnel: tunnel::Limits,
    /// Replaces name resolution and connections, for development.
    #[cfg(feature = "dev")]
    pub table: Option<table::Table>,
}

/// Why settings are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// An entry of the allow-list.
    #[error("egress.allowed: {0}")]
    Entry(#[from] InvalidEntry),
    /// A limit of nothing, or no port at all.
    #[error("egress.{0} must not be empty or zero")]
    Zero(&'static str),
    /// The development table.
    #[cfg(feature = "dev")]
    #[error("egress.table: {0}")]
    Table(#[from] table::NotLoopback),
}

impl Config {
    /// Checks settings. `validators` are the hosts of the configured validators' API, socket and registry.
    ///
    /// # Errors
    /// [`InvalidConfig`].
    pub fn check<'a>(
        raw: &'a RawConfig,
        validators: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, InvalidConfig> {
        let limits = [
            ("ports", raw.ports.is_empty()),
            ("connections_max", raw.connections_max == 0),
            ("head_timeout", raw.head_timeout.0.is_zero()),
            ("connect_timeout", raw.connect_timeout.0.is_zero()),
            ("idle_timeout", raw.idle_timeout.0.is_zero()),
            ("half_closed_timeout", raw.half_closed_timeout.0.is_zero()),
        ];
        if let Some((name, _)) = limits.iter().find(|(_, zero)| *zero) {
            return Err(InvalidConfig::Zero(name));
        }
        let listed: Vec<&str> = match &raw.allowed {
            Some(allowed) => allowed.iter().map(String::as_str).collect(),
            None => DEFAULT_ALLOWED.to_vec(),
        };
        let listed = listed
            .into_iter()
            .chain(raw.allowed_also.iter().map(String::as_str));
        Ok(Self {
            listen: raw.listen,
            policy: Policy::compile(raw.mode, raw.ports.iter().copied(), listed, validators)?,
            name_servers: raw.name_servers.clone(),
            own_addresses: raw.own_addresses.clone(),
            connections_max: raw.connections_max,
            head_timeout: raw.head_timeout.0,
            connect_timeout: raw.connect_timeout.0,
            tunnel: tunnel::Limits {
                idle: raw.idle_timeout.0,
                half_closed: raw.half_closed_timeout.0,
            },
            #[cfg(feature = "dev")]
            table: raw.table.as_deref().map(table::Table::new).transpose()?,
        })
    }
}

/// Why the door cannot open.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is taken or not ours.
    #[error("listen on {address} for the egress door: {source}")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Name resolution could not be set up.
    #[error(transparent)]
    Resolve(#[from] NotResolved),
}

/// What all connections share.
pub struct Door {
    policy: Policy,
    network: Network,
    own_addresses: Vec<IpAddr>,
    head_timeout: Duration,
    connect_timeout: Duration,
    tunnel: tunnel::Limits,
    metrics: Arc<Metrics>,
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door")
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

/// The resolve/dial seam as one value.
#[derive(Clone)]
pub struct Network {
    /// Names to addresses.
    pub resolve: Arc<dyn Resolve>,
    /// Checked addresses to connections.
    pub dial: Arc<dyn Dial>,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Network")
    }
}

impl Network {
    /// The seam that settings ask for.
    ///
    /// # Errors
    /// [`NotResolved`] when the system's name resolution cannot be set up.
    pub fn new(config: &Config) -> Result<Self, NotResolved> {
        #[cfg(feature = "dev")]
        if let Some(table) = &config.table {
            let table = Arc::new(table.clone());
            return Ok(Self {
                resolve: Arc::<table::Table>::clone(&table),
                dial: table,
            });
        }
        let resolve = Hickory::new(&config.name_servers, RESOLVE_TIMEOUT)?;
        Ok(Self {
            resolve: Arc::new(resolve),
            dial: Arc::new(Direct),
        })
    }

    /// Resolves once, checks every address, dials only what was checked. Resolving and connecting may each
    /// take `timeout`.
    ///
    /// # Errors
    /// The [`Decision`] that refuses.
    pub async fn connect(
        &self,
        name: &Name,
        port: u16,
        own_addresses: &[IpAddr],
        timeout: Duration,
    ) -> Result<TcpStream, Decision> {
        let resolved = tokio::time::timeout(timeout, self.resolve.resolve(name)).await;
        let addresses = match resolved {
            Ok(Ok(addresses)) if !addresses.is_empty() => addresses,
            Ok(Ok(_)) => {
                return Err(Decision::deny(
                    Reason::NotResolved,
                    format!("{name} has no address"),
                ));
            }
            Ok(Err(error)) => return Err(Decision::deny(Reason::NotResolved, format!("{name}: {error}"))),
            Err(_) => {
                return Err(Decision::deny(
                    Reason::NotResolved,
                    format!("{name}: resolving took too long"),
                ));
            }
        };
        // One bad address spoils them all: a public name with a private address is an attack or a mistake.
        let mut checked = Vec::with_capacity(addresses.len());
        for address in addresses {
            let passed = address::check(address, port, own_addresses);
            checked.push(passed.map_err(|class| Decision::deny_address(name, address, class))?);
        }
        let attempts = async {
            let mut last = String::new();
            for address in checked {
                match self.dial.dial(address).await {
                    Ok(stream) => return Ok(stream),
                    Err(DialError::Own) => {
                        let ip = address.socket_addr().ip();
                        return Err(Decision::deny_address(name, ip, address::Class::Own));
                    }
                    Err(DialError::Io(error)) => last = format!("{}: {error}", address.socket_addr()),
                }
            }
            Err(Decision::deny(
                Reason::Unreachable,
                format!("connect to {name}: {last}"),
            ))
        };
        tokio::time::timeout(timeout, attempts).await.unwrap_or_else(|_| {
            Err(Decision::deny(
                Reason::Unreachable,
                format!("connect to {name}: took too long"),
            ))
        })
    }
}
/// An egress door that listens.
#[derive(Debug)]
pub struct Service {
    listener: TcpListener,
    door: Arc<Door>,
    connections_max: usize,
}

impl Service {
    /// Opens the listener, with the seam that is given.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn bind(config: &Config, network: Network, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let failed = |source| Error::Listen {
            address: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let door = Door {
            policy: config.policy.clone(),
            network,
            own_addresses: config.own_addresses.clone(),
            head_timeout: config.head_timeout,
            connect_timeout: config.connect_timeout,
            tunnel: config.tunnel,
            metrics,
        };
        Ok(Self {
            listener,
            door: Arc::new(door),
            connections_max: config.connections_max,
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`; then gives tunnels a moment and cuts them.
    pub async fn serve(self, shutdown: CancellationToken) {
        let places = Arc::new(Semaphore::new(self.connections_max));
        let busy_answers = Arc::new(Semaphore::new(BUSY_ANSWERS_MAX));
        let (tasks, cut) = (TaskTracker::new(), CancellationToken::new());
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = shutdown.cancelled() => break,
            };
            let (client, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept on the egress door");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let (door, cut) = (Arc::clone(&self.door), cut.clone());
            match Arc::clone(&places).try_acquire_owned() {
                Ok(place) => tasks.spawn(async move {
                    door.metrics.connections.inc();
                    tokio::select! {
                        () = proxy::serve(Arc::clone(&door), client, peer) => {}
                        () = cut.cancelled() => {}
                    }
                    door.metrics.connections.dec();
                    drop(place);
                }),
                Err(_) => match Arc::clone(&busy_answers).try_acquire_owned() {
                    Ok(answer) => tasks.spawn(async move {
                        proxy::refuse_busy(&door, client, peer).await;
                        drop(answer);
                    }),
                    Err(_) => continue,
                },
            };
        }
        tasks.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, tasks.wait()).await.is_err() {
            cut.cancel();
            tasks.wait().await;
        }
    }
}

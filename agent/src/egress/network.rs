//! The resolve/dial seam, and its one real implementation.
//!
//! A name is resolved once; every address is checked; only a [`Checked`] address can be dialled. Tests and
//! development replace this seam, never the checks.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use crate::egress::address::Checked;
use crate::egress::policy::Name;

/// A future of the seam.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

const ADDRESSES_MAX: usize = 32;

/// Why a name gave no addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotResolved(pub String);

/// Why an address could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// It is this host's own address.
    #[error("it is this host's own address")]
    Own,
    /// The network said no.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Turns names into addresses.
pub trait Resolve: Send + Sync {
    /// All addresses of a name, unchecked.
    fn resolve<'a>(&'a self, name: &'a Name) -> Pending<'a, Result<Vec<IpAddr>, NotResolved>>;
}

/// Connects to checked addresses.
pub trait Dial: Send + Sync {
    /// Connects.
    fn dial(&self, address: Checked) -> Pending<'_, Result<TcpStream, DialError>>;
}

/// Resolution through hickory, with its cache.
pub struct Hickory(TokioResolver);

impl std::fmt::Debug for Hickory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hickory")
    }
}

impl Hickory {
    /// Uses the given name servers, or the system's if there are none.
    ///
    /// # Errors
    /// [`NotResolved`] when the system's configuration cannot be read.
    pub fn new(name_servers: &[IpAddr], timeout: Duration) -> Result<Self, NotResolved> {
        let failed =
            |error: hickory_resolver::net::NetError| NotResolved(format!("set up name resolution: {error}"));
        let mut builder = if name_servers.is_empty() {
            TokioResolver::builder_tokio().map_err(failed)?
        } else {
            let servers = name_servers
                .iter()
                .copied()
                .map(NameServerConfig::udp_and_tcp)
                .collect();
            let config = ResolverConfig::from_parts(None, Vec::new(), servers);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        let options = builder.options_mut();
        options.timeout = timeout;
        options.attempts = 2;
        // Names in the hosts file are the host's business, not the chutes'.
        options.use_hosts_file = ResolveHosts::Never;
        Ok(Self(builder.build().map_err(failed)?))
    }
}

impl Resolve for Hickory {
    fn resolve<'a>(&'a self, name: &'a Name) -> Pending<'a, Result<Vec<IpAddr>, NotResolved>> {
        Box::pin(async move {
            // With the root's dot no search domain is tried.
            let found = self.0.lookup_ip(format!("{name}.")).await;
            let found = found.map_err(|error| NotResolved(error.to_string()))?;
            Ok(found.iter().take(ADDRESSES_MAX).collect())
        })
    }
}

/// Connections of this host.
#[derive(Debug, Clone, Copy)]
pub struct Direct;

impl Dial for Direct {
    fn dial(&self, address: Checked) -> Pending<'_, Result<TcpStream, DialError>> {
        Box::pin(async move {
            let address = address.socket_addr();
            if is_own(address).await? {
                return Err(DialError::Own);
            }
            let socket = if address.is_ipv4() {
                TcpSocket::new_v4()
            } else {
                TcpSocket::new_v6()
            }?;
            socket.set_nodelay(true)?;
            let stream = socket.connect(address).await?;
            // Addresses come and go: ask again of the connection itself.
            if stream.local_addr()?.ip() == address.ip() {
                return Err(DialError::Own);
            }
            Ok(stream)
        })
    }
}

/// True if the system would take `address` for itself: it then chooses that very address as the source.
/// Connecting a UDP socket sends nothing.
async fn is_own(address: SocketAddr) -> io::Result<bool> {
    let any: SocketAddr = if address.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        ([0; 16], 0).into()
    };
    let probe = UdpSocket::bind(any).await?;
    probe.connect(address).await?;
    Ok(probe.local_addr()?.ip() == address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn own_addresses_are_recognised() {
        let own = is_own("127.0.0.7:443".parse().expect("an address"))
            .await
            .expect("loopback is there");
        assert!(!own, "any loopback address is reached from 127.0.0.1");
        let own = is_own("127.0.0.1:443".parse().expect("an address"))
            .await
            .expect("loopback is there");
        assert!(own);
    }
}

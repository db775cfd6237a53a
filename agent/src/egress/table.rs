//! A replaced resolve/dial seam for development and tests (feature `dev` only): a table gives the addresses
//! for the check, and a loopback listener for the connection.
//!
//! The checks stay as they are: a row whose address is private is refused like any other name that resolves
//! to one.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use crate::egress::address::Checked;
use crate::egress::network::{Dial, DialError, NotResolved, Pending, Resolve};
use crate::egress::policy::Name;

/// One row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// The name that a chute asks for.
    pub name: String,
    /// What it resolves to: for the check.
    pub addresses: Vec<IpAddr>,
    /// Who answers: a loopback listener.
    pub listener: SocketAddr,
}

/// The table.
#[derive(Debug, Clone)]
pub struct Table {
    names: BTreeMap<String, Vec<IpAddr>>,
    listeners: BTreeMap<IpAddr, SocketAddr>,
}

/// A listener that is not on loopback: the table must not become a way around the checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the table's listener {0} is not on loopback")]
pub struct NotLoopback(pub SocketAddr);

impl Table {
    /// From rows; two names with one address share the last one's listener.
    ///
    /// # Errors
    /// [`NotLoopback`].
    pub fn new(rows: &[Row]) -> Result<Self, NotLoopback> {
        let (mut names, mut listeners) = (BTreeMap::new(), BTreeMap::new());
        for row in rows {
            if !row.listener.ip().is_loopback() {
                return Err(NotLoopback(row.listener));
            }
            names.insert(row.name.to_ascii_lowercase(), row.addresses.clone());
            listeners.extend(
                row.addresses
                    .iter()
                    .map(|address| (address.to_canonical(), row.listener)),
            );
        }
        Ok(Self { names, listeners })
    }
}

impl Resolve for Table {
    fn resolve<'a>(&'a self, name: &'a Name) -> Pending<'a, Result<Vec<IpAddr>, NotResolved>> {
        let found = self.names.get(name.as_str()).cloned();
        Box::pin(async move { found.ok_or_else(|| NotResolved("not in the development table".to_owned())) })
    }
}

impl Dial for Table {
    fn dial(&self, address: Checked) -> Pending<'_, Result<TcpStream, DialError>> {
        let listener = self.listeners.get(&address.socket_addr().ip()).copied();
        Box::pin(async move {
            let listener =
                listener.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::HostUnreachable))?;
            let stream = TcpStream::connect(listener).await?;
            stream.set_nodelay(true)?;
            Ok(stream)
        })
    }
}

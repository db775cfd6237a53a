//! Settings of a coordinator member, as checked. The agent's configuration file joins them with those of the
//! other services.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use coordinator_core::state_machine::command::PayProfile;
use protocol::hotkey::Hotkey;

pub use crate::backup::Settings as Backup;
use crate::validator::Directory;

/// Settings of one member.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder with the log and the state.
    pub data: PathBuf,
    /// Folder with this host's certificate and its admission to the cluster.
    pub identity: PathBuf,
    /// Name of this host, for people.
    pub name: String,
    /// Provider or place of this host; empty if it has none.
    pub site: String,
    /// `host:port` where others reach `hosts_listen`.
    pub advertise: String,
    /// `host:port` of doors at which other members may be, besides where they are known to be.
    pub members: Vec<String>,
    /// Heartbeats and elections.
    pub timing: replica::Timing,
    /// Us.
    pub miner: Hotkey,
    /// For whom we work.
    pub validators: Directory,
    /// UDP address where hosts and other members connect.
    pub hosts_listen: SocketAddr,
    /// TCP address of the management API; loopback, or with TLS in front of it.
    pub api_listen: SocketAddr,
    /// TCP address of the metrics, which need no signature there.
    pub metrics_listen: Option<SocketAddr>,
    /// Rules of pay that protect running instances.
    pub pay_profile: PayProfile,
    /// Name of the strategy that places chutes.
    pub strategy: String,
    /// Between two passes of the strategy when nothing happens.
    pub tick_every: Duration,
    /// Between two listings of a validator when nothing asks for one earlier.
    pub observe_every: Duration,
    /// A cluster that this member founds observes until an operator says otherwise.
    pub found_observing: bool,
    /// Accept state-changing requests signed in the original scheme from anywhere; for old clients behind a
    /// network that the operator trusts.
    pub allow_plain_legacy_writes: bool,
    /// Snapshots that leave the cluster; none are put away by themselves without it.
    pub backup: Option<Backup>,
}

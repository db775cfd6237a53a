//! Settings of a replica, as checked: plain numbers, no parsing.

use crate::error::Error;
use crate::faults::Faults;
use crate::proposer::Proposals;
use crate::storage::{Storage, Writer};

/// How an empty store begins. A store that is not empty goes on from what it holds either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// Founds a cluster of which this member is the only voter.
    #[default]
    Found,
    /// Waits, without ever standing for election, until a leader adds this member.
    Join,
}

/// Heartbeats and elections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Timing {
    /// From the round trips measured to the other voters; that of [`Timing::Lan`] while nothing is measured.
    Auto,
    /// For members in one place: failover within about a second.
    #[default]
    Lan,
    /// For members far apart, round trips of up to 150 ms: failover within about five seconds.
    Wan,
    /// Given outright.
    Exact(Pace),
}

/// Numbers behind a [`Timing`], in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Between two heartbeats of a leader.
    pub heartbeat_ms: u64,
    /// Shortest silence after which a member stands for election.
    pub election_min_ms: u64,
    /// Longest such silence, and the lease of a leader: failover takes this plus a random part.
    pub election_max_ms: u64,
}

impl Pace {
    /// For members in one place.
    pub const LAN: Self = Self::of_heartbeat(80);
    /// For members far apart.
    pub const WAN: Self = Self::of_heartbeat(500);

    /// Elections after three to six missed heartbeats.
    #[must_use]
    pub const fn of_heartbeat(heartbeat_ms: u64) -> Self {
        Self {
            heartbeat_ms,
            election_min_ms: 3 * heartbeat_ms,
            election_max_ms: 6 * heartbeat_ms,
        }
    }
}

impl Timing {
    /// The numbers to start with.
    pub(crate) fn pace(self) -> Pace {
        match self {
            Self::Auto | Self::Lan => Pace::LAN,
            Self::Wan => Pace::WAN,
            Self::Exact(pace) => pace,
        }
    }
}

/// When snapshots are written and what of the log is kept after one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotPolicy {
    /// Log entries after the last snapshot that cause the next one; `None` leaves it to
    /// [`crate::Replica::snapshot`].
    pub every_entries: Option<u64>,
    /// Bytes of log after the last snapshot that cause the next one, unless the snapshot itself is larger:
    /// then as many as that. Bounds the time that a restart takes. `None`: no limit. Default 64 MiB.
    pub every_bytes: Option<u64>,
    /// Entries before a snapshot that stay in the log, so that a member that was away for a moment needs no
    /// snapshot.
    pub keep_entries: u64,
}

impl Default for SnapshotPolicy {
    fn default() -> Self {
        Self {
            every_entries: Some(10_000),
            every_bytes: Some(64 * 1024 * 1024),
            keep_entries: 1_000,
        }
    }
}

/// Settings of one replica.
#[derive(Debug)]
pub struct Config {
    /// Names the cluster; a store of another cluster is refused.
    pub cluster: String,
    /// Names the member within the cluster. A member whose store is lost never comes back under its old id.
    pub node_id: u64,
    /// Where other members reach this one; may be empty in a cluster of one.
    pub address: String,
    /// What an empty store does.
    pub start: Start,
    /// Where the data is.
    pub storage: Storage,
    /// Who writes it.
    pub writer: Writer,
    /// Heartbeats and elections.
    pub timing: Timing,
    /// Snapshots and purges.
    pub snapshots: SnapshotPolicy,
    /// Group commit.
    pub proposals: Proposals,
    /// Bytes of log entries kept in memory; older ones are read from the file. Default 2 MiB.
    pub log_tail_bytes_max: usize,
    /// Seed of the Raft library's random numbers; `None` takes one from the operating system.
    pub seed: Option<u64>,
    /// Planted faults; none but in tests of the tests.
    pub faults: Faults,
}

impl Config {
    /// Defaults of production over the given storage.
    #[must_use]
    pub fn new(cluster: impl Into<String>, node_id: u64, storage: Storage) -> Self {
        Self {
            cluster: cluster.into(),
            node_id,
            address: String::new(),
            start: Start::Found,
            storage,
            writer: Writer::Thread,
            timing: Timing::Lan,
            snapshots: SnapshotPolicy::default(),
            proposals: Proposals::default(),
            log_tail_bytes_max: 2 * 1024 * 1024,
            seed: None,
            faults: Faults::none(),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let proposals = &self.proposals;
        let limits = [
            ("cluster: must not be empty", !self.cluster.is_empty()),
            (
                "commands_per_entry_max: 1 to 65536",
                (1..=1 << 16).contains(&proposals.commands_per_entry_max),
            ),
            (
                "entry_bytes_max: 1 byte to 4 MiB",
                (1..=4 << 20).contains(&proposals.entry_bytes_max),
            ),
            (
                "entries_in_flight_max: 1 to 64",
                (1..=64).contains(&proposals.entries_in_flight_max),
            ),
            (
                "waiting_max: 1 to 1000000",
                (1..=1_000_000).contains(&proposals.waiting_max),
            ),
            ("timeout_ms: at least 1", proposals.timeout_ms > 0),
            (
                "every_entries: at least 1",
                self.snapshots.every_entries != Some(0),
            ),
        ];
        match limits.iter().find(|(_, holds)| !holds) {
            Some((rule, _)) => Err(Error::Configuration((*rule).to_owned())),
            None => Ok(()),
        }
    }

    /// The Raft library's settings.
    pub(crate) fn raft(&self) -> Result<openraft::Config, Error> {
        let snapshot_policy = match self.snapshots.every_entries {
            Some(entries) => openraft::SnapshotPolicy::LogsSinceLast(entries),
            None => openraft::SnapshotPolicy::Never,
        };
        let pace = self.timing.pace();
        let config = openraft::Config {
            cluster_name: self.cluster.clone(),
            heartbeat_interval: pace.heartbeat_ms,
            election_timeout_min: pace.election_min_ms,
            election_timeout_max: pace.election_max_ms,
            snapshot_policy,
            max_in_snapshot_log_to_keep: self.snapshots.keep_entries,
            // Without it a member that was cut off comes back with a high term and unseats the leader.
            enable_pre_vote: Some(true),
            // Its state may be behind what it acknowledged: a leader that restarts is elected like any other.
            enable_leader_restore: Some(false),
            ..openraft::Config::default()
        };
        config
            .validate()
            .map_err(|error| Error::Configuration(error.to_string()))
    }
}

//! Planted faults, for tests that must show that they can fail.

/// What a replica does wrong on purpose. Production has [`Faults::none`]: no configuration and no environment
/// reaches these.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Log entries are acknowledged before they are on the disk.
    pub acknowledge_before_fsync: bool,
    /// A vote is given before it is on the disk, so that a member may vote twice in a term.
    pub two_votes_in_a_term: bool,
    /// A linearizable read asks nobody.
    pub stale_read: bool,
    /// Snapshots lack this table.
    pub snapshot_misses_table: Option<u8>,
}

impl Faults {
    /// No faults.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }
}

//! Faults that can be planted, by name, to see that they are found.

use coordinator_core::state_machine::Faults as StateMachineFaults;
use replica::Faults as ReplicaFaults;

/// What is wrong on purpose, in each part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Planted {
    /// In the state machine.
    pub state_machine: StateMachineFaults,
    /// In the replica.
    pub replica: ReplicaFaults,
    /// In the host models, which take a set of a lower fence.
    pub revision_not_checked: bool,
    /// In the members, which go by the clocks of their machines.
    pub clocks_not_compared: bool,
}

/// The table of a snapshot that is left out: the answers to requests.
const TABLE_LEFT_OUT: u8 = 12;

/// All names, in the order of [`planted`].
pub const NAMES: [&str; 13] = [
    "acknowledge_before_fsync",
    "stale_read",
    "two_votes_in_a_term",
    "outbox_entry_lost_at_leader_change",
    "effect_done_twice",
    "revision_not_checked",
    "snapshot_misses_a_table",
    "replay_guard_lost",
    "double_allocation",
    "late_config_revives",
    "gpu_freed_early",
    "unknown_is_empty",
    "clocks_not_compared",
];

/// The fault with this name. Effects out of order are not among them: the executor takes the oldest of each
/// subject, whatever the state machine would accept.
///
/// # Errors
/// The names that there are.
pub fn planted(name: &str) -> Result<Planted, String> {
    let mut planted = Planted::default();
    let (core, replica) = (&mut planted.state_machine, &mut planted.replica);
    match name {
        "acknowledge_before_fsync" => replica.acknowledge_before_fsync = true,
        "stale_read" => replica.stale_read = true,
        "two_votes_in_a_term" => replica.two_votes_in_a_term = true,
        "outbox_entry_lost_at_leader_change" => core.outbox_entry_lost_at_leader_change = true,
        "effect_done_twice" => core.effect_done_twice = true,
        "revision_not_checked" => planted.revision_not_checked = true,
        "snapshot_misses_a_table" => replica.snapshot_misses_table = Some(TABLE_LEFT_OUT),
        "replay_guard_lost" => core.replay_guard_lost = true,
        "double_allocation" => core.double_allocation = true,
        "late_config_revives" => core.late_config_revives = true,
        "gpu_freed_early" => core.gpu_freed_early = true,
        "clocks_not_compared" => planted.clocks_not_compared = true,
        "unknown_is_empty" => core.unknown_is_empty = true,
        _ => return Err(NAMES.join(", ")),
    }
    Ok(planted)
}

//! Faults, and what must hold in spite of them.
//!
//! - `simulation.rs`: members with their hosts and a validator in one process, on simulated time, from a seed.
//! - `sim.rs`: its command line: many seeds on all cores, and what came of them.
//! - `storm.rs`: a development cluster in real processes, which are killed one after the other.
//! - `members.rs`: members in real processes, whose leader is killed or stopped, or whose links or disks are bad.
//! - `kubernetes.rs`: the whole miner on a real API server, with nodes that KWOK plays, while the API server is killed.
//! - `faults.rs`: faults for real processes: network, disk, clock, signals.

pub mod faults;
pub mod kubernetes;
pub mod members;
pub mod sim;
pub mod simulation;
pub mod storm;

//! Faults, and what must hold in spite of them.
//!
//! - `simulation.rs`: one member with its hosts and validator in one process, on simulated time, from a seed.
//! - `storm.rs`: a development cluster in real processes, which are killed one after the other.
//! - `faults.rs`: faults for real processes: network, disk, clock, signals.

pub mod faults;
pub mod simulation;
pub mod storm;

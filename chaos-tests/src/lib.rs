//! Faults, and what must hold in spite of them.
//!
//! - `simulation.rs`: one member with its hosts and validator in one process, on simulated time, from a seed.

pub mod simulation;

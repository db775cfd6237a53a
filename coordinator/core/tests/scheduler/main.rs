//! The scheduler against the real state machine: every decision becomes a command that `apply` must accept.
//!
//! The acceptance tests are named after the rows of the reference (`scheduling`, section 8).

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod chutes_and_pay;
mod fleet;
mod random_fleets;
mod replacing;
mod servers_and_faults;
mod strategies;
mod trial;
mod victims_and_jobs;

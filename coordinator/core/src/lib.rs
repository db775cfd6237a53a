//! What the coordinator decides, without doing anything: commands in, state and effects out; views in,
//! proposals out.
//!
//! No clock, no randomness, no IO, no floats in the state machine: the same log gives the same bytes on any
//! member. The manifest keeps it so: no tokio, redb, openraft or reqwest.
//!
//! Reading order: [`state_machine`], then [`scheduler`], then [`trial`] which has both at work on a copy.

pub mod scheduler;
pub mod state_machine;
pub mod trial;

//! The replicated state machine.
//!
//! ```text
//! Proposal { request, at, guard, command } --> apply --> State (tables of rows) + Outbox + desired sets
//! ```
//!
//! Reading order: the nouns ([`host`], [`server`], [`worker`], [`chute`], [`deployment`], [`job`], [`adoption`]), then [`effect`] and
//! [`outbox`], [`desired`], [`state`] which holds them all, the rules in [`placement`], [`reconcile`] and [`taking_over`],
//! and at last [`command`] and [`mod@apply`]. [`invariant`] says what holds after every command, [`codec`]
//! how commands and rows become bytes, [`format`](mod@format) from when on in which form. A noun's file knows nothing of `State`.

pub mod adoption;
pub mod apply;
pub mod chute;
pub mod codec;
pub mod command;
pub mod deployment;
pub mod desired;
pub mod effect;
pub mod format;
pub mod host;
pub mod invariant;
pub mod job;
pub mod outbox;
pub mod placement;
pub mod reconcile;
pub mod server;
pub mod state;
pub mod table;
pub mod taking_over;
#[cfg(test)]
mod testing;
pub mod upgrading;
pub mod worker;

mod answers;
mod driving;
mod enrolment;
mod hotkey;
mod joining;
mod lifecycle;
mod observe;
mod recovery;
mod restoring;
mod rotation;

pub use apply::apply;
pub use command::{Command, Proposal, Rejection, Reply};
pub use state::{Faults, State};

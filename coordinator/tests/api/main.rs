//! The management API against a store in memory, in this process: every route, every refusal.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod auth;
mod connection;
mod diff;
mod enrolment;
mod fixture;
mod hosts;
mod hotkey;
mod import;
mod kept;
mod limits;
mod original;
mod own;
mod raft;
mod trial;
mod workers;

//! The management API against a store in memory, in this process: every route, every refusal.

mod auth;
mod diff;
mod enrolment;
mod fixture;
mod limits;
mod original;
mod own;

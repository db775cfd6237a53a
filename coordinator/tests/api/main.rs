//! The management API against a store in memory, in this process: every route, every refusal.

mod auth;
mod fixture;
mod original;

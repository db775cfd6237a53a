//! The replica from outside: on simulated disks and links, on real files, over QUIC.

#![allow(clippy::unwrap_used, reason = "a panic in a helper is how its test fails")]

mod backup;
mod cluster;
mod compaction;
mod faults;
mod leadership;
mod load;
mod members;
mod quic;
mod refusal;
mod replication;
mod restart;
mod store;

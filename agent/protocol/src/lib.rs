//! What hosts, the coordinator and validators must agree on: plain data without IO.
//!
//! Reading order: [`id`], [`hotkey`], [`signing`], [`gpu`], [`workload`], [`report`], [`link`], [`logs`],
//! [`socket_io`], [`sealing`], [`snapshot_file`]. Nothing here reads a clock, a file or a socket.

pub mod gpu;
pub mod hotkey;
pub mod id;
pub mod link;
pub mod logs;
pub mod report;
pub mod sealing;
pub mod signing;
pub mod snapshot_file;
pub mod socket_io;
pub mod time;
pub mod workload;

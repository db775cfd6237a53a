//! `chutes-agent`: the host plane and a coordinator member in one binary.

pub mod cache;
pub mod config;
pub mod data_plane;
#[cfg(feature = "dev")]
pub mod dev;
pub mod egress;
pub mod gpu;
pub mod host_plane;
pub mod link;
pub mod local;
pub mod nodes;
pub mod packet_filter;
pub mod processes;
pub mod proof_plane;
pub mod registry;
pub mod sealed_worker;
pub mod signer;
pub mod telemetry;
pub mod workloads;

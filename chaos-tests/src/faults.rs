//! Faults for real processes, where a simulation cannot go: the network, the disk and the clock that they see.
//!
//! - `relay.rs`: a UDP relay that delays, loses, cuts one way or flaps; all traffic between members is QUIC;
//! - `gate.rs`: a TCP relay that can be cut;
//! - `network.rs`: hosts in network namespaces of their own, cut off from each other by nftables;
//! - `fsync.rs`: a preloaded library that counts, slows and fails fsync;
//! - `disk.rs`: a small file system that can be full;
//! - `clock.rs`: a wall clock that is off;
//! - `signal.rs`: a process that is stopped for a while, or killed.
//!
//! Everything but the relay and the signals needs root and a program of the system; [`probe`] says which is missing.

use std::process::{Command, Stdio};

use anyhow::Context;

pub mod clock;
pub mod disk;
pub mod fsync;
pub mod gate;
pub mod network;
pub mod relay;
pub mod signal;

/// Tries each tool; what works, and why the others do not.
#[must_use]
pub fn probe() -> Vec<(&'static str, Result<(), String>)> {
    let tried = |result: anyhow::Result<()>| result.map_err(|error| format!("{error:#}"));
    vec![
        ("network namespaces with nftables", tried(network::probe())),
        ("loop mounts", tried(disk::probe())),
        ("a preloaded fsync", tried(fsync::probe())),
        ("faketime", tried(clock::probe())),
    ]
}

/// Runs a program to its end; an error with what it said if it fails.
fn run(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let called = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(called)?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{}: {}", called(), said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

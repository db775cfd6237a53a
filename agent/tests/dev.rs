//! `chutes-agent dev`, as a newcomer runs it: the whole miner against the stand-in, and what it says when it
//! cannot.

#![cfg(feature = "dev")]

use std::net::TcpListener;
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;
use validator_stand_in::scenario::Scenario;

/// What the last line of `--output json` has at least.
const MEMBERS: [&str; 16] = [
    "ok",
    "hosts",
    "gpus_proved",
    "deployments_verified",
    "events_published",
    "events_lost",
    "recovered_by_rest",
    "writes_acknowledged",
    "writes_lost",
    "image_bytes_pulled",
    "egress_allowed",
    "egress_denied",
    "paid_seconds",
    "event_to_running_ms",
    "invariants_checked",
    "invariant_violations",
];

/// All clusters have the same addresses.
static ADDRESSES: Mutex<()> = Mutex::new(());

fn dev(arguments: &[&str]) -> Output {
    let _alone = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
    run(arguments)
}

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chutes-agent"));
    command
        .arg("dev")
        .args(arguments)
        .output()
        .expect("our own executable starts")
}

#[test]
fn the_main_job_is_done_and_accounted_for() {
    let output = dev(&["--once", "--output", "json"]);
    let account = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    let last = account.lines().last().unwrap_or_default();
    let result: Value =
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {last:?}\n{said}"));
    for member in MEMBERS {
        assert!(!result[member].is_null(), "no {member} in {result}");
    }
    assert_eq!(result["ok"], true, "{result}\n{said}");
    assert!(output.status.success());
    assert!(result["gpus_proved"].as_u64() >= Some(8), "{result}");
    assert!(result["deployments_verified"].as_u64() >= Some(5), "{result}");
    for nothing in ["events_lost", "writes_lost", "invariant_violations"] {
        assert_eq!(result[nothing], 0, "{result}");
    }
    for something in [
        "writes_acknowledged",
        "image_bytes_pulled",
        "egress_allowed",
        "egress_denied",
    ] {
        assert!(result[something].as_u64() > Some(0), "{result}");
    }
}

#[test]
fn leaders_that_are_killed_cost_neither_events_nor_writes() {
    let output = dev(&[
        "--hosts",
        "3",
        "--kill-leader-every",
        "15s",
        "--for",
        "75s",
        "--output",
        "json",
    ]);
    let account = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    let last = account.lines().last().unwrap_or_default();
    let result: Value =
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {last:?}\n{said}"));
    assert_eq!(result["ok"], true, "{result}\n{said}");
    assert!(result["leader_kills"].as_u64() >= Some(4), "{result}");
    assert!(result["socket_gap_ms_max"].as_u64() > Some(0), "{result}");
    for nothing in ["events_lost", "writes_lost", "invariant_violations"] {
        assert_eq!(result[nothing], 0, "{result}");
    }
}

#[test]
fn a_wrong_scenario_is_refused_with_file_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("scenario.toml");
    std::fs::write(&file, "nmae = \"x\"\n").unwrap();
    let output = dev(&["--once", "--scenario", &file.display().to_string()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("scenario.toml") && said.contains("nmae"), "{said}");
}

#[test]
fn a_host_that_is_not_verified_ends_it_and_the_reason_is_said() {
    let mut scenario = Scenario::development();
    for gpu in &mut scenario.relaxed.gpu_types {
        gpu.prove_ms_min = gpu.prove_ms_max - 1;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("scenario.toml");
    std::fs::write(&file, toml::to_string(&scenario).expect("settings are a table")).unwrap();
    let output = dev(&["--once", "--scenario", &file.display().to_string()]);
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().last().unwrap_or_default();
    assert!(!output.status.success());
    let reason = "host-1 was not verified: server host-1 was not added: the validator did not accept the GPUs: \
                  proof: took ";
    assert!(last.contains(reason), "{said}");
}

#[test]
fn a_second_cluster_is_refused_with_the_address_that_is_in_use() {
    let _alone = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
    let _first = TcpListener::bind("127.0.1.2:32000").expect("no other cluster runs");
    let output = run(&["--once"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        said.contains("127.0.1.2:32000") && said.contains("another `chutes-agent dev`"),
        "{said}"
    );
}

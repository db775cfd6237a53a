//! `chutes-agent dev`, as a newcomer runs it: the whole miner against the stand-in, and what it says when it
//! cannot.

#![cfg(feature = "dev")]

use std::process::{Command, Output};

use serde_json::Value;

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

fn dev(arguments: &[&str]) -> Output {
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
fn a_wrong_scenario_is_refused_with_file_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("scenario.toml");
    std::fs::write(&file, "nmae = \"x\"\n").unwrap();
    let output = dev(&["--once", "--scenario", &file.display().to_string()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("scenario.toml") && said.contains("nmae"), "{said}");
}

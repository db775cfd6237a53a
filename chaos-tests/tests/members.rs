//! Short forms of what `chaos-tests leaders`, `pause`, `clocks` and `links --namespaces` do at length: three members in
//! real processes, whose leader is killed a few times, stands still once, and has a clock that jumps once, and five
//! members, each in a network namespace or behind relays, whose links are spoilt. The bars on times are for the long forms.

use chaos_tests::faults::probe;
use chaos_tests::members::{Clocks, Leaders, Pause};
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn killed_leaders_lose_and_double_nothing() {
    let options = Leaders {
        kills: 4,
        brief: true,
        ..Leaders::default()
    };
    let outcome = options.run().await.expect("a cluster to shake");
    eprintln!("{}", outcome.figures);
    assert!(outcome.reasons.is_empty(), "{:#?}", outcome.reasons);
    assert_eq!(outcome.figures["kills"], 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_stood_still_answers_nothing_stale_and_acts_no_more() {
    let options = Pause {
        seconds: 8,
        times: 1,
        ..Pause::default()
    };
    let outcome = options.run().await.expect("a cluster to stop");
    eprintln!("{}", outcome.figures);
    assert!(outcome.reasons.is_empty(), "{:#?}", outcome.reasons);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_but_its_own_host_goes_by_a_leader_s_clock_that_jumps() {
    if !has("faketime") {
        return;
    }
    let options = Clocks {
        seconds: 3600,
        times: 1,
        ..Clocks::default()
    };
    let outcome = options.run().await.expect("a cluster to set off");
    eprintln!("{}", outcome.figures);
    assert!(outcome.reasons.is_empty(), "{:#?}", outcome.reasons);
    assert_eq!(outcome.figures["times"], 1);
}

/// Whether a fault tool works; CI must have it.
fn has(tool: &str) -> bool {
    let tried = probe().into_iter().find(|(name, _)| *name == tool);
    let Some((_, Err(reason))) = tried else {
        return true;
    };
    let required = std::env::var_os("REQUIRE_PEERS").is_some_and(|value| value == "1");
    assert!(!required, "{tool}: {reason}");
    eprintln!("NOT TESTED: {tool}: {reason}");
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn members_in_namespaces_go_on_without_a_leader_that_is_cut_off() {
    if !has("network namespaces with nftables") {
        return;
    }
    let faults = [
        "leader_alone",
        "leader_deaf",
        "hosts_cut_from_voters",
        "validator_cut_from_leader",
    ];
    links(&["--namespaces"], &faults).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_go_on_over_ways_that_lose_delay_flap_and_change_ports() {
    let faults = ["loss_30_percent", "round_trip_200_ms", "flapping", "ports_change"];
    links(&[], &faults).await;
}

/// `chaos-tests links` with some of its faults.
async fn links(arguments: &[&str], faults: &[&str]) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_chaos-tests"));
    command.args(["links", "--fault-seconds", "4"]).args(arguments);
    for fault in faults {
        command.args(["--only", fault]);
    }
    let output = command
        .kill_on_drop(true)
        .output()
        .await
        .expect("the program runs");
    let (said, complained) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{said} {complained}");
    let figures: Value = serde_json::from_str(said.lines().last().expect("figures")).expect("JSON");
    eprintln!("{figures}");
    for fault in faults {
        assert!(figures[*fault]["next_write_ms"].is_u64(), "{figures}");
    }
}

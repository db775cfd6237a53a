//! A short storm over a real development cluster: the whole agent, the coordinator and the host process are
//! killed, each once.

use chaos_tests::storm::{Options, run};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_doubles_loses_and_ends_nothing() {
    let options = Options {
        kills: 3,
        victim: None,
        seed: Some(1),
        agent: None,
    };
    let report = run(&options).await.expect("a cluster to shake");
    eprintln!("{}", report.to_json());
    assert!(report.reasons.is_empty(), "{:#?}", report.reasons);
    assert_eq!(report.kills.len(), 3, "{:?}", report.kills);
}

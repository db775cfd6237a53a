//! Short forms of what `chaos-tests leaders` and `chaos-tests pause` do at length: three members in real processes,
//! whose leader is killed a few times, and stands still once. The bars on times are for the long forms.

use chaos_tests::members::{Leaders, Pause};

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

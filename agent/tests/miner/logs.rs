//! What chutes wrote: told by any member, wherever the chute's host is connected, and still after its end.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::cluster::{Miner, Plan};
use super::stand_in::{StandIn, chute, scenario};
use super::{alone, until};

/// What each member says that a deployment wrote.
async fn logs(miner: &Miner, deployment: &Value) -> Vec<Value> {
    let id = deployment["deployment_id"].as_str().expect("an id");
    let path = format!("/v1/deployments/{id}/log");
    let answers = miner.ask_all(&path).await;
    assert_eq!(answers.len(), 2);
    let each = answers.into_iter().map(|(status, log)| {
        assert_eq!(status, StatusCode::OK, "{log}");
        assert_eq!(log["server_id"], deployment["server_id"]);
        log
    });
    each.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_member_says_what_a_chute_wrote() {
    let _alone = alone().await;
    let chutes = vec![chute("one"), chute("two")];
    let validator = StandIn::start(scenario("logs", 0xf6, chutes)).await;
    let plan = || Plan {
        works_for: &validator,
        gpus: 1,
        has_seed: true,
    };
    let miner = Miner::start(&[&validator], &[plan(), plan()]).await;
    let (one, two) = (
        miner.serving(&validator, "one").await,
        miner.serving(&validator, "two").await,
    );
    assert_ne!(one["server_id"], two["server_id"], "each host has one GPU");

    for deployment in [&one, &two] {
        let id = deployment["deployment_id"].as_str().expect("an id");
        for log in logs(&miner, deployment).await {
            assert!(!log["text"].as_str().expect("a text").is_empty(), "{log}");
            assert_eq!(log["gone"], false, "{log}");
            let next = log["next"].as_str().expect("a place");
            let first = log["text"].as_str().and_then(|text| text.lines().next());
            let first = first.expect("a line");
            let rest = miner
                .ask_all(&format!("/v1/deployments/{id}/log?after={next}"))
                .await;
            for (status, rest) in rest {
                assert_eq!(status, StatusCode::OK, "{rest}");
                let text = rest["text"].as_str().expect("a text");
                assert!(!text.contains(first), "only what came afterwards: {rest}");
            }
        }
        for (status, events) in miner.ask_all(&format!("/v1/deployments/{id}/events")).await {
            assert_eq!((status, &events["events"]), (StatusCode::OK, &json!([])));
        }
        for (status, refused) in miner
            .ask_all(&format!("/v1/deployments/{id}/log?previous=true"))
            .await
        {
            assert_eq!(status, StatusCode::BAD_REQUEST, "{refused}");
        }
    }

    let id = two["deployment_id"].as_str().expect("an id");
    let (status, answer) = miner
        .ask(Method::DELETE, &format!("/deployments/{id}"), None)
        .await;
    assert!(status.is_success(), "{answer}");
    miner.gone(&two).await;
    // The host may say so a moment later than it has let go.
    let kept = until("it is kept", async || {
        let logs = logs(&miner, &two).await;
        logs.iter().all(|log| log["gone"] == true).then_some(logs)
    })
    .await;
    assert_eq!(kept[0]["text"], kept[1]["text"]);
    assert!(!kept[0]["text"].as_str().expect("a text").is_empty());

    let nobody = miner.ask_all("/v1/deployments/nobody/log").await;
    assert!(
        nobody.iter().all(|(status, _)| *status == StatusCode::NOT_FOUND),
        "{nobody:?}"
    );
    miner.stop().await;
}

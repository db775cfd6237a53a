//! Private chutes: placed for a bounty only, and stopped for nobody unless a person allows the loss.

use reqwest::{Method, StatusCode};
use serde_json::json;
use validator_stand_in::ledger::Record;
use validator_stand_in::scenario::{Action, ChuteSpec};

use super::cluster::{Miner, Plan, rows};
use super::stand_in::{StandIn, chute, scenario};
use super::{alone, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_private_chute_needs_a_bounty_and_is_stopped_for_nobody() {
    let _alone = alone().await;
    let private = ChuteSpec {
        public: false,
        ..chute("private")
    };
    let validator = StandIn::start(scenario("private", 0xd4, vec![private])).await;
    let plans = [Plan {
        works_for: &validator,
        gpus: 2,
        has_seed: false,
    }];
    let miner = Miner::start(&[&validator], &plans).await;
    let id = until("the private chute is known", async || {
        let state = miner.state().await;
        let known = rows(&state, "chutes").iter().find(|row| row["name"] == "private");
        known.map(|row| row["chute_id"].as_str().expect("an id").to_owned())
    })
    .await;

    // There is room, and others are placed, but nobody waits for it.
    validator.publish(chute("public")).await;
    miner.serving(&validator, "public").await;
    let asked = validator.records(|record| match record {
        Record::TokenGranted { chute, .. } => Some(chute.to_string()),
        Record::TokenRefused { chute, .. } => Some(chute.clone()),
        _ => None,
    });
    assert!(!asked.contains(&id), "it was to be launched without a bounty");

    let bounty = |chute: &str| Action::OfferBounty {
        chute: chute.to_owned(),
        amount: None,
    };
    validator.perform(&bounty("private")).await;
    let serving = miner.serving(&validator, "private").await;
    assert!(
        serving["reason"]
            .as_str()
            .is_some_and(|why| why.contains("bounty"))
    );

    // Nothing else makes it go: not a bounty of another chute when all GPUs are in use, ...
    validator.publish(chute("rival")).await;
    validator.perform(&bounty("rival")).await;
    until("the rival's bounty is known", async || {
        let state = miner.state().await;
        let rival = rows(&state, "chutes").iter().find(|row| row["name"] == "rival")?;
        let known = |row: &serde_json::Value| row["chute_id"] == rival["chute_id"];
        rows(&state, "bounties").iter().any(known).then_some(())
    })
    .await;
    // ... nor a person who did not say that the loss is meant.
    let mut stop = json!({"deployments": [serving["deployment_id"]]});
    let (status, answer) = miner.ask(Method::POST, "/v1/stop", Some(&stop)).await;
    assert_eq!(status, StatusCode::CONFLICT, "{answer}");
    assert!(answer.to_string().contains("it is a private chute"), "{answer}");
    let still = miner.serving(&validator, "private").await;
    assert_eq!(still["deployment_id"], serving["deployment_id"]);
    let ended = validator.records(|record| match record {
        Record::InstanceDeleted { .. } => Some(record.clone()),
        _ => None,
    });
    assert!(ended.is_empty(), "{ended:?}");

    stop["allow_loss"] = json!(true);
    let (status, answer) = miner.ask(Method::POST, "/v1/stop", Some(&stop)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    miner.gone(&serving).await;
    miner.stop().await;
}

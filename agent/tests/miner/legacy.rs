//! The flow of chutes libraries before 0.3.0: the miner announces the instance and activates it, and only
//! then the validator verifies it.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use validator_stand_in::ledger::{DeletedBy, Record};
use validator_stand_in::scenario::{ChuteSpec, Gates};

use super::cluster::{Miner, Plan, rows};
use super::stand_in::{StandIn, chute, scenario};
use super::{alone, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_legacy_chute_lives_and_is_deleted_by_its_operator() {
    let _alone = alone().await;
    let mut scenario = scenario(
        "legacy",
        0xc3,
        vec![ChuteSpec {
            chutes_version: Some("0.2.60".to_owned()),
            ..chute("old")
        }],
    );
    scenario.gates = Gates {
        legacy: true,
        ..scenario.gates
    };
    let validator = StandIn::start(scenario).await;
    let plans = [Plan {
        works_for: &validator,
        gpus: 1,
        has_seed: false,
    }];
    let miner = Miner::start(&[&validator], &plans).await;

    let serving = miner.serving(&validator, "old").await;
    assert_eq!(serving["config_id"], Value::Null, "there is no launch config");
    assert!(serving["verified_at"].is_u64() && serving["active_at"].is_u64());
    let steps = validator.records(|record| match record {
        Record::LegacyAnnounced { .. } => Some("announced"),
        Record::InstanceActivated { .. } => Some("activated"),
        Record::InstanceVerified { .. } => Some("verified"),
        Record::TokenGranted { .. } | Record::TokenRefused { .. } => Some("token"),
        _ => None,
    });
    assert_eq!(steps, ["announced", "activated", "verified"]);
    assert_eq!(miner.chutes_on(1).len(), 1);

    // Banned first, or it would be placed again.
    let ban = json!({"chute_id": serving["chute_id"], "reason": "a test"});
    let (status, answer) = miner.ask(Method::POST, "/v1/bans", Some(&ban)).await;
    assert!(status.is_success(), "{status}: {answer}");
    let id = serving["deployment_id"].as_str().expect("an id");
    let (status, answer) = miner
        .ask(Method::DELETE, &format!("/deployments/{id}"), None)
        .await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["status"], "initiated");

    miner.gone(&serving).await;
    let deleted = validator.records(|record| match record {
        Record::InstanceDeleted { instance, by, .. } => Some((instance.to_string(), *by)),
        _ => None,
    });
    let instance = serving["instance_id"].as_str().expect("an id").to_owned();
    assert_eq!(deleted, [(instance, DeletedBy::Miner)]);
    assert!(validator.instances().await.is_empty());
    assert!(
        miner.chutes_on(1).is_empty(),
        "gone means that its process is gone"
    );
    let state = until("the GPU is free", async || {
        let state = miner.state().await;
        let gpus = rows(&state, "gpus");
        (gpus.len() == 1 && gpus[0]["holder"].is_null()).then_some(state)
    })
    .await;
    assert!(rows(&state, "deployments").is_empty());
    miner.stop().await;
}

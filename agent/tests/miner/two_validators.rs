//! One miner, two validators, a host for each: nothing of one reaches the other, not even where they use the
//! same chute id, and one that is away holds up only itself.

use serde_json::Value;
use validator_stand_in::ledger::Record;
use validator_stand_in::scenario::{Action, ChuteSpec};

use super::cluster::{Miner, Plan, rows};
use super::stand_in::{StandIn, chute, scenario};
use super::{alone, until};

/// An image that only one of the two has.
fn of_owner(owner: &str, name: &str) -> ChuteSpec {
    ChuteSpec {
        username: owner.to_owned(),
        image: "tool:2.0".to_owned(),
        ..chute(name)
    }
}

/// Same name and owner, so the same id; its code and so its version are the validator's own.
fn shared(code: &str) -> ChuteSpec {
    ChuteSpec {
        code: Some(code.to_owned()),
        ..chute("shared")
    }
}

/// The image was pulled from this validator's registry, and nothing of the other's was asked for there.
fn pulled_only_its_own(validator: &StandIn, own: &str, others: &str) {
    let requests = validator.records(|record| match record {
        Record::RegistryRequest {
            path, status, bytes, ..
        } => Some((path.clone(), *status, *bytes)),
        _ => None,
    });
    for image in ["acme/app", own] {
        let manifest = format!("{image}/manifests/");
        assert!(
            requests
                .iter()
                .any(|(path, status, _)| path.contains(&manifest) && *status == 200),
            "{image} was not pulled: {requests:?}"
        );
    }
    assert!(
        !requests.iter().any(|(path, ..)| path.contains(others)),
        "{requests:?}"
    );
    let bytes: u64 = requests.iter().map(|(_, _, bytes)| bytes).sum();
    assert!(bytes > 1_000_000, "the layer was not pulled: {requests:?}");
}

fn no_instance_ended(validator: &StandIn) {
    let ended = validator.records(|record| match record {
        Record::InstanceDeleted { .. } => Some(record.clone()),
        _ => None,
    });
    assert!(ended.is_empty(), "{ended:?}");
}

/// What must not change while somebody else's matters do: name, instance and GPUs of a deployment.
fn identity(deployment: &Value) -> [&Value; 4] {
    ["deployment_id", "instance_id", "gpus", "phase"].map(|member| &deployment[member])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_validators_are_kept_apart() {
    let _alone = alone().await;
    let a = scenario("a", 0xa1, vec![shared("# of a\n"), of_owner("alpha", "only-a")]);
    let b = scenario("b", 0xb2, vec![shared("# of b\n"), of_owner("beta", "only-b")]);
    let (a, mut b) = tokio::join!(StandIn::start(a), StandIn::start(b));
    let plans = [
        Plan {
            works_for: &a,
            gpus: 3,
            has_seed: false,
        },
        Plan {
            works_for: &b,
            gpus: 3,
            has_seed: false,
        },
    ];
    let miner = Miner::start(&[&a, &b], &plans).await;

    // Each validator's chutes run on its own host, from its own registry.
    let shared_a = miner.serving(&a, "shared").await;
    let only_a = miner.serving(&a, "only-a").await;
    let shared_b = miner.serving(&b, "shared").await;
    let only_b = miner.serving(&b, "only-b").await;
    for (row, server) in [
        (&shared_a, "host-1.test"),
        (&only_a, "host-1.test"),
        (&shared_b, "host-2.test"),
        (&only_b, "host-2.test"),
    ] {
        assert_eq!(row["server_id"], server, "{row}");
    }
    pulled_only_its_own(&a, "alpha/tool", "beta/");
    pulled_only_its_own(&b, "beta/tool", "alpha/");
    for (validator, other) in [(&a, "only-b"), (&b, "only-a")] {
        let state = miner.state().await;
        let chutes = rows(&state, "chutes").iter();
        let mine: Vec<&Value> = chutes
            .filter(|row| row["validator"] == validator.hotkey.as_str())
            .collect();
        assert_eq!(mine.len(), 2, "{mine:?}");
        assert!(!mine.iter().any(|row| row["name"] == other));
    }

    // One id, two chutes.
    assert_eq!(shared_a["chute_id"], shared_b["chute_id"]);
    assert_ne!(shared_a["version"], shared_b["version"]);
    assert_ne!(shared_a["instance_id"], shared_b["instance_id"]);

    // Deleted at one, it goes on at the other.
    let processes_of_b = miner.chutes_on(2);
    assert_eq!(processes_of_b.len(), 2);
    a.perform(&Action::DeleteChute {
        chute: "shared".to_owned(),
    })
    .await;
    miner.gone(&shared_a).await;
    until("its process is gone", async || {
        (miner.chutes_on(1).len() == 1).then_some(())
    })
    .await;
    let state = miner.state().await;
    let of_id = |row: &&Value| row["chute_id"] == shared_b["chute_id"];
    let known: Vec<&Value> = rows(&state, "chutes").iter().filter(of_id).collect();
    assert_eq!(known.len(), 1);
    assert_eq!(known[0]["validator"], b.hotkey.as_str());
    assert_eq!(identity(&miner.serving(&b, "shared").await), identity(&shared_b));
    assert_eq!(miner.chutes_on(2), processes_of_b);
    no_instance_ended(&b);

    // One validator is away: the other's chutes go on, and new ones are placed.
    b.stop().await;
    a.publish(chute("late-a")).await;
    let late_a = miner.serving(&a, "late-a").await;
    assert_eq!(late_a["server_id"], "host-1.test");
    assert_eq!(identity(&miner.serving(&a, "only-a").await), identity(&only_a));
    assert_eq!(miner.chutes_on(2), processes_of_b);

    // It comes back and finds everything as it was.
    b.start_again().await;
    until("the miner listens again", async || {
        let ledger = b.ledger();
        let mut records = ledger.iter().rev().map(|entry| &entry.record);
        records
            .by_ref()
            .take_while(|record| !matches!(record, Record::Started { .. }))
            .any(|record| matches!(record, Record::SocketAuthenticated { .. }))
            .then_some(())
    })
    .await;
    let instances = b.instances().await;
    assert_eq!(instances.len(), 2, "{instances:?}");
    for row in [&shared_b, &only_b] {
        let found = instances
            .iter()
            .find(|instance| instance["instance_id"] == row["instance_id"]);
        let found = found.expect("it was there before");
        assert!(found["active"] == true && found["verified"] == true, "{found}");
    }
    b.publish(chute("late-b")).await;
    let late_b = miner.serving(&b, "late-b").await;
    assert_eq!(late_b["server_id"], "host-2.test");
    for (name, row) in [("shared", &shared_b), ("only-b", &only_b)] {
        assert_eq!(identity(&miner.serving(&b, name).await), identity(row));
    }
    no_instance_ended(&b);
    miner.stop().await;
}

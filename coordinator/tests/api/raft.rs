//! The members' routes over real replicas: three in this process, each with its own API.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::StatusCode;
use coordinator::api::{Alone, Config, Deps, Limits, ReplicatedCluster, router};
use coordinator::backup::{self, Door, Snapshots};
use coordinator::clock::{AgreedClock, Clock};
use coordinator::leader::Scheduling;
use coordinator::member::ReplicatedLog;
use coordinator::membership::HandOver;
use coordinator::store::{BoxFuture, Machine, Store};
use coordinator_core::state_machine::host::{InviteId, NewHost};
use coordinator_core::state_machine::{Command, Faults, Reply};
use replica::{Replica, Start, Storage, Transport, Unreachable};
use serde_json::{Value, json};

use super::fixture::{Fixture, LastListings, Reports, Types, server_id, signer};

const SITES: [&str; 3] = ["east", "east", "west"];

/// All replicas of this process, by member.
#[derive(Clone, Default)]
struct Links(Arc<Mutex<BTreeMap<u64, Replica>>>);

/// One member's way to the others.
struct End(u64, Links);

impl Transport for End {
    fn call<'a>(
        &'a self,
        member: u64,
        _: &'a str,
        request: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, Unreachable>> {
        let unreachable = |reason: String| Unreachable { reason };
        Box::pin(async move {
            let replica = self.1.0.lock().unwrap().get(&member).cloned();
            let replica = replica.ok_or_else(|| unreachable("not there".to_owned()))?;
            let answer = tokio::time::timeout(within, replica.answer(self.0, &request)).await;
            let answer = answer.map_err(|late| unreachable(late.to_string()))?;
            answer.map_err(|error| unreachable(error.to_string()))
        })
    }
}

/// A member with its API; its replica stays in `links`.
async fn member(id: u64, folder: &tempfile::TempDir, links: &Links) -> (Fixture, Replica) {
    let mut fixture = Fixture::new().await;
    let storage = Storage::Files {
        directory: folder.path().join(id.to_string()),
    };
    let mut config = replica::Config::new("cluster-1", id, storage);
    config.address = address(id);
    config.start = if id == 1 { Start::Found } else { Start::Join };
    let machine = Machine::new(Faults::none());
    let end = Arc::new(End(id, links.clone()));
    let replica = Replica::open(config, Box::new(machine.clone()), end)
        .await
        .expect("an empty folder");
    links.0.lock().unwrap().insert(id, replica.clone());
    let log = Arc::new(ReplicatedLog::new(replica.clone()));
    let clock = Arc::clone(&fixture.clock) as Arc<dyn Clock>;
    fixture.store = Store::new(machine, log, clock, id);
    let config = Config {
        miner: fixture.miner.hotkey().clone(),
        member: id.to_string(),
        allow_plain_legacy_writes: false,
        limits: Limits::default(),
    };
    let (hand_over, mut wishes) = HandOver::channel();
    let of_wishes = replica.clone();
    tokio::spawn(async move {
        while let Some(wish) = wishes.recv().await {
            wish.carry_out(&of_wishes).await;
        }
    });
    let deps = Deps {
        supported_gpus: Arc::new(Types::default()),
        hosts: Arc::new(Reports::default()),
        validator_listing: Arc::new(LastListings::default()),
        scheduling: Scheduling::default(),
        cluster: Arc::new(ReplicatedCluster::new(
            "cluster-1".to_owned(),
            replica.clone(),
            hand_over,
            AgreedClock::new(id, fixture.clock.clone()),
        )),
        backup: Door::new(
            Some(Snapshots::new(
                "cluster-1".to_owned(),
                fixture.store.clone(),
                replica.clone(),
            )),
            None,
            backup::Reports::default(),
        ),
        others: Arc::new(Alone),
        signer: signer(),
        workers: None,
    };
    fixture.routes = router(config, fixture.store.clone(), deps);
    (fixture, replica)
}

fn address(member: u64) -> String {
    format!("gpu-{member}.example:4433")
}

fn host(member: u64) -> NewHost {
    let name = format!("gpu-{member}");
    NewHost {
        server: server_id(&name),
        site: SITES[usize::try_from(member - 1).unwrap()].to_owned(),
        address: address(member),
        key_hash: [u8::try_from(member).unwrap(); 32],
        name,
    }
}

/// The view of a leader that has heard both others.
async fn raft_of_leader(fixture: &Fixture) -> Value {
    let asked = async {
        loop {
            let raft = raft_of(fixture).await;
            let members = raft["members"].as_array().unwrap();
            let heard = |row: &&Value| row["matched"].is_u64() && row["answered_ago_ms"].is_u64();
            if members.iter().filter(heard).count() == 2 {
                return raft;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let asked = tokio::time::timeout(Duration::from_secs(20), asked).await;
    asked.expect("both others are heard")
}

async fn raft_of(fixture: &Fixture) -> Value {
    let answer = fixture.ask("GET", "/v1/raft", "").await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    answer.json()
}

#[tokio::test]
async fn three_members_tell_who_they_are_and_hand_the_lead_over() {
    let (folder, links) = (tempfile::tempdir().unwrap(), Links::default());
    let (first, leader) = member(1, &folder, &links).await;
    first
        .propose(Command::FoundCluster {
            authority_pem: "-----BEGIN CERTIFICATE-----\nAQID\n-----END CERTIFICATE-----\n".to_owned(),
            sealed_key: vec![1],
            founder: host(1),
        })
        .await;
    let alone = first.ask("POST", "/v1/raft/transfer", "").await;
    assert_eq!(alone.status, StatusCode::CONFLICT);
    assert!(
        alone.detail().contains("no other voter answers"),
        "{}",
        alone.text()
    );
    let mut others = Vec::new();
    for id in 2..=3 {
        let invited = first.ask("POST", "/hosts/invites", r#"{"eligible":true}"#).await;
        let token = invited.json()["token"].as_str().unwrap().to_owned();
        let token: coordinator::join::Token = token.parse().unwrap();
        let joined = first
            .propose(Command::JoinHost {
                id: InviteId(token.invite),
                secret_hash: token.secret_hash(),
                host: host(id),
            })
            .await;
        assert_eq!(joined, Reply::Joined { member: Some(id) });
        let rows = raft_of(&first).await["members"].clone();
        assert_eq!(rows.as_array().unwrap().last().unwrap()["role"], "learner");
        others.push(member(id, &folder, &links).await.0);
        leader.add_learner(id, address(id)).await.expect("it leads");
    }
    leader
        .set_voters(BTreeSet::from([1, 2, 3]))
        .await
        .expect("all of them follow");

    let raft = raft_of_leader(&first).await;
    let members = raft["members"].as_array().unwrap();
    assert_eq!((&raft["leader"], members.len()), (&json!(1), 3));
    for (index, row) in members.iter().enumerate() {
        assert_eq!(
            (&row["role"], &row["site"]),
            (&json!("voter"), &json!(SITES[index]))
        );
        assert_eq!(row["matched"].is_u64(), index > 0, "{row}");
        assert_eq!(row["leads"], index == 0);
    }
    let survives = |raft: &Value| [0, 1].map(|site| raft["sites"][site]["survives"].clone());
    assert_eq!(survives(&raft), [json!(false), json!(true)]);

    // A follower answers too, and says who knows more.
    let second = &others[0];
    let raft = raft_of(second).await;
    assert_eq!((&raft["leader"], &raft["answered_by"]), (&json!(1), &json!(2)));
    assert_eq!(raft["sites"], Value::Null);
    let refused = second.ask("POST", "/v1/raft/transfer", "").await;
    assert_eq!(
        refused.detail(),
        "host gpu-1 leads and could not be asked: try again, or ask its API"
    );

    let answer = first.ask("POST", "/v1/raft/transfer", r#"{"to":"gpu-2"}"#).await;
    assert_eq!(answer.json(), json!({ "leader": 2, "host": "gpu-2" }));
    let raft = raft_of(second).await;
    assert_eq!(
        (&raft["leader"], &raft["members"][1]["leads"]),
        (&json!(2), &json!(true))
    );
    assert_eq!(survives(&raft), [json!(false), json!(true)]);
    // What anyone of them is asked for is written by the new leader.
    let pinned = first.ask("PUT", "/hosts/gpu-3/pin", r#"{"pin":"never"}"#).await;
    assert_eq!(pinned.status, StatusCode::OK, "{}", pinned.text());
    let hosts = others[1].ask("GET", "/hosts", "").await.json();
    assert_eq!(
        (&hosts[2]["pin"], &hosts[1]["leads"]),
        (&json!("never"), &json!(true))
    );
    // Without a majority it is said that nothing was changed, who must be there, and what can be done meanwhile.
    links.0.lock().unwrap().clear();
    let lost = async {
        while others[0].store.leads_now() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let lost = tokio::time::timeout(Duration::from_secs(20), lost).await;
    lost.expect("it hears that nobody follows");
    for (method, path) in [("GET", "/hosts"), ("POST", "/hosts/invites")] {
        let body = if method == "POST" {
            r#"{"eligible":true}"#
        } else {
            ""
        };
        let answer = second.ask(method, path, body).await;
        assert_eq!(
            answer.status,
            StatusCode::SERVICE_UNAVAILABLE,
            "{}",
            answer.text()
        );
        for said in [
            "2 of these voters must be there",
            "member 1 at gpu-1.example:4433",
            "member 2 at gpu-2.example:4433, this one",
            "X-Chutes-Read: local",
            "raft recover",
            "nothing was changed",
        ] {
            assert!(answer.detail().contains(said), "{said}: {}", answer.detail());
        }
    }
}

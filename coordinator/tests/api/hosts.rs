//! `/hosts` and `/v1/raft`: inviting, joining with what was given out, pins, removal, who votes and who leads.

use std::collections::{BTreeMap, BTreeSet};

use axum::http::StatusCode;
use coordinator::api::{Progress, Roles};
use coordinator::join::Token;
use coordinator_core::state_machine::host::{InviteId, NewHost};
use coordinator_core::state_machine::{Command, Reply};
use protocol::id::ServerId;
use protocol::report::WorkloadReport;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::fixture::{FOREIGN, Fixture, LOOPBACK, server_id};

/// The bytes 1, 2, 3 where a certificate would be.
const AUTHORITY: &str = "-----BEGIN CERTIFICATE-----\nAQID\n-----END CERTIFICATE-----\n";

fn new_host(name: &str, key: u8, site: &str) -> NewHost {
    NewHost {
        server: server_id(name),
        name: name.to_owned(),
        site: site.to_owned(),
        address: format!("{name}.example:4433"),
        key_hash: [key; 32],
    }
}

/// `gpu-a` has founded a cluster and leads it.
async fn founded() -> Fixture {
    let fixture = Fixture::new().await;
    let command = Command::FoundCluster {
        authority_pem: AUTHORITY.to_owned(),
        sealed_key: vec![1],
        founder: new_host("gpu-a", 1, "east"),
    };
    assert_eq!(fixture.propose(command).await, Reply::Done);
    *fixture.members.roles.lock().unwrap() = Roles {
        leader: Some(1),
        voters: BTreeSet::from([1]),
        learners: BTreeSet::new(),
        own: 1,
        term: 4,
    };
    fixture
}

async fn invited(fixture: &Fixture, body: &Value) -> (Value, Token) {
    let answer = fixture.ask("POST", "/hosts/invites", &body.to_string()).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let answer = answer.json();
    let token = answer["token"].as_str().unwrap().parse().unwrap();
    (answer, token)
}

/// Invites a host, which comes with what it was given.
async fn joined(fixture: &Fixture, name: &str, key: u8, site: &str, eligible: bool) -> Option<u64> {
    let (_, token) = invited(fixture, &json!({ "eligible": eligible })).await;
    let command = Command::JoinHost {
        id: InviteId(token.invite),
        secret_hash: token.secret_hash(),
        host: new_host(name, key, site),
    };
    match fixture.propose(command).await {
        Reply::Joined { member } => member,
        other => panic!("{other:?}"),
    }
}

/// Members 1 to 3 in two sites, all voters, and the observer `gpu-d`.
async fn of_three() -> Fixture {
    let fixture = founded().await;
    assert_eq!(joined(&fixture, "gpu-b", 2, "east", true).await, Some(2));
    assert_eq!(joined(&fixture, "gpu-c", 3, "west", true).await, Some(3));
    assert_eq!(joined(&fixture, "gpu-d", 4, "west", false).await, None);
    fixture.members.roles.lock().unwrap().voters = BTreeSet::from([1, 2, 3]);
    let answered = |ms| Progress {
        matched: Some(90),
        answered_ago_ms: Some(ms),
    };
    *fixture.members.progress.lock().unwrap() = BTreeMap::from([(2, answered(40)), (3, answered(60))]);
    fixture
}

#[tokio::test]
async fn an_invitation_says_where_to_come_and_with_what() {
    let fixture = founded().await;
    let (answer, token) = invited(&fixture, &json!({})).await;
    assert_eq!(answer["invite"], format!("{:032x}", token.invite));
    assert_eq!(
        answer["expires_at"], "2025-01-01T01:00:00.000000+00:00",
        "an hour"
    );
    assert_eq!(token.cluster, "cluster-1");
    assert_eq!(token.doors, ["gpu-a.example:4433"]);
    assert_eq!(token.authority, <[u8; 32]>::from(Sha256::digest([1, 2, 3])));
    let (_, other) = invited(&fixture, &json!({})).await;
    assert_ne!((token.invite, token.secret), (other.invite, other.secret));
    let invite = fixture
        .store
        .read(|state| state.invites().get(&InviteId(token.invite)).cloned())
        .unwrap();
    assert_eq!(invite.secret_hash, <[u8; 32]>::from(Sha256::digest(token.secret)));
    assert!(!invite.eligible && invite.site.is_none() && invite.used_by.is_none());
    let asked = json!({ "eligible": true, "ttl": "10m", "site": " west " });
    let (answer, token) = invited(&fixture, &asked).await;
    assert_eq!(answer["expires_at"], "2025-01-01T00:10:00.000000+00:00");
    let invite = fixture
        .store
        .read(|state| state.invites().get(&InviteId(token.invite)).cloned())
        .unwrap();
    assert!(invite.eligible);
    assert_eq!(invite.site.as_deref(), Some("west"));
    let (answer, _) = invited(&fixture, &json!({ "ttl": 86400 })).await;
    assert_eq!(answer["expires_at"], "2025-01-02T00:00:00.000000+00:00");
    // No body is no wish.
    let answer = fixture.ask("POST", "/hosts/invites", "").await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
}

#[tokio::test]
async fn what_cannot_be_an_invitation_is_refused() {
    let fixture = Fixture::new().await;
    let answer = fixture.ask("POST", "/hosts/invites", "{}").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(
        answer.detail(),
        "the cluster is not founded yet: try again in a moment"
    );
    let fixture = founded().await;
    for (body, why) in [
        (json!({ "ttl": "25h" }), "24h at most"),
        (json!({ "ttl": 0 }), "24h at most"),
        (json!({ "ttl": "soon" }), "24h at most"),
        (json!({ "ttl": -1 }), "Ttl"),
        (json!({ "site": "" }), "1 to 64 characters"),
        (json!({ "site": "x".repeat(65) }), "1 to 64 characters"),
        (json!({ "eligable": true }), "unknown field"),
    ] {
        let answer = fixture.ask("POST", "/hosts/invites", &body.to_string()).await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
        let text = answer.json()["detail"][0]["msg"].as_str().unwrap().to_owned();
        assert!(text.contains(why), "{body}: {text}");
    }
    assert_eq!(fixture.store.read(|state| state.invites().len()), 0);
}

#[tokio::test]
async fn hosts_are_listed_with_their_roles() {
    let fixture = of_three().await;
    fixture.members.roles.lock().unwrap().voters = BTreeSet::from([1]);
    let report = WorkloadReport {
        fence: Default::default(),
        workloads: vec![],
    };
    let reports = || fixture.reports.0.lock().unwrap();
    reports().insert(server_id("gpu-d"), (super::fixture::START, report));
    let hosts = fixture.ask("GET", "/hosts", "").await.json();
    assert_eq!(
        hosts[0],
        json!({
            "server_id": "gpu-a-uid", "name": "gpu-a", "site": "east", "address": "gpu-a.example:4433",
            "member": 1, "eligible": true, "role": "voter", "leads": true, "pin": "auto",
            "joined_at": "2025-01-01T00:00:00.000000+00:00", "revoked_at": null, "connected": false,
        })
    );
    let rows: Vec<_> = hosts.as_array().unwrap().iter().collect();
    let of = |name: &str| rows.iter().map(|row| row[name].clone()).collect::<Vec<_>>();
    assert_eq!(of("role"), ["voter", "learner", "learner", "observer"]);
    assert_eq!(of("leads"), [true, false, false, false]);
    assert_eq!(of("connected"), [false, false, false, true]);
    assert_eq!(of("site"), ["east", "east", "west", "west"]);
    // Hosts report to the leader: others do not know.
    fixture.members.roles.lock().unwrap().leader = Some(2);
    let hosts = fixture.ask("GET", "/hosts", "").await.json();
    assert_eq!(hosts[3]["connected"], Value::Null);
}

#[tokio::test]
async fn pins_are_for_members_and_three_words() {
    let fixture = of_three().await;
    let answer = fixture.ask("PUT", "/hosts/gpu-b/pin", r#"{"pin":"voter"}"#).await;
    assert_eq!(
        answer.json(),
        json!({ "server_id": "gpu-b-uid", "name": "gpu-b", "pin": "voter" })
    );
    let answer = fixture
        .ask("PUT", "/hosts/gpu-c-uid/pin", r#"{"pin":"never"}"#)
        .await;
    assert_eq!(answer.status, StatusCode::OK, "by its id");
    let hosts = fixture.ask("GET", "/hosts", "").await.json();
    assert_eq!(
        (&hosts[1]["pin"], &hosts[2]["pin"]),
        (&json!("voter"), &json!("never"))
    );
    let answer = fixture.ask("PUT", "/hosts/gpu-d/pin", r#"{"pin":"voter"}"#).await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(answer.detail(), "host gpu-d-uid is not eligible: it has no seed");
    let answer = fixture.ask("PUT", "/hosts/gpu-b/pin", r#"{"pin":"maybe"}"#).await;
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY);
    let answer = fixture.ask("PUT", "/hosts/none/pin", r#"{"pin":"auto"}"#).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND, "{}", answer.text());
}

#[tokio::test]
async fn a_removed_host_is_out_and_its_name_is_free() {
    let fixture = of_three().await;
    fixture.join("gpu-d", &[]).await;
    let silent = Command::RecordHostCondition {
        server: server_id("gpu-d"),
        reachable: false,
        quarantine: None,
    };
    fixture.propose(silent).await;
    let status = async || fixture.ask("GET", "/v1/status", "").await.json();
    assert_eq!(status().await["alerts"][0]["subject"], "gpu-d");
    let answer = fixture.ask("DELETE", "/hosts/gpu-d", "").await;
    let removed = json!({ "server_id": "gpu-d-uid", "name": "gpu-d", "role": "removed", "changed": true });
    assert_eq!(answer.json(), removed);
    let again = fixture.ask("DELETE", "/hosts/gpu-d", "").await.json();
    assert_eq!(again["changed"], false);
    let hosts = fixture.ask("GET", "/hosts", "").await.json();
    assert_eq!(hosts[3]["role"], "removed");
    assert_eq!(hosts[3]["revoked_at"], "2025-01-01T00:00:00.000000+00:00");
    let status = status().await;
    assert_eq!(status["alerts"], json!([]), "nobody misses it");
    assert_eq!(status["servers"].as_array().unwrap().len(), 1, "the founder's");
    // Another host takes the name: it is the one that is meant from now on.
    let (_, token) = invited(&fixture, &json!({})).await;
    let mut host = new_host("gpu-d", 9, "west");
    host.server = ServerId::parse("gpu-z-uid").unwrap();
    let command = Command::JoinHost {
        id: InviteId(token.invite),
        secret_hash: token.secret_hash(),
        host,
    };
    fixture.propose(command).await;
    let answer = fixture.ask("DELETE", "/hosts/gpu-d", "").await.json();
    assert_eq!(answer["server_id"], "gpu-z-uid");
    let answer = fixture.ask("DELETE", "/hosts/none", "").await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND, "{}", answer.text());
}

/// With two members the second only follows. The first could be removed, and nobody was left who could lead.
#[tokio::test]
async fn the_only_voter_stays_while_others_follow() {
    let fixture = of_three().await;
    let votes =
        |voters: &[u64]| fixture.members.roles.lock().unwrap().voters = voters.iter().copied().collect();
    votes(&[2]);
    let answer = fixture.ask("DELETE", "/hosts/gpu-b", "").await;
    assert_eq!(answer.status, StatusCode::CONFLICT, "{}", answer.text());
    assert!(
        answer.detail().contains("chutes-miner host pin gpu-b never"),
        "{}",
        answer.detail()
    );
    votes(&[1]);
    let answer = fixture.ask("DELETE", "/hosts/gpu-b", "").await;
    assert_eq!(answer.json()["changed"], true, "{}", answer.text());
}

#[tokio::test]
async fn hosts_with_work_and_the_last_member_stay() {
    let fixture = founded().await;
    let answer = fixture.ask("DELETE", "/hosts/gpu-a", "").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(
        answer.detail(),
        "host gpu-a-uid is the only member: invite another eligible host first"
    );
    fixture.make_busy().await;
    let answer = fixture.ask("DELETE", "/hosts/gpu-a", "").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert!(answer.detail().contains("has 2 deployments"), "{}", answer.text());
}

#[tokio::test]
async fn the_status_names_the_members() {
    let fixture = of_three().await;
    let status = fixture.ask("GET", "/v1/status", "").await.json();
    let cluster = &status["cluster"];
    assert_eq!(cluster["hosts_with_seed"], json!(["gpu-a", "gpu-b", "gpu-c"]));
    assert_eq!(cluster["members"].as_array().unwrap().len(), 3, "no observer");
    assert_eq!(
        cluster["members"][2],
        json!({
            "host": "gpu-c", "server_id": "gpu-c-uid", "member": 3, "role": "voter", "leads": false,
            "site": "west", "address": "gpu-c.example:4433", "pin": "auto",
        })
    );
}

#[tokio::test]
async fn the_raft_view_says_what_a_site_is_worth() {
    let fixture = of_three().await;
    let raft = fixture.ask("GET", "/v1/raft", "").await.json();
    assert_eq!((&raft["term"], &raft["leader"]), (&json!(4), &json!(1)));
    assert_eq!(
        raft["members"][1],
        json!({
            "member": 2, "host": "gpu-b", "site": "east", "role": "voter", "leads": false, "matched": 90,
            "answered_ago_ms": 40, "clock_ahead_ms": -3_600_000,
        })
    );
    assert_eq!(
        raft["sites"],
        json!([
            { "site": "east", "voters": 2, "survives": false },
            { "site": "west", "voters": 1, "survives": true },
        ])
    );
    // A dead voter elsewhere counts as lost.
    if let Some(silent) = fixture.members.progress.lock().unwrap().get_mut(&2) {
        silent.answered_ago_ms = Some(31_000);
    }
    let raft = fixture.ask("GET", "/v1/raft", "").await.json();
    assert_eq!(raft["sites"][1]["survives"], false);
    // A member that was removed is shown until the log forgets it.
    fixture.ask("DELETE", "/hosts/gpu-c", "").await;
    let raft = fixture.ask("GET", "/v1/raft", "").await.json();
    assert_eq!(
        (&raft["members"][2]["member"], &raft["members"][2]["host"]),
        (&json!(3), &Value::Null)
    );
    // Who does not lead does not know who answers.
    fixture.members.roles.lock().unwrap().leader = None;
    let raft = fixture.ask("GET", "/v1/raft", "").await.json();
    assert_eq!(raft["sites"], Value::Null);
}

#[tokio::test]
async fn the_lead_is_handed_to_a_voter() {
    let fixture = of_three().await;
    fixture.members.roles.lock().unwrap().voters.remove(&2);
    for (to, status, why) in [
        (
            "gpu-b",
            StatusCode::CONFLICT,
            "host gpu-b does not vote at present",
        ),
        ("gpu-d", StatusCode::CONFLICT, "host gpu-d-uid is not eligible"),
        ("none", StatusCode::NOT_FOUND, "none"),
    ] {
        let body = json!({ "to": to }).to_string();
        let answer = fixture.ask("POST", "/v1/raft/transfer", &body).await;
        assert_eq!(answer.status, status, "{to}");
        assert!(answer.detail().contains(why), "{to}: {}", answer.text());
    }
    let body = json!({ "to": "gpu-c" }).to_string();
    let headers = fixture.bound("POST", "/v1/raft/transfer", body.as_bytes());
    let transfer = || fixture.send("POST", "/v1/raft/transfer", &headers, &body, FOREIGN);
    assert_eq!(transfer().await.json(), json!({ "leader": 3, "host": "gpu-c" }));
    let answer = fixture.ask("POST", "/v1/raft/transfer", "").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(
        answer.detail(),
        "host gpu-c leads and could not be asked: try again, or ask its API"
    );
    // The signature was good for one transfer.
    fixture.members.roles.lock().unwrap().leader = Some(1);
    assert_eq!(transfer().await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(fixture.members.roles.lock().unwrap().leader, Some(1));
    let answer = fixture.ask("POST", "/v1/raft/transfer", "").await;
    assert_eq!(answer.json()["host"], "gpu-c", "whoever can");
    *fixture.members.roles.lock().unwrap() = Roles {
        leader: Some(1),
        voters: BTreeSet::from([1]),
        own: 1,
        ..Roles::default()
    };
    let answer = fixture.ask("POST", "/v1/raft/transfer", "").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert_eq!(
        answer.detail(),
        "the lead stays where it is: no other voter answers"
    );
}

#[tokio::test]
async fn original_signatures_change_no_members() {
    let fixture = of_three().await;
    for (method, path, body) in [
        ("POST", "/hosts/invites", "{}"),
        ("DELETE", "/hosts/gpu-d", ""),
        ("PUT", "/hosts/gpu-b/pin", r#"{"pin":"voter"}"#),
        ("POST", "/v1/raft/transfer", "{}"),
    ] {
        let answer = fixture.ask_originally(method, path, body).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{method} {path}");
        assert!(
            answer.detail().contains("this route needs a signature with"),
            "{path}"
        );
        let answer = fixture.send(method, path, &[], body, LOOPBACK).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{method} {path}");
    }
    assert_eq!(
        fixture.ask_originally("GET", "/hosts", "").await.status,
        StatusCode::OK
    );
    let hosts = fixture.ask("GET", "/hosts", "").await.json();
    assert_eq!(
        (&hosts[1]["pin"], &hosts[3]["role"]),
        (&json!("auto"), &json!("observer"))
    );
    assert_eq!(fixture.members.roles.lock().unwrap().leader, Some(1));
}

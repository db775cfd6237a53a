//! Another hotkey for the miner: what keeps it from coming, and what it ends.

use axum::http::StatusCode;
use coordinator::api::Connection;
use coordinator_core::state_machine::Command;
use coordinator_core::state_machine::host::NewHost;
use protocol::hotkey::Signer;
use protocol::signing::SEQUENCE_HEADER;
use serde_json::{Value, json};

use super::fixture::{Fixture, LOOPBACK, server_id};

const PATH: &str = "/v1/hotkey";

impl Fixture {
    async fn found(&self) {
        let founder = NewHost {
            server: server_id("gpu-a"),
            name: "gpu-a".to_owned(),
            site: String::new(),
            address: "203.0.113.1:4433".to_owned(),
            key_hash: [1; 32],
        };
        self.propose(Command::FoundCluster {
            authority_pem: "pem".to_owned(),
            sealed_key: vec![1, 2],
            founder,
        })
        .await;
    }

    fn wish(&self, new: &Signer) -> Value {
        json!({ "old": self.miner.hotkey(), "new": new.hotkey(), "sealed_key": "0304" })
    }
}

#[tokio::test]
async fn what_works_for_a_validator_keeps_the_hotkey() {
    let fixture = Fixture::busy().await;
    fixture.found().await;
    let status = fixture.ask("GET", PATH, "").await.json();
    assert_eq!(status["hotkey"], json!(fixture.miner.hotkey()));
    assert_eq!(status["sealed_key"], "0102");
    let reasons = status["in_the_way"].to_string();
    assert!(
        reasons.contains("chutes-miner delete-node --name gpu-a"),
        "{reasons}"
    );
    let wish = fixture.wish(&Signer::from_seed(&[7; 32])).to_string();
    let refused = fixture.ask("POST", PATH, &wish).await;
    assert_eq!(refused.status, StatusCode::CONFLICT);
    assert!(
        refused.detail().contains("2 deployments are not gone yet"),
        "{}",
        refused.detail()
    );
    let status = fixture.ask("GET", PATH, "").await.json();
    assert_eq!(status["hotkey"], json!(fixture.miner.hotkey()), "nothing changed");
}

#[tokio::test]
async fn with_the_old_hotkey_all_that_it_opened_ends() {
    let mut fixture = Fixture::new().await;
    fixture.found().await;
    let connection = Connection::default();
    let opened = fixture.bound("POST", "/v1/connection", b"");
    let opened = fixture.open_on(&connection, "POST", "/v1/connection", &opened, "", LOOPBACK);
    assert_eq!(opened.await.status(), StatusCode::OK);

    let new = Signer::from_seed(&[7; 32]);
    let good = fixture.wish(&new);
    for (what, value) in [
        ("new", json!("5Gr")),
        ("old", json!("")),
        ("sealed_key", json!("")),
        ("sealed_key", json!("xy")),
        ("sealed_key", json!("00".repeat(5000))),
    ] {
        let mut wish = good.clone();
        wish[what] = value;
        let refused = fixture.ask("POST", PATH, &wish.to_string()).await;
        assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY, "{wish}");
        assert!(refused.text().contains(what), "{}", refused.text());
    }
    let replaced = fixture.ask("POST", PATH, &good.to_string()).await;
    assert_eq!(
        replaced.json(),
        json!({ "hotkey": new.hotkey(), "changed": true })
    );

    assert_eq!(
        fixture.ask("GET", PATH, "").await.status,
        StatusCode::UNAUTHORIZED
    );
    assert_eq!(
        fixture.ask_originally("GET", "/servers/", "").await.status,
        StatusCode::UNAUTHORIZED
    );
    let numbered = [(SEQUENCE_HEADER, "1".to_owned())];
    let answer = fixture.open_on(&connection, "GET", "/v1/bans", &numbered, "", LOOPBACK);
    assert_eq!(
        answer.await.status(),
        StatusCode::UNAUTHORIZED,
        "its connection too"
    );

    fixture.miner = new;
    let status = fixture.ask("GET", PATH, "").await.json();
    assert_eq!(
        (&status["hotkey"], &status["sealed_key"]),
        (&json!(fixture.miner.hotkey()), &json!("0304"))
    );
}

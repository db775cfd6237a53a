//! Snapshots and upgrades, as far as they need no store on a disk: what is refused, and what is shown.

use axum::http::StatusCode;
use coordinator_core::state_machine::format::{FIRST, NEWEST};
use serde_json::{Value, json};

use super::fixture::Fixture;

#[tokio::test]
async fn a_snapshot_needs_a_key_and_a_store() {
    let fixture = Fixture::new().await;
    for (body, status, why) in [
        ("{}", StatusCode::BAD_REQUEST, "chutes-miner snapshot keygen"),
        ("{\"recipient\":\"nonsense\"}", StatusCode::UNPROCESSABLE_ENTITY, "key"),
        ("{\"to\":\"/etc\"}", StatusCode::UNPROCESSABLE_ENTITY, "unknown field"),
        (
            &json!({ "recipient": protocol::snapshot_file::SnapshotKey::new([1; 32]).recipient().to_string() })
                .to_string(),
            StatusCode::SERVICE_UNAVAILABLE,
            "keeps no state on its disk",
        ),
    ] {
        let answer = fixture.ask("POST", "/v1/snapshots", body).await;
        assert_eq!(answer.status, status, "{body}");
        assert!(answer.text().contains(why), "{body}: {}", answer.text());
    }
    let status = fixture.ask("GET", "/v1/status", "").await.json();
    assert_eq!(status["backup"], Value::Null, "this member has put none away");
    assert_eq!(status["cluster"]["id"], "cluster-1");
}

#[tokio::test]
async fn where_nothing_is_new_finalizing_changes_nothing() {
    assert_eq!(NEWEST, FIRST, "with a second format this test has more to say");
    let fixture = Fixture::new().await;
    let shown = fixture.ask("GET", "/v1/upgrade", "").await.json();
    assert_eq!((&shown["format"], &shown["newest"]), (&json!(1), &json!(1)));
    assert_eq!(shown["finalized"], Value::Null);
    assert_eq!(shown["hosts"][0]["name"], "gpu-a");
    assert_eq!(shown["hosts"][0]["ready"], true);
    let answer = fixture.ask("POST", "/v1/upgrade/finalize", "{}").await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.json()["changed"], false);
    assert!(fixture.store.read(|state| state.finalized().is_none()));
    let answer = fixture
        .ask("POST", "/v1/upgrade/finalize", "{\"vouch\":[\"nobody\"]}")
        .await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND, "{}", answer.detail());
}

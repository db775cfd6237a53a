//! A connection that one signature opens: numbers instead of signatures, on this connection only.

use axum::http::StatusCode;
use coordinator::api::Connection;
use protocol::signing::SEQUENCE_HEADER;

use super::fixture::{FOREIGN, Fixture, LOOPBACK};

const OPEN: &str = "/v1/connection";
const BANS: &str = "/v1/bans";

impl Fixture {
    /// The status of a request with a number.
    async fn numbered(&self, connection: &Connection, number: &str, method: &str, body: &str) -> StatusCode {
        let headers = [(SEQUENCE_HEADER, number.to_owned())];
        let answer = self.open_on(connection, method, BANS, &headers, body, LOOPBACK);
        answer.await.status()
    }

    async fn open_by(&self, connection: &Connection, peer: &str) -> StatusCode {
        let headers = self.bound("POST", OPEN, b"");
        self.open_on(connection, "POST", OPEN, &headers, "", peer)
            .await
            .status()
    }
}

#[tokio::test]
async fn an_open_connection_needs_numbers_that_count_up() {
    let fixture = Fixture::busy().await;
    let (connection, other) = (Connection::default(), Connection::default());
    let refused = StatusCode::UNAUTHORIZED;
    assert_eq!(
        fixture.numbered(&connection, "1", "GET", "").await,
        refused,
        "it is not open"
    );
    assert_eq!(fixture.open_by(&connection, LOOPBACK).await, StatusCode::OK);
    assert_eq!(
        fixture.numbered(&connection, "1", "GET", "").await,
        StatusCode::OK
    );
    let ban = r#"{"chute_id":"chute-1","reason":"no"}"#;
    assert_eq!(
        fixture.numbered(&connection, "2", "POST", ban).await,
        StatusCode::OK
    );
    for wrong in ["2", "4", "", "-1", "x"] {
        assert_eq!(
            fixture.numbered(&connection, wrong, "GET", "").await,
            refused,
            "{wrong}"
        );
    }
    assert_eq!(
        fixture.numbered(&other, "3", "GET", "").await,
        refused,
        "another connection is not open"
    );
    assert_eq!(
        fixture.numbered(&connection, "3", "GET", "").await,
        StatusCode::OK
    );
    fixture.pass(3_600_000);
    assert_eq!(
        fixture.numbered(&connection, "4", "GET", "").await,
        refused,
        "not for ever"
    );
}

#[tokio::test]
async fn only_a_new_bound_signature_over_loopback_opens() {
    let fixture = Fixture::new().await;
    let connection = Connection::default();
    assert_eq!(fixture.open_by(&connection, FOREIGN).await, StatusCode::FORBIDDEN);
    let original = fixture.original("POST", b"");
    let answer = fixture
        .open_on(&connection, "POST", OPEN, &original, "", LOOPBACK)
        .await;
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    let bound = fixture.bound("POST", OPEN, b"");
    let answer = fixture
        .open_on(&connection, "POST", OPEN, &bound, "", LOOPBACK)
        .await;
    assert_eq!(answer.status(), StatusCode::OK);
    let other = Connection::default();
    let answer = fixture.open_on(&other, "POST", OPEN, &bound, "", LOOPBACK).await;
    assert_eq!(
        answer.status(),
        StatusCode::UNAUTHORIZED,
        "it has opened one already"
    );
    assert_eq!(
        fixture.numbered(&other, "1", "GET", "").await,
        StatusCode::UNAUTHORIZED
    );
}

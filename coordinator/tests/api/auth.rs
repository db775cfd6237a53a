//! Who is let in: the table of the reference's section 1.2, replays, and signatures used for something else.

use axum::http::StatusCode;
use protocol::hotkey::Signer;
use protocol::signing::{
    MINER_HEADER, NONCE_HEADER, RANDOM_HEADER, SCHEME_HEADER, SIGNATURE_HEADER, VALIDATOR_HEADER,
};

use super::fixture::{FOREIGN, Fixture, LOOPBACK};

fn with(
    headers: &[(&'static str, String)],
    name: &'static str,
    value: Option<&str>,
) -> Vec<(&'static str, String)> {
    let mut headers = headers.to_vec();
    headers.retain(|(other, _)| *other != name);
    headers.extend(value.map(|value| (name, value.to_owned())));
    headers
}

#[tokio::test]
async fn original_signatures_are_refused_as_in_the_reference() {
    let fixture = Fixture::new().await;
    let good = fixture.original("GET", b"");
    let other = Signer::from_seed(&[9; 32]).hotkey().to_string();
    let seconds = 1_735_689_600_i64;
    let nonce = |shift: i64| (seconds + shift).to_string();
    let missing = "go away (missing)";
    let table: Vec<(&'static str, Option<String>, &str)> = vec![
        (MINER_HEADER, None, missing),
        (VALIDATOR_HEADER, None, missing),
        (NONCE_HEADER, None, missing),
        (SIGNATURE_HEADER, None, missing),
        (MINER_HEADER, Some(String::new()), missing),
        (MINER_HEADER, Some(other.clone()), missing),
        (VALIDATOR_HEADER, Some(other), missing),
        (NONCE_HEADER, Some(nonce(-30)), missing),
        (NONCE_HEADER, Some(nonce(30)), missing),
        (NONCE_HEADER, Some(nonce(10_000_000)), missing),
        (NONCE_HEADER, Some("soon".to_owned()), missing),
        (NONCE_HEADER, Some("-1".to_owned()), missing),
        (NONCE_HEADER, Some(nonce(-1)), "go away: (sig): "),
        (SIGNATURE_HEADER, Some("zz".repeat(64)), "go away: (sig): "),
        (SIGNATURE_HEADER, Some("00".repeat(63)), "go away: (sig): "),
        (SIGNATURE_HEADER, Some("00".repeat(64)), "go away: (sig): "),
    ];
    for (name, value, detail) in table {
        let headers = with(&good, name, value.as_deref());
        let answer = fixture.send("GET", "/servers/", &headers, "", LOOPBACK).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{name} {value:?}");
        assert!(
            answer.detail().starts_with(detail),
            "{name} {value:?}: {}",
            answer.text()
        );
        assert!(
            !answer.text().contains("management"),
            "the expected message is not echoed"
        );
    }
    let answer = fixture.send("GET", "/servers/", &good, "", FOREIGN).await;
    assert_eq!(answer.status, StatusCode::OK, "a read may come from anywhere");
    fixture.pass(29_000);
    let answer = fixture.send("GET", "/servers/", &good, "", FOREIGN).await;
    assert_eq!(answer.status, StatusCode::OK);
    fixture.pass(1_000);
    let answer = fixture.send("GET", "/servers/", &good, "", FOREIGN).await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
}

/// Made once with the reference's own library: the vector of its section 1.8.
#[tokio::test]
async fn a_signature_of_the_original_client_is_accepted() {
    let fixture = Fixture::new().await;
    let miner = "5CcyqxXnJucaCnQQvvUg5EPzj1uoNAxACZvzArHw5aVDvgNH".to_owned();
    let signature = "8e8b7d327ed2568f148b40a9b5e2606f53416ba7def89d2fcaeda4373f21d216ac82d2a35826769db694424d6f26e610a02de88a47dca8bf27e389d5e1f26386";
    let headers = [
        ("X-Chutes-Miner", miner.clone()),
        ("X-Chutes-Validator", miner),
        ("X-Chutes-Nonce", "1735689600".to_owned()),
        ("X-Chutes-Signature", signature.to_owned()),
    ];
    let answer = fixture.send("GET", "/servers/", &headers, "", LOOPBACK).await;
    assert_eq!((answer.status, answer.text().as_str()), (StatusCode::OK, "[]"));
}

#[tokio::test]
async fn the_newer_scheme_covers_the_whole_request() {
    let fixture = Fixture::busy().await;
    let good = fixture.bound("DELETE", "/deployments/purge", b"");
    let elsewhere = [
        ("DELETE", "/servers/gpu-a", ""),
        ("DELETE", "/deployments/purge?include_jobs=true", ""),
        ("DELETE", "/deployments/purge", "{}"),
        ("GET", "/servers/", ""),
    ];
    for (method, path, body) in elsewhere {
        let answer = fixture.send(method, path, &good, body, LOOPBACK).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{method} {path}");
    }
    for (name, value) in [
        (SCHEME_HEADER, "3"),
        (RANDOM_HEADER, "short"),
        (NONCE_HEADER, "1735689630"),
        (NONCE_HEADER, "1735689570"),
        (MINER_HEADER, "somebody"),
        (SIGNATURE_HEADER, "00"),
    ] {
        let headers = with(&good, name, Some(value));
        let answer = fixture
            .send("DELETE", "/deployments/purge", &headers, "", LOOPBACK)
            .await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{name}: {value}");
        assert!(answer.detail().starts_with("go away: "), "{}", answer.text());
    }
    assert_eq!(fixture.live(), ["dep-1", "dep-2"]);
    let answer = fixture
        .send("DELETE", "/deployments/purge", &good, "", FOREIGN)
        .await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(fixture.live(), ["dep-2"]);
}

#[tokio::test]
async fn a_write_is_good_for_once() {
    let fixture = Fixture::busy().await;
    for (headers, peer) in [
        (fixture.bound("GET", "/servers/gpu-a/lock", b""), FOREIGN),
        (fixture.original("GET", b""), LOOPBACK),
    ] {
        let ask = || fixture.send("GET", "/servers/gpu-a/lock", &headers, "", peer);
        assert_eq!(ask().await.status, StatusCode::OK);
        let again = ask().await;
        assert_eq!(again.status, StatusCode::UNAUTHORIZED);
        assert_eq!(again.detail(), "this signature was used before");
    }
    // Also where the first one found nothing to do.
    let headers = fixture.original("DELETE", b"");
    let path = "/servers/unknown/deployments";
    let answer = fixture.send("DELETE", path, &headers, "", LOOPBACK).await;
    assert_eq!(answer.status, StatusCode::OK);
    let answer = fixture
        .send("DELETE", "/deployments/purge", &headers, "", LOOPBACK)
        .await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    assert_eq!(fixture.live(), ["dep-1", "dep-2"]);
}

#[tokio::test]
async fn a_captured_read_does_not_purge() {
    let fixture = Fixture::busy().await;
    let captured = fixture.original("GET", b"");
    let read = fixture.send("GET", "/servers/", &captured, "", LOOPBACK).await;
    assert_eq!(read.status, StatusCode::OK);
    for peer in [LOOPBACK, FOREIGN] {
        for path in ["/deployments/purge", "/servers/gpu-a", "/deployments/dep-1"] {
            let answer = fixture.send("DELETE", path, &captured, "", peer).await;
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{path} from {peer}");
        }
    }
    assert_eq!(fixture.live(), ["dep-1", "dep-2"]);
    // Reading again is nothing bad.
    let read = fixture.send("GET", "/servers/", &captured, "", LOOPBACK).await;
    assert_eq!(read.status, StatusCode::OK);
}

#[tokio::test]
async fn original_writes_come_over_loopback_unless_a_setting_allows_others() {
    for (allowed, peer, status) in [
        (false, FOREIGN, StatusCode::UNAUTHORIZED),
        (false, LOOPBACK, StatusCode::OK),
        (false, "[::1]:40000", StatusCode::OK),
        (false, "[::ffff:127.0.0.1]:40000", StatusCode::OK),
        (true, FOREIGN, StatusCode::OK),
    ] {
        let fixture = Fixture::with(allowed, |store| store).await;
        fixture.make_busy().await;
        let headers = fixture.original("DELETE", b"");
        let answer = fixture
            .send("DELETE", "/deployments/purge", &headers, "", peer)
            .await;
        assert_eq!(answer.status, status, "{allowed} {peer}");
    }
}

#[tokio::test]
async fn own_writes_need_the_newer_scheme() {
    let fixture = Fixture::busy().await;
    let body = r#"{"deployments":["dep-1"],"allow_loss":true}"#;
    let answer = fixture.ask_originally("POST", "/v1/stop", body).await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    assert_eq!(fixture.live(), ["dep-1", "dep-2"]);
}

#[tokio::test]
async fn a_write_older_than_the_process_is_refused() {
    let fixture = Fixture::busy().await;
    fixture.pass(5_000);
    let headers = fixture.original("DELETE", b"");
    let older = protocol::signing::headers_to_miner(
        &fixture.miner,
        fixture.miner.hotkey(),
        super::fixture::START - 1_000,
        &protocol::signing::Tail::Purpose(protocol::signing::Purpose::Management),
    );
    let answer = fixture
        .send("DELETE", "/deployments/purge", &older, "", LOOPBACK)
        .await;
    assert_eq!(
        answer.status,
        StatusCode::UNAUTHORIZED,
        "its reads may be forgotten"
    );
    let answer = fixture
        .send("DELETE", "/deployments/purge", &headers, "", LOOPBACK)
        .await;
    assert_eq!(answer.status, StatusCode::OK);
}

#[tokio::test]
async fn every_route_asks_for_a_signature() {
    let fixture = Fixture::busy().await;
    for (method, path) in [
        ("GET", "/servers/"),
        ("POST", "/servers/"),
        ("GET", "/servers/gpu-a/lock"),
        ("POST", "/servers/gpu-a/lock"),
        ("GET", "/servers/gpu-a/unlock"),
        ("POST", "/servers/gpu-a/unlock"),
        ("GET", "/servers/gpu-a/delete_preflight"),
        ("DELETE", "/servers/gpu-a"),
        ("DELETE", "/servers/gpu-a/deployments"),
        ("DELETE", "/deployments/purge"),
        ("DELETE", "/deployments/dep-1"),
        ("GET", "/v1/status"),
        ("GET", "/v1/deployments"),
        ("GET", "/v1/audits"),
        ("GET", "/v1/deployments/dep-1/log"),
        ("GET", "/v1/deployments/dep-1/events"),
        ("GET", "/v1/diff"),
        ("GET", "/v1/explain?server=gpu-a"),
        ("POST", "/v1/stop"),
        ("GET", "/v1/bans"),
        ("POST", "/v1/bans"),
        ("DELETE", "/v1/bans?chute_id=chute-1"),
    ] {
        let answer = fixture.send(method, path, &[], "", LOOPBACK).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{method} {path}");
        assert_eq!(answer.detail(), "go away (missing)", "{method} {path}");
    }
    assert_eq!(fixture.live(), ["dep-1", "dep-2"]);
    let metrics = fixture.send("GET", "/metrics", &[], "", FOREIGN).await;
    assert_eq!(metrics.status, StatusCode::UNAUTHORIZED);
}

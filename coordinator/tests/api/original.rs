//! The routes of the original: shapes, texts and status codes that its clients depend on.

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::fixture::{Fixture, LOOPBACK};

#[tokio::test]
async fn ping_and_what_is_not_there() {
    let fixture = Fixture::new().await;
    let answer = fixture.send("GET", "/ping", &[], "", LOOPBACK).await;
    assert_eq!(answer.text(), r#"{"message":"pong"}"#);
    let answer = fixture.send("GET", "/ready", &[], "", LOOPBACK).await;
    assert_eq!(answer.text(), r#"{"ready":true}"#);
    let answer = fixture.send("GET", "/registry/auth", &[], "", LOOPBACK).await;
    assert_eq!(
        (answer.status, answer.detail().as_str()),
        (StatusCode::NOT_FOUND, "Not Found")
    );
    let answer = fixture.send("PATCH", "/servers/", &[], "", LOOPBACK).await;
    assert_eq!(
        (answer.status, answer.detail().as_str()),
        (StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed")
    );
    let allow = answer.headers["allow"].to_str().unwrap();
    assert!(allow.contains("GET") && allow.contains("POST"), "{allow}");
}

#[tokio::test]
async fn a_missing_slash_is_redirected() {
    let fixture = Fixture::new().await;
    let host = [("host", "miner.example:32000".to_owned())];
    for (method, path, location) in [
        ("GET", "/servers", "http://miner.example:32000/servers/"),
        ("POST", "/servers?a=b", "http://miner.example:32000/servers/?a=b"),
    ] {
        let answer = fixture.send(method, path, &host, "", LOOPBACK).await;
        assert_eq!(answer.status, StatusCode::TEMPORARY_REDIRECT);
        assert_eq!(answer.headers["location"], location);
    }
}

fn gpu(digit: &str, deployment: Value) -> Value {
    json!({
        "gpu_id": digit.repeat(32),
        "validator": "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq",
        "server_id": "gpu-a-uid",
        "deployment_id": deployment,
        "device_info": {
            "uuid": digit.repeat(32),
            "name": "NVIDIA H100 80GB HBM3",
            "memory": 85_031_714_816_u64,
            "processors": 132,
            "clock_rate": 1_980_000.0,
            "max_threads_per_processor": 2048,
        },
        "model_short_ref": "h100_sxm",
        "verified": true,
    })
}

fn deployment(number: u16, verified: bool) -> Value {
    let at = "2025-01-01T00:00:00.000000+00:00";
    let digit = if number == 1 { "a" } else { "b" };
    json!({
        "deployment_id": format!("dep-{number}"),
        "instance_id": verified.then_some("inst-1"),
        "validator": "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq",
        "host": "198.51.100.7",
        "port": 31000 + number,
        "chute_id": format!("chute-{number}"),
        "server_id": "gpu-a-uid",
        "version": "v1",
        "active": verified,
        "verified_at": verified.then_some(at),
        "stub": false,
        "job_id": (!verified).then_some("job-1"),
        "config_id": format!("config-dep-{number}"),
        "created_at": at,
        "gpus": [gpu(digit, json!(format!("dep-{number}")))],
        "chute": {
            "chute_id": format!("chute-{number}"),
            "validator": "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq",
            "name": format!("name of chute-{number}"),
            "image": "user/image:tag",
            "code": "chute = Chute()\n",
            "filename": "app.py",
            "ref_str": "app:chute",
            "version": "v1",
            "supported_gpus": ["h100_sxm", "h200"],
            "gpu_count": 1,
            "created_at": at,
            "updated_at": at,
            "ban_reason": null,
            "chutes_version": "0.3.40",
        },
    })
}

/// Golden: the objects that clients read, member by member.
#[tokio::test]
async fn the_inventory_has_the_shape_of_the_reference() {
    let fixture = Fixture::busy().await;
    fixture.join("gpu-b", &['d']).await;
    let answer = fixture.ask_originally("GET", "/servers/", "").await;
    assert_eq!(answer.headers["content-type"], "application/json");
    let expected = json!([{
        "server_id": "gpu-a-uid",
        "validator": "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq",
        "name": "gpu-a",
        "ip_address": "198.51.100.7",
        "verification_port": 30443,
        "status": "Ready",
        "created_at": "2025-01-01T00:00:00.000000+00:00",
        "labels": { "nvidia.com/gpu.count": "3" },
        "seed": 18_446_744_073_709_551_615_u64,
        "gpu_count": 3,
        "cpu_per_gpu": 4,
        "memory_per_gpu": 32,
        "hourly_cost": 1.5,
        "locked": false,
        "gpus": [gpu("a", json!("dep-1")), gpu("b", json!("dep-2")), gpu("c", Value::Null)],
        "deployments": [deployment(1, true), deployment(2, false)],
    }]);
    assert_eq!(
        answer.json(),
        expected,
        "a host that works for nobody is not listed"
    );
}

#[tokio::test]
async fn locking_says_what_is_so_now() {
    let fixture = Fixture::busy().await;
    for (method, path, locked) in [
        ("GET", "/servers/gpu-a/lock", true),
        ("POST", "/servers/gpu-a-uid/lock", true),
        ("GET", "/servers/gpu-a-uid/unlock", false),
        ("POST", "/servers/gpu-a/unlock", false),
        ("POST", "/servers/gpu-a/lock", true),
    ] {
        let answer = fixture.ask_originally(method, path, "").await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text());
        assert_eq!(answer.json()["locked"], locked, "{path}");
        assert_eq!(answer.json()["name"], "gpu-a");
    }
    for path in ["/servers/nobody/lock", "/servers/nobody/unlock"] {
        let answer = fixture.ask_originally("GET", path, "").await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
        assert_eq!(
            answer.detail(),
            "No kubernetes node with id or name nobody found!"
        );
    }
}

#[tokio::test]
async fn the_preflight_lists_jobs_flat() {
    let fixture = Fixture::busy().await;
    let answer = fixture
        .ask_originally("GET", "/servers/gpu-a/delete_preflight", "")
        .await;
    assert_eq!(answer.json(), json!({ "jobs": [deployment(2, false)] }));
    let answer = fixture
        .ask_originally("GET", "/servers/nobody/delete_preflight", "")
        .await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
}

fn purged(number: u16) -> Value {
    json!({
        "chute_id": format!("chute-{number}"),
        "chute_name": format!("name of chute-{number}"),
        "server_id": "gpu-a-uid",
        "server_name": "gpu-a",
        "gpu_count": 1,
    })
}

#[tokio::test]
async fn purges_leave_jobs_alone_unless_asked() {
    for path in ["/deployments/purge", "/servers/gpu-a/deployments"] {
        let fixture = Fixture::busy().await;
        // The original signature covers no query, so it cannot ask for jobs.
        let answer = fixture
            .ask_originally("DELETE", &format!("{path}?include_jobs=true"), "")
            .await;
        let expected = json!({ "status": "initiated", "deployments_purged": [purged(1)] });
        assert_eq!(
            (answer.status, answer.json()),
            (StatusCode::OK, expected),
            "{path}"
        );
        assert_eq!(fixture.live(), ["dep-2"]);
        let answer = fixture
            .ask("DELETE", &format!("{path}?include_jobs=true"), "")
            .await;
        assert_eq!(answer.json()["deployments_purged"], json!([purged(2)]));
        assert!(fixture.live().is_empty());
        let answer = fixture.ask("DELETE", path, "").await;
        assert_eq!(answer.json()["deployments_purged"], json!([]));
    }
}

#[tokio::test]
async fn purging_an_unknown_server_is_no_error() {
    let fixture = Fixture::busy().await;
    let answer = fixture
        .ask_originally("DELETE", "/servers/nobody/deployments", "")
        .await;
    let expected = json!({ "status": "initiated", "deployments_purged": [] });
    assert_eq!((answer.status, answer.json()), (StatusCode::OK, expected));
    assert_eq!(fixture.live(), ["dep-1", "dep-2"]);
}

#[tokio::test]
async fn one_deployment_is_stopped_by_its_id() {
    let fixture = Fixture::busy().await;
    let answer = fixture.ask_originally("DELETE", "/deployments/dep-1", "").await;
    let expected = json!({ "status": "initiated", "deployment_purged": purged(1) });
    assert_eq!((answer.status, answer.json()), (StatusCode::OK, expected));
    assert_eq!(fixture.live(), ["dep-2"]);
    for unknown in ["dep-9", "a b", &"x".repeat(200)] {
        let path = format!("/deployments/{}", unknown.replace(' ', "%20"));
        let answer = fixture.ask_originally("DELETE", &path, "").await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
        assert_eq!(answer.detail(), format!("No deploymentwith id {unknown} found!"));
    }
}

#[tokio::test]
async fn a_server_is_removed_with_its_jobs_only_if_that_is_said() {
    let fixture = Fixture::busy().await;
    let answer = fixture.ask("DELETE", "/servers/gpu-a", "").await;
    assert_eq!(answer.status, StatusCode::CONFLICT, "{}", answer.text());
    assert_eq!(fixture.live(), ["dep-1", "dep-2"]);
    // An original client has asked its user about jobs before.
    let answer = fixture.ask_originally("DELETE", "/servers/gpu-a", "").await;
    assert_eq!(
        answer.json(),
        json!({
            "status": "started",
            "detail": "Deletion of server.name='gpu-a' server.server_id='gpu-a-uid' started, and will be \
                       processed asynchronously by gepetto.",
        })
    );
    assert!(fixture.live().is_empty());
    let fixture = Fixture::busy().await;
    let answer = fixture
        .ask("DELETE", "/servers/gpu-a-uid?include_jobs=true", "")
        .await;
    assert_eq!(answer.status, StatusCode::OK);
    assert!(fixture.live().is_empty());
    let answer = fixture.ask("DELETE", "/servers/nobody", "").await;
    assert_eq!(
        answer.detail(),
        "No kubernetes node with id or name nobody found!"
    );
}

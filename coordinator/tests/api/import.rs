//! Servers of another miner: compared, and taken over while the cluster observes.

use axum::http::StatusCode;
use coordinator_core::state_machine::Command;
use serde_json::{Value, json};

use super::fixture::{Fixture, gpu_id, server_id};

async fn observing() -> Fixture {
    let fixture = Fixture::new().await;
    let observe = Command::SetObserving { observing: true };
    fixture.propose(observe).await;
    fixture
}

fn request(fixture: &Fixture, apply: bool) -> Value {
    let chute = json!({
        "name": "acme/model", "image": "acme/model:1", "version": "v1", "chutes_version": "0.3.40",
        "gpu_count": 2, "supported_gpus": ["h100_sxm"], "tee": false, "filename": "app.py",
        "ref_str": "app:chute", "code": "print()",
    });
    let gpus = ['a', 'b'].map(|digit| json!({ "gpu_id": gpu_id(digit), "verified": true }));
    let port = json!({ "internal": 8000, "external": 31001, "protocol": "tcp" });
    json!({
        "apply": apply,
        "server": {
            "name": "gpu-a", "ip_address": "198.51.100.7", "validator": fixture.validator, "gpu_short_ref": "h100_sxm", "hourly_cost": 2.5,
            "seed": u64::MAX, "locked": true,
            "gpus": gpus,
        },
        "deployments": [{
            "deployment_id": "dep-1", "chute_id": "chute-1", "version": "v1", "image": "acme/model:1",
            "chutes_version": "0.3.40", "gpus": [gpu_id('a'), gpu_id('b')], "job_id": null,
            "config_id": "config-1", "instance_id": "inst-1", "active": true,
            "verified_at_ms": 1_700_000_000_000_u64, "activated_at_ms": null,
            "created_at_ms": 1_699_999_000_000_u64, "preemptible": true, "ready": true,
            "ports": [port], "chute": chute,
        }],
    })
}

#[tokio::test]
async fn a_server_is_compared_first_and_taken_over_when_asked() {
    let fixture = observing().await;
    let before = fixture.ask("GET", "/v1/state", "").await.json();
    let import = async |apply| {
        let body = request(&fixture, apply).to_string();
        let answer = fixture.ask("POST", "/v1/import", &body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        answer.json()
    };
    let compared = import(false).await;
    assert_eq!(compared["server_id"], json!(server_id("gpu-a")));
    assert_eq!(compared["applied"], false);
    assert_eq!(compared["problems"], json!([]));
    assert_eq!(
        compared["changes"].as_array().map(Vec::len),
        Some(5),
        "{compared}"
    );
    assert_eq!(fixture.ask("GET", "/v1/state", "").await.json(), before);

    assert_eq!(import(true).await["applied"], true);
    let servers = fixture.ask("GET", "/servers/", "").await.json();
    let server = &servers[0];
    assert_eq!(server["seed"], json!(u64::MAX), "every bit of it");
    assert_eq!(
        (&server["hourly_cost"], &server["locked"]),
        (&json!(2.5), &json!(true))
    );
    let deployment = &server["deployments"][0];
    assert_eq!(deployment["deployment_id"], "dep-1");
    assert_eq!(
        (&deployment["active"], &deployment["port"]),
        (&json!(true), &json!(31001))
    );
    assert_eq!(deployment["verified_at"], "2023-11-14T22:13:20.000000+00:00");
    let state = fixture.ask("GET", "/v1/state", "").await.json();
    assert_eq!(state["deployments"][0]["phase"], "serving");

    let again = import(true).await;
    assert_eq!(
        (&again["changes"], &again["applied"]),
        (&json!([]), &json!(false))
    );
}

#[tokio::test]
async fn what_cannot_be_taken_over_is_refused_with_the_reason() {
    let fixture = observing().await;
    let ask = async |body: &Value| fixture.ask("POST", "/v1/import", &body.to_string()).await;
    let mut elsewhere = request(&fixture, true);
    elsewhere["server"]["name"] = json!("gpu-z");
    let answer = ask(&elsewhere).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert!(
        answer.detail().contains("no host with the name gpu-z"),
        "{}",
        answer.detail()
    );

    let mut blind = request(&fixture, true);
    blind["server"]["gpus"][1]["gpu_id"] = json!("e".repeat(32));
    let answer = ask(&blind).await.json();
    assert_eq!(answer["applied"], false);
    assert_eq!(answer["problems"].as_array().map(Vec::len), Some(2), "{answer}");

    let mut moved = request(&fixture, true);
    moved["server"]["ip_address"] = json!("192.0.2.9");
    let answer = ask(&moved).await.json();
    assert_eq!(answer["applied"], false);
    let problem = answer["problems"][0].as_str().expect("one");
    assert!(problem.contains("under 192.0.2.9"), "{problem}");

    for (path, value, word) in [
        ("/server/validator", json!("5nobody"), "validator"),
        ("/server/hourly_cost", json!(-1), "hourly_cost"),
        ("/server/seed", json!(-1), "seed"),
        ("/server/gpus/0/gpu_id", json!("x"), "GPU"),
        ("/deployments/0/chute/gpu_count", json!("two"), "gpu_count"),
        ("/deployments/0/ports/0/protocol", json!("smoke"), "smoke"),
        ("/apply", json!("yes"), "apply"),
    ] {
        let mut body = request(&fixture, true);
        *body.pointer_mut(path).expect("it has that") = value;
        let answer = ask(&body).await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{path}");
        // Serde names the type, not always the member.
        let text = answer.text();
        assert!(text.contains(word) || text.contains("invalid"), "{path}: {text}");
    }
    let mut unknown = request(&fixture, true);
    unknown["aply"] = json!(true);
    assert_eq!(ask(&unknown).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    let state = fixture.ask("GET", "/v1/state", "").await.json();
    assert_eq!(state["deployments"], json!([]));
    assert_eq!(state["gpus"], json!([]));
}

#[tokio::test]
async fn a_cluster_that_acts_compares_but_takes_nothing_over() {
    let fixture = Fixture::new().await;
    let body = |apply| request(&fixture, apply).to_string();
    let compared = fixture.ask("POST", "/v1/import", &body(false)).await;
    assert_eq!(compared.status, StatusCode::OK);
    let refused = fixture.ask("POST", "/v1/import", &body(true)).await;
    assert_eq!(refused.status, StatusCode::CONFLICT);
    assert!(
        refused.detail().contains("chutes-miner observe"),
        "{}",
        refused.detail()
    );
    let state = fixture.ask("GET", "/v1/state", "").await.json();
    assert_eq!(state["deployments"], json!([]));
}

#[tokio::test]
async fn an_operator_lets_the_cluster_observe_and_act() {
    let fixture = Fixture::new().await;
    for (observing, changed) in [(true, true), (true, false), (false, true)] {
        let body = json!({ "observing": observing }).to_string();
        let answer = fixture.ask("PUT", "/v1/observing", &body).await.json();
        assert_eq!(answer, json!({ "observing": observing, "changed": changed }));
        let status = fixture.ask("GET", "/v1/status", "").await.json();
        assert_eq!(status["cluster"]["observing_since"].is_string(), observing);
    }
    let nonsense = fixture.ask("PUT", "/v1/observing", "{}").await;
    assert_eq!(nonsense.status, StatusCode::UNPROCESSABLE_ENTITY);
    let body = json!({ "observing": true }).to_string();
    let original = fixture.ask_originally("PUT", "/v1/observing", &body).await;
    assert_eq!(
        original.status,
        StatusCode::UNAUTHORIZED,
        "it needs the newer scheme"
    );
}

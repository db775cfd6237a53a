//! `POST /servers/`: what is refused, and the frames of runs that end well, badly, or unheard.

use std::time::Duration;

use axum::http::StatusCode;
use coordinator_core::state_machine::effect::{EffectKind, EffectOutcome};
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::fixture::{FOREIGN, Fixture, LOOPBACK, server_id};

const VALIDATOR: &str = "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq";

fn body(name: &str, gpu: &str) -> String {
    json!({
        "name": name, "validator": VALIDATOR, "hourly_cost": 1.5, "gpu_short_ref": gpu,
        "agent_api": "http://127.0.0.1:32000",
    })
    .to_string()
}

#[tokio::test]
async fn what_cannot_be_added_is_refused_before_the_stream_begins() {
    let fixture = Fixture::new().await;
    let stranger = "5CcyqxXnJucaCnQQvvUg5EPzj1uoNAxACZvzArHw5aVDvgNH";
    let with_validator = |validator: &str| body("gpu-a", "h100_sxm").replace(VALIDATOR, validator);
    for (body, status, detail) in [
        (
            body("gpu-z", "h100_sxm"),
            StatusCode::NOT_FOUND,
            "No kubernetes node with name=gpu-z found!",
        ),
        (
            body("gpu-a", "h200"),
            StatusCode::BAD_REQUEST,
            "h200 is not supported by validator",
        ),
        (
            with_validator(stranger),
            StatusCode::BAD_REQUEST,
            "is not configured",
        ),
        (
            with_validator("nobody"),
            StatusCode::BAD_REQUEST,
            "validator nobody is not configured",
        ),
    ] {
        let answer = fixture.ask_originally("POST", "/servers/", &body).await;
        assert_eq!(answer.status, status, "{body}");
        assert!(answer.detail().contains(detail), "{body}: {}", answer.text());
    }
    assert!(fixture.store.read(|state| state.gpus().is_empty()));
    fixture.enrol("gpu-a").await;
    for _ in 0..2 {
        let answer = fixture.ask("POST", "/servers/", &body("gpu-a", "h100_sxm")).await;
        assert_eq!(answer.status, StatusCode::CONFLICT);
        assert_eq!(answer.detail(), "Server with name=gpu-a is already provisioned!");
        fixture.verify_if_waiting().await;
    }
}

#[tokio::test]
async fn malformed_bodies_get_422_after_the_signature_was_checked() {
    let fixture = Fixture::new().await;
    let whole: Value = serde_json::from_str(&body("gpu-a", "h100_sxm")).unwrap();
    let changed = |name: &str, value: Value| {
        let mut body = whole.clone();
        body[name] = value;
        body.to_string()
    };
    let without = |name: &str| {
        let mut body = whole.clone();
        body.as_object_mut().unwrap().remove(name);
        body.to_string()
    };
    for (body, kind, loc) in [
        (String::new(), "json_invalid", json!("body")),
        ("{".to_owned(), "json_invalid", json!("body")),
        ("[]".to_owned(), "model_attributes_type", json!("body")),
        (without("name"), "missing", json!("name")),
        (without("validator"), "missing", json!("validator")),
        (without("hourly_cost"), "missing", json!("hourly_cost")),
        (without("gpu_short_ref"), "missing", json!("gpu_short_ref")),
        (changed("name", json!(7)), "string_type", json!("name")),
        (
            changed("hourly_cost", json!("much")),
            "float_type",
            json!("hourly_cost"),
        ),
        (
            changed("hourly_cost", json!(null)),
            "float_type",
            json!("hourly_cost"),
        ),
        (
            changed("hourly_cost", json!(-1)),
            "out_of_range",
            json!("hourly_cost"),
        ),
        (
            changed("hourly_cost", json!(1e300)),
            "out_of_range",
            json!("hourly_cost"),
        ),
        (
            changed("hourly_cost", json!("NaN")),
            "out_of_range",
            json!("hourly_cost"),
        ),
    ] {
        let answer = fixture.ask_originally("POST", "/servers/", &body).await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
        let problem = &answer.json()["detail"][0];
        assert_eq!(problem["type"], kind, "{body}");
        let place = problem["loc"].as_array().unwrap();
        assert!(place.contains(&loc), "{body}: {place:?}");
        let answer = fixture.send("POST", "/servers/", &[], &body, LOOPBACK).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{body}");
    }
    let body = changed("hourly_cost", json!("2.25"));
    let headers = fixture.original("POST", body.as_bytes());
    let answer = fixture.open("POST", "/servers/", &headers, &body, LOOPBACK).await;
    assert_eq!(
        answer.status(),
        StatusCode::OK,
        "numbers may be texts, as in the original"
    );
    let cost = fixture.store.read(|state| {
        let server = state.servers().get(&server_id("gpu-a")).unwrap();
        server.enrolment.as_ref().unwrap().hourly_cost_usd_micros
    });
    assert_eq!(cost, 2_250_000);
}

/// The frames of a body, one by one.
struct Frames(axum::body::BodyDataStream);

impl Frames {
    async fn begin(fixture: &Fixture) -> Self {
        let body = body("gpu-a", "h100_sxm");
        let headers = fixture.bound("POST", "/servers/", body.as_bytes());
        let response = fixture.open("POST", "/servers/", &headers, &body, FOREIGN).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self(response.into_body().into_data_stream())
    }

    /// The next frame's JSON; an error when the body is cut, none at its end.
    async fn next(&mut self) -> Option<Result<Value, String>> {
        let piece = tokio::time::timeout(Duration::from_secs(20), self.0.next()).await;
        let piece = match piece.expect("a frame in time")? {
            Ok(piece) => piece,
            Err(error) => return Some(Err(error.to_string())),
        };
        let text = std::str::from_utf8(&piece).unwrap();
        let json = text
            .strip_prefix("data: ")
            .and_then(|text| text.strip_suffix("\n\n"));
        Some(Ok(serde_json::from_str(json.expect("one whole frame")).unwrap()))
    }

    async fn until(&mut self, word: &str) -> Value {
        loop {
            let frame = self.next().await.expect("more frames").expect("not cut");
            if frame["message"].as_str().unwrap().contains(word) {
                return frame;
            }
        }
    }
}

#[tokio::test]
async fn a_good_run_tells_every_step() {
    let fixture = Fixture::new().await;
    let mut frames = Frames::begin(&fixture).await;
    let first = frames.until("adding node gpu-a server_id=gpu-a-uid").await;
    assert_eq!(first["timestamp"], "2025-01-01T00:00:00.000000");
    frames.until("tracked in the database").await;
    frames
        .until("discovered 3 GPUs [NVIDIA H100 80GB HBM3], advertising to 1 validator")
        .await;
    frames
        .until(&format!("advertising the GPUs to validator {VALIDATOR}"))
        .await;
    frames.until("waiting for validator").await;
    fixture.advertised().await;
    frames.until("seed received").await;
    for _ in 0..2 {
        frames.until("waiting for validator").await;
    }
    fixture.verify_if_waiting().await;
    frames.until("has verified all GPUs").await;
    let last = frames.until("completed server bootstrapping in ").await;
    assert_eq!(
        (&last["state"], &last["server_id"]),
        (&json!("ready"), &json!("gpu-a-uid"))
    );
    assert!(frames.next().await.is_none(), "the body ends");
}

#[tokio::test]
async fn a_failed_run_says_why_and_is_cut() {
    let fixture = Fixture::new().await;
    let mut frames = Frames::begin(&fixture).await;
    fixture.advertised().await;
    frames.until("seed received").await;
    fixture
        .finish(|kind| match kind {
            EffectKind::AwaitVerification { .. } => Some(EffectOutcome::VerificationFailed {
                detail: "wrong device".to_owned(),
            }),
            _ => None,
        })
        .await;
    let last = frames.until("was not added").await;
    assert_eq!(last["state"], "failed");
    assert!(
        last["message"].as_str().unwrap().contains("wrong device"),
        "{last}"
    );
    assert!(
        matches!(frames.next().await, Some(Err(_))),
        "original clients notice only this"
    );
    assert!(frames.next().await.is_none());
}

#[tokio::test]
async fn an_enrolment_outlives_its_listener() {
    let fixture = Fixture::new().await;
    let mut frames = Frames::begin(&fixture).await;
    frames.until("waiting for validator").await;
    drop(frames);
    fixture.advertised().await;
    fixture.verify_if_waiting().await;
    let answer = fixture.ask("GET", "/servers/", "").await;
    assert_eq!(answer.json()[0]["status"], "Ready");
}

#[tokio::test]
async fn a_server_that_is_removed_meanwhile_was_not_added() {
    let fixture = Fixture::new().await;
    let mut frames = Frames::begin(&fixture).await;
    frames.until("waiting for validator").await;
    let answer = fixture.ask("DELETE", "/servers/gpu-a", "").await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(frames.until("was not added").await["state"], "failed");
}

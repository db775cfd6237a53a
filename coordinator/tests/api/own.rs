//! Our own routes under `/v1`, and the metrics.

use std::collections::BTreeSet;

use axum::http::StatusCode;
use coordinator::api::Roles;
use protocol::logs::{HostAnswer, Log, WorkloadEvent};
use protocol::time::UnixMillis;
use serde_json::{Value, json};

use super::fixture::{Fixture, LOOPBACK, server_id};

#[tokio::test]
async fn the_status_counts_what_there_is() {
    let fixture = Fixture::busy().await;
    fixture.join("gpu-b", &['d']).await;
    let status = fixture.ask("GET", "/v1/status", "").await.json();
    assert_eq!(status["cluster"]["miner"], fixture.miner.hotkey().as_str());
    assert_eq!(status["cluster"]["members"][0]["host"], "host-1");
    assert_eq!(status["cluster"]["hosts_with_seed"], json!(["host-1"]));
    assert_eq!(
        status["gpus"],
        json!({ "total": 3, "verified": 3, "free": 1, "held": 2 })
    );
    assert_eq!(status["deployments"]["serving"], 1);
    assert_eq!(status["deployments"]["launched"], 1);
    assert_eq!(status["deployments"]["draining"], 0);
    assert_eq!(status["outbox"], json!({ "length": 0, "oldest": null }));
    assert_eq!(status["alerts"], json!([]));
    assert_eq!(status["servers"][0]["takes_no_work_because"], Value::Null);
    assert_eq!(
        status["servers"][1]["takes_no_work_because"],
        "it is not enrolled"
    );
    // An effect that waits becomes an alert.
    fixture.enrol("gpu-b").await;
    fixture.pass(6 * 60_000);
    let status = fixture.ask("GET", "/v1/status", "").await.json();
    assert_eq!(status["outbox"]["length"], 1);
    assert_eq!(status["outbox"]["oldest"]["waits_seconds"], 360);
    assert_eq!(status["alerts"][0]["subject"], "outbox");
}

#[tokio::test]
async fn the_timeline_of_a_launch_and_of_its_end() {
    let fixture = Fixture::busy().await;
    let rows = fixture.ask("GET", "/v1/deployments", "").await.json();
    let (first, second) = (&rows["deployments"][0], &rows["deployments"][1]);
    let at = "2025-01-01T00:00:00.000000+00:00";
    for time in [
        "created_at",
        "requested_at",
        "running_at",
        "claimed_at",
        "verified_at",
        "active_at",
    ] {
        assert_eq!(first[time], at, "{time}");
    }
    assert_eq!(
        (&first["phase"], &first["deadline"]),
        (&json!("serving"), &Value::Null)
    );
    assert_eq!(first["reason"], "the best value for its cost");
    assert_eq!(
        (&second["phase"], &second["claimed_at"]),
        (&json!("launched"), &Value::Null)
    );
    assert_eq!(second["job_id"], "job-1");
    fixture.ask("DELETE", "/deployments/dep-1", "").await;
    let rows = fixture.ask("GET", "/v1/deployments", "").await.json();
    assert_eq!(rows["deployments"][0]["phase"], "stopping");
    assert_eq!(
        rows["deployments"][0]["stop"]["reason"],
        "a person asked for it: it was named"
    );
    fixture.delete_instances().await;
    fixture.report("gpu-a", vec![]).await;
    let audits = fixture.ask("GET", "/v1/audits?limit=1", "").await.json();
    assert_eq!(audits["audits"].as_array().unwrap().len(), 1);
    let all = fixture.ask("GET", "/v1/audits", "").await.json();
    let gone: Vec<&Value> = all["audits"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| &row["deployment_id"])
        .collect();
    assert!(gone.contains(&&json!("dep-1")), "{gone:?}");
}

#[tokio::test]
async fn stopping_respects_protection_jobs_and_the_budget() {
    let fixture = Fixture::busy().await;
    let stop = |body: Value| {
        let fixture = &fixture;
        async move { fixture.ask("POST", "/v1/stop", &body.to_string()).await }
    };
    for (body, status, detail) in [
        (json!({ "deployments": ["dep-1"] }), StatusCode::CONFLICT, "vests"),
        (
            json!({ "deployments": ["dep-2"], "allow_loss": true }),
            StatusCode::CONFLICT,
            "runs a job",
        ),
        (
            json!({ "deployments": ["dep-9"] }),
            StatusCode::NOT_FOUND,
            "dep-9 is not known",
        ),
        (json!({ "deployments": [] }), StatusCode::BAD_REQUEST, "1 to"),
        (
            json!({ "deployments": ["dep-1"], "reason": " " }),
            StatusCode::BAD_REQUEST,
            "reason",
        ),
    ] {
        let answer = stop(body.clone()).await;
        assert_eq!(answer.status, status, "{body}");
        assert!(answer.detail().contains(detail), "{body}: {}", answer.text());
    }
    for body in [
        json!({}),
        json!({ "deployments": ["dep-1"], "alow_loss": true }),
        json!({ "deployments": ["/"] }),
    ] {
        assert_eq!(stop(body).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    }
    assert_eq!(fixture.live(), ["dep-1", "dep-2"]);
    fixture.place("dep-3", "chute-1", 'c', None).await;
    let body =
        json!({ "deployments": ["dep-1", "dep-2", "dep-3"], "allow_loss": true, "include_jobs": true });
    let answer = stop(body).await.json();
    assert_eq!(
        answer,
        json!({ "stopping": ["dep-1", "dep-2"], "left_by_the_budget": ["dep-3"] })
    );
    let body = json!({ "deployments": ["dep-3"], "allow_loss": true });
    let answer = stop(body).await;
    assert_eq!(answer.status, StatusCode::CONFLICT, "{}", answer.text());
    assert!(answer.detail().contains("budget"));
    let body = json!({ "deployments": ["dep-3"], "allow_loss": true, "budgeted": false });
    assert_eq!(stop(body).await.json()["stopping"], json!(["dep-3"]));
}

#[tokio::test]
async fn bans_come_and_go() {
    let fixture = Fixture::busy().await;
    let ban = |body: Value| {
        let fixture = &fixture;
        async move { fixture.ask("POST", "/v1/bans", &body.to_string()).await }
    };
    let answer = ban(json!({ "chute_id": "chute-9", "reason": "bad" })).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    let answer = ban(json!({ "chute_id": "chute-1", "reason": "it eats the disk" })).await;
    assert_eq!(answer.json()["banned"], true);
    let bans = fixture.ask("GET", "/v1/bans", "").await.json();
    assert_eq!(bans["bans"][0]["chute_id"], "chute-1");
    assert_eq!(bans["bans"][0]["reason"], "it eats the disk");
    let explained = fixture.ask("GET", "/v1/explain?chute=chute-1", "").await.json();
    let why = &explained["chutes"][0]["not_placed_because"];
    assert_eq!(why, "the chute is banned: it eats the disk");
    let answer = fixture.ask("DELETE", "/v1/bans?chute_id=chute-1", "").await;
    assert_eq!(answer.json()["banned"], false);
    assert_eq!(
        fixture.ask("GET", "/v1/bans", "").await.json(),
        json!({ "bans": [] })
    );
}

#[tokio::test]
async fn explanations_come_from_the_rulebook() {
    let fixture = Fixture::busy().await;
    let explained = fixture.ask("GET", "/v1/explain?chute=chute-1", "").await.json();
    let chute = &explained["chutes"][0];
    assert_eq!(chute["not_placed_because"], Value::Null);
    assert_eq!(
        chute["servers"],
        json!([{ "server": "gpu-a", "fits": true, "why_not": [] }])
    );
    let why = chute["deployments"][0]["not_stopped_for_others_because"]
        .as_str()
        .unwrap();
    assert!(why.contains("vests"), "{why}");
    fixture.ask("POST", "/servers/gpu-a/lock", "").await;
    let explained = fixture.ask("GET", "/v1/explain?server=gpu-a", "").await.json();
    assert_eq!(explained["takes_no_work_because"], "it is locked");
    assert_eq!(explained["gpus"][0]["holder"], "dep-1");
    assert_eq!(explained["gpus"][2]["idle_because"], "it is locked");
    let explained = fixture.ask("GET", "/v1/explain?chute=chute-1", "").await.json();
    assert_eq!(
        explained["chutes"][0]["servers"][0]["why_not"],
        json!(["it is locked"])
    );
    let explained = fixture
        .ask("GET", "/v1/explain?deployment=dep-2", "")
        .await
        .json();
    assert_eq!(explained["not_stopped_for_others_because"], "it runs a job");
    for (query, status) in [
        ("chute=none", StatusCode::NOT_FOUND),
        ("server=none", StatusCode::NOT_FOUND),
        ("deployment=none", StatusCode::NOT_FOUND),
        ("server=gpu-a&chute=chute-1", StatusCode::BAD_REQUEST),
    ] {
        let answer = fixture.ask("GET", &format!("/v1/explain?{query}"), "").await;
        assert_eq!(answer.status, status, "{query}: {}", answer.text());
    }
}

#[tokio::test]
async fn metrics_are_open_to_this_machine() {
    let fixture = Fixture::busy().await;
    *fixture.members.roles.lock().unwrap() = Roles {
        leader: Some(2),
        voters: BTreeSet::from([1, 2, 3]),
        own: 1,
        ..Roles::default()
    };
    fixture.send("GET", "/servers/", &[], "", LOOPBACK).await;
    let answer = fixture.send("GET", "/metrics", &[], "", LOOPBACK).await;
    let text = answer.text();
    for line in [
        r#"coordinator_gpus{kind="all"} 3"#,
        r#"coordinator_gpus{kind="free"} 1"#,
        r#"coordinator_deployments{kind="serving"} 1"#,
        "coordinator_outbox_length 0",
        "coordinator_leader_known 1",
        "coordinator_leads 1",
        r#"coordinator_members{kind="voter"} 3"#,
        r#"coordinator_api_answers_total{method="GET",status="401"} 1"#,
    ] {
        assert!(
            text.lines().any(|other| other == line),
            "{line} is missing in\n{text}"
        );
    }
    let signed = fixture.ask("GET", "/metrics", "").await;
    assert_eq!(signed.status, StatusCode::OK, "from elsewhere with a signature");
}

#[tokio::test]
async fn the_door_of_prometheus_asks_for_no_signature_and_shows_nothing_else() {
    let fixture = Fixture::busy().await;
    let (status, text) = fixture.prometheus("/metrics").await;
    assert_eq!(status, StatusCode::OK);
    assert!(text.contains("coordinator_gpus{kind=\"all\"} 3"), "{text}");
    for other in ["/v1/state", "/servers/", "/ping", "/"] {
        assert_eq!(
            fixture.prometheus(other).await.0,
            StatusCode::NOT_FOUND,
            "{other}"
        );
    }
}

#[tokio::test]
async fn what_a_chute_wrote_is_asked_of_its_host() {
    let fixture = Fixture::busy().await;
    let path = "/v1/deployments/dep-1/log?after=3";
    let nobody = fixture.ask("GET", path, "").await;
    assert_eq!(nobody.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(
        nobody.detail(),
        "host gpu-a did not answer: there is no other member"
    );
    let answer_is = |answer| {
        let mut answers = fixture.reports.1.lock().unwrap();
        answers.insert(server_id("gpu-a"), answer);
    };
    answer_is(Ok(HostAnswer::Log(Log {
        text: "a line\n".to_owned(),
        next: Some("10".to_owned()),
        gone: false,
    })));
    let expected = json!({
        "deployment_id": "dep-1", "server_id": "gpu-a-uid", "server_name": "gpu-a",
        "text": "a line\n", "next": "10", "gone": false,
    });
    assert_eq!(fixture.ask("GET", path, "").await.json(), expected);
    let other = fixture.ask("GET", "/v1/deployments/dep-1/events", "").await;
    assert_eq!(other.status, StatusCode::BAD_GATEWAY, "it was no answer to that");
    answer_is(Ok(HostAnswer::Events(vec![WorkloadEvent {
        at: UnixMillis(1_735_689_600_000),
        object: "Pod p".to_owned(),
        reason: "BackOff".to_owned(),
        message: "again".to_owned(),
        count: 2,
    }])));
    let events = fixture
        .ask("GET", "/v1/deployments/dep-1/events", "")
        .await
        .json();
    let at = "2025-01-01T00:00:00.000000+00:00";
    let expected =
        json!([{ "at": at, "object": "Pod p", "reason": "BackOff", "message": "again", "count": 2 }]);
    assert_eq!(events["events"], expected);
    for (answer, status, detail) in [
        (
            Ok(HostAnswer::Unknown),
            StatusCode::NOT_FOUND,
            "has nothing of deployment dep-1",
        ),
        (
            Ok(HostAnswer::Refused("so".to_owned())),
            StatusCode::BAD_REQUEST,
            "host gpu-a: so",
        ),
        (
            Ok(HostAnswer::Failed("no".to_owned())),
            StatusCode::BAD_GATEWAY,
            "host gpu-a: no",
        ),
        (
            Err("late".to_owned()),
            StatusCode::SERVICE_UNAVAILABLE,
            "did not answer: late",
        ),
    ] {
        answer_is(answer);
        let answer = fixture.ask("GET", path, "").await;
        assert_eq!(answer.status, status);
        assert!(answer.detail().contains(detail), "{}", answer.detail());
    }
    let unknown = fixture.ask("GET", "/v1/deployments/nobody/log", "").await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    let misspelt = fixture.ask("GET", "/v1/deployments/dep-1/log?afer=3", "").await;
    assert_eq!(misspelt.status, StatusCode::BAD_REQUEST);
}

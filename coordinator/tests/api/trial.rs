//! `/v1/observing/trial`: what a cluster that observes would do.

use axum::http::StatusCode;
use coordinator::validator::inventory::{Observation, Observed};
use coordinator_core::state_machine::Command;
use protocol::time::UnixMillis;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::fixture::{Fixture, START, gpu_id};

const PATH: &str = "/v1/observing/trial";
/// The command line's tests show this answer, too.
const GOLDEN: &str = include_str!("golden/trial.json");

fn rows<T: DeserializeOwned>(at: UnixMillis, rows: Value) -> Observed<T> {
    Observed::Known {
        asked_at: at,
        rows: serde_json::from_value(rows).expect("rows as on the wire"),
        broken_rows: 0,
    }
}

fn unknown<T>(why: &str) -> Observed<T> {
    Observed::Unknown { why: why.to_owned() }
}

/// Three chutes of which one takes requests, and an instance of the other miner. Ours is missing.
fn look(fixture: &Fixture, at: UnixMillis) -> Observation {
    let chute = |id: &str, cords: &[u8], multiplier: f64| {
        json!({
            "chute_id": id, "version": "v1", "name": format!("name of {id}"), "image": "user/image:tag",
            "filename": "app.py", "code": "chute = Chute()\n", "ref_str": "app:chute",
            "chutes_version": "0.3.40", "supported_gpus": ["h100_sxm", "h200"],
            "node_selector": { "gpu_count": 1 }, "cords": cords, "effective_compute_multiplier": multiplier,
        })
    };
    let instance = |id: &str, chute: &str, config: &str| {
        json!({
            "instance_id": id, "chute_id": chute, "config_id": config, "active": true, "verified": true,
        })
    };
    Observation {
        validator: fixture.validator.clone(),
        chutes: rows(
            at,
            json!([
                chute("chute-1", &[], 1.0),
                chute("chute-2", &[], 1.0),
                chute("chute-3", &[1], 2.5)
            ]),
        ),
        images: unknown("not asked"),
        nodes: rows(at + 1, json!([])),
        instances: rows(at + 2, json!([instance("inst-9", "chute-3", "config-9")])),
        jobs: rows(at, json!([])),
        bounties: rows(at, json!([])),
        metrics: unknown("503: try again"),
        utilization: rows(at, json!([])),
        rolling_updates: rows(at, json!([])),
        active_instances: rows(at, json!([])),
        clock_offset_ms: None,
    }
}

async fn observing(fixture: &Fixture) {
    fixture.propose(Command::SetObserving { observing: true }).await;
}

impl Fixture {
    async fn trial(&self, query: &str) -> Value {
        let answer = self.ask("GET", &format!("{PATH}{query}"), "").await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        answer.json()
    }
}

#[tokio::test]
async fn it_is_shown_and_nothing_is_done() {
    let fixture = Fixture::busy().await;
    // Its GPUs wait to be announced.
    fixture.join("gpu-b", &['d']).await;
    fixture.enrol("gpu-b").await;
    observing(&fixture).await;
    fixture.pass(60_000);
    fixture.listings.record_whole(look(&fixture, START + 50_000));
    let before = fixture.ask("GET", "/v1/state", "").await.json();
    let trial = fixture.trial("?all=true").await;
    let golden: Value = serde_json::from_str(GOLDEN).expect("JSON");
    assert_eq!(trial, golden, "{trial:#}");
    assert_eq!(fixture.ask("GET", "/v1/state", "").await.json(), before);
    let brief = fixture.trial("").await;
    assert_eq!(
        (&brief["left_alone"], &brief["left_alone_because"]),
        (&json!(2), &json!([]))
    );

    // It really acts, by what it has read: the same.
    let act = Command::SetObserving { observing: false };
    fixture.propose(act).await;
    let waiting = fixture.store.read(|state| state.outbox().len());
    assert_eq!(waiting, trial["told"].as_array().unwrap().len());
}

#[tokio::test]
async fn what_cannot_be_shown_yet_is_said_with_the_way_out() {
    let fixture = Fixture::new().await;
    let answer = fixture.ask("GET", PATH, "").await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    for word in ["the cluster acts", "chutes-miner explain", "chutes-miner diff"] {
        assert!(answer.detail().contains(word), "{}", answer.detail());
    }

    observing(&fixture).await;
    let trial = fixture.trial("").await;
    let in_the_way = trial["in_the_way"].as_array().unwrap().clone();
    assert_eq!(in_the_way.len(), 2, "{in_the_way:?}");
    let text = in_the_way[0].as_str().unwrap();
    assert!(text.contains("import --observe"), "{text}");
    let text = in_the_way[1].as_str().unwrap();
    assert!(text.contains("has not read the listing"), "{text}");
    assert_eq!(
        trial["listings"],
        json!([{ "validator": fixture.validator, "read_at": null, "unknown": [] }])
    );
}

#[tokio::test]
async fn servers_of_the_other_miner_count_as_if_they_were_taken_over() {
    let fixture = Fixture::new().await;
    observing(&fixture).await;
    fixture.report("gpu-a", vec![]).await;
    fixture.listings.record_whole(look(&fixture, START));
    let server = |name: &str, address: &str| {
        let gpus = ['a', 'b'].map(|digit| json!({ "gpu_id": gpu_id(digit), "verified": true }));
        json!({
            "server": {
                "name": name, "ip_address": address, "validator": fixture.validator,
                "gpu_short_ref": "h100_sxm", "hourly_cost": 2.5, "seed": null, "locked": false, "gpus": gpus,
            },
            "deployments": [],
        })
    };
    let ask = async |servers: Value| {
        let body = json!({ "servers": servers }).to_string();
        fixture.ask("POST", PATH, &body).await
    };
    let before = fixture.ask("GET", "/v1/state", "").await.json();
    let trial = ask(json!([server("gpu-a", "198.51.100.7")])).await.json();
    assert_eq!(trial["in_the_way"], json!([]));
    assert_eq!(trial["placed"][0]["chute_id"], "chute-3", "{trial:#}");
    assert_eq!(trial["placed"][0]["server_name"], "gpu-a");
    for (name, address, why) in [
        ("gpu-z", "198.51.100.7", "no host with the name gpu-z has joined"),
        ("gpu-a", "192.0.2.9", "under 192.0.2.9"),
    ] {
        let trial = ask(json!([server(name, address)])).await.json();
        let text = trial["in_the_way"][0].as_str().unwrap();
        assert!(text.contains(why), "{text}");
        assert_eq!(trial["placed"], json!([]));
    }
    assert_eq!(fixture.ask("GET", "/v1/state", "").await.json(), before);

    let mut nonsense = server("gpu-a", "198.51.100.7");
    nonsense["server"]["gpus"][0]["gpu_id"] = json!("x");
    let answer = ask(json!([nonsense])).await;
    assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY);
    let unknown = fixture.ask("POST", PATH, "{\"apply\":true}").await;
    assert_eq!(unknown.status, StatusCode::UNPROCESSABLE_ENTITY);
    let unsigned = fixture.send("GET", PATH, &[], "", super::fixture::FOREIGN).await;
    assert_eq!(unsigned.status, StatusCode::UNAUTHORIZED);
}

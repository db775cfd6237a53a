//! `GET /v1/diff`: three sides and their reasons.

use coordinator_core::state_machine::command::{ListedInstance, Listing, Observation};
use protocol::id::{ChuteId, ConfigId, InstanceId};
use protocol::report::WorkloadStatus;
use protocol::time::UnixMillis;
use protocol::workload::{Fence, WorkloadPhase};
use serde_json::{Value, json};

use super::fixture::{Fixture, START, deployment_id, gpu_id, server_id};

fn instance(id: &str, chute: &str, config: Option<&str>) -> ListedInstance {
    ListedInstance {
        instance: InstanceId::parse(id).unwrap(),
        chute: ChuteId::parse(chute).unwrap(),
        config: config.map(|config| ConfigId::parse(config).unwrap()),
        active: true,
        verified: true,
    }
}

impl Fixture {
    fn listed(&self, read_at: UnixMillis, instances: Listing<Vec<ListedInstance>>) {
        self.listings.record(Observation {
            validator: self.validator.clone(),
            read_at,
            chutes: Listing::Unknown,
            instances,
            gpus: Listing::Known(vec![
                (gpu_id('a'), true),
                (gpu_id('b'), true),
                (gpu_id('c'), true),
            ]),
        });
    }

    async fn rows(&self, query: &str) -> Vec<Value> {
        let diff = self.ask("GET", &format!("/v1/diff{query}"), "").await.json();
        diff["rows"].as_array().unwrap().clone()
    }
}

#[tokio::test]
async fn unknown_agrees_with_everything() {
    let fixture = Fixture::busy().await;
    fixture.reports.0.lock().unwrap().clear();
    assert!(fixture.rows("").await.is_empty());
    let rows = fixture.rows("?all=true").await;
    assert_eq!(
        (&rows[0]["host"], &rows[0]["validator"]),
        (&json!("unknown"), &json!("unknown"))
    );
    fixture.listed(START + 1, Listing::Unknown);
    assert!(fixture.rows("").await.is_empty());
}

#[tokio::test]
async fn three_sides_that_agree() {
    let fixture = Fixture::busy().await;
    fixture.listed(
        START + 1,
        Listing::Known(vec![instance("inst-1", "chute-1", Some("config-dep-1"))]),
    );
    assert_eq!(fixture.rows("").await, Vec::<Value>::new());
    let rows = fixture.rows("?all=true").await;
    let sides = |row: &Value| {
        (
            row["state"].clone(),
            row["host"].clone(),
            row["validator"].clone(),
        )
    };
    assert_eq!(
        sides(&rows[0]),
        (json!("serving"), json!("ready"), json!("active"))
    );
    assert_eq!(
        sides(&rows[1]),
        (json!("launched"), json!("ready"), json!("absent"))
    );
    assert_eq!(rows[1]["is_job"], true);
    assert_eq!(rows.iter().filter(|row| row["kind"] == "gpu").count(), 3);
}

#[tokio::test]
async fn each_difference_has_its_reason() {
    let fixture = Fixture::busy().await;
    fixture.listed(
        START + 1,
        Listing::Known(vec![
            instance("inst-2", "chute-2", Some("config-dep-2")),
            instance("inst-9", "chute-1", None),
        ]),
    );
    {
        let mut reports = fixture.reports.0.lock().unwrap();
        let (_, report) = reports.get_mut(&server_id("gpu-a")).unwrap();
        report.workloads.remove(0);
        report.workloads.push(WorkloadStatus {
            deployment: deployment_id("nobody"),
            phase: WorkloadPhase::Pending,
        });
    }
    let rows = fixture.rows("").await;
    let reason = |kind: &str, id: &str| {
        let row = rows.iter().find(|row| row["kind"] == kind && row["id"] == id);
        row.unwrap_or_else(|| panic!("no row {kind} {id} in {rows:#?}"))["reason"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let first = reason("deployment", "dep-1");
    assert!(
        first.contains("the host does not have it although it should"),
        "{first}"
    );
    assert!(
        first.contains("the validator does not list its instance"),
        "{first}"
    );
    let second = reason("deployment", "dep-2");
    assert!(
        second.contains("the record does not know the instance yet"),
        "{second}"
    );
    assert!(reason("workload", "nobody").contains("no deployment accounts for it"));
    assert!(reason("instance", "inst-9").contains("no deployment accounts for it"));
    assert_eq!(rows.len(), 4, "{rows:#?}");
    // A set that the host has not seen yet is no fault of the host.
    fixture
        .reports
        .0
        .lock()
        .unwrap()
        .get_mut(&server_id("gpu-a"))
        .unwrap()
        .1
        .fence = Fence::default();
    let rows = fixture.rows("").await;
    let first = rows.iter().find(|row| row["id"] == "dep-1").unwrap();
    assert!(
        first["reason"]
            .as_str()
            .unwrap()
            .contains("has not taken the newest set up yet")
    );
}

#[tokio::test]
async fn what_is_being_stopped_is_told_apart() {
    let fixture = Fixture::busy().await;
    fixture.listed(
        START + 1,
        Listing::Known(vec![instance("inst-1", "chute-1", Some("config-dep-1"))]),
    );
    fixture.ask("DELETE", "/deployments/dep-1", "").await;
    let rows = fixture.rows("").await;
    let reason = rows[0]["reason"].as_str().unwrap();
    assert!(
        reason.contains("the host has not finished stopping it"),
        "{reason}"
    );
    assert!(reason.contains("its deletion waits"), "{reason}");
    assert_eq!(rows[0]["can_be_stopped"], false);
}

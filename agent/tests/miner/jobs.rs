//! Jobs whose workload dies: given back to the validator for others, and the GPU is free again.

use serde_json::Value;
use validator_stand_in::faults::{HttpAction, HttpFault};
use validator_stand_in::ledger::Record;
use validator_stand_in::scenario::{Action, ChuteSpec, JobSpec};

use super::cluster::{Miner, Plan, end, rows};
use super::stand_in::{StandIn, chute, scenario};
use super::{alone, until};

async fn offer(validator: &StandIn) -> String {
    let offered = validator
        .perform(&Action::OfferJob {
            chute: "batch".to_owned(),
            method: "train".to_owned(),
            // Longer than this test.
            work_ms: 3_600_000,
            disk_gb: 1,
        })
        .await;
    offered["job_id"].as_str().expect("an id").to_owned()
}

/// The deployment that tries a job and is in a phase that fits.
async fn attempt(miner: &Miner, job: &str, table: &str, phase: &str) -> Value {
    until(&format!("job {job} is {phase}"), async || {
        let state = miner.state().await;
        let fits = |row: &&Value| row["job_id"] == job && row["phase"] == phase;
        rows(&state, table).iter().find(fits).cloned()
    })
    .await
}

async fn gpu_is_free(miner: &Miner) -> bool {
    let state = miner.state().await;
    rows(&state, "gpus").iter().all(|gpu| gpu["holder"].is_null())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_workload_dies_is_given_back() {
    let _alone = alone().await;
    let batch = ChuteSpec {
        cords: vec![],
        jobs: vec![JobSpec {
            name: "train".to_owned(),
            ..JobSpec::default()
        }],
        ..chute("batch")
    };
    let validator = StandIn::start(scenario("jobs", 0xe5, vec![batch])).await;
    let plans = [Plan {
        works_for: &validator,
        gpus: 1,
        has_seed: false,
    }];
    let miner = Miner::start(&[&validator], &plans).await;

    // Killed in the middle of its work.
    let job = offer(&validator).await;
    attempt(&miner, &job, "deployments", "serving").await;
    let processes = miner.chutes_on(1);
    assert_eq!(processes.len(), 1);
    end(processes[0]);
    let over = attempt(&miner, &job, "audits", "gone").await;
    assert!(
        over["stop_reason"]
            .as_str()
            .is_some_and(|why| why.contains("WorkloadEnded")),
        "{over}"
    );
    let ends = validator.records(|record| match record {
        Record::JobReleased { job: id, .. } if id.as_str() == job => Some("released"),
        Record::JobFinished { job: id, .. } if id.as_str() == job => Some("finished"),
        _ => None,
    });
    assert_eq!(ends, ["released"], "others may still do it");
    assert!(validator.instances().await.is_empty());
    assert_eq!(validator.job(&job).await["status"], "pending");
    assert!(gpu_is_free(&miner).await);

    // It dies before the validator knows of it.
    let fault = HttpFault {
        path: "/instances/launch_config/".to_owned(),
        method: Some("POST".to_owned()),
        percent: 100,
        times: None,
        action: HttpAction::Refuse { status: 503 },
    };
    validator.perform(&Action::AddHttpFault { fault }).await;
    let unclaimed = offer(&validator).await;
    let over = attempt(&miner, &unclaimed, "audits", "gone").await;
    assert_eq!(over["claimed_at"], Value::Null, "{over}");
    assert!(gpu_is_free(&miner).await);
    assert!(miner.chutes_on(1).is_empty());
    let job = validator.job(&unclaimed).await;
    assert_eq!(
        (&job["status"], &job["finished_at"]),
        (&"pending".into(), &Value::Null)
    );
    miner.stop().await;
}

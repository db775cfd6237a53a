//! The built-in scenario can be met: a greedy little miner with eight software GPUs reaches its goals.

use std::collections::{BTreeMap, BTreeSet};

use protocol::id::GpuId;
use protocol::signing::Purpose;
use serde_json::Value;
use validator_stand_in::scenario::Scenario;

use crate::support::{Flow, World};

/// What runs: by launch config, the chute, its GPUs and its container.
type Running = BTreeMap<String, (String, Vec<GpuId>, tokio::task::JoinHandle<anyhow::Result<()>>)>;

#[tokio::test(flavor = "multi_thread")]
async fn the_development_scenario_reaches_its_goals() {
    let scenario = Scenario::development();
    let (goals, steps) = (scenario.goals.clone(), scenario.program.len());
    let world = World::unfinished(scenario).await;
    let mut free = world.verified_gpus(8).await;
    let mut running = Running::new();
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(goals.within_seconds.into());
    loop {
        assert!(
            tokio::time::Instant::now() < deadline,
            "{}",
            world.control("score").await
        );
        let score = world.control("score").await;
        let reached = |name: &str, goal: u32| score[name].as_u64().is_some_and(|n| n >= u64::from(goal));
        if reached("gpus_proved", goals.gpus_proved)
            && reached("chutes_verified", goals.deployments_verified)
            && reached("jobs_finished", goals.jobs_finished)
            && world.control("state").await["steps_done"] == steps
        {
            break;
        }
        obey_rolling_updates(&world).await;
        collect(&world, &mut running, &mut free).await;
        start_what_is_missing(&world, &mut running, &mut free).await;
    }
    for (_, (_, _, container)) in running {
        container.abort();
    }
    world.server.stop().await;
}

/// Deletes instances of an old version.
async fn obey_rolling_updates(world: &World) {
    let (_, text) = world.call("GET", "/chutes/rolling_updates", Purpose::Miner).await;
    let updates: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    for update in updates {
        for row in world.rows("instances").await {
            if row["chute_id"] == update["chute_id"] && row["version"] == update["old_version"] {
                let (chute, id) = (text_of(&row["chute_id"]), text_of(&row["instance_id"]));
                let path = format!("/instances/{chute}/{id}");
                assert_eq!(world.call("DELETE", &path, Purpose::Instances).await.0, 200);
            }
        }
    }
}

/// Stops containers whose instance is gone, and takes their GPUs back.
async fn collect(world: &World, running: &mut Running, free: &mut Vec<GpuId>) {
    // Claims first, instances afterwards: what was claimed and is not listed is gone.
    let claimed = claimed(world);
    let instances = world.rows("instances").await;
    let gone: Vec<String> = running
        .iter()
        .filter(|(config, (_, _, container))| {
            let known = instances
                .iter()
                .any(|row| text_of(&row["config_id"]) == config.as_str());
            container.is_finished() || (!known && claimed.contains(config.as_str()))
        })
        .map(|(config, _)| config.clone())
        .collect();
    for config in gone {
        if let Some((chute, gpus, container)) = running.remove(&config) {
            if container.is_finished() {
                container
                    .await
                    .expect("no panic")
                    .unwrap_or_else(|error| panic!("a container of {chute} failed: {error:#}"));
            } else {
                container.abort();
            }
            free.extend(gpus);
        }
    }
}

/// Launch configs that were claimed so far.
fn claimed(world: &World) -> BTreeSet<String> {
    let entries = world.server.ledger();
    let rows = entries
        .iter()
        .map(|entry| serde_json::to_value(entry).expect("plain data"));
    rows.filter(|row| row["kind"] == "claim_granted")
        .map(|row| text_of(&row["config"]))
        .collect()
}

async fn start_what_is_missing(world: &World, running: &mut Running, free: &mut Vec<GpuId>) {
    let jobs = world.rows("jobs").await;
    for chute in world.rows("chutes").await {
        let id = text_of(&chute["chute_id"]);
        if running.values().any(|(running, _, _)| *running == id) {
            continue;
        }
        let runs_here = |name: &Value| *name == proof::SOFTWARE.short_ref;
        if !chute["supported_gpus"]
            .as_array()
            .is_some_and(|names| names.iter().any(runs_here))
        {
            continue;
        }
        let job_only = chute["cords"].as_array().is_some_and(Vec::is_empty);
        let job = jobs
            .iter()
            .find(|job| job["chute_id"] == chute["chute_id"] && job["finished_at"].is_null());
        let query = match (job_only, job) {
            (false, _) => format!("chute_id={id}"),
            (true, Some(job)) => format!("chute_id={id}&job_id={}", text_of(&job["job_id"])),
            (true, None) => continue,
        };
        let count = chute["node_selector"]["gpu_count"].as_u64().expect("a number");
        let count = usize::try_from(count).expect("small");
        if free.len() < count {
            continue;
        }
        let (status, config) = world.launch_config(&query).await;
        if status != 200 {
            continue;
        }
        let gpus = free.split_off(free.len() - count);
        let token = text_of(&config["token"]);
        let (container, _) = world.run_chute(&id, &gpus, Flow::Token(&token), None).await;
        running.insert(text_of(&config["config_id"]), (id, gpus, container));
    }
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

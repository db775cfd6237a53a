//! What must hold: nothing twice, nothing without its other side, no chute that ran ended by a kill. Pure
//! functions of the miner's state, the validator's state, the ledger and the processes.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use validator_stand_in::event::RequiredEffect;
use validator_stand_in::ledger::{DeletedBy, Entry, Record};

fn rows<'a>(value: &'a Value, member: &str) -> &'a [Value] {
    value[member].as_array().map_or(&[], Vec::as_slice)
}

fn live(state: &Value) -> impl Iterator<Item = &Value> {
    rows(state, "deployments")
        .iter()
        .filter(|row| row["live"] == true)
}

fn text<'a>(row: &'a Value, member: &str) -> &'a str {
    row[member].as_str().unwrap_or("?")
}

/// Deployments that run twice, launch configs and GPUs that the validator has in two instances.
pub(crate) fn doubled(validator: &Value, chutes: &BTreeMap<&str, usize>) -> Vec<String> {
    let mut found: Vec<String> = chutes
        .iter()
        .filter(|(_, count)| **count > 1)
        .map(|(deployment, count)| format!("{count} processes of deployment {deployment}"))
        .collect();
    let mut seen = BTreeMap::new();
    for instance in rows(validator, "instances") {
        let id = text(instance, "instance_id");
        let gpus = rows(instance, "gpus").iter().filter_map(Value::as_str);
        let config = instance["config_id"].as_str();
        let names = gpus
            .map(|gpu| format!("GPU {gpu}"))
            .chain(config.map(|config| format!("launch config {config}")));
        for name in names {
            if let Some(other) = seen.insert(name.clone(), id) {
                found.push(format!("{name} is in the instances {other} and {id}"));
            }
        }
    }
    found
}

/// Launch configs that more than one instance was ever granted.
pub(crate) fn claimed_twice(ledger: &[Entry]) -> Vec<String> {
    let mut granted: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for entry in ledger {
        if let Record::ClaimGranted { config, instance, .. } = &entry.record {
            let instances = granted.entry(config.to_string()).or_default();
            instances.insert(instance.to_string());
        }
    }
    let twice = granted.into_iter().filter(|(_, instances)| instances.len() > 1);
    twice
        .map(|(config, instances)| format!("launch config {config} became {instances:?}"))
        .collect()
}

/// What has no other side. A launch under way has none for a moment, so this must be empty in the end only.
pub(crate) fn orphaned(state: &Value, validator: &Value, chutes: &BTreeMap<&str, usize>) -> Vec<String> {
    let mut found = Vec::new();
    let instances: BTreeSet<&str> = rows(validator, "instances")
        .iter()
        .filter_map(|row| row["instance_id"].as_str())
        .collect();
    for instance in &instances {
        if !live(state).any(|row| row["instance_id"] == *instance) {
            found.push(format!("instance {instance} has no deployment"));
        }
    }
    for row in live(state).filter(|row| row["phase"] == "serving") {
        let id = text(row, "deployment_id");
        if !row["instance_id"]
            .as_str()
            .is_some_and(|instance| instances.contains(instance))
        {
            found.push(format!("deployment {id} serves without an instance"));
        }
        if !chutes.contains_key(id) {
            found.push(format!("deployment {id} serves without a process"));
        }
    }
    for deployment in chutes.keys() {
        if !live(state).any(|row| row["deployment_id"] == *deployment) {
            found.push(format!(
                "a process of deployment {deployment} runs, which is not wanted"
            ));
        }
    }
    found
}

/// Deployments on the way to serving, or away from it.
pub(crate) fn under_way(state: &Value) -> Vec<String> {
    let moving = rows(state, "deployments")
        .iter()
        .filter(|row| row["phase"] != "serving");
    moving
        .map(|row| {
            format!(
                "deployment {} of {} is {}",
                text(row, "deployment_id"),
                text(row, "chute_name"),
                text(row, "phase")
            )
        })
        .collect()
}

/// What validator, owners and users ended, by the ledger.
#[derive(Debug, Default)]
pub(crate) struct Endings {
    instances: BTreeSet<String>,
    chutes: BTreeSet<String>,
    jobs: BTreeSet<String>,
    /// The newest version of each chute.
    versions: BTreeMap<String, String>,
}

impl Endings {
    pub(crate) fn of(ledger: &[Entry]) -> Self {
        let mut endings = Self::default();
        for entry in ledger {
            match &entry.record {
                Record::EventPublished { event, .. } => {
                    let member = |name: &str| event.data[name].as_str().map(str::to_owned);
                    match event.effect {
                        RequiredEffect::InstanceReplaced | RequiredEffect::InstanceGone => {
                            endings.instances.extend(member("instance_id"));
                        }
                        RequiredEffect::ChuteGone => endings.chutes.extend(member("chute_id")),
                        RequiredEffect::JobGone => endings.jobs.extend(member("job_id")),
                        RequiredEffect::ChuteKnown => {
                            if let (Some(chute), Some(version)) = (member("chute_id"), member("version")) {
                                endings.versions.insert(chute, version);
                            }
                        }
                        _ => {}
                    }
                }
                Record::InstanceDeleted { instance, by, .. } if *by != DeletedBy::Miner => {
                    endings.instances.insert(instance.to_string());
                }
                Record::JobFinished { job, .. } => {
                    endings.jobs.insert(job.to_string());
                }
                _ => {}
            }
        }
        endings
    }

    /// Whether somebody else than the miner wanted this deployment's end.
    pub(crate) fn explain(&self, deployment: &Value) -> bool {
        let named = |set: &BTreeSet<String>, member: &str| {
            deployment[member].as_str().is_some_and(|id| set.contains(id))
        };
        let chute = deployment["chute_id"].as_str().unwrap_or_default();
        let newer = self.versions.get(chute);
        named(&self.instances, "instance_id")
            || named(&self.chutes, "chute_id")
            || named(&self.jobs, "job_id")
            || newer.is_some_and(|version| deployment["version"] != version.as_str())
    }
}

/// The row of a deployment, also when it is over.
pub(crate) fn row_of<'a>(state: &'a Value, deployment: &str) -> Option<&'a Value> {
    let mut all = rows(state, "deployments").iter().chain(rows(state, "audits"));
    all.find(|row| row["deployment_id"] == deployment)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn twice_is_found_in_processes_configs_and_gpus() {
        let fine = json!({"instances": [
            {"instance_id": "i1", "config_id": "c1", "gpus": ["g1"]},
            {"instance_id": "i2", "config_id": "c2", "gpus": ["g2", "g3"]},
        ]});
        assert!(doubled(&fine, &BTreeMap::from([("d1", 1)])).is_empty());
        assert_eq!(doubled(&fine, &BTreeMap::from([("d1", 2)])).len(), 1);
        let bad = json!({"instances": [
            {"instance_id": "i1", "config_id": "c1", "gpus": ["g1"]},
            {"instance_id": "i2", "config_id": "c1", "gpus": ["g1"]},
        ]});
        assert_eq!(doubled(&bad, &BTreeMap::new()).len(), 2);
    }

    #[test]
    fn each_side_without_the_other_is_found() {
        let state = json!({"deployments": [
            {"deployment_id": "d1", "instance_id": "i1", "live": true, "phase": "serving"},
        ]});
        let validator = json!({"instances": [{"instance_id": "i1"}]});
        let chutes = BTreeMap::from([("d1", 1)]);
        assert!(orphaned(&state, &validator, &chutes).is_empty());
        let nothing = json!({"instances": [], "deployments": []});
        assert_eq!(orphaned(&nothing, &validator, &BTreeMap::new()).len(), 1);
        assert_eq!(orphaned(&nothing, &nothing, &chutes).len(), 1);
        assert_eq!(orphaned(&state, &nothing, &chutes).len(), 1);
        assert_eq!(orphaned(&state, &validator, &BTreeMap::new()).len(), 1);
    }

    #[test]
    fn only_others_explain_an_end() {
        let entry = |id, record: Value| {
            let mut row = json!({"id": id, "at": 1});
            let members = record.as_object().expect("an object").clone();
            row.as_object_mut().expect("an object").extend(members);
            serde_json::from_value::<Entry>(row).expect("a ledger entry")
        };
        let deleted = |instance: &str, by: &str| {
            entry(
                1,
                json!({"kind": "instance_deleted", "instance": instance, "chute": "c", "by": by, "reason": ""}),
            )
        };
        let endings = Endings::of(&[deleted("i1", "validator"), deleted("i2", "miner")]);
        let deployment = |instance: &str| json!({"instance_id": instance, "chute_id": "c", "version": "v1"});
        assert!(endings.explain(&deployment("i1")));
        assert!(!endings.explain(&deployment("i2")));
        let claim = |instance: &str| {
            entry(
                2,
                json!({"kind": "claim_granted", "chute": "c", "config": "k", "instance": instance, "gpus": [],
                    "hotkey": "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq", "host": "h", "port": 1}),
            )
        };
        assert!(claimed_twice(&[claim("i1"), claim("i1")]).is_empty());
        assert_eq!(claimed_twice(&[claim("i1"), claim("i2")]).len(), 1);
    }
}

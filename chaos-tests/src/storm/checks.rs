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

/// What validator, owners and users ended, by the ledger. What the miner itself ended explains nothing, although the
/// validator tells of it by the same events.
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
        let mut by_the_miner: BTreeSet<String> = BTreeSet::new();
        let mut job_of: BTreeMap<String, String> = BTreeMap::new();
        for entry in ledger {
            match &entry.record {
                Record::EventPublished { event, .. } => {
                    let member = |name: &str| event.data[name].as_str().map(str::to_owned);
                    match event.effect {
                        RequiredEffect::InstanceReplaced | RequiredEffect::InstanceGone => {
                            let instance = member("instance_id");
                            let by_others = instance.filter(|instance| !by_the_miner.contains(instance));
                            endings.instances.extend(by_others);
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
                Record::InstanceDeleted { instance, by, .. } if *by == DeletedBy::Miner => {
                    // Its job counts as finished just before, by nobody but the miner.
                    if let Some(job) = job_of.get(instance.as_str()) {
                        endings.jobs.remove(job);
                    }
                    by_the_miner.insert(instance.to_string());
                }
                Record::InstanceDeleted { instance, .. } => {
                    endings.instances.insert(instance.to_string());
                }
                Record::JobClaimed { job, instance } => {
                    job_of.insert(instance.to_string(), job.to_string());
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

    fn entry(record: &Value) -> Entry {
        let mut row = json!({"id": 1, "at": 1});
        let members = record.as_object().expect("an object").clone();
        row.as_object_mut().expect("an object").extend(members);
        serde_json::from_value(row).expect("a ledger entry")
    }

    fn deleted(instance: &str, by: &str) -> Entry {
        entry(
            &json!({"kind": "instance_deleted", "instance": instance, "chute": "c", "by": by, "reason": ""}),
        )
    }

    fn published(effect: &str, data: &Value) -> Entry {
        let event = json!({"reason": "any", "effect": effect, "data": data});
        entry(&json!({"kind": "event_published", "event": event, "sent_to": 1, "fault": null}))
    }

    fn gone(instance: &str) -> Entry {
        published(
            "instance_gone",
            &json!({"instance_id": instance, "chute_id": "c"}),
        )
    }

    /// Whether what the ledger says explains the end of the deployment that had instance `i` for job `j`.
    fn explains(ledger: &[Entry]) -> bool {
        let deployment = json!({"instance_id": "i", "job_id": "j", "chute_id": "c", "version": "v1"});
        Endings::of(ledger).explain(&deployment)
    }

    #[test]
    fn only_others_explain_an_end() {
        let claimed = || entry(&json!({"kind": "job_claimed", "job": "j", "instance": "i"}));
        let finished = |status: &str| entry(&json!({"kind": "job_finished", "job": "j", "status": status}));
        let replaced = || published("instance_replaced", &json!({"instance_id": "i"}));
        let updated = |version: &str| published("chute_known", &json!({"chute_id": "c", "version": version}));
        let by_others: [&[Entry]; 8] = [
            &[deleted("i", "validator"), gone("i")],
            &[deleted("i", "cascade")],
            &[gone("i")],
            // The miner does as it is told.
            &[replaced(), deleted("i", "miner"), gone("i")],
            &[
                published("chute_gone", &json!({"chute_id": "c"})),
                deleted("i", "miner"),
            ],
            &[updated("v1"), updated("v2"), deleted("i", "miner"), gone("i")],
            &[claimed(), finished("complete"), deleted("i", "job_done")],
            &[
                claimed(),
                published("job_gone", &json!({"job_id": "j"})),
                deleted("i", "cascade"),
            ],
        ];
        for ledger in by_others {
            assert!(explains(ledger), "{ledger:?}");
        }
        let by_the_miner: [&[Entry]; 6] = [
            &[],
            &[deleted("other", "validator"), gone("other")],
            // As the validator tells of it.
            &[deleted("i", "miner"), gone("i")],
            &[updated("v1"), deleted("i", "miner"), gone("i")],
            // A job whose instance its miner deletes has failed.
            &[claimed(), finished("error"), deleted("i", "miner"), gone("i")],
            &[published("chute_gone", &json!({"chute_id": "other"}))],
        ];
        for ledger in by_the_miner {
            assert!(!explains(ledger), "{ledger:?}");
        }
    }

    #[test]
    fn a_launch_config_that_became_two_instances_is_found() {
        let claim = |instance: &str| {
            entry(
                &json!({"kind": "claim_granted", "chute": "c", "config": "k", "instance": instance, "gpus": [],
                    "hotkey": "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq", "host": "h", "port": 1}),
            )
        };
        assert!(claimed_twice(&[claim("i1"), claim("i1")]).is_empty());
        assert_eq!(claimed_twice(&[claim("i1"), claim("i2")]).len(), 1);
    }
}

//! Which rows of the original's tables say something else than this miner (pure).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::{Map, Value, json};

use crate::import::rows::unix_ms;

/// A table of the original.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TableOf {
    pub(super) name: &'static str,
    /// Its primary key.
    pub(super) key: &'static str,
}

const CHUTES: TableOf = TableOf {
    name: "chutes",
    key: "chute_id",
};
const SERVERS: TableOf = TableOf {
    name: "servers",
    key: "server_id",
};
const DEPLOYMENTS: TableOf = TableOf {
    name: "deployments",
    key: "deployment_id",
};
const GPUS: TableOf = TableOf {
    name: "gpus",
    key: "gpu_id",
};

/// Rows as they are there.
#[derive(Debug, Default)]
pub(super) struct Tables {
    chutes: Vec<Value>,
    servers: Vec<Value>,
    deployments: Vec<Value>,
    gpus: Vec<Value>,
}

impl Tables {
    pub(super) fn each(&mut self) -> [(&'static str, &mut Vec<Value>); 4] {
        [
            (CHUTES.name, &mut self.chutes),
            (SERVERS.name, &mut self.servers),
            (DEPLOYMENTS.name, &mut self.deployments),
            (GPUS.name, &mut self.gpus),
        ]
    }
}

/// What this miner knows, in the original's shape.
#[derive(Debug, Default)]
pub(super) struct Ours {
    servers: Vec<Value>,
    /// Deployments that were ours and are gone.
    gone: BTreeSet<String>,
    /// Ids of nodes, which the original names servers by.
    nodes: BTreeMap<String, String>,
    /// What cannot be written.
    pub(super) problems: Vec<String>,
}

impl Ours {
    /// From the answers to `GET /servers/` and `GET /v1/state`, and the ids of nodes by their names.
    pub(super) fn new(servers: &Value, state: &Value, nodes: &BTreeMap<String, String>) -> Self {
        let audits = state["audits"].as_array().into_iter().flatten();
        let gone = audits.filter_map(|audit| audit["deployment_id"].as_str());
        let mut ours = Self {
            gone: gone.map(str::to_owned).collect(),
            nodes: nodes.clone(),
            ..Self::default()
        };
        for server in servers.as_array().into_iter().flatten() {
            let name = server["name"].as_str().unwrap_or_default();
            if nodes.contains_key(name) {
                ours.servers.push(server.clone());
            } else {
                ours.problems.push(format!(
                    "server {name}: the original's cluster has no node of this name"
                ));
            }
        }
        ours
    }
}

/// What is done to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Insert,
    Update,
    Delete,
}

/// A row that is to be written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Change {
    pub(super) table: TableOf,
    pub(super) verb: Verb,
    pub(super) id: String,
    /// All columns of a new row; of one that is there, those that differ.
    pub(super) row: Value,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.table.name, self.id, self.what())
    }
}

impl Change {
    pub(super) fn columns(&self) -> impl Iterator<Item = &str> {
        self.row
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, _)| name.as_str())
    }

    /// For people.
    pub(super) fn what(&self) -> String {
        match self.verb {
            Verb::Insert => "new".to_owned(),
            Verb::Delete => "gone".to_owned(),
            Verb::Update => {
                let columns = self.row.as_object().into_iter().flatten();
                let columns: Vec<String> = columns.map(|(name, value)| format!("{name} = {value}")).collect();
                columns.join(", ")
            }
        }
    }

    pub(super) fn json(&self) -> Value {
        let columns: Vec<&str> = match self.verb {
            Verb::Update => self.columns().collect(),
            Verb::Insert | Verb::Delete => Vec::new(),
        };
        json!({
            "table": self.table.name, "id": self.id, "what": format!("{:?}", self.verb).to_lowercase(),
            "columns": columns,
        })
    }
}

/// Everything that is to be written, in an order that no foreign key objects to.
pub(super) fn changes(there: &Tables, ours: &Ours) -> Vec<Change> {
    let mut all = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    let [chutes, servers, deployments, gpus] = &mut all;
    let mut seen = BTreeSet::new();
    for server in &ours.servers {
        let there_id = |row: &&Value| row["name"] == server["name"];
        let name = server["name"].as_str().unwrap_or_default();
        let id = match there.servers.iter().find(there_id) {
            Some(row) => row[SERVERS.key].clone(),
            None => json!(ours.nodes.get(name)),
        };
        let mut row = columns_of(server, &["gpus", "deployments"]);
        row.insert(SERVERS.key.to_owned(), id.clone());
        let kept = ["validator", "hourly_cost", "seed", "locked"];
        servers.extend(compared(SERVERS, &there.servers, &row, &kept));
        for deployment in server["deployments"].as_array().into_iter().flatten() {
            let chute = &deployment["chute"];
            if seen.insert(chute[CHUTES.key].to_string()) {
                // One that is there is the original's own affair: it reads it anew from the validator.
                let row = columns_of(chute, &[]);
                chutes.extend(compared(CHUTES, &there.chutes, &row, &[]));
            }
            let mut row = columns_of(deployment, &["gpus", "chute"]);
            row.insert(SERVERS.key.to_owned(), id.clone());
            let kept = [
                "server_id",
                "version",
                "instance_id",
                "config_id",
                "host",
                "port",
                "active",
                "verified_at",
                "stub",
            ];
            deployments.extend(compared(DEPLOYMENTS, &there.deployments, &row, &kept));
        }
        for gpu in server["gpus"].as_array().into_iter().flatten() {
            let mut row = columns_of(gpu, &[]);
            row.insert(SERVERS.key.to_owned(), id.clone());
            if is_held_there(&there.gpus, &row, &ours.gone) {
                row.remove(DEPLOYMENTS.key);
            }
            let kept = ["server_id", "deployment_id", "verified"];
            gpus.extend(compared(GPUS, &there.gpus, &row, &kept));
        }
    }
    let gone = there
        .deployments
        .iter()
        .filter_map(|row| row[DEPLOYMENTS.key].as_str());
    let gone = gone.filter(|id| ours.gone.contains(*id)).map(|id| Change {
        table: DEPLOYMENTS,
        verb: Verb::Delete,
        id: id.to_owned(),
        row: Value::Null,
    });
    // After the GPUs: some generations delete a GPU's deployment with it, and a deployment's GPUs let it go.
    let gone: Vec<Change> = gone.collect();
    all.into_iter().flatten().chain(gone).collect()
}

/// True for a GPU that is free here, and held there by a deployment that was never ours.
fn is_held_there(there: &[Value], row: &Map<String, Value>, gone: &BTreeSet<String>) -> bool {
    let present = there
        .iter()
        .find(|present| Some(&present[GPUS.key]) == row.get(GPUS.key));
    let holder = present.and_then(|present| present[DEPLOYMENTS.key].as_str());
    let is_free = row.get(DEPLOYMENTS.key).is_none_or(Value::is_null);
    is_free && holder.is_some_and(|holder| !gone.contains(holder))
}

fn columns_of(object: &Value, without: &[&str]) -> Map<String, Value> {
    let members = object.as_object().into_iter().flatten();
    let members = members.filter(|(name, _)| !without.contains(&name.as_str()));
    members
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// A new row, or of one that is there those columns of `kept` that differ. A column that an older generation does not
/// have is passed over.
fn compared(table: TableOf, there: &[Value], row: &Map<String, Value>, kept: &[&str]) -> Option<Change> {
    let id = row.get(table.key)?.as_str()?.to_owned();
    let Some(present) = there.iter().find(|present| present[table.key] == id.as_str()) else {
        return Some(Change {
            table,
            verb: Verb::Insert,
            id,
            row: Value::Object(row.clone()),
        });
    };
    let differs = |(name, value): &(&String, &Value)| {
        kept.contains(&name.as_str()) && present.get(name.as_str()).is_some_and(|old| !is_same(old, value))
    };
    let columns: Map<String, Value> = row
        .iter()
        .filter(differs)
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    (!columns.is_empty()).then_some(Change {
        table,
        verb: Verb::Update,
        id,
        row: Value::Object(columns),
    })
}

/// True for equal values, however a time or a number is written.
fn is_same(one: &Value, other: &Value) -> bool {
    if let (Some(one), Some(other)) = (one.as_str(), other.as_str())
        && let (Ok(one), Ok(other)) = (unix_ms(one), unix_ms(other))
    {
        return one == other;
    }
    let as_floats = one.as_f64().zip(other.as_f64());
    let as_numbers = |one: &Value, other: &Value| one.is_f64() || other.is_f64();
    match as_floats {
        Some((left, right)) if as_numbers(one, other) => (left - right).abs() < 1e-6,
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(deployments: &Value, gpu_holder: &Value) -> Ours {
        let servers = json!([{
            "server_id": "our-own-id", "name": "gpu-1", "validator": "5F", "hourly_cost": 2.5, "seed": 1_u64 << 62,
            "locked": true, "labels": {}, "gpu_count": 1,
            "gpus": [{ "gpu_id": "a", "server_id": "our-own-id", "verified": true, "deployment_id": gpu_holder }],
            "deployments": deployments,
        }]);
        let state = json!({ "audits": [{ "deployment_id": "old" }] });
        let nodes = BTreeMap::from([("gpu-1".to_owned(), "node-uid".to_owned())]);
        Ours::new(&servers, &state, &nodes)
    }

    fn deployment() -> Value {
        json!([{
            "deployment_id": "new", "server_id": "our-own-id", "chute_id": "c", "version": "v1", "stub": false,
            "instance_id": "i", "active": true, "verified_at": "2026-01-01T00:00:00.000000+00:00",
            "gpus": [], "chute": { "chute_id": "c", "name": "n" },
        }])
    }

    fn there() -> Tables {
        Tables {
            servers: vec![
                json!({ "server_id": "there", "name": "gpu-1", "validator": "5F", "hourly_cost": 2.5,
                "seed": 1_u64 << 62, "locked": false }),
            ],
            deployments: vec![
                json!({ "deployment_id": "old", "server_id": "there" }),
                json!({ "deployment_id": "never-ours", "server_id": "there" }),
            ],
            gpus: vec![
                json!({ "gpu_id": "a", "server_id": "there", "verified": true, "deployment_id": "old" }),
            ],
            chutes: Vec::new(),
        }
    }

    #[test]
    fn rows_are_written_in_an_order_that_keys_allow() {
        let changes = changes(&there(), &ours(&deployment(), &json!("new")));
        let lines: Vec<String> = changes.iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "chutes c: new",
                "servers there: locked = true",
                "deployments new: new",
                "gpus a: deployment_id = \"new\"",
                "deployments old: gone",
            ],
            "a row that was never ours stays"
        );
        assert_eq!(
            changes[2].row["server_id"], "there",
            "the id by which it is known there"
        );
    }

    #[test]
    fn what_says_the_same_is_not_written() {
        let mut there = there();
        there.servers[0]["locked"] = json!(true);
        there.deployments = vec![json!({
            "deployment_id": "new", "server_id": "there", "version": "v1", "stub": false, "instance_id": "i",
            "active": true, "verified_at": "2026-01-01T01:00:00+01:00",
        })];
        there.gpus[0]["deployment_id"] = json!("new");
        there.chutes = vec![json!({ "chute_id": "c", "name": "another name" })];
        assert_eq!(changes(&there, &ours(&deployment(), &json!("new"))), []);
    }

    #[test]
    fn a_gpu_goes_on_being_held_by_what_was_never_ours() {
        let mut there = there();
        there.servers[0]["locked"] = json!(true);
        let of = |there: &Tables| changes(there, &ours(&json!([]), &Value::Null));
        assert_eq!(of(&there)[0].to_string(), "gpus a: deployment_id = null");
        there.gpus[0]["deployment_id"] = json!("never-ours");
        assert_eq!(of(&there)[0].verb, Verb::Delete, "of the one that was");
    }

    #[test]
    fn seeds_are_compared_to_the_last_bit() {
        let mut there = there();
        there.servers[0]["seed"] = json!((1_u64 << 62) + 1);
        let changes = changes(&there, &ours(&json!([]), &json!("old")));
        assert_eq!(changes[0].row["seed"], json!(1_u64 << 62));
    }

    #[test]
    fn a_server_that_is_no_node_there_is_a_problem() {
        let servers = json!([{ "name": "gpu-2" }]);
        let ours = Ours::new(&servers, &json!({}), &BTreeMap::new());
        assert_eq!(
            ours.problems,
            ["server gpu-2: the original's cluster has no node of this name"]
        );
    }

    #[test]
    fn a_new_server_is_named_by_its_node() {
        let there = Tables::default();
        let changes = changes(&there, &ours(&json!([]), &Value::Null));
        assert_eq!(
            (changes[0].verb, changes[0].id.as_str()),
            (Verb::Insert, "node-uid")
        );
    }
}

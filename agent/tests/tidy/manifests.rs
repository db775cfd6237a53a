//! Which crate may depend on which, and that versions and lints stand in the root manifest.

use std::collections::BTreeSet;

use crate::tree::{check, root};

/// Crates and what each may depend on within the workspace. `chaos-tests` may use everything.
pub(crate) const CRATES: &[(&str, &str, &[&str])] = &[
    ("protocol", "agent/protocol", &[]),
    ("proof", "agent/proof", &["protocol"]),
    // The control plane is for its tests only.
    (
        "runtime",
        "agent/runtime",
        &["protocol", "kubernetes-control-plane"],
    ),
    ("coordinator-core", "coordinator/core", &["protocol"]),
    ("replica", "coordinator/replica", &["protocol"]),
    ("base2histogram", "coordinator/replica/no-histograms", &[]),
    (
        "coordinator",
        "coordinator",
        &["coordinator-core", "replica", "runtime", "protocol"],
    ),
    (
        "agent",
        "agent",
        &[
            "coordinator",
            "coordinator-core",
            "replica",
            "runtime",
            "proof",
            "protocol",
            "validator-stand-in",
            "kubernetes-control-plane",
        ],
    ),
    // What is above the runtime it needs for its tests only.
    (
        "cli",
        "agent/cli",
        &[
            "protocol",
            "runtime",
            "agent",
            "coordinator",
            "coordinator-core",
            "kubernetes-control-plane",
        ],
    ),
    ("kubernetes-control-plane", "chaos-tests/control-plane", &[]),
    (
        "validator-stand-in",
        "chaos-tests/validator",
        &["protocol", "proof"],
    ),
    (
        "chaos-tests",
        "chaos-tests",
        &[
            "agent",
            "cli",
            "coordinator",
            "coordinator-core",
            "replica",
            "runtime",
            "proof",
            "protocol",
            "validator-stand-in",
            "kubernetes-control-plane",
        ],
    ),
];

/// What the manifest of the pure crate must not name.
const NOT_IN_CORE: &[&str] = &[
    "tokio", "redb", "openraft", "reqwest", "quinn", "rustls", "tracing",
];

fn manifest(folder: &str) -> toml::Table {
    let path = root().join(folder).join("Cargo.toml");
    std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .parse()
        .unwrap()
}

/// All dependencies that a manifest names, also those for tests and for certain systems.
fn dependencies(manifest: &toml::Table) -> Vec<(String, toml::Value)> {
    let mut found = Vec::new();
    for (name, value) in manifest {
        let Some(table) = value.as_table() else { continue };
        if name.ends_with("dependencies") {
            found.extend(table.clone());
        } else if name == "target" {
            for system in table.values().filter_map(toml::Value::as_table) {
                found.extend(dependencies(system));
            }
        }
    }
    found
}

#[test]
fn crates_depend_only_on_those_below_them() {
    let mut broken = Vec::new();
    let ours: BTreeSet<&str> = CRATES.iter().map(|(name, ..)| *name).collect();
    for (name, folder, allowed) in CRATES {
        let manifest = manifest(folder);
        assert_eq!(manifest["package"]["name"].as_str(), Some(*name), "{folder}");
        for (dependency, _) in dependencies(&manifest) {
            if ours.contains(dependency.as_str()) && !allowed.contains(&dependency.as_str()) {
                broken.push(format!(
                    "{folder}: must not depend on {dependency} (CRATES in the tidy test)"
                ));
            }
            if *name == "coordinator-core" && NOT_IN_CORE.contains(&dependency.as_str()) {
                broken.push(format!(
                    "{folder}: must stay pure; {dependency} belongs to another crate"
                ));
            }
        }
    }
    check(&broken);
}

#[test]
fn every_member_is_in_the_table_of_crates() {
    let members = manifest("")["workspace"]["members"].as_array().unwrap().clone();
    let members: BTreeSet<&str> = members.iter().filter_map(toml::Value::as_str).collect();
    let listed: BTreeSet<&str> = CRATES.iter().map(|(_, folder, _)| *folder).collect();
    assert_eq!(
        members, listed,
        "give each member a line in CRATES (manifests.rs) and in docs/architecture.md"
    );
}

#[test]
fn versions_and_lints_stand_in_the_root_manifest() {
    let mut broken = Vec::new();
    for (_, folder, _) in CRATES {
        let manifest = manifest(folder);
        for (dependency, value) in dependencies(&manifest) {
            if value.get("workspace").and_then(toml::Value::as_bool) != Some(true) {
                broken.push(format!(
                    "{folder}: write `{dependency}.workspace = true`; the version stands at the top"
                ));
            }
        }
        let lints = manifest.get("lints").and_then(|lints| lints.get("workspace"));
        if lints.and_then(toml::Value::as_bool) != Some(true) {
            broken.push(format!("{folder}: add `[lints]` with `workspace = true`"));
        }
    }
    check(&broken);
}

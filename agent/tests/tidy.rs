//! Rules of the source tree that no tool checks: layout, size, which room may use which, which crate may
//! depend on which, and that the documents speak of files that exist.
//!
//! Each rule is one function that returns what breaks it, worded as what to do instead. The rules read the
//! files that git tracks, so nothing needs to be built. An exception stands in a list here, with its reason,
//! and a list that names something needless fails too.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const LINES_MAX: usize = 800;

/// What may stand at the top of the repository.
const TOP: &[&str] = &[
    ".cargo",
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "agent",
    "ansible",
    "charts",
    "chaos-tests",
    "clippy.toml",
    "coordinator",
    "deny.toml",
    "docs",
    "rust-toolchain.toml",
    "rustfmt.toml",
];

/// Names that say nothing about what is inside.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "types", "helper", "helpers", "misc", "mod"];

/// Files that may contain `unsafe`: calls of the CUDA driver, and the driver that a test makes.
const UNSAFE: &[&str] = &["agent/src/gpu/cuda.rs", "agent/tests/fake_cuda/libcuda.rs"];

/// The seams: files that may do what clippy.toml bans. Tests may too, where they say why.
const SEAMS: &[&str] = &[
    "agent/runtime/src/process/pull.rs",
    "agent/src/cache.rs",
    "agent/src/clock.rs",
    "agent/src/gpu/worker.rs",
    "agent/src/registry/store.rs",
    "agent/src/workloads/store.rs",
    "chaos-tests/validator/src/clock.rs",
    "chaos-tests/validator/src/compute.rs",
    "coordinator/replica/src/storage.rs",
    "coordinator/src/clock.rs",
];

/// Files of the product that open or accept connections. All others are handed streams, or know only bytes.
const DOORS: &[&str] = &[
    "agent/src/data_plane.rs",
    "agent/src/egress.rs",
    "agent/src/egress/network.rs",
    "agent/src/egress/proxy.rs",
    "agent/src/egress/table.rs",
    "agent/src/egress/tunnel.rs",
    "agent/src/link.rs",
    "agent/src/proof_plane.rs",
    "agent/src/registry.rs",
    "agent/src/registry/redirect.rs",
    "agent/src/signer.rs",
    "coordinator/src/api.rs",
    "coordinator/src/host_link/quic.rs",
    "coordinator/src/identity.rs",
    "coordinator/src/signer/client.rs",
    "coordinator/src/validator/socket/dial.rs",
];

/// Crates and what each may depend on within the workspace. `chaos-tests` may use everything.
const CRATES: &[(&str, &str, &[&str])] = &[
    ("protocol", "agent/protocol", &[]),
    ("proof", "agent/proof", &["protocol"]),
    ("runtime", "agent/runtime", &["protocol"]),
    ("coordinator-core", "coordinator/core", &["protocol"]),
    ("replica", "coordinator/replica", &["protocol"]),
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
        ],
    ),
    ("cli", "agent/cli", &["protocol", "coordinator-core"]),
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
        ],
    ),
];

/// What the manifest of the pure crate must not name.
const NOT_IN_CORE: &[&str] = &["tokio", "redb", "openraft", "reqwest", "quinn", "rustls", "tracing"];

/// The rooms of one source folder from top to bottom. A room may use those in lower rows, never one in its
/// own row or above. A longer name is a room of its own (`config::units`); files of one room may use
/// each other.
struct Order {
    source: &'static str,
    rows: &'static [&'static [&'static str]],
}

const ORDERS: &[Order] = &[
    Order {
        source: "coordinator/core/src/state_machine",
        rows: &[
            &["apply", "codec", "invariant"],
            &["reconcile", "observe", "lifecycle", "enrolment"],
            &["placement"],
            &["desired"],
            &["state"],
            &["command", "outbox"],
            &["effect"],
            // The nouns know nothing of the state; a noun may name another noun's key.
            &["job", "server", "deployment"],
            &["chute"],
            &["table"],
        ],
    },
    Order {
        source: "coordinator/src",
        rows: &[
            &["member"],
            &["leader", "api"],
            &["config"],
            &["executor"],
            &["validator", "host_link", "sealed_worker"],
            &["signer", "store", "identity"],
            &["clock"],
        ],
    },
    Order {
        source: "agent/src",
        rows: &[
            &["main", "setup"],
            &["dev"],
            &["processes"],
            &["processes::service", "local"],
            &["processes::child"],
            &["config"],
            &["telemetry"],
            &["config::written"],
            &["host_plane", "proof_plane", "data_plane"],
            &["workloads", "link", "gpu", "registry", "cache", "signer"],
            &["egress"],
            &["config::units"],
            &["clock"],
        ],
    },
];

/// What of the state machine a strategy may name besides the view: words, never the state.
const WORDS_FOR_STRATEGIES: &[&str] = &["chute", "command", "deployment"];

struct File {
    /// Path below the root, with forward slashes.
    path: String,
    text: String,
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_test(&self) -> bool {
        self.path.contains("/tests/")
    }

    /// The code without comment lines and without the unit tests at the bottom.
    fn code(&self) -> String {
        let text = self
            .text
            .split_once("#[cfg(test)]\nmod ")
            .map_or(self.text.as_str(), |(code, _)| code);
        text.lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect::<Vec<_>>()
            .join("\n")
    }

    fn is_self(&self) -> bool {
        self.path == "agent/tests/tidy.rs"
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// All text files that git tracks and that exist.
fn files() -> Vec<File> {
    let root = root();
    let listed = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(&root)
        .output()
        .expect("git is needed to list the files");
    assert!(
        listed.status.success(),
        "git ls-files: {}",
        String::from_utf8_lossy(&listed.stderr)
    );
    let files: Vec<File> = String::from_utf8(listed.stdout)
        .unwrap()
        .split_terminator('\0')
        .filter_map(|path| {
            let text = std::fs::read_to_string(root.join(path)).ok()?;
            Some(File {
                path: path.to_owned(),
                text,
            })
        })
        .collect();
    assert!(files.len() > 100, "only {} files found", files.len());
    files
}

fn rust_files() -> Vec<File> {
    files().into_iter().filter(File::is_rust).collect()
}

fn check(broken: &[String]) {
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

/// Fails for files outside `listed` that match, and for listed ones that do not.
fn only_in(listed: &[&str], matching: impl Fn(&File) -> bool, advice: &str) {
    let found: BTreeSet<String> = rust_files()
        .into_iter()
        .filter(|file| !file.is_self() && matching(file))
        .map(|file| file.path)
        .collect();
    let listed: BTreeSet<String> = listed.iter().map(|path| (*path).to_owned()).collect();
    let mut broken: Vec<String> = found
        .difference(&listed)
        .map(|path| format!("{path}: {advice}"))
        .collect();
    broken.extend(
        listed
            .difference(&found)
            .map(|path| format!("{path}: take it off the list in tidy.rs, it no longer needs to be there")),
    );
    check(&broken);
}

#[test]
fn top_level_has_only_what_is_allowed() {
    let found: BTreeSet<String> = files()
        .iter()
        .map(|file| file.path.split('/').next().unwrap_or_default().to_owned())
        .collect();
    let broken: Vec<String> = found
        .iter()
        .filter(|name| !TOP.contains(&name.as_str()))
        .map(|name| format!("{name}: move it into a crate or into docs/, or add it to TOP with a good reason"))
        .collect();
    check(&broken);
}

#[test]
fn names_say_what_is_inside() {
    let broken: Vec<String> = rust_files()
        .iter()
        .filter(|file| {
            file.path
                .trim_end_matches(".rs")
                .split('/')
                .any(|part| EMPTY_NAMES.contains(&part))
        })
        .map(|file| format!("{}: name the file after what it holds", file.path))
        .collect();
    check(&broken);
}

#[test]
fn every_room_has_its_front_page() {
    let files = rust_files();
    let paths: BTreeSet<&str> = files.iter().map(|file| file.path.as_str()).collect();
    let mut broken = BTreeSet::new();
    for path in &paths {
        let Some((folder, _)) = path.rsplit_once('/') else {
            continue;
        };
        let room = folder.contains("/src/") && !folder.ends_with("/src/bin");
        let page = format!("{folder}.rs");
        if room && !paths.contains(page.as_str()) {
            broken.insert(format!("{folder}/: write its front page {page}, with the files in reading order"));
        }
    }
    check(&broken.into_iter().collect::<Vec<_>>());
}

#[test]
fn every_file_says_what_it_is_for() {
    let broken: Vec<String> = rust_files()
        .iter()
        .filter(|file| !file.text.starts_with("//! "))
        .map(|file| format!("{}: begin it with `//!` and what it is for", file.path))
        .collect();
    check(&broken);
}

#[test]
fn no_file_is_too_long() {
    let broken: Vec<String> = rust_files()
        .iter()
        .filter(|file| file.text.lines().count() > LINES_MAX)
        .map(|file| {
            let lines = file.text.lines().count();
            format!("{}: {lines} lines; split it by what it knows, below {LINES_MAX}", file.path)
        })
        .collect();
    check(&broken);
}

#[test]
fn nothing_is_left_for_later() {
    let marks = ["#[ignore", "todo!(", "unimplemented!(", "TODO", "FIXME", "XXX"];
    let mut broken = Vec::new();
    for file in rust_files().iter().filter(|file| !file.is_self()) {
        for (number, line) in file.text.lines().enumerate() {
            for mark in marks.iter().filter(|mark| line.contains(*mark)) {
                broken.push(format!(
                    "{}:{}: {mark}: do it, or leave it out and say so in the docs",
                    file.path,
                    number + 1
                ));
            }
        }
    }
    check(&broken);
}

#[test]
fn no_path_of_one_machine() {
    let mut broken = Vec::new();
    for file in files().iter().filter(|file| !file.is_self()) {
        for (number, line) in file.text.lines().enumerate() {
            if ["/work/", "/root/", "/home/"].iter().any(|start| line.contains(start)) {
                broken.push(format!(
                    "{}:{}: start from CARGO_MANIFEST_DIR, a temporary folder or a setting",
                    file.path,
                    number + 1
                ));
            }
        }
    }
    check(&broken);
}

#[test]
fn no_glob_imports() {
    let mut broken = Vec::new();
    for file in rust_files() {
        for (number, line) in file.text.lines().enumerate() {
            let line = line.trim();
            if line.contains("use ") && line.ends_with("::*;") && line != "use super::*;" {
                broken.push(format!("{}:{}: name what is imported", file.path, number + 1));
            }
        }
    }
    check(&broken);
}

#[test]
fn unsafe_code_stays_where_it_is() {
    let forms = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "#[unsafe("];
    only_in(
        UNSAFE,
        |file| forms.iter().any(|form| file.text.contains(form)),
        "do it without `unsafe`, or in one of the files listed in tidy.rs",
    );
}

#[test]
fn banned_calls_stay_in_the_seams() {
    only_in(
        SEAMS,
        |file| !file.is_test() && file.code().contains("clippy::disallowed_methods"),
        "ask the seam (clock, storage, worker) instead; see clippy.toml for the reasons",
    );
}

#[test]
fn connections_are_made_in_few_places() {
    let words = ["tokio::net", "std::net::TcpStream", "std::net::TcpListener", "std::os::unix::net", "quinn::"];
    only_in(
        DOORS,
        |file| {
            let product = file.path.starts_with("agent/") || file.path.starts_with("coordinator/");
            let code = file.code();
            product && !file.is_test() && words.iter().any(|word| code.contains(word))
        },
        "let a door of the list in tidy.rs make the connection, and take a stream or bytes",
    );
}

#[test]
fn every_lint_switched_off_has_a_reason() {
    let mut broken = Vec::new();
    for file in rust_files().iter().filter(|file| !file.is_self()) {
        for start in ["[allow(", "[expect("] {
            for (at, _) in file.text.match_indices(start) {
                let attribute = file.text[at..].split_once(")]").map_or("", |(inside, _)| inside);
                if !attribute.contains("reason =") {
                    let line = file.text[..at].lines().count();
                    broken.push(format!("{}:{line}: add `reason = \"...\"`", file.path));
                }
            }
        }
    }
    check(&broken);
}

/// Reads one tree of a `use` (or one path) from `text`, behind `prefix`.
fn read_tree<'a>(text: &'a str, mut prefix: Vec<String>, found: &mut Vec<Vec<String>>) -> &'a str {
    let mut rest = text.trim_start();
    loop {
        if let Some(list) = rest.strip_prefix('{') {
            rest = list.trim_start();
            while !rest.is_empty() && !rest.starts_with('}') {
                let before = rest.len();
                rest = read_tree(rest, prefix.clone(), found).trim_start();
                rest = rest.strip_prefix("as ").map_or(rest, |renamed| {
                    renamed.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_')
                });
                rest = rest.trim_start();
                rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
                if rest.len() == before {
                    return rest;
                }
            }
            return rest.strip_prefix('}').unwrap_or(rest);
        }
        let end = rest
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        if end > 0 {
            prefix.push(rest[..end].to_owned());
        }
        rest = &rest[end..];
        match rest.strip_prefix("::") {
            Some(next) if end > 0 => rest = next,
            _ => {
                found.push(prefix);
                return rest;
            }
        }
    }
}

/// All paths within the crate that `code` of the module `module` names, by `crate::` and `super::`.
fn named(code: &str, module: &[String]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (at, word) in code.match_indices("crate::").chain(code.match_indices("super::")) {
        let inside_word = code[..at]
            .chars()
            .next_back()
            .is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$' || c == ':');
        if inside_word {
            continue;
        }
        let mut rest = &code[at + word.len()..];
        let mut prefix = Vec::new();
        if word == "super::" {
            prefix = module[..module.len().saturating_sub(1)].to_vec();
            while let Some(further) = rest.strip_prefix("super::") {
                rest = further;
                prefix.pop();
            }
        }
        read_tree(rest, prefix, &mut found);
    }
    found
}

/// The module path of a file below the crate's `src`.
fn module(path: &str) -> Vec<String> {
    let (_, inside) = path.split_once("/src/").unwrap();
    let parts = inside.trim_end_matches(".rs").split('/').map(str::to_owned);
    parts.filter(|part| part != "lib").collect()
}

/// The row and the room of the longest room name that `path` begins with.
fn room(rows: &[&[&'static str]], path: &[String]) -> Option<(usize, &'static str)> {
    let mut best: Option<(usize, &'static str)> = None;
    for (row, names) in rows.iter().enumerate() {
        for name in *names {
            let parts: Vec<&str> = name.split("::").collect();
            let begins = parts.len() <= path.len() && parts.iter().zip(path).all(|(a, b)| a == b);
            if begins && best.is_none_or(|(_, other)| other.len() < name.len()) {
                best = Some((row, name));
            }
        }
    }
    best
}

fn broken_arrows(order: &Order, files: &[File]) -> Vec<String> {
    let mut broken = Vec::new();
    let base = if order.source.ends_with("/src") {
        Vec::new()
    } else {
        module(order.source)
    };
    for file in files {
        let Some(inside) = file.path.strip_prefix(order.source).filter(|rest| rest.starts_with('/')) else {
            continue;
        };
        if inside == "/lib.rs" {
            continue;
        }
        let own_module = module(&file.path);
        let Some((own_row, own)) = room(order.rows, &own_module[base.len()..]) else {
            broken.push(format!("{}: give its room a row in ORDERS (tidy.rs)", file.path));
            continue;
        };
        for target in named(&file.code(), &own_module) {
            let Some(target) = target.strip_prefix(base.as_slice()) else {
                continue;
            };
            let Some((row, other)) = room(order.rows, target) else {
                continue;
            };
            if other != own && row <= own_row {
                broken.push(format!(
                    "{}: `{own}` must not use `{}`: arrows go down only (ORDERS in tidy.rs); pass what is needed as \
                     an argument, or move it down",
                    file.path,
                    target.join("::")
                ));
            }
        }
    }
    broken
}

#[test]
fn rooms_use_only_what_is_below_them() {
    let files = rust_files();
    let broken: Vec<String> = ORDERS.iter().flat_map(|order| broken_arrows(order, &files)).collect();
    check(&broken);
}

#[test]
fn strategies_know_the_view_and_not_the_state() {
    let mut broken = Vec::new();
    for file in rust_files() {
        if !file.path.starts_with("coordinator/core/src/scheduler/") || file.path.ends_with("/view.rs") {
            continue;
        }
        for target in named(&file.code(), &module(&file.path)) {
            if target[0] == "state_machine" && !target.get(1).is_some_and(|t| WORDS_FOR_STRATEGIES.contains(&t.as_str())) {
                broken.push(format!(
                    "{}: `{}`: ask view.rs instead, so that a change of the state breaks no strategy",
                    file.path,
                    target.join("::")
                ));
            }
        }
    }
    check(&broken);
}

/// The rule above is worth something only if the reading of imports finds them.
#[test]
fn imports_are_read_as_written() {
    let module: Vec<String> = ["leader", "follow"].map(str::to_owned).to_vec();
    let read = |code: &str| -> Vec<String> { named(code, &module).iter().map(|path| path.join("::")).collect() };
    assert_eq!(read("use crate::store::Store;"), ["store::Store"]);
    assert_eq!(
        read("use crate::{api::{self, error::Error as Other}, clock};"),
        ["api::self", "api::error::Error", "clock"]
    );
    assert_eq!(read("use super::{Listings, Triggers};"), ["leader::Listings", "leader::Triggers"]);
    assert_eq!(read("fn a() -> super::super::clock::Clock {}"), ["clock::Clock"]);
    assert_eq!(read("let b = other_crate::c();"), Vec::<String>::new());

    let order = &ORDERS[1];
    let wrong = File {
        path: "coordinator/src/store.rs".to_owned(),
        text: "//! .\nuse crate::leader::Leader;\n".to_owned(),
    };
    assert_eq!(broken_arrows(order, &[wrong]).len(), 1);
}

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
                broken.push(format!("{folder}: must not depend on {dependency} (CRATES in tidy.rs)"));
            }
            if *name == "coordinator-core" && NOT_IN_CORE.contains(&dependency.as_str()) {
                broken.push(format!("{folder}: must stay pure; {dependency} belongs to another crate"));
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
    assert_eq!(members, listed, "give each member a line in CRATES (tidy.rs) and in docs/architecture.md");
}

#[test]
fn versions_and_lints_stand_in_the_root_manifest() {
    let mut broken = Vec::new();
    for (_, folder, _) in CRATES {
        let manifest = manifest(folder);
        for (dependency, value) in dependencies(&manifest) {
            if value.get("workspace").and_then(toml::Value::as_bool) != Some(true) {
                broken.push(format!("{folder}: write `{dependency}.workspace = true`; the version stands at the top"));
            }
        }
        let lints = manifest.get("lints").and_then(|lints| lints.get("workspace"));
        if lints.and_then(toml::Value::as_bool) != Some(true) {
            broken.push(format!("{folder}: add `[lints]` with `workspace = true`"));
        }
    }
    check(&broken);
}

fn documents(files: &[File]) -> impl Iterator<Item = &File> {
    files.iter().filter(|file| file.path.ends_with(".md"))
}

#[test]
fn links_of_documents_lead_somewhere() {
    let root = root();
    let files = files();
    let mut broken = Vec::new();
    for file in documents(&files) {
        for (at, _) in file.text.match_indices("](") {
            let link = file.text[at + 2..].split(')').next().unwrap_or_default();
            let target = link.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let folder = root.join(&file.path);
            if !folder.parent().unwrap().join(target).exists() {
                broken.push(format!("{}: the link to {link} leads nowhere", file.path));
            }
        }
    }
    check(&broken);
}

/// Code maps grow stale first: every source file or folder that a document names must exist.
#[test]
fn documents_name_files_that_exist() {
    let files = files();
    let paths: Vec<String> = files.iter().map(|file| format!("/{}", file.path)).collect();
    let mut broken = Vec::new();
    for file in documents(&files).filter(|file| !file.path.starts_with("docs/adr/") && file.path != "CHANGELOG.md") {
        // Every second piece between backticks is code; blocks of code are pieces with line ends.
        for word in file.text.split('`').skip(1).step_by(2) {
            let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
            if !plain || word.starts_with('/') || word.starts_with("..") {
                continue;
            }
            let exists = if word.ends_with(".rs") {
                paths.iter().any(|path| path.ends_with(&format!("/{word}")))
            } else if word.ends_with('/') {
                paths.iter().any(|path| path.contains(&format!("/{word}")))
            } else {
                true
            };
            if !exists {
                broken.push(format!("{}: `{word}` does not exist", file.path));
            }
        }
    }
    check(&broken);
}

#[test]
fn the_code_map_has_every_crate() {
    let text = std::fs::read_to_string(root().join("docs/architecture.md")).expect("docs/architecture.md");
    let broken: Vec<String> = CRATES
        .iter()
        .filter(|(_, folder, _)| !text.contains(&format!("### `{folder}`")))
        .map(|(_, folder, _)| format!("docs/architecture.md: add a section \"### `{folder}`\""))
        .collect();
    check(&broken);
}

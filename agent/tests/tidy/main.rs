//! Rules of the source tree that no tool checks: layout, size, which room may use which, which crate may
//! depend on which, and that the documents speak of files that exist.
//!
//! Each rule is one function that returns what breaks it, worded as what to do instead. The rules read the
//! files that git tracks, so nothing needs to be built. An exception stands in a list here, with its reason,
//! and a list that names something needless fails too.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod arrows;
mod documents;
mod manifests;
mod tree;

use std::collections::BTreeSet;
use std::path::Path;

use tree::{File, check, files, rust_files};

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
const EMPTY_NAMES: &[&str] = &[
    "util", "utils", "common", "types", "helper", "helpers", "misc", "mod",
];

/// Files that may contain `unsafe`: calls of the CUDA driver, and the driver that a test makes.
const UNSAFE: &[&str] = &["agent/src/gpu/cuda.rs", "agent/tests/fake_cuda/libcuda.rs"];

/// The seams: files that may do what clippy.toml bans. Tests may too, where they say why.
const SEAMS: &[&str] = &[
    "agent/cli/src/request.rs",
    "agent/runtime/src/process/pull.rs",
    "agent/src/cache.rs",
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
    "agent/benches/replication/load.rs",
    "agent/src/egress.rs",
    "agent/src/egress/network.rs",
    "agent/src/egress/proxy.rs",
    "agent/src/egress/table.rs",
    "agent/src/egress/tunnel.rs",
    "agent/src/host_plane.rs",
    "agent/src/host_plane/metrics.rs",
    "agent/src/link.rs",
    "agent/src/local.rs",
    "agent/src/processes.rs",
    "agent/src/proof_plane.rs",
    "agent/src/registry.rs",
    "agent/src/registry/redirect.rs",
    "agent/src/signer.rs",
    "coordinator/replica/src/quic.rs",
    "coordinator/src/api.rs",
    "coordinator/src/door.rs",
    "coordinator/src/host_link/quic.rs",
    "coordinator/src/identity/certificate.rs",
    "coordinator/src/join/client.rs",
    "coordinator/src/join/gate.rs",
    "coordinator/src/join/reach.rs",
    "coordinator/src/join/wire.rs",
    "coordinator/src/member.rs",
    "coordinator/src/member/certificate.rs",
    "coordinator/src/signer/client.rs",
    "coordinator/src/validator/socket/dial.rs",
];

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
    broken.extend(listed.difference(&found).map(|path| {
        format!("{path}: take it off the list in the tidy test, it no longer needs to be there")
    }));
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
        .map(|name| {
            format!("{name}: move it into a crate or into docs/, or add it to TOP with a good reason")
        })
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
            broken.insert(format!(
                "{folder}/: write its front page {page}, with the files in reading order"
            ));
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
            format!(
                "{}: {lines} lines; split it by what it knows, below {LINES_MAX}",
                file.path
            )
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
    // Where this checkout lies, and whose machine it is.
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let checkout = checkout
        .expect("the crate lies in the workspace")
        .display()
        .to_string();
    let home = std::env::var("HOME")
        .map(|home| format!("{home}/"))
        .unwrap_or_default();
    let starts: Vec<&String> = [&checkout, &home]
        .into_iter()
        .filter(|path| path.len() > 1)
        .collect();
    for file in files().iter().filter(|file| !file.is_self()) {
        for (number, line) in file.text.lines().enumerate() {
            if starts.iter().any(|start| line.contains(*start)) {
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
    let forms = [
        "unsafe {",
        "unsafe fn",
        "unsafe impl",
        "unsafe extern",
        "#[unsafe(",
    ];
    only_in(
        UNSAFE,
        |file| forms.iter().any(|form| file.text.contains(form)),
        "do it without `unsafe`, or in one of the files listed in the tidy test",
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
    let words = [
        "tokio::net",
        "std::net::TcpStream",
        "std::net::TcpListener",
        "std::os::unix::net",
        "quinn::",
    ];
    only_in(
        DOORS,
        |file| {
            let product = file.path.starts_with("agent/") || file.path.starts_with("coordinator/");
            let code = file.code();
            product && !file.is_test() && words.iter().any(|word| code.contains(word))
        },
        "let a door of the list in the tidy test make the connection, and take a stream or bytes",
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

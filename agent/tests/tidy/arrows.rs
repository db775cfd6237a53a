//! Which room may use which: the order of rooms, the imports as written, and the comparison.

use crate::tree::{File, check, rust_files};

/// The rooms of one source folder from top to bottom. A room may use those in lower rows, never one in its
/// own row or above. A longer name is for a part that others use (`config::units`); files of one room may
/// use each other.
struct Order {
    source: &'static str,
    rows: &'static [&'static [&'static str]],
}

const ORDERS: &[Order] = &[
    Order {
        source: "coordinator/core/src/state_machine",
        rows: &[
            &["testing"],
            &["apply", "codec", "invariant"],
            &[
                "reconcile",
                "observe",
                "lifecycle",
                "enrolment",
                "joining",
                "restoring",
                "upgrading",
                "recovery",
                "rotation",
                "hotkey",
                "driving",
                "taking_over",
            ],
            &["placement"],
            &["desired"],
            &["state"],
            &["answers"],
            &["command", "outbox"],
            &["effect"],
            &["adoption"],
            // The nouns know nothing of the state; a noun may name another noun's key.
            &["job", "server", "worker", "deployment", "host", "format"],
            &["chute"],
            &["table"],
        ],
    },
    Order {
        source: "coordinator/src",
        rows: &[
            &["member"],
            &["config", "api", "door", "recovery"],
            // The API shows what the leader last saw in the validators' listings.
            &["leader", "membership"],
            &["executor", "member_link", "join", "backup"],
            &["sealed_worker"],
            &["validator", "host_link"],
            &["signer", "store", "identity"],
            &["clock"],
        ],
    },
    Order {
        source: "agent/src",
        rows: &[
            &["main", "doctor", "enter", "recover", "restore", "snapshots"],
            &["setup"],
            &["dev"],
            &["processes"],
            &["processes::service", "local"],
            &["processes::child"],
            &["config"],
            &["telemetry"],
            &["config::written"],
            // The host plane of servers without an agent.
            &["sealed_worker"],
            &["host_plane", "proof_plane", "data_plane"],
            &[
                "workloads",
                "link",
                "gpu",
                "registry",
                "cache",
                "signer",
                "nodes",
                "packet_filter",
            ],
            &["egress"],
            &["config::units"],
            &["clock"],
        ],
    },
];

/// What of the state machine a strategy may name besides the view: words, never the state.
const WORDS_FOR_STRATEGIES: &[&str] = &["chute", "command", "deployment"];

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
        let Some(inside) = file
            .path
            .strip_prefix(order.source)
            .filter(|rest| rest.starts_with('/'))
        else {
            continue;
        };
        if inside == "/lib.rs" {
            continue;
        }
        let own_module = module(&file.path);
        let Some((own_row, own)) = room(order.rows, &own_module[base.len()..]) else {
            broken.push(format!(
                "{}: give its room a row in ORDERS (arrows.rs)",
                file.path
            ));
            continue;
        };
        for target in named(&file.code(), &own_module) {
            let Some(target) = target.strip_prefix(base.as_slice()) else {
                continue;
            };
            let Some((row, other)) = room(order.rows, target) else {
                continue;
            };
            let one_room = own.split("::").next() == other.split("::").next();
            if !one_room && row <= own_row {
                broken.push(format!(
                    "{}: `{own}` must not use `{}`: arrows go down only (ORDERS in arrows.rs); pass what is needed as \
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
    let broken: Vec<String> = ORDERS
        .iter()
        .flat_map(|order| broken_arrows(order, &files))
        .collect();
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
            if target[0] == "state_machine"
                && !target
                    .get(1)
                    .is_some_and(|t| WORDS_FOR_STRATEGIES.contains(&t.as_str()))
            {
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
    let read =
        |code: &str| -> Vec<String> { named(code, &module).iter().map(|path| path.join("::")).collect() };
    assert_eq!(read("use crate::store::Store;"), ["store::Store"]);
    assert_eq!(
        read("use crate::{api::{self, error::Error as Other}, clock};"),
        ["api::self", "api::error::Error", "clock"]
    );
    assert_eq!(
        read("use super::{Listings, Triggers};"),
        ["leader::Listings", "leader::Triggers"]
    );
    assert_eq!(read("fn a() -> super::super::clock::Clock {}"), ["clock::Clock"]);
    assert_eq!(read("let b = other_crate::c();"), Vec::<String>::new());

    let order = &ORDERS[1];
    let wrong = File {
        path: "coordinator/src/store.rs".to_owned(),
        text: "//! .\nuse crate::leader::Leader;\n".to_owned(),
    };
    assert_eq!(broken_arrows(order, &[wrong]).len(), 1);
}

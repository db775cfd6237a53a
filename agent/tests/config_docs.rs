//! `docs/configuration.md` is made of the comments on the keys. This test fails when it is out of date, when a
//! key has no comment, and when the page names a key that does not exist. `UPDATE_DOCS=1` writes it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use agent::config::{Written, keys};

const HEAD: &str = r#"# Configuration

`chutes-agent` reads one TOML file, `/etc/chutes-agent/config.toml` unless `--config FILE` (or the variable
`CHUTES_AGENT_CONFIG`) names another. `chutes-agent init` writes a commented one. A key's value is, later ones
winning: its default, the file, the variable `CHUTES_AGENT__SECTION__KEY`, the flag `--set section.key=value`;
`--data FOLDER` sets the data folder. Variables and flags hold values as in the file; texts may lack their quotes.

Durations are written as `"30s"` or `"1h30m"`, sizes as `"500GiB"`. Secrets are never in the file, only paths to
them. An unknown key is an error that names the file and the key. `chutes-agent config check` prints all
settings in effect, or all that is wrong. The signer, coordinator, host, proof and data processes get the
settings in effect from `run` through a file in the data folder; a changed file counts after a restart.

Runtimes: `"kubernetes"` runs chutes as Jobs on the node that this host is. `"process"` is for development and
isolates nothing, so it starts only with validators on this machine. A machine with `host.enabled = false` needs no runtime.

<!-- Made of the comments on the keys: UPDATE_DOCS=1 cargo test -p agent --test config_docs -->
"#;

/// Section, file and struct in which its keys are, and what the section is for.
fn sections() -> Vec<(&'static str, &'static str, &'static str)> {
    let written = include_str!("../src/config/written.rs");
    let validators = include_str!("../../coordinator/src/validator/directory.rs");
    vec![
        ("", written, "Written"),
        ("validators", validators, "ValidatorSettings"),
        ("miner", written, "Miner"),
        ("host", written, "Host"),
        ("coordinator", written, "Coordinator"),
        ("nodes", written, "Nodes"),
        ("backup", written, "Backup"),
        ("proof", written, "Proof"),
        ("registry", include_str!("../src/registry.rs"), "RawConfig"),
        ("egress", include_str!("../src/egress.rs"), "RawConfig"),
        ("cache", include_str!("../src/cache.rs"), "RawConfig"),
        ("runtime", written, "Runtime"),
        (
            "packet_filter",
            include_str!("../src/packet_filter.rs"),
            "RawConfig",
        ),
        ("raft", written, "Raft"),
        ("log", written, "Log"),
    ]
}

struct Key {
    name: String,
    comment: String,
    development: bool,
}

/// The public fields of a struct, with their comments.
fn keys_of(source: &str, name: &str) -> Vec<Key> {
    let start = format!("pub struct {name} {{\n");
    let (_, rest) = source.split_once(&start).expect("the struct is there");
    let (body, _) = rest.split_once("\n}").expect("the struct ends");
    let (mut keys, mut comment, mut development) = (Vec::new(), Vec::new(), false);
    for line in body.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("///") {
            comment.push(text.trim());
        } else if line.contains("feature = \"dev\"") {
            development = true;
        } else if let Some((field, _)) = line.strip_prefix("pub ").and_then(|rest| rest.split_once(':')) {
            assert!(!comment.is_empty(), "{name}.{field} has no comment");
            keys.push(Key {
                name: field.to_owned(),
                comment: std::mem::take(&mut comment).join(" "),
                development: std::mem::take(&mut development),
            });
        }
    }
    keys
}

fn page() -> String {
    let defaults = toml::Table::try_from(Written::default()).expect("settings are TOML");
    let tops = keys_of(include_str!("../src/config/written.rs"), "Written");
    let mut page = HEAD.to_owned();
    for (section, source, name) in sections() {
        let heading = match section {
            "" => "## Top level".to_owned(),
            "validators" => "## `[[validators]]`".to_owned(),
            section => format!("## `[{section}]`"),
        };
        let about = tops.iter().find(|key| key.name == section);
        let about = about.map_or(String::new(), |key| format!("{}\n\n", key.comment));
        write!(page, "\n{heading}\n\n{about}").expect("memory");
        page.push_str("| Key | Default | Meaning |\n|---|---|---|\n");
        for key in keys_of(source, name) {
            if section.is_empty() && keys::of_section(&key.name).is_some() {
                continue;
            }
            let table = match section {
                "" => Some(&defaults),
                section => defaults.get(section).and_then(toml::Value::as_table),
            };
            let default = table
                .and_then(|table| table.get(&key.name))
                .map_or("-".to_owned(), |value| match value.as_str() {
                    Some("") => "-".to_owned(),
                    _ => format!("`{value}`"),
                });
            let comment = key.comment.replace('|', "\\|");
            let only = if key.development {
                " Development builds only."
            } else {
                ""
            };
            writeln!(page, "| `{}` | {default} | {comment}{only} |", key.name).expect("memory");
        }
    }
    page
}

#[test]
fn the_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let expected = page();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &expected).expect("docs can be written");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "docs/configuration.md is out of date: run UPDATE_DOCS=1 cargo test -p agent --test config_docs"
    );
}

#[test]
fn the_page_has_every_key_and_no_other() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let page = std::fs::read_to_string(path).expect("the page is there");
    let (mut named, mut prefix) = (BTreeSet::new(), String::new());
    for line in page.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            let section = heading.trim_matches(|c| "`[]".contains(c));
            prefix = match section {
                "Top level" => String::new(),
                section if keys::is_list(section) => format!("{section}[]."),
                section => format!("{section}."),
            };
        } else if let Some((key, _)) = line.strip_prefix("| `").and_then(|rest| rest.split_once('`')) {
            named.insert(format!("{prefix}{key}"));
        }
    }
    let mut known: BTreeSet<String> = keys::all().into_iter().collect();
    // Builds without the development feature lack this one.
    known.insert("egress.table".to_owned());
    assert_eq!(named, known);
}

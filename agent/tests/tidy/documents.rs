//! The documents speak of files, folders and crates that exist.

use crate::manifests::CRATES;
use crate::tree::{File, check, files, root};

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
    for file in
        documents(&files).filter(|file| !file.path.starts_with("docs/adr/") && file.path != "CHANGELOG.md")
    {
        // Every second piece between backticks is code; blocks of code are pieces with line ends.
        for word in file.text.split('`').skip(1).step_by(2) {
            let plain = word
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
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

/// A rule over a metric that nobody has never fires, and a panel of it stays empty.
#[test]
fn alerts_and_dashboards_name_metrics_that_exist() {
    let files = files();
    let registered = |name: &str| {
        let own = name.split_once('_').map_or(name, |(_, own)| own);
        let own = own.strip_suffix("_total").unwrap_or(own);
        let rest = |group: &str| own.strip_prefix(group).unwrap_or(own).to_owned();
        let words = ["registry_", "egress_", "cache_"].map(|group| format!("\"{}\"", rest(group)));
        let whole = format!("# TYPE {name} ");
        let product = files.iter().filter(|file| file.is_rust() && !file.is_test());
        product
            .filter(|file| file.text.contains("register(") || file.text.contains(&whole))
            .any(|file| file.text.contains(&whole) || words.iter().any(|word| file.text.contains(word)))
    };
    let mut broken = Vec::new();
    let mut seen = 0;
    for file in files.iter().filter(|file| file.path.contains("/monitoring/")) {
        let words = file.text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for word in words {
            if ["coordinator_", "chutes_", "proof_"]
                .iter()
                .any(|prefix| word.starts_with(prefix))
            {
                seen += 1;
                if !registered(word) {
                    broken.push(format!("{}: no metric is called {word}", file.path));
                }
            }
        }
    }
    assert!(seen > 20, "{seen}");
    check(&broken);
}

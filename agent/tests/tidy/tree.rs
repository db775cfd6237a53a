//! The files that git tracks, and how a rule reports.

use std::path::{Path, PathBuf};
use std::process::Command;

pub(crate) struct File {
    /// Path below the root, with forward slashes.
    pub(crate) path: String,
    pub(crate) text: String,
}

impl File {
    pub(crate) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    pub(crate) fn is_test(&self) -> bool {
        self.path.contains("/tests/")
    }

    /// The code without comment lines and without the unit tests at the bottom.
    pub(crate) fn code(&self) -> String {
        let text = self
            .text
            .split_once("#[cfg(test)]\nmod ")
            .map_or(self.text.as_str(), |(code, _)| code);
        text.lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect::<Vec<_>>()
            .join("\n")
    }

    pub(crate) fn is_self(&self) -> bool {
        self.path.starts_with("agent/tests/tidy/")
    }
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// All text files that git tracks and that exist.
pub(crate) fn files() -> Vec<File> {
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

pub(crate) fn rust_files() -> Vec<File> {
    files().into_iter().filter(File::is_rust).collect()
}

pub(crate) fn check(broken: &[String]) {
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

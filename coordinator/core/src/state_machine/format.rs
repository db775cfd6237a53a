//! Which format the cluster's data has. A program that brings a new one reads it at once and writes it only after
//! the operator has finalized the upgrade: until then the program before starts on the same data.
//!
//! The row of [`Finalized`] comes before all others, and its own form never changes: a program that is too old
//! finds it first and says so, rather than stumble over the first row that it cannot read.

use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

/// The format of all data for which nothing was finalized yet.
pub const FIRST: u32 = 1;
/// The newest format that this program reads, and writes once it is finalized.
pub const NEWEST: u32 = 1;

/// This program's version.
pub const PROGRAM: &str = env!("CARGO_PKG_VERSION");
/// How a version says what it knows, after its `+`.
const MARK: &str = "format.";

/// What the operator finalized last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finalized {
    /// Which format.
    pub format: u32,
    /// Version of the program that it came with.
    pub program: String,
    /// When.
    pub at: UnixMillis,
}

/// A program's version with the newest format that it knows, as hosts report it: `0.2.0+format.2`. The first
/// format needs no mention.
#[must_use]
pub fn announced(program: &str, newest: u32) -> String {
    if newest == FIRST {
        program.to_owned()
    } else {
        format!("{program}+{MARK}{newest}")
    }
}

/// The newest format that a program knows, by the version that its host reports.
#[must_use]
pub fn known_by(version: &str) -> u32 {
    let mark = version.split_once('+').map(|(_, mark)| mark);
    let number = mark.and_then(|mark| mark.strip_prefix(MARK));
    number.and_then(|number| number.parse().ok()).unwrap_or(FIRST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_say_what_they_know() {
        for (version, known) in [
            ("0.1.0", 1),
            ("", 1),
            ("0.2.0+format.2", 2),
            ("0.2.0+format.x", 1),
            ("0.2.0+build.7", 1),
        ] {
            assert_eq!(known_by(version), known, "{version}");
        }
        for newest in [1, 2, 77] {
            assert_eq!(known_by(&announced("1.2.3", newest)), newest);
        }
    }
}

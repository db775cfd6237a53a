//! What workloads write: the part that is asked for, without tokens, and what is kept of it for a while after their
//! end.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use protocol::id::DeploymentId;
use protocol::logs::{LOG_BYTES_MAX, WorkloadEvent};
use serde::{Deserialize, Serialize};

const KEPT_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
const KEPT_MAX: usize = 400;
/// In the place of a token.
const REDACTED: &str = "[token]";
/// Every JSON Web Token begins with this: `{"` in base64.
const TOKEN_START: &str = "eyJ";

/// What is left of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Remains {
    /// The end of its output, as its runtime read it; without tokens.
    pub(crate) log: String,
    /// The place after it.
    pub(crate) end: Option<String>,
    /// What happened to it.
    pub(crate) events: Vec<WorkloadEvent>,
}

/// The remains of workloads: one file each, for seven days and not too many.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    folder: PathBuf,
}

impl Kept {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    fn path(&self, deployment: &DeploymentId) -> PathBuf {
        self.folder.join(format!("{deployment}.json"))
    }

    /// Keeps remains in the place of earlier ones, and drops what is too old.
    pub(crate) fn put(&self, deployment: &DeploymentId, remains: &Remains) -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)?;
        let (path, new) = (
            self.path(deployment),
            self.folder.join(format!("{deployment}.new")),
        );
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&serde_json::to_vec(remains)?)?;
        fs::rename(new, path)?;
        sweep(&self.folder)
    }

    /// What was kept of a workload, if anything.
    pub(crate) fn get(&self, deployment: &DeploymentId) -> io::Result<Option<Remains>> {
        let path = self.path(deployment);
        let is_old = |written: SystemTime| written.elapsed().is_ok_and(|age| age > KEPT_FOR);
        let read = || match fs::metadata(&path)?.modified()? {
            written if is_old(written) => Err(io::ErrorKind::NotFound.into()),
            _ => fs::read(&path),
        };
        match read() {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Drops kept files by age, counted from the newest, and by number.
fn sweep(folder: &Path) -> io::Result<()> {
    let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
    for item in fs::read_dir(folder)? {
        let item = item?;
        // Another workload's may be just becoming something else.
        match item.metadata().and_then(|found| found.modified()) {
            Ok(written) => files.push((written, item.path())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    files.sort();
    let Some((newest, _)) = files.last() else {
        return Ok(());
    };
    let oldest_kept = newest.checked_sub(KEPT_FOR).unwrap_or(SystemTime::UNIX_EPOCH);
    let too_many = files.len().saturating_sub(KEPT_MAX);
    for (number, (time, path)) in files.iter().enumerate() {
        if number < too_many || *time < oldest_kept {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// The last whole lines of a text, as many as may be answered at once. One line that is longer than that is cut.
pub(crate) fn last_lines(text: &str) -> &str {
    if text.len() <= LOG_BYTES_MAX {
        return text;
    }
    let end = &text[text.ceil_char_boundary(text.len() - LOG_BYTES_MAX)..];
    match end.split_once('\n') {
        Some((_, whole)) if !whole.is_empty() => whole,
        _ => end,
    }
}

/// A text without the tokens in it: whatever looks like a JSON Web Token.
pub(crate) fn redacted(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(TOKEN_START) {
        let (before, from) = rest.split_at(start);
        clean.push_str(before);
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let length = from.bytes().take_while(|byte| is_part(*byte)).count();
        let (word, after) = from.split_at(length);
        let is_token = word.split('.').filter(|part| !part.is_empty()).count() >= 2;
        clean.push_str(if is_token { REDACTED } else { word });
        rest = after;
    }
    clean.push_str(rest);
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remains(log: &str) -> Remains {
        Remains {
            log: log.to_owned(),
            end: Some("7".to_owned()),
            events: Vec::new(),
        }
    }

    #[test]
    fn what_is_left_is_kept_and_old_files_go() {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let kept = Kept::new(folder.path().join("logs"));
        let id = |name: &str| DeploymentId::parse(name).expect("valid");
        kept.put(&id("old"), &remains("o")).expect("writable");
        let old = File::options().write(true).open(kept.path(&id("old")));
        let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        old.and_then(|file| file.set_modified(long_ago)).expect("ours");
        assert_eq!(kept.get(&id("old")).expect("readable"), None, "it is too old");
        assert!(kept.path(&id("old")).exists());
        kept.put(&id("d1"), &remains("a")).expect("writable");
        kept.put(&id("d1"), &remains("b")).expect("writable");
        assert_eq!(kept.get(&id("d1")).expect("readable"), Some(remains("b")));
        let names = fs::read_dir(&kept.folder).expect("there");
        assert_eq!(names.count(), 1, "no half-written files");
    }

    #[test]
    fn tokens_are_taken_out_and_nothing_else() {
        for (text, clean) in [
            ("", ""),
            ("a eyJhbGciOi.eyJzdWIi.c2ln-_, b\nlast", "a [token], b\nlast"),
            ("key=eyJhbGciOi.eyJzdWIi", "key=[token]"),
            ("eyJust a word. eyJ", "eyJust a word. eyJ"),
            ("ü eyJü", "ü eyJü"),
        ] {
            assert_eq!(redacted(text), clean);
        }
    }

    #[test]
    fn a_long_text_is_cut_at_lines() {
        assert_eq!(last_lines("a\nb"), "a\nb");
        let long = format!("{}\nüb\nc\n", "ü".repeat(LOG_BYTES_MAX / 2));
        assert_eq!(last_lines(&long), "üb\nc\n");
        let one = "ü".repeat(LOG_BYTES_MAX);
        assert_eq!(last_lines(&one).len(), LOG_BYTES_MAX);
    }
}

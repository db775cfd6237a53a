//! The output of workloads: bounded while they run, its end kept for a while afterwards.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::record::make_folder;

const NAMES: [&str; 2] = ["stdout.log", "stderr.log"];
/// What is kept of each file after the workload.
const KEPT_BYTES: u64 = 1024 * 1024;
const KEPT_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
const KEPT_FILES_MAX: usize = 400;
/// A running workload's file that is longer is emptied.
const RUNNING_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Keeps the end of a workload's output as `<kept>/<name>.stdout.log`, and drops what is too old.
pub(crate) fn keep(folder: &Path, kept: &Path, name: &str) -> io::Result<()> {
    make_folder(kept)?;
    for log in NAMES {
        let mut from = match File::open(folder.join(log)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let length = from.metadata()?.len();
        from.seek(SeekFrom::Start(length.saturating_sub(KEPT_BYTES)))?;
        let path = kept.join(format!("{name}.{log}"));
        let mut to = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)?;
        io::copy(&mut from.take(KEPT_BYTES), &mut to)?;
    }
    sweep(kept)
}

/// Drops kept files by age, counted from the newest, and by number.
fn sweep(kept: &Path) -> io::Result<()> {
    let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
    for item in fs::read_dir(kept)? {
        let item = item?;
        files.push((item.metadata()?.modified()?, item.path()));
    }
    files.sort();
    let Some((newest, _)) = files.last() else {
        return Ok(());
    };
    let oldest_kept = newest.checked_sub(KEPT_FOR).unwrap_or(SystemTime::UNIX_EPOCH);
    let too_many = files.len().saturating_sub(KEPT_FILES_MAX);
    for (number, (time, path)) in files.iter().enumerate() {
        if number < too_many || *time < oldest_kept {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Empties the output of a running workload that has grown too long. The process appends, so that it goes
/// on at the start.
pub(crate) fn bound(folder: &Path) -> io::Result<()> {
    for log in NAMES {
        let path = folder.join(log);
        if fs::metadata(&path).is_ok_and(|found| found.len() > RUNNING_BYTES_MAX) {
            File::options().write(true).open(&path)?.set_len(0)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_kept_and_old_files_go() {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let kept = folder.path().join("logs");
        make_folder(&kept).expect("writable");
        let old = File::create(kept.join("old.stdout.log")).expect("writable");
        let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        old.set_modified(long_ago).expect("ours");
        let length = usize::try_from(KEPT_BYTES).expect("small") + 5;
        let mut text = vec![b'a'; length];
        text[length - 1] = b'z';
        fs::write(folder.path().join("stdout.log"), &text).expect("writable");
        keep(folder.path(), &kept, "d1").expect("writable");
        let seen = fs::read(kept.join("d1.stdout.log")).expect("kept");
        assert_eq!((seen.len() as u64, seen.last()), (KEPT_BYTES, Some(&b'z')));
        assert!(!kept.join("old.stdout.log").exists());
        assert!(!kept.join("d1.stderr.log").exists());
    }
}

//! The output of workloads that run: bounded, and read by byte offsets.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use protocol::logs::LOG_BYTES_MAX;

use crate::logs::{Remains, redacted};

/// Both what it says and what it complains of, in order.
pub(crate) const OUTPUT: &str = "output.log";
/// A running workload's output that is longer is emptied.
const RUNNING_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Empties the output of a running workload that has grown too long. The process appends, so that it goes
/// on at the start.
pub(crate) fn bound(folder: &Path) -> io::Result<()> {
    let path = folder.join(OUTPUT);
    if fs::metadata(&path).is_ok_and(|found| found.len() > RUNNING_BYTES_MAX) {
        File::options().write(true).open(&path)?.set_len(0)?;
    }
    Ok(())
}

/// The whole lines after an offset, or else the last ones, and the offset after them. An output that is shorter than
/// the offset was emptied meanwhile. A workload that has ended may have left a line without an end.
pub(crate) fn read(folder: &Path, after: Option<u64>, ended: bool) -> io::Result<(String, u64)> {
    let mut file = match File::open(folder.join(OUTPUT)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok((String::new(), after.unwrap_or(0)));
        }
        Err(error) => return Err(error),
    };
    let (length, most) = (file.metadata()?.len(), LOG_BYTES_MAX as u64);
    let from = match after {
        Some(after) if after <= length => after,
        Some(_) => 0,
        None => length.saturating_sub(most),
    };
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    let read = bytes.len() as u64;
    let (is_full, is_last) = (read == most, ended && from + read >= length);
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map(|at| at + 1);
    match end {
        Some(end) if !is_last => bytes.truncate(end),
        None if !is_last && !is_full => bytes.clear(),
        _ => {}
    }
    let next = from + bytes.len() as u64;
    // What the end was asked for may begin in the middle of a line.
    let start = match bytes.iter().position(|byte| *byte == b'\n') {
        Some(at) if after.is_none() && from > 0 && at + 1 < bytes.len() => at + 1,
        _ => 0,
    };
    Ok((redacted(&String::from_utf8_lossy(&bytes[start..])), next))
}

/// What is left of a workload that has ended.
pub(crate) fn remains(folder: &Path) -> io::Result<Remains> {
    let (log, end) = read(folder, None, true)?;
    Ok(Remains {
        log,
        end: Some(end.to_string()),
        events: Vec::new(),
    })
}

/// The part of kept output after an offset. Tokens that were taken out shift it: some lines may come once more.
pub(crate) fn kept_after(remains: &Remains, after: Option<u64>) -> &str {
    let end = remains.end.as_ref().and_then(|end| end.parse::<u64>().ok());
    let left = match (end, after) {
        (Some(end), Some(after)) if after <= end => usize::try_from(end - after).unwrap_or(usize::MAX),
        _ => return &remains.log,
    };
    let from = remains.log.len().saturating_sub(left);
    &remains.log[remains.log.ceil_char_boundary(from)..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_are_read_from_where_the_last_answer_ended() {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let read = |after, ended| read(folder.path(), after, ended).expect("readable");
        let write = |text: &str| fs::write(folder.path().join(OUTPUT), text).expect("writable");
        assert_eq!(read(None, false), (String::new(), 0), "nothing was written");
        write("one\ntwo\nthr");
        assert_eq!(read(None, false), ("one\ntwo\n".to_owned(), 8));
        assert_eq!(read(Some(8), false), (String::new(), 8));
        write("one\ntwo\nthree\n");
        assert_eq!(read(Some(8), false), ("three\n".to_owned(), 14));
        write("one\nlast");
        assert_eq!(read(Some(4), true), ("last".to_owned(), 8));
        assert_eq!(
            read(Some(1000), true),
            ("one\nlast".to_owned(), 8),
            "it was emptied"
        );
        let left = remains(folder.path()).expect("readable");
        assert_eq!(kept_after(&left, Some(4)), "last");
        assert_eq!(kept_after(&left, Some(8)), "");
        assert_eq!(kept_after(&left, None), "one\nlast");
    }

    #[test]
    fn the_end_of_a_long_output_is_read_in_whole_lines() {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let text = format!("{}\nb\nc", "a".repeat(LOG_BYTES_MAX));
        fs::write(folder.path().join(OUTPUT), &text).expect("writable");
        let (lines, next) = read(folder.path(), None, true).expect("readable");
        assert_eq!((lines.as_str(), next), ("b\nc", text.len() as u64));
        // From the start, piece by piece: a line longer than one answer comes in two.
        let (first, next) = read(folder.path(), Some(0), true).expect("readable");
        assert_eq!(first.len(), LOG_BYTES_MAX);
        let (second, _) = read(folder.path(), Some(next), true).expect("readable");
        assert_eq!(second, "\nb\nc");
    }
}

//! What snapshot files are called: `<cluster>-20260102T030405Z-<last index>.chutes-snapshot`. Whatever is called
//! otherwise is not ours, and is never deleted.

use protocol::time::UnixMillis;

const SUFFIX: &str = ".chutes-snapshot";

/// A snapshot by its name. The earlier one is the smaller one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// When it was taken, to the second.
    pub at: UnixMillis,
    /// Index of the last command in it.
    pub last_index: u64,
}

impl Name {
    /// Reads the name of a snapshot of this cluster; none for anything else.
    #[must_use]
    pub fn parse(text: &str, cluster: &str) -> Option<Self> {
        let rest = text.strip_prefix(&prefix(cluster))?.strip_suffix(SUFFIX)?;
        let (at, index) = rest.split_once('-')?;
        let name = Self {
            at: read_time(at)?,
            last_index: index.parse().ok()?,
        };
        // Only what we would write: no signs, no leading zeros, no 31st of February.
        (name.text(cluster) == text).then_some(name)
    }

    /// The name as text.
    #[must_use]
    pub fn text(&self, cluster: &str) -> String {
        format!(
            "{}{}-{}{SUFFIX}",
            prefix(cluster),
            compact(self.at),
            self.last_index
        )
    }
}

/// How all names of a cluster begin.
#[must_use]
pub(super) fn prefix(cluster: &str) -> String {
    let safe = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '_'
        }
    };
    let cluster: String = cluster.chars().map(safe).collect();
    format!("{}-", cluster.trim_start_matches('.'))
}

/// `20260102T030405Z`.
pub(super) fn compact(at: UnixMillis) -> String {
    let text = at.iso8601();
    let digits = text.chars().filter(|c| c.is_ascii_digit() || *c == 'T').take(15);
    let mut text: String = digits.collect();
    text.push('Z');
    text
}

fn read_time(text: &str) -> Option<UnixMillis> {
    let digits = |range: std::ops::Range<usize>| text.get(range)?.parse::<u64>().ok();
    if text.len() != 16 || text.get(8..9) != Some("T") || !text.ends_with('Z') {
        return None;
    }
    let (year, month, day) = (digits(0..4)?, digits(4..6)?, digits(6..8)?);
    let (hours, minutes, seconds) = (digits(9..11)?, digits(11..13)?, digits(13..15)?);
    if year < 1970 || !(1..=12).contains(&month) {
        return None;
    }
    // Day count of a civil date, the other way round than in `protocol::time`.
    let (y, m) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let (era, year_of_era) = (y / 400, y % 400);
    let day_of_year = (153 * m + 2) / 5 + day.checked_sub(1)?;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = (era * 146_097 + day_of_era).checked_sub(719_468)?;
    let seconds = days * 86_400 + hours * 3_600 + minutes * 60 + seconds;
    Some(UnixMillis::from_unix_seconds(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_written() {
        for (seconds, index) in [
            (1_735_689_600, 0),
            (1_709_164_799, 77),
            (1_709_251_199, u64::MAX),
            (0, 1),
        ] {
            let name = Name {
                at: UnixMillis::from_unix_seconds(seconds),
                last_index: index,
            };
            for cluster in ["miner", "a-b", "my miner/1"] {
                let text = name.text(cluster);
                assert_eq!(Name::parse(&text, cluster), Some(name), "{text}");
                assert_eq!(Name::parse(&text, "other"), None, "{text}");
            }
        }
        let known = Name {
            at: UnixMillis(1_767_323_045_000),
            last_index: 12,
        };
        assert_eq!(known.text("miner"), "miner-20260102T030405Z-12.chutes-snapshot");
    }

    #[test]
    fn what_is_called_otherwise_is_not_ours() {
        for text in [
            "",
            "miner-",
            "miner-20260102T030405Z-12.chutes-snapshot.part",
            "miner-20260102T030405Z-012.chutes-snapshot",
            "miner-20260102T030405Z-+12.chutes-snapshot",
            "miner-20260231T030405Z-12.chutes-snapshot",
            "miner-20261302T030405Z-12.chutes-snapshot",
            "miner-20260102T250405Z-12.chutes-snapshot",
            "miner-b-20260102T030405Z-12.chutes-snapshot",
            "miner-20260100T030405Z-12.chutes-snapshot",
            "notes.txt",
        ] {
            assert_eq!(Name::parse(text, "miner"), None, "{text}");
        }
    }
}

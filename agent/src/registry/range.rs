//! `Range` of a request against a blob of known size. Pure.

use std::ops::Range;

/// What part of a blob a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// All of it: no range, one that we do not understand, or several at once.
    Whole,
    /// From the first to before the last byte.
    Part(Range<u64>),
    /// Beyond the end.
    Unsatisfiable,
}

/// Reads a `Range` header against a size in bytes (RFC 9110, section 14: a range that is not understood is
/// ignored).
#[must_use]
pub fn wanted(header: Option<&str>, size: u64) -> Wanted {
    let Some(spec) = header.and_then(|text| text.trim().strip_prefix("bytes=")) else {
        return Wanted::Whole;
    };
    let number = |text: &str| match text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        true => None,
        false => text.parse::<u64>().ok(),
    };
    match spec.trim().split_once('-') {
        Some(("", suffix)) => match number(suffix) {
            Some(0) => Wanted::Unsatisfiable,
            Some(_) if size == 0 => Wanted::Unsatisfiable,
            Some(length) => Wanted::Part(size.saturating_sub(length)..size),
            None => Wanted::Whole,
        },
        Some((first, last)) => match (number(first), last, number(last)) {
            (Some(first), "", _) if first < size => Wanted::Part(first..size),
            (Some(first), _, Some(last)) if first <= last && first < size => {
                Wanted::Part(first..last.saturating_add(1).min(size))
            }
            (Some(first), "", _) if first >= size => Wanted::Unsatisfiable,
            (Some(first), _, Some(last)) if first <= last => Wanted::Unsatisfiable,
            _ => Wanted::Whole,
        },
        None => Wanted::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_follow_the_rfc() {
        let part = |first, end| Wanted::Part(first..end);
        for (header, expected) in [
            (None, Wanted::Whole),
            (Some("bytes=0-"), part(0, 100)),
            (Some("bytes=10-"), part(10, 100)),
            (Some("bytes=10-19"), part(10, 20)),
            (Some("bytes=99-99"), part(99, 100)),
            (Some("bytes=0-18446744073709551615"), part(0, 100)),
            (Some("bytes=-5"), part(95, 100)),
            (Some("bytes=-500"), part(0, 100)),
            (Some("bytes=-0"), Wanted::Unsatisfiable),
            (Some("bytes=100-"), Wanted::Unsatisfiable),
            (Some("bytes=100-200"), Wanted::Unsatisfiable),
            (Some("bytes=20-10"), Wanted::Whole),
            (Some("bytes=0-1,5-6"), Wanted::Whole),
            (Some("bytes="), Wanted::Whole),
            (Some("bytes=-"), Wanted::Whole),
            (Some("bytes=+1-"), Wanted::Whole),
            (Some("items=0-1"), Wanted::Whole),
            (Some("bytes=99999999999999999999-"), Wanted::Whole),
        ] {
            assert_eq!(wanted(header, 100), expected, "{header:?}");
        }
        assert_eq!(wanted(Some("bytes=-1"), 0), Wanted::Unsatisfiable);
    }
}

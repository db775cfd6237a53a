//! Durations and sizes as people write them: `"30s"`, `"1h30m"`, `"500GiB"`.
//!
//! A bare number is refused, so that nobody has to guess its unit. [`Span`] and [`Size`] are for the raw
//! (serde) forms of settings; the checked forms hold a `Duration` and a number of bytes.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is no duration or size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUnit {
    /// Not a sum of whole numbers with units.
    #[error(
        "{0:?} is not a duration: write whole numbers with ms, s, m, h or d, such as \"30s\" or \"1h30m\""
    )]
    Duration(String),
    /// Not a whole number with a unit.
    #[error(
        "{0:?} is not a size: write a whole number with B, KiB, MiB, GiB, TiB, kB, MB, GB or TB, such as \"500GiB\""
    )]
    Size(String),
}

const SPAN_UNITS_MS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1_000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

const SIZE_UNITS_BYTES: [(&str, u64); 9] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// Reads one number and its unit from the front of `text`; the rest comes back with the product.
fn take_quantity<'a>(text: &'a str, units: &[(&str, u64)]) -> Option<(u64, &'a str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, rest) = text.split_at(digits);
    let rest = rest.trim_start();
    let letters = rest
        .find(|c: char| !c.is_ascii_alphabetic())
        .unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(letters);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    let number: u64 = number.parse().ok()?;
    Some((number.checked_mul(*factor)?, rest.trim_start()))
}

/// Reads a duration: one or more whole numbers with units, added up.
///
/// # Errors
/// [`InvalidUnit::Duration`], also when the sum does not fit 64 bits of milliseconds.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidUnit> {
    let invalid = || InvalidUnit::Duration(text.chars().take(64).collect());
    let (mut rest, mut total_ms) = (text.trim(), 0_u64);
    loop {
        let (ms, after) = take_quantity(rest, &SPAN_UNITS_MS).ok_or_else(invalid)?;
        total_ms = total_ms.checked_add(ms).ok_or_else(invalid)?;
        if after.is_empty() {
            return Ok(Duration::from_millis(total_ms));
        }
        rest = after;
    }
}

/// Reads a size in bytes: one whole number with a unit.
///
/// # Errors
/// [`InvalidUnit::Size`], also when the number of bytes does not fit 64 bits.
pub fn parse_size_bytes(text: &str) -> Result<u64, InvalidUnit> {
    match take_quantity(text.trim(), &SIZE_UNITS_BYTES) {
        Some((bytes, "")) => Ok(bytes),
        _ => Err(InvalidUnit::Size(text.chars().take(64).collect())),
    }
}

/// A duration in a raw setting.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl Span {
    /// A span of whole seconds.
    #[must_use]
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        let fitting = SPAN_UNITS_MS
            .iter()
            .rev()
            .find(|(_, factor)| ms > 0 && ms.is_multiple_of(*factor));
        let (unit, factor) = fitting.unwrap_or(&("s", 1_000));
        write!(f, "{}{unit}", ms / factor)
    }
}

/// A size in a raw setting, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary = SIZE_UNITS_BYTES.iter().take(5).rev();
        let fitting = binary
            .clone()
            .find(|(_, factor)| self.0 > 0 && self.0.is_multiple_of(*factor));
        let (unit, factor) = fitting.unwrap_or(&("B", 1));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

macro_rules! as_text {
    ($name:ident, $parse:expr) => {
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                $parse(&text).map($name).map_err(de::Error::custom)
            }
        }
    };
}

as_text!(Span, parse_duration);
as_text!(Size, parse_size_bytes);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_units() {
        for (text, ms) in [
            ("30s", 30_000),
            ("250ms", 250),
            ("1h30m", 5_400_000),
            ("1h 30m", 5_400_000),
            ("7d", 604_800_000),
            (" 5 m ", 300_000),
            ("0s", 0),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for bad in [
            "",
            "30",
            "s",
            "-1s",
            "1.5h",
            "1w",
            "99999999999999999999s",
            "1s2",
            "18446744073709551615d",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_need_units() {
        for (text, bytes) in [
            ("500GiB", 500 << 30),
            ("1kB", 1000),
            ("10 MiB", 10 << 20),
            ("0B", 0),
        ] {
            assert_eq!(parse_size_bytes(text), Ok(bytes), "{text}");
        }
        for bad in [
            "",
            "500",
            "GiB",
            "1gib",
            "1GiB1B",
            "-1B",
            "99999999999TiB",
            "1.5GiB",
        ] {
            assert!(parse_size_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_printed_reads_back() {
        for text in ["30s", "250ms", "90m", "7d", "0s"] {
            let span = Span(parse_duration(text).expect("valid"));
            assert_eq!(span.to_string(), text);
        }
        for text in ["500GiB", "1000B", "3MiB", "0B"] {
            assert_eq!(Size(parse_size_bytes(text).expect("valid")).to_string(), text);
        }
    }
}

//! The two ways in which validators write a time: ISO 8601 in rows, and the HTTP `Date` header.
//! Pure; what cannot be read is `None`.

use protocol::time::UnixMillis;

/// Reads `2025-09-25T12:01:45.123456+00:00`, with or without fraction and offset (`Z`, `+hh:mm`); without
/// offset it is UTC. A space may stand for the `T`.
#[must_use]
pub fn iso8601(text: &str) -> Option<UnixMillis> {
    let (date, time) = text.trim().split_once(['T', ' '])?;
    let mut date = date.splitn(3, '-');
    let (year, month, day) = (
        number(date.next()?)?,
        number(date.next()?)?,
        number(date.next()?)?,
    );
    let (time, offset_minutes) = split_offset(time)?;
    let (clock, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let mut clock = clock.splitn(3, ':');
    let (hour, minute) = (number(clock.next()?)?, number(clock.next()?)?);
    let second = clock.next().map_or(Some(0), number)?;
    let milli = fraction.get(..3.min(fraction.len()))?;
    let milli = number(milli)? * 10_i64.pow(3 - u32::try_from(milli.len()).ok()?);
    let seconds = unix_seconds(year, month, day, hour, minute, second)? - offset_minutes * 60;
    Some(UnixMillis(u64::try_from(seconds * 1000 + milli).ok()?))
}

/// Reads `Sun, 06 Nov 1994 08:49:37 GMT`; the older forms are not sent by anything we talk to.
#[must_use]
pub fn http_date(text: &str) -> Option<UnixMillis> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (_, rest) = text.trim().split_once(", ")?;
    let rest = rest.strip_suffix(" GMT")?;
    let mut parts = rest.split(' ');
    let (day, month, year, clock) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    let month = i64::try_from(MONTHS.iter().position(|name| *name == month)? + 1).ok()?;
    let mut clock = clock.splitn(3, ':');
    let (hour, minute, second) = (
        number(clock.next()?)?,
        number(clock.next()?)?,
        number(clock.next()?)?,
    );
    let seconds = unix_seconds(number(year)?, month, number(day)?, hour, minute, second)?;
    Some(UnixMillis(u64::try_from(seconds).ok()? * 1000))
}

fn split_offset(time: &str) -> Option<(&str, i64)> {
    if let Some(time) = time.strip_suffix('Z') {
        return Some((time, 0));
    }
    let Some(at) = time.rfind(['+', '-']) else {
        return Some((time, 0));
    };
    let (time, offset) = time.split_at(at);
    let (hours, minutes) = offset.get(1..)?.split_once(':')?;
    let minutes = number(hours)? * 60 + number(minutes)?;
    Some((
        time,
        if offset.starts_with('-') {
            -minutes
        } else {
            minutes
        },
    ))
}

fn number(text: &str) -> Option<i64> {
    let fits = (1..=4).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    if fits { text.parse().ok() } else { None }
}

fn unix_seconds(year: i64, month: i64, day: i64, hour: i64, minute: i64, second: i64) -> Option<i64> {
    let sensible = (1970..=9999).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    if !sensible {
        return None;
    }
    // Days since the epoch of a civil date (proleptic Gregorian), counting years from March.
    let shifted = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = shifted * 365 + shifted / 4 - shifted / 100 + shifted / 400 + day_of_year - 719_468;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iso_times_are_read() {
        for (text, ms) in [
            ("2025-01-01T00:00:00+00:00", 1_735_689_600_000),
            ("2025-01-01T00:00:00", 1_735_689_600_000),
            ("2025-01-01 00:00:00.5Z", 1_735_689_600_500),
            ("2025-01-01T02:30:00.123456+02:30", 1_735_689_600_123),
            ("2024-12-31T23:00:00-01:00", 1_735_689_600_000),
            ("2024-02-29T00:00:00Z", 1_709_164_800_000),
            ("1970-01-01T00:00:00Z", 0),
        ] {
            assert_eq!(iso8601(text), Some(UnixMillis(ms)), "{text}");
        }
        for day in [0_u64, 1, 59, 60, 365, 10_957, 11_016, 20_000, 2_932_000] {
            let at = UnixMillis(day * 86_400_000 + 45_296_789);
            assert_eq!(iso8601(&at.iso8601()), Some(at), "day {day}");
        }
    }

    #[test]
    fn http_dates_are_read() {
        let read = http_date("Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(read, Some(UnixMillis(784_111_777_000)));
    }

    #[test]
    fn nonsense_is_none() {
        for text in [
            "",
            "T",
            "now",
            "2025-13-01T00:00:00",
            "2025-01-01T25:00:00",
            "2025-01-01T00:00:00.",
            "2025-01-01T00:00:00+ü",
            "99999999999999999999-01-01T00:00:00",
            "-1-01-01T00:00:00",
            "1960-01-01T00:00:00",
            "2025-01-01T00:00:00.é",
        ] {
            assert_eq!(iso8601(text), None, "{text}");
        }
        for text in [
            "",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "Sun, 06 Foo 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 GMT",
        ] {
            assert_eq!(http_date(text), None, "{text}");
        }
    }
}

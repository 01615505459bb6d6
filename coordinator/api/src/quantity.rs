//! Sizes and durations as people write them, everywhere in the project: `50G`, `46.6Gi`, `1h30m`.
//!
//! Options, configuration files and documents of host, coordinator and `cachefsctl` are all read here, and everything
//! that is printed for people is written here. So a quantity means the same everywhere, and what is printed can be read
//! back. Prefixes are those of Kubernetes and of the SI: `G` is 10^9 and `Gi` 2^30, each with or without a `B`, in
//! either case.
//!
//! Settings are transferred as text, so that what is shown is what was written. [`Size`] and [`Seconds`] are for keys
//! that are transferred as numbers; they accept text as well.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::{SignedDuration, Span, SpanRelativeTo};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer};

/// The prefixes of units, from a thousand on.
const PREFIXES: [char; 6] = ['k', 'm', 'g', 't', 'p', 'e'];
/// The largest number of bytes that is accepted: TOML and many readers of JSON have no larger integers.
const SIZE_MAX: u128 = i64::MAX as u128;

/// Reads a duration: `500ms`, `30s`, `5m`, `2h`, `1d`, `1h30m`. A day has 24 hours. Only `0` needs no unit.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let trimmed = text.trim();
    if trimmed == "0" {
        return Ok(Duration::ZERO);
    }
    if !trimmed.is_empty() && trimmed.chars().all(|c| c.is_ascii_digit() || c == '.') {
        return Err(format!("{text:?} has no unit: write {trimmed}s for seconds, or 5m, 2h, 1d"));
    }
    let wrong = || format!("{text:?} is not a duration: write 500ms, 30s, 5m, 2h, 1d or 1h30m");
    let span: Span = trimmed.parse().map_err(|_| wrong())?;
    let length = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| wrong())?;
    Duration::try_from(length).map_err(|_| wrong())
}

/// Writes a duration as [`parse_duration`] reads it: `1h 30m`, `30s`, `7d`.
pub fn format_duration(duration: Duration) -> String {
    const DAY: u64 = 86_400;
    if duration.subsec_nanos() == 0 && duration.as_secs() >= 2 * DAY && duration.as_secs().is_multiple_of(DAY) {
        return format!("{}d", duration.as_secs() / DAY);
    }
    format!("{:#}", SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX))
}

/// Reads a number of bytes: `4096`, `20k`, `1.5M`, `20G`, `20Gi`, `1TB`. A part of a byte is dropped.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = |why: &str| {
        format!("{text:?} is not a size: {why}; write bytes, or e.g. 500M or 20G (G is 10^9 bytes, Gi is 2^30)")
    };
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) {
        return Err(wrong("it does not begin with a number"));
    }
    let multiple = unit_bytes(unit.trim()).ok_or_else(|| wrong("its unit is unknown"))?;
    if multiple == 1 && number.contains('.') {
        return Err(wrong("a byte has no parts"));
    }
    // Further digits are less than a byte, even of exabytes.
    let fraction = &fraction[..fraction.len().min(18)];
    let parts: u128 = fraction.parse().map_err(|_| wrong("it does not begin with a number"))?;
    let whole: Option<u128> = whole.parse().ok();
    let bytes = whole.and_then(|whole| {
        whole.checked_mul(multiple)?.checked_add(parts * multiple / 10_u128.pow(fraction.len() as u32))
    });
    match bytes.filter(|bytes| *bytes <= SIZE_MAX) {
        Some(bytes) => Ok(bytes as u64),
        None => Err(wrong("it is larger than 9.2 EB")),
    }
}

/// The bytes of a unit such as `G`, `GB`, `Gi` or `GiB`, in either case.
fn unit_bytes(unit: &str) -> Option<u128> {
    let unit = unit.to_ascii_lowercase();
    let unit = unit.strip_suffix('b').unwrap_or(&unit);
    let (prefix, base) = match unit.strip_suffix('i') {
        Some(prefix) => (prefix, 1024_u128),
        None => (unit, 1000),
    };
    if unit.is_empty() {
        return Some(1);
    }
    let power = PREFIXES.iter().position(|known| prefix.chars().eq([*known]))?;
    Some(base.pow(power as u32 + 1))
}

/// Writes a number of bytes as [`parse_size`] reads it: `12.3 MB`, decimal, as docker shows sizes.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ if value < 9.95 => format!("{value:.2} {}", UNITS[unit]),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// A number of bytes that was written as text or as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        parse_size(text).map(Size)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        deserializer.deserialize_any(Either { what: "a size such as 20G", read: parse_size }).map(Size)
    }
}

/// A number of seconds that was written as a number, or as a duration in text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seconds(pub u64);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Seconds, D::Error> {
        let read = |text: &str| parse_duration(text).map(|duration| duration.as_secs());
        deserializer.deserialize_any(Either { what: "seconds, or a duration such as 7d", read }).map(Seconds)
    }
}

/// Accepts a number as it is, or a text that `read` reads.
struct Either<F> {
    what: &'static str,
    read: F,
}

impl<F: Fn(&str) -> Result<u64, String>> Visitor<'_> for Either<F> {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<u64, E> {
        Ok(number)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<u64, E> {
        u64::try_from(number).map_err(|_| E::custom(format!("{number} is below 0: write {}", self.what)))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<u64, E> {
        (self.read)(text).map_err(E::custom)
    }
}

/// Reads `limit_bytes` and the like as [`Size`].
pub fn size_in_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Size::deserialize(deserializer).map(|Size(bytes)| bytes)
}

/// Reads `grace_seconds` and the like as [`Seconds`].
pub fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Seconds::deserialize(deserializer).map(|Seconds(seconds)| seconds)
}

/// Like [`seconds`], for a key that may be absent or null.
pub fn optional_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Ok(Option::<Seconds>::deserialize(deserializer)?.map(|Seconds(seconds)| seconds))
}

/// Reads the text of a size that is checked later; plain bytes may be written as a number.
pub fn optional_size_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<SizeText>::deserialize(deserializer)?.map(|SizeText(text)| text))
}

/// A size as it was written.
struct SizeText(String);

impl<'de> Deserialize<'de> for SizeText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SizeText, D::Error> {
        deserializer.deserialize_any(Written)
    }
}

struct Written;

impl Visitor<'_> for Written {
    type Value = SizeText;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size such as 20M")
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<SizeText, E> {
        Ok(SizeText(bytes.to_string()))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<SizeText, E> {
        Ok(SizeText(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, seconds) in [("30s", 30), ("5m", 300), ("2h", 7200), ("1d", 86_400), ("1h30m", 5400), ("1.5h", 5400)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!((parse_duration("0"), parse_duration("0s")), (Ok(Duration::ZERO), Ok(Duration::ZERO)));
        for bad in ["", "soon", "-5m", "1y", "1mo", "5m ago", "s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        assert!(parse_duration("5").unwrap_err().contains("no unit: write 5s"));
        assert_eq!(
            ["30s", "1h 30m", "24h", "7d"],
            [30, 5400, 86_400, 604_800].map(|s| format_duration(Duration::from_secs(s)))
        );
        for seconds in [0, 1, 59, 90, 3600, 86_400, 100_000, 2_592_000, 31_622_400] {
            let duration = Duration::from_secs(seconds);
            assert_eq!(parse_duration(&format_duration(duration)), Ok(duration), "{}", format_duration(duration));
        }
    }

    #[test]
    fn a_size_means_the_same_wherever_it_is_written() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("500B", 500),
            ("20k", 20_000),
            ("20Ki", 20 << 10),
            ("1.5M", 1_500_000),
            ("1.5Mi", 3 << 19),
            ("50G", 50_000_000_000),
            ("50g", 50_000_000_000),
            ("50GB", 50_000_000_000),
            ("50Gi", 50 << 30),
            ("50gib", 50 << 30),
            (" 2 GiB ", 2 << 30),
            ("1 TB", 1_000_000_000_000),
            ("0.1Pi", 112_589_990_684_262),
            ("1.0001k", 1000),
            ("9.2E", 9_200_000_000_000_000_000),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for (bad, why) in [
            ("", "begin with a number"),
            ("G", "begin with a number"),
            ("-1G", "begin with a number"),
            ("1.G", "begin with a number"),
            (".5G", "begin with a number"),
            ("1.2.3G", "begin with a number"),
            ("1X", "unit is unknown"),
            ("1e3", "unit is unknown"),
            ("1,5G", "unit is unknown"),
            ("1i", "unit is unknown"),
            ("0.5", "a byte has no parts"),
            ("9.3E", "larger than"),
            ("9223372036854775808", "larger than"),
            ("99999999999999999999999999999999999999999G", "larger than"),
        ] {
            let error = parse_size(bad).unwrap_err();
            assert!(error.contains(why) && error.contains("Gi is 2^30"), "{bad}: {error}");
        }
    }

    #[test]
    fn what_is_printed_can_be_read_back() {
        let shown = |bytes| format_size(bytes);
        assert_eq!(
            [shown(999), shown(1000), shown(12_345_678), shown(50_000_000_000)],
            ["999 B", "1.00 kB", "12.3 MB", "50.0 GB"]
        );
        for bytes in [0, 999, 1000, 12_345_678, 50_000_000_000, 5 << 40, i64::MAX as u64] {
            let read = parse_size(&format_size(bytes)).unwrap();
            assert!(read.abs_diff(bytes) as f64 <= bytes as f64 * 0.005, "{bytes}: {}", format_size(bytes));
        }
    }

    #[test]
    fn keys_take_numbers_and_text() {
        let size =
            |json: &str| serde_json::from_str::<Size>(json).map(|size| size.0).map_err(|error| error.to_string());
        assert_eq!((size("4096"), size("\"20Gi\"")), (Ok(4096), Ok(20 << 30)));
        assert!(size("-1").unwrap_err().contains("below 0"));
        assert!(size("\"much\"").unwrap_err().contains("not a size"));
        assert!(size("true").unwrap_err().contains("a size such as 20G"));
        let text =
            |json: &str| serde_json::from_str::<SizeText>(json).map(|text| text.0).map_err(|error| error.to_string());
        assert_eq!((text("\"20M\""), text("4096")), (Ok("20M".to_owned()), Ok("4096".to_owned())));
        assert!(text("true").unwrap_err().contains("a size such as 20M"));
        let seconds = |json: &str| serde_json::from_str::<Seconds>(json).unwrap().0;
        assert_eq!((seconds("60"), seconds("\"7d\"")), (60, 604_800));
    }
}

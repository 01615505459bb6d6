//! Sizes, durations and zones as people write them: `20G`, `1h30m`, `Europe/Berlin`.
//!
//! Settings travel as text, so that what is shown is what was written; this is the one place that reads it.

use std::time::Duration;

use jiff::{Span, SpanRelativeTo};

/// Reads a duration: `30s`, `5m`, `2h`, `1d`, `1h30m`. A day has 24 hours.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration: write 30s, 5m, 2h or 1d");
    let span: Span = text.trim().parse().map_err(|_| wrong())?;
    let length = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| wrong())?;
    Duration::try_from(length).map_err(|_| wrong())
}

/// Reads a number of bytes: `500`, `20k`, `1.5M`, `20G`, `1T`; decimal, with an optional `B` or `iB` (binary).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: write 500M, 20G or 1T");
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit = unit.trim().to_ascii_lowercase();
    let (prefix, base) = match unit.strip_suffix("ib") {
        Some(prefix) => (prefix, 1024_f64),
        None => (unit.strip_suffix('b').unwrap_or(&unit), 1000_f64),
    };
    let power = match prefix {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return Err(wrong()),
    };
    let bytes = number * base.powi(power);
    if bytes.is_finite() && bytes < 9e18 { Ok(bytes as u64) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_are_read_as_people_write_them() {
        for (text, seconds) in [("30s", 30), ("5m", 300), ("2h", 7200), ("1d", 86_400), ("1h30m", 5400)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "5", "soon", "-5m", "1y"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        for (text, bytes) in [("500", 500), ("20k", 20_000), ("1.5M", 1_500_000), ("2GiB", 2 << 30), ("1 TB", 1 << 40)]
        {
            let expected = if text == "1 TB" { 1_000_000_000_000 } else { bytes };
            assert_eq!(parse_size(text), Ok(expected), "{text}");
        }
        for bad in ["", "G", "-1G", "1X", "1e400"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}

//! Durations and rates as people write them on command lines.

use std::time::Duration;

/// A duration: `0.2ms`, `5ms`, `3s`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let error = || format!("{text} is no duration: write it like 0.2ms or 3s");
    let (number, unit) = match (text.strip_suffix("ms"), text.strip_suffix("us"), text.strip_suffix('s')) {
        (Some(number), _, _) => (number, 1e-3),
        (_, Some(number), _) => (number, 1e-6),
        (_, _, Some(number)) => (number, 1.0),
        _ => return Err(error()),
    };
    let number: f64 = number.parse().map_err(|_| error())?;
    Duration::try_from_secs_f64(number * unit).map_err(|_| error())
}

/// Bytes a second: `50M`, `1G`, with the powers of ten that networks are sold in.
pub(crate) fn rate(text: &str) -> Result<u64, String> {
    let (number, unit) = match (text.strip_suffix('K'), text.strip_suffix('M'), text.strip_suffix('G')) {
        (Some(number), _, _) => (number, 1e3),
        (_, Some(number), _) => (number, 1e6),
        (_, _, Some(number)) => (number, 1e9),
        _ => (text, 1.0),
    };
    let bytes = number.parse::<f64>().ok().map(|number| number * unit).filter(|bytes| *bytes >= 1.0);
    bytes.map(|bytes| bytes as u64).ok_or_else(|| format!("{text} is no rate in bytes a second: write it like 100M"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_write_quantities_in_several_ways() {
        assert_eq!(duration("0.2ms"), Ok(Duration::from_micros(200)));
        assert_eq!((duration("3s"), duration("15us")), (Ok(Duration::from_secs(3)), Ok(Duration::from_micros(15))));
        assert_eq!((rate("100M"), rate("1.5K"), rate("7")), (Ok(100_000_000), Ok(1500), Ok(7)));
        for wrong in ["", "5", "ms", "-1s", "1h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "M", "-1M", "0", "1T"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
    }
}

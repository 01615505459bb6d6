//! What people and programs read: one JSON document, or tables and lines.

use std::io::Write;

use comfy_table::{Table, presets};
use coordinator_api::ClientError;
use jiff::Timestamp;
use serde::Serialize;

/// For whom to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Output {
    /// Prints `value` as JSON, or the text that `text` makes of it.
    pub(crate) fn print<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        let printed = match self {
            Output::Json => serde_json::to_string_pretty(value)?,
            Output::Text => text(value),
        };
        match printed.is_empty() {
            true => Ok(()),
            false => Ok(writeln!(std::io::stdout(), "{}", printed.trim_end())?),
        }
    }
}

/// Does the same to each of several things: prints what was done, and says of each that failed why. Fails if any did.
pub(crate) async fn each<T: Serialize>(
    output: Output,
    names: &[String],
    work: impl AsyncFn(&str) -> Result<T, ClientError>,
    text: impl Fn(&T) -> String,
) -> anyhow::Result<()> {
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    for name in names {
        match work(name).await {
            Ok(one) => done.push(one),
            Err(error) => failures.push(error),
        }
    }
    if !done.is_empty() {
        output.print(&done, |done| done.iter().map(|one| format!("{}\n", text(one))).collect())?;
    }
    let last = failures.pop();
    failures.iter().for_each(|error| eprintln!("cachefsctl: {error}"));
    last.map_or(Ok(()), |error| Err(error.into()))
}

/// A table without lines, as docker prints them.
pub(crate) fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(head);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let lines = table.to_string();
    lines.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// `12.3 MB`: decimal, as docker shows sizes.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
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

/// `3 minutes ago`.
pub(crate) fn ago(then: Timestamp) -> String {
    let seconds = Timestamp::now().duration_since(then).as_secs().max(0);
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86400 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

/// The first twelve digits of a digest.
pub(crate) fn short(digest: &str) -> String {
    digest.trim_start_matches("sha256:").chars().take(12).collect()
}

/// A text with its control characters escaped: some texts come from images and registries, and a terminal would obey them.
pub(crate) fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_steer_the_terminal() {
        assert_eq!(printable("usr/bin/é\u{1b}[2J\n"), "usr/bin/é\\u{1b}[2J\\n");
    }

    #[test]
    fn sizes_read_like_dockers() {
        for (bytes, text) in
            [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (73_456_789, "73.5 MB"), (4 << 30, "4.29 GB")]
        {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn tables_have_no_trailing_blanks() {
        assert_eq!(table(["A", "B"], [["1".into(), "2".into()]]), "A  B\n1  2\n");
    }
}

//! Output for people and for programs: one JSON document, or tables and lines.

use std::io::{ErrorKind, Write};

use comfy_table::{Table, presets};
use coordinator_api::ClientError;
use coordinator_api::printable::{printable, printable_json, printable_lines};
pub(crate) use coordinator_api::quantity::format_size as size;
use coordinator_api::report::{self, Form};
use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// What this program is called in messages.
pub(crate) const PROGRAM: &str = "cachefsctl";

/// The form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// Text for people.
    Text,
    /// JSON for programs.
    Json,
}

impl Output {
    /// Prints `value` as JSON, or as the text that `text` makes of it. Names, reasons and types come from registries, images and
    /// hosts, so they are made printable: nothing in them can control the terminal or split a line.
    pub(crate) fn print<T>(self, value: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()>
    where
        T: Serialize + DeserializeOwned,
    {
        let printed = match self {
            Output::Json => json(value, Layout::Pretty)?,
            Output::Text => printable_lines(&text(&shown(value)?)).into_owned(),
        };
        let printed = printed.trim_end();
        if printed.is_empty() {
            return Ok(());
        }
        match writeln!(std::io::stdout(), "{printed}") {
            // The reader stopped early, which changes nothing about the result.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            written => Ok(written?),
        }
    }

    /// The form of messages on stderr.
    pub(crate) fn form(self) -> Form {
        match self {
            Output::Text => Form::Text,
            Output::Json => Form::Json,
        }
    }
}

/// How JSON is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Indented, so that people can read it as well.
    Pretty,
    /// On one line.
    Line,
}

/// `value` as JSON that is safe to print on a terminal.
pub(crate) fn json(value: &impl Serialize, layout: Layout) -> anyhow::Result<String> {
    let text = match layout {
        Layout::Pretty => serde_json::to_string_pretty(value)?,
        Layout::Line => serde_json::to_string(value)?,
    };
    Ok(printable_json(&text).into_owned())
}

/// A copy of `value` in which every text is printable.
pub(crate) fn shown<T: Serialize + DeserializeOwned>(value: &T) -> anyhow::Result<T> {
    Ok(serde_json::from_value(printable_value(serde_json::to_value(value)?))?)
}

fn printable_value(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(printable(&text).into_owned()),
        Value::Array(values) => Value::Array(values.into_iter().map(printable_value).collect()),
        Value::Object(fields) => {
            let field = |(name, value): (String, Value)| (printable(&name).into_owned(), printable_value(value));
            Value::Object(fields.into_iter().map(field).collect())
        }
        other => other,
    }
}

/// Calls `work` for each name. Prints the results, and an error for each name that failed. Fails if any did.
pub(crate) async fn each<T: Serialize + DeserializeOwned>(
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
    failures.into_iter().for_each(|error| complain(output, &error.into()));
    last.map_or(Ok(()), |error| Err(error.into()))
}

/// A table without borders, as docker prints them.
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

/// The time since `then`, such as `3 minutes ago`.
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

/// The first twelve hexadecimal digits of a digest.
pub(crate) fn short(digest: &str) -> String {
    digest.trim_start_matches("sha256:").chars().take(12).collect()
}

/// The error of a command that found something wrong: exit code 1. If the command could not find out, it exits with another code.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Answer(pub(crate) String);

/// Prints an error on stderr, with its code for programs.
pub(crate) fn complain(output: Output, error: &anyhow::Error) {
    let code = match error.downcast_ref::<ClientError>() {
        Some(ClientError::Refused(detail)) => serde_json::to_value(detail.code).ok(),
        Some(ClientError::Unreachable { .. }) => Some(Value::from("unreachable")),
        _ => None,
    };
    let code = code.as_ref().and_then(Value::as_str).unwrap_or("failed");
    report::fail(PROGRAM, output.form(), code, &error.to_string());
}

/// Prints a warning on stderr.
pub(crate) fn warn(output: Output, message: &str) {
    report::warn(PROGRAM, output.form(), message);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_steer_the_terminal() {
        let value = vec![std::collections::BTreeMap::from([("k\u{7f}".to_owned(), "usr/bin/é\u{1b}[2J\n".to_owned())])];
        let expected =
            [std::collections::BTreeMap::from([("k\\u{7f}".to_owned(), "usr/bin/é\\u{1b}[2J\\n".to_owned())])];
        assert_eq!(shown(&value).unwrap(), expected);
        let line = json(&value, Layout::Line).unwrap();
        assert_eq!(line, r#"[{"k\u007f":"usr/bin/é\u001b[2J\n"}]"#);
    }

    #[test]
    fn tables_have_no_trailing_blanks() {
        assert_eq!(table(["A", "B"], [["1".into(), "2".into()]]), "A  B\n1  2\n");
    }
}

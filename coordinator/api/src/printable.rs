//! Text from strangers, made safe to show to people.
//!
//! Registries, images and hosts choose names freely. A name or a reason may hold sequences that a terminal obeys, line
//! ends that make one line look like two, or marks that reverse the direction of text. Everything that people see
//! passes through here: messages are escaped where such text enters them ([`printable`]), and again at the last moment,
//! by whoever prints ([`printable_lines`], [`printable_json`]) or logs ([`PrintableLog`]). Text that is escaped already
//! stays as it is.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};

/// Whether a character could control a terminal, end a line, or change how its neighbours are read: controls (C0, DEL,
/// C1), line and paragraph separators, marks of direction, and invisible characters.
pub fn is_deceptive(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

fn escape(text: &str, is_kept: impl Fn(char) -> bool, write: impl Fn(&mut String, char)) -> Cow<'_, str> {
    if !text.chars().any(|c| is_deceptive(c) && !is_kept(c)) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_deceptive(c) && !is_kept(c) {
            write(&mut escaped, c);
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

/// `text` in one line, with deceptive characters escaped as in Rust: `\u{1b}`, `\n`.
pub fn printable(text: &str) -> Cow<'_, str> {
    escape(text, |_| false, |escaped, c| escaped.extend(c.escape_default()))
}

/// Like [`printable`], but line ends are kept: for text whose lines are the program's own.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escape(text, |c| c == '\n', |escaped, c| escaped.extend(c.escape_default()))
}

/// Equivalent JSON, with deceptive characters escaped as in JSON: `\u202e`. They can only be in strings.
pub fn printable_json(text: &str) -> Cow<'_, str> {
    let write = |escaped: &mut String, c: char| {
        for unit in c.encode_utf16(&mut [0; 2]) {
            // Writing to a string does not fail.
            let _ = write!(escaped, "\\u{unit:04x}");
        }
    };
    escape(text, |c| c == '\n', write)
}

/// The form of a log's lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogForm {
    /// Text, with colours or without.
    Text,
    /// A JSON object each.
    Json,
}

/// Where a log goes. Each write is one line, however many line ends a stranger has put into it. What cannot be written
/// is lost without an error.
#[derive(Debug)]
pub struct PrintableLog<W> {
    inner: W,
    form: LogForm,
}

impl<W> PrintableLog<W> {
    /// Writes to `inner`.
    pub fn new(inner: W, form: LogForm) -> PrintableLog<W> {
        PrintableLog { inner, form }
    }
}

impl<W: Write> Write for PrintableLog<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let (line, end) = match text.strip_suffix('\n') {
            Some(line) => (line, "\n"),
            None => (&*text, ""),
        };
        let line = match self.form {
            LogForm::Json => printable_json(line),
            LogForm::Text => printable_but_colours(line),
        };
        // If the log's reader has gone, there is nobody to tell, and nothing that is logged may fail because of it.
        let _ = self.inner.write_all(format!("{line}{end}").as_bytes());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.inner.flush();
        Ok(())
    }
}

/// Like [`printable`], but sequences that only set a colour are kept: they are the log's own.
fn printable_but_colours(line: &str) -> Cow<'_, str> {
    if !line.contains("\u{1b}[") {
        return printable(line);
    }
    let mut parts = line.split("\u{1b}[");
    let mut escaped = printable(parts.next().unwrap_or_default()).into_owned();
    for part in parts {
        let end = part.find(|c: char| !c.is_ascii_digit() && c != ';');
        match end.filter(|end| part[*end..].starts_with('m')) {
            Some(end) => {
                escaped.push_str("\u{1b}[");
                escaped.push_str(&part[..=end]);
                escaped.push_str(&printable(&part[end + 1..]));
            }
            None => escaped.push_str(&printable(&format!("\u{1b}[{part}"))),
        }
    }
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a hostile registry says.
    const EVIL: &str = "a\u{1b}[2Jb\r\nforged: line\u{202e}txt.exe\u{9b}31m\u{7f}\u{2028}é\u{e0041}";

    #[test]
    fn nothing_that_deceives_is_left() {
        let expected = "a\\u{1b}[2Jb\\r\\nforged: line\\u{202e}txt.exe\\u{9b}31m\\u{7f}\\u{2028}é\\u{e0041}";
        assert_eq!(printable(EVIL), expected);
        assert_eq!(printable(&printable(EVIL)), expected, "twice is once");
        assert_eq!(printable("größer, 日本語, ∀"), "größer, 日本語, ∀");
        assert_eq!(printable_lines("one\ntwo\r"), "one\ntwo\\r");
    }

    #[test]
    fn json_stays_the_same_document() {
        let text = serde_json::to_string_pretty(&serde_json::json!({"why": EVIL, "more": [EVIL]})).unwrap();
        let shown = printable_json(&text);
        assert!(!shown.chars().any(|c| is_deceptive(c) && c != '\n'), "{shown}");
        let (before, after): (serde_json::Value, serde_json::Value) =
            (serde_json::from_str(&text).unwrap(), serde_json::from_str(&shown).unwrap());
        assert_eq!(before, after);
    }

    #[test]
    fn a_line_of_the_log_stays_one_line_and_keeps_its_colours() {
        let logged = |form, text: &str| {
            let mut log = PrintableLog::new(Vec::new(), form);
            log.write_all(text.as_bytes()).unwrap();
            String::from_utf8(log.inner).unwrap()
        };
        let line = logged(LogForm::Text, &format!("\u{1b}[32mINFO\u{1b}[0m {EVIL}\n"));
        let expected = format!("\u{1b}[32mINFO\u{1b}[0m {}\n", printable(EVIL));
        assert_eq!(line, expected);
        assert_eq!(logged(LogForm::Text, "x\u{1b}[1;1Hy\u{1b}[\n"), "x\\u{1b}[1;1Hy\\u{1b}[\n");
        let json = format!("{}\n", serde_json::json!({"message": EVIL}));
        let shown = logged(LogForm::Json, &json);
        assert!(shown.ends_with("}\n") && !shown.trim_end().chars().any(is_deceptive), "{shown}");
    }

    #[test]
    fn a_log_that_nobody_reads_fails_nobody() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let mut log = PrintableLog::new(Closed, LogForm::Text);
        log.write_all(b"a line\n").and_then(|()| log.flush()).unwrap();
    }
}

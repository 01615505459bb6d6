//! How all programs report errors: one sentence on stderr or, with `--json`, one object in one line there.
//!
//! The object has the form of the coordinator's refusals, `{"error": {"code", "message"}}`: `code` is one of
//! [`crate::error::ErrorCode`], `unreachable`, `usage` or `failed`. What is not a failure, such as progress or a
//! warning, is a line of its own with another key. So stderr with `--json` is JSON lines throughout, and stdout holds
//! the result alone.
//!
//! A reader that has gone away is never a reason to fail.

use std::ffi::OsString;
use std::io::Write;

use serde_json::{Value, json};

use crate::printable::{printable_json, printable_lines};

/// Exit code: done.
pub const EXIT_DONE: u8 = 0;
/// Exit code: failed, or what was asked about is not as it should be.
pub const EXIT_FAILED: u8 = 1;
/// Exit code: the command line is wrong.
pub const EXIT_USAGE: u8 = 2;
/// Exit code of a command whose 1 is an answer (differences, damage, nothing mounted): the answer could not be found
/// out.
pub const EXIT_UNANSWERED: u8 = 3;
/// Exit code: interrupted from the keyboard, as shells count SIGINT.
pub const EXIT_INTERRUPTED: u8 = 130;
/// Exit code: told to end, as shells count SIGTERM.
pub const EXIT_TERMINATED: u8 = 143;

/// The table that every `--help` ends with.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done, and what was asked about is as it should be
  1    failed, or damage, differences, failed jobs or a missing mount were found; one sentence on stderr says which
  2    the command line is wrong
  3    what was asked could not be found out, from commands whose 1 is an answer (diff, fsck; status, verify)
  130  interrupted from the keyboard";

/// Who reads the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// People.
    Text,
    /// Programs.
    Json,
}

impl Form {
    /// The form that a command line asks for. It is known before the command line is parsed, so that mistakes in it are
    /// reported in the right form.
    pub fn of(arguments: impl IntoIterator<Item = OsString>) -> Form {
        if arguments.into_iter().take_while(|word| word != "--").any(|word| word == "--json") {
            Form::Json
        } else {
            Form::Text
        }
    }
}

/// Reports that `program` failed.
pub fn fail(program: &str, form: Form, code: &str, message: &str) {
    match form {
        Form::Text => say(&format!("{program}: {message}")),
        Form::Json => say_json(&json!({ "error": { "code": code, "message": message } })),
    }
}

/// Reports something that is not a failure.
pub fn warn(program: &str, form: Form, message: &str) {
    match form {
        Form::Text => say(&format!("{program}: {message}")),
        Form::Json => say_json(&json!({ "warning": { "message": message } })),
    }
}

/// Writes a line for people to stderr.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{}", printable_lines(line));
}

/// Writes one object in one line to stderr.
pub fn say_json(value: &Value) {
    let _ = writeln!(std::io::stderr(), "{}", printable_json(&value.to_string()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_asked_for_by_a_flag_and_by_no_operand() {
        let form = |words: &[&str]| Form::of(words.iter().map(OsString::from));
        assert_eq!(form(&["x", "images", "--json"]), Form::Json);
        assert_eq!(form(&["x", "images"]), Form::Text);
        assert_eq!(form(&["x", "image", "--", "--json"]), Form::Text);
    }
}

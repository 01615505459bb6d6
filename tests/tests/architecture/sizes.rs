//! No file is longer than a reader can hold in mind. How long functions may be, clippy is told (`clippy.toml`).

use crate::{Source, sources};

/// Lines of code in a file at most, without blank lines and comments.
const FILE_MAX: usize = 500;

/// Lines of code.
fn code_lines(text: &str) -> usize {
    text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with("//")).count()
}

fn too_long(sources: &[Source]) -> Vec<String> {
    let mut wrong = Vec::new();
    for Source { path, text } in sources {
        let lines = code_lines(text);
        if lines > FILE_MAX {
            wrong.push(format!("{path} has {lines} lines of code, more than {FILE_MAX}"));
        }
    }
    wrong
}

#[test]
fn no_file_is_too_long() {
    let wrong = too_long(&sources().unwrap());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_file_that_is_too_long_is_found() {
    let source = |text: String| Source { path: "a.rs".to_owned(), text };
    let lines = "// A comment.\n\nconst A: u8 = 1;\n".repeat(FILE_MAX + 1);
    assert_eq!(too_long(&[source(lines)]), ["a.rs has 501 lines of code, more than 500"]);
}

//! The glossary of `docs/ARCHITECTURE.md`: its terms are where it says, and the words that it retires are nowhere.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use tests::process::run;

use crate::root;

/// Where the glossary stands; it alone may name retired words.
const GLOSSARY: &str = "docs/ARCHITECTURE.md";

/// Where a retired word is something else: the name of a directory on disk, which never changes.
const ELSEWHERE: &[(&str, &[&str])] = &[
    // The state database's directory, and the handover log's.
    ("journal", &["coordinator/src/state/state_db/engine.rs", "tests/tests/pull.rs"]),
    (
        "ledger",
        &[
            "store/FORMAT.md",
            "store/src/layout.rs",
            "store/src/handover_log.rs",
            "store/src/publisher/handover_log.rs",
            "coordinator/src/state/replicated.rs",
            "coordinator/src/state/state_db.rs",
            "coordinator/src/state/replicated/tests.rs",
            "coordinator/src/admin/fsck/finding.rs",
            "docs/OPERATIONS.md",
            "tests/tests/damage.rs",
            "tests/tests/failover.rs",
            "tests/tests/promises.rs",
        ],
    ),
];

/// One row of the glossary.
#[derive(Debug)]
struct Row {
    /// Its terms in code, without backticks.
    terms: Vec<String>,
    /// The files where they live.
    files: Vec<String>,
    retired: Vec<String>,
}

/// What stands between backticks.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn rows(document: &str) -> Vec<Row> {
    let table = document.split("## Glossary").nth(1).unwrap_or_default();
    let lines = table.lines().filter(|line| line.starts_with("| ")).skip(2);
    lines
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let words = cells.get(3).unwrap_or(&"").split(',').map(str::trim);
            let retired = words.filter(|word| !word.is_empty()).map(str::to_owned).collect();
            let cell = |at: usize| cells.get(at).map(|cell| quoted(cell)).unwrap_or_default();
            Row { terms: cell(0), files: cell(2), retired }
        })
        .collect()
}

fn glossary() -> Result<Vec<Row>> {
    let path = root().join(GLOSSARY);
    Ok(rows(&std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?))
}

/// The words of a text: letters, digits and underscores; and the parts that underscores and capitals make of them.
fn words(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| !word.is_empty()) {
        found.insert(word.to_owned());
        for part in word.split('_').filter(|part| !part.is_empty()) {
            let mut start = 0;
            for (at, _) in part.char_indices().skip(1).filter(|(at, c)| {
                c.is_ascii_uppercase() && part[..*at].ends_with(|before: char| before.is_ascii_lowercase())
            }) {
                found.insert(part[start..at].to_owned());
                start = at;
            }
            found.insert(part[start..].to_owned());
        }
    }
    found
}

/// Whether a retired word is among these: as it is if it is a constant or a type, else however it is capitalised.
fn is_among(retired: &str, words: &BTreeSet<String>) -> bool {
    let is_prose = retired.chars().all(|c| c.is_ascii_lowercase());
    words.iter().any(|word| if is_prose { word.eq_ignore_ascii_case(retired) } else { word == retired })
}

/// Every text of the project but the glossary's, the history's and the list of others' reports, which quote.
fn texts() -> Result<Vec<(String, String)>> {
    let mut command = std::process::Command::new("git");
    command.args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "*.rs",
        "*.md",
        "*.toml",
        "scripts",
        "docs",
    ]);
    let listed = run(command.current_dir(root()))?.ok()?;
    let quotes = [GLOSSARY, "CHANGELOG.md", "tests/CASES.md", "tests/tests/architecture/words.rs"];
    let paths = listed.lines().filter(|path| !quotes.contains(path) && root().join(path).is_file());
    paths.map(|path| Ok((path.to_owned(), std::fs::read_to_string(root().join(path))?))).collect()
}

#[test]
fn the_glossarys_terms_are_where_it_says() {
    let rows = glossary().unwrap();
    assert!(rows.len() > 30, "the glossary was found: {}", rows.len());
    for Row { terms, files, .. } in &rows {
        let texts: String = files.iter().map(|file| std::fs::read_to_string(root().join(file)).unwrap()).collect();
        for term in terms.iter().filter(|term| !term.contains('*')) {
            assert!(words(&texts).contains(term), "{term} is not in {files:?}");
        }
    }
}

#[test]
fn no_retired_word_is_left() {
    let rows = glossary().unwrap();
    let retired: Vec<&str> = rows.iter().flat_map(|row| &row.retired).map(String::as_str).collect();
    assert!(retired.len() > 20, "{retired:?}");
    let mut left = Vec::new();
    for (path, text) in texts().unwrap() {
        let words = words(&text);
        for word in retired.iter().filter(|word| is_among(word, &words)) {
            let is_elsewhere = ELSEWHERE.iter().any(|(other, files)| other == word && files.contains(&path.as_str()));
            if !is_elsewhere {
                left.push(format!("{path}: {word}"));
            }
        }
    }
    assert!(left.is_empty(), "retired words: see the glossary in {GLOSSARY} for better ones\n{}", left.join("\n"));
}

#[test]
fn a_planted_word_is_found() {
    let text = "let keyring = Throne::new(\"x\", GOODBYE); fn write_ledger(){} struct SharedJournal;";
    let words = words(text);
    for word in ["keyring", "throne", "GOODBYE", "ledger", "SharedJournal", "journal"] {
        assert!(is_among(word, &words), "{word} in {words:?}");
    }
    assert!(!is_among("desk", &words) && !is_among("goodby", &words));
    let row =
        &rows("## Glossary\n\n| term | a | b | not |\n| --- | --- | --- | --- |\n| `A`, x | m | `f.rs` | one, TWO |\n")
            [0];
    assert_eq!((row.terms.len(), row.files[0].as_str(), row.retired.join(" ")), (1, "f.rs", "one TWO".to_owned()));
}

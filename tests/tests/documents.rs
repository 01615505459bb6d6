//! The documentation is correct: every command line, option, variable, path and test that it names exists, and `--help`
//! says what each command is for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tests::cluster::binary;
use tests::process::run;

const PROGRAMS: &[&str] = &["cachefs", "cachefs-coordinator", "cachefsctl"];

/// The documents, by their path from the root.
const DOCUMENTS: &[&str] = &[
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/ARCHITECTURE.md",
    "docs/BENCHMARKS.md",
    "docs/COMMANDS.md",
    "docs/COMPATIBILITY.md",
    "docs/CONFIGURATION.md",
    "docs/OPERATIONS.md",
    "docs/SECURITY.md",
    "docs/TROUBLESHOOTING.md",
    "tests/README.md",
    "tests/CASES.md",
    "bench/README.md",
    "deploy/README.md",
    "cachefs/SEMANTICS.md",
    "store/FORMAT.md",
];

/// Variables that only the tests read.
const OF_THE_TESTS: &[&str] = &["CACHEFS_BIN_DIR"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn document(path: &str) -> Result<String> {
    std::fs::read_to_string(root().join(path)).with_context(|| format!("cannot read {path}"))
}

/// The `--help` of every command, by the command's words: `cachefsctl schedule add`.
struct Helps(BTreeMap<String, String>);

impl Helps {
    fn read() -> Result<Helps> {
        let mut helps = Helps(BTreeMap::new());
        for program in PROGRAMS {
            helps.add(vec![(*program).to_owned()])?;
        }
        Ok(helps)
    }

    fn add(&mut self, words: Vec<String>) -> Result<()> {
        let text = run(Command::new(binary(&words[0])?).args(&words[1..]).arg("--help"))?.ok()?;
        for command in commands(&text) {
            self.add([words.clone(), vec![command]].concat())?;
        }
        self.0.insert(words.join(" "), text);
        Ok(())
    }
}

/// The subcommands that a `--help` lists, except `help`.
fn commands(help: &str) -> Vec<String> {
    let section = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let named = section.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    named.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").map(str::to_owned).collect()
}

/// Whether a help text has exactly this option, and not only a longer one.
fn has_option(help: &str, option: &str) -> bool {
    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '-');
    help.match_indices(option).any(|(at, _)| ends(&help[at + option.len()..]))
}

/// The code in a document: spans, and lines of code blocks joined with their continuations.
fn code(text: &str) -> (Vec<String>, Vec<String>) {
    let (mut spans, mut lines, mut in_block) = (Vec::new(), Vec::<String>::new(), false);
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
            continue;
        }
        match (in_block, lines.last_mut().filter(|last| last.ends_with('\\'))) {
            (false, _) => spans.extend(line.split('`').skip(1).step_by(2).map(str::to_owned)),
            (true, Some(last)) => {
                last.pop();
                last.push_str(line.trim());
            }
            (true, None) => lines.push(line.to_owned()),
        }
    }
    (spans, lines)
}

/// The parts of a shell line that may be commands, as words. A drawing has none.
fn parts(line: &str) -> Vec<Vec<&str>> {
    let line = line.split(" #").next().filter(|line| !line.contains('\u{2500}')).unwrap_or_default();
    let parts = line.split(['|', ';', '(', ')', '&', '>', '<']);
    parts.map(|part| part.split_whitespace().collect()).collect()
}

/// Checks a command line against the help texts. Other programs are ignored.
fn check_command(helps: &Helps, words: &[&str]) -> Result<()> {
    // Skips assignments of variables, but not systemd's `ExecStartPre=-/usr/bin/cachefs`.
    let is_assignment = |word: &&&str| word.contains('=') && !word.starts_with("ExecStart");
    let words: Vec<&str> = words.iter().skip_while(is_assignment).copied().collect();
    let program = words.first().map(|word| word.rsplit('/').next().unwrap_or(word)).unwrap_or_default();
    if !PROGRAMS.contains(&program) {
        return Ok(());
    }
    let mut at = program.to_owned();
    for word in &words[1..] {
        let below = format!("{at} {word}");
        let help = helps.0.get(&at).context("a command has no help")?;
        if helps.0.contains_key(&below) {
            at = below;
        } else if let Some(option) = word.strip_prefix("--").and_then(|word| word.split(['=', ',', '.']).next()) {
            ensure!(has_option(help, &format!("--{option}")), "{at} has no option --{option}");
        } else if !commands(help).is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c == '-') {
            // The word is the value of an option, or a command that does not exist.
            let after_option =
                words.iter().zip(&words[1..]).any(|(before, own)| own == word && before.starts_with('-'));
            ensure!(after_option || word.starts_with('-'), "{at} has no command {word}");
        }
    }
    Ok(())
}

#[test]
fn every_command_line_of_the_documents_exists() {
    let helps = Helps::read().unwrap();
    let mut wrong = Vec::new();
    // FORMAT.md contains names of the format that look like the programs' names.
    for path in DOCUMENTS.iter().filter(|path| **path != "store/FORMAT.md") {
        let (spans, lines) = code(&document(path).unwrap());
        for line in spans.iter().chain(&lines) {
            for words in parts(line) {
                if let Err(error) = check_command(&helps, &words) {
                    wrong.push(format!("{path}: `{line}`: {error}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (line, why) in [
        ("cachefsctl fsck --shallow", "no option --shallow"),
        ("cachefsctl schedule ad nightly", "no command ad"),
        ("CACHEFS_SERVER=x cachefs mout /mnt", "no command mout"),
        ("cachefs mount /mnt --cache-siz 5G", "no option --cache-siz"),
    ] {
        let words: Vec<&str> = line.split_whitespace().collect();
        let error = check_command(&helps, &words).unwrap_err().to_string();
        assert!(error.contains(why), "{line}: {error}");
    }
}

#[test]
fn every_variable_of_the_documents_is_in_a_help() {
    let helps = Helps::read().unwrap();
    let is_part = |c: char| c.is_ascii_uppercase() || c == '_';
    for path in DOCUMENTS {
        let text = document(path).unwrap();
        for word in text.split(|c| !is_part(c)).filter(|word| word.starts_with("CACHEFS_")) {
            let known = OF_THE_TESTS.contains(&word) || helps.0.values().any(|help| help.contains(word));
            assert!(known, "{path} tells of {word}, which no --help has");
        }
    }
    // The table says which commands read which variables.
    let table = document("docs/COMMANDS.md").unwrap();
    let rows = table
        .lines()
        .filter(|line| line.starts_with("| `") && line.split('`').nth(1).is_some_and(|name| name.chars().all(is_part)));
    let mut checked = 0;
    for row in rows.filter(|row| !row.contains("NO_COLOR")) {
        let cells: Vec<&str> = row.split('|').collect();
        let name = cells[1].trim().trim_matches('`');
        for command in cells[2].split('`').skip(1).step_by(2) {
            let help = helps.0.get(command).unwrap_or_else(|| panic!("no command {command}"));
            assert!(help.contains(name), "{command} --help does not tell of {name}");
            checked += 1;
        }
    }
    assert!(checked >= 9, "the table has rows: {checked}");
}

/// Whether a path exists, relative to the document's directory or to the root. `*` matches any part of a name.
fn is_there(document: &str, path: &str) -> bool {
    let own = root().join(document).parent().map(Path::to_owned).unwrap_or_default();
    [own, root()].iter().any(|base| match path.split_once('*') {
        None => base.join(path.trim_end_matches('/')).exists(),
        Some((before, after)) => {
            let (directory, prefix) = before.rsplit_once('/').unwrap_or(("", before));
            let names = std::fs::read_dir(base.join(directory)).into_iter().flatten().flatten();
            let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
            names.into_iter().any(|name| name.starts_with(prefix) && name.ends_with(after))
        }
    })
}

#[test]
fn every_path_of_the_documents_exists() {
    let ours = ["store", "coordinator", "cachefs", "tests", "bench", "scripts", "docs", "src", "runs"];
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_./*-".contains(c);
    let mut wrong = Vec::new();
    for path in DOCUMENTS {
        let text = document(path).unwrap();
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let links = links.map(|link| link.split('#').next().unwrap_or_default().to_owned());
        let links = links.filter(|link| !link.is_empty() && !link.contains("://"));
        let (spans, lines) = code(&text);
        let words = spans.iter().chain(&lines).flat_map(|line| line.split_whitespace());
        let words = words.filter(|word| word.split_once('/').is_some_and(|(first, _)| ours.contains(&first)));
        let named = words.filter(|word| word.chars().all(is_plain)).map(str::to_owned);
        wrong.extend(links.chain(named).filter(|name| !is_there(path, name)).map(|name| format!("{path}: {name}")));
    }
    assert!(wrong.is_empty(), "these do not exist:\n{}", wrong.join("\n"));
    assert!(!is_there("README.md", "tests/tests/nothing_*.rs") && !is_there("README.md", "docs/NOTHING.md"));
}

/// The keys that a program's configuration file may have. The program lists them when it finds an unknown one.
fn keys(command: &mut Command) -> Result<BTreeSet<String>> {
    let refused = run(command)?;
    ensure!(refused.code == 1, "a file with an unknown key is taken");
    let listed = refused.stderr.split_once("expected one of").context("the refusal lists no keys")?.1;
    Ok(listed.split('`').skip(1).step_by(2).map(str::to_owned).collect())
}

/// The first two cells of the table rows below a heading, without backticks.
fn rows(text: &str, heading: &str) -> Vec<(String, String)> {
    let own = text.lines().skip_while(|line| *line != heading).skip(1).take_while(|line| !line.starts_with("## "));
    let cells =
        own.filter(|line| line.starts_with("| `")).map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
    let bare = |cell: &str| cell.trim_matches('`').to_owned();
    cells.map(|cells| (bare(cells[1]), bare(cells[2]))).collect()
}

#[test]
fn the_reference_has_every_key_and_every_flag() {
    let (helps, text) = (Helps::read().unwrap(), document("docs/CONFIGURATION.md").unwrap());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("unknown.toml");
    std::fs::write(&file, "unknown = 1\n").unwrap();
    for (heading, program, command) in [
        ("## The coordinator", "cachefs-coordinator", &["serve"][..]),
        ("## A host", "cachefs", &["mount", "/nonexistent"][..]),
    ] {
        let keys = keys(Command::new(binary(program).unwrap()).args(command).arg("--config").arg(&file)).unwrap();
        let help = &helps.0[&format!("{program} {}", command[0])];
        let flags: BTreeSet<String> = help
            .split_whitespace()
            .filter(|word| word.starts_with("--") && word.len() > 2)
            .map(|word| word.trim_matches(|c: char| !c.is_ascii_alphanumeric() && c != '-').to_owned())
            .filter(|flag| !["--help", "--version"].contains(&flag.as_str()))
            .collect();
        let rows = rows(&text, heading);
        let is_flag = |word: &&String| word.starts_with("--");
        let named: BTreeSet<String> =
            rows.iter().map(|(first, _)| first).filter(|word| !is_flag(word)).cloned().collect();
        assert_eq!(named, keys, "keys of {program}");
        let flagged = rows.iter().flat_map(|(first, second)| [first, second]);
        let flagged: BTreeSet<String> = flagged.filter(is_flag).cloned().collect();
        assert_eq!(flagged, flags, "flags of {program}");
    }
}

#[test]
fn the_samples_are_taken() {
    let taken = |program: &str, command: &[&str], sample: &str| {
        let mut line = Command::new(binary(program).unwrap());
        run(line.args(command).arg("--config").arg(root().join("docs/samples").join(sample))).unwrap()
    };
    // Both programs accept the file and fail later, because this machine does not have the shared disk.
    let coordinator = taken("cachefs-coordinator", &["serve"], "coordinator.toml");
    assert!(coordinator.code == 1 && coordinator.stderr.contains("/mnt/shared/store"), "{coordinator:?}");
    let host = taken("cachefs", &["mount", "/nonexistent"], "host.toml");
    assert!(host.code == 1 && !host.stderr.contains("configuration"), "{host:?}");
}

/// Collects the text of all Rust files below a directory, and the files' names without `.rs`.
fn sources(directory: &Path, found: &mut (String, Vec<String>)) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found)?;
        } else if let Some(stem) = name.strip_suffix(".rs") {
            found.0.push_str(&std::fs::read_to_string(&path)?);
            found.1.push(stem.to_owned());
        }
    }
    Ok(())
}

#[test]
fn every_test_of_the_cases_exists() {
    let mut found = (String::new(), Vec::new());
    for directory in ["store", "coordinator", "cachefs", "tests", "bench"] {
        sources(&root().join(directory), &mut found).unwrap();
    }
    let (text, files) = found;
    let cases = document("tests/CASES.md").unwrap();
    let mut wrong = Vec::new();
    let rows = cases.lines().map(|line| line.replace("\\|", "")).filter(|line| line.starts_with("| "));
    for row in rows.filter(|row| row.split('|').count() == 7) {
        let last = row.split('|').nth(5).unwrap_or_default();
        for name in last.split('`').skip(1).step_by(2) {
            let own = name.rsplit("::").next().unwrap_or(name);
            let is_there = text.contains(&format!("fn {own}(")) || text.contains(&format!("mod {own}"));
            if !is_there && !files.iter().any(|file| file == own) {
                wrong.push(name.to_owned());
            }
        }
    }
    assert!(wrong.is_empty(), "CASES.md names tests that do not exist: {wrong:?}");
    assert!(cases.matches("::").count() > 10, "the table names tests");
}

#[test]
fn every_part_of_the_harness_is_listed() {
    let readme = document("tests/README.md").unwrap();
    for entry in std::fs::read_dir(root().join("tests/src")).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        let Some(stem) = name.strip_suffix(".rs").filter(|stem| *stem != "lib") else { continue };
        assert!(readme.contains(&format!("`{stem}`")), "tests/README.md does not tell of src/{name}");
    }
}

/// The first sentence of a help text.
fn sentence(help: &str) -> Result<&str> {
    let first = help.lines().next().unwrap_or_default();
    if first.starts_with("Usage:")
        || !first.starts_with(|c: char| c.is_uppercase())
        || first.split_whitespace().count() < 2
    {
        bail!("{first:?} says nothing");
    }
    Ok(first)
}

#[test]
fn every_command_says_what_it_is_for() {
    let helps = Helps::read().unwrap();
    assert!(helps.0.len() > 45, "{} commands", helps.0.len());
    for (command, help) in &helps.0 {
        sentence(help).with_context(|| command.clone()).unwrap();
        // Each option and operand has a description, which clap writes after two spaces or on the next line.
        let lines: Vec<&str> = help.lines().collect();
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.starts_with("      --")) {
            let beside = line.trim_start().split_once("  ").map(|(_, words)| words);
            let words = beside.or(lines.get(at + 1).copied()).unwrap_or_default();
            assert!(!words.trim().is_empty(), "{command}: {line}");
        }
    }
    for program in PROGRAMS {
        assert!(helps.0[*program].contains("Exit codes:"), "{program}");
        let mistaken = run(Command::new(binary(program).unwrap()).arg("completion")).unwrap();
        assert_eq!(mistaken.code, 2);
        assert!(mistaken.stderr.contains("'completions'"), "{program} suggests: {}", mistaken.stderr);
    }
}

/// The manual pages of all programs, by name.
fn manual(directory: &Path) -> Result<BTreeMap<String, String>> {
    let mut pages = BTreeMap::new();
    for entry in std::fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        pages.insert(name, std::fs::read_to_string(&path)?);
    }
    Ok(pages)
}

#[test]
fn the_manual_pages_are_those_of_the_programs() {
    let made = tempfile::tempdir().unwrap();
    for program in PROGRAMS {
        run(Command::new(binary(program).unwrap()).arg("man").arg(made.path())).unwrap().ok().unwrap();
    }
    let (made, kept) = (manual(made.path()).unwrap(), manual(&root().join("docs/man")).unwrap());
    let again =
        "run `man docs/man` of cachefs, cachefsctl and cachefs-coordinator, and remove pages of commands that are gone";
    let (new, old): (BTreeSet<_>, BTreeSet<_>) = (made.keys().collect(), kept.keys().collect());
    assert_eq!(new, old, "{again}");
    for (name, page) in &made {
        assert!(*page == kept[name], "docs/man/{name} is stale: {again}");
    }
    assert!(made.len() > 40 && made["cachefsctl-pull.1"].contains("SYNOPSIS"));
}

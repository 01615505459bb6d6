//! The shape of the project: which crate and which module may know which, and what files are called.
//!
//! Directions come from `cargo metadata`, module orders from the list at the head of each crate's `lib.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;
use tests::process::run;

/// Every crate of ours, and the crates of ours that it may link. What only its own tests need is not restricted.
const DIRECTIONS: &[(&str, &[&str])] = &[
    ("store", &[]),
    ("coordinator-api", &[]),
    ("coordinator", &["store", "coordinator-api"]),
    ("cachefs", &["store", "coordinator-api"]),
    ("tests", &["store", "coordinator-api", "coordinator", "cachefs"]),
    ("bench", &["store", "coordinator-api", "coordinator", "cachefs", "tests"]),
];

/// What must not be linked, however indirectly: the store is plain synchronous std, the coordinator has no FUSE,
/// the host neither serves HTTP nor talks to registries.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("store", &["tokio", "fuser", "axum", "hyper", "reqwest", "tonic", "rocksdb"]),
    ("coordinator-api", &["fuser", "axum", "reqwest", "rocksdb"]),
    ("coordinator", &["fuser"]),
    ("cachefs", &["axum", "reqwest", "rocksdb"]),
];

/// The adapters to FUSE: the product's and that of the slow disk for tests.
const ADAPTERS: &[&str] = &["cachefs/src/fuse.rs", "bench/src/slowdisk/mirror.rs"];

/// Names that say nothing of what a file is for.
const EMPTY_NAMES: &[&str] =
    &["mod", "util", "utils", "common", "helper", "helpers", "manager", "managers", "misc", "shared", "stuff"];

/// The directories of the crates whose `lib.rs` gives an order of modules.
const ORDERED: &[&str] = &["store", "coordinator/api", "coordinator", "cachefs", "tests"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn metadata() -> Result<Value> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["metadata", "--format-version=1", "--locked", "--filter-platform=x86_64-unknown-linux-gnu"]);
    Ok(serde_json::from_str(&run(command.current_dir(root()))?.ok()?)?)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The workspace's packages: name and id.
fn ours(metadata: &Value) -> BTreeMap<&str, &str> {
    let members: BTreeSet<&str> = list(&metadata["workspace_members"]).iter().map(text).collect();
    let packages = list(&metadata["packages"]).iter().map(|package| (text(&package["name"]), text(&package["id"])));
    packages.filter(|(_, id)| members.contains(id)).collect()
}

/// What each package links, by id; neither what only its tests nor what only its build script needs.
fn links(metadata: &Value) -> BTreeMap<&str, Vec<&str>> {
    let is_linked = |dep: &&Value| list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
    list(&metadata["resolve"]["nodes"])
        .iter()
        .map(|node| {
            let deps = list(&node["deps"]).iter().filter(is_linked).map(|dep| text(&dep["pkg"])).collect();
            (text(&node["id"]), deps)
        })
        .collect()
}

#[test]
fn crates_depend_on_each_other_in_one_direction_only() {
    let metadata = metadata().unwrap();
    let (ours, links) = (ours(&metadata), links(&metadata));
    let known: BTreeSet<&str> = DIRECTIONS.iter().map(|(name, _)| *name).collect();
    assert_eq!(ours.keys().copied().collect::<BTreeSet<_>>(), known, "a crate has no place in the design");
    for (name, allowed) in DIRECTIONS {
        for (other, id) in &ours {
            let linked = links[ours[name]].contains(id);
            assert!(!linked || allowed.contains(other), "{name} must not depend on {other}");
        }
    }
}

#[test]
fn no_crate_links_what_is_foreign_to_its_promise() {
    let metadata = metadata().unwrap();
    let (ours, links) = (ours(&metadata), links(&metadata));
    let names: BTreeMap<&str, &str> =
        list(&metadata["packages"]).iter().map(|package| (text(&package["id"]), text(&package["name"]))).collect();
    for (name, forbidden) in FORBIDDEN {
        let mut reached = vec![ours[name]];
        let mut index = 0;
        while let Some(id) = reached.get(index) {
            let new: Vec<_> = links[id].iter().filter(|id| !reached.contains(id)).copied().collect();
            reached.extend(new);
            index += 1;
        }
        for id in reached {
            assert!(!forbidden.contains(&names[id]), "{name} links {}", names[id]);
        }
    }
}

/// A source file of ours.
struct Source {
    /// Below the root.
    path: String,
    text: String,
}

impl Source {
    /// The lines of code, without comments.
    fn code(&self) -> impl Iterator<Item = &str> {
        self.text.lines().map(|line| line.split("//").next().unwrap_or(""))
    }
}

/// Every source file that is part of the project.
fn sources() -> Result<Vec<Source>> {
    let mut command = Command::new("git");
    command.args(["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"]);
    let listed = run(command.current_dir(root()))?.ok()?;
    let read = |path: &str| {
        let text = std::fs::read_to_string(root().join(path)).with_context(|| format!("cannot read {path}"))?;
        Ok(Source { path: path.to_owned(), text })
    };
    listed.lines().filter(|path| root().join(path).exists()).map(read).collect()
}

#[test]
fn files_are_named_for_what_they_are_and_open_by_saying_it() {
    let sources = sources().unwrap();
    assert!(sources.len() > 50, "the sources were found");
    for source in &sources {
        for part in Path::new(&source.path).with_extension("").iter() {
            let part = part.to_str().unwrap();
            assert!(!EMPTY_NAMES.contains(&part), "{}: the name {part} says nothing", source.path);
        }
        let first = source.text.lines().find(|line| !line.starts_with("#!"));
        assert!(first.is_some_and(|line| line.starts_with("//! ")), "{} does not say what it is", source.path);
    }
}

#[test]
fn one_file_of_each_server_names_fuser() {
    let is_word = |line: &str| {
        let around = |at: usize| {
            let bytes = line.as_bytes();
            let inside = |at: Option<usize>| {
                at.and_then(|at| bytes.get(at)).is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_')
            };
            !inside(at.checked_sub(1)) && !inside(Some(at + "fuser".len()))
        };
        line.match_indices("fuser").any(|(at, _)| around(at))
    };
    for source in
        sources().unwrap().iter().filter(|source| source.path.contains("src/") && !source.path.starts_with("tests/"))
    {
        let names_it = source.code().any(is_word);
        assert!(!names_it || ADAPTERS.contains(&source.path.as_str()), "{} names fuser", source.path);
    }
}

/// The modules of a crate in the order of its `lib.rs`: each name in its list that has a colon after it.
fn order(lib: &Source) -> Vec<String> {
    let declared = declared_modules(lib);
    let listed =
        lib.text.lines().filter(|line| line.starts_with("//! ")).flat_map(|line| line.split('`').collect::<Vec<_>>());
    let words: Vec<&str> = listed.collect();
    let named = words.windows(2).filter(|pair| pair[1].starts_with(':') || pair[1].starts_with("]:"));
    named.map(|pair| pair[0]).filter(|name| declared.contains(name)).map(str::to_owned).collect()
}

/// The modules that a `lib.rs` declares, without those that only tests see.
fn declared_modules(lib: &Source) -> BTreeSet<&str> {
    let lines: Vec<&str> = lib.code().collect();
    let pairs = lines.iter().zip(std::iter::once(&"").chain(&lines));
    pairs.filter(|(_, before)| before.trim() != "#[cfg(test)]").filter_map(|(line, _)| declared_module(line)).collect()
}

/// `x` of `pub mod x;`.
fn declared_module(line: &str) -> Option<&str> {
    let line = line.trim();
    line.strip_prefix("pub ").unwrap_or(line).strip_prefix("mod ")?.strip_suffix(';')
}

/// The names that follow `crate::` in a line: one, or several in braces.
fn imported(code: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, word) in code.match_indices("crate::") {
        let rest = &code[at + word.len()..];
        let several = rest.strip_prefix('{').and_then(|rest| rest.split_once("};"));
        let parts = several.map_or(vec![rest], |(inside, _)| inside.split(',').collect());
        for part in parts {
            names.insert(part.trim().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect());
        }
    }
    names
}

#[test]
fn modules_import_only_from_those_before_them() {
    let sources = sources().unwrap();
    let mut wrong = Vec::new();
    for directory in ORDERED {
        let source_directory = format!("{directory}/src/");
        let lib = sources.iter().find(|source| source.path == format!("{source_directory}lib.rs")).unwrap();
        let order = order(lib);
        for module in declared_modules(lib) {
            assert!(order.iter().any(|name| name == module), "{} gives {module} no place in its order", lib.path);
        }
        let place = |name: &str| order.iter().position(|other| other == name);
        for source in sources.iter().filter(|source| source.path.starts_with(&source_directory)) {
            let inside = source.path[source_directory.len()..].split(['/', '.']).next().unwrap();
            let Some(own) = place(inside) else { continue };
            let code: String = source.code().map(|line| format!("{line}\n")).collect();
            for name in imported(&code) {
                if place(&name).is_some_and(|other| other > own) {
                    wrong.push(format!(
                        "{}: {inside} comes before {name} in {} and must not import it",
                        source.path, lib.path
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_reading_of_imports_is_right() {
    let lines = "use crate::a::B;\nuse crate::{c::D, e};\nfn x(y: &crate::f_g::H) {}\npub(crate) fn z() {}";
    assert_eq!(imported(lines).into_iter().collect::<Vec<_>>(), ["a", "c", "e", "f_g"]);
}

/// Licences that the project can be given on under; weak copyleft counts for the files that bear it alone.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "MPL-2.0+",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
    // As BSD-3-Clause.
    "bzip2-1.0.6",
];

/// Whether a licence expression can be met with [`LICENCES`] alone: one of its alternatives, all of whose parts are.
fn is_permissive(expression: &str) -> bool {
    let expression = expression.replace(['(', ')'], " ").replace('/', " OR ");
    let part = |part: &str| LICENCES.contains(&part.trim().trim_end_matches(" WITH LLVM-exception"));
    // Without brackets AND binds closer; what is in brackets here is joined by OR and stands beside AND, so each AND must hold.
    expression.split(" AND ").all(|all| all.split(" OR ").any(part))
}

#[test]
fn dependencies_come_from_the_registry_and_can_be_given_on() {
    let metadata = metadata().unwrap();
    for package in list(&metadata["packages"]) {
        let (name, source) = (text(&package["name"]), text(&package["source"]));
        let own = package["source"].is_null();
        assert!(own || source == "registry+https://github.com/rust-lang/crates.io-index", "{name} comes from {source}");
        let licence = text(&package["license"]);
        assert!(is_permissive(licence), "{name} is under {licence:?}");
    }
    assert!(
        is_permissive("(MIT OR GPL-3.0) AND ISC") && !is_permissive("GPL-3.0") && !is_permissive("MIT AND GPL-3.0")
    );
}

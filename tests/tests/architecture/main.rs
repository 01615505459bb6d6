//! The shape of the project: which crate and which module may know which, what files are called, and how long they are.
//!
//! Directions come from `cargo metadata`, module orders from the list at the head of each crate's `lib.rs`, references between modules
//! from the parsed sources ([`modules`]).

mod dependencies;
mod modules;
mod sizes;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;
use tests::process::run;

use crate::modules::{ModuleGraph, ModulePath, shown};

/// Every crate of ours, and the crates of ours that it may link. What only its own tests need is not restricted.
const DIRECTIONS: &[(&str, &[&str])] = &[
    ("store", &[]),
    ("coordinator-api", &[]),
    ("coordinator", &["store", "coordinator-api"]),
    ("snapshotter", &["store"]),
    ("erofs", &[]),
    ("cachefs", &["store", "coordinator-api", "erofs", "snapshotter"]),
    ("tests", &["store", "coordinator-api", "coordinator", "cachefs", "erofs", "snapshotter"]),
    ("bench", &["store", "coordinator-api", "coordinator", "cachefs", "erofs", "snapshotter", "tests"]),
];

/// What must not be linked, however indirectly: the store is plain synchronous std, the coordinator has no FUSE, the host does
/// not talk to registries. (It links axum, with which tonic routes gRPC.)
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("store", &["tokio", "fuser", "axum", "hyper", "reqwest", "tonic", "rocksdb"]),
    ("coordinator-api", &["fuser", "axum", "reqwest", "rocksdb"]),
    ("coordinator", &["fuser"]),
    ("snapshotter", &["fuser", "reqwest", "rocksdb"]),
    ("erofs", &["fuser", "reqwest", "rocksdb", "tokio"]),
    ("cachefs", &["reqwest", "rocksdb"]),
];

/// The adapters to FUSE: the product's two and that of the slow disk for tests.
const ADAPTERS: &[&str] = &[
    "cachefs/src/mount/connection.rs",
    "cachefs/src/mount/data_files.rs",
    "cachefs/src/mount/fuse.rs",
    "bench/src/slowdisk/mirror.rs",
];

/// Names that say nothing of what a file is for.
const EMPTY_NAMES: &[&str] =
    &["mod", "util", "utils", "common", "helper", "helpers", "manager", "managers", "misc", "shared", "stuff"];

/// The directories of the crates whose `lib.rs` gives an order of modules.
const ORDERED: &[&str] =
    &["store", "coordinator/api", "coordinator", "cachefs", "cachefs/erofs", "cachefs/snapshotter", "tests"];

/// The directories of all crates.
const CRATES: &[&str] =
    &["store", "coordinator/api", "coordinator", "cachefs", "cachefs/erofs", "cachefs/snapshotter", "tests", "bench"];

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub(crate) fn metadata() -> Result<Value> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["metadata", "--format-version=1", "--locked", "--filter-platform=x86_64-unknown-linux-gnu"]);
    Ok(serde_json::from_str(&run(command.current_dir(root()))?.ok()?)?)
}

pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

pub(crate) fn list(value: &Value) -> &[Value] {
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
pub(crate) struct Source {
    /// Below the root.
    pub(crate) path: String,
    pub(crate) text: String,
}

impl Source {
    /// The lines of code, without comments.
    pub(crate) fn code(&self) -> impl Iterator<Item = &str> {
        self.text.lines().map(|line| line.split("//").next().unwrap_or(""))
    }
}

/// Every source file that is part of the project.
pub(crate) fn sources() -> Result<Vec<Source>> {
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

/// The files of a crate by their modules' paths; programs of their own are left out.
fn module_files<'a>(sources: &'a [Source], directory: &str) -> BTreeMap<ModulePath, &'a str> {
    let below = format!("{directory}/src/");
    let in_crate = sources.iter().filter_map(|source| Some((source.path.strip_prefix(&below)?, source.text.as_str())));
    let is_library = |path: &str| !path.starts_with("bin/") && path != "main.rs";
    let module = |path: &str| match path.strip_suffix(".rs").unwrap_or(path) {
        "lib" => Vec::new(),
        path => path.split('/').map(str::to_owned).collect(),
    };
    in_crate.filter(|(path, _)| is_library(path)).map(|(path, text)| (module(path), text)).collect()
}

#[test]
fn modules_refer_to_those_before_them_only() {
    let sources = sources().unwrap();
    let mut wrong = Vec::new();
    for directory in ORDERED {
        let lib = sources.iter().find(|source| source.path == format!("{directory}/src/lib.rs")).unwrap();
        let order = order(lib);
        for module in declared_modules(lib) {
            assert!(order.iter().any(|name| name == module), "{} gives {module} no place in its order", lib.path);
        }
        let place = |module: &ModulePath| order.iter().position(|name| Some(name) == module.first());
        for (module, targets) in ModuleGraph::new(&module_files(&sources, directory)).edges {
            let Some(own) = place(&module) else { continue };
            for (target, names) in targets {
                if place(&target).is_some_and(|other| other > own) {
                    let (module, target) = (shown(&module), shown(&target));
                    wrong.push(format!("{directory}: {module} comes before {target} and must not use its {names:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_modules_refer_to_each_other_in_a_circle() {
    let sources = sources().unwrap();
    for directory in CRATES {
        let files = module_files(&sources, directory);
        assert!(files.len() > 3, "{directory}: its sources were found");
        let cycles = ModuleGraph::new(&files).cycles();
        let lines: Vec<String> = cycles.iter().map(|lines| lines.join("\n")).collect();
        assert!(lines.is_empty(), "{directory}:\n{}", lines.join("\n\n"));
    }
}

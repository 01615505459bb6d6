//! What others' crates are taken: `deny.toml` says which licences, which sources, and which crates in two versions.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::{list, metadata, root, text};

/// The part of `deny.toml` that can be held without the network.
#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
    sources: Sources,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    skip: Vec<Skip>,
}

#[derive(Deserialize)]
struct Skip {
    #[serde(rename = "crate")]
    krate: String,
    reason: String,
}

fn deny() -> Result<Deny> {
    let path = root().join("deny.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("cannot understand {}", path.display()))
}

/// Whether a licence expression can be met with the allowed ones alone: one of its alternatives, all of whose parts are.
fn is_permissive(expression: &str, allowed: &[String]) -> bool {
    let expression = expression.replace(['(', ')'], " ").replace('/', " OR ");
    let part = |part: &str| allowed.iter().any(|licence| licence == part.trim().trim_end_matches('+'));
    // Without brackets AND binds closer; what is in brackets here is joined by OR and stands beside AND, so each AND must hold.
    expression.split(" AND ").all(|all| all.split(" OR ").any(part))
}

#[test]
fn dependencies_come_from_the_registry_and_can_be_given_on() {
    let (metadata, deny) = (metadata().unwrap(), deny().unwrap());
    let allowed = &deny.licenses.allow;
    for package in list(&metadata["packages"]) {
        let (name, source) = (text(&package["name"]), text(&package["source"]));
        let is_known = deny.sources.allow_registry.iter().any(|registry| source == format!("registry+{registry}"));
        assert!(package["source"].is_null() || is_known, "{name} comes from {source}");
        let licence = text(&package["license"]);
        assert!(is_permissive(licence, allowed), "{name} is under {licence:?}");
    }
    assert!(is_permissive("(MIT OR GPL-3.0) AND ISC", allowed));
    assert!(!is_permissive("GPL-3.0", allowed) && !is_permissive("MIT AND GPL-3.0", allowed));
}

/// Whether `wanted`, such as `0.9` or `2`, is the beginning of a version.
fn is_version(version: &str, wanted: &str) -> bool {
    version.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Crates that the lock has in several versions, but for those that may be skipped.
fn duplicates(lock: &str, skip: &[Skip]) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Lock {
        package: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        version: String,
    }
    let lock: Lock = toml::from_str(lock)?;
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for Package { name, version } in &lock.package {
        let is_skipped = skip.iter().any(|skip| {
            skip.krate.split_once('@').is_some_and(|(other, wanted)| other == name && is_version(version, wanted))
        });
        if !is_skipped {
            versions.entry(name).or_default().insert(version);
        }
    }
    let several = versions.into_iter().filter(|(_, versions)| versions.len() > 1);
    Ok(several
        .map(|(name, versions)| format!("{name} {}", versions.into_iter().collect::<Vec<_>>().join(" ")))
        .collect())
}

#[test]
fn no_crate_is_there_twice_without_a_reason() {
    let deny = deny().unwrap();
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    assert_eq!(duplicates(&lock, &deny.bans.skip).unwrap(), Vec::<String>::new(), "say why in deny.toml, or update");
    assert!(deny.bans.skip.iter().all(|skip| !skip.reason.is_empty()));
    let all = duplicates(&lock, &[]).unwrap();
    for skip in &deny.bans.skip {
        let (name, _) = skip.krate.split_once('@').unwrap();
        let is_needed = all.iter().any(|line| line.starts_with(&format!("{name} ")));
        assert!(is_needed, "{} is not there twice any more: remove its line from deny.toml", skip.krate);
    }
}

#[test]
fn a_second_version_is_found() {
    let lock = "[[package]]\nname = \"a\"\nversion = \"1.2.0\"\n[[package]]\nname = \"a\"\nversion = \"1.10.0\"\n";
    let skip = |krate: &str| [Skip { krate: krate.to_owned(), reason: "x".to_owned() }];
    assert_eq!(duplicates(lock, &[]).unwrap(), ["a 1.10.0 1.2.0"]);
    assert!(duplicates(lock, &skip("a@1.2")).unwrap().is_empty());
    assert_eq!(duplicates(lock, &skip("a@1.1")).unwrap().len(), 1, "1.10 is not 1.1");
}

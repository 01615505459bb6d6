//! Guesses at images that are made of this machine's own programs.

use std::path::Path;

use serde_json::json;
use store::image::LayerRecord;
use store::profile::Origin;
use store::publisher::Publisher;

use super::*;
use crate::profiles::built::Built;
use crate::profiles::tests::{Fixture, READ, fixture, layer_of, publish_running};

/// A tar of these files, all of them executable; ` -> ` makes a symbolic link.
fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        match name.split_once(" -> ") {
            Some((name, target)) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                builder.append_link(&mut header, name, target).unwrap();
            }
            None => {
                header.set_size(bytes.len() as u64);
                builder.append_data(&mut header, name, *bytes).unwrap();
            }
        }
    }
    builder.into_inner().unwrap()
}

/// What `/bin/sh` of this machine needs: its path and bytes, those of its loader, and those of its C library.
fn shell() -> [(String, Vec<u8>); 3] {
    let read = |path: &str| std::fs::read(path).unwrap();
    let sh = read("/bin/sh");
    let elf = elf::parse(&mut |offset, len| {
        let (start, end) = (offset as usize, (offset + len) as usize);
        Some(sh[start.min(sh.len())..end.min(sh.len())].to_vec())
    });
    let loader = String::from_utf8(elf.unwrap().interpreter.unwrap()).unwrap();
    let directories = ["/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/lib64", "/lib"];
    let libc =
        directories.map(|directory| format!("{directory}/libc.so.6")).into_iter().find(|path| Path::new(path).exists());
    let libc = libc.unwrap();
    [("/usr/bin/dash".to_owned(), sh), (loader.clone(), read(&loader)), (libc.clone(), read(&libc))]
}

/// The base layer: a shell, and the names by which it is found.
fn base(publisher: &Publisher) -> (LayerRecord, [String; 3]) {
    let files = shell();
    let below = |path: &str| path.trim_start_matches('/').to_owned();
    let mut entries: Vec<(String, &[u8])> = files.iter().map(|(path, bytes)| (below(path), &bytes[..])).collect();
    entries.extend([("bin -> usr/bin".to_owned(), &b""[..]), ("usr/bin/sh -> dash".to_owned(), &b""[..])]);
    entries.push(("etc/passwd".to_owned(), b"root:x:0:0::/root:/bin/sh\n"));
    entries.push(("usr/bin/unused".to_owned(), &files[0].1[..1000]));
    let entries: Vec<(&str, &[u8])> = entries.iter().map(|(path, bytes)| (path.as_str(), *bytes)).collect();
    (layer_of(publisher, &tar_of(&entries)), files.map(|(path, _)| below(&path)))
}

/// The files of the startup pack that a published image gets, in order.
fn guessed(fixture: &Fixture, top: &[(&str, &[u8])], container: serde_json::Value) -> Vec<String> {
    let publisher = &fixture.profiles.publisher;
    let layers = vec![base(publisher).0, layer_of(publisher, &tar_of(top))];
    let image = publish_running(publisher, "r.io/guess", "t", layers, 9, container);
    match fixture.build_for(&image).unwrap_or_else(|error| panic!("{error}")) {
        Built::Published { record, .. } => assert_eq!((record.origin, record.starts), (Origin::Guessed, 0)),
        Built::Unchanged => panic!("there was a pack"),
        Built::Unknown => return Vec::new(),
    }
    fixture.packed_for(&image)
}

/// nydus PR #818: a variant on another base inherits little, and a guess helps it.
#[test]
fn where_little_is_inherited_a_guess_comes_before_it() {
    let variant = |kept: &[&str]| {
        let fixture = fixture();
        let publisher = &fixture.profiles.publisher;
        fixture.take(&fixture.trace("h", &READ)).unwrap();
        let (base, own) = base(publisher);
        let script = ("entry.sh", &b"#!/bin/sh -e\n"[..]);
        let top: Vec<_> = std::iter::once(script).chain(kept.iter().map(|name| (*name, name.as_bytes()))).collect();
        let layers = vec![base, layer_of(publisher, &tar_of(&top))];
        let image = publish_running(publisher, "r.io/a", "t2", layers, 2, json!({ "Entrypoint": ["/entry.sh"] }));
        let Ok(Built::Published { record, .. }) = fixture.build_for(&image) else { panic!("not published") };
        (record.origin == Origin::Inherited { from: fixture.chain() }, fixture.packed_for(&image), own)
    };
    let (is_inherited, files, [shell, loader, libc]) = variant(&["lib/a7"]);
    assert!(is_inherited);
    assert_eq!(files, ["entry.sh", &shell, &loader, &libc, "etc/passwd", "lib/a7"]);
    let (is_inherited, files, _) = variant(&["lib/a7", "lib/a1", "lib/b0"]);
    assert_eq!((is_inherited, files), (true, ["lib/a7", "lib/a1", "lib/b0"].map(String::from).into()));
    assert!(!variant(&[]).0, "a guess alone");
}

#[test]
fn a_script_brings_its_interpreter_its_libraries_and_its_commands() {
    let fixture = fixture();
    let [shell, loader, libc] = base(&fixture.profiles.publisher).1;
    let entry = b"#!/bin/sh -e\nif test -n \"$1\"; then helper one; fi\nexec \"$@\"\n";
    let app = b"#!/bin/sh\necho unused\n. /never\n";
    let top: [(&str, &[u8]); 4] = [
        ("entry.sh", entry),
        ("opt/app", app),
        ("usr/local/bin/helper", b"#!/bin/sh\n"),
        ("etc/app/app.conf", b"a=1\n"),
    ];
    let run = json!({ "Entrypoint": ["/entry.sh"], "Cmd": ["app"], "Env": ["PATH=/usr/local/bin:/usr/bin:/opt"] });
    let expected = ["entry.sh", &shell, &loader, &libc, "usr/local/bin/helper", "opt/app", "etc/passwd"];
    let found = guessed(&fixture, &top, run);
    assert_eq!(found.iter().collect::<std::collections::BTreeSet<_>>().len(), found.len());
    let mut sorted = (found.clone(), expected.map(str::to_owned).to_vec());
    sorted.0.sort();
    sorted.1.sort();
    assert_eq!(sorted.0, sorted.1);
    assert_eq!(found[0], "entry.sh", "in the order of the start: {found:?}");
}

#[test]
fn python_modules_are_followed_without_running_them() {
    let fixture = fixture();
    let top: [(&str, &[u8]); 14] = [
        ("usr/bin/python3 -> python3.12", b""),
        ("usr/bin/python3.12", &shell()[0].1),
        ("usr/lib/python3.12/os.py", b"import abc\n"),
        ("usr/lib/python3.12/encodings/__init__.py", b"from . import aliases\nimport codecs\n"),
        ("usr/lib/python3.12/encodings/__pycache__/__init__.cpython-312.pyc", b"compiled"),
        ("usr/lib/python3.12/encodings/aliases.py", b"# a module\n"),
        ("usr/lib/python3.12/json/__init__.py", b"from .decoder import JSONDecoder\ndef f():\n    import unused\n"),
        ("usr/lib/python3.12/json/decoder.py", b"import re\n"),
        ("usr/lib/python3.12/re.py", b"# a module\n"),
        ("usr/lib/python3.12/unused.py", b"# a module\n"),
        ("srv/app/main.py", b"import json\nfrom helpers import thing\n"),
        ("srv/app/helpers/__init__.py", b"# a module\n"),
        ("srv/app/helpers/thing.py", b"# a module\n"),
        ("srv/app/helpers/other.py", b"# a module\n"),
    ];
    let mut found = guessed(&fixture, &top, json!({ "Cmd": ["python3", "main.py"], "WorkingDir": "/srv/app" }));
    found.retain(|path| path.starts_with("usr/lib/python") || path.starts_with("srv"));
    found.sort();
    let expected = [
        "srv/app/helpers/__init__.py",
        "srv/app/helpers/thing.py",
        "srv/app/main.py",
        "usr/lib/python3.12/encodings/__pycache__/__init__.cpython-312.pyc",
        "usr/lib/python3.12/encodings/aliases.py",
        "usr/lib/python3.12/json/__init__.py",
        "usr/lib/python3.12/json/decoder.py",
        "usr/lib/python3.12/re.py",
    ];
    assert_eq!(found, expected, "os and abc are inside of Python 3.11 and later");
}

#[test]
fn node_modules_are_followed_without_running_them() {
    let fixture = fixture();
    let top: [(&str, &[u8]); 8] = [
        ("usr/bin/node", &shell()[0].1),
        ("srv/package.json", b"{\"type\": \"commonjs\"}"),
        ("srv/main.js", b"const a = require('./lib/a'); const b = require('b'); require('node:fs'); require('fs');"),
        ("srv/lib/a.js", b"module.exports = 1"),
        ("srv/lib/unused.js", b""),
        ("srv/node_modules/b/package.json", b"{\"main\": \"dist/b.js\"}"),
        ("srv/node_modules/b/dist/b.js", b"import('./c.mjs')"),
        ("srv/node_modules/b/dist/c.mjs", b"export const c = 1"),
    ];
    let mut found = guessed(&fixture, &top, json!({ "Entrypoint": ["node"], "Cmd": ["/srv/main.js"] }));
    found.retain(|path| path.starts_with("srv"));
    found.sort();
    let expected = [
        "srv/lib/a.js",
        "srv/main.js",
        "srv/node_modules/b/dist/b.js",
        "srv/node_modules/b/dist/c.mjs",
        "srv/node_modules/b/package.json",
        "srv/package.json",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_guess_is_not_inherited() {
    let fixture = fixture();
    let top: [(&str, &[u8]); 1] = [("one.sh", b"#!/bin/sh\n")];
    assert_eq!(guessed(&fixture, &top, json!({ "Cmd": ["/one.sh"] })).first().map(String::as_str), Some("one.sh"));
    let top: [(&str, &[u8]); 1] = [("two.sh", b"#!/bin/sh\n")];
    // The same tag, and the helper wants a guess again.
    assert_eq!(guessed(&fixture, &top, json!({ "Cmd": ["/two.sh"] })).first().map(String::as_str), Some("two.sh"));
}

#[test]
fn where_there_is_no_telling_nothing_is_guessed() {
    let fixture = fixture();
    for run in [json!({}), json!({ "Cmd": ["absent"] }), json!({ "Cmd": ["/etc"] }), json!({ "Entrypoint": "" })] {
        assert_eq!(guessed(&fixture, &[("note", b"nothing runs")], run.clone()), [""; 0], "{run}");
    }
    // Scripts that start each other, and a link to itself, come to an end.
    let circle: [(&str, &[u8]); 3] = [("a", b"#!/b\n"), ("b", b"#!/a\n"), ("c -> c", b"")];
    assert_eq!(guessed(&fixture, &circle, json!({ "Cmd": ["/a", "/c"] })), ["a", "b", "etc/passwd"]);
    let named: [(&str, &[u8]); 1] = [("odd", b"#!   \n")];
    assert_eq!(guessed(&fixture, &named, json!({ "Cmd": ["/odd"] })), ["odd", "etc/passwd"]);
}

#[test]
fn what_a_stranger_can_have_looked_up_is_bounded() {
    let fixture = fixture();
    let commands: String = (0..5000).map(|n| format!("c{n}\n")).collect();
    let script = format!("#!/bin/sh\n{commands}");
    let path: Vec<String> = (0..10_000).map(|n| format!("/d{n}")).chain(["/bin".to_owned()]).collect();
    let run = json!({ "Entrypoint": ["/entry.sh"], "Env": [format!("PATH={}", path.join(":"))] });
    let found = guessed(&fixture, &[("entry.sh", script.as_bytes())], run);
    assert_eq!(found.first().map(String::as_str), Some("entry.sh"), "{found:?}");
    assert!(found.iter().any(|path| path.ends_with("/dash")), "what comes first is found: {found:?}");
    assert!(!found.contains(&"etc/passwd".to_owned()), "then nothing more is looked up: {found:?}");
}

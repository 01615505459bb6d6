//! `cachefs data-root remove`: everything of the store goes, everything of dockerd stays.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tests::images::image;
use tests::process::run;
use tests::registry::Registry;

use super::host::{Host, data_root};

/// Every path below a directory, with its mode and what it holds or leads to.
fn tree(root: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let content = if meta.is_symlink() {
                std::fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            } else if meta.is_file() {
                std::fs::read(&path).unwrap()
            } else {
                Vec::new()
            };
            if meta.is_dir() {
                directories.push(path.clone());
            }
            found.insert(path, (meta.mode(), content));
        }
    }
    found
}

fn remove(host: &Host) -> Value {
    let text = run(data_root("remove", &host.data).unwrap().arg("--json")).unwrap().ok().unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_new_data_root_is_empty_again() {
    let host = Host::prepare(&["small", "bash"]).unwrap();
    let removed = remove(&host);
    assert_eq!((removed["images"].as_u64(), removed["names"].as_u64()), (Some(2), Some(4)));
    assert_eq!(tree(&host.data), BTreeMap::new());
    let output = run(&mut data_root("remove", &host.data).unwrap()).unwrap();
    assert!(output.stderr.contains("has not been prepared"), "{}", output.stderr);
}

#[test]
fn dockerd_keeps_what_it_had_and_the_store_its_layers() {
    let registry = Registry::start().unwrap();
    let name = registry.push(&image("small").unwrap(), "app", "v1").unwrap();
    let mut host = Host::unprepared(&[image("torture-zstd").unwrap(), image("bash").unwrap()]).unwrap();
    host.start_docker().unwrap();
    host.docker_mut().forward(&registry.address()).unwrap();
    host.docker().ok(&["pull", "--quiet", &name]).unwrap();
    host.docker().ok(&["create", "--name", "old", &name, "true"]).unwrap();
    host.docker_mut().stop().unwrap();
    let before = tree(&host.data);
    host.init(&host.data).unwrap().ok().unwrap();
    assert_ne!(tree(&host.data), before);
    remove(&host);
    let after = tree(&host.data);
    for (path, content) in &before {
        assert_eq!(after.get(path), Some(content), "{} has changed", path.display());
    }
    let new: Vec<_> = after.keys().filter(|path| !before.contains_key(*path)).collect();
    assert!(new.is_empty(), "{new:?}");
    host.docker_mut().restart().unwrap();
    assert_eq!(host.listed().unwrap(), std::slice::from_ref(&name));
    host.docker().ok(&["start", "--attach", "old"]).unwrap();
    assert!(host.mount.layer(&image("bash").unwrap().diff_ids()[0]).is_dir());
}

#[test]
fn as_long_as_something_here_needs_the_store_nothing_is_removed() {
    let mut host = Host::start(&["small", "bash"]).unwrap();
    host.docker().ok(&["create", "--name", "web", "small", "true"]).unwrap();
    host.docker().ok(&["create", "--name", "job", "bash", "true"]).unwrap();
    host.docker().ok(&["commit", "job", "derived:1"]).unwrap();
    host.docker().ok(&["rm", "job"]).unwrap();
    host.docker().ok(&["tag", "bash", "mine:1"]).unwrap();
    host.docker_mut().stop().unwrap();
    let before = tree(&host.data);
    let output = run(&mut data_root("remove", &host.data).unwrap()).unwrap();
    let users = "still needs images of the store for container web, image derived:1, image mine:1: remove these";
    assert!(output.code == 1 && output.stderr.contains(users), "{}", output.stderr);
    assert_eq!(tree(&host.data), before);
    host.docker_mut().restart().unwrap();
    host.docker().ok(&["rm", "web"]).unwrap();
    host.docker().ok(&["rmi", "derived:1", "mine:1"]).unwrap();
    host.docker_mut().stop().unwrap();
    remove(&host);
    host.docker_mut().restart().unwrap();
    assert_eq!(host.listed().unwrap(), [""; 0]);
    host.docker_mut().stop().unwrap();
    host.init(&host.data).unwrap().ok().unwrap();
    host.docker_mut().restart().unwrap();
    assert_eq!(host.shell("small", "cat /data/greeting").unwrap(), "hello again");
}

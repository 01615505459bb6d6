//! The harness's dockerd runs the images that the harness builds, which shows that they are valid, and leaves nothing behind.

use std::time::Duration;

use anyhow::Result;
use tests::docker::{Docker, DockerSpec};
use tests::images::{all_images, debian_images, image, small};
use tests::mounts;
use tests::process::wait_until;
use tests::registry::Registry;
use tests::tree::snapshot;

/// Loads an image, and compares its ID and layers in Docker with those that were built.
fn load(docker: &Docker, name: &str) -> Result<()> {
    let image = image(name)?;
    docker.load(&image)?;
    let id = docker.ok(&["image", "inspect", "--format", "{{.Id}}", name])?;
    assert_eq!(id, image.config.digest, "image ID of {name}");
    let layers = docker.ok(&["image", "inspect", "--format", "{{range .RootFS.Layers}}{{println .}}{{end}}", name])?;
    assert_eq!(layers.split_whitespace().collect::<Vec<_>>(), image.diff_ids(), "diffIDs of {name}");
    Ok(())
}

#[test]
fn the_small_image_loads_and_runs() {
    let docker = Docker::start().unwrap();
    load(&docker, "small").unwrap();
    assert_eq!(docker.ok(&["run", "--rm", "small", "cat", "/data/greeting"]).unwrap(), "hello again");
    assert!(!docker.run(&["run", "--rm", "small", "cat", "/data/deleted-later"]).unwrap().succeeded());
    let directories = docker.layer_directories("small").unwrap();
    assert_eq!(directories.len(), 3);
    let top = snapshot(&directories[2]).unwrap();
    let greeting = &top[b"data/greeting".as_slice()];
    assert_eq!((greeting.mtime, greeting.mtime_nsec), (1_600_000_001, 6));
    assert_eq!(top[b"data/deleted-later".as_slice()].kind, tests::tree::Kind::CharDevice);
}

#[test]
fn images_are_pulled_from_a_registry_outside() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let reference = registry.push(&image, "small", "latest").unwrap();
    let mut docker = Docker::start().unwrap();
    docker.forward(&registry.address()).unwrap();
    docker.ok(&["pull", "--quiet", &reference]).unwrap();
    for layer in &image.layers {
        assert_eq!(registry.blob_fetches(&layer.blob.digest), 1);
    }
    docker.ok(&["tag", &reference, &registry.reference("copy", "1")]).unwrap();
    docker.ok(&["push", "--quiet", &registry.reference("copy", "1")]).unwrap();
}

#[test]
fn containers_outlive_a_daemon_that_may_be_restarted() {
    let spec = DockerSpec { live_restore: true, ..DockerSpec::default() };
    let mut docker = Docker::start_with(spec).unwrap();
    load(&docker, "small").unwrap();
    docker.ok(&["run", "--detach", "--name", "long", "small", "sleep", "600"]).unwrap();
    let pid = docker.ok(&["inspect", "--format", "{{.State.Pid}}", "long"]).unwrap();
    docker.restart().unwrap();
    docker.kill9().unwrap();
    assert!(std::path::Path::new("/proc").join(&pid).exists());
    docker.restart().unwrap();
    assert_eq!(docker.ok(&["inspect", "--format", "{{.State.Pid}}", "long"]).unwrap(), pid);
}

#[test]
fn nothing_is_left_behind() {
    let docker = Docker::start_with(DockerSpec { live_restore: true, ..DockerSpec::default() }).unwrap();
    load(&docker, "small").unwrap();
    docker.ok(&["run", "--detach", "--name", "long", "small", "sleep", "600"]).unwrap();
    let pid = docker.ok(&["inspect", "--format", "{{.State.Pid}}", "long"]).unwrap();
    let (data_root, namespace) = (docker.data_root().to_owned(), docker.namespace().path());
    assert!(mounts::list().unwrap().iter().any(|mount| mount.path.starts_with(&data_root)));
    let mut docker = docker;
    docker.kill9().unwrap();
    drop(docker);
    let process = std::path::Path::new("/proc").join(&pid);
    wait_until("the container's end", Duration::from_secs(10), || Ok(!process.exists())).unwrap();
    assert!(!mounts::list().unwrap().iter().any(|mount| mount.path.starts_with(&data_root)));
    assert!(!namespace.exists() && !data_root.exists());
}

#[test]
fn every_debian_image_loads_and_runs() {
    let docker = Docker::start().unwrap();
    for name in debian_images() {
        load(&docker, name).unwrap();
    }
    let run = |name: &str, command: &[&str]| docker.ok(&[&["run", "--rm", name], command].concat()).unwrap();
    assert_eq!(run("bash", &["bash", "-c", "echo $BASH_VERSINFO"]), "5");
    assert_eq!(run("python3", &[]), "\"ready\"");
    assert_eq!(run("gcc", &[]), "ready");
    assert_eq!(run("nodejs", &["node", "/srv/app/main.js"]), "{\"ready\":true}");
    run("nginx", &["nginx", "-t"]);
    assert!(run("redis", &["redis-server", "--version"]).contains("Redis server"));
    assert!(run("bash", &["stat", "-c", "%a %h", "/opt/tools/id"]).contains("6755 2"));
}

#[test]
fn the_tortuous_images_load() {
    let docker = Docker::start().unwrap();
    for name in all_images().into_iter().filter(|name| name.starts_with("torture")) {
        load(&docker, name).unwrap();
    }
    let size = docker.ok(&["run", "--rm", "torture", "stat", "-c", "%s", "/odd/huge"]).unwrap();
    assert_eq!(size, (2_u64 << 30).to_string());
    assert_eq!(
        docker.ok(&["run", "--rm", "torture", "ls", "/odd/opaque", "/odd/opaque/kept"]).unwrap().lines().count(),
        5
    );
}

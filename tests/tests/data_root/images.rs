//! Operations on images: commit, build, save, push, rmi, and docker-compose.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;
use tests::docker::Docker;
use tests::images::{digest_of_reader, image};
use tests::process::run;
use tests::registry::Registry;
use tests::workloads::compose;

use super::host::Host;

#[test]
fn commit_makes_an_image_of_shared_layers_and_one_more() {
    let host = Host::start(&["small"]).unwrap();
    let docker = host.docker();
    let script = "rm /data/noise; echo committed > /data/greeting";
    docker.ok(&["run", "--name", "one", "--network", "none", "small", "sh", "-c", script]).unwrap();
    docker.ok(&["commit", "one", "derived:1"]).unwrap();
    assert_eq!(host.shell("derived:1", "cat /data/greeting; ls /data").unwrap(), "committed\ngreeting");
    assert_eq!(layers(docker, "derived:1").unwrap()[..3], image("small").unwrap().diff_ids());
    let squeezed = "docker export one | docker import - flat";
    let environment = docker.environment();
    run(Command::new("sh").args(["-c", squeezed]).env("PATH", "/usr/bin:/bin").envs(environment))
        .unwrap()
        .ok()
        .unwrap();
    assert_eq!(host.shell("flat", "cat /data/greeting").unwrap(), "committed");
}

fn layers(docker: &Docker, image: &str) -> Result<Vec<String>> {
    let text = docker.ok(&["image", "inspect", "--format", "{{range .RootFS.Layers}}{{println .}}{{end}}", image])?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

const DOCKERFILE: &str = "FROM small AS first
COPY file /data/copied
RUN rm /data/noise && cat /data/copied /data/greeting > /built && mv /bin/wget /bin/fetch
FROM small AS second
COPY --from=first /built /data/greeting
RUN cat /data/noise | wc -c >> /data/greeting
";

/// Builds on top of a shared image and checks the result.
pub(crate) fn build(host: &Host, builder: &str) {
    let context = tempfile::tempdir().unwrap();
    std::fs::write(context.path().join("Dockerfile"), DOCKERFILE).unwrap();
    std::fs::write(context.path().join("file"), "from the context\n").unwrap();
    let context = context.path().to_string_lossy();
    for target in ["first", "second"] {
        let mut command =
            host.docker().command(&["build", "--network", "none", "--target", target, "--tag", target, &context]);
        run(command.env("DOCKER_BUILDKIT", builder)).unwrap().ok().unwrap();
    }
    let script = "cat /built; ls /data /bin/fetch";
    let expected = "from the context\nhello again\n/bin/fetch\n\n/data:\ncopied\ngreeting";
    assert_eq!(host.shell("first", script).unwrap(), expected);
    assert_eq!(host.shell("second", "cat /data/greeting").unwrap(), "from the context\nhello again\n1048576");
    assert_eq!(layers(host.docker(), "first").unwrap()[..3], image("small").unwrap().diff_ids());
    assert_saved(host.docker(), &["first", "second", "small"]);
}

#[test]
fn the_classic_builder_builds_on_shared_images() {
    build(&Host::start(&["small"]).unwrap(), "0");
}

#[test]
fn buildkit_builds_on_shared_images() {
    build(&Host::start(&["small"]).unwrap(), "1");
}

/// Saves images and checks each layer's tar against the diffID in the image's config.
pub(crate) fn assert_saved(docker: &Docker, names: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let archive = directory.path().join("saved.tar");
    docker.ok(&[&["save", "--output", &archive.to_string_lossy()], names].concat()).unwrap();
    let tree = directory.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    run(Command::new("tar").arg("-C").arg(&tree).arg("-xf").arg(&archive)).unwrap().ok().unwrap();
    let images = read_json(&tree.join("manifest.json")).unwrap();
    assert_eq!(images.as_array().unwrap().len(), names.len());
    for image in images.as_array().unwrap() {
        let config = read_json(&tree.join(image["Config"].as_str().unwrap())).unwrap();
        let (saved, named) = (image["Layers"].as_array().unwrap(), config["rootfs"]["diff_ids"].as_array().unwrap());
        assert_eq!(saved.len(), named.len());
        for (layer, diff_id) in saved.iter().zip(named) {
            let tar = File::open(tree.join(layer.as_str().unwrap())).unwrap();
            assert_eq!(digest_of_reader(tar).unwrap(), diff_id.as_str().unwrap(), "{layer} of {image}");
        }
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

/// With whiteouts, odd names, sparse files and repeated entries.
#[test]
fn saved_layers_have_the_bytes_of_the_original_tars() {
    let host = Host::start(&["small", "torture-zstd", "bash"]).unwrap();
    assert_saved(host.docker(), &["small", "torture-zstd", "bash"]);
}

#[test]
fn a_derived_image_is_pushed_and_comes_back_through_the_coordinator() {
    let registry = Registry::start().unwrap();
    let small = image("small").unwrap();
    let original = registry.push(&small, "team/small", "v1").unwrap();
    let mut host = Host::unprepared(&[]).unwrap();
    host.site.ctl().ok(&["pull", &original]).unwrap();
    host.init(&host.data).unwrap().ok().unwrap();
    host.start_docker().unwrap();
    host.docker_mut().forward(&registry.address()).unwrap();
    let docker = host.docker();
    docker
        .ok(&["run", "--name", "one", "--network", "none", &original, "sh", "-c", "echo derived > /data/greeting"])
        .unwrap();
    let derived = registry.reference("team/derived", "v1");
    docker.ok(&["commit", "one", &derived]).unwrap();
    let pushed = docker.ok(&["push", &derived]).unwrap();
    assert!(pushed.contains("Mounted from team/small"), "shared layers were uploaded again: {pushed}");
    host.site.ctl().ok(&["pull", &derived]).unwrap();
    let id = docker.ok(&["image", "inspect", "--format", "{{.Id}}", &derived]).unwrap();
    assert_eq!(host.site.ctl().json(&["image", &derived]).unwrap()["config"], id);
    // The host already has this image from its own commit, so nothing is replaced.
    let kept = host.sync(&[]).unwrap();
    assert_eq!(kept["layers_added"], 0, "{kept}");
    // dockerd knows the registry's blobs, so it downloads only the one layer that the derived image adds.
    docker.ok(&["rm", "one"]).unwrap();
    docker.ok(&["rmi", &derived]).unwrap();
    let before = registry.blob_bytes();
    docker.ok(&["pull", "--quiet", &derived]).unwrap();
    let downloaded = registry.blob_bytes() - before;
    assert!((1..10_000).contains(&downloaded), "{downloaded} bytes were downloaded");
    let read = ["run", "--rm", "--network", "none", &derived, "cat", "/data/greeting"];
    assert_eq!(docker.ok(&read).unwrap(), "derived");
    let mut plain = Docker::start().unwrap();
    plain.forward(&registry.address()).unwrap();
    plain.ok(&["pull", "--quiet", &derived]).unwrap();
    assert_eq!(plain.ok(&read).unwrap(), "derived");
}

#[test]
fn docker_compose_runs_two_services() {
    let host = Host::start(&["small"]).unwrap();
    compose("small", &host.docker().environment()).unwrap();
}

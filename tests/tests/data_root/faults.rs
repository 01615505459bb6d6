//! Bad input, which yields one sentence each, and death at any moment.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tests::hosts;
use tests::images::{image, small};
use tests::process::{Output, Process, TIMEOUT, run};

use super::host::{Host, data_root};

fn assert_refused(output: &Output, sentence: &str) {
    assert_eq!(output.code, 1, "{}", output.stderr);
    assert!(output.stderr.contains(sentence), "expected `{sentence}` in: {}", output.stderr);
    assert_eq!(output.stderr.trim().lines().count(), 1, "{}", output.stderr);
}

#[test]
fn what_cannot_be_a_data_root_is_refused_in_one_sentence() {
    let host = Host::unprepared(&[small().unwrap()]).unwrap();
    let below = |name: &str| {
        let path = host.site.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    assert_refused(&host.init(&host.site.path().join("none")).unwrap(), "is not a directory: give dockerd's data-root");
    std::fs::create_dir_all(below("zfs").join("image/zfs")).unwrap();
    assert_refused(&host.init(&below("zfs")).unwrap(), "belongs to dockerd's storage driver zfs");
    assert_refused(&host.init(&below("165536.165536")).unwrap(), "is a data-root with remapped users");
    assert_refused(
        &host.init(host.mount.path()).unwrap(),
        "lies on a FUSE file system, where overlay2 cannot keep containers",
    );
    let output = run(&mut data_root("sync", &host.data).unwrap()).unwrap();
    assert_refused(&output, "has not been prepared: run cachefs data-root init");
    let mut init = data_root("init", &host.data).unwrap();
    let output = run(init.arg("--mount").arg(below("plain")).arg("--store").arg(host.site.store())).unwrap();
    assert_refused(&output, "is not a cachefs mount: run cachefs mount");
    let mut init = data_root("init", &host.data).unwrap();
    let output = run(init.arg("--mount").arg(host.mount.path()).arg("--store").arg(below("plain"))).unwrap();
    assert_refused(&output, "is not a cachefs store");
    assert_eq!(std::fs::read_dir(&host.data).unwrap().count(), 0, "nothing was written");
    host.init(&host.data).unwrap().ok().unwrap();
    let other = Host::unprepared(&[]).unwrap();
    let output = run(data_root("sync", &host.data).unwrap().arg("--store").arg(other.site.store())).unwrap();
    assert_refused(&output, "was prepared for another store than");
}

#[test]
fn a_running_dockerd_that_systemd_does_not_know_is_not_restarted() {
    let host = Host::start(&["small"]).unwrap();
    hosts::load(&host.site, &image("torture-zstd").unwrap()).unwrap();
    let output = run(data_root("sync", &host.data).unwrap().arg("--restart")).unwrap();
    assert_refused(&output, "is not run by systemd's docker.service: stop it");
    let output = run(data_root("sync", &host.data).unwrap().args(["--restart-command", "false"])).unwrap();
    assert_refused(&output, "`false stop` failed");
    let output = run(&mut data_root("sync", &host.data).unwrap()).unwrap();
    assert!(output.stdout.contains("wait until dockerd is stopped: add --restart"), "{}", output.stdout);
    assert_refused(&host.init(&host.data).unwrap(), "and would not see the change: stop it");
    let output = run(&mut data_root("remove", &host.data).unwrap()).unwrap();
    assert_refused(&output, "and would not see the change: stop it");
}

#[test]
fn status_tells_of_a_mount_that_is_gone() {
    let mut host = Host::prepare(&["small"]).unwrap();
    assert_eq!(host.status().unwrap()["mount_state"], "serving");
    host.mount.kill9().unwrap();
    assert_eq!(host.status().unwrap()["mount_state"], "dead");
    assert!(host.sync(&[]).is_ok(), "the store suffices");
    host.mount.restart().unwrap();
    assert_eq!(host.status().unwrap()["mount_state"], "serving");
    host.mount.stop().unwrap();
    let status = host.status().unwrap();
    assert_eq!((&status["mount_state"], &status["in_sync"]), (&Value::from("absent"), &Value::from(true)));
    let output = run(&mut data_root("status", &host.data).unwrap()).unwrap();
    assert!(output.code == 1 && output.stderr.contains("is not mounted: run cachefs mount"), "{output:?}");
    let text = output.stdout;
    assert!(text.contains("not mounted: run cachefs mount, else containers cannot start"), "{text}");
}

/// The names in a directory, without those of unfinished entries.
fn names(directory: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.starts_with('.')).collect()
}

/// Checks what dockerd relies on when it starts: nothing refers to anything incomplete.
fn assert_consistent(data_root: &Path) {
    let image_dir = data_root.join("image/overlay2");
    let layers = image_dir.join("layerdb/sha256");
    for chain in names(&layers) {
        let read = |name: &str| std::fs::read_to_string(layers.join(&chain).join(name));
        let overlay = data_root.join("overlay2").join(read("cache-id").unwrap());
        assert!(overlay.join("diff").is_dir() && overlay.join("committed").is_file());
        let link = std::fs::read_to_string(overlay.join("link")).unwrap();
        let short = data_root.join("overlay2/l").join(link);
        assert_eq!(short.canonicalize().unwrap(), overlay.join("diff").canonicalize().unwrap());
        read("size").unwrap().parse::<u64>().unwrap();
        assert!(layers.join(&chain).join("tar-split.json.gz").is_file());
        if let Ok(parent) = read("parent") {
            assert!(names(&layers).contains(parent.trim_start_matches("sha256:")));
        }
    }
    let images = names(&image_dir.join("imagedb/content/sha256"));
    let known: Vec<_> = ["small", "bash"].map(|name| image(name).unwrap()).into();
    for id in &images {
        let image = known.iter().find(|image| image.config.digest.ends_with(id.as_str())).unwrap();
        assert!(image.chain_ids().iter().all(|chain| names(&layers).contains(chain.trim_start_matches("sha256:"))));
    }
    if let Ok(text) = std::fs::read(image_dir.join("repositories.json")) {
        let text: Value = serde_json::from_slice(&text).unwrap();
        let references =
            text["Repositories"].as_object().unwrap().values().flat_map(|names| names.as_object().unwrap());
        for (name, id) in references {
            assert!(images.contains(id.as_str().unwrap().trim_start_matches("sha256:")), "{name}");
        }
    }
}

#[test]
fn killed_at_any_moment_it_leaves_what_dockerd_can_start_with() {
    let mut host = Host::unprepared(&[small().unwrap(), image("bash").unwrap()]).unwrap();
    let log = host.site.path().join("init.log");
    let mut pause = Duration::from_millis(1);
    let mut killed = 0;
    loop {
        let mut init = data_root("init", &host.data).unwrap();
        init.arg("--mount").arg(host.mount.path());
        let mut init = Process::spawn("init", &mut init, &log).unwrap();
        // This sleep is no synchronisation. It sets the moment of death, which is later each time.
        std::thread::sleep(pause);
        init.signal(Signal::SIGKILL).unwrap();
        let ended = init.wait(TIMEOUT).unwrap();
        assert_consistent(&host.data);
        if ended.success() {
            break;
        }
        assert_eq!(ended.code(), None, "{}", init.log());
        killed += 1;
        pause = pause.mul_f64(1.15) + Duration::from_millis(1);
        if killed % 3 == 0 {
            // Start again from nothing, because existing layers would make all later runs the same.
            std::fs::remove_dir_all(&host.data).unwrap();
            std::fs::create_dir(&host.data).unwrap();
        }
    }
    assert!(killed >= 5, "only {killed} runs were killed");
    host.start_docker().unwrap();
    assert_eq!(host.listed().unwrap(), ["bash:latest", "small:latest"]);
    assert_eq!(host.shell("bash", "echo up").unwrap(), "up");
    assert_eq!(host.status().unwrap()["in_sync"], true);
}

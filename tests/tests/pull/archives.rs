//! Archives: load and export.

use std::path::Path;
use std::process::Command;

use tests::docker::Docker;
use tests::images::{image, small};
use tests::process::run;
use tests::registry::Registry;
use tests::site::Site;

use super::check_export;

#[test]
fn archives_are_loaded() {
    let (image, directory) = (small().unwrap(), tempfile::tempdir().unwrap());
    let oci = directory.path().join("oci.tar");
    run(Command::new("tar").arg("-cf").arg(&oci).arg("-C").arg(&image.oci).arg(".")).unwrap().ok().unwrap();
    let docker = image.docker_archive().unwrap();
    let packed = |path: &Path| {
        let name = format!("{}.gz", path.file_name().unwrap().to_string_lossy());
        let target = directory.path().join(name);
        let script = r#"exec gzip --stdout --fast "$1" > "$2""#;
        run(Command::new("sh").args(["-c", script, "sh"]).arg(path).arg(&target)).unwrap().ok().unwrap();
        target
    };
    for archive in [docker.clone(), oci.clone(), packed(&docker), packed(&oci)] {
        let site = Site::start().unwrap();
        site.ctl()
            .ok(&["load", &archive.to_string_lossy()])
            .unwrap_or_else(|error| panic!("{}: {error:#}", archive.display()));
        assert_eq!(site.images().unwrap(), ["small:latest"], "{}", archive.display());
        assert_eq!(site.ctl().json(&["image", "small"]).unwrap()["config"], image.config.digest);
        check_export(&site, "small:latest", &image).unwrap();
        assert_eq!(site.staged().unwrap(), Vec::<String>::new());
    }
}

#[test]
fn an_export_goes_through_what_is_no_file_and_leaves_links_and_directories_alone() {
    let (site, image, directory) = (Site::start().unwrap(), small().unwrap(), tempfile::tempdir().unwrap());
    tests::hosts::load(&site, &image).unwrap();
    let path = |name: &str| directory.path().join(name);
    let export = |name: &str| site.ctl().run(&["export", "small:latest", &path(name).to_string_lossy()]).unwrap();
    nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let reader = std::thread::spawn({
        let fifo = path("fifo");
        move || std::fs::read(fifo).unwrap().len()
    });
    assert_eq!(export("fifo").code, 0);
    assert!(
        reader.join().unwrap() > 1_000_000
            && std::os::unix::fs::FileTypeExt::is_fifo(&path("fifo").metadata().unwrap().file_type())
    );
    std::os::unix::fs::symlink("target.tar", path("link.tar")).unwrap();
    std::fs::write(path("target.tar"), b"old").unwrap();
    assert_eq!(export("link.tar").code, 0);
    assert!(path("link.tar").is_symlink() && path("target.tar").metadata().unwrap().len() > 1_000_000);
    std::fs::create_dir(path("directory")).unwrap();
    let refused = export("directory");
    assert!(refused.code == 1 && refused.stderr.contains("is a directory"), "{}", refused.stderr);
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left.len(), 4, "{left:?}");
}

#[test]
fn a_real_dockerd_takes_what_is_exported() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let (site, docker) = (Site::start().unwrap(), Docker::start().unwrap());
    for name in ["small", "torture-zstd"] {
        let image = image(name).unwrap();
        let reference = registry.push(&image, name, "1").unwrap();
        site.ctl().ok(&["pull", &reference]).unwrap();
        let archive = directory.path().join(name);
        site.ctl().ok(&["export", &reference, &archive.to_string_lossy()]).unwrap();
        docker.ok(&["load", "--quiet", "--input", &archive.to_string_lossy()]).unwrap();
        let id = docker.ok(&["image", "inspect", "--format", "{{.Id}}", &reference]).unwrap();
        assert_eq!(id, image.config.digest, "{name}");
        let greeting = docker.run(&["run", "--rm", "--network=none", &reference, "/bin/busybox", "true"]).unwrap();
        assert!(greeting.succeeded(), "{name}: {}", greeting.stderr);
    }
}

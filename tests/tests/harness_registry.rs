//! The harness's registry: pushed content comes back, clients without access are refused, and faults happen as requested.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use tests::http;
use tests::images::{self, Compression, ImageBuilder, MediaTypes, Pools, digest_of, small};
use tests::process::{Output, run};
use tests::registry::{Access, Fault, FaultyRegistry, Match, Registry, Transport};

fn skopeo(reference: &str, to: &Path, options: &[&str]) -> Result<Output> {
    let mut command = Command::new("skopeo");
    command.args(["--insecure-policy", "copy", "--all"]).args(options);
    run(command.arg(format!("docker://{reference}")).arg(format!("oci:{}:x", to.display())))
}

fn blob(address: &str, name: &str, digest: &str) -> Result<http::Answer> {
    http::get(address, &format!("/v2/{name}/blobs/{digest}"), &[])
}

#[test]
fn what_is_pushed_is_pulled_and_counted() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let reference = registry.push(&image, "some/image", "v1").unwrap();
    assert_eq!(registry.accesses().len(), 0, "pushing leaves no trace");
    let to = tempfile::tempdir().unwrap();
    skopeo(&reference, &to.path().join("oci"), &["--src-tls-verify=false"]).unwrap().ok().unwrap();
    for layer in &image.layers {
        assert_eq!(registry.blob_fetches(&layer.blob.digest), 1);
        let pulled = to.path().join("oci/blobs/sha256").join(images::hex(&layer.blob.digest));
        assert_eq!(std::fs::read(pulled).unwrap(), image.blob(&layer.blob.digest).unwrap());
    }
    assert!(registry.blob_bytes() >= image.compressed_size());
    let stored = std::fs::read(registry.blob_file(&image.config.digest)).unwrap();
    assert_eq!(digest_of(&stored), image.config.digest);
}

#[test]
fn the_other_media_types_and_indexes_are_taken() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let pools = Pools::open(directory.path()).unwrap();
    let image = |architecture: &str| {
        let layer = pools.layer(&small_tar(architecture).unwrap(), Compression::Gzip).unwrap();
        let place = directory.path().join(architecture);
        let builder = ImageBuilder::new("multi").platform("linux", architecture, "").layer(layer).user("7");
        builder.media_types(MediaTypes::Docker).build(&pools, &place).unwrap()
    };
    let both = [image("amd64"), image("arm64")];
    let list = images::index("multi", MediaTypes::Docker, &both, &pools, directory.path()).unwrap();
    let reference = registry.push_index(&list, "multi", "latest").unwrap();
    let all = directory.path().join("all");
    skopeo(&reference, &all, &["--src-tls-verify=false"]).unwrap().ok().unwrap();
    for image in &both {
        assert!(all.join("blobs/sha256").join(images::hex(&image.layers[0].blob.digest)).exists());
    }
    let oci = registry.push_as(MediaTypes::Oci, &both[0], "oci", "latest").unwrap();
    skopeo(&oci, &directory.path().join("one"), &["--src-tls-verify=false"]).unwrap().ok().unwrap();
}

fn small_tar(content: &str) -> Result<Vec<u8>> {
    let mut tar = images::archive::Archive::new(Vec::new());
    tar.add(&images::archive::Header::new(images::archive::Kind::File, "file"), content)?;
    Ok(tar.finish()?)
}

#[test]
fn passwords_are_wanted() {
    let access = Access::Password { user: "eve".into(), password: "apple".into() };
    let registry = Registry::start_with(&access, Transport::Http).unwrap();
    let reference = registry.push(&small().unwrap(), "private", "latest").unwrap();
    let to = tempfile::tempdir().unwrap();
    let options = |credentials| ["--src-tls-verify=false", "--src-creds", credentials];
    skopeo(&reference, &to.path().join("right"), &options("eve:apple")).unwrap().ok().unwrap();
    assert!(!skopeo(&reference, &to.path().join("wrong"), &options("eve:pear")).unwrap().succeeded());
}

#[test]
fn tokens_are_wanted_over_tls() {
    let access = Access::Token { user: "eve".into(), password: "apple".into() };
    let registry = Registry::start_with(&access, Transport::Https).unwrap();
    let reference = registry.push(&small().unwrap(), "private/deep", "latest").unwrap();
    let to = tempfile::tempdir().unwrap();
    std::fs::write(to.path().join("ca.crt"), registry.authority().unwrap().pem()).unwrap();
    let certificates = format!("--src-cert-dir={}", to.path().display());
    let options = |credentials| [certificates.as_str(), "--src-creds", credentials];
    skopeo(&reference, &to.path().join("right"), &options("eve:apple")).unwrap().ok().unwrap();
    assert!(registry.tokens().unwrap().issued() > 0);
    assert!(!skopeo(&reference, &to.path().join("wrong"), &options("eve:pear")).unwrap().succeeded());
    let untrusted = skopeo(&reference, &to.path().join("untrusted"), &["--src-creds", "eve:apple"]).unwrap();
    assert!(untrusted.stderr.contains("certificate"), "{}", untrusted.stderr);
}

#[test]
fn a_stopped_registry_comes_back_on_its_port() {
    let (mut registry, image) = (Registry::start().unwrap(), small().unwrap());
    registry.push(&image, "image", "latest").unwrap();
    registry.stop().unwrap();
    assert!(blob(&registry.address(), "image", &image.config.digest).is_err());
    registry.restart().unwrap();
    assert_eq!(blob(&registry.address(), "image", &image.config.digest).unwrap().status, 200);
}

#[test]
fn faults_happen_as_often_as_told() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    registry.push(&image, "image", "latest").unwrap();
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let digest = &image.layers[1].blob.digest;
    let good = image.blob(digest).unwrap();
    let fetch = || blob(&faulty.address(), "image", digest);
    assert_eq!(fetch().unwrap().body, good);

    faulty.inject(Match::Blobs, Fault::Truncate(1000), 2);
    for _ in 0..2 {
        assert!(format!("{:#}", fetch().unwrap_err()).contains("1000 of"));
    }
    assert_eq!(fetch().unwrap().body, good);

    faulty.inject(Match::Blob(digest.clone()), Fault::Reset(1000), 1);
    assert!(fetch().is_err());
    faulty.inject(Match::All, Fault::Reset(0), 1);
    assert!(fetch().is_err());

    faulty.inject(Match::Blobs, Fault::Corrupt(5), 1);
    let corrupt = fetch().unwrap().body;
    assert_eq!((corrupt[5], corrupt.len()), (!good[5], good.len()));

    let headers = vec![("Retry-After".to_owned(), "3".to_owned())];
    faulty.inject(Match::All, Fault::Status(429, headers), 1);
    let refused = fetch().unwrap();
    assert_eq!((refused.status, refused.head.header("retry-after")), (429, Some("3")));
    assert_eq!(faulty.count(&Match::Blob(digest.clone())), 8);
    assert_eq!(faulty.requests()[1].fault, Some(Fault::Truncate(1000)));
}

#[test]
fn ranges_can_be_ignored_and_answers_can_hang() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    registry.push(&image, "image", "latest").unwrap();
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let path = format!("/v2/image/blobs/{}", image.layers[1].blob.digest);
    let ranged = || http::get(&faulty.address(), &path, &[("Range", "bytes=100-199")]).unwrap();
    assert_eq!((ranged().status, ranged().body.len()), (206, 100));
    faulty.inject(Match::Blobs, Fault::IgnoreRange, 1);
    assert_eq!(ranged().status, 200);

    faulty.inject(Match::Blobs, Fault::Hang(10), 1);
    std::thread::scope(|scope| {
        let hanging = scope.spawn(|| http::get(&faulty.address(), &path, &[]));
        faulty.wait_for(&Match::Blobs, 4, Duration::from_secs(10)).unwrap();
        assert_eq!(ranged().status, 206);
        assert!(!hanging.is_finished());
        faulty.heal();
        assert!(hanging.join().unwrap().is_err());
    });
}

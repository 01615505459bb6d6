//! The harness's images have the content that other tests expect.

use std::collections::BTreeSet;
use std::process::Command;

use tests::images::{MediaTypes, Pools, all_images, debian_images, digest_of, digest_of_reader, hex, image, oddities};
use tests::process::run;

#[test]
fn all_images_are_built_and_their_digests_are_right() {
    for name in all_images() {
        let image = image(name).unwrap();
        for layer in &image.layers {
            let tar = std::fs::File::open(&layer.tar).unwrap();
            assert_eq!(digest_of_reader(tar).unwrap(), layer.diff_id, "diffID in {name}");
            let blob = std::fs::File::open(image.blob_path(&layer.blob.digest)).unwrap();
            assert_eq!(blob.metadata().unwrap().len(), layer.blob.size);
            assert_eq!(digest_of_reader(blob).unwrap(), layer.blob.digest, "blob in {name}");
        }
        let inspected = run(Command::new("skopeo").arg("inspect").arg(format!("oci:{}:latest", image.oci.display())));
        assert!(inspected.unwrap().ok().unwrap().contains(&image.manifest.digest), "skopeo reads {name}");
    }
}

#[test]
fn real_images_share_layers_and_each_holds_whiteouts_and_oddities() {
    let images: Vec<_> = debian_images().into_iter().map(|name| image(name).unwrap()).collect();
    assert!(images.len() >= 6);
    let first: BTreeSet<_> = images.iter().map(|image| &image.layers[0].diff_id).collect();
    assert_eq!(first.len(), 1, "one base for all");
    for image in &images {
        assert!(image.layers.len() >= 6, "{} has several layers", image.name);
        let listing =
            |number: usize| run(Command::new("tar").arg("-tvf").arg(&image.layers[number].tar)).unwrap().ok().unwrap();
        let all: String = (1..image.layers.len()).map(listing).collect();
        for expected in ["/.wh.", ".wh..wh..opq", "-rwsr-xr-x", "link to", "crw", "brw", "prw"] {
            assert!(all.contains(expected), "{} holds {expected}", image.name);
        }
    }
}

#[test]
fn the_odd_layers_are_tars_that_gnu_tar_reads() {
    let directory = tempfile::tempdir().unwrap();
    let tars = [oddities::lower(), oddities::attributes(), oddities::changes(), oddities::repeated()];
    for (number, tar) in tars.into_iter().enumerate() {
        let path = directory.path().join(format!("{number}.tar"));
        std::fs::write(&path, tar.unwrap()).unwrap();
        let to = directory.path().join(number.to_string());
        std::fs::create_dir(&to).unwrap();
        let mut extract = Command::new("tar");
        extract.args(["--xattrs", "--xattrs-include=*", "--same-owner", "-xpf"]).arg(&path).arg("-C").arg(&to);
        let output = run(&mut extract).unwrap();
        assert!(output.succeeded(), "{}", output.stderr);
    }
    let tree = tests::tree::snapshot(&directory.path().join("1")).unwrap();
    let of = |path: &str| &tree[path.as_bytes()];
    assert_eq!(of("odd/xattrs/capability").xattrs[b"security.capability".as_slice()], oddities::CAPABILITY);
    assert_eq!(of("odd/links/a/first").hard_links.len(), 4);
    assert_eq!(of("odd/times/1600000000.123456789").mtime_nsec, 123_456_789);
    assert_eq!(of("odd/modes/owner-3000000000-4294967294").uid, 3_000_000_000);
    assert!(tree.keys().any(|path| path.len() > 2000));
}

#[test]
fn a_manifest_translates_between_the_families_of_media_types() {
    let image = tests::images::small().unwrap();
    let (docker, manifest) = image.manifest_as(MediaTypes::Docker).unwrap();
    assert_eq!(docker, "application/vnd.docker.distribution.manifest.v2+json");
    assert!(!String::from_utf8(manifest).unwrap().contains("vnd.oci"));
    let (oci, manifest) = image.manifest_as(MediaTypes::Oci).unwrap();
    assert_eq!((oci, digest_of(&manifest)), (image.manifest.media_type, image.manifest.digest));
}

#[test]
fn a_layer_may_lie_about_itself() {
    let directory = tempfile::tempdir().unwrap();
    let pools = Pools::open(directory.path()).unwrap();
    let wrong = digest_of(b"something else");
    let layer = pools.raw_layer(b"not gzip", tests::images::Compression::Gzip.layer_type(), &wrong).unwrap();
    let image = tests::images::ImageBuilder::new("liar").layer(layer).build(&pools, directory.path()).unwrap();
    let config = String::from_utf8(image.blob(&image.config.digest).unwrap()).unwrap();
    assert!(config.contains(hex(&wrong)));
}

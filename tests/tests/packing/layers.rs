//! Layers as registries deliver them: docker detects the packing by the first bytes, whatever the media type says.

use std::collections::HashMap;
use std::process::Command;

use anyhow::Result;
use tests::docker::Docker;
use tests::http;
use tests::images::{ImageBuilder, ImageFiles, MediaTypes, Pools, digest_of};
use tests::process::run;
use tests::registry::{Reply, ScriptedRegistry, content_of, free_port};
use tests::site::{Site, SiteSpec};

use crate::{PACKINGS, Pack, compare, tar_with};

const DOCKER: &str = "application/vnd.docker.image.rootfs.diff.tar";
const OCI: &str = "application/vnd.oci.image.layer.v1.tar";

/// An image with one layer that has this packing and media type.
fn image(pools: &Pools, name: &str, pack: Pack, media_type: &str) -> Result<ImageFiles> {
    let tar = tar_with(name)?;
    let layer = pools.raw_layer(&pack(&tar)?, media_type, &digest_of(&tar))?;
    let family = if media_type.starts_with(OCI) { MediaTypes::Oci } else { MediaTypes::Docker };
    let directory = pools.blobs.path(&digest_of(name.as_bytes())).with_extension("image");
    std::fs::create_dir_all(&directory)?;
    ImageBuilder::new(name).layer(layer).media_types(family).build(pools, &directory)
}

/// A registry that serves these images by name.
fn registry(images: Vec<ImageFiles>) -> Result<ScriptedRegistry> {
    let images: HashMap<String, ImageFiles> = images.into_iter().map(|image| (image.name.clone(), image)).collect();
    ScriptedRegistry::start(move |seen| {
        let name = seen.path().split('/').nth(2).unwrap_or_default();
        match images.get(name) {
            Some(image) => content_of(image, name, seen.path()).unwrap_or_else(|| Reply::status(404)),
            None => Reply::status(if seen.path() == "/v2/" { 200 } else { 404 }),
        }
    })
}

#[test]
fn layers_are_unpacked_as_docker_unpacks_them() {
    let directory = tempfile::tempdir().unwrap();
    let pools = Pools::open(directory.path()).unwrap();
    let images = PACKINGS.iter().enumerate().map(|(number, (_, pack))| {
        image(&pools, &format!("packed-{number}"), *pack, &format!("{DOCKER}.gzip")).unwrap()
    });
    let (registry, site) = (registry(images.collect()).unwrap(), Site::start().unwrap());
    let mut docker = Docker::start().unwrap();
    docker.forward(&registry.address()).unwrap();
    for (number, (packing, _)) in PACKINGS.iter().enumerate() {
        let reference = registry.reference(&format!("packed-{number}"), "latest");
        let ours = site.ctl().ok(&["pull", &reference]);
        let dockers = docker.ok(&["pull", "--quiet", &reference]);
        compare(packing, &ours, &dockers).unwrap();
        if let Err(refused) = ours {
            let said = format!("{refused:#}");
            assert!(said.contains("packed-") && said.contains("layer sha256:"), "{packing}: {said}");
        }
    }
}

#[test]
fn a_layers_packing_need_not_be_what_its_media_type_says() {
    let types: Vec<(&str, String)> = [("xz", 12), ("bzip2", 6)]
        .into_iter()
        .flat_map(|(suffix, at)| {
            let ends = ["", "+gzip", "+zstd", &format!("+{suffix}"), &format!(".{suffix}")].map(str::to_owned);
            let oci = ends.into_iter().map(move |end| format!("{OCI}{end}"));
            let docker = ["".to_owned(), ".gzip".to_owned(), format!(".{suffix}")].map(|end| format!("{DOCKER}{end}"));
            oci.chain(docker).map(move |media_type| (PACKINGS[at].0, media_type))
        })
        .collect();
    let directory = tempfile::tempdir().unwrap();
    let pools = Pools::open(directory.path()).unwrap();
    let images = types.iter().enumerate().map(|(number, (packing, media_type))| {
        let (_, pack) = PACKINGS.iter().find(|(name, _)| name == packing).unwrap();
        image(&pools, &format!("called-{number}"), *pack, media_type).unwrap()
    });
    let (registry, site) = (registry(images.collect()).unwrap(), Site::start().unwrap());
    let mut docker = Docker::start().unwrap();
    docker.forward(&registry.address()).unwrap();
    for (number, (packing, media_type)) in types.iter().enumerate() {
        let reference = registry.reference(&format!("called-{number}"), "latest");
        docker.ok(&["pull", "--quiet", &reference]).unwrap();
        let ours = site.ctl().run(&["pull", &reference]).unwrap();
        assert!(ours.succeeded(), "{packing} as {media_type}: {}", ours.stderr);
    }
}

#[test]
fn a_kept_layer_is_given_on_as_it_came() {
    let directory = tempfile::tempdir().unwrap();
    let pools = Pools::open(directory.path()).unwrap();
    let address = format!("127.0.0.1:{}", free_port().unwrap());
    let settings = "blob_cache = '1G'\n".to_owned();
    let site = Site::start_with(&SiteSpec { listen: Some(address.clone()), settings, ..SiteSpec::default() }).unwrap();
    let packed: Vec<_> =
        PACKINGS.iter().filter(|(name, _)| ["xz", "xz padded", "bzip2 twice"].contains(name)).collect();
    let images: Vec<ImageFiles> = packed
        .iter()
        .enumerate()
        .map(|(number, (_, pack))| image(&pools, &format!("kept-{number}"), *pack, &format!("{DOCKER}.gzip")).unwrap())
        .collect();
    let registry = registry(images.clone()).unwrap();
    for image in &images {
        site.ctl().ok(&["pull", &registry.reference(&image.name, "latest")]).unwrap();
        let layer = &image.layers[0];
        let path = format!("/v2/{}/{}/blobs/{}", registry.address().replace(':', "_"), image.name, layer.blob.digest);
        let blob = http::get(&address, &path, &[]).unwrap();
        assert_eq!(blob.status, 200, "{}", image.name);
        assert!(blob.body == image.blob(&layer.blob.digest).unwrap(), "{}: other bytes", image.name);
        // For skopeo the mirror is a registry like any other.
        let copy = directory.path().join(format!("copy-{}", image.name));
        let source = format!("docker://{address}/{}/{}:latest", registry.address().replace(':', "_"), image.name);
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", &source]);
        run(skopeo.arg(format!("docker-archive:{}", copy.display()))).unwrap().ok().unwrap();
    }
}

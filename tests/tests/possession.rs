//! A manifest that names a layer does not prove possession: an image gets only what its own repository delivers,
//! whatever the store has already.
//!
//! The faulty proxy plays a registry that lies: it invents the manifest and config of a repository that has none of the
//! blobs. The real registry behind it answers for the blobs that the repository has.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, Descriptor, ImageBuilder, ImageFiles, Pools, digest_of, oddities};
use tests::process::{TIMEOUT, wait_until};
use tests::registry::{Fault, FaultyRegistry, Match, Registry};
use tests::site::Site;

const LONG: Duration = Duration::from_secs(120);
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

struct Bench {
    registry: Registry,
    faulty: FaultyRegistry,
    site: Site,
    directory: tempfile::TempDir,
}

fn noisy(directory: &Path, name: &str, seed: u64, compression: Compression) -> Result<ImageFiles> {
    let pools = Pools::open(directory)?;
    let mut tar = Archive::new(Vec::new());
    tar.add(&Header::new(Kind::File, format!("noise-{seed}")), oddities::noise(seed, 400_000))?;
    let builder = ImageBuilder::new(name).layer(pools.layer(&tar.finish()?, compression)?);
    builder.build(&pools, &directory.join(name)).context("cannot build an image")
}

impl Bench {
    fn new() -> Result<Bench> {
        let registry = Registry::start()?;
        let faulty = FaultyRegistry::start(&registry.address())?;
        Ok(Bench { faulty, registry, site: Site::start()?, directory: tempfile::tempdir()? })
    }

    /// Pushes an image with one layer of noise. Returns it with its reference through the faulty proxy.
    fn image(&self, name: &str, seed: u64, compression: Compression) -> Result<(ImageFiles, String)> {
        let image = noisy(self.directory.path(), name, seed, compression)?;
        self.registry.push(&image, name, "1")?;
        Ok((image, self.faulty.reference(name, "1")))
    }

    /// Makes this manifest that of the repository `evil`, which otherwise has only what was pushed there.
    fn invent(&self, manifest: &Value) {
        let answer = Fault::Answer(MANIFEST.to_owned(), manifest.to_string().into_bytes());
        self.faulty.inject(Match::Path("/v2/evil/manifests/".to_owned()), answer, 99);
    }

    /// Adds this config to the repository `evil`.
    fn invent_config(&self, config: &[u8]) -> Descriptor {
        let descriptor = Descriptor {
            media_type: "application/vnd.oci.image.config.v1+json".to_owned(),
            digest: digest_of(config),
            size: config.len() as u64,
        };
        let answer = Fault::Answer("application/octet-stream".to_owned(), config.to_vec());
        self.faulty.inject(Match::Path(format!("/v2/evil/blobs/{}", descriptor.digest)), answer, 99);
        descriptor
    }

    /// Pulls `evil`, which must fail, and returns the reason.
    fn refusal(&self) -> Result<String> {
        let output = self.site.ctl().run(&["pull", &self.faulty.reference("evil", "1")])?;
        anyhow::ensure!(output.code == 1, "it was published: {}", output.stdout);
        let images = self.site.images()?;
        anyhow::ensure!(!images.iter().any(|name| name.contains("evil")), "{images:?}");
        Ok(output.stderr)
    }
}

fn descriptor(of: &Descriptor) -> Value {
    json!({"mediaType": of.media_type, "digest": of.digest, "size": of.size})
}

fn manifest(config: &Descriptor, layer: &Descriptor) -> Value {
    json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(config), "layers": [descriptor(layer)]})
}

#[test]
fn a_repository_without_the_config_gets_no_image_by_its_digest() {
    let bench = Bench::new().unwrap();
    let (victim, name) = bench.image("victim", 1, Compression::Gzip).unwrap();
    bench.site.ctl().ok(&["pull", &name]).unwrap();
    bench.invent(&manifest(&victim.config, &victim.layers[0].blob));
    let why = bench.refusal().unwrap();
    assert!(why.contains("lacks the config"), "{why}");
}

#[test]
fn a_repository_without_the_blob_gets_no_layer_by_the_blobs_digest() {
    let bench = Bench::new().unwrap();
    let (victim, name) = bench.image("victim", 1, Compression::Gzip).unwrap();
    bench.site.ctl().ok(&["pull", &name]).unwrap();
    let config = bench.invent_config(&victim.blob(&victim.config.digest).unwrap());
    bench.invent(&manifest(&config, &victim.layers[0].blob));
    let why = bench.refusal().unwrap();
    assert!(why.contains("lacks layer") && why.contains(&victim.layers[0].blob.digest), "{why}");
}

#[test]
fn a_config_that_names_anothers_diff_id_gets_no_layer() {
    let bench = Bench::new().unwrap();
    let (victim, name) = bench.image("victim", 1, Compression::Gzip).unwrap();
    bench.site.ctl().ok(&["pull", &name]).unwrap();
    // The repository has its own blob, and claims that it is the victim's layer.
    let (own, _) = bench.image("evil", 2, Compression::Gzip).unwrap();
    let config = bench.invent_config(&victim.blob(&victim.config.digest).unwrap());
    bench.invent(&manifest(&config, &own.layers[0].blob));
    for _ in 0..2 {
        let why = bench.refusal().unwrap();
        assert!(why.contains(&victim.layers[0].diff_id) && why.contains(&own.layers[0].diff_id), "{why}");
    }
    // The lie has no lasting effect: the repository's own image, which has that blob, is accepted.
    bench.faulty.heal();
    bench.site.ctl().ok(&["pull", &bench.faulty.reference("evil", "1")]).unwrap();
    assert!(bench.site.has_layer(&own.layers[0].diff_id).unwrap());
}

#[test]
fn an_index_that_names_anothers_manifest_gets_no_image() {
    let bench = Bench::new().unwrap();
    let (victim, name) = bench.image("victim", 1, Compression::Gzip).unwrap();
    bench.site.ctl().ok(&["pull", &name]).unwrap();
    let index_type = "application/vnd.oci.image.index.v1+json";
    let mut entry = descriptor(&victim.manifest);
    entry["platform"] = json!({"os": "linux", "architecture": victim.platform["architecture"]});
    let index = json!({"schemaVersion": 2, "mediaType": index_type, "manifests": [entry]});
    let answer = Fault::Answer(index_type.to_owned(), index.to_string().into_bytes());
    bench.faulty.inject(Match::Path("/v2/evil/manifests/1".to_owned()), answer, 99);
    let why = bench.refusal().unwrap();
    assert!(why.contains("lacks the manifest"), "{why}");
}

#[test]
fn whoever_joins_the_fetch_of_a_layer_must_have_it_too() {
    let bench = Bench::new().unwrap();
    let (victim, name) = bench.image("victim", 1, Compression::Gzip).unwrap();
    let blob = Match::Blob(victim.layers[0].blob.digest.clone());
    let config = bench.invent_config(&victim.blob(&victim.config.digest).unwrap());
    bench.invent(&manifest(&config, &victim.layers[0].blob));
    bench.faulty.inject(blob.clone(), Fault::Slow(10_000, Duration::from_millis(500)), 1);
    bench.site.ctl().ok(&["pull", "--detach", &name]).unwrap();
    bench.faulty.wait_for(&blob, 1, TIMEOUT).unwrap();
    let evil = bench.faulty.reference("evil", "1");
    bench.site.ctl().ok(&["pull", "--detach", &evil]).unwrap();
    bench.site.wait_for_job(&evil, &["fetching"], TIMEOUT).unwrap();
    wait_until("the joining", TIMEOUT, || Ok(bench.site.job(&evil)?["layers"][0]["state"] == "fetching")).unwrap();
    // Ends only the slow body. The invented documents stay.
    bench.faulty.hurry();
    bench.site.wait_for_job(&name, &["published"], LONG).unwrap();
    let job = bench.site.wait_for_job(&evil, &["failed", "published"], LONG).unwrap();
    assert_eq!(job["state"], "failed", "{job}");
    assert!(job["reason"].as_str().unwrap().contains("lacks layer"), "{job}");
}

/// A registry that claims to have every blob must have sent the bytes once.
#[test]
fn another_registry_that_lies_gets_no_layer_for_saying_that_it_has_it() {
    let bench = Bench::new().unwrap();
    let (victim, _) = bench.image("victim", 1, Compression::Gzip).unwrap();
    bench.site.ctl().ok(&["pull", &format!("{}/victim:1", bench.registry.address())]).unwrap();
    let config = bench.invent_config(&victim.blob(&victim.config.digest).unwrap());
    bench.invent(&manifest(&config, &victim.layers[0].blob));
    // This answers HEAD with 200, but the bytes are not those of the blob.
    let lie = Fault::Answer("application/octet-stream".to_owned(), vec![b'x'; victim.layers[0].blob.size as usize]);
    bench.faulty.inject(Match::Path(format!("/v2/evil/blobs/{}", victim.layers[0].blob.digest)), lie, 99);
    let why = bench.refusal().unwrap();
    assert!(why.contains(&victim.layers[0].blob.digest), "{why}");
}

/// The same layer in another packing is another blob. It is fetched once to identify it, and is known from then on.
#[test]
fn a_layer_that_is_here_under_another_blobs_name_is_verified_once() {
    let bench = Bench::new().unwrap();
    let (first, first_name) = bench.image("first", 1, Compression::Gzip).unwrap();
    let (second, second_name) = bench.image("second", 1, Compression::Zstd).unwrap();
    assert_eq!(first.layers[0].diff_id, second.layers[0].diff_id);
    bench.site.ctl().ok(&["pull", &first_name]).unwrap();
    let packs = bench.site.files("packs").unwrap();
    bench.site.ctl().ok(&["pull", &second_name]).unwrap();
    let fetches = |image: &ImageFiles| bench.registry.blob_fetches(&image.layers[0].blob.digest);
    assert_eq!((fetches(&first), fetches(&second)), (1, 1));
    assert_eq!(bench.site.files("packs").unwrap(), packs, "nothing was stored twice");
    for name in [&first_name, &second_name] {
        bench.site.ctl().ok(&["remove", name]).unwrap();
        bench.site.ctl().ok(&["pull", name]).unwrap();
    }
    assert_eq!((fetches(&first), fetches(&second)), (1, 1), "both are known");
}

/// When the database is lost, verified blobs are known from the catalogue, so nothing is fetched again.
#[test]
fn a_coordinator_that_lost_its_database_knows_verified_blobs_from_the_store() {
    let mut bench = Bench::new().unwrap();
    let (image, name) = bench.image("image", 1, Compression::Gzip).unwrap();
    bench.site.ctl().ok(&["pull", &name]).unwrap();
    bench.site.coordinator().kill9().unwrap();
    std::fs::remove_dir_all(bench.site.path().join("state")).unwrap();
    bench.site.coordinator().restart().unwrap();
    bench.site.ctl().ok(&["pull", &name]).unwrap();
    assert_eq!(bench.registry.blob_fetches(&image.layers[0].blob.digest), 1);
}

/// `name:tag@digest` names the content by its digest. The tag in it is for people and no tag is moved, as in Docker.
#[test]
fn a_reference_with_tag_and_digest_moves_no_tag() {
    let bench = Bench::new().unwrap();
    let (old, name) = bench.image("app", 1, Compression::Gzip).unwrap();
    bench.site.ctl().ok(&["pull", &name]).unwrap();
    let new = noisy(bench.directory.path(), "new", 2, Compression::Gzip).unwrap();
    bench.registry.push(&new, "app", "1").unwrap();
    bench.site.ctl().ok(&["pull", &name]).unwrap();
    let target = |name: &str| bench.site.ctl().json(&["image", name]).unwrap()["manifest"].clone();
    assert_eq!(target(&name), new.manifest.digest.as_str());
    let both = format!("{name}@{}", old.manifest.digest);
    bench.site.ctl().ok(&["pull", &both]).unwrap();
    assert_eq!(target(&name), new.manifest.digest.as_str(), "the tag stays where it was");
    assert_eq!(target(&both), old.manifest.digest.as_str());
    let by_digest = both.replace(":1@", "@");
    let mut images = bench.site.images().unwrap();
    images.sort();
    assert_eq!(images, [name.clone(), by_digest]);
}

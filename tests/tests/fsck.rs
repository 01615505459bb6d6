//! Damage to a store is found and repaired from the registry while hosts keep reading, and the store's content is known
//! again after its database or catalogue was lost.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use store::catalogue::Change;
use store::image::{ImageRecord, ImageRef, LayerRecord, Platform, RequestedBy};
use store::layer::{FileContent, LayerFacts, LayerTree, Metadata, NodeKind, PieceSource, ROOT};
use store::pack::PackWriter;
use store::publisher::Publisher;
use store::recipe::RecipeWriter;
use store::{ContentDigest, Digest};
use tests::hosts;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Layer, Pools, hex, image, oddities, small};
use tests::process::{TIMEOUT, wait_until};
use tests::registry::{Fault, FaultyRegistry, Match, Registry};
use tests::site::{Site, SiteSpec};

/// How long work on small images may take on a loaded machine.
const LONG: Duration = Duration::from_secs(120);

/// A layer of files with noise, each given as name, seed and size.
fn layer(pools: &Pools, files: &[(&str, u64, usize)]) -> Result<Layer> {
    let mut tar = Archive::new(Vec::new());
    for (name, seed, size) in files {
        tar.add(&Header::new(Kind::File, *name), oddities::noise(*seed, *size))?;
    }
    pools.layer(&tar.finish()?, Compression::Gzip)
}

fn build(directory: &Path, name: &str, layers: &[&[(&str, u64, usize)]]) -> Result<ImageFiles> {
    let pools = Pools::open(directory)?;
    let mut builder = ImageBuilder::new(name);
    for files in layers {
        builder = builder.layer(layer(&pools, files)?);
    }
    builder.build(&pools, &directory.join(name))
}

/// Runs `cachefsctl fsck` and returns its exit code and document.
fn fsck(site: &Site, arguments: &[&str]) -> Result<(i32, Value)> {
    let output = site.ctl().run(&[&["--json", "fsck"], arguments].concat())?;
    let document = serde_json::from_str(&output.stdout);
    Ok((output.code, document.with_context(|| format!("{arguments:?}: {}{}", output.stdout, output.stderr))?))
}

fn is_whole(site: &Site) -> Result<()> {
    let (code, check) = fsck(site, &["--deep"])?;
    ensure!(code == 0 && check["damaged"] == 0 && check["state"] == "finished", "{check:#}");
    Ok(())
}

fn flip(path: &Path, at: usize) -> Result<()> {
    let mut bytes = std::fs::read(path)?;
    let at = at % bytes.len();
    bytes[at] ^= 0x10;
    Ok(std::fs::write(path, bytes)?)
}

/// Damages one file and describes how.
fn damage(path: &Path, kind: usize) -> Result<String> {
    let len = std::fs::metadata(path)?.len();
    let what = match kind {
        0 => {
            flip(path, len as usize * 2 / 3)?;
            "a flipped bit in"
        }
        1 => {
            std::fs::File::options().write(true).open(path)?.set_len(len / 2)?;
            "half of"
        }
        _ => {
            std::fs::remove_file(path)?;
            "without"
        }
    };
    Ok(format!("{what} {}", path.display()))
}

/// Reads a file of a layer through a host's mount.
fn read(mount: &tests::cluster::Mount, image: &ImageFiles, layer: usize, name: &str) -> std::io::Result<Vec<u8>> {
    std::fs::read(mount.layer(&image.layers[layer].diff_id).join(name))
}

#[test]
fn damage_to_any_file_is_found_and_repaired() {
    let (registry, site, image) = (Registry::start().unwrap(), Site::start().unwrap(), small().unwrap());
    let reference = registry.push(&image, "small", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    is_whole(&site).unwrap();
    let mut cases = 0;
    for directory in ["packs", "layers", "blobs", "catalogue", ""] {
        for kind in 0..3 {
            // Each repair changes the files of the catalogue, so they are listed again for each kind of damage.
            let mut files = site.files(directory).unwrap();
            if directory.is_empty() {
                files = vec![site.store().join("cachefs-store")];
            }
            for path in files.into_iter().filter(|path| path.exists()) {
                let readable_without = directory == "catalogue" && kind == 2;
                let what = damage(&path, kind).unwrap();
                let (code, check) = fsck(&site, &["--deep"]).unwrap();
                // A generation that a newer snapshot supersedes is not needed by anything.
                assert!(code == 1 || readable_without, "{what}: {check:#}");
                let (code, check) = fsck(&site, &["--deep", "--repair"]).unwrap();
                assert_eq!(code, 0, "{what}: {check:#}");
                is_whole(&site).unwrap_or_else(|error| panic!("{what}: {error:#}"));
                cases += 1;
            }
        }
    }
    println!("{cases} cases");
    assert!(cases > 30, "{cases}");
    assert_eq!(site.images().unwrap(), [reference]);
    assert!(site.staged().unwrap().is_empty());
}

#[test]
fn a_damaged_pack_comes_back_under_its_name_for_every_layer_that_shares_it() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let site = Site::start().unwrap();
    let shared = ("shared", 1, 300_000);
    let first = build(directory.path(), "first", &[&[shared, ("own", 2, 5000), ("more", 3, 90_000)]]).unwrap();
    let second = build(directory.path(), "second", &[&[("other", 4, 5000), shared, ("again", 3, 90_000)]]).unwrap();
    let references: Vec<_> =
        [&first, &second].iter().map(|image| registry.push(image, &image.name, "1").unwrap()).collect();
    // The images are pulled one after the other, so that the second layer refers to the first one's pack.
    for reference in &references {
        site.ctl().ok(&["pull", reference]).unwrap();
    }
    let packs = site.files("packs").unwrap();
    let largest = packs.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let good = std::fs::read(largest).unwrap();
    let fetches = registry.blob_fetches(&second.layers[0].blob.digest);
    flip(largest, 1000).unwrap();
    let (code, check) = fsck(&site, &["--deep"]).unwrap();
    assert_eq!((code, &check["findings"][0]["images_affected"]), (1, &Value::from(2)), "{check:#}");
    let (code, check) = fsck(&site, &["--deep", "--repair"]).unwrap();
    assert_eq!((code, &check["findings"][0]["outcome"]), (0, &Value::from("repaired")), "{check:#}");
    assert!(std::fs::read(largest).unwrap() == good, "the same pack under the same name");
    assert_eq!(site.files("packs").unwrap(), packs);
    assert_eq!(registry.blob_fetches(&second.layers[0].blob.digest), fetches, "the other layer needed no fetching");
    assert!(site.store().join("quarantine").is_dir());
    is_whole(&site).unwrap();
}

#[test]
fn a_mounted_host_reads_good_bytes_again_without_a_restart() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let site = Site::start().unwrap();
    let files = [("a", 1, 300_000), ("b", 2, 300_000), ("c", 3, 12_000_000)];
    let image = build(directory.path(), "image", &[&files]).unwrap();
    let reference = registry.push(&image, "image", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    let host = hosts::mount(&site, "a").unwrap();
    wait_until("the layer on the host", TIMEOUT, || Ok(host.layer(&image.layers[0].diff_id).is_dir())).unwrap();
    let expected = |seed, size| oddities::noise(seed, size);
    assert!(read(&host, &image, 0, "a").unwrap() == expected(1, 300_000), "before");
    let pack = site.files("packs").unwrap().pop().unwrap();
    let len = std::fs::metadata(&pack).unwrap().len() as usize;
    // Near the end, in a part that was not read yet.
    flip(&pack, len - 1_000_000).unwrap();
    let error = read(&host, &image, 0, "c").map(|bytes| bytes.len()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EIO as i32), "damage is never served");
    let (code, check) = fsck(&site, &["--deep", "--repair"]).unwrap();
    assert_eq!(code, 0, "{check:#}");
    for (name, seed, size) in files {
        assert!(read(&host, &image, 0, name).unwrap() == expected(seed, size), "{name}");
    }
}

#[test]
fn what_no_registry_gives_back_is_put_back_and_said() {
    let impatient = SiteSpec { settings: "retry_attempts = 1\n".to_owned(), ..SiteSpec::default() };
    let (site, image) = (Site::start_with(&impatient).unwrap(), small().unwrap());
    hosts::load(&site, &image).unwrap();
    let pack = site.files("packs").unwrap().pop().unwrap();
    flip(&pack, 500).unwrap();
    let damaged = std::fs::read(&pack).unwrap();
    let run = site.ctl().run(&["fsck", "--deep", "--repair"]).unwrap();
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(run.stdout.contains("not repaired") && run.stdout.contains("small"), "{}", run.stdout);
    assert!(run.stderr.contains("1 damaged object"), "{}", run.stderr);
    assert!(std::fs::read(&pack).unwrap() == damaged, "a damaged pack still serves its good chunks");
    for layer in &image.layers {
        assert!(site.has_layer(&layer.diff_id).unwrap(), "the layer is still there");
    }
    assert_eq!(site.images().unwrap(), ["small:latest"]);
}

/// Publishes an image as an earlier version did. That version accepted a path twice in a tar and kept the last one;
/// `files` are what it kept.
fn publish_as_before(store: &Path, reference: &str, image: &ImageFiles, files: &[(&str, Vec<u8>)]) -> Result<()> {
    store::publisher::create(store)?;
    let publisher = Publisher::open(store, "before")?;
    let layer = &image.layers[0];
    let (tar, diff_id) = (std::fs::read(&layer.tar)?, layer.diff_id.parse()?);
    let staging = publisher.stage()?;
    let mut recipe = RecipeWriter::new(Vec::new())?;
    recipe.literal(&tar)?;
    let recipe = recipe.finish()?;
    std::fs::write(staging.recipe(), &recipe)?;
    let (mut pack, mut tree, mut placed) = (PackWriter::create(&staging.pack())?, LayerTree::new(), Vec::new());
    for (number, (name, bytes)) in files.iter().enumerate() {
        placed.push(pack.append(&store::chunk::compress(bytes)?)?);
        let pieces = vec![PieceSource::Chunk { chunk: number as u32, start: 0 }];
        let content = FileContent { digest: ContentDigest::of(bytes), size: bytes.len() as u64, pieces };
        tree.insert(ROOT, name.as_bytes(), Metadata::default(), NodeKind::File(content));
    }
    let pack = pack.finish()?;
    let chunks: Vec<_> = placed.iter().map(|placed| placed.in_pack(pack)).collect();
    let recipe_digest = ContentDigest::of(&recipe);
    let facts = LayerFacts { diff_id, tar_size: tar.len() as u64, recipe_len: recipe.len() as u64, recipe_digest };
    std::fs::write(staging.index(), store::layer::seal(&tree.encode(&facts, &chunks)?)?)?;
    publisher.publish_layer(staging, &diff_id, Some(&pack))?;
    let [manifest, config, blob] = [&image.manifest, &image.config, &layer.blob].map(|named| named.digest.parse());
    let (manifest, config, blob): (Digest, Digest, Digest) = (manifest?, config?, blob?);
    for digest in [manifest, config] {
        publisher.put_blob(&digest, &image.blob(&digest.to_string())?)?;
    }
    let reference: ImageRef = reference.parse()?;
    let (media_type, blob_size) = (layer.blob.media_type.clone(), layer.blob.size);
    let record = ImageRecord {
        repository: reference.canonical_repository(),
        tag: reference.tag().map(str::to_owned),
        target: manifest,
        manifest,
        media_type: image.manifest.media_type.clone(),
        config,
        platform: Platform::host(),
        layers: vec![LayerRecord { diff_id, size: tar.len() as u64, blob, blob_size, media_type }],
        published_at: 1,
        ordered_by: RequestedBy::Operator,
    };
    publisher.commit(vec![Change::Set(Arc::new(record))])?;
    Ok(publisher.release()?)
}

#[test]
fn what_an_earlier_version_took_and_this_one_refuses_is_put_back_and_said() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let early = build(directory.path(), "early", &[&[("good", 1, 90_000), ("twice", 2, 5000), ("twice", 3, 90_000)]]);
    let early = early.unwrap();
    let reference = registry.push(&early, "early", "1").unwrap();
    let fresh = Site::start().unwrap().ctl().run(&["pull", &reference]).unwrap();
    assert!(!fresh.succeeded() && fresh.stderr.contains("a second time"), "{}", fresh.stderr);

    let place = tempfile::tempdir().unwrap();
    std::fs::create_dir(place.path().join("store")).unwrap();
    let kept = [("good", oddities::noise(1, 90_000)), ("twice", oddities::noise(3, 90_000))];
    publish_as_before(&place.path().join("store"), &reference, &early, &kept).unwrap();
    let site = Site::start_in(place, &SiteSpec::default()).unwrap();
    is_whole(&site).unwrap();
    let pack = site.files("packs").unwrap().pop().unwrap();
    let len = std::fs::metadata(&pack).unwrap().len() as usize;
    // In the chunk of the second file.
    flip(&pack, len - 10_000).unwrap();
    let damaged = std::fs::read(&pack).unwrap();
    let (code, check) = fsck(&site, &["--deep", "--repair"]).unwrap();
    assert_eq!((code, &check["findings"][0]["outcome"]), (1, &Value::from("not_repaired")), "{check:#}");
    let reason = check["findings"][0]["reason"].as_str().unwrap();
    for words in ["\"twice\"", "a second time", "it was put back and serves what is whole of it"] {
        assert!(reason.contains(words), "{reason}");
    }
    assert!(std::fs::read(&pack).unwrap() == damaged, "it is in its place");
    assert!(site.files("quarantine").unwrap_or_default().is_empty(), "and nowhere else");
    let host = hosts::mount(&site, "a").unwrap();
    wait_until("the layer on the host", TIMEOUT, || Ok(host.layer(&early.layers[0].diff_id).is_dir())).unwrap();
    assert!(read(&host, &early, 0, "good").unwrap() == kept[0].1, "what is whole of it is served");
    let error = read(&host, &early, 0, "twice").map(|bytes| bytes.len()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EIO as i32), "damage is never served");
}

#[test]
fn nothing_is_moved_away_while_the_registry_is_down() {
    let impatient = SiteSpec { settings: "retry_attempts = 1\n".to_owned(), ..SiteSpec::default() };
    let (mut registry, site) = (Registry::start().unwrap(), Site::start_with(&impatient).unwrap());
    let image = small().unwrap();
    let reference = registry.push(&image, "small", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    let pack = site.files("packs").unwrap().pop().unwrap();
    flip(&pack, 500).unwrap();
    registry.stop().unwrap();
    let (code, check) = fsck(&site, &["--deep", "--repair"]).unwrap();
    assert_eq!((code, &check["findings"][0]["outcome"]), (1, &Value::from("not_repaired")), "{check:#}");
    assert!(check["findings"][0]["reason"].as_str().unwrap().contains(&registry.address()), "{check:#}");
    assert!(pack.exists() && site.files("quarantine").unwrap_or_default().is_empty(), "its good part is served");
    registry.restart().unwrap();
    // A registry that was down is not contacted again for a moment.
    wait_until("the repair", LONG, || Ok(fsck(&site, &["--deep", "--repair"])?.0 == 0)).unwrap();
    is_whole(&site).unwrap();
}

#[test]
fn what_a_repair_had_moved_away_when_it_died_is_put_back() {
    let (registry, mut site, image) = (Registry::start().unwrap(), Site::start().unwrap(), small().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    registry.push(&image, "small", "1").unwrap();
    let reference = faulty.reference("small", "1");
    site.ctl().ok(&["pull", &reference]).unwrap();
    let layer = &image.layers[0];
    let index = site.store().join("layers").join(&hex(&layer.diff_id)[..2]).join(hex(&layer.diff_id)).join("tar");
    flip(&index, 20).unwrap();
    let hanging = Match::Blob(layer.blob.digest.clone());
    let before = faulty.count(&hanging);
    faulty.inject(hanging.clone(), Fault::Hang(0), 1);
    site.ctl().ok(&["fsck", "--deep", "--repair", "--detach"]).unwrap();
    faulty.wait_for(&hanging, before + 1, TIMEOUT).unwrap();
    assert!(!site.has_layer(&layer.diff_id).unwrap(), "it is in quarantine");
    site.coordinator().kill9().unwrap();
    faulty.heal();
    site.coordinator().restart().unwrap();
    assert!(site.has_layer(&layer.diff_id).unwrap(), "damaged, it is better than none");
    let events = site.ctl().json(&["events", "--since", "0"]).unwrap();
    let told = events["events"].as_array().unwrap().iter().filter(|event| event["kind"] == "fsck.put_back").count();
    assert_eq!(told, 1, "{events:#}");
    let (code, check) = fsck(&site, &["--deep", "--repair", "--restart"]).unwrap();
    assert_eq!((code, &check["findings"][0]["outcome"]), (0, &Value::from("repaired")), "{check:#}");
    is_whole(&site).unwrap();
}

#[test]
fn a_lost_database_is_rebuilt_and_old_content_is_not_stored_again() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let mut site = Site::start().unwrap();
    let old = build(directory.path(), "old", &[&[("shared", 1, 500_000), ("x", 2, 4000)]]).unwrap();
    let new = build(directory.path(), "new", &[&[("y", 2, 4000), ("elsewhere", 1, 500_000)]]).unwrap();
    site.ctl().ok(&["pull", &registry.push(&old, "old", "1").unwrap()]).unwrap();
    site.coordinator().stop().unwrap();
    std::fs::remove_dir_all(site.coordinator().spec().state.clone()).unwrap();
    site.coordinator().restart().unwrap();
    assert_eq!(site.images().unwrap().len(), 1, "the catalogue is in the store");
    let (code, check) = fsck(&site, &["--rebuild"]).unwrap();
    assert_eq!((code, &check["rebuilt"]["blobs"]), (0, &Value::from(1)), "{check:#}");
    assert!(check["rebuilt"]["pieces"].as_u64().unwrap() >= 3, "{check:#}");
    let packs = site.files("packs").unwrap();
    site.ctl().ok(&["pull", &registry.push(&new, "new", "1").unwrap()]).unwrap();
    assert_eq!(site.files("packs").unwrap(), packs, "all of its content was there");
    is_whole(&site).unwrap();
}

#[test]
fn a_damaged_catalogue_is_refused_salvaged_and_rebuilt() {
    let (registry, mut site, image) = (Registry::start().unwrap(), Site::start().unwrap(), small().unwrap());
    let reference = registry.push(&image, "small", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    site.coordinator().stop().unwrap();
    for path in site.files("catalogue").unwrap() {
        std::fs::write(path, "rubbish").unwrap();
    }
    let mut spec = site.coordinator().spec().clone();
    let refused = tests::site::run_to_end("coordinator", &mut spec.command().unwrap(), TIMEOUT).unwrap();
    assert_eq!(refused.code, 1);
    for words in ["catalogue", "--salvage-catalogue", "fsck --rebuild"] {
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
    // A second coordinator with a new state directory, as if the database were lost too.
    spec.state = site.path().join("salvager");
    spec.arguments.push("--salvage-catalogue".to_owned());
    let salvager = tests::cluster::Coordinator::start(spec).unwrap();
    let check = salvager.ctl().run(&["fsck"]).unwrap();
    assert_eq!(check.code, 1);
    assert!(check.stdout.contains("salvaged"), "{}", check.stdout);
    // The damaged files of the catalogue go to quarantine, since nothing needs them any more.
    let check = salvager.ctl().json(&["fsck", "--deep", "--rebuild", "--repair"]).unwrap();
    let names = check["rebuilt"]["images"].as_array().unwrap();
    assert_eq!(names.len(), 1, "{check:#}");
    let detail = salvager.ctl().json(&["image", names[0].as_str().unwrap()]).unwrap();
    assert_eq!(detail["config"], image.config.digest);
    assert_eq!(detail["manifest"], image.manifest.digest);
    // Without names and database nothing records which registry has which layer. The registry sends each layer once,
    // and nothing is stored twice.
    let before = registry.blob_fetches(&image.layers[0].blob.digest);
    let packs = site.files("packs").unwrap();
    for _ in 0..2 {
        salvager.ctl().ok(&["pull", &reference]).unwrap();
        assert_eq!(registry.blob_fetches(&image.layers[0].blob.digest), before + 1);
    }
    assert_eq!(site.files("packs").unwrap(), packs);
}

#[test]
fn a_check_is_interrupted_also_by_death_and_goes_on_later() {
    let mut site = Site::start().unwrap();
    hosts::load(&site, &image("python3").unwrap()).unwrap();
    let running = |site: &Site, phase: &str| {
        wait_until("the deep check's progress", TIMEOUT, || {
            let status = site.ctl().run(&["--json", "fsck", "--status"])?;
            if status.stderr.contains("was not checked yet") {
                return Ok(false);
            }
            let check: Value = serde_json::from_str(&status.ok()?)?;
            ensure!(check["state"] == "running", "it ended too soon: {check:#}");
            Ok(check["phase"] == phase && check["done"].as_u64() > Some(20_000_000))
        })
    };
    let mut client = site.begin("check", &["fsck", "--deep"]).unwrap();
    running(&site, "content").unwrap();
    let refused = site.ctl().run(&["fsck"]).unwrap();
    assert!(refused.code == 3 && refused.stderr.contains("under way"), "{}", refused.stderr);
    client.signal(Signal::SIGINT).unwrap();
    assert_eq!(client.wait(TIMEOUT).unwrap().code(), Some(1), "{}", client.log());
    assert!(client.log().contains("goes on from here"), "{}", client.log());
    let interrupted = site.ctl().run(&["--json", "fsck", "--status"]).unwrap();
    assert!(interrupted.stdout.contains("\"interrupted\""), "{}", interrupted.stdout);

    site.ctl().ok(&["fsck", "--deep", "--detach"]).unwrap();
    site.coordinator().kill9().unwrap();
    site.coordinator().restart().unwrap();
    let status = site.ctl().run(&["--json", "fsck", "--status"]).unwrap();
    assert!(status.stdout.contains("\"interrupted\""), "{}", status.stdout);
    let (code, check) = fsck(&site, &["--deep"]).unwrap();
    assert_eq!((code, &check["resumed"], &check["state"]), (0, &Value::from(true), &Value::from("finished")));
    let (_, again) = fsck(&site, &["--deep"]).unwrap();
    assert_eq!(again["resumed"], false, "a check that came to its end is not resumed");
    let (resumed, whole) = (&check["checked"]["bytes"], &again["checked"]["bytes"]);
    assert!(whole.as_u64().unwrap() > 100_000_000, "{again:#}");
    // Only the bytes between the last saved position and the death are compared again.
    assert!(resumed.as_u64().unwrap() <= whole.as_u64().unwrap() * 3 / 2, "{resumed} of {whole}");
}

#[test]
fn pulls_and_readers_go_on_while_a_check_runs() {
    let (registry, site, image) = (Registry::start().unwrap(), Site::start().unwrap(), small().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    registry.push(&image, "small", "1").unwrap();
    let reference = faulty.reference("small", "1");
    // A pull that is in progress during the whole check. Some of its layers are published, but its image is not.
    let hanging = Match::Blob(image.layers[2].blob.digest.clone());
    faulty.inject(hanging.clone(), Fault::Hang(0), 1);
    site.ctl().ok(&["pull", "--detach", &reference]).unwrap();
    faulty.wait_for(&hanging, 1, TIMEOUT).unwrap();
    wait_until("the first layers", TIMEOUT, || Ok(site.layers()?.len() == 2)).unwrap();
    let (code, check) = fsck(&site, &["--deep", "--repair"]).unwrap();
    assert_eq!(code, 0, "work in progress is no damage: {check:#}");
    assert_eq!(check["orphans"]["layers"], 2, "{check:#}");
    faulty.heal();
    // The hanging connection ends with its job. The next job finds the layers that exist.
    let id = site.job(&reference).unwrap()["id"].to_string();
    site.ctl().ok(&["cancel", &id]).unwrap();
    site.wait_for_job(&reference, &["cancelled"], LONG).unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    is_whole(&site).unwrap();
}

#[test]
fn people_are_told_what_is_wrong() {
    let (registry, site, image) = (Registry::start().unwrap(), Site::start().unwrap(), small().unwrap());
    let none = site.ctl().run(&["fsck", "--status"]).unwrap();
    assert!(none.code == 3 && none.stderr.contains("not checked yet"), "{}", none.stderr);
    let reference = registry.push(&image, "small", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    let clean = site.ctl().ok(&["fsck"]).unwrap();
    assert!(clean.contains("1 images, 3 layers") && clean.contains("Damaged:    0"), "{clean}");
    let index: PathBuf = site.files("layers").unwrap().into_iter().find(|path| path.ends_with("index")).unwrap();
    std::fs::remove_file(index).unwrap();
    let damaged = site.ctl().run(&["fsck"]).unwrap();
    assert_eq!(damaged.code, 1);
    assert!(
        damaged.stdout.contains(&reference) && damaged.stdout.contains("is not in the store"),
        "{}",
        damaged.stdout
    );
    assert!(damaged.stderr.contains("cachefsctl fsck --repair"), "{}", damaged.stderr);
    let repaired = site.ctl().ok(&["fsck", "--repair"]).unwrap();
    assert!(repaired.contains("repaired") && repaired.contains("Damaged:    0"), "{repaired}");
    let jobs = site.ctl().json(&["jobs"]).unwrap();
    assert_eq!(jobs["jobs"].as_array().unwrap().len(), 2, "repairs are ordinary jobs");
    assert_eq!(site.images().unwrap(), [reference], "and change no names");
}

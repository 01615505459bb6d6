//! Images are pulled into the store: from real registries with every kind of access, once, whatever breaks on the way.
//! The output of `cachefsctl` about them is checked too.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::http;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{
    self, Compression, ImageBuilder, ImageFiles, Layer, MediaTypes, Pools, digest_of_reader, hex, image, oddities,
    small,
};
use tests::process::{TIMEOUT, run, wait_until};
use tests::registry::{Access, Fault, FaultyRegistry, Match, Registry, Transport, free_port};
use tests::site::{Site, SiteSpec};

#[path = "pull/answers.rs"]
mod answers;
#[path = "pull/archives.rs"]
mod archives;
#[path = "pull/huge.rs"]
mod huge;

/// How long a pull of small images may take on a loaded machine.
const LONG: Duration = Duration::from_secs(120);

/// A layer of one file of noise. Its blob is about as large as its content.
fn noise(pools: &Pools, seed: u64, size: usize, compression: Compression) -> Result<Layer> {
    let mut tar = Archive::new(Vec::new());
    tar.add(&Header::new(Kind::File, format!("noise-{seed}")), oddities::noise(seed, size))?;
    pools.layer(&tar.finish()?, compression)
}

/// An image with one layer of noise for each seed.
fn noisy(directory: &Path, name: &str, seeds: &[u64], size: usize) -> Result<ImageFiles> {
    let pools = Pools::open(directory)?;
    let mut builder = ImageBuilder::new(name);
    for seed in seeds {
        builder = builder.layer(noise(&pools, *seed, size, Compression::Gzip)?);
    }
    builder.build(&pools, &directory.join(name))
}

/// Exports an image and checks that its config and layers are those of `image`, byte for byte.
fn check_export(site: &Site, reference: &str, image: &ImageFiles) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let archive = directory.path().join("export.tar");
    site.ctl().ok(&["export", reference, &archive.to_string_lossy()])?;
    run(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(directory.path()))?.ok()?;
    let manifest: Value = serde_json::from_slice(&std::fs::read(directory.path().join("manifest.json"))?)?;
    let open = |name: &Value| std::fs::File::open(directory.path().join(name.as_str().unwrap_or("")));
    ensure!(digest_of_reader(open(&manifest[0]["Config"])?)? == image.config.digest, "the config of {reference}");
    let layers = manifest[0]["Layers"].as_array().context("no layers")?;
    let found: Vec<_> = layers.iter().map(|name| Ok(digest_of_reader(open(name)?)?)).collect::<Result<_>>()?;
    ensure!(found == image.diff_ids(), "the layers of {reference} are {found:?} instead of {:?}", image.diff_ids());
    Ok(())
}

/// Pulls an image and checks that the store has exactly that image.
fn pull_and_check(site: &Site, reference: &str, image: &ImageFiles) -> Result<()> {
    site.ctl().ok(&["pull", reference])?;
    let detail = site.ctl().json(&["image", reference])?;
    ensure!(detail["config"] == image.config.digest, "{reference} is {detail}");
    for diff_id in image.diff_ids() {
        ensure!(site.has_layer(&diff_id)?, "layer {diff_id} of {reference} is not in the store");
    }
    check_export(site, reference, image)
}

#[test]
fn registries_admit_whoever_they_admit() {
    let image = small().unwrap();
    let (user, password) = ("eve".to_owned(), "apple".to_owned());
    let with_password = Access::Password { user: user.clone(), password: password.clone() };
    let with_token = Access::Token { user: user.clone(), password: password.clone() };
    let for_all = Access::Token { user: String::new(), password: String::new() };
    let registries: Vec<_> = [
        (Access::Anonymous, Transport::Http),
        (with_password.clone(), Transport::Http),
        (for_all, Transport::Http),
        (with_token, Transport::Http),
        (with_password, Transport::Https),
    ]
    .iter()
    .map(|(access, transport)| Registry::start_with(access, *transport).unwrap())
    .collect();
    let spec = SiteSpec {
        logins: registries.iter().map(|registry| (registry.address(), user.clone(), password.clone())).collect(),
        authorities: registries.iter().filter_map(|registry| Some(registry.authority()?.pem().to_owned())).collect(),
        ..SiteSpec::default()
    };
    for registry in &registries {
        // Each registry gets its own site, so that no layer is there already from another registry.
        let site = Site::start_with(&spec).unwrap();
        let reference = registry.push(&image, "some/image", "v1").unwrap();
        pull_and_check(&site, &reference, &image).unwrap();
        assert!(registry.blob_bytes() >= image.compressed_size());
        assert!(registry.tokens().is_none_or(|tokens| tokens.issued() > 0));
    }
}

#[test]
fn both_families_of_media_types_and_all_packings_are_taken() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let site = Site::start().unwrap();
    let pools = Pools::open(directory.path()).unwrap();
    let all = [Compression::None, Compression::Gzip, Compression::Zstd];
    let mut builder = ImageBuilder::new("all");
    for (seed, compression) in (0..).zip(all) {
        builder = builder.layer(noise(&pools, seed, 300_000, compression).unwrap());
    }
    let oci = builder.build(&pools, &directory.path().join("all")).unwrap();
    let reference = registry.push(&oci, "oci", "1").unwrap();
    pull_and_check(&site, &reference, &oci).unwrap();

    let docker = small().unwrap();
    let reference = registry.push_as(MediaTypes::Docker, &docker, "docker", "1").unwrap();
    pull_and_check(&site, &reference, &docker).unwrap();
    let by_digest = format!(
        "{}/docker@{}",
        registry.address(),
        site.ctl().json(&["image", &reference]).unwrap()["manifest"].as_str().unwrap()
    );
    pull_and_check(&site, &by_digest, &docker).unwrap();

    let odd = image("torture-zstd").unwrap();
    pull_and_check(&site, &registry.push(&odd, "odd", "1").unwrap(), &odd).unwrap();
}

#[test]
fn of_a_manifest_list_the_wanted_platform_is_pulled() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let pools = Pools::open(directory.path()).unwrap();
    let image = |seed: u64, architecture: &str, variant: &str| {
        let layer = noise(&pools, seed, 1000, Compression::Gzip).unwrap();
        let builder = ImageBuilder::new("multi").platform("linux", architecture, variant).layer(layer);
        builder.build(&pools, &directory.path().join(format!("{architecture}{variant}"))).unwrap()
    };
    let images = [image(1, "amd64", ""), image(2, "arm", "v7"), image(3, "arm64", "v8")];
    for family in [MediaTypes::Docker, MediaTypes::Oci] {
        let list =
            images::index("multi", family, &images, &pools, &directory.path().join(format!("{family:?}"))).unwrap();
        let name = format!("multi-{family:?}").to_lowercase();
        let reference = registry.push_index(&list, &name, "latest").unwrap();
        let site = Site::start().unwrap();
        pull_and_check(&site, &reference, &images[0]).unwrap();
        for (platform, image) in
            [("linux/arm/v7", &images[1]), ("linux/arm64", &images[2]), ("linux/amd64", &images[0])]
        {
            site.ctl().ok(&["pull", "--platform", platform, &reference]).unwrap();
            let detail = site.ctl().json(&["image", &reference]).unwrap();
            assert_eq!(detail["config"], image.config.digest, "{platform}");
            assert!(platform.starts_with(detail["platform"].as_str().unwrap().trim_end_matches("/v8")), "{detail}");
        }
        let refused = site.ctl().run(&["pull", "--platform", "linux/s390x", &reference]).unwrap();
        assert_eq!(refused.code, 1);
        assert!(refused.stderr.contains("linux/amd64, linux/arm"), "{}", refused.stderr);
    }
}

#[test]
fn what_is_there_is_not_fetched_again() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let site = Site::start().unwrap();
    let reference = registry.push(&image, "some/image", "v1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    let other = registry.push(&image, "some/image", "v2").unwrap();
    let elsewhere = registry.push(&image, "elsewhere", "v1").unwrap();
    let before = registry.blob_bytes();
    for reference in [&reference, &other, &elsewhere] {
        site.ctl().ok(&["pull", reference]).unwrap();
        let job = site.job(reference).unwrap();
        assert_eq!((&job["state"], &job["bytes_fetched"]), (&Value::from("published"), &Value::from(0)), "{job}");
    }
    for layer in &image.layers {
        assert_eq!(registry.blob_fetches(&layer.blob.digest), 1);
    }
    assert_eq!(registry.blob_fetches(&image.config.digest), 1, "the config is a blob too");
    assert_eq!(registry.blob_bytes(), before);
    assert_eq!(site.images().unwrap().len(), 3);
}

#[test]
fn layers_that_several_jobs_want_at_once_are_fetched_once() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let site = Site::start().unwrap();
    let size = 400_000;
    let images: Vec<_> = [("a", [1, 2, 3]), ("b", [1, 2, 4]), ("c", [2, 1, 5])]
        .iter()
        .map(|(name, seeds)| noisy(directory.path(), name, seeds, size).unwrap())
        .collect();
    let references: Vec<_> = images
        .iter()
        .map(|image| registry.push(image, &image.name, "1").map(|_| faulty.reference(&image.name, "1")).unwrap())
        .collect();
    // The shared blobs arrive slowly until all three jobs are fetching.
    faulty.inject(
        Match::Blob(images[0].layers[0].blob.digest.clone()),
        Fault::Slow(10_000, Duration::from_millis(500)),
        99,
    );
    faulty.inject(
        Match::Blob(images[0].layers[1].blob.digest.clone()),
        Fault::Slow(10_000, Duration::from_millis(500)),
        99,
    );
    let mut first = site.begin("first", &["pull", &references[0]]).unwrap();
    faulty.wait_for(&Match::Blob(images[0].layers[0].blob.digest.clone()), 1, TIMEOUT).unwrap();
    let mut second = site.begin("second", &["pull", &references[1], &references[2]]).unwrap();
    for reference in &references {
        site.wait_for_job(reference, &["fetching"], TIMEOUT).unwrap();
    }
    faulty.heal();
    assert!(first.wait(LONG).unwrap().success(), "{}", first.log());
    assert!(second.wait(LONG).unwrap().success(), "{}", second.log());
    let blobs: BTreeSet<_> =
        images.iter().flat_map(|image| &image.layers).map(|layer| layer.blob.digest.clone()).collect();
    assert_eq!(blobs.len(), 5);
    for blob in blobs {
        assert_eq!(registry.blob_fetches(&blob), 1, "{blob}");
    }
    for (image, reference) in images.iter().zip(&references) {
        check_export(&site, reference, image).unwrap();
    }
}

/// The bytes of a blob that reached the coordinator, derived from the requested ranges and the faults that cut them.
fn delivered(faulty: &FaultyRegistry, digest: &str, size: u64) -> u64 {
    let requests = faulty.requests();
    let of_blob = requests.iter().filter(|request| request.path.ends_with(&format!("/blobs/{digest}")));
    let one = |request: &tests::registry::Request| {
        let start =
            request.range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.split('-').next()?.parse().ok());
        let rest = size - start.unwrap_or(0);
        match request.fault {
            Some(Fault::Truncate(length) | Fault::Reset(length)) => rest.min(length),
            Some(Fault::Status(..)) => 0,
            _ => rest,
        }
    };
    of_blob.map(one).sum()
}

#[test]
fn a_broken_download_goes_on_where_it_broke() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let site = Site::start().unwrap();
    let image = noisy(directory.path(), "big", &[7], 3_000_000).unwrap();
    registry.push(&image, "big", "1").unwrap();
    let blob = &image.layers[0].blob;
    faulty.inject(Match::Blobs, Fault::Status(503, Vec::new()), 1);
    for length in [1_000_000, 1, 500_000] {
        faulty.inject(Match::Blob(blob.digest.clone()), Fault::Truncate(length), 1);
    }
    faulty.inject(Match::Blob(blob.digest.clone()), Fault::Reset(200_000), 1);
    let reference = faulty.reference("big", "1");
    pull_and_check(&site, &reference, &image).unwrap();
    let requests = faulty.requests();
    let ranges: Vec<_> = requests.iter().filter_map(|request| request.range.clone()).collect();
    assert_eq!(ranges[..3], ["bytes=1000000-", "bytes=1000001-", "bytes=1500001-"], "{ranges:?}");
    let total = delivered(&faulty, &blob.digest, blob.size);
    assert!(total >= blob.size && total <= blob.size + 200_000, "{total} of {} bytes", blob.size);
    let job = site.job(&reference).unwrap();
    assert_eq!((&job["attempts"], &job["bytes_done"]), (&Value::from(1), &Value::from(blob.size)), "{job}");
}

#[test]
fn a_registry_without_ranges_is_read_again_from_the_start() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let site = Site::start().unwrap();
    let image = noisy(directory.path(), "big", &[7], 1_000_000).unwrap();
    registry.push(&image, "big", "1").unwrap();
    faulty.inject(Match::Blob(image.layers[0].blob.digest.clone()), Fault::Truncate(400_000), 1);
    faulty.inject(Match::Blob(image.layers[0].blob.digest.clone()), Fault::IgnoreRange, 9);
    pull_and_check(&site, &faulty.reference("big", "1"), &image).unwrap();
}

#[test]
fn retry_after_is_obeyed() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let site = Site::start().unwrap();
    registry.push(&image, "small", "1").unwrap();
    let blob = Match::Blob(image.layers[1].blob.digest.clone());
    let wait = |seconds: &str| Fault::Status(429, vec![("Retry-After".to_owned(), seconds.to_owned())]);
    faulty.inject(blob.clone(), wait("2"), 1);
    faulty.inject(Match::Manifests, wait("1"), 1);
    let started = Instant::now();
    site.ctl().ok(&["pull", &faulty.reference("small", "1")]).unwrap();
    assert!(started.elapsed() >= Duration::from_secs(3), "{:?}", started.elapsed());
    assert_eq!(faulty.count(&blob), 2, "nothing is asked before its time");

    // The job does not wait for a day, but fails at once.
    faulty.inject(Match::Manifests, wait("86400"), 1);
    let started = Instant::now();
    let refused = site.ctl().run(&["pull", &faulty.reference("small", "1")]).unwrap();
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!(refused.stderr.contains(&faulty.address()) && refused.stderr.contains("429"), "{}", refused.stderr);
    assert!(started.elapsed() < TIMEOUT);
}

#[test]
fn a_job_whose_registry_asks_to_wait_gives_its_place_up_and_goes_on_later() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let site = Site::start().unwrap();
    registry.push(&image, "small", "1").unwrap();
    let (whole, limited) = (Match::Blob(image.layers[0].blob.digest.clone()), &image.layers[1].blob.digest);
    let wait = Fault::Status(429, vec![("Retry-After".to_owned(), "20".to_owned())]);
    faulty.inject(Match::Blob(limited.clone()), wait, 1);
    let started = Instant::now();
    site.ctl().ok(&["pull", "--detach", &faulty.reference("small", "1")]).unwrap();
    let job = || -> Result<Value> { Ok(site.ctl().json(&["jobs"])?["jobs"][0].clone()) };
    wait_until("the job gives its place up", TIMEOUT, || Ok(job()?["state"] == "queued" && job()?["attempts"] == 1))
        .unwrap();
    assert!(started.elapsed() < Duration::from_secs(19), "{:?}", started.elapsed());
    let refused = site.ctl().run(&["wait", &faulty.reference("small", "1"), "--timeout", "0s"]).unwrap();
    assert!(refused.stderr.contains("is not asked before"), "{}", refused.stderr);
    wait_until("the job is done", TIMEOUT, || Ok(job()?["state"] == "published")).unwrap();
    assert!(started.elapsed() >= Duration::from_secs(20), "{:?}", started.elapsed());
    assert_eq!(job().unwrap()["attempts"], 2);
    assert_eq!(faulty.count(&whole), 1, "a layer that is done stays");
}

#[test]
fn a_killed_coordinator_resumes_its_jobs_and_nothing_half_done_is_seen() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let mut site = Site::start().unwrap();
    let image = noisy(directory.path(), "big", &[1, 2], 2_000_000).unwrap();
    registry.push(&image, "big", "1").unwrap();
    let reference = faulty.reference("big", "1");
    let (whole, broken) = (&image.layers[0], &image.layers[1]);
    let hanging = Match::Blob(broken.blob.digest.clone());
    faulty.inject(hanging.clone(), Fault::Hang(0), 1);
    site.ctl().ok(&["pull", "--detach", &reference]).unwrap();
    // Only twice, because after the third death in a row the job would be considered their cause.
    let (mut sent, lengths) = (0, [1_500_000, broken.blob.size]);
    for (times, length) in (1..).zip(lengths) {
        faulty.wait_for(&hanging, times, TIMEOUT).unwrap();
        wait_until("the first layer", TIMEOUT, || site.has_layer(&whole.diff_id)).unwrap();
        // Unpacking begins with the first byte.
        wait_until("work in staging", TIMEOUT, || Ok(sent == 0 || !site.staged().unwrap().is_empty())).unwrap();
        site.coordinator().kill9().unwrap();
        assert_eq!(site.layers().unwrap(), [hex(&whole.diff_id)], "nothing half done is visible");
        // Removes the old rule, so that the transfer does not hang at the same place again.
        faulty.heal();
        faulty.inject(hanging.clone(), Fault::Hang(length), 1);
        sent = length;
        site.coordinator().restart().unwrap();
        // After the last byte nothing is missing, so the image may be published already.
        assert!(length == broken.blob.size || site.images().unwrap().is_empty());
    }
    faulty.wait_for(&hanging, 3, TIMEOUT).unwrap();
    faulty.heal();
    site.ctl().ok(&["wait", &reference, "--timeout", "120s"]).unwrap();
    let job = site.wait_for_job(&reference, &["published"], TIMEOUT).unwrap();
    assert_eq!((&job["id"], &job["attempts"]), (&Value::from(1), &Value::from(3)), "{job}");
    check_export(&site, &reference, &image).unwrap();
    assert_eq!(site.staged().unwrap(), Vec::<String>::new());
    assert_eq!(registry.blob_fetches(&whole.blob.digest), 1, "a whole layer survives the crash");
}

/// A state directory that has the second database's files is opened with that engine.
#[test]
fn a_coordinator_with_the_database_in_rust_keeps_its_word_through_kill_9() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    std::fs::create_dir_all(directory.path().join("state/journal.fjall")).unwrap();
    std::fs::create_dir(directory.path().join("store")).unwrap();
    let mut site = Site::start_in(directory, &SiteSpec::default()).unwrap();
    let reference = registry.push(&small().unwrap(), "small", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    let token = site.ctl().json(&["token", "create", "one", "--role", "viewer"]).unwrap();
    site.ctl().ok(&["schedule", "add", "nightly", "--image", &reference, "--cron", "0 3 * * *"]).unwrap();
    site.coordinator().kill9().unwrap();
    site.coordinator().restart().unwrap();
    let job = site.wait_for_job(&reference, &["published"], TIMEOUT).unwrap();
    assert_eq!(job["id"], 1, "{job}");
    assert!(site.ctl().ok(&["schedule", "list"]).unwrap().contains("nightly"));
    assert!(token["token"].is_string() && site.ctl().ok(&["token", "list"]).unwrap().contains("one"));
    let state = site.path().join("state");
    assert!(state.join("journal.fjall").read_dir().unwrap().count() > 0 && !state.join("journal").exists());
}

#[test]
fn of_two_coordinators_one_stands_by_and_takes_over() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let mut site = Site::start().unwrap();
    let reference = registry.push(&image, "small", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    let mut second = site.second().unwrap();
    let (leader, standby) = (site.ctl().json(&["status"]).unwrap(), second.ctl().json(&["status"]).unwrap());
    assert_eq!((&leader["role"], &standby["role"]), (&Value::from("leader"), &Value::from("standby")));
    assert_eq!(standby["leader"], leader["leader"]);
    assert_eq!(second.ctl().json(&["images"]).unwrap()["images"][0]["name"], Value::from(reference.as_str()));
    for arguments in [vec!["pull", &reference], vec!["remove", &reference]] {
        let refused = second.ctl().run(&arguments).unwrap();
        assert_eq!(refused.code, 1);
        assert!(refused.stderr.contains(leader["leader"].as_str().unwrap()), "{}", refused.stderr);
    }
    site.coordinator().kill9().unwrap();
    let leads = |ctl: &tests::cluster::Ctl| Ok(ctl.json(&["status"])?["role"] == "leader");
    wait_until("the other coordinator to lead", TIMEOUT, || leads(&second.ctl())).unwrap();
    let other = registry.push(&image, "other", "1").unwrap();
    second.ctl().ok(&["pull", &other]).unwrap();
    assert!(second.ctl().json(&["status"]).unwrap()["epoch"].as_u64() > leader["epoch"].as_u64());

    // The first coordinator comes back and stands by until the second one stops in an orderly way.
    site.coordinator().restart().unwrap();
    assert!(!leads(&site.ctl()).unwrap());
    assert_eq!(site.images().unwrap().len(), 2);
    assert!(second.stop().unwrap().success());
    wait_until("the return", TIMEOUT, || leads(&site.ctl())).unwrap();
    site.ctl().ok(&["remove", &other]).unwrap();
}

#[test]
fn a_moved_tag_remembers_where_it_pointed() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let site = Site::start().unwrap();
    let (old, new) = (small().unwrap(), noisy(directory.path(), "new", &[1], 1000).unwrap());
    let reference = registry.push(&old, "app", "stable").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    registry.push(&new, "app", "stable").unwrap();
    for _ in 0..2 {
        site.ctl().ok(&["pull", &reference]).unwrap();
    }
    let detail = site.ctl().json(&["image", &reference]).unwrap();
    let history: Vec<_> = detail["history"].as_array().unwrap().iter().map(|entry| entry["manifest"].clone()).collect();
    assert_eq!(history, [new.manifest.digest.clone(), old.manifest.digest.clone()]);
    assert_eq!(detail["config"], new.config.digest);
    assert!(site.ctl().ok(&["image", &reference]).unwrap().contains(&old.manifest.digest[..19]));
    assert_eq!(site.images().unwrap(), [reference]);
}

#[test]
fn jobs_are_cancelled_retried_and_waited_for() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let site = Site::start().unwrap();
    registry.push(&image, "small", "1").unwrap();
    let reference = faulty.reference("small", "1");
    let hanging = Match::Blob(image.layers[1].blob.digest.clone());
    faulty.inject(hanging.clone(), Fault::Hang(1000), 1);
    let mut pull = site.begin("pull", &["pull", &reference]).unwrap();
    faulty.wait_for(&hanging, 1, TIMEOUT).unwrap();
    let id = site.job(&reference).unwrap()["id"].to_string();
    let late = site.ctl().run(&["wait", &reference, "--timeout", "200ms"]).unwrap();
    assert_eq!(late.code, 1);
    assert!(late.stderr.contains(&reference) && late.stderr.contains("fetching"), "{}", late.stderr);

    site.ctl().ok(&["cancel", &id]).unwrap();
    assert_eq!(pull.wait(TIMEOUT).unwrap().code(), Some(1), "{}", pull.log());
    assert!(pull.log().contains("cancelled"), "{}", pull.log());
    assert_eq!(site.job(&reference).unwrap()["state"], "cancelled");
    wait_until("an empty staging", TIMEOUT, || Ok(site.staged()?.is_empty())).unwrap();
    assert_eq!(site.images().unwrap(), Vec::<String>::new());
    assert_eq!(site.ctl().run(&["cancel", &id]).unwrap().code, 1, "it has ended already");

    faulty.heal();
    let mut waiting = site.begin("wait", &["wait", &reference, "--timeout", "60s"]).unwrap();
    site.ctl().ok(&["retry", &id]).unwrap();
    assert!(waiting.wait(TIMEOUT).unwrap().success(), "{}", waiting.log());
    let job = site.wait_for_job(&reference, &["published"], TIMEOUT).unwrap();
    assert_eq!((job["id"].to_string(), &job["attempts"]), (id.clone(), &Value::from(2)));
    let refused = site.ctl().run(&["retry", &id]).unwrap();
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("published"), "{}", refused.stderr);
}

#[test]
fn a_stopped_coordinator_ends_at_once_and_goes_on_later() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let mut site = Site::start().unwrap();
    registry.push(&image, "small", "1").unwrap();
    let reference = faulty.reference("small", "1");
    faulty.inject(Match::Blobs, Fault::Hang(0), 9);
    site.ctl().ok(&["pull", "--detach", &reference]).unwrap();
    faulty.wait_for(&Match::Blobs, 1, TIMEOUT).unwrap();
    site.coordinator().process().signal(Signal::SIGTERM).unwrap();
    assert!(site.coordinator().process().wait(Duration::from_secs(20)).unwrap().success());
    assert_eq!(site.layers().unwrap(), Vec::<String>::new());
    faulty.heal();
    site.coordinator().restart().unwrap();
    site.ctl().ok(&["wait", &reference, "--timeout", "60s"]).unwrap();
}

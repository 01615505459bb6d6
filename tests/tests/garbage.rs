//! Garbage collection with real registries, coordinators and mounted hosts. Removed content goes when its grace is over
//! and not before, content that is still needed reads byte for byte, and nobody waits.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::cluster::{Coordinator, Ctl, Mount, MountSpec};
use tests::hosts::{host, mount};
use tests::http::request;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Layer, Pools, digest_of_reader, oddities};
use tests::process::{TIMEOUT, run, wait_until};
use tests::registry::{Registry, free_port};
use tests::site::{Site, SiteSpec, coordinator_spec};

/// Bytes of each file of a test layer: more than one piece.
const SIZE: usize = 300_000;

/// A setting of the coordinators.
const LEASE: &str = "host_lease = '2s'\n";

/// A layer of files with noise, each given as name and seed.
fn layer(pools: &Pools, files: &[(&str, u64)]) -> Result<Layer> {
    let mut tar = Archive::new(Vec::new());
    for (name, seed) in files {
        tar.add(&Header::new(Kind::File, *name), oddities::noise(*seed, SIZE))?;
    }
    pools.layer(&tar.finish()?, Compression::Gzip)
}

/// A registry, a site, and a place to make images.
struct Stand {
    registry: Registry,
    site: Site,
    pools: Pools,
    work: tempfile::TempDir,
}

/// An image in the registry.
struct Pushed {
    reference: String,
    image: ImageFiles,
}

impl Pushed {
    fn layer(&self, number: usize) -> String {
        self.image.diff_ids()[number].clone()
    }
}

impl Stand {
    /// Starts a site with short host leases, so that all hosts are known soon.
    fn start(spec: &SiteSpec) -> Result<Stand> {
        let spec = &SiteSpec { settings: format!("{LEASE}{}", spec.settings), ..spec.clone() };
        let work = tempfile::tempdir()?;
        let pools = Pools::open(work.path())?;
        Ok(Stand { registry: Registry::start()?, site: Site::start_with(spec)?, pools, work })
    }

    /// Pushes an image with these layers.
    fn push(&self, name: &str, tag: &str, layers: &[&[(&str, u64)]]) -> Result<Pushed> {
        let mut builder = ImageBuilder::new(name);
        for files in layers {
            builder = builder.layer(layer(&self.pools, files)?);
        }
        let image = builder.build(&self.pools, &self.work.path().join(format!("{name}-{tag}")))?;
        let reference = self.registry.push(&image, name, tag)?;
        Ok(Pushed { reference, image })
    }

    /// Pushes an image and pulls it.
    fn pull(&self, name: &str, tag: &str, layers: &[&[(&str, u64)]]) -> Result<Pushed> {
        let pushed = self.push(name, tag, layers)?;
        self.site.ctl().ok(&["pull", &pushed.reference])?;
        Ok(pushed)
    }

    /// Runs one collection and returns its report.
    fn collect(&self, grace: &str) -> Result<Value> {
        self.wait_for_hosts(&self.site.ctl())?;
        let report = self.site.ctl().json(&["gc", "--grace", grace])?;
        ensure!(report["failures"] == json!([]), "{report}");
        Ok(report)
    }

    /// Waits until the coordinator has led for the duration of a host's lease, and therefore knows all hosts.
    fn wait_for_hosts(&self, ctl: &Ctl) -> Result<()> {
        wait_until("all hosts to be known", TIMEOUT, || Ok(ctl.json(&["gc", "--dry-run"])?["waiting"].is_null()))
    }

    fn plan(&self, arguments: &[&str]) -> Result<Value> {
        self.site.ctl().json(&[&["gc", "--dry-run"], arguments].concat())
    }

    /// Exports an image and compares each layer's digest.
    fn check(&self, pushed: &Pushed) -> Result<()> {
        let directory = tempfile::tempdir()?;
        let archive = directory.path().join("export.tar");
        self.site.ctl().ok(&["export", &pushed.reference, &archive.to_string_lossy()])?;
        run(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(directory.path()))?.ok()?;
        let manifest: Value = serde_json::from_slice(&std::fs::read(directory.path().join("manifest.json"))?)?;
        let layers = manifest[0]["Layers"].as_array().context("no layers")?;
        let open = |name: &Value| std::fs::File::open(directory.path().join(name.as_str().unwrap_or("")));
        let found = layers.iter().map(|name| Ok(digest_of_reader(open(name)?)?)).collect::<Result<Vec<_>>>()?;
        ensure!(found == pushed.image.diff_ids(), "the layers of {} are {found:?}", pushed.reference);
        Ok(())
    }

    /// All packs, with the bytes that they occupy on the disk.
    fn packs(&self) -> Result<Vec<(PathBuf, u64)>> {
        let mut packs = Vec::new();
        for directory in std::fs::read_dir(self.site.store().join("packs"))? {
            for entry in std::fs::read_dir(directory?.path())? {
                let entry = entry?;
                if entry.path().extension().is_none() {
                    packs.push((entry.path(), entry.metadata()?.blocks() * 512));
                }
            }
        }
        Ok(packs)
    }

    fn room(&self) -> Result<u64> {
        Ok(self.packs()?.iter().map(|(_, room)| room).sum())
    }
}

/// Reads a file of a layer through a host's mount and compares its content.
fn check_file(host: &Mount, layer: &str, name: &str, seed: u64) -> Result<()> {
    let path = host.layer(layer).join(name);
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(bytes == oddities::noise(seed, SIZE), "{} has other bytes", path.display());
    Ok(())
}

fn kinds(document: &Value) -> Vec<String> {
    let items = document["items"].as_array().cloned().unwrap_or_default();
    let mut kinds: Vec<_> = items.iter().map(|item| item["kind"].as_str().unwrap_or("").to_owned()).collect();
    kinds.sort();
    kinds
}

#[test]
fn what_was_removed_goes_after_its_grace_and_shared_layers_stay() {
    let stand = Stand::start(&SiteSpec::default()).unwrap();
    let base: &[(&str, u64)] = &[("base", 1)];
    let keep = stand.pull("keep", "1", &[base, &[("k", 2)]]).unwrap();
    let gone = stand.pull("gone", "1", &[base, &[("g", 3)]]).unwrap();
    let host = mount(&stand.site, "a").unwrap();
    check_file(&host, &keep.layer(0), "base", 1).unwrap();
    stand.site.ctl().ok(&["remove", &gone.reference]).unwrap();
    // Files that do not belong to the store must not disturb a collection.
    for stray in ["packs/.DS_Store", "blobs/README.txt"] {
        std::fs::write(stand.site.store().join(stray), b"x").unwrap();
    }

    let plan = stand.plan(&[]).unwrap();
    assert_eq!(kinds(&plan), ["blob", "blob", "layer", "pack"], "{plan}");
    for item in plan["items"].as_array().unwrap() {
        assert!(item["due"].as_str() > plan["at"].as_str() && item["reason"]["why"] == "unreferenced", "{item}");
    }
    let text = stand.site.ctl().ok(&["gc", "--dry-run"]).unwrap();
    assert!(text.contains("nothing refers to it") && text.contains("in 24 h") && text.contains("Freed:"), "{text}");

    let report = stand.collect("24h").unwrap();
    assert_eq!((kinds(&report).len(), report["marked"].as_u64()), (0, Some(4)), "{report}");
    assert!(stand.site.has_layer(&gone.layer(1)).unwrap());

    let report = stand.collect("0s").unwrap();
    assert_eq!(kinds(&report), ["blob", "blob", "layer", "pack"], "{report}");
    assert!(report["freed_bytes"].as_u64() > Some(SIZE as u64), "{report}");
    assert!(!stand.site.has_layer(&gone.layer(1)).unwrap() && stand.site.has_layer(&gone.layer(0)).unwrap());
    stand.check(&keep).unwrap();
    check_file(&host, &keep.layer(1), "k", 2).unwrap();
    assert_eq!(stand.plan(&["--grace", "0s"]).unwrap()["items"], json!([]));
    assert!(stand.site.ctl().ok(&["gc", "--dry-run"]).unwrap().contains("nothing to collect"));

    // The removed image can be pulled again completely.
    stand.site.ctl().ok(&["pull", &gone.reference]).unwrap();
    stand.check(&gone).unwrap();
    check_file(&host, &gone.layer(1), "g", 3).unwrap();
}

#[test]
fn layers_that_share_a_pack_read_on_when_the_pack_is_thinned() {
    let stand = Stand::start(&SiteSpec::default()).unwrap();
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let big: Vec<(&str, u64)> = names.into_iter().zip(1..).collect();
    let first = stand.pull("first", "1", &[&big]).unwrap();
    let second = stand.pull("second", "1", &[&[("own", 50), ("copy of c", 3)]]).unwrap();
    // One host opens the pack before it is thinned, the other one later. Neither holds layers, because they know no coordinator.
    let alone = |name: &str| Mount::start(MountSpec { coordinator: None, ..host(&stand.site, name).unwrap() }).unwrap();
    let early = alone("early");
    check_file(&early, &first.layer(0), "a", 1).unwrap();
    let before = stand.room().unwrap();
    stand.site.ctl().ok(&["remove", &first.reference]).unwrap();
    let report = stand.collect("0s").unwrap();
    assert_eq!(kinds(&report), ["blob", "blob", "layer", "pack_part"], "{report}");
    let after = stand.room().unwrap();
    assert!(before > 2_600_000 && after < 800_000, "{before} bytes of packs became {after}");

    stand.check(&second).unwrap();
    let late = alone("late");
    for host in [&early, &late] {
        check_file(host, &second.layer(0), "copy of c", 3).unwrap();
        check_file(host, &second.layer(0), "own", 50).unwrap();
    }
    assert_eq!(kinds(&stand.collect("0s").unwrap()).len(), 0, "it is as thin as it should be");

    // The dropped pieces come back with another layer, and with the first one itself.
    let third = stand.pull("third", "1", &[&[("again a", 1), ("again c", 3)]]).unwrap();
    stand.site.ctl().ok(&["pull", &first.reference]).unwrap();
    for image in [&first, &second, &third] {
        stand.check(image).unwrap();
    }
    for (name, seed) in &big {
        check_file(&early, &first.layer(0), name, *seed).unwrap();
    }
    check_file(&late, &third.layer(0), "again a", 1).unwrap();
}

#[test]
fn what_a_host_uses_stays_until_it_unmounts() {
    let stand = Stand::start(&SiteSpec::default()).unwrap();
    let image = stand.pull("used", "1", &[&[("base", 1)], &[("top", 2)]]).unwrap();
    let mut user = mount(&stand.site, "user").unwrap();
    let open: Vec<_> = [(0, "base"), (1, "top")]
        .map(|(number, name)| std::fs::File::open(user.layer(&image.layer(number)).join(name)).unwrap())
        .into();
    let held = || -> Result<usize> {
        let list = stand.site.ctl().json(&["hosts"])?;
        Ok(list["hosts"][0]["layers"].as_array().map_or(0, Vec::len))
    };
    wait_until("both layers to be held", TIMEOUT, || Ok(held()? == 2)).unwrap();
    stand.site.ctl().ok(&["remove", &image.reference]).unwrap();
    let report = stand.collect("0s").unwrap();
    assert_eq!(kinds(&report), ["blob", "blob"], "{report}");
    drop(open);
    check_file(&user, &image.layer(0), "base", 1).unwrap();
    check_file(&user, &image.layer(1), "top", 2).unwrap();
    user.stop().unwrap();
    wait_until("the layers to be let go of", TIMEOUT, || Ok(held()? == 0)).unwrap();
    let report = stand.collect("0s").unwrap();
    assert_eq!(kinds(&report), ["layer", "layer", "pack", "pack"], "{report}");
    assert_eq!(stand.room().unwrap(), 0);
}

#[test]
fn pulls_and_collections_run_beside_each_other() {
    let stand = Stand::start(&SiteSpec { settings: "parallel_jobs = 4".into(), ..SiteSpec::default() }).unwrap();
    // Each image has a file that no other image has, and files that it shares with others, so that layers come and go and share pieces.
    let images: Vec<Pushed> = (0..6u64)
        .map(|n| {
            let own = [("own", 100 + n), ("shared piece", 7 + n % 3)];
            stand.push(&format!("churn{n}"), "1", &[&[("base", n % 2)], &own]).unwrap()
        })
        .collect();
    std::thread::scope(|scope| {
        let collecting = scope.spawn(|| {
            let mut collected = 0;
            while stand.site.job(&images[5].reference).is_err() || collected < 5 {
                stand.collect("0s").unwrap();
                collected += 1;
            }
            collected
        });
        for round in 0..3 {
            for image in &images {
                stand.site.ctl().ok(&["pull", &image.reference]).unwrap();
                if round < 2 {
                    stand.site.ctl().ok(&["remove", &image.reference]).unwrap();
                }
            }
        }
        assert!(collecting.join().unwrap() >= 5);
    });
    let host = mount(&stand.site, "a").unwrap();
    for (n, image) in (0..).zip(&images) {
        stand.check(image).unwrap();
        check_file(&host, &image.layer(1), "own", 100 + n).unwrap();
        check_file(&host, &image.layer(1), "shared piece", 7 + n % 3).unwrap();
    }
    stand.collect("0s").unwrap();
    images.iter().for_each(|image| stand.check(image).unwrap());
}

#[test]
fn pins_outlive_the_database_and_guard_against_rules_and_people() {
    let address = format!("127.0.0.1:{}", free_port().unwrap());
    let mut stand = Stand::start(&SiteSpec { listen: Some(address.clone()), ..SiteSpec::default() }).unwrap();
    let images: Vec<Pushed> = (1..4u64).map(|n| stand.pull("app", &format!("v{n}"), &[&[("f", n)]]).unwrap()).collect();
    let pinned = &images[0].reference;
    let said = stand.site.ctl().ok(&["pin", pinned]).unwrap();
    assert_eq!(said.trim_end(), format!("pinned {pinned}"));
    let early = format!("{}/later:v1", stand.registry.address());
    assert!(stand.site.ctl().ok(&["pin", &early]).unwrap().contains("not in the store yet"));
    let refused = stand.site.ctl().run(&["remove", pinned]).unwrap();
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("is pinned: unpin it first, or remove it with --force"), "{}", refused.stderr);

    // The database is lost, but pins are in the store.
    stand.site.coordinator().kill9().unwrap();
    std::fs::remove_dir_all(stand.site.path().join("state")).unwrap();
    stand.site.coordinator().restart().unwrap();
    let list = stand.site.ctl().json(&["images"]).unwrap();
    let is_pinned = |image: &Value| image["pinned"] == json!(true);
    let found: Vec<_> = list["images"].as_array().unwrap().iter().filter(|image| is_pinned(image)).collect();
    assert_eq!((found.len(), found[0]["name"].as_str()), (1, Some(pinned.as_str())), "{list}");

    // The rule keeps one image of each repository, so the pinned one and the last one stay.
    let policy = json!({"rules": [{"pattern": "**", "keep_last": 1}], "collect": {"grace_seconds": 0}}).to_string();
    let put = |body: &str| {
        let json = [("Content-Type", "application/json")];
        request(&address, "PUT", "/v1/retention", &json, body.len() as u64, body.as_bytes()).unwrap()
    };
    assert_eq!(put(r#"{"rules": [{"pattern": "["}]}"#).status, 400);
    assert_eq!(put(&policy).status, 200);
    let shown = stand.site.ctl().ok(&["retention"]).unwrap();
    assert!(shown.contains("KEEP LAST") && shown.contains("**"), "{shown}");
    stand.wait_for_hosts(&stand.site.ctl()).unwrap();
    let report = stand.site.ctl().json(&["gc"]).unwrap();
    let gone: Vec<_> = report["items"].as_array().unwrap().iter().filter(|item| item["kind"] == "image").collect();
    assert_eq!((gone.len(), gone[0]["name"].as_str()), (1, Some(images[1].reference.as_str())), "{report}");
    assert!(!stand.site.has_layer(&images[1].layer(0)).unwrap(), "without a grace its layer goes at once");
    stand.check(&images[0]).unwrap();
    stand.check(&images[2]).unwrap();

    stand.site.ctl().ok(&["unpin", &early]).unwrap();
    assert_eq!(stand.site.ctl().run(&["unpin", &early]).unwrap().code, 1);
    stand.site.ctl().ok(&["remove", "--force", pinned]).unwrap();
    assert_eq!(stand.site.ctl().json(&["pins"]).unwrap()["pins"], json!([]));
}

#[test]
fn a_coordinator_that_takes_over_finishes_what_was_begun() {
    let mut stand = Stand::start(&SiteSpec::default()).unwrap();
    let gone = stand.pull("gone", "1", &[&[("g", 1)]]).unwrap();
    let keep = stand.pull("keep", "1", &[&[("k", 2), ("copy", 1)]]).unwrap();
    stand.site.ctl().ok(&["remove", &gone.reference]).unwrap();
    // Unfinished work of the old leader, in its trash.
    let old_trash = stand.site.store().join("trash").join(format!("{:016x}", 1));
    assert!(old_trash.is_dir());
    std::fs::create_dir(old_trash.join("a layer")).unwrap();
    std::fs::write(old_trash.join("a layer/index"), b"x").unwrap();
    let settings = SiteSpec { settings: LEASE.to_owned(), ..SiteSpec::default() };
    let second = Coordinator::start(coordinator_spec(stand.site.path(), "second", &settings).unwrap()).unwrap();
    let refused = second.ctl().run(&["gc"]).unwrap();
    assert!(refused.code == 1 && refused.stderr.contains("stands by"), "{}", refused.stderr);
    stand.site.coordinator().kill9().unwrap();
    wait_until("the second coordinator to lead", TIMEOUT, || Ok(second.ctl().json(&["status"])?["role"] == "leader"))
        .unwrap();
    assert!(!old_trash.exists(), "the old leader can delete nothing any more");
    stand.wait_for_hosts(&second.ctl()).unwrap();
    let report = second.ctl().json(&["gc", "--grace", "0s"]).unwrap();
    assert!(kinds(&report).contains(&"layer".to_owned()), "{report}");
    assert!(!stand.site.has_layer(&gone.layer(0)).unwrap());
    assert_trash_is_empty(&stand.site.store());
    let host = mount(&stand.site, "a").unwrap();
    check_file(&host, &keep.layer(0), "copy", 1).unwrap();
}

fn assert_trash_is_empty(store: &Path) {
    let left = |directory: &Path| -> std::io::Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(directory)?.map(|entry| Ok(entry?.path()));
        entries.collect()
    };
    let epochs = left(&store.join("trash")).expect("the store has a trash");
    let all: Vec<_> = epochs.iter().flat_map(|epoch| left(epoch).expect("an epoch's trash is a directory")).collect();
    assert_eq!(all, Vec::<PathBuf>::new());
}

#[test]
fn collections_run_by_themselves_when_the_settings_say_so() {
    let address = format!("127.0.0.1:{}", free_port().unwrap());
    let stand = Stand::start(&SiteSpec { listen: Some(address.clone()), ..SiteSpec::default() }).unwrap();
    let gone = stand.pull("gone", "1", &[&[("g", 1)]]).unwrap();
    stand.site.ctl().ok(&["remove", &gone.reference]).unwrap();
    let policy = json!({"collect": {"every_seconds": 1, "grace_seconds": 0}}).to_string();
    let json = [("Content-Type", "application/json")];
    let put = request(&address, "PUT", "/v1/retention", &json, policy.len() as u64, policy.as_bytes()).unwrap();
    assert_eq!(put.status, 200);
    wait_until("the layer to be collected", TIMEOUT, || Ok(!stand.site.has_layer(&gone.layer(0))?)).unwrap();
}

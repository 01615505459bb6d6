//! Learned prefetching from end to end: a start on one host speeds up the start on the next.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tests::cluster::{Ctl, Mount, MountSpec, binary};
use tests::hosts;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{ImageFiles, image, small};
use tests::mounts::Overlay;
use tests::process::{TIMEOUT, run, wait_until};
use tests::site::{Site, SiteSpec};
use tests::slowdisk::SlowDisk;

const IMPORTS: [&str; 3] = ["/usr/bin/python3", "-c", "import json, ssl, sqlite3, asyncio; print('imported')"];

/// The path of an image's merged tree in a mount.
fn lower(mount: &Mount, image: &ImageFiles) -> PathBuf {
    mount.chain(image.chain_ids().last().map_or("", String::as_str))
}

/// Runs a command in a container's root.
fn chroot(root: &Path, command: &[&str]) -> Result<String> {
    run(Command::new("chroot").arg(root).args(command))?.ok()
}

/// Starts Python on a host with an empty cache, and returns the start's record from `cachefs why`.
fn start_python(host: &MountSpec, image: &ImageFiles) -> Result<Value> {
    let mount = Mount::start(host.clone())?;
    {
        let root = Overlay::mount(&[lower(&mount, image)])?;
        assert_eq!(chroot(&root.root(), &IMPORTS)?, "imported");
    }
    let mut starts = Value::Null;
    wait_until("the start is over", TIMEOUT, || {
        starts = why(host)?;
        Ok(starts.as_array().is_some_and(|starts| !starts.is_empty()))
    })?;
    Ok(starts[0].clone())
}

/// A host with a shared disk as distant as in practice; on a disk that answers at once, the start would overtake
/// prefetching. Each host has its own client of the disk.
fn far_away(site: &Site, name: &str) -> Result<(MountSpec, SlowDisk)> {
    let mountpoint = site.path().join(format!("disk-of-{name}"));
    let disk = SlowDisk::start(&site.store(), &mountpoint, Duration::from_millis(5), Some(100 << 20))?;
    Ok((MountSpec { store: disk.path().to_owned(), ..hosts::host(site, name)? }, disk))
}

fn cachefs(host: &MountSpec, arguments: &[&str]) -> Result<tests::process::Output> {
    run(Command::new(binary("cachefs")?).args(arguments).arg("--mount").arg(&host.mountpoint))
}

fn why(host: &MountSpec) -> Result<Value> {
    let text = cachefs(host, &["why", "--json"])?.ok()?;
    Ok(serde_json::from_str::<Value>(&text)?["starts"].clone())
}

fn bytes(start: &Value, name: &str) -> Result<f64> {
    start["outcome"][name].as_f64().with_context(|| format!("there is no {name} in {start}"))
}

fn profile(ctl: &Ctl, image: &str) -> Result<Value> {
    ctl.json(&["profile", image])
}

#[test]
fn a_start_on_one_host_teaches_the_next() -> Result<()> {
    let (site, python) = (Site::start()?, image("python3")?);
    hosts::load(&site, &python)?;
    let name = site.images()?.pop().context("no image")?;
    let (first, _first_disk) = far_away(&site, "first")?;
    let cold = start_python(&first, &python)?;
    assert_eq!(cold["profile"], Value::Null);
    assert!(bytes(&cold, "missed_bytes")? > 0.0 && bytes(&cold, "prefetched_bytes")? == 0.0, "{cold}");
    assert!(cold["images"][0].as_str().is_some_and(|found| name.ends_with(found) || found.ends_with(&name)), "{cold}");
    assert!(cold["waits"].as_array().is_some_and(|waits| waits.iter().all(|wait| wait["path"] != "?")), "{cold}");
    wait_until(
        "the profile is published",
        TIMEOUT,
        || Ok(profile(&site.ctl(), &name)?["published_at"] != Value::Null),
    )?;

    let (second, _second_disk) = far_away(&site, "second")?;
    let taught = start_python(&second, &python)?;
    let touched = bytes(&taught, "touched_bytes")?;
    let (prefetched, used) = (bytes(&taught, "prefetched_bytes")?, bytes(&taught, "prefetched_used_bytes")?);
    // Nine tenths and more on an idle machine. On a busy machine the start overtakes its pack, and what a miss fetches
    // in addition is not counted as prefetched.
    assert!(used / touched > 0.5, "recall: {taught}");
    // The bytes that a start requested by itself say little, because it requests what was not prefetched yet instead of
    // waiting for it. The time that it waited shows the effect: an eighth of the cold start's time, on a quiet machine.
    let waited = |start: &Value| start["waited_millis"].as_f64().context("no waiting");
    assert!(waited(&taught)? < waited(&cold)? / 2.0, "{taught} after {cold}");
    assert!(used / prefetched > 0.9, "precision: {taught}");
    wait_until("the second start is known", TIMEOUT, || {
        let profile = profile(&site.ctl(), &name)?;
        Ok(profile["starts"] == 2 && profile["recall"].as_f64().is_some_and(|recall| recall > 0.5))
    })
}

/// The next build of an image, with a changed module and a file more.
fn next_build(python: &ImageFiles, module: &Path, source: &[u8], directory: &Path) -> Result<ImageFiles> {
    let mut tar = Archive::new(Vec::new());
    tar.add(&Header::new(Kind::File, module.as_os_str().as_encoded_bytes()).mode(0o644).mtime(1, 0), source)?;
    tar.add(&Header::new(Kind::File, "release").mode(0o644), "2")?;
    python.next_build(&tar.finish()?, directory)
}

#[test]
fn a_new_build_starts_with_what_its_predecessor_needed() -> Result<()> {
    let (site, python) = (Site::start()?, image("python3")?);
    hosts::load(&site, &python)?;
    let name = site.images()?.pop().context("no image")?;
    let (first, _first_disk) = far_away(&site, "first")?;
    let cold = start_python(&first, &python)?;
    let known = || profile(&site.ctl(), &name);
    wait_until("the profile is published", TIMEOUT, || Ok(known()?["published_at"] != Value::Null))?;
    assert_eq!((&known()?["origin"], &known()?["inherited_from"]), (&json!("traced"), &Value::Null));

    let module = {
        let mount = Mount::start(first)?;
        let decoder = glob(&lower(&mount, &python), "usr/lib/python3.", "json/decoder.py")?;
        let changed = [&std::fs::read(lower(&mount, &python).join(&decoder))?[..], b"\n# of the next build\n"].concat();
        (decoder, changed)
    };
    let next = next_build(&python, &module.0, &module.1, &site.path().join("next"))?;
    hosts::load(&site, &next)?;
    wait_until("the profile is inherited", TIMEOUT, || Ok(known()?["published_at"] != Value::Null))?;
    let inherited = known()?;
    assert_eq!((&inherited["origin"], &inherited["starts"]), (&json!("inherited"), &json!(0)), "{inherited}");
    let (second, _second_disk) = far_away(&site, "second")?;
    let taught = start_python(&second, &next)?;
    assert_ne!(taught["profile"], Value::Null);
    let (prefetched, used) = (bytes(&taught, "prefetched_bytes")?, bytes(&taught, "prefetched_used_bytes")?);
    assert!(used / bytes(&taught, "touched_bytes")? > 0.5, "recall: {taught}");
    assert!(used / prefetched > 0.9, "precision: {taught}");
    let waited = |start: &Value| start["waited_millis"].as_f64().context("no waiting");
    assert!(waited(&taught)? < waited(&cold)? / 2.0, "{taught} after {cold}");
    wait_until("the start is known", TIMEOUT, || Ok(known()?["starts"] == 1))?;
    let (known, shown) = (known()?, site.ctl().ok(&["profile", &name])?);
    assert_eq!(known["origin"], "inherited");
    assert!(known["recent"][0]["recall"].as_f64().is_some_and(|recall| recall > 0.5), "{known}");
    assert!(shown.contains("and starts of its own") && shown.contains("PRECISION"), "{shown}");
    Ok(())
}

#[test]
fn an_image_that_nobody_has_started_is_guessed_at() -> Result<()> {
    let (site, python) = (Site::start_with(&SiteSpec { guesses: true, ..SiteSpec::default() })?, image("python3")?);
    hosts::load(&site, &python)?;
    let name = site.images()?.pop().context("no image")?;
    let known = || profile(&site.ctl(), &name);
    wait_until("the guess is published", TIMEOUT, || Ok(known()?["published_at"] != Value::Null))?;
    let guess = known()?;
    assert_eq!((&guess["origin"], &guess["starts"]), (&json!("guessed"), &json!(0)), "{guess}");
    assert!(site.ctl().ok(&["profile", &name])?.contains("a guess by what its command is"));
    let (host, _disk) = far_away(&site, "first")?;
    let first = start_python(&host, &python)?;
    let (prefetched, used) = (bytes(&first, "prefetched_bytes")?, bytes(&first, "prefetched_used_bytes")?);
    assert!(used / bytes(&first, "touched_bytes")? > 0.5, "recall: {first}");
    assert!(used / prefetched > 0.5, "precision: {first}");
    wait_until("the start is known", TIMEOUT, || Ok(known()?["starts"] == 1))?;
    let traced = known()?;
    assert_eq!(traced["origin"], "traced", "the first trace replaces the guess");
    assert!(traced["recent"][0]["precision"].as_f64().is_some_and(|precision| precision > 0.5), "{traced}");
    Ok(())
}

/// The one path below `root` that begins with `start` and ends with `/` and `end`, relative to `root`.
fn glob(root: &Path, start: &str, end: &str) -> Result<PathBuf> {
    let start = Path::new(start);
    let (parent, prefix) = (start.parent().context("no parent")?, start.file_name().context("no name")?);
    for entry in std::fs::read_dir(root.join(parent))? {
        let path = parent.join(entry?.file_name()).join(end);
        let begins = path.strip_prefix(parent)?.to_string_lossy().starts_with(&*prefix.to_string_lossy());
        if begins && root.join(&path).exists() {
            return Ok(path);
        }
    }
    bail!("nothing below {} begins with {} and ends with {end}", root.display(), start.display())
}

/// SEMANTICS: "What an image's first start on a host reads is told to the coordinator,"
#[test]
fn traces_wait_for_a_coordinator_that_is_away() -> Result<()> {
    let (mut site, image) = (Site::start()?, small()?);
    hosts::load(&site, &image)?;
    let name = site.images()?.pop().context("no image")?;
    let host = hosts::host(&site, "alone")?;
    let spool = host.cache.join("traces");
    let traces = || std::fs::read_dir(&spool).map_or(0, |entries| entries.flatten().count());
    site.coordinator().kill9()?;
    let mount = Mount::start(host)?;
    std::fs::read(lower(&mount, &image).join("bin/busybox"))?;
    wait_until("the start is traced", TIMEOUT, || Ok(traces() == 1))?;
    site.coordinator().restart()?;
    wait_until("the trace is delivered", TIMEOUT * 3, || Ok(traces() == 0))?;
    wait_until("the profile is there", TIMEOUT, || Ok(profile(&site.ctl(), &name)?["published_at"] != Value::Null))
}

#[test]
fn a_whole_image_is_brought_before_it_starts() -> Result<()> {
    let (site, python) = (Site::start()?, image("python3")?);
    hosts::load(&site, &python)?;
    let name = site.images()?.pop().context("no image")?;
    let host = hosts::host(&site, "eager")?;
    let mount = Mount::start(host.clone())?;
    assert!(cachefs(&host, &["prefetch", &name])?.ok()?.contains("is in the local cache"));
    assert_eq!(hosts::counter(&host, "reads_missed")?, 0);
    assert!(hosts::counter(&host, "chunks_fetched")? > 100, "what it says is here now, not soon");
    assert!(hosts::status(&host)?["cache_used"].as_u64() > Some(50 << 20));
    let root = Overlay::mount(&[lower(&mount, &python)])?;
    assert_eq!(chroot(&root.root(), &IMPORTS)?, "imported");
    assert_eq!(hosts::counter(&host, "reads_missed")?, 0, "nothing waits for the shared disk");
    let unknown = cachefs(&host, &["prefetch", "no/such:image"])?;
    assert!(unknown.stderr.contains("image no/such:image is not in the store"), "{}", unknown.stderr);
    Ok(())
}

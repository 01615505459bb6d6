//! Every kind of object in the store, damaged in every way, while the coordinator runs and while it is down. The damage
//! is found and named, and a repair or the suggested way out makes the store whole again, also for a new host.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tests::cluster::{Coordinator, Ctl, Mount, MountSpec};
use tests::images::{ImageFiles, small};
use tests::process::{TIMEOUT, wait_until};
use tests::registry::Registry;
use tests::site::{Site, run_to_end};

/// How long a coordinator may take to become leader.
const LONG: Duration = Duration::from_secs(120);

/// The kinds of objects in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Superblock,
    SuperblockCopy,
    Reserve,
    Snapshot,
    Generation,
    Lease,
    Beat,
    Handover,
    Manifest,
    Index,
    Recipe,
    Pack,
}

/// The ways to damage a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    Flip,
    Truncate,
    Delete,
    Empty,
    Older,
}

/// Whether the coordinator runs when the damage happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leader {
    Up,
    Down,
}

const KINDS: [Kind; 12] = [
    Kind::Superblock,
    Kind::SuperblockCopy,
    Kind::Reserve,
    Kind::Snapshot,
    Kind::Generation,
    Kind::Lease,
    Kind::Beat,
    Kind::Handover,
    Kind::Manifest,
    Kind::Index,
    Kind::Recipe,
    Kind::Pack,
];
const DAMAGES: [Damage; 5] = [Damage::Flip, Damage::Truncate, Damage::Delete, Damage::Empty, Damage::Older];

/// A registry, and a store with one image and its coordinator.
struct Stand {
    registry: Registry,
    site: Site,
    image: ImageFiles,
    reference: String,
}

impl Stand {
    fn start() -> Result<Stand> {
        let (registry, site, image) = (Registry::start()?, Site::start()?, small()?);
        let reference = registry.push(&image, "small", "1")?;
        let ctl = site.ctl();
        ctl.ok(&["pull", &reference])?;
        ctl.ok(&["schedule", "add", "nightly", "--image", &reference, "--cron", "0 3 * * *"])?;
        Ok(Stand { registry, site, image, reference })
    }

    /// A file of this kind that readers or the leader currently rely on.
    fn file(&self, kind: Kind) -> Result<PathBuf> {
        let numbered = |directory: &str, suffix: &str| -> Result<Vec<PathBuf>> {
            let mut files = self.site.files(directory)?;
            let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.len() == 16 + suffix.len());
            files.retain(|path| named(path) && path.to_string_lossy().ends_with(suffix));
            Ok(files)
        };
        let store = self.site.store();
        let found = match kind {
            Kind::Superblock => Some(store.join("cachefs-store")),
            Kind::SuperblockCopy => Some(store.join("cachefs-store.copy")),
            Kind::Reserve => Some(store.join("reserve")),
            Kind::Generation => numbered("catalogue", "")?.pop(),
            Kind::Snapshot => {
                let newest = numbered("catalogue", "")?.pop().context("no generation")?;
                let text = fs::read_to_string(newest)?;
                let json: Value = serde_json::from_str(text.split_once('\n').context("one line")?.1)?;
                Some(store.join(format!("catalogue/{:016x}", json["snapshot"].as_u64().context("no snapshot")?)))
            }
            Kind::Lease => numbered("lease", "")?.pop(),
            Kind::Beat => numbered("lease", ".beat")?.pop(),
            Kind::Handover => numbered("ledger", "")?.pop(),
            Kind::Manifest => {
                let detail = self.site.ctl().json(&["image", &self.reference])?;
                let hex = detail["manifest"].as_str().context("no manifest")?.trim_start_matches("sha256:").to_owned();
                Some(store.join(format!("blobs/{}/{hex}", &hex[..2])))
            }
            Kind::Index => self.site.files("layers")?.into_iter().find(|path| path.ends_with("index")),
            Kind::Recipe => self.site.files("layers")?.into_iter().find(|path| path.ends_with("tar")),
            Kind::Pack => {
                self.site.files("packs")?.into_iter().max_by_key(|path| path.metadata().map_or(0, |m| m.len()))
            }
        };
        found.with_context(|| format!("there is no {kind:?}"))
    }

    /// Makes changes, so that a copy of a file made before is outdated.
    fn go_on(&self, turn: usize) -> Result<()> {
        let ctl = self.site.ctl();
        ctl.ok(&["schedule", "add", &format!("later-{turn}"), "--image", &self.reference, "--every", "5h"])?;
        ctl.ok(&["pin", &format!("r.io/app:{turn}")]).map(drop)
    }

    /// Checks that the store is whole after the repair: a deep check passes, the schedule exists, and a new host sees and reads the image.
    fn is_whole(&mut self, name: &str) -> Result<()> {
        let ctl = self.site.ctl();
        let check = ctl.run(&["--json", "fsck", "--deep"])?;
        ensure!(check.code == 0, "not whole: {}{}", check.stdout, check.stderr);
        ensure!(ctl.ok(&["schedule", "list"])?.contains("nightly"), "the schedule is gone");
        let host = Mount::start(MountSpec::new(&self.site.path().join(name), &self.site.store()))?;
        for layer in &self.image.layers {
            let layer = host.layer(&layer.diff_id);
            read_all(&layer).with_context(|| format!("a new host cannot read {}", layer.display()))?;
        }
        let (_, image) = self.reference.split_once('/').context("no repository")?;
        let (repository, tag) = image.split_once(':').context("no tag")?;
        let registry = self.registry.address();
        let link = host.path().join("images").join(registry).join(repository).join(tag);
        ensure!(fs::symlink_metadata(&link).is_ok(), "a new host does not see {}", link.display());
        Ok(())
    }
}

fn read_all(path: &Path) -> Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            read_all(&entry.path())?;
        } else if entry.file_type()?.is_file() {
            fs::read(entry.path())?;
        }
    }
    Ok(())
}

fn damage(path: &Path, how: Damage, older: Option<&[u8]>) -> Result<()> {
    let bytes = fs::read(path)?;
    match how {
        Damage::Flip => {
            let mut bytes = bytes;
            let at = bytes.len() * 2 / 3;
            *bytes.get_mut(at).context("it is empty")? ^= 0x10;
            fs::write(path, bytes)?;
        }
        Damage::Truncate => fs::write(path, &bytes[..bytes.len() / 2])?,
        Damage::Delete => fs::remove_file(path)?,
        Damage::Empty => fs::write(path, b"")?,
        Damage::Older => fs::write(path, older.context("nothing older")?)?,
    }
    Ok(())
}

/// Whether a case is possible. Some files have no older copy that differs, or are rewritten all the time.
fn applies(kind: Kind, how: Damage) -> bool {
    match how {
        // Files that are named by their content or never change have no older copy.
        Damage::Older => matches!(kind, Kind::Handover | Kind::Generation),
        // A heartbeat has only a digit or two and is replaced every few seconds. Its value does not matter.
        Damage::Flip | Damage::Truncate => kind != Kind::Beat,
        Damage::Delete | Damage::Empty => true,
    }
}

/// Damage that a coordinator and its hosts need not notice: nothing reads these files except to see that they change or to remove them.
fn is_harmless(kind: Kind, how: Damage) -> bool {
    match kind {
        Kind::Reserve | Kind::Beat => true,
        // The file's name shows who leads. Its content matters only to the next leader.
        Kind::Lease => true,
        // For later readers, a generation that is gone completely was never committed.
        Kind::Generation => how == Damage::Delete,
        _ => false,
    }
}

/// How often a leader that checks its store has repaired a file by itself.
fn healed(ctl: &Ctl) -> Result<usize> {
    Ok(ctl.ok(&["events", "--limit", "1000"])?.matches("was written anew").count())
}

/// Repairs what is found, with the coordinator running. Everything that is not harmless must be found, or have been repaired by the leader,
/// which had repaired `before` files before the damage.
fn repair(ctl: &Ctl, kind: Kind, how: Damage, before: usize) -> Result<()> {
    let found = ctl.run(&["--json", "fsck", "--deep"])?;
    let check: Value = serde_json::from_str(&found.stdout).with_context(|| found.stderr.clone())?;
    let expected = match kind {
        Kind::Superblock | Kind::SuperblockCopy => "superblock",
        Kind::Snapshot | Kind::Generation => "generation",
        Kind::Handover => "handover log",
        Kind::Manifest => "blob",
        Kind::Index | Kind::Recipe => "layer",
        Kind::Pack => "pack",
        Kind::Reserve | Kind::Lease | Kind::Beat => "",
    };
    let findings = check["findings"].as_array().context("no findings")?;
    if !is_harmless(kind, how) {
        let named = findings.iter().any(|finding| finding["kind"] == expected);
        if found.code != 1 || !named {
            // The leader says so after it has done it.
            wait_until("a repair by the leader", TIMEOUT, || Ok(healed(ctl)? > before))
                .with_context(|| format!("it is not found as {expected}: {check:#}"))?;
        }
    }
    ctl.ok(&["fsck", "--deep", "--repair"]).map(drop)
}

/// Runs one case. `turn` makes its names unique.
fn case(stand: &mut Stand, kind: Kind, how: Damage, leader: Leader, turn: usize) -> Result<()> {
    // An object that nothing depends on is written again after a while.
    wait_until("the object", LONG, || Ok(stand.file(kind).is_ok_and(|path| path.exists())))?;
    let old = fs::read(stand.file(kind)?)?;
    if how == Damage::Older {
        stand.go_on(turn)?;
    }
    let path = stand.file(kind)?;
    let before = healed(&stand.site.ctl())?;
    if leader == Leader::Down {
        stand.site.coordinator().kill9()?;
    }
    damage(&path, how, Some(&old))?;
    if leader == Leader::Down {
        start_again(stand, kind, how)?;
        let ctl = stand.site.ctl();
        // If the lease cannot be read, the coordinator first waits for it to end.
        wait_until("leading", LONG, || Ok(ctl.json(&["status"])?["role"] == "leader"))?;
        // A new leader writes some files anew, and repairs what it needs to start.
        let own = matches!(
            kind,
            Kind::Superblock | Kind::SuperblockCopy | Kind::Handover | Kind::Generation | Kind::Snapshot
        );
        if own || is_harmless(kind, how) {
            stand.site.ctl().ok(&["fsck", "--deep", "--repair", "--rebuild"]).map(drop)?
        } else {
            repair(&stand.site.ctl(), kind, how, before)?
        }
        // A tag that a salvaged catalogue could not contain is pulled again.
        if matches!(kind, Kind::Generation | Kind::Snapshot) {
            stand.site.ctl().ok(&["pull", &stand.reference])?;
        }
    } else {
        repair(&stand.site.ctl(), kind, how, before)?;
    }
    stand.is_whole(&format!("host-{turn}"))
}

/// Starts the coordinator. If it refuses, its error must name an option to salvage, which is then used.
fn start_again(stand: &mut Stand, kind: Kind, how: Damage) -> Result<()> {
    let spec = stand.site.coordinator().spec().clone();
    if stand.site.coordinator().restart().is_ok() {
        return Ok(());
    }
    let said = run_to_end("coordinator", &mut spec.command()?, TIMEOUT)?;
    let way = ["--salvage-catalogue", "--salvage-superblock"].into_iter().find(|way| said.stderr.contains(way));
    let Some(way) = way else { bail!("{kind:?} {how:?}: no way out is named: {}", said.stderr) };
    let mut once = spec.clone();
    once.arguments.push(way.to_owned());
    let mut salvager = Coordinator::start(once)?;
    salvager.stop()?;
    stand.site.coordinator().restart()
}

/// Runs all cases with the coordinator up or down. Each starts with a store that is whole.
fn all_cases(leader: Leader) -> Result<()> {
    let mut stand = Stand::start()?;
    let (mut turn, mut failed) = (0, Vec::new());
    for kind in KINDS {
        for how in DAMAGES.into_iter().filter(|how| applies(kind, *how)) {
            turn += 1;
            if let Err(error) = case(&mut stand, kind, how, leader, turn) {
                failed.push(format!("{kind:?} {how:?} {leader:?}: {error:#}"));
                stand = Stand::start()?;
            }
        }
    }
    ensure!(turn > 40, "only {turn} cases");
    ensure!(failed.is_empty(), "{} of {turn} cases:\n{}", failed.len(), failed.join("\n"));
    Ok(())
}

#[test]
fn whatever_is_damaged_while_somebody_leads_is_found_and_made_whole() {
    all_cases(Leader::Up).unwrap();
}

#[test]
fn whatever_is_damaged_while_nobody_leads_is_found_and_the_way_back_is_open() {
    all_cases(Leader::Down).unwrap();
}

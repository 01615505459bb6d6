//! Odd archives: this project must make of each one what `docker load` makes of it in its overlay2 directory, with
//! every attribute of every file, or both must refuse it.
//!
//! Hundreds of archives are generated (`generate`, the same on every run). Others come from public reports and real
//! tools (`fixed`). One dockerd loads all of them, many in one archive. The project's side is its real unpacking, read
//! back from the index, and a real mount for chains of several layers. `kept` has the intentional differences.

mod blocks;
mod engines;
mod fixed;
mod generate;
mod kept;
mod random;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tests::hosts;
use tests::images::{Compression, ImageBuilder, Pools};
use tests::mounts::Overlay;
use tests::process::run;
use tests::site::Site;
use tests::tree::{Ignore, Tree, diff, snapshot};

use engines::{Engine, Ours, Verdict};
use generate::Odd;
use kept::KEPT;
use random::Random;

/// The number of layers in one archive for Docker.
const TOGETHER: usize = 30;
/// The number of concurrent requests to Docker.
const AT_ONCE: usize = 3;
/// The number of images with several layers.
const CHAINS: usize = 40;

/// An archive and both results.
struct Tried {
    odd: Odd,
    ours: Verdict,
    docker: Verdict,
}

/// Tries archives. Those that the project accepts go to Docker in batches, because Docker most likely accepts them too.
fn try_all(engine: &Engine, ours: &Ours, odd: Vec<Odd>) -> Result<Vec<Tried>> {
    let mut taken = Vec::new();
    let mut refused = Vec::new();
    for odd in odd {
        let verdict = ours.unpack(&odd.tar).with_context(|| odd.what.clone())?;
        if matches!(verdict, Verdict::Made(_)) { taken.push((odd, verdict)) } else { refused.push((odd, verdict)) }
    }
    let mut batches: Vec<Vec<(Odd, Verdict)>> = Vec::new();
    for (list, together) in [(taken, TOGETHER), (refused, 1)] {
        let mut list = list.into_iter().peekable();
        while list.peek().is_some() {
            batches.push(list.by_ref().take(together).collect());
        }
    }
    let waiting = std::sync::Mutex::new(batches);
    let work = || -> Result<Vec<Tried>> {
        let mut tried = Vec::new();
        loop {
            let Some(batch) = waiting.lock().ok().and_then(|mut batches| batches.pop()) else { return Ok(tried) };
            let tars: Vec<&[u8]> = batch.iter().map(|(odd, _)| &odd.tar[..]).collect();
            let verdicts = engine.load(&tars)?;
            let both = batch.into_iter().zip(verdicts);
            tried.extend(both.map(|((odd, ours), docker)| Tried { odd, ours, docker }));
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        let parts: Result<Vec<Vec<Tried>>> =
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked"))).collect();
        let mut tried: Vec<Tried> = parts?.into_iter().flatten().collect();
        tried.sort_by(|one, other| one.odd.what.cmp(&other.odd.what));
        Ok(tried)
    })
}

/// The differences of an archive that no row of the table explains. Adds the rows that were needed to `needed`.
fn differences(tried: &Tried, began: i64, needed: &mut BTreeSet<usize>) -> Vec<String> {
    let (left, right) = match (&tried.ours, &tried.docker) {
        (Verdict::Refused(_), Verdict::Refused(_)) => return Vec::new(),
        (Verdict::Made(left), Verdict::Made(right)) => (left, right),
        (ours, docker) => {
            if let Some(row) = KEPT.iter().position(|row| (row.refusal)(ours, docker)) {
                needed.insert(row);
                return Vec::new();
            }
            let (who, why) = match (ours, docker) {
                (Verdict::Refused(why), _) => ("only here", why),
                (_, Verdict::Refused(why)) => ("only by Docker", why),
                _ => return Vec::new(),
            };
            return vec![format!("refused {who}: {why}")];
        }
    };
    let mut lines = diff(left, right, &untold(right, began));
    lines.retain(|line| {
        let row = KEPT.iter().position(|row| (row.line)(line));
        needed.extend(row);
        row.is_none()
    });
    lines
}

/// Ignores the times of entries that were created during the extraction, because no tar contains these.
fn untold(tree: &Tree, began: i64) -> Ignore {
    let new = tree.iter().filter(|(_, entry)| entry.mtime >= began);
    Ignore { mtime_of: new.map(|(path, _)| path.clone()).collect(), ..Ignore::default() }
}

#[test]
fn every_odd_archive_is_what_docker_makes_of_it() {
    let (engine, ours) = (Engine::start().unwrap(), Ours::new().unwrap());
    let mut odd = fixed::all().unwrap();
    odd.extend(generate::KINDS.into_iter().flat_map(generate::all));
    let tried = try_all(&engine, &ours, odd).unwrap();
    let (mut needed, mut wrong, mut agree, mut listed, mut both_refuse) = (BTreeSet::new(), Vec::new(), 0, 0, 0);
    for tried in &tried {
        let mut own = BTreeSet::new();
        let lines = differences(tried, engine.began, &mut own);
        match (lines.is_empty(), own.is_empty()) {
            (true, true) => agree += 1,
            (true, false) => listed += 1,
            (false, _) => wrong.push(format!("{}\n    {}", tried.odd.what, lines.join("\n    "))),
        }
        both_refuse += usize::from(matches!((&tried.ours, &tried.docker), (Verdict::Refused(_), Verdict::Refused(_))));
        needed.extend(own);
    }
    println!(
        "{} archives: {agree} agree ({both_refuse} are refused by both), {listed} differ as the table says, {} differ",
        tried.len(),
        wrong.len()
    );
    wrong.sort();
    assert!(wrong.is_empty(), "{} archives differ; left is ours:\n{}", wrong.len(), wrong.join("\n"));
    let idle: Vec<&str> =
        KEPT.iter().enumerate().filter(|(row, _)| !needed.contains(row)).map(|(_, row)| row.why).collect();
    assert!(idle.is_empty(), "no archive needs these rows any more: {idle:?}");
}

/// The layers of several images, chosen from the archives that both accept.
fn chains(tried: Vec<Tried>) -> Vec<Vec<Odd>> {
    let good: Vec<Odd> = tried
        .into_iter()
        .filter(|tried| matches!((&tried.ours, &tried.docker), (Verdict::Made(_), Verdict::Made(_))))
        .map(|tried| tried.odd)
        .collect();
    let mut random = Random::new(7);
    let mut layers = |count: usize| (0..count).map(|_| good[random.below(good.len())].clone()).collect();
    (0..CHAINS).map(|number| layers(2 + number % 3)).collect()
}

#[test]
fn chains_of_odd_layers_are_what_the_kernel_makes_of_dockers() {
    let (engine, ours) = (Engine::start().unwrap(), Ours::new().unwrap());
    let files = generate::KINDS.into_iter().filter(|(name, ..)| *name == "files").flat_map(generate::all);
    let tried = try_all(&engine, &ours, files.collect()).unwrap();
    let site = Site::start().unwrap();
    let mount = hosts::mount(&site, "one").unwrap();
    let mut wrong = Vec::new();
    for (number, layers) in chains(tried).into_iter().enumerate() {
        let lines = chain(&engine, &site, &mount, number, &layers).with_context(|| format!("chain {number}")).unwrap();
        if !lines.is_empty() {
            let layers: Vec<&str> = layers.iter().map(|layer| layer.what.as_str()).collect();
            wrong.push(format!("chain {number} of\n  {}\n    {}", layers.join("\n  "), lines.join("\n    ")));
        }
    }
    assert!(wrong.is_empty(), "{} of {CHAINS} chains differ; left is ours:\n{}", wrong.len(), wrong.join("\n"));
}

/// Loads one image on both sides and returns the differences of its merged trees, and of its single layers through the mount.
fn chain(
    engine: &Engine,
    site: &Site,
    mount: &tests::cluster::Mount,
    number: usize,
    layers: &[Odd],
) -> Result<Vec<String>> {
    let directory = tempfile::tempdir()?;
    let pools = Pools::open(directory.path())?;
    let mut builder = ImageBuilder::new(&format!("chain-{number}"));
    for layer in layers {
        builder = builder.layer(pools.layer(&layer.tar, Compression::None)?);
    }
    let image = builder.build(&pools, directory.path())?;
    site.ctl().ok(&["load", &image.oci.to_string_lossy()])?;
    engine.docker().load(&image)?;
    let extracted = engine.docker().extracted(&image)?;
    let mut lines = Vec::new();
    for (diff_id, extracted) in image.diff_ids().iter().zip(&extracted) {
        let docker = snapshot(extracted)?;
        lines.extend(diff(&snapshot(&mount.layer(diff_id))?, &docker, &untold(&docker, engine.began)));
    }
    let chain = image.chain_ids().pop().context("an image without layers")?;
    // The layers are copied, because other images share Docker's own directories.
    let copies: Vec<PathBuf> =
        (0..extracted.len()).map(|layer| directory.path().join(format!("copy-{layer}"))).collect();
    for (from, to) in extracted.iter().zip(&copies) {
        run(Command::new("cp").arg("-a").arg(from).arg(to))?.ok()?;
    }
    remove_vain_whiteouts(&copies)?;
    let docker = snapshot(&Overlay::mount(&copies)?.root())?;
    // A merged overlay counts hard links that its upper layers hide.
    let ignore = Ignore { nlink: true, ..untold(&docker, engine.began) };
    lines.extend(diff(&snapshot(&mount.chain(&chain))?, &docker, &ignore));
    lines.retain(|line| !KEPT.iter().any(|row| (row.line)(line)));
    Ok(lines)
}

/// Removes whiteouts in directories that only one layer has. The kernel lists their names in the overlay, although nothing is there.
fn remove_vain_whiteouts(layers: &[PathBuf]) -> Result<()> {
    let overlay = Overlay::mount(layers)?;
    let mut vain = Vec::new();
    let mut directories = vec![overlay.root()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let path = entry?.path();
            match std::fs::symlink_metadata(&path) {
                Ok(found) if found.is_dir() => directories.push(path),
                Ok(_) => {}
                Err(_) => vain.push(path.strip_prefix(overlay.root())?.to_owned()),
            }
        }
    }
    drop(overlay);
    for path in vain {
        let mut removed = 0;
        for layer in layers {
            removed += usize::from(std::fs::remove_file(layer.join(&path)).is_ok());
        }
        ensure!(removed > 0, "{} is listed, and no layer has it", path.display());
    }
    Ok(())
}

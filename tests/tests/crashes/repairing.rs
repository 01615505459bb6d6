//! The coordinator repairs a damaged pack, of an image that the registry still provides and of one that it does not.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use store::Digest;
use store::crash::CrashPoint;
use store::reader::Store;
use tests::images::small;
use tests::registry::{Fault, FaultyRegistry, Match, Registry};
use tests::site::{Site, SiteSpec};

use super::{deep_check, doom, work_until_death};

/// Flips a bit in one pack. Returns the pack's path and its new content.
fn damage(site: &Site) -> Result<(PathBuf, Vec<u8>)> {
    let pack = site.files("packs")?.into_iter().next().context("the store has no pack")?;
    let mut bytes = std::fs::read(&pack)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&pack, &bytes)?;
    Ok((pack, bytes))
}

/// Dies once during a repair from a registry that has the image.
pub(crate) fn die(registry: &Registry, point: CrashPoint, nth: u32) -> Result<bool> {
    let (image, mut site) = (small()?, Site::start()?);
    let reference = registry.push(&image, "small", "1")?;
    site.ctl().ok(&["pull", &reference])?;
    damage(&site)?;
    let mut doomed = doom(&mut site, point, nth)?;
    let died = work_until_death(&site, &mut doomed, &["fsck", "--deep", "--repair"], None)?;
    site.coordinator().restart()?;
    site.ctl().ok(&["fsck", "--deep", "--repair"]).context("the repair, once more")?;
    deep_check(&site)?;
    Ok(died)
}

/// Dies once during a repair from a registry that no longer delivers the image's blobs. The damaged pack is there
/// afterwards as before, and no layer is ever visible without its packs.
pub(crate) fn die_in_vain(registry: &Registry, point: CrashPoint, nth: u32) -> Result<bool> {
    let impatient = SiteSpec { settings: "retry_attempts = 1\n".to_owned(), ..SiteSpec::default() };
    let (image, mut site) = (small()?, Site::start_with(&impatient)?);
    let faulty = FaultyRegistry::start(&registry.address())?;
    registry.push(&image, "small", "1")?;
    site.ctl().ok(&["pull", &faulty.reference("small", "1")])?;
    for layer in &image.layers {
        faulty.inject(Match::Blob(layer.blob.digest.clone()), Fault::Status(404, Vec::new()), usize::MAX);
    }
    let layers = site.layers()?;
    let (pack, damaged) = damage(&site)?;
    let mut doomed = doom(&mut site, point, nth)?;
    let arguments = ["fsck", "--deep", "--repair"];
    let died = work_until_death(&site, &mut doomed, &arguments, Some("damaged object"))?;
    check_packs_of_layers(&site).context("after the crash")?;
    site.coordinator().restart()?;
    let check = site.ctl().run(&arguments)?;
    ensure!(check.code == 1 && check.stdout.contains("not repaired"), "{}{}", check.stdout, check.stderr);
    check_packs_of_layers(&site).context("after the repair")?;
    ensure!(site.layers()? == layers, "{:?} were there before", layers);
    ensure!(std::fs::read(&pack)? == damaged, "{} is another one", pack.display());
    ensure!(site.staged()?.is_empty(), "staging holds {:?}", site.staged()?);
    Ok(died)
}

/// Checks that every visible layer has its packs.
fn check_packs_of_layers(site: &Site) -> Result<()> {
    let store = Store::open(&site.store())?;
    for layer in site.layers()? {
        let index = store.index(&layer_digest(&layer)?)?;
        for number in 0..index.pack_count() {
            let pack = index.pack(number)?;
            ensure!(store.layout().pack(&pack).exists(), "layer {layer} lacks pack {pack}");
        }
    }
    Ok(())
}

fn layer_digest(hex: &str) -> Result<Digest> {
    Digest::from_hex(hex).with_context(|| format!("{hex} is no digest"))
}

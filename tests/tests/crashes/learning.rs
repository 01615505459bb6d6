//! The coordinator receives a host's trace of a start and builds a startup pack from it.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use store::ContentDigest;
use store::crash::CrashPoint;
use store::image::ImageRecord;
use store::reader::Store;
use store::trace::AccessTrace;
use tests::images::small;
use tests::process::{TIMEOUT, wait_until};
use tests::registry::{Registry, free_port};
use tests::site::{Site, SiteSpec};

use super::pulling::fetches;
use super::traces::{post, touches, trace};
use super::{LONG, deep_check, died, doom, tidy_check};

/// Dies once between the arrival of a trace and the publication of its startup pack.
pub(crate) fn die(registry: &Registry, point: CrashPoint, nth: u32) -> Result<bool> {
    let (image, address) = (small()?, format!("127.0.0.1:{}", free_port()?));
    let mut site = Site::start_with(&SiteSpec { listen: Some(address.clone()), ..SiteSpec::default() })?;
    let reference = registry.push(&image, "small", "1")?;
    site.ctl().ok(&["pull", &reference])?;
    let (fetched, store) = (fetches(registry, &image), Store::open(&site.store())?);
    let record = store.catalogue()?.images().next().context("no image")?.as_ref().clone();
    let packs = site.files("packs")?;
    let trace = trace(&record, "one", touches(&store, &record, 1)?);

    let mut doomed = doom(&mut site, point, nth)?;
    // There may be no answer.
    let _ = post(&address, &trace.encode()?);
    let published = || Ok::<_, anyhow::Error>(store.catalogue()?.startup(&trace.chain).is_some());
    wait_until("a startup pack or a death", LONG, || Ok(doomed.exited()?.is_some() || published()?))?;
    if doomed.exited()?.is_none() {
        doomed.terminate(TIMEOUT)?;
    }
    let died = died(&mut doomed)?;
    site.coordinator().restart()?;
    deep_check(&site).context("after the crash")?;
    // The coordinator kept the trace and needs no other trace to continue.
    wait_until("the startup pack", LONG, published)?;
    let starts = |answer: tests::http::Answer| Ok::<Value, anyhow::Error>(serde_json::from_slice(&answer.body)?);
    let starts = starts(post(&address, &trace.encode()?)?)?;
    ensure!(starts["starts"] == 1, "a host that had no answer sends its trace again, as no other start: {starts}");
    check_pack(&store, &record, &trace)?;
    wait_until("an empty staging", TIMEOUT, || Ok(site.staged()?.is_empty()))?;
    tidy_check(&site).context("with the startup pack")?;
    let now = site.files("packs")?.len();
    ensure!(now == packs.len() + 1, "{} packs became {now}", packs.len());
    ensure!(fetches(registry, &image) == fetched, "a startup pack is made of what is there");
    Ok(died)
}

/// Checks that the published pack contains everything traced, byte for byte.
fn check_pack(store: &Store, image: &ImageRecord, trace: &AccessTrace) -> Result<()> {
    let catalogue = store.catalogue()?;
    let table = store.startup_table(catalogue.startup(&trace.chain).context("no startup pack")?)?;
    ensure!(table.pieces.len() == trace.touches.len(), "{} pieces", table.pieces.len());
    for piece in &table.pieces {
        let index = store.index(&image.layers[usize::from(piece.key.layer)].diff_id)?;
        let expected = index.piece(&index.inode(piece.key.inode)?, piece.key.piece)?;
        let place = piece.place.context("in no chunk")?;
        let chunk = store.read_chunk(&table.chunks[place.chunk as usize])?;
        let bytes = chunk.piece(place.start, expected.len).context("outside its chunk")?;
        ensure!(ContentDigest::of(bytes) == expected.digest, "{piece:?} holds other bytes");
    }
    Ok(())
}

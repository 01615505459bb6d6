//! The fast check: every referenced object exists, and every small file matches its digest.
//!
//! Memory holds the objects' names and one layer's index at a time, however large the store is.

use std::collections::{BTreeSet, HashSet};

use coordinator_api::fsck::FsckPhase;
use store::catalogue::Catalogue;
use store::layer::LayerIndex;
use store::reader::Survey;
use store::{ContentDigest, Digest, Error};

use crate::admin::fsck::check;
use crate::admin::fsck::finding::Object;
use crate::admin::fsck::run::{Halt, Run};

/// What the fast check found out, for the later phases.
pub(super) struct SurveyResult {
    /// The catalogue that was checked.
    pub(super) catalogue: Catalogue,
    /// What is in the store.
    pub(super) survey: Survey,
    /// The packs, with their lengths in bytes.
    pub(super) packs: Vec<(ContentDigest, u64)>,
    /// Packs that layers or startup tables refer to.
    pub(super) used: HashSet<ContentDigest>,
}

pub(super) fn survey(run: &Run) -> Result<SurveyResult, Halt> {
    let catalogue = run.components.publisher.catalogue();
    check_catalogue(run)?;
    let survey = run.store().survey()?;
    check_blobs(run, &catalogue, &survey)?;
    let mut used = check_layers(run, &catalogue, &survey)?;
    check_startups(run, &catalogue, &mut used)?;
    let length = |pack: &ContentDigest| Some((*pack, run.store().pack_len(pack).ok()?));
    let packs = survey.packs.iter().filter_map(length).collect();
    let surveyed = SurveyResult { catalogue, survey, packs, used };
    count_orphans(run, &surveyed)?;
    Ok(surveyed)
}

fn check_catalogue(run: &Run) -> Result<(), Halt> {
    for (object, found) in [
        (Object::Superblock, check::superblock(run)),
        (Object::Modes, check::modes(run)),
        (Object::Handover, check::handover(run)?),
    ] {
        if let Err(error) = found {
            run.judge(object, error)?;
        }
    }
    if let Some(note) = run.store().salvage_note()? {
        let lost = note.lines().next().unwrap_or_default();
        let why = format!("the catalogue was salvaged and may lack images ({lost}): run cachefsctl fsck --rebuild");
        run.found(Object::Catalogue, why);
    }
    let state = run.components.publisher.catalogue();
    let needed = state.snapshot().max(1)..=state.generation();
    let numbers: BTreeSet<u64> = run.store().generation_numbers()?.into_iter().chain(needed).collect();
    run.enter(FsckPhase::Catalogue, numbers.len() as u64)?;
    for number in numbers {
        run.go_on()?;
        if let Err(error) = check::generation(run, number) {
            run.judge(Object::Generation(number), error)?;
        }
        run.show(|view| view.checked.generations += 1);
        run.advance(1);
    }
    Ok(())
}

fn check_blobs(run: &Run, catalogue: &Catalogue, survey: &Survey) -> Result<(), Halt> {
    let referred = catalogue.images().flat_map(|image| [image.manifest, image.config, image.target]);
    let mut all: Vec<Digest> = survey.blobs.iter().copied().chain(referred).collect();
    all.sort_unstable();
    all.dedup();
    run.enter(FsckPhase::Images, all.len() as u64)?;
    run.show(|view| view.checked.images = catalogue.images().count() as u64);
    for digest in all {
        run.go_on()?;
        if let Err(error) = check::blob(run, &digest, catalogue) {
            run.judge(Object::Blob(digest), error)?;
        }
        run.show(|view| view.checked.blobs += 1);
        run.advance(1);
    }
    Ok(())
}

fn check_layers(run: &Run, catalogue: &Catalogue, survey: &Survey) -> Result<HashSet<ContentDigest>, Halt> {
    let referred: HashSet<Digest> =
        catalogue.images().flat_map(|image| image.layers.iter().map(|layer| layer.diff_id)).collect();
    let mut all: Vec<Digest> = survey.layers.iter().copied().chain(referred.iter().copied()).collect();
    all.sort_unstable();
    all.dedup();
    run.enter(FsckPhase::Layers, all.len() as u64)?;
    let mut used = HashSet::new();
    for diff_id in all {
        run.go_on()?;
        match check::layer(run, &diff_id) {
            Ok(index) => check_packs_of(run, &index, &mut used)?,
            // It was removed during the check, like all layers that no image has.
            Err(Error::Missing { .. }) if !referred.contains(&diff_id) => {}
            Err(error) => run.judge(Object::Layer(diff_id), error)?,
        }
        run.show(|view| view.checked.layers += 1);
        run.advance(1);
    }
    Ok(used)
}

fn check_packs_of(run: &Run, index: &LayerIndex, used: &mut HashSet<ContentDigest>) -> Result<(), Halt> {
    let layer = format!("layer {}", index.diff_id());
    let ends = match check::needs(index) {
        Ok(ends) => ends,
        Err(error) => return run.judge(Object::Layer(index.diff_id()), error),
    };
    for (pack, end) in ends {
        used.insert(pack);
        if let Err(error) = check::pack_length(run, &pack, end, &layer) {
            // A layer that was removed during the check may have taken its pack along.
            if run.store().has_layer(&index.diff_id())? {
                run.judge(check::find_culprit(run, index, pack)?, error)?;
            }
        }
    }
    Ok(())
}

fn check_startups(run: &Run, catalogue: &Catalogue, used: &mut HashSet<ContentDigest>) -> Result<(), Halt> {
    for startup in catalogue.startups() {
        run.go_on()?;
        used.insert(startup.pack);
        let needed_by = format!("the startup table of chain {}", startup.chain);
        let whole = check::pack_length(run, &startup.pack, startup.pack_len, &needed_by);
        let checked = whole.and_then(|()| run.store().startup_table(startup).map(drop));
        if let Err(error) = checked
            && run.components.publisher.catalogue().startup(&startup.chain) == Some(startup)
        {
            run.judge(Object::Pack(startup.pack), error)?;
        }
    }
    Ok(())
}

/// Counts unreferenced objects. They are not damage: a running pull leaves such objects, and garbage collection removes the
/// others.
fn count_orphans(run: &Run, surveyed: &SurveyResult) -> Result<(), Halt> {
    let SurveyResult { catalogue, survey, packs, used } = surveyed;
    run.enter(FsckPhase::Orphans, 0)?;
    let layers: HashSet<Digest> =
        catalogue.images().flat_map(|image| image.layers.iter().map(|layer| layer.diff_id)).collect();
    let blobs: HashSet<Digest> =
        catalogue.images().flat_map(|image| [image.manifest, image.config, image.target]).collect();
    let unused = packs.iter().filter(|(pack, _)| !used.contains(pack));
    run.show(|view| {
        view.checked.packs = packs.len() as u64;
        view.orphans.layers = survey.layers.iter().filter(|layer| !layers.contains(layer)).count() as u64;
        view.orphans.blobs = survey.blobs.iter().filter(|blob| !blobs.contains(blob)).count() as u64;
        (view.orphans.packs, view.orphans.pack_bytes) =
            unused.fold((0, 0), |(count, bytes), (_, len)| (count + 1, bytes + len));
        view.orphans.unknown_files = survey.unknown_files.len() as u64;
    });
    Ok(())
}

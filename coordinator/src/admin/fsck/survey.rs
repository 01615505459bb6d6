//! The fast part: everything that is referred to is there, and every small file matches its digest.
//!
//! Each check of one object stands alone, so that a finding can be looked at again after the object was repaired. Memory
//! holds the objects' names and one layer's index at a time, whatever the size of the store.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use coordinator_api::fsck::FsckPhase;
use store::catalogue::Catalogue;
use store::error::Result as StoreResult;
use store::layer::LayerIndex;
use store::reader::Survey;
use store::version::Superblock;
use store::{ContentDigest, Digest, Error};

use crate::admin::fsck::deep;
use crate::admin::fsck::finding::Object;
use crate::admin::fsck::run::{Halt, Run};

/// So often is looked at what hosts may not read, and that long apart, before it is a finding.
const LOOKS: u32 = 3;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// What the fast part learned for those after it.
pub(super) struct Surveyed {
    /// The catalogue that was checked.
    pub(super) catalogue: Catalogue,
    /// What lies in the store.
    pub(super) survey: Survey,
    /// Packs that layers or startup tables refer to.
    pub(super) used: HashSet<ContentDigest>,
}

/// Looks at all of it.
pub(super) fn survey(run: &Run) -> Result<Surveyed, Halt> {
    let catalogue = run.parts.publisher.catalogue();
    check_catalogue(run)?;
    let survey = run.store().survey()?;
    check_blobs(run, &catalogue, &survey)?;
    let mut used = check_layers(run, &catalogue, &survey)?;
    check_startups(run, &catalogue, &mut used)?;
    let surveyed = Surveyed { catalogue, survey, used };
    count_orphans(run, &surveyed)?;
    Ok(surveyed)
}

/// Whether the superblock and its copy are the one that this coordinator started with.
pub(super) fn superblock(run: &Run) -> StoreResult<()> {
    let layout = run.store().layout();
    let read: [(&str, StoreResult<Superblock>); 2] = [
        ("the file cachefs-store", Superblock::read_first(layout)),
        ("the file cachefs-store.copy", Superblock::read_copy(layout)),
    ];
    for (what, found) in read {
        match found {
            Ok(found) if found.identity == run.store().identity() => {}
            Ok(_) => return Err(Error::corrupt(what, "it names another store")),
            Err(Error::Missing { .. }) => return Err(Error::corrupt(what, "it is missing")),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether hosts may read all that they must read, whoever they run as. What is being made is closed for a moment, before it gets
/// its mode: what counts is what stays closed.
pub(super) fn modes(run: &Run) -> StoreResult<()> {
    let mut looks = 0;
    loop {
        let closed = run.parts.publisher.closed_to_hosts(1);
        let Some(path) = closed.first() else { return Ok(()) };
        looks += 1;
        if looks == LOOKS {
            let path = path.strip_prefix(run.store().layout().root()).unwrap_or(path);
            let why = format!("hosts that run as other users cannot read {}", path.display());
            return Err(Error::corrupt("the store", why));
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

/// Whether another coordinator could go on with what this one knows.
pub(super) fn handover(run: &Run) -> Result<StoreResult<()>, Halt> {
    let why = run.parts.state_db.check_handover()?;
    Ok(why.map_or(Ok(()), |why| Err(Error::corrupt("what the next coordinator would take over", why))))
}

/// Whether a generation can be read, if readers may need it.
pub(super) fn generation(run: &Run, number: u64) -> StoreResult<()> {
    match run.store().generation_file(number) {
        Ok(_) => Ok(()),
        // A newer whole state stands for it, and it may go at any time.
        Err(Error::Missing { .. }) if number < run.parts.publisher.catalogue().snapshot() => Ok(()),
        Err(Error::Missing { .. }) => {
            Err(Error::corrupt("the catalogue", format!("generation {number} is missing, which hosts have to read")))
        }
        Err(Error::Corrupt { why, .. }) => Err(Error::corrupt(format!("generation {number} of the catalogue"), why)),
        Err(error) => Err(error),
    }
}

fn check_catalogue(run: &Run) -> Result<(), Halt> {
    for (object, found) in
        [(Object::Superblock, superblock(run)), (Object::Modes, modes(run)), (Object::Handover, handover(run)?)]
    {
        if let Err(error) = found {
            run.judge(object, error)?;
        }
    }
    if let Some(note) = run.store().salvage_note()? {
        let lost = note.lines().next().unwrap_or_default();
        let why = format!("the catalogue was salvaged and may lack images ({lost}): run cachefsctl fsck --rebuild");
        run.found(Object::Catalogue, why);
    }
    let state = run.parts.publisher.catalogue();
    let needed = state.snapshot().max(1)..=state.generation();
    let numbers: BTreeSet<u64> = run.store().generation_numbers()?.into_iter().chain(needed).collect();
    run.enter(FsckPhase::Catalogue, numbers.len() as u64)?;
    for number in numbers {
        run.go_on()?;
        if let Err(error) = generation(run, number) {
            run.judge(Object::Generation(number), error)?;
        }
        run.show(|view| view.checked.generations += 1);
        run.advance(1);
    }
    Ok(())
}

/// Whether a blob matches its digest; one that is gone is a fault only where an image refers to it.
pub(super) fn blob(run: &Run, digest: &Digest, catalogue: &Catalogue) -> StoreResult<()> {
    match run.store().blob(digest) {
        Ok(_) => Ok(()),
        Err(Error::Missing { .. }) => match catalogue.images().find(|image| super::finding::has_blob(image, digest)) {
            None => Ok(()),
            Some(image) => {
                let why = format!("it is missing, and {} needs it", image.familiar_name());
                Err(Error::corrupt(format!("blob {digest}"), why))
            }
        },
        Err(error) => Err(error),
    }
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
        if let Err(error) = blob(run, &digest, catalogue) {
            run.judge(Object::Blob(digest), error)?;
        }
        run.show(|view| view.checked.blobs += 1);
        run.advance(1);
    }
    Ok(())
}

/// What a layer needs of each pack: the end of its last chunk there.
pub(super) fn needs(index: &LayerIndex) -> StoreResult<HashMap<ContentDigest, u64>> {
    let mut ends: HashMap<ContentDigest, u64> = HashMap::new();
    for number in 0..index.pack_count() {
        ends.insert(index.pack(number)?, 0);
    }
    for number in 0..index.chunk_count() {
        let chunk = index.chunk(number)?;
        let end = ends.entry(chunk.pack).or_default();
        *end = (*end).max(chunk.offset.saturating_add(chunk.stored_len.into()));
    }
    Ok(ends)
}

/// Whether a layer's own two files are right; gives its index. Its packs are not looked at.
pub(super) fn layer(run: &Run, diff_id: &Digest) -> StoreResult<LayerIndex> {
    let index = run.store().index(diff_id)?;
    let what = || format!("the tar recipe of layer {diff_id}");
    match run.store().recipe_len(diff_id) {
        Ok(len) if len == index.header().recipe_len => Ok(index),
        Ok(_) => Err(Error::corrupt(what(), "its length differs from the index")),
        Err(Error::Missing { .. }) => Err(Error::corrupt(what(), "it is missing")),
        Err(error) => Err(error),
    }
}

/// Whether a pack is long enough for what `needed_by` wants of it.
fn pack_length(run: &Run, pack: &ContentDigest, end: u64, needed_by: &str) -> StoreResult<()> {
    let what = || format!("pack {pack}");
    match run.store().pack_len(pack) {
        Ok(len) if len >= end => Ok(()),
        Ok(_) => Err(Error::corrupt(what(), format!("it is shorter than {needed_by} needs it"))),
        Err(Error::Missing { .. }) => Err(Error::corrupt(what(), format!("it is missing, and {needed_by} needs it"))),
        Err(error) => Err(error),
    }
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
        match layer(run, &diff_id) {
            Ok(index) => check_packs_of(run, &index, &mut used)?,
            // It was removed meanwhile, as layers that no image has are.
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
    let ends = match needs(index) {
        Ok(ends) => ends,
        Err(error) => return run.judge(Object::Layer(index.diff_id()), error),
    };
    for (pack, end) in ends {
        used.insert(pack);
        if let Err(error) = pack_length(run, &pack, end, &layer) {
            // A layer that was removed meanwhile may have taken its pack along.
            if run.store().has_layer(&index.diff_id())? {
                run.judge(find_culprit(run, index, pack)?, error)?;
            }
        }
    }
    Ok(())
}

/// Which of the two is wrong, where an index and a pack differ: a pack that matches its name is not.
pub(super) fn find_culprit(run: &Run, index: &LayerIndex, pack: ContentDigest) -> Result<Object, Halt> {
    let is_there = run.store().pack_len(&pack).is_ok();
    Ok(match is_there && deep::pack(run, &pack)?.is_ok() {
        true => Object::Layer(index.diff_id()),
        false => Object::Pack(pack),
    })
}

fn check_startups(run: &Run, catalogue: &Catalogue, used: &mut HashSet<ContentDigest>) -> Result<(), Halt> {
    for startup in catalogue.startups() {
        run.go_on()?;
        used.insert(startup.pack);
        let needed_by = format!("the startup table of chain {}", startup.chain);
        let whole = pack_length(run, &startup.pack, startup.pack_len, &needed_by);
        let checked = whole.and_then(|()| run.store().startup_table(startup).map(drop));
        if let Err(error) = checked
            && run.parts.publisher.catalogue().startup(&startup.chain) == Some(startup)
        {
            run.judge(Object::Pack(startup.pack), error)?;
        }
    }
    Ok(())
}

/// Counts what nothing refers to. That is no damage: a pull under way looks like it, and the collector takes the rest.
fn count_orphans(run: &Run, surveyed: &Surveyed) -> Result<(), Halt> {
    let Surveyed { catalogue, survey, used } = surveyed;
    run.enter(FsckPhase::Orphans, 0)?;
    let layers: HashSet<Digest> =
        catalogue.images().flat_map(|image| image.layers.iter().map(|layer| layer.diff_id)).collect();
    let blobs: HashSet<Digest> =
        catalogue.images().flat_map(|image| [image.manifest, image.config, image.target]).collect();
    let packs = survey.packs.iter().filter(|(pack, _)| !used.contains(pack));
    run.show(|view| {
        view.checked.packs = survey.packs.len() as u64;
        view.orphans.layers = survey.layers.iter().filter(|layer| !layers.contains(layer)).count() as u64;
        view.orphans.blobs = survey.blobs.iter().filter(|blob| !blobs.contains(blob)).count() as u64;
        (view.orphans.packs, view.orphans.pack_bytes) =
            packs.fold((0, 0), |(count, bytes), (_, len)| (count + 1, bytes + len));
        view.orphans.strangers = survey.strangers.len() as u64;
    });
    Ok(())
}

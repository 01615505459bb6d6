//! Damage is moved out of the way, and what it was is fetched again.
//!
//! ```text
//! superblock, generations, handover log ─> written again from memory and database
//! blobs, layers, packs ─> does the registry have it? ─> quarantine ─> jobs that fetch the content ─> looked at again ─┬─> repaired
//!           ^                                                                                                   └─> the next
//!           └─────────────────────────────────────────────────────────────────────────────────────── image, or put back
//! startup packs ─> made again from the layers
//! ```
//!
//! A pack is made by unpacking the layer that brought it, so the layer that refers to most of its bytes is fetched first. It
//! comes out as the same pack (`unpack::former`), and every layer that shares it is whole again. Should it not, the others
//! that refer to it are fetched in the next round, each on its own. What no registry gives back is put back in its place:
//! a damaged layer still serves its good files, as long as its index can be read and its packs are there. That goes also for layers that
//! an earlier version took and this one refuses: their content comes, but is not unpacked. For the same reason
//! nothing is moved before the registry has answered, and what was moved is put back when it answers no more. Nothing is
//! fetched for what no image needs; it stays in quarantine.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::fsck::{FsckOutcome, FsckPhase};
use coordinator_api::job::{Job, JobState};
use futures::{StreamExt, TryStreamExt};
use store::catalogue::Catalogue;
use store::chunk::PieceLocation;
use store::image::{ImageRecord, ImageRef, OrderedBy};
use store::publisher::{Moved, Suspect};
use store::{ContentDigest, Digest, Error};
use tokio::runtime::Handle;

use crate::admin::fsck::finding::{Object, has_blob, has_layer};
use crate::admin::fsck::run::{Halt, Run};
use crate::admin::fsck::{deep, startup, survey};
use crate::jobs::queue::NewJob;
use crate::state::job::{JobId, Source};
use crate::unpack::former::pieces_of;

/// Images that are tried for one object.
const ROUNDS: usize = 8;
/// How long damaged objects are kept.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);
/// How often a job is looked at, should no end be announced.
const LOOK: Duration = Duration::from_secs(2);
/// How long a registry may take to say whether it has an image. Others are asked at the same time.
const ANSWER: Duration = Duration::from_secs(20);
/// Images that are asked about at a time.
const ASKED_AT_ONCE: usize = 8;

/// Why images were not to be had, by their targets.
type Failures = HashMap<Digest, String>;

/// Which layers refer to which of some packs, and to how many bytes there.
pub(super) type Dependents = HashMap<ContentDigest, BTreeMap<Digest, u64>>;

/// Reads all indexes for those that refer to `packs`.
pub(super) fn dependents(run: &Run, packs: &HashSet<ContentDigest>) -> Result<Dependents, Halt> {
    let mut found: Dependents = packs.iter().map(|pack| (*pack, BTreeMap::new())).collect();
    if packs.is_empty() {
        return Ok(found);
    }
    for diff_id in run.store().survey()?.layers {
        run.go_on()?;
        let Ok(index) = run.store().index(&diff_id) else { continue };
        let mut seen = HashSet::new();
        // What cannot be read of an index refers to nothing that could be fetched for it.
        let _ = pieces_of(&index, |_, PieceLocation { chunk, start, len }| {
            if let Some(layers) = found.get_mut(&chunk.pack)
                && seen.insert((chunk.pack, chunk.offset, start))
            {
                *layers.entry(diff_id).or_default() += u64::from(len);
            }
        });
    }
    Ok(found)
}

/// The packs among objects.
pub(super) fn packs<'a>(objects: impl IntoIterator<Item = &'a Object>) -> HashSet<ContentDigest> {
    let pack = |object: &Object| match object {
        Object::Pack(pack) => Some(*pack),
        _ => None,
    };
    objects.into_iter().filter_map(pack).collect()
}

/// Repairs whatever was found.
pub(super) fn repair(run: &Run) -> Result<(), Halt> {
    let removed = run.parts.publisher.forget_quarantined(KEPT)?;
    if removed > 0 {
        tracing::info!("fsck: {removed} damaged objects are no longer kept in quarantine");
    }
    let damaged = run.findings.lock().damaged();
    run.enter(FsckPhase::Repairing, damaged.len() as u64)?;
    rewrite(run, &damaged)?;
    fetch_again(run)?;
    startup::make_again(run)
}

/// What this coordinator itself knows.
fn rewrite(run: &Run, damaged: &[Object]) -> Result<(), Halt> {
    let publisher = &run.parts.publisher;
    if damaged.contains(&Object::Superblock) {
        publisher.restore_superblock()?;
        settle(run, Object::Superblock)?;
    }
    if damaged.contains(&Object::Modes) {
        let opened = publisher.open_all_to_hosts();
        settle_or_tell(run, Object::Modes, opened.err().map(|error| error.to_string()))?;
    }
    if damaged.contains(&Object::Handover) {
        let renewed = run.parts.state_db.renew_handover();
        settle_or_tell(run, Object::Handover, renewed.err().map(|error| error.to_string()))?;
    }
    let generations: Vec<_> = damaged.iter().filter(|object| matches!(object, Object::Generation(_))).collect();
    if !generations.is_empty() {
        publisher.commit_whole()?;
    }
    for object in generations {
        if let Some(suspect) = object.suspect() {
            publisher.quarantine(suspect)?;
        }
        settle(run, *object)?;
    }
    if damaged.contains(&Object::Catalogue) {
        let reason = "only cachefsctl fsck --rebuild can find the images that it lacks".to_owned();
        run.findings.lock().settle(&Object::Catalogue, FsckOutcome::NotRepaired, Some(reason));
    }
    Ok(())
}

/// The same for what could not be written, for the reason `failed`.
fn settle_or_tell(run: &Run, object: Object, failed: Option<String>) -> Result<(), Halt> {
    if let Some(wrong) = settle(run, object)? {
        run.findings.lock().settle(&object, FsckOutcome::NotRepaired, Some(failed.unwrap_or(wrong)));
    }
    Ok(())
}

/// Looks at an object again and writes down that it is whole, or tells what is wrong with it still.
fn settle(run: &Run, object: Object) -> Result<Option<String>, Halt> {
    let wrong = look(run, object)?;
    if wrong.is_none() {
        run.findings.lock().settle(&object, FsckOutcome::Repaired, None);
        run.advance(1);
    }
    Ok(wrong)
}

/// What is wrong with an object now; nothing if nobody misses it.
pub(super) fn look(run: &Run, object: Object) -> Result<Option<String>, Halt> {
    let catalogue = run.parts.publisher.catalogue();
    let found = match object {
        Object::Superblock => survey::superblock(run),
        Object::Modes => survey::modes(run),
        Object::Handover => survey::handover(run)?,
        Object::Catalogue => match run.store().salvage_note()? {
            None => Ok(()),
            Some(_) => return Ok(Some("the catalogue was salvaged and may lack images".to_owned())),
        },
        Object::Generation(number) => survey::generation(run, number),
        Object::Blob(digest) => survey::blob(run, &digest, &catalogue),
        Object::Layer(diff_id) => match survey::layer(run, &diff_id) {
            Err(Error::Missing { .. }) if !catalogue.images().any(|image| has_layer(image, &diff_id)) => Ok(()),
            Ok(_) if run.is_deep() => deep::tar(run, &diff_id)?,
            other => other.map(drop),
        },
        Object::Pack(pack) => return look_at_pack(run, pack, &catalogue),
    };
    Ok(found.err().map(|error| error.to_string()))
}

fn look_at_pack(run: &Run, pack: ContentDigest, catalogue: &Catalogue) -> Result<Option<String>, Halt> {
    match run.store().pack_len(&pack) {
        Ok(_) => Ok(deep::pack(run, &pack)?.err().map(|error| error.to_string())),
        Err(Error::Missing { .. }) => {
            let layers = dependents(run, &HashSet::from([pack]))?.remove(&pack).unwrap_or_default();
            let startup = catalogue.startups().any(|startup| startup.pack == pack);
            let needed = !layers.is_empty() || startup;
            Ok(needed.then(|| format!("pack {pack} is missing, and {} layers need it", layers.len())))
        }
        Err(error) => Ok(Some(error.to_string())),
    }
}

/// One object that registries may give back.
struct RepairTarget {
    object: Object,
    /// The layers to fetch for it.
    layers: BTreeSet<Digest>,
    /// Images that were asked for and did not help, by what they are known by.
    tried: BTreeSet<(String, Digest)>,
    /// What came of the last try.
    reason: String,
}

impl RepairTarget {
    fn needs(&self, image: &ImageRecord) -> bool {
        match &self.object {
            Object::Blob(digest) => has_blob(image, digest),
            _ => self.layers.iter().any(|diff_id| has_layer(image, diff_id)),
        }
    }

    fn is_tried(&self, image: &ImageRecord) -> bool {
        self.tried.contains(&(image.repository.clone(), image.target))
    }
}

/// Quarantine, jobs, another look; again with other images while there are any.
fn fetch_again(run: &Run) -> Result<(), Halt> {
    let objects = run.findings.lock().damaged();
    let fetched = |object: &Object| matches!(object, Object::Blob(_) | Object::Layer(_) | Object::Pack(_));
    let new = |object| RepairTarget { object, layers: BTreeSet::new(), tried: BTreeSet::new(), reason: String::new() };
    let mut targets: Vec<RepairTarget> = objects.into_iter().filter(fetched).map(new).collect();
    let mut moved: BTreeSet<Suspect> = BTreeSet::new();
    let done = rounds(run, &mut targets, &mut moved);
    // Also after an interruption: what was not fetched by now is as it was.
    put_back(run, &targets, &moved)?;
    done
}

/// Tries until all are whole or there is nothing left to try; `targets` are then those that are not.
fn rounds(run: &Run, targets: &mut Vec<RepairTarget>, moved: &mut BTreeSet<Suspect>) -> Result<(), Halt> {
    for round in 0..ROUNDS {
        if targets.is_empty() {
            break;
        }
        choose_layers(run, targets, round)?;
        let catalogue = run.parts.publisher.catalogue();
        let chosen = choose_images(&catalogue, targets);
        let (images, mut failures) = ask(run, chosen)?;
        quarantine(run, &catalogue, targets, &images, moved)?;
        failures.extend(fetch(run, &images)?);
        let mut left = Vec::new();
        for mut target in std::mem::take(targets) {
            match examine(run, &target)? {
                None => continue,
                Some(wrong) => target.reason = reason(&target, &catalogue, &failures, wrong),
            }
            left.push(target);
        }
        *targets = left;
        if images.is_empty() && failures.is_empty() {
            break;
        }
    }
    Ok(())
}

/// Whether a target is whole, and with it all layers that were moved away for it.
fn examine(run: &Run, target: &RepairTarget) -> Result<Option<String>, Halt> {
    for diff_id in &target.layers {
        if let Some(wrong) = look(run, Object::Layer(*diff_id))? {
            return Ok(Some(wrong));
        }
    }
    settle(run, target.object)
}

/// For a layer that layer; for a pack first the one that brought it, then everyone that refers to it.
fn choose_layers(run: &Run, targets: &mut [RepairTarget], round: usize) -> Result<(), Halt> {
    let dependents = dependents(run, &packs(targets.iter().map(|target| &target.object)))?;
    for target in targets {
        match &target.object {
            Object::Layer(diff_id) => _ = target.layers.insert(*diff_id),
            Object::Pack(pack) => {
                let layers = dependents.get(pack).into_iter().flatten();
                let owner = layers.clone().max_by_key(|(diff_id, bytes)| (**bytes, std::cmp::Reverse(**diff_id)));
                match round {
                    0 => target.layers.extend(owner.map(|(diff_id, _)| *diff_id)),
                    _ => {
                        target.layers.extend(layers.map(|(diff_id, _)| *diff_id));
                        // Other layers are another matter: images that did not help with the first may do so now.
                        if round == 1 {
                            target.tried.clear();
                        }
                    }
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// As few images as cover all targets, each of which was not tried before for the target that it is chosen for.
fn choose_images(catalogue: &Catalogue, targets: &mut [RepairTarget]) -> Vec<Arc<ImageRecord>> {
    let mut chosen: Vec<Arc<ImageRecord>> = Vec::new();
    for target in targets.iter() {
        let fresh = |image: &&Arc<ImageRecord>| target.needs(image) && !target.is_tried(image);
        let covers = |image: &Arc<ImageRecord>| match &target.object {
            Object::Blob(_) => fresh(&image),
            _ => !target.is_tried(image) && target.layers.iter().all(|diff_id| has_layer(image, diff_id)),
        };
        if chosen.iter().any(covers) {
            continue;
        }
        // One image a layer: those that share a pack need not be of one image.
        let mut open: BTreeSet<Digest> = target.layers.clone();
        for image in catalogue.images().filter(fresh) {
            let helps = image.layers.iter().any(|layer| open.contains(&layer.diff_id));
            if !helps && !matches!(target.object, Object::Blob(_)) {
                continue;
            }
            image.layers.iter().for_each(|layer| _ = open.remove(&layer.diff_id));
            if !chosen.iter().any(|other| (&other.repository, other.target) == (&image.repository, image.target)) {
                chosen.push(Arc::clone(image));
            }
            if open.is_empty() {
                break;
            }
        }
    }
    for target in targets {
        let used = chosen.iter().filter(|image| target.needs(image));
        let used: Vec<_> = used.map(|image| (image.repository.clone(), image.target)).collect();
        target.tried.extend(used);
    }
    chosen
}

/// Moves what will be fetched again out of the way, and what no image needs.
fn quarantine(
    run: &Run,
    catalogue: &Catalogue,
    targets: &[RepairTarget],
    images: &[Arc<ImageRecord>],
    moved: &mut BTreeSet<Suspect>,
) -> Result<(), Halt> {
    for target in targets {
        let wanted = images.iter().any(|image| target.needs(image));
        let needed = catalogue.images().any(|image| target.needs(image));
        let startup = matches!(target.object, Object::Pack(pack) if catalogue.startups().any(|s| s.pack == pack));
        if (needed || startup) && !wanted {
            continue;
        }
        let layers = target.layers.iter().filter(|diff_id| !needed || images.iter().any(|i| has_layer(i, diff_id)));
        // The layer goes first: whoever sees the pack gone finds no index that wants it.
        let suspects = layers.map(|diff_id| Suspect::Layer(*diff_id)).chain(target.object.suspect());
        for suspect in suspects.collect::<BTreeSet<_>>() {
            // What nobody needs does not come back.
            if !(needed || startup) || moved.insert(suspect) {
                run.parts.publisher.quarantine(suspect)?;
            }
        }
    }
    Ok(())
}

/// An image as registries know it, whatever its tag means by now.
fn by_digest(image: &ImageRecord) -> Result<ImageRef, Error> {
    format!("{}@{}", image.repository, image.target).parse()
}

/// The images that their registries have, and why the others are not to be had.
fn ask(run: &Run, images: Vec<Arc<ImageRecord>>) -> Result<(Vec<Arc<ImageRecord>>, Failures), Halt> {
    if images.is_empty() {
        return Ok((images, Failures::new()));
    }
    let one = async |image: Arc<ImageRecord>| {
        let reference = by_digest(&image)?;
        let resolving = run.parts.registry.resolve(&reference, Some(&image.platform));
        let answer = match tokio::time::timeout(ANSWER, resolving).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => {
                let registry = reference.registry();
                Err(format!("registry {registry} did not say within {} s whether it has {reference}", ANSWER.as_secs()))
            }
        };
        Ok::<_, Error>((image, answer))
    };
    let all = async {
        let asking = futures::stream::iter(images.into_iter().map(one)).buffered(ASKED_AT_ONCE);
        tokio::select! {
            () = run.stop.cancelled() => Err(Halt::Interrupted),
            answers = asking.try_collect::<Vec<_>>() => Ok(answers?),
        }
    };
    let (mut there, mut failures) = (Vec::new(), HashMap::new());
    for (image, answer) in Handle::current().block_on(all)? {
        match answer {
            Ok(()) => there.push(image),
            Err(why) => _ = failures.insert(image.target, why),
        }
    }
    Ok((there, failures))
}

/// Has the content of images fetched by ordinary jobs and waits for them; why some of them failed.
fn fetch(run: &Run, images: &[Arc<ImageRecord>]) -> Result<Failures, Halt> {
    let job = |image: &Arc<ImageRecord>| {
        let (platform, source) = (Some(image.platform.clone()), Source::Restore);
        let (image, ordered_by) = (by_digest(image)?, OrderedBy::Operator);
        Ok(NewJob { image, platform, priority: 0, source, origin: Some("fsck".to_owned()), ordered_by })
    };
    let new = images.iter().map(job).collect::<Result<Vec<_>, Error>>()?;
    let mut ended = run.parts.queue.ended();
    let jobs = run.parts.queue.submit(new)?;
    let mut failures = HashMap::new();
    for (job, image) in jobs.iter().zip(images) {
        let (job, gave_up) = match wait(run, job.id, image, &mut ended) {
            Ok(ended) => ended,
            Err(halt) => {
                // Those that have ended cannot be cancelled, and need not be.
                jobs.iter().for_each(|job| _ = run.parts.queue.cancel(JobId(job.id)));
                return Err(halt);
            }
        };
        if job.state != JobState::Published {
            let why = gave_up.or(job.reason).unwrap_or_else(|| format!("it was {}", job.state));
            failures.insert(image.target, format!("job {} for {} failed: {why}", job.id, image.familiar_name()));
        }
    }
    Ok(failures)
}

/// Waits for a job's end, or until the check is stopped. A job whose registry is left alone by now is given up, because what it is to
/// replace serves its good part as soon as it is put back.
fn wait(
    run: &Run,
    id: u64,
    image: &ImageRecord,
    ended: &mut tokio::sync::watch::Receiver<u64>,
) -> Result<(Job, Option<String>), Halt> {
    let reference = by_digest(image)?;
    let mut gave_up = None;
    loop {
        ended.mark_unchanged();
        let job = run.parts.queue.get(JobId(id))?;
        if job.state.is_final() {
            return Ok((job, gave_up));
        }
        if let (None, Some(held)) = (&gave_up, run.parts.queue.held(&reference)) {
            gave_up =
                Some(format!("registry {} is not asked before {}: {}", reference.registry(), held.until, held.why));
            // One that has ended meanwhile needs no cancelling.
            let _ = run.parts.queue.cancel(JobId(id));
        }
        Handle::current().block_on(async {
            tokio::select! {
                () = run.stop.cancelled() => {}
                _ = ended.changed() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        });
        run.go_on()?;
    }
}

/// Why an object is still damaged: the registry's or the job's reason, if it could not be fetched.
fn reason(target: &RepairTarget, catalogue: &Catalogue, failures: &Failures, wrong: String) -> String {
    let images = catalogue.images().filter(|image| target.needs(image));
    let failed = images.into_iter().find_map(|image| failures.get(&image.target));
    match failed {
        Some(failure) => failure.clone(),
        None if target.reason.is_empty() => wrong,
        None => target.reason.clone(),
    }
}

/// Puts back what nobody gave anew, and says why.
fn put_back(run: &Run, targets: &[RepairTarget], moved: &BTreeSet<Suspect>) -> Result<(), Halt> {
    let startups: HashSet<_> = run.parts.publisher.catalogue().startups().map(|startup| startup.pack).collect();
    let mut staying: BTreeMap<Suspect, Error> = BTreeMap::new();
    let mut back: BTreeSet<Suspect> = BTreeSet::new();
    for suspect in moved {
        match run.parts.publisher.reinstate(*suspect) {
            Ok(Moved::Away) => _ = back.insert(*suspect),
            Ok(Moved::Nothing) => {}
            Err(error) if error.is_of_object() => _ = staying.insert(*suspect, error),
            Err(error) => return Err(error.into()),
        }
    }
    for target in targets {
        // Startup packs come after all layers.
        if matches!(target.object, Object::Pack(pack) if startups.contains(&pack)) {
            continue;
        }
        let mut reasons = vec![target.reason.clone()];
        let own = target.layers.iter().map(|diff_id| Suspect::Layer(*diff_id)).chain(target.object.suspect());
        let own = own.collect::<BTreeSet<_>>();
        reasons.extend(own.iter().filter_map(|one| Some(format!("it stays in quarantine: {}", staying.get(one)?))));
        if own.iter().any(|one| back.contains(one)) {
            reasons.push("it was put back and serves what is whole of it".to_owned());
        }
        reasons.retain(|reason| !reason.is_empty());
        let reason = Some(reasons.join("; ")).filter(|reason| !reason.is_empty());
        run.findings.lock().settle(&target.object, FsckOutcome::NotRepaired, reason);
        run.advance(1);
    }
    Ok(())
}

//! Repairs damage: damaged objects are moved out of the way and their content is fetched again.
//!
//! ```text
//! superblock, generations, handover log ─> written again from memory and database
//! blobs, layers, packs ─> does the registry have it? ─> quarantine ─> jobs that fetch the content ─> looked at again ─┬─> repaired
//!           ^                                                                                                   └─> the next
//!           └─────────────────────────────────────────────────────────────────────────────────────── image, or put back
//! startup packs ─> made again from the layers
//! ```
//!
//! A pack is made by unpacking the layer that brought it, so the layer that refers to most of the pack's bytes is fetched first.
//! The unpacker reproduces the same pack (`unpack::previous_layout`), and every layer that shares the pack is whole again. If it
//! does not, all other layers that refer to the pack are fetched in the next round, each on its own.
//!
//! Objects that no registry provides are put back in their place: a damaged layer still serves its good files, as long as its
//! index can be read and its packs exist. The same goes for layers that an earlier version accepted and this one refuses: their
//! content is fetched but not unpacked. For the same reason nothing is moved before the registry has answered, and what was moved
//! is put back if the registry stops answering. Objects that no image needs are not fetched; they stay in quarantine.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::fsck::{FsckOutcome, FsckPhase};
use coordinator_api::job::{Job, JobState};
use futures::{StreamExt, TryStreamExt};
use store::catalogue::Catalogue;
use store::image::{ImageRecord, ImageRef, RequestedBy};
use store::publisher::{Moved, Suspect};
use store::{Digest, Error};
use tokio::runtime::Handle;

use crate::admin::fsck::finding::{Object, has_blob, has_layer};
use crate::admin::fsck::run::{Halt, Run};
use crate::admin::fsck::{check, startup};
use crate::jobs::queue::NewJob;
use crate::state::job::{JobId, Source};

/// Rounds of fetching at most: how many images are tried for one object.
const ROUNDS: usize = 8;
/// How long damaged objects are kept in quarantine.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);
/// How often a job is looked at if no end is announced.
const LOOK: Duration = Duration::from_secs(2);
/// How long a registry may take to say whether it has an image. Other registries are asked at the same time.
const ANSWER: Duration = Duration::from_secs(20);
/// Images that registries are asked about at a time.
const ASKED_AT_ONCE: usize = 8;

/// Why images could not be fetched, by their targets.
type Failures = HashMap<Digest, String>;

/// Repairs all findings.
pub(super) fn repair(run: &Run) -> Result<(), Halt> {
    let removed = run.components.publisher.forget_quarantined(KEPT)?;
    if removed > 0 {
        tracing::info!("fsck: {removed} damaged objects are no longer kept in quarantine");
    }
    let damaged = run.findings.lock().damaged();
    run.enter(FsckPhase::Repairing, damaged.len() as u64)?;
    rewrite(run, &damaged)?;
    fetch_again(run)?;
    startup::make_again(run)?;
    startup::look_again(run, &damaged);
    Ok(())
}

/// Writes again what this coordinator knows by itself.
fn rewrite(run: &Run, damaged: &[Object]) -> Result<(), Halt> {
    let publisher = &run.components.publisher;
    if damaged.contains(&Object::Superblock) {
        publisher.restore_superblock()?;
        settle(run, Object::Superblock)?;
    }
    if damaged.contains(&Object::Modes) {
        let opened = publisher.open_all_to_hosts();
        settle_or_tell(run, Object::Modes, opened.err().map(|error| error.to_string()))?;
    }
    if damaged.contains(&Object::Handover) {
        let renewed = run.components.state_db.renew_handover();
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

/// Looks at an object after an attempt to write it anew. If it is still damaged, the reason is `failed`, or else what is still
/// wrong.
fn settle_or_tell(run: &Run, object: Object, failed: Option<String>) -> Result<(), Halt> {
    if let Some(wrong) = settle(run, object)? {
        run.findings.lock().settle(&object, FsckOutcome::NotRepaired, Some(failed.unwrap_or(wrong)));
    }
    Ok(())
}

/// Looks at an object again. Records it as repaired if it is whole; otherwise returns what is still wrong.
fn settle(run: &Run, object: Object) -> Result<Option<String>, Halt> {
    let wrong = check::look(run, object)?;
    if wrong.is_none() {
        run.findings.lock().settle(&object, FsckOutcome::Repaired, None);
        run.advance(1);
    }
    Ok(wrong)
}

/// One damaged object that a registry may give back.
struct RepairTarget {
    object: Object,
    /// The layers to fetch for it.
    layers: BTreeSet<Digest>,
    /// Images that were already asked for, by repository and target.
    tried: BTreeSet<(String, Digest)>,
    /// Why the last attempt failed.
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

/// Moves objects into quarantine, fetches them by jobs and looks again; repeats with other images while there are any.
fn fetch_again(run: &Run) -> Result<(), Halt> {
    let objects = run.findings.lock().damaged();
    let fetched = |object: &Object| matches!(object, Object::Blob(_) | Object::Layer(_) | Object::Pack(_));
    let new = |object| RepairTarget { object, layers: BTreeSet::new(), tried: BTreeSet::new(), reason: String::new() };
    let mut targets: Vec<RepairTarget> = objects.into_iter().filter(fetched).map(new).collect();
    let mut moved: BTreeSet<Suspect> = BTreeSet::new();
    let done = rounds(run, &mut targets, &mut moved);
    // This also runs after an interruption: whatever was not fetched goes back to where it was.
    put_back(run, &targets, &moved)?;
    done
}

/// Repeats until all targets are whole or nothing is left to try. `targets` then holds those that are still damaged.
fn rounds(run: &Run, targets: &mut Vec<RepairTarget>, moved: &mut BTreeSet<Suspect>) -> Result<(), Halt> {
    for round in 0..ROUNDS {
        if targets.is_empty() {
            break;
        }
        choose_layers(run, targets, round)?;
        let catalogue = run.components.publisher.catalogue();
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

/// Whether a target is whole, and with it all layers that were moved away for it. Returns what is wrong otherwise.
fn examine(run: &Run, target: &RepairTarget) -> Result<Option<String>, Halt> {
    for diff_id in &target.layers {
        if let Some(wrong) = check::look(run, Object::Layer(*diff_id))? {
            return Ok(Some(wrong));
        }
    }
    settle(run, target.object)
}

/// Chooses the layers to fetch: for a layer, itself; for a pack, first the layer that brought it, then every layer that refers to
/// it.
fn choose_layers(run: &Run, targets: &mut [RepairTarget], round: usize) -> Result<(), Halt> {
    let dependents = check::dependents(run, &check::packs(targets.iter().map(|target| &target.object)))?;
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
                        // The layers to fetch have changed: images that were tried for the first layer may help with these.
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

/// Chooses as few images as cover all targets. No image is chosen for a target that it was tried for before.
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
        // One image per layer: layers that share a pack need not belong to the same image.
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

/// Moves away what is about to be fetched again, and what no image needs.
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
        // The layer goes first, so that no reader that finds the pack gone finds an index that refers to it.
        let suspects = layers.map(|diff_id| Suspect::Layer(*diff_id)).chain(target.object.suspect());
        for suspect in suspects.collect::<BTreeSet<_>>() {
            // Objects that nothing needs are not tracked: they are not put back.
            if !(needed || startup) || moved.insert(suspect) {
                run.components.publisher.quarantine(suspect)?;
            }
        }
    }
    Ok(())
}

/// The image by digest, which stays valid when its tag has moved.
fn by_digest(image: &ImageRecord) -> Result<ImageRef, Error> {
    format!("{}@{}", image.repository, image.target).parse()
}

/// Asks registries for images. Returns the images that they have, and why the others could not be resolved.
fn ask(run: &Run, images: Vec<Arc<ImageRecord>>) -> Result<(Vec<Arc<ImageRecord>>, Failures), Halt> {
    if images.is_empty() {
        return Ok((images, Failures::new()));
    }
    let one = async |image: Arc<ImageRecord>| {
        let reference = by_digest(&image)?;
        let resolving = run.components.registry.resolve(&reference, Some(&image.platform));
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

/// Fetches the content of images by ordinary jobs and waits for them. Returns why some of them failed.
fn fetch(run: &Run, images: &[Arc<ImageRecord>]) -> Result<Failures, Halt> {
    let job = |image: &Arc<ImageRecord>| {
        let (platform, source) = (Some(image.platform.clone()), Source::Restore);
        let (image, ordered_by) = (by_digest(image)?, RequestedBy::Operator);
        Ok(NewJob { image, platform, priority: 0, source, origin: Some("fsck".to_owned()), ordered_by })
    };
    let new = images.iter().map(job).collect::<Result<Vec<_>, Error>>()?;
    let mut ended = run.components.queue.ended();
    let jobs = run.components.queue.submit(new)?;
    let mut failures = HashMap::new();
    for (job, image) in jobs.iter().zip(images) {
        let (job, gave_up) = match wait(run, job.id, image, &mut ended) {
            Ok(ended) => ended,
            Err(halt) => {
                // Jobs that have ended cannot be cancelled, and need not be.
                jobs.iter().for_each(|job| _ = run.components.queue.cancel(JobId(job.id)));
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

/// Waits for a job's end, or until the check is stopped. If the job's registry is not being asked at present, the job is
/// cancelled and the reason returned: the damaged objects serve their good part as soon as they are put back.
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
        let job = run.components.queue.get(JobId(id))?;
        if job.state.is_final() {
            return Ok((job, gave_up));
        }
        if let (None, Some(held)) = (&gave_up, run.components.queue.held(&reference)) {
            gave_up =
                Some(format!("registry {} is not asked before {}: {}", reference.registry(), held.until, held.why));
            // A job that has ended in the meantime needs no cancelling.
            let _ = run.components.queue.cancel(JobId(id));
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

/// Why an object is still damaged: the reason of the registry or job if fetching failed, else `wrong`.
fn reason(target: &RepairTarget, catalogue: &Catalogue, failures: &Failures, wrong: String) -> String {
    let images = catalogue.images().filter(|image| target.needs(image));
    let failed = images.into_iter().find_map(|image| failures.get(&image.target));
    match failed {
        Some(failure) => failure.clone(),
        None if target.reason.is_empty() => wrong,
        None => target.reason.clone(),
    }
}

/// Puts back the objects that were not fetched, and records why.
fn put_back(run: &Run, targets: &[RepairTarget], moved: &BTreeSet<Suspect>) -> Result<(), Halt> {
    let startups: HashSet<_> = run.components.publisher.catalogue().startups().map(|startup| startup.pack).collect();
    let mut staying: BTreeMap<Suspect, Error> = BTreeMap::new();
    let mut back: BTreeSet<Suspect> = BTreeSet::new();
    for suspect in moved {
        match run.components.publisher.reinstate(*suspect) {
            Ok(Moved::Away) => _ = back.insert(*suspect),
            Ok(Moved::Nothing) => {}
            Err(error) if error.is_of_object() => _ = staying.insert(*suspect, error),
            Err(error) => return Err(error.into()),
        }
    }
    for target in targets {
        // Startup packs are repaired last, after all layers.
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

//! One collection: what it finds, decides and does. The dry run is the same up to the deciding.
//!
//! Each step looks again at what it is about to take, so a plan that has been overtaken costs nothing but the attempt. A
//! collection that breaks off leaves marks and a store that is whole; the next one goes on.

mod images_leave;
mod packs_go;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use coordinator_api::event::Severity;
use coordinator_api::retention::{
    CollectionPhase, CollectionPlan, CollectionReport, GarbageItem, GarbageKind, GarbageReason, RetentionPolicy,
};
use jiff::Timestamp;
use store::catalogue::Catalogue;
use store::crash::{CrashPoint, crash_point};
use store::image::ImageRecord;
use store::publisher::{Collection, Object, Removal};
use store::{ContentDigest, Digest};

use super::images::{Candidate, Departure, departures};
use super::marks::{Marks, Remembered};
use super::objects::{Needs, Unneeded, is_sparse, thinnable, unneeded};
use super::rules::Rules;
use super::survey::Survey;
use super::usage::{self, LayerUse, Usage};
use super::{Garbage, GarbageError, Held};
use crate::state::events::{Events, NewEvent};
use crate::state::state_db::StateError;

/// Things are taken in turns of so many, after each of which the trash is emptied and a stop is heard.
const TURN: usize = 256;
/// Failures that are listed; more of them have the same cause.
const FAILURES_MAX: usize = 20;
/// Why nothing is collected right after the lead was taken.
fn hosts_unknown(until: Timestamp) -> String {
    format!("hosts have not all been heard of since this coordinator leads: nothing is collected before {until:.0}")
}

/// What is found before anything is decided.
struct Found {
    catalogue: Catalogue,
    policy: RetentionPolicy,
    grace: u64,
    /// The counted time, by which objects age,
    now: u64,
    /// and that for what is stamped with the machine's.
    today: u64,
    survey: Survey,
    usage: Usage,
    marks: HashMap<Object, u64>,
    /// When images were last seen in use, by familiar name.
    in_use: HashMap<String, u64>,
    /// Layers whose index cannot be read, or is missing although an image needs it, and why: it is not known which packs they
    /// use, so none goes.
    unreadable: BTreeMap<Digest, String>,
}

/// What is decided.
struct Decided {
    departures: Vec<Departure>,
    over_quota: u64,
    needed_bytes: u64,
    unneeded: Vec<Unneeded>,
}

/// Looks at everything.
fn find(garbage: &Garbage, grace: Option<u64>) -> Result<Found, GarbageError> {
    let table = Marks::of(&*garbage.state_db);
    let policy = table.policy()?;
    let catalogue = garbage.publisher.catalogue();
    let store = garbage.publisher.store();
    let survey = garbage.sizes.survey(store.layout())?;
    let Remembered { marks, usage: mut known, in_use } = table.remembered()?;
    let (mut new, mut unreadable): (Vec<(Digest, LayerUse)>, _) = (Vec::new(), BTreeMap::new());
    for layer in survey.layers.keys().filter(|layer| !known.contains_key(layer)) {
        if garbage.stop.is_cancelled() {
            return Err(GarbageError::Stopping);
        }
        match usage::read(store, layer) {
            Ok(packs) => new.push((*layer, packs)),
            Err(error) => _ = unreadable.insert(*layer, error.to_string()),
        }
    }
    let wanted = catalogue.images().flat_map(|image| &image.layers).map(|layer| layer.diff_id);
    for layer in wanted.filter(|layer| !survey.layers.contains_key(layer)) {
        unreadable.insert(layer, "it is missing".to_owned());
    }
    let gone: Vec<Digest> = known.keys().filter(|layer| !survey.layers.contains_key(layer)).copied().collect();
    table.update_usage(&new, gone.iter().copied())?;
    gone.iter().for_each(|layer| _ = known.remove(layer));
    known.extend(new);
    let grace = grace.unwrap_or(policy.collect.grace_seconds);
    let (now, today) = (garbage.ages.now(), garbage.ages.today());
    Ok(Found { catalogue, policy, grace, now, today, survey, usage: Usage::new(known), marks, in_use, unreadable })
}

/// Decides what goes. `leased` are layers that hosts need, `relied` digests that pulls hold.
fn decide(found: &Found, leased: &HashSet<Digest>, relied: &HashSet<Digest>) -> Result<Decided, GarbageError> {
    let rules = Rules::compile(&found.policy.rules).map_err(|error| GarbageError::Policy(error.to_string()))?;
    let mut needs = needs(found, &found.catalogue, leased, relied);
    let candidate = |image: &Arc<ImageRecord>| Candidate {
        protected: found.catalogue.is_pinned(image) || is_leased(image, leased) || relied.contains(&image.manifest),
        last_used: found.in_use.get(&image.familiar_name()).copied().unwrap_or(0).max(image.published_at),
        image: Arc::clone(image),
    };
    let candidates: Vec<Candidate> = found.catalogue.images().map(candidate).collect();
    let (departures, over_quota) =
        departures(&candidates, &rules, found.policy.quota.as_ref(), found.today, &mut needs);
    let unneeded = without_doubt(found, &needs);
    Ok(Decided { departures, over_quota, needed_bytes: needs.bytes(), unneeded })
}

/// What the images of a catalogue, hosts and pulls need.
fn needs(found: &Found, catalogue: &Catalogue, leased: &HashSet<Digest>, relied: &HashSet<Digest>) -> Needs {
    let startups = catalogue.startups().map(|startup| (startup.chain, startup.pack)).collect();
    let mut needs = Needs::new(&found.survey, &found.usage, startups);
    catalogue.images().for_each(|image| needs.require(image));
    leased.iter().chain(relied).for_each(|digest| needs.require_digest(digest));
    needs
}

/// What is not needed, packs only if it is known of every layer which it uses.
fn without_doubt(found: &Found, needs: &Needs) -> Vec<Unneeded> {
    let mut unneeded = unneeded(&found.survey, needs, &found.usage, &found.marks, found.now, found.grace);
    if !found.unreadable.is_empty() {
        unneeded.retain(|one| !matches!(one.object, Object::Pack(_)));
    }
    unneeded
}

/// Whether hosts use all of an image.
fn is_leased(image: &ImageRecord, leased: &HashSet<Digest>) -> bool {
    !image.layers.is_empty() && image.layers.iter().all(|layer| leased.contains(&layer.diff_id))
}

/// Remembers which images are in use now, for the quota's sake.
fn remember_use(garbage: &Garbage, found: &Found, leased: &HashSet<Digest>) -> Result<(), StateError> {
    let images: HashMap<String, bool> =
        found.catalogue.images().map(|image| (image.familiar_name(), is_leased(image, leased))).collect();
    let used = images.iter().filter(|(_, in_use)| **in_use).map(|(name, _)| name.as_str());
    let gone = found.in_use.keys().filter(|name| !images.contains_key(*name)).map(String::as_str);
    Marks::of(&*garbage.state_db).update_in_use(used, gone, found.today)
}

fn unreadable_sentence(found: &Found) -> Option<String> {
    let (layer, why) = found.unreadable.first_key_value()?;
    Some(format!("no pack is removed while layer {layer} cannot be read ({why}): run cachefsctl fsck --repair"))
}

/// What a collection would do.
pub(super) fn plan(garbage: &Garbage, grace: Option<u64>) -> Result<CollectionPlan, GarbageError> {
    let (waiting, leased) = match garbage.holds.held() {
        Held::NotYetKnown { until } => (Some(hosts_unknown(until)), HashSet::new()),
        Held::Layers(layers) => (None, layers),
    };
    let found = find(garbage, grace)?;
    let decided = decide(&found, &leased, &garbage.publisher.held())?;
    let mut items: Vec<GarbageItem> =
        decided.departures.iter().map(|departure| departed(departure, found.today)).collect();
    items.extend(decided.unneeded.iter().map(|one| item(&one.object, one.bytes, one.reason.clone(), one.due)));
    let going: HashSet<Digest> = decided.unneeded.iter().filter_map(|one| due_layer(one, found.now)).collect();
    let staying = found.survey.layers.keys().filter(|layer| !going.contains(layer)).copied();
    let thin = thinnable(&found.survey, staying, &found.usage, found.policy.collect.thin_below_percent);
    items.extend(thin.iter().filter_map(|(pack, used)| {
        let size = found.survey.packs.get(pack).copied()?;
        let worth = is_sparse(size, *used, found.policy.collect.thin_below_percent) && found.unreadable.is_empty();
        worth.then(|| part_item(pack, size - used, found.today))
    }));
    Ok(CollectionPlan {
        at: time(found.today),
        generation: found.catalogue.generation(),
        grace_seconds: found.grace,
        waiting: waiting.or_else(|| unreadable_sentence(&found)),
        store_bytes: found.survey.bytes(),
        needed_bytes: decided.needed_bytes,
        over_quota_bytes: decided.over_quota,
        items,
    })
}

fn due_layer(one: &Unneeded, now: u64) -> Option<Digest> {
    match one.object {
        Object::Layer(layer) if one.due <= now => Some(layer),
        _ => None,
    }
}

/// One collection; what it did.
pub(super) fn collect(garbage: &Garbage, grace: Option<u64>) -> CollectionReport {
    let mut report = CollectionReport {
        started_at: Timestamp::now(),
        seconds: 0.0,
        stopped: None,
        freed_bytes: 0,
        items: Vec::new(),
        marked: 0,
        spared: 0,
        failures: Vec::new(),
    };
    if let Err(error) = try_collect(garbage, grace, &mut report) {
        report.stopped = Some(error.to_string());
    }
    report
}

/// Frees what was removed; what somebody still has open is freed by a later collection.
fn empty_trash(collection: &Collection<'_>) -> Result<(), GarbageError> {
    for path in collection.empty_trash()? {
        tracing::warn!("{} is still open somewhere and is removed later", path.display());
    }
    Ok(())
}

fn try_collect(garbage: &Garbage, grace: Option<u64>, report: &mut CollectionReport) -> Result<(), GarbageError> {
    let leased = match garbage.holds.held() {
        Held::Layers(leased) => leased,
        Held::NotYetKnown { until } => {
            report.stopped = Some(hosts_unknown(until));
            return Ok(());
        }
    };
    let collection = garbage.publisher.begin_collection().ok_or(GarbageError::Running)?;
    empty_trash(&collection)?;
    garbage.progress(CollectionPhase::Surveying, 0, 0);
    let mut found = find(garbage, grace)?;
    remember_use(garbage, &found, &leased)?;
    let relied = garbage.publisher.held();
    let decided = decide(&found, &leased, &relied)?;
    images_leave::leave(garbage, &found, &decided, report)?;
    // By the images that are there now: some may have been spared, others published.
    let needs = needs(&found, &garbage.publisher.catalogue(), &leased, &relied);
    let unneeded = without_doubt(&found, &needs);
    mark(garbage, &collection, &mut found, &unneeded, report)?;
    let due: Vec<&Unneeded> = unneeded.iter().filter(|one| is_due(&found, one)).collect();
    remove_layers(garbage, &collection, &mut found, &due, report)?;
    if let Some(why) = unreadable_sentence(&found) {
        report.failures.push(why);
        return Ok(());
    }
    packs_go::go(garbage, &collection, &found, &due, report)
}

/// Whether an object's grace is over, by its mark as it is now.
fn is_due(found: &Found, one: &Unneeded) -> bool {
    found.marks.get(&one.object).is_some_and(|since| since.saturating_add(found.grace) <= found.now)
}

/// Brings the marks up to date.
fn mark(
    garbage: &Garbage,
    collection: &Collection<'_>,
    found: &mut Found,
    unneeded: &[Unneeded],
    report: &mut CollectionReport,
) -> Result<(), StateError> {
    let objects = unneeded.iter().map(|one| one.object).collect();
    let lately = collection.held_lately();
    let renewed = |object: &Object| match object {
        Object::Layer(digest) | Object::Blob(digest) => lately.contains(digest),
        Object::Pack(_) => false,
    };
    Marks::of(&*garbage.state_db).update(&mut found.marks, &objects, &renewed, found.now)?;
    crash_point(CrashPoint::Marked);
    report.marked = unneeded.iter().filter(|one| !is_due(found, one)).count() as u64;
    Ok(())
}

/// Removes the layers and blobs that are due; what is gone leaves the survey.
fn remove_layers(
    garbage: &Garbage,
    collection: &Collection<'_>,
    found: &mut Found,
    due: &[&Unneeded],
    report: &mut CollectionReport,
) -> Result<(), GarbageError> {
    let also = |object: &Object| match object {
        Object::Layer(digest) => garbage.holds.holds(digest),
        Object::Blob(_) | Object::Pack(_) => false,
    };
    let due: Vec<_> = due.iter().filter(|one| !matches!(one.object, Object::Pack(_))).collect();
    for (turn, part) in due.chunks(TURN).enumerate() {
        garbage.progress(CollectionPhase::Layers, (turn * TURN) as u64, due.len() as u64);
        for one in part {
            let removal = collection.remove(&one.object, &also);
            if take(garbage, report, item(&one.object, one.bytes, one.reason.clone(), found.now), &one.object, removal)?
                && let Object::Layer(layer) = &one.object
            {
                found.survey.layers.remove(layer);
                found.unreadable.remove(layer);
            }
        }
        pause(garbage, collection)?;
    }
    Ok(())
}

/// Between two turns.
fn pause(garbage: &Garbage, collection: &Collection<'_>) -> Result<(), GarbageError> {
    empty_trash(collection)?;
    match garbage.stop.is_cancelled() {
        true => Err(GarbageError::Stopping),
        false => Ok(()),
    }
}

/// Notes what came of an attempt; tells whether the object is gone or thinner. Only the loss of the lead ends the collection.
fn take(
    garbage: &Garbage,
    report: &mut CollectionReport,
    item: GarbageItem,
    object: &Object,
    removal: store::error::Result<Removal>,
) -> Result<bool, GarbageError> {
    match removal {
        Ok(Removal::Done) => {
            garbage.sizes.forget(object);
            report.freed_bytes += item.bytes;
            report.items.push(item);
            Ok(true)
        }
        Ok(Removal::Needed) => {
            report.spared += 1;
            Ok(false)
        }
        Ok(Removal::Nothing) => Ok(false),
        Err(error @ store::Error::Fenced { .. }) => Err(error.into()),
        Err(error) => {
            if report.failures.len() < FAILURES_MAX {
                report.failures.push(error.to_string());
            }
            Ok(false)
        }
    }
}

/// Tells people what a collection did that somebody asked for, or that came at its hour.
pub(super) fn announce(events: &Events, report: &CollectionReport, by: Option<String>) {
    let images = report.items.iter().filter(|item| item.kind == GarbageKind::Image).count();
    let objects = report.items.len() - images;
    let done = format!(
        "{images} images left the catalogue, {objects} objects with {} bytes were removed, {} wait for their grace to end",
        report.freed_bytes, report.marked
    );
    let (severity, kind, message) = match (&report.stopped, report.failures.first()) {
        (Some(why), _) => (Severity::Warning, "collection.stopped", format!("a collection ended early: {why}; {done}")),
        (None, Some(why)) => (Severity::Warning, "collection.incomplete", format!("{done}; not all could be: {why}")),
        (None, None) => (Severity::Info, "collection.finished", done),
    };
    let news = NewEvent::new(severity, kind, "store", message);
    events.record(match by {
        Some(actor) => news.by(actor),
        None => news,
    });
}

fn departed(departure: &Departure, now: u64) -> GarbageItem {
    GarbageItem {
        kind: GarbageKind::Image,
        name: departure.image.familiar_name(),
        bytes: departure.bytes,
        reason: departure.reason.clone(),
        due: time(now),
    }
}

fn item(object: &Object, bytes: u64, reason: GarbageReason, due: u64) -> GarbageItem {
    let (kind, name) = match object {
        Object::Layer(digest) => (GarbageKind::Layer, digest.to_string()),
        Object::Blob(digest) => (GarbageKind::Blob, digest.to_string()),
        Object::Pack(pack) => (GarbageKind::Pack, pack.to_string()),
    };
    GarbageItem { kind, name, bytes, reason, due: time(due) }
}

fn part_item(pack: &ContentDigest, bytes: u64, now: u64) -> GarbageItem {
    let (kind, reason) = (GarbageKind::PackPart, GarbageReason::MostlyUnused);
    GarbageItem { kind, name: pack.to_string(), bytes, reason, due: time(now) }
}

fn time(seconds: u64) -> Timestamp {
    i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok()).unwrap_or(Timestamp::MAX)
}

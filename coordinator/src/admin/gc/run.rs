//! One collection: what it finds, decides and does. A dry run is the same up to the decision.
//!
//! Each step checks again what it is about to remove, so an outdated plan costs nothing but the attempt. A collection that is
//! interrupted leaves marks and an intact store; the next one continues.

use std::collections::{BTreeSet, HashMap, HashSet};

use coordinator_api::event::Severity;
use coordinator_api::retention::{CollectionPhase, CollectionPlan, CollectionReport, GarbageItem, GarbageKind};
use jiff::Timestamp;
use store::Digest;
use store::crash::{CrashPoint, crash_point};
use store::publisher::{Collection, Object};

use super::collector::GarbageCollector;
use super::error::GarbageError;
use super::findings::{Found, decide, find, is_due, is_leased, needs, without_doubt};
use super::marks::Marks;
use super::objects::{Unneeded, is_sparse, thinnable};
use super::step::{departed, empty_trash, item, part_item, pause, take};
use super::{remove_images, remove_packs};
use crate::identity::hosts::LayersInUse;
use crate::state::clock::timestamp;
use crate::state::events::{Events, NewEvent};
use crate::state::state_db::StateError;

/// Objects removed between two pauses, in which the trash is emptied and a stop is noticed.
const BATCH: usize = 256;
/// Why nothing is collected just after this coordinator began to lead.
fn hosts_unknown(until: Timestamp) -> String {
    format!("hosts have not all been heard of since this coordinator leads: nothing is collected before {until:.0}")
}

/// Records which images are in use now, for the quota.
fn remember_use(collector: &GarbageCollector, found: &Found, leased: &BTreeSet<Digest>) -> Result<(), StateError> {
    let images: HashMap<String, bool> =
        found.catalogue.images().map(|image| (image.familiar_name(), is_leased(image, leased))).collect();
    let used = images.iter().filter(|(_, in_use)| **in_use).map(|(name, _)| name.as_str());
    let gone = found.in_use.keys().filter(|name| !images.contains_key(*name)).map(String::as_str);
    Marks::of(&*collector.state_db).update_in_use(used, gone, found.today)
}

fn unreadable_sentence(found: &Found) -> Option<String> {
    let (layer, why) = found.unreadable.first_key_value()?;
    Some(format!("no pack is removed while layer {layer} cannot be read ({why}): run cachefsctl fsck --repair"))
}

/// What a collection would do now.
pub(super) fn plan(collector: &GarbageCollector, grace: Option<u64>) -> Result<CollectionPlan, GarbageError> {
    let (waiting, leased) = match collector.holds.layers_in_use() {
        LayersInUse::NotYetKnown { until } => (Some(hosts_unknown(until)), BTreeSet::new()),
        LayersInUse::Layers(layers) => (None, layers),
    };
    let found = find(collector, grace)?;
    let decided = decide(&found, &leased, &collector.publisher.held())?;
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
        at: timestamp(found.today),
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

/// Runs one collection and reports what it did.
pub(super) fn collect(collector: &GarbageCollector, grace: Option<u64>) -> CollectionReport {
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
    if let Err(error) = try_collect(collector, grace, &mut report) {
        report.stopped = Some(error.to_string());
    }
    report
}

fn try_collect(
    collector: &GarbageCollector,
    grace: Option<u64>,
    report: &mut CollectionReport,
) -> Result<(), GarbageError> {
    let leased = match collector.holds.layers_in_use() {
        LayersInUse::Layers(leased) => leased,
        LayersInUse::NotYetKnown { until } => {
            report.stopped = Some(hosts_unknown(until));
            return Ok(());
        }
    };
    let collection = collector.publisher.begin_collection().ok_or(GarbageError::Running)?;
    empty_trash(&collection)?;
    collector.progress(CollectionPhase::Surveying, 0, 0);
    let mut found = find(collector, grace)?;
    remember_use(collector, &found, &leased)?;
    let relied = collector.publisher.held();
    let decided = decide(&found, &leased, &relied)?;
    remove_images::remove(collector, &found, &decided, report)?;
    // Based on the images that exist now: some may have been spared, others published.
    let needs = needs(&found, &collector.publisher.catalogue(), &leased, &relied);
    let unneeded = without_doubt(&found, &needs);
    mark(collector, &collection, &mut found, &unneeded, report)?;
    let due: Vec<&Unneeded> = unneeded.iter().filter(|one| is_due(&found, one)).collect();
    remove_layers(collector, &collection, &mut found, &due, report)?;
    if let Some(why) = unreadable_sentence(&found) {
        report.failures.push(why);
        return Ok(());
    }
    remove_packs::remove(collector, &collection, &found, &due, report)
}

/// Updates the marks.
fn mark(
    collector: &GarbageCollector,
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
    Marks::of(&*collector.state_db).update(&mut found.marks, &objects, &renewed, found.now)?;
    crash_point(CrashPoint::Marked);
    report.marked = unneeded.iter().filter(|one| !is_due(found, one)).count() as u64;
    Ok(())
}

/// Removes the layers and blobs that are due. Removed layers leave the survey.
fn remove_layers(
    collector: &GarbageCollector,
    collection: &Collection<'_>,
    found: &mut Found,
    due: &[&Unneeded],
    report: &mut CollectionReport,
) -> Result<(), GarbageError> {
    let also = |object: &Object| match object {
        Object::Layer(digest) => collector.holds.holds(digest),
        Object::Blob(_) | Object::Pack(_) => false,
    };
    let due: Vec<_> = due.iter().filter(|one| !matches!(one.object, Object::Pack(_))).collect();
    for (batch, part) in due.chunks(BATCH).enumerate() {
        collector.progress(CollectionPhase::Layers, (batch * BATCH) as u64, due.len() as u64);
        for one in part {
            let removal = collection.remove(&one.object, &also);
            if take(
                collector,
                report,
                item(&one.object, one.bytes, one.reason.clone(), found.now),
                &one.object,
                removal,
            )? && let Object::Layer(layer) = &one.object
            {
                found.survey.layers.remove(layer);
                found.unreadable.remove(layer);
            }
        }
        pause(collector, collection)?;
    }
    Ok(())
}

/// Records the event of a collection; `by` is who requested it, if anybody did.
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
    let event = NewEvent::new(severity, kind, "store", message);
    events.record(match by {
        Some(actor) => event.by(actor),
        None => event,
    });
}

//! What a collection finds in the store, and what it decides.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use coordinator_api::retention::RetentionPolicy;
use store::Digest;
use store::catalogue::Catalogue;
use store::image::ImageRecord;
use store::publisher::Object;

use super::collector::GarbageCollector;
use super::error::GarbageError;
use super::images::{Candidate, Departure, departures};
use super::marks::{Marks, Remembered};
use super::objects::{Needs, Unneeded, unneeded};
use super::rules::Rules;
use super::survey::StoreSizes;
use super::usage::{self, LayerUse, Usage};

/// The facts that a collection decides on.
pub(super) struct Found {
    pub(super) catalogue: Catalogue,
    pub(super) policy: RetentionPolicy,
    pub(super) grace: u64,
    /// The counted time, by which objects age, seconds since 1970.
    pub(super) now: u64,
    /// The time to compare with times from the machine's clock, seconds since 1970.
    pub(super) today: u64,
    pub(super) survey: StoreSizes,
    pub(super) usage: Usage,
    pub(super) marks: HashMap<Object, u64>,
    /// When images were last seen in use, by familiar name.
    pub(super) in_use: HashMap<String, u64>,
    /// Layers whose index cannot be read, or is missing although an image needs it, with the reason. The packs that they use are
    /// unknown, so no pack is removed.
    pub(super) unreadable: BTreeMap<Digest, String>,
}

/// What a collection decides.
pub(super) struct Decided {
    pub(super) departures: Vec<Departure>,
    pub(super) over_quota: u64,
    pub(super) needed_bytes: u64,
    pub(super) unneeded: Vec<Unneeded>,
}

/// Surveys the store and reads what the database remembers.
pub(super) fn find(collector: &GarbageCollector, grace: Option<u64>) -> Result<Found, GarbageError> {
    let table = Marks::of(&*collector.state_db);
    let policy = table.policy()?;
    let catalogue = collector.publisher.catalogue();
    let store = collector.publisher.store();
    let survey = collector.sizes.survey(store)?;
    let Remembered { marks, usage: mut known, in_use } = table.remembered()?;
    let (mut new, mut unreadable): (Vec<(Digest, LayerUse)>, _) = (Vec::new(), BTreeMap::new());
    for layer in survey.layers.keys().filter(|layer| !known.contains_key(layer)) {
        if collector.stop.is_cancelled() {
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
    let (now, today) = (collector.ages.now(), collector.ages.today());
    Ok(Found { catalogue, policy, grace, now, today, survey, usage: Usage::new(known), marks, in_use, unreadable })
}

/// Decides what goes. `leased` are layers that hosts need, `relied` are digests that pulls hold.
pub(super) fn decide(
    found: &Found,
    leased: &BTreeSet<Digest>,
    relied: &HashSet<Digest>,
) -> Result<Decided, GarbageError> {
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
pub(super) fn needs(
    found: &Found,
    catalogue: &Catalogue,
    leased: &BTreeSet<Digest>,
    relied: &HashSet<Digest>,
) -> Needs {
    let startups = catalogue.startups().map(|startup| (startup.chain, startup.pack)).collect();
    let mut needs = Needs::new(&found.survey, &found.usage, startups);
    catalogue.images().for_each(|image| needs.require(image));
    leased.iter().chain(relied).for_each(|digest| needs.require_digest(digest));
    needs
}

/// Unneeded objects. Packs are left out unless the packs of every layer are known.
pub(super) fn without_doubt(found: &Found, needs: &Needs) -> Vec<Unneeded> {
    let mut unneeded = unneeded(&found.survey, needs, &found.usage, &found.marks, found.now, found.grace);
    if !found.unreadable.is_empty() {
        unneeded.retain(|one| !matches!(one.object, Object::Pack(_)));
    }
    unneeded
}

/// Whether live hosts lease all layers of an image.
pub(super) fn is_leased(image: &ImageRecord, leased: &BTreeSet<Digest>) -> bool {
    !image.layers.is_empty() && image.layers.iter().all(|layer| leased.contains(&layer.diff_id))
}

/// Whether an object's grace is over, according to its current mark.
pub(super) fn is_due(found: &Found, one: &Unneeded) -> bool {
    found.marks.get(&one.object).is_some_and(|since| since.saturating_add(found.grace) <= found.now)
}

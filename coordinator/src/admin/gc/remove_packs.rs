//! Removes and thins packs, after all coordinators have forgotten the pieces in them; see [`crate::admin::gc`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use coordinator_api::retention::{CollectionPhase, CollectionReport};
use store::ContentDigest;
use store::chunk::{ChunkRef, PieceLocation};
use store::crash::{CrashPoint, crash_point};
use store::publisher::{Collection, Object};

use super::collector::GarbageCollector;
use super::error::GarbageError;
use super::findings::Found;
use super::marks::Marks;
use super::objects::{Unneeded, is_sparse, thinnable};
use super::step::{item, part_item, pause, take};
use super::usage::chunks;

/// How long to wait for unpacking that began before. If it takes longer, the packs stay until the next collection.
const UNPACKING_TIMEOUT: Duration = Duration::from_secs(600);

/// The chunks of a pack that are in use, by offset.
type Live = BTreeMap<u64, ChunkRef>;

/// The packs to remove and to thin.
#[derive(Default)]
struct RemovalPlan<'a> {
    whole: HashMap<ContentDigest, &'a Unneeded>,
    thin: HashMap<ContentDigest, (u64, Live)>,
}

impl RemovalPlan<'_> {
    /// Whether a piece lies in a part that is about to go.
    fn covers(&self, location: &PieceLocation) -> bool {
        let pack = &location.chunk.pack;
        self.whole.contains_key(pack)
            || self.thin.get(pack).is_some_and(|(_, live)| !live.contains_key(&location.chunk.offset))
    }
}

/// Removes the packs that are due and that no layer uses, and thins those that are mostly unused.
pub(super) fn remove(
    collector: &GarbageCollector,
    collection: &Collection<'_>,
    found: &Found,
    due: &[&Unneeded],
    report: &mut CollectionReport,
) -> Result<(), GarbageError> {
    for pack in &found.survey.stray_records {
        collection.remove_stray_record(pack)?;
    }
    let plan = plan_removal(collector, found, due)?;
    if plan.whole.is_empty() && plan.thin.is_empty() {
        return pause(collector, collection);
    }
    collector.state_db.forget_locations(&|location| plan.covers(location))?;
    crash_point(CrashPoint::Forgotten);
    let publisher = &collector.publisher;
    let number = collection.announce()?;
    Marks::of(&*collector.state_db).set_collected(publisher.store().identity(), publisher.epoch(), number)?;
    crash_point(CrashPoint::NumberKept);
    let total = (plan.whole.len() + plan.thin.len()) as u64;
    collector.progress(CollectionPhase::Waiting, 0, total);
    if !collection.wait_for_work(UNPACKING_TIMEOUT, &|| collector.stop.is_cancelled()) {
        let minutes = UNPACKING_TIMEOUT.as_secs() / 60;
        report.failures.push(format!("{total} packs stay: layers are being unpacked for more than {minutes} minutes"));
        return pause(collector, collection);
    }
    execute(collector, collection, found, plan, report)
}

/// Decides by the layers that are in the store now.
fn plan_removal<'a>(
    collector: &GarbageCollector,
    found: &Found,
    due: &[&'a Unneeded],
) -> Result<RemovalPlan<'a>, GarbageError> {
    let present = || found.survey.layers.keys().copied();
    let used: HashSet<ContentDigest> = present()
        .flat_map(|layer| found.usage.packs(&layer).iter().map(|(pack, _)| *pack).collect::<Vec<_>>())
        .collect();
    let mut plan = RemovalPlan::default();
    for one in due {
        if let Object::Pack(pack) = one.object
            && !used.contains(&pack)
        {
            plan.whole.insert(pack, *one);
        }
    }
    let percent = found.policy.collect.thin_below_percent;
    let candidates = thinnable(&found.survey, present(), &found.usage, percent);
    if candidates.is_empty() {
        return Ok(plan);
    }
    let mut live: HashMap<ContentDigest, Live> = HashMap::new();
    let users =
        present().filter(|layer| found.usage.packs(layer).iter().any(|(pack, _)| candidates.contains_key(pack)));
    for layer in users {
        let index = collector.publisher.store().index(&layer)?;
        for chunk in chunks(&index) {
            let chunk = chunk?;
            if candidates.contains_key(&chunk.pack) {
                live.entry(chunk.pack).or_default().insert(chunk.offset, chunk);
            }
        }
    }
    for (pack, live) in live {
        let size = found.survey.packs.get(&pack).copied().unwrap_or(0);
        let used = live.values().map(|chunk| u64::from(chunk.stored_len)).sum();
        if is_sparse(size, used, percent) {
            plan.thin.insert(pack, (size - used, live));
        }
    }
    Ok(plan)
}

fn execute(
    collector: &GarbageCollector,
    collection: &Collection<'_>,
    found: &Found,
    plan: RemovalPlan<'_>,
    report: &mut CollectionReport,
) -> Result<(), GarbageError> {
    let total = (plan.whole.len() + plan.thin.len()) as u64;
    let mut done = 0;
    let mut step = || {
        collector.progress(CollectionPhase::Packs, done, total);
        done += 1;
        pause(collector, collection)
    };
    for (pack, one) in plan.whole {
        step()?;
        let removal = collection.remove(&Object::Pack(pack), &|_| false);
        take(collector, report, item(&one.object, one.bytes, one.reason.clone(), found.now), &one.object, removal)?;
    }
    for (pack, (bytes, live)) in plan.thin {
        step()?;
        let live: Vec<ChunkRef> = live.into_values().collect();
        let removal = collection.thin(pack, &live);
        take(collector, report, part_item(&pack, bytes, found.now), &Object::Pack(pack), removal)?;
    }
    pause(collector, collection)
}

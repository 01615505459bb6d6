//! Removing and thinning packs, after everybody has forgotten the pieces in them; see the head of [`crate::admin::gc`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use coordinator_api::retention::{CollectionPhase, CollectionReport};
use store::ContentDigest;
use store::chunk::{ChunkRef, PieceLocation};
use store::crash::{CrashPoint, crash_point};
use store::publisher::{Collection, Object};

use super::{Found, item, part_item, pause, take};
use crate::admin::gc::marks::Marks;
use crate::admin::gc::objects::{Unneeded, is_sparse, thinnable};
use crate::admin::gc::usage::chunks;
use crate::admin::gc::{Garbage, GarbageError};

/// How long earlier unpacking is waited for. Beyond that the packs stay for the next collection.
const PATIENCE: Duration = Duration::from_secs(600);

/// The chunks of a pack that are in use, by offset.
type Live = BTreeMap<u64, ChunkRef>;

/// What is to become of packs.
#[derive(Default)]
struct Condemned<'a> {
    whole: HashMap<ContentDigest, &'a Unneeded>,
    thin: HashMap<ContentDigest, (u64, Live)>,
}

impl Condemned<'_> {
    /// Whether a piece lies in what goes.
    fn covers(&self, location: &PieceLocation) -> bool {
        let pack = &location.chunk.pack;
        self.whole.contains_key(pack)
            || self.thin.get(pack).is_some_and(|(_, live)| !live.contains_key(&location.chunk.offset))
    }
}

/// Removes the packs that are due and that no layer uses, and thins those of which little is used.
pub(super) fn go(
    garbage: &Garbage,
    collection: &Collection<'_>,
    found: &Found,
    due: &[&Unneeded],
    report: &mut CollectionReport,
) -> Result<(), GarbageError> {
    for pack in &found.survey.stray_records {
        collection.remove_stray_record(pack)?;
    }
    let condemned = condemn(garbage, found, due)?;
    if condemned.whole.is_empty() && condemned.thin.is_empty() {
        return pause(garbage, collection);
    }
    garbage.state_db.forget_locations(&|location| condemned.covers(location))?;
    crash_point(CrashPoint::Forgotten);
    let publisher = &garbage.publisher;
    let number = collection.announce()?;
    Marks::of(&*garbage.state_db).set_collected(publisher.store().identity(), publisher.epoch(), number)?;
    crash_point(CrashPoint::NumberKept);
    let total = (condemned.whole.len() + condemned.thin.len()) as u64;
    garbage.progress(CollectionPhase::Waiting, 0, total);
    if !collection.wait_for_work(PATIENCE, &|| garbage.stop.is_cancelled()) {
        let minutes = PATIENCE.as_secs() / 60;
        report.failures.push(format!("{total} packs stay: layers are being unpacked for more than {minutes} minutes"));
        return pause(garbage, collection);
    }
    execute(garbage, collection, found, condemned, report)
}

/// Decides by the layers that are in the store now.
fn condemn<'a>(garbage: &Garbage, found: &Found, due: &[&'a Unneeded]) -> Result<Condemned<'a>, GarbageError> {
    let present = || found.survey.layers.keys().copied();
    let used: HashSet<ContentDigest> = present()
        .flat_map(|layer| found.usage.packs(&layer).iter().map(|(pack, _)| *pack).collect::<Vec<_>>())
        .collect();
    let mut condemned = Condemned::default();
    for one in due {
        if let Object::Pack(pack) = one.object
            && !used.contains(&pack)
        {
            condemned.whole.insert(pack, *one);
        }
    }
    let percent = found.policy.collect.thin_below_percent;
    let candidates = thinnable(&found.survey, present(), &found.usage, percent);
    if candidates.is_empty() {
        return Ok(condemned);
    }
    let mut live: HashMap<ContentDigest, Live> = HashMap::new();
    let users =
        present().filter(|layer| found.usage.packs(layer).iter().any(|(pack, _)| candidates.contains_key(pack)));
    for layer in users {
        let index = garbage.publisher.store().index(&layer)?;
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
            condemned.thin.insert(pack, (size - used, live));
        }
    }
    Ok(condemned)
}

fn execute(
    garbage: &Garbage,
    collection: &Collection<'_>,
    found: &Found,
    condemned: Condemned<'_>,
    report: &mut CollectionReport,
) -> Result<(), GarbageError> {
    let total = (condemned.whole.len() + condemned.thin.len()) as u64;
    let mut done = 0;
    let mut step = || {
        garbage.progress(CollectionPhase::Packs, done, total);
        done += 1;
        pause(garbage, collection)
    };
    for (pack, one) in condemned.whole {
        step()?;
        let removal = collection.remove(&Object::Pack(pack), &|_| false);
        take(garbage, report, item(&one.object, one.bytes, one.reason.clone(), found.now), &one.object, removal)?;
    }
    for (pack, (bytes, live)) in condemned.thin {
        step()?;
        let live: Vec<ChunkRef> = live.into_values().collect();
        let removal = collection.thin(pack, &live);
        take(garbage, report, part_item(&pack, bytes, found.now), &Object::Pack(pack), removal)?;
    }
    pause(garbage, collection)
}

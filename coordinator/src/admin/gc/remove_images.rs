//! Removes images from the catalogue, each after a second look at what protects it.

use coordinator_api::event::Severity;
use coordinator_api::retention::{CollectionPhase, CollectionReport, GarbageReason};
use store::catalogue::{Catalogue, Change};
use store::crash::{CrashPoint, crash_point};

use super::collector::GarbageCollector;
use super::error::GarbageError;
use super::findings::{Decided, Found};
use super::images::Departure;
use super::step::departed;
use crate::state::events::NewEvent;

/// Images removed with one generation of the catalogue.
const AT_ONCE: usize = 64;

/// Removes the images that were decided on.
pub(super) fn remove(
    collector: &GarbageCollector,
    found: &Found,
    decided: &Decided,
    report: &mut CollectionReport,
) -> Result<(), GarbageError> {
    let Decided { departures, over_quota, .. } = decided;
    for (batch, part) in departures.chunks(AT_ONCE).enumerate() {
        collector.progress(CollectionPhase::Images, (batch * AT_ONCE) as u64, departures.len() as u64);
        let mut left = Vec::new();
        collector.publisher.commit_with(|catalogue| {
            let (going, staying): (Vec<_>, Vec<_>) =
                part.iter().partition(|departure| may_leave(collector, catalogue, departure));
            report.spared += staying.len() as u64;
            left = going;
            Ok(left.iter().map(|departure| removal(departure)).collect())
        })?;
        crash_point(CrashPoint::Departed);
        for departure in left {
            tell(collector, departure);
            // The bytes count as freed only when they are.
            let mut item = departed(departure, found.today);
            item.bytes = 0;
            report.items.push(item);
        }
    }
    if *over_quota > 0 {
        let message = format!(
            "the images that must stay need {over_quota} bytes more than the quota's low mark: raise the quota, or unpin or remove some"
        );
        collector.events.record(NewEvent::new(Severity::Warning, "quota.exceeded", "store", message));
    }
    Ok(())
}

/// Whether the image is still the one that was decided on and nothing protects it now.
fn may_leave(collector: &GarbageCollector, catalogue: &Catalogue, departure: &Departure) -> bool {
    let image = &departure.image;
    let is_same = catalogue.images().any(|present| {
        (&present.repository, &present.tag, present.target, present.published_at)
            == (&image.repository, &image.tag, image.target, image.published_at)
    });
    let in_use = !image.layers.is_empty() && image.layers.iter().all(|layer| collector.holds.holds(&layer.diff_id));
    is_same && !in_use && !catalogue.is_pinned(image)
}

fn removal(departure: &Departure) -> Change {
    let image = &departure.image;
    Change::Remove { repository: image.repository.clone(), tag: image.tag.clone(), target: image.target }
}

fn tell(collector: &GarbageCollector, departure: &Departure) {
    let name = departure.image.familiar_name();
    let why = match &departure.reason {
        GarbageReason::Rule { pattern } => format!("no limit of the rule {pattern} keeps it"),
        _ => "the store is larger than its quota".to_owned(),
    };
    let event = NewEvent::new(Severity::Info, "image.expired", &name, format!("{name} left the catalogue: {why}"));
    collector.events.record(event.by("retention"));
}

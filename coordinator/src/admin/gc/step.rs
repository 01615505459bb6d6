//! Single steps of a collection: one object is removed or stays, and the report says which.

use coordinator_api::retention::{CollectionReport, GarbageItem, GarbageKind, GarbageReason};
use store::ContentDigest;
use store::publisher::{Collection, Object, Removal};

use super::collector::GarbageCollector;
use super::error::GarbageError;
use super::images::Departure;
use crate::state::clock::timestamp;

/// Failures that are listed. Further ones most likely have the same cause.
const FAILURES_MAX: usize = 20;

/// Frees what was removed. Files that are still open somewhere are freed by a later collection.
pub(super) fn empty_trash(collection: &Collection<'_>) -> Result<(), GarbageError> {
    for path in collection.empty_trash()? {
        tracing::warn!("{} is still open somewhere and is removed later", path.display());
    }
    Ok(())
}

/// Empties the trash and checks for a stop, between two batches.
pub(super) fn pause(collector: &GarbageCollector, collection: &Collection<'_>) -> Result<(), GarbageError> {
    empty_trash(collection)?;
    if collector.stop.is_cancelled() { Err(GarbageError::Stopping) } else { Ok(()) }
}

/// Records the result of a removal; returns whether the object is gone or thinner. Only the loss of the lease ends the
/// collection.
pub(super) fn take(
    collector: &GarbageCollector,
    report: &mut CollectionReport,
    item: GarbageItem,
    object: &Object,
    removal: store::error::Result<Removal>,
) -> Result<bool, GarbageError> {
    match removal {
        Ok(Removal::Done) => {
            collector.sizes.forget(object);
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

pub(super) fn departed(departure: &Departure, now: u64) -> GarbageItem {
    GarbageItem {
        kind: GarbageKind::Image,
        name: departure.image.familiar_name(),
        bytes: departure.bytes,
        reason: departure.reason.clone(),
        due: timestamp(now),
    }
}

pub(super) fn item(object: &Object, bytes: u64, reason: GarbageReason, due: u64) -> GarbageItem {
    let (kind, name) = match object {
        Object::Layer(digest) => (GarbageKind::Layer, digest.to_string()),
        Object::Blob(digest) => (GarbageKind::Blob, digest.to_string()),
        Object::Pack(pack) => (GarbageKind::Pack, pack.to_string()),
    };
    GarbageItem { kind, name, bytes, reason, due: timestamp(due) }
}

pub(super) fn part_item(pack: &ContentDigest, bytes: u64, now: u64) -> GarbageItem {
    let (kind, reason) = (GarbageKind::PackPart, GarbageReason::MostlyUnused);
    GarbageItem { kind, name: pack.to_string(), bytes, reason, due: timestamp(now) }
}

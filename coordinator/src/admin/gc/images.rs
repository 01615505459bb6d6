//! Which images leave the catalogue: first those that no limit of their rule keeps, then, if space is short, those that have not
//! been used for longest. Pure: the same facts always give the same answer.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use coordinator_api::retention::{GarbageReason, Quota};
use store::image::{ImageRecord, RequestedBy};

use super::objects::Needs;
use super::rules::Rules;

/// An image and the facts that decide about it.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    /// The image.
    pub(super) image: Arc<ImageRecord>,
    /// Pinned, leased by a host, or being pulled: it stays regardless of rules and quota.
    pub(super) protected: bool,
    /// When it was last used or published, seconds since 1970.
    pub(super) last_used: u64,
}

/// An image that leaves the catalogue.
#[derive(Debug, Clone)]
pub(super) struct Departure {
    /// The image.
    pub(super) image: Arc<ImageRecord>,
    /// Why it leaves.
    pub(super) reason: GarbageReason,
    /// Bytes that nothing else needs once it is gone.
    pub(super) bytes: u64,
}

/// How strongly an image's rule keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Retained {
    /// No limit keeps it: it leaves, unless it is protected.
    No,
    /// No rule limits it; it stays unless the quota takes it.
    WithoutLimit,
    /// Its rule keeps it for some time yet; the quota takes it only after all that are kept freely.
    UntilExpiry,
    /// It is among the last images of its repository; the quota does not take it.
    AmongLast,
}

/// How strongly the rules keep each image.
fn judge(candidates: &[Candidate], rules: &Rules, now: u64) -> Vec<Retained> {
    let governed: Vec<Option<usize>> = candidates.iter().map(|candidate| rules.first(&candidate.image)).collect();
    // Images that hosts had pulled are counted separately: they take no place among the last from images that operators ordered.
    let mut groups: HashMap<(usize, &str, RequestedBy), Vec<usize>> = HashMap::new();
    for (number, rule) in governed.iter().enumerate() {
        if let Some(rule) = rule {
            let image = &candidates[number].image;
            groups.entry((*rule, &image.repository, image.ordered_by)).or_default().push(number);
        }
    }
    let mut kept = vec![Retained::WithoutLimit; candidates.len()];
    for ((rule, ..), mut members) in groups {
        let rule = rules.get(rule);
        members.sort_by_key(|number| {
            let image = &candidates[*number].image;
            // Among images published in the same second, later names count as later versions.
            Reverse((image.published_at, image.tag.clone(), image.target))
        });
        for (place, number) in members.into_iter().enumerate() {
            let age = now.saturating_sub(candidates[number].image.published_at);
            kept[number] = match (rule.keep_last, rule.keep_for_seconds) {
                (Some(last), _) if place < last as usize => Retained::AmongLast,
                (_, Some(time)) if age < time => Retained::UntilExpiry,
                (None, None) => Retained::WithoutLimit,
                _ => Retained::No,
            };
        }
    }
    kept
}

/// The images that leave, in order, and the number of bytes by which the rest exceeds the quota's low mark although nothing more
/// may leave. `needs` starts as what all candidates need, and ends as what the remaining ones need.
pub(super) fn departures(
    candidates: &[Candidate],
    rules: &Rules,
    quota: Option<&Quota>,
    now: u64,
    needs: &mut Needs,
) -> (Vec<Departure>, u64) {
    let kept = judge(candidates, rules, now);
    let mut leaving = Vec::new();
    let mut left: Vec<(Retained, &Candidate)> = Vec::new();
    for (candidate, kept) in candidates.iter().zip(kept) {
        match (kept, candidate.protected, rules.first(&candidate.image)) {
            (Retained::No, false, Some(rule)) => {
                let reason = GarbageReason::Rule { pattern: rules.get(rule).pattern.clone() };
                let bytes = needs.release(&candidate.image);
                leaving.push(Departure { image: Arc::clone(&candidate.image), reason, bytes });
            }
            (_, true, _) | (Retained::AmongLast, ..) => {}
            (kept, ..) => left.push((kept, candidate)),
        }
    }
    let Some(quota) = quota else { return (leaving, 0) };
    let mark = |percent: u8| (u128::from(quota.limit_bytes) * u128::from(percent) / 100) as u64;
    if needs.bytes() <= mark(quota.high_percent) {
        return (leaving, 0);
    }
    left.sort_by_key(|(kept, candidate)| {
        let image = &candidate.image;
        (*kept, candidate.last_used, image.repository.clone(), image.tag.clone(), image.target)
    });
    for (_, candidate) in left {
        if needs.bytes() <= mark(quota.low_percent) {
            break;
        }
        let bytes = needs.release(&candidate.image);
        leaving.push(Departure { image: Arc::clone(&candidate.image), reason: GarbageReason::Quota, bytes });
    }
    (leaving, needs.bytes().saturating_sub(mark(quota.low_percent)))
}

#[cfg(test)]
mod tests;

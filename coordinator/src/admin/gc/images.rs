//! Which images leave the catalogue: first those that no limit of their rule keeps, then for want of space those that were not
//! used for longest. Pure: the same facts always give the same answer.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use coordinator_api::retention::{GarbageReason, Quota};
use store::image::{ImageRecord, OrderedBy};

use super::objects::Needs;
use super::rules::Rules;

/// An image and what is known of it.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    /// The image.
    pub(super) image: Arc<ImageRecord>,
    /// Pinned, leased by a host, or being pulled: it stays whatever the rules and the quota say.
    pub(super) protected: bool,
    /// When it was last used or published, seconds since 1970.
    pub(super) last_used: u64,
}

/// An image that leaves.
#[derive(Debug, Clone)]
pub(super) struct Departure {
    /// The image.
    pub(super) image: Arc<ImageRecord>,
    /// Why.
    pub(super) reason: GarbageReason,
    /// Bytes that nothing else needs any more.
    pub(super) bytes: u64,
}

/// How strongly an image's rule keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kept {
    /// Not at all: it leaves.
    No,
    /// No rule says anything of it.
    Freely,
    /// Its rule keeps it for some time yet; the quota takes it after those that are kept freely.
    ForNow,
    /// It is one of the last of its repository; the quota leaves it alone.
    Last,
}

/// What the rules say of each image.
fn judge(candidates: &[Candidate], rules: &Rules, now: u64) -> Vec<Kept> {
    let governed: Vec<Option<usize>> = candidates.iter().map(|candidate| rules.first(&candidate.image)).collect();
    // What hosts had pulled is counted by itself: it takes nobody else's place among the last.
    let mut groups: HashMap<(usize, &str, OrderedBy), Vec<usize>> = HashMap::new();
    for (number, rule) in governed.iter().enumerate() {
        if let Some(rule) = rule {
            let image = &candidates[number].image;
            groups.entry((*rule, &image.repository, image.ordered_by)).or_default().push(number);
        }
    }
    let mut kept = vec![Kept::Freely; candidates.len()];
    for ((rule, ..), mut members) in groups {
        let rule = rules.get(rule);
        members.sort_by_key(|number| {
            let image = &candidates[*number].image;
            // Of those that were published in the same second, the later names are taken for the later versions.
            Reverse((image.published_at, image.tag.clone(), image.target))
        });
        for (place, number) in members.into_iter().enumerate() {
            let age = now.saturating_sub(candidates[number].image.published_at);
            kept[number] = match (rule.keep_last, rule.keep_for_seconds) {
                (Some(last), _) if place < last as usize => Kept::Last,
                (_, Some(time)) if age < time => Kept::ForNow,
                (None, None) => Kept::Freely,
                _ => Kept::No,
            };
        }
    }
    kept
}

/// The images that leave, in the order in which they do, and the bytes by which what remains exceeds the quota's low mark
/// although nothing more may leave. `needs` is what the candidates need, and in the end what the remaining ones do.
pub(super) fn departures(
    candidates: &[Candidate],
    rules: &Rules,
    quota: Option<&Quota>,
    now: u64,
    needs: &mut Needs,
) -> (Vec<Departure>, u64) {
    let kept = judge(candidates, rules, now);
    let mut leaving = Vec::new();
    let mut left: Vec<(Kept, &Candidate)> = Vec::new();
    for (candidate, kept) in candidates.iter().zip(kept) {
        match (kept, candidate.protected, rules.first(&candidate.image)) {
            (Kept::No, false, Some(rule)) => {
                let reason = GarbageReason::Rule { pattern: rules.get(rule).pattern.clone() };
                let bytes = needs.release(&candidate.image);
                leaving.push(Departure { image: Arc::clone(&candidate.image), reason, bytes });
            }
            (_, true, _) | (Kept::Last, ..) => {}
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

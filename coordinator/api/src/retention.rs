//! What is kept in the store and for how long, and what a garbage collection does about the rest.
//!
//! The policy has three parts. **Rules** say which images leave the catalogue by age and number. The **quota** says
//! which ones leave it for lack of space. The **settings** say when and how carefully the bytes behind them are
//! removed.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::quantity::{optional_seconds, seconds, size_in_bytes};

/// Everything that decides what the store keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RetentionPolicy {
    /// For each image, the first rule whose pattern it matches counts; an image that matches none is kept for ever.
    #[serde(default)]
    pub rules: Vec<RetentionRule>,
    /// How large the store may grow; none: as large as its disk.
    #[serde(default)]
    pub quota: Option<Quota>,
    /// When collections run, and how.
    #[serde(default)]
    pub collect: CollectSettings,
}

/// Which images of those that match a pattern are kept. An image that no limit keeps leaves the catalogue; a rule
/// without limits keeps all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RetentionRule {
    /// Images by name, with `*` for anything but a slash, `**` for anything, `?` and `[a-z]`: `registry.io/team/*:pr-*`. Without
    /// a tag it means all tags. Both forms of a name are tried: `debian:12` and `docker.io/library/debian:12`.
    pub pattern: String,
    /// Keeps this many of the latest images of each repository: of those that people and schedules ordered, and as many
    /// again of those that hosts had pulled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_last: Option<u32>,
    /// Keeps images for this many seconds after they were published; may also be written as `7d`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "optional_seconds")]
    pub keep_for_seconds: Option<u64>,
}

/// How large the store may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    /// The most bytes of the store's files; may also be written as `500G`.
    #[serde(deserialize_with = "size_in_bytes")]
    pub limit_bytes: u64,
    /// Images leave when what the catalogue needs is more than this percentage of the limit.
    #[serde(default = "high_percent")]
    pub high_percent: u8,
    /// They leave until it is at most this percentage.
    #[serde(default = "low_percent")]
    pub low_percent: u8,
}

fn high_percent() -> u8 {
    90
}

fn low_percent() -> u8 {
    80
}

/// When collections run, and how carefully.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CollectSettings {
    /// Seconds between collections; may also be written as `1h`. 0: only on request.
    #[serde(deserialize_with = "seconds")]
    pub every_seconds: u64,
    /// Objects that nothing refers to stay for this many seconds; may also be written as `24h`. It must be longer than
    /// hosts take to notice a new catalogue.
    #[serde(deserialize_with = "seconds")]
    pub grace_seconds: u64,
    /// A pack is rewritten when less than this percentage of it is in use; 0: never.
    pub thin_below_percent: u8,
}

impl Default for CollectSettings {
    fn default() -> CollectSettings {
        CollectSettings { every_seconds: 3600, grace_seconds: 24 * 3600, thin_below_percent: 50 }
    }
}

/// What kind of object a collection removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GarbageKind {
    /// An image's name, from the catalogue; its bytes follow when they are due.
    Image,
    /// A layer's index and recipe.
    Layer,
    /// A pack of content.
    Pack,
    /// The unused part of a pack that is still needed.
    PackPart,
    /// A manifest, config or list of manifests.
    Blob,
}

/// Why something is removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "why")]
pub enum GarbageReason {
    /// No limit of the rule keeps the image.
    Rule {
        /// The rule's pattern.
        pattern: String,
    },
    /// The store is larger than its quota allows.
    Quota,
    /// Nothing refers to it.
    Unreferenced,
    /// A newer startup pack has taken its place, or its image is gone, or it never belonged to a layer.
    NoLayer,
    /// So little of the pack is in use that it is worth rewriting.
    MostlyUnused,
}

/// One object that a collection removes or would remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GarbageItem {
    /// What it is.
    pub kind: GarbageKind,
    /// The image's name or the object's digest.
    pub name: String,
    /// Bytes on the shared disk that are freed; for an image, as far as known, those that are freed after it.
    pub bytes: u64,
    /// Why it is removed.
    pub reason: GarbageReason,
    /// When it is removed at the earliest: now, or when its grace is over.
    #[schema(value_type = String, format = DateTime)]
    pub due: Timestamp,
}

/// What a collection would do at this moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CollectionPlan {
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// The catalogue generation that it was made from.
    pub generation: u64,
    /// The grace that it was made with.
    pub grace_seconds: u64,
    /// Why nothing is collected at present, if so.
    pub waiting: Option<String>,
    /// Bytes of the store's packs, layers and blobs.
    pub store_bytes: u64,
    /// Bytes that the catalogue's images need.
    pub needed_bytes: u64,
    /// Bytes that the images need beyond the quota's low mark, even with everything that may be removed counted as
    /// gone.
    pub over_quota_bytes: u64,
    /// What is removed now or later.
    pub items: Vec<GarbageItem>,
}

/// The phase of a running collection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CollectionPhase {
    /// Looking at what the store holds.
    Surveying,
    /// Taking images out of the catalogue.
    Images,
    /// Removing layers and blobs.
    Layers,
    /// Waiting for layers whose unpacking began before it.
    Waiting,
    /// Removing and rewriting packs.
    Packs,
}

/// How far a running collection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CollectionProgress {
    /// The present phase.
    pub phase: CollectionPhase,
    /// Steps of this phase that are done.
    pub done: u64,
    /// Steps of this phase.
    pub total: u64,
}

/// What a collection did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CollectionReport {
    /// When it began.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    /// How long it took.
    pub seconds: f64,
    /// Why it collected nothing, or broke off, if so.
    pub stopped: Option<String>,
    /// Bytes that were freed.
    pub freed_bytes: u64,
    /// What was removed.
    pub items: Vec<GarbageItem>,
    /// Objects that are marked and will be removed when their grace is over.
    pub marked: u64,
    /// Objects that were due and turned out to be needed again.
    pub spared: u64,
    /// Objects that could not be removed, one sentence each.
    pub failures: Vec<String>,
}

/// The present and the last collection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CollectionStatus {
    /// Collections that have begun since the coordinator began to lead; the present or last one has this number.
    pub number: u64,
    /// The running one.
    pub running: Option<CollectionProgress>,
    /// The last one that ended.
    pub last: Option<CollectionReport>,
}

/// A request for a collection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CollectRequest {
    /// Another grace than that of the settings, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_seconds: Option<u64>,
}

/// A name that only a person removes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pin {
    /// The image's name in its familiar form.
    pub name: String,
    /// When it was pinned.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// Whether the store has an image of that name.
    pub present: bool,
}

/// All pins, in the order of their names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PinList {
    /// The pins.
    pub pins: Vec<Pin>,
    /// Set if there are more: where the next page continues.
    #[serde(rename = "continue", default, skip_serializing_if = "Option::is_none")]
    pub next_page: Option<String>,
}

/// A request for a pin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    /// The image, as `docker pull` takes it.
    pub name: String,
}

impl RetentionPolicy {
    /// What is wrong with the policy, in one sentence for people; `None` if it makes sense. The coordinator checks
    /// patterns.
    pub fn fault(&self) -> Option<String> {
        if let Some(rule) = self.rules.iter().find(|rule| rule.pattern.is_empty()) {
            let limits = rule.keep_last.map_or(String::new(), |n| format!(" (keep_last {n})"));
            return Some(format!("a retention rule{limits} has an empty pattern: write ** for all images"));
        }
        let is_for_all = |rule: &RetentionRule| rule.pattern == "**";
        if self
            .rules
            .iter()
            .any(|rule| is_for_all(rule) && (rule.keep_last == Some(0) || rule.keep_for_seconds == Some(0)))
        {
            return Some(
                "a retention rule for ** keeps no image at all: give it at least 1, or leave it out to keep all"
                    .to_owned(),
            );
        }
        if let Some(at) = self.rules.iter().position(is_for_all)
            && let Some(behind) = self.rules.get(at + 1)
        {
            let pattern = &behind.pattern;
            return Some(format!(
                "the retention rule for {pattern} never counts: the one for ** before it takes all images; write it before that one"
            ));
        }
        if self.collect.thin_below_percent > 100 {
            return Some(format!(
                "thin_below_percent is a share from 0 to 100, not {}",
                self.collect.thin_below_percent
            ));
        }
        let Quota { limit_bytes, high_percent, low_percent } = self.quota?;
        if limit_bytes == 0 {
            return Some("a quota of 0 bytes keeps no image: leave the quota out to have none".to_owned());
        }
        (low_percent > high_percent || high_percent > 100).then(|| {
            format!("the quota's marks are low <= high <= 100 percent, not low {low_percent} and high {high_percent}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_has_its_default_and_what_is_misspelt_is_refused() {
        let policy: RetentionPolicy =
            serde_json::from_str(r#"{"rules":[{"pattern":"**"}],"quota":{"limit_bytes":5}}"#).unwrap();
        assert_eq!(policy.quota, Some(Quota { limit_bytes: 5, high_percent: 90, low_percent: 80 }));
        assert_eq!(policy.collect, CollectSettings::default());
        assert_eq!((policy.rules[0].keep_last, policy.rules[0].keep_for_seconds), (None, None));
        assert!(serde_json::from_str::<RetentionPolicy>(r#"{"qouta":null}"#).is_err());
        assert!(serde_json::from_str::<RetentionPolicy>(r#"{"rules":[{"pattern":"a","keep":3}]}"#).is_err());
    }

    #[test]
    fn senseless_policies_are_named() {
        let quota = |limit_bytes, high_percent, low_percent| RetentionPolicy {
            quota: Some(Quota { limit_bytes, high_percent, low_percent }),
            ..RetentionPolicy::default()
        };
        assert_eq!(RetentionPolicy::default().fault(), None);
        assert_eq!(quota(1, 90, 90).fault(), None);
        assert!(quota(0, 90, 80).fault().unwrap().contains("0 bytes"));
        assert!(quota(1, 80, 90).fault().unwrap().contains("low 90 and high 80"));
        assert!(quota(1, 101, 90).fault().is_some());
        let rules = |text: &str| serde_json::from_str::<RetentionPolicy>(text).unwrap().fault();
        assert!(rules(r#"{"rules":[{"pattern":"**","keep_last":0}]}"#).unwrap().contains("no image at all"));
        assert!(rules(r#"{"rules":[{"pattern":"**","keep_for_seconds":0}]}"#).unwrap().contains("no image at all"));
        let shadowed = rules(r#"{"rules":[{"pattern":"**","keep_last":5},{"pattern":"r.io/a","keep_last":1}]}"#);
        assert!(shadowed.unwrap().contains("r.io/a never counts"));
        assert_eq!(
            rules(r#"{"rules":[{"pattern":"r.io/a:pr-*","keep_last":0},{"pattern":"**","keep_last":5}]}"#),
            None
        );
        let rule = RetentionRule { pattern: String::new(), keep_last: Some(3), keep_for_seconds: None };
        let policy = RetentionPolicy { rules: vec![rule], ..RetentionPolicy::default() };
        assert!(policy.fault().unwrap().contains("(keep_last 3)"));
    }
}

//! Rules and quota on made-up catalogues, both chosen and random.

use std::collections::HashSet;

use coordinator_api::retention::RetentionRule;
use proptest::prelude::*;
use store::image::{LayerRecord, Platform, RequestedBy};
use store::{ContentDigest, Digest};

use super::*;
use crate::admin::gc::survey::StoreSizes;
use crate::admin::gc::usage::Usage;

const DAY: u64 = 86_400;

fn layer(number: u64) -> Digest {
    Digest::of(&number.to_le_bytes())
}

fn pack(number: u64) -> ContentDigest {
    ContentDigest::of(&number.to_le_bytes())
}

/// An image published at `published_at` with these layers.
fn candidate(repository: &str, tag: &str, published_at: u64, layers: &[u64]) -> Candidate {
    let digest = Digest::of(format!("{repository}:{tag}").as_bytes());
    let record = |number: &u64| {
        let diff_id = layer(*number);
        LayerRecord { diff_id, size: 1, blob: diff_id, blob_size: 1, media_type: String::new() }
    };
    let image = Arc::new(ImageRecord {
        repository: repository.into(),
        tag: Some(tag.into()),
        target: digest,
        manifest: digest,
        media_type: String::new(),
        config: digest,
        platform: Platform::host(),
        layers: layers.iter().map(record).collect(),
        published_at,
        ordered_by: RequestedBy::Operator,
    });
    Candidate { image, protected: false, last_used: published_at }
}

/// A store in which each layer N has its own pack N of `size` bytes.
fn needs(candidates: &[Candidate], size: u64) -> Needs {
    let mut survey = StoreSizes::default();
    let mut usage = HashMap::new();
    for number in 0..64 {
        survey.layers.insert(layer(number), 0);
        survey.packs.insert(pack(number), size);
        usage.insert(layer(number), vec![(pack(number), size)]);
    }
    let mut needs = Needs::new(&survey, &Usage::new(usage), HashMap::new());
    candidates.iter().for_each(|candidate| needs.require(&candidate.image));
    needs
}

fn rule(pattern: &str, keep_last: Option<u32>, keep_for_seconds: Option<u64>) -> RetentionRule {
    RetentionRule { pattern: pattern.into(), keep_last, keep_for_seconds }
}

/// Names of the images that leave, and the bytes over the quota.
fn leaving(candidates: &[Candidate], rules: &[RetentionRule], quota: Option<Quota>, now: u64) -> (Vec<String>, u64) {
    let rules = Rules::compile(rules).unwrap();
    let (leaving, over) = departures(candidates, &rules, quota.as_ref(), now, &mut needs(candidates, 100));
    (leaving.iter().map(|departure| departure.image.familiar_name()).collect(), over)
}

#[test]
fn the_first_rule_that_matches_counts_and_each_limit_keeps() {
    let tags = |repository: &str| -> Vec<Candidate> {
        (0..6).map(|n| candidate(repository, &format!("t{n}"), n * DAY, &[n])).collect()
    };
    let mut all = [tags("q.io/a"), tags("q.io/b"), tags("q.io/forever")].concat();
    let rules = [
        rule("q.io/forever", None, None),
        rule("q.io/a", Some(2), None),
        rule("q.io/*:t[0-3]", None, Some(3 * DAY)),
        rule("**", Some(1), Some(DAY)),
    ];
    // At day 6: of a, t4 and t5 stay. Of b, t0 to t3 are kept for three days, which are over; t4 and t5 fall under the last
    // rule, which keeps t5 as the last one.
    let (names, over) = leaving(&all, &rules, None, 6 * DAY);
    let expected = [
        "q.io/a:t0",
        "q.io/a:t1",
        "q.io/a:t2",
        "q.io/a:t3",
        "q.io/b:t0",
        "q.io/b:t1",
        "q.io/b:t2",
        "q.io/b:t3",
        "q.io/b:t4",
    ];
    assert_eq!((names, over), (expected.map(str::to_owned).to_vec(), 0));
    all[0].protected = true;
    all[8].protected = true;
    let (names, _) = leaving(&all, &rules, None, 6 * DAY);
    assert!(!names.contains(&"q.io/a:t0".to_owned()) && !names.contains(&"q.io/b:t2".to_owned()));
    assert_eq!(leaving(&all, &[], None, 1000 * DAY).0, Vec::<String>::new(), "without a rule all are kept");
}

#[test]
fn what_hosts_had_pulled_takes_nobody_elses_place() {
    let mut all: Vec<_> = (0..7).map(|n| candidate("q.io/a", &format!("t{n}"), n * DAY, &[n])).collect();
    for demanded in &mut all[3..] {
        Arc::make_mut(&mut demanded.image).ordered_by = RequestedBy::Host;
    }
    let (names, _) = leaving(&all, &[rule("**", Some(2), None)], None, 7 * DAY);
    assert_eq!(names, ["q.io/a:t0", "q.io/a:t3", "q.io/a:t4"], "the last two of each stay");
}

#[test]
fn the_quota_takes_what_was_not_used_for_longest_down_to_the_low_mark() {
    let mut all: Vec<_> = (0..10).map(|n| candidate("q.io/a", &format!("t{n}"), n * DAY, &[n])).collect();
    all[0].last_used = 50 * DAY;
    all[1].protected = true;
    let quota = |limit_bytes| Some(Quota { limit_bytes, high_percent: 90, low_percent: 50 });
    let now = 60 * DAY;
    assert_eq!(leaving(&all, &[], quota(1200), now).0.len(), 0, "1000 bytes are below the high mark of 1080");
    let (names, over) = leaving(&all, &[], quota(1000), now);
    assert_eq!(names, ["q.io/a:t2", "q.io/a:t3", "q.io/a:t4", "q.io/a:t5", "q.io/a:t6"]);
    assert_eq!(over, 0);
    // An image that a rule keeps as one of the last stays; one that is kept for some time goes last.
    let rules = [rule("q.io/a:t[23]", None, Some(1000 * DAY)), rule("q.io/a:t[4-9]", Some(4), None)];
    let (names, over) = leaving(&all, &rules, quota(800), now);
    assert_eq!(names, ["q.io/a:t4", "q.io/a:t5", "q.io/a:t0", "q.io/a:t2", "q.io/a:t3"]);
    assert_eq!(over, 100, "five that must stay, and a low mark of 400");
}

#[test]
fn shared_layers_are_freed_with_their_last_image() {
    let all = [candidate("a/a", "1", 1, &[1, 2]), candidate("a/a", "2", 2, &[1, 3]), candidate("a/b", "1", 3, &[1, 3])];
    let quota = Quota { limit_bytes: 100, high_percent: 100, low_percent: 0 };
    let rules = Rules::compile(&[]).unwrap();
    let (leaving, over) = departures(&all, &rules, Some(&quota), 9, &mut needs(&all, 100));
    let freed: Vec<_> = leaving.iter().map(|departure| departure.bytes).collect();
    assert_eq!((freed, over), (vec![100, 0, 200], 0));
}

/// Any small catalogue: repository, tag, publishing time, time of use, layers, protection.
fn any_candidates() -> impl Strategy<Value = Vec<Candidate>> {
    let one =
        (0..3u8, 0..6u8, 0..40u64, 0..40u64, proptest::collection::vec(0..20u64, 0..4), proptest::bool::weighted(0.2));
    proptest::collection::vec(one, 0..16).prop_map(|all| {
        let mut names = HashSet::new();
        let fresh = all.into_iter().filter(|(repository, tag, ..)| names.insert((*repository, *tag)));
        let make = |(repository, tag, published, used, layers, protected): (u8, u8, u64, u64, Vec<u64>, bool)| {
            let made = candidate(&format!("q.io/r{repository}"), &format!("t{tag}"), published * DAY, &layers);
            Candidate { protected, last_used: published.max(used) * DAY, ..made }
        };
        fresh.map(make).collect()
    })
}

fn any_rules() -> impl Strategy<Value = Vec<RetentionRule>> {
    let pattern = prop_oneof!["q\\.io/r[0-2]", "q\\.io/\\*:t[0-5]", Just("**".to_owned())];
    let one = (pattern, proptest::option::of(0..4u32), proptest::option::of(0..40u64))
        .prop_map(|(pattern, last, days)| rule(&pattern, last, days.map(|days| days * DAY)));
    proptest::collection::vec(one, 0..4)
}

proptest! {
    #[test]
    fn nothing_protected_leaves_and_limits_are_kept(
        all in any_candidates(),
        rules in any_rules(),
        limit in proptest::option::of(0..3000u64),
        now in 40..80u64,
    ) {
        let now = now * DAY;
        let quota = limit.map(|limit_bytes| Quota { limit_bytes: limit_bytes + 1, high_percent: 80, low_percent: 60 });
        let compiled = Rules::compile(&rules).unwrap();
        let mut left = needs(&all, 100);
        let before = left.bytes();
        let (leaving, over) = departures(&all, &compiled, quota.as_ref(), now, &mut left);
        let gone: HashSet<String> = leaving.iter().map(|departure| departure.image.familiar_name()).collect();
        prop_assert_eq!(gone.len(), leaving.len(), "each leaves once");
        prop_assert_eq!(left.bytes() + leaving.iter().map(|departure| departure.bytes).sum::<u64>(), before);
        let staying: Vec<&Candidate> = all.iter().filter(|one| !gone.contains(&one.image.familiar_name())).collect();
        let fresh = needs(&staying.iter().map(|one| (*one).clone()).collect::<Vec<_>>(), 100);
        prop_assert_eq!(fresh.bytes(), left.bytes(), "what is needed is what the remaining images need");
        for candidate in all.iter().filter(|one| gone.contains(&one.image.familiar_name())) {
            prop_assert!(!candidate.protected);
            let departure = leaving.iter().find(|one| one.image == candidate.image).unwrap();
            let position = compiled.first(&candidate.image);
            let rule = position.map(|position| &rules[position]);
            if let (Some(rule), Some(last)) = (rule, rule.and_then(|rule| rule.keep_last)) {
                let newer = all.iter().filter(|other| {
                    other.image.repository == candidate.image.repository
                        && compiled.first(&other.image) == position
                        && other.image.published_at >= candidate.image.published_at
                });
                prop_assert!(newer.count() > last as usize, "{:?} is one of the last", rule);
            }
            let is_young = |time: u64| now - candidate.image.published_at < time;
            match &departure.reason {
                GarbageReason::Rule { .. } => {
                    let rule = rule.unwrap();
                    prop_assert!(rule.keep_last.is_some() || rule.keep_for_seconds.is_some());
                    prop_assert!(!rule.keep_for_seconds.is_some_and(is_young));
                }
                reason => prop_assert_eq!(reason, &GarbageReason::Quota),
            }
        }
        if let Some(quota) = quota {
            let low = quota.limit_bytes * 60 / 100;
            prop_assert_eq!(over, if leaving.iter().any(|one| one.reason == GarbageReason::Quota) || over > 0 {
                left.bytes().saturating_sub(low)
            } else {
                0
            });
            // The quota takes no more than it must: with the last departure still there, the store would be above the low mark.
            if let Some(last) = leaving.iter().rev().find(|one| one.reason == GarbageReason::Quota) {
                prop_assert!(left.bytes() + last.bytes > low);
            }
            prop_assert!(over == 0 || staying.iter().all(|one| one.protected || {
                let rule = compiled.first(&one.image).map(|position| &rules[position]);
                rule.is_some_and(|rule| rule.keep_last.is_some_and(|last| last > 0))
            }), "over the quota only with what must stay");
        }
    }

    #[test]
    fn the_same_facts_give_the_same_answer(all in any_candidates(), rules in any_rules(), seed in any::<u64>()) {
        let quota = Some(Quota { limit_bytes: 500, high_percent: 80, low_percent: 60 });
        let mut shuffled = all.clone();
        let len = shuffled.len().max(1) as u64;
        shuffled.rotate_left((seed % len) as usize);
        let (first, over) = leaving(&all, &rules, quota, 50 * DAY);
        let (second, over_again) = leaving(&shuffled, &rules, quota, 50 * DAY);
        prop_assert_eq!(first.into_iter().collect::<HashSet<_>>(), second.into_iter().collect::<HashSet<_>>());
        prop_assert_eq!(over, over_again);
    }
}

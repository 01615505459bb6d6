//! Which images a schedule means: names, patterns of tags, ranges of versions, the newest so many.
//!
//! Only the tag may be a pattern (`*`, `?`, `[a-z]`): a repository is listed, a registry is not. Tags that are versions
//! (`1.2.3`, `v1.2`, `1.2.3-rc1`) are ordered and ranged as semantic versions, as cargo reads ranges: a pre-release, and
//! so `1.2.3-alpine`, is in a range only if the range names one. Other tags are ordered naturally: `build-9` before
//! `build-10`, `2026-11-20` before `2026-11-21`. The time at which an image was built plays no part: it can be forged, is often
//! absent (reproducible builds) and costs two requests for each tag.

use std::cmp::Ordering;

use globset::{Glob, GlobMatcher};
use semver::{Version, VersionReq};
use store::image::ImageRef;

/// One entry of a schedule's images.
#[derive(Debug, Clone)]
pub enum Pattern {
    /// This image.
    Image(ImageRef),
    /// Tags of a repository.
    Tags {
        /// The repository, with any tag.
        repository: ImageRef,
        /// Which.
        tags: GlobMatcher,
    },
}

/// Of the tags that match a pattern, which.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Only so many, newest first.
    pub newest: Option<usize>,
    /// Only these versions.
    pub versions: Option<VersionReq>,
}

impl Choice {
    fn is_everything(&self) -> bool {
        self.newest.is_none() && self.versions.is_none()
    }

    /// Whether a tag is in the range.
    fn admits(&self, tag: &str) -> bool {
        self.versions.as_ref().is_none_or(|range| version(tag).is_some_and(|version| range.matches(&version)))
    }
}

impl Pattern {
    /// Reads one entry. With a `choice`, a name without a tag means all tags.
    pub fn parse(text: &str, choice: &Choice) -> Result<Pattern, String> {
        let last = text.rfind('/').map_or(0, |at| at + 1);
        let (repository, tag) = match text[last..].find(':') {
            Some(colon) => (&text[..last + colon], Some(&text[last + colon + 1..])),
            None => (text, None),
        };
        // An IPv6 address stands in brackets.
        if repository.trim_start_matches('[').contains(['*', '?', '[']) {
            return Err(format!("{text:?}: only the tag may be a pattern; name the repository in full"));
        }
        let tags = match tag {
            Some(tag) if tag.contains(['*', '?', '[']) => tag,
            None if !choice.is_everything() && !text.contains('@') => "*",
            _ if !choice.is_everything() => {
                return Err(format!("{text:?} names one image: newest and semver choose among the tags of a pattern"));
            }
            _ => return Ok(Pattern::Image(text.parse::<ImageRef>().map_err(|error| error.to_string())?)),
        };
        let repository = repository.parse::<ImageRef>().map_err(|error| error.to_string())?;
        let tags = Glob::new(tags).map_err(|error| format!("{text:?} is not a pattern: {error}"))?;
        Ok(Pattern::Tags { repository, tags: tags.compile_matcher() })
    }

    /// Whether a push of `image` is one that this entry means, as far as its name tells.
    pub fn means(&self, image: &ImageRef, choice: &Choice) -> bool {
        match self {
            Pattern::Image(own) => {
                own.canonical_repository() == image.canonical_repository()
                    && (own.tag(), own.digest()) == (image.tag(), image.digest())
            }
            Pattern::Tags { repository, tags } => {
                let tag = image.tag().unwrap_or_default();
                repository.canonical_repository() == image.canonical_repository()
                    && tags.is_match(tag)
                    && choice.admits(tag)
            }
        }
    }

    /// An image of the repository that is meant.
    pub fn repository(&self) -> &ImageRef {
        match self {
            Pattern::Image(image) => image,
            Pattern::Tags { repository, .. } => repository,
        }
    }
}

/// The images of `repository` that `pattern` and `choice` mean, among its `tags`; newest first.
pub fn choose(repository: &ImageRef, pattern: &GlobMatcher, choice: &Choice, tags: &[String]) -> Vec<ImageRef> {
    let matching = tags.iter().filter(|tag| pattern.is_match(tag.as_str()) && choice.admits(tag));
    // Each tag is read once, not at every comparison: there may be very many.
    let mut chosen: Vec<(Option<Version>, &str)> = matching.map(|tag| (version(tag), tag.as_str())).collect();
    chosen.sort_by(newer_first);
    chosen.dedup_by(|a, b| a.1 == b.1);
    chosen.truncate(choice.newest.unwrap_or(usize::MAX));
    chosen.iter().filter_map(|(_, tag)| repository.with_tag(tag).ok()).collect()
}

/// A tag as a version: with or without `v`, missing parts being 0.
pub fn version(tag: &str) -> Option<Version> {
    let tag = tag.strip_prefix(['v', 'V']).unwrap_or(tag);
    if let Ok(version) = Version::parse(tag) {
        return Some(version);
    }
    let end = tag.find(['-', '+']).unwrap_or(tag.len());
    let (numbers, rest) = tag.split_at(end);
    let padded = match numbers.split('.').count() {
        1 => format!("{numbers}.0.0{rest}"),
        2 => format!("{numbers}.0{rest}"),
        _ => return None,
    };
    Version::parse(&padded).ok()
}

/// Versions before all else, the highest first; then the rest, naturally.
fn newer_first((x, a): &(Option<Version>, &str), (y, b): &(Option<Version>, &str)) -> Ordering {
    match (x, y) {
        (Some(x), Some(y)) => y.cmp(x).then_with(|| a.cmp(b)),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => natural(b, a).then_with(|| b.cmp(a)),
    }
}

/// Runs of digits compare as numbers.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        match (a.first(), b.first()) {
            (None, None) => return Ordering::Equal,
            (None, Some(_)) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            (Some(x), Some(y)) if x.is_ascii_digit() && y.is_ascii_digit() => {
                let (x, rest_a) = number(a);
                let (y, rest_b) = number(b);
                match x.len().cmp(&y.len()).then_with(|| x.cmp(y)) {
                    Ordering::Equal => (a, b) = (rest_a, rest_b),
                    other => return other,
                }
            }
            (Some(x), Some(y)) if x != y => return x.cmp(y),
            _ => (a, b) = (&a[1..], &b[1..]),
        }
    }
}

/// The digits at the beginning, without leading zeros, and the rest.
fn number(text: &[u8]) -> (&[u8], &[u8]) {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    let zeros = digits.iter().position(|byte| *byte != b'0').unwrap_or(digits.len());
    (&digits[zeros..], rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chosen(pattern: &str, newest: Option<usize>, semver: Option<&str>, tags: &[&str]) -> Vec<String> {
        let choice = Choice { newest, versions: semver.map(|range| range.parse().unwrap()) };
        let tags: Vec<String> = tags.iter().map(|tag| (*tag).to_owned()).collect();
        match Pattern::parse(pattern, &choice).unwrap() {
            Pattern::Tags { repository, tags: pattern } => choose(&repository, &pattern, &choice, &tags)
                .iter()
                .map(|image| image.tag().unwrap().to_owned())
                .collect(),
            Pattern::Image(image) => vec![image.tag().unwrap().to_owned()],
        }
    }

    #[test]
    fn patterns_ranges_and_the_newest_choose_among_tags() {
        let tags = ["v1.2.0", "v1.10.0", "v1.9.3", "v2.0.0", "v1.11.0-rc1", "latest", "v1.3"];
        assert_eq!(chosen("r.io/app:v1.*", None, None, &tags), ["v1.11.0-rc1", "v1.10.0", "v1.9.3", "v1.3", "v1.2.0"]);
        assert_eq!(chosen("r.io/app:v1.*", Some(2), Some(">=1.2, <2"), &tags), ["v1.10.0", "v1.9.3"]);
        assert_eq!(chosen("r.io/app", Some(1), Some("^2"), &tags), ["v2.0.0"]);
        assert_eq!(chosen("r.io/app:latest", None, None, &tags), ["latest"]);
        let builds = ["build-9", "build-10", "build-1"];
        assert_eq!(chosen("r.io/app:build-*", Some(2), None, &builds), ["build-10", "build-9"]);
        assert_eq!(chosen("[::1]:5000/app:v2.*", None, None, &tags), ["v2.0.0"]);
        let days = ["2026-11-09", "2026-11-20", "2025-12-31"];
        assert_eq!(chosen("r.io:5000/a/b:202*", Some(1), None, &days), ["2026-11-20"]);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let newest = Choice { newest: Some(1), versions: None };
        assert!(Pattern::parse("r.io/*/app:1", &Choice::default()).is_err());
        assert!(Pattern::parse("r.io/app:1", &newest).unwrap_err().contains("newest"));
        assert!(Pattern::parse("r.io/app:[", &Choice::default()).is_err());
        assert!(Pattern::parse("r.io/UPPER", &Choice::default()).is_err());
    }

    #[test]
    fn a_push_is_meant_by_name_and_range() {
        let range = Choice { newest: None, versions: Some("1".parse().unwrap()) };
        let pattern = Pattern::parse("r.io/app", &range).unwrap();
        assert!(pattern.means(&"r.io/app:1.4".parse().unwrap(), &range));
        assert!(!pattern.means(&"r.io/app:2.4".parse().unwrap(), &range));
        assert!(!pattern.means(&"r.io/other:1.4".parse().unwrap(), &range));
        let image = Pattern::parse("alpine", &Choice::default()).unwrap();
        assert!(image.means(&"docker.io/library/alpine:latest".parse().unwrap(), &Choice::default()));
    }

    proptest! {
        #[test]
        fn the_order_of_tags_is_total(tags in prop::collection::vec("[a-z0-9.v-]{0,8}", 0..12)) {
            let mut tags: Vec<_> = tags.iter().map(|tag| (version(tag), tag.as_str())).collect();
            tags.sort_by(newer_first);
            for pair in tags.windows(2) {
                prop_assert_ne!(newer_first(&pair[0], &pair[1]), Ordering::Greater);
                prop_assert_eq!(newer_first(&pair[1], &pair[0]), newer_first(&pair[0], &pair[1]).reverse());
            }
        }
    }
}

//! Which images a schedule means: names, patterns of tags, ranges of versions, the newest N.
//!
//! Only the tag may be a pattern (`*`, `?`, `[a-z]`): a repository can be listed, a registry cannot. How tags are ordered and compared with
//! ranges is up to [`crate::plan::versions`]. The time at which an image was built plays no part: it can be forged, is often absent
//! (reproducible builds) and costs two requests for each tag. Signatures and the like, which registries keep under tags of their own, are
//! not images.

use globset::{Glob, GlobMatcher};
use store::image::ImageRef;

use crate::plan::versions::{Range, TagVersion};

/// One entry of a schedule's images.
#[derive(Debug, Clone)]
pub enum Pattern {
    /// This image.
    Image(ImageRef),
    /// Tags of a repository.
    Tags {
        /// The repository, with any tag.
        repository: ImageRef,
        /// The tags that are meant.
        tags: GlobMatcher,
    },
}

/// Which of the tags that match a pattern are chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Only this many, newest first.
    pub newest: Option<usize>,
    /// Only versions in this range.
    pub versions: Option<Range>,
}

impl Choice {
    fn is_everything(&self) -> bool {
        self.newest.is_none() && self.versions.is_none()
    }

    /// Whether a tag is in the range.
    fn admits(&self, tag: &str) -> bool {
        self.versions.as_ref().is_none_or(|range| range.admits(tag))
    }
}

impl Pattern {
    /// Parses one entry. With a `choice`, a name without a tag means all tags.
    pub fn parse(text: &str, choice: &Choice) -> Result<Pattern, String> {
        let last = text.rfind('/').map_or(0, |at| at + 1);
        let (repository, tag) = match text[last..].find(':') {
            Some(colon) => (&text[..last + colon], Some(&text[last + colon + 1..])),
            None => (text, None),
        };
        // An IPv6 address has brackets.
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

    /// Whether this entry means a push of `image`, as far as the name tells.
    pub fn means(&self, image: &ImageRef, choice: &Choice) -> bool {
        match self {
            Pattern::Image(own) => {
                own.canonical_repository() == image.canonical_repository()
                    && (own.tag(), own.digest()) == (image.tag(), image.digest())
            }
            Pattern::Tags { repository, tags } => {
                let tag = image.tag().unwrap_or_default();
                repository.canonical_repository() == image.canonical_repository()
                    && matches(tags, tag)
                    && choice.admits(tag)
            }
        }
    }

    /// The image, or the repository whose tags are meant.
    pub fn repository(&self) -> &ImageRef {
        match self {
            Pattern::Image(image) => image,
            Pattern::Tags { repository, .. } => repository,
        }
    }
}

/// The images of `repository` that `pattern` and `choice` select from its `tags`, newest first.
pub fn choose(repository: &ImageRef, pattern: &GlobMatcher, choice: &Choice, tags: &[String]) -> Vec<ImageRef> {
    let matching = tags.iter().filter(|tag| matches(pattern, tag) && choice.admits(tag));
    // Each tag is parsed once, not at every comparison: there may be very many.
    let mut chosen: Vec<(TagVersion<'_>, &str)> = matching.map(|tag| (TagVersion::of(tag), tag.as_str())).collect();
    chosen.sort_by(|(one, _), (other, _)| other.cmp(one));
    chosen.dedup_by(|a, b| a.1 == b.1);
    chosen.truncate(choice.newest.unwrap_or(usize::MAX));
    chosen.iter().filter_map(|(_, tag)| repository.with_tag(tag).ok()).collect()
}

/// Whether a tag names something that belongs to an image but is none: the signatures, attestations and lists that cosign and the
/// referrers' fallback keep beside it, under `sha256-HEX` and what follows.
fn belongs_to_an_image(tag: &str) -> bool {
    let Some(rest) = tag.strip_prefix("sha256-") else { return false };
    rest.len() >= 64 && rest.bytes().take(64).all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a pattern means a tag. It means what belongs to images only if it begins with `sha256-`.
fn matches(pattern: &GlobMatcher, tag: &str) -> bool {
    pattern.is_match(tag) && (!belongs_to_an_image(tag) || pattern.glob().glob().starts_with("sha256-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(pattern: &str, newest: Option<usize>, semver: Option<&str>, tags: &[&str]) -> Vec<String> {
        let choice = Choice { newest, versions: semver.map(|range| Range::parse(range).unwrap()) };
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
    fn signatures_beside_images_are_no_images() {
        let hex = "0123456789abcdef".repeat(4);
        let signature = format!("sha256-{hex}.sig");
        let tags = ["build-8", "build-10", &signature, &format!("sha256-{hex}"), "sha256-short"];
        assert_eq!(chosen("r.io/app:build-*", Some(1), None, &tags), ["build-10"]);
        assert_eq!(chosen("r.io/app", Some(2), None, &tags), ["sha256-short", "build-10"]);
        assert_eq!(chosen("r.io/app:sha256-*.sig", None, None, &tags), [signature.as_str()]);
        let all = Pattern::parse("r.io/app:*", &Choice::default()).unwrap();
        let pushed = |tag: &str| all.means(&format!("r.io/app:{tag}").parse().unwrap(), &Choice::default());
        assert!(pushed("build-10") && !pushed(&signature));
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
        let range = Choice { newest: None, versions: Some(Range::parse("1").unwrap()) };
        let pattern = Pattern::parse("r.io/app", &range).unwrap();
        assert!(pattern.means(&"r.io/app:1.4".parse().unwrap(), &range));
        assert!(!pattern.means(&"r.io/app:2.4".parse().unwrap(), &range));
        assert!(!pattern.means(&"r.io/other:1.4".parse().unwrap(), &range));
        let image = Pattern::parse("alpine", &Choice::default()).unwrap();
        assert!(image.means(&"docker.io/library/alpine:latest".parse().unwrap(), &Choice::default()));
    }
}

//! Patterns of image names: one language wherever people name many images at once (which images a token is for, which are kept).
//!
//! The syntax is that of shells: `*` is anything but a slash, `**` anything, `?` one character, `[ab]` one of these, `{a,b}` one of those.
//! Names match both as people write them and in full. A pattern without a tag means all tags (and digests) of its repositories; so does one
//! that ends with `**`.

use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Serialize};
use store::Digest;
use store::image::{DEFAULT_REGISTRY, ImageRecord, ImageRef, canonical_registry, familiar, parse_registry};

/// The longest pattern, in bytes.
const LENGTH_MAX: usize = 512;

/// Text that is not a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a pattern of image names ({why}): * stands for anything but a slash and ** for anything, such as registry.example.com/team/*"
)]
pub struct BadPattern {
    text: String,
    why: String,
}

/// The part of a name that a pattern is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    Repository,
    Tag,
    Digest,
}

/// A pattern of image names.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImagePattern {
    text: String,
    names: GlobMatcher,
    /// Matches repositories that may hold something the pattern matches. `None` if that cannot be told.
    repositories: Option<GlobMatcher>,
    scope: Scope,
}

impl PartialEq for ImagePattern {
    fn eq(&self, other: &ImagePattern) -> bool {
        self.text == other.text
    }
}

impl Eq for ImagePattern {}

impl TryFrom<String> for ImagePattern {
    type Error = BadPattern;

    fn try_from(text: String) -> Result<ImagePattern, BadPattern> {
        ImagePattern::parse(&text)
    }
}

impl From<ImagePattern> for String {
    fn from(pattern: ImagePattern) -> String {
        pattern.text
    }
}

impl ImagePattern {
    /// Parses a pattern.
    pub fn parse(text: &str) -> Result<ImagePattern, BadPattern> {
        let bad = |why: &str| BadPattern { text: text.chars().take(LENGTH_MAX).collect(), why: why.to_owned() };
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        if text.len() > LENGTH_MAX {
            return Err(bad("it is too long"));
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(bad("no image's name has such characters"));
        }
        // A pattern may call a registry by any of its names; images use one. On Docker Hub, a name of one part is an official image.
        let named = match text.split_once('/').map(|(host, rest)| (canonical_registry(host), rest)) {
            Some((DEFAULT_REGISTRY, rest)) if !rest.contains('/') && !rest.starts_with("**") => {
                format!("{DEFAULT_REGISTRY}/library/{rest}")
            }
            // The brackets of an IPv6 address are not a class of characters.
            Some((host, rest)) if host.starts_with('[') && parse_registry(host).is_ok() => {
                format!("{}/{rest}", globset::escape(host))
            }
            Some((host, rest)) => format!("{host}/{rest}"),
            None => text.to_owned(),
        };
        let glob = GlobBuilder::new(&named).literal_separator(true).build();
        let glob = glob.map_err(|error| bad(&error.kind().to_string()))?;
        let last = named.rsplit('/').next().unwrap_or(&named);
        let scope = match named.ends_with("**") {
            true => Scope::Repository,
            false if last.contains('@') => Scope::Digest,
            false if last.contains(':') => Scope::Tag,
            false => Scope::Repository,
        };
        let before = named.len() - last.len();
        let repository = match scope {
            Scope::Repository => &named,
            Scope::Tag | Scope::Digest => &named[..before + last.find([':', '@']).unwrap_or(last.len())],
        };
        // A pattern such as `{a:1,b:2}` has no repository of its own.
        let repositories = GlobBuilder::new(repository).literal_separator(true).build();
        let repositories = repositories.ok().map(|glob| glob.compile_matcher());
        Ok(ImagePattern { text: text.to_owned(), names: glob.compile_matcher(), repositories, scope })
    }

    /// Whether the pattern could match something in a repository, whatever its tag or digest.
    pub fn may_match_in(&self, canonical_repository: &str) -> bool {
        let names = [familiar(canonical_repository), canonical_repository.to_owned()];
        self.repositories.as_ref().is_none_or(|glob| names.iter().any(|name| glob.is_match(name)))
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the pattern matches a reference: both tag and digest, where it has both.
    pub fn matches(&self, image: &ImageRef) -> bool {
        self.matches_tag(image) && self.matches_digest(image)
    }

    /// Whether the pattern matches the reference's tag; true if it has none.
    pub fn matches_tag(&self, image: &ImageRef) -> bool {
        image.tag().is_none() || self.matches_name(&image.canonical_repository(), image.tag(), None)
    }

    /// Whether the pattern matches the reference's digest; true if it has none.
    pub fn matches_digest(&self, image: &ImageRef) -> bool {
        image.digest().is_none() || self.matches_name(&image.canonical_repository(), None, image.digest())
    }

    /// Whether the pattern matches an entry of the catalogue.
    pub fn matches_record(&self, image: &ImageRecord) -> bool {
        let digest = image.tag.is_none().then_some(&image.target);
        self.matches_name(&image.repository, image.tag.as_deref(), digest)
    }

    fn matches_name(&self, canonical: &str, tag: Option<&str>, digest: Option<&Digest>) -> bool {
        let repositories = [familiar(canonical), canonical.to_owned()];
        repositories.iter().any(|repository| match (self.scope, tag, digest) {
            (Scope::Repository, ..) => self.names.is_match(repository),
            (Scope::Tag, Some(tag), _) => self.names.is_match(format!("{repository}:{tag}")),
            (Scope::Digest, _, Some(digest)) => self.names.is_match(format!("{repository}@{digest}")),
            _ => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names_as_people_write_them() {
        let digest = "0".repeat(64);
        for (pattern, name, expected) in [
            ("debian", "debian:12", true),
            ("debian:12", "debian:12", true),
            ("debian:12", "debian:13", false),
            ("debian:*", "debian", true),
            ("docker.io/library/debian:1*", "debian:12", true),
            ("docker.io/library/*", "debian", true),
            ("index.docker.io/library/*", "debian", true),
            ("registry-1.docker.io/me/*", "me/app:1", true),
            ("docker.io/debian", "debian:12", true),
            ("index.docker.io/debian:1*", "debian:12", true),
            ("docker.io/deb*", "me/debian:12", false),
            ("docker.io/**", "me/app:1", true),
            ("quay.io/**", "docker.io/quay.io/app:1", false),
            ("docker.io/quay.io/*", "docker.io/quay.io/app:1", true),
            ("deb*", "debian:12", true),
            ("*", "me/app:1", false),
            ("*/*", "me/app:1", true),
            ("**", "q.io/a/b/c:1", true),
            ("q.io/**", "q.io/a/b/c:1", true),
            ("q.io/**", "r.io/a:1", false),
            ("q.io/*", "q.io/a/b:1", false),
            ("q.io/team/*", "q.io/team/app:1", true),
            ("q.io/team/*", "q.io/teams/app:1", false),
            ("q.io/team/*:pr-*", "q.io/team/app:pr-17", true),
            ("q.io/team/*:pr-*", "q.io/team/app:main", false),
            ("q.io/team/{app,web}", "q.io/team/web:1", true),
            ("127.0.0.1:5000/*", "127.0.0.1:5000/app:v1", true),
            ("[::1]:5000/*:v*", "[::1]:5000/app:v1", true),
            ("[::1]:5000/**", "[::2]:5000/app:v1", false),
            ("127.0.0.1:5000/app:v[12]", "127.0.0.1:5000/app:v1", true),
            ("127.0.0.1:5000/app:v[12]", "127.0.0.1:5000/app:v3", false),
            ("app:*", &format!("app@sha256:{digest}"), false),
            ("app", &format!("app@sha256:{digest}"), true),
            ("app@sha256:*", &format!("app@sha256:{digest}"), true),
            ("app@sha256:1*", &format!("app@sha256:{digest}"), false),
            ("app@sha256:*", "app:1", false),
            // The tag beside a digest promises nothing about the content.
            ("app:*", &format!("app:1@sha256:{digest}"), false),
            ("app@sha256:*", &format!("app:1@sha256:{digest}"), false),
            ("app", &format!("app:1@sha256:{digest}"), true),
        ] {
            let found = ImagePattern::parse(pattern).unwrap().matches(&name.parse().unwrap());
            assert_eq!(found, expected, "{pattern} and {name}");
        }
    }

    #[test]
    fn a_pattern_tells_in_which_repositories_it_can_match() {
        for (pattern, repository, expected) in [
            ("app", "docker.io/library/app", true),
            ("app:v*", "docker.io/library/app", true),
            ("app:v*", "docker.io/library/other", false),
            ("app@sha256:*", "docker.io/library/app", true),
            ("127.0.0.1:5000/app:v[12]", "127.0.0.1:5000/app", true),
            ("127.0.0.1:5000/*", "127.0.0.1:5000/app", true),
            ("127.0.0.1:5000/*", "127.0.0.1:5001/app", false),
            ("q.io/**", "q.io/a/b", true),
            ("index.docker.io/library/*", "docker.io/library/app", true),
            ("registry-1.docker.io/app:v*", "docker.io/library/app", true),
            ("{app:1,web:2}", "docker.io/library/anything", true),
        ] {
            let found = ImagePattern::parse(pattern).unwrap().may_match_in(repository);
            assert_eq!(found, expected, "{pattern} and {repository}");
        }
    }

    #[test]
    fn what_is_no_pattern_is_said_and_what_is_one_is_kept_as_it_was_written() {
        for bad in ["", "a b", "a\n", "ä", "a[", "{a", &"a".repeat(513)] {
            let error = ImagePattern::parse(bad).unwrap_err().to_string();
            assert!(error.contains("is not a pattern of image names"), "{error}");
        }
        let pattern: ImagePattern = serde_json::from_str("\"q.io/team/*\"").unwrap();
        assert_eq!(serde_json::to_string(&pattern).unwrap(), "\"q.io/team/*\"");
        assert!(serde_json::from_str::<ImagePattern>("\"a[\"").is_err());
    }
}

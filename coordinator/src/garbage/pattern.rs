//! Images by name: patterns as shells have them.

use coordinator_api::retention::RetentionRule;
use globset::{GlobBuilder, GlobMatcher};
use store::image::{ImageRecord, familiar};

/// A pattern of image names: `*` is anything but a slash, `**` anything.
#[derive(Debug, Clone)]
pub struct ImagePattern {
    names: GlobMatcher,
    /// Whether the pattern has a tag, rather than meaning all of them.
    tagged: bool,
}

impl ImagePattern {
    /// Reads a pattern; the error says what is wrong with it, in one sentence for people.
    pub fn parse(text: &str) -> Result<ImagePattern, String> {
        let glob = GlobBuilder::new(text).literal_separator(true).build();
        let glob = glob.map_err(|error| format!("{text:?} is not a pattern of image names: {}", error.kind()))?;
        let last = text.rsplit('/').next().unwrap_or(text);
        let everything = text.ends_with("**");
        Ok(ImagePattern { names: glob.compile_matcher(), tagged: !everything && last.contains(':') })
    }

    /// Whether the image's name matches, in its familiar or its canonical form.
    pub fn matches(&self, image: &ImageRecord) -> bool {
        let forms = [familiar(&image.repository), image.repository.clone()];
        forms.iter().any(|repository| match (&image.tag, self.tagged) {
            (Some(tag), true) => self.names.is_match(format!("{repository}:{tag}")),
            (None, true) => false,
            (_, false) => self.names.is_match(repository),
        })
    }
}

/// Rules with their patterns.
pub(super) struct Rules(Vec<(ImagePattern, RetentionRule)>);

impl Rules {
    /// Reads the rules' patterns.
    pub(super) fn compile(rules: &[RetentionRule]) -> Result<Rules, String> {
        let rule = |rule: &RetentionRule| Ok((ImagePattern::parse(&rule.pattern)?, rule.clone()));
        rules.iter().map(rule).collect::<Result<_, _>>().map(Rules)
    }

    /// The position of the rule that counts for an image.
    pub(super) fn first(&self, image: &ImageRecord) -> Option<usize> {
        self.0.iter().position(|(pattern, _)| pattern.matches(image))
    }

    /// The rule at a position.
    pub(super) fn get(&self, position: usize) -> &RetentionRule {
        &self.0[position].1
    }
}

#[cfg(test)]
mod tests {
    use store::Digest;
    use store::image::Platform;

    use super::*;

    fn image(name: &str) -> ImageRecord {
        let reference: store::image::ImageRef = name.parse().unwrap();
        let digest = Digest::of(name.as_bytes());
        ImageRecord {
            repository: reference.canonical_repository(),
            tag: reference.tag().map(str::to_owned),
            target: digest,
            manifest: digest,
            media_type: String::new(),
            config: digest,
            platform: Platform::host(),
            layers: Vec::new(),
            published_at: 0,
        }
    }

    #[test]
    fn patterns_match_names_as_people_write_them() {
        let digest = Digest::of(b"x");
        for (pattern, name, expected) in [
            ("debian", "debian:12", true),
            ("debian:12", "debian:12", true),
            ("debian:12", "debian:13", false),
            ("docker.io/library/debian:1*", "debian:12", true),
            ("deb*", "debian:12", true),
            ("*", "me/app:1", false),
            ("*/*", "me/app:1", true),
            ("**", "q.io/a/b/c:1", true),
            ("q.io/**", "q.io/a/b/c:1", true),
            ("q.io/**", "r.io/a:1", false),
            ("q.io/*", "q.io/a/b:1", false),
            ("q.io/team/*:pr-*", "q.io/team/app:pr-17", true),
            ("q.io/team/*:pr-*", "q.io/team/app:main", false),
            ("127.0.0.1:5000/*", "127.0.0.1:5000/app:v1", true),
            ("127.0.0.1:5000/app:v[12]", "127.0.0.1:5000/app:v1", true),
            ("127.0.0.1:5000/app:v[12]", "127.0.0.1:5000/app:v3", false),
            ("app:*", &format!("app@{digest}"), false),
            ("app", &format!("app@{digest}"), true),
        ] {
            let found = ImagePattern::parse(pattern).unwrap().matches(&image(name));
            assert_eq!(found, expected, "{pattern} and {name}");
        }
        assert!(ImagePattern::parse("a[").unwrap_err().contains("\"a[\" is not a pattern"));
    }
}

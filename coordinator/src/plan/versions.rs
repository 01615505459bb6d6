//! Tags as versions: which of two is newer, and which lie in a range.
//!
//! A tag that begins with a number, with or without a `v`, is a version with any number of parts: `1.2.3`, `v1.2`, `24.04`, `2026-11-20`,
//! `1.2.3.4-rc1`. Parts compare as numbers of any length, without leading zeros; missing parts are 0. What follows a `-` is a pre-release,
//! older than the version itself, unless the whole tag is a date. What follows a `+`, or the `_` that stands for it in tags, is a build,
//! newer than the version itself. Pre-releases, builds and all other tags compare naturally: `build-9` before `build-10`, `rc9` before
//! `rc10`.
//!
//! Ranges are semantic, with three parts. They are written as in cargo, npm, Helm and Flux: `>=1.2, <2`, `>=1.2 <2`, `^1 || ^2`,
//! `1.2 - 1.4`; a bare `1.2` is all of 1.2. A pre-release is in a range only if the range names a pre-release of the same version, or has
//! `-0` (`>=1.2.0-0`), which admits all of them.

use std::cmp::Ordering;

use semver::{BuildMetadata, Comparator, Prerelease, Version, VersionReq};

/// The most alternatives in one range; each is tried for each tag.
const ALTERNATIVES_MAX: usize = 32;

/// A tag, parsed for comparison with others of the same repository. The greater one is newer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagVersion<'a> {
    /// The parts' digits without leading zeros, and without trailing parts that are zero. `None` for a tag that is no version.
    numbers: Option<Vec<&'a str>>,
    /// What follows a version's `-`.
    prerelease: Option<&'a str>,
    tag: &'a str,
}

impl<'a> TagVersion<'a> {
    /// Parses a tag.
    pub fn of(tag: &'a str) -> TagVersion<'a> {
        let (numbers, rest) = numbers(tag);
        if numbers.is_empty() {
            return TagVersion { numbers: None, prerelease: None, tag };
        }
        let mut numbers = if is_date(tag) { tag.split('-').map(without_zeros).collect() } else { numbers };
        while numbers.last().is_some_and(|last| last.is_empty()) {
            numbers.pop();
        }
        let prerelease = rest.strip_prefix('-').filter(|_| !is_date(tag));
        TagVersion { numbers: Some(numbers), prerelease, tag }
    }
}

impl Ord for TagVersion<'_> {
    fn cmp(&self, other: &TagVersion<'_>) -> Ordering {
        let by_version = match (&self.numbers, &other.numbers) {
            (Some(own), Some(others)) => {
                let numbers = own.iter().map(|number| value(number)).cmp(others.iter().map(|number| value(number)));
                numbers.then_with(|| match (self.prerelease, other.prerelease) {
                    (Some(own), Some(others)) => natural(own, others),
                    (own, others) => own.is_none().cmp(&others.is_none()),
                })
            }
            (own, others) => own.is_some().cmp(&others.is_some()),
        };
        by_version.then_with(|| natural(self.tag, other.tag)).then_with(|| self.tag.cmp(other.tag))
    }
}

impl PartialOrd for TagVersion<'_> {
    fn partial_cmp(&self, other: &TagVersion<'_>) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The numbers at the beginning of a tag, and what follows them.
fn numbers(tag: &str) -> (Vec<&str>, &str) {
    let (mut found, mut rest) = (Vec::new(), tag.strip_prefix(['v', 'V']).unwrap_or(tag));
    loop {
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        if end == 0 {
            return (found, rest);
        }
        found.push(without_zeros(&rest[..end]));
        let next = rest[end..].strip_prefix('.').filter(|next| next.starts_with(|c: char| c.is_ascii_digit()));
        match next {
            Some(next) => rest = next,
            None => return (found, &rest[end..]),
        }
    }
}

/// A key that orders digits without leading zeros by the number that they are, however long.
fn value(digits: &str) -> (usize, &str) {
    (digits.len(), digits)
}

fn without_zeros(digits: &str) -> &str {
    digits.trim_start_matches('0')
}

/// `2026-11`, `2026-11-20`, `2026-11-20-2`: a year, and numbers.
fn is_date(tag: &str) -> bool {
    let mut parts = tag.split('-');
    let is_year = |part: &str| part.len() == 4 && (part.starts_with("19") || part.starts_with("20"));
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    tag.contains('-') && parts.next().is_some_and(is_year) && tag.split('-').all(is_number)
}

/// Compares two texts, with runs of digits as numbers.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let ordering = match (digits(a), digits(b)) {
            (x, y) if x > 0 && y > 0 => {
                let ordering = value(without_zeros(&a[..x])).cmp(&value(without_zeros(&b[..y])));
                (a, b) = (&a[x..], &b[y..]);
                ordering
            }
            _ => {
                let (mut own, mut others) = (a.chars(), b.chars());
                let first = (own.next(), others.next());
                if first == (None, None) {
                    return Ordering::Equal;
                }
                (a, b) = (own.as_str(), others.as_str());
                first.0.cmp(&first.1)
            }
        };
        if ordering.is_ne() {
            return ordering;
        }
    }
}

/// A tag as a semantic version of three parts, for ranges.
fn version(tag: &str) -> Option<Version> {
    let (found, rest) = numbers(tag);
    if found.is_empty() || found.len() > 3 || is_date(tag) {
        return None;
    }
    let number = |at: usize| match found.get(at) {
        Some(&"") | None => Some(0),
        Some(digits) => digits.parse().ok(),
    };
    let (rest, build) = rest.split_once(['+', '_']).map_or((rest, ""), |(rest, build)| (rest, build));
    let prerelease = match rest.strip_prefix('-') {
        Some(text) => Prerelease::new(&bare_numbers(text)).ok()?,
        None if rest.is_empty() => Prerelease::EMPTY,
        None => return None,
    };
    let build = BuildMetadata::new(build).unwrap_or_default();
    Some(Version { major: number(0)?, minor: number(1)?, patch: number(2)?, pre: prerelease, build })
}

/// A pre-release without the leading zeros of its numbers, which the standard forbids and people write.
fn bare_numbers(text: &str) -> String {
    let bare = |part: &str| {
        let is_number = part.len() > 1 && part.bytes().all(|byte| byte.is_ascii_digit());
        if is_number { format!("{:0>1}", without_zeros(part)) } else { part.to_owned() }
    };
    text.split('.').map(bare).collect::<Vec<_>>().join(".")
}

/// A range of versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    alternatives: Vec<Alternative>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Alternative {
    range: VersionReq,
    /// Whether pre-releases are in it like other versions.
    takes_prereleases: bool,
}

impl Range {
    /// Parses a range. The error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Range, String> {
        let wrong = |why: String| format!("semver {text:?} is not a range of versions: {why}; write e.g. >=1.2, <2");
        let alternatives = text.split("||").map(|part| Alternative::parse(part).map_err(wrong));
        let alternatives = alternatives.collect::<Result<Vec<_>, _>>()?;
        if alternatives.len() > ALTERNATIVES_MAX {
            return Err(wrong(format!("it has more than {ALTERNATIVES_MAX} alternatives")));
        }
        Ok(Range { alternatives })
    }

    /// Whether a tag is a version in this range.
    pub fn admits(&self, tag: &str) -> bool {
        version(tag).is_some_and(|version| self.alternatives.iter().any(|alternative| alternative.admits(&version)))
    }
}

impl Alternative {
    fn parse(text: &str) -> Result<Alternative, String> {
        let text = text.trim();
        if matches!(text, "" | "*" | "x" | "X") {
            return Ok(Alternative { range: VersionReq::STAR, takes_prereleases: false });
        }
        let comparators = match text.split_once(" - ") {
            Some((first, last)) => vec![format!(">={}", first.trim()), format!("<={}", last.trim())],
            None => split(text),
        };
        let comparators = comparators.iter().map(|part| comparator(part)).collect::<Result<Vec<_>, _>>()?;
        let takes_prereleases = comparators.iter().any(|comparator| comparator.pre.as_str() == "0");
        Ok(Alternative { range: VersionReq { comparators }, takes_prereleases })
    }

    fn admits(&self, version: &Version) -> bool {
        let released = Version { pre: Prerelease::EMPTY, ..version.clone() };
        self.range.matches(version) || (self.takes_prereleases && self.range.matches(&released))
    }
}

/// Splits a range into its comparators, at commas and blanks. An operator may stand apart from its version.
fn split(text: &str) -> Vec<String> {
    let mut parts: Vec<String> = Vec::new();
    for word in text.split([',', ' ', '\t']).filter(|word| !word.is_empty()) {
        match parts.last_mut().filter(|last| last.chars().all(|c| "<>=^~!".contains(c))) {
            Some(operator) => operator.push_str(word),
            None => parts.push(word.to_owned()),
        }
    }
    parts
}

/// Parses one comparator. A bare version means all that begins with it.
fn comparator(text: &str) -> Result<Comparator, String> {
    let at = text.find(|c: char| !"<>=^~!".contains(c)).unwrap_or(text.len());
    let (operator, version) = text.split_at(at);
    if operator.contains('!') {
        return Err(
            "it excludes a version, which ranges here cannot: name what is below it and what is above it".to_owned()
        );
    }
    let operator = match operator {
        "" | "==" => "=",
        other => other,
    };
    let version = version.strip_prefix(['v', 'V']).unwrap_or(version);
    let end = version.find(['-', '+']).unwrap_or(version.len());
    let (numbers, rest) = version.split_at(end);
    let operator = if numbers.contains(['*', 'x', 'X']) && operator == "=" { "" } else { operator };
    Comparator::parse(&format!("{operator}{}{rest}", bare_numbers(numbers))).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn newest<'a>(tags: &[&'a str]) -> Vec<&'a str> {
        let mut ages: Vec<TagVersion<'a>> = tags.iter().map(|tag| TagVersion::of(tag)).collect();
        ages.sort();
        ages.iter().rev().map(|age| age.tag).collect()
    }

    #[test]
    fn tags_of_any_scheme_are_ordered_by_their_age() {
        for order in [
            &["25.04", "24.10", "24.04", "22.10", "18.04"][..],
            &["2026.02.0", "2025.11.1", "2025.11.0"],
            &["2026-02", "2026-01", "2025-12", "2025-11"],
            &["2026-11-20", "2026-11-09", "2026-10-01", "2026-9-30"],
            &["1.2.10_b1", "1.2.3_b1", "1.2.3", "1.2.2"],
            &["20240201123456789012345", "20240201", "20240131"],
            &["1.2.3.10", "1.2.3.9", "1.2.3", "1.2.3-rc10", "1.2.3-rc9", "1.2.2", "latest"],
            &["v2.0.0", "1.99", "v1.10", "V1.9.3"],
            &["1.0.0", "1.0.0-rc.1", "1.0.0-beta.11", "1.0.0-beta.2", "1.0.0-alpha.1", "1.0.0-alpha"],
            &["build-10", "build-9", "build-1"],
        ] {
            let mut mixed = order.to_vec();
            mixed.sort_unstable();
            assert_eq!(newest(&mixed), order);
        }
    }

    #[test]
    fn ranges_are_read_as_they_are_written_elsewhere() {
        for (range, inside, outside) in [
            (">=1.2, <2", &["1.2", "v1.99.0", "1.3_b1"][..], &["1.1.9", "2.0.0", "1.5.0-rc1", "latest"][..]),
            (">=1.2 <2", &["1.2", "1.99"], &["2.0.0", "1.1"]),
            (">= 1.2 < 2", &["1.2", "1.99"], &["2.0.0", "1.1"]),
            ("^1 || ^3", &["1.5", "3.0.1"], &["2.0.0", "4"]),
            ("1.2 - 1.4", &["1.2.0", "1.4.9"], &["1.5", "1.1"]),
            ("1.2", &["1.2.0", "1.2.99"], &["1.3.0", "1.9.1"]),
            ("v1.2.3", &["1.2.3", "v1.2.3"], &["1.2.4"]),
            ("1.x", &["1.0", "1.99"], &["2.0"]),
            ("1.*", &["1.0", "1.99"], &["2.0"]),
            ("*", &["0.1", "99"], &["1.0-rc1", "latest"]),
            (">=22.04", &["22.04", "24.10"], &["18.04", "2026-11-20"]),
            (">=1.2.0-0", &["1.2.0-rc1", "1.3.0-alpine", "2.0"], &["1.1.9"]),
            (">=1.2.0-0 <2.0.0-0", &["1.9.0-rc1"], &["2.0.0-rc1", "2.0.0"]),
            ("~1.2", &["1.2.9"], &["1.3"]),
        ] {
            let read = Range::parse(range).unwrap();
            for tag in inside {
                assert!(read.admits(tag), "{tag} is in {range}");
            }
            for tag in outside {
                assert!(!read.admits(tag), "{tag} is not in {range}");
            }
        }
        for (bad, why) in [("!=1.3", "excludes"), (">=", "range"), ("newest", "range"), ("1.2.3.4", "range")] {
            let error = Range::parse(bad).unwrap_err();
            assert!(error.contains(why) && error.contains(bad), "{error}");
        }
        assert!(Range::parse(&"1 || ".repeat(1000)).is_err());
    }

    proptest! {
        #[test]
        fn the_order_of_tags_is_total(tags in prop::collection::vec("[v]{0,1}[a-z0-9._-]{0,8}", 0..12)) {
            let mut ages: Vec<_> = tags.iter().map(|tag| TagVersion::of(tag)).collect();
            ages.sort();
            for (at, one) in ages.iter().enumerate() {
                for other in &ages[at..] {
                    prop_assert_ne!(one.cmp(other), Ordering::Greater);
                    prop_assert_eq!(other.cmp(one), one.cmp(other).reverse());
                    prop_assert!((one.cmp(other) == Ordering::Equal) == (one.tag == other.tag));
                }
            }
        }

        #[test]
        fn any_range_is_survived(range in ".{0,40}", tag in ".{0,20}") {
            if let Ok(range) = Range::parse(&range) {
                let _ = range.admits(&tag);
            }
        }
    }
}

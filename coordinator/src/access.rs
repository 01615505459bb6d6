//! Who asks, and what they may.
//!
//! A [`Caller`] is who a request comes from: a user of this machine on the unix socket, known by what the kernel says of
//! the peer, the holder of a token, or anybody on the loopback of a coordinator that was told so. Roles say which
//! routes are for a caller; image patterns say which images.

use std::fmt;
use std::net::SocketAddr;

use coordinator_api::access::Role;
use serde::{Deserialize, Serialize};
use store::image::ImageRef;

/// The longest pattern.
const PATTERN_MAX: usize = 512;

/// A pattern that matches nothing that could ever be an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no pattern of images: write a name in which * stands for anything, such as registry.example.com/team/*"
)]
pub struct BadPattern(String);

/// Images by name: with `*` for any text. Names match as people write them and in full, with and without their tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImagePattern(String);

impl TryFrom<String> for ImagePattern {
    type Error = BadPattern;

    fn try_from(text: String) -> Result<ImagePattern, BadPattern> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"*./:@_-[]".contains(&byte);
        let is_pattern = !text.is_empty() && text.len() <= PATTERN_MAX && text.bytes().all(fits);
        if is_pattern { Ok(ImagePattern(text)) } else { Err(BadPattern(text.chars().take(PATTERN_MAX).collect())) }
    }
}

impl From<ImagePattern> for String {
    fn from(pattern: ImagePattern) -> String {
        pattern.0
    }
}

impl ImagePattern {
    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it matches an image.
    pub fn matches(&self, image: &ImageRef) -> bool {
        let repositories = [image.familiar_repository(), image.canonical_repository()];
        repositories.iter().any(|repository| {
            let tag = image.tag().map(|tag| format!("{repository}:{tag}"));
            let digest = image.digest().map(|digest| format!("{repository}@{digest}"));
            let names = [Some(repository.clone()), tag, digest];
            names.iter().flatten().any(|name| matches(&self.0, name))
        })
    }
}

/// Whether `text` is `pattern` with each `*` replaced by some text.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut left) = text.strip_prefix(head) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let tail = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = left.find(part) else { return false };
        left = &left[at + part.len()..];
    }
    left.ends_with(tail)
}

/// The images that a caller may see and ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Images(Vec<ImagePattern>);

impl Images {
    /// Those that match any of the patterns; all, if there are none.
    pub fn new(patterns: Vec<String>) -> Result<Images, BadPattern> {
        patterns.into_iter().map(ImagePattern::try_from).collect::<Result<_, _>>().map(Images)
    }

    /// Whether there are images that are not among them.
    pub fn is_restricted(&self) -> bool {
        !self.0.is_empty()
    }

    /// Whether an image is among them.
    pub fn contain(&self, image: &ImageRef) -> bool {
        self.0.is_empty() || self.0.iter().any(|pattern| pattern.matches(image))
    }

    /// The same for an image's name; what is no name is not among a restricted set.
    pub fn contain_name(&self, name: &str) -> bool {
        self.0.is_empty() || name.parse().is_ok_and(|image| self.contain(&image))
    }

    /// The patterns as they were written.
    pub fn patterns(&self) -> Vec<String> {
        self.0.iter().map(|pattern| pattern.0.clone()).collect()
    }
}

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// The unix socket, with what the kernel says of who opened it; nothing if it does not.
    Local(Option<Account>),
    /// The loopback, in the clear, of a coordinator that runs with `--insecure`.
    Loopback(SocketAddr),
    /// The network, over TLS.
    Remote(SocketAddr),
}

/// A user of this machine and their first group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// The user.
    pub uid: u32,
    /// The group that their process runs as.
    pub gid: u32,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Local(Some(account)) => write!(f, "uid {}", account.uid),
            Peer::Local(None) => f.write_str("an unknown user of this machine"),
            // Without the port: the same peer comes from many.
            Peer::Loopback(address) | Peer::Remote(address) => write!(f, "{}", address.ip()),
        }
    }
}

/// Whom of this machine's users a rule is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// One user.
    User(u32),
    /// The members of one group.
    Group(u32),
}

/// What users of this machine may do through the unix socket, besides root and the coordinator's own user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalRule {
    /// Who.
    pub subject: Subject,
    /// What.
    pub role: Role,
    /// With which images.
    pub images: Images,
}

/// Who a user of this machine is to us: root and `own`, the coordinator's user, are admins; for others the first rule
/// counts that is for them. `groups` are all groups of the user, asked for only if a rule needs them.
pub fn local_caller(
    account: Account,
    own: u32,
    rules: &[LocalRule],
    groups: impl FnOnce() -> Vec<u32>,
) -> Option<Caller> {
    let Account { uid, gid } = account;
    let proof = Proof::Local { uid };
    if uid == 0 || uid == own {
        return Some(Caller { proof, role: Role::Admin, images: Images::default() });
    }
    let wants_groups = rules.iter().any(|rule| matches!(rule.subject, Subject::Group(_)));
    let groups = if wants_groups { groups() } else { Vec::new() };
    let is_for = |rule: &&LocalRule| match rule.subject {
        Subject::User(user) => user == uid,
        Subject::Group(group) => group == gid || groups.contains(&group),
    };
    let rule = rules.iter().find(is_for)?;
    Some(Caller { proof, role: rule.role, images: rule.images.clone() })
}

/// How we know who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// The kernel says so: a user of this machine.
    Local {
        /// The user's number.
        uid: u32,
    },
    /// A token was shown.
    Token {
        /// Its name.
        name: String,
    },
    /// Nobody asked: the loopback of a coordinator that runs with `--insecure`.
    Nothing,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// How we know.
    pub proof: Proof,
    /// What they may do.
    pub role: Role,
    /// With which images.
    pub images: Images,
}

/// An image that is not for a caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{who} may not use image {image}: its images are {images}; ask an admin for a token with other patterns")]
pub struct Forbidden {
    who: String,
    image: String,
    images: String,
}

impl Caller {
    /// The name under which what they do is recorded: `uid 0`, `token ci`, `loopback`.
    pub fn actor(&self) -> String {
        match &self.proof {
            Proof::Local { uid } => format!("uid {uid}"),
            Proof::Token { name } => format!("token {name}"),
            Proof::Nothing => "loopback".to_owned(),
        }
    }

    /// Refuses an image that is not for them.
    pub fn check(&self, image: &ImageRef) -> Result<(), Forbidden> {
        match self.images.contain(image) {
            true => Ok(()),
            false => {
                Err(Forbidden { who: self.actor(), image: image.to_string(), images: self.images.patterns().join(" ") })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images(patterns: &[&str]) -> Images {
        Images::new(patterns.iter().map(ToString::to_string).collect()).unwrap()
    }

    #[test]
    fn stars_stand_for_any_text() {
        for (pattern, text, expected) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("*", "", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a*c", "ac", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c", false),
            ("ab*ba", "aba", false),
            ("a**", "a", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn images_match_by_any_of_their_names() {
        for (pattern, image, expected) in [
            ("r.example/team/*", "r.example/team/app:1", true),
            ("r.example/team/*", "r.example/teams/app:1", false),
            ("r.example/team/app", "r.example/team/app:1", true),
            ("r.example/team/app:1", "r.example/team/app:2", false),
            ("debian", "debian:12", true),
            ("docker.io/library/*", "debian", true),
            ("debian:*", "debian", true),
            ("debian:*", &format!("debian@sha256:{}", "0".repeat(64)), false),
        ] {
            assert_eq!(images(&[pattern]).contain(&image.parse().unwrap()), expected, "{pattern} {image}");
        }
    }

    #[test]
    fn root_and_the_coordinators_user_are_admins_and_rules_say_who_else_is_what() {
        let rule = |subject, role| LocalRule { subject, role, images: Images::default() };
        let rules = [
            rule(Subject::User(1000), Role::Host),
            rule(Subject::Group(50), Role::Viewer),
            rule(Subject::User(1001), Role::Admin),
        ];
        let role = |uid, gid, groups: &[u32]| {
            local_caller(Account { uid, gid }, 7, &rules, || groups.to_vec()).map(|caller| caller.role)
        };
        for (uid, gid, groups, expected) in [
            (0, 0, &[][..], Some(Role::Admin)),
            (7, 7, &[], Some(Role::Admin)),
            (1000, 50, &[50], Some(Role::Host)),
            (1001, 1, &[2, 50], Some(Role::Viewer)),
            (1001, 1, &[2], Some(Role::Admin)),
            (1002, 50, &[], Some(Role::Viewer)),
            (1002, 51, &[1, 2], None),
        ] {
            assert_eq!(role(uid, gid, groups), expected, "{uid} {gid} {groups:?}");
        }
    }

    #[test]
    fn without_patterns_all_images_are_meant_and_refusals_name_them() {
        assert!(images(&[]).contain_name("anything:1") && images(&[]).contain_name("no image at all"));
        let some = images(&["r/a/*", "r/b"]);
        assert!(!some.contain_name("no image at all"));
        let caller = Caller { proof: Proof::Token { name: "ci".to_owned() }, role: Role::Viewer, images: some };
        assert_eq!(
            caller.check(&"localhost/x".parse().unwrap()).unwrap_err().to_string().split(':').next(),
            Some("token ci may not use image localhost/x")
        );
        for bad in ["", "a b", "a\n", &"a".repeat(513)] {
            assert!(Images::new(vec![bad.to_owned()]).is_err(), "{bad}");
        }
    }
}

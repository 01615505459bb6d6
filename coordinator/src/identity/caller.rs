//! Who asks, and what they may do.
//!
//! A [`Caller`] is who a request comes from: a user of this machine on the unix socket, whom the kernel identifies; the holder of a token;
//! or anybody on the loopback of a coordinator that runs with `--insecure`. Roles say which routes a caller may use, image patterns say
//! which images.

use std::fmt;
use std::net::SocketAddr;

use coordinator_api::access::Role;
use serde::{Deserialize, Serialize};
use store::image::{ImageRecord, ImageRef};

use crate::identity::image_pattern::{BadPattern, ImagePattern};

/// The images that a caller may see and request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Images(Vec<ImagePattern>);

impl Images {
    /// The images that match any of the patterns; all images, if there are no patterns.
    pub fn new(patterns: Vec<String>) -> Result<Images, BadPattern> {
        patterns.into_iter().map(ImagePattern::try_from).collect::<Result<_, _>>().map(Images)
    }

    /// Whether any image is excluded.
    pub fn is_restricted(&self) -> bool {
        !self.0.is_empty()
    }

    /// Whether an image is included: both its tag and its digest, where a reference has both.
    pub fn contain(&self, image: &ImageRef) -> bool {
        self.0.is_empty()
            || (self.0.iter().any(|pattern| pattern.matches_tag(image))
                && self.0.iter().any(|pattern| pattern.matches_digest(image)))
    }

    /// The same for an image's name. Text that is not an image's name is not in a restricted set.
    pub fn contain_name(&self, name: &str) -> bool {
        self.0.is_empty() || name.parse().is_ok_and(|image| self.contain(&image))
    }

    /// Whether an entry of the catalogue is included.
    pub fn contain_record(&self, image: &ImageRecord) -> bool {
        self.0.is_empty() || self.0.iter().any(|pattern| pattern.matches_record(image))
    }

    /// Whether any image of a repository could be included.
    pub fn may_contain_in(&self, image: &ImageRef) -> bool {
        let repository = image.canonical_repository();
        self.0.is_empty() || self.0.iter().any(|pattern| pattern.may_match_in(&repository))
    }

    /// The patterns as they were written.
    pub fn patterns(&self) -> Vec<String> {
        self.0.iter().map(|pattern| pattern.as_str().to_owned()).collect()
    }
}

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// The unix socket, with the account that the kernel reports for the peer, if it reports one.
    Local(Option<Account>),
    /// The loopback, without TLS, of a coordinator that runs with `--insecure`.
    Loopback(SocketAddr),
    /// The network, over TLS.
    Remote(SocketAddr),
}

/// A user of this machine, and the group of their process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// The user's id.
    pub uid: u32,
    /// The id of the group that their process runs as.
    pub gid: u32,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Local(Some(account)) => write!(f, "uid {}", account.uid),
            Peer::Local(None) => f.write_str("an unknown user of this machine"),
            // Without the port: the same peer comes from many ports.
            Peer::Loopback(address) | Peer::Remote(address) => write!(f, "{}", address.ip()),
        }
    }
}

/// The users of this machine that a rule applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// One user.
    User(u32),
    /// The members of one group.
    Group(u32),
}

/// What users of this machine may do through the unix socket. Root and the coordinator's own user need no rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalRule {
    /// Whom it applies to.
    pub subject: Subject,
    /// Their role.
    pub role: Role,
    /// The images that they may use.
    pub images: Images,
}

/// The caller for a user of this machine. Root and `own`, the coordinator's user, are admins; for others, the first rule that applies
/// counts. `groups` returns all groups of the user, and is called only if a rule needs them.
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

/// How a caller was identified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// By the kernel, as a user of this machine.
    Local {
        /// The user's id.
        uid: u32,
    },
    /// By a token.
    Token {
        /// The token's name.
        name: String,
    },
    /// Not at all: the loopback of a coordinator that runs with `--insecure`.
    Nothing,
}

/// Who makes a request, and what they may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// How they were identified.
    pub proof: Proof,
    /// What they may do.
    pub role: Role,
    /// The images that they may use.
    pub images: Images,
}

/// An image that a caller may not use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{who} may not use image {image}: its images are {images}; ask an admin for a token with other patterns")]
pub struct Forbidden {
    who: String,
    image: String,
    images: String,
}

impl Caller {
    /// The name under which their actions are recorded: `uid 0`, `token ci`, `loopback`.
    pub fn actor(&self) -> String {
        match &self.proof {
            Proof::Local { uid } => format!("uid {uid}"),
            Proof::Token { name } => format!("token {name}"),
            Proof::Nothing => "loopback".to_owned(),
        }
    }

    /// Refuses a repository of which they may use no image.
    pub fn check_repository(&self, image: &ImageRef) -> Result<(), Forbidden> {
        if self.images.may_contain_in(image) { Ok(()) } else { Err(self.forbidden(image.familiar_repository())) }
    }

    fn forbidden(&self, image: String) -> Forbidden {
        Forbidden { who: self.actor(), image, images: self.images.patterns().join(" ") }
    }

    /// Refuses an image that they may not use.
    pub fn check(&self, image: &ImageRef) -> Result<(), Forbidden> {
        if self.images.contain(image) { Ok(()) } else { Err(self.forbidden(image.to_string())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images(patterns: &[&str]) -> Images {
        Images::new(patterns.iter().map(ToString::to_string).collect()).unwrap()
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
        assert!(Images::new(vec!["a b".to_owned()]).is_err());
    }
}

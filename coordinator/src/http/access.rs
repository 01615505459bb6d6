//! Who may use a route.

use coordinator_api::access::Role;

use crate::identity::caller::Caller;

/// Who may use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody, without authentication: the route shows nothing secret, or checks a secret of its own.
    Open,
    /// Every caller with a role.
    Any,
    /// Viewers and admins whose access is not limited to some images.
    Viewers,
    /// Viewers and admins. For callers limited to some images, the handler shows only what concerns those.
    LimitedViewers,
    /// Hosts and admins. The handler checks whether the caller may use the image.
    Hosts,
    /// Admins. The guard records each change as an event.
    Admins,
    /// Admins. The handler records each change itself, in its own words.
    AdminsSelfAudited,
}

impl Access {
    /// Whether a role is sufficient.
    pub fn admits(self, role: Role) -> bool {
        match self {
            Access::Open | Access::Any => true,
            Access::Viewers | Access::LimitedViewers => matches!(role, Role::Viewer | Role::Admin),
            Access::Hosts => matches!(role, Role::Host | Role::Admin),
            Access::Admins | Access::AdminsSelfAudited => role == Role::Admin,
        }
    }

    /// Why a caller may not use the route; `None` if the caller may.
    pub(super) fn refusal(self, caller: &Caller) -> Option<String> {
        if !self.admits(caller.role) {
            let (actor, role) = (caller.actor(), caller.role);
            return Some(format!("{actor} has the role {role}, which is not enough for this: ask an admin"));
        }
        let shows_all = self == Access::Viewers && caller.images.is_restricted();
        shows_all.then(|| format!("{} is limited to some images, and this shows all: ask an admin", caller.actor()))
    }
}

/// The methods of a route and who may use each. The route itself refuses methods that are not listed.
pub type Methods = &'static [(&'static str, Access)];

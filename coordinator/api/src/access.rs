//! Who may do what: roles and tokens.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[schema(as = AccessRole)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Looks at everything, changes nothing.
    Viewer,
    /// What a host needs: looks at images, asks for them, renews its lease, sends traces.
    Host,
    /// Everything.
    Admin,
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 3] = [Role::Viewer, Role::Host, Role::Admin];

    /// The word used in JSON, tables, flags and messages.
    pub const fn word(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Host => "host",
            Role::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// A request for a new token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewToken {
    /// The token's name; unique among all tokens.
    pub name: String,
    /// What it allows.
    pub role: Role,
    /// Patterns of images that it is limited to (`*` stands for anything but a slash, `**` for anything); none means
    /// all. Not for admins.
    #[serde(default)]
    pub images: Vec<String>,
    /// Seconds until it expires; none means never.
    #[serde(default)]
    pub expires_seconds: Option<u64>,
}

/// What is known of a token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenInfo {
    /// Its name.
    pub name: String,
    /// The part of the token that is not secret.
    pub id: String,
    /// What it allows.
    pub role: Role,
    /// The images that it is limited to; none means all.
    pub images: Vec<String>,
    /// When it was created.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Who made it.
    pub created_by: String,
    /// When it expires.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<Timestamp>,
    /// When it was last used, accurate to some minutes.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_used_at: Option<Timestamp>,
}

/// A new token. This is the only time that it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenCreated {
    /// What the coordinator keeps of it.
    #[serde(flatten)]
    pub info: TokenInfo,
    /// The token itself.
    pub token: String,
}

/// The tokens, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenList {
    /// The tokens.
    pub tokens: Vec<TokenInfo>,
    /// Set if there are more: where the next page continues.
    #[serde(rename = "continue", default, skip_serializing_if = "Option::is_none")]
    pub next_page: Option<String>,
}

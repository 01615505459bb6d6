//! Credentials for a registry: what Docker's own `config.json` says ([`super::docker_config`]), including its helpers.
//!
//! Credentials are read when they are needed and never written anywhere; helpers' answers are cached in memory for a while
//! ([`super::credential_cache`]). A missing file means anonymous; a file or helper that fails is an error, because falling back to
//! anonymous would turn a configuration fault into a misleading "no such image". Helpers are processes, and may hang:
//! [`super::credential_helper`].

use std::fmt;

/// A text that no log, error or debug output shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(text: String) -> Secret {
        Secret(text)
    }

    /// The text itself, for the one header that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Credentials for one registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// No credentials.
    Anonymous,
    /// A user with a password.
    Basic {
        /// The user's name.
        user: String,
        /// The password or access token.
        password: Secret,
    },
    /// An OAuth2 refresh token.
    Identity {
        /// The token.
        token: Secret,
        /// The user and password beside the token, if any, for a registry that accepts no tokens.
        password: Option<(String, Secret)>,
    },
    /// A bearer token for the registry itself.
    Registry(Secret),
}

impl Credentials {
    /// A user with a password; anonymous if both are empty.
    pub fn of(user: String, password: String) -> Credentials {
        if user.is_empty() && password.is_empty() {
            Credentials::Anonymous
        } else {
            Credentials::Basic { user, password: Secret::new(password) }
        }
    }

    /// The user and the password, if both are known.
    pub fn password(&self) -> Option<(&str, &Secret)> {
        match self {
            Credentials::Basic { user, password } | Credentials::Identity { password: Some((user, password)), .. } => {
                Some((user, password))
            }
            Credentials::Anonymous | Credentials::Identity { .. } | Credentials::Registry(_) => None,
        }
    }

    /// The name used in messages.
    pub fn who(&self) -> String {
        match self {
            Credentials::Anonymous => "anonymous users".to_owned(),
            Credentials::Basic { user, .. } => format!("user {user}"),
            Credentials::Identity { .. } | Credentials::Registry(_) => "the logged-in user".to_owned(),
        }
    }
}

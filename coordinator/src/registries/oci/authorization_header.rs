//! `Authorization` headers, what they are for, and the error when they are refused.

use base64::Engine as _;

use crate::registries::error::RegistryError;
use crate::registries::oci::credentials::{Credentials, Secret};

/// One repository of one registry: the scope of a token.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    /// The registry's host.
    pub registry: String,
    /// The repository's path in it.
    pub repository: String,
}

/// The error for 401 or 403, with advice.
pub(super) fn denied(scope: &Scope, credentials: &Credentials) -> RegistryError {
    let registry = &scope.registry;
    let remedy = match credentials {
        Credentials::Anonymous => format!("check the name, or run docker login {registry} as the coordinator's user"),
        _ => format!("check the name and the user's rights, or run docker login {registry} again"),
    };
    RegistryError::Denied {
        registry: registry.clone(),
        image: scope.repository.clone(),
        who: credentials.who(),
        remedy,
    }
}

/// A header value that no debug output shows. A secret that no header can hold becomes an empty value, and so is refused.
pub(super) fn sensitive(text: &Secret) -> http::HeaderValue {
    let mut value = http::HeaderValue::from_str(text.expose()).unwrap_or(http::HeaderValue::from_static(""));
    value.set_sensitive(true);
    value
}

pub(super) fn bearer_header(token: &str) -> Secret {
    Secret::new(format!("Bearer {token}"))
}

pub(super) fn basic_header(user: &str, password: &Secret) -> Secret {
    let pair = format!("{user}:{}", password.expose());
    Secret::new(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair)))
}

//! What proves who we are, for what, and what to say when it does not.

use base64::Engine as _;

use crate::registries::error::RegistryError;
use crate::registries::oci::credentials::{Credentials, Secret};

/// One repository of one registry: what a token is good for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    /// The registry's host.
    pub registry: String,
    /// The repository's path in it.
    pub repository: String,
}

/// 401 or 403 in words.
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

/// A header's value that nothing shows. One that no header can hold is left empty, and so refused.
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

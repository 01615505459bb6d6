//! Who we are to a registry: Docker's own `config.json`, its helpers included.
//!
//! Credentials are read when they are needed and never written anywhere; the keyring keeps them in memory for a while. A file that does not exist means anonymous; a file or
//! helper that fails is an error, because falling back to anonymous would turn a configuration fault into a
//! misleading "no such image".

use std::fmt;
use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::PathBuf;

use docker_credential::{CredentialRetrievalError, DockerCredential};

use crate::registry::error::RegistryError;

/// A text that no log, no error and no debug output shows.
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

/// Who we are to one registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// Nobody.
    Anonymous,
    /// A user with a password.
    Basic {
        /// The user's name.
        user: String,
        /// The password or access token.
        password: Secret,
    },
    /// An OAuth2 refresh token.
    Identity(Secret),
}

impl Credentials {
    /// The name used in messages.
    pub fn who(&self) -> String {
        match self {
            Credentials::Anonymous => "anonymous users".to_owned(),
            Credentials::Basic { user, .. } => format!("user {user}"),
            Credentials::Identity(_) => "the logged-in user".to_owned(),
        }
    }
}

/// Where credentials are looked up.
#[derive(Debug, Clone, Default)]
pub struct CredentialStore {
    /// Docker's `config.json`; none means always anonymous.
    pub config: Option<PathBuf>,
}

/// The keys under which Docker files a registry's credentials.
fn keys(registry: &str) -> Vec<String> {
    match registry {
        "docker.io" => {
            vec!["https://index.docker.io/v1/".to_owned(), "index.docker.io".to_owned(), "docker.io".to_owned()]
        }
        other => vec![other.to_owned(), format!("https://{other}")],
    }
}

impl CredentialStore {
    /// The credentials for `registry`. Blocks: a helper is a process.
    pub fn lookup(&self, registry: &str) -> Result<Credentials, RegistryError> {
        let Some(path) = &self.config else { return Ok(Credentials::Anonymous) };
        let failed = |why: String| RegistryError::Credentials { registry: registry.to_owned(), why };
        for key in keys(registry) {
            let file = match File::open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Credentials::Anonymous),
                Err(error) => return Err(failed(format!("{}: {error}", path.display()))),
            };
            match docker_credential::get_credential_from_reader(BufReader::new(file), &key) {
                Ok(found) => return Ok(convert(found)),
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(failed(explain(&error, path))),
            }
        }
        Ok(Credentials::Anonymous)
    }
}

/// Docker's credential in our words. Docker itself ignores NULs at a password's end, and so do we.
fn convert(found: DockerCredential) -> Credentials {
    match found {
        DockerCredential::IdentityToken(token) => Credentials::Identity(Secret::new(token)),
        DockerCredential::UsernamePassword(user, password) => match user.is_empty() && password.is_empty() {
            true => Credentials::Anonymous,
            false => Credentials::Basic { user, password: Secret::new(password.trim_end_matches('\0').to_owned()) },
        },
    }
}

/// Whether the answer is simply "none": the helpers' protocol has only a message for that.
fn is_absent(error: &CredentialRetrievalError) -> bool {
    match error {
        CredentialRetrievalError::NoCredentialConfigured | CredentialRetrievalError::ConfigNotFound => true,
        CredentialRetrievalError::HelperFailure { stdout, stderr, .. } => {
            stdout.contains("credentials not found") || stderr.contains("credentials not found")
        }
        _ => false,
    }
}

/// A sentence without the helper's output, which may hold secrets.
fn explain(error: &CredentialRetrievalError, path: &std::path::Path) -> String {
    let path = path.display();
    match error {
        CredentialRetrievalError::HelperCommunicationError => {
            format!("the credential helper named in {path} cannot be run: install it or remove it from that file")
        }
        CredentialRetrievalError::MalformedHelperResponse => {
            format!("the credential helper named in {path} gives an unusable answer: try it by hand")
        }
        CredentialRetrievalError::HelperFailure { helper, .. } => format!("{helper} fails: try it by hand"),
        _ => format!("{path} is not a valid Docker configuration: repair it or run docker login"),
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;

    use super::*;

    fn store(text: &str) -> (tempfile::TempDir, CredentialStore) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        (dir, CredentialStore { config: Some(path) })
    }

    #[test]
    fn nothing_configured_is_anonymous() {
        assert_eq!(CredentialStore::default().lookup("r"), Ok(Credentials::Anonymous));
        let absent = CredentialStore { config: Some(PathBuf::from("/nonexistent/config.json")) };
        assert_eq!(absent.lookup("r"), Ok(Credentials::Anonymous));
        let (_dir, empty) = store("{}");
        assert_eq!(empty.lookup("r"), Ok(Credentials::Anonymous));
    }

    #[test]
    fn users_and_identity_tokens_are_found_under_dockers_keys() {
        let auth = base64::engine::general_purpose::STANDARD.encode("anna:pa:ss");
        let text = format!(
            r#"{{"auths": {{"r.example:5000": {{"auth": "{auth}"}},
                 "https://index.docker.io/v1/": {{"identitytoken": "refresh"}}}}}}"#
        );
        let (_dir, store) = store(&text);
        let anna = Credentials::Basic { user: "anna".to_owned(), password: Secret::new("pa:ss".to_owned()) };
        assert_eq!(store.lookup("r.example:5000"), Ok(anna.clone()));
        assert_eq!(store.lookup("docker.io"), Ok(Credentials::Identity(Secret::new("refresh".to_owned()))));
        assert_eq!(store.lookup("other"), Ok(Credentials::Anonymous));
        assert!(!format!("{anna:?}").contains("pa:ss"));
    }

    #[test]
    fn a_broken_file_or_helper_is_an_error_not_anonymity() {
        let (_dir, broken) = store("{");
        assert!(matches!(broken.lookup("r"), Err(RegistryError::Credentials { .. })));
        let (_dir, helper) = store(r#"{"credHelpers": {"r": "does-not-exist-anywhere"}}"#);
        let error = helper.lookup("r").unwrap_err().to_string();
        assert!(error.contains("cannot be run"), "{error}");
    }
}

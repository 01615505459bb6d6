//! Who we are to a registry: Docker's own `config.json`, its helpers included.
//!
//! Credentials are read when they are needed and never written anywhere; the keyring keeps them in memory for a while. A file that does not exist means anonymous; a file or
//! helper that fails is an error, because falling back to anonymous would turn a configuration fault into a
//! misleading "no such image". Helpers are processes, and may hang: [`super::credential_helper`].

use std::collections::HashMap;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use store::image::registry_names;

use crate::registry::credential_helper::{self, Login};
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
    let hub = (registry == store::image::DEFAULT_REGISTRY).then(|| "https://index.docker.io/v1/".to_owned());
    let names = registry_names(registry);
    let plain = names.iter().map(|name| (*name).to_owned());
    hub.into_iter().chain(plain).chain([format!("https://{registry}")]).collect()
}

/// Docker's `config.json`, as far as it is about logins.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: HashMap<String, FiledLogin>,
    creds_store: Option<String>,
    cred_helpers: HashMap<String, String>,
}

/// A login that stands in the file itself.
#[derive(Default, Deserialize)]
#[serde(default)]
struct FiledLogin {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

/// The host that a key of `auths` means: Docker writes hosts, and URLs with and without a path.
fn host_of_key(key: &str) -> &str {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    bare.map_or(key, |rest| rest.split('/').next().unwrap_or(rest))
}

impl DockerConfig {
    fn filed(&self, key: &str) -> Option<&FiledLogin> {
        let host = host_of_key(key);
        let same = |other: &&String| registry_names(host).contains(&host_of_key(other));
        self.auths.get(key).or_else(|| self.auths.get(self.auths.keys().filter(same).min()?))
    }

    fn helper(&self, key: &str) -> Option<&str> {
        self.cred_helpers.get(key).map(String::as_str).filter(|name| !name.is_empty())
    }
}

impl FiledLogin {
    /// What it holds; nothing if it is only a place that a helper fills.
    fn read(&self) -> Option<Result<Credentials, String>> {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = given(&self.identitytoken) {
            return Some(Ok(Credentials::Identity(Secret::new(token))));
        }
        let named = given(&self.username).zip(self.password.clone());
        match (given(&self.auth), named) {
            (Some(auth), named) => Some(match (decode(&auth), named) {
                (None, _) => Err("the login in it is not USER:PASSWORD in base64".to_owned()),
                (Some(found), Some(named)) if found != named => {
                    Err("its auth says otherwise than its username and password".to_owned())
                }
                (Some((user, password)), _) => Ok(basic(user, &password)),
            }),
            (None, Some((user, password))) => Some(Ok(basic(user, &password))),
            (None, None) => None,
        }
    }
}

/// User and password from base64, however it is padded and wrapped.
fn decode(auth: &str) -> Option<(String, String)> {
    let lenient = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let bare: String = auth.split_ascii_whitespace().collect();
    let decoded = String::from_utf8(GeneralPurpose::new(&STANDARD, lenient).decode(bare).ok()?).ok()?;
    decoded.split_once(':').map(|(user, password)| (user.to_owned(), password.to_owned()))
}

/// Docker itself ignores NULs at a password's end, and so do we.
fn basic(user: String, password: &str) -> Credentials {
    if user.is_empty() && password.is_empty() {
        return Credentials::Anonymous;
    }
    Credentials::Basic { user, password: Secret::new(password.trim_end_matches('\0').to_owned()) }
}

/// What a helper knows; nothing if that is nothing.
fn ask(name: &str, key: &str) -> Result<Option<Credentials>, String> {
    Ok(match credential_helper::ask(name, key)? {
        Login::Password(user, password) => Some(basic(user, &password)),
        Login::Token(token) => Some(Credentials::Identity(Secret::new(token))),
        Login::None => None,
    })
}

/// The login for one key.
fn login(config: &DockerConfig, key: &str) -> Result<Option<Credentials>, String> {
    if let Some(name) = config.helper(key) {
        return ask(name, key);
    }
    if let Some(read) = config.filed(key).and_then(FiledLogin::read) {
        return read.map(Some);
    }
    match config.creds_store.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => ask(name, key),
        None => Ok(None),
    }
}

fn read(path: &Path) -> Result<Option<DockerConfig>, String> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    // What the parser says could quote a password.
    let config = serde_json::from_slice(&text);
    config
        .map(Some)
        .map_err(|_| format!("{} is not a valid Docker configuration: repair it or run docker login", path.display()))
}

impl CredentialStore {
    /// The credentials for `registry`. Blocks: a helper is a process.
    pub fn lookup(&self, registry: &str) -> Result<Credentials, RegistryError> {
        let Some(path) = &self.config else { return Ok(Credentials::Anonymous) };
        let failed = |why: String| RegistryError::Credentials { registry: registry.to_owned(), why };
        let Some(config) = read(path).map_err(failed)? else { return Ok(Credentials::Anonymous) };
        for key in keys(registry) {
            let found = login(&config, &key).map_err(|why| failed(format!("{}: {why}", path.display())))?;
            if let Some(credentials) = found {
                return Ok(credentials);
            }
        }
        Ok(Credentials::Anonymous)
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
    fn logins_are_read_as_docker_reads_them() {
        let good = base64::engine::general_purpose::STANDARD.encode("anna:pass-word");
        let wrapped = format!("{}\\n  {}\\n", &good[..8], &good[8..]);
        let bare = good.trim_end_matches('=');
        let anna = Credentials::Basic { user: "anna".to_owned(), password: Secret::new("pass-word".to_owned()) };
        for login in [
            format!(r#"{{"auth": "{wrapped}"}}"#),
            format!(r#"{{"auth": "{bare}"}}"#),
            format!(r#"{{"auth": "{good}", "identitytoken": ""}}"#),
            format!(r#"{{"auth": "{good}", "username": "anna", "password": "pass-word"}}"#),
            r#"{"username": "anna", "password": "pass-word"}"#.to_owned(),
        ] {
            for key in ["r.io", "https://r.io", "https://r.io/v2/", "http://r.io/v1/"] {
                let (_dir, store) = store(&format!(r#"{{"auths": {{"{key}": {login}, "other": {{}}}}}}"#));
                assert_eq!(store.lookup("r.io"), Ok(anna.clone()), "{key} {login}");
            }
        }
        let (_dir, empty) = store(r#"{"auths": {"r.io": {}}, "credsStore": "", "HttpHeaders": {"a": "b"}}"#);
        assert_eq!(empty.lookup("r.io"), Ok(Credentials::Anonymous));
        for bad in
            [r#"{"auth": "%%%"}"#, r#"{"auth": "YW5uYQ=="}"#, r#"{"auth": "YTpi", "username": "a", "password": "c"}"#]
        {
            let (_dir, store) = store(&format!(r#"{{"auths": {{"r.io": {bad}}}}}"#));
            let error = store.lookup("r.io").unwrap_err().to_string();
            assert!(error.contains("config.json") && !error.contains("YW5"), "{error}");
        }
    }

    #[test]
    fn docker_hub_has_one_login_whatever_it_is_filed_under() {
        let auth = base64::engine::general_purpose::STANDARD.encode("anna:x");
        for key in [
            "docker.io",
            "https://docker.io",
            "index.docker.io",
            "https://index.docker.io/v1/",
            "registry-1.docker.io",
            "https://registry-1.docker.io/v2/",
            "registry.hub.docker.com",
        ] {
            let (_dir, store) = store(&format!(r#"{{"auths": {{"{key}": {{"auth": "{auth}"}}}}}}"#));
            assert!(matches!(store.lookup("docker.io"), Ok(Credentials::Basic { .. })), "{key}");
            assert_eq!(store.lookup("r.io"), Ok(Credentials::Anonymous), "{key}");
        }
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

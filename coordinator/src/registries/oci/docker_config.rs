//! The logins in Docker's `config.json`, in the forms in which docker, podman, Kubernetes and clouds' helpers write it.
//!
//! Everything that docker accepts is accepted: names of fields in any case, `null`, unknown fields, anything after the document, an empty
//! file. So is what other tools write: podman's keys with a part of the path (the longest that fits counts), the old form without `auths`,
//! and base64 of every kind. An entry that cannot be read affects only its own registry.

use std::cmp::Reverse;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Map, Value};
use store::image::{DEFAULT_REGISTRY, registry_names};

use crate::registries::error::RegistryError;
use crate::registries::oci::credentials::{Credentials, Secret};

/// Names of such a file in a directory: docker's, podman's, and those in Kubernetes' secrets, new and old.
const NAMES: [&str; 4] = ["config.json", "auth.json", ".dockerconfigjson", ".dockercfg"];

/// The key under which docker stores its login to Docker Hub.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// Where credentials are looked up.
#[derive(Debug, Clone, Default)]
pub struct CredentialStore {
    /// Docker's `config.json`, or the directory that it lies in; `None` means always anonymous.
    pub config: Option<PathBuf>,
}

impl CredentialStore {
    /// Where the login for a repository of `registry` comes from, and the file that says so. Blocks.
    pub(super) fn source(&self, registry: &str, repository: &str) -> Result<(String, Source), RegistryError> {
        let nobody = || (String::new(), Source::File(Ok(Credentials::Anonymous)));
        let Some(path) = &self.config else { return Ok(nobody()) };
        let failed = |why: String| RegistryError::Credentials { registry: registry.to_owned(), why };
        let Some((file, config)) = DockerConfig::read(path).map_err(failed)? else { return Ok(nobody()) };
        Ok((file.display().to_string(), config.source(registry, repository)))
    }
}

/// The parsed file.
#[derive(Default)]
pub(super) struct DockerConfig {
    logins: Vec<(Key, Value)>,
    /// Registries and their helpers; an empty name means that only this file is used.
    helpers: Vec<(Key, String)>,
    store: Option<String>,
}

/// Where a login comes from.
pub(super) enum Source {
    /// From the file itself; the error is a sentence without secrets.
    File(Result<Credentials, String>),
    /// From a helper.
    Helper {
        /// Its name.
        name: String,
        /// Names under which it may know the registry, likely ones first.
        servers: Vec<String>,
        /// The login in the file, in case the helper has none.
        otherwise: Option<Result<Credentials, String>>,
    },
}

/// A key of a file: a host, a host with a part of the path as podman writes it, or a URL.
struct Key {
    text: String,
    host: String,
    path: String,
}

impl Key {
    fn new(text: String) -> Key {
        let lower = text.to_ascii_lowercase();
        let bare = lower.strip_prefix("https://").or_else(|| lower.strip_prefix("http://"));
        let (host, path) = bare.unwrap_or(&lower).split_once('/').unwrap_or((bare.unwrap_or(&lower), ""));
        let path = path.trim_matches('/');
        // Of a URL only the host counts; the paths of the registry's own API mean the whole registry.
        let is_whole = bare.is_some() || ["v1", "v2"].contains(&path);
        Key { host: host.to_owned(), path: if is_whole { String::new() } else { path.to_owned() }, text }
    }

    /// Whether it covers a repository of a registry.
    fn covers(&self, registry: &str, repository: &str) -> bool {
        let rest = repository.strip_prefix(&self.path);
        let is_within = self.path.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        is_within && registry_names(registry).iter().any(|name| name.eq_ignore_ascii_case(&self.host))
    }

    /// Its rank among the keys that cover the same repository: the longest path first, then docker's own key.
    fn order(&self, registry: &str) -> (Reverse<usize>, usize, &str) {
        let names = servers(registry);
        let at = names.iter().position(|name| *name == self.text).unwrap_or(names.len());
        (Reverse(self.path.len()), at, &self.text)
    }
}

/// The names under which docker knows a registry; the one that it writes comes first.
fn servers(registry: &str) -> Vec<String> {
    let names = registry_names(registry).into_iter().map(str::to_owned);
    match registry {
        DEFAULT_REGISTRY => [HUB_KEY.to_owned()].into_iter().chain(names).collect(),
        _ => names.chain([format!("https://{registry}")]).collect(),
    }
}

/// A field by its name in any case, as in Go; an exact match comes first.
fn field<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let alike =
        || object.iter().filter(|(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value).next_back();
    object.get(name).or_else(alike).filter(|value| !value.is_null())
}

/// A text field; `None` if it is missing or empty, an error if it is no text.
fn text(object: &Map<String, Value>, name: &str) -> Result<Option<String>, ()> {
    match field(object, name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        Some(_) => Err(()),
    }
}

/// An object field; `None` if it is missing, an error if it is no object.
fn table<'a>(object: &'a Map<String, Value>, name: &str) -> Result<Option<&'a Map<String, Value>>, ()> {
    field(object, name).map(|value| value.as_object().ok_or(())).transpose()
}

/// Whether an entry of the old form is a login: other files have objects, too.
fn is_login(value: &Value) -> bool {
    value.as_object().is_some_and(|entry| field(entry, "auth").or(field(entry, "username")).is_some())
}

impl DockerConfig {
    /// Reads the file or, in a directory, the first of [`NAMES`] that exists; `None` if there is none. The error is a sentence.
    pub(super) fn read(path: &Path) -> Result<Option<(PathBuf, DockerConfig)>, String> {
        let candidates: Vec<PathBuf> =
            if path.is_dir() { NAMES.iter().map(|name| path.join(name)).collect() } else { vec![path.to_owned()] };
        for file in candidates {
            match std::fs::read(&file) {
                // The parser's message could quote a password.
                Ok(bytes) => match DockerConfig::parse(&bytes) {
                    Ok(config) => return Ok(Some((file, config))),
                    Err(()) => {
                        let file = file.display();
                        return Err(format!(
                            "{file} is not a valid Docker configuration: repair it or run docker login"
                        ));
                    }
                },
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(format!("{} cannot be read: {error}", file.display())),
            }
        }
        Ok(None)
    }

    fn parse(bytes: &[u8]) -> Result<DockerConfig, ()> {
        let text = String::from_utf8_lossy(bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes));
        let document = serde_json::Deserializer::from_str(&text).into_iter::<Value>().next();
        let object = match document.transpose().map_err(|_| ())? {
            None | Some(Value::Null) => return Ok(DockerConfig::default()),
            Some(Value::Object(object)) => object,
            Some(_) => return Err(()),
        };
        let (auths, named) = (table(&object, "auths")?, table(&object, "credHelpers")?);
        let store = self::text(&object, "credsStore")?;
        let is_old = auths.is_none() && named.is_none() && store.is_none();
        let entries = auths.into_iter().flatten().chain(object.iter().filter(|(_, value)| is_old && is_login(value)));
        let login = |(key, value): (&String, &Value)| (Key::new(key.clone()), value.clone());
        let helper = |(key, value): (&String, &Value)| {
            let name = if value.is_null() { Some("") } else { value.as_str() };
            name.map(|name| (Key::new(key.clone()), name.to_owned())).ok_or(())
        };
        let helpers = named.into_iter().flatten().map(helper).collect::<Result<_, ()>>()?;
        Ok(DockerConfig { logins: entries.map(login).collect(), helpers, store })
    }

    /// Where the login for a repository comes from, in docker's order: the registry's own helper, then the helper for all registries
    /// (`credsStore`), then the file. A login that podman stored for a part of the path is for that part only, and comes before
    /// `credsStore`.
    pub(super) fn source(&self, registry: &str, repository: &str) -> Source {
        let mut helpers: Vec<_> = self.helpers.iter().filter(|(key, _)| key.covers(registry, "")).collect();
        helpers.sort_by_key(|(key, _)| key.order(registry));
        let own = helpers.first().map(|(_, name)| name.as_str());
        let (filed, is_partial) = match self.filed(registry, repository) {
            Some((key, read)) => (Some(read), !key.path.is_empty()),
            None => (None, false),
        };
        let name = match own {
            Some(name) => Some(name),
            None if is_partial => None,
            None => self.store.as_deref(),
        };
        match name.filter(|name| !name.is_empty()) {
            Some(name) => Source::Helper { name: name.to_owned(), servers: servers(registry), otherwise: filed },
            None => Source::File(filed.unwrap_or(Ok(Credentials::Anonymous))),
        }
    }

    /// The login in the file for a repository.
    fn filed(&self, registry: &str, repository: &str) -> Option<(&Key, Result<Credentials, String>)> {
        let mut covering: Vec<_> = self.logins.iter().filter(|(key, _)| key.covers(registry, repository)).collect();
        covering.sort_by_key(|(key, _)| key.order(registry));
        covering.into_iter().find_map(|(key, entry)| read(entry).map(|read| (key, read)))
    }
}

/// Parses an entry; `None` if it is only a placeholder that a helper fills.
fn read(entry: &Value) -> Option<Result<Credentials, String>> {
    let entry = match entry {
        Value::Null => return None,
        Value::Object(entry) => entry,
        _ => return Some(Err("the login in it is not an object".to_owned())),
    };
    let fields = ["auth", "username", "password", "identitytoken", "registrytoken"].map(|name| text(entry, name));
    let [Ok(auth), Ok(user), Ok(password), Ok(identity), Ok(registry)] = fields else {
        return Some(Err("the login in it holds something that is no text".to_owned()));
    };
    if let Some(token) = registry {
        return Some(Ok(Credentials::Registry(Secret::new(token))));
    }
    // As in docker, `auth` takes precedence over `username` and `password`.
    let login = match auth {
        Some(auth) => {
            decode(&auth).ok_or_else(|| "the login in it is not USER:PASSWORD in base64".to_owned()).map(Some)
        }
        None => Ok(user.map(|user| (user, password.unwrap_or_default()))),
    };
    match (identity, login) {
        (Some(token), login) => Some(Ok(Credentials::Identity {
            token: Secret::new(token),
            password: login.ok().flatten().map(|(user, password)| (user, Secret::new(password))),
        })),
        (None, login) => login.map(|login| login.map(|(user, password)| Credentials::of(user, password))).transpose(),
    }
}

/// Decodes a user and a password from base64, in either alphabet and with any padding and line breaks. NULs around a password are docker's
/// padding.
fn decode(auth: &str) -> Option<(String, String)> {
    let lenient = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let plain = |c: char| match c {
        '-' => '+',
        '_' => '/',
        other => other,
    };
    let bare: String = auth.chars().filter(|c| !c.is_whitespace()).map(plain).collect();
    let decoded = String::from_utf8(GeneralPurpose::new(&STANDARD, lenient).decode(bare).ok()?).ok()?;
    decoded.split_once(':').map(|(user, password)| (user.to_owned(), password.trim_matches('\0').to_owned()))
}

#[cfg(test)]
mod tests;

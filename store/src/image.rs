//! References to images, and what the store records of each.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::Error;

/// The registry that a reference without a host means.
pub const DEFAULT_REGISTRY: &str = "docker.io";

/// All names of [`DEFAULT_REGISTRY`]: the one in image names, those of its API, and former ones.
const DEFAULT_REGISTRY_NAMES: [&str; 4] =
    [DEFAULT_REGISTRY, "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"];

/// The canonical name of a registry: [`DEFAULT_REGISTRY`] has several names, all others keep theirs.
pub fn canonical_registry(host: &str) -> &str {
    if DEFAULT_REGISTRY_NAMES.contains(&host) { DEFAULT_REGISTRY } else { host }
}

/// All names of a registry.
pub fn registry_names(host: &str) -> Vec<&str> {
    if canonical_registry(host) == DEFAULT_REGISTRY { DEFAULT_REGISTRY_NAMES.to_vec() } else { vec![host] }
}

/// Parses a registry by itself, `HOST` or `HOST:PORT`; returns its canonical name.
pub fn parse_registry(text: &str) -> Result<String, Error> {
    let named = canonical_registry(text);
    if named.is_empty() || !is_registry(named) {
        let what = text.chars().take(300).collect();
        return Err(Error::Invalid {
            kind: "registry",
            what,
            why: "write HOST or HOST:PORT, without https:// and path",
        });
    }
    Ok(named.to_owned())
}

/// An image reference in Docker's normal form: `alpine` is `docker.io/library/alpine:latest`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageRef {
    registry: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

fn invalid(text: &str, why: &'static str) -> Error {
    Error::Invalid { kind: "image reference", what: text.chars().take(300).collect(), why }
}

/// `[a-z0-9]+` joined by `.`, `_`, `__` or dashes, as the distribution specification has it.
fn is_path_component(part: &str) -> bool {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let separators_ok = part.split(alphanumeric).filter(|s| !s.is_empty());
    part.starts_with(alphanumeric)
        && part.ends_with(alphanumeric)
        && separators_ok.into_iter().all(|s| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

/// Whether a text is `HOST` or `HOST:PORT`. An IPv6 address stands in brackets, in hexadecimal only and without a zone.
fn is_registry(host: &str) -> bool {
    let label = |label: &str| {
        let alphanumeric = |c: char| c.is_ascii_alphanumeric();
        label.starts_with(alphanumeric)
            && label.ends_with(alphanumeric)
            && label.chars().all(|c| alphanumeric(c) || c == '-')
    };
    let (name_ok, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => (!address.contains('.') && address.parse::<Ipv6Addr>().is_ok(), port),
        None => {
            let (name, port) = host.split_at(host.find(':').unwrap_or(host.len()));
            (name.split('.').all(label), port)
        }
    };
    let is_port = |text: &str| {
        let digits = text.strip_prefix(':').filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        digits.and_then(|digits| digits.parse::<u16>().ok()).is_some_and(|port| port != 0)
    };
    name_ok && (port.is_empty() || is_port(port))
}

/// Whether the first part of a name means a registry, as docker decides it: `quay.io` in `quay.io/team/app`, but not `team` in
/// `team/app`.
pub fn means_registry(head: &str) -> bool {
    head.contains(['.', ':']) || head == "localhost" || head.contains(char::is_uppercase)
}

/// Whether a text is an image's ID as docker writes it. No repository on Docker Hub has such a name.
fn is_identifier(text: &str) -> bool {
    Digest::from_hex(text).is_some()
}

/// Whether a text can be a tag, as the distribution specification has it.
pub fn is_tag(tag: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    tag.len() <= 128 && tag.starts_with(word) && tag.chars().all(|c| word(c) || matches!(c, '.' | '-'))
}

impl FromStr for ImageRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<ImageRef, Error> {
        if is_identifier(text) {
            return Err(invalid(text, "64 hexadecimal digits are an image's ID: write its name"));
        }
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest.parse::<Digest>()?)),
            None => (text, None),
        };
        let last_slash = name.rfind('/').map_or(0, |at| at + 1);
        let (name, tag) = match name[last_slash..].rfind(':') {
            Some(colon) => (&name[..last_slash + colon], Some(&name[last_slash + colon + 1..])),
            None => (name, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(invalid(text, "the tag may hold letters, digits, '_', '.' and '-', 128 at most"));
        }
        let (registry, path) = match name.split_once('/') {
            Some((head, rest)) if means_registry(head) => (head, rest.to_owned()),
            Some(_) => (DEFAULT_REGISTRY, name.to_owned()),
            None => (DEFAULT_REGISTRY, format!("library/{name}")),
        };
        let registry = canonical_registry(registry);
        let path = if registry == DEFAULT_REGISTRY && !path.contains('/') { format!("library/{path}") } else { path };
        if !is_registry(registry) {
            return Err(invalid(text, "the registry must be HOST or HOST:PORT"));
        }
        if path.len() > 255 || !path.split('/').all(is_path_component) {
            return Err(invalid(text, "a repository is lower-case letters and digits, joined by '/', '.', '_' or '-'"));
        }
        let tag = match (tag, digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(ImageRef { registry: registry.to_owned(), path, tag, digest })
    }
}

impl ImageRef {
    /// The registry's host, with its port where it has one.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository within its registry: `library/alpine`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Registry and repository: `docker.io/library/alpine`. Two references to one repository have the same one.
    pub fn canonical_repository(&self) -> String {
        format!("{}/{}", self.registry, self.path)
    }

    /// The repository as people write it: `alpine`.
    pub fn familiar_repository(&self) -> String {
        familiar(&self.canonical_repository())
    }

    /// The tag; a reference by digest alone has none.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The manifest digest, where the reference names one.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// A reference to `tag` in the same repository. `tag` is not trusted: anything that is not a tag, such as
    /// `1@sha256:...`, is refused.
    pub fn with_tag(&self, tag: &str) -> Result<ImageRef, Error> {
        if !is_tag(tag) {
            return Err(invalid(tag, "a tag may hold letters, digits, '_', '.' and '-', 128 at most"));
        }
        let (registry, path) = (self.registry.clone(), self.path.clone());
        Ok(ImageRef { registry, path, tag: Some(tag.to_owned()), digest: None })
    }

    /// The name under which the image is known once it is pulled. A reference by digest names that content and moves no
    /// tag, even if it has a tag as well, as with `docker pull name:tag@digest`.
    pub fn published_as(&self) -> ImageRef {
        match self.digest {
            Some(_) => ImageRef { tag: None, ..self.clone() },
            None => self.clone(),
        }
    }
}

/// Reads a repository. Older software may have written it under another of its registry's names.
pub(crate) fn read_repository<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let written = String::deserialize(deserializer)?;
    let Some((host, path)) = written.split_once('/') else { return Ok(written) };
    let registry = canonical_registry(host);
    Ok(if registry == DEFAULT_REGISTRY && !path.contains('/') {
        format!("{registry}/library/{path}")
    } else {
        format!("{registry}/{path}")
    })
}

/// A repository as people write it: `docker.io/library/alpine` -> `alpine`, `docker.io/me/app` -> `me/app`. Other
/// registries keep their host, and so does Docker Hub where the short name would mean something else
/// (`docker.io/quay.io/app`): the result is read as the same image again.
pub fn familiar(canonical_repository: &str) -> String {
    let Some(path) = canonical_repository.strip_prefix("docker.io/") else { return canonical_repository.to_owned() };
    let official = path.strip_prefix("library/").filter(|rest| !rest.contains('/'));
    match path.split_once('/') {
        Some((head, _)) if means_registry(head) => canonical_repository.to_owned(),
        _ => official.filter(|name| !is_identifier(name)).unwrap_or(path).to_owned(),
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.familiar_repository())?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl TryFrom<String> for ImageRef {
    type Error = Error;

    fn try_from(text: String) -> Result<ImageRef, Error> {
        text.parse()
    }
}

impl From<ImageRef> for String {
    fn from(reference: ImageRef) -> String {
        reference.to_string()
    }
}

/// Operating system and processor of an image, as in the OCI image specification.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, ... (Go's names).
    pub architecture: String,
    /// `v7`, `v8`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// The platform of this machine.
    pub fn host() -> Platform {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "aarch64" => ("arm64", None),
            "arm" => ("arm", Some("v7".to_owned())),
            "powerpc64" => ("ppc64le", None),
            other => (other, None),
        };
        Platform { os: "linux".into(), architecture: architecture.into(), variant }
    }
}

impl FromStr for Platform {
    type Err = Error;

    fn from_str(text: &str) -> Result<Platform, Error> {
        let why = "write os/architecture or os/architecture/variant, for example linux/arm64";
        let error = || Error::Invalid { kind: "platform", what: text.chars().take(100).collect(), why };
        let parts: Vec<_> = text.split('/').map(str::to_owned).collect();
        if parts.iter().any(String::is_empty) {
            return Err(error());
        }
        match <[String; 2]>::try_from(parts) {
            Ok([os, architecture]) => Ok(Platform { os, architecture, variant: None }),
            Err(parts) => match <[String; 3]>::try_from(parts) {
                Ok([os, architecture, variant]) => Ok(Platform { os, architecture, variant: Some(variant) }),
                Err(_) => Err(error()),
            },
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// One layer of an image: its names in the registry and in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Digest of the uncompressed tar stream: the layer's name in the store.
    pub diff_id: Digest,
    /// Length of the uncompressed tar stream, bytes.
    pub size: u64,
    /// Digest of the layer as the manifest has it (usually compressed).
    pub blob: Digest,
    /// Length of the layer as the manifest has it, bytes.
    pub blob_size: u64,
    /// Media type of the layer in the manifest.
    pub media_type: String,
}

/// Who ordered an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestedBy {
    /// A person or a schedule. Images that older software published count as such.
    #[default]
    Operator,
    /// A host that lacked it.
    Host,
}

impl RequestedBy {
    fn is_operator(&self) -> bool {
        *self == RequestedBy::Operator
    }
}

/// One image: a tag (or a bare digest) of a repository, and everything a host needs to know to run it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Canonical repository: `docker.io/library/alpine`.
    #[serde(deserialize_with = "read_repository")]
    pub repository: String,
    /// The tag; nothing for an image that is known by digest only.
    pub tag: Option<String>,
    /// Digest of what the tag names at the registry: an index where there is one, else the manifest.
    pub target: Digest,
    /// Digest of the platform's manifest; its bytes are a blob of the store.
    pub manifest: Digest,
    /// Media type of the manifest.
    pub media_type: String,
    /// Digest of the config (Docker's image ID); its bytes are a blob of the store.
    pub config: Digest,
    /// The platform that was pulled.
    pub platform: Platform,
    /// The layers, base first.
    pub layers: Vec<LayerRecord>,
    /// When it was published, seconds since 1970.
    pub published_at: u64,
    /// On whose order it was published.
    #[serde(default, skip_serializing_if = "RequestedBy::is_operator")]
    pub ordered_by: RequestedBy,
}

impl ImageRecord {
    /// `alpine:latest`, or `alpine@sha256:...` without a tag.
    pub fn familiar_name(&self) -> String {
        match &self.tag {
            Some(tag) => format!("{}:{tag}", familiar(&self.repository)),
            None => format!("{}@{}", familiar(&self.repository), self.target),
        }
    }

    /// The chainID of each layer, base first.
    pub fn chain_ids(&self) -> Vec<Digest> {
        let mut chain: Option<Digest> = None;
        self.layers.iter().map(|layer| *chain.insert(Digest::chain(chain.as_ref(), &layer.diff_id))).collect()
    }

    /// The diffIDs of its layers, base first.
    pub fn diff_ids(&self) -> Vec<Digest> {
        self.layers.iter().map(|layer| layer.diff_id).collect()
    }

    /// The chainID of the last layer, which stands for the image's whole content; nothing without layers.
    pub fn top_chain(&self) -> Option<Digest> {
        Digest::top_chain(self.layers.iter().map(|layer| &layer.diff_id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn registries_are_hosts() {
        for (text, expected) in [
            ("r.io", "r.io"),
            ("r.io:5000", "r.io:5000"),
            ("[::1]:5000", "[::1]:5000"),
            ("localhost", "localhost"),
            ("registry-1.docker.io", "docker.io"),
        ] {
            assert_eq!(parse_registry(text).unwrap(), expected);
        }
        for bad in
            ["", "https://r.io", "https://r.io/", "r.io/", "r.io/app", "r.io:", "r.io:0", "10.0.0.0/8", "*.io", "r io"]
        {
            let error = parse_registry(bad).unwrap_err().to_string();
            assert!(error.contains("HOST:PORT"), "{error}");
        }
    }

    #[test]
    fn references_take_dockers_normal_form() {
        let digest = Digest::of(b"m");
        for (text, canonical, shown) in [
            ("alpine", "docker.io/library/alpine", "alpine:latest".to_owned()),
            ("alpine:3.20", "docker.io/library/alpine", "alpine:3.20".to_owned()),
            ("me/app", "docker.io/me/app", "me/app:latest".to_owned()),
            ("index.docker.io/alpine", "docker.io/library/alpine", "alpine:latest".to_owned()),
            ("registry-1.docker.io/library/alpine", "docker.io/library/alpine", "alpine:latest".to_owned()),
            ("registry.hub.docker.com/me/app", "docker.io/me/app", "me/app:latest".to_owned()),
            ("localhost/x", "localhost/x", "localhost/x:latest".to_owned()),
            ("127.0.0.1:5000/a/b:v1.0", "127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:v1.0".to_owned()),
            (&format!("q.io/a@{digest}"), "q.io/a", format!("q.io/a@{digest}")),
            (&format!("q.io/a:t@{digest}"), "q.io/a", format!("q.io/a:t@{digest}")),
        ] {
            let reference: ImageRef = text.parse().unwrap();
            assert_eq!(reference.canonical_repository(), canonical);
            assert_eq!(reference.to_string(), shown);
        }
        for bad in [
            "",
            ":",
            "A",
            "a:",
            "a/",
            "/a",
            "a b",
            "a@b",
            "a..b",
            "a:*",
            "-a",
            "x.io:0/a",
            "x.io:70000/a",
            "../a",
            "a//b",
        ] {
            assert!(bad.parse::<ImageRef>().is_err(), "{bad}");
        }
    }

    #[test]
    fn platforms() {
        assert_eq!("linux/arm/v7".parse::<Platform>().unwrap().to_string(), "linux/arm/v7");
        assert!("linux".parse::<Platform>().is_err());
        assert!("linux//x".parse::<Platform>().is_err());
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused_and_what_parses_is_stable(
            text in prop_oneof![".{0,60}", "(docker\\.io/|library/|localhost/|A/|q\\.io/|\\[::1\\]:5/|[a-c._:/@-]){0,6}"],
        ) {
            if let Ok(reference) = text.parse::<ImageRef>() {
                prop_assert_eq!(reference.to_string().parse::<ImageRef>().unwrap(), reference);
            }
        }
    }
}

//! Parses paths of the distribution protocol: what is requested, and from which repository of which registry.

use store::Digest;
use store::image::{DEFAULT_REGISTRY, ImageRef, means_registry, parse_registry};

/// A request below `/v2/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// All repositories.
    Catalog,
    /// A repository's tags.
    Tags(ImageRef),
    /// A manifest or an index, by tag or digest.
    Manifest(ImageRef),
    /// A config, a manifest or a layer of a repository.
    Blob(ImageRef, Digest),
}

/// Why a path is malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misasked {
    /// The protocol defines no such path.
    Path,
    /// The repository's name is invalid.
    Name,
    /// What follows is neither a tag nor a digest.
    Reference,
    /// What follows is not a digest.
    Digest,
}

impl Ask {
    /// Parses what follows `/v2/`; `ns` names the registry that is mirrored.
    pub fn parse(path: &str, ns: Option<&str>) -> Result<Ask, Misasked> {
        if path == "_catalog" {
            return Ok(Ask::Catalog);
        }
        let named = |repository: &str, suffix: &str| -> Option<ImageRef> {
            let name = match (ns, repository.split_once('/')) {
                (Some(ns), _) => format!("{}/{repository}", parse_registry(ns).ok().filter(|ns| means_registry(ns))?),
                (None, Some((host, rest))) => match with_port(host) {
                    Some(host) if is_unmistakable(&host) => format!("{host}/{rest}"),
                    _ if means_registry(host) => repository.to_owned(),
                    _ => format!("{DEFAULT_REGISTRY}/{repository}"),
                },
                (None, None) => format!("{DEFAULT_REGISTRY}/{repository}"),
            };
            // Tags and digests come from the rest of the path, never from the name.
            if repository.contains([':', '@']) {
                return None;
            }
            format!("{name}{suffix}").parse().ok()
        };
        if let Some(repository) = path.strip_suffix("/tags/list") {
            return named(repository, "").map(Ask::Tags).ok_or(Misasked::Name);
        }
        // The last two parts decide: a repository's name may contain the same words.
        let (repository, kind, reference) = path
            .rsplit_once('/')
            .and_then(|(rest, last)| rest.rsplit_once('/').map(|(repository, kind)| (repository, kind, last)))
            .ok_or(Misasked::Path)?;
        if kind == "blobs" {
            let image = named(repository, "").ok_or(Misasked::Name)?;
            return reference.parse().map(|digest| Ask::Blob(image, digest)).map_err(|_| Misasked::Digest);
        }
        if kind != "manifests" {
            let is_manifest = path.contains("/manifests/");
            return Err(if is_manifest { Misasked::Reference } else { Misasked::Path });
        }
        named(repository, "").ok_or(Misasked::Name)?;
        let separator = if reference.contains(':') { '@' } else { ':' };
        named(repository, &format!("{separator}{reference}")).map(Ask::Manifest).ok_or(Misasked::Reference)
    }

    /// The other reading of a path without `ns` that begins with `registry_5000/`: a host without a dot, instead of an old name
    /// on Docker Hub. `None` if there is only one reading.
    pub fn of_port(&self) -> Option<Ask> {
        let other = |image: &ImageRef| -> Option<ImageRef> {
            let (head, rest) = image.path().split_once('/')?;
            let host = with_port(head).filter(|_| image.registry() == DEFAULT_REGISTRY)?;
            let suffix = match (image.digest(), image.tag()) {
                (Some(digest), _) => format!("@{digest}"),
                (None, tag) => tag.map(|tag| format!(":{tag}")).unwrap_or_default(),
            };
            format!("{host}/{rest}{suffix}").parse().ok()
        };
        Some(match self {
            Ask::Catalog => return None,
            Ask::Tags(image) => Ask::Tags(other(image)?),
            Ask::Manifest(image) => Ask::Manifest(other(image)?),
            Ask::Blob(image, digest) => Ask::Blob(other(image)?, *digest),
        })
    }

    /// The repository, if one is requested.
    pub fn repository(&self) -> Option<&ImageRef> {
        match self {
            Ask::Catalog => None,
            Ask::Tags(image) | Ask::Manifest(image) | Ask::Blob(image, _) => Some(image),
        }
    }
}

/// `registry:5000` for `registry_5000`. Host names contain no underscores.
fn with_port(text: &str) -> Option<String> {
    let (host, port) = text.rsplit_once('_')?;
    let host = format!("{host}:{port}");
    parse_registry(&host).ok().filter(|parsed| *parsed == host)
}

/// Whether the host is recognised as a registry even without its port, so that it cannot be a name on Docker Hub.
fn is_unmistakable(host: &str) -> bool {
    host.split_once(':').is_some_and(|(name, _)| means_registry(name))
}

/// A repository's name in the paths of this mirror without `ns`.
pub(super) fn path_name(repository: &str) -> String {
    match repository.strip_prefix("docker.io/") {
        Some(path) => path.to_owned(),
        None => match repository.split_once('/') {
            Some((host, path)) => format!("{}/{path}", host.replace(':', "_")),
            None => repository.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(path: &str, ns: Option<&str>) -> Option<String> {
        match Ask::parse(path, ns).ok()? {
            Ask::Catalog => Some("catalog".to_owned()),
            Ask::Tags(image) => Some(format!("tags {}", image.canonical_repository())),
            Ask::Manifest(image) => Some(format!(
                "manifest {} {}",
                image.canonical_repository(),
                image.digest().map(ToString::to_string).or(image.tag().map(str::to_owned))?
            )),
            Ask::Blob(image, digest) => Some(format!("blob {} {digest}", image.canonical_repository())),
        }
    }

    #[test]
    fn paths_name_repositories_of_registries() {
        let digest = Digest::of(b"x");
        for (path, ns, expected) in [
            ("_catalog", None, "catalog".to_owned()),
            ("library/debian/manifests/12", None, "manifest docker.io/library/debian 12".to_owned()),
            ("debian/manifests/12", None, "manifest docker.io/library/debian 12".to_owned()),
            ("me/app/tags/list", None, "tags docker.io/me/app".to_owned()),
            ("quay.io/team/app/manifests/v1", None, "manifest quay.io/team/app v1".to_owned()),
            ("127.0.0.1_5000/a/b/manifests/v1", None, "manifest 127.0.0.1:5000/a/b v1".to_owned()),
            ("localhost_5000/a/manifests/v1", None, "manifest localhost:5000/a v1".to_owned()),
            ("registry_5000/a/manifests/v1", None, "manifest docker.io/registry_5000/a v1".to_owned()),
            ("Registry/a/manifests/v1", None, "manifest Registry/a v1".to_owned()),
            ("r.io/a/manifests/v1", Some("[::1]:5000"), "manifest [::1]:5000/r.io/a v1".to_owned()),
            ("quay.io/a/manifests/v1", Some("docker.io"), "manifest docker.io/quay.io/a v1".to_owned()),
            ("a/b/manifests/v1", Some("127.0.0.1:5000"), "manifest 127.0.0.1:5000/a/b v1".to_owned()),
            ("library/a/manifests/v1", Some("registry-1.docker.io"), "manifest docker.io/library/a v1".to_owned()),
            (&format!("a/blobs/{digest}"), None, format!("blob docker.io/library/a {digest}")),
            ("q.io/team/blobs/app/manifests/1", None, "manifest q.io/team/blobs/app 1".to_owned()),
            ("q.io/a/blobs/manifests/1", None, "manifest q.io/a/blobs 1".to_owned()),
            ("q.io/a/tags/list/manifests/1", None, "manifest q.io/a/tags/list 1".to_owned()),
            (&format!("q.io/a/manifests/b/blobs/{digest}"), None, format!("blob q.io/a/manifests/b {digest}")),
            ("q.io/a/manifests/tags/list", None, "tags q.io/a/manifests".to_owned()),
            (&format!("a/manifests/{digest}"), None, format!("manifest docker.io/library/a {digest}")),
        ] {
            assert_eq!(parsed(path, ns), Some(expected), "{path}");
        }
        for (bad, why) in [
            ("", Misasked::Path),
            ("a", Misasked::Path),
            ("a/manifests/", Misasked::Reference),
            ("a/manifests/sha256:1", Misasked::Reference),
            ("a/blobs/sha256:1", Misasked::Digest),
            ("A/manifests/x", Misasked::Name),
            ("../manifests/x", Misasked::Name),
            ("a:1/tags/list", Misasked::Name),
            ("a:1/blobs/sha256:1", Misasked::Name),
            ("a/manifests/x/y", Misasked::Reference),
        ] {
            assert_eq!(Ask::parse(bad, None), Err(why), "{bad}");
        }
        for ns in ["", "nohost", "quay.io/team", "https://quay.io", "a b"] {
            assert_eq!(Ask::parse("a/manifests/x", Some(ns)), Err(Misasked::Name), "{ns}");
            assert_eq!(Ask::parse("a/tags/list", Some(ns)), Err(Misasked::Name), "{ns}");
        }
        let other = |path: &str| Ask::parse(path, None).unwrap().of_port().and_then(|ask| ask.repository().cloned());
        let expected: ImageRef = "registry:5000/a/b:v1".parse().unwrap();
        assert_eq!(other("registry_5000/a/b/manifests/v1"), Some(expected));
        for one in ["registry_5000/manifests/v1", "registry_0/a/tags/list", "me/app/tags/list", "q.io_5/a/tags/list"] {
            assert_eq!(other(one), None, "{one}");
        }
        assert_eq!(path_name("docker.io/library/a"), "library/a");
        assert_eq!(path_name("127.0.0.1:5000/a/b"), "127.0.0.1_5000/a/b");
    }
}

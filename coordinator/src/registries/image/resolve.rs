//! From a name to what must be fetched: index, manifest, config, layers.
//!
//! The walk is the same for a registry and an archive; only the source of the documents differs.
//!
//! **Which platform an image has.** Tools that build for another architecture often leave their own in the config, or none. Docker chooses
//! by the index and then runs what it got, whatever the config says; so an image has the platform that its index states. If no index states
//! one, the config's platform counts, and a request for a different one is refused: the store is shared, so an image that is stored under
//! the wrong platform would reach all hosts.

use futures::future::BoxFuture;
use store::image::Platform;

use crate::registries::error::RegistryError;
use crate::registries::image::manifest::{self, Descriptor, Manifest, Parsed};
use crate::registries::image::platform;
use crate::registries::{Document, ResolvedImage};

/// An index may name other indexes; a longer chain than this is a mistake or an attack.
const MAX_DEPTH: usize = 3;

/// What kind of document is wanted: registries keep them in different places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A manifest or an index.
    Manifest,
    /// An image config.
    Config,
}

/// Where documents come from.
pub trait Documents: Send + Sync {
    /// Fetches and verifies the document that `descriptor` names. `what` describes it in errors.
    fn fetch<'a>(
        &'a self,
        kind: Kind,
        descriptor: &'a Descriptor,
        what: &'a str,
    ) -> BoxFuture<'a, Result<Document, RegistryError>>;
}

/// Walks from `root`, the document that the name `image` points to, to the layers for `platform`.
pub async fn resolve(
    documents: &dyn Documents,
    image: &str,
    root: Document,
    platform: Option<&Platform>,
) -> Result<ResolvedImage, RegistryError> {
    let (mut index, mut said) = (None, None);
    let mut document = root;
    let mut parsed = manifest::parse(&document, &format!("image {image}"))?;
    for _ in 0..MAX_DEPTH {
        let Parsed::Index(list) = &parsed else { break };
        let entry = list.choose(platform, image)?;
        let next = documents.fetch(Kind::Manifest, entry, &format!("the manifest of {image}")).await?;
        said = entry.whole_platform().or(said);
        index.get_or_insert(document);
        parsed = manifest::parse(&next, &format!("image {image}"))?;
        document = next;
    }
    match parsed {
        Parsed::Manifest(manifest) => {
            let resolved = finish(documents, image, index, document, manifest).await?;
            let platform = settle(image, said, resolved.platform, platform)?;
            Ok(ResolvedImage { platform, ..resolved })
        }
        Parsed::Index(_) => Err(RegistryError::Malformed {
            what: format!("image {image}"),
            why: format!("its indexes are nested deeper than {MAX_DEPTH}"),
        }),
    }
}

/// Fetches the config and joins it with the manifest.
async fn finish(
    documents: &dyn Documents,
    image: &str,
    index: Option<Document>,
    document: Document,
    manifest: Manifest,
) -> Result<ResolvedImage, RegistryError> {
    manifest.check_config(image)?;
    let what = format!("the config of {image}");
    let config = documents.fetch(Kind::Config, &manifest.config, &what).await?;
    let (found, layers) = manifest::join(&manifest, &config.bytes, image)?;
    Ok(ResolvedImage { platform: found, index, manifest: document, config, layers })
}

/// Decides an image's platform. `said` is what its index states, if it does; `found` is what its config states.
fn settle(
    image: &str,
    said: Option<Platform>,
    found: Platform,
    wanted: Option<&Platform>,
) -> Result<Platform, RegistryError> {
    let refused = |wanted: &Platform| {
        let (image, wanted, offered) = (image.to_owned(), wanted.to_string(), found.to_string());
        Err(RegistryError::NoPlatform { image, wanted, offered })
    };
    let is_unnamed = found.architecture.is_empty();
    match (said, wanted) {
        (Some(said), _) if said.os != found.os => refused(&said),
        (Some(said), _) => {
            if !is_unnamed && said.architecture != found.architecture {
                tracing::warn!("image {image} is for {said}, as its index says, but its config says {found}");
            }
            Ok(said)
        }
        (None, Some(wanted)) if wanted.os != found.os => refused(wanted),
        (None, Some(wanted)) if is_unnamed => Ok(wanted.clone()),
        (None, Some(wanted)) if wanted.architecture != found.architecture => refused(wanted),
        (None, None) if is_unnamed => Ok(Platform { os: found.os, ..platform::own() }),
        (None, _) => Ok(found),
    }
}

//! From a name to what must be fetched: index, manifest, config, layers.
//!
//! The walk is the same for a registry and an archive; only where the documents come from differs.

use futures::future::BoxFuture;
use store::image::Platform;

use crate::registry::error::RegistryError;
use crate::registry::manifest::{self, Descriptor, Manifest, Parsed};
use crate::registry::{Document, ResolvedImage, platform};

/// An index may name indexes; a chain of more than this is a mistake or an attack.
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
    /// The document that `descriptor` names, verified. `what` names it in errors.
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
    let mut index = None;
    let mut document = root;
    let mut parsed = manifest::parse(&document, &format!("image {image}"))?;
    for _ in 0..MAX_DEPTH {
        let Parsed::Index(list) = &parsed else { break };
        let entry = list.choose(platform, image)?;
        let next = documents.fetch(Kind::Manifest, entry, &format!("the manifest of {image}")).await?;
        index.get_or_insert(document);
        parsed = manifest::parse(&next, &format!("image {image}"))?;
        document = next;
    }
    match parsed {
        Parsed::Manifest(manifest) => finish(documents, image, index, document, manifest, platform).await,
        Parsed::Index(_) => Err(RegistryError::Malformed {
            what: format!("image {image}"),
            why: format!("its indexes are nested deeper than {MAX_DEPTH}"),
        }),
    }
}

/// Reads the config and joins all.
async fn finish(
    documents: &dyn Documents,
    image: &str,
    index: Option<Document>,
    document: Document,
    manifest: Manifest,
    wanted: Option<&Platform>,
) -> Result<ResolvedImage, RegistryError> {
    manifest.check_config(image)?;
    let what = format!("the config of {image}");
    let config = documents.fetch(Kind::Config, &manifest.config, &what).await?;
    let (found, layers) = manifest::join(&manifest, &config.bytes, image)?;
    if let Some(wanted) = wanted.filter(|wanted| platform::rank(&found, wanted).is_none()) {
        return Err(RegistryError::NoPlatform {
            image: image.to_owned(),
            wanted: wanted.to_string(),
            offered: found.to_string(),
        });
    }
    Ok(ResolvedImage { platform: found, index, manifest: document, config, layers })
}

//! The OCI image layout in a tar: `index.json` names manifests, `blobs/sha256/` holds everything.

use std::collections::HashMap;

use store::image::ImageRef;
use store::{Digest, go_json};

use crate::registries::archive::contents::{Contents, Kept, Naming, check_images, root};
use crate::registries::archive::member_index::{Blob, Members, unreadable};
use crate::registries::error::RegistryError;
use crate::registries::image::manifest::{Descriptor, Index, MAX_MANIFEST};

/// The annotation with the full name, as containerd writes it.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// The annotation with a full name or only a tag, as all others write it.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Reads `index.json` and finds the blobs.
pub(crate) fn read(members: &Members, name: Option<&ImageRef>) -> Result<Contents, RegistryError> {
    let bytes = members.read("index.json", MAX_MANIFEST)?;
    let index: Index = go_json::from_slice(&bytes)
        .map_err(|error| unreadable(format!("its index.json cannot be understood ({error})")))?;
    let mut contents = Contents::default();
    for member in members.names() {
        let digest = member.strip_prefix("blobs/sha256/").and_then(Digest::from_hex);
        if let (Some(digest), Some(span)) = (digest, members.find(member)) {
            contents.blobs.insert(digest, Blob::Member(span));
        }
    }
    let named = Naming::of(name, index.manifests.iter().map(|descriptor| full_name(descriptor).is_none()))?;
    check_images(index.manifests.len())?;
    // Many names may point to one manifest, which is read once.
    let (mut roots, mut kept) = (HashMap::new(), Kept::default());
    for descriptor in &index.manifests {
        let own = full_name(descriptor);
        let image = match (named.instead(own.is_none()), own) {
            (Some(name), _) => name.clone(),
            (None, Some(own)) => own.parse().map_err(|error: store::Error| unreadable(error.to_string()))?,
            (None, None) => {
                contents.unnamed.push(unnamed(descriptor));
                continue;
            }
        };
        let digest = descriptor.digest(&format!("image {image}"))?;
        let known = (digest, descriptor.media_type.clone());
        if !roots.contains_key(&known) {
            let missing = || unreadable(format!("it lacks the manifest of {image}: save the image again"));
            let blob = contents.blobs.get(&digest).ok_or_else(missing)?;
            let root = root(members, blob, descriptor)?;
            kept.count(&root.bytes)?;
            roots.insert(known.clone(), root);
        }
        contents.images.extend(roots.get(&known).map(|root| (image, root.clone())));
    }
    Ok(contents)
}

/// The image's name according to the annotations. A bare tag is no name.
fn full_name(descriptor: &Descriptor) -> Option<&str> {
    let annotation = |key: &str| descriptor.annotations.get(key).map(String::as_str);
    annotation(CONTAINERD_NAME).or(annotation(REF_NAME).filter(|text| text.contains([':', '/', '@'])))
}

/// What to call an image without a name.
fn unnamed(descriptor: &Descriptor) -> String {
    match descriptor.annotations.get(REF_NAME) {
        Some(tag) => format!("{} (it has only the tag {tag:?})", descriptor.digest),
        None => descriptor.digest.clone(),
    }
}

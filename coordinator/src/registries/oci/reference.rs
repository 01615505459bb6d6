//! The reference in a request for a manifest, and the digest that its answer states.

use http::header;
use store::Digest;
use store::image::ImageRef;

/// What follows `manifests/`: the digest if there is one, otherwise the tag or `latest`.
pub(super) fn reference(image: &ImageRef) -> String {
    match (image.digest(), image.tag()) {
        (Some(digest), _) => digest.to_string(),
        (None, tag) => tag.unwrap_or("latest").to_owned(),
    }
}

/// The digest that the headers of an answer state, if any.
pub(super) fn stated_digest(headers: &header::HeaderMap) -> Option<Digest> {
    headers.get("docker-content-digest")?.to_str().ok()?.trim().parse().ok()
}

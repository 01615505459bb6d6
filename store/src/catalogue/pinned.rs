//! What pins keep: a name as such, and a digest under whatever name its image has.
//!
//! When the image of a pinned digest is about to lose its last name (its tag is removed, or moves), it is kept under
//! the digest itself: the commit that takes the name away also sets a record without a tag. So the image stays listed,
//! its bytes stay referred to, and software that knows nothing of pins finds an ordinary image.

use std::sync::Arc;

use crate::catalogue::{Catalogue, Change, Pin};
use crate::digest::Digest;
use crate::image::{ImageRecord, ImageRef};

/// Whether a digest names an image: as its manifest, or as the list of manifests that its tag pointed to.
fn is_named_by(image: &ImageRecord, digest: &Digest) -> bool {
    image.manifest == *digest || image.target == *digest
}

impl Catalogue {
    /// The pins on digests that name an image.
    fn digest_pins_of<'a>(&'a self, image: &'a ImageRecord) -> impl Iterator<Item = &'a Pin> {
        let from = (image.repository.clone(), None, None);
        let of_repository = self.pins.range(from..).take_while(|(key, _)| key.0 == image.repository && key.1.is_none());
        let pins = of_repository.map(|(_, pin)| pin);
        pins.filter(|pin| pin.target.is_some_and(|digest| is_named_by(image, &digest)))
    }

    /// Whether an image's name is pinned, or the digest of its manifest or of what its tag points to.
    pub fn is_pinned(&self, image: &ImageRecord) -> bool {
        !self.pins.is_empty() && (self.pin_of(image).is_some() || self.digest_pins_of(image).next().is_some())
    }

    /// The pin on the digest that a reference without a tag names.
    pub fn pin_of_digest(&self, reference: &ImageRef) -> Option<&Pin> {
        let digest = reference.digest().filter(|_| reference.tag().is_none())?;
        self.pins.get(&(reference.canonical_repository(), None, Some(*digest)))
    }

    /// `changes`, and records that keep images under their pinned digests where `changes` would take their last name.
    pub fn keeping_pinned(&self, mut changes: Vec<Change>) -> Vec<Change> {
        let mut losing: Vec<Arc<ImageRecord>> = Vec::new();
        if !self.pins.is_empty() {
            losing = changes.iter().filter_map(|change| self.replaced_by(change)).collect();
        }
        losing.retain(|image| self.digest_pins_of(image).next().is_some());
        if losing.is_empty() {
            return changes;
        }
        let mut after = self.clone();
        changes.iter().cloned().for_each(|change| after.change(change));
        for image in losing {
            let pins: Vec<Pin> = after.digest_pins_of(&image).cloned().collect();
            for digest in pins.iter().filter_map(|pin| pin.target) {
                if after.has_named_by(&image.repository, &digest) {
                    continue;
                }
                let kept = ImageRecord { tag: None, target: digest, ..(*image).clone() };
                let kept = Change::Set(Arc::new(kept));
                after.change(kept.clone());
                changes.push(kept);
            }
        }
        changes
    }

    /// The image that loses a name through a change.
    fn replaced_by(&self, change: &Change) -> Option<Arc<ImageRecord>> {
        let key = match change {
            Change::Set(image) => super::key(&image.repository, image.tag.as_deref(), &image.target),
            Change::Remove { repository, tag, target } => super::key(repository, tag.as_deref(), target),
            _ => return None,
        };
        self.tags.get(&key).map(|state| Arc::clone(&state.image))
    }

    /// Whether some name in a repository has the image that a digest names.
    fn has_named_by(&self, repository: &str, digest: &Digest) -> bool {
        let from = (repository.to_owned(), None, None);
        let mut states = self.tags.range(from..).take_while(|(key, _)| key.0 == repository);
        states.any(|(_, state)| is_named_by(&state.image, digest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::tests::image;

    const REPOSITORY: &str = "docker.io/r/a";

    fn pinned(what: &ImageRecord, digest: Digest) -> Catalogue {
        let mut catalogue = Catalogue::default();
        catalogue.change(Change::Set(Arc::new(what.clone())));
        let pin = Pin { repository: REPOSITORY.to_owned(), tag: None, target: Some(digest), since: 1 };
        catalogue.change(Change::Pin(pin));
        catalogue
    }

    fn removal(image: &ImageRecord) -> Change {
        Change::Remove { repository: image.repository.clone(), tag: image.tag.clone(), target: image.target }
    }

    fn names(mut catalogue: Catalogue, changes: Vec<Change>) -> Vec<String> {
        let changes = catalogue.keeping_pinned(changes);
        changes.into_iter().for_each(|change| catalogue.change(change));
        catalogue.images().map(|image| image.familiar_name()).collect()
    }

    #[test]
    fn a_pinned_digest_is_held_under_whatever_name() {
        let three = image(REPOSITORY, Some("3"), 1);
        let index = Digest::of(b"a list of manifests");
        let three = ImageRecord { target: index, ..(*three).clone() };
        for digest in [three.manifest, index] {
            let catalogue = pinned(&three, digest);
            assert!(catalogue.is_pinned(&three));
            let by_digest = format!("r/a@{digest}");
            assert_eq!(
                names(catalogue.clone(), vec![removal(&three)]),
                std::slice::from_ref(&by_digest),
                "its tag is removed"
            );
            let moved = image(REPOSITORY, Some("3"), 2);
            assert_eq!(
                names(catalogue.clone(), vec![Change::Set(moved)]),
                [by_digest.as_str(), "r/a:3"],
                "its tag moves"
            );
            let other = ImageRecord { tag: Some("4".into()), ..three.clone() };
            assert_eq!(names(catalogue.clone(), vec![Change::Set(Arc::new(other)), removal(&three)]), ["r/a:4"]);
            let pin = catalogue.pins().next().unwrap().clone();
            let forced = vec![removal(&three), Change::Unpin(pin)];
            assert_eq!(names(catalogue, forced), Vec::<String>::new(), "whoever lets go of it may remove it");
        }
    }

    #[test]
    fn what_is_not_pinned_by_digest_goes() {
        let three = image(REPOSITORY, Some("3"), 1);
        let catalogue = pinned(&three, Digest::of(b"another"));
        assert!(!catalogue.is_pinned(&three));
        assert_eq!(names(catalogue, vec![removal(&three)]), Vec::<String>::new());
        let elsewhere = image("docker.io/r/b", Some("3"), 1);
        assert!(!pinned(&three, three.manifest).is_pinned(&elsewhere), "a pin is on a digest of a repository");
    }
}

//! The findings of a check: one for each damaged object, up to a limit.

use std::collections::HashSet;

use coordinator_api::fsck::{FsckFinding, FsckOutcome};
use serde::{Deserialize, Serialize};
use store::catalogue::Catalogue;
use store::image::ImageRecord;
use store::publisher::Suspect;
use store::{ContentDigest, Digest};

/// Further findings are only counted: with so many damaged objects, it takes several runs to repair the store.
const KEEP: usize = 1000;
/// Images that a finding lists by name.
const NAMED: usize = 5;

/// An object that can be damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Object {
    /// The superblock or its copy.
    Superblock,
    /// File modes that keep hosts from reading.
    Modes,
    /// The handover log, from which the next coordinator takes over.
    Handover,
    /// The catalogue as a whole: it was salvaged.
    Catalogue,
    /// One generation of the catalogue.
    Generation(u64),
    /// A manifest or config.
    Blob(Digest),
    /// A layer's index or recipe, or the tar that they and the packs make.
    Layer(Digest),
    /// A pack.
    Pack(ContentDigest),
}

impl Object {
    fn kind(&self) -> &'static str {
        match self {
            Object::Superblock => "superblock",
            Object::Modes => "permissions",
            Object::Handover => "handover log",
            Object::Catalogue => "catalogue",
            Object::Generation(_) => "generation",
            Object::Blob(_) => "blob",
            Object::Layer(_) => "layer",
            Object::Pack(_) => "pack",
        }
    }

    fn name(&self) -> String {
        match self {
            Object::Superblock => "cachefs-store".to_owned(),
            Object::Modes => "permissions".to_owned(),
            Object::Handover => "ledger".to_owned(),
            Object::Catalogue => "catalogue".to_owned(),
            Object::Generation(number) => number.to_string(),
            Object::Blob(digest) | Object::Layer(digest) => digest.to_string(),
            Object::Pack(pack) => pack.hex(),
        }
    }

    /// The object to move into quarantine before it is fetched again; `None` if it is repaired in place.
    pub(super) fn suspect(&self) -> Option<Suspect> {
        match self {
            Object::Superblock | Object::Modes | Object::Handover | Object::Catalogue => None,
            Object::Generation(number) => Some(Suspect::Generation(*number)),
            Object::Blob(digest) => Some(Suspect::Blob(*digest)),
            Object::Layer(diff_id) => Some(Suspect::Layer(*diff_id)),
            Object::Pack(pack) => Some(Suspect::Pack(*pack)),
        }
    }
}

/// Whether a blob is an image's manifest, its config, or the index that its tag points to.
pub(super) fn has_blob(image: &ImageRecord, digest: &Digest) -> bool {
    [image.manifest, image.config, image.target].contains(digest)
}

pub(super) fn has_layer(image: &ImageRecord, diff_id: &Digest) -> bool {
    image.layers.iter().any(|layer| layer.diff_id == *diff_id)
}

/// All findings of one check.
#[derive(Debug, Default)]
pub(super) struct Findings {
    kept: Vec<(Object, FsckFinding)>,
    known: HashSet<Object>,
    left_out: u64,
}

impl Findings {
    /// Adds a finding, unless the object already has one. Returns whether it is new.
    pub(super) fn add(&mut self, object: Object, message: String) -> bool {
        if !self.known.insert(object) {
            return false;
        }
        if self.kept.len() >= KEEP {
            self.known.remove(&object);
            self.left_out += 1;
            return true;
        }
        let (kind, name, outcome) = (object.kind().to_owned(), object.name(), FsckOutcome::Damaged);
        let (images, reason) = (Vec::new(), None);
        let finding = FsckFinding { kind, object: name, message, images, images_affected: 0, outcome, reason };
        self.kept.push((object, finding));
        true
    }

    /// The objects that are still damaged.
    pub(super) fn damaged(&self) -> Vec<Object> {
        let damaged = self.kept.iter().filter(|(_, finding)| finding.outcome != FsckOutcome::Repaired);
        damaged.map(|(object, _)| *object).collect()
    }

    /// The findings as the API shows them.
    pub(super) fn view(&self) -> Vec<FsckFinding> {
        self.kept.iter().map(|(_, finding)| finding.clone()).collect()
    }

    /// The findings with their objects, for the database.
    pub(super) fn records(&self) -> &[(Object, FsckFinding)] {
        &self.kept
    }

    /// How many findings were counted but not kept.
    pub(super) fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Forgets a finding that turned out to be wrong.
    pub(super) fn forget(&mut self, object: &Object) {
        self.known.remove(object);
        self.kept.retain(|(other, _)| other != object);
    }

    /// Records the outcome of a repair.
    pub(super) fn settle(&mut self, object: &Object, outcome: FsckOutcome, reason: Option<String>) {
        for (_, finding) in self.kept.iter_mut().filter(|(other, _)| other == object) {
            (finding.outcome, finding.reason) = (outcome, reason.clone());
        }
    }

    /// Notes which images need an object. If the object is a pack, `layers` are the layers that refer to it.
    pub(super) fn name_images(&mut self, object: &Object, catalogue: &Catalogue, layers: &[Digest]) {
        let needs = |image: &ImageRecord| match object {
            Object::Superblock | Object::Modes | Object::Catalogue | Object::Generation(_) => true,
            Object::Handover => false,
            Object::Blob(digest) => has_blob(image, digest),
            Object::Layer(diff_id) => has_layer(image, diff_id),
            Object::Pack(_) => layers.iter().any(|diff_id| has_layer(image, diff_id)),
        };
        let names: Vec<_> = catalogue.images().filter(|image| needs(image)).map(|i| i.familiar_name()).collect();
        for (_, finding) in self.kept.iter_mut().filter(|(other, _)| other == object) {
            finding.images_affected = names.len() as u64;
            finding.images = names.iter().take(NAMED).cloned().collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_found_once_and_too_many_are_counted() {
        let mut findings = Findings::default();
        assert!(findings.add(Object::Superblock, "gone".into()));
        assert!(!findings.add(Object::Superblock, "again".into()));
        for number in 0..KEEP as u64 + 9 {
            findings.add(Object::Generation(number), "bad".into());
        }
        assert_eq!((findings.view().len(), findings.left_out()), (KEEP, 10));
        findings.settle(&Object::Superblock, FsckOutcome::Repaired, None);
        assert_eq!(findings.damaged().len(), KEEP - 1);
        findings.forget(&Object::Generation(0));
        assert_eq!(findings.damaged().len(), KEEP - 2);
    }
}

//! What the store holds, found by listing its directories, and how much room it takes.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use parking_lot::Mutex;
use store::error::{Error, Result};
use store::layout::{INDEX, Layout, RECIPE};
use store::pack::thinned::SUFFIX;
use store::publisher::Object;
use store::{ContentDigest, Digest};

/// Everything in the store, with the bytes that it takes on the disk.
#[derive(Debug, Clone, Default)]
pub(super) struct Survey {
    /// By diffID.
    pub(super) layers: HashMap<Digest, u64>,
    /// Manifests, configs and lists of manifests.
    pub(super) blobs: HashMap<Digest, u64>,
    /// Packs.
    pub(super) packs: HashMap<ContentDigest, u64>,
    /// Packs of which only the record of their thinning is there.
    pub(super) stray_records: Vec<ContentDigest>,
}

impl Survey {
    /// Bytes of everything.
    pub(super) fn bytes(&self) -> u64 {
        self.layers.values().sum::<u64>() + self.blobs.values().sum::<u64>() + self.packs.values().sum::<u64>()
    }
}

/// Sizes that were found before: what has a digest for a name keeps its size, until a collection changes it.
#[derive(Debug, Default)]
pub(super) struct Sizes(Mutex<HashMap<Object, u64>>);

impl Sizes {
    /// The object is gone or has another size.
    pub(super) fn forget(&self, object: &Object) {
        self.0.lock().remove(object);
    }

    /// Lists the store.
    pub(super) fn survey(&self, layout: &Layout) -> Result<Survey> {
        let mut survey = Survey::default();
        names(&layout.layers(), |name| {
            let Some(digest) = Digest::from_hex(name) else { return Ok(()) };
            let dir = layout.layer(&digest);
            let size = || Ok(allocated(&dir.join(INDEX))? + allocated(&dir.join(RECIPE))?);
            survey.layers.insert(digest, self.size(Object::Layer(digest), size)?);
            Ok(())
        })?;
        names(&layout.blobs(), |name| {
            let Some(digest) = Digest::from_hex(name) else { return Ok(()) };
            survey.blobs.insert(digest, self.size(Object::Blob(digest), || allocated(&layout.blob(&digest)))?);
            Ok(())
        })?;
        self.survey_packs(layout, &mut survey)?;
        self.0.lock().retain(|object, _| match object {
            Object::Layer(digest) => survey.layers.contains_key(digest),
            Object::Blob(digest) => survey.blobs.contains_key(digest),
            Object::Pack(pack) => survey.packs.contains_key(pack),
        });
        Ok(survey)
    }

    fn survey_packs(&self, layout: &Layout, survey: &mut Survey) -> Result<()> {
        let (mut packs, mut records) = (Vec::new(), HashSet::new());
        names(&layout.packs(), |name| {
            packs.extend(ContentDigest::from_hex(name));
            records.extend(name.strip_suffix(SUFFIX).and_then(ContentDigest::from_hex));
            Ok(())
        })?;
        for pack in packs {
            // A thinned pack may become thinner, or whole again.
            if records.remove(&pack) {
                self.forget(&Object::Pack(pack));
                survey.packs.insert(pack, allocated(&layout.pack(&pack))?);
            } else {
                survey.packs.insert(pack, self.size(Object::Pack(pack), || allocated(&layout.pack(&pack)))?);
            }
        }
        survey.stray_records = records.into_iter().collect();
        Ok(())
    }

    fn size(&self, object: Object, find: impl FnOnce() -> Result<u64>) -> Result<u64> {
        let known = self.0.lock().get(&object).copied();
        match known {
            Some(size) => Ok(size),
            None => {
                let size = find()?;
                self.0.lock().insert(object, size);
                Ok(size)
            }
        }
    }
}

/// Bytes that a file takes on the disk; none if it is gone.
fn allocated(path: &Path) -> Result<u64> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(metadata.blocks() * 512),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(e) => Err(Error::io("look up", path, e)),
    }
}

/// Calls `each` with the names in the directories below `dir`.
fn names(dir: &Path, mut each: impl FnMut(&str) -> Result<()>) -> Result<()> {
    for fan in std::fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))? {
        let fan = fan.map_err(|e| Error::io("list", dir, e))?.path();
        // Somebody else's file, or a directory that has gone meanwhile: nothing of ours.
        let entries = match std::fs::read_dir(&fan) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotADirectory | io::ErrorKind::NotFound) => continue,
            entries => entries.map_err(|e| Error::io("list", &fan, e))?,
        };
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("list", &fan, e))?;
            if let Some(name) = entry.file_name().to_str() {
                each(name)?;
            }
        }
    }
    Ok(())
}

//! Lists what the store holds, and how much disk space it takes.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use parking_lot::Mutex;
use store::error::{Error, Result};
use store::layout::{INDEX, RECIPE};
use store::publisher::Object;
use store::reader::Store;
use store::{ContentDigest, Digest};

/// Everything in the store, with the bytes that it takes on the disk.
#[derive(Debug, Clone, Default)]
pub(super) struct StoreSizes {
    /// By diffID.
    pub(super) layers: HashMap<Digest, u64>,
    /// Manifests, configs and indexes, by digest.
    pub(super) blobs: HashMap<Digest, u64>,
    /// Packs, by name.
    pub(super) packs: HashMap<ContentDigest, u64>,
    /// Packs that are gone but whose record of thinning is left.
    pub(super) stray_records: Vec<ContentDigest>,
}

impl StoreSizes {
    /// Bytes of everything together.
    pub(super) fn bytes(&self) -> u64 {
        self.layers.values().sum::<u64>() + self.blobs.values().sum::<u64>() + self.packs.values().sum::<u64>()
    }
}

/// Sizes found by earlier surveys. An object named by a digest keeps its size until a collection changes it.
#[derive(Debug, Default)]
pub(super) struct Sizes(Mutex<HashMap<Object, u64>>);

impl Sizes {
    /// Forgets an object's size, because it is gone or has changed.
    pub(super) fn forget(&self, object: &Object) {
        self.0.lock().remove(object);
    }

    /// Lists the store, and looks at the size of what is new.
    pub(super) fn survey(&self, store: &Store) -> Result<StoreSizes> {
        let (found, layout) = (store.survey()?, store.layout());
        if let Some(dir) = found.absent.first() {
            return Err(Error::io("list", dir, io::ErrorKind::NotFound.into()));
        }
        // A thinned pack may have become thinner, or whole again.
        found.thinned.iter().for_each(|pack| self.forget(&Object::Pack(*pack)));
        let mut sizes = StoreSizes { stray_records: found.stray_records, ..StoreSizes::default() };
        for digest in found.layers {
            let dir = layout.layer(&digest);
            let size = || Ok(allocated(&dir.join(INDEX))? + allocated(&dir.join(RECIPE))?);
            sizes.layers.insert(digest, self.size(Object::Layer(digest), size)?);
        }
        for digest in found.blobs {
            sizes.blobs.insert(digest, self.size(Object::Blob(digest), || allocated(&layout.blob(&digest)))?);
        }
        for pack in found.packs {
            sizes.packs.insert(pack, self.size(Object::Pack(pack), || allocated(&layout.pack(&pack)))?);
        }
        self.0.lock().retain(|object, _| match object {
            Object::Layer(digest) => sizes.layers.contains_key(digest),
            Object::Blob(digest) => sizes.blobs.contains_key(digest),
            Object::Pack(pack) => sizes.packs.contains_key(pack),
        });
        Ok(sizes)
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

/// Bytes that a file takes on the disk; 0 if it is gone.
fn allocated(path: &Path) -> Result<u64> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(metadata.blocks() * 512),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(e) => Err(Error::io("look up", path, e)),
    }
}

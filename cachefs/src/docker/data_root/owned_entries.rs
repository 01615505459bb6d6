//! What this program has put into a data-root, so that it removes nothing else.
//!
//! The list is written before anything is added (with what is about to be added) and after everything was removed. So
//! after a crash it may name too much, never too little. An entry for something that is not there does no harm.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use store::Digest;

use super::error::{Error, Result};
use super::root::Root;
use crate::docker::files;

/// Version 1 gave containers each layer as a lower directory of its own. It can be removed only: with other links below
/// them, its containers would see again what an upper layer has removed.
const VERSION: u32 = 2;

/// `cachefs-data-root.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OwnedEntries {
    version: u32,
    /// The mount point that layers' links lead into.
    pub(super) mount: PathBuf,
    /// The store that images come from.
    pub(super) store: PathBuf,
    /// The store's random identity, hex.
    pub(super) identity: String,
    /// Names that we gave, and the image each was given to; two while a name is being moved.
    #[serde(default)]
    pub(super) references: BTreeMap<String, BTreeSet<Digest>>,
    /// Images that we added.
    #[serde(default)]
    pub(super) images: BTreeSet<Digest>,
    /// Layers that we added, by chainID.
    #[serde(default)]
    pub(super) layers: BTreeSet<Digest>,
}

impl OwnedEntries {
    /// An empty list.
    pub(super) fn new(mount: PathBuf, store: PathBuf, identity: String) -> OwnedEntries {
        OwnedEntries {
            version: VERSION,
            mount,
            store,
            identity,
            references: BTreeMap::new(),
            images: BTreeSet::new(),
            layers: BTreeSet::new(),
        }
    }

    /// Whether this program gave the name `reference` to `image`.
    pub(super) fn gave(&self, reference: &str, image: &Digest) -> bool {
        self.references.get(reference).is_some_and(|images| images.contains(image))
    }

    /// Reads the list of a data-root; nothing if it has none.
    pub(super) fn read(root: &Root) -> Result<Option<OwnedEntries>> {
        match OwnedEntries::read_any(root)? {
            Some(owned) if owned.version < VERSION => Err(Error::OldLayout { path: root.path().into() }),
            other => Ok(other),
        }
    }

    /// The same, also of a data-root that an older version has made.
    pub(super) fn read_any(root: &Root) -> Result<Option<OwnedEntries>> {
        let path = root.owned();
        let Some(text) = files::read_text(&path)? else { return Ok(None) };
        let owned: OwnedEntries =
            serde_json::from_str(&text).map_err(|e| Error::Damaged { path: path.clone(), why: e.to_string() })?;
        match owned.version {
            0..=VERSION => Ok(Some(owned)),
            other => Err(Error::Damaged { path, why: format!("it has version {other}, written by a newer cachefs") }),
        }
    }

    /// Writes the list, durably.
    pub(super) fn write(&self, root: &Root) -> Result<()> {
        let path = root.owned();
        let mut bytes = serde_json::to_vec_pretty(self).map_err(|e| Error::io("write", &path, e.into()))?;
        bytes.push(b'\n');
        Ok(files::replace(&path, &bytes, 0o600)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_and_a_newer_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert_eq!(OwnedEntries::read(&root).unwrap(), None);
        let mut owned = OwnedEntries::new("/mnt".into(), "/store".into(), "ab".into());
        owned.references.insert("a:b".into(), BTreeSet::from([Digest::of(b"a")]));
        owned.layers.insert(Digest::of(b"l"));
        owned.write(&root).unwrap();
        assert_eq!(OwnedEntries::read(&root).unwrap(), Some(owned.clone()));
        let newer = OwnedEntries { version: VERSION + 1, ..owned.clone() };
        newer.write(&root).unwrap();
        assert!(OwnedEntries::read(&root).unwrap_err().to_string().contains("written by a newer cachefs"));
        let older = OwnedEntries { version: 1, ..owned };
        older.write(&root).unwrap();
        assert!(OwnedEntries::read(&root).unwrap_err().to_string().contains("cachefs data-root remove"));
        assert_eq!(OwnedEntries::read_any(&root).unwrap(), Some(older));
    }
}

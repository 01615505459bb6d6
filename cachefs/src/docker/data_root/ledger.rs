//! What this program has put into a data-root, so that it takes away nothing else.
//!
//! The ledger is written before anything is added (with what is about to be there) and after everything was removed, so
//! that after a crash it may name too much, never too little: what it names and is not there is no harm.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use store::Digest;

use super::daemon::Identity;
use super::error::{Error, Result};
use super::root::Root;
use super::write;

const VERSION: u32 = 1;

/// `cachefs-data-root.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ledger {
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
    /// The dockerd that ran when something was added, and has not seen it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) unseen_by: Option<Identity>,
}

impl Ledger {
    /// An empty ledger.
    pub(super) fn new(mount: PathBuf, store: PathBuf, identity: String) -> Ledger {
        Ledger {
            version: VERSION,
            mount,
            store,
            identity,
            references: BTreeMap::new(),
            images: BTreeSet::new(),
            layers: BTreeSet::new(),
            unseen_by: None,
        }
    }

    /// Whether `reference` means `image` by our doing.
    pub(super) fn gave(&self, reference: &str, image: &Digest) -> bool {
        self.references.get(reference).is_some_and(|images| images.contains(image))
    }

    /// Reads the ledger of a data-root; nothing if it has none.
    pub(super) fn read(root: &Root) -> Result<Option<Ledger>> {
        let path = root.ledger();
        let Some(text) = write::read_text(&path)? else { return Ok(None) };
        let ledger: Ledger =
            serde_json::from_str(&text).map_err(|e| Error::Damaged { path: path.clone(), why: e.to_string() })?;
        match ledger.version {
            VERSION => Ok(Some(ledger)),
            other => Err(Error::Damaged { path, why: format!("it has version {other}, written by a newer cachefs") }),
        }
    }

    /// Writes it, durably.
    pub(super) fn write(&self, root: &Root) -> Result<()> {
        let path = root.ledger();
        let mut bytes = serde_json::to_vec_pretty(self).map_err(|e| Error::io("write", &path, e.into()))?;
        bytes.push(b'\n');
        write::replace(&path, &bytes, 0o600)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_and_a_newer_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert_eq!(Ledger::read(&root).unwrap(), None);
        let mut ledger = Ledger::new("/mnt".into(), "/store".into(), "ab".into());
        ledger.references.insert("a:b".into(), BTreeSet::from([Digest::of(b"a")]));
        ledger.layers.insert(Digest::of(b"l"));
        ledger.write(&root).unwrap();
        assert_eq!(Ledger::read(&root).unwrap(), Some(ledger.clone()));
        let newer = Ledger { version: 2, ..ledger };
        newer.write(&root).unwrap();
        assert!(Ledger::read(&root).unwrap_err().to_string().contains("written by a newer cachefs"));
    }
}

//! The only place where a digest becomes a path.
//!
//! ```text
//! STORE/
//!   cachefs-store                      superblock: magic, version, feature sets, identity
//!   cachefs-store.copy                 the same once more
//!   reserve                            room for small writes when the disk is full
//!   blobs/<2 hex>/<64 hex>             manifest and config JSON, named by SHA-256
//!   layers/<2 hex>/<diffID hex>/index  the layer's file tree, zstd
//!   layers/<2 hex>/<diffID hex>/tar    the layer's tar recipe, zstd
//!   packs/<2 hex>/<BLAKE3 hex>         chunks, appended
//!   catalogue/<generation, 16 hex>     images and tags, one file a generation
//!   lease/<epoch, 16 hex>              one file an epoch; <epoch>.beat is its heartbeat
//!   ledger/<epoch, 16 hex>             jobs, schedules, settings: what the next leader must know besides
//!   staging/<epoch hex>-<random>/      work in progress of the leader with that epoch
//!   quarantine/<path>                  damaged objects, where no reader looks
//!   trash/<epoch hex>/                 what that leader removed
//! ```

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::digest::{ContentDigest, Digest};

/// What file systems, filers and desktops put into the root of an otherwise empty volume.
const OF_THE_VOLUME: &[&str] =
    &["lost+found", ".snapshot", ".snapshots", ".snap", ".zfs", ".glusterfs", ".trashcan", ".Trash-0"];

/// Whether a name in the store's root belongs to the volume that the store lies on, rather than to the store.
pub fn is_of_the_volume(name: &OsStr) -> bool {
    OF_THE_VOLUME.iter().any(|known| name == *known)
}

/// Paths below one store directory.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// The layout of the store at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Layout {
        Layout { root: root.into() }
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The superblock.
    pub fn superblock(&self) -> PathBuf {
        self.root.join("cachefs-store")
    }

    /// The superblock's second copy.
    pub fn superblock_copy(&self) -> PathBuf {
        self.root.join("cachefs-store.copy")
    }

    /// The file that reserves room for small writes.
    pub fn reserve(&self) -> PathBuf {
        self.root.join("reserve")
    }

    /// All directories that a store has from its creation.
    pub fn directories(&self) -> [PathBuf; 7] {
        ["blobs", "layers", "packs", "catalogue", "lease", "staging", "trash"].map(|name| self.root.join(name))
    }

    /// A manifest or config.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        fan_out(self.root.join("blobs"), &digest.hex())
    }

    /// The directory of one layer, by diffID.
    pub fn layer(&self, diff_id: &Digest) -> PathBuf {
        fan_out(self.root.join("layers"), &diff_id.hex())
    }

    /// The index inside a layer's directory.
    pub fn index(&self, diff_id: &Digest) -> PathBuf {
        self.layer(diff_id).join(INDEX)
    }

    /// The tar recipe inside a layer's directory.
    pub fn recipe(&self, diff_id: &Digest) -> PathBuf {
        self.layer(diff_id).join(RECIPE)
    }

    /// A pack, by the BLAKE3 digest of all its bytes.
    pub fn pack(&self, pack: &ContentDigest) -> PathBuf {
        fan_out(self.root.join("packs"), &pack.hex())
    }

    /// The directory of all packs, in directories by their first two digits.
    pub fn packs(&self) -> PathBuf {
        self.root.join("packs")
    }

    /// The directory of all layers, likewise.
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// The directory of all manifests and configs, likewise.
    pub fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    /// The directory of catalogue generations.
    pub fn catalogue(&self) -> PathBuf {
        self.root.join("catalogue")
    }

    /// One generation of the catalogue.
    pub fn generation(&self, number: u64) -> PathBuf {
        self.catalogue().join(format!("{number:016x}"))
    }

    /// What was lost when the catalogue was last salvaged; no reader looks at it.
    pub fn salvage_note(&self) -> PathBuf {
        self.catalogue().join("salvaged")
    }

    /// The directory of damaged objects, made with the first one.
    pub fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    /// Where the object at `path` is kept once it was found damaged.
    pub fn quarantined(&self, path: &Path) -> PathBuf {
        self.quarantine().join(path.strip_prefix(&self.root).unwrap_or(path))
    }

    /// The directory of lease epochs.
    pub fn leases(&self) -> PathBuf {
        self.root.join("lease")
    }

    /// The directory of handover logs, made with the first one.
    pub fn handover_logs(&self) -> PathBuf {
        self.root.join("ledger")
    }

    /// The handover log of the leader with that epoch.
    pub fn handover_log(&self, epoch: u64) -> PathBuf {
        self.handover_logs().join(format!("{epoch:016x}"))
    }

    /// The directory of work in progress.
    pub fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    /// The directory of removed objects that are not unlinked yet.
    pub fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// The directory of what the leader with that epoch removed.
    pub fn trash_of(&self, epoch: u64) -> PathBuf {
        self.trash().join(format!("{epoch:016x}"))
    }
}

/// Parses a file name that is a number: 16 hexadecimal digits.
pub(crate) fn number(name: &str) -> Option<u64> {
    (name.len() == 16).then(|| u64::from_str_radix(name, 16).ok()).flatten()
}

/// The number that a name begins with, whatever follows it.
pub(crate) fn leading_number(name: &str) -> Option<u64> {
    name.get(..16).and_then(number)
}

/// The index's name inside a layer's directory.
pub const INDEX: &str = "index";
/// The tar recipe's name inside a layer's directory.
pub const RECIPE: &str = "tar";

/// `dir/<first two digits>/<all digits>`: 256 directories keep each short at 200,000 layers.
fn fan_out(dir: PathBuf, hex: &str) -> PathBuf {
    dir.join(&hex[..2]).join(hex)
}

//! The publisher, the only way into the store: stage, sync, verify by reading back, rename, sync the directory.
//!
//! A crash at any point leaves either nothing visible or the whole object: names appear by `rename(2)` or `link(2)` of complete,
//! synced files. Everything but the catalogue is named by digest, so publishing twice is the same as once, and two
//! publishers cannot harm each other. The order is packs, then the layer that refers to them, then blobs, then the
//! catalogue: nothing visible ever refers to something that is not.
//!
//! - `commit`: generations of the catalogue, one after the other.
//! - `indexes`: which index each layer has.
//! - `modes`: file modes that let hosts read what they need.
//! - `takeover`: how a new leader makes sure that no rename of an old one succeeds any more.
//! - `holds`: objects that running work relies on. `collection`: the only way out of the store, which spares them.
//! - `startup`: publishes an image's startup pack. `handover_log`: writes what the next leader must know besides
//!   images.
//! - `quarantine`: moves damaged objects out of the readers' way. `salvaged`: leading with what is left of a damaged
//!   catalogue.
//!
//! An image is committed only if everything that it refers to is there, which is checked under the lock that removals
//! take.
//!
//! Locks: `catalogue` guards commits and is held across a commit's I/O, because commits must follow each other; no
//! reader takes it. `lease` guards the beat counter, likewise. `relied` guards holds and touched packs, and is held
//! across one rename into the trash. `indexes` guards the index digests of layers whose images are yet to be committed,
//! and is not held during I/O. Order: `catalogue`, then `lease`, then `relied`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::catalogue::Catalogue;
use crate::crash::{CrashPoint, crash_point};
use crate::digest::{ContentDigest, Digest};
use crate::durable::{
    create_exclusive, drop_cached, make_directory, make_own_directory, make_parent, open_to_all, replace, sync_dir,
};
use crate::error::{Error, Result};
use crate::layer;
use crate::layout::{INDEX, Layout, RECIPE, is_of_the_volume};
use crate::lease::{self, Attempt, Holder, Lease, Watch};
use crate::pack;
use crate::pack::thinned::record_path;
use crate::publisher::first_state::OnDamage;
use crate::publisher::holds::{InProgress, Relied, lock};
use crate::reader::Store;
use crate::reserve::{self, with_reserve};
use crate::version::{Access, Features, Superblock};

mod collection;
mod commit;
mod digested;
mod first_state;
mod handover_log;
mod holds;
mod indexes;
mod modes;
mod quarantine;
mod salvaged;
mod startup;
mod takeover;

pub use crate::durable::write_synced;
pub use collection::{Collection, Object, Removal, references};
pub use digested::DigestedFile;
pub use handover_log::{Durability, HandoverLogWriter};
pub use holds::{Hold, Working};
pub use quarantine::{Moved, Suspect};
pub use startup::{StagedStartup, StartupWriter};

/// Whether publishing changed anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// It is in the store now.
    New,
    /// It was there already.
    AlreadyPresent,
}

/// Makes the directory `root` (which must exist and be empty) a store.
pub fn create(root: &Path) -> Result<()> {
    let layout = Layout::new(root);
    let mut entries = fs::read_dir(root).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::NotAStore {
            path: root.to_owned(),
            why: "there is no such directory; mount the shared disk there first".into(),
        },
        _ => Error::io("open", root, e),
    })?;
    if entries.any(|entry| entry.is_ok_and(|e| !is_of_the_volume(&e.file_name()))) {
        return Err(Error::NotAStore {
            path: root.to_owned(),
            why: "it holds other files; choose an empty directory".into(),
        });
    }
    for dir in layout.directories() {
        make_directory(&dir).map_err(|e| Error::io("create", &dir, e))?;
    }
    let superblock = Superblock { features: Features::default(), identity: rand::random() };
    create_exclusive(&layout.superblock_copy(), &superblock.encode())?;
    create_exclusive(&layout.superblock(), &superblock.encode())?;
    reserve::keep(&layout)?;
    sync_dir(root)
}

/// Makes those of a store's directories that are missing: a copy by a tool that leaves out empty directories lacks
/// some.
fn make_missing_directories(layout: &Layout) -> Result<()> {
    for dir in layout.directories() {
        match make_directory(&dir) {
            Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem || e.kind() == io::ErrorKind::PermissionDenied => {}
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(Error::io("create", &dir, e)),
            _ => {}
        }
    }
    Ok(())
}

/// Writes the superblock of the store at `root` anew when it is lost altogether: with the given identity, or a new one.
pub fn write_new_superblock(root: &Path, identity: Option<[u8; 16]>) -> Result<()> {
    let layout = Layout::new(root);
    let identity = identity.unwrap_or_else(rand::random);
    let bytes = Superblock { features: Features::default(), identity }.encode();
    for path in [layout.superblock_copy(), layout.superblock()] {
        with_reserve(&layout, || replace(&path, &bytes))?;
    }
    sync_dir(root)
}

/// The right to write to one store.
#[derive(Debug)]
pub struct Publisher {
    store: Store,
    epoch: u64,
    lease: Mutex<Option<Lease>>,
    catalogue: Mutex<Catalogue>,
    indexes: Mutex<HashMap<Digest, ContentDigest>>,
    relied: Arc<Mutex<Relied>>,
    in_progress: Arc<InProgress>,
}

/// Tries to become the publisher of one store; to be tried again and again until the store is free.
#[derive(Debug)]
pub struct Candidate {
    store: Store,
    me: Holder,
    watch: Watch,
    on_damage: OnDamage,
}

/// The result of one attempt.
#[derive(Debug)]
pub enum Candidacy {
    /// This coordinator leads.
    Leading(Box<Publisher>),
    /// Another coordinator leads; try again soon.
    Standby {
        /// Its name.
        holder: String,
        /// Its epoch.
        epoch: u64,
    },
}

impl Candidate {
    /// Opens the store at `root` for writing, as `name`.
    pub fn new(root: &Path, name: &str) -> Result<Candidate> {
        let store = Store::open(root)?;
        Superblock::read(store.layout(), Access::Write)?;
        make_missing_directories(store.layout())?;
        let probe = store.layout().staging().join(format!("probe-{:016x}", rand::random::<u64>()));
        with_reserve(store.layout(), || {
            fs::write(&probe, b"").map_err(|source| match source.kind() {
                io::ErrorKind::PermissionDenied => Error::ReadOnly { path: root.to_owned(), source },
                _ => Error::io("write", root, source),
            })
        })?;
        let _ = fs::remove_file(&probe);
        Ok(Candidate { store, me: Holder::this_process(name), watch: Watch::default(), on_damage: OnDamage::Refuse })
    }

    /// If the catalogue is damaged, leads with what can still be read of it.
    pub fn salvaging(self) -> Candidate {
        Candidate { on_damage: OnDamage::Salvage, ..self }
    }

    /// Takes no epoch up to `epoch`, whatever the store says: a store that was restored from a backup has forgotten
    /// some.
    pub fn above(mut self, epoch: u64) -> Candidate {
        self.watch.above(epoch);
        self
    }

    /// Looks once whether the store is free, and takes it if so.
    pub fn attempt(&mut self) -> Result<Candidacy> {
        if lease::highest(self.store.layout())? == 0 && self.store.generation()? > 0 {
            // The leases are gone. The leader that wrote the catalogue may still lead, and must find a higher epoch.
            self.watch.above(self.store.salvage()?.catalogue.epoch());
        }
        match self.watch.attempt(self.store.layout(), &self.me, Instant::now())? {
            Attempt::Held { holder, epoch } => Ok(Candidacy::Standby { holder: holder.name, epoch }),
            Attempt::Taken(lease) => {
                let publisher = Publisher::new(self.store.clone(), lease, self.on_damage)?;
                Ok(Candidacy::Leading(Box::new(publisher)))
            }
        }
    }
}

impl Publisher {
    /// Opens the store at `root` for writing, as `name`; an error if another coordinator leads.
    pub fn open(root: &Path, name: &str) -> Result<Publisher> {
        match Candidate::new(root, name)?.attempt()? {
            Candidacy::Leading(publisher) => Ok(*publisher),
            Candidacy::Standby { holder, epoch } => Err(Error::Held { path: root.to_owned(), holder, epoch }),
        }
    }

    fn new(store: Store, lease: Lease, on_damage: OnDamage) -> Result<Publisher> {
        let epoch = lease.epoch();
        crash_point(CrashPoint::EpochTaken);
        let (catalogue, lost) = match first_state::first_state(&store, epoch, on_damage) {
            Ok(found) => found,
            // The next attempt, perhaps after a repair, need not wait for a beat that never comes.
            Err(error) => return lease.release().and(Err(error)),
        };
        let catalogue = Mutex::new(catalogue);
        let (indexes, relied, in_progress) = (Mutex::default(), Arc::default(), Arc::default());
        let lease = Mutex::new(Some(lease));
        let publisher = Publisher { store, epoch, lease, catalogue, indexes, relied, in_progress };
        if let Err(error) = publisher.take_over() {
            return publisher.release().and(Err(error));
        }
        crash_point(CrashPoint::Fenced);
        publisher.declare_lost(&lost)?;
        Ok(publisher)
    }

    /// The store, for reading.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The fencing epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Renews the lease; to be called several times within [`lease::TIME_TO_LIVE`].
    pub fn renew(&self) -> Result<()> {
        match &mut *lock(&self.lease) {
            Some(lease) => lease.renew(),
            None => Err(Error::Fenced { mine: self.epoch, current: self.epoch }),
        }
    }

    /// Makes the reserve for small writes on a full disk, if it is missing and there is room. Returns whether it is
    /// there. To be called now and then.
    pub fn keep_reserve(&self) -> Result<bool> {
        reserve::keep(self.store.layout())
    }

    /// Gives the lease up. Every later commit is refused.
    pub fn release(&self) -> Result<()> {
        lock(&self.lease).take().map_or(Ok(()), Lease::release)
    }

    fn check(&self) -> Result<()> {
        if lock(&self.lease).is_none() {
            return Err(Error::Fenced { mine: self.epoch, current: self.epoch });
        }
        lease::check(self.store.layout(), self.epoch)
    }

    /// Puts a manifest or config into the store.
    pub fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<Published> {
        if Digest::of(bytes) != *digest {
            return Err(Error::corrupt(format!("blob {digest}"), "its bytes do not match its digest"));
        }
        let path = self.store.layout().blob(digest);
        make_parent(&path)?;
        let published = if create_exclusive(&path, bytes)? { Published::New } else { Published::AlreadyPresent };
        crash_point(CrashPoint::DocumentPut);
        Ok(published)
    }

    /// Starts staging a layer.
    pub fn stage(&self) -> Result<Staging> {
        let name = format!("{:016x}-{:016x}", self.epoch, rand::random::<u64>());
        let dir = self.store.layout().staging().join(name);
        let layer = dir.join("layer");
        let working = self.in_progress.begin();
        make_own_directory(&dir).map_err(|e| Error::io("create", &dir, e))?;
        let staging = Staging { dir, working, stopped: Stopped::default() };
        make_directory(&layer).map_err(|e| Error::io("create", &layer, e))?;
        crash_point(CrashPoint::Staged);
        Ok(staging)
    }

    /// Makes a staged layer visible: verified by reading it back, then renamed into place.
    pub fn publish_layer(&self, staging: Staging, diff_id: &Digest, pack: Option<&ContentDigest>) -> Result<Published> {
        if self.store.has_layer(diff_id)? {
            return Ok(Published::AlreadyPresent);
        }
        let index = self.claim(&staging, diff_id, pack)?;
        self.expect_index(diff_id, index)?;
        let published = self.reveal(&staging, diff_id, pack)?;
        if published == Published::AlreadyPresent {
            // Another staging was faster, perhaps with another index.
            self.expect_index(diff_id, self.index_digest(diff_id)?)?;
        }
        Ok(published)
    }

    /// Verifies a staged layer, and keeps it and the packs that it refers to from collections until its staging is
    /// over. Returns the digest of its index.
    fn claim(&self, staging: &Staging, diff_id: &Digest, pack: Option<&ContentDigest>) -> Result<ContentDigest> {
        let mut hold = self.hold([*diff_id]);
        let (index, used) = staging.verify(diff_id, pack)?;
        crash_point(CrashPoint::LayerVerified);
        hold.claim(used.iter().copied());
        staging.working.keep(hold);
        used.iter().filter(|used| pack != Some(used)).try_for_each(|other| self.check_pack(other, diff_id))?;
        Ok(index)
    }

    /// Fails with [`Error::Missing`] if a pack that a layer refers to is not there.
    fn check_pack(&self, pack: &ContentDigest, layer: &Digest) -> Result<()> {
        let path = self.store.layout().pack(pack);
        if path.try_exists().map_err(|e| Error::io("look up", &path, e))? {
            Ok(())
        } else {
            Err(Error::Missing { what: format!("pack {pack}, which layer {layer} shares,") })
        }
    }

    /// Renames a claimed layer and its pack into place.
    fn reveal(&self, staging: &Staging, diff_id: &Digest, pack: Option<&ContentDigest>) -> Result<Published> {
        self.check()?;
        if let Some(pack) = pack {
            self.publish_pack(staging, pack)?;
            crash_point(CrashPoint::PackRenamed);
        }
        for path in [staging.index(), staging.recipe()] {
            open_to_all(&path)?;
        }
        sync_dir(&staging.layer())?;
        let published = rename_into_place(&staging.layer(), &self.store.layout().layer(diff_id))?;
        crash_point(CrashPoint::LayerRenamed);
        Ok(published)
    }

    /// Renames a whole pack into place, over a thinned one if there is one, whose record is then removed.
    fn publish_pack(&self, staging: &Staging, pack: &ContentDigest) -> Result<()> {
        let path = self.store.layout().pack(pack);
        open_to_all(&staging.pack())?;
        rename_into_place(&staging.pack(), &path)?;
        crash_point(CrashPoint::PackReplaced);
        match fs::remove_file(record_path(&path)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &record_path(&path), e)),
            _ => Ok(()),
        }
    }
}

/// Returns true once nobody wants a staged layer any more.
struct Stopped(Box<dyn Fn() -> bool + Send + Sync>);

impl Default for Stopped {
    fn default() -> Stopped {
        Stopped(Box::new(|| false))
    }
}

impl std::fmt::Debug for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stopped({})", (self.0)())
    }
}

/// A layer on its way into the store. Dropping it removes what was staged.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    working: Arc<Working>,
    stopped: Stopped,
}

impl Staging {
    /// Makes reading back, which takes long for a large layer, fail once `stopped` returns true.
    pub fn until(mut self, stopped: impl Fn() -> bool + Send + Sync + 'static) -> Staging {
        self.stopped = Stopped(Box::new(stopped));
        self
    }

    /// A ticket that keeps collections waiting, and the layer in its place, after the staging itself is gone: for
    /// callers that have yet to tell the database where the layer's pieces lie.
    pub fn working(&self) -> Arc<Working> {
        Arc::clone(&self.working)
    }

    /// A path beside the pack, for the record of a thinned pack.
    fn beside_pack(&self) -> PathBuf {
        self.dir.join("record")
    }

    /// Where to write the pack.
    pub fn pack(&self) -> PathBuf {
        self.dir.join("pack")
    }

    /// The directory that becomes the layer's.
    fn layer(&self) -> PathBuf {
        self.dir.join("layer")
    }

    /// Where to write the sealed index.
    pub fn index(&self) -> PathBuf {
        self.layer().join(INDEX)
    }

    /// Where to write the tar recipe.
    pub fn recipe(&self) -> PathBuf {
        self.layer().join(RECIPE)
    }

    /// Reads everything back and verifies it, from the disk rather than from memory where the system allows. Returns
    /// the digest of the index, and the packs that the layer refers to.
    fn verify(&self, diff_id: &Digest, pack: Option<&ContentDigest>) -> Result<(ContentDigest, Vec<ContentDigest>)> {
        if let Some(pack) = pack {
            drop_cached(&self.pack());
            pack::verify_until(&self.pack(), pack, &self.stopped.0)?;
        }
        drop_cached(&self.index());
        let index = fs::File::open(self.index()).map_err(|e| Error::io("read back", &self.index(), e))?;
        let (header, packs) = layer::check_sealed(index, diff_id)?;
        drop_cached(&self.recipe());
        if pack::digest_of(&self.recipe())? == header.recipe_digest {
            Ok((pack::digest_of(&self.index())?, packs))
        } else {
            Err(Error::corrupt(
                format!("the tar recipe of layer {diff_id}"),
                "it reads back differently than it was written",
            ))
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn rename_into_place(from: &Path, to: &Path) -> Result<Published> {
    make_parent(to)?;
    match fs::rename(from, to) {
        Ok(()) => {}
        Err(e) if matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty) => {
            return Ok(Published::AlreadyPresent);
        }
        Err(e) => return Err(Error::io("publish", to, e)),
    }
    sync_dir(to.parent().unwrap_or(to))?;
    Ok(Published::New)
}

#[cfg(test)]
pub(crate) mod tests;

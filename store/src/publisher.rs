//! The only way into the store: stage, sync, verify by reading back, rename, sync the directory.
//!
//! A crash at any point leaves either nothing visible or the whole object: names appear by `rename(2)` or `link(2)` of complete,
//! synced files. Everything but the catalogue is named by digest, so publishing twice is the same as once, and two
//! publishers cannot harm each other. The order is packs, then the layer that refers to them, then blobs, then the
//! catalogue: nothing visible ever refers to something that is not.
//!
//! - `commit`: generations of the catalogue, one after the other.
//! - `indexes`: which index each layer has.
//! - `modes`: what hosts read is readable to them.
//! - `takeover`: how a new leader makes sure that no old one's rename succeeds any more.
//! - `holds`: what is relied on. `collection`: the only way out, which heeds it.
//! - `startup`: an image's startup pack on its way in. `ledger`: what the next leader must know besides.
//! - `quarantine`: damaged objects on their way out. `salvaged`: leading with what is left of a damaged catalogue.
//!
//! An image is committed only if everything that it refers to is there, which is looked at under the lock that removals take.
//!
//! Locks: `catalogue` guards the committing of generations and is held across that commit's I/O, because commits must follow
//! each other; no reader takes it. `lease` guards the beat counter, likewise. `relied` guards what is held and touched, and is
//! held across one rename into the trash. `indexes` guards the digests of indexes that images are yet to be committed with,
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
use crate::publisher::holds::{InProgress, Relied, lock};
use crate::reader::Store;
use crate::reserve::{self, with_reserve};
use crate::version::{Access, Features, Superblock};

mod collection;
mod commit;
mod digested;
mod holds;
mod indexes;
mod ledger;
mod modes;
mod quarantine;
mod salvaged;
mod startup;
mod takeover;

pub use crate::durable::write_synced;
pub use collection::{Collection, Object, Removal, references};
pub use digested::DigestedFile;
pub use holds::{Hold, Working};
pub use ledger::{LedgerWriter, Promise};
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

/// Makes those of a store's directories that are gone: a copy by a tool that leaves empty directories out lacks some.
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

/// Writes the superblock of the store at `root` although none is there any more: with this identity, or a new one.
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

/// Tries to become the publisher of one store, again and again until it is free.
#[derive(Debug)]
pub struct Candidate {
    store: Store,
    me: Holder,
    watch: Watch,
    start: Start,
}

/// Which catalogue a new leader starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// The one that is there; a damaged one is an error.
    Sound,
    /// What is left of it.
    Salvaged,
}

/// What one try gave.
#[derive(Debug)]
pub enum Candidacy {
    /// We lead.
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
        Ok(Candidate { store, me: Holder::this_process(name), watch: Watch::default(), start: Start::Sound })
    }

    /// Is content with what can still be read of the catalogue, should it be damaged.
    pub fn salvaging(self) -> Candidate {
        Candidate { start: Start::Salvaged, ..self }
    }

    /// Takes no epoch up to `epoch`, whatever the store says: a store that was put back from a backup has forgotten some.
    pub fn above(mut self, epoch: u64) -> Candidate {
        self.watch.above(epoch);
        self
    }

    /// Looks once whether the store is free, and takes it if so.
    pub fn attempt(&mut self) -> Result<Candidacy> {
        if lease::highest(self.store.layout())? == 0 && self.store.generation()? > 0 {
            // The leases are gone. Whoever led when the catalogue was written may lead still, and must find a higher one.
            self.watch.above(self.store.salvage()?.catalogue.epoch());
        }
        match self.watch.attempt(self.store.layout(), &self.me, Instant::now())? {
            Attempt::Held { holder, epoch } => Ok(Candidacy::Standby { holder: holder.name, epoch }),
            Attempt::Taken(lease) => {
                let publisher = Publisher::new(self.store.clone(), lease, self.start)?;
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

    fn new(store: Store, lease: Lease, start: Start) -> Result<Publisher> {
        let epoch = lease.epoch();
        crash_point(CrashPoint::EpochTaken);
        let (catalogue, lost) = match salvaged::first_state(&store, epoch, start) {
            Ok(found) => found,
            // Whoever tries next, perhaps after a repair, need not wait for a beat that never comes.
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

    /// Shows that we live; to be called several times within [`lease::TIME_TO_LIVE`].
    pub fn renew(&self) -> Result<()> {
        match &mut *lock(&self.lease) {
            Some(lease) => lease.renew(),
            None => Err(Error::Fenced { mine: self.epoch, current: self.epoch }),
        }
    }

    /// Keeps some room for small writes on a full disk, if there is any; tells whether there is. To be called now and then.
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
        let published = match create_exclusive(&path, bytes)? {
            true => Published::New,
            false => Published::AlreadyPresent,
        };
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
            // Somebody was faster, with another index perhaps.
            self.expect_index(diff_id, self.index_digest(diff_id)?)?;
        }
        Ok(published)
    }

    /// Verifies a staged layer, and keeps it and the packs that it refers to from collections until its staging is over. Gives the
    /// digest of its index.
    fn claim(&self, staging: &Staging, diff_id: &Digest, pack: Option<&ContentDigest>) -> Result<ContentDigest> {
        let mut hold = self.hold([*diff_id]);
        let (index, used) = staging.verify(diff_id, pack)?;
        crash_point(CrashPoint::LayerVerified);
        hold.claim(used.iter().copied());
        staging.working.keep(hold);
        used.iter().filter(|used| pack != Some(used)).try_for_each(|other| self.check_pack(other, diff_id))?;
        Ok(index)
    }

    /// Whether a pack that a layer refers to is there.
    fn check_pack(&self, pack: &ContentDigest, layer: &Digest) -> Result<()> {
        let path = self.store.layout().pack(pack);
        match path.try_exists().map_err(|e| Error::io("look up", &path, e))? {
            true => Ok(()),
            false => Err(Error::Missing { what: format!("pack {pack}, which layer {layer} shares,") }),
        }
    }

    /// Gives a claimed layer and its pack their names.
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

    /// Renames a whole pack into place, over a thinned one if need be.
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

/// Tells whether nobody wants a staged layer any more.
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

/// A layer on its way into the store; dropped, it is removed.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    working: Arc<Working>,
    stopped: Stopped,
}

impl Staging {
    /// Lets reading back, which takes long for a large layer, end with an error when `stopped` says so.
    pub fn until(mut self, stopped: impl Fn() -> bool + Send + Sync + 'static) -> Staging {
        self.stopped = Stopped(Box::new(stopped));
        self
    }

    /// Keeps collections waiting, and the layer in its place, when the staging itself is gone: for whoever has yet to tell the
    /// journal where its pieces lie.
    pub fn working(&self) -> Arc<Working> {
        Arc::clone(&self.working)
    }

    /// A name beside the pack.
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

    /// Reads everything back, from the disk rather than from memory where the system allows. Gives the digest of the index, and the
    /// packs that the layer refers to.
    fn verify(&self, diff_id: &Digest, pack: Option<&ContentDigest>) -> Result<(ContentDigest, Vec<ContentDigest>)> {
        if let Some(pack) = pack {
            drop_cached(&self.pack());
            pack::verify_until(&self.pack(), pack, &self.stopped.0)?;
        }
        drop_cached(&self.index());
        let index = fs::File::open(self.index()).map_err(|e| Error::io("read back", &self.index(), e))?;
        let (header, packs) = layer::check_sealed(index, diff_id)?;
        drop_cached(&self.recipe());
        match pack::digest_of(&self.recipe())? == header.recipe_digest {
            true => Ok((pack::digest_of(&self.index())?, packs)),
            false => Err(Error::corrupt(
                format!("the tar recipe of layer {diff_id}"),
                "it reads back differently than it was written",
            )),
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

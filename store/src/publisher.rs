//! The only way into the store: stage, sync, verify by reading back, rename, sync the directory.
//!
//! A crash at any point leaves either nothing visible or the whole object: names appear by `rename(2)` or `link(2)` of complete,
//! synced files. Everything but the catalogue is named by digest, so publishing twice is the same as once, and two
//! publishers cannot harm each other. The order is packs, then the layer that refers to them, then blobs, then the
//! catalogue: nothing visible ever refers to something that is not.
//!
//! - `takeover`: how a new leader makes sure that no old one's rename succeeds any more.
//! - `holds`: what is relied on. `collection`: the only way out, which heeds it.
//! - `startup`: an image's startup pack on its way in. `ledger`: what the next leader must know besides.
//! - `quarantine`: damaged objects on their way out. `salvaged`: leading with what is left of a damaged catalogue.
//!
//! An image is committed only if everything that it refers to is there, which is looked at under the lock that removals take.
//!
//! Locks: `catalogue` guards the committing of generations and is held across that commit's I/O, because commits must follow
//! each other; no reader takes it. `lease` guards the beat counter, likewise. `relied` guards what is held and touched, and is
//! held across one rename into the trash. Order: `catalogue`, then `lease`, then `relied`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::catalogue::{Catalogue, Change, SNAPSHOT_EVERY};
use crate::crash::{CrashPoint, crash_point};
use crate::digest::{ContentDigest, Digest};
use crate::durable::{create_exclusive, drop_cached, make_parent, sync_dir};
use crate::error::{Error, Result};
use crate::image::ImageRecord;
use crate::layer;
use crate::layout::{self, INDEX, Layout, RECIPE};
use crate::lease::{self, Attempt, Holder, Lease, Watch};
use crate::pack;
use crate::pack::thinned::record_path;
use crate::publisher::holds::{InProgress, Relied, lock};
use crate::reader::Store;
use crate::version::{Access, Features, Superblock};

mod collection;
mod digested;
mod holds;
mod ledger;
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
    if entries.any(|entry| entry.is_ok_and(|e| e.file_name() != "lost+found")) {
        return Err(Error::NotAStore {
            path: root.to_owned(),
            why: "it holds other files; choose an empty directory".into(),
        });
    }
    for dir in layout.directories() {
        fs::create_dir(&dir).map_err(|e| Error::io("create", &dir, e))?;
    }
    let superblock = Superblock { features: Features::default(), identity: rand::random() };
    create_exclusive(&layout.superblock(), &superblock.encode())?;
    sync_dir(root)
}

/// The right to write to one store.
#[derive(Debug)]
pub struct Publisher {
    store: Store,
    epoch: u64,
    lease: Mutex<Option<Lease>>,
    catalogue: Mutex<Catalogue>,
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
        let probe = store.layout().staging().join(format!("probe-{:016x}", rand::random::<u64>()));
        fs::write(&probe, b"").map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => Error::ReadOnly { path: root.to_owned(), source },
            _ => Error::io("write", root, source),
        })?;
        let _ = fs::remove_file(&probe);
        Ok(Candidate { store, me: Holder::this_process(name), watch: Watch::default(), start: Start::Sound })
    }

    /// Is content with what can still be read of the catalogue, should it be damaged.
    pub fn salvaging(self) -> Candidate {
        Candidate { start: Start::Salvaged, ..self }
    }

    /// Looks once whether the store is free, and takes it if so.
    pub fn attempt(&mut self) -> Result<Candidacy> {
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
        let (relied, in_progress) = (Arc::default(), Arc::default());
        let publisher = Publisher { store, epoch, lease: Mutex::new(Some(lease)), catalogue, relied, in_progress };
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

    /// The present state of the catalogue.
    pub fn catalogue(&self) -> Catalogue {
        lock(&self.catalogue).clone()
    }

    /// Commits `changes` as one new generation. Refused as [`Error::Missing`] if an image lacks a layer, its manifest or its
    /// config.
    pub fn commit(&self, changes: Vec<Change>) -> Result<u64> {
        self.commit_with(|_| Ok(changes))
    }

    /// Commits what `changes` makes of the present state, which stays as it is until then.
    pub fn commit_with(&self, changes: impl FnOnce(&Catalogue) -> Result<Vec<Change>>) -> Result<u64> {
        let mut catalogue = lock(&self.catalogue);
        self.check()?;
        let changes = changes(&catalogue)?;
        for change in &changes {
            if let Change::Set(image) = change {
                self.check_complete(image)?;
            }
        }
        let next = catalogue.next(self.epoch, changes);
        let number = next.generation;
        let path = self.store.layout().catalogue().join(format!("{number:016x}"));
        if !create_exclusive(&path, &next.encode()?)? {
            self.check()?;
            return Err(Error::corrupt("the catalogue", format!("generation {number} was written by somebody else")));
        }
        crash_point(CrashPoint::Committed);
        // Seen after the commit: whoever took over meanwhile started from a state without ours, or with it.
        self.check()?;
        let is_snapshot = next.tags.is_some();
        catalogue.apply(next)?;
        if is_snapshot {
            self.forget_generations_before(number.saturating_sub(SNAPSHOT_EVERY));
        }
        Ok(number)
    }

    /// Whether everything that an image refers to is in the store.
    fn check_complete(&self, image: &ImageRecord) -> Result<()> {
        let layout = self.store.layout();
        let blobs = [("manifest", image.manifest), ("config", image.config)];
        let blobs = blobs.map(|(kind, digest)| (kind, digest, layout.blob(&digest)));
        let layers = image.layers.iter().map(|layer| ("layer", layer.diff_id, layout.index(&layer.diff_id)));
        for (kind, digest, path) in blobs.into_iter().chain(layers) {
            if !path.try_exists().map_err(|e| Error::io("look up", &path, e))? {
                return Err(Error::Missing { what: format!("{kind} {digest} of {}", image.familiar_name()) });
            }
        }
        Ok(())
    }

    fn forget_generations_before(&self, oldest: u64) {
        let dir = self.store.layout().catalogue();
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(layout::number);
            if number.is_some_and(|n| n < oldest) {
                let _ = fs::remove_file(entry.path());
            }
        }
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
        fs::create_dir(&dir).map_err(|e| Error::io("create", &dir, e))?;
        let staging = Staging { dir, working, stopped: Stopped::default() };
        fs::create_dir(&layer).map_err(|e| Error::io("create", &layer, e))?;
        crash_point(CrashPoint::Staged);
        Ok(staging)
    }

    /// Makes a staged layer visible: verified by reading it back, then renamed into place.
    pub fn publish_layer(&self, staging: Staging, diff_id: &Digest, pack: Option<&ContentDigest>) -> Result<Published> {
        if self.store.has_layer(diff_id)? {
            return Ok(Published::AlreadyPresent);
        }
        self.claim(&staging, diff_id, pack)?;
        self.reveal(&staging, diff_id, pack)
    }

    /// Verifies a staged layer, and keeps it and the packs that it refers to from collections until its staging is over.
    fn claim(&self, staging: &Staging, diff_id: &Digest, pack: Option<&ContentDigest>) -> Result<()> {
        let mut hold = self.hold([*diff_id]);
        let used = staging.verify(diff_id, pack)?;
        crash_point(CrashPoint::LayerVerified);
        hold.claim(used.iter().copied());
        staging.working.keep(hold);
        used.iter().filter(|used| pack != Some(used)).try_for_each(|other| self.check_pack(other, diff_id))
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
        sync_dir(&staging.layer())?;
        let published = rename_into_place(&staging.layer(), &self.store.layout().layer(diff_id))?;
        crash_point(CrashPoint::LayerRenamed);
        Ok(published)
    }

    /// Renames a whole pack into place, over a thinned one if need be.
    fn publish_pack(&self, staging: &Staging, pack: &ContentDigest) -> Result<()> {
        let path = self.store.layout().pack(pack);
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

    /// Reads everything back, from the disk rather than from memory where the system allows. Gives the packs that the layer
    /// refers to.
    fn verify(&self, diff_id: &Digest, pack: Option<&ContentDigest>) -> Result<Vec<ContentDigest>> {
        if let Some(pack) = pack {
            drop_cached(&self.pack());
            pack::verify_until(&self.pack(), pack, &self.stopped.0)?;
        }
        drop_cached(&self.index());
        let index = fs::File::open(self.index()).map_err(|e| Error::io("read back", &self.index(), e))?;
        let (header, packs) = layer::check_sealed(index, diff_id)?;
        drop_cached(&self.recipe());
        match pack::digest_of(&self.recipe())? == header.recipe_digest {
            true => Ok(packs),
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

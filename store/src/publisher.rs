//! The only way into the store: stage, sync, verify by reading back, rename, sync the directory.
//!
//! A crash at any point leaves either nothing visible or the whole object: names appear by `rename(2)` or `link(2)` of complete,
//! synced files. Everything but the catalogue is named by digest, so publishing twice is the same as once, and two
//! publishers cannot harm each other. The order is packs, then the layer that refers to them, then blobs, then the
//! catalogue: nothing visible ever refers to something that is not.
//!
//! - `startup`: an image's startup pack on its way in.
//! - `quarantine`: damaged objects on their way out. `salvaged`: leading with what is left of a damaged catalogue.
//!
//! Locks: `catalogue` guards the committing of generations and is held across that commit's I/O, because commits must follow
//! each other; no reader takes it. `lease` guards the beat counter, likewise. Order: `catalogue`, then `lease`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::catalogue::{Catalogue, Change, SNAPSHOT_EVERY};
use crate::crash::{CrashPoint, crash_point};
use crate::digest::{ContentDigest, Digest};
use crate::durable::{create_exclusive, make_parent, sync_dir};
use crate::error::{Error, Result};
use crate::layer::{self, LayerIndex};
use crate::layout::{INDEX, Layout, RECIPE};
use crate::lease::{self, Attempt, Holder, Lease, Watch};
use crate::pack;
use crate::reader::Store;
use crate::version::{Access, Features, Superblock};

mod quarantine;
mod salvaged;
mod startup;

pub use crate::durable::write_synced;
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        let (catalogue, lost) = salvaged::first_state(&store, epoch, start)?;
        let catalogue = Mutex::new(catalogue);
        let publisher = Publisher { store, epoch, lease: Mutex::new(Some(lease)), catalogue };
        // The first generation of a new epoch is a fence: a stale leader that was about to commit this number loses.
        publisher.commit(Vec::new())?;
        crash_point(CrashPoint::Fenced);
        publisher.sweep_staging()?;
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

    /// Commits `changes` as one new generation.
    pub fn commit(&self, changes: Vec<Change>) -> Result<u64> {
        self.commit_on(|_| Ok(changes))
    }

    /// Commits what `changes` makes of the present state, which stays as it is until then.
    fn commit_on(&self, changes: impl FnOnce(&Catalogue) -> Result<Vec<Change>>) -> Result<u64> {
        let mut catalogue = lock(&self.catalogue);
        self.check()?;
        let next = catalogue.next(self.epoch, changes(&catalogue)?);
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

    fn forget_generations_before(&self, oldest: u64) {
        let dir = self.store.layout().catalogue();
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let number = name.to_str().filter(|n| n.len() == 16).and_then(|n| u64::from_str_radix(n, 16).ok());
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
        fs::create_dir(&dir).map_err(|e| Error::io("create", &dir, e))?;
        let staging = Staging { dir };
        fs::create_dir(&layer).map_err(|e| Error::io("create", &layer, e))?;
        crash_point(CrashPoint::Staged);
        Ok(staging)
    }

    /// Makes a staged layer visible: verified by reading it back, then renamed into place.
    pub fn publish_layer(&self, staging: Staging, diff_id: &Digest, pack: Option<&ContentDigest>) -> Result<Published> {
        let layout = self.store.layout();
        if self.store.has_layer(diff_id)? {
            return Ok(Published::AlreadyPresent);
        }
        staging.verify(diff_id, pack)?;
        crash_point(CrashPoint::LayerVerified);
        self.check()?;
        if let Some(pack) = pack {
            rename_into_place(&staging.pack(), &layout.pack(pack))?;
            crash_point(CrashPoint::PackRenamed);
        }
        sync_dir(&staging.layer())?;
        let published = rename_into_place(&staging.layer(), &layout.layer(diff_id))?;
        crash_point(CrashPoint::LayerRenamed);
        Ok(published)
    }

    /// Removes work in progress of leaders that are no more. Our own is left alone.
    pub fn sweep_staging(&self) -> Result<()> {
        let dir = self.store.layout().staging();
        for entry in fs::read_dir(&dir).map_err(|e| Error::io("list", &dir, e))?.flatten() {
            let mine = format!("{:016x}-", self.epoch);
            if entry.file_name().to_str().is_some_and(|name| !name.starts_with(&mine)) {
                let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
            }
        }
        Ok(())
    }
}

/// A layer on its way into the store; dropped, it is removed.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
}

impl Staging {
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

    /// Reads everything back, from the disk rather than from memory where the system allows.
    fn verify(&self, diff_id: &Digest, pack: Option<&ContentDigest>) -> Result<()> {
        if let Some(pack) = pack {
            drop_cached(&self.pack());
            pack::verify(&self.pack(), pack)?;
        }
        let read = |path: PathBuf| {
            drop_cached(&path);
            fs::read(&path).map_err(|e| Error::io("read back", &path, e))
        };
        let index = LayerIndex::from_bytes(layer::unseal(&read(self.index())?, diff_id)?)?;
        match ContentDigest::of(&read(self.recipe())?) == index.header().recipe_digest {
            true => Ok(()),
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

/// Asks the system to forget its copy of a file's bytes, so that reading back reaches the disk. A hint.
fn drop_cached(path: &Path) {
    if let Ok(file) = File::open(path) {
        let _ = nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
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
mod tests;

//! Collections: the only way to remove objects from the store. One runs at a time.
//!
//! Removing is one `rename(2)` into `trash/<epoch>`, then unlinking at leisure. The rename happens under the
//! catalogue's lock and the lock of what is relied on, after a look at both and at the lease. So nothing that an image,
//! a startup record or a hold refers to is ever renamed, and whoever holds or commits afterwards finds the object gone.
//! No reader takes either lock, and a pull waits for one rename at most. `takeover` shows why a stale leader's rename
//! fails.
//!
//! Packs need one more rule, because layers refer to them without names in the catalogue. The caller has looked at the
//! index of **every** layer that the store has, referred to or not, after the collection began. Layers that get their
//! names later claim their packs before. Work that may have been told where pieces lie is waited for
//! ([`Collection::wait_for_work`]), after the database has forgotten the pieces and [`Collection::announce`] has told
//! all other databases to.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::catalogue::{Catalogue, Change};
use crate::chunk::ChunkRef;
use crate::crash::{CrashPoint, crash_point};
use crate::digest::{ContentDigest, Digest};
use crate::durable::{open_to_all, sync_dir, write_synced};
use crate::error::{Error, Result};
use crate::image::ImageRecord;
use crate::pack;
use crate::pack::thinned::{self, Thinned, record_path};
use crate::publisher::holds::{Relied, lock};
use crate::publisher::takeover::{is_in_use, remove_completely};
use crate::publisher::{Hold, Publisher};
use crate::reserve::with_reserve;

/// Something in the store that a collection may remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A layer's index and recipe, by diffID.
    Layer(Digest),
    /// A manifest, config or list of manifests.
    Blob(Digest),
    /// A pack.
    Pack(ContentDigest),
}

/// The result of an attempt to remove or thin an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// The object was removed or thinned.
    Done,
    /// The object is needed again.
    Needed,
    /// There is nothing to do: the object is gone, or as thin as it should be.
    Nothing,
}

/// A running collection: the right to remove objects. A publisher has one at a time.
#[derive(Debug)]
pub struct Collection<'a> {
    publisher: &'a Publisher,
    trash: PathBuf,
    lately: HashSet<Digest>,
    /// The number of a generation, and what its images refer to.
    referred: RefCell<(u64, HashSet<Digest>)>,
}

/// The digests that an image refers to: its layers, manifest, config, and what its name points to.
pub fn references(image: &ImageRecord) -> impl Iterator<Item = Digest> {
    image.layers.iter().map(|layer| layer.diff_id).chain([image.manifest, image.config, image.target])
}

impl Publisher {
    /// Keeps objects from being collected. Take the hold before looking whether they are there.
    pub fn hold(&self, digests: impl IntoIterator<Item = Digest>) -> Hold {
        let mut hold = Hold::new(&self.relied);
        hold.add(digests);
        hold
    }

    /// All digests that are held now.
    pub fn held(&self) -> HashSet<Digest> {
        lock(&self.relied).held()
    }

    /// Begins a collection; `None` if one is running.
    pub fn begin_collection(&self) -> Option<Collection<'_>> {
        let lately = lock(&self.relied).begin()?;
        let trash = self.store.layout().trash_of(self.epoch);
        Some(Collection { publisher: self, trash, lately, referred: RefCell::default() })
    }

    fn path_of(&self, object: &Object) -> PathBuf {
        let layout = self.store.layout();
        match object {
            Object::Layer(digest) => layout.layer(digest),
            Object::Blob(digest) => layout.blob(digest),
            Object::Pack(pack) => layout.pack(pack),
        }
    }
}

impl Drop for Collection<'_> {
    fn drop(&mut self) {
        lock(&self.publisher.relied).end();
    }
}

impl Collection<'_> {
    /// Digests that were held at some time since the last collection began. They may seem to be unreferenced for longer
    /// than they are.
    pub fn held_lately(&self) -> &HashSet<Digest> {
        &self.lately
    }

    /// Moves an object into the trash, unless it is needed: an image refers to it, it is held, or `also` says so.
    pub fn remove(&self, object: &Object, also: &dyn Fn(&Object) -> bool) -> Result<Removal> {
        let catalogue = lock(&self.publisher.catalogue);
        self.publisher.check()?;
        let relied = lock(&self.publisher.relied);
        if self.is_needed(object, &catalogue, &relied) || also(object) {
            return Ok(Removal::Needed);
        }
        let removal = self.discard(&self.publisher.path_of(object))?;
        if let Object::Pack(pack) = object {
            self.discard(&record_path(&self.publisher.store.layout().pack(pack)))?;
        }
        Ok(removal)
    }

    fn is_needed(&self, object: &Object, catalogue: &Catalogue, relied: &Relied) -> bool {
        match object {
            Object::Pack(pack) => relied.is_touched(pack) || catalogue.startups().any(|startup| startup.pack == *pack),
            Object::Layer(digest) | Object::Blob(digest) => {
                let mut referred = self.referred.borrow_mut();
                if referred.0 != catalogue.generation() {
                    let all = catalogue.images().flat_map(|image| references(image).collect::<Vec<_>>());
                    *referred = (catalogue.generation(), all.collect());
                }
                relied.is_held(digest) || referred.1.contains(digest)
            }
        }
    }

    /// Renames `path` into the trash.
    fn discard(&self, path: &Path) -> Result<Removal> {
        let grave = self.trash.join(format!("{:032x}", rand::random::<u128>()));
        let moved = with_reserve(self.publisher.store.layout(), || match fs::rename(path, &grave) {
            Err(e) if e.kind() == io::ErrorKind::StorageFull => Err(Error::io("remove", path, e)),
            moved => Ok(moved),
        });
        match moved? {
            Ok(()) => {
                crash_point(CrashPoint::Trashed);
                Ok(Removal::Done)
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::StaleNetworkFileHandle) => {
                if self.trash.exists() {
                    return Ok(Removal::Nothing);
                }
                self.publisher.check()?;
                let why = "its directory in trash/ is gone: restart the coordinator, which makes another";
                Err(Error::corrupt("this coordinator's right to delete", why))
            }
            Err(e) => Err(Error::io("remove", path, e)),
        }
    }

    /// Announces in the catalogue that packs are about to go, so that other coordinators forget where pieces lie.
    /// Returns the number of collections, which this coordinator's database must remember.
    pub fn announce(&self) -> Result<u64> {
        let mut number = 0;
        self.publisher.commit_with(|catalogue| {
            number = catalogue.collected() + 1;
            Ok(vec![Change::Collected(number)])
        })?;
        crash_point(CrashPoint::Announced);
        Ok(number)
    }

    /// Waits until all work that is being staged now is published or given up. Returns false if it is not after
    /// `patience`, or once `stop` returns true. Work that begins meanwhile is not waited for.
    pub fn wait_for_work(&self, patience: Duration, stop: &dyn Fn() -> bool) -> bool {
        self.publisher.in_progress.wait(patience, stop)
    }

    /// Replaces a pack by one that has only the chunks `live`, each where it was.
    pub fn thin(&self, name: ContentDigest, live: &[ChunkRef]) -> Result<Removal> {
        let path = self.publisher.store.layout().pack(&name);
        let mut offsets: Vec<u64> = live.iter().map(|chunk| chunk.offset).collect();
        offsets.sort_unstable();
        offsets.dedup();
        // The record alone proves nothing: a crash may have come before the pack was renamed.
        if let Some(known) = Thinned::beside(&path)?.filter(|known| known.live == offsets)
            && path.exists()
            && pack::digest_of(&path)? == known.digest
        {
            return Ok(Removal::Nothing);
        }
        let staging = self.publisher.stage()?;
        let thinned = match thinned::write(&path, name, live, &staging.pack()) {
            Err(error) if error.is_missing() && !path.exists() => return Ok(Removal::Nothing),
            thinned => thinned?,
        };
        open_to_all(&staging.pack())?;
        let record = staging.beside_pack();
        write_synced(&record, &thinned.encode())?;
        let _catalogue = lock(&self.publisher.catalogue);
        self.publisher.check()?;
        let relied = lock(&self.publisher.relied);
        if relied.is_touched(&name) {
            return Ok(Removal::Needed);
        }
        let put = |from: &Path, to: &Path| fs::rename(from, to).map_err(|e| Error::io("publish", to, e));
        put(&record, &record_path(&path))?;
        crash_point(CrashPoint::RecordRenamed);
        put(&staging.pack(), &path)?;
        crash_point(CrashPoint::Thinned);
        drop(relied);
        sync_dir(path.parent().unwrap_or(&path))?;
        Ok(Removal::Done)
    }

    /// Removes the record of a thinned pack that is gone.
    pub fn remove_stray_record(&self, pack: &ContentDigest) -> Result<Removal> {
        let _catalogue = lock(&self.publisher.catalogue);
        self.publisher.check()?;
        let path = self.publisher.store.layout().pack(pack);
        if path.exists() { Ok(Removal::Needed) } else { self.discard(&record_path(&path)) }
    }

    /// Unlinks what was moved into the trash. To be called now and then: until then nothing is freed. Returns what
    /// stays for now, because a client of a network file system still has it open.
    pub fn empty_trash(&self) -> Result<Vec<PathBuf>> {
        let (dir, mut in_use) = (&self.trash, Vec::new());
        for entry in fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))?.flatten() {
            match remove_completely(&entry.path()) {
                Err(error) if is_in_use(&error) => in_use.push(entry.path()),
                removed => removed?,
            }
            crash_point(CrashPoint::Freed);
        }
        Ok(in_use)
    }
}

#[cfg(test)]
mod tests;

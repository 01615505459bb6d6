//! The layers as registries sent them, compressed, as long as there is room: for the mirror.
//!
//! The store keeps layers unpacked, and compressing them again would not give the same bytes. So the mirror needs the
//! original ones to serve an image under its own digest. They are kept as they pass by while they are pulled, in a
//! directory on the coordinator's own disk, under their digest. The least recently used go when there is no room; all of it may
//! be lost at any moment. A file that has its name was verified.
//!
//! `entries` guards which blobs there are; it is not held while blobs are read or written.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use store::Digest;

/// The name of a blob that is not complete ends in this.
const PARTIAL: &str = ".partial";

#[derive(Debug, Clone, Copy)]
struct Entry {
    size: u64,
    used: SystemTime,
}

/// Original layers, by digest.
#[derive(Debug)]
pub struct BlobCache {
    directory: PathBuf,
    limit: u64,
    entries: Mutex<HashMap<Digest, Entry>>,
}

impl BlobCache {
    /// The cache in `directory`, which is made if need be, of at most `limit` bytes. A limit of 0 keeps nothing.
    pub fn open(directory: &Path, limit: u64) -> io::Result<BlobCache> {
        let mut entries = HashMap::new();
        if limit > 0 {
            fs::create_dir_all(directory)?;
        }
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let digest = entry.file_name().to_str().and_then(Digest::from_hex);
            match (digest, entry.metadata()) {
                (Some(digest), Ok(status)) => {
                    let used = status.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                    entries.insert(digest, Entry { size: status.len(), used });
                }
                // What was under way when the last coordinator died.
                _ => _ = fs::remove_file(entry.path()),
            }
        }
        let cache = BlobCache { directory: directory.to_owned(), limit, entries: Mutex::new(entries) };
        cache.make_room(0);
        Ok(cache)
    }

    /// A cache that keeps nothing.
    pub fn none() -> BlobCache {
        BlobCache { directory: PathBuf::new(), limit: 0, entries: Mutex::default() }
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(digest.hex())
    }

    /// Whether a blob is kept.
    pub fn has(&self, digest: &Digest) -> bool {
        self.entries.lock().contains_key(digest)
    }

    /// A kept blob and its size. It can be read to its end even if it has to go meanwhile.
    pub fn get(&self, digest: &Digest) -> Option<(File, u64)> {
        let now = SystemTime::now();
        let size = {
            let mut entries = self.entries.lock();
            let entry = entries.get_mut(digest)?;
            entry.used = now;
            entry.size
        };
        match File::open(self.path(digest)) {
            Ok(file) => {
                // For the order after a restart; a hint.
                let _ = file.set_modified(now);
                Some((file, size))
            }
            Err(_) => {
                self.entries.lock().remove(digest);
                None
            }
        }
    }

    /// Starts keeping a blob that is said to have `claimed` bytes; nothing if it is kept already or has no room.
    pub fn fill(self: &Arc<Self>, digest: Digest, claimed: u64) -> Option<Filling> {
        if claimed > self.limit || self.limit == 0 || self.has(&digest) {
            return None;
        }
        let path = self.directory.join(format!("{}-{:016x}{PARTIAL}", digest.hex(), rand::random::<u64>()));
        let file = File::options().write(true).create_new(true).open(&path);
        match file {
            Ok(file) => Some(Filling { cache: Arc::clone(self), digest, path, file: Some(file), written: 0 }),
            Err(error) => {
                tracing::warn!("blob {digest} is not kept for the mirror: {error}");
                None
            }
        }
    }

    /// Removes what was not used for longest until there is room for `more` bytes.
    fn make_room(&self, more: u64) {
        loop {
            let oldest = {
                let mut entries = self.entries.lock();
                let total: u64 = entries.values().map(|entry| entry.size).sum();
                if total.saturating_add(more) <= self.limit {
                    return;
                }
                let oldest = entries.iter().min_by_key(|(_, entry)| entry.used).map(|(digest, _)| *digest);
                oldest.inspect(|digest| _ = entries.remove(digest))
            };
            let Some(oldest) = oldest else { return };
            let _ = fs::remove_file(self.path(&oldest));
        }
    }
}

/// A blob on its way into the cache; dropped before its end, it leaves nothing.
#[derive(Debug)]
pub struct Filling {
    cache: Arc<BlobCache>,
    digest: Digest,
    path: PathBuf,
    file: Option<File>,
    written: u64,
}

impl Filling {
    /// Takes the next bytes. A failure ends the keeping and nothing else, and so does a blob that turns out to have no room.
    pub fn write(&mut self, bytes: &[u8]) {
        let Some(file) = &mut self.file else { return };
        if self.written + bytes.len() as u64 > self.cache.limit {
            self.file = None;
            return;
        }
        match file.write_all(bytes) {
            Ok(()) => self.written += bytes.len() as u64,
            Err(error) => {
                tracing::warn!("blob {} is not kept for the mirror: {error}", self.digest);
                self.file = None;
            }
        }
    }

    /// Keeps the blob, if all of it could be written: the caller has seen that the bytes have its digest.
    pub fn finish(mut self) {
        if self.file.take().is_none() {
            return;
        }
        self.cache.make_room(self.written);
        if fs::rename(&self.path, self.cache.path(&self.digest)).is_ok() {
            let entry = Entry { size: self.written, used: SystemTime::now() };
            self.cache.entries.lock().insert(self.digest, entry);
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        // A finished one has another name by now.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn put(cache: &Arc<BlobCache>, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        if let Some(mut filling) = cache.fill(digest, bytes.len() as u64) {
            bytes.chunks(3).for_each(|part| filling.write(part));
            filling.finish();
        }
        digest
    }

    fn files(directory: &Path) -> usize {
        fs::read_dir(directory).unwrap().count()
    }

    #[test]
    fn blobs_are_kept_up_to_the_limit_and_the_least_used_goes() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Arc::new(BlobCache::open(directory.path(), 25).unwrap());
        let (a, b) = (put(&cache, b"aaaaaaaaaa"), put(&cache, b"bbbbbbbbbb"));
        assert!(cache.get(&a).is_some());
        let c = put(&cache, b"cccccccccc");
        assert_eq!((cache.has(&a), cache.has(&b), cache.has(&c)), (true, false, true));
        assert!(!cache.has(&put(&cache, &[9; 26])), "what is larger than all is not kept");
        let (mut file, size) = cache.get(&c).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!((bytes.as_slice(), size), (&b"cccccccccc"[..], 10));
        assert_eq!(files(directory.path()), 2);
        let again = Arc::new(BlobCache::open(directory.path(), 25).unwrap());
        assert!(again.has(&a) && again.has(&c));
        let smaller = BlobCache::open(directory.path(), 10).unwrap();
        assert_eq!(usize::from(smaller.has(&a)) + usize::from(smaller.has(&c)), 1);
    }

    #[test]
    fn what_does_not_come_to_its_end_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Arc::new(BlobCache::open(directory.path(), 100).unwrap());
        let digest = Digest::of(b"whole");
        let mut filling = cache.fill(digest, 5).unwrap();
        filling.write(b"who");
        drop(filling);
        // Longer than it was said to be, and than there is room.
        let mut filling = cache.fill(digest, 5).unwrap();
        (0..11).for_each(|_| filling.write(&[1; 10]));
        filling.finish();
        assert!(!cache.has(&digest));
        fs::write(directory.path().join(format!("x{PARTIAL}")), b"left").unwrap();
        BlobCache::open(directory.path(), 100).unwrap();
        assert_eq!(files(directory.path()), 0);
        let none = Arc::new(BlobCache::open(&directory.path().join("none"), 0).unwrap());
        assert!(none.fill(digest, 5).is_none() && !directory.path().join("none").exists());
    }
}

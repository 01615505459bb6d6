//! A cache of layers as registries sent them, still compressed, for the mirror.
//!
//! The store keeps layers unpacked, and compressing them again would not give the same bytes. So the mirror needs the original bytes to
//! serve an image under its own digest. They are saved while they are pulled, in a directory on the coordinator's own disk, under their
//! digest. The least recently used are removed when space runs out, and the whole cache may be lost at any moment. A file under its final
//! name has been verified.
//!
//! `entries` guards the list of blobs; it is not held while blobs are read or written.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use store::Digest;

/// Suffix of the file name of an incomplete blob.
const PARTIAL: &str = ".partial";

#[derive(Debug, Clone, Copy)]
struct CachedBlob {
    size: u64,
    used: SystemTime,
}

/// Original layers, by digest.
#[derive(Debug)]
pub struct BlobCache {
    directory: PathBuf,
    limit: u64,
    entries: Mutex<HashMap<Digest, CachedBlob>>,
}

impl BlobCache {
    /// Opens the cache in `directory`, which is created if need be, with room for `limit` bytes. A limit of 0 keeps nothing.
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
                    entries.insert(digest, CachedBlob { size: status.len(), used });
                }
                // A download that was under way when the last coordinator died.
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

    /// Opens a cached blob, and returns it with its size. It can be read to its end even if it is evicted meanwhile.
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
                // Preserves the order of use across a restart; losing it is harmless.
                let _ = file.set_modified(now);
                Some((file, size))
            }
            Err(_) => {
                self.entries.lock().remove(digest);
                None
            }
        }
    }

    /// Starts caching a blob that should have `claimed` bytes. `None` if it is cached already, does not fit, or its file cannot be created.
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

    /// Removes the least recently used blobs until `more` bytes fit.
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

/// A blob that is being written to the cache. If it is dropped before [`Filling::finish`], nothing of it remains.
#[derive(Debug)]
pub struct Filling {
    cache: Arc<BlobCache>,
    digest: Digest,
    path: PathBuf,
    file: Option<File>,
    written: u64,
}

impl Filling {
    /// Writes the next bytes. If that fails, or the blob turns out not to fit, the blob is not cached; nothing else happens.
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

    /// Adds the blob to the cache if all of it was written. The caller must have verified that the bytes match the digest.
    pub fn finish(mut self) {
        if self.file.take().is_none() {
            return;
        }
        self.cache.make_room(self.written);
        if fs::rename(&self.path, self.cache.path(&self.digest)).is_ok() {
            let entry = CachedBlob { size: self.written, used: SystemTime::now() };
            self.cache.entries.lock().insert(self.digest, entry);
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        // A finished blob has been renamed by now.
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
        // Longer than announced, and larger than the cache.
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

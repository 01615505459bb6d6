//! For tests: a store in a temporary directory, a disk that fails on request, and a host on top of both.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use store::catalogue::Change;
use store::chunk::{self, CHUNK_TARGET, PIECE_SIZE};
use store::image::{ImageRecord, ImageRef, LayerRecord, Platform, RequestedBy};
use store::layer::{
    self, FileContent, InodeIndex, LayerFacts, LayerTree, Metadata, NodeKind, PieceSource, ROOT, S_IFCHR,
};
use store::pack::PackWriter;
use store::publisher::{self, Publisher, write_synced};
use store::reader::{Disk as StoreDisk, PosixDisk, Store};
use store::recipe::RecipeWriter;
use store::{ContentDigest, Digest};

use crate::content::cache::disk::Disk;
pub(crate) use crate::content::cache::disk::Limit;
use crate::content::cache::{Cache, DESCRIPTORS, Prefetch};
use crate::content::indexes::Indexes;
pub(crate) use crate::content::indexes::hash_file;
use crate::content::prefetch::Prefetcher;
pub(crate) use crate::filesystem::Filesystem;
use crate::filesystem::kernel_state::KernelState;
pub(crate) use crate::filesystem::node::{Attributes, Detail, Found, Lifetime, Node, ReplyRoom};
use crate::os::pool::Pools;
use crate::source::catalogue::CatalogueWatcher;
use crate::source::failure::{Failure, Result};
use crate::source::metrics::Metrics;
use crate::source::shared_store::SharedStore;
use crate::uplink::lease::roots::LinkedChains;
use crate::uplink::recorder::Recorder;

/// What lies at a path of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TreeEntry {
    Directory,
    Opaque,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    /// Another name of the file at that path of the same layer.
    Hardlink(String),
    Whiteout,
    /// Type bits, major, minor.
    Special(u32, u32, u32),
}

/// A layer as a list of paths; parents come first.
pub(crate) type Entries = Vec<(String, Metadata, TreeEntry)>;

/// Entries with plain metadata.
pub(crate) fn plain(entries: &[(&str, TreeEntry)]) -> Entries {
    entries
        .iter()
        .map(|(path, entry)| {
            ((*path).to_owned(), Metadata { permissions: 0o644, ..Metadata::default() }, entry.clone())
        })
        .collect()
}

/// A file entry.
pub(crate) fn file(content: &[u8]) -> TreeEntry {
    TreeEntry::File(content.to_vec())
}

/// Bytes that do not repeat themselves.
pub(crate) fn noise(len: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

struct LayerBuilder {
    tree: LayerTree,
    pack: PackWriter,
    placed: Vec<store::pack::Placed>,
    gathered: Vec<u8>,
}

impl LayerBuilder {
    fn append(&mut self, bytes: &[u8]) {
        self.placed.push(self.pack.append(&chunk::compress(bytes).unwrap()).unwrap());
    }

    fn flush(&mut self) {
        let gathered = std::mem::take(&mut self.gathered);
        if !gathered.is_empty() {
            self.append(&gathered);
        }
    }

    fn content(&mut self, bytes: &[u8]) -> FileContent {
        let mut pieces = Vec::new();
        if bytes.len() > PIECE_SIZE as usize {
            self.flush();
        }
        for piece in bytes.chunks(PIECE_SIZE as usize) {
            let chunk = self.placed.len() as u32;
            if piece.iter().all(|b| *b == 0) {
                pieces.push(PieceSource::Hole);
            } else if bytes.len() > PIECE_SIZE as usize {
                self.append(piece);
                pieces.push(PieceSource::Chunk { chunk, start: 0 });
            } else {
                pieces.push(PieceSource::Chunk { chunk, start: self.gathered.len() as u32 });
                self.gathered.extend_from_slice(piece);
                if self.gathered.len() >= CHUNK_TARGET {
                    self.flush();
                }
            }
        }
        FileContent { digest: ContentDigest::of(bytes), size: bytes.len() as u64, pieces }
    }

    fn find(&self, path: &str) -> InodeIndex {
        path.split('/')
            .filter(|name| !name.is_empty())
            .fold(ROOT, |at, name| self.tree.child(at, name.as_bytes()).unwrap())
    }

    fn add(&mut self, path: &str, metadata: &Metadata, entry: &TreeEntry) {
        if path.is_empty() {
            self.tree.set_metadata(ROOT, metadata.clone());
            if *entry == TreeEntry::Opaque {
                self.tree.set_opaque(ROOT);
            }
            return;
        }
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parent = self.find(parent);
        let kind = match entry {
            TreeEntry::Directory | TreeEntry::Opaque => NodeKind::Directory,
            TreeEntry::File(bytes) => NodeKind::File(self.content(bytes)),
            TreeEntry::Symlink(target) => NodeKind::Symlink(target.clone()),
            TreeEntry::Whiteout => NodeKind::Special(S_IFCHR, 0, 0),
            TreeEntry::Special(bits, major, minor) => NodeKind::Special(*bits, *major, *minor),
            TreeEntry::Hardlink(target) => {
                let target = self.find(target);
                return self.tree.link(parent, name.as_bytes(), target);
            }
        };
        let number = self.tree.insert(parent, name.as_bytes(), metadata.clone(), kind);
        if *entry == TreeEntry::Opaque {
            self.tree.set_opaque(number);
        }
    }
}

/// A store that can be written.
pub(crate) struct TestStore {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) publisher: Publisher,
}

impl TestStore {
    pub(crate) fn new() -> TestStore {
        let dir = tempfile::tempdir().unwrap();
        publisher::create(dir.path()).unwrap();
        let publisher = Publisher::open(dir.path(), "test").unwrap();
        TestStore { dir, publisher }
    }

    /// A store that is there already, with a new leader.
    pub(crate) fn in_directory(dir: tempfile::TempDir) -> TestStore {
        // Nobody renews the lease any more; waiting until that is certain would take long.
        std::fs::remove_dir_all(dir.path().join("lease")).unwrap();
        std::fs::create_dir(dir.path().join("lease")).unwrap();
        let publisher = Publisher::open(dir.path(), "test").unwrap();
        TestStore { dir, publisher }
    }

    /// Publishes a layer.
    pub(crate) fn layer(&self, entries: &Entries) -> Digest {
        self.layer_called(entries, Digest::of(format!("{entries:?}").as_bytes()))
    }

    /// Publishes a layer under the given diffID: for a large layer it would take long to derive one from the entries.
    pub(crate) fn layer_called(&self, entries: &Entries, diff_id: Digest) -> Digest {
        let staging = self.publisher.stage().unwrap();
        let pack = PackWriter::create(&staging.pack()).unwrap();
        let mut builder = LayerBuilder { tree: LayerTree::new(), pack, placed: Vec::new(), gathered: Vec::new() };
        for (path, metadata, entry) in entries {
            builder.add(path, metadata, entry);
        }
        builder.flush();
        let pack = builder.pack.finish().unwrap();
        let recipe = RecipeWriter::new(Vec::new()).unwrap().finish().unwrap();
        write_synced(&staging.recipe(), &recipe).unwrap();
        let recipe_digest = ContentDigest::of(&recipe);
        let facts = LayerFacts { diff_id, tar_size: 1, recipe_len: recipe.len() as u64, recipe_digest };
        let chunks: Vec<_> = builder.placed.iter().map(|placed| placed.in_pack(pack)).collect();
        let raw = builder.tree.encode(&facts, &chunks).unwrap();
        write_synced(&staging.index(), &layer::seal(&raw).unwrap()).unwrap();
        self.publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap();
        diff_id
    }

    /// Publishes an image of these layers, base first, under a tag; returns the chainID.
    pub(crate) fn image(&self, name: &str, diff_ids: &[Digest]) -> Digest {
        let reference: ImageRef = name.parse().unwrap();
        let layer = |diff_id: &Digest| LayerRecord {
            diff_id: *diff_id,
            size: 1,
            blob: *diff_id,
            blob_size: 1,
            media_type: "t".into(),
        };
        let document = format!("{diff_ids:?}");
        let config = Digest::of(document.as_bytes());
        self.publisher.put_blob(&config, document.as_bytes()).unwrap();
        let image = ImageRecord {
            repository: reference.canonical_repository(),
            tag: reference.tag().map(str::to_owned),
            target: config,
            manifest: config,
            media_type: "m".into(),
            config,
            platform: Platform::host(),
            layers: diff_ids.iter().map(layer).collect(),
            published_at: 1,
            ordered_by: RequestedBy::Operator,
        };
        let chain = image.chain_ids().last().copied().unwrap();
        self.publisher.commit(vec![Change::Set(Arc::new(image))]).unwrap();
        chain
    }

    /// Flips a bit in every pack.
    pub(crate) fn damage_packs(&self) {
        for path in files(&self.dir.path().join("packs")) {
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[20] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
    }
}

/// All files below a directory.
pub(crate) fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() { found.extend(files(&entry.path())) } else { found.push(entry.path()) }
    }
    found.sort();
    found
}

/// The cache files of a host's cache directory that hold files' content, not layers' indexes.
pub(crate) fn cached(cache: &Path) -> Vec<std::path::PathBuf> {
    let names = std::fs::read_dir(cache.join("indexes")).into_iter().flatten().flatten();
    let indexes: Vec<_> =
        names.filter_map(|name| Some(name.file_name().to_str()?.split_once('.')?.1.to_owned())).collect();
    let mut found = files(&cache.join("objects"));
    found.retain(|path| !indexes.iter().any(|index| path.ends_with(index)));
    found
}

/// How the shared disk behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    Good,
    Failing,
    Hanging,
    /// Each request panics, as a mistake in the daemon would make it.
    Panicking,
}

/// A shared disk that behaves as a test tells it.
pub(crate) struct FickleDisk {
    inner: PosixDisk,
    health: Mutex<Health>,
    changed: Condvar,
    /// A file of which nothing comes from an offset on.
    stuck: Mutex<Option<(PathBuf, u64)>>,
    pub(crate) chunk_reads: AtomicUsize,
    pub(crate) whole_reads: AtomicUsize,
}

impl FickleDisk {
    pub(crate) fn set(&self, health: Health) {
        *self.health.lock().unwrap() = health;
        self.changed.notify_all();
    }

    /// Has reads of one file hang from an offset on, while others are answered.
    pub(crate) fn stick(&self, stuck: Option<(PathBuf, u64)>) {
        *self.stuck.lock().unwrap() = stuck;
    }

    /// Files that were read as a whole.
    pub(crate) fn opens(&self) -> usize {
        self.whole_reads.load(Ordering::SeqCst)
    }

    fn pass(&self) -> io::Result<()> {
        let health = self.changed.wait_while(self.health.lock().unwrap(), |health| *health == Health::Hanging).unwrap();
        match *health {
            Health::Failing => Err(io::Error::from_raw_os_error(nix::errno::Errno::EIO as i32)),
            Health::Panicking => {
                drop(health);
                panic!("expected by this test")
            }
            _ => Ok(()),
        }
    }
}

impl StoreDisk for FickleDisk {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.whole_reads.fetch_add(1, Ordering::SeqCst);
        self.pass()?;
        self.inner.read(path)
    }

    fn read_at(&self, path: &Path, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.chunk_reads.fetch_add(1, Ordering::SeqCst);
        let is_stuck = |(stuck, from): &(PathBuf, u64)| stuck == path && offset >= *from;
        while self.stuck.lock().unwrap().as_ref().is_some_and(is_stuck) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.pass()?;
        self.inner.read_at(path, offset, len)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.pass()?;
        self.inner.list(dir)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.pass()?;
        self.inner.exists(path)
    }
}

/// How long reads wait in tests of things that never come.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(300);

/// One host's daemon without FUSE.
pub(crate) struct Host {
    pub(crate) disk: Arc<FickleDisk>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) cache: Arc<Cache>,
    pools: Pools,
    pub(crate) watcher: Arc<CatalogueWatcher>,
    pub(crate) indexes: Arc<Indexes>,
    pub(crate) prefetcher: Arc<Prefetcher>,
    linked: Arc<LinkedChains>,
    pub(crate) recorder: Arc<Recorder>,
    pub(crate) filesystem: Arc<Filesystem>,
}

impl Host {
    /// A daemon whose cache directory is `cache`, and which fetches nothing but what is asked for.
    pub(crate) fn start(store: &Path, cache: &Path, limit: Limit, timeout: Duration) -> Host {
        Host::start_with(store, cache, limit, timeout, Prefetch::Off)
    }

    /// A daemon whose cache directory is `cache`.
    pub(crate) fn start_with(store: &Path, cache: &Path, limit: Limit, timeout: Duration, prefetch: Prefetch) -> Host {
        let health = Mutex::new(Health::Good);
        let disk = FickleDisk {
            inner: PosixDisk::default(),
            health,
            changed: Condvar::new(),
            stuck: Mutex::default(),
            chunk_reads: AtomicUsize::new(0),
            whole_reads: AtomicUsize::new(0),
        };
        let disk = Arc::new(disk);
        let metrics = Arc::new(Metrics::default());
        let shared_store = SharedStore::new(store, timeout, Arc::clone(&metrics));
        if let Ok(opened) = Store::open_on(store, disk.clone()) {
            shared_store.preset(opened);
        }
        let (shared_store, pools) = (Arc::new(shared_store), Pools::new(4, 8));
        std::fs::create_dir_all(cache.join("indexes")).unwrap();
        let watcher = Arc::new(CatalogueWatcher::new(shared_store.clone(), pools.clone(), cache.join("catalogue")));
        let _ = shared_store.open().and_then(|store| watcher.update(store));
        let objects = Disk::new(cache.join("objects"), limit).unwrap();
        let recorder = Arc::new(Recorder::new(cache.join("traces")));
        let cache_of_files =
            Arc::new(Cache::new(shared_store.clone(), pools.clone(), objects, DESCRIPTORS, prefetch, recorder.clone()));
        let indexes = Indexes::new(cache.join("indexes"), shared_store.clone(), pools.clone(), cache_of_files.clone());
        let indexes = Arc::new(indexes);
        let prefetcher = Prefetcher::new(
            shared_store,
            pools.clone(),
            watcher.clone(),
            indexes.clone(),
            cache_of_files.clone(),
            recorder.clone(),
        );
        let prefetcher = Arc::new(prefetcher);
        let linked = Arc::new(LinkedChains::new(cache, pools.clone()));
        let filesystem = Filesystem::new(
            watcher.clone(),
            indexes.clone(),
            cache_of_files.clone(),
            prefetcher.clone(),
            linked.clone(),
            timeout,
            cache,
        );
        let filesystem = Arc::new(filesystem);
        filesystem.hold_indexes();
        let cache = cache_of_files;
        Host { disk, pools, metrics, cache, watcher, indexes, prefetcher, linked, recorder, filesystem }
    }

    /// The same daemon, serving a mount that others have served before, or will.
    pub(crate) fn resuming(mut self, state: &Arc<KernelState>) -> Host {
        let filesystem = Filesystem::new(
            self.watcher.clone(),
            self.indexes.clone(),
            self.cache.clone(),
            self.prefetcher.clone(),
            self.linked.clone(),
            TIMEOUT * 100,
            Path::new("/"),
        );
        self.filesystem = Arc::new(filesystem.resume(state));
        self
    }

    /// Waits for an answer, ending requests whose time is up meanwhile, as the daemon's clock does.
    fn wait<T>(&self, receive: &std::sync::mpsc::Receiver<T>) -> T {
        loop {
            if let Ok(answer) = receive.recv_timeout(Duration::from_millis(5)) {
                return answer;
            }
            let now = Instant::now();
            let late = self.cache.expire(now) + self.indexes.expire(now) + self.watcher.expire(now);
            self.metrics.store_timeouts.add(late as u64);
        }
    }

    /// Looks for a newer catalogue.
    pub(crate) fn refresh_catalogue(&self) -> Result<()> {
        let (send, receive) = channel();
        let later = Instant::now() + Duration::from_secs(30);
        self.watcher.refresh(later, Box::new(move |refreshed| send.send(refreshed.map(drop)).unwrap()));
        self.wait(&receive)
    }

    pub(crate) fn lookup(&self, parent: Node, name: &[u8]) -> Result<Found> {
        let (send, receive) = channel();
        self.filesystem.lookup(parent, name, move |found| send.send(found).unwrap());
        self.wait(&receive)
    }

    /// Looks a path up from the root; symbolic links are not followed.
    pub(crate) fn find(&self, path: &str) -> Result<Attributes> {
        let mut attributes = self.filesystem.attributes(Node::ROOT)?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            attributes = match self.lookup(attributes.node, name.as_bytes())? {
                Found::Entry(attributes, _) => attributes,
                Found::Absent(_) => return Err(Failure::Absent),
            };
        }
        Ok(attributes)
    }

    pub(crate) fn node(&self, path: &str) -> Node {
        self.find(path).unwrap_or_else(|failure| panic!("{path}: {failure}")).node
    }

    pub(crate) fn read(&self, node: Node, offset: u64, len: usize) -> Result<Vec<u8>> {
        let (send, receive) = channel();
        self.filesystem.read(node, offset, len, move |result| send.send(result.map(<[u8]>::to_vec)).unwrap());
        self.wait(&receive)
    }

    /// Reads a whole file.
    pub(crate) fn content(&self, path: &str) -> Result<Vec<u8>> {
        let attributes = self.find(path)?;
        self.read(attributes.node, 0, attributes.size as usize + 1)
    }

    /// Lists a directory in calls of `room` entries each.
    pub(crate) fn list_by(&self, node: Node, room: usize) -> Result<Vec<(Vec<u8>, Node, u32)>> {
        let (mut listed, mut offset) = (Vec::new(), 0);
        loop {
            let (before, mut left) = (listed.len(), room);
            self.filesystem.list(node, offset, Detail::Attributes, &mut |entry| {
                if left == 0 {
                    return ReplyRoom::Full;
                }
                left -= 1;
                offset = entry.offset;
                let (attributes, _) = entry.attributes.unwrap();
                assert_eq!((attributes.node, attributes.mode & layer::S_IFMT), (entry.node, entry.file_type));
                listed.push((entry.name.to_vec(), entry.node, entry.file_type));
                ReplyRoom::Left
            })?;
            if listed.len() == before {
                return Ok(listed);
            }
        }
    }

    /// A directory's names but `.` and `..`.
    pub(crate) fn names(&self, path: &str) -> Vec<String> {
        let listed = self.list_by(self.node(path), usize::MAX).unwrap();
        assert_eq!((&listed[0].0[..], &listed[1].0[..]), (&b"."[..], &b".."[..]));
        listed[2..].iter().map(|(name, ..)| String::from_utf8_lossy(name).into_owned()).collect()
    }

    /// Waits until what was fetched has been written into the cache.
    pub(crate) fn settle(&self) {
        // A job that was just queued, such as reading ahead, has not begun a fetch yet.
        while !(self.cache.is_settled() && self.pools.remote.is_idle() && self.pools.local.is_idle()) {
            std::thread::yield_now();
        }
    }

    /// Requests for chunks that the shared disk has seen.
    pub(crate) fn requests(&self) -> usize {
        self.disk.chunk_reads.load(Ordering::SeqCst)
    }

    /// Chunks that came from the shared store.
    pub(crate) fn chunks(&self) -> u64 {
        self.metrics.chunks_fetched.get()
    }
}

//! Applies entries to a layer's tree, as Docker's overlay2 driver would extract them onto a disk.
//!
//! Docker works entry by entry, with system calls: an entry replaces whatever has its name, unless both are directories, and whatever an
//! entry needs must exist when it comes. So the order of entries matters, and is kept here. Paths are resolved inside the layer, as in a
//! chroot. `attributes`: what the kernel makes of an entry's attributes.

use store::layer::{FileContent, InodeIndex, LayerTree, Metadata, NodeKind, NodeView, ROOT, S_IFBLK, S_IFCHR, S_IFIFO};
use tokio_util::sync::CancellationToken;

use super::attributes::{self, ACCESS_ACL, CAPABILITY, On};
use super::bounds::{self, LargeLayerPermit};
use super::content::{FileWriter, Pieces};
use super::error::UnpackError;
use super::paths::Cleaned;
use super::tar::{Kind, TarEntry, TarReader, refused};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// The most symbolic links in one path: the kernel's limit.
const SYMLINKS_MAX: usize = 40;
/// Files are read in blocks of this size.
const BUFFER: usize = 64 << 10;

/// The tree that grows entry by entry.
pub(super) struct Apply<'a> {
    tree: LayerTree,
    buffer: Vec<u8>,
    stop: &'a CancellationToken,
    /// Entries so far, names looked up, bytes of holes and ranges of sparse files: see [`bounds`].
    entries: u64,
    steps: u64,
    holes: u64,
    ranges: u64,
    /// The permit of a large layer, once this layer is one.
    place: Option<LargeLayerPermit>,
}

/// A directory, and a name in it.
type Place<'a> = (InodeIndex, &'a [u8]);

impl<'a> Apply<'a> {
    /// Starts with an empty tree. Long operations end when `stop` is cancelled.
    pub(super) fn new(stop: &'a CancellationToken) -> Apply<'a> {
        let (tree, buffer) = (LayerTree::new(), Vec::new());
        Apply { tree, buffer, stop, entries: 0, steps: 0, holes: 0, ranges: 0, place: None }
    }

    /// The finished tree, and the permit for its memory if the layer is a large one.
    pub(super) fn into_tree(self) -> (LayerTree, Option<LargeLayerPermit>) {
        (self.tree, self.place)
    }

    /// Applies one entry, reading its content from `tar`.
    pub(super) fn entry<R: std::io::Read>(
        &mut self,
        entry: &TarEntry,
        tar: &mut TarReader<R>,
        pieces: &mut Pieces<'_>,
    ) -> Result<(), UnpackError> {
        if self.stop.is_cancelled() {
            return Err(UnpackError::Stopped);
        }
        self.entries += 1;
        self.apply(entry, tar, pieces)?;
        let len = self.tree.encoded_len(pieces.chunk_count());
        bounds::check_index(&self.tree, len, tar.at()).map_err(|why| refused(&entry.name, why))?;
        if len > bounds::SMALL_INDEX && self.place.is_none() {
            self.place = Some(bounds::wait_for_place(self.stop).ok_or(UnpackError::Stopped)?);
        }
        Ok(())
    }

    /// Counts a name lookup; an error if the layer has made too many.
    fn count_step(&mut self) -> Result<(), &'static str> {
        self.steps += 1;
        if self.steps > bounds::STEPS_BASE + bounds::STEPS_EACH * self.entries {
            Err("lies behind so many symbolic links, as others before it, that no image needs them")
        } else {
            Ok(())
        }
    }

    fn apply<R: std::io::Read>(
        &mut self,
        entry: &TarEntry,
        tar: &mut TarReader<R>,
        pieces: &mut Pieces<'_>,
    ) -> Result<(), UnpackError> {
        let refuse = |why: &str| refused(&entry.name, why);
        let mut path = Cleaned::new(&entry.name);
        if path.is_dot() {
            // Docker leaves the root as it is for an entry named ".", whatever its type. Only an entry named "/" sets the root's
            // attributes.
            return tar.ignore_content(entry);
        }
        path.check().map_err(refuse)?;
        let Some(name) = path.names.pop() else { return self.root(entry).map_err(refuse) };
        let parent = self.directory(&path.names).map_err(refuse)?;
        if name.starts_with(WHITEOUT) {
            self.whiteout(entry, parent, name).map_err(refuse)?;
            return tar.ignore_content(entry);
        }
        let place = (parent, name);
        match entry.kind {
            Kind::HardLink => self.hard_link(entry, place).map_err(refuse),
            Kind::File => self.file(entry, place, tar, pieces),
            _ => self.plain(entry, place).map_err(refuse),
        }
    }

    fn root(&mut self, entry: &TarEntry) -> Result<(), &'static str> {
        if entry.kind == Kind::Directory { self.merge(entry, ROOT) } else { Err("takes the place of the layer's root") }
    }

    /// Gives an existing directory the attributes of another entry. Extended attributes are added to those it has.
    fn merge(&mut self, entry: &TarEntry, directory: InodeIndex) -> Result<(), &'static str> {
        let metadata = attributes::metadata(entry, On::Directory, &self.tree.metadata(directory))?;
        self.tree.set_metadata(directory, metadata);
        Ok(())
    }

    /// Finds the directory at `names` and creates what is missing. A symbolic link on the way must lead somewhere.
    fn directory(&mut self, names: &[&[u8]]) -> Result<InodeIndex, &'static str> {
        let mut pending: Vec<Vec<u8>> = names.iter().rev().map(|name| name.to_vec()).collect();
        // The first elements of `pending` are the path's own names; those of links lie above them.
        let mut own = pending.len();
        let mut at = ROOT;
        let mut links = 0;
        while let Some(name) = pending.pop() {
            self.count_step()?;
            let is_own = pending.len() < own;
            own = own.min(pending.len());
            at = match self.step(at, &name) {
                None if is_own => self.tree.make_implicit(at, &name),
                None => return Err("lies behind a symbolic link to nothing"),
                Some(next) => match self.tree.kind(next) {
                    NodeView::Directory => next,
                    NodeView::Symlink(target) => {
                        links += 1;
                        if links > SYMLINKS_MAX {
                            return Err("lies behind a loop of symbolic links");
                        }
                        follow(at, &mut pending, target)
                    }
                    _ => return Err("lies below something that is not a directory"),
                },
            };
        }
        Ok(at)
    }

    fn step(&self, at: InodeIndex, name: &[u8]) -> Option<InodeIndex> {
        match name {
            b".." => Some(self.tree.parent(at)),
            name => self.tree.child(at, name),
        }
    }

    /// Finds the target of a hard link. Symbolic links on the way are followed, the last name is not.
    fn find(&mut self, names: &[&[u8]]) -> Result<Option<InodeIndex>, &'static str> {
        let mut pending: Vec<Vec<u8>> = names.iter().rev().map(|name| name.to_vec()).collect();
        let mut at = ROOT;
        let mut links = 0;
        while let Some(name) = pending.pop() {
            self.count_step()?;
            let Some(next) = self.step(at, &name) else { return Ok(None) };
            at = match self.tree.kind(next) {
                NodeView::Symlink(target) if !pending.is_empty() => {
                    links += 1;
                    if links > SYMLINKS_MAX {
                        return Ok(None);
                    }
                    follow(at, &mut pending, target)
                }
                _ => next,
            }
        }
        Ok(Some(at))
    }

    /// A whiteout hides a file of lower layers. Docker creates its device as soon as the entry comes. So a whiteout fails if the layer
    /// itself already has that name, and a later entry replaces it.
    fn whiteout(&mut self, entry: &TarEntry, parent: InodeIndex, name: &[u8]) -> Result<(), &'static str> {
        if name == OPAQUE {
            self.tree.set_opaque(parent);
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err("is a whiteout of nothing");
        }
        if self.tree.child(parent, hidden).is_some() {
            return Err("is a whiteout of what the layer itself has");
        }
        if self.tree.child(parent, name).is_some() && entry.kind != Kind::Directory {
            return Err("is a whiteout whose own name is that of a directory");
        }
        let (uid, gid) = attributes::owner(entry, &Metadata::default());
        let metadata = Metadata { uid, gid, ..Metadata::default() };
        self.tree.insert(parent, hidden, metadata, NodeKind::Special(S_IFCHR, 0, 0));
        Ok(())
    }

    fn hard_link(&mut self, entry: &TarEntry, (parent, name): Place<'_>) -> Result<(), &'static str> {
        let target = Cleaned::below_root(&entry.link);
        target.check()?;
        // Whatever has the link's name is removed first. It may be the target, or hold it.
        self.tree.remove(parent, name);
        let target = self.find(&target.names)?.ok_or("is a hard link to a file that the layer does not have")?;
        let on = match self.tree.kind(target) {
            NodeView::Directory => return Err("is a hard link to a directory"),
            NodeView::File => On::File,
            NodeView::Symlink(_) => On::Symlink,
            NodeView::Special(..) => On::Special,
        };
        self.tree.link(parent, name, target);
        // Copies no metadata for links without attributes of their own: there may be a hundred thousand of them.
        let changes = [CAPABILITY, ACCESS_ACL].iter().any(|name| self.tree.has_xattr(target, name));
        let plain = entry.xattrs.is_empty() && !changes;
        let old = if plain { self.tree.own_metadata(target) } else { self.tree.metadata(target) };
        let mut new = attributes::metadata(entry, on, &old)?;
        if on == On::Symlink {
            (new.permissions, new.mtime, new.mtime_nsec) = (old.permissions, old.mtime, old.mtime_nsec);
        }
        if plain {
            self.tree.set_own_metadata(target, &new);
        } else {
            self.tree.set_metadata(target, new);
        }
        Ok(())
    }

    /// Creates an entry that its header describes completely. An existing directory is kept if the entry is a directory, too.
    fn plain(&mut self, entry: &TarEntry, (parent, name): Place<'_>) -> Result<(), &'static str> {
        let old = self.tree.child(parent, name).filter(|old| self.tree.kind(*old) == NodeView::Directory);
        if let (Kind::Directory, Some(old)) = (entry.kind, old) {
            return self.merge(entry, old);
        }
        let (kind, on) = node_kind(entry)?;
        let metadata = attributes::metadata(entry, on, &Metadata::default())?;
        self.tree.insert(parent, name, metadata, kind);
        Ok(())
    }

    /// Counts what a sparse file asks for beyond its bytes: holes and ranges.
    fn count_sparse(&mut self, entry: &TarEntry) -> Result<(), &'static str> {
        let data: u64 = entry.data.iter().map(|(_, len)| *len).sum();
        self.holes = self.holes.saturating_add(entry.size.saturating_sub(data));
        self.ranges += entry.data.len() as u64;
        if self.holes > bounds::HOLES_MAX {
            return Err("is sparse, and makes the holes of the layer's files larger than 16 GiB");
        }
        // A layer's ordinary files have one range each, which the number of entries allows for.
        if entry.data.len() > 1 && self.ranges > bounds::RANGES_MAX + self.entries {
            Err("is sparse, and has more ranges, with those of the files before it, than a million")
        } else {
            Ok(())
        }
    }

    fn file<R: std::io::Read>(
        &mut self,
        entry: &TarEntry,
        (parent, name): Place<'_>,
        tar: &mut TarReader<R>,
        pieces: &mut Pieces<'_>,
    ) -> Result<(), UnpackError> {
        let metadata = attributes::metadata(entry, On::File, &Metadata::default());
        let metadata = metadata.map_err(|why| refused(&entry.name, why))?;
        self.count_sparse(entry).map_err(|why| refused(&entry.name, why))?;
        // The recipe needs the inode's number before the content is known.
        let number = self.tree.insert(parent, name, metadata, NodeKind::File(FileContent::empty()));
        let mut file = FileWriter::new(pieces, entry.size).map_err(|why| refused(&entry.name, why))?;
        self.buffer.resize(BUFFER, 0);
        for (offset, len) in &entry.data {
            file.zeros_to(*offset, self.stop)?;
            let mut crc = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64GoIso);
            let mut rest = *len;
            while rest > 0 {
                let n = rest.min(BUFFER as u64) as usize;
                tar.read(&mut self.buffer[..n])?;
                crc.update(&self.buffer[..n]);
                file.write(&self.buffer[..n])?;
                rest -= n as u64;
            }
            if *len > 0 {
                tar.content(number, (*offset, *len), crc.finalize(), &entry.name)?;
            }
        }
        file.zeros_to(entry.size, self.stop)?;
        let content = file.finish()?;
        self.tree.set_content(number, content);
        Ok(())
    }
}

/// Where a path continues when it meets a symbolic link in directory `at`. Puts the names of the link's target on `pending`.
fn follow(at: InodeIndex, pending: &mut Vec<Vec<u8>>, target: &[u8]) -> InodeIndex {
    let names = target.split(|b| *b == b'/').filter(|name| !matches!(*name, b"" | b"."));
    let first = pending.len();
    pending.extend(names.map(<[u8]>::to_vec));
    pending[first..].reverse();
    if target.first() == Some(&b'/') { ROOT } else { at }
}

fn node_kind(entry: &TarEntry) -> Result<(NodeKind, On), &'static str> {
    let (major, minor) = entry.device;
    Ok(match entry.kind {
        Kind::Directory => (NodeKind::Directory, On::Directory),
        Kind::Symlink if entry.link.is_empty() => return Err("is a symbolic link to nothing"),
        Kind::Symlink if entry.link.len() > 4095 => return Err("is a symbolic link to a path longer than 4095 bytes"),
        Kind::Symlink => (NodeKind::Symlink(entry.link.clone()), On::Symlink),
        Kind::CharDevice => (NodeKind::Special(S_IFCHR, major, minor), On::Special),
        Kind::BlockDevice => (NodeKind::Special(S_IFBLK, major, minor), On::Special),
        Kind::Fifo => (NodeKind::Special(S_IFIFO, 0, 0), On::Special),
        Kind::File | Kind::HardLink | Kind::Other(_) => return Err("has a type that Docker refuses"),
    })
}

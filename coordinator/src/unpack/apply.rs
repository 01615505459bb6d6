//! Entries onto a layer's tree, as Docker's overlay2 driver would extract them onto a disk.
//!
//! Where Docker's behaviour is the kernel's (a chown strips file capabilities, a symbolic link has no permissions of its own), the rule
//! is repeated here with its reason. Paths are resolved inside the layer, as in a chroot.

use std::collections::BTreeMap;

use store::layer::{FileContent, InodeIndex, LayerTree, Metadata, NodeKind, NodeView, ROOT, S_IFBLK, S_IFCHR, S_IFIFO};
use tokio_util::sync::CancellationToken;

use super::UnpackError;
use super::bounds::{self, LargePlace};
use super::content::{FileWriter, Pieces};
use super::paths;
use super::tar::{Entry, Kind, TarReader, refused};

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// As the kernel's limit for one path.
const SYMLINKS_MAX: usize = 40;
/// What a chown takes away.
const CAPABILITY: &[u8] = b"security.capability";
/// Go's last representable time in nanoseconds; Docker sets times outside its range to 1970.
const MTIME_MAX: i64 = i64::MAX / 1_000_000_000;
/// Files are read in pieces of this size.
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
    /// Held once the layer is a large one.
    place: Option<LargePlace>,
}

type Names<'a> = Vec<&'a [u8]>;

impl<'a> Apply<'a> {
    /// An empty tree; what takes long ends when told to stop.
    pub(super) fn new(stop: &'a CancellationToken) -> Apply<'a> {
        let (tree, buffer) = (LayerTree::new(), Vec::new());
        Apply { tree, buffer, stop, entries: 0, steps: 0, holes: 0, ranges: 0, place: None }
    }

    /// The finished tree, and the right to its memory.
    pub(super) fn into_tree(self) -> (LayerTree, Option<LargePlace>) {
        (self.tree, self.place)
    }

    /// Applies one entry, reading its content from `tar`.
    pub(super) fn entry<R: std::io::Read>(
        &mut self,
        entry: &Entry,
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

    /// Counts a name that is looked up.
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
        entry: &Entry,
        tar: &mut TarReader<R>,
        pieces: &mut Pieces<'_>,
    ) -> Result<(), UnpackError> {
        let refuse = |why: &str| refused(&entry.name, why);
        let mut names = paths::split(&entry.name).map_err(refuse)?;
        let Some(name) = names.pop() else {
            if entry.kind == Kind::Directory {
                self.tree.set_metadata(ROOT, metadata(entry).map_err(refuse)?);
            }
            return tar.ignore_content(entry);
        };
        let parent = self.directory(&names).map_err(refuse)?;
        if name.starts_with(WHITEOUT) {
            self.whiteout(entry, parent, name).map_err(refuse)?;
            return tar.ignore_content(entry);
        }
        match entry.kind {
            Kind::HardLink => self.hard_link(entry, parent, name).map_err(refuse),
            Kind::File => self.file(entry, parent, name, tar, pieces),
            _ => {
                let kind = node_kind(entry).map_err(refuse)?;
                self.tree.insert(parent, name, metadata(entry).map_err(refuse)?, kind);
                Ok(())
            }
        }
    }

    /// The directory at `names`, made where it is missing.
    fn directory(&mut self, names: &Names<'_>) -> Result<InodeIndex, &'static str> {
        let mut pending: Vec<Vec<u8>> = names.iter().rev().map(|name| name.to_vec()).collect();
        let mut at = ROOT;
        let mut links = 0;
        while let Some(name) = pending.pop() {
            self.count_step()?;
            let Some(next) = self.step(at, &name) else {
                at = self.tree.make_implicit(at, &name);
                continue;
            };
            match self.tree.kind(next) {
                NodeView::Directory => at = next,
                NodeView::Symlink(target) => {
                    links += 1;
                    if links > SYMLINKS_MAX {
                        return Err("lies behind a loop of symbolic links");
                    }
                    (at, pending) = follow(at, pending, target);
                }
                _ if self.tree.is_whiteout(next) => at = self.tree.make_implicit(at, &name),
                _ => return Err("lies below something that is not a directory"),
            }
        }
        Ok(at)
    }

    fn step(&self, at: InodeIndex, name: &[u8]) -> Option<InodeIndex> {
        match name {
            b".." => Some(self.tree.parent(at)),
            name => self.tree.child(at, name),
        }
    }

    /// What a hard link's target names. Symbolic links on the way are followed, the last name is not.
    fn find(&mut self, names: &Names<'_>) -> Result<Option<InodeIndex>, &'static str> {
        let mut pending: Vec<Vec<u8>> = names.iter().rev().map(|name| name.to_vec()).collect();
        let mut at = ROOT;
        let mut links = 0;
        while let Some(name) = pending.pop() {
            self.count_step()?;
            let Some(next) = self.step(at, &name) else { return Ok(None) };
            match self.tree.kind(next) {
                NodeView::Symlink(target) if !pending.is_empty() => {
                    links += 1;
                    if links > SYMLINKS_MAX {
                        return Ok(None);
                    }
                    (at, pending) = follow(at, pending, target);
                }
                _ => at = next,
            }
        }
        Ok(Some(at))
    }

    fn whiteout(&mut self, entry: &Entry, parent: InodeIndex, name: &[u8]) -> Result<(), &'static str> {
        if name == OPAQUE {
            self.tree.set_opaque(parent);
            return Ok(());
        }
        if name.starts_with(WHITEOUT_META) {
            // Bookkeeping of AUFS (hard link directories); it has no meaning elsewhere.
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err("is a whiteout of nothing");
        }
        match self.tree.child(parent, hidden) {
            // A whiteout is about lower layers: what this layer itself has under the name stays, but hides them.
            Some(own) => {
                if self.tree.kind(own) == NodeView::Directory {
                    self.tree.set_opaque(own);
                }
            }
            None => {
                let metadata = Metadata { uid: entry.uid, gid: entry.gid, ..Metadata::default() };
                self.tree.insert(parent, hidden, metadata, NodeKind::Special(S_IFCHR, 0, 0));
            }
        }
        Ok(())
    }

    fn hard_link(&mut self, entry: &Entry, parent: InodeIndex, name: &[u8]) -> Result<(), &'static str> {
        // Docker joins the target to the root, so even one that climbs stays inside.
        let mut target = b"/".to_vec();
        target.extend_from_slice(&entry.link);
        let target =
            self.find(&paths::split(&target)?)?.ok_or("is a hard link to a file that the layer does not have")?;
        if self.tree.kind(target) == NodeView::Directory {
            return Err("is a hard link to a directory");
        }
        if self.tree.child(parent, name) != Some(target) {
            self.tree.link(parent, name, target);
        }
        let mut new = metadata(entry)?;
        if matches!(self.tree.kind(target), NodeView::Symlink(_)) {
            let old = self.tree.own_metadata(target);
            (new.permissions, new.mtime, new.mtime_nsec) = (old.permissions, old.mtime, old.mtime_nsec);
        }
        // The link's header sets the owner of the shared inode, and a chown takes file capabilities away.
        if new.xattrs.is_empty() && !self.tree.has_xattr(target, CAPABILITY) {
            self.tree.set_own_metadata(target, &new);
            return Ok(());
        }
        let mut xattrs = self.tree.metadata(target).xattrs;
        xattrs.remove(CAPABILITY);
        xattrs.append(&mut new.xattrs);
        check_xattrs(&xattrs)?;
        self.tree.set_metadata(target, Metadata { xattrs, ..new });
        Ok(())
    }

    /// Counts what a sparse file asks for beyond its bytes.
    fn count_sparse(&mut self, entry: &Entry) -> Result<(), &'static str> {
        let data: u64 = entry.data.iter().map(|(_, len)| *len).sum();
        self.holes = self.holes.saturating_add(entry.size.saturating_sub(data));
        self.ranges += entry.data.len() as u64;
        if self.holes > bounds::HOLES_MAX {
            return Err("is sparse, and makes the holes of the layer's files larger than 16 GiB");
        }
        // A layer's ordinary files have one range each, and are counted otherwise.
        if entry.data.len() > 1 && self.ranges > bounds::RANGES_MAX + self.entries {
            Err("is sparse, and has more ranges, with those of the files before it, than a million")
        } else {
            Ok(())
        }
    }

    fn file<R: std::io::Read>(
        &mut self,
        entry: &Entry,
        parent: InodeIndex,
        name: &[u8],
        tar: &mut TarReader<R>,
        pieces: &mut Pieces<'_>,
    ) -> Result<(), UnpackError> {
        let metadata = metadata(entry).map_err(|why| refused(&entry.name, why))?;
        self.count_sparse(entry).map_err(|why| refused(&entry.name, why))?;
        // The number is needed by the recipe before the content is known.
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

/// Where a path goes on when it meets a symbolic link in directory `at`.
fn follow(at: InodeIndex, mut pending: Vec<Vec<u8>>, target: &[u8]) -> (InodeIndex, Vec<Vec<u8>>) {
    let names = target.split(|b| *b == b'/').filter(|name| !matches!(*name, b"" | b"."));
    let names: Vec<_> = names.map(<[u8]>::to_vec).collect();
    pending.extend(names.into_iter().rev());
    (if target.first() == Some(&b'/') { ROOT } else { at }, pending)
}

fn node_kind(entry: &Entry) -> Result<NodeKind, &'static str> {
    Ok(match entry.kind {
        Kind::Directory => NodeKind::Directory,
        Kind::Symlink if entry.link.is_empty() => return Err("is a symbolic link to nothing"),
        Kind::Symlink if entry.link.len() > 4095 => return Err("is a symbolic link to a path longer than 4095 bytes"),
        Kind::Symlink => NodeKind::Symlink(entry.link.clone()),
        Kind::CharDevice => NodeKind::Special(S_IFCHR, entry.device.0, entry.device.1),
        Kind::BlockDevice => NodeKind::Special(S_IFBLK, entry.device.0, entry.device.1),
        Kind::Fifo | Kind::File | Kind::HardLink => NodeKind::Special(S_IFIFO, 0, 0),
    })
}

fn metadata(entry: &Entry) -> Result<Metadata, &'static str> {
    let is_symlink = entry.kind == Kind::Symlink;
    let (mtime, mtime_nsec) = match is_symlink || (0..=MTIME_MAX).contains(&entry.mtime) {
        true => (entry.mtime, entry.mtime_nsec),
        false => (0, 0),
    };
    Ok(Metadata {
        permissions: if is_symlink { 0o777 } else { entry.mode },
        uid: entry.uid,
        gid: entry.gid,
        mtime,
        mtime_nsec,
        xattrs: xattrs(entry)?,
    })
}

/// The attributes that end up on the inode.
fn xattrs(entry: &Entry) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, &'static str> {
    let has_user = matches!(entry.kind, Kind::File | Kind::Directory | Kind::HardLink);
    let mut kept = BTreeMap::new();
    for (name, value) in &entry.xattrs {
        if name.len() > bounds::XATTR_NAME_MAX || value.len() > bounds::XATTR_VALUE_MAX {
            return Err("has an extended attribute longer than the kernel allows");
        }
        // A layer must not steer overlayfs (redirects, metadata copies); and the kernel keeps user attributes only on
        // files and directories.
        let steers = name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
        if !steers && !name.is_empty() && (has_user || !name.starts_with(b"user.")) {
            kept.insert(name.clone(), value.clone());
        }
    }
    check_xattrs(&kept)?;
    Ok(kept)
}

/// Whether one inode may have all of these.
fn check_xattrs(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<(), &'static str> {
    let bytes: usize = xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
    if xattrs.len() > bounds::XATTRS_MAX || bytes > bounds::XATTR_BYTES_MAX {
        Err("has more than 512 extended attributes or 128 KiB of them, which no file system holds")
    } else {
        Ok(())
    }
}

//! The tree that a host must see for random layers: each layer as overlayfs keeps it on a disk, and all of them merged.
//!
//! The merge follows the definition (an upper entry replaces a lower one, directories join, a whiteout removes, an
//! opaque directory starts anew). It applies one layer after the other to one map, and shares nothing with the daemon,
//! which searches downwards.

use std::collections::{BTreeMap, BTreeSet};

use nix::sys::stat::makedev;
use tests::images::archive;
use tests::tree::{Entry, Ignore, Kind, RelativePath, Tree};

use super::model::{Attributes, Item, Layer, Node, parent};

/// A tree, and the paths whose times the tars do not contain.
pub(crate) struct Expected {
    pub(crate) tree: Tree,
    pub(crate) untold: BTreeSet<RelativePath>,
}

impl Expected {
    /// What the comparison must ignore.
    pub(crate) fn ignore(&self) -> Ignore {
        Ignore { directory_nlink: false, mtime_of: self.untold.clone(), ..Ignore::default() }
    }
}

/// One path of a tree under construction.
#[derive(Clone)]
struct Place<'a> {
    item: &'a Item,
    /// The inode, identified by the layer's number and the item's own path.
    inode: (usize, RelativePath),
    /// Whether it is a directory that several layers have.
    merged: bool,
}

/// The tree of a single layer: `layers/<diffID>`.
pub(crate) fn layer(layer: &Layer) -> Expected {
    let places = places(0, layer).into_iter().collect();
    finish(&places, View::Layer)
}

/// The merged tree of several layers, lowest first: `chains/<chainID>`.
pub(crate) fn chain(layers: &[Layer]) -> Expected {
    finish(&merge(layers), View::Chain { layers: layers.len() })
}

/// The layers without the whiteouts in directories that only one layer has. These hide nothing, and `docker build`
/// never makes them. The kernel's overlayfs lists their names although nothing is there; the mount does not.
pub(crate) fn without_vain_whiteouts(layers: &[Layer]) -> Vec<Layer> {
    let merged: BTreeSet<RelativePath> =
        merge(layers).into_iter().filter(|(_, place)| place.merged).map(|(path, _)| path).collect();
    let in_vain = |path: &RelativePath, item: &Item| {
        item.node == Node::Whiteout && parent(path).is_some_and(|parent| !merged.contains(parent))
    };
    layers.iter().map(|layer| layer.without(in_vain)).collect()
}

fn merge(layers: &[Layer]) -> BTreeMap<RelativePath, Place<'_>> {
    let mut places: BTreeMap<RelativePath, Place<'_>> = BTreeMap::new();
    for (number, layer) in layers.iter().enumerate() {
        for (path, place) in self::places(number, layer) {
            let lower = places.get(&path).map(|place| matches!(place.item.node, Node::Directory { .. }));
            let joins = matches!(place.item.node, Node::Directory { opaque: false }) && lower == Some(true);
            if !joins {
                places.retain(|below, _| !is_at_or_below(below, &path));
            }
            if place.item.node != Node::Whiteout {
                places.insert(path, Place { merged: joins, ..place });
            }
        }
    }
    places
}

fn is_at_or_below(path: &[u8], top: &[u8]) -> bool {
    path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

/// All names of a layer. A directory comes before its contents.
fn places(number: usize, layer: &Layer) -> Vec<(RelativePath, Place<'_>)> {
    let mut places = Vec::new();
    for (path, item) in &layer.items {
        for name in [path].into_iter().chain(&item.links) {
            places.push((name.clone(), Place { item, inode: (number, path.clone()), merged: false }));
        }
    }
    // A directory's path is a prefix of the paths below it, so it sorts before them.
    places.sort_by(|(one, _), (other, _)| one.cmp(other));
    places
}

#[derive(Clone, Copy, PartialEq)]
enum View {
    Layer,
    Chain { layers: usize },
}

fn finish(places: &BTreeMap<RelativePath, Place<'_>>, view: View) -> Expected {
    let mut tree = Tree::new();
    let mut untold = BTreeSet::from([Vec::new()]);
    let root = Item {
        node: Node::Directory { opaque: false },
        attributes: Attributes { mode: 0o755, owner: (0, 0), mtime: (0, 0), xattrs: BTreeMap::new() },
        implied: true,
        links: Vec::new(),
    };
    let merged = matches!(view, View::Chain { layers } if layers > 1);
    let root = Place { item: &root, inode: (usize::MAX, Vec::new()), merged };
    tree.insert(Vec::new(), entry(places, &Vec::new(), &root, view));
    for (path, place) in places {
        if place.item.implied || place.item.node == Node::Whiteout {
            untold.insert(path.clone());
        }
        tree.insert(path.clone(), entry(places, path, place, view));
    }
    Expected { tree, untold }
}

fn entry(places: &BTreeMap<RelativePath, Place<'_>>, path: &RelativePath, place: &Place<'_>, view: View) -> Entry {
    let Place { item, inode, merged } = place;
    let Attributes { mode, owner, mtime, xattrs } = &item.attributes;
    let kind = kind_of(&item.node);
    let mut entry = Entry {
        kind,
        listed_kind: None,
        mode: *mode,
        uid: owner.0,
        gid: owner.1,
        size: 0,
        mtime: mtime.0,
        mtime_nsec: mtime.1.into(),
        nlink: 1 + item.links.len() as u64,
        rdev: 0,
        target: None,
        xattrs: xattrs.clone(),
        content: None,
        hard_links: Vec::new(),
    };
    // The kernel allows `user.` attributes only on files and directories.
    if !matches!(kind, Kind::File | Kind::Directory) {
        entry.xattrs.retain(|name, _| !name.starts_with(b"user."));
    }
    match &item.node {
        Node::File(content) => {
            (entry.size, entry.content) = (content.len() as u64, Some(blake3::hash(content)));
            let same = places.iter().filter(|(_, other)| other.inode == *inode).map(|(path, _)| path.clone());
            let names: Vec<_> = same.collect();
            entry.hard_links = if names.len() > 1 { names } else { Vec::new() };
        }
        Node::Directory { opaque } => {
            if *opaque && view == View::Layer {
                entry.xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
            }
            // overlayfs reports 1 for merged directories. Otherwise subdirectories are counted, as on ext4.
            entry.nlink = if *merged { 1 } else { 2 + subdirectories(places, path) };
        }
        // Symbolic links have no permissions of their own on Linux.
        Node::Symlink(target) => {
            (entry.mode, entry.size, entry.target) = (0o777, target.len() as u64, Some(target.clone()))
        }
        Node::Device { number, .. } => entry.rdev = makedev(number.0.into(), number.1.into()),
        Node::Fifo => {}
        // overlayfs's own whiteout: a device 0:0 on which only the owner is set.
        Node::Whiteout => (entry.mode, entry.xattrs) = (0, BTreeMap::new()),
    }
    entry
}

fn kind_of(node: &Node) -> Kind {
    match node {
        Node::File(_) => Kind::File,
        Node::Directory { .. } => Kind::Directory,
        Node::Symlink(_) => Kind::Symlink,
        Node::Device { kind: archive::Kind::BlockDevice, .. } => Kind::BlockDevice,
        Node::Device { .. } | Node::Whiteout => Kind::CharDevice,
        Node::Fifo => Kind::Fifo,
    }
}

fn subdirectories(places: &BTreeMap<RelativePath, Place<'_>>, path: &RelativePath) -> u64 {
    let inside = |(inner, place): &(&RelativePath, &Place<'_>)| {
        matches!(place.item.node, Node::Directory { .. }) && parent(inner).unwrap_or_default() == path
    };
    places.iter().filter(inside).count() as u64
}

//! Random layers: their tars, and the trees that a host must see. Both are derived from the same items, and neither
//! uses the project's code.
//!
//! A layer grows step by step. Each step adds one entry below an existing directory. So every list of steps is a valid
//! layer, and a shorter list is a smaller layer, which allows failures to shrink.

use std::collections::BTreeMap;

use anyhow::Result;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::Index;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::oddities::noise;
use tests::tree::RelativePath;

/// The attributes that all entries have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// The type and content of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Node {
    File(Vec<u8>),
    Directory {
        opaque: bool,
    },
    Symlink(Vec<u8>),
    Device {
        kind: Kind,
        number: (u32, u32),
    },
    Fifo,
    /// Hides what lower layers have under this name.
    Whiteout,
}

/// One entry of a layer.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) node: Node,
    pub(crate) attributes: Attributes,
    /// Whether the tar implies the directory only by names below it, such as its opaque mark, and has no entry for it.
    pub(crate) implied: bool,
    /// Additional hard links to a file, which come later in the tar.
    pub(crate) links: Vec<RelativePath>,
}

/// One layer: items by path. Additional hard links are not items.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) items: BTreeMap<RelativePath, Item>,
    /// The paths in the order of their creation.
    order: Vec<RelativePath>,
    /// Whether directories come after everything else, deepest first, as some tools write them.
    directories_last: bool,
    /// The prefix of every name in the tar.
    prefix: &'static str,
}

/// The entry that a step adds.
#[derive(Debug, Clone)]
enum Shape {
    File(Vec<u8>),
    Directory {
        opaque: bool,
        implied: bool,
    },
    Symlink(Vec<u8>),
    Device {
        kind: Kind,
        number: (u32, u32),
    },
    Fifo,
    Whiteout,
    /// Another name of an earlier file.
    HardLink(Index),
}

/// One step: the parent directory, the name and the entry.
#[derive(Debug, Clone)]
struct Step {
    parent: Index,
    name: Vec<u8>,
    shape: Shape,
    attributes: Attributes,
}

/// One to four layers, lowest first.
pub(crate) fn layers() -> impl Strategy<Value = Vec<Layer>> {
    vec(layer(), 1..=4)
}

fn layer() -> impl Strategy<Value = Layer> {
    (vec(step(), 1..40), any::<bool>(), prop_oneof![Just(""), Just("./"), Just("/")])
        .prop_map(|(steps, directories_last, prefix)| grow(&steps, directories_last, prefix))
}

fn step() -> impl Strategy<Value = Step> {
    (any::<Index>(), name(), shape(), attributes()).prop_map(|(parent, name, shape, attributes)| Step {
        parent,
        name,
        shape,
        attributes,
    })
}

/// Mostly one of a few short names, so that layers overlap; sometimes any bytes, up to the longest name.
fn name() -> impl Strategy<Value = Vec<u8>> {
    let any_bytes = vec(any::<u8>(), 1..=255).prop_map(|mut bytes| {
        bytes.iter_mut().filter(|byte| matches!(**byte, 0 | b'/')).for_each(|byte| *byte = b'_');
        bytes
    });
    let strange = prop_oneof![Just("new\nline"), Just(" "), Just("-"), Just("..."), Just("\u{2603}"), Just("a.wh.b")];
    prop_oneof![
        8 => (b'a'..=b'f').prop_map(|letter| vec![letter]),
        2 => any_bytes,
        1 => strange.prop_map(|name| name.as_bytes().to_vec()),
    ]
    .prop_filter("names with a meaning of their own", |name| {
        !matches!(name.as_slice(), b"." | b"..") && !name.starts_with(b".wh.")
    })
}

fn shape() -> impl Strategy<Value = Shape> {
    let target = vec(1_u8..=255, 1..300);
    let number = (0_u32..4096, 1_u32..1_000_000);
    let kind = prop_oneof![Just(Kind::CharDevice), Just(Kind::BlockDevice)];
    prop_oneof![
        6 => content().prop_map(Shape::File),
        6 => (prop::bool::weighted(0.2), prop::bool::weighted(0.2))
            .prop_map(|(opaque, implied)| Shape::Directory { opaque, implied }),
        2 => target.prop_map(Shape::Symlink),
        1 => (kind, number).prop_map(|(kind, number)| Shape::Device { kind, number }),
        1 => Just(Shape::Fifo),
        3 => Just(Shape::Whiteout),
        3 => any::<Index>().prop_map(Shape::HardLink),
    ]
}

/// Sizes around the limits of pieces and chunks, some with holes of zeros.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let edge = prop_oneof![Just(4096_usize), Just(131_072), Just(262_144)];
    let size = prop_oneof![
        3 => 0_usize..200,
        2 => (edge, -2_isize..=2).prop_map(|(edge, by)| edge.saturating_add_signed(by)),
        1 => 0_usize..500_000,
    ];
    // There are few seeds, so that the same content occurs under several names and in several layers.
    (size, 0_u64..4, any::<Index>(), any::<Index>()).prop_map(|(size, seed, one, other)| {
        let mut bytes = if seed == 0 { vec![0; size] } else { noise(seed, size) };
        if size > 10_000 {
            let (one, other) = (one.index(size), other.index(size));
            bytes[one.min(other)..one.max(other)].fill(0);
        }
        bytes
    })
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let mode = prop_oneof![Just(0o644), Just(0o755), 0_u32..=0o7777];
    let owner = prop_oneof![Just(0), Just(1000), 0..=u32::MAX - 1];
    // The tar's own field ends at 8^11 seconds. Unit tests cover later times.
    let seconds = prop_oneof![Just(1_600_000_000), 0_i64..8_589_934_592];
    let nanoseconds = prop_oneof![Just(0), Just(999_999_999), 0_u32..1_000_000_000];
    let name = prop_oneof![
        "user\\.[a-z]{1,8}".prop_map(String::into_bytes),
        "trusted\\.[a-z]{1,8}".prop_map(String::into_bytes),
    ];
    // PAX treats an empty value as an absent record.
    let xattrs = btree_map(name, vec(any::<u8>(), 1..60), 0..3);
    let xattrs = prop_oneof![3 => Just(BTreeMap::new()), 1 => xattrs];
    (mode, (owner.clone(), owner), (seconds, nanoseconds), xattrs).prop_map(|(mode, owner, mtime, xattrs)| Attributes {
        mode,
        owner,
        mtime,
        xattrs,
    })
}

/// The parent directory of a path; `None` for entries in the root.
pub(crate) fn parent(path: &[u8]) -> Option<&[u8]> {
    path.iter().rposition(|byte| *byte == b'/').map(|slash| &path[..slash])
}

fn grow(steps: &[Step], directories_last: bool, prefix: &'static str) -> Layer {
    let mut layer = Layer { items: BTreeMap::new(), order: Vec::new(), directories_last, prefix };
    let mut directories: Vec<RelativePath> = vec![Vec::new()];
    let mut files: Vec<RelativePath> = Vec::new();
    let mut taken = std::collections::BTreeSet::new();
    for step in steps {
        let parent = &directories[step.parent.index(directories.len())];
        let mut path = parent.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(&step.name);
        // The whiteout's mark makes its name longer. A path must also fit the kernel's limit.
        let too_long = matches!(step.shape, Shape::Whiteout) && step.name.len() > 251 || path.len() > 3500;
        if too_long || !taken.insert(path.clone()) {
            continue;
        }
        let (node, implied) = match &step.shape {
            Shape::HardLink(_) if files.is_empty() => continue,
            Shape::HardLink(of) => {
                let first = &files[of.index(files.len())];
                layer.items.entry(first.clone()).and_modify(|item| item.links.push(path));
                continue;
            }
            Shape::File(content) => (Node::File(content.clone()), false),
            Shape::Directory { opaque, implied } => (Node::Directory { opaque: *opaque }, *implied),
            Shape::Symlink(target) => (Node::Symlink(target.clone()), false),
            Shape::Device { kind, number } => (Node::Device { kind: *kind, number: *number }, false),
            Shape::Fifo => (Node::Fifo, false),
            Shape::Whiteout => (Node::Whiteout, false),
        };
        match node {
            Node::Directory { .. } => directories.push(path.clone()),
            Node::File(_) => files.push(path.clone()),
            _ => {}
        }
        let item = Item { node, attributes: step.attributes.clone(), implied, links: Vec::new() };
        layer.items.insert(path.clone(), item);
        layer.order.push(path);
    }
    layer.settle();
    layer
}

impl Layer {
    /// Clears the mark `implied` of directories that nothing in the tar implies. A directory that stays implied gets
    /// the attributes of a plain mkdir by root, including the setgid bit that the kernel passes on to new directories.
    fn settle(&mut self) {
        let held: Vec<RelativePath> = self
            .items
            .iter()
            .flat_map(|(path, item)| {
                let own =
                    (!item.implied || matches!(item.node, Node::Directory { opaque: true })).then(|| path.clone());
                own.into_iter().chain(item.links.iter().cloned())
            })
            .collect();
        for (path, item) in &mut self.items {
            let below = [path, &b"/"[..]].concat();
            let opaque = matches!(item.node, Node::Directory { opaque: true });
            item.implied &= opaque || held.iter().any(|held| held.starts_with(&below));
        }
        // A directory's path sorts before the paths below it.
        for path in self.items.iter().filter(|(_, item)| item.implied).map(|(path, _)| path.clone()).collect::<Vec<_>>()
        {
            let above = parent(&path).map_or(0, |above| self.items[above].attributes.mode);
            // If directories come last, all were made through their children's names before they got their mode bits.
            let setgid = if self.directories_last { 0 } else { above & 0o2000 };
            let plain = Attributes { mode: 0o755 | setgid, owner: (0, 0), mtime: (0, 0), xattrs: BTreeMap::new() };
            self.items.entry(path).and_modify(|item| item.attributes = plain);
        }
    }

    /// The layer without the items that `unwanted` selects, none of which is a directory.
    pub(crate) fn without(&self, unwanted: impl Fn(&RelativePath, &Item) -> bool) -> Layer {
        let mut layer = self.clone();
        layer.items.retain(|path, item| !unwanted(path, item));
        layer.order.retain(|path| layer.items.contains_key(path));
        layer.settle();
        layer
    }

    /// The layer as a tar stream.
    pub(crate) fn tar(&self) -> Result<Vec<u8>> {
        let mut tar = Archive::new(Vec::new());
        let is_directory = |path: &RelativePath| matches!(self.items[path].node, Node::Directory { .. });
        let (mut last, first): (Vec<_>, Vec<_>) =
            self.order.iter().partition(|path| self.directories_last && is_directory(path));
        last.reverse();
        for path in first {
            self.entry(&mut tar, path)?;
        }
        for path in self.order.iter() {
            for link in &self.items[path].links {
                let header = self.header(Kind::HardLink, link, &self.items[path]);
                tar.add(&header.link([self.prefix.as_bytes(), path].concat()), "")?;
            }
        }
        for path in last {
            self.entry(&mut tar, path)?;
        }
        Ok(tar.finish()?)
    }

    fn entry(&self, tar: &mut Archive<Vec<u8>>, path: &RelativePath) -> Result<()> {
        let item = &self.items[path];
        match &item.node {
            Node::File(content) => tar.add(&self.header(Kind::File, path, item), content)?,
            Node::Directory { opaque } => {
                if !item.implied {
                    tar.add(&self.header(Kind::Directory, &[path, &b"/"[..]].concat(), item), "")?;
                }
                if *opaque {
                    let mark = [path, &b"/.wh..wh..opq"[..]].concat();
                    tar.add(&Header::new(Kind::File, [self.prefix.as_bytes(), &mark].concat()), "")?;
                }
            }
            Node::Symlink(target) => tar.add(&self.header(Kind::Symlink, path, item).link(target), "")?,
            Node::Device { kind, number } => tar.add(&self.header(*kind, path, item).device(number.0, number.1), "")?,
            Node::Fifo => tar.add(&self.header(Kind::Fifo, path, item), "")?,
            Node::Whiteout => {
                let at = parent(path).map_or(0, |parent| parent.len() + 1);
                let name = [&path[..at], b".wh.", &path[at..]].concat();
                tar.add(&self.header(Kind::File, &name, item), "")?;
            }
        }
        Ok(())
    }

    fn header(&self, kind: Kind, path: &[u8], item: &Item) -> Header {
        let attributes = &item.attributes;
        let header = Header::new(kind, [self.prefix.as_bytes(), path].concat())
            .mode(attributes.mode)
            .owner(attributes.owner.0.into(), attributes.owner.1.into())
            .mtime(attributes.mtime.0, attributes.mtime.1);
        attributes.xattrs.iter().fold(header, |header, (name, value)| header.xattr(name, value))
    }
}

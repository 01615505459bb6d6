//! The result of unpacking a layer by Docker and by this project: a tree, or a refusal.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use coordinator::unpack::{Expect, NoLocations, unpack_layer, write_layer_tar};
use nix::sys::stat::makedev;
use serde_json::json;
use store::Digest;
use store::layer::{Inode, InodeIndex, LayerIndex, ROOT, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT};
use store::publisher::Publisher;
use tests::docker::Docker;
use tests::images::archive::{Archive, Header, Kind};
use tests::tree::{self, Entry, RelativePath, Tree, snapshot};

/// The result of unpacking a layer.
pub(crate) enum Verdict {
    Made(Tree),
    Refused(String),
}

/// A dockerd that loads archives of many images, each with one layer.
pub(crate) struct Engine {
    docker: Docker,
    /// Seconds since the epoch, before anything was extracted. Later times do not come from a tar.
    pub(crate) began: i64,
}

impl Engine {
    pub(crate) fn start() -> Result<Self> {
        let began = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs().cast_signed() - 5;
        Ok(Self { docker: Docker::start()?, began })
    }

    /// Loads each layer as an image of its own. Docker stops at the first layer that it refuses, so the rest is sent again.
    pub(crate) fn load(&self, layers: &[&[u8]]) -> Result<Vec<Verdict>> {
        let mut verdicts = Vec::new();
        while verdicts.len() < layers.len() {
            let rest = &layers[verdicts.len()..];
            let answer = self.send(&images(rest)?)?;
            for layer in rest {
                let directory = self.extracted(layer);
                let Ok(directory) = directory else {
                    ensure!(answer.contains("errorDetail"), "Docker has no layer and no reason: {answer}");
                    verdicts.push(Verdict::Refused(answer));
                    break;
                };
                verdicts.push(Verdict::Made(snapshot(&directory)?));
            }
        }
        Ok(verdicts)
    }

    pub(crate) fn docker(&self) -> &Docker {
        &self.docker
    }

    fn extracted(&self, layer: &[u8]) -> Result<PathBuf> {
        let root = self.docker.data_root();
        let entry = root.join("image/overlay2/layerdb/sha256").join(Digest::of(layer).hex());
        let cache = std::fs::read_to_string(entry.join("cache-id"))?;
        Ok(root.join("overlay2").join(cache.trim()).join("diff"))
    }

    /// Sends `POST /images/load` without Docker's client, which takes longer to start than most layers take to load.
    fn send(&self, archive: &[u8]) -> Result<String> {
        let host = self.docker.host();
        let mut stream = UnixStream::connect(host.trim_start_matches("unix://"))?;
        let length = archive.len();
        write!(
            stream,
            "POST /images/load?quiet=1 HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\
             Content-Type: application/x-tar\r\nContent-Length: {length}\r\n\r\n"
        )?;
        stream.write_all(archive)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

/// A `docker save` archive with one image for each layer.
fn images(layers: &[&[u8]]) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    let mut manifest = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        let (config, tar) = (format!("{number}.json"), format!("{number}.tar"));
        let diff_id = Digest::of(layer).to_string();
        let document =
            json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [diff_id]}});
        archive.add(&Header::new(Kind::File, &config), document.to_string())?;
        archive.add(&Header::new(Kind::File, &tar), layer)?;
        manifest.push(json!({"Config": config, "RepoTags": null, "Layers": [tar]}));
    }
    archive.add(&Header::new(Kind::File, "manifest.json"), json!(manifest).to_string())?;
    Ok(archive.finish()?)
}

/// A store into which layers are unpacked.
pub(crate) struct Ours {
    publisher: Publisher,
    _directory: tempfile::TempDir,
}

impl Ours {
    pub(crate) fn new() -> Result<Self> {
        // In memory, because a store syncs several times for each layer.
        let directory = tempfile::tempdir_in("/dev/shm")?;
        store::publisher::create(directory.path())?;
        Ok(Self { publisher: Publisher::open(directory.path(), "tars")?, _directory: directory })
    }

    /// Unpacks a layer as a pull does. An accepted layer must be reproduced byte for byte.
    pub(crate) fn unpack(&self, layer: &[u8]) -> Result<Verdict> {
        let diff_id = Digest::of(layer);
        if let Err(error) = unpack_layer(&self.publisher, &NoLocations, layer, &Expect { diff_id }) {
            return Ok(Verdict::Refused(error.to_string()));
        }
        let mut back = Vec::new();
        write_layer_tar(self.publisher.store(), &diff_id, &mut back)?;
        ensure!(back == layer, "another tar comes back");
        tree_of(&self.publisher.store().index(&diff_id)?).map(Verdict::Made)
    }
}

/// The tree in a layer's index.
fn tree_of(index: &LayerIndex) -> Result<Tree> {
    let mut tree = Tree::new();
    let mut names: std::collections::BTreeMap<InodeIndex, Vec<RelativePath>> = Default::default();
    let mut pending = vec![(RelativePath::new(), ROOT)];
    while let Some((path, number)) = pending.pop() {
        let inode = index.inode(number)?;
        for entry in index.entries(&inode, 0) {
            let entry = entry?;
            let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
            pending.push(([&path[..], separator, &entry.name].concat(), entry.inode));
        }
        names.entry(number).or_default().push(path.clone());
        tree.insert(path, entry(index, &inode)?);
    }
    for mut paths in names.into_values().filter(|paths| paths.len() > 1) {
        paths.sort();
        for path in &paths {
            tree.get_mut(path).context("a name without an entry")?.hard_links.clone_from(&paths);
        }
    }
    Ok(tree)
}

fn entry(index: &LayerIndex, inode: &Inode) -> Result<Entry> {
    let kind = match inode.mode & S_IFMT {
        S_IFDIR => tree::Kind::Directory,
        S_IFLNK => tree::Kind::Symlink,
        S_IFCHR => tree::Kind::CharDevice,
        S_IFBLK => tree::Kind::BlockDevice,
        S_IFIFO => tree::Kind::Fifo,
        _ => tree::Kind::File,
    };
    let xattrs = index.xattrs(inode).map(|xattr| xattr.map(|(name, value)| (name.into_owned(), value.into_owned())));
    let target = if inode.is_symlink() { Some(index.link_target(inode)?.into_owned()) } else { None };
    let content = inode.is_file().then(|| blake3::Hash::from_bytes(*inode.content_digest().as_bytes()));
    Ok(Entry {
        kind,
        listed_kind: None,
        mode: inode.mode & 0o7777,
        uid: inode.uid,
        gid: inode.gid,
        size: inode.size,
        mtime: inode.mtime,
        mtime_nsec: inode.mtime_nsec.into(),
        nlink: inode.nlink.into(),
        rdev: makedev(inode.rdev_major.into(), inode.rdev_minor.into()),
        target,
        xattrs: xattrs.collect::<Result<_, _>>()?,
        content,
        hard_links: Vec::new(),
    })
}

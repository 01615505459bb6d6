//! The data-root's directory: its paths, and whether overlay2 can live there.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};
use store::Digest;

use super::error::{Error, Result};
use crate::docker::files;

/// Storage drivers whose directory in the data-root shows that dockerd uses them.
const OTHER_DRIVERS: [&str; 7] = ["aufs", "btrfs", "devicemapper", "fuse-overlayfs", "overlay", "vfs", "zfs"];

/// File systems, by `statfs` magic, on which overlayfs cannot have an upper directory.
const UNSUITED: [(i64, &str); 8] = [
    (0x794c_7630, "overlayfs"),
    (0x6573_5546, "a FUSE file system"),
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x0102_1997, "9p"),
    (0xf15f, "eCryptfs"),
    (0x4d44, "FAT"),
];

/// A directory that dockerd has, or will have, as its data-root.
#[derive(Debug, Clone)]
pub(super) struct Root {
    path: PathBuf,
}

impl Root {
    /// Takes `path` as it is.
    pub(super) fn at(path: &Path) -> Result<Root> {
        if !path.is_dir() {
            return Err(Error::NotADirectory { path: path.into() });
        }
        Ok(Root { path: path.canonicalize().map_err(|e| Error::io("open", path, e))? })
    }

    /// Takes `path` after checking that overlay2 can share layers there.
    pub(super) fn open(path: &Path) -> Result<Root> {
        let root = Root::at(path)?;
        root.check_driver()?;
        root.check_file_system(&root.path)?;
        if root.overlay().is_dir() {
            root.check_file_system(&root.overlay())?;
        }
        if is_remapped(&root.path) { Err(Error::Remapped { path: root.path }) } else { Ok(root) }
    }

    /// Whether dockerd, or this program, has kept images here with overlay2.
    pub(super) fn has_overlay2(&self) -> bool {
        self.image().is_dir()
    }

    /// Whether a dockerd has run here and kept its images in containerd: one with a graph driver makes a directory for them at
    /// its first start.
    pub(super) fn uses_containerd(&self) -> bool {
        !self.has_overlay2() && (self.volume_database().exists() || self.path.join("rootfs").is_dir())
    }

    fn check_driver(&self) -> Result<()> {
        let images = files::names(&self.path.join("image"))?;
        if images.iter().any(|name| name == "overlay2") {
            return Ok(());
        }
        let other = |driver: &&str| !files::names(&self.path.join(driver)).unwrap_or_default().is_empty();
        let driver =
            images.into_iter().next().or_else(|| OTHER_DRIVERS.iter().find(|d| other(d)).map(|d| (*d).to_owned()));
        match driver {
            Some(driver) => Err(Error::Driver { path: self.path.clone(), driver }),
            None => Ok(()),
        }
    }

    fn check_file_system(&self, path: &Path) -> Result<()> {
        let found = statfs(path).map_err(|e| Error::io("examine", path, e.into()))?.filesystem_type();
        match UNSUITED.iter().find(|(magic, _)| FsType(*magic) == found) {
            Some((_, kind)) => Err(Error::FileSystem { path: path.into(), kind }),
            None => Ok(()),
        }
    }

    /// Keeps other runs of this program out until the value is dropped.
    pub(super) fn lock(&self) -> Result<File> {
        let dir = File::open(&self.path).map_err(|e| Error::io("open", &self.path, e))?;
        dir.lock().map_err(|e| Error::io("lock", &self.path, e))?;
        Ok(dir)
    }

    /// The directory itself.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The list of what this program has put here.
    pub(super) fn owned(&self) -> PathBuf {
        self.path.join("cachefs-data-root.json")
    }

    /// The graph driver's directory.
    pub(super) fn overlay(&self) -> PathBuf {
        self.path.join("overlay2")
    }

    /// One layer in the graph driver, by cache-id.
    pub(super) fn overlay_layer(&self, cache_id: &str) -> PathBuf {
        self.overlay().join(cache_id)
    }

    /// The directory of short links.
    pub(super) fn links(&self) -> PathBuf {
        self.overlay().join("l")
    }

    fn image(&self) -> PathBuf {
        self.path.join("image/overlay2")
    }

    /// Names and tags.
    pub(super) fn repositories(&self) -> PathBuf {
        self.image().join("repositories.json")
    }

    /// The layer database.
    pub(super) fn layer_db(&self) -> PathBuf {
        self.image().join("layerdb")
    }

    /// One layer in the layer database, by chainID.
    pub(super) fn layer_entry(&self, chain: &Digest) -> PathBuf {
        self.layer_db().join("sha256").join(chain.hex())
    }

    /// Where layer database entries are written before they get their name.
    pub(super) fn staging(&self) -> PathBuf {
        self.layer_db().join("tmp/cachefs")
    }

    /// The read-write layers of containers.
    pub(super) fn container_layers(&self) -> PathBuf {
        self.layer_db().join("mounts")
    }

    /// Image configs, by image ID.
    pub(super) fn image_content(&self) -> PathBuf {
        self.image().join("imagedb/content/sha256")
    }

    /// What dockerd notes about images, by image ID.
    pub(super) fn image_metadata(&self) -> PathBuf {
        self.image().join("imagedb/metadata/sha256")
    }

    /// What dockerd knows about registries' blobs.
    pub(super) fn distribution(&self) -> PathBuf {
        self.image().join("distribution")
    }

    /// Blobs, by the diffID of their layer.
    pub(super) fn blobs_of_layers(&self) -> PathBuf {
        self.distribution().join("v2metadata-by-diffid/sha256")
    }

    /// DiffIDs, by the digest of their blob.
    pub(super) fn layers_of_blobs(&self) -> PathBuf {
        self.distribution().join("diffid-by-digest/sha256")
    }

    /// The containers' own descriptions.
    pub(super) fn containers(&self) -> PathBuf {
        self.path.join("containers")
    }

    /// The database that a running dockerd holds locked.
    pub(super) fn volume_database(&self) -> PathBuf {
        self.path.join("volumes/metadata.db")
    }

    /// BuildKit's databases, which name layers that its cache uses.
    pub(super) fn build_cache(&self) -> PathBuf {
        self.path.join("buildkit")
    }

    /// The directories that dockerd would make at its first start, with its modes.
    fn directories(&self) -> [(PathBuf, u32); 10] {
        [
            (self.overlay(), 0o710),
            (self.links(), 0o700),
            (self.path.join("image"), 0o700),
            (self.image_content(), 0o700),
            (self.image_metadata(), 0o700),
            (self.distribution(), 0o700),
            (self.blobs_of_layers(), 0o755),
            (self.layers_of_blobs(), 0o755),
            (self.layer_db().join("sha256"), 0o755),
            (self.layer_db().join("tmp"), 0o755),
        ]
    }

    /// Makes the directories that dockerd would make at its first start.
    pub(super) fn make_directories(&self) -> Result<()> {
        Ok(self.directories().iter().try_for_each(|(dir, mode)| files::make_dir(dir, *mode))?)
    }

    /// Removes those of the directories that are empty.
    pub(super) fn remove_directories(&self) -> Result<()> {
        for (dir, _) in self.directories() {
            for dir in dir.ancestors().take_while(|dir| *dir != self.path) {
                files::forget_empty(dir)?;
            }
        }
        Ok(())
    }
}

/// dockerd with `userns-remap` names its data-root `<uid>.<gid>`.
pub(super) fn is_remapped(path: &Path) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let name = path.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.split_once('.')).is_some_and(|(uid, gid)| number(uid) && number(gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_drivers_and_other_things_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let message = |path: &Path| Root::open(path).unwrap_err().to_string();
        assert!(message(&dir.path().join("none")).contains("is not a directory"));
        std::fs::create_dir_all(dir.path().join("image/zfs")).unwrap();
        assert!(message(dir.path()).contains("storage driver zfs"));
        std::fs::create_dir_all(dir.path().join("image/overlay2")).unwrap();
        Root::open(dir.path()).unwrap();
        let remapped = dir.path().join("165536.165536");
        std::fs::create_dir(&remapped).unwrap();
        assert!(message(&remapped).contains("remapped users"));
        assert!(message(Path::new("/proc/self/status")).contains("is not a directory"));
    }
}

//! The mounts of this mount namespace, and how to detach them.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Where it is mounted.
    pub path: PathBuf,
    /// The file system's type, such as `fuse.cachefs` or `overlay`.
    pub kind: String,
    /// The source field. For FUSE this is the name that the daemon gave itself.
    pub source: String,
}

/// Every mount of this namespace, oldest first.
pub fn list() -> Result<Vec<MountPoint>> {
    let text = std::fs::read("/proc/self/mountinfo").context("cannot read the list of mounts")?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

fn parse(line: &[u8]) -> Option<MountPoint> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    Some(MountPoint {
        path: PathBuf::from(OsString::from_vec(unescape(fields.get(4)?))),
        kind: String::from_utf8_lossy(fields.get(dash + 1)?).into_owned(),
        source: String::from_utf8_lossy(&unescape(fields.get(dash + 2)?)).into_owned(),
    })
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(value) if byte == b'\\' => {
                out.push(value);
                rest = &tail[3..];
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

/// The topmost mount at exactly `path`, if there is one.
pub fn at(path: &Path) -> Result<Option<MountPoint>> {
    Ok(list()?.into_iter().rfind(|mount| mount.path == path))
}

/// Detaches everything mounted at or below `path`, deepest first. Mounts that cannot be detached are left.
pub fn detach_below(path: &Path) {
    let mut mounts = list().unwrap_or_default();
    mounts.retain(|mount| mount.path.starts_with(path));
    mounts.sort_by_key(|mount| std::cmp::Reverse(mount.path.components().count()));
    for mount in mounts {
        let _ = umount2(&mount.path, MntFlags::MNT_DETACH);
    }
}

/// An overlay, like a container's root. Unmounted when dropped.
#[derive(Debug)]
pub struct Overlay {
    directory: TempDir,
}

impl Overlay {
    /// Mounts a read-only overlay of `layers`, lowest first.
    pub fn mount(layers: &[PathBuf]) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("overlay-").tempdir()?;
        // An overlay without an upper directory needs at least two lower ones.
        let floor = directory.path().join("floor");
        let root = directory.path().join("root");
        std::fs::create_dir(&floor)?;
        std::fs::create_dir(&root)?;
        let mut lower = OsString::from("lowerdir=");
        for layer in layers.iter().rev() {
            lower.push(layer);
            lower.push(":");
        }
        lower.push(&floor);
        mount(Some("overlay"), &root, Some("overlay"), MsFlags::MS_RDONLY, Some(lower.as_os_str()))
            .with_context(|| format!("cannot mount an overlay of {} layers", layers.len()))?;
        Ok(Self { directory })
    }

    /// Mounts an overlay of one tree with an upper directory, and with these further options.
    pub fn writable(tree: &Path, options: &str) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("overlay-").tempdir()?;
        for name in ["upper", "work", "root"] {
            std::fs::create_dir(directory.path().join(name))?;
        }
        let at = directory.path().display();
        let all = format!("lowerdir={},upperdir={at}/upper,workdir={at}/work,{options}", tree.display());
        mount(Some("overlay"), &directory.path().join("root"), Some("overlay"), MsFlags::empty(), Some(all.as_str()))
            .with_context(|| format!("cannot mount an overlay with {options}"))?;
        Ok(Self { directory })
    }

    /// The merged root.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        detach_below(self.directory.path());
    }
}

/// A directory in which mounts made later are seen by programs that have their own mounts, as below the root of a machine with
/// systemd.
#[derive(Debug)]
pub struct SharedDirectory(PathBuf);

impl SharedDirectory {
    /// Shares what will be mounted below a directory.
    pub fn new(path: &Path) -> Result<SharedDirectory> {
        let none = None::<&str>;
        mount(Some(path), path, none, MsFlags::MS_BIND, none)?;
        let shared = SharedDirectory(path.to_owned());
        mount(none, path, none, MsFlags::MS_SHARED, none)?;
        Ok(shared)
    }
}

impl Drop for SharedDirectory {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_the_kernel_are_undone() {
        let line = br"36 35 0:50 / /a\040b\134c rw,noatime shared:1 - fuse.cachefs cache\011fs rw";
        let mount = parse(line).unwrap();
        assert_eq!(mount.path, Path::new("/a b\\c"));
        assert_eq!((mount.kind.as_str(), mount.source.as_str()), ("fuse.cachefs", "cache\tfs"));
    }
}

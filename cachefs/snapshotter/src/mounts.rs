//! What a container engine has to mount to see a snapshot.
//!
//! A snapshot on the local disk with its parents is an overlay, as containerd's own overlay snapshotter makes it. The first
//! shared parent ends the list of lower directories: its tree holds all that is below it. All lower directories are named
//! `ROOT/snapshots/<id>/fs`, shared ones too, so that containerd can shorten a long list by its common prefix.
//!
//! For a container in a user namespace, containerd gives the layers to the namespace's ids itself: no mount is idmapped here.
//!
//! A view of a shared tree alone is an overlay too, of the tree and an empty directory: the mount of the store itself is
//! nosuid and nodev, and a bind mount would be so for the container. Views of what lies on a shared tree end with the
//! empty directory as well, so that they have exactly one directory more than the view of their parent: BuildKit then
//! knows that this directory is all that a step has changed, and compares no trees.

use crate::directories::Directories;
use crate::metadata::Lineage;
use crate::record::{Kind, Record};

/// One mount, in containerd's terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The file system's type.
    pub kind: &'static str,
    /// What is mounted.
    pub source: String,
    /// Options as in fstab.
    pub options: Vec<String>,
}

/// What to mount for an active snapshot or a view. An overlay without an upper directory is read-only by itself.
pub fn mounts(directories: &Directories, lineage: &Lineage, overlay_options: &[String]) -> Vec<Mount> {
    let Lineage { record, parents } = lineage;
    let files = |record: &Record| directories.files(record.id).display().to_string();
    let mut options = Vec::new();
    let bind = |source: String, access: &str| {
        let options = vec![access.to_owned(), "rbind".to_owned()];
        vec![Mount { kind: "bind", source, options }]
    };
    let is_view = record.kind == Kind::View;
    let Some(nearest) = parents.first() else {
        return bind(files(record), if is_view { "ro" } else { "rw" });
    };
    let is_last = |record: &Record| record.shared.is_some();
    let end = parents.iter().position(is_last).map_or(parents.len(), |position| position + 1);
    let mut lower: Vec<String> = parents[..end].iter().map(files).collect();
    if is_view {
        if parents[..end].last().is_some_and(is_last) {
            lower.push(directories.empty().display().to_string());
        } else if lower.len() == 1 {
            return bind(files(nearest), "ro");
        }
    } else {
        options.push(format!("workdir={}", directories.work(record.id).display()));
        options.push(format!("upperdir={}", files(record)));
    }
    options.push(format!("lowerdir={}", lower.join(":")));
    options.extend_from_slice(overlay_options);
    vec![Mount { kind: "overlay", source: "overlay".to_owned(), options }]
}

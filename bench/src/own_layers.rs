//! An image's own layers on the local disk, as Docker's overlay2 keeps them: what cachefs is compared with.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use tests::cluster::Mount;
use tests::images::{self, ImageFiles};
use tests::process::run;

/// Copies the layers of an image from a mount into `directory`, with all attributes. Returns their paths, base first. Layers that
/// are there already are not copied again.
pub(crate) fn copy(mount: &Mount, image: &ImageFiles, directory: &Path) -> Result<Vec<PathBuf>> {
    let copy = |diff_id: &String| {
        let name = images::hex(diff_id);
        let copy = directory.join(name);
        if !copy.exists() {
            run(Command::new("cp").arg("-a").arg(mount.path().join("layers").join(name)).arg(&copy))?.ok()?;
        }
        Ok(copy)
    };
    image.diff_ids().iter().map(copy).collect()
}

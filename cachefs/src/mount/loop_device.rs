//! Loop devices: files as block devices, for kernels that mount EROFS from nothing else.
//!
//! `losetup` of util-linux attaches them. A device goes by itself when nobody uses it any more: it is detached as soon as the mount on
//! top of it is made or has failed, which takes effect when its last user has closed it. If the daemon is killed in between, the device
//! stays until somebody detaches it.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use erofs::BLOCK;

const LOSETUP: &str = "losetup";

/// A file that is a block device as long as anybody uses it. Detached when dropped.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Makes a file a device that can only be read, past the page cache: what is on top has one.
    pub fn attach(file: &Path) -> io::Result<LoopDevice> {
        let size = BLOCK.to_string();
        let options = ["--find", "--show", "--read-only", "--direct-io=on", "--sector-size", &size];
        let path = losetup(options.iter().map(OsStr::new).chain([file.as_os_str()]))?;
        Ok(LoopDevice { path: path.trim_end().into() })
    }

    /// The device's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The device's number.
    pub fn number(&self) -> io::Result<u64> {
        Ok(std::fs::metadata(&self.path)?.rdev())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = losetup([OsStr::new("--detach"), self.path.as_os_str()]) {
            tracing::warn!("{} stays: {error}", self.path.display());
        }
    }
}

/// Runs losetup; returns what it says.
fn losetup<'a>(arguments: impl IntoIterator<Item = &'a OsStr>) -> io::Result<String> {
    let ran = Command::new(LOSETUP).args(arguments).stdin(Stdio::null()).env("LC_ALL", "C").output();
    let output =
        ran.map_err(|error| io::Error::new(error.kind(), format!("{LOSETUP} (of util-linux) does not run: {error}")))?;
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

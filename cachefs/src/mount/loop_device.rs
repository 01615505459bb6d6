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
        let (said, failure) = losetup(options.iter().map(OsStr::new).chain([file.as_os_str()]))?;
        let device = said.lines().next().map(|path| LoopDevice { path: path.into() });
        // Older ones attach a device and then fail: it is detached when it is dropped.
        match (device, failure) {
            (Some(device), None) => Ok(device),
            (_, failure) => Err(io::Error::other(failure.unwrap_or_else(|| format!("{LOSETUP} names no device")))),
        }
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
        let why = match losetup([OsStr::new("--detach"), self.path.as_os_str()]) {
            Ok((_, failure)) => failure,
            Err(error) => Some(error.to_string()),
        };
        if let Some(why) = why {
            tracing::warn!("{} stays: {why}", self.path.display());
        }
    }
}

/// Runs losetup; returns what it says, and why it failed if it did.
fn losetup<'a>(arguments: impl IntoIterator<Item = &'a OsStr>) -> io::Result<(String, Option<String>)> {
    let ran = Command::new(LOSETUP).args(arguments).stdin(Stdio::null()).env("LC_ALL", "C").output();
    let output =
        ran.map_err(|error| io::Error::new(error.kind(), format!("{LOSETUP} (of util-linux) does not run: {error}")))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    Ok((text(&output.stdout), (!output.status.success()).then(|| text(&output.stderr))))
}

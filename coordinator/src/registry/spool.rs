//! An archive on its way in: unpacked and written to the coordinator's own disk, where it can be read in any order.

use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::path::{Path, PathBuf};

use store::crash::{CrashPoint, crash_point};

use crate::encoding::{Encoding, MAGIC_LEN};
use crate::registry::error::RegistryError;

/// How much is copied at once.
const BLOCK: usize = 256 << 10;

/// A spooled archive; dropped before [`Spool::keep`], it is removed.
#[derive(Debug)]
pub struct Spool {
    path: Option<PathBuf>,
}

impl Spool {
    /// The file.
    pub fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(""))
    }

    /// Leaves the file in place: from now on its jobs own it.
    pub fn keep(mut self) -> PathBuf {
        self.path.take().unwrap_or_default()
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Writes `upload` to `path`, unpacked if it is a compressed archive. Blocks.
pub fn spool(mut upload: impl BufRead, path: &Path) -> Result<Spool, RegistryError> {
    let spool = Spool { path: Some(path.to_owned()) };
    let written = |error: io::Error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => RegistryError::Archive {
            why: format!("the disk of {} is full: free space or move --state to a larger disk", path.display()),
        },
        _ => RegistryError::Archive { why: format!("cannot write {}: {error}", path.display()) },
    };
    let mut file = File::options().write(true).create_new(true).open(path).map_err(written)?;
    let read = |error: io::Error| RegistryError::Archive { why: error.to_string() };
    let mut head = Vec::with_capacity(MAGIC_LEN);
    (&mut upload).take(MAGIC_LEN as u64).read_to_end(&mut head).map_err(read)?;
    let encoding = Encoding::sniff(&head);
    let whole = (&head[..]).chain(upload);
    let mut bytes = encoding.unpack(whole).map_err(read)?;
    let mut block = vec![0; BLOCK];
    loop {
        match bytes.read(&mut block) {
            Ok(0) => break,
            Ok(count) => {
                file.write_all(&block[..count]).map_err(written)?;
                crash_point(CrashPoint::UploadArriving);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(read(error)),
        }
    }
    file.sync_all().map_err(written)?;
    // Its jobs will be on disk, and so must the name be that they know it by.
    let directory = path.parent().map(File::open).transpose().map_err(written)?;
    directory.map_or(Ok(()), |directory| directory.sync_all()).map_err(written)?;
    crash_point(CrashPoint::UploadSpooled);
    Ok(spool)
}

//! An uploaded archive, decompressed and written to the coordinator's own disk, where it can be read in any order.
//!
//! A few bytes may decompress to an endless stream. Zeros take no disk space, and the work stops when the sender disconnects.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use store::crash::{CrashPoint, crash_point};
use tokio_util::sync::CancellationToken;

use crate::registries::compression::{Compression, MAGIC_LEN};
use crate::registries::error::RegistryError;

/// Bytes copied at once.
const BLOCK: usize = 256 << 10;

/// A spooled archive. It is removed on drop, unless [`Spool::keep`] was called.
#[derive(Debug)]
pub struct Spool {
    path: Option<PathBuf>,
}

impl Spool {
    /// The path of the file.
    pub fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(""))
    }

    /// Leaves the file in place: from then on its jobs own it.
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

/// Writes `upload` to `path`, decompressed if it is a compressed archive, and syncs it. Fails once `stop` is cancelled. Blocks.
pub fn spool(mut upload: impl BufRead, path: &Path, stop: &CancellationToken) -> Result<Spool, RegistryError> {
    let spool = Spool { path: Some(path.to_owned()) };
    let written = |error: io::Error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => RegistryError::Archive {
            why: format!("the disk of {} is full: free space or move --state to a larger disk", path.display()),
        },
        _ => RegistryError::Archive { why: format!("cannot write {}: {error}", path.display()) },
    };
    let file = File::options().write(true).create_new(true).open(path).map_err(written)?;
    let read = |error: io::Error| RegistryError::Archive { why: error.to_string() };
    let mut head = Vec::with_capacity(MAGIC_LEN);
    (&mut upload).take(MAGIC_LEN as u64).read_to_end(&mut head).map_err(read)?;
    let encoding = Compression::sniff(&head);
    let whole = (&head[..]).chain(upload);
    let mut bytes = encoding.unpack(whole).map_err(read)?;
    let mut block = vec![0; BLOCK];
    let mut length = 0;
    loop {
        if stop.is_cancelled() {
            return Err(RegistryError::Archive { why: "whoever sent it has gone: send it again".to_owned() });
        }
        match bytes.read(&mut block) {
            Ok(0) => break,
            Ok(count) => {
                write_sparse(&file, &block[..count], length).map_err(written)?;
                length += count as u64;
                crash_point(CrashPoint::UploadArriving);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(read(error)),
        }
    }
    file.set_len(length).map_err(written)?;
    file.sync_all().map_err(written)?;
    // The archive's jobs will be on disk, and refer to it by this name. So the directory must be synced, too.
    let directory = path.parent().map(File::open).transpose().map_err(written)?;
    directory.map_or(Ok(()), |directory| directory.sync_all()).map_err(written)?;
    crash_point(CrashPoint::UploadSpooled);
    Ok(spool)
}

/// Writes bytes at offset `at`; if all are zero, a hole is left.
fn write_sparse(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    if bytes.iter().all(|byte| *byte == 0) { Ok(()) } else { file.write_all_at(bytes, at) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn zeros(count: usize) -> Vec<u8> {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
        for _ in 0..count {
            encoder.write_all(&[0; 1 << 20]).unwrap();
        }
        encoder.finish().unwrap()
    }

    #[test]
    fn zeros_take_no_room_and_are_zeros_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spool");
        let mut text = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        for part in [&[0; 900_000][..], b"text", &[0; 900_000]] {
            text.write_all(part).unwrap();
        }
        let stop = CancellationToken::new();
        spool(&text.finish().unwrap()[..], &path, &stop).unwrap().keep();
        let read = std::fs::read(&path).unwrap();
        assert!(read.len() == 1_800_004 && &read[900_000..900_004] == b"text");
        assert!(read.iter().filter(|byte| **byte != 0).count() == 4);
        std::fs::remove_file(&path).unwrap();
        let bomb = spool(&zeros(200)[..], &path, &stop).unwrap();
        let found = std::fs::metadata(bomb.path()).unwrap();
        assert_eq!((found.len(), found.blocks()), (200 << 20, 0));
    }

    #[test]
    fn nothing_is_unpacked_for_those_who_have_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("spool");
        let stop = CancellationToken::new();
        stop.cancel();
        let error = spool(&zeros(1)[..], &path, &stop).unwrap_err().to_string();
        assert!(error.contains("has gone") && !path.exists(), "{error}");
    }
}

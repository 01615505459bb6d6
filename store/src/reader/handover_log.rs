//! Reads the handover log that the last leader left.

use std::os::unix::fs::MetadataExt;

use crate::error::{Error, Result};
use crate::handover_log::{self, HandoverKey, HandoverLog, Seal};
use crate::layout::number;
use crate::reader::Store;

/// Identifies a state of the newest handover log; it changes with everything that is written to the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandoverExtent {
    epoch: u64,
    len: u64,
    /// A handover log that is rewritten is a new file, with another inode.
    inode: u64,
    written: (i64, i64),
}

impl Store {
    /// The newest leader's handover log; `None` if no leader has written one. Its records mean nothing to a host. With
    /// a `key`, only a log that was written with it is read.
    pub fn handover_log(&self, key: Option<HandoverKey>) -> Result<Option<HandoverLog>> {
        let Some(epoch) = self.handover_log_epoch()? else { return Ok(None) };
        let path = self.layout.handover_log(epoch);
        let bytes = self.disk.read(&path).map_err(|e| Error::io("read", &path, e))?;
        handover_log::decode(&self.handover_log_seal(epoch, key), &bytes).map(Some)
    }

    /// How far the newest handover log claims to go, if it is one without authentication.
    pub fn unauthenticated_handover_log(&self) -> Result<Option<handover_log::Position>> {
        Ok(self.handover_log(None)?.map(|handover_log| handover_log.position))
    }

    /// Whether the newest handover log claims to be authenticated. Anybody can have written that claim.
    pub fn handover_log_is_keyed(&self) -> Result<bool> {
        let Some(epoch) = self.handover_log_epoch()? else { return Ok(false) };
        let path = self.layout.handover_log(epoch);
        let bytes = self.disk.read(&path).map_err(|e| Error::io("read", &path, e))?;
        Ok(handover_log::is_keyed(&bytes))
    }

    /// What the entries of the handover log that the leader of `epoch` writes in this store are bound to.
    pub(crate) fn handover_log_seal(&self, epoch: u64, key: Option<HandoverKey>) -> Seal {
        Seal { identity: self.identity(), epoch, key }
    }

    /// The state of the newest handover log; while it stays the same, nothing was written. This does not read the log,
    /// but costs one request to the disk's server: an NFS client refreshes what it has cached of a file when it opens
    /// the file.
    pub fn handover_log_extent(&self) -> Result<Option<HandoverExtent>> {
        let Some(epoch) = self.handover_log_epoch()? else { return Ok(None) };
        let path = self.layout.handover_log(epoch);
        let status = std::fs::File::open(&path).and_then(|file| file.metadata());
        let status = status.map_err(|e| Error::io("look up", &path, e))?;
        let written = (status.mtime(), status.mtime_nsec());
        Ok(Some(HandoverExtent { epoch, len: status.len(), inode: status.ino(), written }))
    }

    /// The epoch of the newest leader that has written a handover log.
    pub fn handover_log_epoch(&self) -> Result<Option<u64>> {
        let dir = self.layout.handover_logs();
        let names = match self.disk.list(&dir) {
            Ok(names) => names,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("list", &dir, error)),
        };
        Ok(names.iter().filter_map(|name| number(name)).max())
    }
}

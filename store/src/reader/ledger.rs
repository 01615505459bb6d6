//! What the last leader left to the next one.

use std::os::unix::fs::MetadataExt;

use crate::error::{Error, Result};
use crate::layout::number;
use crate::ledger::{self, Ledger, LedgerKey, Seal};
use crate::reader::Store;

/// What changes when something is written to the newest ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LedgerExtent {
    epoch: u64,
    len: u64,
    /// A ledger that is rewritten is a new file.
    inode: u64,
    written: (i64, i64),
}

impl Store {
    /// The newest leader's ledger; nothing if no leader has written one. Its records say nothing to a host. With a `key`, only
    /// what was written with it is read.
    pub fn ledger(&self, key: Option<LedgerKey>) -> Result<Option<Ledger>> {
        let Some(epoch) = self.ledger_epoch()? else { return Ok(None) };
        let path = self.layout.ledger(epoch);
        let bytes = self.disk.read(&path).map_err(|e| Error::io("read", &path, e))?;
        ledger::decode(&self.ledger_seal(epoch, key), &bytes).map(Some)
    }

    /// How far the newest ledger says that it goes, if it is one without authentication.
    pub fn unauthenticated_ledger(&self) -> Result<Option<ledger::Position>> {
        Ok(self.ledger(None)?.map(|ledger| ledger.position))
    }

    /// Whether the newest ledger says that it is authenticated, whoever wrote that.
    pub fn ledger_is_keyed(&self) -> Result<bool> {
        let Some(epoch) = self.ledger_epoch()? else { return Ok(false) };
        let path = self.layout.ledger(epoch);
        let bytes = self.disk.read(&path).map_err(|e| Error::io("read", &path, e))?;
        Ok(ledger::is_keyed(&bytes))
    }

    /// What the entries of a leader's ledger of this store are bound to.
    pub(crate) fn ledger_seal(&self, epoch: u64, key: Option<LedgerKey>) -> Seal {
        Seal { identity: self.identity(), epoch, key }
    }

    /// The state of the newest ledger: while it stays, nothing was written. Costs no reading of it, but one question to the disk's
    /// server: what a client of NFS remembers of a file is looked at anew when it is opened.
    pub fn ledger_extent(&self) -> Result<Option<LedgerExtent>> {
        let Some(epoch) = self.ledger_epoch()? else { return Ok(None) };
        let path = self.layout.ledger(epoch);
        let status = std::fs::File::open(&path).and_then(|file| file.metadata());
        let status = status.map_err(|e| Error::io("look up", &path, e))?;
        let written = (status.mtime(), status.mtime_nsec());
        Ok(Some(LedgerExtent { epoch, len: status.len(), inode: status.ino(), written }))
    }

    /// The newest leader that has written a ledger.
    pub fn ledger_epoch(&self) -> Result<Option<u64>> {
        let dir = self.layout.ledgers();
        let names = match self.disk.list(&dir) {
            Ok(names) => names,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("list", &dir, error)),
        };
        Ok(names.iter().filter_map(|name| number(name)).max())
    }
}

//! What the last leader left to the next one.

use crate::error::{Error, Result};
use crate::layout::number;
use crate::ledger::{self, Ledger};
use crate::reader::Store;

impl Store {
    /// The newest leader's ledger; nothing if no leader has written one. Its records say nothing to a host.
    pub fn ledger(&self) -> Result<Option<Ledger>> {
        let Some(epoch) = self.ledger_epoch()? else { return Ok(None) };
        let path = self.layout.ledger(epoch);
        let bytes = self.disk.read(&path).map_err(|e| Error::io("read", &path, e))?;
        ledger::decode(epoch, &bytes).map(Some)
    }

    /// The epoch and the length of the newest ledger: while they stay, it has hardly changed. Costs no reading of it.
    pub fn ledger_extent(&self) -> Result<Option<(u64, u64)>> {
        let Some(epoch) = self.ledger_epoch()? else { return Ok(None) };
        let path = self.layout.ledger(epoch);
        let status = std::fs::metadata(&path).map_err(|e| Error::io("look up", &path, e))?;
        Ok(Some((epoch, status.len())))
    }

    fn ledger_epoch(&self) -> Result<Option<u64>> {
        let dir = self.layout.ledgers();
        let names = match self.disk.list(&dir) {
            Ok(names) => names,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("list", &dir, error)),
        };
        Ok(names.iter().filter_map(|name| number(name)).max())
    }
}

//! The leader's own ledger: appended to, rewritten when it has grown, never touched by anybody else.
//!
//! An entry is promised to somebody only after it is on disk and no higher epoch was found: whoever took over by then reads it,
//! because it took its epoch first and reads the ledger afterwards. What fails leaves the file's end in doubt; then the next
//! entry is a whole new file.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use crate::crash::{CrashPoint, crash_point};
use crate::durable::{make_own_parent, replace_synced};
use crate::error::{Error, Result};
use crate::layout::leading_number;
use crate::ledger::{LedgerKey, Position, RecordChange, Records, Seal, decode, encode_entry, encode_whole};
use crate::publisher::Publisher;
use crate::reserve::with_reserve;

/// A ledger is rewritten when its entries have outgrown its first one so many times,
const REWRITE_FACTOR: u64 = 2;
/// and this length.
const REWRITE_BYTES: u64 = 4 << 20;

/// Whether an entry must survive a power failure, and may be promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// It is on disk, and we lead, when the call returns.
    Kept,
    /// Soon.
    None,
}

/// The end of the ledger that this leader writes.
#[derive(Debug)]
pub struct LedgerWriter {
    publisher: Arc<Publisher>,
    seal: Seal,
    path: PathBuf,
    /// None until the file is made, and after a failure.
    file: Option<File>,
    entry: u64,
    /// Bytes of the first entry, and of those behind it.
    first: u64,
    appended: u64,
}

impl LedgerWriter {
    /// The ledger of `publisher`, which is not there yet.
    pub fn new(publisher: Arc<Publisher>, key: Option<LedgerKey>) -> LedgerWriter {
        let path = publisher.store.layout().ledger(publisher.epoch);
        let seal = publisher.store.ledger_seal(publisher.epoch, key);
        LedgerWriter { publisher, seal, path, file: None, entry: 0, first: 0, appended: 0 }
    }

    /// Whether the next entry must be the whole state: [`LedgerWriter::rewrite`].
    pub fn wants_all(&self) -> bool {
        self.file.is_none() || self.appended > REWRITE_BYTES.max(self.first * REWRITE_FACTOR)
    }

    /// Adds an entry; tells how far the ledger goes now.
    pub fn append(&mut self, changes: &[RecordChange], promise: Promise) -> Result<Position> {
        let bytes = encode_entry(&self.seal, self.entry + 1, changes)?;
        // Until it is whole again, its end is in doubt.
        let Some(mut file) = self.file.take() else {
            return Err(Error::corrupt(format!("ledger {}", self.path.display()), "its last entry is in doubt"));
        };
        let written = file.write_all(&bytes).and_then(|()| match promise {
            Promise::Kept => file.sync_data(),
            Promise::None => Ok(()),
        });
        written.map_err(|e| Error::io("write", &self.path, e))?;
        crash_point(CrashPoint::LedgerWritten);
        if promise == Promise::Kept {
            self.publisher.check()?;
            self.check_name(&file)?;
        }
        self.file = Some(file);
        self.entry += 1;
        self.appended += bytes.len() as u64;
        Ok(self.position())
    }

    /// Begins the file anew with one entry that holds `records`, on disk when this returns. Older leaders' ledgers go.
    pub fn rewrite(&mut self, records: &Records) -> Result<Position> {
        self.file = None;
        let bytes = encode_whole(&self.seal, self.entry + 1, records)?;
        make_own_parent(&self.path)?;
        self.close_to_others()?;
        with_reserve(self.publisher.store.layout(), || replace_synced(&self.path, &bytes))?;
        crash_point(CrashPoint::LedgerWritten);
        self.publisher.check()?;
        let opened = File::options().append(true).mode(0o600).open(&self.path);
        self.file = Some(opened.map_err(|e| Error::io("open", &self.path, e))?);
        self.entry += 1;
        (self.first, self.appended) = (bytes.len() as u64, 0);
        self.forget_older();
        Ok(self.position())
    }

    /// An entry in a file that has lost its name, or lacks bytes, is promised to nobody: the next leader would not find it.
    fn check_name(&self, file: &File) -> Result<()> {
        let found = fs::metadata(&self.path).map_err(|e| Error::io("look up", &self.path, e))?;
        let own = file.metadata().map_err(|e| Error::io("look up", &self.path, e))?;
        let len = self.first + self.appended;
        match (found.dev(), found.ino()) == (own.dev(), own.ino()) && own.len() >= len {
            true => Ok(()),
            false => Err(Error::corrupt(format!("ledger {}", self.path.display()), "somebody else has changed it")),
        }
    }

    /// Whether the file holds what was written to it, as the next leader would read it; an error says why it does not.
    pub fn verify(&self, records: &Records) -> Result<()> {
        let bytes = fs::read(&self.path).map_err(|e| Error::io("read", &self.path, e))?;
        let found = decode(&self.seal, &bytes)?;
        let why = match (found.torn, found.position == self.position(), found.records == *records) {
            (0, true, true) => return Ok(()),
            (1.., ..) => format!("{} bytes at its end cannot be read", found.torn),
            _ => "it does not hold what the coordinator's database holds".to_owned(),
        };
        Err(Error::corrupt(format!("ledger {}", self.path.display()), why))
    }

    /// The directory, which older software made as the umask was, is for coordinators alone.
    fn close_to_others(&self) -> Result<()> {
        let dir = self.publisher.store.layout().ledgers();
        let closed = fs::set_permissions(&dir, fs::Permissions::from_mode(0o700));
        closed.map_err(|e| Error::io("change the mode of", &dir, e))
    }

    /// The epoch of the leader that writes it.
    pub fn epoch(&self) -> u64 {
        self.publisher.epoch
    }

    fn position(&self) -> Position {
        Position { epoch: self.publisher.epoch, entry: self.entry }
    }

    /// Removes the ledgers of epochs before ours, and what crashes left of them.
    fn forget_older(&self) {
        let dir = self.publisher.store.layout().ledgers();
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let epoch = name.to_str().and_then(leading_number);
            if epoch.is_some_and(|epoch| epoch < self.publisher.epoch) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Attempt, Holder, Watch};
    use crate::ledger::{Ledger, apply};
    use crate::publisher::create;

    fn key(name: &str) -> (String, Vec<u8>) {
        ("table".to_owned(), name.as_bytes().to_vec())
    }

    fn put(name: &str, value: &str) -> RecordChange {
        RecordChange { key: key(name), value: Some(value.into()) }
    }

    fn read(publisher: &Publisher) -> Ledger {
        publisher.store().ledger(None).unwrap().unwrap()
    }

    fn lead(dir: &std::path::Path) -> Arc<Publisher> {
        Arc::new(Publisher::open(dir, "a").unwrap())
    }

    #[test]
    fn what_one_leader_wrote_the_next_one_reads() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path()).unwrap();
        let first = lead(dir.path());
        assert_eq!(first.store().ledger(None).unwrap(), None);
        let mut writer = LedgerWriter::new(Arc::clone(&first), None);
        assert!(writer.wants_all());
        assert!(writer.append(&[put("a", "0")], Promise::Kept).is_err(), "there is nothing to append to");
        writer.rewrite(&Records::from([(key("a"), b"1".to_vec())])).unwrap();
        writer.append(&[put("b", "2"), put("a", "3")], Promise::Kept).unwrap();
        let position = writer.append(&[RecordChange { key: key("b"), value: None }], Promise::None).unwrap();
        assert_eq!(position, Position { epoch: 1, entry: 3 });
        let ledger = read(&first);
        assert_eq!(ledger.records, Records::from([(key("a"), b"3".to_vec())]));
        assert_eq!((ledger.position, ledger.torn), (position, 0));
        first.release().unwrap();

        let second = lead(dir.path());
        assert_eq!(read(&second), ledger);
        let mut next = LedgerWriter::new(Arc::clone(&second), None);
        next.rewrite(&ledger.records).unwrap();
        assert_eq!(read(&second).position, Position { epoch: 2, entry: 1 });
        assert_eq!(fs::read_dir(dir.path().join("ledger")).unwrap().count(), 1, "the first one is gone");
    }

    #[test]
    fn a_ledger_that_has_grown_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path()).unwrap();
        let publisher = lead(dir.path());
        let mut writer = LedgerWriter::new(Arc::clone(&publisher), None);
        let (mut records, value) = (Records::new(), "x".repeat(100_000));
        writer.rewrite(&records).unwrap();
        let mut appended = 0;
        while !writer.wants_all() {
            let change = put(&format!("{}", appended % 3), &value);
            apply(&mut records, [change.clone()]);
            writer.append(&[change], Promise::None).unwrap();
            appended += 1;
        }
        assert!((30..60).contains(&appended), "{appended}");
        let path = dir.path().join("ledger/0000000000000001");
        let before = path.metadata().unwrap().len();
        writer.rewrite(&records).unwrap();
        assert!(path.metadata().unwrap().len() < before / 10);
        assert_eq!(read(&publisher).records, records);
        assert_eq!(read(&publisher).position.entry, appended + 2);
    }

    #[test]
    fn a_leader_that_was_replaced_promises_nothing_and_harms_nobody() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path()).unwrap();
        let old = lead(dir.path());
        let mut stale = LedgerWriter::new(Arc::clone(&old), None);
        stale.rewrite(&Records::from([(key("a"), b"old".to_vec())])).unwrap();
        // Its process lives, but another coordinator takes the next epoch.
        old.release().unwrap();
        let Attempt::Taken(_lease) = Watch::default()
            .attempt(old.store().layout(), &Holder::this_process("b"), std::time::Instant::now())
            .unwrap()
        else {
            panic!("a released lease is free");
        };
        assert!(matches!(stale.append(&[put("a", "late")], Promise::Kept), Err(Error::Fenced { .. })));
        assert!(matches!(stale.rewrite(&Records::new()), Err(Error::Fenced { .. })));
        let seal = old.store().ledger_seal(2, None);
        fs::write(dir.path().join("ledger/0000000000000002"), encode_whole(&seal, 1, &Records::new()).unwrap())
            .unwrap();
        assert_eq!(read(&old).position, Position { epoch: 2, entry: 1 });
    }

    #[test]
    fn damage_to_what_was_written_is_found_and_nothing_is_promised_in_a_lost_file() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path()).unwrap();
        let publisher = lead(dir.path());
        let secret = LedgerKey::derive(b"a long random word");
        let mut writer = LedgerWriter::new(Arc::clone(&publisher), secret);
        let records = Records::from([(key("a"), b"1".to_vec())]);
        writer.rewrite(&records).unwrap();
        writer.verify(&records).unwrap();
        assert!(publisher.store().ledger(None).is_err() && publisher.store().ledger(secret).unwrap().is_some());
        let path = dir.path().join("ledger/0000000000000001");
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(path.parent().unwrap().metadata().unwrap().mode() & 0o777, 0o700);
        let good = fs::read(&path).unwrap();
        for at in [0, 20, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            assert!(writer.verify(&records).unwrap_err().is_of_object(), "byte {at}");
        }
        fs::write(&path, [&good[..], b"more"].concat()).unwrap();
        assert!(writer.verify(&records).unwrap_err().to_string().contains("4 bytes at its end"));
        fs::write(&path, &good).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(writer.append(&[put("b", "2")], Promise::Kept).is_err(), "nobody would find it");
        assert!(writer.wants_all());
        writer.rewrite(&records).unwrap();
        writer.verify(&records).unwrap();
    }
}

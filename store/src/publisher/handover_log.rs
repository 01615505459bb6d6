//! The leader's own handover log: appended to, rewritten when it has grown, never touched by anybody else.
//!
//! An entry is promised to somebody only after it is on disk and no higher epoch was found. A leader that takes over
//! afterwards reads the entry, because it takes its epoch first and reads the handover log then. A failed write leaves
//! the file's end in doubt; the next entry is then a whole new file.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use crate::crash::{CrashPoint, crash_point};
use crate::durable::{make_own_parent, replace_synced};
use crate::error::{Error, Result};
use crate::handover_log::{HandoverKey, Position, RecordChange, Records, Seal, decode, encode_entry, encode_whole};
use crate::layout::leading_number;
use crate::publisher::Publisher;
use crate::reserve::with_reserve;

/// A handover log is rewritten when the entries after its first one are longer than this many times the first one, and
/// than [`REWRITE_BYTES`].
const REWRITE_FACTOR: u64 = 2;
/// Entries after the first one may always be this long in all, bytes; see [`REWRITE_FACTOR`].
const REWRITE_BYTES: u64 = 4 << 20;

/// Whether a change must survive a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// On disk before the call returns, which also shows that this coordinator leads.
    Synced,
    /// On disk soon. Until then it survives the end of the process, but no power failure.
    Eventual,
}

/// Writes this leader's handover log.
#[derive(Debug)]
pub struct HandoverLogWriter {
    publisher: Arc<Publisher>,
    seal: Seal,
    path: PathBuf,
    /// None until the file is made, and after a failure.
    file: Option<File>,
    entry: u64,
    /// Length of the file up to the end of its first entry, and of the entries after it, bytes.
    first: u64,
    appended: u64,
}

impl HandoverLogWriter {
    /// A writer for the handover log of `publisher`; the file is not there yet.
    pub fn new(publisher: Arc<Publisher>, key: Option<HandoverKey>) -> HandoverLogWriter {
        let path = publisher.store.layout().handover_log(publisher.epoch);
        let seal = publisher.store.handover_log_seal(publisher.epoch, key);
        HandoverLogWriter { publisher, seal, path, file: None, entry: 0, first: 0, appended: 0 }
    }

    /// Whether the next entry must be the whole state; see [`HandoverLogWriter::rewrite`].
    pub fn wants_all(&self) -> bool {
        self.file.is_none() || self.appended > REWRITE_BYTES.max(self.first * REWRITE_FACTOR)
    }

    /// Appends an entry; returns how far the handover log goes now.
    pub fn append(&mut self, changes: &[RecordChange], durability: Durability) -> Result<Position> {
        let bytes = encode_entry(&self.seal, self.entry + 1, changes)?;
        // The file is put back after the entry is written whole; until then its end is in doubt.
        let Some(mut file) = self.file.take() else {
            return Err(Error::corrupt(format!("handover log {}", self.path.display()), "its last entry is in doubt"));
        };
        let written = file.write_all(&bytes).and_then(|()| match durability {
            Durability::Synced => file.sync_data(),
            Durability::Eventual => Ok(()),
        });
        written.map_err(|e| Error::io("write", &self.path, e))?;
        crash_point(CrashPoint::HandoverLogWritten);
        if durability == Durability::Synced {
            self.publisher.check()?;
            self.check_name(&file)?;
        }
        self.file = Some(file);
        self.entry += 1;
        self.appended += bytes.len() as u64;
        Ok(self.position())
    }

    /// Begins the file anew with one entry that holds `records`, on disk when this returns. Removes older leaders'
    /// handover logs.
    pub fn rewrite(&mut self, records: &Records) -> Result<Position> {
        self.file = None;
        let bytes = encode_whole(&self.seal, self.entry + 1, records)?;
        make_own_parent(&self.path)?;
        self.close_to_others()?;
        with_reserve(self.publisher.store.layout(), || replace_synced(&self.path, &bytes))?;
        crash_point(CrashPoint::HandoverLogWritten);
        self.publisher.check()?;
        let opened = File::options().append(true).mode(0o600).open(&self.path);
        self.file = Some(opened.map_err(|e| Error::io("open", &self.path, e))?);
        self.entry += 1;
        (self.first, self.appended) = (bytes.len() as u64, 0);
        self.forget_older();
        Ok(self.position())
    }

    /// Fails if the file has lost its name or lacks bytes: the next leader would not find an entry in it, so none is
    /// promised.
    fn check_name(&self, file: &File) -> Result<()> {
        let found = fs::metadata(&self.path).map_err(|e| Error::io("look up", &self.path, e))?;
        let own = file.metadata().map_err(|e| Error::io("look up", &self.path, e))?;
        let len = self.first + self.appended;
        if (found.dev(), found.ino()) == (own.dev(), own.ino()) && own.len() >= len {
            Ok(())
        } else {
            Err(Error::corrupt(format!("handover log {}", self.path.display()), "somebody else has changed it"))
        }
    }

    /// Checks that the next leader would read from the file what was written to it; the error says why it would not.
    pub fn verify(&self, records: &Records) -> Result<()> {
        let bytes = fs::read(&self.path).map_err(|e| Error::io("read", &self.path, e))?;
        let found = decode(&self.seal, &bytes)?;
        let why = match (found.torn, found.position == self.position(), found.records == *records) {
            (0, true, true) => return Ok(()),
            (1.., ..) => format!("{} bytes at its end cannot be read", found.torn),
            _ => "it does not hold what the coordinator's database holds".to_owned(),
        };
        Err(Error::corrupt(format!("handover log {}", self.path.display()), why))
    }

    /// Makes the directory private to coordinators. Older software made it with whatever mode the umask gave.
    fn close_to_others(&self) -> Result<()> {
        let dir = self.publisher.store.layout().handover_logs();
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

    /// Removes the handover logs of epochs before ours, and what crashes left of them.
    fn forget_older(&self) {
        let dir = self.publisher.store.layout().handover_logs();
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
    use crate::handover_log::{HandoverLog, apply};
    use crate::lease::{Attempt, Holder, Watch};
    use crate::publisher::create;

    fn key(name: &str) -> (String, Vec<u8>) {
        ("table".to_owned(), name.as_bytes().to_vec())
    }

    fn put(name: &str, value: &str) -> RecordChange {
        RecordChange { key: key(name), value: Some(value.into()) }
    }

    fn read(publisher: &Publisher) -> HandoverLog {
        publisher.store().handover_log(None).unwrap().unwrap()
    }

    fn lead(dir: &std::path::Path) -> Arc<Publisher> {
        Arc::new(Publisher::open(dir, "a").unwrap())
    }

    #[test]
    fn what_one_leader_wrote_the_next_one_reads() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path()).unwrap();
        let first = lead(dir.path());
        assert_eq!(first.store().handover_log(None).unwrap(), None);
        let mut writer = HandoverLogWriter::new(Arc::clone(&first), None);
        assert!(writer.wants_all());
        assert!(writer.append(&[put("a", "0")], Durability::Synced).is_err(), "there is nothing to append to");
        writer.rewrite(&Records::from([(key("a"), b"1".to_vec())])).unwrap();
        writer.append(&[put("b", "2"), put("a", "3")], Durability::Synced).unwrap();
        let position = writer.append(&[RecordChange { key: key("b"), value: None }], Durability::Eventual).unwrap();
        assert_eq!(position, Position { epoch: 1, entry: 3 });
        let handover_log = read(&first);
        assert_eq!(handover_log.records, Records::from([(key("a"), b"3".to_vec())]));
        assert_eq!((handover_log.position, handover_log.torn), (position, 0));
        first.release().unwrap();

        let second = lead(dir.path());
        assert_eq!(read(&second), handover_log);
        let mut next = HandoverLogWriter::new(Arc::clone(&second), None);
        next.rewrite(&handover_log.records).unwrap();
        assert_eq!(read(&second).position, Position { epoch: 2, entry: 1 });
        assert_eq!(fs::read_dir(dir.path().join("ledger")).unwrap().count(), 1, "the first one is gone");
    }

    #[test]
    fn a_handover_log_that_has_grown_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path()).unwrap();
        let publisher = lead(dir.path());
        let mut writer = HandoverLogWriter::new(Arc::clone(&publisher), None);
        let (mut records, value) = (Records::new(), "x".repeat(100_000));
        writer.rewrite(&records).unwrap();
        let mut appended = 0;
        while !writer.wants_all() {
            let change = put(&format!("{}", appended % 3), &value);
            apply(&mut records, [change.clone()]);
            writer.append(&[change], Durability::Eventual).unwrap();
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
        let mut stale = HandoverLogWriter::new(Arc::clone(&old), None);
        stale.rewrite(&Records::from([(key("a"), b"old".to_vec())])).unwrap();
        // Its process lives, but another coordinator takes the next epoch.
        old.release().unwrap();
        let Attempt::Taken(_lease) = Watch::default()
            .attempt(old.store().layout(), &Holder::this_process("b"), std::time::Instant::now())
            .unwrap()
        else {
            panic!("a released lease is free");
        };
        assert!(matches!(stale.append(&[put("a", "late")], Durability::Synced), Err(Error::Fenced { .. })));
        assert!(matches!(stale.rewrite(&Records::new()), Err(Error::Fenced { .. })));
        let seal = old.store().handover_log_seal(2, None);
        fs::write(dir.path().join("ledger/0000000000000002"), encode_whole(&seal, 1, &Records::new()).unwrap())
            .unwrap();
        assert_eq!(read(&old).position, Position { epoch: 2, entry: 1 });
    }

    #[test]
    fn damage_to_what_was_written_is_found_and_nothing_is_promised_in_a_lost_file() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path()).unwrap();
        let publisher = lead(dir.path());
        let secret = HandoverKey::derive(b"a long random word");
        let mut writer = HandoverLogWriter::new(Arc::clone(&publisher), secret);
        let records = Records::from([(key("a"), b"1".to_vec())]);
        writer.rewrite(&records).unwrap();
        writer.verify(&records).unwrap();
        assert!(
            publisher.store().handover_log(None).is_err() && publisher.store().handover_log(secret).unwrap().is_some()
        );
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
        assert!(writer.append(&[put("b", "2")], Durability::Synced).is_err(), "nobody would find it");
        assert!(writer.wants_all());
        writer.rewrite(&records).unwrap();
        writer.verify(&records).unwrap();
    }
}

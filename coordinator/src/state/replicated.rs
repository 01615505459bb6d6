//! The state of one coordinator among several: what another one needs to go on is written to the store's handover log, too.
//!
//! ```text
//!  change ──▶ handover log (synced, still leading?) ──▶ database ──▶ how far the database knows the handover log
//! ```
//!
//! With this order, after a crash it is the handover log that knows more, and whoever opens the database next takes over what the database
//! lacks ([`ReplicatedState::follow`]). The same happens after another coordinator has led: its epoch is higher. A standby changes no
//! shared state.
//!
//! The handover log is a copy. If it cannot be written (the shared disk is full, or hangs), work goes on with the database alone. This is
//! logged, and noted in the database (which now knows more than this epoch's handover log). A whole new handover log is written as soon as
//! possible.
//!
//! The contents of the handover log are obeyed, so coordinators may share a key that authenticates it. A handover log that is not
//! authenticated, and says more than the local database knows, is then refused. A handover log that is damaged, or is missing although
//! somebody led before, does not prevent leading: what may be lost is reported ([`ReplicatedState::take_lost`]), and its bytes are kept in
//! quarantine.
//!
//! Besides its position in the handover log, a database remembers how far the store had gone, so that a store restored from a backup is
//! noticed ([`ReplicatedState::newest`]).
//!
//! Locks: `following` is held while a standby reads the handover log, so that reads come one after the other, and none ends after this
//! coordinator has begun to lead. `leading` guards the handover log's end and is held while one change is written, because the handover log
//! must have changes in the same order as the database; readers do not take it. `read` and `lost` guard their values and are not held
//! during I/O.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use store::Digest;
use store::chunk::PieceLocation;
use store::handover_log::{HandoverKey, Position, RecordChange, RecordKey, Records, apply};
use store::profile::PrefetchProfile;
use store::publisher::{Durability, HandoverLogWriter, Publisher};
use store::reader::Store;
use store::reader::handover_log::HandoverExtent;
use store::wire::{Fields, Put};

use crate::state::job::{JobId, PullJob};
use crate::state::state_db::{KeyValue, StateDb, StateError, Table};
use crate::unpack::ChunkLocations;

/// The handover log's table of jobs.
const JOBS: &str = "jobs";
/// The key of the position in [`Table::HandoverLog`]: how far the database knows the handover log.
const POSITION: &[u8] = b"position";
/// The key of how far the store had gone: its identity, then epoch and generation as u64.
const NEWEST: &[u8] = b"newest";
/// How long a handover log is left alone after it failed.
const AGAIN: Duration = Duration::from_secs(5);

/// A leader's handover log.
struct Leading {
    writer: HandoverLogWriter,
    /// When a write last failed. The handover log then lacks changes.
    behind: Option<Instant>,
}

/// A database whose shared changes are copied into the handover log.
pub struct ReplicatedState {
    own: Arc<dyn StateDb>,
    store: Store,
    key: Option<HandoverKey>,
    leading: Mutex<Option<Leading>>,
    following: Mutex<()>,
    /// The handover log's extent when this standby last read it.
    read: Mutex<Option<HandoverExtent>>,
    /// What could not be taken over from the last leader.
    lost: Mutex<Option<String>>,
}

/// How far a store had gone at the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Newest {
    /// The leader's epoch.
    pub epoch: u64,
    /// The catalogue's generation.
    pub generation: u64,
}

/// What was taken over from another leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakenOver {
    /// The leader's epoch.
    pub epoch: u64,
    /// How many records differed.
    pub records: usize,
}

fn handover_log_error(error: &store::Error) -> StateError {
    match error {
        store::Error::Fenced { .. } => StateError::NotLeading { why: error.to_string() },
        error => StateError::HandoverLog { why: error.to_string() },
    }
}

fn job_key(id: JobId) -> RecordKey {
    (JOBS.to_owned(), id.0.to_be_bytes().to_vec())
}

impl ReplicatedState {
    /// Wraps `own`. Once this coordinator leads, changes are shared with the other coordinators of `store`, which have the same `key`.
    pub fn new(own: Arc<dyn StateDb>, store: Store, key: Option<HandoverKey>) -> ReplicatedState {
        let (leading, read, lost) = (Mutex::new(None), Mutex::new(None), Mutex::new(None));
        ReplicatedState { own, store, key, leading, following: Mutex::new(()), read, lost }
    }

    /// The identity of the store that a database was last used with.
    pub fn identity(own: &dyn StateDb) -> Result<Option<[u8; 16]>, StateError> {
        let bytes = own.record(Table::HandoverLog, POSITION)?.unwrap_or_default();
        Ok(Fields::new("how far the handover log is known", &bytes).array::<16>().ok())
    }

    /// Takes over what another leader has written and this database does not know. For a coordinator that does not lead. Blocks on the
    /// shared disk.
    pub fn follow(&self) -> Result<Option<TakenOver>, StateError> {
        let handover_log = match self.store.handover_log(self.key) {
            Ok(Some(handover_log)) => handover_log,
            Ok(None) => return Ok(None),
            Err(error @ store::Error::Corrupt { .. }) => return self.cannot_follow(&error).map(|()| None),
            Err(error) => return Err(handover_log_error(&error)),
        };
        if handover_log.position <= self.known()? {
            return Ok(None);
        }
        if handover_log.torn > 0 {
            self.lose(format!(
                "{} bytes at the end of the last leader's handover log cannot be read: a crash tore them off, or they are damaged, and what changed last may be lost",
                handover_log.torn
            ));
        }
        let own = self.whole()?;
        let gone = own.keys().filter(|key| !handover_log.records.contains_key(key)).map(|key| (key, None));
        let other = handover_log.records.iter().filter(|(key, value)| own.get(key) != Some(value));
        let changes: Vec<_> = gone.chain(other.map(|(key, value)| (key, Some(value.as_slice())))).collect();
        for table in Table::SHARED {
            let of_table = changes.iter().filter(|((name, _), _)| name == table.name());
            let of_table: Vec<(&[u8], Option<&[u8]>)> =
                of_table.map(|((_, key), value)| (key.as_slice(), *value)).collect();
            self.own.change_records(table, &of_table, Durability::Synced)?;
        }
        changes
            .iter()
            .filter(|((name, _), _)| name == JOBS)
            .try_for_each(|((_, key), value)| self.take(key, *value))?;
        self.remember(handover_log.position)?;
        Ok(Some(TakenOver { epoch: handover_log.position.epoch, records: changes.len() }))
    }

    /// Handles a handover log that cannot be read. An error means that this coordinator must not go on without it.
    fn cannot_follow(&self, error: &store::Error) -> Result<(), StateError> {
        let (epoch, known) =
            (self.store.handover_log_epoch().map_err(|error| handover_log_error(&error))?, self.known()?);
        if let Ok(Some(says)) = self.store.unauthenticated_handover_log() {
            // It is readable without a key: it was written before there was one, or by somebody who has none.
            return if says <= known {
                Ok(())
            } else {
                Err(StateError::HandoverLog {
                    why: format!(
                        "{error}, and it says more than this coordinator's database knows: start once without handover_key_file to believe it, or remove the directory ledger in the store to go on without it"
                    ),
                })
            };
        }
        let is_keyed = self.store.handover_log_is_keyed().map_err(|error| handover_log_error(&error))?;
        if is_keyed && self.key.is_none() && epoch.is_some_and(|epoch| known.epoch < epoch) {
            let why = format!("{error}: set it to the file that the last leader used");
            return Err(StateError::HandoverLog { why });
        }
        let lost = "jobs, schedules, settings and tokens of coordinators before are not known (images are): run cachefsctl apply with your settings, and make new tokens";
        self.lose(match epoch {
            Some(epoch) if known.epoch >= epoch => {
                format!("{error}: this coordinator goes on with what its database knows, which is all if it led last")
            }
            _ if known.epoch > 0 => {
                format!("{error}: what changed since epoch {} is lost, this coordinator goes on with what its database knows", known.epoch)
            }
            _ => format!("{error}, and this coordinator's database is new: {lost}"),
        });
        Ok(())
    }

    /// Logs that something could not be taken over, and remembers it.
    fn lose(&self, why: String) {
        tracing::error!("{why}");
        *self.lost.lock() = Some(why);
    }

    /// What could not be taken over; returned once, to be reported.
    pub fn take_lost(&self) -> Option<String> {
        self.lost.lock().take()
    }

    /// How far the store had gone when this database last heard of it; zero for another store.
    pub fn newest(&self) -> Result<Newest, StateError> {
        let bytes = self.own.record(Table::HandoverLog, NEWEST)?.unwrap_or_default();
        let mut fields = Fields::new("how far the store had gone", &bytes);
        let of_this_store = fields.array::<16>().is_ok_and(|identity| identity == self.store.identity());
        match (of_this_store, fields.u64(), fields.u64()) {
            (true, Ok(epoch), Ok(generation)) => Ok(Newest { epoch, generation }),
            _ => Ok(Newest::default()),
        }
    }

    /// Records how far the store has gone.
    pub fn note_newest(&self, newest: Newest) -> Result<(), StateError> {
        let mut bytes = Vec::with_capacity(32);
        bytes.put_bytes(&self.store.identity());
        bytes.put_u64(newest.epoch);
        bytes.put_u64(newest.generation);
        self.own.change_records(Table::HandoverLog, &[(NEWEST, Some(&bytes))], Durability::Eventual)
    }

    /// Like [`ReplicatedState::follow`], for a standby: does not read again what has not changed, because a standby reads all of it before
    /// it leads. Calls `changed` with what is new. If that fails, the next call calls it again.
    pub fn follow_growth(
        &self,
        changed: impl FnOnce(Option<TakenOver>) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let _one_by_one = self.following.lock();
        if self.leading.lock().is_some() {
            return Ok(());
        }
        let extent = self.store.handover_log_extent().map_err(|error| handover_log_error(&error))?;
        if extent.is_none() || *self.read.lock() == extent {
            return Ok(());
        }
        changed(self.follow()?)?;
        *self.read.lock() = extent;
        Ok(())
    }

    /// Takes over one job. A job that is not understood, because a newer version wrote it, is left out.
    fn take(&self, key: &[u8], value: Option<&[u8]>) -> Result<(), StateError> {
        let Ok(id) = <[u8; 8]>::try_from(key).map(u64::from_be_bytes) else { return Ok(()) };
        match value.map(serde_json::from_slice::<PullJob>) {
            None => self.own.remove_jobs(&[JobId(id)]),
            Some(Ok(job)) => self.own.put_job(&job),
            Some(Err(error)) => {
                tracing::warn!("job {id} of the last leader is not understood and left out: {error}");
                Ok(())
            }
        }
    }

    /// Begins to lead: takes over what the last leader left, and shares changes from now on. Blocks on the shared disk.
    pub fn lead(&self, publisher: &Arc<Publisher>) -> Result<Option<TakenOver>, StateError> {
        let _after_the_last_look = self.following.lock();
        let is_new = self.known()?.epoch == 0;
        let taken = self.follow()?;
        let error = |error: store::Error| handover_log_error(&error);
        if is_new && publisher.epoch() > 1 && self.store.handover_log_epoch().map_err(error)?.is_none() {
            self.lose("this coordinator's database is new, and the store has no handover log: if there was a coordinator before, its jobs, schedules, settings and tokens are not known (images are)".to_owned());
        }
        if self.lost.lock().is_some() {
            publisher.keep_handover_log().map_err(error)?;
        }
        let writer = HandoverLogWriter::new(Arc::clone(publisher), self.key);
        let mut leading = Leading { writer, behind: None };
        let known = self.tell(&mut leading, &[], Durability::Synced)?;
        *self.leading.lock() = Some(leading);
        known.map_or(Ok(()), |known| self.remember(known))?;
        Ok(taken)
    }

    /// Rewrites a handover log that fell behind. Blocks on the shared disk.
    pub fn catch_up(&self) -> Result<(), StateError> {
        match &mut *self.leading.lock() {
            Some(leading) if leading.behind.is_some() => match self.tell(leading, &[], Durability::Synced)? {
                Some(known) => self.remember(known),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// Runs `work` with the handover log's writer, if this coordinator leads.
    fn with_writer<T>(
        &self,
        work: impl FnOnce(&mut Leading) -> Result<T, StateError>,
    ) -> Result<Option<T>, StateError> {
        self.leading.lock().as_mut().map(work).transpose()
    }

    /// How far this database knows the handover log of this store.
    fn known(&self) -> Result<Position, StateError> {
        let bytes = self.own.record(Table::HandoverLog, POSITION)?.unwrap_or_default();
        let mut fields = Fields::new("how far the handover log is known", &bytes);
        let of_this_store = fields.array::<16>().is_ok_and(|identity| identity == self.store.identity());
        match (of_this_store, fields.u64(), fields.u64()) {
            (true, Ok(epoch), Ok(entry)) => Ok(Position { epoch, entry }),
            _ => Ok(Position { epoch: 0, entry: 0 }),
        }
    }

    fn remember(&self, known: Position) -> Result<(), StateError> {
        let mut bytes = Vec::with_capacity(32);
        bytes.put_bytes(&self.store.identity());
        bytes.put_u64(known.epoch);
        bytes.put_u64(known.entry);
        self.own.change_records(Table::HandoverLog, &[(POSITION, Some(&bytes))], Durability::Eventual)
    }

    /// All shared records, as this database has them.
    fn whole(&self) -> Result<Records, StateError> {
        let mut records = Records::new();
        for table in Table::SHARED {
            let of_table = self.own.records(table)?.into_iter();
            records.extend(of_table.map(|(key, value)| ((table.name().to_owned(), key), value)));
        }
        for job in self.own.jobs()? {
            records.insert(job_key(job.id), job_bytes(&job)?);
        }
        Ok(records)
    }

    /// Writes changes to the handover log, before the database gets them. Returns how far the database then knows the handover log, if that
    /// changes. An error means that this coordinator leads no more; any other failure of the handover log is only logged.
    fn tell(
        &self,
        leading: &mut Leading,
        changes: &[RecordChange],
        durability: Durability,
    ) -> Result<Option<Position>, StateError> {
        if leading.behind.is_some_and(|since| since.elapsed() < AGAIN) && !changes.is_empty() {
            return Ok(None);
        }
        let mut told = self.write(leading, changes, durability)?;
        if matches!(told, Err(store::Error::Full { .. })) {
            // After a failure the writer needs a whole new file, for which some room is kept.
            told = self.write(leading, changes, durability)?;
        }
        match told {
            Ok(position) => {
                if leading.behind.take().is_some() {
                    tracing::info!("the handover log in the store is whole again");
                }
                Ok(Some(position))
            }
            Err(error @ store::Error::Fenced { .. }) => Err(handover_log_error(&error)),
            Err(error) => {
                if leading.behind.replace(Instant::now()).is_none() {
                    tracing::warn!("another coordinator would not know what changes from now on: {error}");
                }
                // However much of the change got there, this database knows more.
                Ok(Some(Position { epoch: leading.writer.epoch(), entry: u64::MAX }))
            }
        }
    }

    /// Appends changes to the handover log, or rewrites it with them.
    fn write(
        &self,
        leading: &mut Leading,
        changes: &[RecordChange],
        durability: Durability,
    ) -> Result<store::error::Result<Position>, StateError> {
        if !leading.writer.wants_all() {
            return Ok(leading.writer.append(changes, durability));
        }
        let mut all = self.whole()?;
        apply(&mut all, changes.iter().cloned());
        Ok(leading.writer.rewrite(&all))
    }

    /// Makes a change to shared state.
    fn change(
        &self,
        changes: &[RecordChange],
        durability: Durability,
        own: impl FnOnce() -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let mut leading = self.leading.lock();
        let Some(leading) = &mut *leading else {
            return match durability {
                // Nobody needs what a standby notes.
                Durability::Eventual => Ok(()),
                Durability::Synced => Err(StateError::NotLeading { why: "another coordinator leads".to_owned() }),
            };
        };
        let known = self.tell(leading, changes, durability)?;
        own()?;
        known.map_or(Ok(()), |known| self.remember(known))
    }
}

fn job_bytes(job: &PullJob) -> Result<Vec<u8>, StateError> {
    serde_json::to_vec(job).map_err(|error| StateError::Unreadable {
        what: format!("job {}", job.id),
        why: error.to_string(),
        remedy: "report this".to_owned(),
    })
}

impl StateDb for ReplicatedState {
    fn jobs(&self) -> Result<Vec<PullJob>, StateError> {
        self.own.jobs()
    }

    fn put_job(&self, job: &PullJob) -> Result<(), StateError> {
        let change = RecordChange { key: job_key(job.id), value: Some(job_bytes(job)?) };
        self.change(&[change], Durability::Synced, || self.own.put_job(job))
    }

    fn put_jobs(&self, jobs: &[PullJob]) -> Result<(), StateError> {
        let change = |job: &PullJob| Ok(RecordChange { key: job_key(job.id), value: Some(job_bytes(job)?) });
        let changes = jobs.iter().map(change).collect::<Result<Vec<_>, StateError>>()?;
        self.change(&changes, Durability::Synced, || self.own.put_jobs(jobs))
    }

    fn remove_jobs(&self, jobs: &[JobId]) -> Result<(), StateError> {
        let changes: Vec<_> = jobs.iter().map(|id| RecordChange { key: job_key(*id), value: None }).collect();
        self.change(&changes, Durability::Eventual, || self.own.remove_jobs(jobs))
    }

    fn diff_id_of(&self, blob: &Digest) -> Result<Option<Digest>, StateError> {
        self.own.diff_id_of(blob)
    }

    fn record_blob(&self, blob: &Digest, diff_id: &Digest) -> Result<(), StateError> {
        self.own.record_blob(blob, diff_id)
    }

    fn profile(&self, chain: &Digest) -> Result<Option<PrefetchProfile>, StateError> {
        self.own.profile(chain)
    }

    fn profiled_chains(&self) -> Result<Vec<Digest>, StateError> {
        self.own.profiled_chains()
    }

    fn put_profile(&self, profile: &PrefetchProfile) -> Result<(), StateError> {
        self.own.put_profile(profile)
    }

    fn remove_profile(&self, chain: &Digest) -> Result<(), StateError> {
        self.own.remove_profile(chain)
    }

    fn records(&self, table: Table) -> Result<Vec<KeyValue>, StateError> {
        self.own.records(table)
    }

    fn record(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
        self.own.record(table, key)
    }

    fn change_records(
        &self,
        table: Table,
        changes: &[(&[u8], Option<&[u8]>)],
        durability: Durability,
    ) -> Result<(), StateError> {
        let own = || self.own.change_records(table, changes, durability);
        if !Table::SHARED.contains(&table) {
            return own();
        }
        let shared = changes.iter().map(|(key, value)| RecordChange {
            key: (table.name().to_owned(), key.to_vec()),
            value: value.map(<[u8]>::to_vec),
        });
        self.change(&shared.collect::<Vec<_>>(), durability, own)
    }

    fn check_handover(&self) -> Result<Option<String>, StateError> {
        let found = self.with_writer(|leading| match leading.behind {
            // The handover log is known to lack something, and is rewritten as soon as possible.
            Some(_) => Ok(Some("the handover log could not be written lately".to_owned())),
            None => match leading.writer.verify(&self.whole()?) {
                Ok(()) => Ok(None),
                Err(error) if error.is_of_object() => Ok(Some(error.to_string())),
                Err(error) => Err(handover_log_error(&error)),
            },
        });
        Ok(found?.flatten())
    }

    fn follow_leader(&self, changed: &dyn Fn() -> Result<(), StateError>) -> Result<(), StateError> {
        self.follow_growth(|taken| {
            if let Some(TakenOver { epoch, records }) = taken {
                tracing::debug!("{records} records of the leader with epoch {epoch} are known now");
            }
            changed()
        })
    }

    fn renew_handover(&self) -> Result<(), StateError> {
        let renewed = self.with_writer(|leading| {
            let position = leading.writer.rewrite(&self.whole()?).map_err(|error| handover_log_error(&error))?;
            leading.behind = None;
            self.remember(position)
        });
        renewed.map(|_| ())
    }

    fn locations(&self) -> &dyn ChunkLocations {
        self.own.locations()
    }

    fn forget_locations(&self, gone: &dyn Fn(&PieceLocation) -> bool) -> Result<u64, StateError> {
        self.own.forget_locations(gone)
    }

    fn forget_all_locations(&self) -> Result<(), StateError> {
        self.own.forget_all_locations()
    }
}

#[cfg(test)]
mod tests;

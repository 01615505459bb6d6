//! The state of one coordinator among several: what another one needs to go on is told to the store's ledger, too.
//!
//! ```text
//!  change ──▶ ledger (synced, still leading?) ──▶ database ──▶ how far the database knows the ledger
//! ```
//!
//! In this order, so that after a crash the ledger is the one that knows more; whoever opens the database next takes over what it
//! lacks ([`ReplicatedState::follow`]). The same happens where another coordinator has led meanwhile: its epoch is higher. A standby
//! changes nothing of what is shared.
//!
//! The ledger is a copy. If it cannot be written (the shared disk is full, or hangs up) work goes on with the database alone, which
//! is said, noted in the database (it knows more now than this epoch's ledger), and made good with a whole new ledger as soon as
//! that is possible.
//!
//! What the ledger holds is obeyed, so coordinators may share a key that it is authenticated with; one that is not, and says more than
//! our database knows, is then refused. A ledger that is damaged, or missing where somebody led before, is no reason not to
//! lead: what may be lost by it is said ([`ReplicatedState::take_lost`]), and its bytes are kept in quarantine.
//!
//! Beside how far the ledger is known, a database remembers how far the store had gone, so that a store that was put back from a
//! backup is noticed ([`ReplicatedState::newest`]).
//!
//! `following` is held across a standby's whole look at the ledger, so that looks come one after the other and none of them ends after
//! this coordinator has begun to lead. `leading` guards the ledger's end and is held across the writing of one change, because the ledger must have changes in the order
//! in which the database has them. Readers do not take it. `read` and `lost` guard what they say and are not held during I/O.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use store::Digest;
use store::chunk::PieceLocation;
use store::ledger::{LedgerKey, Position, RecordChange, RecordKey, Records, apply};
use store::profile::PrefetchProfile;
use store::publisher::{LedgerWriter, Promise, Publisher};
use store::reader::Store;
use store::reader::ledger::LedgerExtent;
use store::wire::{Fields, Put};

use crate::state::job::{JobId, PullJob};
use crate::state::state_db::{Durability, Record, StateDb, StateError, Table};
use crate::unpack::ChunkLocations;

/// The ledger's table of jobs.
const JOBS: &str = "jobs";
/// The key in [`Table::Ledger`].
const POSITION: &[u8] = b"position";
/// How far the store had gone: its identity, the epoch u64, the generation u64.
const NEWEST: &[u8] = b"newest";
/// How long a ledger that failed is left alone.
const AGAIN: Duration = Duration::from_secs(5);

/// A leader's ledger.
struct Leading {
    writer: LedgerWriter,
    /// When the ledger was last found to be failing; it lacks changes since.
    behind: Option<Instant>,
}

/// A database that shares.
pub struct ReplicatedState {
    own: Arc<dyn StateDb>,
    store: Store,
    key: Option<LedgerKey>,
    leading: Mutex<Option<Leading>>,
    following: Mutex<()>,
    /// The ledger's extent when a standby last read it.
    read: Mutex<Option<LedgerExtent>>,
    /// What could not be taken over.
    lost: Mutex<Option<String>>,
}

/// How far a store had gone when we last looked.
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
    /// How many records were different.
    pub records: usize,
}

fn ledger_error(error: &store::Error) -> StateError {
    match error {
        store::Error::Fenced { .. } => StateError::NotLeading { why: error.to_string() },
        error => StateError::Ledger { why: error.to_string() },
    }
}

fn job_key(id: JobId) -> RecordKey {
    (JOBS.to_owned(), id.0.to_be_bytes().to_vec())
}

impl ReplicatedState {
    /// Shares what `own` is told, once it leads, with the other coordinators of `store`, who have the same `key`.
    pub fn new(own: Arc<dyn StateDb>, store: Store, key: Option<LedgerKey>) -> ReplicatedState {
        let (leading, read, lost) = (Mutex::new(None), Mutex::new(None), Mutex::new(None));
        ReplicatedState { own, store, key, leading, following: Mutex::new(()), read, lost }
    }

    /// The identity of the store that a database was last used with.
    pub fn identity(own: &dyn StateDb) -> Result<Option<[u8; 16]>, StateError> {
        let bytes = own.record(Table::Ledger, POSITION)?.unwrap_or_default();
        Ok(Fields::new("how far the ledger is known", &bytes).array::<16>().ok())
    }

    /// Takes over what another leader has written and our database does not know. For a coordinator that does not lead.
    /// Blocks on the shared disk.
    pub fn follow(&self) -> Result<Option<TakenOver>, StateError> {
        let ledger = match self.store.ledger(self.key) {
            Ok(Some(ledger)) => ledger,
            Ok(None) => return Ok(None),
            Err(error @ store::Error::Corrupt { .. }) => return self.cannot_follow(&error).map(|()| None),
            Err(error) => return Err(ledger_error(&error)),
        };
        if ledger.position <= self.known()? {
            return Ok(None);
        }
        if ledger.torn > 0 {
            self.lose(format!(
                "{} bytes at the end of the last leader's handover log cannot be read: a crash tore them off, or they are damaged, and what changed last may be lost",
                ledger.torn
            ));
        }
        let own = self.whole()?;
        let gone = own.keys().filter(|key| !ledger.records.contains_key(key)).map(|key| (key, None));
        let other = ledger.records.iter().filter(|(key, value)| own.get(key) != Some(value));
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
        self.remember(ledger.position)?;
        Ok(Some(TakenOver { epoch: ledger.position.epoch, records: changes.len() }))
    }

    /// What becomes of a ledger that cannot be read: an error if we must not go on without it.
    fn cannot_follow(&self, error: &store::Error) -> Result<(), StateError> {
        let (epoch, known) = (self.store.ledger_epoch().map_err(|error| ledger_error(&error))?, self.known()?);
        if let Ok(Some(says)) = self.store.unauthenticated_ledger() {
            // It would be read without a key: it was written before there was one, or by somebody who has none.
            return match says <= known {
                true => Ok(()),
                false => Err(StateError::Ledger {
                    why: format!(
                        "{error}, and it says more than this coordinator's database knows: start once without handover_key_file to believe it, or remove the directory ledger in the store to go on without it"
                    ),
                }),
            };
        }
        let is_keyed = self.store.ledger_is_keyed().map_err(|error| ledger_error(&error))?;
        if is_keyed && self.key.is_none() && epoch.is_some_and(|epoch| known.epoch < epoch) {
            let why = format!("{error}: set it to the file that the last leader used");
            return Err(StateError::Ledger { why });
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

    /// Notes that something could not be taken over.
    fn lose(&self, why: String) {
        tracing::error!("{why}");
        *self.lost.lock() = Some(why);
    }

    /// What could not be taken over, to be told to people once.
    pub fn take_lost(&self) -> Option<String> {
        self.lost.lock().take()
    }

    /// How far the store had gone when our database last heard of it; nothing for another store.
    pub fn newest(&self) -> Result<Newest, StateError> {
        let bytes = self.own.record(Table::Ledger, NEWEST)?.unwrap_or_default();
        let mut fields = Fields::new("how far the store had gone", &bytes);
        let of_this_store = fields.array::<16>().is_ok_and(|identity| identity == self.store.identity());
        match (of_this_store, fields.u64(), fields.u64()) {
            (true, Ok(epoch), Ok(generation)) => Ok(Newest { epoch, generation }),
            _ => Ok(Newest::default()),
        }
    }

    /// Remembers how far the store has gone.
    pub fn note_newest(&self, newest: Newest) -> Result<(), StateError> {
        let mut bytes = Vec::with_capacity(32);
        bytes.put_bytes(&self.store.identity());
        bytes.put_u64(newest.epoch);
        bytes.put_u64(newest.generation);
        self.own.change_records(Table::Ledger, &[(NEWEST, Some(&bytes))], Durability::Eventual)
    }

    /// The same for a standby, which does not read again what has not changed: it reads all of it before it leads. Calls `changed`
    /// with what is new; if that fails, the next call does so, too.
    pub fn follow_growth(
        &self,
        changed: impl FnOnce(Option<TakenOver>) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let _one_by_one = self.following.lock();
        if self.leading.lock().is_some() {
            return Ok(());
        }
        let extent = self.store.ledger_extent().map_err(|error| ledger_error(&error))?;
        if extent.is_none() || *self.read.lock() == extent {
            return Ok(());
        }
        changed(self.follow()?)?;
        *self.read.lock() = extent;
        Ok(())
    }

    /// Takes over one job. One that is not understood, being a newer version's, is left out.
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

    /// Begins to lead: takes over what the last leader left, and shares from now on. Blocks on the shared disk.
    pub fn lead(&self, publisher: &Arc<Publisher>) -> Result<Option<TakenOver>, StateError> {
        let _after_the_last_look = self.following.lock();
        let is_new = self.known()?.epoch == 0;
        let taken = self.follow()?;
        let error = |error: store::Error| ledger_error(&error);
        if is_new && publisher.epoch() > 1 && self.store.ledger_epoch().map_err(error)?.is_none() {
            self.lose("this coordinator's database is new, and the store has no handover log: if there was a coordinator before, its jobs, schedules, settings and tokens are not known (images are)".to_owned());
        }
        if self.lost.lock().is_some() {
            publisher.keep_ledger().map_err(error)?;
        }
        let writer = LedgerWriter::new(Arc::clone(publisher), self.key);
        let mut leading = Leading { writer, behind: None };
        let known = self.tell(&mut leading, &[], Promise::Kept)?;
        *self.leading.lock() = Some(leading);
        known.map_or(Ok(()), |known| self.remember(known))?;
        Ok(taken)
    }

    /// Writes a ledger that fell behind anew. Blocks on the shared disk.
    pub fn catch_up(&self) -> Result<(), StateError> {
        match &mut *self.leading.lock() {
            Some(leading) if leading.behind.is_some() => match self.tell(leading, &[], Promise::Kept)? {
                Some(known) => self.remember(known),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// The ledger's writer, once we lead.
    fn with_writer<T>(
        &self,
        work: impl FnOnce(&mut Leading) -> Result<T, StateError>,
    ) -> Result<Option<T>, StateError> {
        self.leading.lock().as_mut().map(work).transpose()
    }

    /// How far our database knows the ledger of this store.
    fn known(&self) -> Result<Position, StateError> {
        let bytes = self.own.record(Table::Ledger, POSITION)?.unwrap_or_default();
        let mut fields = Fields::new("how far the ledger is known", &bytes);
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
        self.own.change_records(Table::Ledger, &[(POSITION, Some(&bytes))], Durability::Eventual)
    }

    /// All that is shared, as our database has it.
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

    /// Tells the ledger, before the database is told; gives how far the database knows it then, where that changes. An error if we
    /// lead no more; a ledger that fails otherwise is none.
    fn tell(
        &self,
        leading: &mut Leading,
        changes: &[RecordChange],
        promise: Promise,
    ) -> Result<Option<Position>, StateError> {
        if leading.behind.is_some_and(|since| since.elapsed() < AGAIN) && !changes.is_empty() {
            return Ok(None);
        }
        let mut told = self.write(leading, changes, promise)?;
        if matches!(told, Err(store::Error::Full { .. })) {
            // What failed wants a whole new file, for which some room is kept.
            told = self.write(leading, changes, promise)?;
        }
        match told {
            Ok(position) => {
                if leading.behind.take().is_some() {
                    tracing::info!("the ledger in the store is whole again");
                }
                Ok(Some(position))
            }
            Err(error @ store::Error::Fenced { .. }) => Err(ledger_error(&error)),
            Err(error) => {
                if leading.behind.replace(Instant::now()).is_none() {
                    tracing::warn!("another coordinator would not know what changes from now on: {error}");
                }
                // Whatever of the change did get there: our database knows more.
                Ok(Some(Position { epoch: leading.writer.epoch(), entry: u64::MAX }))
            }
        }
    }

    /// Appends changes to the ledger, or writes all of it with them.
    fn write(
        &self,
        leading: &mut Leading,
        changes: &[RecordChange],
        promise: Promise,
    ) -> Result<store::error::Result<Position>, StateError> {
        if !leading.writer.wants_all() {
            return Ok(leading.writer.append(changes, promise));
        }
        let mut all = self.whole()?;
        apply(&mut all, changes.iter().cloned());
        Ok(leading.writer.rewrite(&all))
    }

    /// Makes a change of what is shared.
    fn change(
        &self,
        changes: &[RecordChange],
        durability: Durability,
        own: impl FnOnce() -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let mut leading = self.leading.lock();
        let Some(leading) = &mut *leading else {
            return match durability {
                // A standby's notes matter to nobody.
                Durability::Eventual => Ok(()),
                Durability::Synced => Err(StateError::NotLeading { why: "another coordinator leads".to_owned() }),
            };
        };
        let promise = match durability {
            Durability::Synced => Promise::Kept,
            Durability::Eventual => Promise::None,
        };
        let known = self.tell(leading, changes, promise)?;
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

    fn records(&self, table: Table) -> Result<Vec<Record>, StateError> {
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
            // It is known to lack something, and written anew as soon as it can be.
            Some(_) => Ok(Some("the handover log could not be written lately".to_owned())),
            None => match leading.writer.verify(&self.whole()?) {
                Ok(()) => Ok(None),
                Err(error) if error.is_of_object() => Ok(Some(error.to_string())),
                Err(error) => Err(ledger_error(&error)),
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
            let position = leading.writer.rewrite(&self.whole()?).map_err(|error| ledger_error(&error))?;
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

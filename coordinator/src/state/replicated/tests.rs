//! Coordinators with databases of their own and one store: what each knows of the others' promises.

use std::fs;
use std::path::{Path, PathBuf};

use store::publisher::create;

use super::*;
use crate::state::job::tests::job;
use crate::state::state_db::memory::MemoryStateDb;

struct Stand {
    directory: tempfile::TempDir,
    key: Option<HandoverKey>,
}

/// One coordinator's database, which outlives the coordinator.
type Database = Arc<MemoryStateDb>;

fn schedule(state_db: &dyn StateDb, name: &str, text: &str) -> Result<(), StateError> {
    state_db.change_records(Table::Schedules, &[(name.as_bytes(), Some(text.as_bytes()))], Durability::Synced)
}

fn schedules(state_db: &dyn StateDb) -> Vec<(String, String)> {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    state_db.records(Table::Schedules).unwrap().into_iter().map(|(key, value)| (text(key), text(value))).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

impl Stand {
    fn new() -> Stand {
        let directory = tempfile::tempdir().unwrap();
        create(directory.path()).unwrap();
        Stand { directory, key: None }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn handover_log(&self, epoch: u64) -> PathBuf {
        self.path().join(format!("ledger/{epoch:016x}"))
    }

    fn standby(&self, database: &Database) -> ReplicatedState {
        ReplicatedState::new(Arc::clone(database) as _, Store::open(self.path()).unwrap(), self.key)
    }

    /// Starts a coordinator that leads until its publisher is released.
    fn lead(&self, database: &Database) -> (ReplicatedState, Arc<Publisher>, Option<TakenOver>) {
        let publisher = Arc::new(Publisher::open(self.path(), "test").unwrap());
        let state_db = self.standby(database);
        let taken = state_db.lead(&publisher).unwrap();
        (state_db, publisher, taken)
    }
}

#[test]
fn another_coordinator_goes_on_with_what_was_promised() {
    let (stand, a, b) = (Stand::new(), Database::default(), Database::default());
    let (state_db, publisher, taken) = stand.lead(&a);
    assert_eq!(taken, None);
    schedule(&state_db, "nightly", "1").unwrap();
    schedule(&state_db, "hourly", "2").unwrap();
    state_db.put_job(&job(7, 1)).unwrap();
    state_db.put_job(&job(8, 2)).unwrap();
    state_db.remove_jobs(&[JobId(8)]).unwrap();
    let own = [(b"e".as_slice(), Some(b"1".as_slice()))];
    state_db.change_records(Table::Events, &own, Durability::Synced).unwrap();
    publisher.release().unwrap();

    // What the other coordinator had of its own is dropped.
    schedule(&*b, "stale", "0").unwrap();
    b.put_job(&job(9, 0)).unwrap();
    let (next, publisher, taken) = stand.lead(&b);
    assert_eq!(taken, Some(TakenOver { epoch: 1, records: 5 }), "two gone, three come");
    assert_eq!(schedules(&*b), pairs(&[("hourly", "2"), ("nightly", "1")]));
    assert_eq!(b.jobs().unwrap(), [job(7, 1)]);
    assert_eq!(b.records(Table::Events).unwrap(), [], "events belong to one coordinator");
    schedule(&next, "nightly", "3").unwrap();
    let gone: [(&[u8], Option<&[u8]>); 1] = [(b"hourly", None)];
    next.change_records(Table::Schedules, &gone, Durability::Synced).unwrap();
    publisher.release().unwrap();

    // And back.
    let (_, publisher, taken) = stand.lead(&a);
    assert_eq!(taken, Some(TakenOver { epoch: 2, records: 2 }));
    assert_eq!(schedules(&*a), pairs(&[("nightly", "3")]));
    publisher.release().unwrap();
    // A lost database makes no difference.
    let (_, _, taken) = stand.lead(&Database::default());
    assert_eq!(taken, Some(TakenOver { epoch: 3, records: 2 }));
}

#[test]
fn a_restart_finds_what_it_knows_and_what_it_had_not_yet_written() {
    let (stand, database) = (Stand::new(), Database::default());
    let (state_db, publisher, _) = stand.lead(&database);
    schedule(&state_db, "nightly", "1").unwrap();
    publisher.release().unwrap();
    let (state_db, publisher, taken) = stand.lead(&database);
    assert_eq!(taken, None, "nothing that was not known");

    // A crash between the handover log and the database.
    let key = (Table::Schedules.name().to_owned(), b"nightly".to_vec());
    let change = RecordChange { key, value: Some(b"2".to_vec()) };
    let told = state_db.tell(state_db.leading.lock().as_mut().unwrap(), &[change], Durability::Synced).unwrap();
    assert_eq!(told, Some(Position { epoch: 2, entry: 2 }));
    assert_eq!(schedules(&*database), pairs(&[("nightly", "1")]));
    publisher.release().unwrap();
    let (_, _, taken) = stand.lead(&database);
    assert_eq!(taken, Some(TakenOver { epoch: 2, records: 1 }));
    assert_eq!(schedules(&*database), pairs(&[("nightly", "2")]));
}

#[test]
fn a_standby_follows_and_changes_nothing() {
    let (stand, a, b) = (Stand::new(), Database::default(), Database::default());
    let (state_db, _publisher, _) = stand.lead(&a);
    let standby = stand.standby(&b);
    schedule(&state_db, "nightly", "1").unwrap();
    assert_eq!(standby.follow(), Ok(Some(TakenOver { epoch: 1, records: 1 })));
    assert_eq!(standby.follow(), Ok(None));
    schedule(&state_db, "nightly", "2").unwrap();
    assert!(standby.follow().unwrap().is_some());
    assert_eq!(schedules(&standby), pairs(&[("nightly", "2")]));
    schedule(&state_db, "nightly", "3").unwrap();
    let hears = || {
        let mut heard = 0;
        let hear = |_| {
            heard += 1;
            Ok(())
        };
        standby.follow_growth(hear).unwrap();
        heard == 1
    };
    assert!(standby.follow_growth(|_| Err(StateError::HandoverLog { why: "test".to_owned() })).is_err());
    assert!(hears(), "who could not make use of it hears of it the next time");
    assert!(!hears());
    schedule(&state_db, "nightly", "2").unwrap();
    assert!(hears());
    assert!(matches!(schedule(&standby, "nightly", "3"), Err(StateError::NotLeading { .. })));
    let note = [(b"nightly".as_slice(), Some(b"4".as_slice()))];
    standby.change_records(Table::Schedules, &note, Durability::Eventual).unwrap();
    assert_eq!(schedules(&standby), pairs(&[("nightly", "2")]));
}

#[test]
fn a_leader_that_was_replaced_is_refused_and_its_database_is_left_alone() {
    let (stand, a, b) = (Stand::new(), Database::default(), Database::default());
    let (old, publisher, _) = stand.lead(&a);
    schedule(&old, "nightly", "1").unwrap();
    publisher.release().unwrap();
    let (_, _publisher, taken) = stand.lead(&b);
    assert!(taken.is_some());
    assert!(matches!(schedule(&old, "nightly", "2"), Err(StateError::NotLeading { .. })));
    assert_eq!(schedules(&*a), pairs(&[("nightly", "1")]));
}

#[test]
fn work_goes_on_without_a_handover_log_which_is_made_good_and_never_mistaken_for_news() {
    let (stand, a) = (Stand::new(), Database::default());
    let (state_db, publisher, _) = stand.lead(&a);
    schedule(&state_db, "nightly", "1").unwrap();
    // The handover log cannot be written any more: a file is in its place, and the next entry needs a new file.
    *state_db.leading.lock() =
        Some(Leading { writer: HandoverLogWriter::new(Arc::clone(&publisher), None), behind: None });
    fs::rename(stand.path().join("ledger"), stand.path().join("aside")).unwrap();
    fs::write(stand.path().join("ledger"), b"in the way").unwrap();
    schedule(&state_db, "nightly", "2").unwrap();
    schedule(&state_db, "hourly", "1").unwrap();
    assert_eq!(schedules(&*a), pairs(&[("hourly", "1"), ("nightly", "2")]));
    fs::remove_file(stand.path().join("ledger")).unwrap();
    fs::rename(stand.path().join("aside"), stand.path().join("ledger")).unwrap();

    // A restart now: the handover log knows less than the database.
    let restarted = stand.standby(&a);
    assert_eq!(restarted.follow(), Ok(None));
    assert_eq!(schedules(&*a), pairs(&[("hourly", "1"), ("nightly", "2")]));
    // Or the disk recovers first.
    state_db.catch_up().unwrap();
    let b = Database::default();
    assert!(stand.standby(&b).follow().unwrap().is_some());
    assert_eq!(schedules(&*b), schedules(&*a));
    schedule(&state_db, "hourly", "2").unwrap();
    assert!(stand.standby(&b).follow().unwrap().is_some());
    assert_eq!(schedules(&*b), schedules(&*a));
    publisher.release().unwrap();
}

#[test]
fn a_damaged_handover_log_costs_the_copy_and_one_of_a_newer_version_stops_us() {
    let (stand, a, b) = (Stand::new(), Database::default(), Database::default());
    let (state_db, publisher, _) = stand.lead(&a);
    schedule(&state_db, "nightly", "1").unwrap();
    publisher.release().unwrap();
    let good = fs::read(stand.handover_log(1)).unwrap();
    let mut newer = good.clone();
    newer[8] = 9;
    fs::write(stand.handover_log(1), &newer).unwrap();
    assert!(matches!(stand.standby(&b).follow(), Err(StateError::HandoverLog { .. })));
    fs::write(stand.handover_log(1), &good[..20]).unwrap();
    assert_eq!(stand.standby(&b).follow(), Ok(None));
    // The database that wrote it still knows all of it.
    let (_, _, taken) = stand.lead(&a);
    assert_eq!(taken, None);
    assert!(stand.standby(&b).follow().unwrap().is_some());
    assert_eq!(schedules(&*b), pairs(&[("nightly", "1")]));
}

#[test]
fn another_stores_handover_log_is_not_measured_by_ours() {
    let (first, second, database) = (Stand::new(), Stand::new(), Database::default());
    let (state_db, _publisher, _) = first.lead(&database);
    (0..5).for_each(|n| schedule(&state_db, "nightly", &n.to_string()).unwrap());
    let (state_db, _publisher, _) = second.lead(&Database::default());
    schedule(&state_db, "weekly", "1").unwrap();
    assert!(second.standby(&database).follow().unwrap().is_some());
    assert_eq!(schedules(&*database), pairs(&[("weekly", "1")]));
}

#[test]
fn damage_to_the_handover_log_is_found_and_it_is_written_anew_while_the_database_knows_all() {
    let (stand, a) = (Stand::new(), Database::default());
    let (state_db, publisher, _) = stand.lead(&a);
    assert_eq!(stand.standby(&a).check_handover(), Ok(None), "a standby has none");
    schedule(&state_db, "nightly", "1").unwrap();
    state_db.put_job(&job(7, 1)).unwrap();
    assert_eq!(state_db.check_handover(), Ok(None));
    let good = fs::read(stand.handover_log(1)).unwrap();
    let damages: [(&str, Option<Vec<u8>>); 4] = [
        ("flipped", Some([&good[..good.len() - 1], &[good[good.len() - 1] ^ 1]].concat())),
        ("cut", Some(good[..good.len() - 9].to_vec())),
        ("empty", Some(Vec::new())),
        ("gone", None),
    ];
    for (what, bytes) in damages {
        match bytes {
            Some(bytes) => fs::write(stand.handover_log(1), bytes).unwrap(),
            None => fs::remove_file(stand.handover_log(1)).unwrap(),
        }
        assert!(state_db.check_handover().unwrap().is_some(), "{what}");
        state_db.renew_handover().unwrap();
        assert_eq!(state_db.check_handover(), Ok(None), "{what}");
        let b = Database::default();
        assert!(stand.standby(&b).follow().unwrap().is_some());
        assert_eq!((schedules(&*b), b.jobs().unwrap().len()), (schedules(&*a), 1), "{what}");
    }
    publisher.release().unwrap();
}

#[test]
fn a_new_database_and_a_damaged_log_say_what_is_lost() {
    let (stand, a, b) = (Stand::new(), Database::default(), Database::default());
    let (state_db, publisher, _) = stand.lead(&a);
    assert_eq!(state_db.take_lost(), None, "a new store has lost nothing");
    schedule(&state_db, "nightly", "1").unwrap();
    publisher.release().unwrap();
    let good = fs::read(stand.handover_log(1)).unwrap();
    fs::write(stand.handover_log(1), &good[..30]).unwrap();
    let (state_db, publisher, taken) = stand.lead(&b);
    let lost = state_db.take_lost().unwrap();
    assert!(taken.is_none() && lost.contains("schedules") && lost.contains("tokens"), "{lost}");
    assert_eq!(state_db.take_lost(), None, "said once");
    assert!(stand.path().join("quarantine/ledger/0000000000000001").exists(), "and kept");
    schedule(&state_db, "nightly", "2").unwrap();
    publisher.release().unwrap();
    // Torn in the middle: what precedes the tear is taken over, and the rest is reported as lost.
    let mut bytes = fs::read(stand.handover_log(2)).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(stand.handover_log(2), bytes).unwrap();
    let (state_db, publisher, _) = stand.lead(&Database::default());
    assert!(state_db.take_lost().unwrap().contains("cannot be read"));
    publisher.release().unwrap();
    fs::remove_dir_all(stand.path().join("ledger")).unwrap();
    let (state_db, _publisher, _) = stand.lead(&Database::default());
    assert!(state_db.take_lost().unwrap().contains("no handover log"));
}

#[test]
fn with_a_key_only_an_authenticated_log_is_obeyed() {
    let (mut stand, a, b) = (Stand::new(), Database::default(), Database::default());
    let (state_db, publisher, _) = stand.lead(&a);
    schedule(&state_db, "nightly", "1").unwrap();
    publisher.release().unwrap();
    stand.key = HandoverKey::derive(b"a long random word");
    assert!(
        matches!(stand.standby(&b).follow(), Err(StateError::HandoverLog { why }) if why.contains("not authenticated"))
    );
    // The coordinator that led knows all of it. From now on the handover log is authenticated.
    let (state_db, publisher, taken) = stand.lead(&a);
    assert_eq!((taken, state_db.take_lost()), (None, None));
    schedule(&state_db, "nightly", "2").unwrap();
    publisher.release().unwrap();
    let keyless = ReplicatedState::new(Arc::clone(&b) as _, Store::open(stand.path()).unwrap(), None);
    assert!(
        matches!(keyless.follow(), Err(StateError::HandoverLog { why }) if why.contains("handover_key_file is not set"))
    );
    assert_eq!(schedules(&*b), []);
    let (_, publisher, taken) = stand.lead(&b);
    assert!(taken.is_some());
    assert_eq!(schedules(&*b), pairs(&[("nightly", "2")]));
    publisher.release().unwrap();
}

#[test]
fn how_far_the_store_had_gone_is_remembered_for_that_store() {
    let (first, second, database) = (Stand::new(), Stand::new(), Database::default());
    let state_db = first.standby(&database);
    assert_eq!(state_db.newest(), Ok(Newest::default()));
    let newest = Newest { epoch: 3, generation: 99 };
    state_db.note_newest(newest).unwrap();
    assert_eq!(first.standby(&database).newest(), Ok(newest));
    assert_eq!(second.standby(&database).newest(), Ok(Newest::default()));
}

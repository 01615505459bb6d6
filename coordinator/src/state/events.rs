//! What happened: numbered events, kept across restarts, for people who look and programs that follow.
//!
//! Code that does something people want to know of records it here, once, in one sentence. The last [`KEEP`] events of each class are kept,
//! in memory and in the database. So what administrators did is not pushed out by jobs and hosts that come and go, however many, nor by
//! refused callers. If the database fails, the event does not survive a restart; the work that it tells of is not affected.
//!
//! `kept` guards the events in memory and is not held during I/O.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use coordinator_api::event::{Event, Severity};
use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::state::state_db::{Durability, StateDb, StateError, Table};

/// Events of one class beyond this number are forgotten, oldest first.
pub const KEEP: usize = 10_000;
/// The longest sentence, and the longest name of a subject, that is kept, in bytes.
const TEXT_MAX: usize = 4096;
/// The key of the log's own name. It is shorter than the key of an event.
const NAME_KEY: &[u8] = b"log";

/// An event to be recorded.
#[derive(Debug, Clone)]
pub struct NewEvent {
    severity: Severity,
    kind: &'static str,
    subject: String,
    actor: Option<String>,
    message: String,
}

impl NewEvent {
    /// `kind` is two words joined by a dot, the object first (`schedule.at_risk`). `message` is one sentence for people.
    pub fn new(severity: Severity, kind: &'static str, subject: impl ToString, message: impl ToString) -> NewEvent {
        let (subject, message) = (subject.to_string(), message.to_string());
        NewEvent { severity, kind, subject, actor: None, message }
    }

    /// Names who caused the event.
    pub fn by(self, actor: impl ToString) -> NewEvent {
        NewEvent { actor: Some(actor.to_string()), ..self }
    }
}

/// Classes of events. An event is forgotten only for a newer one of its class.
#[derive(Debug, Clone, Copy)]
enum Class {
    /// Something that somebody changed: tokens, settings, schedules, pins, images.
    Change,
    /// A refused caller.
    Refusal,
    /// Everything else: jobs, hosts, registries.
    Activity,
}

impl Class {
    fn of(event: &Event) -> Class {
        match event.kind.split('.').next().unwrap_or_default() {
            "access" => Class::Refusal,
            "admin" | "token" => Class::Change,
            // Hosts ask for jobs, too.
            "job" | "host" => Class::Activity,
            _ if event.actor.is_some() => Class::Change,
            _ => Class::Activity,
        }
    }
}

/// The events in memory.
#[derive(Debug, Default)]
struct Kept {
    by_id: BTreeMap<u64, Event>,
    /// The numbers of each class's events, oldest first.
    classes: [VecDeque<u64>; 3],
}

impl Kept {
    fn newest(&self) -> u64 {
        self.by_id.last_key_value().map_or(0, |(id, _)| *id)
    }

    /// Adds an event; returns the number of the event that is forgotten for it.
    fn push(&mut self, event: Event) -> Option<u64> {
        let class = &mut self.classes[Class::of(&event) as usize];
        class.push_back(event.id);
        let forgotten = (class.len() > KEEP).then(|| class.pop_front()).flatten();
        self.by_id.insert(event.id, event);
        forgotten.inspect(|id| _ = self.by_id.remove(id))
    }
}

/// The events of one coordinator.
pub struct Events {
    state_db: Arc<dyn StateDb>,
    /// Distinguishes this log from those of other coordinators.
    name: String,
    kept: Mutex<Kept>,
    /// The number of the newest event, for followers.
    newest: watch::Sender<u64>,
}

impl Events {
    /// Reads the events that the database kept.
    pub fn open(state_db: Arc<dyn StateDb>) -> Result<Events, StateError> {
        let records = state_db.records(Table::Events)?;
        let mut kept = Kept::default();
        for event in records.iter().filter_map(|(_, json)| serde_json::from_slice::<Event>(json).ok()) {
            kept.push(event);
        }
        let newest = kept.newest();
        let name = log_name(&*state_db)?;
        Ok(Events { state_db, name, kept: Mutex::new(kept), newest: watch::Sender::new(newest) })
    }

    /// The log's name. Every log numbers its own events, so a number is valid within one log only.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Records one event and logs it.
    pub fn record(&self, event: NewEvent) {
        let NewEvent { severity, kind, mut subject, actor, mut message } = event;
        [&mut subject, &mut message].into_iter().for_each(cut);
        let by = actor.as_deref();
        match severity {
            Severity::Info => tracing::info!(kind, subject, actor = by, "{message}"),
            Severity::Warning => tracing::warn!(kind, subject, actor = by, "{message}"),
            Severity::Error => tracing::error!(kind, subject, actor = by, "{message}"),
        }
        let (event, forgotten) = {
            let mut kept = self.kept.lock();
            let id = kept.newest() + 1;
            let event = Event { id, at: Timestamp::now(), severity, kind: kind.to_owned(), subject, actor, message };
            let forgotten = kept.push(event.clone());
            (event, forgotten)
        };
        self.newest.send_replace(event.id);
        let Ok(json) = serde_json::to_vec(&event) else { return };
        let key = event.id.to_be_bytes();
        let mut changes: Vec<(&[u8], Option<&[u8]>)> = vec![(&key, Some(&json))];
        let old = forgotten.map(u64::to_be_bytes);
        changes.extend(old.as_ref().map(|key| (key.as_slice(), None)));
        if let Err(error) = self.state_db.change_records(Table::Events, &changes, Durability::Eventual) {
            tracing::warn!("event {} will not survive a restart: {error}", event.id);
        }
    }

    /// Up to `limit` events after number `after`, oldest first.
    pub fn after(&self, after: u64, limit: usize) -> Vec<Event> {
        let kept = self.kept.lock();
        let from = after.saturating_add(1);
        kept.by_id.range(from..).take(limit).map(|(_, event)| event.clone()).collect()
    }

    /// The number after which all events from `since` on come. If the clock was put back, older events may come with them, but none is
    /// missed.
    pub fn before(&self, since: Timestamp) -> u64 {
        let kept = self.kept.lock();
        let first = kept.by_id.iter().find(|(_, event)| event.at >= since);
        first.map_or_else(|| kept.newest(), |(id, _)| id.saturating_sub(1))
    }

    /// A receiver of the newest event's number, notified of each new event.
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}

/// Shortens a text that is too long.
fn cut(text: &mut String) {
    if text.len() > TEXT_MAX {
        text.truncate(text.floor_char_boundary(TEXT_MAX));
        text.push('…');
    }
}

/// The log's name, which it is given when it begins.
fn log_name(state_db: &dyn StateDb) -> Result<String, StateError> {
    if let Some(name) = state_db.record(Table::Events, NAME_KEY)? {
        return Ok(String::from_utf8_lossy(&name).into_owned());
    }
    let name = format!("{:016x}", rand::random::<u64>());
    state_db.change_records(Table::Events, &[(NAME_KEY, Some(name.as_bytes()))], Durability::Synced)?;
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::state_db::database::StateDatabase;

    #[test]
    fn a_flood_of_one_class_does_not_push_out_what_administrators_did() {
        let state_db = Arc::new(crate::state::state_db::memory::MemoryStateDb::default());
        let events = Events::open(state_db.clone()).unwrap();
        let event = |kind, n: usize| NewEvent::new(Severity::Info, kind, n, format!("{kind} {n}"));
        events.record(event("token.created", 0).by("uid 0"));
        events.record(event("settings.applied", 0).by("uid 0"));
        events.record(event("access.refused", 0));
        (0..KEEP + 5).for_each(|n| events.record(event("job.submitted", n).by("token host")));
        (0..KEEP + 5).for_each(|n| events.record(event("access.refused", n)));
        for events in [&events, &Events::open(state_db).unwrap()] {
            let first: Vec<String> = events.after(0, 3).into_iter().map(|event| event.message).collect();
            assert_eq!(first, ["token.created 0", "settings.applied 0", "job.submitted 5"]);
            assert_eq!(events.after(0, usize::MAX).len(), 2 + 2 * KEEP);
            assert_eq!(*events.newest().borrow(), 13 + 2 * KEEP as u64);
        }
        events.record(NewEvent::new(Severity::Info, "job.failed", "x", "é".repeat(TEXT_MAX)));
        assert!(events.after(13 + 2 * KEEP as u64, 1)[0].message.len() < TEXT_MAX + 4);
    }

    #[test]
    fn events_are_numbered_and_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Events::open(Arc::new(StateDatabase::open(dir.path()).unwrap())).unwrap();
        let mut name = String::new();
        let event = |n: u32| NewEvent::new(Severity::Warning, "job.failed", n, format!("job {n} failed"));
        {
            let events = open();
            let newest = events.newest();
            (1..=3).for_each(|n| events.record(event(n).by("uid 0")));
            assert_eq!(*newest.borrow(), 3);
            name.push_str(events.name());
        }
        let events = open();
        assert_eq!(events.name(), name);
        events.record(event(4));
        let seen = events.after(1, 2);
        assert_eq!(seen.iter().map(|event| event.id).collect::<Vec<_>>(), [2, 3]);
        assert_eq!((seen[0].subject.as_str(), seen[0].actor.as_deref()), ("2", Some("uid 0")));
        assert_eq!(events.after(3, 9).iter().map(|event| event.id).collect::<Vec<_>>(), [4]);
        let of_the_last = events.after(3, 1)[0].at;
        let earlier = of_the_last - jiff::SignedDuration::from_hours(1);
        let later = of_the_last + jiff::SignedDuration::from_hours(1);
        assert_eq!([events.before(earlier), events.before(of_the_last), events.before(later)], [0, 3, 4]);
    }
}

//! What was asked of a disk and when, so that each round trip of a start can be accounted for.
//!
//! Recorded only between `record` and `timeline`.

use std::time::Instant;

use parking_lot::Mutex;
use serde_json::{Value, json};

/// The most requests that are recorded; later ones are not.
const ENTRIES_MAX: usize = 50_000;

/// One request.
struct Entry {
    kind: &'static str,
    object: String,
    asked: Instant,
    /// When it was answered, and the bytes that the answer carried.
    answered: Option<(Instant, u64)>,
}

struct Recording {
    begun: Instant,
    entries: Vec<Entry>,
}

/// Requests in the order in which they came.
#[derive(Default)]
pub(super) struct Timeline {
    /// Guards the recording, if there is one.
    recording: Mutex<Option<Recording>>,
}

/// A request's place on the timeline; nothing if it is not recorded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place(Option<usize>);

impl Timeline {
    /// Starts a new recording.
    pub(super) fn record(&self) {
        *self.recording.lock() = Some(Recording { begun: Instant::now(), entries: Vec::new() });
    }

    /// Notes a request. `object` is called only while requests are recorded.
    pub(super) fn asked(&self, kind: &'static str, object: impl FnOnce() -> String) -> Place {
        if self.recording.lock().is_none() {
            return Place(None);
        }
        let entry = Entry { kind, object: object(), asked: Instant::now(), answered: None };
        let mut recording = self.recording.lock();
        let entries = recording.as_mut().map(|recording| &mut recording.entries);
        let place = entries.filter(|entries| entries.len() < ENTRIES_MAX).map(|entries| {
            entries.push(entry);
            entries.len() - 1
        });
        Place(place)
    }

    /// Notes that a request was answered with so many bytes.
    pub(super) fn answered(&self, place: Place, bytes: u64) {
        let Some(number) = place.0 else { return };
        let mut recording = self.recording.lock();
        if let Some(entry) = recording.as_mut().and_then(|recording| recording.entries.get_mut(number)) {
            entry.answered = Some((Instant::now(), bytes));
        }
    }

    /// Ends the recording. For each request: when it was asked, milliseconds since the recording began; how long it
    /// waited; kind, object and bytes.
    pub(super) fn end(&self) -> Value {
        let Some(Recording { begun, entries }) = self.recording.lock().take() else { return json!([]) };
        let millis = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
        let shown = entries.iter().map(|entry| {
            json!({
                "at_ms": millis(begun, entry.asked),
                "wait_ms": entry.answered.map(|(at, _)| millis(entry.asked, at)),
                "kind": entry.kind,
                "object": entry.object,
                "bytes": entry.answered.map_or(0, |(_, bytes)| bytes),
            })
        });
        Value::Array(shown.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_recorded_on_demand_only() {
        let timeline = Timeline::default();
        let unseen = timeline.asked("read", || panic!("nothing is recorded"));
        timeline.record();
        timeline.answered(unseen, 9);
        let first = timeline.asked("open", || "a".to_owned());
        timeline.asked("read", || "b".to_owned());
        timeline.answered(first, 5);
        let shown = timeline.end();
        assert_eq!(
            (&shown[0]["kind"], &shown[0]["object"], &shown[0]["bytes"]),
            (&json!("open"), &json!("a"), &json!(5))
        );
        assert!(shown[0]["wait_ms"].is_number() && shown[1]["wait_ms"].is_null());
        assert_eq!(timeline.end(), json!([]));
    }
}

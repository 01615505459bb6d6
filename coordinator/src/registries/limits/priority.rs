//! Whose turn it is: the highest priority's, and waiting raises it.
//!
//! One point for each [`STEP`] of waiting. So one who waits is overtaken only by those who came at most `STEP` times the difference
//! of their priorities later: none starves, however many urgent ones keep coming. Jobs and layers go by the same rule.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;

/// So long a wait is worth one point of priority.
pub const STEP: Duration = Duration::from_secs(60);

/// The urgency at `now` of one who has waited since `since`: comparable, not for people.
pub fn urgency(priority: i32, since: Timestamp, now: Timestamp) -> i128 {
    let waited = now.duration_since(since).as_nanos().max(0);
    i128::from(priority) * STEP.as_nanos() as i128 + waited
}

/// A priority that may rise while work for it is under way.
#[derive(Debug, Clone)]
pub struct LivePriority(Arc<AtomicI32>);

impl LivePriority {
    /// It begins at `priority`.
    pub fn new(priority: i32) -> LivePriority {
        LivePriority(Arc::new(AtomicI32::new(priority)))
    }

    /// At least `priority` from now on.
    pub fn raise(&self, priority: i32) {
        self.0.fetch_max(priority, Ordering::Relaxed);
    }

    /// What it is now.
    pub fn get(&self) -> i32 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Those for whom one piece of work is done: it is as urgent as the most urgent of them.
///
/// The lock guards the list and is held for a look at it.
#[derive(Debug, Default)]
pub struct Waiters(Mutex<Vec<LivePriority>>);

impl Waiters {
    /// The work is done for this one, too.
    pub fn join(&self, priority: LivePriority) {
        self.0.lock().push(priority);
    }

    /// This one does not want it any more; tells whether nobody does.
    pub fn leave(&self, priority: &LivePriority) -> bool {
        let mut all = self.0.lock();
        if let Some(at) = all.iter().position(|other| Arc::ptr_eq(&other.0, &priority.0)) {
            all.swap_remove(at);
        }
        all.is_empty()
    }

    /// The priority of the work now.
    pub fn priority(&self) -> i32 {
        self.0.lock().iter().map(LivePriority::get).max().unwrap_or(i32::MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_as_urgent_as_the_most_urgent_who_wants_it() {
        let (first, second) = (LivePriority::new(1), LivePriority::new(5));
        let all = Waiters::default();
        all.join(first.clone());
        all.join(second.clone());
        assert_eq!(all.priority(), 5);
        assert!(!all.leave(&second));
        assert_eq!(all.priority(), 1);
        first.raise(7);
        first.raise(3);
        assert_eq!(all.priority(), 7);
        assert!(!all.leave(&second), "it has left already");
        assert!(all.leave(&first));
        assert_eq!(all.priority(), i32::MIN);
    }
}

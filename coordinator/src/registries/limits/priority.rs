//! Decides whose turn it is: the highest priority goes first, and waiting raises it.
//!
//! Each [`STEP`] of waiting is worth one point. So an entry is only overtaken by those that arrive at most `STEP` times the difference of
//! their priorities later, and none starves, however many urgent ones keep arriving. Jobs and layers follow the same rule.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;

/// A wait of this length is worth one point of priority.
pub const STEP: Duration = Duration::from_secs(60);

/// The urgency at `now` of an entry that has waited since `since`. Only meant for comparison.
pub fn urgency(priority: i32, since: Timestamp, now: Timestamp) -> i128 {
    let waited = now.duration_since(since).as_nanos().max(0);
    i128::from(priority) * STEP.as_nanos() as i128 + waited
}

/// A priority that may rise while work for it is under way.
#[derive(Debug, Clone)]
pub struct LivePriority(Arc<AtomicI32>);

impl LivePriority {
    /// Starts at `priority`.
    pub fn new(priority: i32) -> LivePriority {
        LivePriority(Arc::new(AtomicI32::new(priority)))
    }

    /// Raises it to at least `priority`.
    pub fn raise(&self, priority: i32) {
        self.0.fetch_max(priority, Ordering::Relaxed);
    }

    /// The current priority.
    pub fn get(&self) -> i32 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The jobs that wait for one piece of work, which is as urgent as the most urgent of them.
///
/// The lock guards the list and is only held to read or change it.
#[derive(Debug, Default)]
pub struct Waiters(Mutex<Vec<LivePriority>>);

impl Waiters {
    /// Adds a job, given by its priority.
    pub fn join(&self, priority: LivePriority) {
        self.0.lock().push(priority);
    }

    /// Removes a job. Returns whether none is left.
    pub fn leave(&self, priority: &LivePriority) -> bool {
        let mut all = self.0.lock();
        if let Some(at) = all.iter().position(|other| Arc::ptr_eq(&other.0, &priority.0)) {
            all.swap_remove(at);
        }
        all.is_empty()
    }

    /// The current priority of the work; `i32::MIN` if no job waits for it.
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

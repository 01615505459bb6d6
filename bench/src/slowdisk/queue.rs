//! Work that is due at a given time, done by a fixed number of threads.
//!
//! One idle thread waits for the earliest time on behalf of all. When it takes work, it wakes another thread to wait in
//! its place. So each piece of work costs one wake-up, and any number of them can wait at the same time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

/// Enough for all that the directory behind the disk can have in flight. Waiting work occupies no thread.
const THREADS: usize = 16;

type Work = Box<dyn FnOnce() + Send>;

struct Due {
    at: Instant,
    /// Keeps work that is due at the same time in order.
    number: u64,
    work: Work,
}

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        self.number == other.number
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Due) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

#[derive(Default)]
struct State {
    waiting: BinaryHeap<Reverse<Due>>,
    pushed: u64,
    /// No work is done while this is true.
    held: bool,
    /// A thread is waiting for the earliest time.
    timed: bool,
}

#[derive(Default)]
struct Shared {
    /// Guards the waiting work and the two flags.
    state: Mutex<State>,
    /// Wakes the thread that waits for the earliest time, because that time has changed.
    earlier: Condvar,
    /// Wakes one of the other threads, which then waits for the earliest time.
    idle: Condvar,
}

/// A queue with its threads, which live as long as the process.
pub(super) struct Queue(Arc<Shared>);

impl Queue {
    pub(super) fn new() -> Queue {
        let shared = Arc::new(Shared::default());
        for _ in 0..THREADS {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.work());
        }
        Queue(shared)
    }

    /// Does `work` at the time `at`, or later if all threads are busy or the queue is held.
    pub(super) fn push(&self, at: Instant, work: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state.lock();
        let earliest = state.waiting.peek().is_none_or(|Reverse(first)| at < first.at);
        state.pushed += 1;
        let number = state.pushed;
        state.waiting.push(Reverse(Due { at, number, work: Box::new(work) }));
        if earliest {
            self.0.earlier.notify_one();
        }
    }

    /// Holds all work back, or releases it.
    pub(super) fn hold(&self, held: bool) {
        self.0.state.lock().held = held;
        self.0.earlier.notify_one();
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            let next = state.waiting.peek().filter(|_| !state.held).map(|Reverse(first)| first.at);
            if next.is_some_and(|at| at <= Instant::now()) {
                let due = state.waiting.pop();
                self.idle.notify_one();
                drop(state);
                if let Some(Reverse(due)) = due {
                    (due.work)();
                }
                state = self.state.lock();
            } else if state.timed {
                self.idle.wait(&mut state);
            } else {
                state.timed = true;
                match next {
                    Some(at) => drop(self.earlier.wait_until(&mut state, at)),
                    None => self.earlier.wait(&mut state),
                }
                state.timed = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn work_is_done_when_it_is_due_and_not_in_the_order_of_pushing() {
        let queue = Queue::new();
        let (send, receive) = mpsc::channel();
        let start = Instant::now();
        for milliseconds in [90, 30, 60] {
            let send = send.clone();
            let at = start + Duration::from_millis(milliseconds);
            queue.push(at, move || send.send((milliseconds, Instant::now() >= at)).unwrap());
        }
        let done: Vec<_> = (0..3).map(|_| receive.recv_timeout(LONG).unwrap()).collect();
        assert_eq!(done, [(30, true), (60, true), (90, true)]);
    }

    #[test]
    fn what_is_held_waits_and_then_all_of_it_is_done() {
        let queue = Queue::new();
        let (send, receive) = mpsc::channel();
        queue.hold(true);
        for number in 0..1000 {
            let send = send.clone();
            queue.push(Instant::now(), move || send.send(number).unwrap());
        }
        assert!(receive.recv_timeout(Duration::from_millis(50)).is_err());
        queue.hold(false);
        let mut done: Vec<i32> = (0..1000).map(|_| receive.recv_timeout(LONG).unwrap()).collect();
        done.sort_unstable();
        assert_eq!(done, (0..1000).collect::<Vec<_>>());
    }
}

//! One fetch of each key, however many wait for it.
//!
//! ```text
//!   join (first) -> under way -> complete -> completed -> forget
//!                        |    \-> end, or complete with a failure
//!                        \-> abandon, when nobody waits any more
//! ```
//!
//! Waiters are callbacks, not blocked threads: a FUSE thread that joins goes on with the next request. A good result
//! stays until [`SingleFlight::forget`], so that whoever comes before it has reached the local disk need not fetch it
//! again. A fetch that panics fails for all waiters ([`Guard`]). Each waiter has a deadline. The fetch itself has none,
//! because a thread inside a hung system call cannot be called back.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Instant;

use parking_lot::Mutex;

use crate::source::failure::{Failure, Result};

/// The callback that is given the result.
pub type Done<V> = Box<dyn FnOnce(Result<V>) + Send>;

struct Waiter<V> {
    deadline: Instant,
    done: Done<V>,
}

struct Fetch<V> {
    result: Option<V>,
    waiters: Vec<Waiter<V>>,
}

/// Fetches under way, by key.
pub struct SingleFlight<K, V> {
    /// Guards the table only; no callback runs under it.
    table: Mutex<HashMap<K, Fetch<V>>>,
}

/// What joining means for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Joined {
    /// The caller must start the fetch.
    First,
    /// The fetch is under way, or the callback has been called already.
    Later,
}

impl<K, V> Default for SingleFlight<K, V> {
    fn default() -> Self {
        SingleFlight { table: Mutex::new(HashMap::new()) }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> SingleFlight<K, V> {
    /// Waits for `key`: `done` is called with the result, or at the `deadline`, or now if the result is known.
    pub fn join(&self, key: K, deadline: Instant, done: Done<V>) -> Joined {
        let mut table = self.table.lock();
        if let Some(fetch) = table.get_mut(&key) {
            if let Some(value) = fetch.result.clone() {
                drop(table);
                done(Ok(value));
            } else {
                fetch.waiters.push(Waiter { deadline, done });
            }
            return Joined::Later;
        }
        table.insert(key, Fetch { result: None, waiters: vec![Waiter { deadline, done }] });
        Joined::First
    }

    /// Starts a fetch that nobody waits for yet; returns whether none was under way.
    pub fn reserve(&self, key: K) -> bool {
        let mut table = self.table.lock();
        let is_new = !table.contains_key(&key);
        if is_new {
            table.insert(key, Fetch { result: None, waiters: Vec::new() });
        }
        is_new
    }

    /// Gives the result to all waiters. A good one stays until [`SingleFlight::forget`].
    pub fn complete(&self, key: &K, result: Result<V>) {
        let Ok(value) = &result else { return self.end(key, result) };
        let waiters = self.table.lock().get_mut(key).map(|fetch| {
            fetch.result = Some(value.clone());
            std::mem::take(&mut fetch.waiters)
        });
        tell(waiters, &result);
    }

    /// Gives the result to all waiters, and does not keep it: whoever comes next fetches anew.
    pub fn end(&self, key: &K, result: Result<V>) {
        let waiters = self.table.lock().remove(key).map(|fetch| fetch.waiters);
        tell(waiters, &result);
    }

    /// Forgets a good result.
    pub fn forget(&self, key: &K) {
        self.table.lock().remove(key);
    }

    /// Ends these fetches with a failure if the thread panics while the guard lives: the waiters are told, and whoever
    /// comes next fetches anew.
    pub fn guard(&self, keys: Vec<K>) -> Guard<'_, K, V> {
        Guard { single_flight: self, keys }
    }

    /// Whether anybody still waits.
    pub fn is_wanted(&self, key: &K) -> bool {
        self.table.lock().get(key).is_some_and(|fetch| !fetch.waiters.is_empty())
    }

    /// Whether nothing is under way and no result is kept.
    pub fn is_empty(&self) -> bool {
        self.table.lock().is_empty()
    }

    /// Gives up a fetch if nobody waits for it; returns whether it is gone.
    pub fn abandon(&self, key: &K) -> bool {
        let mut table = self.table.lock();
        match table.get(key) {
            Some(fetch) if !fetch.waiters.is_empty() => false,
            _ => {
                table.remove(key);
                true
            }
        }
    }

    /// Fails the waiters whose deadline has passed; returns their number. The fetches go on.
    pub fn expire(&self, now: Instant) -> usize {
        let mut late = Vec::new();
        for fetch in self.table.lock().values_mut() {
            late.extend(fetch.waiters.extract_if(.., |waiter| waiter.deadline <= now));
        }
        let count = late.len();
        for waiter in late {
            (waiter.done)(Err(Failure::TimedOut));
        }
        count
    }
}

/// See [`SingleFlight::guard`].
pub struct Guard<'a, K: Hash + Eq + Clone, V: Clone> {
    single_flight: &'a SingleFlight<K, V>,
    keys: Vec<K>,
}

impl<K: Hash + Eq + Clone, V: Clone> Drop for Guard<'_, K, V> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keys.iter().for_each(|key| self.single_flight.end(key, Err(Failure::Unreachable)));
        }
    }
}

fn tell<V: Clone>(waiters: Option<Vec<Waiter<V>>>, result: &Result<V>) {
    for waiter in waiters.into_iter().flatten() {
        (waiter.done)(result.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Duration;

    fn joined(fetches: &SingleFlight<u8, u32>, deadline: Instant) -> (Joined, Receiver<Result<u32>>) {
        let (send, receive) = channel();
        (fetches.join(7, deadline, Box::new(move |r| send.send(r).unwrap())), receive)
    }

    #[test]
    fn the_first_fetches_and_all_are_told() {
        let fetches = SingleFlight::default();
        let later = Instant::now() + Duration::from_secs(100);
        let (first, a) = joined(&fetches, later);
        let (second, b) = joined(&fetches, later);
        assert_eq!((first, second), (Joined::First, Joined::Later));
        assert!(fetches.is_wanted(&7) && !fetches.abandon(&7));
        fetches.complete(&7, Ok(5));
        assert_eq!((a.recv().unwrap(), b.recv().unwrap()), (Ok(5), Ok(5)));
        let (late, c) = joined(&fetches, later);
        assert_eq!((late, c.try_recv().unwrap()), (Joined::Later, Ok(5)), "a good result stays until it is forgotten");
        fetches.forget(&7);
        assert_eq!(joined(&fetches, later).0, Joined::First);
    }

    #[test]
    fn a_failure_is_told_and_forgotten() {
        let fetches = SingleFlight::default();
        let (_, a) = joined(&fetches, Instant::now());
        fetches.complete(&7, Err(Failure::Damaged));
        assert_eq!(a.recv().unwrap(), Err(Failure::Damaged));
        assert_eq!(joined(&fetches, Instant::now()).0, Joined::First);
    }

    #[test]
    fn a_fetch_that_panics_tells_those_who_wait_and_the_next_one_starts_anew() {
        let fetches = SingleFlight::default();
        let later = Instant::now() + Duration::from_secs(100);
        let (_, a) = joined(&fetches, later);
        let fetch = || {
            let _guard = fetches.guard(vec![7]);
            panic!("expected by this test");
        };
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(fetch)).is_err());
        assert_eq!(a.try_recv().unwrap(), Err(Failure::Unreachable));
        assert_eq!(joined(&fetches, later).0, Joined::First);
        drop(fetches.guard(vec![7]));
        assert!(fetches.is_wanted(&7), "without a panic a guard does nothing");
    }

    #[test]
    fn a_reserved_flight_is_joined_or_given_up() {
        let fetches = SingleFlight::default();
        assert!(fetches.reserve(7) && !fetches.reserve(7));
        assert!(fetches.abandon(&7) && fetches.reserve(7));
        let (role, told) = joined(&fetches, Instant::now());
        assert_eq!(role, Joined::Later);
        assert!(!fetches.abandon(&7));
        fetches.complete(&7, Ok(3));
        assert_eq!(told.recv().unwrap(), Ok(3));
    }

    #[test]
    fn time_ends_for_some_and_the_flight_goes_on() {
        let fetches = SingleFlight::default();
        let now = Instant::now();
        let (_, short) = joined(&fetches, now);
        let (_, long) = joined(&fetches, now + Duration::from_secs(9));
        assert_eq!(fetches.expire(now), 1);
        assert_eq!(short.recv().unwrap(), Err(Failure::TimedOut));
        fetches.complete(&7, Ok(1));
        assert_eq!(long.recv().unwrap(), Ok(1));
        fetches.forget(&7);
        let (_, gone) = joined(&fetches, now);
        fetches.expire(now);
        assert!(gone.recv().unwrap().is_err() && fetches.abandon(&7));
    }
}

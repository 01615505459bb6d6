//! One fetch, many who wait for it.
//!
//! ```text
//!   board (first) -> in flight -> land -> landed -> finish
//!                        |    \-> end, or land with a failure
//!                        \-> abandon, when nobody waits any more
//! ```
//!
//! Those who wait are callbacks, not blocked threads: a FUSE worker that boards goes on with the next request. A
//! landed result stays until [`Flights::finish`], so that whoever comes before it has reached the local disk need not
//! fetch it again. A fetch that panics ends its flights by a [`Guard`]. Everyone has a deadline; the fetch itself has none, because a thread inside a hung system call cannot be
//! called back.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Instant;

use parking_lot::Mutex;

use crate::failure::{Failure, Result};

/// What is called with the result.
pub type Done<V> = Box<dyn FnOnce(Result<V>) + Send>;

struct Waiter<V> {
    deadline: Instant,
    done: Done<V>,
}

struct Flight<V> {
    landed: Option<V>,
    waiters: Vec<Waiter<V>>,
}

/// Fetches under way, by key.
pub struct Flights<K, V> {
    /// Guards the table only; no callback runs under it.
    table: Mutex<HashMap<K, Flight<V>>>,
}

/// What boarding means for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Boarding {
    /// The caller must start the fetch.
    First,
    /// The fetch is under way, or the callback has been called already.
    Joined,
}

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Flights { table: Mutex::new(HashMap::new()) }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Flights<K, V> {
    /// Waits for `key`: `done` is called with the result, or at the `deadline`, or now if it has landed.
    pub fn board(&self, key: K, deadline: Instant, done: Done<V>) -> Boarding {
        let mut table = self.table.lock();
        if let Some(flight) = table.get_mut(&key) {
            if let Some(value) = flight.landed.clone() {
                drop(table);
                done(Ok(value));
            } else {
                flight.waiters.push(Waiter { deadline, done });
            }
            return Boarding::Joined;
        }
        table.insert(key, Flight { landed: None, waiters: vec![Waiter { deadline, done }] });
        Boarding::First
    }

    /// Starts a flight that nobody waits for yet; tells whether there was none.
    pub fn reserve(&self, key: K) -> bool {
        let mut table = self.table.lock();
        let is_new = !table.contains_key(&key);
        if is_new {
            table.insert(key, Flight { landed: None, waiters: Vec::new() });
        }
        is_new
    }

    /// Tells everyone the result. A good one stays until [`Flights::finish`].
    pub fn land(&self, key: &K, result: Result<V>) {
        let Ok(value) = &result else { return self.end(key, result) };
        let waiters = self.table.lock().get_mut(key).map(|flight| {
            flight.landed = Some(value.clone());
            std::mem::take(&mut flight.waiters)
        });
        tell(waiters, &result);
    }

    /// Tells everyone the result, which does not stay: whoever comes next fetches anew.
    pub fn end(&self, key: &K, result: Result<V>) {
        let waiters = self.table.lock().remove(key).map(|flight| flight.waiters);
        tell(waiters, &result);
    }

    /// Forgets a landed result.
    pub fn finish(&self, key: &K) {
        self.table.lock().remove(key);
    }

    /// Ends these flights with a failure if the thread panics while the guard lives: whoever waits is told, and whoever comes next
    /// fetches anew.
    pub fn guard(&self, keys: Vec<K>) -> Guard<'_, K, V> {
        Guard { flights: self, keys }
    }

    /// Whether anybody still waits.
    pub fn is_wanted(&self, key: &K) -> bool {
        self.table.lock().get(key).is_some_and(|flight| !flight.waiters.is_empty())
    }

    /// Whether nothing is under way and nothing has landed.
    pub fn is_empty(&self) -> bool {
        self.table.lock().is_empty()
    }

    /// Gives a flight up if nobody waits for it: tells whether it is gone.
    pub fn abandon(&self, key: &K) -> bool {
        let mut table = self.table.lock();
        match table.get(key) {
            Some(flight) if !flight.waiters.is_empty() => false,
            _ => {
                table.remove(key);
                true
            }
        }
    }

    /// Tells those whose time is up; gives their number. The flights go on.
    pub fn expire(&self, now: Instant) -> usize {
        let mut late = Vec::new();
        for flight in self.table.lock().values_mut() {
            late.extend(flight.waiters.extract_if(.., |waiter| waiter.deadline <= now));
        }
        let count = late.len();
        for waiter in late {
            (waiter.done)(Err(Failure::TimedOut));
        }
        count
    }
}

/// See [`Flights::guard`].
pub struct Guard<'a, K: Hash + Eq + Clone, V: Clone> {
    flights: &'a Flights<K, V>,
    keys: Vec<K>,
}

impl<K: Hash + Eq + Clone, V: Clone> Drop for Guard<'_, K, V> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keys.iter().for_each(|key| self.flights.end(key, Err(Failure::Unreachable)));
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

    fn board(flights: &Flights<u8, u32>, deadline: Instant) -> (Boarding, Receiver<Result<u32>>) {
        let (send, receive) = channel();
        (flights.board(7, deadline, Box::new(move |r| send.send(r).unwrap())), receive)
    }

    #[test]
    fn the_first_fetches_and_all_are_told() {
        let flights = Flights::default();
        let later = Instant::now() + Duration::from_secs(100);
        let (first, a) = board(&flights, later);
        let (second, b) = board(&flights, later);
        assert_eq!((first, second), (Boarding::First, Boarding::Joined));
        assert!(flights.is_wanted(&7) && !flights.abandon(&7));
        flights.land(&7, Ok(5));
        assert_eq!((a.recv().unwrap(), b.recv().unwrap()), (Ok(5), Ok(5)));
        let (late, c) = board(&flights, later);
        assert_eq!((late, c.try_recv().unwrap()), (Boarding::Joined, Ok(5)), "landed results stay until finished");
        flights.finish(&7);
        assert_eq!(board(&flights, later).0, Boarding::First);
    }

    #[test]
    fn a_failure_is_told_and_forgotten() {
        let flights = Flights::default();
        let (_, a) = board(&flights, Instant::now());
        flights.land(&7, Err(Failure::Damaged));
        assert_eq!(a.recv().unwrap(), Err(Failure::Damaged));
        assert_eq!(board(&flights, Instant::now()).0, Boarding::First);
    }

    #[test]
    fn a_fetch_that_panics_tells_those_who_wait_and_the_next_one_starts_anew() {
        let flights = Flights::default();
        let later = Instant::now() + Duration::from_secs(100);
        let (_, a) = board(&flights, later);
        let fetch = || {
            let _guard = flights.guard(vec![7]);
            panic!("expected by this test");
        };
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(fetch)).is_err());
        assert_eq!(a.try_recv().unwrap(), Err(Failure::Unreachable));
        assert_eq!(board(&flights, later).0, Boarding::First);
        drop(flights.guard(vec![7]));
        assert!(flights.is_wanted(&7), "without a panic a guard does nothing");
    }

    #[test]
    fn a_reserved_flight_is_joined_or_given_up() {
        let flights = Flights::default();
        assert!(flights.reserve(7) && !flights.reserve(7));
        assert!(flights.abandon(&7) && flights.reserve(7));
        let (boarding, told) = board(&flights, Instant::now());
        assert_eq!(boarding, Boarding::Joined);
        assert!(!flights.abandon(&7));
        flights.land(&7, Ok(3));
        assert_eq!(told.recv().unwrap(), Ok(3));
    }

    #[test]
    fn time_ends_for_some_and_the_flight_goes_on() {
        let flights = Flights::default();
        let now = Instant::now();
        let (_, short) = board(&flights, now);
        let (_, long) = board(&flights, now + Duration::from_secs(9));
        assert_eq!(flights.expire(now), 1);
        assert_eq!(short.recv().unwrap(), Err(Failure::TimedOut));
        flights.land(&7, Ok(1));
        assert_eq!(long.recv().unwrap(), Ok(1));
        flights.finish(&7);
        let (_, gone) = board(&flights, now);
        flights.expire(now);
        assert!(gone.recv().unwrap().is_err() && flights.abandon(&7));
    }
}

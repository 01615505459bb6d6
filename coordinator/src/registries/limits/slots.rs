//! Slots for parallel layer fetches: a limit in all and one for each registry. Both may change while slots are taken.
//!
//! Among the waiting fetches whose registry has a free slot, the most urgent goes next ([`priority`](super::priority)); among equals, the
//! first to arrive. So a registry at its limit delays no other.
//!
//! A registry that is slow on purpose could occupy all slots. So when all are taken, a registry that has none gets an extra one: a slow
//! registry delays only itself.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use jiff::Timestamp;

use crate::registries::limits::priority::{Waiters, urgency};

/// Maximum number of extra slots, and so of registries that have one at a time.
const MOST_BEYOND: usize = 8;

/// The slots that are taken, and the fetches that wait for one.
#[derive(Debug, Default)]
pub struct Slots {
    taken: usize,
    by_registry: HashMap<String, usize>,
    waiting: BTreeMap<u64, Waiting>,
    last: u64,
}

/// A fetch that waits for a slot.
#[derive(Debug)]
struct Waiting {
    registry: String,
    waiters: Arc<Waiters>,
    since: Timestamp,
}

/// How many slots there are.
pub trait Capacity {
    /// Slots in all.
    fn in_all(&self) -> usize;
    /// Slots of one registry.
    fn of(&self, registry: &str) -> usize;
    /// Extra slots, for registries that have none.
    fn beyond(&self) -> usize;
}

/// The number of extra slots beyond `in_all`, for registries that have none.
pub fn beyond(in_all: usize) -> usize {
    in_all.clamp(1, MOST_BEYOND)
}

impl Slots {
    /// Joins the queue. Returns the ticket for [`Slots::take`] and [`Slots::leave`].
    pub fn queue(&mut self, registry: &str, waiters: &Arc<Waiters>, now: Timestamp) -> u64 {
        self.last += 1;
        let waiting = Waiting { registry: registry.to_owned(), waiters: Arc::clone(waiters), since: now };
        self.waiting.insert(self.last, waiting);
        self.last
    }

    /// Leaves the queue without a slot.
    pub fn leave(&mut self, ticket: u64) {
        self.waiting.remove(&ticket);
    }

    /// Takes a slot if it is this ticket's turn. Returns whether it was.
    pub fn take(&mut self, ticket: u64, room: &impl Capacity, now: Timestamp) -> bool {
        let is_full = self.taken >= room.in_all();
        if is_full && self.taken >= room.in_all() + room.beyond() {
            return false;
        }
        let eligible = self.waiting.iter().filter(|(_, waiting)| {
            let taken = self.of(&waiting.registry);
            if is_full { taken == 0 } else { taken < room.of(&waiting.registry) }
        });
        let turn = eligible.max_by_key(|(number, waiting)| {
            (urgency(waiting.waiters.priority(), waiting.since, now), Reverse(**number))
        });
        if turn.map(|(number, _)| *number) != Some(ticket) {
            return false;
        }
        if let Some(Waiting { registry, .. }) = self.waiting.remove(&ticket) {
            self.taken += 1;
            *self.by_registry.entry(registry).or_default() += 1;
        }
        true
    }

    /// Gives a slot back.
    pub fn give_back(&mut self, registry: &str) {
        self.taken = self.taken.saturating_sub(1);
        if let Some(count) = self.by_registry.get_mut(registry) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.by_registry.remove(registry);
            }
        }
    }

    /// Number of slots that one registry has taken.
    pub fn of(&self, registry: &str) -> usize {
        self.by_registry.get(registry).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registries::limits::priority::LivePriority;

    struct Small;

    impl Capacity for Small {
        fn in_all(&self) -> usize {
            3
        }
        fn of(&self, registry: &str) -> usize {
            if registry == "slow" { 1 } else { 9 }
        }
        fn beyond(&self) -> usize {
            2
        }
    }

    fn whom(priority: i32) -> (LivePriority, Arc<Waiters>) {
        let (priority, whom) = (LivePriority::new(priority), Arc::new(Waiters::default()));
        whom.join(priority.clone());
        (priority, whom)
    }

    #[test]
    fn the_most_urgent_goes_first_also_if_it_became_so_and_waiting_makes_up_for_it() {
        let mut slots = Slots::default();
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let (late, raised) = (whom(0), whom(0));
        let first = slots.queue("fast", &whom(0).1, at(0));
        let urgent = slots.queue("fast", &whom(5).1, at(10));
        let third = slots.queue("fast", &raised.1, at(10));
        let last = slots.queue("fast", &late.1, at(10));
        raised.0.raise(9);
        assert!(!slots.take(urgent, &Small, at(20)) && slots.take(third, &Small, at(20)));
        assert!(!slots.take(first, &Small, at(20)) && slots.take(urgent, &Small, at(20)));
        // An urgent newcomer does not overtake one that has waited for long.
        let newcomer = slots.queue("fast", &whom(5).1, at(400));
        assert!(!slots.take(newcomer, &Small, at(400)) && slots.take(first, &Small, at(400)));
        slots.give_back("fast");
        assert!(slots.take(last, &Small, at(400)), "ten seconds less, and still long enough");
    }

    #[test]
    fn a_registry_at_its_limit_holds_up_nobody_else() {
        let mut slots = Slots::default();
        let now = Timestamp::UNIX_EPOCH;
        let names = ["slow", "slow", "fast", "fast", "fast"];
        let tickets: Vec<u64> = names.map(|name| slots.queue(name, &whom(0).1, now)).to_vec();
        let take = |slots: &mut Slots, at: usize| slots.take(tickets[at], &Small, now);
        assert!(!take(&mut slots, 2), "not before the first");
        assert!(take(&mut slots, 0));
        assert!(!take(&mut slots, 1), "slow is full");
        assert!(take(&mut slots, 2) && take(&mut slots, 3));
        assert!(!take(&mut slots, 4), "all is full");
        slots.give_back("slow");
        assert!(!take(&mut slots, 4), "the second came before");
        assert!(take(&mut slots, 1));
        slots.give_back("fast");
        slots.leave(99);
        assert!(take(&mut slots, 4));
        assert_eq!((slots.of("slow"), slots.of("fast")), (1, 2));
    }

    #[test]
    fn a_registry_that_takes_all_places_leaves_one_for_every_other() {
        let mut slots = Slots::default();
        let now = Timestamp::UNIX_EPOCH;
        let tickets: Vec<u64> = ["evil"; 5]
            .iter()
            .chain(&["good", "good", "fine", "fourth"])
            .map(|name| slots.queue(name, &whom(0).1, now))
            .collect();
        let taken: Vec<usize> = (0..tickets.len()).filter(|at| slots.take(tickets[*at], &Small, now)).collect();
        assert_eq!(taken, [0, 1, 2, 5, 7], "three in all, and one for each of two that have none");
        slots.give_back("evil");
        assert!(!slots.take(tickets[3], &Small, now), "four are still taken");
        assert!(slots.take(tickets[8], &Small, now), "one that has none goes before the crowd");
    }
}

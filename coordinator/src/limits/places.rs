//! Places for parallel fetches: so many in all, so many from each registry, changeable while they are taken.
//!
//! Whoever waits is served in order of arrival among those whose registry has room, so that a registry at its limit
//! holds up nobody else.

use std::collections::{BTreeMap, HashMap};

/// Who has a place and who waits for one.
#[derive(Debug, Default)]
pub struct Places {
    taken: usize,
    by_registry: HashMap<String, usize>,
    waiting: BTreeMap<u64, String>,
    last: u64,
}

/// How many places there are.
pub trait Room {
    /// In all.
    fn in_all(&self) -> usize;
    /// From one registry.
    fn of(&self, registry: &str) -> usize;
}

impl Places {
    /// Joins the queue; the number is for [`Places::take`] and [`Places::leave`].
    pub fn queue(&mut self, registry: &str) -> u64 {
        self.last += 1;
        self.waiting.insert(self.last, registry.to_owned());
        self.last
    }

    /// Leaves the queue without a place.
    pub fn leave(&mut self, ticket: u64) {
        self.waiting.remove(&ticket);
    }

    /// Takes a place if it is this ticket's turn.
    pub fn take(&mut self, ticket: u64, room: &impl Room) -> bool {
        if self.taken >= room.in_all() {
            return false;
        }
        let has_room = |registry: &String| self.of(registry) < room.of(registry);
        let turn = self.waiting.iter().find(|(_, registry)| has_room(registry)).map(|(turn, _)| *turn);
        if turn != Some(ticket) {
            return false;
        }
        if let Some(registry) = self.waiting.remove(&ticket) {
            self.taken += 1;
            *self.by_registry.entry(registry).or_default() += 1;
        }
        true
    }

    /// Gives a place back.
    pub fn give_back(&mut self, registry: &str) {
        self.taken = self.taken.saturating_sub(1);
        if let Some(count) = self.by_registry.get_mut(registry) {
            *count = count.saturating_sub(1);
        }
    }

    /// Places taken for one registry.
    pub fn of(&self, registry: &str) -> usize {
        self.by_registry.get(registry).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Small;

    impl Room for Small {
        fn in_all(&self) -> usize {
            3
        }
        fn of(&self, registry: &str) -> usize {
            if registry == "slow" { 1 } else { 9 }
        }
    }

    #[test]
    fn a_registry_at_its_limit_holds_up_nobody_else() {
        let mut places = Places::default();
        let tickets: Vec<u64> = ["slow", "slow", "fast", "fast", "fast"].map(|name| places.queue(name)).to_vec();
        assert!(!places.take(tickets[2], &Small), "not before the first");
        assert!(places.take(tickets[0], &Small));
        assert!(!places.take(tickets[1], &Small), "slow is full");
        assert!(places.take(tickets[2], &Small) && places.take(tickets[3], &Small));
        assert!(!places.take(tickets[4], &Small), "all is full");
        places.give_back("slow");
        assert!(!places.take(tickets[4], &Small), "the second came before");
        assert!(places.take(tickets[1], &Small));
        places.give_back("fast");
        places.leave(99);
        assert!(places.take(tickets[4], &Small));
        assert_eq!((places.of("slow"), places.of("fast")), (1, 2));
    }
}

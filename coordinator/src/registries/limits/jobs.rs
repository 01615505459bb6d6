//! Slots for jobs that run at a time: so many in all, and one beyond them for a registry that has none.
//!
//! A job whose registry trickles its manifest holds its place as long as patience lasts; jobs of other registries must not wait for
//! that. The same rule as for layers ([`slots`](super::slots)).
//!
//! The lock guards the counts and is held for a look at them.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::registries::limits::slots::beyond;

/// Who runs.
#[derive(Debug)]
pub struct JobPlaces {
    in_all: usize,
    running: Mutex<HashMap<String, usize>>,
}

/// A place of one job; given back when dropped.
#[derive(Debug)]
pub struct JobPlace {
    slots: Arc<JobPlaces>,
    registry: String,
}

impl JobPlaces {
    /// `in_all` slots.
    pub fn new(in_all: usize) -> JobPlaces {
        JobPlaces { in_all, running: Mutex::default() }
    }

    /// Whether a job of this registry may start now.
    pub fn admits(&self, registry: &str) -> bool {
        let running = self.running.lock();
        let taken: usize = running.values().sum();
        taken < self.in_all || (!running.contains_key(registry) && taken < self.in_all + beyond(self.in_all))
    }

    /// Takes a place for a job of this registry, whether or not there is one.
    pub fn take(self: &Arc<Self>, registry: &str) -> JobPlace {
        *self.running.lock().entry(registry.to_owned()).or_default() += 1;
        JobPlace { slots: Arc::clone(self), registry: registry.to_owned() }
    }
}

impl Drop for JobPlace {
    fn drop(&mut self) {
        let mut running = self.slots.running.lock();
        if let Some(count) = running.get_mut(&self.registry) {
            *count -= 1;
            if *count == 0 {
                running.remove(&self.registry);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_that_takes_all_places_leaves_one_for_every_other() {
        let slots = Arc::new(JobPlaces::new(2));
        let evil = [slots.take("evil"), slots.take("evil")];
        assert!(!slots.admits("evil") && slots.admits("good"));
        let _good = slots.take("good");
        assert!(!slots.admits("good") && slots.admits("fine"));
        let _fine = slots.take("fine");
        assert!(!slots.admits("fifth"), "two in all, and two beyond");
        drop(evil);
        assert!(!slots.admits("good") && slots.admits("fifth"));
    }
}

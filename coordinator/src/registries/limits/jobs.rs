//! Slots for running jobs: a fixed number in all, plus an extra one for a registry that has none.
//!
//! A job whose registry trickles its manifest occupies its slot until its attempts time out; jobs of other registries must not wait for
//! that. Layers follow the same rule ([`slots`](super::slots)).
//!
//! The lock guards the counts and is only held to read or change them.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::registries::limits::slots::beyond;

/// The slots of all jobs, and how many each registry has taken.
#[derive(Debug)]
pub struct JobSlots {
    in_all: usize,
    running: Mutex<HashMap<String, usize>>,
}

/// The slot of one job, given back on drop.
#[derive(Debug)]
pub struct JobPermit {
    slots: Arc<JobSlots>,
    registry: String,
}

impl JobSlots {
    /// Creates `in_all` slots.
    pub fn new(in_all: usize) -> JobSlots {
        JobSlots { in_all, running: Mutex::default() }
    }

    /// Whether a job of this registry may start now.
    pub fn admits(&self, registry: &str) -> bool {
        let running = self.running.lock();
        let taken: usize = running.values().sum();
        taken < self.in_all || (!running.contains_key(registry) && taken < self.in_all + beyond(self.in_all))
    }

    /// Takes a slot for a job of this registry, even if none is free.
    pub fn take(self: &Arc<Self>, registry: &str) -> JobPermit {
        *self.running.lock().entry(registry.to_owned()).or_default() += 1;
        JobPermit { slots: Arc::clone(self), registry: registry.to_owned() }
    }
}

impl Drop for JobPermit {
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
        let slots = Arc::new(JobSlots::new(2));
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

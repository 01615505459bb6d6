//! Room in the cache: files are evicted when there are too many, or when one is about to be written that needs it.
//!
//! Copies of layers' indexes are cache files, too, but their use is not seen here: [`Users`] tells of it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use store::ContentDigest;

use super::eviction::Candidate;
use super::{Cache, body, eviction};

/// Tells which cache files others than the cache itself use: the copies of layers' indexes.
pub type Users = Box<dyn Fn() -> HashMap<ContentDigest, Use> + Send + Sync>;

/// How a cache file is used by others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// What runs now needs it.
    Held,
    /// It was read since this was last asked.
    Lately,
}

impl Cache {
    pub(super) fn make_room(&self) {
        *self.crowded.lock() = true;
        self.wake_evictor.notify_one();
    }

    /// Removes entries whenever there are too many; never returns. To be called on a thread of its own.
    pub fn keep_room(&self) {
        self.disk.survey();
        if self.disk.is_crowded() {
            self.make_room();
        }
        loop {
            let mut crowded = self.crowded.lock();
            while !*crowded {
                self.wake_evictor.wait(&mut crowded);
            }
            *crowded = false;
            drop(crowded);
            if self.evict() == 0 {
                // All that is left is open: looking again at once would find the same.
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }

    /// Leaves in the cache files when they were last used, for the daemon that comes next.
    pub fn remember_use(&self) {
        for shard in &self.shards {
            let bodies: Vec<_> = shard.lock().bodies.iter().map(|(_, body)| Arc::clone(body)).collect();
            bodies.iter().for_each(|body| body.remember_use());
        }
    }

    /// One round of eviction; gives the number of removed entries.
    pub fn evict(&self) -> usize {
        self.evict_some(self.disk.excess())
    }

    /// Makes room for a file of so many bytes; tells whether there is. No single one gets more than half of the room.
    pub fn make_room_for(&self, bytes: u64) -> bool {
        let (limit, needed) = (self.disk.limit(), bytes.saturating_add(self.disk.used()));
        if self.disk.is_resting() || bytes > limit / 2 {
            return false;
        }
        if needed > limit {
            self.evict_some(needed - limit);
        }
        bytes.saturating_add(self.disk.used()) <= limit
    }

    /// What others use counts as used now; what they hold stays, unless that takes more than half of the room.
    fn apply_uses(&self, candidates: &mut [Candidate]) {
        let Some(users) = self.users.get() else { return };
        let (uses, now) = (users(), body::now());
        let is_held = |candidate: &Candidate| uses.get(&candidate.digest) == Some(&Use::Held);
        let held: u64 = candidates.iter().filter(|candidate| is_held(candidate)).map(|held| held.bytes).sum();
        for candidate in candidates.iter_mut().filter(|candidate| uses.contains_key(&candidate.digest)) {
            candidate.last_used = now;
            candidate.in_use |= held <= self.disk.limit() / 2 && is_held(candidate);
        }
    }

    fn evict_some(&self, excess: u64) -> usize {
        if excess == 0 {
            return 0;
        }
        let _one_at_a_time = self.evicting.lock();
        let mut removed = 0;
        let mut candidates = self.disk.survey();
        self.apply_uses(&mut candidates);
        for candidate in &mut candidates {
            let shard = self.shard(&candidate.digest).lock();
            candidate.in_use |= shard.opens.contains_key(&candidate.digest);
            let body = shard.bodies.peek(&candidate.digest);
            candidate.last_used = candidate.last_used.max(body.map_or(0, |body| body.last_used()));
        }
        for victim in eviction::victims(candidates, excess) {
            let mut shard = self.shard(&victim.digest).lock();
            if shard.opens.contains_key(&victim.digest) {
                continue;
            }
            let body = shard.bodies.pop(&victim.digest);
            drop(shard);
            drop(body);
            self.disk.remove(&victim.digest);
            self.metrics().evicted_objects.one();
            self.metrics().evicted_bytes.add(victim.bytes);
            removed += 1;
        }
        removed
    }
}

//! Room in the cache: files are evicted when there are too many, or when room is needed for one that is about to be
//! written.
//!
//! Copies of layers' indexes are cache files, too, but their use is not seen here: [`super::eviction::Users`] reports
//! it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cache_file;
use super::eviction::{self, Candidate, Use};
use super::state::Cache;

/// After an eviction that made no room, none is tried for this long.
const PAUSE: Duration = Duration::from_secs(1);

impl Cache {
    pub(super) fn make_room(&self) {
        *self.crowded.lock() = true;
        self.wake_evictor.notify_one();
    }

    /// Evicts files whenever there are too many; never returns. Run it on a thread of its own.
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
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// Stores in the cache files when they were last used, for the next daemon.
    pub fn remember_use(&self) {
        for shard in &self.shards {
            let cache_files: Vec<_> =
                shard.lock().cache_files.iter().map(|(_, cache_file)| Arc::clone(cache_file)).collect();
            cache_files.iter().for_each(|cache_file| cache_file.remember_use());
        }
    }

    /// Runs one round of eviction; returns the number of removed entries.
    pub fn evict(&self) -> usize {
        self.evict_some(|| self.disk.excess())
    }

    /// Makes room for a file of `bytes` bytes; returns whether there is room now. No single file gets more than half of
    /// the limit.
    pub fn make_room_for(&self, bytes: u64) -> bool {
        let limit = self.disk.limit();
        if self.disk.is_resting() || bytes > limit / 2 {
            return false;
        }
        self.evict_some(|| bytes.saturating_add(self.disk.used()).saturating_sub(limit));
        bytes.saturating_add(self.disk.used()) <= limit
    }

    /// Makes room for chunks of a startup pack, which a start needs more than others need what is oldest; returns whether there is some.
    pub(super) fn make_room_at_start(&self) -> bool {
        let is_in_vain = self.evicted_nothing.lock().is_some_and(|at| at.elapsed() < PAUSE);
        let lacks_room = || self.disk.is_crowded() || !self.disk.accepts();
        // Looking for what is oldest takes long: so much goes that there is room for a while.
        if !is_in_vain && !self.disk.is_resting() {
            let removed = self.evict_some(|| if lacks_room() { self.disk.excess() } else { 0 });
            *self.evicted_nothing.lock() = (removed == 0 && lacks_room()).then(Instant::now);
        }
        self.disk.accepts()
    }

    /// Marks the files that others use as used now. Those that they hold stay, unless these take more than half of the
    /// limit.
    fn apply_uses(&self, candidates: &mut [Candidate]) {
        let Some(users) = self.users.get() else { return };
        let (uses, now) = (users(), cache_file::now());
        let is_held = |candidate: &Candidate| uses.get(&candidate.digest) == Some(&Use::Held);
        let held: u64 = candidates.iter().filter(|candidate| is_held(candidate)).map(|held| held.bytes).sum();
        for candidate in candidates.iter_mut().filter(|candidate| uses.contains_key(&candidate.digest)) {
            candidate.last_used = now;
            candidate.in_use |= held <= self.disk.limit() / 2 && is_held(candidate);
        }
    }

    /// Evicts what is too much. Whoever waits for another eviction may find that nothing is any more.
    fn evict_some(&self, excess: impl Fn() -> u64) -> usize {
        if excess() == 0 {
            return 0;
        }
        let _one_at_a_time = self.evicting.lock();
        let excess = excess();
        if excess == 0 {
            return 0;
        }
        let mut removed = 0;
        let mut candidates = self.disk.survey();
        self.apply_uses(&mut candidates);
        for candidate in &mut candidates {
            let shard = self.shard(&candidate.digest).lock();
            candidate.in_use |= shard.opens.contains_key(&candidate.digest);
            let cache_file = shard.cache_files.peek(&candidate.digest);
            candidate.last_used = candidate.last_used.max(cache_file.map_or(0, |cache_file| cache_file.last_used()));
        }
        for victim in eviction::victims(candidates, excess) {
            let mut shard = self.shard(&victim.digest).lock();
            if shard.opens.contains_key(&victim.digest) {
                continue;
            }
            let cache_file = shard.cache_files.pop(&victim.digest);
            drop(shard);
            drop(cache_file);
            self.disk.remove(&victim.digest);
            self.metrics().evicted_objects.one();
            self.metrics().evicted_bytes.add(victim.bytes);
            removed += 1;
        }
        removed
    }
}

//! Threads that may wait, so that no FUSE thread ever has to: some for the shared disk, others for this host's own.
//!
//! There are two pools ([`Pools`]), because a shared disk that hangs blocks one thread after the other. Jobs that need
//! nothing but the local disk and the processor run in a pool where no job may ask the shared disk, so they never queue
//! behind it.
//!
//! A pool is elastic: threads start when work is queued and none is idle, up to a limit, and end after some idle
//! seconds, because each keeps decompression buffers. Demand comes first, then the unpacking of what came from the
//! shared disk, then prefetching, then work that can wait. Only a little prefetching is under way at once, because
//! requests that the shared disk already has are served before the next demand. A thread that hangs on a dead shared
//! disk is lost until the disk answers; those who wait for its result are told by
//! [`crate::source::single_flight::SingleFlight::expire`].

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// An idle thread ends after this long.
const IDLE: Duration = Duration::from_secs(10);
/// How many prefetch jobs run at once. Each has one request of half a megabyte or so under way. Four of them keep a
/// disk of 5 ms and 100 MB/s busy, and a demand that arrives meanwhile waits for 2 MB at most.
pub const PREFETCHING: usize = 4;
/// How many prefetch jobs run at once while somebody waits for the shared disk.
const PREFETCHING_BESIDE_DEMAND: usize = 1;

/// The nice value of background work.
const BACKGROUND_NICENESS: i32 = 10;

type Job = Box<dyn FnOnce() + Send>;

/// What a job is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Somebody waits for it.
    Demand,
    /// It makes usable what came from the shared disk.
    Unpack,
    /// Nobody waits for it: it gets the processors' idle time.
    Background,
    /// Nobody may ever want its result.
    Prefetch,
}

/// The two pools of a daemon; clones share them.
#[derive(Clone)]
pub struct Pools {
    /// For work that touches the local disk and memory only: it ends soon, whatever the shared disk does.
    pub local: Pool,
    /// For work that waits for the shared disk.
    pub remote: Pool,
}

impl Pools {
    /// Pools of at most `local` and `remote` threads.
    pub fn new(local: usize, remote: usize) -> Pools {
        Pools { local: Pool::new("cachefs-local", local), remote: Pool::new("cachefs-store", remote) }
    }
}

/// A handle to one pool; clones share it.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    /// Guards the queues and the counts of threads; never held while a job runs.
    state: Mutex<State>,
    wake: Condvar,
    name: &'static str,
    limit: usize,
}

#[derive(Default)]
struct State {
    demand: VecDeque<Job>,
    unpack: VecDeque<Job>,
    background: VecDeque<Job>,
    prefetch: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// Demand and prefetch jobs that run now.
    demanding: usize,
    prefetching: usize,
}

impl State {
    fn may_prefetch(&self) -> usize {
        let limit = if self.demanding > 0 { PREFETCHING_BESIDE_DEMAND } else { PREFETCHING };
        limit.saturating_sub(self.prefetching).min(self.prefetch.len())
    }

    /// Jobs that a thread could take now.
    fn ready(&self) -> usize {
        self.demand.len() + self.unpack.len() + self.background.len() + self.may_prefetch()
    }

    /// How many threads the queues can use, now or once nobody waits any more.
    fn welcome(&self) -> usize {
        self.demand.len() + self.unpack.len() + self.background.len() + self.prefetch.len().min(PREFETCHING)
    }

    fn pop(&mut self) -> Option<(Priority, Job)> {
        if let Some(job) = self.demand.pop_front() {
            self.demanding += 1;
            return Some((Priority::Demand, job));
        }
        if let Some(job) = self.unpack.pop_front() {
            return Some((Priority::Unpack, job));
        }
        if self.may_prefetch() > 0
            && let Some(job) = self.prefetch.pop_front()
        {
            self.prefetching += 1;
            return Some((Priority::Prefetch, job));
        }
        self.background.pop_front().map(|job| (Priority::Background, job))
    }

    fn ended(&mut self, priority: Priority) {
        match priority {
            Priority::Demand => self.demanding -= 1,
            Priority::Unpack | Priority::Background => {}
            Priority::Prefetch => self.prefetching -= 1,
        }
    }
}

impl Pool {
    /// A pool of at most `limit` threads of that name.
    pub fn new(name: &'static str, limit: usize) -> Pool {
        let shared = Shared { state: Mutex::default(), wake: Condvar::new(), name, limit: limit.max(1) };
        Pool { shared: Arc::new(shared) }
    }

    /// Queues a job.
    pub fn submit(&self, priority: Priority, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock();
        match priority {
            Priority::Demand => state.demand.push_back(Box::new(job)),
            Priority::Unpack => state.unpack.push_back(Box::new(job)),
            Priority::Background => state.background.push_back(Box::new(job)),
            Priority::Prefetch => state.prefetch.push_back(Box::new(job)),
        }
        if state.welcome() > state.idle && state.threads < self.shared.limit {
            state.threads += 1;
            drop(state);
            self.start();
        }
        self.shared.wake.notify_one();
    }

    /// Background jobs that wait for a thread.
    pub fn backlog(&self) -> usize {
        self.shared.state.lock().background.len()
    }

    /// Whether no job waits or runs.
    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        let state = self.shared.state.lock();
        state.ready() == 0 && state.prefetch.is_empty() && state.idle == state.threads
    }

    fn start(&self) {
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new().name(shared.name.into()).spawn(move || shared.work());
        if let Err(error) = started {
            tracing::warn!("cannot start another thread of {}: {error}", self.shared.name);
            self.shared.state.lock().threads -= 1;
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut niceness = Niceness::default();
        let mut state = self.state.lock();
        loop {
            if let Some((priority, job)) = state.pop() {
                drop(state);
                niceness.set(priority);
                if std::panic::catch_unwind(AssertUnwindSafe(job)).is_err() {
                    tracing::error!("a job of {} panicked; please report this", self.name);
                }
                state = self.state.lock();
                state.ended(priority);
                if state.ready() > 1 {
                    self.wake.notify_one();
                }
                continue;
            }
            state.idle += 1;
            let waited = self.wake.wait_for(&mut state, IDLE);
            state.idle -= 1;
            if waited.timed_out() && state.ready() == 0 {
                state.threads -= 1;
                return;
            }
        }
    }
}

/// The nice value of a thread: background work, such as writing into the cache, must not take the processor from a
/// container.
#[derive(Default)]
struct Niceness(i32);

impl Niceness {
    fn set(&mut self, priority: Priority) {
        let wanted = match priority {
            Priority::Demand | Priority::Unpack | Priority::Prefetch => 0,
            Priority::Background => BACKGROUND_NICENESS,
        };
        // Not every process may lower its nice value again: then the thread keeps that of background work.
        if wanted != self.0 && rustix::process::setpriority_process(None, wanted).is_ok() {
            self.0 = wanted;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn demand_comes_first_and_a_panic_costs_no_thread() {
        let pool = Pool::new("test", 1);
        let (send, receive) = mpsc::channel();
        let (gate, wait) = mpsc::channel::<()>();
        pool.submit(Priority::Demand, move || wait.recv().unwrap());
        for (priority, name) in [(Priority::Background, "background"), (Priority::Demand, "demand")] {
            let send = send.clone();
            pool.submit(priority, move || send.send(name).unwrap());
        }
        pool.submit(Priority::Demand, || panic!("expected by this test"));
        assert_eq!(pool.backlog(), 1);
        gate.send(()).unwrap();
        assert_eq!([receive.recv().unwrap(), receive.recv().unwrap()], ["demand", "background"]);
    }

    #[test]
    fn little_is_prefetched_at_once_and_less_beside_demand() {
        let pool = Pool::new("test", 16);
        let (gate, wait) = mpsc::channel::<()>();
        pool.submit(Priority::Demand, move || wait.recv().unwrap());
        while pool.shared.state.lock().demanding == 0 {
            std::thread::yield_now();
        }
        let running = Arc::new(Mutex::new((0, 0)));
        let (send, receive) = mpsc::channel();
        for _ in 0..50 {
            let (running, send) = (running.clone(), send.clone());
            pool.submit(Priority::Prefetch, move || {
                let mut now = running.lock();
                *now = (now.0 + 1, now.1.max(now.0 + 1));
                drop(now);
                std::thread::yield_now();
                running.lock().0 -= 1;
                send.send(()).unwrap();
            });
        }
        (0..25).for_each(|_| receive.recv().unwrap());
        assert_eq!(running.lock().1, PREFETCHING_BESIDE_DEMAND);
        gate.send(()).unwrap();
        (0..25).for_each(|_| receive.recv().unwrap());
        assert!(running.lock().1 <= PREFETCHING);
    }

    #[test]
    fn threads_start_while_others_wait() {
        let pool = Pool::new("test", 8);
        let barrier = Arc::new(std::sync::Barrier::new(9));
        for _ in 0..8 {
            let barrier = Arc::clone(&barrier);
            pool.submit(Priority::Demand, move || _ = barrier.wait());
        }
        barrier.wait();
    }
}

//! One fetch per layer and registry, however many jobs want it.
//!
//! A fetch is identified by what is fetched and from where: registry, blob, and the layer that the blob is said to be. So a foreign
//! registry that claims to have a layer, and sends it slowly or never, delays only those who asked it.
//!
//! A fetch is a task of its own, not a part of the job that asked first. A job that is cancelled leaves, and the fetch goes on as long as
//! one job waits for it. When the last one leaves, the fetch is told to stop, and the next job that asks starts a new one.
//!
//! `under_way` guards the fetches under way, and joining and leaving them; it is never held across an await.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use store::Digest;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::jobs::pull::error::PullError;
use crate::jobs::pull::progress::LayerMeter;
use crate::registries::RemoteLayer;
use crate::registries::limits::priority::{LivePriority, Waiters};

/// How a fetch ended.
pub type FetchResult = Result<(), PullError>;

struct Fetch {
    number: u64,
    /// The jobs that wait for it.
    waiters: Arc<Waiters>,
    stop: CancellationToken,
    meter: Arc<LayerMeter>,
    result: watch::Receiver<Option<FetchResult>>,
}

/// What is fetched, and from where.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FetchKey {
    host: String,
    blob: Digest,
    diff_id: Digest,
}

impl FetchKey {
    /// The key for `layer` of the registry `host`.
    pub fn new(host: &str, layer: &RemoteLayer) -> FetchKey {
        FetchKey { host: host.to_owned(), blob: layer.blob, diff_id: layer.diff_id }
    }
}

#[derive(Default)]
struct UnderWay {
    fetches: HashMap<FetchKey, Fetch>,
    last: u64,
}

/// All fetches under way.
#[derive(Default)]
pub struct SingleFlight {
    under_way: Mutex<UnderWay>,
}

/// Whether a job started its fetch or joined it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joined {
    /// The fetch was started for this job.
    First,
    /// The fetch was already under way, started for another job.
    Later,
}

/// One job's interest in a fetch. Dropping it ends the interest.
pub struct JoinedFetch {
    single_flight: Arc<SingleFlight>,
    key: FetchKey,
    number: u64,
    waiters: Arc<Waiters>,
    priority: LivePriority,
    /// Whether the fetch was started for this job.
    pub joined: Joined,
    /// The fetch's progress.
    pub meter: Arc<LayerMeter>,
    result: watch::Receiver<Option<FetchResult>>,
}

impl SingleFlight {
    /// Joins the fetch of `key`, or makes one with `start` if none is under way. A fetch is as urgent as the most urgent of its waiters.
    pub fn join<F>(
        self: &Arc<Self>,
        key: FetchKey,
        meter: Arc<LayerMeter>,
        priority: LivePriority,
        start: impl FnOnce(CancellationToken, Arc<LayerMeter>, Arc<Waiters>) -> F,
    ) -> JoinedFetch
    where
        F: Future<Output = FetchResult> + Send + 'static,
    {
        let mut under_way = self.under_way.lock();
        if let Some(fetch) = under_way.fetches.get_mut(&key) {
            fetch.waiters.join(priority.clone());
            return JoinedFetch {
                waiters: Arc::clone(&fetch.waiters),
                priority,
                single_flight: Arc::clone(self),
                key,
                number: fetch.number,
                joined: Joined::Later,
                meter: Arc::clone(&fetch.meter),
                result: fetch.result.clone(),
            };
        }
        under_way.last += 1;
        let number = under_way.last;
        let (finish, result) = watch::channel(None);
        let stop = CancellationToken::new();
        let waiters = Arc::new(Waiters::default());
        waiters.join(priority.clone());
        let task = start(stop.clone(), Arc::clone(&meter), Arc::clone(&waiters));
        let (shared_waiters, shown) = (Arc::clone(&waiters), Arc::clone(&meter));
        let fetch = Fetch { number, waiters: shared_waiters, stop, meter: shown, result: result.clone() };
        under_way.fetches.insert(key.clone(), fetch);
        drop(under_way);
        let (fetches, ended) = (Arc::clone(self), key.clone());
        tokio::spawn(async move {
            let result = task.await;
            fetches.forget(&ended, number);
            let _ = finish.send(Some(result));
        });
        let single_flight = Arc::clone(self);
        JoinedFetch { single_flight, key, number, waiters, priority, joined: Joined::First, meter, result }
    }

    fn forget(&self, key: &FetchKey, number: u64) {
        let mut under_way = self.under_way.lock();
        if under_way.fetches.get(key).is_some_and(|fetch| fetch.number == number) {
            under_way.fetches.remove(key);
        }
    }
}

impl JoinedFetch {
    /// Waits for the fetch's end.
    pub async fn done(&mut self) -> FetchResult {
        match self.result.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or(Err(PullError::Cancelled)),
            Err(_) => Err(PullError::Cancelled),
        }
    }
}

impl Drop for JoinedFetch {
    fn drop(&mut self) {
        // Under the lock that joining takes, so that nobody joins a fetch for which no job waits any more.
        let mut under_way = self.single_flight.under_way.lock();
        let is_empty = self.waiters.leave(&self.priority);
        if let Some(fetch) = under_way.fetches.get(&self.key).filter(|fetch| is_empty && fetch.number == self.number) {
            fetch.stop.cancel();
            under_way.fetches.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;
    use crate::registries::compression::Compression;

    fn layer() -> RemoteLayer {
        let digest = Digest::of(b"x");
        RemoteLayer {
            diff_id: digest,
            blob: digest,
            claimed: 1,
            media_type: String::new(),
            encoding: Compression::Plain,
        }
    }

    struct Bench {
        fetches: Arc<SingleFlight>,
        started: AtomicUsize,
        go: Arc<Notify>,
    }

    impl Bench {
        fn new() -> Bench {
            Bench { fetches: Arc::default(), started: AtomicUsize::new(0), go: Arc::new(Notify::new()) }
        }

        fn join(&self) -> JoinedFetch {
            self.join_at("q.io")
        }

        fn join_at(&self, host: &str) -> JoinedFetch {
            let go = Arc::clone(&self.go);
            let (key, meter) = (FetchKey::new(host, &layer()), Arc::new(LayerMeter::new(&layer())));
            self.fetches.join(key, meter, LivePriority::new(0), |stop, _, _| {
                self.started.fetch_add(1, Ordering::Relaxed);
                async move {
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => Err(PullError::Cancelled),
                        () = go.notified() => Ok(()),
                    }
                }
            })
        }
    }

    #[tokio::test]
    async fn many_jobs_share_one_fetch_and_it_survives_its_starter() {
        let bench = Bench::new();
        let first = bench.join();
        let mut second = bench.join();
        let mut third = bench.join();
        assert_eq!(second.joined, Joined::Later);
        drop(first);
        bench.go.notify_one();
        assert!(second.done().await.is_ok());
        assert!(third.done().await.is_ok());
        assert_eq!(bench.started.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn the_last_one_to_leave_stops_it_and_the_next_starts_anew() {
        let bench = Bench::new();
        let (first, second) = (bench.join(), bench.join());
        drop(first);
        drop(second);
        let mut fresh = bench.join();
        assert_eq!(fresh.joined, Joined::First);
        bench.go.notify_one();
        bench.go.notify_waiters();
        assert!(fresh.done().await.is_ok());
        assert_eq!(bench.started.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn another_registry_that_claims_the_same_layer_holds_nobody_up() {
        let bench = Bench::new();
        let claimed = bench.join_at("evil.io");
        let mut own = bench.join_at("q.io");
        assert_eq!((claimed.joined, own.joined), (Joined::First, Joined::First));
        drop(claimed);
        bench.go.notify_one();
        bench.go.notify_waiters();
        assert!(own.done().await.is_ok());
    }
}

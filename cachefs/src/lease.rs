//! The host's lease: tells the coordinator which layers this host uses, so that they stay in the store.
//!
//! A layer is in use while the kernel knows any of its inodes ([`crate::filesystem::Filesystem::in_use`]) or a data-root
//! that dockerd runs on has a link to it (`roots`). That is more than what containers run from: the kernel remembers what
//! was looked at until it needs the memory, and then tells.
//!
//! A thread of its own renews the lease at a third of its life, and soon after a layer comes into use. Nothing waits for
//! it: with the coordinator down the mount reads on, and the thread tries again. An unmount gives the lease up; of a
//! daemon that was killed it expires.
//!
//! - `roots`: data-roots with links into the mount.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use coordinator_api::client::{Client, ClientError};
use coordinator_api::error::ErrorCode;
use coordinator_api::host::LeaseRequest;
use parking_lot::Mutex;
use store::Digest;

use crate::private;

pub mod roots;

/// How often it is looked at what is in use.
const TICK: Duration = Duration::from_millis(500);
/// Layers come into use together: this long after the first of them the coordinator is told.
const DEBOUNCE: Duration = Duration::from_secs(1);
/// A coordinator that takes longer to answer is asked again later.
const PATIENCE: Duration = Duration::from_secs(20);
/// An unmount does not wait longer for the coordinator.
const GOODBYE: Duration = Duration::from_millis(1500);
/// The first pause after the coordinator did not answer; it doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// How the lease stands, for `cachefs status`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// When the coordinator last renewed it.
    pub renewed: Option<Instant>,
    /// Why the last attempt failed, if it did.
    pub error: Option<String>,
}

/// When to renew: a pure timetable, fed with the present time.
#[derive(Debug)]
struct Timetable {
    /// The next regular attempt.
    due: Instant,
    /// No attempt before then, whatever comes into use.
    not_before: Instant,
    /// When something came into use that the coordinator does not know of.
    news: Option<Instant>,
    pause: Duration,
}

impl Timetable {
    fn new(now: Instant) -> Timetable {
        Timetable { due: now, not_before: now, news: None, pause: PAUSE }
    }

    /// Notes whether there is something that the coordinator does not know of.
    fn note(&mut self, has_news: bool, now: Instant) {
        self.news = has_news.then(|| self.news.unwrap_or(now));
    }

    fn is_due(&self, now: Instant) -> bool {
        let told = self.news.is_some_and(|since| now >= since + DEBOUNCE);
        now >= self.not_before && (now >= self.due || told)
    }

    /// Renewed for `life`: comes again at a third of it, a little earlier by `jitter` (0 to 1), so that hosts that started
    /// together do not come together.
    fn renewed(&mut self, life: Duration, now: Instant, jitter: f64) {
        let next = life.mul_f64((1.0 - 0.2 * jitter) / 3.0);
        *self = Timetable { due: now + next, not_before: now, news: None, pause: PAUSE };
    }

    /// Failed: comes again after a pause.
    fn failed(&mut self, now: Instant, jitter: f64) {
        self.not_before = now + self.pause.mul_f64(1.0 - 0.2 * jitter);
        self.due = self.not_before;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}

/// A number from 0 to 1 that differs from host to host.
fn jitter() -> f64 {
    let random = RandomState::new().hash_one(0u8);
    random as f64 / u64::MAX as f64
}

/// The host's id: made once in the cache directory, so that it outlives the daemon and dies with the cache.
pub fn host_id(cache: &Path) -> io::Result<String> {
    let path = cache.join("host-id");
    let is_id = |text: &str| text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match std::fs::read_to_string(&path) {
        Ok(text) if is_id(text.trim()) => return Ok(text.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().replace('-', "");
    private::replace(&path, id.as_bytes())?;
    Ok(id)
}

/// What the thread is told.
enum Order {
    /// Give the lease up, then answer.
    Release(Sender<()>),
}

/// What the daemon knows of itself.
pub trait Report {
    /// The layers in use now; asked for often.
    fn layers(&self) -> BTreeSet<Digest>;

    /// What to send, if these are in use.
    fn request(&self, layers: &BTreeSet<Digest>) -> LeaseRequest;
}

/// The lease of one daemon.
pub struct Lease {
    orders: Sender<Order>,
    /// Guards how it stands.
    standing: Arc<Mutex<Standing>>,
}

/// The thread's side.
pub struct Renewal {
    orders: Receiver<Order>,
    standing: Arc<Mutex<Standing>>,
    client: Client,
    name: String,
}

impl Lease {
    /// A lease with the coordinator behind `client`, of the host called `name`, and what its thread is to run.
    pub fn new(client: Client, name: String) -> (Lease, Renewal) {
        let (orders, received) = channel();
        let standing = Arc::new(Mutex::new(Standing::default()));
        let renewal = Renewal { orders: received, standing: Arc::clone(&standing), client, name };
        (Lease { orders, standing }, renewal)
    }

    /// How it stands.
    pub fn standing(&self) -> Standing {
        self.standing.lock().clone()
    }

    /// Gives it up; waits for the coordinator only shortly.
    pub fn release(&self) {
        let (done, told) = channel();
        if self.orders.send(Order::Release(done)).is_ok() {
            let _ = told.recv_timeout(GOODBYE + TICK);
        }
    }
}

impl Renewal {
    /// Renews until the lease is given up.
    pub fn run(self, report: &dyn Report) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return tracing::error!("the coordinator is not told what this host uses: {error}"),
        };
        let mut timetable = Timetable::new(Instant::now());
        let mut known = BTreeSet::new();
        let mut id = None;
        loop {
            match self.orders.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(Order::Release(done)) => {
                    if let Some(id) = id {
                        runtime.block_on(self.release(id));
                    }
                    let _ = done.send(());
                    return;
                }
            }
            let layers = report.layers();
            timetable.note(!layers.is_subset(&known), Instant::now());
            if !timetable.is_due(Instant::now()) {
                continue;
            }
            let request = report.request(&layers);
            let renewed = runtime.block_on(self.renew(&request));
            let now = Instant::now();
            match &renewed {
                Ok(life) => {
                    timetable.renewed(*life, now, jitter());
                    known = layers;
                    id = Some(request.id);
                }
                Err(_) => timetable.failed(now, jitter()),
            }
            self.note(renewed.map(drop), now);
        }
    }

    async fn renew(&self, request: &LeaseRequest) -> Result<Duration, String> {
        let renewing = tokio::time::timeout(PATIENCE, self.client.renew_lease(&self.name, request)).await;
        match renewing {
            Ok(Ok(granted)) => Ok(Duration::from_secs(granted.lease_seconds.max(1))),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the coordinator takes too long to answer".to_owned()),
        }
    }

    async fn release(&self, id: String) {
        match tokio::time::timeout(GOODBYE, self.client.release_lease(&self.name, &id)).await {
            Ok(Ok(_)) => {}
            Ok(Err(ClientError::Refused(detail))) if detail.code == ErrorCode::NotFound => {}
            Ok(Err(error)) => tracing::debug!("the lease is left to expire: {error}"),
            Err(_) => tracing::debug!("the lease is left to expire: the coordinator takes too long to answer"),
        }
    }

    /// Notes how the last attempt went, and logs what is new about that.
    fn note(&self, renewed: Result<(), String>, now: Instant) {
        let mut standing = self.standing.lock();
        match renewed {
            Ok(()) => {
                if standing.error.take().is_some() {
                    tracing::info!("the coordinator knows again what this host uses");
                }
                standing.renewed = Some(now);
            }
            Err(error) => {
                if standing.error.as_ref() != Some(&error) {
                    tracing::warn!("the coordinator is not told what this host uses, trying again: {error}");
                }
                standing.error = Some(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Duration = Duration::from_secs(900);

    fn seconds(n: f64) -> Duration {
        Duration::from_secs_f64(n)
    }

    #[test]
    fn it_is_renewed_at_a_third_of_its_life_and_when_there_are_news() {
        let start = Instant::now();
        let mut timetable = Timetable::new(start);
        assert!(timetable.is_due(start), "at once, when the mount is there");
        timetable.renewed(LIFE, start, 0.0);
        assert!(!timetable.is_due(start + seconds(299.0)) && timetable.is_due(start + seconds(300.0)));
        timetable.renewed(LIFE, start, 1.0);
        assert!(!timetable.is_due(start + seconds(239.0)) && timetable.is_due(start + seconds(240.0)));
        timetable.note(true, start + seconds(10.0));
        timetable.note(true, start + seconds(10.9));
        assert!(!timetable.is_due(start + seconds(10.9)) && timetable.is_due(start + seconds(11.0)));
        timetable.note(false, start + seconds(12.0));
        assert!(!timetable.is_due(start + seconds(12.0)), "what was let go of again is no news");
    }

    #[test]
    fn pauses_double_and_news_do_not_shorten_them() {
        let mut now = Instant::now();
        let mut timetable = Timetable::new(now);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            timetable.failed(now, 0.0);
            timetable.note(true, now);
            pauses.push((timetable.due - now).as_secs());
            assert!(!timetable.is_due(timetable.due - Duration::from_millis(1)) && timetable.is_due(timetable.due));
            now = timetable.due;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        timetable.renewed(LIFE, now, 0.0);
        timetable.failed(now, 0.0);
        assert_eq!((timetable.due - now).as_secs(), 1, "from the beginning");
    }

    #[test]
    fn the_id_lives_as_long_as_the_cache() {
        let cache = tempfile::tempdir().unwrap();
        let id = host_id(cache.path()).unwrap();
        assert_eq!(id.len(), 32);
        assert_eq!(host_id(cache.path()).unwrap(), id);
        std::fs::write(cache.path().join("host-id"), "damaged").unwrap();
        assert_ne!(host_id(cache.path()).unwrap(), id);
        assert_ne!(host_id(tempfile::tempdir().unwrap().path()).unwrap(), id);
    }
}

//! The host's lease: tells the coordinator which layers this host uses, so that they stay in the store.
//!
//! A layer is in use while the kernel knows any of its inodes ([`crate::filesystem::Filesystem::in_use`]) or a
//! container engine has a link to it (`roots`). That is more than what containers run from: the kernel
//! remembers what was looked at until it needs the memory, and then tells the daemon.
//!
//! A thread of its own renews the lease at a third of its life, and soon after a layer comes into use. Nothing waits
//! for that thread: with the coordinator down the mount reads on, and the thread tries again. An unmount releases the
//! lease; the lease of a daemon that was killed expires.
//!
//! - `roots`: directories of engines with links into the mount.

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

use crate::os::private_files;
use crate::uplink::coordinator::{AskError, Coordinator};

pub mod roots;

/// How often the thread looks at what is in use.
const TICK: Duration = Duration::from_millis(500);
/// Layers come into use together: the coordinator is told this long after the first of them.
const DEBOUNCE: Duration = Duration::from_secs(1);
/// A coordinator that takes longer to answer is asked again later.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How long an unmount waits for the coordinator.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(1500);
/// The first pause after the coordinator did not answer; it doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The state of the lease, for `cachefs status`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeaseStatus {
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

    /// Notes a renewal for `life`. The next one is due at a third of that, or up to a fifth earlier with `jitter` (0 to
    /// 1), so that hosts that started together do not renew together.
    fn renewed(&mut self, life: Duration, now: Instant, jitter: f64) {
        let next = life.mul_f64((1.0 - 0.2 * jitter) / 3.0);
        *self = Timetable { due: now + next, not_before: now, news: None, pause: PAUSE };
    }

    /// Notes a failed attempt: the next one comes after a pause.
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

/// The host's id. It is made once and kept in the cache directory, so that it outlives the daemon and dies with the
/// cache.
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
    private_files::replace(&path, id.as_bytes())?;
    Ok(id)
}

/// A command to the lease's thread.
enum Command {
    /// Release the lease, then answer.
    Release(Sender<()>),
}

/// What the daemon reports about itself.
pub trait Report {
    /// The layers in use now; asked for often.
    fn layers(&self) -> BTreeSet<Digest>;

    /// The request to send if these layers are in use.
    fn request(&self, layers: &BTreeSet<Digest>) -> LeaseRequest;
}

/// The lease of one daemon.
pub struct Lease {
    commands: Sender<Command>,
    /// Guards the state of the lease.
    status: Arc<Mutex<LeaseStatus>>,
}

/// The part that the lease's thread runs.
pub struct Renewal {
    commands: Receiver<Command>,
    status: Arc<Mutex<LeaseStatus>>,
    client: Client,
    name: String,
}

impl Lease {
    /// A lease with the coordinator behind `client`, of the host called `name`, and what its thread is to run.
    pub fn new(client: Client, name: String) -> (Lease, Renewal) {
        let (commands, received) = channel();
        let status = Arc::new(Mutex::new(LeaseStatus::default()));
        let renewal = Renewal { commands: received, status: Arc::clone(&status), client, name };
        (Lease { commands, status }, renewal)
    }

    /// The state of the lease.
    pub fn status(&self) -> LeaseStatus {
        self.status.lock().clone()
    }

    /// Releases the lease; waits only briefly for the coordinator.
    pub fn release(&self) {
        let (done, told) = channel();
        if self.commands.send(Command::Release(done)).is_ok() {
            let _ = told.recv_timeout(RELEASE_TIMEOUT + TICK);
        }
    }
}

impl Renewal {
    /// Renews the lease until it is released.
    pub fn run(self, report: &dyn Report) {
        let coordinator = match Coordinator::new(self.client) {
            Ok(coordinator) => coordinator,
            Err(error) => return tracing::error!("the coordinator is not told what this host uses: {error}"),
        };
        let mut timetable = Timetable::new(Instant::now());
        let mut known = BTreeSet::new();
        let mut id: Option<String> = None;
        loop {
            match self.commands.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(Command::Release(done)) => {
                    if let Some(id) = id {
                        release(&coordinator, &self.name, &id);
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
            let renewed = renew(&coordinator, &self.name, &request);
            let now = Instant::now();
            match &renewed {
                Ok(life) => {
                    timetable.renewed(*life, now, jitter());
                    known = layers;
                    id = Some(request.id);
                }
                Err(_) => timetable.failed(now, jitter()),
            }
            note(&self.status, renewed.map(drop), now);
        }
    }
}

/// Renews the lease of the host called `name`; returns how long it lives from now.
fn renew(coordinator: &Coordinator, name: &str, request: &LeaseRequest) -> Result<Duration, String> {
    let granted = coordinator.ask(TIMEOUT, async |client| client.renew_lease(name, request).await);
    granted.map(|granted| Duration::from_secs(granted.lease_seconds.max(1))).map_err(|error| error.to_string())
}

/// Releases the lease; one that cannot be released expires.
fn release(coordinator: &Coordinator, name: &str, id: &str) {
    match coordinator.ask(RELEASE_TIMEOUT, async |client| client.release_lease(name, id).await) {
        Ok(_) => {}
        Err(AskError::Client(ClientError::Refused(detail))) if detail.code == ErrorCode::NotFound => {}
        Err(error) => tracing::debug!("the lease is left to expire: {error}"),
    }
}

/// Notes the outcome of the last attempt, and logs what is new about it.
fn note(status: &Mutex<LeaseStatus>, renewed: Result<(), String>, now: Instant) {
    let mut status = status.lock();
    match renewed {
        Ok(()) => {
            if status.error.take().is_some() {
                tracing::info!("the coordinator knows again what this host uses");
            }
            status.renewed = Some(now);
        }
        Err(error) => {
            if status.error.as_ref() != Some(&error) {
                tracing::warn!("the coordinator is not told what this host uses, trying again: {error}");
            }
            status.error = Some(error);
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

//! What pulling may use up, enforced where it is used: slots for layers, bytes a second, requests; and how registries stand.
//!
//! ```text
//!  a layer   ── place() ──▶ waits for room in all and at its registry, the most urgent first
//!  a request ── admit() ──▶ waits while the breaker is open, the registry asked to wait, or the minute's requests are spent
//!  an answer ── report() ─▶ turns the breakers, notes Retry-After and rate-limit headers
//!  bytes     ── spend() ──▶ waits until the buckets have paid for them
//! ```
//!
//! Whom an answer holds up: 429 with `Retry-After` holds all of its registry; a fault with `Retry-After` (503) that a document is
//! answered with holds its repository, any other its registry; neither for long at the first time ([`pause`]). Headers that say that
//! no requests are left slow manifests down and hold nothing: the registry still answers, and says 429 when it does not.
//!
//! Rules may change at any moment and hold for whatever waits already. `state` guards everything and is never held across
//! an await.

pub mod breaker;
pub mod bucket;
pub mod jobs;
pub mod pause;
pub mod priority;
pub mod rate_limit;
pub mod rules;
pub mod slots;
pub mod speed;
mod standing;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::limits::RegistryCondition;
use jiff::Timestamp;
use parking_lot::Mutex;
use store::image::ImageRef;
use tokio::sync::Notify;

use crate::registries::limits::breaker::{Pass, Turn};
use crate::registries::limits::bucket::Bucket;
use crate::registries::limits::priority::Waiters;
use crate::registries::limits::rate_limit::RateLimit;
use crate::registries::limits::rules::Rules;
use crate::registries::limits::slots::{Capacity, Slots, beyond};
use crate::registries::limits::standing::{Registry, its};
use crate::state::clock::{Clock, SystemClock, after, until};

/// The longest sleep without a look at the rules, which may have changed.
const SLICE: Duration = Duration::from_secs(1);

/// How long a request waits for its repository: a short fault is to be waited out, but those who wait have slots that others need.
/// Jobs that have not begun wait without one.
const REPOSITORYS_PATIENCE: Duration = Duration::from_secs(20);

/// More registries than these are not remembered when nothing is going on with them.
const MOST_REGISTRIES: usize = 1000;

/// Layers at a time when nothing says otherwise: what dockerd does (max-concurrent-downloads).
pub const DEFAULT_PARALLEL_LAYERS: usize = 3;

/// What kind of request goes out; registries count them differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// A manifest: what Docker Hub counts.
    Manifest,
    /// Anything else.
    Other,
}

/// Who is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target<'a> {
    /// The registry, or a token service.
    pub registry: &'a str,
    /// Of which repository something is asked for; nothing when it is the registry itself that is asked.
    pub repository: Option<&'a str>,
}

impl<'a> Target<'a> {
    /// The registry itself.
    pub fn registry(registry: &'a str) -> Target<'a> {
        Target { registry, repository: None }
    }
}

/// How a request ended, as far as limits care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// An answer that tells of what was asked for.
    Answered,
    /// An answer that tells that somebody is there, and no more: who we are does not do, or we ask too often, or it leads where we do
    /// not go.
    Refused,
    /// No answer of the registry, in words.
    Unanswered(String),
    /// A fault, in words: of the registry where that was asked itself, else of the repository or of the storage that it lies in.
    Failed(String),
    /// It asks us to wait before we ask again.
    AskedToWait {
        /// How long.
        wait: Duration,
        /// Whether it is a fault (503) rather than a limit (429).
        fault: Option<String>,
    },
}

/// What keeps a request back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldBy {
    /// How the registry stands, or what we allow for it.
    Registry,
    /// That its repository fails.
    Repository,
    /// A wish of theirs (`Retry-After`).
    Wish,
}

/// Why a request does not go out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// By what.
    pub by: HeldBy,
    /// Until when.
    pub until: Timestamp,
    /// In words.
    pub why: String,
}

/// Something about a registry that people want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistryNews {
    /// Its breaker has opened.
    Opened {
        /// The registry.
        registry: String,
        /// Until when.
        until: Timestamp,
        /// The last failure.
        why: String,
    },
    /// Its breaker has closed again.
    Closed {
        /// The registry.
        registry: String,
    },
}

struct State {
    rules: Arc<Rules>,
    registries: HashMap<String, Registry>,
    bytes: Bucket,
    slots: Slots,
    news: Vec<RegistryNews>,
}

impl State {
    fn registry(&mut self, name: &str, now: Timestamp) -> &mut Registry {
        if self.registries.len() >= MOST_REGISTRIES && !self.registries.contains_key(name) {
            // Registries name token services as they like.
            self.registries.retain(|_, registry| !registry.is_idle(now));
            if self.registries.len() >= MOST_REGISTRIES {
                self.registries.retain(|_, registry| registry.speed.active() > 0);
            }
        }
        self.registries.entry(name.to_owned()).or_insert_with(|| Registry::new(now, None))
    }
}

/// All limits of one coordinator.
pub struct Limits {
    clock: Arc<dyn Clock>,
    /// Layers at a time when the rules do not say.
    parallel_layers: usize,
    state: Mutex<State>,
    /// Rung when a place becomes free, rules change, or a breaker turns.
    changed: Notify,
}

impl std::fmt::Debug for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limits").finish_non_exhaustive()
    }
}

/// How many layers may be fetched at a time, by the rules.
struct LayerCapacity<'a> {
    rules: &'a Rules,
    default: usize,
}

impl Capacity for LayerCapacity<'_> {
    fn in_all(&self) -> usize {
        self.rules.parallel_layers.unwrap_or(self.default)
    }

    fn of(&self, registry: &str) -> usize {
        self.rules.registry(registry).parallel_layers.unwrap_or(usize::MAX)
    }

    fn beyond(&self) -> usize {
        beyond(self.in_all())
    }
}

/// A place among the parallel fetches; given back when dropped.
pub struct Place {
    limits: Arc<Limits>,
    registry: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        let now = self.limits.clock.now();
        let mut state = self.limits.state.lock();
        state.slots.give_back(&self.registry);
        state.registry(&self.registry, now).speed.end(now);
        drop(state);
        self.limits.changed.notify_waiters();
    }
}

/// A ticket in the queue for a place; given up when dropped.
struct Ticket<'a> {
    limits: &'a Limits,
    number: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.limits.state.lock().slots.leave(self.number);
        self.limits.changed.notify_waiters();
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits::new(Arc::new(SystemClock), DEFAULT_PARALLEL_LAYERS)
    }
}

impl Limits {
    /// Without rules.
    pub fn new(clock: Arc<dyn Clock>, parallel_layers: usize) -> Limits {
        let state = State {
            rules: Arc::default(),
            registries: HashMap::new(),
            bytes: Bucket::new(clock.now()),
            slots: Slots::default(),
            news: Vec::new(),
        };
        Limits { clock, parallel_layers, state: Mutex::new(state), changed: Notify::new() }
    }

    /// The time that limits go by.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Other rules from now on.
    pub fn set(&self, rules: Rules) {
        self.state.lock().rules = Arc::new(rules);
        self.changed.notify_waiters();
    }

    /// The present rules.
    pub fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.state.lock().rules)
    }

    /// What was measured before a restart.
    pub fn remember_speed(&self, registry: &str, speed: f64) {
        let now = self.clock.now();
        self.state.lock().registries.insert(registry.to_owned(), Registry::new(now, Some(speed)));
    }

    /// Measured bytes a second of each registry, and of those not met yet nothing.
    pub fn speeds(&self) -> Vec<(String, f64)> {
        let state = self.state.lock();
        let known =
            state.registries.iter().filter_map(|(name, registry)| Some((name.clone(), registry.speed.average()?)));
        known.collect()
    }

    /// Measured bytes a second of one registry.
    pub fn speed(&self, registry: &str) -> Option<f64> {
        self.state.lock().registries.get(registry)?.speed.average()
    }

    /// What a registry last said of requests to come.
    pub fn allowance(&self, registry: &str) -> Option<RateLimit> {
        let now = self.clock.now();
        self.state.lock().registries.get(registry)?.allowance.filter(|allowance| now < allowance.more_at)
    }

    /// Why nothing goes out to a registry at present.
    pub fn held(&self, registry: &str) -> Option<Held> {
        let now = self.clock.now();
        self.state.lock().registries.get(registry)?.held(now, None)
    }

    /// Until when nothing of an image is asked for because its registry wished so, if it did.
    pub fn asked_to_wait(&self, image: &ImageRef) -> Option<Timestamp> {
        self.held_from(image).filter(|held| held.by == HeldBy::Wish).map(|held| held.until)
    }

    /// Why nothing of an image is asked for at present; then its jobs need not be started.
    pub fn held_from(&self, image: &ImageRef) -> Option<Held> {
        let now = self.clock.now();
        self.state.lock().registries.get(image.registry())?.held(now, Some(image.path()))
    }

    /// What is wrong where an image comes from, if the last request failed.
    pub fn trouble(&self, image: &ImageRef) -> Option<String> {
        let (registry, path) = (image.registry(), image.path());
        let state = self.state.lock();
        let known = state.registries.get(registry)?;
        if known.own.breaker.failures() > 0 {
            return Some(format!("registry {registry} gives no answer: {}", known.own.why_open("it")));
        }
        let standing = known.repositories.get(path).filter(|standing| standing.breaker.failures() > 0)?;
        Some(format!("registry {registry} fails: {}", standing.why_open(&its(path))))
    }

    /// What happened to breakers since the last call.
    pub fn take_news(&self) -> Vec<RegistryNews> {
        std::mem::take(&mut self.state.lock().news)
    }

    /// Waits for a place to fetch one layer from `registry`, for those who want it.
    pub async fn place(self: &Arc<Self>, registry: &str, waiters: &Arc<Waiters>) -> Place {
        let now = self.clock.now();
        let ticket = Ticket { limits: self, number: self.state.lock().slots.queue(registry, waiters, now) };
        loop {
            let mut freed = std::pin::pin!(self.changed.notified());
            // From here on nothing that rings is missed.
            freed.as_mut().enable();
            let now = self.clock.now();
            let taken = {
                let mut state = self.state.lock();
                let rules = Arc::clone(&state.rules);
                let capacity = LayerCapacity { rules: &rules, default: self.parallel_layers };
                let taken = state.slots.take(ticket.number, &capacity, now);
                if taken {
                    state.registry(registry, now).speed.begin(now);
                }
                taken
            };
            if taken {
                return Place { limits: Arc::clone(self), registry: registry.to_owned() };
            }
            freed.await;
        }
    }

    /// Waits until a request, or a probe of the registry, may go out; refuses when that is later than `patience` from now.
    pub async fn admit(&self, target: Target<'_>, kind: RequestKind, patience: Duration) -> Result<Pass, Held> {
        let deadline = after(self.clock.now(), patience);
        loop {
            let held = match self.try_admit(target, kind) {
                Ok(pass) => return Ok(pass),
                Err(held) => held,
            };
            let latest = match held.by {
                HeldBy::Registry | HeldBy::Wish => deadline,
                HeldBy::Repository => deadline.min(after(self.clock.now(), REPOSITORYS_PATIENCE)),
            };
            if held.until > latest {
                return Err(held);
            }
            let wait = until(self.clock.now(), held.until).clamp(Duration::from_millis(1), SLICE);
            let _ = tokio::time::timeout(wait, self.changed.notified()).await;
        }
    }

    fn try_admit(&self, target: Target<'_>, kind: RequestKind) -> Result<Pass, Held> {
        let now = self.clock.now();
        let mut state = self.state.lock();
        let rules = Arc::clone(&state.rules);
        let registry = state.registry(target.registry, now);
        if let Some(held) = registry.held(now, target.repository) {
            return Err(held);
        }
        if let (RequestKind::Manifest, Some(until)) = (kind, registry.next_manifest(now)) {
            return Err(Held { by: HeldBy::Registry, until, why: "its rate limit is used up".to_owned() });
        }
        let rate = rules.registry(target.registry).requests_per_minute;
        if let Some(requests) = rate {
            let wait = registry.requests.wait(now, f64::from(requests) / 60.0);
            if !wait.is_zero() {
                return Err(Held {
                    by: HeldBy::Registry,
                    until: after(now, wait),
                    why: format!("{requests} requests a minute are allowed"),
                });
            }
        }
        let pass = registry.admit(now, target.repository)?;
        if let Some(requests) = rate {
            registry.requests.take(now, 1.0, f64::from(requests) / 60.0);
        }
        if (kind, pass) == (RequestKind::Manifest, Pass::Go) {
            registry.share(now);
        }
        Ok(pass)
    }

    /// Says how a request ended, and what the registry said of those to come.
    pub fn report(&self, target: Target<'_>, outcome: Outcome, allowance: Option<RateLimit>) {
        let now = self.clock.now();
        let mut state = self.state.lock();
        let registry = state.registry(target.registry, now);
        if let Some(said) = allowance {
            registry.allowance = Some(RateLimit { more_at: said.more_at.min(after(now, pause::LONGEST)), ..said });
            registry.share(now);
        }
        let [own, its] = registry.note(target.repository, outcome, now);
        if let (Turn::Opened(until), Some(name)) = (its, target.repository) {
            let why = registry.repositories.get(name).map(|standing| standing.failure.as_str()).unwrap_or_default();
            tracing::warn!(
                "repository {name} of {} is left alone until {until}: it keeps failing ({why})",
                target.registry
            );
        }
        let is_turned = tell(&mut state, target.registry, own) | (its != Turn::Same);
        drop(state);
        if is_turned {
            self.changed.notify_waiters();
        }
    }

    /// Says that a transfer was broken off because it came too slowly: enough of these open the breaker, though the registry
    /// answers.
    pub fn stalled(&self, name: &str, why: String) {
        let now = self.clock.now();
        let mut state = self.state.lock();
        let registry = state.registry(name, now);
        registry.own.failure = why;
        let turn = registry.own.breaker.stalled(now);
        let is_turned = tell(&mut state, name, turn);
        drop(state);
        if is_turned {
            self.changed.notify_waiters();
        }
    }

    /// Says that a transfer came as fast as it must.
    pub fn flowed(&self, name: &str) {
        let now = self.clock.now();
        self.state.lock().registry(name, now).own.breaker.flowed();
    }

    /// Counts bytes that came from `registry` and waits until the limits have paid for them.
    pub async fn spend(&self, registry: &str, bytes: u64) {
        {
            let now = self.clock.now();
            let mut state = self.state.lock();
            state.registry(registry, now).speed.add(now, bytes);
            self.rates(&mut state, registry, now, |bucket, rate| bucket.take(now, bytes as f64, rate));
        }
        loop {
            let now = self.clock.now();
            let mut wait = Duration::ZERO;
            {
                let mut state = self.state.lock();
                self.rates(&mut state, registry, now, |bucket, rate| wait = wait.max(bucket.wait(now, rate)));
                if wait.is_zero() {
                    return;
                }
                state.registry(registry, now).speed.hold();
            }
            let _ = tokio::time::timeout(wait.min(SLICE), self.changed.notified()).await;
        }
    }

    /// Calls `each` with every bucket that bytes from `registry` pass, and its rate.
    fn rates(&self, state: &mut State, registry: &str, now: Timestamp, mut each: impl FnMut(&mut Bucket, f64)) {
        let rules = Arc::clone(&state.rules);
        if let Some(rate) = rules.bandwidth_at(now) {
            each(&mut state.bytes, rate as f64);
        }
        if let Some(rate) = rules.registry(registry).bandwidth {
            each(&mut state.registry(registry, now).bytes, rate as f64);
        }
    }

    /// How the registries stand, by name.
    pub fn view(&self) -> Vec<RegistryCondition> {
        let now = self.clock.now();
        let state = self.state.lock();
        let condition = |(name, registry): (&String, &Registry)| {
            let held = registry.held(now, None);
            RegistryCondition {
                registry: name.clone(),
                breaker: registry.own.breaker.view(),
                failures: registry.own.breaker.failures(),
                waits_until: held.as_ref().map(|held| held.until),
                why: held.map(|held| held.why),
                rate_limit_remaining: registry.allowance.map(|allowance| allowance.remaining),
                fetching: state.slots.of(name),
                bytes_per_second: registry.speed.average().map(|speed| speed as u64),
            }
        };
        // Archives have no registry, but take slots like everybody.
        let registries = state.registries.iter().filter(|(name, _)| !name.is_empty());
        let mut conditions: Vec<_> = registries.map(condition).collect();
        conditions.sort_by(|a, b| a.registry.cmp(&b.registry));
        conditions
    }
}

/// Notes how a registry's breaker turned; whether it did.
fn tell(state: &mut State, name: &str, turn: Turn) -> bool {
    let registry = name.to_owned();
    match turn {
        Turn::Same => return false,
        Turn::Cleared => {}
        Turn::Opened(until) => {
            let why = state.registries.get(name).map(|registry| registry.own.failure.clone()).unwrap_or_default();
            state.news.push(RegistryNews::Opened { registry, until, why });
        }
        Turn::Closed => state.news.push(RegistryNews::Closed { registry }),
    }
    true
}

#[cfg(test)]
mod tests;

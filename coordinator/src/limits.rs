//! What pulling may use up, enforced where it is used: places for layers, bytes a second, requests; and how registries stand.
//!
//! ```text
//!  a layer   ── place() ──▶ waits for room in all and at its registry, the most urgent first
//!  a request ── admit() ──▶ waits while the breaker is open, the registry asked to wait, or the minute's requests are spent
//!  an answer ── report() ─▶ turns the breaker, notes Retry-After and rate-limit headers
//!  bytes     ── spend() ──▶ waits until the buckets have paid for them
//! ```
//!
//! Rules may change at any moment and hold for whatever waits already. `state` guards everything and is never held across
//! an await.

pub mod allowance;
pub mod breaker;
pub mod bucket;
pub mod jobs;
pub mod places;
pub mod rules;
pub mod speed;
pub mod turn;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::limits::RegistryCondition;
use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::clock::{Clock, SystemClock, until};
use crate::limits::allowance::Allowance;
use crate::limits::breaker::{Breaker, Turn};
use crate::limits::bucket::Bucket;
use crate::limits::places::{Places, Room};
use crate::limits::rules::Rules;
use crate::limits::speed::Speed;
use crate::limits::turn::Beneficiaries;

/// The longest sleep without a look at the rules, which may have changed.
const SLICE: Duration = Duration::from_secs(1);

/// A registry that asks for more is asked again after this: it may have meant one repository, or have been mistaken.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

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

/// How a request ended, as far as limits care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// An answer, of whatever content.
    Answered,
    /// No answer, or a fault of the registry, in words.
    Failed(String),
    /// It asks us to wait before we ask again.
    AskedToWait {
        /// How long.
        wait: Duration,
        /// Whether it is a fault (503) rather than a limit (429).
        fault: Option<String>,
    },
}

/// Why a request does not go out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
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

struct Registry {
    breaker: Breaker,
    failure: String,
    paused_until: Timestamp,
    allowance: Option<Allowance>,
    requests: Bucket,
    bytes: Bucket,
    speed: Speed,
}

impl Registry {
    fn new(now: Timestamp, speed: Option<f64>) -> Registry {
        Registry {
            breaker: Breaker::default(),
            failure: String::new(),
            paused_until: Timestamp::UNIX_EPOCH,
            allowance: None,
            requests: Bucket::new(now),
            bytes: Bucket::new(now),
            speed: Speed::new(speed),
        }
    }

    /// Why nothing goes out at `now`, the breaker's probe apart.
    fn held(&self, now: Timestamp) -> Option<Held> {
        let open = self.breaker.opens_at(now).map(|until| Held { until, why: self.why_open() });
        let paused = (now < self.paused_until)
            .then(|| Held { until: self.paused_until, why: "the registry asked us to wait".to_owned() });
        open.into_iter().chain(paused).max_by_key(|held| held.until)
    }

    fn why_open(&self) -> String {
        match self.breaker.is_slow() {
            true => format!("it sends too slowly, last: {}", self.failure),
            false => match self.breaker.failures() {
                1 => format!("it failed: {}", self.failure),
                failures => format!("it failed {failures} times in a row, last with: {}", self.failure),
            },
        }
    }

    /// Whether forgetting it loses nothing but a measured speed.
    fn is_idle(&self, now: Timestamp) -> bool {
        let is_due = |allowance: &Allowance| now < allowance.more_at;
        self.speed.active() == 0
            && self.breaker == Breaker::default()
            && self.paused_until <= now
            && !self.allowance.as_ref().is_some_and(is_due)
    }
}

struct State {
    rules: Arc<Rules>,
    registries: HashMap<String, Registry>,
    bytes: Bucket,
    places: Places,
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

struct Rooms<'a> {
    rules: &'a Rules,
    default: usize,
}

impl Room for Rooms<'_> {
    fn in_all(&self) -> usize {
        self.rules.parallel_layers.unwrap_or(self.default)
    }

    fn of(&self, registry: &str) -> usize {
        self.rules.registry(registry).parallel_layers.unwrap_or(usize::MAX)
    }

    fn beyond(&self) -> usize {
        places::beyond(self.in_all())
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
        state.places.give_back(&self.registry);
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
        self.limits.state.lock().places.leave(self.number);
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
            places: Places::default(),
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
    pub fn allowance(&self, registry: &str) -> Option<Allowance> {
        let now = self.clock.now();
        self.state.lock().registries.get(registry)?.allowance.filter(|allowance| now < allowance.more_at)
    }

    /// Why nothing goes out to a registry at present; then its jobs need not be started.
    pub fn held(&self, registry: &str) -> Option<Held> {
        let now = self.clock.now();
        self.state.lock().registries.get(registry)?.held(now)
    }

    /// Until when a registry has asked us to wait, if it has.
    pub fn asked_to_wait(&self, registry: &str) -> Option<Timestamp> {
        let now = self.clock.now();
        self.state.lock().registries.get(registry).map(|known| known.paused_until).filter(|until| *until > now)
    }

    /// What is wrong with a registry whose last request failed.
    pub fn trouble(&self, registry: &str) -> Option<String> {
        let state = self.state.lock();
        let known = state.registries.get(registry).filter(|known| known.breaker.failures() > 0)?;
        Some(format!("registry {registry} gives no answer: {}", known.why_open()))
    }

    /// What happened to breakers since the last call.
    pub fn take_news(&self) -> Vec<RegistryNews> {
        std::mem::take(&mut self.state.lock().news)
    }

    /// Waits for a place to fetch one layer from `registry`, for those who want it.
    pub async fn place(self: &Arc<Self>, registry: &str, whom_for: &Arc<Beneficiaries>) -> Place {
        let now = self.clock.now();
        let ticket = Ticket { limits: self, number: self.state.lock().places.queue(registry, whom_for, now) };
        loop {
            let mut freed = std::pin::pin!(self.changed.notified());
            // From here on nothing that rings is missed.
            freed.as_mut().enable();
            let now = self.clock.now();
            let taken = {
                let mut state = self.state.lock();
                let rules = Arc::clone(&state.rules);
                let rooms = Rooms { rules: &rules, default: self.parallel_layers };
                let taken = state.places.take(ticket.number, &rooms, now);
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

    /// Waits until a request may go out to `registry`; refuses when that is later than `patience` from now.
    pub async fn admit(&self, registry: &str, kind: RequestKind, patience: Duration) -> Result<(), Held> {
        let deadline = crate::clock::after(self.clock.now(), patience);
        loop {
            let held = match self.try_admit(registry, kind) {
                Ok(()) => return Ok(()),
                Err(held) => held,
            };
            if held.until > deadline {
                return Err(held);
            }
            let wait = until(self.clock.now(), held.until).clamp(Duration::from_millis(1), SLICE);
            let _ = tokio::time::timeout(wait, self.changed.notified()).await;
        }
    }

    fn try_admit(&self, name: &str, kind: RequestKind) -> Result<(), Held> {
        let now = self.clock.now();
        let mut state = self.state.lock();
        let rules = Arc::clone(&state.rules);
        let registry = state.registry(name, now);
        if let Some(held) = registry.held(now) {
            return Err(held);
        }
        let spent = registry.allowance.filter(|allowance| allowance.remaining == 0 && now < allowance.more_at);
        if let (Some(allowance), RequestKind::Manifest) = (spent, kind) {
            return Err(Held { until: allowance.more_at, why: "its rate limit is used up".to_owned() });
        }
        if let Some(requests) = rules.registry(name).requests_per_minute {
            let rate = f64::from(requests) / 60.0;
            let wait = registry.requests.wait(now, rate);
            if !wait.is_zero() {
                let why = format!("{requests} requests a minute are allowed");
                return Err(Held { until: crate::clock::after(now, wait), why });
            }
            registry.requests.take(now, 1.0, rate);
        }
        registry.breaker.admit(now).map_err(|until| Held { until, why: registry.why_open() })
    }

    /// Says how a request ended.
    pub fn report(&self, name: &str, outcome: Outcome, allowance: Option<Allowance>) {
        let now = self.clock.now();
        let mut state = self.state.lock();
        let registry = state.registry(name, now);
        let latest = crate::clock::after(now, LONGEST_PAUSE);
        let allowance = allowance.map(|said| Allowance { more_at: said.more_at.min(latest), ..said });
        registry.allowance = allowance.or(registry.allowance);
        let turn = match outcome {
            Outcome::Answered | Outcome::AskedToWait { fault: None, .. } => registry.breaker.succeeded(),
            Outcome::Failed(ref why) | Outcome::AskedToWait { fault: Some(ref why), .. } => {
                registry.failure.clone_from(why);
                registry.breaker.failed(now)
            }
        };
        if let Outcome::AskedToWait { wait, .. } = outcome {
            registry.paused_until = registry.paused_until.max(crate::clock::after(now, wait.min(LONGEST_PAUSE)));
        }
        let is_turned = tell(&mut state, name, turn);
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
        registry.failure = why;
        let turn = registry.breaker.stalled(now);
        let is_turned = tell(&mut state, name, turn);
        drop(state);
        if is_turned {
            self.changed.notify_waiters();
        }
    }

    /// Says that a transfer came as fast as it must.
    pub fn flowed(&self, name: &str) {
        let now = self.clock.now();
        self.state.lock().registry(name, now).breaker.flowed();
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
            let held = registry.held(now);
            RegistryCondition {
                registry: name.clone(),
                breaker: registry.breaker.view(),
                failures: registry.breaker.failures(),
                waits_until: held.as_ref().map(|held| held.until),
                why: held.map(|held| held.why),
                rate_limit_remaining: registry.allowance.map(|allowance| allowance.remaining),
                fetching: state.places.of(name),
                bytes_per_second: registry.speed.average().map(|speed| speed as u64),
            }
        };
        // Archives have no registry, but take places like everybody.
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
        Turn::Opened(until) => {
            let why = state.registries.get(name).map(|registry| registry.failure.clone()).unwrap_or_default();
            state.news.push(RegistryNews::Opened { registry, until, why });
        }
        Turn::Closed => state.news.push(RegistryNews::Closed { registry }),
    }
    true
}

#[cfg(test)]
mod tests;
